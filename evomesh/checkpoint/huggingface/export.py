"""Export a checkpoint, saved in any layout, as a folder that ``transformers`` loads without remote code.

Tensors are read, converted and written one by one. The folder is written next to its
target, compared with the native model, and then renamed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import evomesh
from evomesh.checkpoint.huggingface.compare_logits import (
    TOLERANCE,
    TensorReader,
    largest_logit_difference,
    native_logits,
    tolerance_of,
)
from evomesh.checkpoint.huggingface.config import (
    Architecture,
    RotaryScaling,
    build_config,
    build_generation_config,
    default_architecture,
    refuse_unexportable,
    rotary_scaling,
)
from evomesh.checkpoint.huggingface.data_files import DataFiles
from evomesh.checkpoint.huggingface.exported_folder import ExportMark
from evomesh.checkpoint.huggingface.folder import HfFolder
from evomesh.checkpoint.huggingface.load import foreign_tensors
from evomesh.checkpoint.huggingface.names import (
    NAME_MAPS,
    TensorLink,
    foreign_shapes,
    native_to_foreign,
    tensor_links,
)
from evomesh.checkpoint.huggingface.original import Original, find_original
from evomesh.checkpoint.huggingface.output_folder import new_folder
from evomesh.checkpoint.huggingface.stock_logits import has_transformers, stock_logits
from evomesh.checkpoint.huggingface.tokenizer import (
    compare_tokenizers,
    special_ids,
    write_json,
    write_tokenizer,
)
from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.ema_weights import EMA, with_ema_weights
from evomesh.checkpoint.native.find import Checkpoint
from evomesh.checkpoint.native.format import CheckpointError, TensorRecord
from evomesh.checkpoint.native.read import read_tensor
from evomesh.checkpoint.native.write import as_bytes, not_finite, safetensors_header
from evomesh.checkpoint.standard_weights import (
    rounds,
    standard_weight,
    without_mup,
)
from evomesh.config.record import config_from_dict
from evomesh.config.schema import Config, ModelConfig, RotaryType
from evomesh.config.user import expand_home
from evomesh.data.chat import portable_source
from evomesh.data.config_folders import other_tokenizer
from evomesh.data.tokenizer import (
    Tokenizer,
    absent_recorded_tokenizer,
    check_tokenizer_fits,
    load_tokenizer,
)
from evomesh.layers.dtype import promote
from evomesh.quantities import readable
from evomesh.storage.local import LocalStorage
from evomesh.user_files import read_text

DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export.

    Attributes:
    arch: None: the model's own where transformers has it, else llama.
    dtype: None: the training dtype.
    max_shard_bytes: maximum size of a weight file; a larger tensor gets a separate file.
    tokenizer: path; None: the training's ``data.tokenizer_path`` where it exists; "none": no tokenizer.
    rotary_type, scaling_factor, max_position: None: as trained.
    chat_template: Jinja file; None: the tokenizer's template, else that of the training data.
    compare: reload and compare logits.
    ema: the moving average of the weights instead of them.
    mark: written into the folder, so that the run which exports knows it again.
    """

    arch: Architecture | None = None
    dtype: str | None = None
    max_shard_bytes: int = 5 * 10**9
    tokenizer: str | None = None
    rotary_type: RotaryType | None = None
    scaling_factor: float | None = None
    max_position: int | None = None
    chat_template: str | None = None
    compare: bool = True
    ema: bool = False
    mark: ExportMark | None = None

    def weights_of(self, found: Checkpoint) -> Checkpoint:
        """Return the checkpoint with the weights to export.

        Raises:
            CheckpointError: their average is asked for, and there is none.
        """
        return with_ema_weights(found) if self.ema else found

    @property
    def averages(self) -> str:
        """Return the prefix of the tensors that stand for the weights in data files."""
        return EMA if self.ema else ""


def refuse_unexportable_run(config: Config) -> None:
    """Check that the model of a run which exports its checkpoints can be exported.

    Raises:
        CheckpointError: no architecture can represent it.
    """
    arch = default_architecture(config.model)
    try:
        rotary = rotary_scaling(config.model, config.data.seq_len)
        refuse_unexportable(config.model, arch, rotary)
    except CheckpointError as error:
        raise CheckpointError(
            f"checkpoints of this model cannot be exported: {error.found}",
            where="ckpt.enable_internevo2hf_ckpt",
            expected=error.expected,
            fix="set ckpt.enable_internevo2hf_ckpt=False, and remove ckpt.export_hf",
            code="EVO-HF-004",
        ) from None


