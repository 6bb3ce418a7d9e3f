"""An optimizer with its state sharded over ranks (ZeRO stage 1, Rajbhandari et al., arXiv 1910.02054).

Each rank of the ``zero`` axis keeps moments and float32 master weights for its share of
the rows of every matrix. In a step, gradients are summed to the rank that owns their
rows, one norm is computed over all of them, an update rule (``optim/rules.py``) changes
the rows, and the updated rows are gathered. With one process none of this communicates or copies.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from evomesh.config.optimizer import OptimizerConfig
from evomesh.config.schema import AdamConfig, ZeroConfig
from evomesh.optim.buckets import (
    GradientSync,
    ParameterSync,
    copy_masters_to_parameters,
    gather_bucket_size,
)
from evomesh.optim.clip import (
    GradientCheck,
    UpdateLimits,
    check_norm,
    clip_factor,
    global_norm,
    global_norm_and_sums,
)
from evomesh.optim.ema import WeightEma
from evomesh.optim.gradient_profile import GradientObserver
from evomesh.optim.groups import (
    UpdateSettings,
    hidden_lr_scale,
    is_hidden_matrix,
    scaled_settings,
    update_settings,
)
from evomesh.optim.rules import make_rules
from evomesh.optim.schedule_free import ScheduleFree
from evomesh.optim.slot import ParameterSlot, make_slot
from evomesh.parallel.grid import Grid
from evomesh.parallel.spec import LocalShard, is_sharded

logger = logging.getLogger(__name__)

NamesByModule: TypeAlias = dict[nn.Module, list[str]]


def _no_sums() -> Tensor:
    return torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step.

    Attributes:
        norm: float64 scalar, global norm of the unscaled gradient before clipping; inf or NaN if the step was skipped.
        profile: [R], what ``GradientObserver.measure`` returned; None without a profile.
        sums: [K] float64, the ``sums`` given to the step, added over all ranks.
    """

    norm: Tensor
    profile: Tensor | None = None
    sums: Tensor = field(default_factory=_no_sums)

    @property
    def grad_norm(self) -> float:
        """Return ``norm`` as a float; waits for the device."""
        return float(self.norm)

    @property
    def check(self) -> GradientCheck:
        """Return "ok", or why the step was skipped; waits for the device."""
        return check_norm(self.grad_norm)


