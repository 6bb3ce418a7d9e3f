"""Each config that cannot be used gets one message: key, place, what was found, what was expected, how to fix it."""

from __future__ import annotations

from pathlib import Path

import pytest

from evomesh.config.layout import check_world
from evomesh.config.loader import load_config
from evomesh.errors import ConfigError
from tests.support.covers import covers

BASE = 'data = dict(train_folder="x")\nmodel = dict(dtype="torch.float32")\n'


def message(path: Path, *sets: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), sets)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.py"
    path.write_text(BASE)
    return path


# what is set -> parts of the message
VALUES: list[tuple[list[str], list[str]]] = [
    (
        ["grad_profiling=dict(grad_norm_profiling=True, layers=['layers.48', 'head'])"],
        ["grad_profiling.layers", "no layer 'layers.48'", "layers.0 to layers.47"],
    ),
    (
        ["grad_profiling=dict(zero_grad_profiling=True, interval_steps=0)"],
        ["grad_profiling.interval_steps", "found 0", ">= 1"],
    ),
    (["grad_profiling=dict(layer=['head'])"], ["did you mean grad_profiling.layers?"]),
    *[
        ([f"data.stages={stages}", "data.total_steps=90", *sets], words)
        for stages, sets, *words in (
            ("dict(until=5)", [], ["found {'until': 5}", "a list of dicts"]),
            ("[5, {}]", [], ["item 1 is 5", "a list of dicts"]),
            ("[dict(untill=5), {}]", [], ["unknown key 'untill'", "any of until, "]),
            ("[dict(until=0), {}]", [], ["data.stages", "found 0", ">= 1"]),
            ("[dict(until=9), dict(until=9), {}]", [], ["stage 2 ends at step 9"]),
            ("[dict(until=9), dict(until=4), {}]", [], ["stage 2 ends at step 4"]),
            ("[dict(until_tokens=9), dict(until_tokens=4), {}]", [], ["ends at 4 tok"]),
            ("[dict(until=9, until_tokens=4), {}]", [], ["until and until_tokens"]),
            ("[dict(until=9), {}, {}]", [], ["data stage 2 has no end, and"]),
            ("[dict(until=91), {}]", [], ["at step 91, after the last step"]),
            ("[dict(until=90), {}]", [], ["step 90, which is the end of the run"]),
            ("[dict(until=9), dict(until=50)]", [], ["stage 2 ends at step 50: no"]),
            ("[dict(seq_len=4096)]", [], ["data stage 1 has seq_len 4096", "2048"]),
            ("[dict(micro_bsz=2)]", [], ["packs of 4096 tokens", "at most"]),
            ("[{}]", ["data.rampup_batch_size='1 1 1'"], ["together with data.rampup"]),
            (
                "[dict(seq_len=2047)]",
                ["parallel.tensor=dict(size=2, mode='msp')"],
                ["data stage 1: 2 does not divide the packed length 2047"],
            ),
            (
                "[{}]",
                ["data.type='streaming'", "data.tokenizer_path='x'"],
                ["data.type", "tokenize the text first"],
            ),
        )
        for words in words
    ],
    (["data.stages=[{}]", "data.epochs=2"], ["data.stages together with data.epochs"]),
    (["modle={}"], ["modle", "unknown key", "did you mean model?"]),
    (["data.micro_bzs=2"], ["data.micro_bzs", "did you mean data.micro_bsz?"]),
    # A real key in the wrong section.
    (
        ["model.selective_checkpoint_offload=False"],
        [
            "unknown key",
            "selective_checkpoint_offload belongs at the top level",
            "or did you mean model.selective_checkpoint?",
        ],
    ),
    (["model.job_name='x'"], ["JOB_NAME belongs at the top level"]),
    (["data.lr=1e-3"], ["data.lr", "write it as adam.lr"]),
    (["train_folder='x'"], ["write it as data.train_folder"]),
    (
        ["adam.total_steps=9"],
        ["write it as data.total_steps or lr_scheduler.total_steps"],
    ),
    (["parallel.size=2"], ["parallel.zero1.size or parallel.tensor.size or", " ..."]),
    (["parallel.pipeline.size=64"], ["64 stages of 1 chunk need 64 layers"]),
    (["adam.betas=1"], ["adam.betas (--set)", "unknown key 'betas'"]),
    (["SEQLEN=2"], ["SEQLEN", "unknown key"]),
    (
        ["data.seq_len='2048'"],
        [
            "data.seq_len (--set)",
            "'2048' (a string)",
            "an integer",
            "remove the quotes",
        ],
    ),
    (["data.seq_len=0"], ["found 0", ">= 1"]),
    (["data.seq_len=-5"], ["found -5", ">= 1"]),
    (["data.seq_len=3.5"], ["found 3.5", "an integer"]),
    (["data.seq_len=True"], ["found True (a bool)", "an integer"]),
    (["data.seq_len=99999999999999999999"], ["99999999999999999999"]),
    (["data.seq_len=2147483647", "data.micro_bsz=2"], ["4294967294", "2147483647"]),
    (
        ["data.empty_cache_and_diag_interval=99999999999999999999"],
        ["too large", "2**63"],
    ),
    (
        ["model.hidden_size=100"],
        ["hidden_size=100", "num_attention_heads=32", "96 or 128", "25 or 50"],
    ),
    (["model.hidden_size=96"], ["odd width 3"]),
    (["optimizer.type=moun"], ["optimizer.type", "did you mean 'muon'?"]),
    (
        ["optimizer.type=schedule_free", "adam.adam_beta1=0.0"],
        ["adam.adam_beta1", "no average"],
    ),
    (
        ["optimizer.type=schedule_free", "optimizer.ema.decay=0.9"],
        ["optimizer.ema.decay", "averages the weights already"],
    ),
    (["optimizer.ema.decay=1.0"], ["optimizer.ema.decay", "a number < 1"]),
    (["optimizer.momentum=-0.1"], ["optimizer.momentum", "a number >= 0"]),
    (["optimizer.momentun=0.9"], ["did you mean optimizer.momentum?"]),
    (["optimizer.ns_steps=0"], ["optimizer.ns_steps", "a number >= 1"]),
    (["data.type=streaming"], ["data.tokenizer_path", "needs data.tokenizer_path"]),
    (
        ["data.type=streaming", "data.tokenizer_path=t", "data.train_folder=None"],
        ["needs data.train_folder", "a folder with text"],
    ),
    (
        [
            "data.type=streaming",
            "data.tokenizer_path=t",
            "data.rampup_batch_size='1 1 1'",
        ],
        ["data.rampup_batch_size", "fixed number of packs", "tokenize the text first"],
    ),
    (
        [
            "model.tie_word_embeddings=True",
            "model.embed_split_hidden=True",
            "parallel.tensor.size=2",
        ],
        ["model.tie_word_embeddings", "the embedding by columns", "by rows"],
    ),
    (
        ["model.num_kv_attention_heads=5", "model_type=LLAMA2"],
        ["num_kv_attention_heads=5", "4 or 8"],
    ),
    (["model.num_kv_attention_heads=8"], ["INTERNLM has one key/value head for each"]),
    (["model.no_bias=True"], ["INTERNLM always has attention biases"]),
    (["model_type=INTERNLM_MoE"], ["mixture-of-experts"]),
    (["parallel.tensor=3"], ["3 does not divide num_attention_heads=32", "2 or 4"]),
    (
        ["parallel.tensor=8", "model_type=LLAMA2", "model.num_kv_attention_heads=4"],
        ["num_kv_attention_heads=4"],
    ),
    (
        ["parallel.tensor={'size': 2, 'mode': 'fsp'}", "data.seq_len=2049"],
        ["packed length 2049", "fsp"],
    ),
    (["parallel.tensor.mode=mps"], ["'mps'", "'mtp'", "did you mean"]),
    (["parallel.weight=4"], ["needs tensor mode isp, found mtp"]),
    (
        ["model.num_layers=3", "parallel.pipeline=4"],
        ["need 4 layers, num_layers=3", "at most 3"],
    ),
    (
        ["model.num_chunks=2", "parallel.pipeline=4", "data.micro_num=6"],
        ["micro_num=6", "4 or 8"],
    ),
    (["data.rampup_batch_size='192 24'"], ["three positive integers", "2 items"]),
    (["data.rampup_batch_size='8 2 10'"], ["starts at 8", "micro_num=1"]),
    (
        ["data.rampup_batch_size='1 2 10'", "data.micro_num=4"],
        ["never reaches micro_num=4", "1 or 3"],
    ),
    (
        ["data.rampup_batch_size='5 1 1'", "data.micro_num=4"],
        ["starts at 5", "micro_num=4"],
    ),
    (
        ["data.rampup_batch_size='1 2 3'", "data.micro_num=4"],
        ["never reaches micro_num=4"],
    ),
    (["data.rampup_batch_size='0 1 1'"], ["three positive integers", "'0 1 1'"]),
    (["data.rampup_batch_size=3"], ["found 3 (int)", "three positive integers"]),
    (["data.skip_batches='10-5'"], ["item 1", "'10-5'", "runs backwards", "5-10"]),
    (["data.skip_batches='5,3'"], ["item 2", "'3'", "after step 5"]),
    (["data.skip_batches='a-b'"], ["item 1", "'a-b'"]),
    (["data.skip_batches='1,2-'"], ["item 2", "'2-'", "is not a step or a range"]),
    (["data.total_steps=0"], ["data.total_steps", ">= 1"]),
    (["adam.lr=-1"], ["adam.lr", "found -1", ">= 0"]),
    (["adam.lr='1e-4'"], ["'1e-4' (a string)", "a number", "remove the quotes"]),
    (["adam.lr=fast"], ["'fast' (a string)", "a number"]),
    (
        ["model.hidden_size=64", "model.use_dynamic_ntk_rope=True"],
        ["heads of width 2", "use_dynamic_ntk_rope=False or fewer heads"],
    ),
    (
        ["model_type=QWEN3", "model.qk_norm=False"],
        ["model.qk_norm", "qk_norm is False, and QWEN3 models have qk_norm=True"],
    ),
    (
        ["model_type=QWEN2", "model.o_bias=True"],
        ["model.o_bias", "QWEN2 models have o_bias=False"],
    ),
    (
        ["model_type=MISTRAL", "model.no_bias=False"],
        ["qkv_bias is True", "MISTRAL models have qkv_bias=False"],
    ),
    (
        ["model_type=LLAMA2", "model.sliding_window=4096"],
        ["LLAMA2 models do not have a window", "QWEN2 or QWEN3 or MISTRAL"],
    ),
    (
        ["model_type=LLAMA2", "model.nope_layers=[0]"],
        ["LLAMA2 models do not have layers without rotary positions", "SMOLLM3"],
    ),
    (
        ["model_type=SMOLLM3", "model.num_layers=4", "model.nope_layers=[3,4]"],
        ["nope_layers has 4, and there are 4 layers", "indices from 0 to 3"],
    ),
    (
        ["model_type=BAICHUAN2", "model.num_kv_attention_heads=8"],
        ["BAICHUAN2 has one key/value head for each of its 32 heads, found 8"],
    ),
    (
        ["model_type=QWEN3", "model.mlp_bias=True"],
        [
            "QWEN3 models do not have biases in their feed-forward networks",
            "INTERNLM3 or LLAMA2 or SMOLLM3",
        ],
    ),
    (
        [
            "model_type=MISTRAL",
            "model.sliding_window=8",
            "model.layer_types=['full_attention']",
        ],
        ["MISTRAL models do not have layers of two kinds", "QWEN2 or QWEN3"],
    ),
    (
        [
            "model_type=QWEN3",
            "model.sliding_window=8",
            "model.layer_types=['full_attention']",
        ],
        ["1 layer types for 48 layers", "one for each layer"],
    ),
    (
        [
            "model_type=QWEN3",
            "model.num_layers=1",
            "model.layer_types=['sliding_attention']",
        ],
        ["layer_types without sliding_window"],
    ),
    (
        ["model_type=QWEN3", "model.layer_types=['local']"],
        ["model.layer_types", "'full_attention' or 'sliding_attention'"],
    ),
    (
        ["model_type=OLMO2", "model.norm_placement='before'"],
        [
            "norm_placement is 'before', and OLMO2 models have norm_placement='after'",
            "LLAMA2",
        ],
    ),
    (
        ["model_type=QWEN3", "model.qk_norm_over='projection'"],
        ["QWEN3 models have qk_norm_over='head'", "or LLAMA2 or OLMO2"],
    ),
    (
        [
            "model_type=INTERNLM2_PUBLIC",
            "model.apply_post_layer_norm=True",
            "model.norm_placement='after'",
        ],
        ["norm_placement='after' together with apply_post_layer_norm"],
    ),
    (
        ["model_type=GEMMA", "model.attn_logit_softcapping=50.0"],
        [
            "attn_logit_softcapping is 50.0, and GEMMA models have attn_logit_softcapping=None",
            "or LLAMA2 or GEMMA2",
        ],
    ),
    (
        ["model_type=GEMMA2", "model.scale_embeddings=False"],
        ["scale_embeddings is False, and GEMMA2 models have scale_embeddings=True"],
    ),
    (
        ["model_type=GEMMA3", "model.local_rope_base=1e4"],
        ["local_rope_base without sliding_window"],
    ),
    (
        [
            "model_type=LLAMA2",
            "model.add_unit_offset=True",
            "model.norm_type=layernorm",
        ],
        ["add_unit_offset with norm_type='layernorm'"],
    ),
    (
        [
            "model_type=LLAMA2",
            "model.use_swiglu=False",
            "model.gate_activation='gelu_tanh'",
        ],
        ["gate_activation with use_swiglu=False", "no gate"],
    ),
    (
        ["model_type=LLAMA2", "model.final_logit_softcapping=0"],
        ["model.final_logit_softcapping", "> 0"],
    ),
    (["model.head_dim=7"], ["heads of odd width 7"]),
    (["model.rope_scaling={'factor': 2.0}"], ["model.rope_scaling", "add type=..."]),
    (
        ["model.rope_scaling={'type': 'llama3', 'factor': 8.0}"],
        ["'llama3' needs it", "low_freq_factor=..."],
    ),
    (
        ["model.rope_scaling={'type': 'linear', 'factor': 2.0, 'beta_fast': 1.0}"],
        ["rope_scaling.beta_fast", "no meaning for type 'linear'", "some of factor"],
    ),
    (
        [
            "model.rope_scaling={'type': 'longrope', 'short_factor': [1.0], 'long_factor': [1.0], "
            "'original_max_position_embeddings': 2048}"
        ],
        ["rope_scaling.short_factor", "found 1 numbers", "32 positive ones"],
    ),
    (
        [
            "model.rope_scaling={'type': 'linear', 'factor': 2.0}",
            "model.use_dynamic_ntk_rope=True",
        ],
        ["dynamic NTK together with", "'linear'"],
    ),
    (
        [
            "model.rope_scaling={'type': 'dynamic', 'factor': 2.0}",
            "model.use_dynamic_ntk_rope=False",
        ],
        ["model.use_dynamic_ntk_rope", "False contradicts rope_scaling"],
    ),
    (
        ["model.rope_scaling={'type': 'dynamic', 'beta_fast': 2.0}"],
        ["rope_scaling.beta_fast", "no meaning for type 'dynamic'"],
    ),
    (["adam.lr=nan"], ["adam.lr", "nan", ">= 0"]),
    (["adam.lr=inf"], ["adam.lr", "inf", "a finite number"]),
    (["lr_scheduler.warmup_ratio=1.5"], ["found 1.5", "<= 1"]),
    (["lr_scheduler.type=wds"], ["found 'wds'", "'inverse_sqrt'", "mean 'wsd'?"]),
    (["lr_scheduler.warmup_steps=-1"], ["lr_scheduler.warmup_steps", "found -1"]),
    (
        ["data.total_steps=100", "lr_scheduler.warmup_steps=101"],
        ["101 steps of warm-up (init_steps + warmup_steps)", "100 steps"],
    ),
    (
        ["data.total_steps=100", "lr_scheduler=dict(type='wsd', decay_steps=101)"],
        ["lr_scheduler.decay_steps", "decay of 101 steps", "at most 100 steps"],
    ),
    (
        [
            "data.total_steps=100",
            "lr_scheduler=dict(type='wsd', decay_ratio=0.5, warmup_steps=51)",
        ],
        ["lr_scheduler.decay_ratio", "51 steps of warm-up and 50 of decay"],
    ),
    (["lr_scheduler.decay_steps=5"], ["cosine falls over the whole run already"]),
    (["lr_scheduler.decay_from=5"], ["the length of the decay is not set"]),
    (
        ["lr_scheduler=dict(decay_from='runs/last', decay_steps=5)"],
        ["'runs/last' names no step", "llm_ckpts/5000"],
    ),
    (
        ["lr_scheduler=dict(decay_from=5, decay_steps=5, warmup_steps=6)"],
        ["step 5 is in the warm-up", "from 6 on"],
    ),
    (
        ["lr_scheduler=dict(decay_from=5, decay_steps=5)", "data.epochs=1"],
        ["data.epochs", "sets the end of the run"],
    ),
    (
        [
            "lr_scheduler=dict(decay_from='local:a/b/5', decay_steps=5)",
            "ckpt.save_ckpt_folder=a/b",
        ],
        ["ckpt.save_ckpt_folder", "branches from", "lr_scheduler.decay_from=5"],
    ),
    (
        ["lr_scheduler.init_steps=60000"],
        ["60000 steps of warm-up", "longer than the training, 50000"],
    ),
    (["adam.adam_beta2=1.0"], ["adam.adam_beta2", "< 1"]),
    (["adam.adam_eps=0.0"], ["adam.adam_eps", "> 0"]),
    (["grad_scaler.backoff_factor=1.0"], ["< 1"]),
    (["grad_scaler.growth_factor=1.0"], ["> 1"]),
    (
        ["grad_scaler.fp16.min_scale=4e9"],
        ["min_scale=4e+09 is above max_scale=1.67772e+07"],
    ),
    (["grad_scaler.fp16.initial_scale=4e9"], ["initial_scale=4e+09 is outside"]),
    (["grad_scaler.hysteresis=0"], ["grad_scaler.hysteresis", ">= 1"]),
    (["model.dtype=bf16"], ["'bf16'", "did you mean 'bfloat16'"]),
    (["model.dtype=fp32"], ["'fp32'", "did you mean 'float32'"]),
    (["model.dtype=half"], ["did you mean 'float16'"]),
    (["model.dtype=fp16"], ["did you mean 'float16'"]),
    (["model.dtype=torch.bfloat"], ["did you mean 'torch.bfloat16'"]),
    (["model.checkpoint=1.5"], ["found 1.5", "<= 1"]),
    (
        ["ckpt.checkpoint_every=0"],
        ["found 0", 'float("inf")', "enable_save_ckpt=False"],
    ),
    (["ckpt.checkpoint_every=-3"], ["found -3"]),
    (["ckpt.checkpoint_every=2.5"], ["found 2.5"]),
    (["ckpt.enable_save_ckpt=True"], ["no folder to save to", "save_ckpt_folder"]),
    (
        ["ckpt.load_ckpt_info={'path': 'x', 'content': ('modle',)}"],
        ["modle", "model, sampler, optimizer"],
    ),
    (
        ["ckpt.load_ckpt_info={'content': ('model',)}"],
        ["ckpt.load_ckpt_info.path", "is missing", "add path=..."],
    ),
    (
        ["ckpt.s3_endpoint=host"],
        ["ckpt.s3_endpoint", "found 'host'", "https://HOST:PORT"],
    ),
    (
        ["ckpt.load_ckpt_info=5"],
        ["ckpt.load_ckpt_info", "found 5", "dict(key=value, ...)"],
    ),
    (["seed=4294967296"], ["seed", "< 4294967296"]),
    (["seed=abc"], ["seed", "'abc' (a string)", "an integer"]),
    (["JOB_NAME=../../etc"], ["JOB_NAME", "../../etc", "cannot name a folder"]),
    (["JOB_NAME=" + "x" * 256], ["JOB_NAME", "has 256 bytes", "at most 255 bytes"]),
    (["JOB_NAME=" + "é" * 128], ["JOB_NAME", "has 256 bytes", "at most 255 bytes"]),
    ([r"JOB_NAME='a\ud800'"], ["JOB_NAME", r"'a\ud800' contains half of", "U+D800"]),
    ([r"ckpt.save_ckpt_folder='a\udfff'"], ["ckpt.save_ckpt_folder", "U+DFFF"]),
    ([r"data.train_folder='a\0b'"], ["data.train_folder", r"'a\x00b' contains NUL"]),
    (
        [r"data.samples=dict(prompts=['a', 'b\ud800'])", "data.sample_every=5"],
        ["data.samples.prompts", "U+D800"],
    ),
    (
        ["data.dataset_weights={'en': 1, 'cn': -1}"],
        ["data.dataset_weights", "'cn' has weight -1", "a positive number"],
    ),
    (["data.dataset_weights={'en': 0}"], ["'en' has weight 0"]),
    (
        ["data.stages=[dict(until=5), dict(dataset_weights={'cn': -1})]"],
        ["data.stages", "data stage 2: 'cn' has weight -1"],
    ),
    *[
        ([f"{key}={url}", "ckpt.auto_resume=False"], [key, *words])
        for key in ("ckpt.save_ckpt_folder", "ckpt.snapshot_ckpt_folder")
        for url, *words in (
            ("local:", "'local:' is empty", "a plain path"),
            ("foo:bar", "unknown prefix 'foo:'", "local:foo:bar for a file name"),
            ("volc:vc://b.e/k", "the volc: store is not supported"),
            ("boto3:s3://bucket/key", "no bucket or no endpoint"),
            ("s3:https://host", "no bucket", "s3:https://HOST/BUCKET/KEY"),
            ("s3://", "no bucket", "s3://BUCKET/KEY"),
        )
    ],
    (
        ["ckpt.auto_resume=False", "ckpt.load_ckpt_info=dict(path='foo:bar')"],
        ["ckpt.load_ckpt_info.path", "unknown prefix 'foo:'"],
    ),
    (["model.drop_rate=1.0"], ["model.drop_rate", "a number < 1"]),
    (["model.attn_drop_rate=-0.1"], ["model.attn_drop_rate", "a number >= 0"]),
    (["model.qk_interleaved=True", "model.adapt_hf=True"], ["contradict"]),
    (["data.packed_length=3000"], ["3000", "not a multiple of seq_len=2048"]),
    (["data.gradient_accumulation=3"], ["gradient_accumulation=3 but micro_num=1"]),
    (["data=5"], ["data", "found 5", "dict(key=value, ...)"]),
    (["parallel.zero1='8'"], ["parallel.zero1", "'8'"]),
]


