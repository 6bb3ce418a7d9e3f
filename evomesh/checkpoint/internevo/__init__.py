"""Read and write InternEvo's checkpoint files.

model.py       model_tp*_pp*.pt -> unsharded tensors under our names
optimizer.py   optimizer_tp*_pp*_zo*.pt, context.pt, sampler.pt -> optimizer state, counters, data position
export.py      one of our checkpoints -> model_tp*_pp*.pt of any tensor x pipeline (x weight) size
"""
