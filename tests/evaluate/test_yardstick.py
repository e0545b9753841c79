import gzip
import lzma

import pytest

from langmill.evaluate.yardstick import Yardstick


def test_it_counts_what_the_compressors_write():
    texts = ["春眠不觉晓，处处闻啼鸟。" * 9, "", "the quick brown fox " * 50]
    data = "".join(texts).encode()
    yardstick = Yardstick()
    for text in texts:
        yardstick.add(text)
    found = yardstick.bits_per_byte()
    assert found["xz"] == pytest.approx(8 * len(lzma.compress(data, preset=6)) / len(data))
    assert found["gzip"] == pytest.approx(8 * len(gzip.compress(data, 9)) / len(data), rel=0.01)
