"""Read, write, verify and repair token files: ``X.bin`` with ``X.bin.meta`` and ``X.bin.json`` beside it.

    folder  ->  X.bin + X.bin.meta  ->  lines  ->  tokens
          folders          meta, bin_dataset    lines

``writer`` goes the other way, ``cache`` stores the tokens in binary form, ``shared_index`` keeps one index per node.
``verify`` and ``repair`` trust only the lines.
"""
