"""Read XTuner's configs, which are mmengine's, without either package, and translate them into ours.

    CONFIG.py, overrides  ->  XTunerFile  ->  XTunerSettings  ->  Translation  ->  ConfigSource
       foreign_names            file            settings           translate        (reading/source.py)

``model``, ``data``, ``optimizer`` and ``runtime`` translate one part each; ``inert`` lists what has no meaning here.
"""
