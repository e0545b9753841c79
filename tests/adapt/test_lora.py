from __future__ import annotations

import sys
from pathlib import Path

import pytest

from langmill.adapt.lora import quantise
from langmill.common.settings import ModelSettings
from langmill.families.folder import load, save
from langmill.jobs.pretrain import fresh
from langmill.jobs.size import config_for
from langmill.model.layers import Int4Linear


@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is read from /proc")
def test_after_quantising_no_weight_holds_the_mapped_file(tmp_path: Path) -> None:
    save(fresh(config_for(ModelSettings(size="100k"), 300, 64), 0), None, tmp_path / "model")
    model, _ = load(tmp_path / "model")
    quantise(model)
    assert any(isinstance(layer, Int4Linear) for layer in model.modules())
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")
