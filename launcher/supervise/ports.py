"""Is the port free? Asked before the engine starts, because the answer then names who has it.

Refuses to know: keeping the port; the engine binds it itself a moment later and reports a lost race as its own failure.
"""

from __future__ import annotations

import errno
import socket

from launcher.errors import PreflightError
from launcher.supervise import procfs

_MAX_COMMAND = 120


def check_port(host: str, port: int) -> None:
    """Bind and release `host:port`.

    Raises: PreflightError in one line of cause and fix: port in use (with its owner), no such address, no right.
    """
    try:
        candidates = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise PreflightError(
            f"host {host} is not known: {error.strerror}", hint="set host to an address of this machine"
        ) from error
    for family, kind, protocol, _, address in candidates[:1]:
        with socket.socket(family, kind, protocol) as probe:
            # As servers do: sockets in TIME_WAIT are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
                probe.listen(1)
            except OSError as error:
                message, hint = _cause(host, port, error)
                raise PreflightError(message, hint=hint) from error


def free_port(host: str) -> int:
    """Let the kernel choose a port that is free now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host.strip("[]"), 0))
        port: int = probe.getsockname()[1]
        return port


def _cause(host: str, port: int, error: OSError) -> tuple[str, str]:
    """Say why a port cannot be had, and what to do."""
    if error.errno == errno.EADDRINUSE:
        from launcher.redaction import Redaction

        pid = procfs.listener_of(port)
        owner = " by another process"
        if pid is not None:
            # Cut when its secrets are out: half of one is none that can be told.
            command = Redaction().line(procfs.command_line(pid))[:_MAX_COMMAND].strip()
            owner = f" by pid {pid}" + (f" ({command})" if command else "")
        return f"port {port} on {host} is in use{owner}", "stop that, or choose another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} needs privileges", "choose one above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"host {host} is not an address of this machine", "set host to 127.0.0.1, 0.0.0.0 or one of its own"
    return f"port {port} on {host} cannot be used: {error.strerror}", "choose another with --port"
