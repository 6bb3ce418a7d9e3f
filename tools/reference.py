"""Write docs/commands.md and docs/keys.md, each in English and Chinese.

    python tools/reference.py

The first has every command with its purpose and what --help prints, the second every key of a config
(tools/keys_page.py). The purposes in English are those of the code; a command that has no Chinese one below is an
error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# After the path is set.
import typer  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from evomesh.cli.app import app  # noqa: E402
from evomesh.cli.main import train_py_app  # noqa: E402
from tests.support.pages import DOCS, Page  # noqa: E402
from tools import keys_page  # noqa: E402
from tools.translations import as_chinese_page  # noqa: E402

PAGE = Page(DOCS / "commands.md")
COLUMNS = 80  # what a terminal of usual width shows
TRAIN_PY = "train.py"


class Command(NamedTuple):
    """A command that can be typed.

    Attributes:
        name: what is typed, such as `evomesh data verify`.
        purpose: the first sentence of its help.
        help: what it prints with --help.
    """

    name: str
    purpose: str
    help: str


# Commands by what they are for: (English title, Chinese title, {command: Chinese purpose}).
GROUPS = (
    (
        "Train and watch",
        "训练与观察",
        {
            "evomesh demo": "用每个 Python 自带的文本训练一个小模型和一个对话模型，并报告它们学到了什么。",
            "evomesh train": "训练 CONFIG 描述的模型。",
            "evomesh run": "与 train 命令一样训练；崩溃或丢失进程后，从最新的检查点重新启动。",
            "evomesh top": "在训练时显示一次运行：进度、损失、速度、保存、告警和每个进程。",
            "evomesh report": "为一次运行写一个 HTML 页面，或把几次运行并排：曲线、时间、重启、数据、配置。",
            "evomesh watch": "提供 `evomesh report` 的页面，训练时保持更新。",
            "evomesh compare": "比较两次运行：配置、数据、代码、版本、并行方式，以及数值开始不同的第一步。",
            "evomesh replay": "从某一步之前的检查点重新计算 RUN 的这一步，并与记录比较。",
            TRAIN_PY: "用 InternEvo 的命令行训练：`train.py --config CONFIG --launcher torch`。",
        },
    ),
    (
        "Before a run",
        "运行之前",
        {
            "evomesh plan": "预测一个进程的显存和通信量。",
            "evomesh scale": "预测启动、检查点、流水线、掉队进程与故障的代价如何随进程数增长。",
            "evomesh doctor": "不到一分钟，在所有进程上检查 CONFIG 的运行需要的一切。",
            "evomesh parity": "把 CONFIG 缩小，在每种并行方式和单个进程中各训练两步，比较每个张量。",
            "evomesh slurm": "写出在 Slurm 集群上训练 CONFIG 的批处理脚本；打印、保存或提交。",
            "evomesh batch": "与 XTuner 比较每步的 token 数。",
            "evomesh explain": "解释一个错误代码：原因、例子和处理方法。",
        },
    ),
    (
        "Configs",
        "配置",
        {
            "evomesh config check": "按所有规则检查 CONFIG。",
            "evomesh config show": "打印 CONFIG 的每个值，以及它在哪里设置。",
            "evomesh config list": "列出 evomesh 自带的配置。",
            "evomesh config copy": "复制自带的配置及其基础文件。",
            "evomesh config translate": "把 XTuner 的 CONFIG 写成 evomesh 的配置；每行的注释写明它来自哪里。",
        },
    ),
    (
        "Data and tokenizers",
        "数据与分词器",
        {
            "evomesh tokenize": "对文本或对话分词，写成 .bin 及其 .meta。",
            "evomesh data inspect": "显示数量、长度、id 和解码后的样本。",
            "evomesh data show": "显示模型在一个 pack 中看到的内容，一字不差。",
            "evomesh data verify": "检查 token 文件的每一行。",
            "evomesh data repair": "根据各行重建 .meta。",
            "evomesh data cache": "把每个文件的 token 缓存为二进制数组。",
            "evomesh data report": "为数据文件夹写一个 HTML 页面：长度、重复、语言、分词、打包损失。",
            "evomesh data order": "写出供 data.data_order_path 使用的文件。",
            "evomesh ledger": "查询一步用了哪些文档。",
            "evomesh tokenizer train": "用文本训练分词器：txt、json、jsonl、csv、parquet 和 arrow，"
            "读取方式与 `evomesh tokenize` 相同。",
            "evomesh tokenizer inspect": "显示分词器的大小和特殊 id，以及按文本种类的每个 token 的字节数。",
            "evomesh tokenizer compare": "按文本种类比较两个分词器在同一批文本上每个 token 的字节数。",
        },
    ),
    (
        "Checkpoints",
        "检查点",
        {
            "evomesh ckpt ls": "列出检查点，最新的在前。",
            "evomesh ckpt verify": "检查 PATH 下每个检查点的每个字节。",
            "evomesh ckpt prune": "删除旧的检查点。",
            "evomesh ckpt pin": "让一个检查点不受保留规则的限制。",
            "evomesh ckpt diff": "比较两个检查点：配置、状态和每个元素。",
            "evomesh ckpt reshard": "把检查点改写为另一种并行方式。",
            "evomesh ckpt average": "对同一模型的多个检查点的权重取平均，保存时的并行方式不限。",
        },
    ),
    (
        "Use a model",
        "使用模型",
        {
            "evomesh generate": "补全一个提示，或回答文件夹中的提示。",
            "evomesh eval": "用 lm-evaluation-harness 评测检查点。",
            "evomesh validate": "打印一个检查点在 data.valid_folder 的每个验证集上的损失、困惑度和准确率。",
            "evomesh serve": "以 OpenAI API 提供模型服务。",
            "evomesh chat": "提供与模型对话的页面。",
        },
    ),
    (
        "Formats of other systems",
        "其他系统的格式",
        {
            "evomesh convert to-hf": "把检查点导出为 Hugging Face 文件夹。",
            "evomesh convert from-hf": "把 Hugging Face 文件夹导入为检查点，只有权重。",
            "evomesh convert check": "检查模型文件夹是否可以用于推理。",
            "evomesh convert push": "把模型文件夹上传到 Hugging Face hub。",
            "evomesh convert from-internevo": "导入以任意并行方式保存的 InternEvo 检查点。",
            "evomesh convert to-internevo": "把检查点导出为 InternEvo 的模型文件。",
        },
    ),
    (
        "XTuner's command",
        "XTuner 的命令",
        {
            "evomesh xtuner train": "训练 CONFIG 描述的模型：一个文件，或 list-cfg 打印的名字。",
            "evomesh xtuner tokenize": "为 CONFIG 指定的原始数据生成 token 文件；已有的文件不动。",
            "evomesh xtuner log-dataset": "显示 CONFIG 的数据中训练看到的一个 pack："
            "文本（变暗的部分不是目标），没有分词器时是 id。",
            "evomesh xtuner check-custom-dataset": "检查 CONFIG 的数据的每一行：id、偏移和数量。",
            "evomesh xtuner list-cfg": "列出自带的、沿用 XTuner 名字的配置。",
            "evomesh xtuner copy-cfg": "把自带的配置及其基础文件复制为 DIR/NAME_copy.py，供修改。",
            "evomesh xtuner install-command": "写出名为 xtuner 的脚本，它运行 `evomesh xtuner`；已有的同名命令不动。",
            "evomesh xtuner convert pth_to_hf": "把检查点写成 Hugging Face 文件夹，配置放在旁边。",
            "evomesh xtuner convert merge": "拒绝：适配器不属于 evomesh。",
            "evomesh xtuner convert split": "把 Hugging Face 文件夹中的模型写成指定大小的权重文件。",
        },
    ),
)
INTRODUCTIONS = (
    f"""\
