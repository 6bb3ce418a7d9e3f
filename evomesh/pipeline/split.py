"""The stage of a zbv pipeline."""

from __future__ import annotations

from torch.distributed.pipelining import PipelineStage


class ZeroBubbleStage(PipelineStage):
    """A stage of zbv, which makes gradients of weights apart from those of inputs, and then without autograd's hooks.

    They are called here, so that 16-bit gradients are taken over into float32 after every micro-batch, and buckets of
    gradients set off when they are full.
    """

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        if self.stage_index == 0:  # which has no inputs to tell apart: torch went through it as usual
            return
        for parameter in self.submod.parameters():
            if parameter.grad is not None:
                for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                    hook(parameter)
