"""TLS: the official clients over https, what is wrong with a certificate, and refusals where no half can be closed."""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from tests.serve.conftest import certificate, settings_of

from langmill import cli
from langmill.common.errors import UsageError
from langmill.serve.tls import check_tls

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "model": "tiny", "max_tokens": 4}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificate(tmp_path_factory.mktemp("tls"))


def test_clients_speak_over_tls_and_pages_over_http_do_not(
    serving: Any, folder: str, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serving(folder, tls_cert=files[0], tls_key=files[1]).url
    monkeypatch.setenv("SSL_CERT_FILE", str(files[0]))
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        parts = list(client.chat.completions.create(stream=True, **ASK))
        assert parts[-1].choices[0].finish_reason is not None
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as claude:
        assert claude.messages.create(**ASK).usage.output_tokens > 0
    host = url.removeprefix("https://")
    for origin, status in ((f"https://{host}", 200), (f"http://{host}", 403), ("https://a.example", 403)):
        assert httpx.get(f"{url}/v1/models", headers={"Origin": origin}).status_code == status
    page = httpx.get(url)
    assert "Content-Security-Policy" in page.headers and "set-cookie" not in page.headers
    with pytest.raises(httpx.TransportError):
        httpx.get(url.replace("https", "http"))
    with pytest.raises(httpx.ConnectError, match=r"self.signed certificate"):
        httpx.get(url, trust_env=False)


def test_what_is_turned_away_is_told_why(serving: Any, folder: str, files: tuple[Path, Path]) -> None:
    running = serving(folder, tls_cert=files[0], tls_key=files[1], max_connections=2)
    known = ssl.create_default_context(cafile=str(files[0]))
    address = ("127.0.0.1", int(running.url.rpartition(":")[2]))

    def opened() -> ssl.SSLSocket:
        return known.wrap_socket(socket.create_connection(address, timeout=30), server_hostname="localhost")

    taken = [opened() for _ in range(2)]
    there = running.server.server_state.connections
    running.until(lambda: len(there) == 2)
    with opened() as more:
        assert b"too_many_connections" in b"".join(iter(lambda: more.recv(1 << 16), b""))
    taken[0].sendall(b"no HTTP\r\n\r\n")
    assert b"invalid_http" in b"".join(iter(lambda: taken[0].recv(1 << 16), b""))
    running.until(lambda: len(there) == 1)
    running.server.config.timeout_keep_alive = 0
    taken.append(opened())
    running.until(lambda: len(there) == 2)
    taken[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    running.until(lambda: [one.transport.is_closing() for one in there].count(True) == 1)
    running.stop()  # which no client that rests holds up: it would not answer a goodbye
    assert not there
    for one in taken:
        one.close()


def test_slow_ones_are_ended(serving: Any, folder: str, files: tuple[Path, Path]) -> None:
    running = serving(folder, tls_cert=files[0], tls_key=files[1], request_seconds=0.3)
    known = ssl.create_default_context(cafile=str(files[0]))
    address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
    long = max(running.state.models.all[0].tokenizer.special_ids)  # ten letters
    body = json.dumps({"tokens": [long] * 400_000}).encode()
    head = b"POST /detokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(address) as idle, socket.create_connection(address) as deaf:
        known.wrap_socket(idle, server_hostname="localhost")  # and then nothing, not even a goodbye
        client = known.wrap_socket(deaf, server_hostname="localhost")
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        running.until(
            lambda: 'reason="slow_reader"} 1.0' in httpx.get(f"{running.url}/metrics", verify=known).text
        )
        running.until(lambda: not running.server.server_state.connections)


def test_the_command_says_https(folder: str, files: tuple[Path, Path]) -> None:
    words = [
        folder,
        "--tls-cert",
        str(files[0]),
        "--tls-key",
        str(files[1]),
        "--port",
        "0",
        "--history",
        "off",
    ]
    command = [sys.executable, "-m", "langmill", "serve", *words, "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = next(
            found[1] for line in process.stderr if (found := re.search(r"answers at (https://\S+)/v1", line))
        )
        known = ssl.create_default_context(cafile=str(files[0]))
        assert httpx.get(f"{url}/health", verify=known).status_code == 200
    finally:
        process.kill()
        process.communicate()


def test_files_that_cannot_be_used_are_told_before_a_model_is_loaded(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cert, key = files
    other, locked = certificate(tmp_path, "other")[1], certificate(tmp_path, "locked", "secret")
    (tmp_path / "broken").write_text(cert.read_text().replace("M", "!"), encoding="utf-8")
    both = tmp_path / "both"
    both.write_text(cert.read_text() + key.read_text(), encoding="utf-8")
    check_tls(settings_of("m"))
    check_tls(settings_of("m", tls_cert=both))
    check_tls(settings_of("m", tls_cert=cert, tls_key=key))
    for given, message in (
        ((None, key), "--tls-key needs --tls-cert FILE"),
        ((cert, None), "holds no private key in PEM: give it by --tls-key"),
        ((tmp_path / "none", key), r"--tls-cert .*none cannot be read \(No such file"),
        ((cert, tmp_path), r"--tls-key .* cannot be read \(Is a directory"),
        ((key, cert), "--tls-cert .* holds no certificate in PEM"),
        ((cert, cert), "--tls-key .* holds no private key in PEM$"),
        (locked, "a key under a password, .* openssl pkey -in"),
        ((cert, other), "is not that of the certificate"),
        ((tmp_path / "broken", key), r"cannot be used \("),
    ):
        with pytest.raises(UsageError, match=message):
            check_tls(settings_of("m", tls_cert=given[0], tls_key=given[1]))
    assert cli.run(["serve", "no/such/model", "--tls-cert", str(cert), "--tls-key", str(other)]) == 2
    assert "is not that of the certificate" in capsys.readouterr().err
