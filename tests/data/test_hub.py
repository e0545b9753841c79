"""Data sets of the hub as sources: from its cache offline, from a hub on this machine, and what is said where not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from langmill.common.errors import DataError, UsageError
from langmill.data import hub
from langmill.data.sources import files, roots

COMMIT = "c" * 40
FILES = {
    "data/train-0.jsonl": "a",
    "data/test.jsonl": "b",
    "README.md": "card",
    "pictures/x.png": "no",
    "load.py": "no",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub leaves it: links to blobs."""
    folder = tmp_path / "datasets--me--rows"
    for name, text in FILES.items():
        link = folder / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        (folder / "blobs").mkdir(exist_ok=True)
        blob = folder / "blobs" / name.replace("/", "-").replace(".", "-")
        blob.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
        link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub.fetched.cache_clear()
    return tmp_path


def found(*sources: str) -> list[str]:
    gone: list[tuple[object, ...]] = []
    names = [file.id for file in files(sources, False, lambda *given: gone.append(given))]
    assert gone == []
    return names


def test_what_the_cache_holds_is_read_offline(cache: Path) -> None:
    both = ["me/rows/data/test.jsonl", "me/rows/data/train-0.jsonl"]
    assert found("hf://datasets/me/rows") == both == found("hf://datasets/me/rows@main/data")
    assert found("hf://datasets/me/rows/data/train-*") == both[1:]
    assert (
        found("hf://datasets/me/rows/data/test.jsonl", f"hf://datasets/me/rows@{COMMIT}/data/train-*") == both
    )
    (root,) = roots(["hf://datasets/me/rows"])
    assert (root.name, root.revision) == ("me/rows", COMMIT)
    with pytest.raises(DataError, match="not in the hub's cache.*HF_HUB_OFFLINE.*Go online once"):
        roots(["hf://datasets/me/other"])
    for wrong in ("hf://me/rows", "hf://datasets/rows", "hf://datasets/me/rows/../x", "hf://models/a/b"):
        with pytest.raises(UsageError, match="no data set of the hub"):
            roots([wrong])
    with pytest.raises(UsageError, match="no such file of a known format"):
        roots(["hf://datasets/me/rows/pictures"])


@pytest.fixture
def endpoint() -> Iterator[str]:
    """A hub on loopback that holds me/rows."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            listing = [
                {"type": "file", "path": f, "rfilename": f, "size": 14, "oid": "b" * 40} for f in FILES
            ]
            name = path.partition("/resolve/")[2].partition("/")[2]
            if not path.startswith(("/api/datasets/me/rows/", "/datasets/me/rows/")):
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "none"})
            if path.startswith("/api/"):
                about = {"id": "me/rows", "sha": COMMIT, "siblings": listing}
                return self.answer(200, json.dumps(listing if "/tree/" in path else about).encode(), {})
            body = json.dumps({"text": FILES[name]}).encode()
            self.answer(200, body, {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": COMMIT})

        do_HEAD = do_GET

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_data_set_is_fetched_prepared_and_named_with_its_commit(tmp_path: Path, endpoint: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    command = [
        sys.executable,
        "-m",
        "langmill",
        "data",
        "prepare",
        "--out",
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    for source, code, told in (
        ("hf://datasets/me/rows", 0, "2 documents"),
        ("hf://datasets/me/none", 1, "there is no data set me/none on the hub"),
    ):
        done = subprocess.run(
            [*command, source], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code and told in done.stdout + done.stderr, done.stderr
    about = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert about["sources"]["me/rows"]["revision"] == COMMIT and about["sources"]["me/rows"]["files"] == 2
    cached = [path.name for path in (tmp_path / "home").rglob("snapshots/*/**/*") if path.is_file()]
    assert sorted(cached) == ["test.jsonl", "train-0.jsonl"]
