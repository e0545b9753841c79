"""The module of fake.py under the name `fake_engine`, for `import fake_engine` in the tests of this folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("fake_engine", Path(__file__).with_name("fake.py"))
assert spec and spec.loader
module = importlib.util.module_from_spec(spec)
sys.modules["fake_engine"] = module
spec.loader.exec_module(module)
