"""Upload a Hugging Face folder to the hub, or to another server that speaks its protocol.

The folder is checked first: half a model, or a truncated file of weights, never leaves
this machine. The client is ``huggingface_hub``; it takes the server from
``HF_ENDPOINT`` and the token from ``HF_TOKEN`` or from ``hf auth login``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomesh.checkpoint.hub_cache import local_folder
from evomesh.checkpoint.huggingface.checklist import check_tokenizer, check_weights
from evomesh.checkpoint.huggingface.exported_folder import MARK
from evomesh.checkpoint.huggingface.folder import HfFolder
from evomesh.checkpoint.native.format import CheckpointError
from evomesh.errors import EXIT_RESTART, UserError
from evomesh.outside_errors import not_installed
from evomesh.quantities import counted, readable
from evomesh.storage.local import LocalStorage

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Of no use to a reader: what a run notes about its export, and what systems leave.
NOT_UPLOADED = (MARK, ".git", ".cache", ".DS_Store", "__pycache__")
# What huggingface_hub sends its requests with; httpx2 is one of them.
HTTP_CLIENTS = ("httpx", "httpcore", "requests", "urllib3")
Report = Callable[[str], None]


@dataclass(frozen=True)
class PushOptions:
    """The options of an upload.

    Attributes:
        private: make a new repository private; one that exists must be.
        revision: branch to commit to, made if need be; None: the main one.
        message: of the commit; None: one that names the folder.
    """

    private: bool = False
    revision: str | None = None
    message: str | None = None


def push(path: str, repo: str, options: PushOptions, report: Report) -> str:
    """Upload the folder ``path`` to the repository ``repo`` and return the URL of the commit.

    Raises:
        UserError: the folder is not a complete model, ``huggingface_hub`` is missing or
            offline, there is no token, or the server refused; one with the exit code of a
            restart if it cannot be reached.
    """
    hub = _client()
    _refuse_bad_name(hub, repo)
    folder = local_folder(path)
    files = _check_folder(folder, report)
    size = sum(file.stat().st_size for file in files)

    api = hub.HfApi(library_name="evomesh")
    with _explaining(hub, repo, api.endpoint):
        name = _make_repository(api, repo, options)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=options.revision,
            commit_message=options.message or f"Upload {folder.resolve().name}",
            allow_patterns=[file.relative_to(folder).as_posix() for file in files],
        )
    url = str(commit.commit_url)
    report(f"pushed {counted(len(files), 'file')}, {readable(size)}: {url}")
    return url


def _client() -> Any:
    """Return the module ``huggingface_hub``, ready to be used."""
    try:
        hub: Any = importlib.import_module("huggingface_hub")
        for module in ("constants", "errors", "utils"):
            # The package loads its modules when they are asked for, but not these.
            importlib.import_module(f"huggingface_hub.{module}")
    except ImportError:
        raise not_installed("huggingface_hub", "hub") from None
    if hub.constants.HF_HUB_OFFLINE:
        raise UserError(
            "the hub is switched off, so nothing can be uploaded",
            where="HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE)",
            fix="unset it for this command",
            code="EVO-HF-008",
        )
    if hub.get_token() is None:
        raise UserError(
            "there is no token for the hub",
            where="HF_TOKEN",
            fix="hf auth login, or export HF_TOKEN=... (a token that may write)",
            code="EVO-HF-008",
        )
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    return hub


def _refuse_bad_name(hub: Any, repo: str) -> None:
    try:
        hub.utils.validate_repo_id(repo)
    except ValueError:
        raise UserError(
            f"{repo!r} cannot name a repository",
            where="REPO",
            expected="OWNER/NAME, of letters, digits, '-', '_' and '.'",
            code="EVO-HF-008",
        ) from None


def _check_folder(folder: Path, report: Report) -> list[Path]:
    """Return the files to upload, after a check that they are a model.

    Raises:
        UserError: config.json is missing or describes another model, or weights are
            missing, truncated or too many.
    """
    model = HfFolder(LocalStorage(), str(folder))
    weights = check_weights(model)
    report(f"{folder}: {weights}")
    try:
        report(f"tokenizer: {check_tokenizer(model)}")
    except UserError as error:
        report(f"warning: the tokenizer cannot be used by others: {error.found}")
    return list(_files(folder))


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        is_left_out = any(part in NOT_UPLOADED for part in inside.parts)
        if path.is_file() and not is_left_out:
            yield path


def _make_repository(api: HfApi, repo: str, options: PushOptions) -> str:
    """Make repository and branch where they do not exist, and return the full name."""
    made = api.create_repo(repo, private=options.private or None, exist_ok=True)
    name = made.repo_id
    # One that exists keeps its visibility, and what was meant to be private would be
    # public.
    if options.private and not api.repo_info(name).private:
        raise CheckpointError(
            "the repository exists and is public",
            where=name,
            expected="a private one, as --private asks",
            fix="make it private on the hub, give another name, or leave --private out",
            code="EVO-HF-008",
        )
    if options.revision is not None:
        api.create_branch(name, branch=options.revision, exist_ok=True)
    return name


@contextmanager
def _explaining(hub: Any, repo: str, endpoint: str) -> Iterator[None]:
    """Turn what the client raises into sentences, without the token."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for cause in _causes(error):
            message = _explain(cause, hub, repo, endpoint)
            if message is not None:
                raise message from None
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it: an upload's is wrapped."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _explain(
    error: BaseException, hub: Any, repo: str, endpoint: str
) -> UserError | None:
    """Return the sentence for an error of the client; None for any other."""
    if isinstance(error, hub.errors.HfHubHTTPError):
        return _refusal(error, repo, endpoint)
    package = type(error).__module__.partition(".")[0]
    is_network = package.startswith(HTTP_CLIENTS)
    if is_network or isinstance(error, ConnectionError | TimeoutError):
        return UserError(
            f"the hub cannot be reached: {type(error).__name__}: {error}",
            where=endpoint,
            fix="check the network and HF_ENDPOINT, and run the command again",
            exit_code=EXIT_RESTART,
            code="EVO-HF-008",
        )
    if isinstance(error, ValueError):  # an answer that the client does not understand
        return UserError(
            f"the server's answer is not that of a hub: {error}",
            where=endpoint,
            fix="check HF_ENDPOINT; a server without Xet storage needs HF_HUB_DISABLE_XET=1",
            code="EVO-HF-008",
        )
    return None


