"""Write docs/cluster-run.md, in both languages: a run on a real Slurm cluster that loses a node, hangs, and still ends
bit-equal.

    python tools/cluster_transcript.py          # root, with Debian's slurm-wlm and munge; a few minutes

All that stands in the blocks was printed by this very run: the batch job's log, Slurm's own words, and the alerts that
a web server on this machine received. The cluster is the one of tests/e2e/test_slurm.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# After the path is set.
from tests.support import slurm  # noqa: E402
from tests.support.pages import DOCS, Page  # noqa: E402
from tests.support.runs import write_run  # noqa: E402
from tests.support.slurm import Cluster, wait_until  # noqa: E402
from tests.support.webhook import WebhookServer  # noqa: E402
from tools.translations import mark  # noqa: E402

PAGE = Page(DOCS / "cluster-run.md")
STEPS = 300
PATIENCE_S = 600  # a wait takes seconds; more only on a busy machine
CONFIG = f"""
model |= dict(num_layers=4, hidden_size=128)
data |= dict(seq_len=256, micro_num=1, total_steps={STEPS})
lr_scheduler |= dict(total_steps={STEPS})
adam |= dict(lr=1e-3)
ckpt |= dict(checkpoint_every=50)
"""
ALERTS = 'monitor = dict(alert=dict(channels=[dict(type="webhook", url="env:HOOK")]))\n'
SUBMIT = (
    "evomesh slurm config.py --nodes 2 --gpus-per-node 1 -p llm --time 1:00:00 --submit"
)
SINFO = "sinfo --partition llm"
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d (\d\d:\d\d:\d\d),\d+\t\w+ \S+ in \S+ -- (.*)")
FIGURES = re.compile(r".*(step=\d+,loss=[\d.]+).*")
SHOWN = re.compile(
    r"^job \d+ on|resuming step|checkpoint of step|is lost|is stopped by|^  at |is queued again"
)


class Prose(NamedTuple):
    """The same words in both languages."""

    english: str
    chinese: str

    def naming(self, rank: int) -> Prose:
        """Return the words with a rank's process id at their {rank}."""
        return Prose(*(words.format(rank=rank) for words in self))


INTRODUCTION = Prose(
    """\
# A run that loses a node and hangs

Two virtual nodes of a real Slurm (Debian's 22.05, two daemons on one machine), two ranks on CPUs with gloo. Written by
`python tools/cluster_transcript.py`: every line is of one run, shortened to time and message; most steps are left out.
What each part does is in [Starting a job](launching.md) and [Monitoring](monitoring.md).""",
    """\
# 一次丢失节点并卡住的运行

真实的 Slurm（Debian 的 22.05，两个守护进程在一台机器上）中的两个虚拟节点，CPU 上用 gloo 的两个进程。\
本页由 `python tools/cluster_transcript.py` 写出：每一行都来自同一次运行，只保留时间和信息；大部分步略去。\
各部分的作用见[启动任务](launching.zh.md)和[监控](monitoring.zh.md)。""",
)
SUBMITTED = Prose("Submitted", "提交")
NODE_LOST = Prose(
    "The node of the batch script loses its power", "批处理脚本所在的节点断电"
)
RANK_HANGS = Prose(
    "Queued again by Slurm; then rank 1 hangs (kill -STOP {rank})",
    "由 Slurm 重新排队；然后 rank 1 卡住（kill -STOP {rank}）",
)
FINISHED = Prose("Queued again by its script; finished", "由脚本重新排队；完成")
LEFT_ALONE = Prose("The same config, left alone", "同样的配置，不受干扰")
TITLES = (SUBMITTED, NODE_LOST, RANK_HANGS, FINISHED, LEFT_ALONE)


class Transcript:
    """Markdown of what was typed and what was printed."""

    def __init__(self) -> None:
        self._parts = [INTRODUCTION]

    def add(self, title: Prose, *blocks: tuple[str, str]) -> None:
        """Add a section: each block is a command and what it printed."""
        lines = []
        for command, printed in blocks:
            lines += [f"$ {command}", *printed.strip("\n").splitlines()]
        fenced = "\n".join(["```", *lines, "```"])
        section = Prose(*(f"## {words}\n\n{fenced}" for words in title))
        self._parts.append(section)

    @property
    def text(self) -> Prose:
        """The page in both languages."""
        english, chinese = zip(*self._parts, strict=True)
        return Prose("\n\n".join(english) + "\n", "\n\n".join(chinese) + "\n")

    def write(self) -> None:
        """Write the page and its translation."""
        PAGE.path.write_text(self.text.english, encoding="utf-8")
        PAGE.translation.path.write_text(self.text.chinese, encoding="utf-8")
        mark(PAGE)


