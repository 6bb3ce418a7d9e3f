from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evomesh.config.schema import ModelConfig
from evomesh.layers.attention import Attention, SequenceBounds, attend
from evomesh.layers.sequence_bounds import single_sequence
from evomesh.models.decoder import Decoder
from evomesh.models.registry import build_model, initialize_weights
from evomesh.parallel.grid import Axis, Grid
from evomesh.parallel.spec import spec_of
from tests.support.covers import covers

LENGTHS = [5, 1, 9, 9, 3]
T, V = sum(LENGTHS), 50


def tiny(**changes: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "model_type": "INTERNLM2_PUBLIC",
        "num_layers": 4,
        "hidden_size": 24,
        "vocab_size": V,
        "num_attention_heads": 4,
        "num_kv_attention_heads": 2,
        "mlp_ratio": 2.0,
        "multiple_of": 8,
        "dtype": "float64",
        "embedding_init_std": 1.0,
        "attn_wqkv_init_std": 0.4,
        "ffn_uplayer_init_std": 0.4,
        "attn_other_init_std": 0.4,
        "ffn_other_init_std": 0.4,
        "out_head_init_std": 0.5,
    }
    return ModelConfig(**base | changes)


def make(config: ModelConfig, **layout: Any) -> Decoder:
    model = build_model(config, **layout)
    assert isinstance(model, Decoder)
    initialize_weights(model, seed=7)
    return model


def pack(lengths: list[int]) -> SequenceBounds:
    bounds = torch.tensor([0, *lengths, 0]).cumsum(0).int()
    return SequenceBounds(
        torch.cat([torch.arange(n) for n in lengths]), bounds, max(lengths)
    )