def export(
    found: Checkpoint, out: str, options: ExportOptions, report: Callable[[str], None]
) -> str:
    """Write the folder ``out``, local or in a store, and return it.

    Raises:
        CheckpointError: the architecture cannot represent the model, wrong tensors, no average, no space, or logits
            that differ. Nothing is left on disk then.
    """
    found = options.weights_of(found)
    config = config_from_dict(found.config)
    arch = options.arch or default_architecture(config.model)
    dtype = _export_dtype(config.model, options.dtype)
    rotary = rotary_scaling(
        config.model,
        config.data.seq_len,
        type=options.rotary_type,
        factor=options.scaling_factor,
        max_position=options.max_position,
    )
    refuse_unexportable(config.model, arch, rotary)
    tokenizer = _fitting_tokenizer(config, options.tokenizer, report)
    template = _template(options.chat_template) or _trained_template(
        config, tokenizer, report
    )
    job = _WeightExport(found, config.model, arch, dtype)
    with new_folder(out, job.total_bytes) as work:
        if options.mark is not None:
            options.mark.begin(work)
        # What can be refused comes before the weights, which take long.
        if tokenizer is not None:
            write_tokenizer(tokenizer, work, template, rotary.max_position)
        _write_settings(job, config, rotary, work, has_tokenizer=tokenizer is not None)
        if options.compare and tokenizer is not None and has_transformers():
            compare_tokenizers(tokenizer, work)
        job.write_weights(work, options.max_shard_bytes)
        if options.compare:
            weights = DataFiles(found, options.averages).read
            for line in _compare(job, work, rotary, weights):
                report(line)
        if options.mark is not None:
            options.mark.complete(work)
    scaling = config.model.rope_scaling
    kind = scaling.type if scaling else rotary.type
    report(f"wrote {out}: {arch}, {dtype}, {readable(job.total_bytes)}, rotary {kind}")
    return out


def _export_dtype(model: ModelConfig, given: str | None) -> str:
    """Return the dtype of the exported weights: the given one, else that of the training."""
    dtype = given or {"tf32": "float32"}.get(model.dtype, model.dtype)
    if dtype not in DTYPES:
        raise CheckpointError(
            f"dtype {dtype!r}",
            where="--dtype",
            expected=f"one of {', '.join(DTYPES)}",
            code="EVO-CLI-002",
        )
    return dtype


def _write_settings(
    job: _WeightExport,
    config: Config,
    rotary: RotaryScaling,
    work: Path,
    *,
    has_tokenizer: bool,
) -> None:
    """Write config.json and generation_config.json, with the ids of the tokenizer in the folder."""
    written = load_tokenizer(work) if has_tokenizer else None
    ids = special_ids(written, config.generation, config.model.vocab_size)
    record = build_config(config.model, job.arch, rotary, ids, job.dtype_name)
    write_json(work / "config.json", record | {"evomesh_version": evomesh.__version__})
    write_json(work / "generation_config.json", build_generation_config(ids))


def _template(file: str | None) -> str | None:
    if file is None:
        return None
    return read_text(expand_home(file), "--chat-template", "a Jinja template")


def _trained_template(
    config: Config, tokenizer: Tokenizer | None, report: Callable[[str], None]
) -> str | None:
    """Return the template of the training data, for a tokenizer that has none."""
    name = config.data.chat_template
    if name is None or tokenizer is None or tokenizer.chat_template:
        return None
    source = portable_source(name, tokenizer)
    if source is None:
        report(
            f"the chat template {name} of the training data cannot be written as Jinja for this tokenizer: chat with "
            f"--chat-template {name}, or give a Jinja file"
        )
    return source


def _fitting_tokenizer(
    config: Config, given: str | None, report: Callable[[str], None]
) -> Tokenizer | None:
    tokenizer = _tokenizer(config, given, report)
    if tokenizer is not None:
        fix = "give another one with --tokenizer PATH, or export the weights alone with --tokenizer none"
        check_tokenizer_fits(tokenizer, config.model.vocab_size, fix)
        # The token files may be elsewhere: then nothing is known of them.
        for warning in other_tokenizer(config.data, given):
            report(f"warning: {warning}")
    return tokenizer


