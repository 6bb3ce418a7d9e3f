"""Codes of errors: what is printed with them, in which language, and how they are looked up."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from evomesh.checkpoint.native.agreement import ErrorMessage
from evomesh.cli.app import app
from evomesh.cli.main import train_py_app
from evomesh.cli.usage import ExplainedParser
from evomesh.error_codes.catalog import find_page, look_up
from evomesh.error_codes.words import chosen_language, explained, printed
from evomesh.errors import ConfigError, UserError

ERROR = UserError("no room", where="/data", fix="free some", code="EVO-SYS-002")


class TestLanguage:
    @pytest.mark.parametrize(
        "env,language",
        [
            ({}, "en"),
            ({"LANG": "zh_CN.UTF-8"}, "zh"),
            ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
            ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "de_DE.UTF-8"}, "en"),
            ({"LANG": "en_US.UTF-8", "EVOMESH_LANG": "zh"}, "zh"),
            ({"LANG": "zh_CN.UTF-8", "EVOMESH_LANG": "en"}, "en"),
            ({"LANG": "zh_CN.UTF-8", "EVOMESH_LANG": ""}, "zh"),
        ],
    )
    def test_of_the_environment(self, env: dict[str, str], language: str) -> None:
        assert chosen_language(env) == language

    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "no-such", None])
    def test_english_where_chinese_cannot_be_written(
        self, encoding: str | None
    ) -> None:
        assert chosen_language({"LANG": "zh_CN"}, encoding) == "en"
        assert chosen_language({"LANG": "zh_CN"}, "gb18030") == "zh"


class TestPrinted:
    def test_english_is_the_message_and_its_code(self) -> None:
        assert str(ERROR) == "/data: no room\n  fix: free some"
        assert printed(ERROR, "en") == (
            "error: /data: no room\n  fix: free some\n  explain: evomesh explain EVO-SYS-002"
        )

    def test_chinese_comes_before_the_message(self) -> None:
        page = find_page("EVO-SYS-002")
        assert page
        text = page.texts["zh"]
        head = f"\u9519\u8bef\uff1a{text.title}\n  \u5904\u7406\uff1a{text.fix}\n"
        assert printed(ERROR, "zh") == head + printed(ERROR, "en")

    def test_an_error_of_custom_code_has_none(self) -> None:
        for language in ("en", "zh"):
            assert printed(UserError("found"), language) == "error: found"

    def test_a_config_has_the_codes_of_its_problems_each_once(self) -> None:
        codes = ["EVO-CONFIG-002", "EVO-CONFIG-001", "EVO-CONFIG-002"]
        error = ConfigError([UserError("found", code=code) for code in codes])
        assert error.codes == ("EVO-CONFIG-002", "EVO-CONFIG-001")
        assert printed(error, "en").endswith(
            "\n  explain: evomesh explain EVO-CONFIG-002 EVO-CONFIG-001"
        )
        assert printed(error, "zh").count("\u5904\u7406\uff1a") == 2

    def test_a_code_goes_to_other_ranks(self) -> None:
        message = ErrorMessage(**asdict(ErrorMessage.of(ERROR)))
        assert message.to_error().code == ERROR.code


class TestExplain:
    @pytest.mark.parametrize(
        "text", ["EVO-DATA-001", "[EVO-DATA-001]", "data-1", "DATA-001", " evo-data-1 "]
    )
    def test_a_code_as_it_is_typed(self, text: str) -> None:
        assert look_up(text).code == "EVO-DATA-001"

    @pytest.mark.parametrize("text", ["EVO-DATA-999", "EVO-DAAT-001", "nonsense", ""])
    def test_an_unknown_code_is_one_message(self, text: str) -> None:
        with pytest.raises(UserError, match="no code") as caught:
            look_up(text)
        assert caught.value.codes == ("EVO-CLI-010",)
        assert "evomesh explain" in caught.value.fix
        assert ("did you mean EVO-DATA-0" in caught.value.fix) == ("EVO" in text)

    @pytest.mark.parametrize("language", ["en", "zh"])
    def test_the_command(self, language: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EVOMESH_LANG", language)
        result = CliRunner().invoke(app, ["explain", "data-1", "sys-2"])
        pages = [find_page("EVO-DATA-001"), find_page("EVO-SYS-002")]
        expected = [explained(page, language) for page in pages if page]
        assert result.output == "\n\n\n".join(expected) + "\n"
        for page in pages:
            assert page
            assert page.texts[language].title in result.output
            assert page.example.splitlines()[0] in result.output

    def test_without_a_code_it_lists_all(self) -> None:
        lines = CliRunner().invoke(app, ["explain"]).output.splitlines()
        assert len(lines) > 100
        assert lines[0].startswith("EVO-ALERT-001  ")

    def test_usage_has_a_code_and_keeps_its_exit_code(self) -> None:
        result = CliRunner().invoke(app, ["plan", "--no-such"])
        assert result.exit_code == 2
        assert result.stderr.endswith(
            "No such option: --no-such\n  explain: evomesh explain EVO-CLI-001\n"
        )
        group = CliRunner().invoke(app, ["config"])
        assert "explain: " not in group.output

    @pytest.mark.parametrize("language", ["en", "zh"])
    def test_commands_of_other_systems_have_the_code_too(
        self,
        language: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("EVOMESH_LANG", language)
        result = CliRunner().invoke(train_py_app(), ["--no-such"])
        parser = ExplainedParser(prog="tokenizer.py")
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(["--no-such"])
        assert (result.exit_code, ended.value.code) == (2, 2)
        of_argparse = capsys.readouterr().err
        for shown in (result.stderr, of_argparse):
            assert shown.endswith("\n  explain: evomesh explain EVO-CLI-001\n")
            assert ("错误" in shown) == (language == "zh")
        usage, error, *_ = of_argparse.splitlines()
        assert usage.startswith("usage: tokenizer.py")
        assert error == "tokenizer.py: error: unrecognized arguments: --no-such"
