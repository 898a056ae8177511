"""The head's desk for nodes that join by themselves: one address at which they come in, whichever engine needs them.

Knows: which nodes are here, which engine waits for which. Refuses to know: ranks, plans, why an engine ends. It lives
in the API process, which outlasts its engines: a node stays joined while an engine is started again.

    node agent ──TCP──▶ desk ◀──AF_UNIX── engine core       orders one way, news the other
    node host  ──TCP──▶ desk ──descriptor──▶ engine core     the desk authenticates it, and hands its connection over
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from dataclasses import dataclass, field

import msgspec

from engine.comm.node_listener import NodeArrival, NodeListener, refuse
from engine.comm.node_messages import (
    Came,
    DeskMessage,
    Ended,
    NodeFacts,
    NodeKind,
    NodeNews,
    Order,
    Refusal,
    Wanted,
    Welcome,
    check_facts,
    decode,
    encode,
    own_facts,
)
from engine.comm.secure_link import LinkRefused, NodeLinkError, SecureLink
from engine.config import ConfigError, EngineConfig
from engine.model_digest import digest_of
from engine.node_secret import SecretError, read_secret
from engine.placement import Placement
from engine.process import say

MAX_MESSAGE_BYTES = 128 << 10
_MESSAGES = msgspec.msgpack.Decoder(DeskMessage)


@dataclass(slots=True)
class _Node:
    """A node that has joined."""

    name: str
    hostname: str
    link: SecureLink


@dataclass(slots=True)
class _Channel:
    """The way to one engine core. `orders` are order ids by node."""

    engine: int
    socket: socket.socket
    orders: dict[str, str] = field(default_factory=dict)


class NodeDesk:
    """Open from construction to `close`. Its threads are its own; every method may be called from any thread.

    Raises: ConfigError when there is no secret, or the address is not this node's or is taken.
    """

    def __init__(self, config: EngineConfig, facts: NodeFacts | None = None) -> None:
        nodes = config.nodes
        self._names = nodes.names[1:]
        self._model = config.served_name
        self._engines = _engines_by_node(config)
        self._config = config
        self._facts = facts
        self._silence = nodes.silence_seconds
        self._lock = threading.Lock()
        self._nodes: dict[str, _Node] = {}
        self._channels: list[_Channel] = []
        self._is_closed = False
        try:
            self._listener = NodeListener(nodes.head_host, nodes.head_port, read_secret(os.environ))
        except SecretError as error:
            raise ConfigError("nodes", str(error), error.hint) from error
        except OSError as error:
            where = f"{nodes.head_host}:{nodes.head_port}"
            raise ConfigError(
                "head-addr",
                f"cannot listen on {where} for other nodes: {str(error.strerror).partition(' (while')[0]}",
                "it must be an address of this node, with a free port",
            ) from error
        threading.Thread(target=self._receive, name="node desk", daemon=True).start()

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def joined(self) -> tuple[str, ...]:
        """Names of the nodes that are here."""
        with self._lock:
            return tuple(self._nodes)

    def open_channel(self, engine: int) -> socket.socket:
        """Make a way for an engine's core; returns the core's end, to be inherited by it and closed here."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        channel = _Channel(engine, ours)
        with self._lock:
            self._channels.append(channel)
        threading.Thread(target=self._serve, args=(channel,), name=f"desk of engine {engine}", daemon=True).start()
        return theirs

    def close(self) -> None:
        """Tell all nodes that it is over, and stop listening. Idempotent."""
        with self._lock:
            self._is_closed = True
            nodes, channels = list(self._nodes.values()), list(self._channels)
        for node in nodes:
            with contextlib.suppress(NodeLinkError):
                node.link.send(NodeKind.GOODBYE)
        self._listener.close()
        for node in nodes:
            node.link.close()
        for channel in channels:
            with contextlib.suppress(OSError):
                channel.socket.shutdown(socket.SHUT_RDWR)

    # Who comes in at the door.

    def _receive(self) -> None:
        # Samples of the weights are read beside this: a node that comes before they are is kept, not taken in.
        threading.Thread(target=self._read_facts, name="model digest", daemon=True).start()
        early: list[NodeArrival] = []
        while not self._is_closed:
            arrival = self._listener.accept(0.1 if self._facts is None else 1.0)
            facts = self._facts
            if facts is not None:
                for one in early:
                    self._take_in(one, facts)
                early.clear()
            if arrival is None:
                continue
            if arrival.hello.order_id:
                self._hand_over(arrival)
            elif facts is not None:
                self._take_in(arrival, facts)
            else:
                # The node is not to take our reading for silence.
                arrival.link.start_heartbeat()
                early.append(arrival)
        for arrival in early:
            arrival.link.dispose()

    def _read_facts(self) -> None:
        if self._facts is None:
            self._facts = own_facts(digest_of(self._config.model, self._config.load_format))

    def _hand_over(self, arrival: NodeArrival) -> None:
        """Give a host's connection to the engine that ordered it."""
        hello = arrival.hello
        with self._lock:
            wanting = (one for one in self._channels if one.orders.get(hello.node) == hello.order_id)
            channel = next(wanting, None)
        if channel is None:
            return refuse(arrival.link, Refusal(f"no host of {hello.node} is wanted for this run of the engine"))
        fd, state = arrival.link.detach()
        try:
            with contextlib.suppress(OSError):  # the core is gone; the host will notice the same
                socket.send_fds(channel.socket, [msgspec.msgpack.encode(Came(hello, state))], [fd])
        finally:
            os.close(fd)

    def _take_in(self, arrival: NodeArrival, facts: NodeFacts) -> None:
        """Let a node join, or say why not."""
        hello, link = arrival.hello, arrival.link
        node = _Node(hello.node, hello.facts.hostname or link.peer, link)
        hint = "the same --nnodes on all nodes, and a --node-rank of its own for each"
        try:
            if hello.node not in self._names:
                raise LinkRefused(f"no node is called {hello.node}; expected: {', '.join(self._names)}")
            hint = "the same hlaunch, torch, model files and NCCL settings on all nodes"
            check_facts(facts, hello.node, hello.facts)
        except LinkRefused as error:
            _say(f"{link.peer} cannot join: {error}")
            return refuse(link, Refusal(str(error), hint))
        with self._lock:
            there = self._nodes.get(hello.node)
        if there is not None:
            text = f"{hello.node} has joined already, from {there.hostname} ({there.link.peer})"
            # That one may be dead and not yet known to be.
            return refuse(link, Refusal(text, "give each node its own --node-rank", is_final=False))
        link.allow_silence(self._silence)
        link.start_heartbeat()
        try:
            # Before a core can find the node here: its welcome comes before any order.
            link.send(NodeKind.WELCOME, encode(Welcome(self._engines.get(node.name, ()), self._model)))
        except NodeLinkError:
            return link.dispose()
        with self._lock:
            if self._is_closed:
                return link.dispose()
            self._nodes[hello.node] = node
            waiting = [(channel, order) for channel in self._channels if (order := channel.orders.get(node.name))]
        threading.Thread(target=self._listen, args=(node,), name=f"node {node.name}", daemon=True).start()
        _say(f"{node.name} joined from {node.hostname} ({link.peer})")
        for channel, order_id in waiting:
            self._tell(channel, NodeNews(node.name, node.hostname))
            with contextlib.suppress(NodeLinkError):
                link.send(NodeKind.ORDER, encode(Order(channel.engine, order_id)))
        return None

    def _listen(self, node: _Node) -> None:
        """Hear a node until it leaves or is lost."""
        how = "it was stopped there"
        try:
            while True:
                frame = node.link.receive()
                if frame is None:
                    continue
                kind, body = frame
                if kind == NodeKind.GOODBYE:
                    break
                if kind == NodeKind.ENDED:
                    ended = decode(body, Ended)
                    self._news(node, ended.how, ended.order_id)
        except NodeLinkError as error:
            how = str(error)
        with self._lock:
            if self._nodes.get(node.name) is node:
                del self._nodes[node.name]
        if not self._is_closed:
            _say(f"{node.name} left: {how}")
        self._news(node, how)
        node.link.dispose()

    def _news(self, node: _Node, lost: str, order_id: str = "") -> None:
        """Tell the engines that have ordered a host on a node what became of it."""
        with self._lock:
            concerned = [
                channel
                for channel in self._channels
                if (found := channel.orders.get(node.name)) and order_id in ("", found)
            ]
        for channel in concerned:
            self._tell(channel, NodeNews(node.name, "", lost, bool(order_id)))

    # What engines want.

    def _serve(self, channel: _Channel) -> None:
        """Hear one core until it is gone; then its hosts are wanted no longer."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            while body := channel.socket.recv(MAX_MESSAGE_BYTES):
                message = _MESSAGES.decode(body)
                if isinstance(message, Wanted):
                    self._order(channel, message)
        with self._lock:
            self._channels.remove(channel)
            cancelled = [(self._nodes.get(name), order_id) for name, order_id in channel.orders.items()]
            channel.orders = {}
        for node, order_id in cancelled:
            if node is not None:
                with contextlib.suppress(NodeLinkError):
                    node.link.send(NodeKind.CANCEL, encode(Order(channel.engine, order_id)))
        channel.socket.close()

    def _order(self, channel: _Channel, message: Wanted) -> None:
        with self._lock:
            channel.orders = dict(message.orders)
            here = [(node, order) for name, order in message.orders if (node := self._nodes.get(name)) is not None]
        for node, order_id in here:
            self._tell(channel, NodeNews(node.name, node.hostname))
            with contextlib.suppress(NodeLinkError):
                node.link.send(NodeKind.ORDER, encode(Order(channel.engine, order_id)))

    @staticmethod
    def _tell(channel: _Channel, news: NodeNews) -> None:
        with contextlib.suppress(OSError):
            channel.socket.send(msgspec.msgpack.encode(news))


def _engines_by_node(config: EngineConfig) -> dict[str, tuple[int, ...]]:
    if not config.placement:
        return {}
    placement = Placement.from_json(config.placement)
    return {name: tuple(sorted({rank.dp_rank for rank in placement.on_node(name)})) for name in config.nodes.names}


def _say(line: str) -> None:
    say(f"nodes: {line}")
