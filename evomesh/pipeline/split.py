"""The pipeline stage of a zbv (zero-bubble, V-shaped) schedule."""

from __future__ import annotations

from torch.distributed.pipelining import PipelineStage


class ZeroBubbleStage(PipelineStage):
    """A stage whose weight gradients are computed separately from, and later than, its input gradients.

    torch does not call autograd's post-accumulate hooks then. They are called here, so
    that 16-bit gradients are accumulated in float32 after every micro-batch and full
    gradient buckets are launched.
    """

    def backward_weight_one_chunk(
        self, bwd_chunk_id: int, last_backward: bool = False
    ) -> None:
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        # It has no input gradients, so torch ran its backward in one pass, with hooks.
        if self.stage_index == 0:
            return
        for parameter in self.submod.parameters():
            if parameter.grad is None:
                continue
            for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                hook(parameter)
