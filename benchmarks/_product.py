"""Whole training steps by the product's own code, on made-up tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from evomesh.config.schema import IGNORE, Config, LossConfig, ModelConfig
from evomesh.data.batch import Batch
from evomesh.optim.scaler import LossScaler
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.train.stages import build_optimizer, build_stages
from evomesh.train.step import StepOutput, train_step


class Training:
    """Model, optimizer and scaler as `evomesh train` builds them; ``step`` is what it does with a batch."""

    def __init__(
        self, model: ModelConfig, device: torch.device, *, draw_on_device: bool = False
    ) -> None:
        config, self.grid = Config(model=model), Grid()
        self.stages = build_stages(config, self.grid, MODES["mtp"], device)
        if draw_on_device:
            draw_weights(self.stages.parameters().values())
        else:
            self.stages.initialize(1, self.grid)
        self.optimizer = build_optimizer(config, self.stages, self.grid)
        self.optimizer.refresh_masters()
        self.scaler = LossScaler(config.grad_scaler, model.dtype)

    def step(self, batch: Batch) -> StepOutput:
        output = train_step(
            batch,
            schedule=self.stages.schedule,
            optimizer=self.optimizer,
            scaler=self.scaler,
            grid=self.grid,
            loss_config=LossConfig(),
            data_types=["en"],
            lr=1e-4,
            beta2=0.95,
        )
        assert output is not None
        return output


def draw_weights(parameters: Iterable[torch.Tensor]) -> None:
    """Matrices small and random, norms one: what matters for speed."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(1.0)


def made_up(ids: torch.Tensor, lengths: Sequence[int], *, pin: bool = False) -> Batch:
    """A batch of ``ids`` [M, T] as the loader hands it out, each row cut into documents of these lengths."""
    count = len(ids)
    positions = torch.cat([torch.arange(n) for n in lengths]).repeat(count, 1)
    bounds = torch.tensor((0, *lengths)).cumsum(0).int().repeat(count, 1)
    labels = ids.roll(-1, 1)
    # A document's last token has no next one.
    labels[:, bounds[0, 1:].long() - 1] = IGNORE
    rows = (ids, labels, positions, torch.zeros_like(ids), bounds)
    return Batch(
        *(row.pin_memory() if pin else row for row in rows), max_seqlen=max(lengths)
    )
