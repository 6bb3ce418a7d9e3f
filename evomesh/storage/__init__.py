"""Bytes at a path: the one place that touches checkpoint files.

    what a user types -> storage and path -> files on a disk (local) or objects (s3)
                  urls                    base

``atomic_file`` and ``local`` say in which order a crash cannot tear a file,
``s3_lock`` keeps a second writer out of an object store, and ``staged`` writes to a
local folder first.
"""
