"""One save attempt, in the order that makes every crash harmless: data, index, then the commit record."""

from __future__ import annotations

import datetime
import errno
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from evomesh.checkpoint.native import format as fmt
from evomesh.checkpoint.native.boxes import Box, Coordinates, split_box
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.checkpoint.native.plan import SavePlan, WriteItem, check_cover
from evomesh.checkpoint.native.software import software
from evomesh.config.json_codec import encode_json
from evomesh.errors import UserError
from evomesh.parallel.exchange import Exchange
from evomesh.storage.base import Storage, join

logger = logging.getLogger(__name__)
FIXES = {
    errno.ENOSPC: "free space, or keep fewer checkpoints with ckpt.keep_last",
    errno.EDQUOT: "free space within the quota, or keep fewer checkpoints with ckpt.keep_last",
    errno.EACCES: "make the folder writable for this user, or choose another save_ckpt_folder",
    errno.EROFS: "choose a save_ckpt_folder on a writable file system",
}


ItemReader = Callable[
    [WriteItem], Iterator[tuple[Box, memoryview]]
]  # the pieces of an entry with their bytes, in order


def write_data(
    storage: Storage,
    folder: str,
    attempt: str,
    rank: int,
    entries: list[WriteItem],
    source: ItemReader | None = None,
) -> dict[str, Any]:
    """Writes this rank's file and returns what rank 0 must know; when it returns, the bytes are durable.

    Args:
        source: where the bytes come from; by default the entries' own tensors.

    Returns:
        {"file": [name, size, header digest] or None, "rows": [[tensor name, [offsets, shape, start, digest] ...] ...]}
    """
    if not entries:
        return {"file": None, "rows": []}
    name = fmt.file_name(attempt, rank)
    sizes = [
        (fmt.entry_key(e.name, e.shape, e.part.box), e.dtype, e.part.box.shape, _bytes(e)) for e in entries
    ]
    header = fmt.safetensors_header(sizes)
    position = len(header)
    rows: list[list[Any]] = []
    writer = storage.create(join(folder, name))
    try:
        writer.write(header)
        for entry in entries:
            row: list[Any] = [entry.name]
            for piece, data in (source or live_pieces)(entry):
                writer.write(data)
                row.append([list(piece.offsets), list(piece.shape), position, fmt.piece_hash(data)])
                position += len(data)
            rows.append(row)
        writer.finish()
    finally:
        writer.abort()
    storage.sync(folder)
    return {"file": [name, position, fmt.piece_hash(header)], "rows": rows}


def _bytes(entry: WriteItem) -> int:
    return entry.part.box.numel * fmt.DTYPES[entry.dtype].itemsize


def live_pieces(entry: WriteItem) -> Iterator[tuple[Box, memoryview]]:
    """The pieces of a tensor in memory; only one piece is ever copied at a time.

    Raises:
        CheckpointError: NaN or infinity in it: no checkpoint is committed that a run could not go on from.
    """
    part, item_size = entry.part, fmt.DTYPES[entry.dtype].itemsize
    in_place = part.tensor.is_contiguous() and part.tensor.device.type == "cpu"
    whole = as_bytes(part.tensor) if in_place else None
    position = 0
    for piece in split_box(part.box, item_size, fmt.PIECE_BYTES):
        size = piece.numel * item_size
        bad = not_finite(part.tensor[piece.within(part.box)])
        if bad:
            place = f"{entry.name}{list(piece.offsets)}"
            raise CheckpointError(
                f"{place}: {bad} of {piece.numel} values are NaN or infinite: such a state is not saved"
            )
        if whole is not None:
            yield piece, whole[position : position + size]
        else:
            view = part.tensor[piece.within(part.box)]
            yield piece, as_bytes(view.contiguous().cpu())
        position += size


def not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return 0
    # One cheap pass as a rule: NaN and infinity survive a sum, and a sum that overflows is counted exactly.
    if bool(torch.isfinite(tensor.sum())):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)


