"""Imported last by the fork server: what it has imported is no garbage, and no child searches it again.

A full collection takes a child 0.2 s otherwise, and its writes to the counters of all
objects copy the memory that it shares with the others.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
# Counting a million objects takes a child as long as two steps of its training do.
_frozen = gc.get_freeze_count()
gc.get_freeze_count = lambda: _frozen
