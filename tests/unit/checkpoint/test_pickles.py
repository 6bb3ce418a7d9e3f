"""Other people's ``.pt`` and ``.bin`` files: what torch.save writes is read, whatever could act is refused."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evomesh.checkpoint.huggingface.files import load_pickle
from evomesh.checkpoint.pickle_names import STORAGES, OpaqueStub
from evomesh.checkpoint.pickles import MAGIC, PROTOCOL, read_pickle
from evomesh.errors import UserError
from tests.support.deepspeed import ZeroStageEnum, save

SCRIPT = """
import torch

class Program(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return (self.x, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        mapped = torch.from_file("VICTIM", True, 3, dtype=torch.uint8)
        mapped.copy_(torch.tensor([97, 98, 99], dtype=torch.uint8))
        self.x = state[0]
        self.training = state[1]
"""
SYSTEM = {
    "protocol_version": PROTOCOL,
    "little_endian": sys.byteorder == "little",
    "type_sizes": {},
}


def program(folder: Path, victim: Path) -> Path:
    """A TorchScript archive that writes ``victim`` as it is opened."""
    source = folder / "program.py"
    source.write_text(SCRIPT.replace("VICTIM", str(victim)))
    spec = importlib.util.spec_from_file_location("program", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path = folder / "model_tp0_pp0.pt"
    torch.jit.script(module.Program()).save(str(path))
    victim.unlink(missing_ok=True)
    return path


def test_a_torchscript_archive_does_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    path = program(tmp_path, victim)
    with pytest.raises(UserError, match="TorchScript archive"):
        read_pickle(str(path))
    with pytest.raises(UserError, match="cannot be read as tensors alone"):
        load_pickle(str(path), "it")
    with pytest.raises(UserError, match="cannot be read as tensors alone"):
        load_pickle(io.BytesIO(path.read_bytes()), "it")
    assert not victim.exists()


@pytest.mark.parametrize("drop", ["constants.pkl", "code/"])
def test_half_a_torchscript_archive_is_refused(tmp_path: Path, drop: str) -> None:
    victim, half = tmp_path / "victim", tmp_path / "half.pt"
    with (
        zipfile.ZipFile(program(tmp_path, victim)) as whole,
        zipfile.ZipFile(half, "w") as archive,
    ):
        for entry in whole.infolist():
            if drop not in entry.filename:
                archive.writestr(entry.filename, whole.read(entry))
    with pytest.raises(UserError, match="TorchScript archive"):
        read_pickle(str(half))
    assert not victim.exists()


def test_a_file_may_be_called_code(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "code.pt")
    assert torch.equal(read_pickle(str(tmp_path / "code.pt"))["w"], torch.ones(2))


@pytest.mark.parametrize("member", ["storages", "tensors"])
@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_an_old_tar_file_is_not_unpacked(
    tmp_path: Path, member: str, kind: bytes
) -> None:
    """Unpacking a hard link changes the mode and time of the file that it names."""
    victim = tmp_path / "victim"
    victim.write_bytes(pickle.dumps(0))
    victim.chmod(0o600)
    before = victim.stat()
    path = tmp_path / "old.pt"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.mode, info.mtime = 0o777, 1
            if name == member:
                info.type, info.linkname = kind, str(victim)
                tar.addfile(info)
            else:
                content = pickle.dumps(0) + pickle.dumps([])
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match="cannot be read"):
        read_pickle(str(path))
    with pytest.raises(UserError, match="cannot be read as tensors alone"):
        load_pickle(str(path), "it")
    after = victim.stat()
    assert (after.st_mode, after.st_mtime, after.st_nlink) == (
        before.st_mode,
        before.st_mtime,
        before.st_nlink,
    )


def old_file(path: Path, main: bytes, keys: bytes = pickle.dumps([])) -> Path:
    """In the form of torch before 1.6."""
    path.write_bytes(
        b"".join(pickle.dumps(part, 2) for part in (MAGIC, PROTOCOL, SYSTEM))
        + main
        + keys
    )
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def changed(**values: bytes) -> bytes:
    """Opcodes that give the function that rebuilds tensors after they set attributes of it."""
    return (
        REBUILD
        + b"N}("
        + b"".join(text(name) + value for name, value in values.items())
        + b"u\x86b"
    )


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_changes_no_function(tmp_path: Path, legacy: bool) -> None:
    main = b"\x80\x02" + changed(__doc__=text("changed")) + b"."
    path = tmp_path / "x.pt"
    if legacy:
        old_file(path, main)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", main)
    before = torch._utils._rebuild_tensor_v2.__doc__
    try:
        with pytest.raises(UserError, match="changes a function"):
            read_pickle(str(path))
        assert torch._utils._rebuild_tensor_v2.__doc__ == before
    finally:
        torch._utils._rebuild_tensor_v2.__doc__ = before


def test_no_patch_is_written(tmp_path: Path) -> None:
    """In old files torch writes a patch where the source of a module differs from what the file says."""
    victim = tmp_path / "victim"
    holder = changed(dump_patches=b"\x88", __name__=text(str(victim)))
    module = (
        b"(" + text("module") + holder + text("source.py") + text("other\n") + b"tQ"
    )
    path = old_file(tmp_path / "x.pt", b"\x80\x02" + module + b".")
    name = torch._utils._rebuild_tensor_v2.__name__
    try:
        with pytest.raises(UserError, match="cannot be read"):
            read_pickle(str(path))
        assert not list(tmp_path.glob("victim*"))
    finally:
        torch._utils._rebuild_tensor_v2.__name__ = name
        vars(torch._utils._rebuild_tensor_v2).pop("dump_patches", None)


class Codec:
    def __init__(self, value: str, coding: str) -> None:
        self.value, self.coding = value, coding

    def __reduce__(self) -> Any:
        import _codecs

        return _codecs.encode, (self.value, self.coding)


class Wrong:
    """A tensor of more elements than its storage has, or before its beginning."""

    def __init__(
        self, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        self.place = offset, size, stride

    def __reduce__(self) -> Any:
        storage = torch.zeros(4).storage()  # type: ignore[no-untyped-call]
        return torch._utils._rebuild_tensor_v2, (
            storage,
            *self.place,
            False,
            OrderedDict(),
        )


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        Wrong(0, (5,), (1,)),
        Wrong(3, (2,), (1,)),
        Wrong(-1, (2,), (1,)),
        Wrong(0, (2,), (1 << 60,)),
        Wrong(0, (2,), (-1,)),
        Codec("x", "idna"),
        Codec("x", "rot13"),
    ],
)
def test_what_no_tensor_can_be(tmp_path: Path, legacy: bool, content: object) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": content}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="cannot be read"):
        read_pickle(str(path))


class Attribute:
    """An attribute by its name, as Python 3.11.0 to 3.11.3 wrote members of an enumeration."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def test_a_stage_may_be_written_by_its_name(tmp_path: Path) -> None:
    stage = Attribute(ZeroStageEnum, "gradients")
    path = save({"zero_stage": stage}, tmp_path / "early.pt")
    assert read_pickle(str(path)) == {"zero_stage": 2}


@pytest.mark.parametrize(
    "owner,name",
    [
        (ZeroStageEnum, "__class__"),
        (ZeroStageEnum, "mro"),
        (torch.Size, "numel"),
        (OrderedDict, "fromkeys"),
        (torch.zeros(1), "tolist"),
    ],
)
def test_no_other_attribute_is_read(tmp_path: Path, owner: object, name: str) -> None:
    path = save({"w": Attribute(owner, name)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="cannot be read"):
        read_pickle(str(path))


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_saves_is_read(tmp_path: Path, legacy: bool) -> None:
    base = torch.arange(12.0).view(3, 4)
    content = {
        "view": base[1:, 1:],
        "same": base.t(),
        "scalar": torch.tensor(5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "plain": [
            1,
            2.5,
            "text",
            None,
            True,
            (1, 2),
            {3},
            b"\x00\xff",
            torch.Size([1, 2]),
            slice(1, 2),
        ],
        "types": [torch.bfloat16, torch.device("cpu")],
        "ordered": OrderedDict(a=1),
        "random": {"numpy": np.arange(3), "torch": torch.get_rng_state()},
    } | {str(dtype): torch.tensor([1, 0, 1]).to(dtype) for dtype in STORAGES.values()}
    path = tmp_path / "x.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = read_pickle(str(path))
    assert isinstance(found["random"].pop("numpy"), OpaqueStub)
    assert found.keys() == content.keys()
    assert torch.equal(found["random"]["torch"], torch.get_rng_state())
    for name in ("plain", "types", "ordered"):
        assert found[name] == content[name]
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype
            assert found[name].stride() == value.stride()
            assert torch.equal(found[name], value)
    # One storage, as it was saved.
    assert found["same"].data_ptr() == found["view"].data_ptr() - 5 * 4


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_ends_early_is_refused(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(1000)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for length in (0, 3, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cannot be read"):
            read_pickle(str(path))
    os.truncate(path, 0)


def test_a_tensor_larger_than_its_file_takes_no_memory(tmp_path: Path) -> None:
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    )
    storage += b"\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"NtQ."
    with pytest.raises(UserError, match="takes 4398046511104 bytes"):
        read_pickle(str(old_file(tmp_path / "x.pt", b"\x80\x02" + storage)))
