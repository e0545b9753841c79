from pathlib import Path

import pytest

from langmill.common.errors import DataError
from langmill.jobs.manual import manual


def library(folder: Path, topics: bool = True) -> Path:
    (folder / "pkg" / "test").mkdir(parents=True)
    (folder / "site-packages").mkdir()
    (folder / "pkg" / "__init__.py").write_text(
        '"""The package.\n\nMore."""\nraise SystemExit("imported!")\n'
    )
    (folder / "pkg" / "test" / "hidden.py").write_text('"""Hidden."""\n')
    (folder / "site-packages" / "other.py").write_text('"""Hidden."""\n')
    (folder / "broken.py").write_text("def (:\n")
    (folder / "shapes.py").write_text(
        "try:\n    def area(w, h=2): 'Width times height: 面积.'\nexcept ImportError:\n    def area(w): 'Other.'\n"
        "class Box(list):\n    'A box.'\n    def lid(self): 'The lid.'\n    def bare(self): pass\n",
        encoding="utf-8",
    )
    if topics:
        (folder / "pydoc_data").mkdir()
        (folder / "pydoc_data" / "topics.py").write_text("topics = {'b': 'The b\\n', 'a': 'The a'}\n")
    return folder


def test_pages_are_parsed_and_never_run(tmp_path: Path) -> None:
    found = manual(library(tmp_path))
    pages = {d.id: d.text for d in found.documents}
    assert list(pages) == ["pydoc_data.topics.a", "pydoc_data.topics.b", "pkg", "shapes.area", "shapes.Box"]
    assert pages["shapes.area"] == "shapes.area(w, h=2)\n\nWidth times height: 面积.\n"
    assert pages["shapes.Box"] == "class shapes.Box(list)\n\nA box.\n\nBox.lid(self)\n\nThe lid.\n"
    assert found.notes == ("1 files of the library could not be read as Python and were left out.",)


def test_a_python_without_topics_says_so(tmp_path: Path) -> None:
    assert "pydoc_data" in manual(library(tmp_path, topics=False)).notes[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="--text FOLDER"):
        manual(tmp_path / "empty")


def test_this_python_carries_enough() -> None:
    documents = manual().documents
    assert sum(len(d.text.encode()) for d in documents) > 1_000_000
    assert len({d.id for d in documents}) == len(documents) > 2000
