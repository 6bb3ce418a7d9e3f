"""The settings with which a run starts from parts of a checkpoint instead of resuming it, for messages."""

from __future__ import annotations

from collections.abc import Sequence

WEIGHTS = ("model",)
WITHOUT_POSITION = ("model", "optimizer", "scheduler")  # in the data


def start_anew(
    path: str = "",
    content: Sequence[str] = WEIGHTS,
    ckpt_type: str = "",
) -> str:
    """Return both ways to take parts of a checkpoint: in another save folder, or in the same one without a resume.

    In another folder the run still resumes after a crash.

    Args:
        path: of the checkpoint; "" where it is not known.
        content, ckpt_type: as in ``load_ckpt_info``.
    """
    parts = [f'"{part}"' for part in content]
    if len(parts) == 1:
        parts.append("")  # a tuple of one has a comma
    items = ", ".join(parts).rstrip(" ")
    shown_path = f'"{path}"' if path else "..."
    kind = f', ckpt_type="{ckpt_type}"' if ckpt_type else ""
    return (
        f"ckpt.load_ckpt_info=dict(path={shown_path}, content=({items}){kind}, fallback=True) and another "
        "ckpt.save_ckpt_folder; or, in the same folder, with ckpt.auto_resume=False"
    )
