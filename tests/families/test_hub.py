"""Where a model is: local paths, the hub's cache, and a hub on this machine that counts what is asked of it."""

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

from langmill.common.errors import ModelError, UsageError
from langmill.families.hub import resolve

COMMIT = "a" * 40
REPOSITORIES = {
    "me/whole": ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md",
                 "pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors", "code.py", "m.Q4_0.gguf"],
    "me/sentences": ["config.json", "model.safetensors", "modules.json", "vocab.txt", "1_Pooling/config.json",
                     "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin",
                     "onnx/config.json", "1_Pooling/deep/config.json", "x1_Pooling/config.json", "9_Code/config.json"],
    "me/pickled": ["config.json", "pytorch_model.bin"],
    "me/quantised": ["a.gguf", "b.gguf"],
}  # fmt: skip


@pytest.fixture(scope="module")
def hub() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A hub on loopback: its address, and each path asked for with the user agent that asked."""
    asked: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path.split("?")[0], self.headers.get("user-agent", "")))
            parts = self.path.split("?")[0].strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            repo = "/".join(parts[2:4] if api else parts[:2])
            if repo == "me/gated":
                return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
            if repo not in REPOSITORIES:
                return self.answer(
                    401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
                )
            files = REPOSITORIES[repo]
            revision = parts[5] if api and len(parts) > 5 else parts[3]
            if revision not in ("main", "v1", COMMIT):
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            if api:
                listing = [
                    {"type": "file", "path": f, "rfilename": f, "size": 2, "oid": "b" * 40} for f in files
                ]
                about = {"id": repo, "sha": COMMIT, "siblings": listing}
                return self.answer(200, json.dumps(listing if "tree" in parts else about).encode(), {})
            if (name := "/".join(parts[4:])) not in files:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            self.answer(200, b"{}", {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": COMMIT})

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
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def ask(home: Path, endpoint: str, *names: str, offline: bool = False) -> list[str]:
    """`resolve` in a process of its own, as the library reads its environment once: a path or an error each."""
    code = (
        "import sys\nfrom langmill.families.hub import resolve\nfrom langmill.common.errors import ModelError\n"
        "for name in sys.argv[1:]:\n    try: print(resolve(name))\n"
        "    except ModelError as error: print('ERROR', str(error).replace(chr(10), ' '))\n"
        "assert 'torch' not in sys.modules"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": str(int(offline))}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_only_what_a_model_needs_is_fetched(tmp_path: Path, hub: tuple[str, list[tuple[str, str]]]) -> None:
    endpoint, asked = hub
    asked.clear()
    names = ["me/whole", "me/whole@v1", "me/whole/m.Q4_0.gguf", "me/pickled", "me/quantised", "me/gated", "me/none",
             "me/whole@v9", "me/whole/x.gguf"]  # fmt: skip
    found = dict(zip(names, ask(tmp_path, endpoint, *names), strict=True))
    folder = Path(found["me/whole"])
    assert folder.is_relative_to(tmp_path / "hub")
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert {path.name for path in folder.iterdir()} == wanted | {"m.Q4_0.gguf"}
    assert Path(found["me/whole@v1"]) == folder
    assert Path(found["me/whole/m.Q4_0.gguf"]) == folder / "m.Q4_0.gguf"
    for name, words in {
        "me/pickled": "Pickled weights are never read",
        "me/quantised": "needs the file's name",
        "me/gated": "by request",
        "me/none": "neither a local folder nor a model on the hub",
        "me/whole@v9": "no revision v9",
        "me/whole/x.gguf": "no file x.gguf",
    }.items():
        assert found[name].startswith("ERROR") and words in found[name], found[name]
    assert {agent for _, agent in asked} == {"langmill"}  # nothing about this machine is told
    assert not [
        path for path, _ in asked if path.endswith((".bin", ".py", ".md", "consolidated.safetensors"))
    ]
    asked.clear()
    again = ask(
        tmp_path, endpoint, "me/whole", "me/whole@v1", "me/whole/m.Q4_0.gguf", "me/other", offline=True
    )
    assert again[:3] == [str(folder), str(folder), str(folder / "m.Q4_0.gguf")] and not asked
    assert "neither a local folder nor in the hub's cache" in again[3] and "offline mode is on" in again[3]


def test_what_makes_vectors_is_fetched_and_no_more(
    tmp_path: Path, hub: tuple[str, list[tuple[str, str]]]
) -> None:
    endpoint, asked = hub
    asked.clear()
    (found,) = ask(tmp_path, endpoint, "me/sentences")
    there = {path.relative_to(found).as_posix() for path in Path(found).rglob("*") if path.is_file()}
    behind = {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    assert there == {"config.json", "model.safetensors", "modules.json", "vocab.txt"} | behind
    asked.clear()
    assert ask(tmp_path, endpoint, "me/sentences", offline=True) == [found] and not asked


def test_a_hub_that_cannot_be_reached(tmp_path: Path, hub: tuple[str, list[tuple[str, str]]]) -> None:
    (first,) = ask(tmp_path, hub[0], "me/whole")
    cached, missing = ask(tmp_path, "http://127.0.0.1:9", "me/whole", "me/other")
    assert cached == first  # what was fetched serves on
    assert "cannot be reached" in missing and "copy its folder here" in missing


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "a.gguf").write_bytes(b"")
    (tmp_path / "a.bin").write_bytes(b"")
    assert resolve(tmp_path / "here") == tmp_path / "here"
    with pytest.raises(
        ModelError, match=r"holds GGUF files and no config\.json; name one, such as .*a\.gguf"
    ):
        resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    with pytest.raises(ModelError, match="neither a model folder nor"):
        resolve(tmp_path / "a.bin")
    with pytest.raises(ModelError, match="empty name"):
        resolve("")
    for name in [
        "nothing",
        "./no",
        "/no/such",
        "a/b/c",
        "../x",
        "org/name@",
        "org//name",
        "C:\\no",
        "a/../c.gguf",
    ]:
        with pytest.raises(UsageError, match="does not exist"):
            resolve(name)
