"""Every section of a config as one frozen pydantic model; nothing here imports torch.

The sections ``model``, ``data``, ``lr_scheduler``, ``grad_profiling``, ``spike``
and ``ckpt.export_hf`` have files of their name; ``monitor`` is in ``alert.py``.

Field names are InternEvo's. A field's default and description are written here and
nowhere else. The loader (``loader.py``) resolves older spellings
(``reading/spellings.py``) before validation, so these models hold the resolved form
only. Rules that involve more than one value are in ``rules.py`` and ``layout.py``.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Literal

from pydantic import Field

from evomesh.config.alert import MonitorConfig
from evomesh.config.data import DataConfig
from evomesh.config.export_hf import ExportHfConfig
from evomesh.config.grad_profiling import GradProfilingConfig
from evomesh.config.lr_scheduler import LrConfig
from evomesh.config.model import (
    DType,
    LayerType,
    ModelConfig,
    ModelFamily,
    RotaryType,
)
from evomesh.config.optimizer import OptimizerConfig
from evomesh.config.parameter_groups import GroupsSetting
from evomesh.config.section import Section
from evomesh.config.spike import SpikeConfig

# Imported here and from here.
__all__ = [
    "DType",
    "DataConfig",
    "ExportHfConfig",
    "GradProfilingConfig",
    "LayerType",
    "LrConfig",
    "ModelConfig",
    "ModelFamily",
    "MonitorConfig",
    "OptimizerConfig",
    "RotaryType",
    "Section",
    "SpikeConfig",
]

INF = math.inf
# Label of a position that is an input but not a target (torch's ignore_index).
IGNORE = -100

Mode = Literal["mtp", "msp", "fsp", "isp"]


class RunConfig(Section):
    """Top-level scalars of a config file."""

    job_name: str = Field(
        "AnonymousJob", description="Name of the run: its folder and its log."
    )
    seed: int = Field(
        1024,
        ge=0,
        lt=2**32,
        description="Seed of the initial weights and of sampling; the data order has its own, data.seed.",
    )
    deterministic: bool = Field(
        False,
        description="Use deterministic kernels only, so that runs on CUDA repeat to the bit; may be slower.",
    )
    cudnn_deterministic: bool = Field(
        False, description="Passed on to torch.backends.cudnn."
    )
    cudnn_benchmark: bool = Field(
        False, description="Passed on to torch.backends.cudnn."
    )
    enable_tb: bool = Field(True, description="Write TensorBoard files.")
    tensorboard_folder: str | None = Field(
        None,
        description="Folder of TensorBoard files; also the environment variable of this name.",
    )
    resume_tb_folder: str | None = Field(
        None,
        description="Folder of earlier TensorBoard files to continue; also the environment variable of this name.",
    )
    tensorboard_queue: int = Field(
        10, ge=1, description="Number of steps that TensorBoard buffers before a write."
    )
    run_dir: str | None = Field(
        None,
        description="Folder of the log, metrics.jsonl and TensorBoard files; None: RUN/{JOB_NAME}/{time}.",
    )
    max_consecutive_skips: int = Field(
        100, ge=1, description="Stop after this many consecutive skipped steps."
    )


class Zero1Config(Section):
    size: int = Field(
        -1,
        description="Ranks that optimizer state is sharded over; <= 0: all data-parallel ranks, or the divisor of "
        "their number with the least state.",
    )
    fsdp: bool = Field(
        False,
        description="Shard weights and gradients over the zero1 ranks too (ZeRO-3).",
    )


class TensorConfig(Section):
    size: int = Field(1, ge=1, description="Ranks that share a layer or a sequence.")
    mode: Mode = Field(
        "mtp",
        description="What tensor ranks share: layers (mtp), activations too (msp, fsp), or sequences (isp).",
    )


class PipelineConfig(Section):
    size: int = Field(1, ge=1, description="Number of pipeline stages.")
    interleaved_overlap: bool = Field(
        False,
        description="Accepted for InternEvo: sends and receives are always asynchronous.",
    )
    schedule: Literal["1f1b", "interleaved", "zbv"] | None = Field(
        None,
        description="Order of the stages' work; None: interleaved if num_chunks > 1, else 1f1b.",
    )
    balance: bool = Field(
        False,
        description="Count embedding and head when layers are assigned to stages.",
    )


class WeightConfig(Section):
    size: int = Field(1, ge=1, description="Ranks that weights are sharded over (isp).")
    overlap: bool = Field(
        False, description="Gather weights while the device computes."
    )
    memory_pool: bool = Field(
        False,
        description="Accepted for InternEvo; memory of gathered weights is reused anyway.",
    )
    forward_overlap_per: Literal["layer", "module"] = Field(
        "layer",
        description="Weights gathered together: a layer's, or its attention's and its feed-forward network's apart.",
    )
    launch_allgather_before: Literal["wqkv", "attn", "wo", "w1"] = Field(
        "wo",
        description="Where in a layer the gather of the next layer's weights starts (forward_overlap_per layer).",
    )


class ParallelConfig(Section):
    zero1: Zero1Config = Field(
        Zero1Config(), description="Sharding of optimizer state (ZeRO); int: its size."
    )
    tensor: TensorConfig = Field(
        TensorConfig(), description="Tensor parallelism; int: its size."
    )
    pipeline: PipelineConfig = Field(
        PipelineConfig(), description="Pipeline parallelism; int: its size."
    )
    weight: WeightConfig = Field(
        WeightConfig(), description="Sharding of weights (isp); int: its size."
    )
    timeout: float | None = Field(
        None,
        gt=0,
        description="Seconds after which a collective fails; None: torch's default, 600 with NCCL and 1800 with gloo.",
    )

    @property
    def collective_timeout(self) -> timedelta | None:
        return None if self.timeout is None else timedelta(seconds=self.timeout)


class ZeroConfig(Section):
    """``hybrid_zero_optimizer``."""

    overlap_sync_grad: bool = Field(
        False, description="Reduce gradients during the backward pass."
    )
    overlap_sync_param: bool = Field(
        False, description="Gather parameters during the next forward pass."
    )
    reduce_bucket_size: int = Field(
        512 * 1024 * 1024, ge=1, description="Elements per reduction."
    )
    clip_grad_norm: float = Field(
        1.0, ge=0, description="Maximum global gradient norm; 0: no clipping."
    )
    use_split_tensor_optim: bool = Field(
        False, description="Shard optimizer state evenly, through tensors."
    )
    all_gather_size: int = Field(
        512 * 1024 * 1024, ge=1, description="Elements per gather."
    )


class Fp16Config(Section):
    initial_scale: float = Field(
        2.0**16, gt=0, description="Initial loss scale (float16 only)."
    )
    min_scale: float | None = Field(1.0, gt=0, description="Minimum loss scale.")
    growth_interval: int = Field(
        1000, ge=1, description="Steps without overflow before the loss scale grows."
    )


class ScalerConfig(Section):
    """``grad_scaler``: dynamic loss scale, used for float16 only."""

    fp16: Fp16Config = Field(
        Fp16Config(), description="Bounds and growth of the loss scale."
    )
    growth_factor: float = Field(
        2.0, gt=1, description="Factor by which the loss scale grows."
    )
    backoff_factor: float = Field(
        0.5, gt=0, lt=1, description="Factor by which the loss scale backs off."
    )
    max_scale: float | None = Field(2.0**24, gt=0, description="Maximum loss scale.")
    hysteresis: int = Field(
        2, ge=1, description="Overflows before the loss scale backs off."
    )


class AdamConfig(Section):
    lr: float = Field(1e-4, ge=0, description="Peak learning rate.")
    adam_beta1: float = Field(
        0.9, ge=0, lt=1, description="Decay of AdamW's first moment."
    )
    adam_beta2: float = Field(
        0.95, ge=0, lt=1, description="Decay of AdamW's second moment."
    )
    adam_beta2_c: float = Field(
        0.0, description="Exponent of the beta2 schedule; 0: constant."
    )
    adam_eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(
        0.01, ge=0, description="AdamW's decoupled weight decay."
    )
    no_decay: tuple[Literal["bias", "norm", "embedding"], ...] = Field(
        (),
        description="Parameters exempt from weight decay; by default none, as InternEvo documents it.",
    )
    groups: GroupsSetting = Field(
        (),
        description="Parameters with another learning rate or weight decay: "
        "[dict(pattern=..., lr_scale=..., weight_decay=...), ...]; the first pattern that matches a name holds.",
    )


class Beta2Config(Section):
    init_beta2: float | None = Field(
        None, ge=0, lt=1, description="Initial beta2; None: adam.adam_beta2."
    )
    c: float | None = Field(
        None,
        description="Exponent of the beta2 schedule; None: adam.adam_beta2_c; <= 0: constant.",
    )
    cur_iter: int = Field(
        -1,
        description="Accepted for InternEvo; a resumed run takes the step from its checkpoint.",
    )


class LossConfig(Section):
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing.")
    z_loss_coeff: float = Field(
        0.0,
        ge=0,
        description="Factor of log(Z)^2 in the loss of a target, which keeps logits from drifting; 1e-4 is usual.",
    )
    reduction: Literal["token", "micro_batch"] = Field(
        "token",
        description="Mean over all tokens of a step, or InternEvo's mean of micro-batch means.",
    )


class LoadConfig(Section):
    """``ckpt.load_ckpt_info``."""

    path: str = Field(description="Folder of the checkpoint to start from.")
    content: tuple[str, ...] = Field(
        ("model",),
        description="Parts to load: model, sampler, optimizer, scheduler, all.",
    )
    ckpt_type: str = Field(
        "internevo",
        description="internevo, internlm, normal; hf (hf_llama, hf_model), llama; xtuner; or a registered loader.",
    )
    fallback: bool = Field(
        False, description="With auto_resume: used where nothing can be resumed."
    )


class CheckpointConfig(Section):
    """``ckpt``."""

    enable_save_ckpt: bool = Field(
        False, description="Save checkpoints; unset: if save_ckpt_folder is set."
    )
    save_ckpt_folder: str | None = Field(
        None,
        description="Folder of checkpoints: a local: or plain path, boto3:s3://BUCKET.ENDPOINT/KEY or s3://BUCKET/KEY.",
    )
    checkpoint_every: float = Field(
        INF, description="Steps between checkpoints; inf: one at the end."
    )
    checkpoint_every_epochs: float | None = Field(
        None, gt=0, description="Passes between checkpoints."
    )
    load_ckpt_info: LoadConfig | None = Field(
        None,
        description="Checkpoint to start from; used with fallback=True in it, or with auto_resume=False.",
    )
    auto_resume: bool = Field(
        True, description="Resume from the newest valid checkpoint in save_ckpt_folder."
    )
    allow_changed_model: bool = Field(
        False,
        description="Load weights although the model settings then give other outputs.",
    )
    accept_schedule_change: bool = Field(
        False,
        description="Resume although the learning rate then jumps to another curve; --accept-schedule-change.",
    )
    async_upload: bool = Field(
        False, description="Upload in the background; for remote folders only."
    )
    async_upload_tmp_folder: str | None = Field(
        None, description="Local upload folder."
    )
    s3_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^/\s]+/?$",
        description="Endpoint of s3://BUCKET/KEY; None: from the environment, else AWS.",
    )
    oss_snapshot_freq: float = Field(
        INF,
        description="Steps between snapshots; unset: half of checkpoint_every in a remote folder, else none.",
    )
    snapshot_ckpt_folder: str | None = Field(
        None, description="Folder of snapshots; None: snapshot in save_ckpt_folder."
    )
    stop_file_path: str | None = Field(
        None, description="A file that ends the run at a given step."
    )
    save_optimizer: bool = Field(
        True, description="Save the optimizer state; False: weights only."
    )
    keep_last: int | None = Field(
        None, ge=1, description="Number of newest checkpoints to keep."
    )
    keep_every: int | None = Field(
        None,
        ge=1,
        description="Also keep checkpoints whose step is a multiple of this.",
    )
    enable_internevo2hf_ckpt: bool = Field(
        False,
        description="Export checkpoints in the background; unset: if export_hf is set.",
    )
    export_hf: ExportHfConfig = Field(
        ExportHfConfig(), description="Hugging Face folders written after a save."
    )


class GenerationConfig(Section):
    """``generation``: prompts, sampling and answers of ``generate.py --config``, and the ids that an export records."""

    output_folder: str | None = Field(None, description="Folder of the answers.")
    ckpt_folder: str | None = Field(None, description="Checkpoint to generate with.")
    data_folder: str | None = Field(None, description="Folder of the prompts.")
    batch_size: int | None = Field(None, ge=1, description="Prompts per batch.")
    bos_id: int = Field(
        1, description="Recorded and exported; prompts are taken as they are."
    )
    eos_id: tuple[int, ...] = Field(
        (2,), description="Id, or list of ids, that ends an answer."
    )
    pad_id: int | None = Field(
        None, description="Recorded and exported; nothing is padded."
    )
    additional_eos_token_list: tuple[int, ...] = Field(
        (), description="More ids that end an answer."
    )
    max_length: int = Field(
        100, ge=1, description="Maximum number of tokens of prompt and answer together."
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="Maximum number of new tokens of an answer."
    )
    do_sample: bool = Field(True, description="Sample; False: greedy.")
    temperature: float = Field(
        1.0, ge=0, description="Sampling temperature; 0: greedy."
    )
    num_beams: int = Field(
        1, ge=1, description="Width of beam search; 1: no beam search."
    )
    top_k: int = Field(
        50, ge=0, description="Sample from this many of the most likely tokens; 0: all."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Sample from the fewest top tokens whose probability reaches this.",
    )
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Sample from tokens with this fraction of the highest probability.",
    )
    repetition_penalty: float = Field(
        1.0, gt=0, description="Penalty for tokens that already occurred; 1: none."
    )
    length_penalty: float = Field(
        1.0, description="Exponent of the length in the score of a beam."
    )
    num_return_sequences: int = Field(1, ge=1, description="Answers per prompt.")
    seed: int = Field(1024, ge=0, description="Sampling seed.")
    paged: Literal["auto", "on", "off"] = Field(
        "off",
        description='Keep keys and values in pages: "off", "auto" (on a GPU with 16-bit weights) or "on".',
    )


class Config(Section):
    """A whole run, resolved.

    ``train``, ``plan``, ``serve`` and ``cli`` read it; ``checkpoint`` records it, and builds one for a foreign model.
    """

    # Not a section of a config file: its keys are top-level names.
    run: RunConfig = RunConfig()
    data: DataConfig = Field(DataConfig(), description="Data, packing and batches.")
    model: ModelConfig = Field(
        ModelConfig(), description="Shape and numerics of the model."
    )
    parallel: ParallelConfig = Field(
        ParallelConfig(), description="Layout of the run: sizes of the axes."
    )
    hybrid_zero_optimizer: ZeroConfig = Field(
        ZeroConfig(),
        description="Gradient clipping, and communication of gradients and parameters.",
    )
    grad_scaler: ScalerConfig = Field(
        ScalerConfig(), description="Dynamic loss scale (float16 only)."
    )
    optimizer: OptimizerConfig = Field(
        OptimizerConfig(), description="Rule that updates the weights."
    )
    adam: AdamConfig = Field(
        AdamConfig(), description="AdamW; learning rate and weight decay of every rule."
    )
    lr_scheduler: LrConfig = Field(
        LrConfig(), description="Learning rate: warm-up, shape and decay."
    )
    beta2_scheduler: Beta2Config = Field(
        Beta2Config(), description="Schedule of AdamW's beta2."
    )
    loss: LossConfig = Field(LossConfig(), description="Loss function.")
    ckpt: CheckpointConfig = Field(
        CheckpointConfig(), description="Saving and loading of checkpoints."
    )
    monitor: MonitorConfig = Field(
        MonitorConfig(), description="Alerts; also TensorBoard settings."
    )
    grad_profiling: GradProfilingConfig = Field(
        GradProfilingConfig(),
        description="Gradient norms and zeros of single layers, for the metrics.",
    )
    spike: SpikeConfig = Field(
        SpikeConfig(),
        description="Spikes of the loss and the gradient norm, and what is done about them.",
    )
    generation: GenerationConfig | None = Field(
        None,
        description="Prompts that generate.py answers, and its sampling parameters.",
    )