def _tokenizer(
    config: Config, given: str | None, report: Callable[[str], None]
) -> Tokenizer | None:
    if given == "none":
        return None
    if given is not None:
        return load_tokenizer(given)
    path = config.data.tokenizer_path
    if path is not None and expand_home(path).exists():
        return load_tokenizer(path, "data.tokenizer_path")
    found = "the checkpoint's config names none"
    if path is not None:
        found = absent_recorded_tokenizer(path)
    report(f"no tokenizer is exported: {found}; give one with --tokenizer PATH")
    return None


class _WeightExport:
    """Converts the weights of one checkpoint to one architecture and dtype."""

    def __init__(
        self, found: Checkpoint, model: ModelConfig, arch: Architecture, dtype: str
    ) -> None:
        self.found = found
        self.model = model
        self.arch = arch
        self.dtype_name = dtype
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.naming = NAME_MAPS[arch]
        # Baichuan2's readers normalize it themselves.
        self.normalizes_head = model.norm_head and arch != "baichuan"
        self.links = tensor_links(model, self.naming)
        self.records = found.records()
        self._check()

    def _check(self) -> None:
        """Refuse a checkpoint whose tensors are not those that its config describes."""
        wanted = {link.native: link.native_shape for link in self.links}
        stored = set(filter(_is_weight, self.records))
        missing = []
        for name, shape in wanted.items():
            if name not in stored:
                missing.append(f"{name} {list(shape)}")
        unknown = sorted(stored - wanted.keys())
        wrong = []
        for name in sorted(stored & wanted.keys()):
            shape = wanted[name]
            if not self._has_elements(name, shape):
                found = self.records[name].described
                wrong.append(f"{found} instead of {list(shape)}")
        if missing or unknown or wrong:
            raise CheckpointError(
                f"the checkpoint does not match its own config: missing {missing}, unknown {unknown}, "
                f"wrong shape {wrong}",
                where=self.found.folder,
                code="EVO-CKPT-005",
            )

    def _has_elements(self, name: str, shape: tuple[int, ...]) -> bool:
        # Counts, not shapes: a fused tensor may be stored in another arrangement of the
        # same elements.
        return math.prod(self.records[name].shape) == math.prod(shape)

    @property
    def total_bytes(self) -> int:
        return sum(self._bytes(link) for link in self.links)

    def _bytes(self, link: TensorLink) -> int:
        return sum(math.prod(shape) for shape in link.shapes) * int(self.dtype.itemsize)

    def native(self, name: str) -> Tensor:
        return read_tensor(self.found, self.records[name])

    def write_weights(self, folder: Path, limit: int) -> None:
        """Write the shards and, if there are several, their index."""
        shards = self._shards(limit)
        if len(shards) == 1:
            self._write_shard(folder / "model.safetensors", shards[0])
            return
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._write_shard(folder / name, shard)
            for link in shard:
                weight_map.update(dict.fromkeys(link.foreign, name))
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(folder / "model.safetensors.index.json", index)

    def _shards(self, limit: int) -> list[list[TensorLink]]:
        """Divide the tensors, in the order of the layers, into shards of ``limit`` bytes."""
        shards: list[list[TensorLink]] = [[]]
        size = 0
        for link in self.links:
            # Rows of one tensor stay in one shard, whatever its limit.
            begins_tensor = link.first_rows[0] == 0
            is_full = size + self._bytes(link) > limit
            if shards[-1] and is_full and begins_tensor:
                shards.append([])
                size = 0
            shards[-1].append(link)
            size += self._bytes(link)
        return shards

    def _write_shard(self, path: Path, shard: list[TensorLink]) -> None:
        # The sizes are known before any data is: the header is written first, and one
        # tensor is in memory at a time.
        header = self._header(shard)
        with open(path, "xb") as file:
            file.write(header)
            for link in shard:
                record = self.records[link.native]
                converted = self._converted(link, record)
                for tensor in converted:
                    whole = tensor.contiguous()
                    file.write(as_bytes(whole))
            file.flush()
            os.fsync(file.fileno())

    def _header(self, shard: list[TensorLink]) -> bytes:
        dtype_name = fmt.DTYPE_NAMES[self.dtype]
        # Parts of one tensor come one after the other, as its rows do.
        entries = []
        for name, shape in foreign_shapes(shard).items():
            size = math.prod(shape) * self.dtype.itemsize
            entries.append((name, dtype_name, shape, size))
        return safetensors_header(entries)

    def _converted(self, link: TensorLink, record: TensorRecord) -> list[Tensor]:
        stored = read_tensor(self.found, record)
        value = standard_weight(link.native, stored, self.model)
        if link.native == "head.weight" and self.normalizes_head:
            # What the model multiplies with, rounded as it is there: readers of the
            # folder know no norm_head.
            wide = value.to(promote(value.dtype))
            normalized = F.normalize(wide, dim=1)
            value = normalized.to(value.dtype)
        narrow = value.to(self.dtype)
        bad = not_finite(narrow)
        if bad:
            is_cause = not_finite(value) == 0
            raise CheckpointError(
                f"{link.native}: {bad} of {narrow.numel()} values are not finite as {self.dtype_name}",
                where=self.found.folder,
                fix="export another --dtype, such as bfloat16" if is_cause else "",
                code="EVO-CKPT-007",
            )
        return native_to_foreign(link, narrow, self.model, self.naming)


