"""Save, find, verify and load the state of a run, in any parallel layout.

    training state  ->  native/  ->  resume.py    resume the run
                                 ->  restore.py   model and tokenizer, for generate, serve, eval and export

``loaders`` loads what a config names, in any format; ``detect`` tells formats apart. ``huggingface/``,
``internevo/`` and ``deepspeed/`` convert from and to the formats of other systems; ``pickles`` opens the ``.pt`` files
of the last two without running code that they name.
"""
