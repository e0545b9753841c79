"""TLS: a certificate and its private key in PEM, looked at before anything is loaded; uvicorn speaks with them."""

from __future__ import annotations

import ssl
from pathlib import Path

from langmill.common.errors import UsageError
from langmill.common.settings import ServeSettings

CERTIFICATE, KEY = "-----BEGIN CERTIFICATE-----", "PRIVATE KEY-----"


def check_tls(settings: ServeSettings) -> None:
    """UsageError says what is wrong with the files of `tls_cert` and `tls_key`; without a key file the certificate's
    holds both."""
    cert, key = settings.tls_cert, settings.tls_key
    if cert is None:
        if key is not None:
            raise UsageError("--tls-key needs --tls-cert FILE, the certificate that this key belongs to")
        return
    if CERTIFICATE not in _read("--tls-cert", cert):
        raise UsageError(f"--tls-cert {cert} holds no certificate in PEM ({CERTIFICATE})")
    option, file = ("--tls-cert", cert) if key is None else ("--tls-key", key)
    text = _read(option, file)
    if KEY not in text:
        more = ": give it by --tls-key FILE" if key is None else ""
        raise UsageError(f"{option} {file} holds no private key in PEM{more}")
    if "ENCRYPTED" in text:  # OpenSSL would ask for it in the middle of the start
        raise UsageError(
            f"{option} {file} holds a key under a password, which nobody is there to give: "
            f"take it off by openssl pkey -in {file} -out FILE"
        )
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(
                f"the key in {file} is not that of the certificate in {cert}: with several certificates "
                "in the file the server's own comes first"
            ) from None
        raise UsageError(f"--tls-cert {cert} with the key in {file} cannot be used ({error})") from None


def scheme_of(settings: ServeSettings) -> str:
    """What an address of this server begins with."""
    return "http" if settings.tls_cert is None else "https"


def _read(option: str, file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{option} {file} cannot be read ({error.strerror})") from None