class ZeroOptimizer:
    """Updates the parameters of one rank, under the numerics contract (docs/adr/0001-numerics-contract.md).

    float16 and bfloat16 parameters have float32 masters, and their gradients accumulate
    in float32; float32 and float64 parameters are updated in place. Frozen parameters
    (``requires_grad=False``) are left out.

    Args:
        named_parameters: global names and parameters, each with its ``ShardSpec``, in the order forward uses them.
        adam: its learning rate and beta2 are ignored; ``step`` takes them as arguments.
        zero: clipping, bucket sizes and overlap.
        grid: the axes as this rank sees them.
        model: the module they belong to, which ``overlap_sync_param`` needs: without it, gathers finish in ``step``.
        config: the update rule.
        width_multiplier: of muP (``ModelConfig.width_multiplier``).

    Attributes:
        settings: what holds for the updates of each master.

    Raises:
        UserError: the rule does not fit the parameters.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        adam: AdamConfig,
        zero: ZeroConfig,
        grid: Grid = Grid(),  # noqa: B008 (frozen)
        model: nn.Module | None = None,
        config: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        width_multiplier: float = 1.0,
    ) -> None:
        self.adam = adam
        self.zero = zero
        self.grid = grid
        self.slots = [
            make_slot(name, param, grid)
            for name, param in named_parameters
            if param.requires_grad
        ]
        _count_uses(self.slots, model)
        self._gradients = GradientSync(
            self.slots, zero.reduce_bucket_size, zero.overlap_sync_grad
        )
        self._parameters = ParameterSync(
            self.slots,
            bucket_size=gather_bucket_size(zero, self.device),
            overlap=zero.overlap_sync_param and model is not None,
        )
        hidden_scale = hidden_lr_scale(config.type, width_multiplier)
        self.settings = _settings_of(self.slots, adam, hidden_scale)
        self._rules = make_rules(self.slots, self.settings, adam, config, grid)
        masters = [slot.master for slot in self.slots]
        self.ema = None
        if config.ema.decay is not None:
            self.ema = WeightEma(masters, config.ema)
        # The masters' own values, while they hold others; see ``holding``.
        self._kept: dict[Tensor, Tensor] = {}
        for slot in self.slots:
            if slot.is_half or zero.overlap_sync_grad:
                hook = partial(self._on_gradient, slot)
                slot.param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        if model is not None and self._parameters.overlap:
            self._await_in_forward(model)
        # The same on every rank, rows being equal.
        elements = sum(slot.master.numel() for slot in self.slots)
        logger.info(
            "Number of elements on ranks: %s, rank:%d",
            [elements] * grid.zero.size,
            grid.zero.rank,
        )

    def expect_micro_batches(self, micro_batches: int) -> None:
        """Set the number of micro-batches of a step, before its first backward; ``overlap_sync_grad`` needs it."""
        self._gradients.expect_micro_batches(micro_batches)

    @torch.no_grad()
    def step(
        self,
        lr: float,
        beta2: float,
        inv_scale: float,
        profile: GradientObserver | None = None,
        sums: Tensor | None = None,
        limits: UpdateLimits | None = None,
    ) -> StepResult:
        """Make one update with the gradients accumulated since ``zero_grad``; the host never waits for the device.

        Only the device knows whether the gradient is finite, so phases 4 to 6 always
        run. In a skipped step no rule changes a master, and what is rounded and
        gathered from the masters is what was there before.

        Args:
            inv_scale: 1 / the loss scale that the gradients carry.
            profile: measures the gradients of this step too.
            sums: [K] float64, this rank's summands of totals that travel with the norm.
            limits: beyond which nothing changes either, and the step counts for the moving average as none;
                the first of ``sums`` is the loss.

        Returns:
            the norm, the same on every rank. If it is not finite, nothing changes.
        """
        # 1. Finish what the last step may have left pending: the parameters' new values.
        self._parameters.wait()

        # 2. Sum the gradients over ranks; each master gets the gradient of its rows.
        self._gradients.finish()
        gradients, counted = self._summed_gradients()

        # 3. One norm over all parameters and ranks, each element counted once.
        if sums is None:
            sums = _no_sums().to(self.device)
        scaled_norm, totals = global_norm_and_sums(counted, sums, self.grid)
        norm = scaled_norm * inv_scale
        measured = None if profile is None else profile.measure()

        # 4. The rules on this rank's rows, with the clipped gradient; skipped by the device if the norm is not finite.
        divisor = self._scale_gradients(gradients, norm, inv_scale)
        is_beyond = None if limits is None else limits.are_exceeded(norm, totals[0])
        self._apply_rules(lr, beta2, divisor, norm, is_beyond)

        # 5. Round the masters to 16-bit parameters, and gather the rows that other ranks have updated.
        copy_masters_to_parameters(self.slots)
        self._parameters.start()

        # 6. Free the gradients of the masters.
        for slot in self.slots:
            slot.master.grad = None
        return StepResult(norm, measured, totals)

    def _summed_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the gradients of this rank's rows, and those of them that it counts in the norm."""
        gradients: list[Tensor] = []
        counted: list[Tensor] = []
        for slot in self.slots:
            gradient = slot.master.grad
            if gradient is None:
                continue
            gradients.append(gradient)
            if slot.counts_in_norm:
                counted.append(gradient)
        return gradients, counted

    @torch.no_grad()
    def measure_only(self, profile: GradientObserver) -> tuple[Tensor, Tensor]:
        """Sum the gradients over ranks, measure them and drop them; nothing is updated.

        Returns:
            their norm and what the profile measured, both with the loss scale.
        """
        self._parameters.wait()
        self._gradients.finish()
        _, counted = self._summed_gradients()
        norm = global_norm(counted, self.grid, self.device)
        measured = profile.measure()
        for slot in self.slots:
            slot.master.grad = None
        self.zero_grad()
        return norm, measured

    def _apply_rules(
        self,
        lr: float,
        beta2: float,
        divisor: Tensor | None,
        norm: Tensor,
        is_beyond: Tensor | None,
    ) -> None:
        """Update the masters and their average, unless the norm is not finite or the step is beyond its limits."""
        is_left_out = ~norm.isfinite()
        if is_beyond is not None:
            is_left_out = is_left_out | is_beyond
        for rule in self._rules:
            rule.step(lr, beta2, divisor, found_inf=is_left_out.float())
        if self.ema is not None:
            self.ema.after_step(is_beyond)

    def _scale_gradients(
        self, gradients: list[Tensor], norm: Tensor, inv_scale: float
    ) -> Tensor | None:
        """Apply clipping and loss scale; return the divisor of float32 gradients, which the rules apply themselves.

        That saves a pass over all gradients. Other dtypes are multiplied here.
        """
        max_norm = self.zero.clip_grad_norm
        if inv_scale == 1.0 and max_norm <= 0:
            return None
        factor = clip_factor(norm, max_norm) * inv_scale
        if all(gradient.dtype == torch.float32 for gradient in gradients):
            return factor.reciprocal().float()
        torch._foreach_mul_(gradients, factor)
        return None

    @torch.no_grad()
    def communicate_only(self) -> None:
        """Communicate as a step does, except for the norm, and update nothing: for a trace without numbers."""
        self._gradients.finish()
        for rule in self._rules:
            rule.communicate()
        self._parameters.start()
        self._parameters.wait()

    def forget_step(self) -> None:
        """Count the last step, which was beyond its limits, as none."""
        if self.ema is not None:
            self.ema.calls -= 1

    def zero_grad(self) -> None:
        """Drop the gradients accumulated so far."""
        for slot in self.slots:
            slot.reset()

    def wait_for_parameters(self) -> None:
        """Block until every parameter holds its new value; call it before reading weights outside forward."""
        self._parameters.wait()

    @torch.no_grad()
    def refresh_masters(self) -> None:
        """Copy the parameters into masters and averages, after weights were loaded without an optimizer state."""
        for slot in self.slots:
            master = self._kept.get(slot.master, slot.master)
            if slot.is_half or self._kept:
                master.copy_(slot.own_rows)
            for rule in self._rules:
                rule.restart(slot.master, master)
        self.restart_ema()

    @torch.no_grad()
    def restart_ema(self) -> None:
        """Let the average of the weights begin with the present ones."""
        if self.ema is not None:
            for master, average in self.ema.averages.items():
                average.copy_(master)

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """Let the parameters hold what is to be evaluated and stored: with Schedule-Free AdamW its average.

        Other rules evaluate what they train. Weights that are loaded meanwhile are taken as the average.
        """
        (*_, rule) = self._rules
        if not isinstance(rule, ScheduleFree):
            yield
            return
        with self.holding(rule.average_of):
            yield

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Let the parameters hold the exponential moving average."""
        assert self.ema is not None
        with self.holding(self.ema.averages.__getitem__):
            yield

    @contextmanager
    def holding(self, value_of: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Let the parameters of all ranks hold other values, then to the bit what they held before.

        Args:
            value_of: of a master, of its shape.
        """
        self.wait_for_parameters()
        for slot in self.slots:
            self._kept[slot.master] = slot.master.clone()
        self._publish(value_of)
        try:
            yield
        finally:
            kept = self._kept
            self._kept = {}
            self._publish(kept.__getitem__)

    @torch.no_grad()
    def _publish(self, value_of: Callable[[Tensor], Tensor]) -> None:
        for slot in self.slots:
            slot.master.copy_(value_of(slot.master))
        copy_masters_to_parameters(self.slots)
        self._parameters.start()
        self._parameters.wait()

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the live tensors of the state by checkpoint name; see ``state_shards``."""
        return {name: shard.tensor for name, shard in self.state_shards().items()}

    def state_shards(self) -> dict[str, LocalShard]:
        """Return the live tensors of the state with their specs, for checkpoints: write into them to load.

        ``optim.KIND.NAME``: what the rule remembers of each parameter (AdamW's ``exp_avg`` and ``exp_avg_sq``, the
        ``momentum`` of Muon and Lion), ``optim.ema.NAME`` and, for float16 and bfloat16, ``optim.master.NAME``.
        Inside ``evaluated_weights`` the parameters are the average, and the masters are stored for every dtype.
        """
        self.wait_for_parameters()
        shards: dict[str, LocalShard] = {}
        for slot in self.slots:
            master = slot.master
            tensors: dict[str, Tensor] = {}
            for rule in self._rules:
                tensors |= rule.state_of(master)
            if self.ema is not None:
                tensors["ema"] = self.ema.averages[master]
            if slot.is_half or self._kept:
                tensors["master"] = self._kept.get(master, master)
            for kind, tensor in tensors.items():
                name = f"optim.{kind}.{slot.name}"
                shards[name] = LocalShard(tensor, slot.spec)
        return shards

    def state(self) -> dict[str, Any]:
        """Return the number of updates and what else is no tensor; waits for the device, which counts them."""
        state: dict[str, Any] = {}
        for rule in self._rules:
            state |= rule.numbers()
        if self.ema is not None:
            state["ema_calls"] = self.ema.calls
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        for rule in self._rules:
            rule.load_numbers(state)
        if self.ema is not None:
            self.ema.calls = int(state.get("ema_calls", 0))

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters."""
        return self.slots[0].local.device

    def _on_gradient(self, slot: ParameterSlot, _: Tensor) -> None:
        slot.accumulate()
        self._gradients.mark_ready(slot)

    def _await_in_forward(self, model: nn.Module) -> None:
        """Make forward of each block wait for the block's parameters, and forward of the model for all others.

        The others include the head, which the loss may read without a forward of the
        head, and shards, which FSDP2 reads before the block that they belong to.
        """
        for root in _roots(model):
            for module, names in self._names_to_await(root).items():
                self._wait_before(module, names)

    def _names_to_await(self, root: nn.Module) -> NamesByModule:
        """Return the names of the parameters that each module's forward waits for."""
        waits_in = _waiting_modules(root)
        awaited: NamesByModule = defaultdict(list)
        for slot in self.slots:
            # Parameters of another root wait in the modules of that one.
            module = waits_in.get(slot.param)
            if module is not None:
                awaited[module].append(slot.name)
        return awaited

    def _wait_before(self, module: nn.Module, names: list[str]) -> None:
        def wait(*_: Any) -> None:
            with torch.no_grad():
                self._parameters.wait(names)

        if getattr(module, "_compiled_call_impl", None) is not None:
            # Handles and names do not belong in a compiled graph.
            wait = torch.compiler.disable(wait)  # type: ignore[no-untyped-call, unused-ignore]
        # Before FSDP2 looks at the shards.
        module.register_forward_pre_hook(wait, prepend=True)