class WatchedJob:
    """The submitted job: its state, its log, and the part of the log that no section has shown yet."""

    def __init__(self, cluster: Cluster, number: str, folder: Path) -> None:
        self.number = number
        self._cluster = cluster
        self.log = folder / f"tiny-{number}.out"
        self._shown = 0

    @property
    def text(self) -> str:
        """What all lives of the job have printed so far."""
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, words: str) -> None:
        """Wait until the log has the words in a line that no section has shown yet."""
        wait_until(
            lambda: words in self.text[self._shown :],
            f"{words!r} never came",
            PATIENCE_S,
        )

    def wait_for_state(self, state: str) -> None:
        """Wait for a state with its number of restarts."""
        wait_until(lambda: self._cluster.state(self.number) == state, state, PATIENCE_S)

    def new_lines(self) -> str:
        """Return what is worth reading in the lines since the last call."""
        new = self.text[self._shown :]
        self._shown += len(new)
        return "\n".join(shortened(new.splitlines()))


def shortened(lines: Sequence[str]) -> list[str]:
    """Keep the lines of events, without date and place in the code, and the last step before each and at the end."""
    kept: list[str] = []
    step = ""
    for line in lines:
        found = LOG_LINE.fullmatch(line)
        text = f"{found[1]} {found[2]}" if found else line
        figures = FIGURES.fullmatch(text)
        if figures and found:
            step = f"{found[1]} {figures[1]}"
        elif SHOWN.search(text):
            kept += [step, text] if step else [text]
            step = ""
    return [*kept, step] if step else kept


def alerts_of(server: WebhookServer, since: int) -> str:
    """Return the alerts that the server received, from a number on."""
    rows = [json.dumps(alert, ensure_ascii=False) for alert in server.documents[since:]]
    return "\n".join(rows)


def losses(folder: Path) -> dict[int, str]:
    """Return step -> loss and norm with all their digits."""
    (path,) = folder.glob("RUN/*/*/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["step"]: f"{row['loss']!r} {row['grad_norm']!r}" for row in rows}


def main() -> None:
    """Make the run and write the page, in both languages."""
    if slurm.missing():
        sys.exit(slurm.missing())
    folder = Path(tempfile.mkdtemp(prefix="transcript"))
    try:
        with WebhookServer() as server, slurm.cluster() as cluster:
            os.environ["HOOK"] = server.url
            story = Transcript()
            tell(story, cluster, server, folder)
            story.write()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tell(
    story: Transcript, cluster: Cluster, server: WebhookServer, folder: Path
) -> None:
    """Submit, kill a node, stop a rank, and compare with a run that was left alone."""
    write_run(folder / "job", CONFIG + ALERTS)
    write_run(folder / "alone", CONFIG)
    printed = cluster.call(*SUBMIT.split(), cwd=folder / "job")
    story.add(SUBMITTED, (SUBMIT, printed))
    found = re.search(r"job (\d+)", printed)
    assert found, printed
    job = WatchedJob(cluster, found[1], folder / "job")
    follow = f"tail -F {job.log.name}"
    hook = "# received by the webhook"

    job.wait_for("checkpoint of step 100 committed")
    cluster.kill_node(job.number, "n1")
    job.wait_for_state("PENDING 1")
    down = cluster.call(*SINFO.split())
    reason = [
        line
        for line in (cluster.folder / "slurmctld.log").read_text().splitlines()
        if "due to failure" in line
    ]
    grep = ('grep "due to failure" slurmctld.log', "\n".join(reason))
    story.add(
        NODE_LOST,
        (follow, job.new_lines()), (SINFO, down), grep, (hook, alerts_of(server, 0)),
    )  # fmt: skip

    seen = len(server.documents)
    cluster.start_node("n1")
    job.wait_for("checkpoint of step 200 committed")
    (rank,) = cluster.tasks(job.number, "n2")
    os.kill(rank, signal.SIGSTOP)
    job.wait_for("is queued again")
    story.add(
        RANK_HANGS.naming(rank),
        (follow, job.new_lines()),
        (hook, alerts_of(server, seen)),
    )

    seen = len(server.documents)
    job.wait_for_state("COMPLETED 2")
    story.add(
        FINISHED,
        (follow, job.new_lines()),
        (hook, alerts_of(server, seen)),
    )
    story.add(LEFT_ALONE, compare(cluster, folder))


def compare(cluster: Cluster, folder: Path) -> tuple[str, str]:
    """Run the config without Slurm and without faults; return the command and how many losses are equal."""
    command = "NPROC_PER_NODE=2 evomesh train config.py"
    subprocess.run(
        ["env", *command.split()],
        cwd=folder / "alone",
        env=cluster.env,
        capture_output=True,
        check=True,
    )
    alone, job = losses(folder / "alone"), losses(folder / "job")
    equal = sum(job[step] == alone[step] for step in alone)
    assert len(job) == len(alone) == equal == STEPS, f"{equal} of {len(alone)}"
    last = f"the last loss: {job[STEPS - 1].split()[0]}, and alone: {alone[STEPS - 1].split()[0]}"
    verdict = f"# {equal} of {len(alone)} steps have the same loss and the same gradient norm, to the last bit"
    return command, f"{verdict}\n# {last}"


if __name__ == "__main__":
    main()
