"""Load and check config files. Never imports torch.

    CONFIG.py, --set  ->  values  ->  resolved keys  ->  Config  ->  findings, warnings
               reading/source   reading/spellings   schema   rules, layout

``loader.load_config`` runs the whole line and reports all problems at once. ``explain`` describes a key, ``record``
turns a Config into plain values for a checkpoint and back, ``size`` counts its parameters and tokens.
"""