def _compare(
    job: _WeightExport, folder: Path, rotary: RotaryScaling, weights: TensorReader
) -> Iterator[str]:
    """Compare the written folder with the native model.

    A folder that the checkpoint was imported from is compared too.

    Args:
        weights: reads those of the native model.

    Yields:
        A line for each comparison.
    """
    dtype = job.dtype_name
    model = job.model
    # What is scaled or normalized and then rounded differs from what is rounded first.
    is_rounded_later = job.normalizes_head or rounds(model)
    tolerance = tolerance_of(dtype) if is_rounded_later else TOLERANCE
    changes = {
        "use_dynamic_ntk_rope": rotary.type == "dynamic",
        "rope_scaling_factor": rotary.factor,
        "max_position_embeddings": rotary.max_position,
    }
    native = model.model_copy(update=changes)
    ours = native_logits(native, weights, dtype)
    if has_transformers():
        by = "transformers"
        theirs = stock_logits(folder, [dtype])
    else:
        by = "the exported folder read back (transformers is not installed)"
        theirs = _read_back(job, folder, native)
    difference = largest_logit_difference(
        ours,
        theirs,
        str(folder),
        sides=("the native model", by),
        tolerance=tolerance,
    )
    largest = f"(largest logit {ours.abs().max():.3g})"
    yield f"largest logit difference between the native model and {by}: {difference:.3g} {largest}"

    original = find_original(job.found.state)
    if original is not None and has_transformers():
        yield _compare_with_original(original, theirs, folder, dtype, tolerance)


def _compare_with_original(
    original: Original, exported: Tensor, folder: Path, dtype: str, tolerance: float
) -> str:
    """Compare the logits of the written folder with those of the one that the checkpoint was imported from."""
    try:
        before = stock_logits(original.path, [original.dtype, dtype])
    except CheckpointError as error:
        return f"the original {original.path} was not compared: {error.found}"
    sides = ("the exported folder", f"the original {original.path}")
    difference = largest_logit_difference(
        exported, before, str(folder), sides=sides, tolerance=tolerance
    )
    return f"largest logit difference between {' and '.join(sides)}, both in transformers: {difference:.3g}"


def _read_back(
    job: _WeightExport,
    folder: Path,
    native: ModelConfig,
) -> Tensor:
    """Return the logits of the written folder, as evomesh reads it."""
    changes = {
        "norm_head": native.norm_head and not job.normalizes_head,
        "qk_interleaved": False,
    }
    described = without_mup(native).model_copy(update=changes)
    written = HfFolder(LocalStorage(), str(folder))
    stored = dict(foreign_tensors(written, job.naming, described))

    def read(name: str) -> Tensor:
        tensor = stored[name]
        return tensor.read()

    return native_logits(described, read, job.dtype_name)


def _is_weight(name: str) -> bool:
    """Return whether a tensor of a checkpoint is a weight, not optimizer state."""
    return not name.startswith("optim.")
