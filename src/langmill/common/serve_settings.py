"""What `langmill serve` can be told; see settings.py."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from langmill.common.setting import Count, Device, Settings, Threads, UseDtype


class ServeSettings(Settings):
    """`langmill serve`: models behind HTTP, by OpenAI's routes, and a page to chat with them."""

    model: list[str] = Field(
        default_factory=list, description="model folders, .gguf files or hub ids (repeatable)"
    )
    name: list[str] = Field(
        default_factory=list,
        description="names to serve the models under, in their order; none: each folder's last part",
    )
    adapter: list[str] = Field(
        default_factory=list,
        description="NAME=DIR or NAME=DIR@MODEL: the PEFT adapter in that folder, under this name, on the model that "
        "it was made for or on MODEL (repeatable)",
    )
    host: str = Field(
        "127.0.0.1", description="address to listen on; others than this machine's own need --api-keys"
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any that is free")
    slots: int = Field(
        16, ge=1, le=256, description="requests that are answered side by side, for each model"
    )
    context: int | None = Field(
        None,
        ge=16,
        description="tokens of a prompt and its answer; none: the model's, within 1 GiB of memory",
    )
    kv_bits: Literal[32, 8] = Field(
        32, description="of the keys and values that are remembered; 8: a quarter of the memory, on a CPU"
    )
    queue_tokens: Count = Field(
        1 << 18,
        ge=1,
        description="tokens of prompts that may wait; beyond them a request is refused with 429",
    )
    max_choices: int = Field(16, ge=1, description="answers that one request may ask for (n), at most")
    bits: Literal[8] | None = Field(
        None,
        description="embedding models: 8 rounds their weights as they are read, which is faster on a CPU",
    )
    pool: Literal["auto", "mean", "first", "last"] = Field(
        "auto",
        description="embedding models: how tokens become one vector; auto: as the folder says, or mean",
    )
    zero_shot: bool = Field(
        False,
        description="let models that write classify by labels too (/v1/classify); takes their memory a second time",
    )
    api_keys: Path | None = Field(
        None, description="file of hashed API keys; every request then needs one of them"
    )
    new_key: str | None = Field(
        None, description="make a key of this name, add it to --api-keys, print it once, and stop"
    )
    tls_cert: Path | None = Field(
        None,
        description="file of a certificate and those above it, in PEM: the server then speaks https alone",
    )
    tls_key: Path | None = Field(
        None, description="file of its private key; none: it is in --tls-cert's file"
    )
    allow_host: list[str] = Field(
        default_factory=list,
        description="names of this server in requests, beside this machine's own (repeatable)",
    )
    allow_origin: list[str] = Field(
        default_factory=list,
        description="web pages' origins that may call, as https://example.org (repeatable)",
    )
    requests_per_minute: int | None = Field(None, ge=1, description="for each key; none: no limit")
    tokens_per_minute: Count | None = Field(
        None, ge=1, description="read and written, for each key; none: no limit"
    )
    max_body_bytes: Count = Field(8 << 20, ge=1024, description="of one request, at most")
    max_connections: int = Field(
        512, ge=1, description="that stand open at once, at most; more are answered with 503"
    )
    request_seconds: float = Field(
        30.0,
        gt=0,
        description="in which a request's head must be there, then its body; so long a client may also read nothing",
    )
    workers: int = Field(
        1, ge=1, le=64, description="processes that share the port; each loads the models for itself"
    )
    drain_seconds: float = Field(
        30.0, ge=0, description="how long running answers may go on after a signal to stop"
    )
    page: bool = Field(True, description="serve the chat page at /")
    history: str | None = Field(
        None,
        description="file of the page's conversations; none: in the user's state folder; off: keep none",
    )
    log_prompts: bool = Field(False, description="write prompts and answers to the log too")
    log_format: Literal["text", "json"] = Field("text", description="of the log's lines on standard error")
    dtype: UseDtype = "auto"
    device: Device = "auto"
    threads: Threads = None
