"""No secret of the environment, a config, an argument or a URL reaches the terminal or a file that a command writes."""

from __future__ import annotations

from pathlib import Path

from tests.support.interpreter import Finished, Interpreter
from tests.support.runs import write_run
from tests.support.serving import byte_tokenizer

CANARY = "Canary7x9Qz"
SECRET_VARIABLES = (
    "HF_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "S3_ACCESS_KEY_ID",
    "S3_SECRET_ACCESS_KEY_ID",
    "EVOMESH_API_KEY",
    "OPENAI_API_KEY",
    "WANDB_API_KEY",
    "GITHUB_TOKEN",
    "SLACK_WEBHOOK_URL",
    "MYSQL_PWD",
    "DEPLOY_PRIVATE_KEY",
    "AZURE_CLIENT_SECRET",
)
ENVIRONMENT = {
    name: f"{CANARY}{number:02}" for number, name in enumerate(SECRET_VARIABLES)
}
ENVIRONMENT["https_proxy"] = f"http://user:{CANARY}50@127.0.0.1:1"

CONFIG = f"""
data["tokenizer_path"] = "tokenizer"
data["total_steps"] = 2
lr_scheduler["total_steps"] = 2
ckpt["checkpoint_every"] = 1
monitor = dict(
    alert=dict(
        enable_feishu_alert=False,
        feishu_alert_address="https://open.feishu.cn/open-apis/bot/v2/hook/{CANARY}60",
    ),
)
_my_password = "{CANARY}62"
# https://bucket.s3.amazonaws.com/data?X-Amz-Signature={CANARY}63
STORE = "https://user:{CANARY}64@store/path"
"""

# Each ends with a message that repeats what it was given.
REFUSED = [
    ["ckpt", "ls", f"https://user:{CANARY}70@127.0.0.1:1/bucket/key"],
    ["data", "verify", f"https://user:{CANARY}71@host/data"],
    ["convert", "to-hf", f"https://host/x?Signature={CANARY}72", "out"],
    [
        "train",
        "config.py",
        "--set",
        f"monitor.alert=https://open.feishu.cn/open-apis/bot/v2/hook/{CANARY}73",
    ],
    ["train", "config.py", "--set", f"storage.secret_access_key={CANARY}74"],
    ["train", "from_environment.py"],
    [f"--api-key={CANARY}75"],
]


def run(interpreter: Interpreter, folder: Path, *arguments: str) -> Finished:
    return interpreter.run(["evomesh", *arguments], cwd=folder, env=ENVIRONMENT)


def test_canaries_stay_where_they_are(tmp_path: Path, interpreter: Interpreter) -> None:
    byte_tokenizer(tmp_path / "tokenizer")
    config = write_run(tmp_path, CONFIG)
    from_environment = tmp_path / "from_environment.py"
    folder = "import os\ndata['train_folder'] = os.environ['HF_TOKEN'] + os.environ['MYSQL_PWD']\n"
    from_environment.write_text(config.read_text() + folder)
    sources = {config, from_environment}

    # 1. A whole run, and what is made from it.
    for arguments in (
        ["train", "config.py"],
        ["config", "show", "config.py"],
        ["ckpt", "ls", "ckpts"],
        ["convert", "to-hf", "ckpts", "exported"],
        ["generate", "--ckpt", "ckpts", "--prompt", "abc", "--max-new-tokens", "3"],
    ):
        done = run(interpreter, tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        assert CANARY not in done.stdout + done.stderr, arguments

    # 2. Commands that are refused.
    for arguments in REFUSED:
        done = run(interpreter, tmp_path, *arguments)
        assert done.returncode != 0, arguments
        assert CANARY not in done.stdout + done.stderr, arguments
        assert "Traceback" not in done.stderr, done.stderr

    # 3. Every file that was written.
    written = [
        path for path in tmp_path.rglob("*") if path.is_file() and path not in sources
    ]
    names = {path.name for path in written}
    assert {"commit.json", "metrics.jsonl", "config.json"} <= names
    assert any("tfevents" in name for name in names)
    found = [path for path in written if CANARY.encode() in path.read_bytes()]
    assert not found
