"""AdamW with its state divided over ranks (ZeRO stage 1, Rajbhandari et al., arXiv 1910.02054).

Each rank of the ``zero`` axis keeps, for every matrix, the moments and the float32 master of its own rows only.
A step: gradients are summed to the rank that owns their rows, one norm is taken over all of them, AdamW runs on the
rows, and the updated rows are gathered. With one process none of this communicates or copies.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evomesh.config.schema import AdamConfig, ZeroConfig
from evomesh.optim.adamw import AdamW
from evomesh.optim.buckets import GradientSync, ParameterSync, copy_masters_to_parameters
from evomesh.optim.clip import GradientCheck, check_norm, clip_factor, global_norm
from evomesh.optim.groups import has_weight_decay
from evomesh.optim.slot import ParameterSlot, make_slot
from evomesh.parallel.grid import Grid
from evomesh.parallel.spec import LocalShard, is_sharded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """Attributes:
    norm: float64 scalar, global norm of the unscaled gradient before clipping; inf or NaN when the step was skipped.
    """

    norm: Tensor

    @property
    def grad_norm(self) -> float:
        """``norm`` as a number: waits for the device that it lies on."""
        return float(self.norm)

    @property
    def check(self) -> GradientCheck:
        """ "ok", or what made the step be skipped: waits like ``grad_norm``."""
        return check_norm(self.grad_norm)


class ZeroOptimizer:
    """Updates the parameters of one rank; what holds for a step is in docs/adr/0001-numerics-contract.md.

    float16 and bfloat16 parameters have float32 masters, and their gradients accumulate in float32; float32 and
    float64 parameters are updated in place. Frozen parameters (``requires_grad=False``) are left out.

    Args:
        named_parameters: global names and parameters, each with its ``ShardSpec``, in the order forward uses them.
        adam: learning rate and beta2 in it are ignored: ``step`` is given them.
        zero: clipping, bucket sizes and overlap.
        grid: where this rank stands.
        model: the module they belong to; only ``overlap_sync_param`` needs it, which without it waits in ``step``.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        adam: AdamConfig,
        zero: ZeroConfig,
        grid: Grid = Grid(),  # noqa: B008 (frozen)
        model: nn.Module | None = None,
    ) -> None:
        self.adam, self.zero, self.grid = adam, zero, grid
        self.slots = [make_slot(name, param, grid) for name, param in named_parameters if param.requires_grad]
        self._gradients = GradientSync(self.slots, zero.reduce_bucket_size, zero.overlap_sync_grad)
        self._parameters = ParameterSync(
            self.slots,
            bucket_size=zero.all_gather_size if zero.use_split_tensor_optim else 0,
            overlap=zero.overlap_sync_param and model is not None,
        )
        decay = {
            slot.master: adam.weight_decay * has_weight_decay(slot.name, adam.no_decay) for slot in self.slots
        }
        self._adamw = AdamW(decay, adam.adam_beta1, adam.adam_eps)
        for slot in self.slots:
            if slot.accumulated_grad is not None or zero.overlap_sync_grad:
                hook = partial(self._accumulated, slot)
                slot.param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        if model is not None and self._parameters.overlap:
            self._await_in_forward(model)
        elements = sum(slot.master.numel() for slot in self.slots)  # the same on every rank, rows being equal
        logger.info("Number of elements on ranks: %s, rank:%d", [elements] * grid.zero.size, grid.zero.rank)

    def expect_micro_batches(self, micro_batches: int) -> None:
        """Says, before the first backward of a step, how many there will be: ``overlap_sync_grad`` needs to know."""
        self._gradients.expect_micro_batches(micro_batches)

    @torch.no_grad()
    def step(self, lr: float, beta2: float, inv_scale: float) -> StepResult:
        """One update with the gradients accumulated since ``zero_grad``; waits for no device.

        Args:
            inv_scale: 1 / the loss scale that the gradients carry.

        Returns:
            the norm, the same on every rank. When it is not finite nothing changes.
        """
        self._parameters.wait()
        self._gradients.finish()
        counted = [
            slot.master.grad for slot in self.slots if slot.counts_in_norm and slot.master.grad is not None
        ]
        norm = global_norm(counted, self.grid, self.device) * inv_scale
        self._update(lr, beta2, inv_scale, norm)
        for slot in self.slots:
            slot.master.grad = None
        return StepResult(norm)

    @torch.no_grad()
    def communicate_only(self) -> None:
        """Sends what a step sends, but for the norm, and updates nothing: for a trace without numbers."""
        self._gradients.finish()
        self._parameters.start()
        self._parameters.wait()

    def zero_grad(self) -> None:
        for slot in self.slots:
            slot.reset()

    def wait_for_parameters(self) -> None:
        """Blocks until every parameter holds its new value; call it before reading weights outside forward."""
        self._parameters.wait()

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Takes the masters from the parameters: after weights were loaded without an optimizer state."""
        for slot in self.slots:
            if slot.accumulated_grad is not None:
                slot.master.copy_(slot.own_rows)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the live tensors of the state by checkpoint name; see ``state_shards``."""
        return {name: shard.tensor for name, shard in self.state_shards().items()}

    def state_shards(self) -> dict[str, LocalShard]:
        """Return the live tensors of the state with their specs, for checkpoints: write into them to load.

        ``optim.exp_avg.NAME``, ``optim.exp_avg_sq.NAME`` and, for float16 and bfloat16, ``optim.master.NAME``.
        """
        self.wait_for_parameters()
        shards: dict[str, LocalShard] = {}
        for slot in self.slots:
            moments = self._adamw.moments[slot.master]
            kinds = {"exp_avg": moments.exp_avg, "exp_avg_sq": moments.exp_avg_sq}
            if slot.accumulated_grad is not None:
                kinds["master"] = slot.master
            for kind, tensor in kinds.items():
                shards[f"optim.{kind}.{slot.name}"] = LocalShard(tensor, slot.spec)
        return shards

    def state(self) -> dict[str, Any]:
        """Waits for the device, which counts the steps."""
        return {"steps": self._adamw.steps}

    def load_state(self, state: dict[str, Any]) -> None:
        self._adamw.set_steps(int(state["steps"]))

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self.slots[0].local.device

    def _accumulated(self, slot: ParameterSlot, _: Tensor) -> None:
        slot.accumulate()
        self._gradients.arrived(slot)

    def _update(self, lr: float, beta2: float, inv_scale: float, norm: Tensor) -> None:
        """Everything behind the norm is done in any case, since only the device knows whether the step is skipped:
        then AdamW's kernel changes no target, and what is rounded and gathered from the targets is what was there."""
        gradients = [slot.master.grad for slot in self.slots if slot.master.grad is not None]
        divisor = None
        if inv_scale != 1.0 or self.zero.clip_grad_norm > 0:
            factor = clip_factor(norm, self.zero.clip_grad_norm) * inv_scale
            if all(gradient.dtype == torch.float32 for gradient in gradients):
                divisor = (
                    factor.reciprocal().float()
                )  # on the kernel's way: it saves a pass over all gradients
            else:
                torch._foreach_mul_(gradients, factor)
        self._adamw.step(lr, beta2, divisor, found_inf=(~norm.isfinite()).float())
        copy_masters_to_parameters(self.slots)
        self._parameters.start()

    def _await_in_forward(self, model: nn.Module) -> None:
        """Forward of each block waits for the block's parameters, forward of the model for all others.

        All others: a head may be read by the loss without a forward of its own, and FSDP2 reads shards ahead of the
        block that they belong to.
        """
        names = {slot.param: slot.name for slot in self.slots}
        for root in (
            model.children() if isinstance(model, nn.ModuleList) else (model,)
        ):  # a list has no forward itself
            waits_in: dict[nn.Parameter, nn.Module] = dict.fromkeys(root.parameters(), root)
            for parent in root.modules():
                for block in parent.children() if isinstance(parent, nn.ModuleList | nn.ModuleDict) else ():
                    waits_in |= {p: block for p in block.parameters() if not is_sharded(p)}
            for module in dict.fromkeys(waits_in.values()):
                self._wait_before(
                    module, [names[p] for p, at in waits_in.items() if at is module and p in names]
                )

    def _wait_before(self, module: nn.Module, names: list[str]) -> None:
        def wait(*_: Any) -> None:
            with torch.no_grad():
                self._parameters.wait(names)

        if getattr(module, "_compiled_call_impl", None) is not None:
            wait = torch.compiler.disable(wait)  # type: ignore[no-untyped-call, unused-ignore]  # handles and names are no part of a graph
        module.register_forward_pre_hook(wait, prepend=True)  # before FSDP2 looks at the shards
