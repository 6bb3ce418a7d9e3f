"""Turn what a store raises into errors of one sentence with a fix and an exit code."""

from __future__ import annotations

import errno

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.errors import EXIT_RESTART, EXIT_USER_ERROR, UserError
from evomesh.outside_errors import fix_for, is_outage

# What helps against a refused save in particular, where the config has a key for it.
FIXES = {
    errno.ENOSPC: "free space, or keep fewer checkpoints with ckpt.keep_last",
    errno.EDQUOT: "free space within the quota, or keep fewer checkpoints with ckpt.keep_last",
    errno.EACCES: "make the folder writable for this user, or choose another save_ckpt_folder",
    errno.EROFS: "choose a save_ckpt_folder on a writable file system",
}


def as_checkpoint_error(error: Exception, path: str) -> CheckpointError:
    """Return whatever a store raised as an error of one sentence with a fix.

    Args:
        path: folder of the checkpoint; a file in it is named relative to it.
    """
    if isinstance(error, UserError):
        return CheckpointError(
            error.found,
            where=error.where,
            expected=error.expected,
            fix=error.fix,
            exit_code=error.exit_code,
            code=error.code,
        )
    if isinstance(error, OSError):
        return CheckpointError(
            _describe(error, path),
            where=path,
            fix=FIXES.get(error.errno or 0) or fix_for(error.errno),
            exit_code=EXIT_RESTART if is_outage(error.errno) else EXIT_USER_ERROR,
            code="EVO-CKPT-014",
        )
    return CheckpointError(str(error), where=path, code="EVO-CKPT-014")


def _describe(error: OSError, path: str) -> str:
    """Return the system's words, after the name of the file if they are about one."""
    name = errno.errorcode.get(error.errno or 0, "unknown")
    reason = f"{error.strerror or error} ({name})"
    file = str(error.filename or "").removeprefix(path).lstrip("/")
    return f"{file}: {reason}" if file else reason
