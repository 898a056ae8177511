"""Node hosts on nodes that were started by hand and joined: ordered and received over the API process's desk.

Knows: what the desk is asked and what it says. Refuses to know: how nodes join (`engine.node_desk`), what hosts do.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Sequence
from queue import Empty, SimpleQueue

import msgspec

from engine.comm.node_listener import NodeArrival
from engine.comm.node_messages import Came, DeskMessage, NodeNews, Wanted
from engine.comm.secure_link import LinkLost, SecureLink
from engine.config import EngineConfig
from engine.executor.base import ExecutorError
from engine.executor.node_starter import LostCallback, NodeOrder

_MESSAGES = msgspec.msgpack.Decoder(DeskMessage)
_MAX_MESSAGE_BYTES = 128 << 10


class JoinStarter:
    """Orders hosts over `channel`, the core's end of a way to the desk; see `NodeStarter`. Owns the channel."""

    def __init__(self, channel: socket.socket, config: EngineConfig) -> None:
        self._channel = channel
        self._config = config
        self._arrivals: SimpleQueue[NodeArrival | None] = SimpleQueue()
        self._joined: dict[str, str] = {}
        self._came: set[str] = set()
        self._on_lost: LostCallback = lambda node, why: None
        self._thread = threading.Thread(target=self._listen, name="desk", daemon=True)
        self._is_stopped = False

    def start(self, orders: Sequence[NodeOrder], on_lost: LostCallback) -> None:
        """See `NodeStarter.start`."""
        self._on_lost = on_lost
        self._thread.start()
        try:
            self._channel.send(msgspec.msgpack.encode(Wanted([(order.node, order.order_id) for order in orders])))
        except OSError as error:
            raise ExecutorError(f"the desk for other nodes is gone: {error.strerror}") from error

    def accept(self, timeout_seconds: float) -> NodeArrival | None:
        """See `NodeStarter.accept`."""
        with contextlib.suppress(Empty):
            return self._arrivals.get(timeout=timeout_seconds)
        return None

    def advice(self, node: str) -> str:
        """See `NodeStarter.advice`."""
        if node in self._joined:
            return f"{node} has joined from {self._joined[node]}, its ranks are being started"
        config = self._config
        names = config.nodes.names
        where = f"{config.nodes.head_host}:{config.nodes.head_port}"
        rank = names.index(node)
        return (
            f"run on it: hlaunch up {config.served_name} --nnodes {len(names)} --node-rank {rank} --head-addr {where}"
        )

    def stop(self) -> None:
        """See `NodeStarter.stop`."""
        if self._is_stopped:
            return
        self._is_stopped = True
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join(2.0)
        self._channel.close()
        with contextlib.suppress(Empty):
            while (left := self._arrivals.get_nowait()) is not None:
                left.link.dispose()

    def _listen(self) -> None:
        with contextlib.suppress(OSError, msgspec.DecodeError):
            while True:
                body, fds, _, _ = socket.recv_fds(self._channel, _MAX_MESSAGE_BYTES, 1)
                if not body:
                    return
                message = _MESSAGES.decode(body)
                if isinstance(message, Came) and fds:
                    self._came.add(message.hello.node)
                    with contextlib.suppress(LinkLost):  # it died on its way here: the desk will say so
                        self._arrivals.put(_arrival(message, fds[0]))
                elif isinstance(message, NodeNews):
                    self._hear(message)
                for fd in fds[1:]:
                    os.close(fd)

    def _hear(self, news: NodeNews) -> None:
        if not news.lost:
            self._joined[news.node] = news.hostname
            return
        if not news.is_host:
            self._joined.pop(news.node, None)
        # A node that leaves before its host has come may come again, and is waited for.
        if not self._is_stopped and (news.is_host or news.node in self._came):
            self._on_lost(news.node, news.lost)


def _arrival(message: Came, fd: int) -> NodeArrival:
    return NodeArrival(SecureLink(socket.socket(fileno=fd), message.link), message.hello)