def tokens() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    ids, labels = torch.randint(0, V, (2, T))
    labels[[4, 5, 14, 23, 26]] = -100
    return ids, labels


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of a tensor relative to its largest element, over all tensors."""
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).abs().max() / b[n].abs().max()).item() for n in b)


def test_names_are_the_global_ones() -> None:
    names = set(dict(build_model(tiny(), layer_range=range(2, 4)).named_parameters()))
    block = {
        "attention.wqkv.weight",
        "attention.wqkv.bias",
        "attention.wo.weight",
        "attention.wo.bias",
        "attention_norm.weight",
        "ffn_norm.weight",
        "feed_forward.w1.weight",
        "feed_forward.w2.weight",
        "feed_forward.w3.weight",
    }
    assert names == {f"layers.{i}.{part}" for i in (2, 3) for part in block} | {
        "norm.weight",
        "head.weight",
    }


@pytest.mark.parametrize("ntk", [False, True])
def test_packed_documents_are_as_if_alone(ntk: bool) -> None:
    model = make(tiny(use_dynamic_ntk_rope=ntk, max_position_embeddings=6))
    ids, labels = tokens()
    packed = model.loss(model(ids, pack(LENGTHS)), labels)
    packed.scaled_sum.backward()
    together = {n: g.clone() for n, g in gradients(model).items()}
    model.zero_grad()
    alone = []
    for start, stop in pairwise([0, *torch.tensor(LENGTHS).cumsum(0).tolist()]):
        part = model.loss(
            model(ids[start:stop], single_sequence(stop - start)), labels[start:stop]
        )
        part.scaled_sum.backward()
        alone.append(part.nll)
    torch.testing.assert_close(packed.nll, torch.cat(alone), rtol=1e-12, atol=1e-12)
    assert relative(together, gradients(model)) < 1e-12


@pytest.mark.parametrize("recompute", [0.0, 0.6])
def test_micro_batches_add_up_to_one_batch(recompute: float) -> None:
    model = make(tiny(checkpoint=recompute, embed_grad_scale=0.3))
    ids, labels = tokens()
    scale = 1 / int((labels >= 0).sum())
    model.loss(model(ids, pack(LENGTHS)), labels, scale, 0.1).scaled_sum.backward()
    one = {n: g.clone() for n, g in gradients(model).items()}
    model.zero_grad()
    for part, lengths in ((slice(0, 15), LENGTHS[:3]), (slice(15, T), LENGTHS[3:])):
        model.loss(
            model(ids[part], pack(lengths)), labels[part], scale, 0.1
        ).scaled_sum.backward()
    assert relative(gradients(model), one) < 1e-12


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_recompute_changes_no_bit(dtype: str) -> None:
    ids, labels = tokens()
    results = []
    for fraction in (0.0, 1.0):
        model = make(tiny(checkpoint=fraction, dtype=dtype))
        out = model.loss(model(ids, pack(LENGTHS)), labels)
        out.scaled_sum.backward()
        results.append((out.nll, gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][n], g) for n, g in results[1][1].items())


@covers("model.checkpoint")
@pytest.mark.parametrize(
    ("family", "fraction", "layers", "expected"),
    [
        ("INTERNLM", 0.3, 4, 1),
        ("LLAMA2", 0.3, 4, 2),
        ("INTERNLM2_PUBLIC", 0.3, 10, 3),
        ("INTERNLM", 0.3, 10, 3),
        ("INTERNLM", 1.0, 4, 4),
        ("LLAMA2", 0.0, 4, 0),
    ],
)
def test_how_many_layers_are_recomputed(
    family: str, fraction: float, layers: int, expected: int
) -> None:
    config = tiny(
        model_type=family,
        num_kv_attention_heads=None,
        checkpoint=fraction,
        num_layers=layers,
    )
    assert make(config).recomputed_layers == expected


def test_stages_make_up_the_whole_model() -> None:
    config = tiny()
    model, stages = (
        make(config),
        [make(config, layer_range=r) for r in (range(1), range(1, 3), range(3, 4))],
    )
    split = {n: p for stage in stages for n, p in stage.named_parameters()}
    assert split.keys() == dict(model.named_parameters()).keys()
    ids, labels = tokens()
    model.loss(model(ids, pack(LENGTHS)), labels).scaled_sum.backward()
    x = ids
    for stage in stages:
        x = stage(x, pack(LENGTHS))
    stages[-1].loss(x, labels).scaled_sum.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, split[name]), name
        assert parameter.grad is not None and torch.equal(
            parameter.grad, split[name].grad
        ), name
    with pytest.raises(ValueError, match="no output head"):
        stages[0].logits(x)


def test_post_norm_blocks_have_no_final_norm() -> None:
    model = make(tiny(apply_post_layer_norm=True, num_layers=1))
    assert model.norm is None
    ids, _ = tokens()
    block = model.layers["0"]
    x, tables = (
        model.embedding.weight[ids],
        model.rotary.tables(pack(LENGTHS), torch.float64),
    )
    x = block.attention_norm(x + block.attention(x, tables, pack(LENGTHS)))
    x = block.ffn_norm(x + block.feed_forward(x))
    assert torch.equal(model(ids, pack(LENGTHS)), x)
    assert (
        make(
            tiny(
                model_type="INTERNLM",
                num_kv_attention_heads=None,
                apply_post_layer_norm=True,
            )
        ).norm
        is not None
    )


@covers("model.norm_head")
def test_norm_head_has_rows_of_length_one_and_their_gradient() -> None:
    model = make(tiny(norm_head=True))
    hidden = torch.randn(T, 24, dtype=torch.float64, requires_grad=True)
    _, labels = tokens()
    weight = model.head.weight
    unit = weight / weight.pow(2).sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(
        model.logits(hidden), hidden @ unit.T, rtol=1e-13, atol=1e-13
    )
    expected = nn.functional.cross_entropy(hidden @ unit.T, labels, reduction="sum")
    leaves = [hidden, weight]
    ours = torch.autograd.grad(model.loss(hidden, labels).scaled_sum, leaves)
    for a, b in zip(ours, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@covers("model.embed_grad_scale")
def test_embed_grad_scale_scales_embedding_and_head_only() -> None:
    found = []
    for scale in (1.0, 0.25):
        model = make(tiny(embed_grad_scale=scale))
        ids, labels = tokens()
        model.loss(model(ids, pack(LENGTHS)), labels).scaled_sum.backward()
        found.append(gradients(model))
    for name, plain in found[0].items():
        factor = 0.25 if name in ("embedding.weight", "head.weight") else 1.0
        assert torch.equal(found[1][name], plain * factor), name


@covers("model.residual_in_fp32")
def test_residual_in_fp32_keeps_the_stream_wide() -> None:
    ids, _ = tokens()
    exact = make(tiny())
    errors = []
    for wide in (False, True):
        model = make(
            tiny(dtype="bfloat16", residual_in_fp32=wide, num_layers=4),
            layer_range=range(3),
        )
        stream = model(ids, pack(LENGTHS))
        assert stream.dtype is (torch.float32 if wide else torch.bfloat16)
        expected = make(tiny(), layer_range=range(3))(ids, pack(LENGTHS))
        errors.append((stream.double() - expected).abs().mean().item())
    assert errors[1] < errors[0]
    assert exact(ids, pack(LENGTHS)).dtype is torch.float64


@covers("model.dtype")
@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("fp32_norm", [False, True])
def test_narrow_dtypes_train_near_float64(dtype: str, fp32_norm: bool) -> None:
    """Beside float64 with the same, rounded weights."""
    ids, labels = tokens()
    found: list[Any] = []
    rounded = make(
        tiny(dtype=dtype, use_fp32_norm=fp32_norm, num_layers=2)
    ).state_dict()
    for kind in ("float64", dtype):
        model = make(tiny(dtype=kind, use_fp32_norm=fp32_norm, num_layers=2))
        model.load_state_dict(rounded)
        out = model.loss(model(ids, pack(LENGTHS)), labels)
        out.scaled_sum.backward()
        found.append((out, {n: g.double() for n, g in gradients(model).items()}))
    tolerance = {"float32": 1e-5, "tf32": 1e-5, "bfloat16": 8e-2, "float16": 1e-2}[
        dtype
    ]
    assert found[1][0].scaled_sum.item() == pytest.approx(
        found[0][0].scaled_sum.item(), rel=tolerance
    )
    for name, exact in found[0][1].items():
        difference = (found[1][1][name] - exact).norm() / exact.norm()
        assert difference < tolerance, name
    narrow = build_model(tiny(dtype=dtype, use_fp32_norm=fp32_norm))
    for name, parameter in narrow.named_parameters():
        wide = dtype in ("float32", "tf32") or (fp32_norm and "norm" in name)
        assert (parameter.dtype is torch.float32) == wide, name


def test_layer_norm_and_gelu_variant_trains() -> None:
    model = make(tiny(norm_type="layernorm", use_swiglu=False))
    ids, labels = tokens()
    model.loss(model(ids, pack(LENGTHS)), labels).scaled_sum.backward()
    assert "layers.0.attention_norm.bias" in gradients(model)
    assert "layers.0.feed_forward.w3.weight" not in gradients(model)


def test_generation_can_keep_keys_and_values() -> None:
    """An ``attend`` with a cache, one token at a time, gives the logits of the whole sequence."""
    model, (ids, _) = make(tiny()), tokens()
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def cached(
        q: Tensor, k: Tensor, v: Tensor, bounds: SequenceBounds, module: Attention
    ) -> Tensor:
        layer = module.layer
        if layer in kept:
            k, v = torch.cat([kept[layer][0], k]), torch.cat([kept[layer][1], v])
        kept[layer] = k, v
        queries = torch.cat([q.new_zeros(len(k) - len(q), *q.shape[1:]), q])
        return attend(queries, k, v, single_sequence(len(k)), module)[-len(q) :]

    with torch.no_grad():
        expected = model.logits(model(ids, single_sequence(T)))
        steps = [
            model.logits(model(ids[i : i + 1], single_sequence(1, start=i), cached))
            for i in range(T)
        ]
    torch.testing.assert_close(torch.cat(steps), expected, rtol=1e-11, atol=1e-11)


@covers(
    "model.embedding_init_std",
    "model.attn_wqkv_init_std",
    "model.attn_other_init_std",
    "model.ffn_uplayer_init_std",
    "model.ffn_other_init_std",
    "model.out_head_init_std",
)
@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        (
            "INTERNLM",
            {},
            {
                "embedding": 0.0052,
                "wqkv": 0.006,
                "wo": 0.006 / 2,
                "w1": 0.006,
                "w2": 0.003,
                "head": 0.0052,
            },
        ),
        (
            "INTERNLM",
            {"use_scaled_init": False},
            {"wo": 0.0015, "w2": 0.0015, "w3": 0.006},
        ),
        (
            "LLAMA2",
            {},
            {
                "embedding": 0.02,
                "wqkv": 0.02,
                "wo": 0.01,
                "w1": 0.02,
                "w2": 0.01,
                "head": 0.02,
            },
        ),
        (
            "INTERNLM2_PUBLIC",
            {"attn_other_init_std": 0.1, "init_type": "uniform"},
            {"wo": 0.05, "w2": 0.01},
        ),
        (
            "LLAMA2",
            {"ffn_other_init_std": 0.3, "use_scaled_init": False},
            {"wo": 0.02, "w2": 0.3},
        ),
    ],
)
def test_initial_deviations(
    family: str, changes: dict[str, Any], expected: dict[str, float]
) -> None:
    """Of global layer 1: scaled by 1 / sqrt(2 (1 + 1))."""
    model = build_model(
        ModelConfig(
            model_type=family, num_layers=2, hidden_size=64, vocab_size=64, **changes
        )
    )
    for part, std in expected.items():
        prefix = {
            "wqkv": "layers.1.attention.",
            "wo": "layers.1.attention.",
            "embedding": "",
            "head": "",
        }
        initial = model.initial(
            f"{prefix.get(part, 'layers.1.feed_forward.')}{part}.weight"
        )
        assert initial.scale == pytest.approx(std, rel=1e-12)
        assert initial.kind == changes.get("init_type", "normal")
    assert model.initial("layers.1.attention.wqkv.bias").scale == 0
    assert model.initial("layers.1.ffn_norm.weight").scale == 1


def test_start_is_independent_of_the_cut() -> None:
    """Two tensor ranks hold the two halves of the one-process start; the padded vocabulary row is their only extra."""
    config = tiny(dtype="float32", vocab_size=V - 1, num_layers=1)
    model = make(config)
    parts = []
    for rank in range(2):
        grid = Grid(tp=Axis("tp", 2, rank))
        part = build_model(config, grid=grid)
        initialize_weights(part, 7, grid)
        parts.append(dict(part.named_parameters()))
    for name, parameter in model.named_parameters():
        dims = [dim for _, dim in spec_of(parameter).shards]
        joined = (
            torch.cat([part[name] for part in parts], dims[0])
            if dims
            else parts[0][name]
        )
        if name in ("embedding.weight", "head.weight"):
            assert len(joined) == V
            joined = joined[: V - 1]
        assert torch.equal(joined, parameter), name


@pytest.mark.slow
@covers("model.compile")
def test_compiled_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as for a device, but run by torch's own operations: no C++ compiler is needed."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager")
    )
    ids, labels = tokens()
    results = []
    for compiled in (False, True):
        model = make(tiny(compile=compiled, num_layers=1))
        out = model.loss(model(ids, pack(LENGTHS)), labels)
        out.scaled_sum.backward()
        results.append((out, gradients(model)))
    torch.testing.assert_close(
        results[0][0].nll, results[1][0].nll, rtol=1e-12, atol=1e-12
    )
    assert relative(results[1][1], results[0][1]) < 1e-12
