"""Models: one decoder that all built-in families share, and a registry for custom ones.

    model_type -> registry -> family (llama, qwen, ...) -> decoder.Decoder
                               facts: names, switches      algebra on one pack

A model meets the interface in ``language_model``; training and generation ask for
nothing else.
"""
