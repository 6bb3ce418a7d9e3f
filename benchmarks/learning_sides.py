"""The two sides of learning.py: the demo's recipe as `evomesh train` has it, and a plain transformers Llama."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
from torch.nn.functional import cross_entropy

from evomesh.config.loader import load_config
from evomesh.config.lr_scheduler import LrConfig
from evomesh.config.schema import AdamConfig, Config, LossConfig
from evomesh.data.build import ValidationSet, build_train_data, build_valid_data
from evomesh.optim.scaler import LossScaler
from evomesh.optim.schedule import learning_rate
from evomesh.parallel.grid import Grid
from evomesh.parallel.modes import MODES
from evomesh.train.allocator import keep_freed_memory
from evomesh.train.stages import build_optimizer, build_stages
from evomesh.train.step import train_step
from evomesh.train.validate import validate

DEMO = Path(__file__).parents[1] / "configs" / "demo.py"
# The steps of a schedule whose run ends with the time, however many it really has.
SCHEDULE_STEPS = 10_000
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Recipe:
    """What differs from the demo's config, and the share of the time that it gets.

    Attributes:
        phases: more settings from a share of the run on, such as another length of the segments.
    """

    settings: tuple[str, ...] = ()
    time_share: float = 1.0
    phases: tuple[tuple[float, tuple[str, ...]], ...] = ()


class Side(Protocol):
    """A model in training."""

    def step(self, progress: float) -> int:
        """Take one step, and return its number of tokens; ``progress`` is the share of the time that has passed."""
        ...

    def bits(self) -> dict[str, float]:
        """Return the bits per byte of each held-out set."""
        ...


class EvomeshSide:
    """Model, data and steps as `evomesh train` has them."""

    def __init__(self, recipe: Recipe, seed: int, data: str) -> None:
        keep_freed_memory()  # as `evomesh train` does
        self.phases = [(0.0, ()), *recipe.phases]
        self.shared = [
            *(f"data.{kind}_folder={data}/{kind}" for kind in ("train", "valid")),
            f"data.total_steps={SCHEDULE_STEPS}",
            f"data.seed={seed}",
            *recipe.settings,
        ]
        self.config = config = load_config(str(DEMO), self.shared).config
        self.grid = Grid()
        self.stages = build_stages(config, self.grid, MODES["mtp"], CPU)
        self.stages.initialize(seed, self.grid)
        self.optimizer = build_optimizer(config, self.stages, self.grid)
        self.scaler = LossScaler(config.grad_scaler, config.model.dtype)
        self.sets = build_valid_data(config.data, config.model.vocab_size)
        self.phase = -1

    def step(self, progress: float) -> int:
        due = sum(start <= progress for start, _ in self.phases) - 1
        if due != self.phase:
            self.phase = due
            sets = [*self.shared, *self.phases[due][1]]
            self.config = load_config(str(DEMO), sets).config
            vocab_size = self.config.model.vocab_size
            self.stream = build_train_data(self.config.data, vocab_size).stream()
        config = self.config
        batch = next(self.stream)
        train_step(
            batch,
            schedule=self.stages.schedule,
            optimizer=self.optimizer,
            scaler=self.scaler,
            grid=self.grid,
            loss_config=LossConfig(),
            data_types=["code", "en"],
            lr=rate(progress, config.lr_scheduler, config.adam),
            beta2=config.adam.adam_beta2,
        )
        return batch.tokens.numel()

    def bits(self) -> dict[str, float]:
        with self.optimizer.evaluated_weights():
            figures = validate(self.stages, self.sets, self.grid, CPU)
        return {one.name: figures[f"val/{one.name}_bpb"] for one in self.sets}


class TransformersSide:
    """A stock Llama of the demo's shape on rows of tokens, with torch's AdamW."""

    def __init__(self, lr: float, seed: int, data: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        sets = [f"data.{kind}_folder={data}/{kind}" for kind in ("train", "valid")]
        config = load_config(str(DEMO), sets).config
        self.sets = build_valid_data(config.data, config.model.vocab_size)
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(LlamaConfig(**llama_shape(config))).train()
        self.adam = AdamConfig(lr=lr)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=lr,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=True,
        )
        self.schedule = LrConfig(
            type="cosine", warmup_ratio=0.05, eta_min=0.1 * lr, init_steps=0
        )
        self.batches = row_batches(
            Path(data) / "train", config.data.seq_len, config.data.micro_bsz, seed
        )

    def step(self, progress: float) -> int:
        rows = next(self.batches)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(progress, self.schedule, self.adam)
        self.optimizer.zero_grad(set_to_none=True)
        self.model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return rows.numel()

    @torch.no_grad()
    def bits(self) -> dict[str, float]:
        self.model.eval()
        bits = {one.name: self._bits_of(one) for one in self.sets}
        self.model.train()
        return bits

    def _bits_of(self, valid: ValidationSet) -> float:
        """Return the bits per byte of a held-out set, each segment of it by itself."""
        nats = 0.0
        for batch in valid.batches(0, 1):
            for row, bounds in enumerate(batch.cu_seqlens.tolist()):
                for start, stop in pairwise(bounds):
                    if start == stop:
                        continue
                    part = slice(start, stop)
                    logits = self.model(input_ids=batch.tokens[row : row + 1, part])
                    labels = batch.labels[row, part]
                    loss = cross_entropy(logits.logits[0], labels, reduction="sum")
                    nats += loss.item()
        assert valid.text_bytes is not None
        return nats / math.log(2) / valid.text_bytes


def llama_shape(config: Config) -> dict[str, int | float | bool | str]:
    """Return the LlamaConfig of the model of a config."""
    model = config.model
    return dict(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.mlp_width,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        rms_norm_eps=model.layer_norm_epsilon,
        max_position_embeddings=config.data.seq_len,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )


def row_batches(
    folder: Path, length: int, rows: int, seed: int
) -> Iterator[torch.Tensor]:
    """Yield batches of rows of all texts, joined once and split evenly; each pass has its own order."""
    documents: list[list[int]] = []
    for path in sorted(folder.rglob("*.bin")):
        documents += [json.loads(line)["tokens"] for line in path.open()]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    tokens = torch.tensor([token for index in order for token in documents[index]])
    whole = tokens[: len(tokens) // length * length].view(-1, length)
    while True:
        shuffled = whole[torch.randperm(len(whole), generator=generator)]
        for start in range(0, len(shuffled) - rows + 1, rows):
            yield shuffled[start : start + rows]


def rate(progress: float, schedule: LrConfig, adam: AdamConfig) -> float:
    """Return the learning rate after a share of the time."""
    step = int(progress * SCHEDULE_STEPS)
    return learning_rate(step, schedule, adam, SCHEDULE_STEPS)
