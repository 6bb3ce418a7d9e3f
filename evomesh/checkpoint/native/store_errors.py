"""Turn what a store raises into errors of one sentence with a fix and an exit code."""

from __future__ import annotations

import errno

from evomesh.checkpoint.native.format import CheckpointError
from evomesh.errors import EXIT_RESTART, EXIT_USER_ERROR, UserError

FIXES = {
    errno.ENOSPC: "free space, or keep fewer checkpoints with ckpt.keep_last",
    errno.EDQUOT: "free space within the quota, or keep fewer checkpoints with ckpt.keep_last",
    errno.EACCES: "make the folder writable for this user, or choose another save_ckpt_folder",
    errno.EROFS: "choose a save_ckpt_folder on a writable file system",
}


# What a network file system reports while its server is away: the same command works
# once it is back.
OUTAGES = (
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
)


def as_checkpoint_error(error: Exception, path: str) -> CheckpointError:
    """Return whatever a store raised as an error of one sentence with a fix."""
    if isinstance(error, UserError):
        return CheckpointError(
            error.found,
            where=error.where,
            expected=error.expected,
            fix=error.fix,
            exit_code=error.exit_code,
        )
    if isinstance(error, OSError):
        code = error.errno or 0
        name = errno.errorcode.get(code, "unknown")
        return CheckpointError(
            f"{error.filename or path}: {error.strerror or error} ({name})",
            fix=FIXES.get(code, ""),
            exit_code=EXIT_RESTART if code in OUTAGES else EXIT_USER_ERROR,
        )
    return CheckpointError(f"{path}: {error}")
