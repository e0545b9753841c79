"""docs/data.md: every command that it prints runs, and its YAML is every setting with its default."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from tests.test_docs import LITTLE, task_inputs

from langmill import cli
from langmill.common.settings import PrepareSettings
from langmill.jobs.manual import manual

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [block for kind, block in fenced if kind == language]


def test_every_command_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    prose = [d.text[:900] for d in manual().documents if len(d.text) > 900]
    for number, folder in enumerate(("raw", "more")):
        (tmp_path / folder).mkdir()
        lines = [json.dumps({"text": text}) + "\n" for text in prose[30 * number : 30 * number + 30]]
        (tmp_path / folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    for i, text in enumerate(prose[60:69]):
        ada = " And this is the boat of Ada." if i == 4 else ""
        (tmp_path / "raw" / f"{i:02}.txt").write_text(text + ada, encoding="utf-8")
    (tmp_path / "rude.txt").write_text("blast\n", encoding="utf-8")
    rows = [{"text": text[:60], "label": ("good", "bad")[i % 2]} for i, text in enumerate(prose[70:90])]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "quality.jsonl").write_text("".join(lines), encoding="utf-8")
    task_inputs(tmp_path)
    commands = [shlex.split(line)[1:] for block in blocks("") for line in block.splitlines()]
    assert {tuple(words[:2]) for words in commands} >= {
        ("data", name) for name in ("prepare", "why", "report", "forget", "shards")
    }
    for words in commands:
        few = ["--workers", "1"] if words[1] == "prepare" else LITTLE.get(words[0], [])
        assert cli.run([*words, *few, "--quiet"]) == 0, (words, capfd.readouterr().err)


def test_the_yaml_is_every_setting_with_its_default() -> None:
    (block,) = blocks("yaml")
    given = yaml.safe_load(block)
    made = PrepareSettings(**given)
    assert made == PrepareSettings(source=given["source"], out=given["out"])
    for name, value in made.model_dump().items():
        assert name in given and (not isinstance(value, dict) or set(value) == set(given[name])), name
