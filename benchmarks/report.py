"""Runs the benchmarks and writes docs/benchmarks.md, in both languages: what each printed, with command and machine.

Run: python benchmarks/report.py [NAME ...]    the names are those of COMMANDS; without any, all of them

A section whose benchmark is not run keeps its text; one that fails keeps it too, and the report ends with exit code 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
# After the path is set.
from tests.support.pages import DOCS, Page  # noqa: E402
from tools.translations import mark  # noqa: E402

PAGE = Page(DOCS / "benchmarks.md")
INTRODUCTION = (
    "# Benchmarks\n\nWritten by `make bench`: each section is what one command printed, on the machine that it names. "
    "What the figures\nmean, and what was tried, stands in [performance.md](performance.md).\n"
)
COMMANDS = {
    "CPU step, 10M": "train_step.py --shape 10M",
    "CPU step, 10M, compiled reference": "train_step.py --shape 10M --compiled",
    "CPU step, 10M, packed": "train_step.py --shape 10M --packed",
    "CPU step, 60M": "train_step.py",
    "CPU step, 60M, compiled reference": "train_step.py --compiled",
    "CPU step, 60M, packed": "train_step.py --packed",
    "CPU step, 200M": "train_step.py --shape 200M --rounds 4",
    "CPU step, 200M, compiled reference": "train_step.py --shape 200M --compiled --rounds 4",
    "CPU step, 200M, packed": "train_step.py --shape 200M --packed --rounds 4",
    "CPU step, 60M, where the time goes": "train_step.py --profile",
    "CPU step, 200M, where the time goes": "train_step.py --shape 200M --profile",
    "CPU step, growth": "growth.py",
    "GPU step": "gpu_step.py",
    "Data": "data.py",
    "Tokenizing": "tokenizing.py",
    "Checkpoints": "checkpoint.py",
    "Generation": "generate.py",
    "Serving": "serve.py",
}
CHINESE_INTRODUCTION = (
    "# 基准测试\n\n由 `make bench` 写出：每一节是一条命令的输出，运行在该节注明的机器上。"
    "这些数字的含义，以及做过哪些尝试，见 [performance.md](performance.zh.md)。\n"
)
CHINESE_NAMES = {
    "CPU step, 10M": "CPU 上的一步，10M",
    "CPU step, 10M, compiled reference": "CPU 上的一步，10M，参照经过编译",
    "CPU step, 10M, packed": "CPU 上的一步，10M，打包",
    "CPU step, 60M": "CPU 上的一步，60M",
    "CPU step, 60M, compiled reference": "CPU 上的一步，60M，参照经过编译",
    "CPU step, 60M, packed": "CPU 上的一步，60M，打包",
    "CPU step, 200M": "CPU 上的一步，200M",
    "CPU step, 200M, compiled reference": "CPU 上的一步，200M，参照经过编译",
    "CPU step, 200M, packed": "CPU 上的一步，200M，打包",
    "CPU step, 60M, where the time goes": "CPU 上的一步，60M，时间用在哪里",
    "CPU step, 200M, where the time goes": "CPU 上的一步，200M，时间用在哪里",
    "CPU step, growth": "CPU 上的一步，随规模的变化",
    "GPU step": "GPU 上的一步",
    "Data": "数据",
    "Tokenizing": "分词",
    "Checkpoints": "检查点",
    "Generation": "生成",
    "Serving": "服务",
}
# What ``section`` writes above a block.
HEADING = re.compile(
    r"^## (?P<name>.*)\n\n(?P<command>`[^`\n]*`) on (?P<machine>.*)$", re.MULTILINE
)


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "numpy")
    )
    return (
        f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {device}; Python {platform.python_version()}, "
        f"{versions}; {time.strftime('%Y-%m-%d')}"
    )


def processor() -> str:
    """Its name, which can be that of a whole family, and the vectors that torch uses on it."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.11
    name = str(
        capabilities.get("cpu_name") or platform.processor() or platform.machine()
    )
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def section(name: str, command: str) -> str | None:
    """The section's text, or None where the benchmark failed."""
    print(f"== {name}: {command}", flush=True)
    done = subprocess.run(
        [sys.executable, *command.split()],
        check=False,
        cwd=HERE,
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout, flush=True)
    if done.returncode:
        return None
    return f"## {name}\n\n`python benchmarks/{command}` on {machine()}\n\n```\n{done.stdout.strip()}\n```\n"


def kept(text: str) -> dict[str, str]:
    """The sections of an earlier report, by name."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]
    return {
        part.splitlines()[0].removeprefix("## "): part.strip() + "\n" for part in parts
    }


def chinese_section(text: str) -> str:
    """The same section, with the same block, for readers of Chinese."""

    def heading(found: re.Match[str]) -> str:
        name = CHINESE_NAMES[found["name"]]
        return (
            f"## {name}\n\n{found['command']}，在 {_chinese_machine(found['machine'])}"
        )

    return HEADING.sub(heading, text, count=1)


def _chinese_machine(machine: str) -> str:
    """The line that ``machine`` returns: processor, cores, memory and GPU; Python and packages; the day."""
    hardware, software, day = machine.rsplit("; ", 2)
    processor_name, cores, memory, device = hardware.rsplit(", ", 3)
    cores = cores.replace(" cores", " 核")
    device = device.replace("no GPU", "没有 GPU")
    software = software.replace(", ", "，")
    return f"{processor_name} 上运行，{cores}，{memory}，{device}；{software}；{day}"


def write_pages(sections: dict[str, str]) -> None:
    """Write the page in both languages, sections in the order of COMMANDS."""
    known = [sections[name] for name in COMMANDS if name in sections]
    PAGE.path.write_text("\n".join([INTRODUCTION, *known]), encoding="utf-8")
    chinese = [CHINESE_INTRODUCTION, *map(chinese_section, known)]
    PAGE.translation.path.write_text("\n".join(chinese), encoding="utf-8")
    mark(PAGE)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(COMMANDS))
    names = parser.parse_args().names or list(COMMANDS)
    unknown = [name for name in names if name not in COMMANDS]
    if unknown:
        parser.error(
            f"no such benchmark: {', '.join(unknown)}; known: {', '.join(COMMANDS)}"
        )
    failed = []
    for name in names:
        text = section(name, COMMANDS[name])
        if text is None:
            failed.append(name)
            continue
        earlier = kept(PAGE.text) if PAGE.path.exists() else {}
        write_pages(earlier | {name: text})
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
