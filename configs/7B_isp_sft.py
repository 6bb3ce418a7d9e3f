"""InternLM 7B with the sequence split over 2 GPUs and the weights over 4 (isp).

Command:   torchrun --nnodes=1 --nproc_per_node=8 train.py --config configs/7B_isp_sft.py --launcher torch
Hardware:  8 GPUs of 80 GB; 65,536 tokens a step
Expect:    loss 11.6 at step 0, as with configs/7B_sft.py: the layout changes no number
"""

_base_ = "_base_/7B.py"

JOB_NAME = "7b_isp_train"

parallel = dict(tensor=dict(size=2, mode="isp"), weight=dict(size=4, memory_pool=True))
monitor = dict(alert=dict(alert_file_path=f"llm_alter/{JOB_NAME}_alert.log"))