<!-- Generated by tools/reference.py; change the help texts in the code, not this file. -->
# Commands

Every command with what it prints for `--help` (`-h` is the same) on a terminal of {COLUMNS} columns.
`evomesh --version` prints the version. `evomesh --debug COMMAND` shows the traceback of an error that ends with code 2;
what each exit code means is in [Run files](run-files.md#exit-codes). What is marked repeatable can be given
several times: `--set adam.lr=1e-4 --set data.total_steps=100`. `python -m evomesh` is the same as `evomesh`.
""",
    f"""\
<!-- Generated by tools/reference.py; change the help texts in the code, not this file. -->
# 命令

这里是每个命令，以及它在 {COLUMNS} 列的终端上对 `--help`（`-h` 也一样）打印的内容；帮助文本是英文。\
`evomesh --version` 打印版本。`evomesh --debug COMMAND` 显示以退出码 2 结束的错误的 traceback；\
各退出码的含义见[运行写出的文件](run-files.md#exit-codes)。帮助中写明 repeatable 的选项可以给出多次：\
`--set adam.lr=1e-4 --set data.total_steps=100`。`python -m evomesh` 与 `evomesh` 相同。
""",
)
COLUMN_TITLES = (("command", "purpose"), ("命令", "用途"))


def commands() -> Iterator[Command]:
    """Yield every command of `evomesh`, and InternEvo's train.py."""
    yield from _commands_below(typer.main.get_command(app), ["evomesh"])
    shim = train_py_app()
    purpose = typer.main.get_command(shim).get_short_help_str(300)
    yield Command(TRAIN_PY, purpose, _help_of(shim, [TRAIN_PY]))


def _commands_below(command: Any, words: list[str]) -> Iterator[Command]:
    children = getattr(command, "commands", None)
    if children is None:
        purpose = command.get_short_help_str(300)
        yield Command(" ".join(words), purpose, _help_of(app, words))
        return
    for name, child in children.items():
        yield from _commands_below(child, [*words, name])


def _help_of(typed_app: typer.Typer, words: list[str]) -> str:
    program, *arguments = words
    result = CliRunner().invoke(
        typed_app,
        [*arguments, "--help"],
        prog_name=program,
        terminal_width=COLUMNS,
        env={"COLUMNS": str(COLUMNS)},
    )
    assert result.exit_code == 0, result.output
    lines = (line.rstrip() for line in result.stdout.splitlines())
    return "\n".join(lines).strip()


def pages() -> tuple[str, str]:
    """Return the page in English and in Chinese; the latter without its stamp."""
    known = {command.name: command for command in commands()}
    listed = [name for *_, purposes in GROUPS for name in purposes]
    if sorted(listed) != sorted(known):
        differing = sorted(set(listed) ^ set(known))
        raise SystemExit(
            f"GROUPS of tools/reference.py and the code differ: {differing}"
        )
    english, chinese = (_page(language, known) for language in (0, 1))
    return english, as_chinese_page(chinese)


def _page(language: int, known: dict[str, Command]) -> str:
    parts = [INTRODUCTIONS[language]]
    for *titles, purposes in GROUPS:
        parts.append(f"## {titles[language]}\n")
        parts.append(_table(language, [known[name] for name in purposes], purposes))
        for name in purposes:
            parts.append(f"### {name}\n\n```\n{known[name].help}\n```\n")
    return "\n".join(parts)


def _table(
    language: int, listed: list[Command], chinese_purposes: dict[str, str]
) -> str:
    rows = [COLUMN_TITLES[language], ("---", "---")]
    for command in listed:
        purposes = (command.purpose, chinese_purposes[command.name])
        anchor = command.name.replace(" ", "-").replace(".", "")
        rows.append((f"[`{command.name}`](#{anchor})", purposes[language]))
    return "".join(f"| {name} | {purpose} |\n" for name, purpose in rows)


def write(page: Page, english: str, chinese: str) -> None:
    """Write a page in both languages, the Chinese one with its stamp."""
    page.path.write_text(english, encoding="utf-8")
    stamp = f"\n<!-- English page: {page.digest} -->\n"
    page.translation.path.write_text(chinese + stamp, encoding="utf-8")


def main() -> None:
    write(PAGE, *pages())
    write(keys_page.PAGE, *keys_page.pages())


if __name__ == "__main__":
    main()
