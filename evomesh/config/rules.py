"""Rules that need more than one value: settings that must fit together, and features that are not available yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from evomesh.config.alert import alert_findings, alert_warnings
from evomesh.config.architecture import architecture_findings
from evomesh.config.data_rules import data_findings
from evomesh.config.export_hf import export_findings, exports_once
from evomesh.config.families import FAMILY_FACTS
from evomesh.config.finding import ConfigFinding, nearest
from evomesh.config.folders import shared_role
from evomesh.config.grad_profiling import profiling_findings
from evomesh.config.layout import data_stage_layout_findings, layout_findings
from evomesh.config.lr_rules import learning_rate_findings, learning_rate_warnings
from evomesh.config.mup_rules import mup_findings
from evomesh.config.optimizer import optimizer_findings
from evomesh.config.place_rules import place_findings
from evomesh.config.reading.draft import leaves
from evomesh.config.rope import scaling_problems
from evomesh.config.schema import Config, ModelConfig
from evomesh.config.switches import SWITCHES
from evomesh.config.trackers import tracker_findings
from evomesh.config.windows import window_findings

INT64 = 2**63 - 1
STREAMING_KEYS = (
    "data.content_name",
    "data.subset_name",
    "data.split_name",
    "data.valid_split_name",
)
TOKEN_FILE_KEYS = (
    "data.dataset_weights",
    "data.data_order_path",
    "data.min_length_dict",
    "data.remainder",
    "data.use_shm",
)
CONTENT = ("model", "sampler", "optimizer", "scheduler", "all")


# Features that are not available yet: key, whether a config asks for it, name of the
# feature.
PENDING: tuple[tuple[str, Callable[[Config], bool], str], ...] = (
    ("model.output_tf32", lambda c: c.model.output_tf32, "an output head in TF32"),
)


def check(
    config: Config, given: Callable[[str], bool]
) -> tuple[list[ConfigFinding], list[tuple[str, str]]]:
    """Return all problems of a validated config, and (key, words) of all warnings.

    Args:
        given: whether a resolved key was set by the user.
    """
    findings = [
        *_number_findings(config),
        *_model_findings(config),
        *_rope_findings(config),
        *window_findings(config.model),
        *architecture_findings(config.model),
        *mup_findings(config.model),
        *data_findings(config),
        *_loss_scale_findings(config),
        *learning_rate_findings(config),
        *place_findings(config),
        *layout_findings(config),
        *data_stage_layout_findings(config),
        *_checkpoint_findings(config),
        *optimizer_findings(config.optimizer, config.adam.adam_beta1),
        *profiling_findings(config.grad_profiling, config.model),
        *alert_findings(config.monitor.alert),
        *tracker_findings(config.monitor.trackers),
    ]
    findings += _twice_given(given)
    findings += [
        ConfigFinding(
            (key,),
            f"{feature}: not available yet",
            fix=f"remove {key} or give it its default",
            code="EVO-CONFIG-009",
        )
        for key, asks, feature in PENDING
        if asks(config)
    ]
    return findings, list(_warnings(config, given))


def _twice_given(given: Callable[[str], bool]) -> Iterator[ConfigFinding]:
    """Yield a problem for each number that is set in steps and in passes over the data."""
    for steps, epochs in (
        ("data.total_steps", "data.epochs"),
        ("ckpt.checkpoint_every", "ckpt.checkpoint_every_epochs"),
    ):
        if given(steps) and given(epochs):
            yield ConfigFinding(
                (epochs,),
                f"{steps} is set too",
                fix=f"remove {steps} or {epochs}",
                code="EVO-CONFIG-007",
            )


def _number_findings(config: Config) -> Iterator[ConfigFinding]:
    """Yield numbers that no key can mean.

    NaN passes every bound of the schema, since each comparison with it is false; torch
    and NumPy take integers of 64 bits.
    """
    may_be_infinite = ("ckpt.checkpoint_every", "ckpt.oss_snapshot_freq")
    for key, value in leaves(config.model_dump()):
        keys = (key,)
        is_float = isinstance(value, float)
        is_nan = is_float and math.isnan(value)
        is_infinite = is_float and math.isinf(value) and key not in may_be_infinite
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if is_nan or is_infinite:
            yield ConfigFinding(
                keys,
                f"found {value}",
                expected="a finite number",
                code="EVO-CONFIG-002",
            )
        elif is_int and abs(value) > INT64:
            yield ConfigFinding(
                keys,
                f"{value} is too large",
                expected=f"at most 2**63 - 1 = {INT64}",
                code="EVO-CONFIG-002",
            )


def _model_findings(config: Config) -> Iterator[ConfigFinding]:
    model = config.model
    heads = model.num_attention_heads
    hidden = model.hidden_size
    kv = model.kv_heads
    h = "model.num_attention_heads"
    d = "model.hidden_size"
    # A head_dim that differs from the derived one was set by the user: then the heads
    # together may be wider or narrower than the model, as in Qwen 3.
    if hidden % heads and model.head_dim == max(hidden // heads, 1):
        yield ConfigFinding(
            (d, h),
            f"hidden_size={hidden} cannot be divided by num_attention_heads={heads}",
            expected=f"hidden_size={nearest(hidden, multiples_of=heads)}, num_attention_heads={nearest(heads, hidden)}",
            code="EVO-CONFIG-008",
        )
    elif model.head_dim % 2:
        yield ConfigFinding(
            (d, h),
            f"heads of odd width {model.head_dim}",
            expected="an even hidden_size / num_attention_heads, or head_dim (rotary)",
            code="EVO-CONFIG-008",
        )
    elif model.use_dynamic_ntk_rope and model.head_dim == 2:
        yield ConfigFinding(
            ("model.use_dynamic_ntk_rope", h, d),
            "heads of width 2 have one rotary angle, which dynamic NTK leaves as it is",
            expected="hidden_size / num_attention_heads of at least 4",
            fix="set model.use_dynamic_ntk_rope=False or fewer heads",
            code="EVO-CONFIG-007",
        )
    if heads % kv:
        yield ConfigFinding(
            ("model.num_kv_attention_heads", h),
            f"num_attention_heads={heads} cannot be divided by num_kv_attention_heads={kv}",
            expected=f"num_kv_attention_heads={nearest(kv, heads)}",
            code="EVO-CONFIG-008",
        )
    yield from _family_findings(model)
    facts = FAMILY_FACTS.get(model.model_type)
    if facts is not None and not facts.grouped and kv != heads:
        yield ConfigFinding(
            ("model.num_kv_attention_heads",),
            f"{model.model_type} has one key/value head for each of its {heads} heads, found {kv}",
            fix='remove model.num_kv_attention_heads, or take model_type="LLAMA2" or "INTERNLM2_PUBLIC"',
            code="EVO-CONFIG-010",
        )


def _family_findings(model: ModelConfig) -> Iterator[ConfigFinding]:
    """Yield what contradicts the facts of the family: such a model could not be exported as one of it."""
    family, facts = model.model_type, FAMILY_FACTS.get(model.model_type)
    if facts is None:
        return
    other = 'or take model_type="LLAMA2" or "INTERNLM2_PUBLIC"'
    if family == "INTERNLM" and not (model.has_qkv_bias and model.has_o_bias):
        yield ConfigFinding(
            ("model.no_bias", "model.qkv_bias", "model.o_bias"),
            "INTERNLM always has attention biases",
            fix=f"remove model.no_bias, {other}",
            code="EVO-CONFIG-010",
        )
        return
    switches = (
        ("qkv_bias", model.has_qkv_bias, facts.qkv_bias),
        ("o_bias", model.has_o_bias, facts.o_bias),
        ("qk_norm", model.qk_norm, facts.qk_norm),
    )
    for key, value, wanted in switches:
        if wanted is not None and value != wanted:
            keys = (
                (f"model.{key}",)
                if key == "qk_norm"
                else (f"model.{key}", "model.no_bias")
            )
            yield ConfigFinding(
                keys,
                f"{key} is {value}, and {family} models have {key}={wanted}",
                fix=f"remove it, {other}",
                code="EVO-CONFIG-010",
            )


def _rope_findings(config: Config) -> Iterator[ConfigFinding]:
    model = config.model
    if model.rope_scaling is None:
        return
    for key, found, expected in scaling_problems(model.rope_scaling, model.head_dim):
        yield ConfigFinding(
            (f"model.rope_scaling.{key}", "model.rope_scaling"),
            found,
            expected=expected,
            code="EVO-CONFIG-002",
        )
    if model.use_dynamic_ntk_rope:
        yield ConfigFinding(
            ("model.use_dynamic_ntk_rope", "model.rope_scaling"),
            f"dynamic NTK together with rope_scaling of type {model.rope_scaling.type!r}",
            expected="one of them",
            fix="remove model.use_dynamic_ntk_rope",
            code="EVO-CONFIG-007",
        )


def _loss_scale_findings(config: Config) -> Iterator[ConfigFinding]:
    scaler = config.grad_scaler
    start = scaler.fp16.initial_scale
    low = scaler.fp16.min_scale
    high = scaler.max_scale
    keys = (
        "grad_scaler.fp16.min_scale",
        "grad_scaler.max_scale",
        "grad_scaler.fp16.initial_scale",
    )
    if low is not None and high is not None and low > high:
        yield ConfigFinding(
            keys,
            f"min_scale={low:g} is above max_scale={high:g}",
            expected="min_scale <= max_scale",
            code="EVO-CONFIG-007",
        )
    elif (low is not None and start < low) or (high is not None and start > high):
        yield ConfigFinding(
            keys[2:] + keys[:2],
            f"initial_scale={start:g} is outside min_scale={low} .. max_scale={high}",
            expected="min_scale <= initial_scale <= max_scale",
            code="EVO-CONFIG-007",
        )


def _checkpoint_findings(config: Config) -> Iterator[ConfigFinding]:
    ckpt = config.ckpt
    every = ckpt.checkpoint_every
    if ckpt.enable_save_ckpt and not ckpt.save_ckpt_folder:
        yield ConfigFinding(
            ("ckpt.enable_save_ckpt", "ckpt.save_ckpt_folder"),
            "saving is enabled, but no folder to save to is set",
            fix='set ckpt.save_ckpt_folder="local:llm_ckpts", or ckpt.enable_save_ckpt=False',
            code="EVO-CONFIG-016",
        )
    # NaN is found by _number_findings.
    is_whole = math.isnan(every) or math.isinf(every) or every == int(every)
    if every < 1 or not is_whole:
        yield ConfigFinding(
            ("ckpt.checkpoint_every",),
            f"found {every:g}",
            expected='a whole number of steps from 1 on, or float("inf") for one checkpoint at the end',
            fix="set ckpt.enable_save_ckpt=False to save none",
            code="EVO-CONFIG-002",
        )
    yield from _folder_role_findings(ckpt.save_ckpt_folder, ckpt.snapshot_ckpt_folder)
    yield from export_findings(ckpt)
    if ckpt.load_ckpt_info is not None:
        yield from _load_content_findings(ckpt.load_ckpt_info.content)


def _folder_role_findings(
    save: str | None, snapshots: str | None
) -> Iterator[ConfigFinding]:
    reason = shared_role(save, snapshots) if save and snapshots else ""
    if reason:
        yield ConfigFinding(
            ("ckpt.snapshot_ckpt_folder", "ckpt.save_ckpt_folder"),
            f"{snapshots!r} is {reason}, {save!r}: of snapshots only the newest two stay",
            expected="a separate folder for snapshots",
            fix="remove ckpt.snapshot_ckpt_folder: snapshots then go to {save_ckpt_folder}/snapshot",
            code="EVO-CONFIG-016",
        )


def _load_content_findings(content: tuple[str, ...]) -> Iterator[ConfigFinding]:
    wrong = [word for word in content if word not in CONTENT]
    if wrong or not content:
        yield ConfigFinding(
            ("ckpt.load_ckpt_info.content",),
            f"found {wrong or content!r}",
            expected=f"some of {', '.join(CONTENT)}",
            code="EVO-CONFIG-002",
        )


def _warnings(
    config: Config, given: Callable[[str], bool]
) -> Iterator[tuple[str, str]]:
    yield from _switched_off_warnings(config, given)
    yield from _without_effect_warnings(config, given)
    yield from _training_warnings(config, given)
    yield from learning_rate_warnings(config, given)
    yield from _parallel_warnings(config)
    yield from alert_warnings(config.monitor.alert)
    yield from _snapshot_warnings(config)


def _switched_off_warnings(
    config: Config, given: Callable[[str], bool]
) -> Iterator[tuple[str, str]]:
    """Yield the keys that were set while the switch that they need has its default, which is off."""
    values = dict(leaves(config.model_dump()))
    defaults = dict(leaves(Config().model_dump()))
    # A key is set if it is given and has not its default.
    changed = []
    for key, value in values.items():
        if value != defaults.get(key) and given(key):
            changed.append(key)

    for switch in SWITCHES:
        # Whoever writes a switch knows what it turns off.
        if switch.key not in values or given(switch.key):
            continue
        state = values[switch.key]
        if not switch.off_by_default or not switch.is_off(state):
            continue
        for key in changed:
            if switch.governs(key):
                yield key, f"has no effect while {switch.key} is {state}"


def _without_effect_warnings(
    config: Config, given: Callable[[str], bool]
) -> Iterator[tuple[str, str]]:
    """Yield the keys that were set and that the values of others make inert."""
    streams = config.data.type == "streaming"
    family = config.model.model_type
    saves_once = exports_once(config.ckpt)
    has_post_norm = family == "INTERNLM2_PUBLIC" or family not in FAMILY_FACTS
    # Keys, whether they act in this config, and the reason if they do not.
    conditions = (
        (
            ("data.pack_sample_into_one",),
            config.data.use_packed_dataset or not config.data.pack_sample_into_one,
            "data.use_packed_dataset is False, which keeps documents in rows",
        ),
        (STREAMING_KEYS, streams, 'it is for data.type="streaming"'),
        (TOKEN_FILE_KEYS, not streams, 'it is for data.type="tokenized"'),
        (
            ("model.apply_post_layer_norm",),
            has_post_norm or not config.model.apply_post_layer_norm,
            f"{family} has its norms before each sublayer",
        ),
        (
            ("ckpt.export_hf.every",),
            not saves_once,
            "ckpt.checkpoint_every is inf, so the last checkpoint is the only one, and it is always exported",
        ),
    )
    for keys, acts, reason in conditions:
        for key in keys:
            if not acts and given(key):
                yield key, f"has no effect: {reason}"


def _training_warnings(
    config: Config, given: Callable[[str], bool]
) -> Iterator[tuple[str, str]]:
    data = config.data
    if data.train_folder is None and data.type == "tokenized":
        yield (
            "data.train_folder",
            "None: training on SYNTHETIC data, as documented; set it to train on text",
        )
    elif data.validates_on_synthetic:
        yield (
            "data.valid_folder",
            f"None while data.valid_every is {data.valid_every}: validation on SYNTHETIC data, as documented, whose "
            "loss says nothing about your text; set it, or data.valid_every=0",
        )
    if given("grad_scaler") and config.model.dtype != "float16":
        yield (
            "grad_scaler",
            f"has no effect with {config.model.dtype}: only float16 needs a loss scale",
        )


def _parallel_warnings(config: Config) -> Iterator[tuple[str, str]]:
    parallel = config.parallel
    chunks = config.model.num_chunks
    sharded = parallel.weight.size > 1 or parallel.zero1.fsdp
    if parallel.weight.overlap and not sharded:
        yield "parallel.weight.overlap", "has no effect while parallel.weight.size is 1"
    if parallel.weight.memory_pool:
        yield (
            "parallel.weight.memory_pool",
            "has no effect: gathered weights are freed after each block, and the next block reuses the memory",
        )
    if parallel.pipeline.interleaved_overlap and chunks == 1:
        yield (
            "parallel.pipeline.interleaved_overlap",
            "has no effect while model.num_chunks is 1",
        )
    if chunks > 1 and parallel.pipeline.size == 1:
        yield "model.num_chunks", "has no effect while parallel.pipeline.size is 1"


def _snapshot_warnings(config: Config) -> Iterator[tuple[str, str]]:
    interval = config.ckpt.oss_snapshot_freq
    if interval <= 1:
        yield "ckpt.oss_snapshot_freq", f"{interval:g} means no snapshots"
    elif interval >= config.ckpt.checkpoint_every and not math.isinf(interval):
        yield (
            "ckpt.oss_snapshot_freq",
            "not below checkpoint_every: no snapshot comes between two checkpoints",
        )
