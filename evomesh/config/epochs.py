"""Passes over the data as steps: what ``data.epochs`` and ``ckpt.checkpoint_every_epochs`` stand for."""

from __future__ import annotations

from evomesh.config.schema import Config
from evomesh.errors import UserError
from evomesh.quantities import counted


def steps_per_epoch(config: Config, num_packs: int, dp_size: int) -> float:
    """Return the optimizer steps of one pass.

    XTuner's order shortens a pass to a multiple of the data-parallel size and lets
    steps cross its end; InternEvo's ends a pass where no whole step is left.

    Args:
        num_packs: packs in one pass.
        dp_size: data-parallel ranks.
    """
    # 1003 packs on 8 ranks with micro_num 4, so 32 packs a step: XTuner's pass has 1000
    # packs, 31.25 steps, and InternEvo's 31 steps.
    packs_per_step = config.data.micro_num * dp_size
    if config.data.order == "xtuner":
        packs_of_pass = num_packs // dp_size * dp_size
        return packs_of_pass / packs_per_step
    return float(num_packs // packs_per_step)


def packs_left_out(config: Config, num_packs: int, dp_size: int) -> int:
    """Return the packs of a pass that are in no step, because they do not fill one or cannot be divided among ranks."""
    per_epoch = steps_per_epoch(config, num_packs, dp_size)
    return num_packs - round(per_epoch * config.data.micro_num * dp_size)


def resolve_epochs(config: Config, num_packs: int, dp_size: int) -> Config:
    """Return the config with ``total_steps`` and ``checkpoint_every`` set from its epochs, if it has any.

    Raises:
        UserError: the number of packs is not known beforehand, or the epochs are less than one step.
    """
    data = config.data
    ckpt = config.ckpt
    if data.epochs is None and ckpt.checkpoint_every_epochs is None:
        return config
    key = "data.epochs" if data.epochs is not None else "ckpt.checkpoint_every_epochs"
    if not num_packs:
        raise UserError(
            "streaming data has no known length, so a pass cannot be counted in steps",
            where=key,
            fix="set data.total_steps and ckpt.checkpoint_every instead",
            code="EVO-CONFIG-013",
        )
    # From here on all is counted in steps, as the schedule and the loop count.
    per_epoch = steps_per_epoch(config, num_packs, dp_size)
    if data.epochs is not None:
        total_steps = int(data.epochs * per_epoch)
        if total_steps < 1:
            raise UserError(
                f"{counted(data.epochs, 'pass', 'g')} over {counted(num_packs, 'pack', '')}: less than one step of "
                f"{counted(data.micro_num, 'micro-batch')} on {counted(dp_size, 'data-parallel rank')}",
                where=key,
                fix="add data, or lower data.micro_num or data.seq_len",
                code="EVO-CONFIG-013",
            )
        data = data.model_copy(update={"total_steps": total_steps})
    if ckpt.checkpoint_every_epochs is not None:
        every = max(1, int(ckpt.checkpoint_every_epochs * per_epoch))
        ckpt = ckpt.model_copy(update={"checkpoint_every": every})
    return config.model_copy(update={"data": data, "ckpt": ckpt})
