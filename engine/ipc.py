"""The wire between the API process and the engine core: length-prefixed msgpack over an AF_UNIX socket pair.

Frame: `u32 length (little-endian) | u8 kind | body`. Bodies are closed msgspec types; nothing else is ever decoded,
and a frame above `MAX_FRAME_BYTES` closes the link.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.core.request import EngineRequest, RequestOutput, SchedulerStats
from engine.usage import EngineUsage

MAX_FRAME_BYTES = 64 << 20
HEADER = struct.Struct("<IB")


class WireError(Exception):
    """A malformed or oversized frame: the peer is not who we think it is."""


class Kind(enum.IntEnum):
    """One byte per message kind. API to core: CONFIG, ADD, ABORT, PING. Core to API: the rest."""

    CONFIG = 0
    ADD = 1
    ABORT = 2
    PING = 3
    PHASE = 16
    READY = 17
    OUTPUTS = 18
    PONG = 19
    FATAL = 20
    USAGE = 21


@dataclass(frozen=True, slots=True)
class PhaseMessage:
    phase: str
    state: str
    fraction: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ReadyMessage:
    """Figures of the engine once it serves; `facts` holds numbers and short strings for people."""

    max_model_len: int
    facts: dict[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FatalMessage:
    phase: str
    error_type: str
    message: str
    hint: str = ""
    exit_code: int = 1


@dataclass(frozen=True, slots=True)
class OutputsMessage:
    """New outputs of one or more steps, in batch order, and the core's gauges."""

    outputs: list[RequestOutput]
    stats: SchedulerStats | None = None


_BODIES: dict[Kind, type[Any]] = {
    Kind.CONFIG: str,
    Kind.ADD: EngineRequest,
    Kind.ABORT: list[str],
    Kind.PING: int,
    Kind.PHASE: PhaseMessage,
    Kind.READY: ReadyMessage,
    Kind.OUTPUTS: OutputsMessage,
    Kind.PONG: OutputsMessage,
    Kind.FATAL: FatalMessage,
    Kind.USAGE: EngineUsage,
}
_DECODERS = {kind: msgspec.msgpack.Decoder(body) for kind, body in _BODIES.items()}
_ENCODER = msgspec.msgpack.Encoder()


def encode(kind: Kind, body: Any) -> bytes:
    """Encode one frame.

    Raises: WireError when the body is larger than a frame may be.
    """
    payload = _ENCODER.encode(body)
    if len(payload) > MAX_FRAME_BYTES:
        raise WireError(f"{kind.name} frame of {len(payload)} bytes is above the limit of {MAX_FRAME_BYTES}")
    return HEADER.pack(len(payload), kind) + payload


def decode_header(header: bytes) -> tuple[int, Kind]:
    """Split a frame header into body length and kind.

    Raises: WireError on an unknown kind or an oversized length.
    """
    length, kind = HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise WireError(f"frame of {length} bytes is above the limit of {MAX_FRAME_BYTES}")
    try:
        return length, Kind(kind)
    except ValueError as error:
        raise WireError(f"unknown frame kind {kind}") from error


def decode(kind: Kind, payload: bytes) -> Any:
    """Decode the body of a frame into its one type.

    Raises: WireError on anything else.
    """
    try:
        return _DECODERS[kind].decode(payload)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise WireError(f"malformed {kind.name} body: {error}") from error
