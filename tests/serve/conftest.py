"""A tiny model behind a real server on a free port of this machine; after each test nothing is left in its slots."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn

from langmill.common.settings import ServeSettings
from langmill.families import folder as folders
from langmill.model.config import Head, Learned, ModelConfig, StackConfig, Tokens
from langmill.model.init import init_
from langmill.model.transformer import Transformer
from langmill.serve.app import create_app
from langmill.serve.connections import config_of
from langmill.serve.logs import LOG
from langmill.serve.state import State, open_state
from langmill.serve.tls import scheme_of
from langmill.text.specials import Specials
from langmill.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["The quick brown fox jumps over the lazy dog, every day and every night. 春眠不觉晓。"] * 3
WINDOW = 512


def save(
    folder: Path,
    template: str | None = TEMPLATE,
    length: int = WINDOW,
    seed: int = 0,
    more: Sequence[str] = (),
) -> str:
    """Write a model of random weights, spread so wide that no two scores are nearly equal. more: specials."""
    tokenizer = Tokenizer.train(WORDS, vocab_size=320, specials=["<|im_start|>", "<|im_end|>", *more])
    known = Specials(bos=tokenizer.bos_id, eos=tokenizer.eos_id, pad=tokenizer.pad_id, chat_template=template)
    tokenizer = Tokenizer(tokenizer._backend, known)
    stack = StackConfig(dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48)
    size = tokenizer.vocab_size
    model = Transformer(ModelConfig(stack, Tokens(size, length), head=Head(size)))
    init_(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    folders.save(model, tokenizer, folder)
    return str(folder)


def save_encoder(folder: Path, length: int = 64) -> str:
    """Write a tiny encoder of random weights, which makes vectors."""
    tokenizer = Tokenizer.train(WORDS, vocab_size=300)
    stack = StackConfig(
        32, 2, 2, 2, 16, 64, norm="layer", norm_eps=1e-12, activation="gelu", gated=False, position=Learned(),
        bias=frozenset({"q", "k", "v", "o", "mlp"}), norm_order="post", causal=False,
    )  # fmt: skip
    tokens = Tokens(tokenizer.vocab_size, length, types=2, norm=True)
    model = Transformer(ModelConfig(encoder=stack, encoder_input=tokens))
    init_(model, 0)
    folders.save(model, tokenizer, folder)
    return str(folder)


def settings_of(*models: str, **more: Any) -> ServeSettings:
    return ServeSettings(
        **{"model": list(models), "device": "cpu", "threads": 1, "history": "off", "drain_seconds": 5, **more}
    )


def certificate(folder: Path, name: str = "mill", password: str = "") -> tuple[Path, Path]:
    """Write a certificate for this machine, signed by itself, and its key, by the program openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no program openssl")
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    command = [
        "openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "2", "-subj", "/CN=localhost", "-addext",
        "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert),
        *(["-passout", f"pass:{password}"] if password else ["-nodes"]),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


class Running:
    """A server of a state, in a thread, until `stop`."""

    def __init__(self, state: State) -> None:
        self.state, self.app = state, create_app(state)
        config = config_of(self.app, state)
        config.port = 0
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"{scheme_of(state.settings)}://127.0.0.1:{port}"

    def busy(self) -> int:
        """Requests in any engine."""
        services = [one.service for one in self.state.models.all if one.service is not None]
        return sum(sum(service.accounting().values()) for service in services)

    def ask(self, path: str, body: Any) -> socket.socket:
        """A POST on its way, whose answer nobody reads yet."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        connection.sendall(head.encode() + data)
        return connection

    def until(self, true: Callable[[], bool]) -> None:
        """Wait for it; an error after a while."""
        until(true)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        # in a thread, since the one of a test may have a loop already
        ending = threading.Thread(target=lambda: asyncio.run(self.state.models.close(drain=False)))
        ending.start()
        ending.join(30)
        assert not self.thread.is_alive() and not ending.is_alive()


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for it, however busy the machine is."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random chat model."""
    return save(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same without a chat template."""
    return save(tmp_path_factory.mktemp("served") / "plain", template=None)


@pytest.fixture(scope="session")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with a window so long that a client can leave before an answer ends by itself."""
    return save(tmp_path_factory.mktemp("served") / "long", length=1 << 13)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny encoder, which makes vectors."""
    return save_encoder(tmp_path_factory.mktemp("served") / "encoder")


@pytest.fixture(scope="session")
def _running(folder: str, plain_folder: str, long_folder: str) -> Iterator[Running]:
    running = Running(open_state(settings_of(folder, plain_folder, long_folder)))
    yield running
    running.stop()


@pytest.fixture
def running(_running: Running) -> Iterator[Running]:
    """The server with the models "tiny", which chats, "plain", which does not, and "long". Afterwards its slots are
    free."""
    yield _running
    until(lambda: _running.busy() == 0)


@pytest.fixture
def url(running: Running) -> str:
    """Its address."""
    return running.url


@pytest.fixture
def state(running: Running) -> State:
    """Its state."""
    return running.state


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client of it."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def _starter() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(*models: str, **more: Any) -> Running:
        started.append(Running(open_state(settings_of(*models, **more))))
        return started[-1]

    yield start
    for running in started:
        running.stop()


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Let caplog hear the server, whatever a test of this process did to logging before."""
    LOG.handlers, LOG.propagate = [caplog.handler], False
    yield
    LOG.handlers, LOG.propagate = [], True


@pytest.fixture
def serving() -> Iterator[Callable[..., Running]]:
    """`serving(model, …, setting=value)` starts a server of one's own, which is stopped afterwards."""
    yield from _starter()


@pytest.fixture(scope="module")
def serving_long() -> Iterator[Callable[..., Running]]:
    """The same for all tests of a file."""
    yield from _starter()
