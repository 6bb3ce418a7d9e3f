"""Resolve InternEvo's spellings of the ``ckpt`` section."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from evomesh.config.reading.draft import ConfigDraft, shown
from evomesh.config.reading.dtypes import dtype_name

REMOTE = ("boto3:", "volc:", "oss2:", "s3:")


def resolve_checkpoint(draft: ConfigDraft) -> None:
    ckpt = draft.take_section("ckpt")
    _resolve_load_info(draft, ckpt)
    _resolve_s3_endpoint(ckpt)
    _resolve_export(draft, ckpt)
    # InternEvo saves by default and fails without a folder; here the folder decides.
    folder = ckpt.get("save_ckpt_folder")
    if ckpt.get("enable_save_ckpt") is None:
        ckpt["enable_save_ckpt"] = bool(folder)
        draft.sources["ckpt.enable_save_ckpt"] = "ckpt.save_ckpt_folder"
    remote = isinstance(folder, str) and folder.startswith(REMOTE)
    if ckpt.get("async_upload") is True and not remote:
        draft.warn(
            "ckpt.async_upload",
            "True has no effect: it applies to remote folders (boto3:..., s3://...), and this one is local",
        )
        ckpt["async_upload"] = False
    if not remote:
        return
    # InternEvo's defaults of a remote folder: a snapshot halfway between two
    # checkpoints, and memory as the place of files that wait for their upload.
    every = ckpt.get("checkpoint_every", math.inf)
    has_halfway = isinstance(every, int) and every > 1
    if has_halfway and "oss_snapshot_freq" not in ckpt:
        ckpt["oss_snapshot_freq"] = every // 2
    uploads = ckpt.get("async_upload") is True
    if uploads and ckpt.get("async_upload_tmp_folder") is None:
        job = draft.take_section("run").get("job_name", "AnonymousJob")
        ckpt["async_upload_tmp_folder"] = f"/dev/shm/{job}_tmp_ckpt/"


def _resolve_export(draft: ConfigDraft, ckpt: dict[str, Any]) -> None:
    """Let the block ``export_hf`` turn exports on, and read the spellings of its dtype."""
    if "ckpt.export_hf" in draft.off:
        ckpt.pop("export_hf", None)
    export = ckpt.get("export_hf")

    # 1. Whoever writes the block wants exports: the switch need not be written too.
    switch = "enable_internevo2hf_ckpt"
    if ckpt.get(switch) is None:
        ckpt[switch] = export is not None
        draft.sources[f"ckpt.{switch}"] = "ckpt.export_hf"

    # 2. The block itself: None is as good as none.
    if export is None:
        ckpt.pop("export_hf", None)
        return
    if isinstance(export, Mapping) and "dtype" in export:
        name = dtype_name(export["dtype"])
        ckpt["export_hf"] = {**export, "dtype": name}


def _resolve_s3_endpoint(ckpt: dict[str, Any]) -> None:
    """Rewrite ``s3://BUCKET/KEY`` as ``s3:ENDPOINT/BUCKET/KEY``, so that a path contains its endpoint."""
    endpoint = ckpt.get("s3_endpoint")
    if not isinstance(endpoint, str):
        return
    info = ckpt.get("load_ckpt_info")
    paths = [(ckpt, "save_ckpt_folder"), (ckpt, "snapshot_ckpt_folder")]
    if isinstance(info, dict):
        info = dict(info)
        ckpt["load_ckpt_info"] = info
        paths.append((info, "path"))
    for section, key in paths:
        path = section.get(key)
        if isinstance(path, str) and path.startswith("s3://"):
            bucket_and_key = path.removeprefix("s3://")
            section[key] = f"s3:{endpoint.rstrip('/')}/{bucket_and_key}"


def _is_ignored_load_info(ckpt: dict[str, Any]) -> bool:
    """Return whether ``auto_resume`` comes before ``load_ckpt_info``, which is not even its fallback."""
    info = ckpt.get("load_ckpt_info")
    if not isinstance(info, dict) or info.get("fallback") is True:
        return False
    return ckpt.get("auto_resume", True) is True


def _resolve_load_info(draft: ConfigDraft, ckpt: dict[str, Any]) -> None:
    """Take ``load_ckpt_info`` from its older names: a folder to resume from, or one to load the weights of."""
    info = ckpt.get("load_ckpt_info")
    for name, content in (
        ("load_ckpt_folder", ("all",)),
        ("load_model_only_folder", ("model",)),
    ):
        value = ckpt.pop(name, None)
        if value is None:
            continue
        if info is not None:
            draft.warn(
                f"ckpt.{name}",
                "has no effect: ckpt.load_ckpt_info is its newer name, and it is set",
            )
            continue
        info = {"path": value, "content": content} if isinstance(value, str) else value
        ckpt["load_ckpt_info"] = info
        draft.sources["ckpt.load_ckpt_info"] = f"ckpt.{name}"
        for key in ("path", "content", "ckpt_type"):
            written = (
                f"ckpt.{name}.{key}" if isinstance(value, dict) else f"ckpt.{name}"
            )
            draft.sources[f"ckpt.load_ckpt_info.{key}"] = written
    if isinstance(info, dict) and "path" in info and info["path"] is None:
        ckpt["load_ckpt_info"] = info = None  # InternEvo's way to say: from scratch
    _resolve_load_optimizer(draft, ckpt)
    if _is_ignored_load_info(ckpt):
        draft.warn(
            "ckpt.load_ckpt_info",
            "is not used: ckpt.auto_resume is True, which is also its default; add fallback=True to load_ckpt_info to "
            "start from this where there is nothing to resume",
        )


def _resolve_load_optimizer(draft: ConfigDraft, ckpt: dict[str, Any]) -> None:
    """Resolve ``load_optimizer`` of InternEvo 0.1 and 0.2: False leaves the optimizer state out."""
    wanted = ckpt.pop("load_optimizer", None)
    if wanted is None or wanted is True:
        return
    if wanted is not False:
        draft.problem(
            "ckpt.load_optimizer",
            f"found {shown(wanted)}",
            expected="True or False",
            code="EVO-CONFIG-002",
        )
        return
    info = ckpt.get("load_ckpt_info")
    if not isinstance(info, dict):
        draft.warn(
            "ckpt.load_optimizer",
            "False has no effect: a resumed run takes the optimizer state of its checkpoint, "
            "and there is no load_ckpt_info to leave it out of",
        )
        return
    content = info.get("content", ("model",))
    if not isinstance(content, str | list | tuple):
        return  # the validation names it
    # "all" without the optimizer has no word: name the other parts.
    parts = [content] if isinstance(content, str) else list(content)
    if "all" in parts:
        parts = ["model", "sampler", "scheduler"]
    kept = tuple(part for part in parts if part != "optimizer")
    ckpt["load_ckpt_info"] = {**info, "content": kept}
