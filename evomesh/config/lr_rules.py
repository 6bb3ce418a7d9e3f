"""Rules of the ``lr_scheduler`` section, and the length of a run that decays from a given step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from evomesh.config.finding import ConfigFinding
from evomesh.config.folders import FolderPlace
from evomesh.config.lr_scheduler import FALLING, POWER_LAWS
from evomesh.config.schema import Config
from evomesh.quantities import counted

DECAY_KEYS = tuple(
    f"lr_scheduler.{key}" for key in ("decay_steps", "decay_ratio", "decay_type")
)
POWER_KEYS = ("lr_scheduler.power", "lr_scheduler.timescale")


def resolve_decay(config: Config) -> Config:
    """Return the config with the length of a run that ``decay_from`` ends; others as they are.

    The schedule before the decay stays that of the run's full length.
    """
    lr = config.lr_scheduler
    if lr.decay_start is None or lr.decay_steps is None:
        return config
    data = config.data
    full_length = lr.length(data.total_steps)
    end = lr.decay_start + lr.decay_steps
    sections = {
        "data": data.model_copy(update={"total_steps": end}),
        "lr_scheduler": lr.model_copy(update={"total_steps": full_length}),
    }
    return config.model_copy(update=sections)


def learning_rate_findings(config: Config) -> Iterator[ConfigFinding]:
    """Yield what cannot be a schedule: parts that are longer than the run."""
    yield from _warmup_findings(config)
    if config.lr_scheduler.decay_from is None:
        yield from _decay_findings(config)
    else:
        yield from _decay_from_findings(config)


def _warmup_findings(config: Config) -> Iterator[ConfigFinding]:
    lr = config.lr_scheduler
    # The schedule may be longer than the training; its warm-up is a share of it.
    steps = config.data.total_steps
    scheduled = lr.length(steps)
    warmup = lr.init_steps + lr.warmup_updates(steps)
    if warmup > min(scheduled, steps):
        given_as = "total_steps * warmup_ratio"
        key = "warmup_ratio"
        if lr.warmup_steps is not None:
            given_as = key = "warmup_steps"
        yield ConfigFinding(
            (
                f"lr_scheduler.{key}",
                "lr_scheduler.init_steps",
                "lr_scheduler.total_steps",
                "data.total_steps",
            ),
            f"{warmup} steps of warm-up (init_steps + {given_as}) are longer than the training, "
            f"{counted(min(scheduled, steps), 'step', '')}",
            expected="a warm-up shorter than data.total_steps",
            fix=f"lower {key}, or set lr_scheduler.total_steps={steps} too",
            code="EVO-CONFIG-015",
        )


def _decay_findings(config: Config) -> Iterator[ConfigFinding]:
    """Yield the problems of a decay at the end of the schedule."""
    lr = config.lr_scheduler
    decay = lr.decay_span(config.data.total_steps)
    if decay is None:
        return
    key = "decay_ratio" if lr.decay_steps is None else "decay_steps"
    keys = (f"lr_scheduler.{key}", "lr_scheduler.type")
    length = lr.length(config.data.total_steps)
    warmup = lr.init_steps + lr.warmup_updates(config.data.total_steps)
    if lr.type in FALLING:
        yield ConfigFinding(
            keys,
            f"{lr.type} falls over the whole run already",
            expected="a type that does not: wsd, constant, inverse_sqrt or power",
            fix=f'set lr_scheduler.type="wsd", remove {key}, or set lr_scheduler.decay_from to a step',
            code="EVO-CONFIG-015",
        )
    elif decay.start < 0:
        yield ConfigFinding(
            keys,
            f"a decay of {counted(decay.steps, 'step', '')} is longer than the schedule, {counted(length, 'step', '')}",
            expected=f"at most {length - warmup} steps",
            fix=f"lower {key}, or raise data.total_steps",
            code="EVO-CONFIG-015",
        )
    elif decay.start < warmup <= length:
        yield ConfigFinding(
            keys,
            f"{counted(warmup, 'step', '')} of warm-up and {decay.steps} of decay are longer than the schedule, "
            f"{length} steps",
            expected="warm-up + decay <= total_steps",
            fix=f"lower {key} or the warm-up, or raise data.total_steps",
            code="EVO-CONFIG-015",
        )


def _decay_from_findings(config: Config) -> Iterator[ConfigFinding]:
    lr = config.lr_scheduler
    key = "lr_scheduler.decay_from"
    start = lr.decay_start
    if start is None:
        yield ConfigFinding(
            (key,),
            f"{lr.decay_from!r} names no step",
            expected='a step, or the checkpoint of a step: "local:llm_ckpts/5000"',
            code="EVO-CONFIG-015",
        )
        return
    if lr.decay_steps is None:
        yield ConfigFinding(
            (key,),
            "the length of the decay is not set",
            fix="set lr_scheduler.decay_steps",
            code="EVO-CONFIG-015",
        )
    warmup = lr.init_steps + lr.warmup_updates(config.data.total_steps)
    if start < warmup:
        yield ConfigFinding(
            (key,),
            f"step {start} is in the warm-up, which ends after {counted(warmup, 'step', '')}",
            expected=f"a step from {warmup} on",
            code="EVO-CONFIG-015",
        )
    if config.data.epochs is not None:
        yield ConfigFinding(
            ("data.epochs", key),
            f"{key} sets the end of the run, and data.epochs does so too",
            fix="set data.total_steps instead of data.epochs",
            code="EVO-CONFIG-015",
        )
    yield from _branch_findings(config)


def _branch_findings(config: Config) -> Iterator[ConfigFinding]:
    """Yield a problem if a branch would write into the folder that it branches from."""
    branch = config.lr_scheduler.branch
    if branch is None:
        return
    source = FolderPlace.of(branch)
    for key in ("save_ckpt_folder", "snapshot_ckpt_folder"):
        folder = getattr(config.ckpt, key)
        if folder and FolderPlace.of(folder).contains(source):
            yield ConfigFinding(
                (f"ckpt.{key}", "lr_scheduler.decay_from"),
                f"{folder!r} has the checkpoint that this run branches from, {branch!r}",
                expected="another folder, so that the run that it branches from stays as it is",
                fix=f"set ckpt.{key} to a new folder; to continue the run itself: "
                f"lr_scheduler.decay_from={config.lr_scheduler.decay_start}",
                code="EVO-CONFIG-015",
            )
    if not config.ckpt.auto_resume:
        yield ConfigFinding(
            ("ckpt.auto_resume", "lr_scheduler.decay_from"),
            "a branch that is stopped resumes from its own folder, which auto_resume=False forbids",
            fix="remove ckpt.auto_resume=False",
            code="EVO-CONFIG-015",
        )
    info = config.ckpt.load_ckpt_info
    if info is not None:
        yield ConfigFinding(
            ("ckpt.load_ckpt_info", "lr_scheduler.decay_from"),
            f"the run would start from {info.path!r} and from {branch!r}",
            expected="one of them",
            fix="remove ckpt.load_ckpt_info",
            code="EVO-CONFIG-015",
        )


def learning_rate_warnings(
    config: Config, given: Callable[[str], bool]
) -> Iterator[tuple[str, str]]:
    """Yield settings of the learning rate that act otherwise than they look, or not at all."""
    lr = config.lr_scheduler
    steps = config.data.total_steps
    ends_early = lr.total_steps is not None and lr.total_steps != steps
    if ends_early and lr.decay_from is None:
        yield (
            "lr_scheduler.total_steps",
            f"{lr.total_steps} differs from data.total_steps={steps}: training ends after "
            f"{counted(steps, 'step', '')}, the learning rate falls over {lr.total_steps}",
        )
    if lr.eta_min > config.adam.lr:
        # InternEvo computes its formula with any pair, and two of its configs have one.
        yield (
            "lr_scheduler.eta_min",
            f"{lr.eta_min:g} is above adam.lr={config.adam.lr:g}: after the warm-up the learning rate rises to it",
        )
    has_no_decay = lr.decay_span(steps) is None
    inert = (
        (
            ("lr_scheduler.warmup_start",),
            lr.warmup_updates(steps) == 0 and not given("lr_scheduler.warmup_ratio"),
            f"lr_scheduler.warmup_ratio is {lr.warmup_ratio}",
        ),
        (
            ("lr_scheduler.warmup_ratio",),
            lr.warmup_steps is not None,
            "lr_scheduler.warmup_steps is set",
        ),
        (
            ("lr_scheduler.decay_ratio",),
            lr.decay_steps is not None,
            "lr_scheduler.decay_steps is set",
        ),
        (DECAY_KEYS, has_no_decay, f"{lr.type} has no decay"),
        (
            POWER_KEYS[:1],
            lr.type != "power",
            f'lr_scheduler.type is {lr.type!r}, not "power"',
        ),
        (POWER_KEYS[1:], lr.type not in POWER_LAWS, f"{lr.type} has no timescale"),
    )
    for keys, is_inert, reason in inert:
        for key in keys:
            if is_inert and given(key):
                yield key, f"has no effect while {reason}"
