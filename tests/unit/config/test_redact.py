"""Secrets of every form are hidden, and texts without secrets stay as they are."""

from __future__ import annotations

import io

import pytest

from evomesh.config.redact import REDACTED, RedactingStream, redact_setting, redact_text

CANARY = "Canary7x9Qz"
LONG = "Canary7x9QzAbCdEfGhIjKlMnOpQrStUvWx"
ENVIRONMENT = {
    "HF_TOKEN": f"{CANARY}01",
    "AWS_ACCESS_KEY_ID": f"{CANARY}02",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}/03+",
    "AWS_SESSION_TOKEN": f"{CANARY}04",
    "S3_SECRET_ACCESS_KEY_ID": f"{CANARY}05",
    "EVOMESH_API_KEY": f"{CANARY}06",
    "WANDB_API_KEY": f"{CANARY}07",
    "PGPASSWORD_": "short",
    "MYSQL_PWD": f"{CANARY}08",
    "SLACK_WEBHOOK_URL": f"{CANARY}09",
    "DEPLOY_PRIVATE_KEY": f"-----\n{CANARY}10 line\n{CANARY}11 line\n-----",
    "https_proxy": f"http://user:{CANARY}%4012@proxy:80",
    "DATABASE_URL": f"postgres://user:{CANARY}13@host/db",
    "AZURE_CLIENT_SECRET": f"{CANARY}14",
    "DOCKER_AUTH": f"{CANARY}15",
    "SENTRY_DSN": f"{CANARY}16",
    "GOOGLE_CREDENTIALS": f"{CANARY}17",
    "REGISTRY_PASS": f"{CANARY}18",
}
TEXTS = [
    f"http://user:{CANARY}@host:9000/bucket",
    f"http:/user:{CANARY}@host:9000/bucket",
    f"s3:http://user:{CANARY}@host:9000/bucket",
    f"s3://{CANARY}:{CANARY}@bucket/key",
    f"ftp://user:pa@{CANARY}@host/x",
    f"postgres://user:pa/{CANARY}@host/x",
    f"https://{CANARY}@github.com/a/b",
    f"https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature={CANARY}",
    f"https://b.s3.amazonaws.com/k?X-Amz-Credential={CANARY}%2Fus-east-1&X-Amz-Expires=1",
    f"https://b.s3.amazonaws.com/k?X-Amz-Security-Token={CANARY}",
    f"https://b.s3.amazonaws.com/k?AWSAccessKeyId={CANARY}&Signature={CANARY}&Expires=1",
    f"https://x.blob.core.windows.net/c/b?sv=2024&sig={CANARY}",
    f"https://host/api?api_key={CANARY}",
    f"https://oapi.dingtalk.com/robot/send?access_token={CANARY}",
    f"https://qyapi.weixin.qq.com/cgi-bin/webhook/send?key={CANARY}",
    f"https://open.feishu.cn/open-apis/bot/v2/hook/{CANARY}",
    f"https://discord.com/api/webhooks/1/{CANARY}",
    f"https://hooks.slack.com/services/T0/B0/{CANARY}",
    f"x.webhook.office.com https://x.webhook.office.com/webhookb2/{CANARY}@b/IncomingWebhook/c",
    f'feishu_alert_address = "{CANARY}"',
    f"light_monitor_address='{CANARY}'",
    f'monitor = dict(alert=dict(api_key="{CANARY} x"))',
    f'{{"password": "{CANARY}"}}',
    f"config['aws_secret_access_key'] = '{CANARY}'",
    f"--set storage.password={CANARY}",
    f"unknown option --api-key={CANARY}",
    f"client_secret = {CANARY}",
    f"Authorization: Bearer {CANARY}",
    f"{{'authorization': 'Basic {CANARY}=='}}",
    f"bearer {LONG}",
    f"hf_{LONG}",
    f"ghp_{LONG}",
    f"sk-{LONG}",
    "AKIACANARY7X9QZAB1CD",
    f"AIza{LONG}",
    f"eyJhbGciOi{CANARY}.eyJhbGciOi{CANARY}.{CANARY}",
    f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}\n-----END RSA PRIVATE KEY-----",
]


@pytest.mark.parametrize("text", TEXTS)
def test_secrets_are_known_by_their_form(text: str) -> None:
    hidden = redact_text(f"before {text} after", {})
    assert "canary" not in hidden.lower()
    assert REDACTED in hidden
    assert hidden.startswith("before ") and hidden.endswith(" after")


@pytest.mark.parametrize(
    "name", [name for name in ENVIRONMENT if name != "PGPASSWORD_"]
)
@pytest.mark.parametrize("form", ["{}", "{!r}", "x{}y", "/{}/"])
def test_values_of_secret_variables_are_hidden(name: str, form: str) -> None:
    hidden = redact_text(form.format(ENVIRONMENT[name]), ENVIRONMENT)
    assert CANARY not in hidden


@pytest.mark.parametrize(
    "text",
    [
        "num_consumed_tokens=131072 step=5 loss=3.25",
        "http://host:80/y https://host/a?page=2",
        "/opt/services/hook/data.bin",
        "token id 5, token_type: bert; tokenizer='tok'",
        "the key is under the mat: key=5",
        "hf_tokenizer sk-learn AKIA eyJ",
        "wrote secrets.txt with password policies",
        "a@b.c",
        "PWD /home/someone/work",
    ],
)
def test_other_texts_stay(text: str) -> None:
    environment = {
        "PWD": "/home/someone/work",
        "HF_TOKEN_PATH": "/opt/services",
        "MAX_TOKEN": "131072",
    }
    assert redact_text(text, environment) == text


@pytest.mark.parametrize(
    ("key", "is_secret"),
    [
        ("monitor.alert.feishu_alert_address", True),
        ("model.hub_token", True),
        ("model.api_key", True),
        ("storage.secret_access_key", True),
        ("data.tokenizer_path", False),
        ("loss.reduction", False),
        ("ckpt.save_ckpt_folder", False),
    ],
)
def test_settings_are_secret_by_their_key(key: str, is_secret: bool) -> None:
    assert redact_setting(key, "something", []) == (
        REDACTED if is_secret else "something"
    )
    assert redact_setting(key, "", []) == ""


def test_a_stream_hides_what_is_written_and_is_otherwise_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{CANARY}01")
    below = io.StringIO()
    stream = RedactingStream(below)
    print(f"a {CANARY}01", "b", file=stream)
    stream.writelines([f"{CANARY}01\n"])
    stream.flush()
    assert below.getvalue() == f"a {REDACTED} b\n{REDACTED}\n"
    assert stream.isatty() is False
