"""``evomesh top``: its screen at several sizes, and the command itself."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evomesh.cli.top_view import duration, render
from evomesh.monitor.overview import RunOverview
from evomesh.monitor.status import RankStatus, encode

NOW = 1_700_000_000.0
ROOT = Path(__file__).parents[3]
METRICS = {
    "loss": 2.34567,
    "grad_norm": 0.81,
    "lr": 3e-4,
    "tgs (tokens/gpu/second)": 1500.0,
    "inf_nan_skip_batches": 2,
}


def rank(number: int, **values: object) -> RankStatus:
    figures = {
        "host": f"node{number // 8}", "time": NOW, "since": NOW - 0.2, "phase": "train", "step": 50, "total": 200,
        "started": NOW - 100, "first_step": 30, "tgs": 1500.0, "fwd_bwd": 0.4, "data_wait": 0.01,
        "memory": 12_300_000_000, "memory_limit": 80_000_000_000, "saved": 40,
    }  # fmt: skip
    return RankStatus(number, **{**figures, **values})  # type: ignore[arg-type]


def screen(
    *ranks: RankStatus,
    width: int = 80,
    height: int | None = None,
    in_color: bool = False,
    alerts: tuple[dict[str, str], ...] = (),
) -> list[str]:
    view = RunOverview(Path("RUN/tiny"), NOW, list(ranks), METRICS, list(alerts))
    return render(view, width, height, in_color)


def test_the_screen_of_a_run() -> None:
    alert = {
        "kind": "loss spike",
        "text": "the loss of step 7 is 9",
        "time": "2023-11-14T22:12:20+00:00",
    }
    lines = screen(
        rank(0), rank(1, saving=True, phase="save", since=NOW - 75), alerts=(alert,)
    )
    assert lines == [
        "running   2 ranks on 1 host   RUN/tiny",
        "step    50 of 200  [#####...............] 25.0%   12m 30s left",  # 5 s each
        "figures loss 2.3457   grad norm 0.81   lr 3.00e-04   3,000 tokens/s   2 steps skipped"[:79] + "…",
        "saves   last: step 40   being written by 1 rank",
        "alerts  1m 00s ago, loss spike: the loss of step 7 is 9",
        "",
        " rank host             step phase              tok/s  fwd+bwd   data  memory",
        "    0 node0              50 train              1,500   0.400s  0.01s 12.3/80.0G",
        "    1 node0              50 save 1m 15s        1,500   0.400s  0.01s 12.3/80.0G",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    long = {"kind": "crash", "text": "very long " * 50, "time": "not a time"}
    lines = screen(
        rank(0, host="a-host-with-a-name-of-more-than-32-letters", step=10**9, tgs=1e6),
        rank(1, phase="failed"),
        width=width,
        alerts=(long,) * 5,
    )
    assert max(map(len, lines)) <= width
    assert any("2 earlier" in line for line in lines)


def test_with_little_room_the_ranks_in_trouble_are_shown() -> None:
    ranks = [rank(number) for number in range(1000)]
    ranks[700] = rank(700, time=NOW - 45)
    ranks[123] = rank(123, fwd_bwd=0.9)
    lines = screen(*ranks, height=12)
    assert len(lines) <= 12
    table = [line.split()[0] for line in lines[7:-1]]
    assert table[-2:] == ["123", "700"] or {"123", "700"} <= set(table)
    assert any("silent 45s" in line for line in lines)
    assert re.search(r"and 99\d more ranks", lines[-1])
    assert len(screen(*ranks)) == 1007  # a pipe gets all


def test_colors_are_codes_around_lines_of_the_same_text() -> None:
    ranks = (rank(0), rank(1, time=NOW - 45), rank(2, phase="failed"))
    plain, colored = screen(*ranks), screen(*ranks, in_color=True)
    assert [re.sub(r"\x1b\[\d+m", "", line) for line in colored] == plain
    assert colored[0].startswith("\x1b[31m")  # failed
    assert "\x1b" not in "".join(plain)


def test_names_of_others_cannot_control_the_terminal() -> None:
    lines = screen(
        rank(0, host="a\x1b[2Jb"), alerts=({"kind": "x\x07", "text": "\x1b]0;t"},)
    )
    assert not re.search(r"[\x00-\x1f]", "".join(lines))


def test_a_run_without_records() -> None:
    lines = screen()
    assert lines[0] == "unknown   0 ranks on 0 hosts   RUN/tiny"
    assert lines[1] == "no rank has written its status yet"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0s"),
        (59.6, "1m 00s"),
        (3599, "59m 59s"),
        (3700, "1h 01m"),
        (90_000, "1d 01h"),
        (-5, "0s"),
        (float("inf"), "?"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def write_folder(folder: Path) -> None:
    (folder / "status").mkdir()
    alive = rank(0, time=time.time(), since=time.time())
    (folder / "status/a.jsonl").write_bytes(encode(alive))


@pytest.mark.slow
def test_a_pipe_gets_one_plain_print_without_torch(tmp_path: Path) -> None:
    write_folder(tmp_path)
    code = (
        "import sys\n"
        "from evomesh.cli.main import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "top", str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.stdout.startswith("running   1 rank on 1 host")
    assert done.stderr == "False\n"
    assert "\x1b" not in done.stdout
    empty = subprocess.run(
        [sys.executable, "-m", "evomesh", "top", str(tmp_path / "gone")],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert empty.returncode == 2
    assert "does not exist" in empty.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("key", "no_color"), [(b"q", ""), (b"\x03", "1")])
def test_on_a_terminal_it_draws_until_q_or_ctrl_c(
    key: bytes, no_color: str, tmp_path: Path
) -> None:
    write_folder(tmp_path)
    leader, follower = pty.openpty()
    environment = os.environ | {"NO_COLOR": no_color, "TERM": "xterm"}
    # The terminal of a new session, so that Ctrl-C is a signal.
    code = (
        "import fcntl, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        # A shell that starts the tests in the background lets them ignore SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from evomesh.cli.main import main; main()"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code, "top", str(tmp_path)],
        stdin=follower, stdout=follower, stderr=follower, cwd=ROOT, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    drawn = b""
    while b"q: end" not in drawn:
        drawn += os.read(leader, 65536)
    os.write(leader, key)
    while True:
        try:
            drawn += os.read(leader, 65536)
        except OSError:  # its last process has closed the terminal
            break
    assert running.wait(30) == 0
    os.close(leader)
    screens, _, left = drawn.decode().rpartition("\x1b[?25h\x1b[?1049l")
    assert screens.startswith("\x1b[?1049h\x1b[?25l")
    assert "running   1 rank on 1 host" in left  # the last picture stays
    assert ("\x1b[32m" in screens) == (not no_color)
    assert "Traceback" not in left
