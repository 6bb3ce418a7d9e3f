"""Save, find, verify, load and reshard checkpoints in the native format.

    live tensors -> boxes (boxes, plan) -> data files (write) -> index and commit record (commit, format)
    path -> candidates (find) -> verified checkpoint (verify) -> pieces (read) -> live tensors

``save.CheckpointWriter`` drives the first line, ``load.CheckpointReader`` the second. ``reshard`` and the importers
commit through ``commit.commit`` as well. A folder is a checkpoint once its commit record exists, which is written last.
"""
