"""The ``data`` section of a config: files, packs, steps and order."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evomesh.config.data_stages import StagesSetting
from evomesh.config.evaluation import EvaluationConfig, SamplesConfig
from evomesh.config.section import Section
from evomesh.config.step_values import RampupSetting, StepRanges, StepsSetting


class StopWhenConfig(Section):
    """``data.stop_when``."""

    metric: str = Field(
        description="Figure of a validation, such as val/en_loss: an accuracy is better when higher, any other figure "
        "when lower; or of a task, such as eval/TASK/acc, for which the task says what is better."
    )
    patience: int = Field(
        3, ge=1, description="The run ends after so many validations without a gain."
    )
    min_delta: float = Field(
        0.0, ge=0, description="Smaller improvements do not count."
    )


# The built-in chat templates (``evomesh.data.chat_styles``), and those of XTuner
# (``evomesh.data.instruction_styles``).
ChatTemplateName = Literal[
    "internlm",
    "chatml",
    "llama3",
    "xtuner_default",
    "xtuner_zephyr",
    "xtuner_mistral",
    "xtuner_code_llama",
    "xtuner_llama2",
    "xtuner_vicuna",
    "xtuner_wizardcoder",
    "xtuner_deepseek_coder",
    "xtuner_baichuan",
    "xtuner_baichuan2",
]


class DataConfig(Section):
    type: Literal["tokenized", "streaming"] = Field(
        "tokenized",
        description="tokenized: token files; streaming, or hf: text is tokenized while it is read.",
    )
    seq_len: int = Field(
        2048, ge=1, description="Longest attention segment, in tokens."
    )
    micro_num: int = Field(1, ge=1, description="Micro-batches per step.")
    micro_bsz: int = Field(1, ge=1, description="Packed length = micro_bsz * seq_len.")
    total_steps: int = Field(
        50000, ge=1, description="Training ends after this many steps."
    )
    epochs: float | None = Field(
        None, gt=0, description="Passes over the token files; sets total_steps."
    )
    train_folder: str | None = Field(
        None,
        description="Folder of tokenized data; None: synthetic data, with a warning.",
    )
    valid_folder: str | None = Field(
        None,
        description="Folder of validation sets; None: synthetic data, with a warning.",
    )
    valid_micro_num: int | None = Field(
        None, ge=1, description="Micro-batches of a validation step; None: micro_num."
    )
    valid_every: int = Field(0, description="Steps between validations; <= 0: never.")
    valid_at_start: bool = Field(
        True, description="Validate before the first step too, if valid_every is set."
    )
    valid_at_end: bool = Field(
        True, description="Validate after the last step too, if valid_every is set."
    )
    stop_when: StopWhenConfig | None = Field(
        None, description="End the run early, when its validation does not improve."
    )
    sample_every: int = Field(
        0, description="Steps between answers to samples.prompts; <= 0: never."
    )
    samples: SamplesConfig | None = Field(
        None, description="Prompts that the model answers during training."
    )
    eval_every: int = Field(
        0, description="Steps between runs of evaluation.tasks; <= 0: never."
    )
    evaluation: EvaluationConfig | None = Field(
        None, description="Benchmark tasks that are run during training."
    )
    valid_min_length: int = Field(
        0, ge=0, description="Validation samples with fewer tokens are left out."
    )
    min_length: int = Field(
        0,
        ge=0,
        description="Documents with fewer tokens are left out (InternEvo's guide says rows).",
    )
    min_length_dict: dict[str, int] = Field(
        {}, description="min_length by part of the path."
    )
    pack_sample_into_one: bool = Field(
        False, description="Attend across the documents of a pack."
    )
    remainder: Literal["drop", "carry", "pad"] = Field(
        "drop", description="What happens to tokens that do not fill a pack."
    )
    order: Literal["internevo", "xtuner"] = Field(
        "internevo", description="Shuffle and label as InternEvo or as XTuner does."
    )
    data_order_path: str | None = Field(
        None, description="File with the order of the data files, in XTuner's format."
    )
    dataset_weights: dict[str, float] | None = Field(
        None, description="Shares of the packs, by part of the path."
    )
    stages: StagesSetting = Field(
        (),
        description="Parts of the run with their own data, each until a step or a number of tokens.",
    )
    skip_batches: StepsSetting = Field(
        StepRanges(), description="Steps whose data is consumed without training on it."
    )
    rampup_batch_size: RampupSetting = Field(
        None,
        description="Growing micro_num: start, increment, steps between increments.",
    )
    seed: int = Field(
        1024, ge=0, lt=2**32, description="Seed of the order of the packs."
    )
    num_worker: int = Field(1, ge=0, description="Background reader threads.")
    gradient_accumulation: int | None = Field(
        None, ge=1, description="Another name of micro_num, and must equal it."
    )
    use_packed_dataset: bool = Field(
        True,
        description="False: one document a row, cut and padded to seq_len; micro_bsz rows a micro-batch.",
    )
    fixed_random_dataset_seqlen: bool = Field(
        True, description="Synthetic samples fill seq_len."
    )
    empty_cache_and_diag_interval: int = Field(
        50,
        description="Steps between freeing cached memory and looking for slow ranks.",
    )
    diag_outlier_ratio: float = Field(
        1.1,
        ge=1.0,
        description="A rank is slow if it takes this many times the median.",
    )
    use_shm: bool = Field(
        False, description="Keep one copy of the packing index per node."
    )
    shm_path: str = Field(
        "/dev/shm/metacache", description="Where use_shm keeps the packing index."
    )
    tokenizer_path: str | None = Field(None, description="Tokenizer of the data.")
    chat_template: ChatTemplateName | None = Field(
        None,
        description="Built-in chat template the data was tokenized with; chats use it if the tokenizer has none, and "
        "exports have it where Jinja can express it.",
    )
    content_name: str = Field("text", description="Text column of streaming data.")
    encoding: str = Field(
        "utf-8",
        description="Encoding of the text files of streaming data, such as gb18030.",
    )
    subset_name: str | None = Field(None, description="Subset of streaming data.")
    split_name: str | None = Field(
        None,
        description="Split of streaming data; None: the one named train, if that is unambiguous.",
    )
    valid_split_name: str | None = Field(
        None,
        description="Split of streaming data to validate on; None: the one named validation, else test.",
    )
    allow_tokenizer_mismatch: bool = Field(
        False,
        description="Train even if training and validation data have different tokenizers.",
    )

    @property
    def packed_length(self) -> int:
        """Tokens in one pack, which is one micro-batch."""
        return self.seq_len * self.micro_bsz

    @property
    def validates_on_synthetic(self) -> bool:
        """Return whether the validation of a run says nothing about the data that it trains on, which are real."""
        trains_on_text = self.type == "streaming" or self.train_folder is not None
        return trains_on_text and self.valid_every > 0 and self.valid_folder is None

    @property
    def validation_micro_num(self) -> int:
        return self.valid_micro_num or self.micro_num
