"""Pipeline parallelism: the layers of each stage, and the order in which micro-batches run through the stages."""
