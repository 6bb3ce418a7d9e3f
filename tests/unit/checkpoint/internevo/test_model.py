"""InternEvo's files by the letter of its layout, made here without the package's own writer."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evomesh.checkpoint.internevo.export import write_model
from evomesh.checkpoint.internevo.model import HeadCounts, find_model_files, read_model
from evomesh.checkpoint.loaders import checkpoint_loaders
from evomesh.checkpoint.native.load import CheckpointReader
from evomesh.checkpoint.native.save import CheckpointWriter
from evomesh.checkpoint.pickles import read_pickle
from evomesh.config.schema import ModelConfig
from evomesh.errors import UserError
from tests.support.covers import covers

H, F, V, LAYERS = 8, 12, 20, 5


def model_of(family: str) -> ModelConfig:
    return ModelConfig(
        model_type=family,
        num_layers=LAYERS,
        hidden_size=H,
        vocab_size=V,
        num_attention_heads=4,
        num_kv_attention_heads=4 if family == "INTERNLM" else 2,
        mlp_ratio=1.5,
        multiple_of=4,
        no_bias=family != "INTERNLM",
    )


def split_heads(family: str, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    kv = 4 if family == "INTERNLM" else 2
    return tuple(torch.randn(n, 2, H, generator=g) for n in (4, kv, kv))  # type: ignore[return-value]


def make(
    root: Path, family: str, tp: int, pp: int, swap: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Writes the files of a random model; returns what we must read."""
    g = torch.Generator().manual_seed(seed)
    v1 = family == "INTERNLM"
    ours: dict[str, Tensor] = {
        "embedding.weight": torch.randn(V, H, generator=g),
        "head.weight": torch.randn(V, H, generator=g),
        "norm.weight": torch.randn(H, generator=g),
    }
    counts = [LAYERS // pp + (p >= pp - LAYERS % pp) for p in range(pp)]
    first = [sum(counts[:p]) for p in range(pp)]
    files: list[list[dict[str, Tensor]]] = [[{} for _ in range(tp)] for _ in range(pp)]
    for p in range(pp):
        for t in range(tp):
            file = files[p][t]
            if p == 0:
                file["embedding.weight" if v1 else "tok_embeddings.weight"] = ours[
                    "embedding.weight"
                ].chunk(tp, 1)[t]
            if p == pp - 1:
                file["norm.weight"] = ours["norm.weight"]
                file["head.weight" if v1 else "output.weight"] = ours[
                    "head.weight"
                ].chunk(tp)[t]
    for p in range(pp):
        for i in range(counts[p]):
            q, k, v = split_heads(family, g)
            group = q.shape[0] // k.shape[0]
            name = f"layers.{first[p] + i}."
            ours[name + "attention.wqkv.weight"] = torch.cat(
                [
                    torch.cat(
                        [q[j * group : (j + 1) * group].flatten(0, 1), k[j], v[j]]
                    )
                    for j in range(len(k))
                ]
            )
            wo, w1, w2, w3 = (
                torch.randn(*s, generator=g) for s in ((H, H), (F, H), (H, F), (F, H))
            )
            n1, n2, bias = (torch.randn(H, generator=g) for _ in range(3))
            ours |= {
                name + "attention.wo.weight": wo,
                name + "attention_norm.weight": n1,
                name + "ffn_norm.weight": n2,
                name + "feed_forward.w1.weight": w1,
                name + "feed_forward.w2.weight": w2,
                name + "feed_forward.w3.weight": w3,
            }
            if v1:
                ours[name + "attention.wo.bias"] = bias
                qb = torch.randn(3, 4, 2, generator=g)
                ours[name + "attention.wqkv.bias"] = qb.transpose(0, 1).flatten()
            for t in range(tp):
                file = files[p][t]
                part = [x.chunk(tp)[t].flatten(0, 1) for x in (q, k, v)]
                pre = f"blocks.{i}." if v1 else f"layers.{i}."
                names = (
                    ("mixer.out_proj", "norm1", "norm2", "mlp")
                    if v1
                    else ("attention.wo", "attention_norm", "ffn_norm", "feed_forward")
                )
                file[f"{pre}{names[0]}.weight"] = wo.chunk(tp, 1)[t]
                file[f"{pre}{names[1]}.weight"], file[f"{pre}{names[2]}.weight"] = (
                    n1,
                    n2,
                )
                file[f"{pre}{names[3]}.w1.weight"] = w1.chunk(tp)[t]
                up, down = ("w2", "w3") if swap else ("w3", "w2")
                file[f"{pre}{names[3]}.{up}.weight"] = w3.chunk(tp)[t]
                file[f"{pre}{names[3]}.{down}.weight"] = w2.chunk(tp, 1)[t]
                if v1:
                    file[f"{pre}mixer.Wqkv.weight"] = torch.cat(part)
                    file[f"{pre}mixer.Wqkv.bias"] = qb.chunk(tp, 1)[t].flatten()
                    if t == 0:
                        file[f"{pre}mixer.out_proj.bias"] = bias
                elif family == "LLAMA2":
                    for x, rows in zip("qkv", part, strict=True):
                        file[f"{pre}attention.w{x}.weight"] = rows
                else:
                    file[f"{pre}attention.wqkv.weight"] = ours[
                        name + "attention.wqkv.weight"
                    ].chunk(tp)[t]
    root.mkdir(parents=True, exist_ok=True)
    for p in range(pp):
        for t in range(tp):
            torch.save(
                {k: v.clone() for k, v in files[p][t].items()},
                root / f"model_tp{t}_pp{p}.pt",
            )
    return ours


FAMILIES = ("INTERNLM", "INTERNLM2_PUBLIC", "LLAMA2")


def heads_of(family: str) -> HeadCounts:
    return HeadCounts(4, 4 if family == "INTERNLM" else 2)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@covers("promise:internevo-files")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("swap", [False, True])
def test_read_and_write_back(
    tmp_path: Path, family: str, tp: int, pp: int, swap: bool
) -> None:
    expected = make(tmp_path / "theirs", family, tp, pp, swap)
    read = dict(read_model(str(tmp_path / "theirs"), heads_of(family)))
    assert equal(read, expected)
    if swap:
        return
    manager = CheckpointWriter(str(tmp_path / "ours"))
    manager.save(7, read, {}, {})
    write_model(
        CheckpointReader().resolve(str(tmp_path / "ours")),
        model_of(family),
        str(tmp_path / "back"),
        tp,
        pp,
    )
    for file in (tmp_path / "theirs").iterdir():
        assert equal(torch.load(tmp_path / "back" / file.name), torch.load(file)), (
            file.name
        )
    assert (tmp_path / "back" / "7.step").exists()


def test_equal_shapes_need_a_word(tmp_path: Path) -> None:
    state = {
        f"layers.0.feed_forward.w{i}.weight": torch.full((4, 4), float(i))
        for i in (1, 2, 3)
    }
    torch.save(
        state | {"layers.0.attention.wqkv.weight": torch.zeros(12, 4)},
        tmp_path / "model_tp0_pp0.pt",
    )
    with pytest.raises(UserError, match="--w2 down or --w2 up"):
        dict(read_model(str(tmp_path), HeadCounts(2, 2)))
    up = dict(read_model(str(tmp_path), HeadCounts(2, 2), "up"))
    assert up["layers.0.feed_forward.w2.weight"][0, 0] == 3


def test_missing_files_are_named(tmp_path: Path) -> None:
    make(tmp_path, "INTERNLM", 2, 2)
    (tmp_path / "model_tp1_pp0.pt").unlink()
    with pytest.raises(UserError, match=r"model_tp1_pp0\.pt of 4 files are missing"):
        find_model_files(str(tmp_path))


class Config(dict):  # type: ignore[type-arg]
    """Takes the place of InternEvo's class while the test pickles it."""


Config.__module__ = "internlm.core.context.parallel_context"


def test_model_config_without_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    for name in (
        "internlm",
        "internlm.core",
        "internlm.core.context",
        "internlm.core.context.parallel_context",
    ):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["internlm.core.context.parallel_context"].Config = Config  # type: ignore[attr-defined]
    torch.save(Config(num_layers=4, dtype=torch.bfloat16), tmp_path / "model_config.pt")
    for name in [n for n in sys.modules if n.split(".")[0] == "internlm"]:
        monkeypatch.delitem(sys.modules, name)
    assert read_pickle(str(tmp_path / "model_config.pt")) == {
        "num_layers": 4,
        "dtype": torch.bfloat16,
    }


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/evomesh-pwned",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "model_tp0_pp0.pt"
    torch.save({"w": Evil()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"it names posix\.system"):
        read_pickle(str(path))
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="cannot be read"):
        read_pickle(str(path))
    assert not os.path.exists("/tmp/evomesh-pwned")


def test_a_zip_bomb_and_a_cut_file_are_refused(tmp_path: Path) -> None:
    import zipfile

    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (50 << 20))
    with pytest.raises(UserError, match="more than twice its size"):
        read_pickle(str(bomb))
    torch.save({"w": torch.zeros(1000)}, bomb)
    bomb.write_bytes(bomb.read_bytes()[:700])
    with pytest.raises(UserError, match="cannot be read"):
        read_pickle(str(bomb))


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_parallel_files(tmp_path: Path, family: str) -> None:
    """isp: blocks cut by rows over wp and repeated over tp, embedding and head cut over tp."""
    expected = make(tmp_path / "one", family, 1, 1)
    state = torch.load(tmp_path / "one" / "model_tp0_pp0.pt")
    (tmp_path / "isp").mkdir()
    for t in range(2):
        for w in range(4):
            part = {}
            for name, tensor in state.items():
                if "norm" in name:
                    part[name] = tensor
                elif "embedding" in name:
                    part[name] = tensor.chunk(2, 1)[t].clone()
                elif name.startswith(("head", "output")):
                    part[name] = tensor.chunk(2)[t].clone()
                else:
                    part[name] = tensor.chunk(4)[w].clone()
            torch.save(part, tmp_path / "isp" / f"model_tp{t}_wp{w}_pp0.pt")
    read = dict(read_model(str(tmp_path / "isp"), heads_of(family)))
    assert equal(read, expected)
    manager = CheckpointWriter(str(tmp_path / "ours"))
    manager.save(7, read, {}, {})
    found = CheckpointReader().resolve(str(tmp_path / "ours"))
    write_model(found, model_of(family), str(tmp_path / "back"), 2, 1, weight=4)
    for file in (tmp_path / "isp").iterdir():
        assert equal(torch.load(tmp_path / "back" / file.name), torch.load(file)), (
            file.name
        )
    write_model(found, model_of(family), str(tmp_path / "deep"), 1, 2, weight=2)
    assert equal(dict(read_model(str(tmp_path / "deep"), heads_of(family))), expected)
    with pytest.raises(
        UserError, match=r"matrices of \d+ rows are not divisible by --weight 5"
    ):
        write_model(found, model_of(family), str(tmp_path / "no"), 1, 1, weight=5)
    assert not (tmp_path / "no").exists()


