"""Every section of a config as one frozen pydantic model; nothing here imports torch.

Field names are the documents' words. A value has its documented default here and nowhere else.
The loader (``loader.py``) brings older spellings into this form before validation (``legacy.py``), so these
models hold the resolved form only. Rules that need more than one section live in ``rules.py``.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from evomesh.config.step_values import RampupSetting, StepRanges, StepsSetting

INF = math.inf
IGNORE = -100  # label of a position that is an input but not a target (torch's ignore_index)

DType = Literal["float64", "float32", "tf32", "bfloat16", "float16"]
ModelFamily = Literal["INTERNLM", "INTERNLM2_PUBLIC", "LLAMA2"]
RotaryType = Literal["origin", "dynamic"]  # beyond the trained length: unscaled, or with dynamic NTK
Mode = Literal["mtp", "msp", "fsp", "isp"]


class Section(BaseModel):
    """Base of all sections: unknown keys, wrong types and later mutation are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=True
    )


class RunConfig(Section):
    """Top-level scalars of a config file."""

    job_name: str = "AnonymousJob"  # JOB_NAME
    seed: int = Field(
        1024, ge=0, lt=2**32
    )  # initial weights and sampling; the data order has its own, data.seed
    cudnn_deterministic: bool = False
    cudnn_benchmark: bool = False
    enable_tb: bool = True
    tensorboard_folder: str | None = None
    resume_tb_folder: str | None = None
    tensorboard_queue: int = Field(10, ge=1)  # tensorboard.queue_max_length: steps buffered before a write
    run_dir: str | None = (
        None  # --run-dir: where log, metrics.jsonl and TensorBoard go; None: RUN/{JOB_NAME}/{time}
    )
    max_consecutive_skips: int = Field(100, ge=1)  # stop when this many steps in a row had inf or NaN


class DataConfig(Section):
    type: Literal["tokenized", "streaming"] = "tokenized"
    seq_len: int = Field(2048, ge=1)
    micro_num: int = Field(1, ge=1)
    micro_bsz: int = Field(1, ge=1)
    total_steps: int = Field(50000, ge=1)
    train_folder: str | None = None  # None: synthetic data
    valid_folder: str | None = None
    valid_micro_num: int | None = Field(None, ge=1)  # None: micro_num
    valid_every: int = 0  # <= 0: never
    valid_min_length: int = Field(0, ge=0)
    min_length: int = Field(0, ge=0)  # in tokens
    min_length_dict: dict[str, int] = {}
    pack_sample_into_one: bool = False
    remainder: Literal["drop", "carry", "pad"] = "drop"
    order: Literal["internevo", "xtuner"] = "internevo"
    data_order_path: str | None = None
    dataset_weights: dict[str, float] | None = None
    skip_batches: StepsSetting = StepRanges()
    rampup_batch_size: RampupSetting = None
    seed: int = Field(1024, ge=0, lt=2**32)
    num_worker: int = Field(1, ge=0)
    gradient_accumulation: int | None = Field(None, ge=1)
    use_packed_dataset: bool = True
    fixed_random_dataset_seqlen: bool = True
    empty_cache_and_diag_interval: int = 50
    diag_outlier_ratio: float = Field(1.1, ge=1.0)
    use_shm: bool = False
    shm_path: str = "/dev/shm/metacache"
    tokenizer_path: str | None = None
    content_name: str = "text"
    subset_name: str | None = None
    split_name: str | None = None  # None: the one named train, if it is clear which
    valid_split_name: str | None = None  # None: the one named validation, else test
    allow_tokenizer_mismatch: bool = False

    @property
    def packed_length(self) -> int:
        """Tokens in one pack, which is one micro-batch."""
        return self.seq_len * self.micro_bsz

    @property
    def validation_micro_num(self) -> int:
        return self.valid_micro_num or self.micro_num


