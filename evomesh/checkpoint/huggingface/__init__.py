"""Read and write model folders in the Hugging Face layout.

    folder  ->  tensors and config  ->  native checkpoint        to_native.py (folder, files, config, names, load)
    native checkpoint  ->  folder   ->  compared logits          export.py (config, names, tokenizer, compare_logits)

``checklist`` checks that a folder is ready for inference engines.
"""
