"""``evomesh demo``: from text that every Python ships to a trained model, a small chat and a report of both.

`make train` is this command in the folder of the checkout.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from evomesh.cli.config import shipped_configs
from evomesh.cli.options import OverrideOption
from evomesh.errors import EXIT_USER_ERROR
from evomesh.outside_errors import not_written

if TYPE_CHECKING:
    from evomesh.demo.questions import Question

CONFIGS = ("demo", "demo_chat")
CHECKPOINTS = "llm_ckpts/demo"
CHAT_CHECKPOINTS = "llm_ckpts/demo_chat"
DATA_VARIABLE = "DEMO_DATA"  # the configs read it too
VOCAB_SIZE = 4096
STEPS_PER_CHAT_STEP = 5  # as in the configs
PROMPT = 'def read_file(path):\n    """'
PROMPT_TOKENS = 80
OTHER_RUN = "  or, for a run of another length or with other settings, another folder: evomesh demo FOLDER"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

FolderArgument = Annotated[
    Path, typer.Argument(help="Folder to work in; made if it is missing.")
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Train for so many steps, and the chat for a fifth, to see that all works "
        "[default: the configs', 1500 and 300].",
    ),
]


def demo(
    folder: FolderArgument = Path("evomesh_demo"),
    steps: StepsOption = None,
    overrides: OverrideOption = None,
) -> None:
    """Train a small model and a chat on text that every Python ships, and report what they learned.

    Writes configs, data, checkpoints and run folders into FOLDER. What is complete is not done again: after Ctrl-C the
    same command resumes. Exit code 1: the models did not learn as much as they should.
    """
    from evomesh.demo.questions import read_questions

    start = Path.cwd()
    _enter(folder)
    make_dataset(Path(os.environ.get(DATA_VARIABLE, "demo_data")))
    for name in CONFIGS:
        settings = [*_length(name, steps), *(overrides or [])]
        _train(name, settings)
    questions = read_questions()
    has_learned = _print_report(overrides or [], questions)
    if not has_learned and steps is None:
        sys.exit("the demo did not learn as much as it should: see the tables")
    _print_samples(next(one for one in questions if one.is_held_out))
    chat = f"evomesh chat --ckpt {CHAT_CHECKPOINTS}"
    if Path.cwd() != start:
        chat = f"cd {shlex.quote(str(folder))} && {chat}"
    print(f"\nto ask more: {chat}")


def _enter(folder: Path) -> None:
    """Make the folder of the demo with its configs and work in it; configs that are there stay as they are.

    Raises:
        UserError: it cannot be made.
    """
    known = {path.stem: path for path in shipped_configs()}
    try:
        configs = folder / "configs"
        configs.mkdir(parents=True, exist_ok=True)
        for name in CONFIGS:
            copied = configs / f"{name}.py"
            if not copied.exists():
                shutil.copyfile(known[name], copied)
        os.chdir(folder)
    except OSError as error:
        expected = "a folder, or the name of a new one"
        raise not_written(folder, error, expected=expected) from None


def make_dataset(folder: Path) -> None:
    """Write raw text, tokenizer and token files; a complete folder that was made from the same text stays as it is."""
    from evomesh.demo.texts import read_texts, write_documents, write_questions

    texts = read_texts()
    hash_file = folder / "source.sha256"
    is_complete = hash_file.exists() and hash_file.read_text() == texts.source_hash
    if is_complete:
        print(f"{folder}: already made from the same text", flush=True)
        return

    print(f"{folder}: {texts.size}", flush=True)
    raw_files = write_documents(folder / "raw", texts.documents)
    tokenizer = folder / "tokenizer"
    _train_tokenizer(raw_files, tokenizer)
    for file in raw_files:
        output = folder / file.parent.name / file.stem / "stdlib.bin"
        _tokenize(file, output, tokenizer, "text")
    for file in write_questions(folder / "raw" / "chat", texts.questions):
        output = folder / "chat" / file.stem / "docstrings" / "stdlib.bin"
        _tokenize(file, output, tokenizer, "messages")
    hash_file.write_text(texts.source_hash)