def write_index(
    storage: Storage,
    folder: str,
    attempt: str,
    tensors: dict[str, tuple[str, Coordinates]],
    messages: list[dict[str, Any]],
) -> dict[str, Any]:
    """Merges the ranks' rows into the index; rank 0 only.

    Returns:
        the fields ``software``, ``files``, ``index``, ``tensors`` and ``tensor_bytes`` of the commit body.
    """
    files: list[list[Any]] = []
    pieces: dict[str, list[fmt.PieceRecord]] = {name: [] for name in tensors}
    for message in messages:
        for name, *found in message["rows"]:
            pieces[name] += [
                fmt.PieceRecord(len(files), Box(tuple(o), tuple(s)), b, h) for o, s, b, h in found
            ]
        if message["file"] is not None:
            files.append(message["file"])
    lines, total = [], 0
    for name in sorted(tensors):
        dtype, shape = tensors[name]
        mine = tuple(sorted(pieces[name], key=lambda piece: piece.box.offsets))
        check_cover(name, shape, [piece.box for piece in mine])
        record = fmt.TensorRecord(name, dtype, shape, mine)
        total += sum(piece.box.numel for piece in mine) * record.item_size
        lines.append(record.to_line())
    data = b"".join(lines)
    index = fmt.index_name(attempt)
    writer = storage.create(join(folder, index))
    try:
        writer.write(data)
        writer.finish()
    finally:
        writer.abort()
    storage.sync(folder)
    return {
        "software": software(),  # here, since one rank comes here, and behind the training
        "files": files,
        "index": {"file": index, "bytes": len(data), "sha256": fmt.sha256(data)},
        "tensors": len(lines),
        "tensor_bytes": total,
    }


def publish(storage: Storage, folder: str, body: dict[str, Any]) -> None:
    """The commit. A record of another job in this place is never replaced.

    Raises:
        CheckpointError: another job committed here.
    """
    path = join(folder, fmt.COMMIT)
    try:
        storage.publish(path, fmt.seal(body), body["attempt"])
    except FileExistsError:
        other = fmt.unseal(storage.read(path))
        if other["attempt"] == body["attempt"]:
            return  # our own write, repeated after its answer was lost
        raise CheckpointError(
            f"another job committed step {other['step']} (attempt {other['attempt']}, {other['created']})",
            where=folder,
            expected="one job per save folder",
            fix="stop one of the two jobs, or give each its own save_ckpt_folder",
        ) from None


def attempt(
    storage: Storage,
    exchange: Exchange,
    root: str,
    folder: str,
    plan: SavePlan,
    entries: list[WriteItem],
    record: dict[str, Any],
) -> None:
    """Data on every rank, then index and commit on rank 0; the same verdict everywhere.

    Raises:
        CheckpointError: on every rank, naming the ranks that failed; the files of the attempt are gone again.
    """
    rank, name = exchange.rank, record["attempt"]
    message: dict[str, Any]
    try:
        storage.make_folder(folder)
        message = write_data(storage, folder, name, rank, entries)
        storage.sync(root)
    except (OSError, UserError) as error:
        message = {"error": refusal(error, folder).found}
    messages = exchange.gather(message)
    verdict: dict[str, Any] | None = None
    if messages is not None:
        errors = [f"rank {r}: {m['error']}" for r, m in enumerate(messages) if "error" in m]
        verdict = {"errors": errors, "clean": True}
        try:
            if not errors:
                record |= write_index(storage, folder, name, plan.tensors, messages)
                verdict["clean"] = False  # from here on the commit may be visible even if the call fails
                publish(storage, folder, record)
        except (OSError, UserError) as error:
            verdict["errors"] = [f"rank 0: {refusal(error, folder).found}"]
    verdict = exchange.broadcast(verdict)
    if verdict["errors"]:
        if verdict["clean"]:
            _clean(storage, folder, [fmt.file_name(name, rank), fmt.index_name(name)][: 1 if rank else 2])
        raise CheckpointError("; ".join(verdict["errors"][:4]), where=folder)


def _clean(storage: Storage, folder: str, names: list[str]) -> None:
    """Gives a full disk its space back; what cannot be deleted now goes with the next retention."""
    try:
        for name in names:
            storage.delete(join(folder, name))
        if not storage.list(folder):
            storage.delete_folder(folder)
    except OSError as error:
        logger.warning("%s: cleaning up a failed save: %s", folder, error)


def refusal(error: Exception, path: str) -> CheckpointError:
    """One sentence for whatever the store said."""
    if isinstance(error, UserError):
        return CheckpointError(error.found, where=error.where, expected=error.expected, fix=error.fix)
    if isinstance(error, OSError):
        place = error.filename or path
        name = errno.errorcode.get(error.errno or 0, "unknown")
        return CheckpointError(
            f"{place}: {error.strerror or error} ({name})", fix=FIXES.get(error.errno or 0, "")
        )
    return CheckpointError(f"{path}: {error}")


def body(step: int, attempt: str, state: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The fields of the commit body that do not depend on the data files."""
    encoded = encode_json(config)
    return {
        "format": fmt.FORMAT,
        "version": fmt.VERSION,
        "step": step,
        "attempt": attempt,
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "hash": {"piece": fmt.PIECE_HASH, "record": fmt.RECORD_HASH},
        "config": encoded,
        "config_sha256": fmt.sha256(fmt.canonical(encoded)),
        "state": encode_json(state),
    }
