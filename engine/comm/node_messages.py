"""What the head of an engine and the hosts of its ranks on other nodes tell each other, as msgpack.

Knows: the wire form of each message, and who a node says it is. Refuses to know: plans, results and reports, whose
bytes pass through as `engine.executor.messages` wrote them.
"""

from __future__ import annotations

import enum
import importlib.metadata
import os
import platform
import socket
from typing import TypeVar

import msgspec

from engine.comm import fabric_variables
from engine.comm.board import RankState
from engine.comm.rdma_traffic import RdmaTraffic
from engine.comm.secure_link import LinkRefused, LinkState

T = TypeVar("T")
MAX_HELLO_BYTES = 16 << 10
"""The first frame of a node is small; more is not looked at."""


class NodeKind(enum.IntEnum):
    """One byte per message kind; below 64 are the kinds of `engine.executor.messages`, passed through as they are.

    Host to head: HELLO, PREPARED, RESULT, STATES, USAGE and reports. Head to host: PREPARE, START, STATES, STACKS,
    GOODBYE, plans and calls. Between the head and a node that joined: ORDER and CANCEL one way, ENDED the other,
    GOODBYE both.
    """

    HELLO = 64
    WELCOME = 65
    REFUSED = 66
    PREPARE = 67
    PREPARED = 68
    START = 69
    RESULT = 70
    STATES = 71
    STACKS = 72
    USAGE = 73
    ORDER = 80
    CANCEL = 81
    ENDED = 82
    GOODBYE = 83


class NodeFacts(msgspec.Struct, frozen=True, omit_defaults=True):
    """What must be the same on all nodes, and what people call this one."""

    hostname: str = ""
    hlaunch: str = ""
    python: str = ""
    torch: str = ""
    nccl: str = ""
    """Empty where there is none: a node of CPU ranks."""
    model_digest: str = ""
    """SHA-256 of the model's configuration and weights, as `engine.model_digest` takes it; "" is unknown."""
    fabric: dict[str, str] = {}
    """What it has set of `engine.comm.fabric_variables`."""
    has_gpus: bool = False


class Hello(msgspec.Struct, frozen=True, omit_defaults=True):
    """The first frame: which node this is. `order_id` is set by the host of one engine's ranks, and not by a node that
    joins and waits for orders.
    """

    node: str
    order_id: str = ""
    facts: NodeFacts = NodeFacts()


class Welcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """A node has joined: the engines that have ranks on it, and what the head serves."""

    engines: tuple[int, ...]
    model: str = ""


