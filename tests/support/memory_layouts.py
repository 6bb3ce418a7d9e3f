"""Layouts whose memory is measured in real steps and predicted by the planner, and the job that measures it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from evomesh.config.schema import Config
from evomesh.data.batch import Batch
from evomesh.optim.scaler import LossScaler
from evomesh.optim.zero import ZeroOptimizer
from evomesh.parallel.build import build_grid
from evomesh.parallel.modes import MODES
from evomesh.train.stages import build_optimizer, build_stages
from evomesh.train.step import train_step
from tests.support.live_tensors import LiveTensors

SIZES = {
    "model_type": "LLAMA2",
    "dtype": "bfloat16",
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_kv_attention_heads": 2,
    "mlp_ratio": 2.0,
    "multiple_of": 8,
    "vocab_size": 384,
    "no_bias": True,
}
DATA = {"seq_len": 128, "micro_bsz": 1, "micro_num": 4}
HELD = ("weights", "masters", "moments", "gradients")


@dataclass(frozen=True)
class MemoryLayout:
    """A name, a number of ranks, and the sections of a config that differ from a plain model in bfloat16."""

    name: str
    ranks: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        return Config.model_validate(
            {
                "model": SIZES | self.model,
                "data": DATA | self.data,
                "parallel": self.parallel,
                "hybrid_zero_optimizer": self.zero,
                "optimizer": self.optimizer,
                "loss": self.loss,
            }
        )


def batch_of(config: Config) -> Batch:
    """Micro-batches of full segments, every token with a target."""
    data = config.data
    tokens = data.packed_length
    draw = torch.Generator().manual_seed(0)
    shape = (data.micro_num, tokens)
    ids = torch.randint(0, config.model.vocab_size, shape, generator=draw)
    positions = torch.arange(tokens) % data.seq_len
    bounds = torch.arange(0, tokens + 1, data.seq_len, dtype=torch.int32)
    return Batch(
        tokens=ids,
        labels=ids.roll(-1, 1),
        position_ids=positions.repeat(data.micro_num, 1),
        type_ids=torch.zeros(shape, dtype=torch.long),
        cu_seqlens=bounds.repeat(data.micro_num, 1),
        max_seqlen=data.seq_len,
    )


def measure_step(rank: int, layout: MemoryLayout) -> dict[str, int]:
    """The bytes by kind at the peak of the second step of this rank."""
    config = layout.config
    grid = build_grid(config.parallel, layout.ranks, rank)
    tracker = LiveTensors()
    with tracker:
        mode = MODES[config.parallel.tensor.mode]
        stages = build_stages(config, grid, mode, torch.device("cpu"))
        stages.initialize(7, grid)
        optimizer = build_optimizer(config, stages, grid)
        _label(tracker, optimizer, list(stages.parameters().values()))
        scaler = LossScaler(config.grad_scaler, config.model.dtype)
        for _ in range(2):
            batch = batch_of(config)
            tracker.restart()
            train_step(
                batch,
                schedule=stages.schedule,
                optimizer=optimizer,
                scaler=scaler,
                grid=grid,
                loss_config=config.loss,
                data_types=["en"],
                lr=1e-4,
                beta2=0.95,
            )
    return tracker.at_peak


def _label(
    tracker: LiveTensors, optimizer: ZeroOptimizer, parameters: list[torch.Tensor]
) -> None:
    for slot in optimizer.slots:
        if slot.accumulated_grad is not None:
            tracker.label(slot.accumulated_grad, "gradients")
    for name, tensor in optimizer.state_tensors().items():
        kind = "masters" if name.startswith("optim.master.") else "moments"
        tracker.label(tensor, kind)
    for parameter in parameters:
        tracker.label(parameter, "weights")
    tracker.with_gradients = parameters


def _pipeline(size: int, **options: Any) -> dict[str, Any]:
    return {"pipeline": {"size": size, **options}}


def _tensor(size: int, mode: str, **sections: Any) -> dict[str, Any]:
    return {"tensor": {"size": size, "mode": mode}, **sections}


WIDE = {"dtype": "float32"}
FSDP = {"zero1": {"size": -1, "fsdp": True}}
OVERLAP = {
    "overlap_sync_grad": True,
    "overlap_sync_param": True,
    "reduce_bucket_size": 40_000,
}
ISP = {"tensor": {"size": 2, "mode": "isp"}, "weight": {"size": 2}}

LAYOUTS = [
    # One rank: dtypes, recomputation, families, losses, rules.
    MemoryLayout("bfloat16"),
    MemoryLayout("float32", model=WIDE),
    MemoryLayout("float16", model={"dtype": "float16"}),
    MemoryLayout("float64", model={"dtype": "float64"}),
    MemoryLayout("half recomputed", model={"checkpoint": 0.5}),
    MemoryLayout("all recomputed, float32", model=WIDE | {"checkpoint": 1.0}),
    MemoryLayout("long sequences", data={"seq_len": 512, "micro_num": 2}),
    MemoryLayout("two sequences a micro-batch", data={"micro_bsz": 2, "micro_num": 2}),
    MemoryLayout("large vocabulary", model={"vocab_size": 4096}),
    MemoryLayout("tied embedding", model={"tie_word_embeddings": True}),
    MemoryLayout(
        "smoothing and z-loss", loss={"label_smoothing": 0.1, "z_loss_coeff": 1e-4}
    ),
    MemoryLayout("muon", optimizer={"type": "muon"}),
    MemoryLayout(
        "lion, average of weights", optimizer={"type": "lion", "ema": {"decay": 0.9}}
    ),
    MemoryLayout(
        "schedule-free, float32", model=WIDE, optimizer={"type": "schedule_free"}
    ),
    # Two ranks.
    MemoryLayout("zero1", 2),
    MemoryLayout("zero1, float32", 2, model=WIDE),
    MemoryLayout("zero1, overlap, small buckets", 2, zero=OVERLAP),
    MemoryLayout("zero1, overlap, float32", 2, model=WIDE, zero=OVERLAP),
    MemoryLayout("replicas", 2, parallel={"zero1": {"size": 1}}),
    MemoryLayout("fsdp", 2, parallel=FSDP),
    MemoryLayout(
        "fsdp, float32, recomputed", 2, model=WIDE | {"checkpoint": 1.0}, parallel=FSDP
    ),
    MemoryLayout("mtp", 2, parallel=_tensor(2, "mtp")),
    MemoryLayout("msp", 2, parallel=_tensor(2, "msp")),
    MemoryLayout("fsp, float32", 2, model=WIDE, parallel=_tensor(2, "fsp")),
    MemoryLayout("isp", 2, parallel=ISP),
    MemoryLayout(
        "isp, overlap, float32",
        2,
        model=WIDE,
        parallel=ISP | {"weight": {"size": 2, "overlap": True}},
    ),
    MemoryLayout("1f1b", 2, parallel=_pipeline(2)),
    MemoryLayout(
        "1f1b, one micro-batch", 2, data={"micro_num": 1}, parallel=_pipeline(2)
    ),
    MemoryLayout(
        "1f1b, eight micro-batches, float32",
        2,
        model=WIDE,
        data={"micro_num": 8},
        parallel=_pipeline(2),
    ),
    # Four ranks.
    MemoryLayout("zero1 of two", 4, parallel={"zero1": {"size": 2}}, zero=OVERLAP),
    MemoryLayout("fsdp, small batch", 4, data={"micro_num": 1}, parallel=FSDP),
    MemoryLayout("1f1b of four", 4, data={"micro_num": 8}, parallel=_pipeline(4)),
    MemoryLayout(
        "interleaved",
        4,
        model={"num_chunks": 2},
        data={"micro_num": 8},
        parallel=_pipeline(2),
    ),
    MemoryLayout(
        "interleaved of four, recomputed",
        4,
        model={"num_chunks": 2, "num_layers": 8, "checkpoint": 0.5},
        data={"micro_num": 8},
        parallel=_pipeline(4),
    ),
    MemoryLayout(
        "zbv",
        4,
        model={"num_chunks": 2},
        data={"micro_num": 8},
        parallel=_pipeline(2, schedule="zbv"),
    ),
    MemoryLayout(
        "zbv of four, float32",
        4,
        model=WIDE | {"num_chunks": 2, "num_layers": 8},
        data={"micro_num": 8},
        parallel=_pipeline(4, schedule="zbv"),
    ),
    MemoryLayout("msp and 1f1b", 4, parallel=_tensor(2, "msp", **_pipeline(2))),
    MemoryLayout("mtp and zero1, float32", 4, model=WIDE, parallel=_tensor(2, "mtp")),
    MemoryLayout(
        "isp and zero1, recomputed", 4, model={"checkpoint": 1.0}, parallel=ISP
    ),
    MemoryLayout("fsdp and 1f1b", 4, parallel=FSDP | _pipeline(2)),
]
