"""Who may talk to this server: keys, and the Host and Origin of browsers.

Knows: the public routes, the digests of the keys, which host names a DNS-rebinding page cannot use. Decides on
`scope["path"]` only and denies by default: a route is behind the key unless it is on the public list.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket

from engine.config import ServerConfig
from engine.server import errors
from engine.server.http import Exchange

PUBLIC_PATHS = frozenset({"/", "/live", "/ready", "/health", "/version"})
_SAFE_METHODS = frozenset({"GET", "HEAD"})


class Guard:
    """Admits or refuses an exchange before any route sees it."""

    def __init__(self, config: ServerConfig) -> None:
        self._digests = [bytes.fromhex(digest) for digest in config.api_key_sha256]
        self._own_names = {config.host.lower(), socket.gethostname().lower()}

    def check(self, exchange: Exchange) -> None:
        """Raise ApiError 400, 401 or 403 unless the exchange may go on."""
        host = exchange.headers.get(b"host", b"")
        if not host:
            raise errors.invalid_value(None, "The Host header is missing.")
        if not self._digests:
            self._check_browser(host, exchange.headers.get(b"origin"))
            return
        if exchange.path in PUBLIC_PATHS and exchange.method in _SAFE_METHODS:
            return
        exchange.tenant = self._tenant(exchange)
        if not exchange.tenant:
            raise errors.invalid_api_key()

    def _tenant(self, exchange: Exchange) -> str:
        """Return the digest of the valid key in `Authorization: Bearer` or `x-api-key`, or nothing; constant time."""
        scheme, _, credential = exchange.headers.get(b"authorization", b"").partition(b" ")
        bearer = credential.strip() if scheme.lower() == b"bearer" else b""
        plain = exchange.headers.get(b"x-api-key", b"").strip()
        tenant = ""
        for offered in (bearer, plain):
            digest = hashlib.sha256(offered).digest()
            for expected in self._digests:
                # No early exit: the time must not tell which key came close.
                if hmac.compare_digest(digest, expected) and offered != b"":
                    tenant = expected.hex()
        return tenant

    def _check_browser(self, host: bytes, origin: bytes | None) -> None:
        """Without keys, refuse what a web page could send: a rebound DNS name as Host, or a foreign Origin."""
        name = host_name(host)
        if not self._is_local_name(name):
            raise errors.forbidden(
                "host_not_allowed", "This Host is not served without an API key (protection against DNS rebinding)."
            )
        if origin is None:
            return
        scheme, separator, authority = origin.partition(b"://")
        if not separator or scheme not in (b"http", b"https") or not self._is_same_place(authority, name):
            raise errors.forbidden("origin_not_allowed", "Requests from this Origin need an API key.")

    def _is_same_place(self, authority: bytes, host: str) -> bool:
        name = host_name(authority)
        return name == host or _is_loopback(name)

    def _is_local_name(self, name: str) -> bool:
        # A page can only rebind a name of public DNS, so addresses, single labels and local suffixes are safe.
        if name in self._own_names or _is_address(name):
            return True
        if not name or not all(c.isalnum() or c in "-_." for c in name):
            return False
        return "." not in name or name.endswith((".localhost", ".local", ".internal"))


def host_name(authority: bytes) -> str:
    """Return the lower-case name or address in `name:port`, `[v6]:port` or `name`; empty when malformed."""
    text = authority.decode("latin-1").strip().lower()
    if text.startswith("["):
        address, bracket, rest = text[1:].partition("]")
        return address if bracket and (not rest or _is_port(rest)) else ""
    name, colon, port = text.partition(":")
    if colon and not _is_port(":" + port):
        return ""
    return name.removesuffix(".")


def _is_port(text: str) -> bool:
    return text.startswith(":") and (text == ":" or (text[1:].isascii() and text[1:].isdigit() and len(text) <= 6))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
