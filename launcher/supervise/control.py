"""A node's control socket: who asks on it gets the node's status as one JSON line, or every change of it.

Knows: AF_UNIX, one-line questions (`status`, `watch`), slow and rude clients. Refuses to know: what a status says.
The socket lies in a folder of mode 0700, so the file system decides who may ask. Nothing can be changed through it.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.errors import HlaunchError, PreflightError

SOCKET_NAME = "control.sock"
MAX_QUESTION_BYTES = 64
MAX_WAITING_BYTES = 1 << 20
MAX_CLIENTS = 64
_MAX_PATH = 107


class NoAnswer(HlaunchError):
    """Nobody answers on the socket: the node's supervisor does not run."""


class _Client:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.question = b""
        self.waiting = b""
        self.is_watching = False
        self.is_done = False


class ControlServer:
    """Serves the socket from the owner's own event loop: register `fileno`s through `attach`, never a thread."""

    def __init__(self, folder: Path, status: Callable[[], dict[str, Any]]) -> None:
        """Listen in `folder`. Raises: PreflightError when that is not possible."""
        self._status = status
        self._path = folder / SOCKET_NAME
        self._clients: dict[int, _Client] = {}
        self._selector: selectors.BaseSelector | None = None
        make_private_folder(folder)
        if len(os.fsencode(self._path)) > _MAX_PATH:
            raise PreflightError(f"{self._path} is too long for a socket", hint="choose a shorter run folder")
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(str(self._path))
            self._listener.listen(16)
        except OSError as error:
            raise PreflightError(f"{self._path} cannot be made: {error.strerror}") from error
        self._listener.setblocking(False)

    def attach(self, selector: selectors.BaseSelector) -> None:
        """Register with the loop; its events come back through `on_event`."""
        self._selector = selector
        selector.register(self._listener, selectors.EVENT_READ, self)

    def on_event(self, source: socket.socket, mask: int) -> None:
        """Serve one event of the loop."""
        if source is self._listener:
            self._accept()
            return
        client = self._clients.get(source.fileno())
        if client is None:
            return
        try:
            if mask & selectors.EVENT_READ:
                self._read(client)
            if mask & selectors.EVENT_WRITE or client.waiting:
                self._write(client)
        except OSError:
            self._drop(client)

    def publish(self) -> None:
        """Tell every watcher the status as it is now."""
        watchers = [client for client in self._clients.values() if client.is_watching]
        if not watchers:
            return
        line = self._line()
        for client in watchers:
            client.waiting += line
            try:
                self._write(client)
            except OSError:
                self._drop(client)

    def close(self) -> None:
        """Close everything; watchers see the end."""
        for client in list(self._clients.values()):
            with contextlib.suppress(OSError):
                client.connection.setblocking(True)
                client.connection.settimeout(1.0)
                client.connection.sendall(client.waiting)
            self._drop(client)
        if self._selector is not None:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(self._listener)
        self._listener.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _line(self) -> bytes:
        return json.dumps(self._status()).encode() + b"\n"

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, _ = self._listener.accept()
            if len(self._clients) >= MAX_CLIENTS or self._selector is None:
                connection.close()
                return
            connection.setblocking(False)
            client = _Client(connection)
            self._clients[connection.fileno()] = client
            self._selector.register(connection, selectors.EVENT_READ, self)

    def _read(self, client: _Client) -> None:
        data = client.connection.recv(MAX_QUESTION_BYTES + 1)
        if not data:
            self._drop(client)
            return
        client.question += data
        if b"\n" not in client.question:
            if len(client.question) > MAX_QUESTION_BYTES:
                self._drop(client)
            return
        question = client.question.partition(b"\n")[0].strip()
        if question not in (b"status", b"watch"):
            self._drop(client)
            return
        client.waiting += self._line()
        client.is_watching = question == b"watch"
        client.is_done = not client.is_watching

    def _write(self, client: _Client) -> None:
        if client.waiting:
            with contextlib.suppress(BlockingIOError):
                sent = client.connection.send(client.waiting)
                client.waiting = client.waiting[sent:]
        if len(client.waiting) > MAX_WAITING_BYTES or (client.is_done and not client.waiting):
            self._drop(client)
        elif self._selector is not None and client.connection.fileno() in self._clients:
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.waiting else 0)
            self._selector.modify(client.connection, wanted, self)

    def _drop(self, client: _Client) -> None:
        self._clients.pop(client.connection.fileno(), None)
        if self._selector is not None:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(client.connection)
        client.connection.close()


def make_private_folder(folder: Path) -> None:
    """Make a folder of mode 0700 that is ours. Raises: PreflightError when it is somebody else's."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
            raise PreflightError(f"{folder} is not a folder of this user", hint="remove it, or choose another")
        folder.chmod(0o700)
    except OSError as error:
        raise PreflightError(f"{folder} cannot be made: {error.strerror}") from error


def ask(folder: Path, timeout_seconds: float = 3.0) -> dict[str, Any]:
    """Fetch the status once. Raises: NoAnswer."""
    for line in _lines(folder, b"status\n", timeout_seconds):
        return line
    raise NoAnswer(f"{folder}: the node's supervisor closed the connection")


def watch(folder: Path, wait_seconds: float = 0.0) -> Iterator[dict[str, Any]]:
    """Yield the status now and after every change, until the supervisor ends. Blocks.

    Waits up to `wait_seconds` for the socket to appear. Raises: NoAnswer when it does not.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            yield from _lines(folder, b"watch\n", None)
            return
        except NoAnswer:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)


def _lines(folder: Path, question: bytes, timeout_seconds: float | None) -> Iterator[dict[str, Any]]:
    path = folder / SOCKET_NAME
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_seconds if timeout_seconds is not None else 10.0)
        try:
            connection.connect(str(path))
            connection.sendall(question)
        except OSError as error:
            raise NoAnswer(f"no supervisor answers on {path}: {error.strerror or error}") from error
        connection.settimeout(timeout_seconds)
        with connection.makefile("rb") as lines:
            try:
                for line in lines:
                    loaded = json.loads(line)
                    if isinstance(loaded, dict):
                        yield loaded
            except (OSError, ValueError) as error:
                raise NoAnswer(f"{path}: {error}") from error
