"""Read what XTuner wrote: files of mmengine, and folders of DeepSpeed's ZeRO.

    work_dirs/NAME or a folder with `latest`
      |  find.py        which iter_N.pth is meant
      v
    iter_N.pth, a file                    iter_N.pth/, a folder
      |  state_dict, meta                   |  shards.py    the files of all ranks, complete and of one ZeRO stage
      |                                     |  gather.py    which numbers of which rank make up a parameter
      v                                     v
    named tensors, still on disk (``Weight``)
      |  weights.py     names without XTuner's prefixes; adapters are refused
      v
    ``foreign_tensors`` of huggingface/  ->  evomesh's names and layouts
      |  load.py        into a run (ckpt_type "xtuner"), with its counters
      |  to_native.py   into a checkpoint, from which pth_to_hf exports

Weights are read, in float32 where DeepSpeed keeps them so; the optimizer's moments are not.
"""
