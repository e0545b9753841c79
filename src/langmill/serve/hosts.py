"""Who may call from a browser: the Host and Origin of a request, on this machine's own address too.

A page from elsewhere can reach 127.0.0.1 by a name of its own that it lets point there (DNS rebinding), or simply ask;
so a name must be one of ours, and an origin our own or an allowed one. An address written in digits is nobody's name.
"""

from __future__ import annotations

import ipaddress
import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from langmill.common.errors import UsageError
from langmill.common.settings import ServeSettings
from langmill.serve import errors
from langmill.serve.state import State

HOST = re.compile(r"(\[[0-9A-Fa-f:.%]{2,64}\]|[A-Za-z0-9._-]{1,253})(?::(\d{1,5}))?")
ORIGIN = re.compile(rf"https?://{HOST.pattern}", re.IGNORECASE)
METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE"
REMEMBER_SECONDS = 600
TOLD = [
    f"X-RateLimit-{part}-{what}"
    for part in ("Limit", "Remaining", "Reset")
    for what in ("Requests", "Tokens")
]


def name_in(host: str) -> str | None:
    """The name in a Host header, in lower case and without its port; None where it is no host."""
    match = HOST.fullmatch(host)
    return None if match is None else match[1].lower().rstrip(".")


def is_address(name: str) -> bool:
    """Whether a name is an IP address in digits."""
    try:
        ipaddress.ip_address(name.strip("[]").partition("%")[0])
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    if host.lower() == "localhost":
        return True
    return is_address(host) and ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback


def origins_of(settings: ServeSettings) -> frozenset[str]:
    """The origins that may call. UsageError for what is none; "*" would let every page on the web in."""
    for origin in settings.allow_origin:
        if ORIGIN.fullmatch(origin) is None:
            raise UsageError(
                f"--allow-origin {origin}: an origin is a scheme and a host, as https://example.org or "
                "http://localhost:3000, without a path"
            )
    return frozenset(origin.lower() for origin in settings.allow_origin)


class Hosts:
    """Refuses other names with 421 and other origins with 403; answers the preflights of allowed origins."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self.app, self.metrics, settings = app, state.metrics, state.settings
        self.names = {"localhost", settings.host.lower(), *(name.lower() for name in settings.allow_host)}
        self.origins = origins_of(settings)
        # without TLS a proxy may speak it; with it a page over http at this address is somebody else's on the way
        self.schemes = ("http", "https") if settings.tls_cert is None else ("https",)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        told = self._refusal(host, origin)
        if told is not None:
            return await errors.refused(told, self.metrics, scope, receive, send)
        if origin is None or origin.lower() not in self.origins:
            return await self.app(scope, receive, send)
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            wanted = headers.get("access-control-request-headers", "")
            return await Response(
                status_code=204,
                headers={
                    **_allowed(origin),
                    "Access-Control-Allow-Methods": METHODS,
                    "Access-Control-Allow-Headers": wanted,
                    "Access-Control-Max-Age": str(REMEMBER_SECONDS),
                },
            )(scope, receive, send)

        async def opened(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_allowed(origin))
            await send(message)

        await self.app(scope, receive, opened)

    def _refusal(self, host: str, origin: str | None) -> errors.Refused | None:
        name = name_in(host)
        if name is None or not (name in self.names or is_address(name)):
            return errors.Refused(
                f"this server does not go by the name {host[:100]!r}: start it with --allow-host NAME",
                421,
                "wrong_host",
            )
        if origin is None or origin.lower() in self.origins:
            return None
        if origin.lower() in (f"{scheme}://{host.lower()}" for scheme in self.schemes):
            return None
        return errors.Refused(
            f"pages of {origin[:100]!r} may not call this server: start it with --allow-origin",
            403,
            "wrong_origin",
        )


def _allowed(origin: str) -> dict[str, str]:
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Expose-Headers": ", ".join(("X-Request-Id", "Retry-After", *TOLD)),
        "Cross-Origin-Resource-Policy": "cross-origin",
        "Vary": "Origin",
    }
