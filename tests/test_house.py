"""The rules of the house, held by tests: see the docstrings and messages for what each protects."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from langmill.common import settings
from langmill.common.settings import Settings

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "langmill"
CODE = [
    file
    for folder in ("src", "tests", "scripts", "benchmarks", "examples")
    for file in (ROOT / folder).rglob("*.py")
]
TEXT = (".py", ".md", ".toml", ".txt", ".yaml", ".sh", ".css", ".html", ".json", "")

# Names of files and functions that may be longer, each with its reason.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
# Places below cli.py that read the environment, each with its reason.
ENVIRONMENT = {
    "src/langmill/train/guard.py": "sets what cuBLAS needs to be deterministic",
    "src/langmill/privacy/key.py": "reads the secret that a setting names, which must not stand in one",
}
PACKAGES = {
    "src/langmill/__init__.py": "the public surface",
    "src/langmill/families/__init__.py": "finds the families",
}


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inner = f"{prefix}{child.name}"
            if not isinstance(child, ast.ClassDef):
                yield inner, (child.end_lineno or 0) - child.lineno + 1
            yield from functions(child, inner + ".")
        else:
            yield from functions(child, prefix)


def test_files_and_functions_are_short() -> None:
    lengths = {name(file): len(file.read_text(encoding="utf-8").splitlines()) for file in CODE}
    assert {file: length for file, length in lengths.items() if length > 400 and file not in LONG_FILES} == {}
    found = {
        f"{name(file)}:{function}": length for file in CODE for function, length in functions(tree(file))
    }
    assert {
        place: length for place, length in found.items() if length > 60 and place not in LONG_FUNCTIONS
    } == {}
    assert all(lengths[file] > 400 for file in LONG_FILES) and all(
        found[place] > 60 for place in LONG_FUNCTIONS
    )


def test_every_setting_is_read_somewhere() -> None:
    classes = [
        c
        for _, c in inspect.getmembers(settings, inspect.isclass)
        if issubclass(c, Settings) and c is not Settings
    ]
    read = {
        node.attr
        for file in SOURCE.rglob("*.py")
        if file.name != "settings.py"
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and not _is_self(node.value)
    }
    unread = {f"{c.__name__}.{field}" for c in classes for field in c.model_fields if field not in read}
    assert unread == set(), "settings that no code reads: make them work or remove them"
    undescribed = {
        f"{c.__name__}.{f}"
        for c in classes
        for f, i in c.model_fields.items()
        if not (i.description or _group(i))
    }
    assert undescribed == set()


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _group(info: object) -> bool:
    annotation = getattr(info, "annotation", None)
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def test_the_environment_is_read_at_the_door_only() -> None:
    """What a run does must stand in its settings, so nothing below cli.py looks at environment variables."""
    reading = {
        name(file)
        for file in SOURCE.rglob("*.py")
        if file.name != "cli.py" and re.search(r"\benviron\b|\bgetenv\b", file.read_text(encoding="utf-8"))
    }
    assert reading == set(ENVIRONMENT)


def test_nothing_runs_code_from_data() -> None:
    """No pickle, no eval, no torch.load: a model or a data set is never a program."""
    called = re.compile(
        r"\bimport pickle\b|\bpickle\.load|\btorch\.load\(|(?<![.\w])eval\(|(?<![.\w])exec\(|shell=True"
    )
    assert [
        name(file) for file in SOURCE.rglob("*.py") if called.search(file.read_text(encoding="utf-8"))
    ] == []


def test_packages_hold_no_code() -> None:
    for file in SOURCE.rglob("__init__.py"):
        body = tree(file).body
        empty = not body or (len(body) == 1 and isinstance(body[0], ast.Expr))
        assert empty or name(file) in PACKAGES, f"{name(file)} must hold a docstring at most"


def test_no_text_names_a_registry_or_this_machine() -> None:
    """The project is installed through whatever registry a machine uses, and from any folder."""
    words = (
        "py" + "pi.org",
        "pythonhosted" + ".org",
        "npmjs" + ".org",
        "deb.debian" + ".org",
        "/work" + "/main",
        "/tmp" + "/w/",
    )
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [
        ROOT / line
        for line in listed.stdout.splitlines()
        if Path(line).suffix in TEXT and (ROOT / line).is_file()
    ]
    assert files
    found = [
        (name(f), word)
        for f in files
        for word in words
        if word in f.read_text(encoding="utf-8", errors="replace")
    ]
    assert found == []


def test_rooms_import_downward_only() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    if not program.exists() and not program.with_suffix(".exe").exists():
        pytest.skip("import-linter is not installed")
    result = subprocess.run([program, "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_files_are_read_and_written_as_utf8() -> None:
    """A text file opened without an encoding is read differently on Windows."""
    bad = []
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(tree(file)):
            if (
                isinstance(node, ast.Call)
                and _opens_text(node)
                and not any(k.arg == "encoding" for k in node.keywords)
            ):
                bad.append(f"{name(file)}:{node.lineno}")
    assert bad == []


def _opens_text(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Attribute):
        needed = {"read_text": 1, "write_text": 2}.get(call.func.attr, 0)
        return len(call.args) < needed
    constants = [a.value for a in call.args[1:2] if isinstance(a, ast.Constant)]
    return (
        isinstance(call.func, ast.Name)
        and call.func.id == "open"
        and not any("b" in str(mode) for mode in constants)
    )
