"""XTuner's datasets and dataloader: token files as they are, raw text and conversations by tokenizing them first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evomesh.config.reading.draft import shown
from evomesh.config.reading.xtuner.foreign_names import last_name
from evomesh.config.reading.xtuner.optimizer import accumulation
from evomesh.config.reading.xtuner.raw_data import RAW_LOADERS, prepare_raw_data
from evomesh.config.reading.xtuner.translation import Translation

LOADER = "train_dataloader"
DATASET = f"{LOADER}.dataset"
PACKER = "build_packed_dataset"
TOKENIZED_LOADERS = (
    "load_intern_repo_tokenized_dataset",
    "process_intern_repo_dataset",
)
XTUNER_SEED = 1024  # of documents within a file and, plus the pass, of packs: InternRepoSampler takes no other
REPOSITORY_SAMPLERS = ("InternRepoSampler", "InternlmRepoSampler")
OTHER_SAMPLERS = ("SequenceParallelSampler", "DefaultSampler", "LengthGroupedSampler")


def translate_data(out: Translation) -> None:
    """Translate ``train_dataloader`` and the dataset in it."""
    settings = out.settings
    dataset = settings.peek(DATASET)
    if not isinstance(dataset, Mapping):
        settings.problem(
            DATASET,
            f"found {shown(dataset)}",
            expected="dict(type=build_packed_dataset, ...)",
            code="EVO-CONFIG-014",
        )
        return
    loader_key = (
        f"{DATASET}.dataset_cfg"
        if last_name(dataset.get("type")) == PACKER
        else DATASET
    )
    loader = last_name(settings.get(f"{loader_key}.type"))
    if loader in TOKENIZED_LOADERS:
        _put_token_files(out, loader_key)
    elif loader in RAW_LOADERS:
        prepare_raw_data(out, loader_key, loader)
    else:
        expected = ", ".join((*TOKENIZED_LOADERS[:1], *RAW_LOADERS))
        settings.problem(
            f"{loader_key}.type",
            f"unknown dataset {loader or shown(dataset)}",
            expected=expected,
            code="EVO-CONFIG-014",
        )
        return
    _put_packing(out)
    _put_batch(out)
    _put_order(out)
    workers = settings.whole(f"{LOADER}.num_workers", 0)
    out.put("data.num_worker", workers, f"{LOADER}.num_workers")


def _put_token_files(out: Translation, key: str) -> None:
    settings = out.settings
    folder = settings.get(f"{key}.folder")
    if not isinstance(folder, str):
        settings.problem(
            f"{key}.folder",
            f"found {shown(folder)}",
            expected="the folder of the .bin files",
            code="EVO-CONFIG-014",
        )
        return
    out.put("data.train_folder", folder, f"{key}.folder")
    out.put(
        "data.min_length", settings.whole(f"{key}.min_length", 0), f"{key}.min_length"
    )
    order = settings.get(f"{key}.data_order_path")
    if order is not None:
        out.put("data.data_order_path", str(order), f"{key}.data_order_path")
    suffix = settings.get(f"{key}.file_type", ".bin")
    if suffix != ".bin" and order is None:
        settings.problem(
            f"{key}.file_type",
            f"found {suffix!r}",
            expected='".bin": token files end so',
            code="EVO-CONFIG-014",
        )


def _put_packing(out: Translation) -> None:
    settings = out.settings
    lengths = (
        f"{DATASET}.packed_length",
        f"{DATASET}.max_length",
        f"{DATASET}.dataset_cfg.max_length",
    )
    key = next((name for name in lengths if settings.has(name)), lengths[0])
    length = settings.whole(key, 8192)
    out.put("data.seq_len", length, key)
    out.put("data.micro_bsz", 1, "", "a pack of XTuner holds one sequence length")
    # Without use_varlen_attn XTuner's attention knows no documents: a pack is one
    # sequence, whose documents see each other.
    varlen = settings.get("model.use_varlen_attn", False)
    out.put(
        "data.pack_sample_into_one", not varlen, "model.use_varlen_attn", "its opposite"
    )
    settings.get(f"{DATASET}.use_varlen_attn")  # of the dataset: it follows the model's
    packs = f"{DATASET}.pack_to_max_length"
    if settings.get(packs, True) is False:
        settings.problem(
            packs,
            "False: samples are padded",
            expected="True: evomesh always packs",
            code="EVO-CONFIG-014",
        )
    sequence = settings.whole("sequence_parallel_size", 1)
    if sequence > 1 and length % sequence:
        settings.problem(
            "sequence_parallel_size",
            f"{sequence} does not divide max_length={length}",
            expected=f"max_length={length // sequence * sequence or sequence}, or a divisor of {length}",
            code="EVO-CONFIG-008",
        )


def _put_batch(out: Translation) -> None:
    """Translate the micro-batches of a step.

    XTuner takes batch_size packs on each of N / SP data-parallel ranks in each of
    accumulative_counts iterations, and evomesh micro_num packs on each of as many
    ranks. A template multiplies accumulative_counts by SP itself, so the number that
    mmengine receives needs no factor.
    """
    settings = out.settings
    key = f"{LOADER}.batch_size"
    size = settings.whole(key, 1)
    counts = accumulation(settings)
    if size > 1 and settings.get("model.use_varlen_attn", False):
        settings.problem(
            key,
            f"{size} with use_varlen_attn=True",
            expected="1: a longer max_length instead",
            code="EVO-CONFIG-014",
        )
    remark = f"{counts} micro-iterations x batch_size {size}"
    out.put(
        "data.micro_num",
        max(1, counts * size),
        "optim_wrapper.accumulative_counts",
        remark,
    )


def _put_order(out: Translation) -> None:
    settings = out.settings
    out.put("data.order", "xtuner", f"{LOADER}.sampler.type")
    out.put(
        "data.seed",
        XTUNER_SEED,
        f"{LOADER}.sampler.seed",
        "the only one that InternRepoSampler takes",
    )
    key = f"{LOADER}.sampler"
    sampler = last_name(settings.get(f"{key}.type"))
    if sampler in OTHER_SAMPLERS:
        out.warn(
            f"{key}.type",
            f"{sampler} draws another order; here the order is InternRepoSampler's, NumPy's shuffle by 1024 + pass",
        )
    elif sampler and sampler not in REPOSITORY_SAMPLERS:
        out.warn(
            f"{key}.type", f"{sampler} is not run; the order is InternRepoSampler's"
        )
    if settings.get(f"{key}.shuffle", True) is False:
        out.warn(f"{key}.shuffle", "False has no effect: packs are always shuffled")
    for name in (f"{key}.seed", f"{DATASET}.seed"):
        seed: Any = settings.get(name, XTUNER_SEED)
        if seed not in (None, XTUNER_SEED):
            out.warn(
                name,
                f"{seed} has no effect: documents and packs are shuffled by {XTUNER_SEED}",
            )