def _train_tokenizer(raw_files: Sequence[Path], tokenizer: Path) -> None:
    """Run ``evomesh tokenizer train`` on the texts for training."""
    from evomesh.cli.tokenizer import train
    from evomesh.data.prepare.tokenize import set_encoder_threads

    shutil.rmtree(tokenizer, ignore_errors=True)  # of other text
    inputs = [str(file) for file in raw_files if file.parent.name == "train"]
    set_encoder_threads(None)
    train(inputs, str(tokenizer), VOCAB_SIZE, chat="chatml")


def _tokenize(file: Path, output: Path, tokenizer: Path, format: str) -> None:
    """Run ``evomesh tokenize``, for conversations with the tokenizer's own chat template."""
    from evomesh.cli.tokenize import tokenize

    tokenize(
        [str(file)],
        str(output),
        str(tokenizer),
        format=format,
        chat_template="tokenizer",
    )


def _length(name: str, steps: int | None) -> list[str]:
    """Return the settings of a training that is shorter than its config's."""
    if steps is None:
        return []
    if name == "demo_chat":
        steps = -(-steps // STEPS_PER_CHAT_STEP)
    return [
        f"data.total_steps={steps}",
        f"data.valid_every={steps}",
        f"lr_scheduler.total_steps={steps}",
        f"ckpt.checkpoint_every={steps}",
    ]


def _train(name: str, settings: Sequence[str]) -> None:
    """Run ``evomesh train`` in a new process; if it does not complete, this process ends with its exit code."""
    words = ["evomesh", "train", f"configs/{name}.py"]
    for setting in settings:
        words += ["--set", setting]
    print(f"$ {shlex.join(words)}", flush=True)
    command = [sys.executable, "-m", *words]
    code = run_until_its_end(command)
    has_checkpoints = Path(CHECKPOINTS).exists()
    if code == EXIT_USER_ERROR and has_checkpoints:
        print(OTHER_RUN, file=sys.stderr, flush=True)
    if code:
        sys.exit(code)


def run_until_its_end(command: Sequence[str]) -> int:
    """Run a command that ends by itself after a signal; return its exit code, as a shell would."""
    from evomesh.train.signals import SUPERVISOR

    env = {**os.environ, SUPERVISOR: str(os.getpid())}  # it ends when this process dies
    child = subprocess.Popen(
        command,
        env=env,
        start_new_session=True,  # Ctrl-C reaches it once, through this process
    )
    with _forwarding_signals(child):
        code = child.wait()
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _forwarding_signals(child: subprocess.Popen[bytes]) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    earlier = {}
    for number in FORWARDED:
        handler = signal.getsignal(number)
        if handler not in (signal.SIG_IGN, None):  # nohup
            earlier[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _print_report(overrides: list[str], questions: Sequence[Question]) -> bool:
    """Print what the models learned; return whether it is enough."""
    from rich.console import Console

    from evomesh.checkpoint.restore import load_model
    from evomesh.config.loader import load_config
    from evomesh.demo.report import print_losses, print_shares

    loaded = load_config("configs/demo.py", overrides)
    console = Console()
    newest = _newest_run()
    model_learned = print_losses(console, loaded.config, newest)
    chat = load_model(CHAT_CHECKPOINTS, template="auto")
    chat_learned = print_shares(console, chat, questions)
    return model_learned and chat_learned


def _newest_run() -> Path:
    """Return the folder of the demo's run that changed last."""
    runs = Path("RUN/demo").iterdir()
    return max(runs, key=lambda path: path.stat().st_mtime)


def _print_samples(question: Question) -> None:
    """Print a text of the model, and the chat's answer to a question."""
    from evomesh.checkpoint.restore import load_model
    from evomesh.cli.generate import answer_message, complete_prompt
    from evomesh.cli.options import sampling_params

    model = load_model(CHECKPOINTS)
    sampling = sampling_params(PROMPT_TOKENS, temperature=0.5, seed=1)
    complete_prompt(model, PROMPT, sampling)
    print(f"\n> {question.text}", flush=True)
    chat = load_model(CHAT_CHECKPOINTS, template="auto")
    most_probable = sampling_params(PROMPT_TOKENS)
    answer_message(chat, question.text, most_probable)
