from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from langmill import cli
from langmill.common import settings
from langmill.common.configure import keys
from langmill.common.errors import DataError, Interrupted, MissingExtra
from langmill.common.metrics import Report

HEAVY = ("torch", "pydantic", "numpy", "rich", "yaml", "tokenizers", "jinja2", "safetensors")
Job = Callable[..., Report]


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[[Job], None]:
    """Put a function in the place of `langmill doctor`'s and of `langmill pretrain`'s."""

    def put(function: Job) -> None:
        monkeypatch.setitem(sys.modules, "langmill.jobs.doctor", type(sys)("doctor"))
        monkeypatch.setitem(sys.modules, "langmill.jobs.pretrain", type(sys)("pretrain"))
        monkeypatch.setattr(sys.modules["langmill.jobs.doctor"], "run", function, raising=False)
        monkeypatch.setattr(sys.modules["langmill.jobs.pretrain"], "run", function, raising=False)

    return put


def failing(error: BaseException) -> Job:
    def run(*arguments: Any, quiet: bool) -> Report:
        raise error

    return run


@pytest.mark.parametrize("code", ["import langmill", "from langmill import cli; cli.run(['--help'])"])
def test_help_and_import_load_nothing_heavy(code: str) -> None:
    result = python(f"{code}\nimport sys; print(sorted(set({HEAVY!r}) & set(sys.modules)))")
    assert result.stdout.endswith("[]\n") and result.stderr == ""


@pytest.mark.parametrize("row", cli.COMMANDS, ids=lambda row: row.name)
def test_help_teaches_every_setting_and_loads_no_torch(row: cli.Command) -> None:
    words = [*row.name.split(), "--help"]
    result = python(f"from langmill import cli; import sys; print(cli.run({words}), 'torch' in sys.modules)")
    text = " ".join(result.stdout.split())
    assert text.endswith("0 False") and row.help in text
    for key in keys(getattr(settings, row.settings)) if row.settings else []:
        assert " ".join(key.description.split()) in text.replace("- ", "-"), key.name


def test_the_program_alone_prints_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert {cli.run(words) for words in ([], ["--help"], *([group] for group in cli.GROUPS))} == {0}
    text = capsys.readouterr().out
    assert all(row.help in text for row in cli.COMMANDS)
    assert cli.run(["--version"]) == 0 and capsys.readouterr().out.startswith("langmill 0.")


def test_json_is_one_object_on_the_last_line(
    capsys: pytest.CaptureFixture[str], job: Any, tmp_path: Path
) -> None:
    report = Report(tmp_path, {"documents": 3}, {"loss": 1.5}, "for a person", {"results": ["é"]})
    job(lambda *arguments, quiet: report)
    assert cli.run(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert out.count("\n") == 1 and "é" in out and found.pop("seconds") >= 0
    assert found == {
        "command": "doctor", "ok": True, "out": str(tmp_path), "counts": {"documents": 3},
        "figures": {"loss": 1.5}, "results": ["é"],
    }  # fmt: skip
    assert cli.run(["doctor"]) == 0 and capsys.readouterr().out == "for a person\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("a.txt is empty:\n  add text"), 1, "langmill: a.txt is empty: add text\n"),
        (MissingExtra("data", "zstandard"), 2, 'pip install "langmill[data]"'),
        (Interrupted("stopped at step 7, saved", 143), 143, "stopped at step 7"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "not enough memory"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.txt"), 1, "x.txt: no such file"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "free some space"),
        (ZeroDivisionError("oops"), 1, "internal error (ZeroDivisionError: oops); run again with --debug"),
    ],
)
def test_an_error_is_a_sentence_and_a_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str], job: Any
) -> None:
    job(failing(error))
    assert cli.run(["doctor", "--json"]) == code
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1
    found = json.loads(shown.out)
    assert found["command"] == "doctor" and found["ok"] is False
    assert said.removeprefix("langmill: ").strip() in found["error"]["message"]
    assert cli.run(["doctor", "--debug"]) == code and "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pretrian", "Did you mean 'pretrain'?"),
        ("doctor extra", "takes no 'extra'"),
        ("pretrain x --out y --max-stepz 3", "did you mean 'train.max_steps'?"),
        ("pretrain x --out y --dubug", "did you mean 'debug'?"),
        ("pretrain x", "out is missing"),
        ("pretrain --out y", "path is missing"),
        ("pretrain x --out y --config none.yaml", "none.yaml does not exist"),
        ("pretrain x --out y --seed many", "should be a valid integer"),
        ("quickstart stray", "no place for 'stray'"),
        ("evaluate m n", "no place for 'n'"),
    ],
)
def test_usage_errors_leave_with_2(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*words.split(), "--json"]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and json.loads(shown.out)["ok"] is False


def test_settings_reach_the_job(job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, bool]] = []
    job(lambda settings, quiet: seen.append((settings, quiet)) or Report())
    (tmp_path / "run.yaml").write_text("train: {max_steps: 5, beta1: 0.8}\nfrom: base\n")
    words = [
        "pretrain",
        "a",
        "b",
        "--out",
        "o",
        "--config",
        str(tmp_path / "run.yaml"),
        "max_steps=7",
        "--quiet",
    ]
    assert cli.run([*words, "--seed", "3", "--resume", "--", "--odd", "x=y"]) == 0
    found, quiet = seen[0]
    assert found.path == ["a", "b", "--odd", "x=y"] and found.out == Path("o") and quiet
    assert (found.train.max_steps, found.train.beta1, found.from_model, found.seed, found.resume) == (
        7,
        0.8,
        "base",
        3,
        True,
    )


def test_a_dry_run_prints_settings_that_a_file_can_hold(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert (
        cli.run(
            [
                "data",
                "shards",
                "a",
                "--tokenizer",
                "t",
                "--out",
                "o",
                "--holdout",
                "0.5",
                "--seed",
                "1",
                "--dry-run",
            ]
        )
        == 0
    )
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert cli.run(["data", "shards", "--config", str(tmp_path / "run.yaml"), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["settings"]
    assert found == yaml.safe_load((tmp_path / "run.yaml").read_text()) and found["data"]["holdout"] == 0.5


@pytest.mark.parametrize(
    ("words", "prompts"),
    [([], ["a piped\nprompt"]), (["x=1", "temperature=0.5"], ["x=1"]), (["--file", "f"], [])],
)
def test_prompts(words: list[str], prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a piped\nprompt\n"))
    call = cli._parse(["generate", "m", *words])
    assert isinstance(call, cli.Call)
    found: Any = cli.read_settings(call)
    assert found.prompt == prompts


def test_a_closed_pipe_is_no_error() -> None:
    command = [sys.executable, "-m", "langmill", "pretrain", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
    assert process.returncode in (0, 1, 141)


def test_the_public_surface() -> None:
    import langmill
    import langmill.evaluate.loss

    assert (
        set(langmill.__all__)
        == {"__version__", "evaluate", "generate", "load", "pretrain", "save"}
        == set(dir(langmill))
    )
    assert all(callable(getattr(langmill, name)) for name in langmill.__all__ if name != "__version__")
    assert all(getattr(langmill, name).__doc__ for name in langmill.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        langmill.nothing  # noqa: B018
