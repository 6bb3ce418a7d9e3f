"""Jobs for a cluster's scheduler: what is written from a config, and what is checked before it is submitted.

config -> checks (layout, time, partition) -> SlurmJob -> batch script -> sbatch
"""