class Refusal(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why the head does not take a node in: one line, and the fix."""

    message: str
    hint: str = ""
    is_final: bool = True
    """Trying again would not help."""


class Order(msgspec.Struct, frozen=True):
    """Run a host for the ranks of an engine; `order_id` is what it is to say in its hello."""

    engine: int
    order_id: str


class Ended(msgspec.Struct, frozen=True):
    """A host that was ordered is gone, and how."""

    order_id: str
    how: str


class Wanted(msgspec.Struct, frozen=True, tag=True):
    """Core to desk: the hosts that an engine needs, as (node, order id)."""

    orders: list[tuple[str, str]]


class Came(msgspec.Struct, frozen=True, tag=True):
    """Desk to core, with a descriptor: a host has come, and where its link stands."""

    hello: Hello
    link: LinkState


class NodeNews(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Desk to core: a node has joined as `hostname`, or is gone, or only its host of this engine (`lost` says how)."""

    node: str
    hostname: str = ""
    lost: str = ""
    is_host: bool = False


DeskMessage = Wanted | Came | NodeNews


class Prepare(msgspec.Struct, frozen=True):
    """What a host is to run: the engine's configuration and placement as JSON, and which engine of it."""

    config: str
    placement: str
    engine: int


class Prepared(msgspec.Struct, frozen=True, omit_defaults=True):
    """The host has made what its ranks share. `store` is where ranks of several nodes meet, from who keeps it."""

    store: tuple[str, int] | None = None


class Start(msgspec.Struct, frozen=True, omit_defaults=True):
    """Spawn the ranks; `store` is what the keeper's host said."""

    store: tuple[str, int] | None = None


class RankStates(msgspec.Struct, frozen=True, omit_defaults=True):
    """What each rank of a node does and holds, and what keeps its process from running, for how long, if anything does.

    `traffic` is the node's; None where it has no RDMA port, or was not asked.
    """

    ranks: list[tuple[RankState, str, float]]
    traffic: RdmaTraffic | None = None


def own_facts(model_digest: str = "") -> NodeFacts:
    """Tell this node's versions and settings. Imports nothing heavy."""
    return NodeFacts(
        hostname=socket.gethostname(),
        hlaunch=_version_of("hlaunch"),
        python=platform.python_version(),
        torch=_version_of("torch"),
        nccl=_version_of("nvidia-nccl-cu13") or _version_of("nvidia-nccl-cu12"),
        model_digest=model_digest,
        fabric=fabric_variables.own_values(os.environ),
        has_gpus=fabric_variables.has_gpus(),
    )


def check_facts(ours: NodeFacts, node: str, theirs: NodeFacts) -> None:
    """Hold a node's versions, model and fabric against the head's. Raises: LinkRefused naming what differs, where."""
    for what, one, other in (
        ("hlaunch", ours.hlaunch, theirs.hlaunch),
        # Patch releases of Python speak the same: nothing of Python's own travels.
        ("Python", _minor(ours.python), _minor(theirs.python)),
        ("torch", ours.torch, theirs.torch),
    ):
        if one != other:
            raise LinkRefused(f"{node} ({theirs.hostname}) has {what} {other or 'none'}, the head {one or 'none'}")
    if ours.nccl and theirs.nccl and ours.nccl != theirs.nccl:
        raise LinkRefused(f"{node} ({theirs.hostname}) has NCCL {theirs.nccl}, the head {ours.nccl}")
    if ours.model_digest and theirs.model_digest and ours.model_digest != theirs.model_digest:
        raise LinkRefused(
            f"{node} ({theirs.hostname}) has other weights: its model's digest is {theirs.model_digest[:12]}, "
            f"the head's {ours.model_digest[:12]}"
        )
    both_have_gpus = ours.has_gpus and theirs.has_gpus
    if found := fabric_variables.first_difference(ours.fabric, theirs.fabric, both_have_gpus=both_have_gpus):
        name, *values = found
        head, there = ("unset" if value is None else f"= {value}" for value in values)
        raise LinkRefused(
            f"{node} ({theirs.hostname}) has {name} {there}, the head ({ours.hostname}) {head}; "
            "ranks on several nodes must read it alike"
        )


def encode(message: msgspec.Struct) -> bytes:
    """Write a message's body."""
    return msgspec.msgpack.encode(message)


def decode(body: bytes, kind: type[T]) -> T:
    """Read a message's body. Raises: LinkRefused when it is anything else."""
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise LinkRefused(f"not a {kind.__name__}: {error}") from error


def read_hello(frame: tuple[int, bytes] | None) -> Hello:
    """Read a node's first frame. Raises: LinkRefused when it is late or anything else."""
    if frame is None:
        raise LinkRefused("a node proved the secret and then said nothing")
    kind, body = frame
    if kind != NodeKind.HELLO or len(body) > MAX_HELLO_BYTES:
        raise LinkRefused(f"a node's first frame is of kind {kind} with {len(body)} bytes, not its hello")
    hello = decode(body, Hello)
    if not hello.node or len(hello.node) > 255 or not hello.node.isprintable():
        raise LinkRefused(f"a node calls itself {hello.node[:40]!r}")
    facts = hello.facts
    versions = (facts.hostname, facts.hlaunch, facts.python, facts.torch, facts.nccl, facts.model_digest)
    for said in (hello.order_id, *versions, *facts.fabric, *facts.fabric.values()):
        # These reach logs and terminals.
        if len(said) > 255 or not said.isprintable():
            raise LinkRefused(f"{hello.node} says {said[:40]!r} of itself")
    return hello


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
