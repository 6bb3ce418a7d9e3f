"""Read a config file: execute it, apply overrides, and record where each value came from.

    CONFIG.py, --set  ->  ConfigSource  ->  ConfigDraft  ->  resolved sections
       overrides             source            draft          spellings, ignored_keys

``source_lines`` finds the line of each key, ``origins`` says for each resolved value where it was set.
"""
