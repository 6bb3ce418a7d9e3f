"""Does a layout train like one process? Two steps of a small model in both, every tensor compared.

    config   --shrink.py-->   a small config with the same features and divisibility
    both     --observe.py-->  what modules and the optimizer computed, by name
    these    --compare.py-->  the first tensor that differs, by module and direction

``run.py`` does all of it: ``train_alone``, then ``compare_with``.
"""
