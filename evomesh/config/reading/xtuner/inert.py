"""Settings of XTuner that have no meaning here, each with its reason; any other that is not translated is unknown."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from typing import Any

from evomesh.config.reading.xtuner.translation import Translation

# What mmengine's runner reads: other top-level names are the author's own.
RUNNER_KEYS = (
    "model",
    "tokenizer",
    "train_dataloader",
    "optim_wrapper",
    "param_scheduler",
    "train_cfg",
    "default_hooks",
    "custom_hooks",
    "env_cfg",
    "visualizer",
    "log_level",
    "load_from",
    "resume",
    "randomness",
    "log_processor",
    "launcher",
    "work_dir",
    "sequence_parallel_size",
    "default_scope",
    "val_dataloader",
    "val_cfg",
    "val_evaluator",
    "test_dataloader",
    "test_cfg",
    "test_evaluator",
)
# Names that the runner reads although a config need not have them: an override may
# create them.
CREATABLE = (
    "work_dir",
    "resume",
    "load_from",
    "randomness",
    "sequence_parallel_size",
    "visualizer",
)

# Patterns of keys -> the reason; they need no warning, because what they ask for happens anyway.
AS_ALWAYS = {
    "*.type": "there is one implementation",
    "*.trust_remote_code": "code of a model folder is never run",
    "tokenizer.*": "the tokenizer's files decide",
    "model.use_varlen_attn": "translated",
    "model.llm.torch_dtype": "optim_wrapper.dtype decides",
    "model.llm.attn_implementation": "the fastest available kernel is used",
    "model.freeze_*": "all weights are trained",
    "train_dataloader.batch_sampler*": "every step is full",
    "train_dataloader.collate_fn*": "packs need no padding",
    "train_dataloader.dataset.*tokenizer*": "the config's tokenizer is used",
    "train_dataloader.dataset.*remove_unused_columns": "only the text is read",
    "train_dataloader.dataset.*shuffle_before_pack": "documents are shuffled before packing",
    "train_dataloader.dataset.*map_num_proc": "all cores tokenize",
    "train_dataloader.dataset.*max_dataset_length": "all records are read",
    "train_dataloader.dataset.dataset": "translated to a command that tokenizes the data",
    "train_dataloader.dataset.dataset.*": "translated to a command that tokenizes the data",
    "train_dataloader.dataset.datasets*": "translated to a command that tokenizes the data",
    "train_dataloader.dataset.*dataset_map_fn*": "translated to a command that tokenizes the data",
    "train_dataloader.dataset.*template_map_fn*": "translated to a command that tokenizes the data",
    "train_dataloader.dataset.*max_length": "translated",
    "train_dataloader.dataset.packed_length": "translated",
    "train_dataloader.dataset.*use_varlen_attn": "the model's decides",
    "train_dataloader.pin_memory": "reader threads prefetch",
    "train_dataloader.persistent_workers": "reader threads prefetch",
    "train_dataloader.prefetch_factor": "reader threads prefetch",
    "train_dataloader.drop_last": "every step is full",
    "train_dataloader.sampler.*": "translated",
    "optim_wrapper.loss_scale": "float16 has a dynamic loss scale, other dtypes need none",
    "optim_wrapper.clip_grad.error_if_nonfinite": "a step whose gradient is not finite is skipped",
    "optim_wrapper.optimizer.fused": "the update is fused",
    "optim_wrapper.optimizer.foreach": "the update is fused",
    "default_hooks.timer*": "every step is timed",
    "default_hooks.logger*": "every step is logged",
    "default_hooks.param_scheduler*": "the rate is set in every step",
    "default_hooks.sampler_seed*": "the order follows from the pass",
    "default_hooks.checkpoint.save_last": "the last step is always saved",
    "train_cfg.val_interval": "there is no validation loop",
    "train_cfg.by_epoch": "max_epochs and max_iters decide",
    "env_cfg.*": "processes are started by the launcher",
    "randomness.diff_rank_seed": "weights and data do not draw from the global generators",
    "log_level": "the log has one level",
    "log_processor*": "every step is logged",
    "launcher": "the environment decides",
    "default_scope": "names are not looked up in a registry",
}
# Patterns of keys -> why a value other than None is worth a warning.
WITHOUT_EFFECT = {
    "val_*": "evaluators of mmengine are not run: data.valid_folder and evomesh eval measure a model",
    "test_*": "evaluators of mmengine are not run: data.valid_folder and evomesh eval measure a model",
    "model.tokenizer*": "the tokenizer's files decide",
    "default_hooks.checkpoint.save_best": "there is no best checkpoint: every one within the limit is kept",
    "default_hooks.checkpoint.*": "checkpoints have one format",
    "default_hooks.*": "hooks are not run",
    "optim_wrapper.paramwise_cfg*": "adam.groups sets rates and decay by parameter, adam.no_decay exempts from decay",
}


def report_unused(out: Translation) -> None:
    """Warn of settings without effect, and record a problem for keys that neither XTuner nor evomesh knows."""
    for key, value in out.settings.unused(RUNNER_KEYS):
        if _matching(key, AS_ALWAYS):
            continue
        reason = _matching(key, WITHOUT_EFFECT)
        if reason and value is not None:
            out.warn(key, f"has no effect: {reason}")
        elif not reason:
            _add_unknown(out, key, value)


def _matching(key: str, patterns: dict[str, str]) -> str:
    return next(
        (reason for pattern, reason in patterns.items() if fnmatchcase(key, pattern)),
        "",
    )


def _add_unknown(out: Translation, key: str, value: Any) -> None:
    if value is None or value == {}:
        return
    section, _, name = key.rpartition(".")
    near = difflib.get_close_matches(name, out.settings.used_below(section), n=1)
    fix = f"did you mean {section}.{near[0]}?" if near else "remove it"
    out.settings.problem(key, f"unknown key {name!r}", fix=fix, code="EVO-CONFIG-001")
