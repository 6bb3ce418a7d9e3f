"""Find the rank that stopped a run, and say where it is stuck.

this_process()  -> activity.py      each rank records what it enters and leaves
     |
 ring file      -> ring.py          in shared memory, read by another process
     |
 watcher.py     one small process per host: rings and /proc (process_state.py, stacks.py)
     |               other hosts send theirs (channel.py)
 diagnosis.py   who is stuck, who waits for it: one sentence
     |
 verdict file   -> the ranks of the host end with it (parallel/hang_watch.py)
"""
