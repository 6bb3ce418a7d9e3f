"""Convert a resolved config to plain values without secrets, for checkpoints and logs, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from evomesh.config.redact import redact_setting, secret_values
from evomesh.config.schema import Config
from evomesh.errors import UserError

# Where a node keeps something may differ; what it keeps there is compared by the data's
# own fingerprint.
PLACES = (
    "run.run_dir",
    "run.tensorboard_folder",
    "run.resume_tb_folder",
    "data.train_folder",
    "data.valid_folder",
    "data.shm_path",
    "data.tokenizer_path",
    "data.data_order_path",
    "ckpt.async_upload_tmp_folder",
)


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return the config as nested dicts of plain values, secrets hidden, tuples as lists.

    Infinities stay floats; ``encode_json`` makes strict JSON of the result.
    """
    record = _plain_value(config.model_dump(mode="python"), "", secret_values())
    assert isinstance(record, dict)
    return record


def config_from_dict(record: dict[str, Any]) -> Config:
    """Return the config that ``config_to_dict`` recorded; what was hidden stays hidden.

    Raises:
        UserError: the record has keys or values that this version does not know.
    """
    try:
        return Config.model_validate({"generation": None} | record, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"the stored config is not valid: {first['msg']}",
            where=".".join(str(part) for part in first["loc"]),
            expected="a config that this version knows",
            fix="use the version of evomesh that wrote it",
            code="EVO-CONFIG-011",
        ) from None


def _plain_value(value: Any, key: str, secrets: Sequence[str]) -> Any:
    """Return a value of JSON's types; every text goes through the redactor with the key that it stands under."""
    if isinstance(value, str):
        return redact_setting(key, value, secrets)
    if isinstance(value, bool | int | float | None):
        return value
    if isinstance(value, list | tuple):
        # Items have the key of their list: it is the name that tells a secret.
        return [_plain_value(item, key, secrets) for item in value]
    if not isinstance(value, dict):
        # A parameter of a custom model that JSON cannot express.
        return str(value)
    record = {}
    prefix = f"{key}." if key else ""
    for name, item in value.items():
        item_key = prefix + name
        record[name] = _plain_value(item, item_key, secrets)
    return record


def _plain_section(
    section: dict[str, Any], key: str, secrets: Sequence[str]
) -> dict[str, Any]:
    prefix = f"{key}." if key else ""
    record = {}
    for name, value in section.items():
        record[name] = _plain_value(value, prefix + name, secrets)
    return record