@pytest.mark.parametrize(("sets", "parts"), VALUES, ids=lambda v: v[0] if v else "")
def test_value(base: Path, sets: list[str], parts: list[str]) -> None:
    text = message(base, *sets)
    assert [part for part in parts if part not in text] == [], text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "sets",
    [
        ["JOB_NAME=" + "x" * 255],
        [r"data.train_folder='caf\udce9'"],  # bytes of a name that is not UTF-8
        [r"data.samples=dict(prompts=['a\0b'])", "data.sample_every=5"],
        ["ckpt.save_ckpt_folder=s3://bucket"],
        ["ckpt.load_ckpt_info=dict(path='foo:bar')"],  # auto_resume comes before it
    ],
    ids=ascii,
)
def test_names_and_places_that_a_run_can_use(base: Path, sets: list[str]) -> None:
    key = sets[0].partition("=")[0]
    loaded = load_config(str(base), [*sets, "data.tokenizer_path=t"])
    origins = [loaded.origins[name] for name in loaded.origins if name.startswith(key)]
    assert "--set" in origins


def test_a_nul_byte_has_a_line(tmp_path: Path) -> None:
    path = tmp_path / "nul.py"
    path.write_bytes(b"data = dict()\n\nJOB_NAME = 'a\0b'\n")
    text = message(path)
    assert f"{path}:3: contains a NUL byte" in text
    assert "None" not in text and "^" not in text