# Status of an answer -> what it means, how to fix it.
REFUSALS = {
    401: (
        "the token is not valid",
        "hf auth login, or export HF_TOKEN=... with a token that may write",
    ),
    403: (
        "the token may not write to this repository",
        "take a token with the permission to write, or a repository of an owner that you belong to",
    ),
    404: (
        "there is no such repository, or the token may not see it",
        "check the names of the owner and of the revision",
    ),
    413: ("a file is larger than the server takes", "export with --max-shard-size 5GB"),
}


def _refusal(error: Any, repo: str, endpoint: str) -> UserError:
    """Return the sentence for a request that the server refused."""
    response = error.response
    status = response.status_code if response is not None else 0
    said = str(getattr(error, "server_message", None) or "").strip()
    words = f" ({said})" if said else ""
    where = f"{repo} on {endpoint}"
    if status in REFUSALS:
        found, fix = REFUSALS[status]
        return UserError(
            f"{found}: {status}{words}", where=where, fix=fix, code="EVO-HF-008"
        )
    if status == 429 or status >= 500:
        return UserError(
            f"the hub answers {status}{words}",
            where=where,
            fix="run the command again in a while",
            exit_code=EXIT_RESTART,
            code="EVO-HF-008",
        )
    return UserError(
        f"the hub refuses the upload: {status}{words}", where=where, code="EVO-HF-008"
    )
