"""Word lists as signals: phrases in any script are counted in meta, and dense ones lead out where a policy says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.data.test_prepare import batch

from langmill.common.errors import DataError, UsageError
from langmill.data.words import Words, pairs


def put(file: Path, text: str | bytes) -> str:
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return str(file)


def test_words_and_phrases_are_counted_and_dense_texts_go(tmp_path: Path) -> None:
    rude = put(tmp_path / "rude.txt", "# a remark\nblast\nsilly old fool # so they say\n混蛋\n\n")
    calm = put(tmp_path / "calm.txt", "\ufeffquiet\n")
    step = Words((("rude", rude), ("calm", calm)), (("rude", 100),))
    texts = [
        "Blast! What a BLAST, said the silly, old fool. " + "He was quiet then. " * 10,
        "blast " * 3 + "it",
        "A silly old man, and no fool: blasted.",
        "他是个混蛋，" + "可是天气很好。" * 9,
        "",
        "silly old",
    ]
    after = step(batch(*texts))
    counts = [json.loads(meta).get("words") for meta in after["meta"].to_pylist()]
    assert counts == [{"rude": 3, "calm": 10}, {"rude": 3}, None, {"rude": 1}, None, None]
    reasons = [None, "words: too many of the list rude", None, None, None, None]
    assert after["dropped"].to_pylist() == reasons and after["text"].to_pylist() == texts
    assert step(after)["meta"].to_pylist()[0] == after["meta"].to_pylist()[0].replace(",", ", ").replace(
        ":", ": "
    )


@pytest.mark.parametrize(
    ("content", "told"), [("# none\n\n", "holds no word"), (b"\xff", "cannot be read"), ("a " * 60, ":1 has 60 words")]
)  # fmt: skip
def test_a_list_that_is_none_is_an_error_that_names_it(
    tmp_path: Path, content: str | bytes, told: str
) -> None:
    file = put(tmp_path / "list.txt", content)
    with pytest.raises(DataError, match=f"list.txt.*{told}"):
        Words((("x", file),))(batch("a text"))
    with pytest.raises(UsageError, match="NAME=VALUE"):
        pairs(["list.txt"], "rules.words")
