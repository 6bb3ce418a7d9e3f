"""Pipeline parallelism: which layers a stage holds, and when it runs which micro-batch.

layers -> stages (stages, split) -> schedule (schedule) -> forward and backward
                                 -> evaluation order (evaluation_order)
"""