class ModelConfig(Section):
    """Shape and numerics of the decoder. ``model_type`` and ``use_fp32_norm`` are top-level keys in a config file."""

    model_type: str = "INTERNLM"
    num_layers: int = Field(48, ge=1)
    hidden_size: int = Field(2048, ge=1)
    vocab_size: int = Field(50304, ge=2)
    num_attention_heads: int = Field(32, ge=1)
    num_kv_attention_heads: int | None = Field(None, ge=1)  # None: num_attention_heads
    mlp_ratio: float = Field(4.0, gt=0)
    multiple_of: int = Field(256, ge=1)  # mlp width is rounded up to this
    dtype: DType = "float16"
    checkpoint: float = Field(0.0, ge=0, le=1)  # fraction of layers whose activations are recomputed
    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    layer_norm_epsilon: float = Field(1e-5, gt=0)
    apply_post_layer_norm: bool = False
    use_swiglu: bool = True
    no_bias: bool = False  # False: attention projections have biases
    qk_interleaved: bool = False  # True: rotary pairs are neighbouring columns; False: first and second half
    rope_base: float = Field(10000.0, gt=0)
    rope_scaling_factor: float = Field(1.0, ge=1)
    max_position_embeddings: int = Field(2048, ge=1)
    use_dynamic_ntk_rope: bool = False
    embed_grad_scale: float = 1.0
    embed_split_hidden: bool = False
    parallel_output: bool = True
    norm_head: bool = False
    residual_in_fp32: bool = False
    use_scaled_init: bool = True
    init_type: Literal["normal", "uniform"] = "normal"
    embedding_init_std: float | None = None  # None: the family's own value
    attn_wqkv_init_std: float | None = None
    attn_other_init_std: float | None = None
    ffn_uplayer_init_std: float | None = None
    ffn_other_init_std: float | None = None
    out_head_init_std: float | None = None
    drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    dropout_selective_checkpoint: bool = True
    num_chunks: int = Field(1, ge=1)
    use_flash_attn: bool = True
    use_fp32_norm: bool = False
    output_tf32: bool = False
    compile: bool | Literal["auto"] = "auto"  # auto: on CUDA only
    extra: dict[str, Any] = {}  # parameters of a user's own registered model

    @property
    def kv_heads(self) -> int:
        return self.num_kv_attention_heads or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_type(self) -> RotaryType:
        """Return what the rotary embedding does beyond the trained length."""
        return "dynamic" if self.use_dynamic_ntk_rope else "origin"

    @property
    def qkv_width(self) -> int:
        """Output width of the fused query, key and value projection."""
        return (self.num_attention_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def mlp_width(self) -> int:
        """``int(hidden * mlp_ratio)`` rounded up to ``multiple_of``."""
        return -(-int(self.hidden_size * self.mlp_ratio) // self.multiple_of) * self.multiple_of


class Zero1Config(Section):
    size: int = -1  # <= 0: the whole data-parallel group
    fsdp: bool = False


class TensorConfig(Section):
    size: int = Field(1, ge=1)
    mode: Mode = "mtp"


class PipelineConfig(Section):
    size: int = Field(1, ge=1)
    interleaved_overlap: bool = False
    schedule: Literal["1f1b", "interleaved", "zbv"] | None = None  # None: by num_chunks
    balance: bool = False


class WeightConfig(Section):
    size: int = Field(1, ge=1)
    overlap: bool = False
    memory_pool: bool = False


class ParallelConfig(Section):
    zero1: Zero1Config = Zero1Config()
    tensor: TensorConfig = TensorConfig()
    pipeline: PipelineConfig = PipelineConfig()
    weight: WeightConfig = WeightConfig()


class ZeroConfig(Section):
    """``hybrid_zero_optimizer``."""

    overlap_sync_grad: bool = False
    overlap_sync_param: bool = False
    reduce_bucket_size: int = Field(512 * 1024 * 1024, ge=1)  # elements
    clip_grad_norm: float = Field(1.0, ge=0)  # 0: no clipping
    use_split_tensor_optim: bool = False
    all_gather_size: int = Field(512 * 1024 * 1024, ge=1)  # elements


class Fp16Config(Section):
    initial_scale: float = Field(2.0**16, gt=0)
    min_scale: float | None = Field(1.0, gt=0)
    growth_interval: int = Field(1000, ge=1)


class ScalerConfig(Section):
    """``grad_scaler``: dynamic loss scale, used for float16 only."""

    fp16: Fp16Config = Fp16Config()
    growth_factor: float = Field(2.0, gt=1)
    backoff_factor: float = Field(0.5, gt=0, lt=1)
    max_scale: float | None = Field(2.0**24, gt=0)
    hysteresis: int = Field(2, ge=1)


class AdamConfig(Section):
    lr: float = Field(1e-4, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_beta2_c: float = 0.0
    adam_eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    no_decay: tuple[Literal["bias", "norm", "embedding"], ...] = ()  # what is left out of weight decay


class LrConfig(Section):
    """``lr_scheduler``: linear warm-up, then cosine."""

    total_steps: int | None = Field(None, ge=1)  # None: data.total_steps
    init_steps: int = Field(0, ge=0)
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    eta_min: float = Field(0.0, ge=0)
    last_epoch: int = -1


class Beta2Config(Section):
    init_beta2: float | None = Field(None, ge=0, lt=1)  # None: adam.adam_beta2
    c: float | None = None  # None: adam.adam_beta2_c; <= 0: constant
    cur_iter: int = -1


class LossConfig(Section):
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    reduction: Literal["token", "micro_batch"] = "token"


class LoadConfig(Section):
    """``ckpt.load_ckpt_info``."""

    path: str
    content: tuple[str, ...] = ("model",)
    ckpt_type: str = "internevo"


class CheckpointConfig(Section):
    """``ckpt``."""

    enable_save_ckpt: bool = False
    save_ckpt_folder: str | None = None
    checkpoint_every: float = INF  # successful steps; inf: at the end only
    load_ckpt_info: LoadConfig | None = None
    auto_resume: bool = True
    async_upload: bool = False
    async_upload_tmp_folder: str | None = None
    s3_endpoint: str | None = Field(
        None, pattern=r"^https?://[^/\s]+/?$"
    )  # of s3://BUCKET/KEY in this section
    oss_snapshot_freq: float = INF
    snapshot_ckpt_folder: str | None = None
    stop_file_path: str | None = None
    save_optimizer: bool = True
    keep_last: int | None = Field(None, ge=1)
    keep_every: int | None = Field(None, ge=1)


class AlertConfig(Section):
    enable_feishu_alert: bool = False
    feishu_alert_address: str | None = None
    light_monitor_address: str | None = None
    alert_file_path: str | None = None


class MonitorConfig(Section):
    alert: AlertConfig = AlertConfig()


class GenerationConfig(Section):
    """``generation``: what ``generate.py --config`` does, and the ids that an export hands on."""

    output_folder: str | None = None
    ckpt_folder: str | None = None
    data_folder: str | None = None
    batch_size: int | None = Field(None, ge=1)
    bos_id: int = 1
    eos_id: tuple[int, ...] = (2,)
    pad_id: int | None = None
    additional_eos_token_list: tuple[int, ...] = ()
    max_length: int = Field(100, ge=1)
    max_new_tokens: int | None = Field(None, ge=1)
    do_sample: bool = True
    temperature: float = Field(1.0, ge=0)
    num_beams: int = Field(1, ge=1)
    top_k: int = Field(50, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    length_penalty: float = 1.0
    num_return_sequences: int = Field(1, ge=1)
    seed: int = Field(1024, ge=0)


class Config(Section):
    """A whole run, resolved.

    ``train``, ``plan``, ``serve`` and ``cli`` read it; ``checkpoint`` records it, and builds one for a foreign model.
    """

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    hybrid_zero_optimizer: ZeroConfig = ZeroConfig()
    grad_scaler: ScalerConfig = ScalerConfig()
    adam: AdamConfig = AdamConfig()
    lr_scheduler: LrConfig = LrConfig()
    beta2_scheduler: Beta2Config = Beta2Config()
    loss: LossConfig = LossConfig()
    ckpt: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    generation: GenerationConfig | None = None
