"""Resolve InternEvo's spellings of the ``parallel`` section."""

from __future__ import annotations

from typing import Any

from evomesh.config.reading.draft import ConfigDraft, shown


def resolve_parallel(draft: ConfigDraft) -> None:
    """Resolve int forms, ``sequence_parallel`` and ``pipeline.mode``."""
    # InternEvo's configs have parallel = dict(zero1=8, tensor=2, sequence_parallel=True)
    # or, newer, zero1=dict(size=8), tensor=dict(size=2, mode="msp").
    parallel = draft.take_section("parallel")
    sequence = parallel.pop("sequence_parallel", None)
    for name in ("zero1", "tensor", "pipeline", "weight"):
        value = parallel.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            parallel[name] = {"size": value}
            draft.sources[f"parallel.{name}.size"] = f"parallel.{name}"
        elif name in parallel and value is None:
            del parallel[name]
    if sequence is not None:
        _resolve_sequence_parallel(draft, parallel, sequence)
    _resolve_sequence_2d(draft, parallel)
    pipeline = parallel.get("pipeline")
    if isinstance(pipeline, dict) and "mode" in pipeline:
        _resolve_pipeline_mode(draft, pipeline)


def _resolve_sequence_parallel(
    draft: ConfigDraft, parallel: dict[str, Any], sequence: Any
) -> None:
    """Take the tensor mode from ``sequence_parallel``, unless ``tensor.mode`` is set too."""
    key = "parallel.sequence_parallel"
    if not isinstance(sequence, bool):
        draft.problem(
            key,
            f"found {shown(sequence)}",
            expected="True or False",
            code="EVO-CONFIG-002",
        )
        return
    tensor = parallel.setdefault("tensor", {})
    if not isinstance(tensor, dict):
        return  # the validation reports it
    if "mode" not in tensor:
        tensor["mode"] = "msp" if sequence else "mtp"
        draft.sources["parallel.tensor.mode"] = key
    elif sequence != (tensor["mode"] != "mtp"):  # only mtp is not sequence parallel
        draft.warn(
            key,
            f"{sequence} has no effect: parallel.tensor.mode decides, and it is set",
        )


def _resolve_pipeline_mode(draft: ConfigDraft, pipeline: dict[str, Any]) -> None:
    """Take the schedule from ``pipeline.mode``, its older name."""
    mode = pipeline.pop("mode")
    schedules = {"1f1b": None, "zbv": "zbv"}
    name = str(mode).lower()
    if name not in schedules:
        is_known = name == "zbh1"
        reason = ": this zero-bubble schedule is not part of evomesh"
        draft.problem(
            "parallel.pipeline.mode",
            f"found {mode!r}{reason if is_known else ''}",
            expected='"1F1B" or "ZBV"',
            fix='set mode="ZBV" with model.num_chunks=2' if is_known else "",
            code="EVO-CONFIG-002",
        )
        return
    pipeline.setdefault("schedule", schedules[name])
    draft.sources["parallel.pipeline.schedule"] = "parallel.pipeline.mode"


def _resolve_sequence_2d(draft: ConfigDraft, parallel: dict[str, Any]) -> None:
    """Check that ``sequence_2D``, if it is on, asks for what mode isp does.

    InternEvo arranges the tensor ranks in a grid: ``head_size`` ranks exchange
    sequence shards for heads, as isp does, and ``context_size`` of such groups pass
    keys and values around a ring. With one of the two at 1 the result is that of isp.
    """
    key = "parallel.sequence_2D"
    block = parallel.pop("sequence_2D", None)
    if not block or key in draft.off:
        return
    if not isinstance(block, dict):
        draft.problem(
            key,
            f"found {shown(block)}",
            expected="dict(enable=..., ...)",
            code="EVO-CONFIG-002",
        )
        return
    if block.get("enable") is not True:
        return  # it is off by default
    tensor = parallel.get("tensor")
    tensor = tensor if isinstance(tensor, dict) else {}
    size = tensor.get("size", 1)
    heads = block.get("head_size", 1)
    context = block.get("context_size", 1)
    grid = f"head_size={heads} and context_size={context}"
    if tensor.get("mode") != "isp":
        draft.problem(
            key,
            f"found tensor mode {tensor.get('mode', 'mtp')!r}",
            expected="mode isp, which alone shards sequences by heads",
            fix='set parallel.tensor=dict(size=..., mode="isp")',
            code="EVO-CONFIG-007",
        )
    elif heads != 1 and context != 1:
        draft.problem(
            key,
            f"{grid}: a ring of keys and values is not part of evomesh",
            expected="context_size=1, which is mode isp",
            fix=f"set head_size={size}, context_size=1",
            code="EVO-CONFIG-009",
        )
    elif heads * context != size:
        draft.problem(
            key,
            f"{grid} with tensor.size={size}",
            expected="head_size * context_size = tensor.size",
            code="EVO-CONFIG-007",
        )
    elif context != 1:
        draft.warn(
            key,
            f"the {size} ranks exchange heads, as mode isp does, instead of passing keys around a ring: "
            "the numbers are the same",
        )
