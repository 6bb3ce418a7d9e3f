"""XTuner's runtime settings: layout, checkpoints, hooks, trackers, seeds and where a run starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomesh.config.reading.draft import shown
from evomesh.config.reading.xtuner.foreign_names import last_name
from evomesh.config.reading.xtuner.optimizer import accumulation
from evomesh.config.reading.xtuner.translation import Translation
from evomesh.quantities import counted

CHECKPOINT = "default_hooks.checkpoint"
BACKENDS = {"TensorboardVisBackend": True, "LocalVisBackend": False}
NO_SAMPLES = "no prompts are answered during training: evomesh generate answers them from any checkpoint of the run"
# Hooks that do what evomesh does anyway, and what to know about the others.
USUAL_HOOKS = ("DatasetInfoHook", "ThroughputHook", "VarlenAttnArgsToMessageHubHook")
OTHER_HOOKS = {
    "EvaluateChatHook": NO_SAMPLES,
    "HFCheckpointHook": "no folder is written at the end: evomesh convert to-hf makes it from any checkpoint",
}


def translate_runtime(out: Translation) -> None:
    """Translate everything outside of model, data and optimizer."""
    settings = out.settings
    name = Path(settings.file.path).stem
    out.put("JOB_NAME", name, "", "the config's file name")
    out.put("run_dir", out.work_dir, "work_dir")
    _put_layout(out)
    _put_checkpoints(out)
    _put_start(out)
    _put_trackers(out)
    seed = settings.get("randomness.seed")
    if seed is not None:
        out.put("seed", seed, "randomness.seed")
    if settings.get("randomness.deterministic", False):
        out.put("cudnn_deterministic", True, "randomness.deterministic")
    if settings.get("env_cfg.cudnn_benchmark", False):
        out.put("cudnn_benchmark", True, "env_cfg.cudnn_benchmark")
    _check_hooks(out)


def _put_layout(out: Translation) -> None:
    """Translate sequence parallelism: XTuner's exchange of heads for sequence parts is tensor mode isp."""
    size = out.settings.whole("sequence_parallel_size", 1)
    out.put(
        "parallel.zero1.size", -1, "", "over all data-parallel ranks, as DeepSpeed does"
    )
    if size > 1:
        out.put("parallel.tensor.size", size, "sequence_parallel_size")
        out.put("parallel.tensor.mode", "isp", "sequence_parallel_size")


def _put_checkpoints(out: Translation) -> None:
    settings = out.settings
    hook = settings.peek(CHECKPOINT)
    if not isinstance(hook, Mapping):
        out.put("ckpt.enable_save_ckpt", False, CHECKPOINT, "no checkpoint hook")
        return
    out.put("ckpt.enable_save_ckpt", True, CHECKPOINT)
    folder = settings.get(f"{CHECKPOINT}.out_dir") or out.work_dir
    out.put(
        "ckpt.save_ckpt_folder",
        f"local:{folder}",
        f"{CHECKPOINT}.out_dir",
        "default: work_dir",
    )
    _put_interval(out)
    keep = settings.whole(f"{CHECKPOINT}.max_keep_ckpts", -1)
    if keep > 0:
        out.put("ckpt.keep_last", keep, f"{CHECKPOINT}.max_keep_ckpts")
    if settings.get(f"{CHECKPOINT}.save_optimizer", True) is False:
        out.put("ckpt.save_optimizer", False, f"{CHECKPOINT}.save_optimizer")


def _put_interval(out: Translation) -> None:
    """Translate the interval of checkpoints: passes, or micro-iterations, of which a step has several."""
    settings = out.settings
    key = f"{CHECKPOINT}.interval"
    interval = settings.number(key, -1)
    if interval <= 0:
        out.put("ckpt.checkpoint_every", math.inf, key, "one at the end")
        return
    if settings.get(f"{CHECKPOINT}.by_epoch", True):
        out.put("ckpt.checkpoint_every_epochs", interval, key, "passes: by_epoch=True")
        return
    per_step = accumulation(settings)
    steps = max(1, int(interval // per_step))
    out.put(
        "ckpt.checkpoint_every",
        steps,
        key,
        f"{interval} micro-iterations, {per_step} per step",
    )
    if steps * per_step != interval:
        out.warn(
            key,
            f"{interval} micro-iterations are {interval / per_step:g} steps of {per_step}: a checkpoint every "
            f"{counted(steps, 'step', '')}",
        )


def _put_start(out: Translation) -> None:
    """Translate ``load_from`` and ``resume``: continue a run, take weights, or begin with the pretrained ones."""
    settings = out.settings
    path = settings.get("load_from")
    resume = settings.get("resume", False)
    if isinstance(resume, str):
        path, resume = resume, True
    if path is not None and not isinstance(path, str):
        settings.problem(
            "load_from",
            f"found {shown(path)}",
            expected="a path, or None",
            code="EVO-CONFIG-014",
        )
        return

    # 1. A path: its weights, or with ``resume`` all of its state. It replaces
    #    pretrained weights.
    if path is not None:
        out.values.get("ckpt", {}).pop("load_ckpt_info", None)
        is_hugging_face = (Path(path) / "config.json").exists() and not resume
        out.put("ckpt.load_ckpt_info.path", path, "load_from")
        out.put(
            "ckpt.load_ckpt_info.content", ["all"] if resume else ["model"], "resume"
        )
        out.put(
            "ckpt.load_ckpt_info.ckpt_type",
            "hf" if is_hugging_face else "internevo",
            "load_from",
        )
        out.put("ckpt.auto_resume", False, "load_from")
        return

    # 2. None: the newest checkpoint of the work folder, if ``resume`` asks for it.
    out.put("ckpt.auto_resume", bool(resume), "resume")
    if resume:
        out.put(
            "ckpt.load_ckpt_info.fallback",
            True,
            "resume",
            "the pretrained weights, for the first start",
        )


def _put_trackers(out: Translation) -> None:
    visualizer = out.settings.get("visualizer")
    writes_tensorboard = False
    unknown = []
    for name in _tracker_names(visualizer):
        if name not in BACKENDS:
            unknown.append(name)
        elif BACKENDS[name]:
            writes_tensorboard = True
    out.put("enable_tb", writes_tensorboard, "visualizer")
    if unknown:
        listed = ", ".join(unknown)
        out.warn("visualizer", f"{listed} is not written to; TensorboardVisBackend is")


def _tracker_names(visualizer: Any) -> list[str]:
    """Return the classes in ``dict(vis_backends=[dict(type=TensorboardVisBackend), ...])``, or in one such dict."""
    backends: Any = []
    if isinstance(visualizer, Mapping):
        backends = visualizer.get("vis_backends") or []
    if isinstance(backends, Mapping):
        backends = [backends]
    return [last_name(backend.get("type")) for backend in backends]


def _check_hooks(out: Translation) -> None:
    hooks: Any = out.settings.get("custom_hooks") or []
    for hook in hooks:
        name = (
            last_name(hook.get("type"))
            if isinstance(hook, Mapping)
            else last_name(hook)
        )
        if name not in USUAL_HOOKS:
            out.warn(
                "custom_hooks", f"{name}: {OTHER_HOOKS.get(name, 'hooks are not run')}"
            )
