"""Folders of a config: seen by all ranks, with room for the checkpoints, fast enough, and with the same data."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evomesh.checkpoint.native.disk_space import check_space
from evomesh.checkpoint.native.find import SaveFolder
from evomesh.config.schema import Config, ParallelConfig
from evomesh.config.user import expand_home
from evomesh.data.build import build_train_data
from evomesh.data.config_folders import other_tokenizer
from evomesh.diagnose.results import CheckResult, RankPlace, by_value, listed
from evomesh.errors import UserError
from evomesh.parallel.exchange import Exchange, gather_on_all_ranks
from evomesh.plan.trace import hold
from evomesh.quantities import readable
from evomesh.storage.base import Storage, join
from evomesh.train.build import save_folder
from evomesh.train.probes import PROBE_FILE, FileTimes, time_folder

PROBE_BYTES = 8 << 20
MIB = 1 << 20
SLOW_RATE = 20 * MIB  # bytes per second; less makes a checkpoint take minutes
LOOKS = 20  # a network file system may show a new file late
PAUSE_S = 0.1


def checkpoint_bytes(config: Config) -> int | None:
    """Return the bytes of one checkpoint; None for a custom model that cannot be built without a layout.

    Call it before the ranks meet: it plans a world of one process.
    """
    model = config.model.model_copy(update={"num_chunks": 1})
    single = config.model_copy(update={"model": model, "parallel": ParallelConfig()})
    if config.ckpt.save_ckpt_folder is None:
        return None
    try:
        memory = hold(single, 1)
    except UserError:
        return None
    optimizer = memory.optimizer if config.ckpt.save_optimizer else 0
    return memory.parameters + optimizer


@dataclass
class SaveFolderCheck:
    """Checks of the save folder that all ranks make together.

    Attributes:
        places: of all ranks, in their order.
        made: the folders that rank 0 made, and so removes; the innermost first.
    """

    config: Config
    exchange: Exchange
    places: Sequence[RankPlace]
    made: list[str] = field(default_factory=list)

    def results(self, one_checkpoint: int | None) -> list[CheckResult]:
        """Return the results, on every rank the same; none where nothing is saved."""
        if self.config.ckpt.save_ckpt_folder is None:
            return []
        folder = save_folder(self.config.ckpt)
        assert folder is not None
        self._make(folder)
        try:
            seen = self._is_shared(folder)
            if seen.status == "fail":
                return [seen]
            space = self._space(folder, one_checkpoint)
            return [seen, space, self._rates(folder)]
        finally:
            self._remove(folder)

    def _make(self, folder: SaveFolder) -> None:
        """Make the folder on rank 0 where there is none, as a run does; a refusal shows when a file is written."""
        if self.exchange.rank:
            return
        missing = folder.root
        with contextlib.suppress(OSError, UserError):
            while missing and not folder.storage.exists(missing):
                self.made.append(missing)
                missing = os.path.dirname(missing)
            folder.storage.make_folder(folder.root)

    def _remove(self, folder: SaveFolder) -> None:
        with contextlib.suppress(OSError, UserError):
            for made in self.made:
                folder.storage.delete_folder(made)

    def _is_shared(self, folder: SaveFolder) -> CheckResult:
        """Let rank 0 write a file for which all others look."""
        name = self.exchange.broadcast(f"{PROBE_FILE}-{secrets.token_hex(4)}")
        probe = join(folder.root, name)
        problem = ""
        if self.exchange.rank == 0:
            problem = _problem_of_writing(folder.storage, probe)
        problem = self.exchange.broadcast(problem)
        if problem:
            return CheckResult(
                "save folder",
                "fail",
                f"{self.places[0]} cannot write to {folder.root}: {problem}",
                "check the permissions, the mount and the store's credentials",
            )
        # Every rank looks before the file goes.
        sees = _appears(folder.storage, probe)
        answers = gather_on_all_ranks(self.exchange, sees)
        if self.exchange.rank == 0:
            with contextlib.suppress(OSError, UserError):
                folder.storage.delete(probe)
        blind = _places_where(self.places, answers, False)
        if blind:
            return CheckResult(
                "save folder",
                "fail",
                f"what rank 0 writes to {folder.root} is not seen by {listed(blind)}",
                "use a shared file system or an object store as ckpt.save_ckpt_folder, mounted on every node",
            )
        return CheckResult(
            "save folder", "ok", f"{folder.root} is the same folder for all ranks"
        )

    def _space(self, folder: SaveFolder, one: int | None) -> CheckResult:
        """Compare the free space with what the run will keep."""
        message = None
        if self.exchange.rank == 0:
            result = judge_space(self.config, folder, one)
            message = [result.status, result.found, result.fix]
        status, found, fix = self.exchange.broadcast(message)
        return CheckResult("disk space", status, found, fix)

    def _rates(self, folder: SaveFolder) -> CheckResult:
        """Let all ranks write and read at once, as they do in a save."""
        problem = ""
        write_s = None
        read_s = None
        try:
            times = time_folder(folder.storage, folder.root, PROBE_BYTES)
            write_s = times.write
            read_s = times.read
        except (OSError, UserError) as error:
            problem = _first_line(error)
        message = [problem, write_s, read_s]
        answers = gather_on_all_ranks(self.exchange, message)
        return judge_rates(self.places, answers)


def _problem_of_writing(storage: Storage, path: str) -> str:
    """Write an empty file and return why it cannot be written, "" if it can."""
    try:
        storage.create(path).finish()
    except (OSError, UserError) as error:
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    line, _, _ = str(error).partition("\n")
    return line


def _appears(storage: Storage, path: str) -> bool:
    """Return whether a file is there, or comes to be within some seconds."""
    for _ in range(LOOKS):
        with contextlib.suppress(OSError, UserError):
            if storage.exists(path):
                return True
        time.sleep(PAUSE_S)
    return False


def _places_where(
    places: Sequence[RankPlace], answers: Sequence[object], wanted: object
) -> list[RankPlace]:
    return [
        place for place, answer in zip(places, answers, strict=True) if answer == wanted
    ]


def judge_space(config: Config, folder: SaveFolder, one: int | None) -> CheckResult:
    """Compare the free space of the save folder with what the run will keep in it.

    Args:
        one: bytes of one checkpoint, None if unknown.
    """
    if one is None:
        free = folder.storage.free_bytes(folder.root)
        shown = "unknown" if free is None else readable(free)
        return CheckResult(
            "disk space",
            "warn",
            f"free: {shown}; the size of a checkpoint of this custom model is not known",
            "compare it with the first checkpoint",
        )
    # At most ``keep_last`` of them are there at once, those of before included.
    saves = 1 + int(config.data.total_steps / config.ckpt.checkpoint_every)
    held = sum(candidate.committed for candidate in folder.candidates())
    try:
        forecast = check_space(
            folder.storage, folder.root, one, held, saves, config.ckpt.keep_last
        )
    except UserError as error:
        return CheckResult("disk space", "fail", error.found, error.fix)
    if "NOT ENOUGH" in forecast:
        found, _, fix = forecast.partition(": ")
        return CheckResult("disk space", "warn", found, fix)
    return CheckResult("disk space", "ok", forecast)


def judge_rates(
    places: Sequence[RankPlace], answers: Sequence[list[object]]
) -> CheckResult:
    """Judge how fast the save folder takes and gives bytes.

    Args:
        answers: of each rank why it failed ("" if not), seconds of writing and of reading ``PROBE_BYTES``.
    """
    timed: list[tuple[FileTimes, RankPlace]] = []
    for place, (problem, write, read) in zip(places, answers, strict=True):
        if problem:
            return CheckResult(
                "disk rates",
                "fail",
                f"{place} cannot write and read {readable(PROBE_BYTES)}: {problem}",
                "check the space, the quota and the permissions of this user",
            )
        times = FileTimes(PROBE_BYTES, float(str(write)), float(str(read)))
        timed.append((times, place))
    # A save is over when the slowest rank has written.
    writing, writer = min(timed, key=lambda pair: pair[0].write_rate)
    reading, reader = min(timed, key=lambda pair: pair[0].read_rate)
    found = (
        f"all ranks at once, the slowest: writes {readable(writing.write_rate)}/s ({writer}), "
        f"reads {readable(reading.read_rate)}/s ({reader})"
    )
    if min(writing.write_rate, reading.read_rate) < SLOW_RATE:
        fix = "choose a faster folder, or save less often: ckpt.checkpoint_every"
        return CheckResult("disk rates", "warn", found, fix)
    return CheckResult("disk rates", "ok", found)


def read_only_results(
    config: Config, exchange: Exchange, places: Sequence[RankPlace]
) -> list[CheckResult]:
    """Return results on the folders that a run only reads, and on the data in them; every rank calls it."""
    folders = {
        "train data": config.data.train_folder,
        "valid data": config.data.valid_folder,
        "tokenizer": config.data.tokenizer_path,
    }
    results = []
    for name, folder in folders.items():
        if folder is not None and config.data.type != "streaming":
            listing = digest_of_listing(folder)
            answers = gather_on_all_ranks(exchange, listing)
            results.append(judge_listing(name, folder, answers, places))
    if any(result.status == "fail" for result in results):
        return results
    facts = gather_on_all_ranks(exchange, _data_facts(config))
    results.append(judge_data(facts, places))
    _, _, *warnings = facts[0]
    if config.data.validates_on_synthetic:
        words = "data.valid_folder is None: validation on synthetic counting sequences"
        warnings.append(words)
    results += [CheckResult("data", "warn", words) for words in warnings]
    return results


def digest_of_listing(path: str) -> str:
    """Return a digest of names and sizes of a file or of all files below a folder, "" where it cannot be read."""
    root = expand_home(path)
    entries = sorted(_names_and_sizes(root))
    can_read = os.access(root, os.R_OK)
    if not entries or not can_read:
        return ""
    text = repr(entries).encode(errors="surrogateescape")
    digest = hashlib.sha256(text).hexdigest()
    return digest[:12]


def _names_and_sizes(root: Path) -> Iterator[tuple[str, int]]:
    """Yield the path below ``root`` and the size of each file; "" is the path of a file itself."""
    if root.is_file():
        yield "", root.stat().st_size
    for folder, _, names in os.walk(root):
        for name in names:
            file = Path(folder, name)
            # A file may go while the folder is read, and a link may lead nowhere.
            try:
                size = file.stat().st_size
            except OSError:
                continue
            name_inside = file.relative_to(root)
            yield str(name_inside), size


def judge_listing(
    name: str, folder: str, answers: Sequence[str], places: Sequence[RankPlace]
) -> CheckResult:
    """Refuse a folder that a rank does not see, or sees other files in."""
    blind = _places_where(places, answers, "")
    if blind:
        return CheckResult(
            name,
            "fail",
            f"{folder} is absent, empty or not readable: {listed(blind)}",
            "mount or copy it on every node, under the same path",
        )
    if len(set(answers)) > 1:
        return CheckResult(
            name,
            "fail",
            f"{folder} has other files or sizes: listing {by_value(answers, places)}",
            "copy the same files to every node",
        )
    return CheckResult(name, "ok", f"{folder} has the same files on all ranks")


def _data_facts(config: Config) -> list[str]:
    """Return the fingerprint of the training data, what is in it and its warnings; or "" and why it cannot be used."""
    try:
        data = build_train_data(config.data, config.model.vocab_size)
    except (UserError, OSError) as error:
        return ["", str(error)]
    warnings = [*data.warnings, *other_tokenizer(config.data)]
    return [str(data.manifest["hash"]), f"{data.num_packs:,} packs", *warnings]


def judge_data(facts: Sequence[list[str]], places: Sequence[RankPlace]) -> CheckResult:
    """Refuse data that cannot be trained on, or that is not the same on all ranks.

    Args:
        facts: of each rank the fingerprint, a description and warnings; or "" and the error.
    """
    for place, (fingerprint, text, *_) in zip(places, facts, strict=True):
        if not fingerprint:
            return CheckResult(
                "data",
                "fail",
                f"{place}: {text}",
                "evomesh data verify FOLDER names every broken file",
            )
    fingerprints = [fingerprint for fingerprint, *_ in facts]
    if len(set(fingerprints)) > 1:
        return CheckResult(
            "data",
            "fail",
            f"the fingerprint differs: {by_value(fingerprints, places)}",
            "copy the same token files to every node",
        )
    return CheckResult(
        "data", "ok", f"readable; fingerprint {fingerprints[0][:16]}, {facts[0][1]}"
    )
