from collections.abc import Callable
from pathlib import Path

import pytest

LINES = (
    "The quick brown fox jumps over the lazy dog, and number {} is counted.",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。第{}首。",
    "مرحبا بالعالم، هذا نص عربي قصير رقم {}.",
)


@pytest.fixture(scope="session")
def write_texts() -> Callable[[Path], Path]:
    """Fills a folder with English, Chinese and Arabic documents, and a file that is not UTF-8."""

    def write(folder: Path) -> Path:
        folder.mkdir()
        for i in range(60):
            body = "\n".join(line.format(i * 7 + j) for j in range(3) for line in LINES)
            (folder / f"{i:03}.txt").write_text(body, encoding="utf-8")
        (folder / "bad.txt").write_bytes(b"\xff\xff\xff")
        return folder

    return write


@pytest.fixture
def texts(tmp_path: Path, write_texts: Callable[[Path], Path]) -> Path:
    return write_texts(tmp_path / "texts")