def _settings_of(
    slots: list[ParameterSlot], adam: AdamConfig, hidden_scale: float
) -> dict[Tensor, UpdateSettings]:
    """Return what holds for each master.

    Args:
        hidden_scale: factor of the learning rate of hidden matrices.
    """
    found: dict[Tensor, UpdateSettings] = {}
    for slot in slots:
        settings = update_settings(slot.name, adam)
        if is_hidden_matrix(slot.name, slot.spec.shape):
            settings = scaled_settings(settings, hidden_scale)
        found[slot.master] = settings
    return found


def _roots(model: nn.Module) -> list[nn.Module]:
    """Return the modules that have a forward: a list of models has none, each of its models has."""
    return list(model.children()) if isinstance(model, nn.ModuleList) else [model]


def _count_uses(slots: list[ParameterSlot], model: nn.Module | None) -> None:
    """Count the models of this rank that hold each parameter: each runs a backward pass for it."""
    holders: Counter[nn.Parameter] = Counter()
    for root in [] if model is None else _roots(model):
        holders.update(root.parameters())
    for slot in slots:
        slot.uses = max(holders[slot.param], 1)


def _waiting_modules(root: nn.Module) -> dict[nn.Parameter, nn.Module]:
    """Map each parameter to the module whose forward waits for it: its block of a module list or dict, else root."""
    waits_in = dict.fromkeys(root.parameters(), root)
    for block in _blocks(root):
        for parameter in block.parameters():
            if not is_sharded(parameter):
                waits_in[parameter] = block
    return waits_in


def _blocks(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the module lists and dicts, an inner one after those around it."""
    for container in root.modules():
        if isinstance(container, nn.ModuleList | nn.ModuleDict):
            yield from container.children()
