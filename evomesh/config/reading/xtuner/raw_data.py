"""XTuner's raw datasets: the ``evomesh tokenize`` command that makes their token files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomesh.config.hub_folders import find_model_folder
from evomesh.config.reading.draft import shown
from evomesh.config.reading.xtuner.foreign_names import last_name
from evomesh.config.reading.xtuner.tokenize_command import output_of
from evomesh.config.reading.xtuner.translation import Translation

RAW_LOADERS = (
    "load_intern_repo_untokenized_dataset",
    "process_untokenized_datasets",
    "process_hf_dataset",
    "ConcatDataset",
)
# XTuner's map function -> the format of evomesh tokenize
FORMATS = {
    "": "xtuner",
    "alpaca_map_fn": "alpaca",
    "alpaca_zh_map_fn": "alpaca",
    "openai_map_fn": "messages",
    "pretrain_map_fn": "text",
}
# XTuner's PROMPT_TEMPLATE -> the chat template of evomesh tokenize
TEMPLATES = {
    "internlm2_chat": "chatml",
    "qwen_chat": "chatml",
    "internlm_chat": "internlm",
    "llama3_chat": "llama3",
    "default": "xtuner_default",
    "zephyr": "xtuner_zephyr",
    "mistral": "xtuner_mistral",
    "mixtral": "xtuner_mistral",
    "deepseek_moe": "xtuner_mistral",
    "code_llama_chat": "xtuner_code_llama",
    "llama2_chat": "xtuner_llama2",
    "vicuna": "xtuner_vicuna",
    "wizardlm": "xtuner_vicuna",
    "wizardcoder": "xtuner_wizardcoder",
    "deepseek_coder": "xtuner_deepseek_coder",
    "deepseekcoder": "xtuner_deepseek_coder",
    "baichuan_chat": "xtuner_baichuan",
    "baichuan2_chat": "xtuner_baichuan2",
}
# Arguments of the loaders that a command carries, or that follow from it.
KNOWN_ARGUMENTS = ("folder", "file_type", "data_order_path", "min_length")
TOKENIZER = "tokenizer.pretrained_model_name_or_path"


@dataclass(frozen=True)
class RawDataset:
    """One raw dataset of a config.

    Attributes:
        key: where it is in the config.
        loader: the function that XTuner reads it with.
        values: the arguments of that function.
    """

    key: str
    loader: str
    values: Mapping[str, Any]


def prepare_raw_data(out: Translation, key: str, loader: str) -> None:
    """Translate raw data: training reads ``WORK_DIR/tokenized``, and ``out.preparation`` fills it."""
    folder = Path(out.work_dir) / "tokenized"
    # Read, so that they do not count as unknown: what they say is in the commands
    # below.
    for argument in KNOWN_ARGUMENTS:
        out.settings.get(f"{key}.{argument}")
    arrow = out.settings.get(f"{key}.processed_dataset_dict_path")
    if arrow is not None:
        out.settings.problem(
            f"{key}.processed_dataset_dict_path",
            f"{arrow!r} is XTuner's Arrow data, which is not read",
            expected="None, and the folder of the raw files",
            fix="set folder, or make token files: python xtuner/tools/process_untokenized_datasets.py",
            code="EVO-CONFIG-009",
        )
    for number, dataset in enumerate(_datasets(out, key, loader)):
        command = _command(out, dataset, folder / "raw" / f"dataset{number}.bin")
        if command is not None:
            out.preparation.append(command)
    out.put("data.train_folder", str(folder), key, "token files of the raw data")
    _put_chat_template(out, key)
    # What is there already, of an earlier start, is not made again.
    missing = [
        command for command in out.preparation if not output_of(command).exists()
    ]
    for command in missing:
        out.warn(
            key, f"raw data is tokenized before training: evomesh {' '.join(command)}"
        )


def _put_chat_template(out: Translation, key: str) -> None:
    """Keep the built-in template of the conversations, if they all have the same, for chats with the model."""
    templates = set()
    for command in out.preparation:
        if "--chat-template" in command:
            templates.add(command[command.index("--chat-template") + 1])
    if len(templates) == 1 and templates <= set(TEMPLATES.values()):
        out.put("data.chat_template", templates.pop(), key, "of the conversations")


def _datasets(out: Translation, key: str, loader: str) -> list[RawDataset]:
    values = out.settings.peek(key)
    if loader != "ConcatDataset":
        return [RawDataset(key, loader, values)]
    members = values.get("datasets") or values.get("datasets_cfg") or []
    found = []
    for number, member in enumerate(members):
        kind = last_name(member.get("type")) if isinstance(member, Mapping) else ""
        if kind in RAW_LOADERS and kind != "ConcatDataset":
            found.append(RawDataset(f"{key}.datasets", kind, member))
        else:
            out.settings.problem(
                f"{key}.datasets",
                f"dataset {number} is {shown(member)}",
                expected=", ".join(RAW_LOADERS[:3]),
                code="EVO-CONFIG-014",
            )
    return found


def _command(
    out: Translation, dataset: RawDataset, output: Path
) -> tuple[str, ...] | None:
    """Return the arguments of ``evomesh`` that tokenize a dataset; a problem and None if there are none."""
    settings = out.settings
    values = dataset.values
    sources = _sources(out, dataset)
    tokenizer = settings.get(TOKENIZER)
    if sources is None or not isinstance(tokenizer, str):
        return None
    # Repositories of raw text are read in OpenAI's form, whatever the config says.
    function = "openai_map_fn"
    if not dataset.loader.startswith(("load_intern_repo", "process_untokenized")):
        function = _map_function(values.get("dataset_map_fn"))
    kind = FORMATS.get(function)
    if kind is None:
        settings.problem(
            f"{dataset.key}.dataset_map_fn",
            f"{function} is not run: map functions of other packages are inert here",
            expected=", ".join(name or "None" for name in FORMATS),
            fix='write the data as {"messages": [{"role": ..., "content": ...}]} and take openai_map_fn',
            code="EVO-CONFIG-014",
        )
        return None
    folder = find_model_folder(tokenizer)
    tokenizer = str(folder or tokenizer)
    command = [
        "tokenize",
        *sources,
        "--output",
        str(output),
        "--tokenizer",
        tokenizer,
        "--format",
        kind,
    ]
    if kind == "text":
        return tuple(command)
    max_length = values.get("max_length") or settings.get(
        "train_dataloader.dataset.packed_length", 2048
    )
    command += [
        "--chat-template",
        _template(out, dataset),
        "--max-length",
        str(max_length),
    ]
    return tuple(command)


def _sources(out: Translation, dataset: RawDataset) -> list[str] | None:
    """Return the files or folders of a dataset; a problem and None if they are not on this machine."""
    if dataset.loader != "process_hf_dataset":
        return [str(dataset.values.get("folder"))]
    inner = dataset.values.get("dataset")
    key = f"{dataset.key}.dataset"
    if isinstance(inner, str):
        inner = {"path": inner}
    if not isinstance(inner, Mapping) or not isinstance(inner.get("path"), str):
        out.settings.problem(
            key,
            f"found {shown(inner)}",
            expected='dict(type=load_dataset, path="json", ...)',
            code="EVO-CONFIG-014",
        )
        return None
    # A name, a list of names, or one of the two for each split.
    files = inner.get("data_files")
    if files is not None:
        found: list[str] = []
        for item in files.values() if isinstance(files, Mapping) else [files]:
            found += [item] if isinstance(item, str) else map(str, item)
        return found
    path = inner["path"]
    if Path(path).exists():
        return [path]
    out.settings.problem(
        f"{key}.path",
        f"{path!r} is neither a file nor a folder",
        expected="data on this machine",
        fix=f"hf download --repo-type dataset {path} --local-dir data/{Path(path).name}, and give that folder",
        code="EVO-DATA-001",
    )
    return None


def _map_function(value: Any) -> str:
    """Return the name of a map function; "" for None."""
    if value is None:
        return ""
    # The function itself, or dict(type=FUNCTION, ...).
    named = value.get("type") if isinstance(value, Mapping) else value
    return last_name(named)


def _template(out: Translation, dataset: RawDataset) -> str:
    """Return the chat template: of the same name, else with a warning the one in the tokenizer's folder."""
    value = dataset.values.get("template_map_fn")
    template = value.get("template") if isinstance(value, Mapping) else value
    name = last_name(template)
    if template is not None and name not in TEMPLATES:
        out.warn(
            f"{dataset.key}.template_map_fn",
            f"there is no template {name}: the conversations get the tokenizer's own chat template instead; those of "
            f"XTuner that are here: {', '.join(TEMPLATES)}",
        )
    return TEMPLATES.get(name, "tokenizer")
