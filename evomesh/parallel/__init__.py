"""Grid of ranks, tensor modes, shard specs, and the only home of collectives.

ParallelConfig ──► axis members ──► process groups ──► Grid ──► collectives
 config/layout       build            build           grid      collectives, exchange
                                                       └──────► the shard of each parameter: spec
"""