def test_interleaved_stages(tmp_path: Path) -> None:
    """Two chunks on two stages: layers run chunk after chunk, and names begin with the chunk."""
    # Stages of 1, 1, 1, 2 layers.
    expected = make(tmp_path / "one", "INTERNLM2_PUBLIC", 1, 4)
    parts = [torch.load(tmp_path / "one" / f"model_tp0_pp{p}.pt") for p in range(4)]
    (tmp_path / "two").mkdir()
    for p in range(2):
        state = {
            f"{c}.{name}": t for c in range(2) for name, t in parts[2 * c + p].items()
        }
        torch.save(state, tmp_path / "two" / f"model_tp0_pp{p}.pt")
    assert equal(
        dict(read_model(str(tmp_path / "two"), heads_of("INTERNLM2_PUBLIC"))), expected
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_without_model_config_the_run_says_the_heads(
    tmp_path: Path, family: str
) -> None:
    expected = make(tmp_path, family, 2, 2)
    loader = checkpoint_loaders.get("internevo")
    assert loader is not None
    assert equal(dict(loader(str(tmp_path), model_of(family).model_dump())), expected)
    assert equal(
        dict(loader(f"local:{tmp_path}", model_of(family).model_dump())), expected
    )
    with pytest.raises(UserError, match="is not on a local disk"):
        loader("s3://bucket/9", model_of(family).model_dump())
