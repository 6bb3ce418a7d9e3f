"""Pipeline parallelism: which layers a stage holds, and the order in which micro-batches run through the stages."""
