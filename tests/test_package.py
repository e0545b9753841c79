"""The wheel, built and installed beside the dependencies only: it holds everything and works alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHORTEST = "import sys, langmill; print(langmill.__file__)"


def call(*command: str | Path, folder: Path) -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    call(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", "out", ".", folder=folder)
    return next((folder / "out").glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_source_and_the_licence(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    files = {f.relative_to(source).as_posix() for f in (source / "langmill").rglob("*") if f.is_file()}
    assert {file for file in files if "__pycache__" not in file} <= packed
    assert any(file.endswith("licenses/LICENSE") for file in packed)


def test_the_installed_wheel_works_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", folder=tmp_path)
    scripts = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    pip = (sys.executable, "-m", "pip", "--python", scripts / "python", "--disable-pip-version-check")
    call(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, folder=tmp_path)
    site = Path(call(scripts / "python", "-c", SHORTEST, folder=tmp_path).strip()).parent.parent
    assert tmp_path in site.parents
    # A path file named by another is not read in turn, so the editable install beside the dependencies stays unseen.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"], encoding="utf-8")
    assert "quickstart" in call(scripts / "langmill", "--help", folder=tmp_path)
    report = json.loads(call(scripts / "langmill", "doctor", "--json", "--quiet", folder=tmp_path))
    assert report["ok"] and report["figures"]["matmul_gflops_float32"] > 0 and "data" in report["extras"]
    assert call(scripts / "python", "-c", SHORTEST, folder=tmp_path).startswith(str(site))