def test_all_at_once_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "many.py"
    path.write_text(
        'data = dict(\n    seq_len="2048",\n    micro_bzs=1,\n    skip_batches="9-3",\n)\n'
        "model = dict(hidden_size=100, num_attention_heads=32)\nmodle = dict()\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    places = {p.where for p in caught.value.problems}
    assert places == {
        f"data.seq_len ({path}:2)",
        f"data.micro_bzs ({path}:3)",
        f"data.skip_batches ({path}:4)",
        f"model.hidden_size ({path}:6)",
        f"modle ({path}:7)",
    }
    assert str(caught.value).startswith(f"{path}: 5 problems in the config")


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("missing", None, ["no such config file", "looked in"]),
        ("a.yaml", "x: 1", ["configs are Python files", ".yaml"]),
        (
            "a.py",
            "data = dict(\n  seq_len=1\nmodel = 3\n",
            ["not valid Python", "a.py:1", "data = dict("],
        ),
        (
            "a.py",
            "x = 1\ndata = dict(seq_len=1 / 0)\n",
            ["ZeroDivisionError", "a.py:2", "data = dict(seq_len=1 / 0)"],
        ),
        ("a.py", "import sys\nsys.exit(3)\n", ["SystemExit", "a.py:2"]),
        (
            "a.py",
            "def f():\n    return nothing\n\nx = f()\n",
            ["NameError", "a.py:2", "return nothing"],
        ),
        ("a.py", "from nowhere_at_all import x\n", ["ModuleNotFoundError", "a.py:1"]),
    ],
)
def test_file(tmp_path: Path, name: str, text: str | None, parts: list[str]) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    found = message(path)
    assert [part for part in parts if part not in found] == [], found


