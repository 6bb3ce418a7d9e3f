"""Compare folders of a config, however each is spelled."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from evomesh.config.user import expand_home

LOCAL = re.compile(r"^local:", re.IGNORECASE)
# boto3:s3://BUCKET.ENDPOINT/KEY, s3:ENDPOINT/BUCKET/KEY and s3://BUCKET/KEY
BOTO3 = re.compile(
    r"^boto3:s3://(?P<bucket>[^./]+)\.(?P<host>[^/]+)/*(?P<key>.*)$", re.IGNORECASE
)
S3_WITH_ENDPOINT = re.compile(
    r"^s3:https?://(?P<host>[^/]+)/+(?P<bucket>[^/]+)/*(?P<key>.*)$", re.IGNORECASE
)
S3 = re.compile(r"^s3:(?:s3:)?//(?P<bucket>[^/]+)/*(?P<key>.*)$", re.IGNORECASE)
FORMS = (BOTO3, S3_WITH_ENDPOINT, S3)
STEP_FOLDER = re.compile(r"step-[0-9]{8,}")


@dataclass(frozen=True)
class FolderPlace:
    """The place of a folder: a path on a disk, or a key in a store.

    Attributes:
        bucket: "" on a disk.
        host: of the store; "" if only the environment knows it, which then counts as any host.
        parts: the names on the way to the folder; on a disk without links.
    """

    bucket: str
    host: str
    parts: tuple[str, ...]

    @staticmethod
    def of(url: str) -> FolderPlace:
        """Return the place that a setting means; links on a disk are followed."""
        # boto3:s3://runs.oss.example.com/a/b and s3:http://oss.example.com/runs/a/b are
        # one place: bucket "runs", host "oss.example.com", parts ("a", "b").
        for form in FORMS:
            match = form.match(url)
            if match is None:
                continue
            fields = match.groupdict()
            host = fields.get("host") or ""
            parts = _path_parts(fields["key"])
            return FolderPlace(fields["bucket"], host, parts)
        path = expand_home(LOCAL.sub("", url))
        parts = _path_parts(os.path.realpath(path))
        return FolderPlace("", "", parts)

    def contains(self, other: FolderPlace) -> bool:
        """Return whether ``other`` is this folder or inside it."""
        same_host = self.host == other.host or not (self.host and other.host)
        inside = other.parts[: len(self.parts)] == self.parts
        return self.bucket == other.bucket and same_host and inside

    @property
    def in_step_folder(self) -> bool:
        """Return whether the folder is, or is inside, what looks like the folder of one checkpoint."""
        return any(STEP_FOLDER.match(part) for part in self.parts)


def _path_parts(path: str) -> tuple[str, ...]:
    """Return the names in a path; "/a//b/" and "a/b" have the same."""
    return tuple(part for part in path.split("/") if part)


def shared_role(save: str, snapshots: str) -> str:
    """Return why a run cannot save checkpoints to one folder and snapshots to the other, "" if it can.

    Snapshots have a separate retention: of the step folders in their folder the newest
    two stay. Their folder may be inside the save folder, as it is by default, but must
    not be it or contain it.
    """
    saved = FolderPlace.of(save)
    snapshot = FolderPlace.of(snapshots)
    is_inside = saved.contains(snapshot)
    is_around = snapshot.contains(saved)
    if saved == snapshot or (is_inside and is_around):
        return "the same folder as save_ckpt_folder"
    if is_around:
        return "a folder that contains save_ckpt_folder"
    parts_below = snapshot.parts[len(saved.parts) :]
    below_save = FolderPlace("", "", parts_below)
    if is_inside and below_save.in_step_folder:
        return "inside the folder of one checkpoint"
    return ""
