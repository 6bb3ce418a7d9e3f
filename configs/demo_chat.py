"""The model of demo.py, fine-tuned to say what a function of the standard library does, and in which module it is.

Command:   make train            (or: evomesh train configs/demo_chat.py, once configs/demo.py has been trained)
Hardware:  2 CPU cores, 2 GiB of memory, about a minute
Expect:    answers begin with a module, for held-out names more often the right one than by always naming the same
"""

import os

_base_ = "demo.py"

JOB_NAME = "demo_chat"
CHAT_DATA = os.environ.get("DEMO_DATA", "demo_data") + "/chat"
STEPS = 300

data = dict(
    total_steps=STEPS,
    valid_every=STEPS,
    train_folder=f"{CHAT_DATA}/train",
    valid_folder=f"{CHAT_DATA}/valid",
)
adam = dict(lr=1e-3)
lr_scheduler = dict(total_steps=data["total_steps"], eta_min=0)

ckpt = dict(
    save_ckpt_folder="local:llm_ckpts/demo_chat",
    checkpoint_every=data["total_steps"],
    load_ckpt_info=dict(
        path="local:llm_ckpts/demo",
        content=("model",),
        ckpt_type="evomesh",
        fallback=True,  # where nothing can be resumed: the first start
    ),
)