def test_a_near_name_is_offered(base: Path) -> None:
    assert f"did you mean {base}?" in message(base.with_name("bace.py"))
    assert "is a folder" in message(base.parent)


@pytest.mark.parametrize("text", ["data.seq_len", "=3", "data..x=1", "data.seq len=1"])
def test_override_that_cannot_be_read(base: Path, text: str) -> None:
    assert "expected: section.key=value" in message(base, text)


@covers("promise:zero1-sizes")
def test_world(base: Path) -> None:
    config = load_config(str(base), ["parallel.zero1=8"]).config
    assert check_world(config, 16) == []
    assert (
        "8 is more than the 4 data-parallel ranks; 4 is used"
        in check_world(config, 4)[0]
    )
    with pytest.raises(ConfigError, match="8 does not divide the 12"):
        check_world(config, 12)
    split = config.model_copy(
        update={
            "parallel": config.parallel.model_copy(
                update={"tensor": config.parallel.tensor.model_copy(update={"size": 4})}
            )
        }
    )
    with pytest.raises(
        ConfigError,
        match=r"6 processes cannot be divided by pipeline.size \* tensor.size = 4",
    ):
        check_world(split, 6)


def test_a_module_of_internevo_is_pointed_to_the_registry(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text("from internlm.model.registry import model_initializer\n" + BASE)
    text = message(path)
    assert "No module named 'internlm'" in text and "evomesh.register_model" in text
    path.write_text("import no_such_module\n" + BASE)
    assert "register_model" not in message(path)
