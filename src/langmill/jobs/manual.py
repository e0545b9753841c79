"""The text that every CPython carries: its language reference and the docstrings of its library.

The quickstart trains on it, so that a first model needs no download. The library's source is parsed, never
imported: importing it would run code (``antigravity`` opens a browser) and some modules exist on one system only.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from langmill.common.errors import DataError
from langmill.text.document import Document

# Test suites, third-party packages and the editor are not the library's own manual; lib2to3's fixtures do not parse.
EXCLUDED = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "ensurepip",
        "pydoc_data",
        "site-packages",
        "dist-packages",
        "__pycache__",
    }
)
SOURCE = "the Python manual"
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Manual:
    """Pages in a fixed order, and what a reader should know about them (a missing part)."""

    documents: tuple[Document, ...]
    notes: tuple[str, ...]


def manual(library: Path | None = None) -> Manual:
    """Read the manual of the running Python (or of the one whose standard library lies at ``library``).

    About 2 MB in 3,000 pages on CPython 3.11, in a few seconds. The order depends on names alone, so that two
    machines with the same Python hold the same pages in the same order. Raises DataError when there is no source.
    """
    root = library or Path(sysconfig.get_paths()["stdlib"])
    notes: list[str] = []
    pages = dict(_topics(root / "pydoc_data" / "topics.py"))
    if not pages:
        notes.append("This Python carries no pydoc_data (some distributions leave it out): docstrings alone.")
    broken = 0
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).parts):
        parts = path.relative_to(root).with_suffix("").parts
        if EXCLUDED.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            broken += 1
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for name, text in _pages(module, tree):
            pages.setdefault(
                name, text
            )  # a second definition under the same name is another system's variant
    if broken:
        notes.append(f"{broken} files of the library could not be read as Python and were left out.")
    if not pages:
        raise DataError(
            f"no manual found: {root} holds no Python source. Give your own text with --text FOLDER."
        )
    documents = tuple(Document(name, text, SOURCE, {}) for name, text in pages.items())
    return Manual(documents, tuple(notes))


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    """The language reference: ``topics = {name: text}``, a literal, so it is read and not run."""
    if not path.is_file():
        return
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in sorted(ast.literal_eval(node.value).items()):
                yield f"pydoc_data.topics.{name}", text.strip() + "\n"


def _pages(module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """A page for the module, one for each class with its methods, and one for each function that is documented."""
    if text := ast.get_docstring(tree):
        yield module, f"{module}\n\n{text.strip()}\n"
    for name, node in _definitions(tree, module):
        entries = list(_entries(name, node))
        if entries:
            yield name, "\n\n".join(entries) + "\n"


def _entries(name: str, node: Definition) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text and text.strip():
        yield f"{_signature(name, node)}\n\n{text.strip()}"
    if isinstance(node, ast.ClassDef):
        for inner, child in _definitions(node, node.name):
            yield from _entries(inner, child)


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    """Classes and functions right below ``node``, those under ``if`` and ``try`` included, in source order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield f"{prefix}.{child.name}", child
        elif isinstance(child, (ast.If, ast.Try, ast.ExceptHandler)):
            yield from _definitions(child, prefix)


def _signature(name: str, node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{name}({ast.unparse(node.args)})"
