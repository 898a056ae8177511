"""What passes between an engine and its ranks, as msgpack: plans out, results, phases and faults back.

Knows: the wire form of each. Refuses to know: how bytes travel (`engine.comm`), what a plan means.

Columns, not one object per row. Short ones are msgpack lists: 256 integers take 0.7 µs to write and 1.6 to read, as
int32 bytes by `array` 3.2 and 0.8. Prompts, which can be long, are int32 bytes: they are read four times faster.

A plan is sent as a difference from the one before: steady decode repeats rows, counts and samples and takes a dozen
bytes. So a decoder must see every plan of its encoder, in order.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from engine.core.plan import AdmittedRow, ExecutionPlan, StepResult
from engine.core.request import TokenLogprobs
from engine.core.sampling_params import SamplingParams


class MessageError(Exception):
    """Bytes that are no message of the kind they claim to be."""


class Kind(enum.IntEnum):
    """One byte per message kind, below 64. Engine to ranks: PLAN, STOP and the calls; to the engine: the rest, ENDED by
    who watches the rank's process.
    """

    PLAN = 1
    STOP = 2
    ALLOCATE_KV = 3
    WARM_UP = 4
    PHASE = 17
    LOADED = 18
    DONE = 19
    FAULT = 20
    ENDED = 21


class SampledTokens(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Tokens that the last stage sampled in earlier plans, for ranks that did not see them: rows and ids, int32."""

    rows: bytes = b""
    token_ids: bytes = b""


class _WireRow(msgspec.Struct, array_like=True, gc=False):
    row: int
    generation: int
    request_id: str
    token_ids: bytes
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: list[bytes]
    params: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]


class _WirePlan(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """`is_same`: rows, counts and samples are those of the plan before."""

    step_id: int
    is_same: bool
    rows: list[int] = []
    num_scheduled: list[int] = []
    samples: list[bool] = []
    admits: list[_WireRow] = []
    new_blocks: list[tuple[int, int, list[int]]] = []
    released: list[int] = []
    sampled: SampledTokens | None = None


class _WireResult(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    step_id: int
    device_seconds: float
    rows: bytes
    token_ids: bytes
    flags: bytes = b""
    logprobs: list[TokenLogprobs | None] | None = None


class PhaseReport(msgspec.Struct, array_like=True, frozen=True):
    """Where a rank is on its way to serving; `fraction` is 0 to 1 within the phase."""

    rank: int
    phase: str
    fraction: float = 0.0
    detail: str = ""


class LoadedReport(msgspec.Struct, array_like=True, frozen=True):
    """A rank has its weights: what it holds, and what of its device is left for KV, in bytes."""

    rank: int
    weight_bytes: int
    budget_bytes: int
    kv_dtype: str
    dtype: str
    device_name: str


class DoneReport(msgspec.Struct, array_like=True, frozen=True):
    """A rank has done what it was called to do."""

    rank: int
    call: int


class FaultReport(msgspec.Struct, array_like=True, frozen=True):
    """Why a rank cannot go on. `message` is one line; `does_not_fit` tells a want of memory from other faults."""

    rank: int
    phase: str
    error_type: str
    message: str
    hint: str = ""
    does_not_fit: bool = False
    is_echo: bool = False
    """The fault is another rank's: this one waited for it in vain."""


class EndedReport(msgspec.Struct, array_like=True, frozen=True):
    """The process of a rank is gone. `how` is what to say of it: by which signal, with which code."""

    rank: int
    how: str


Report = PhaseReport | LoadedReport | DoneReport | FaultReport | EndedReport

_REPORTS: dict[Kind, type[Any]] = {
    Kind.PHASE: PhaseReport,
    Kind.LOADED: LoadedReport,
    Kind.DONE: DoneReport,
    Kind.FAULT: FaultReport,
    Kind.ENDED: EndedReport,
}
_KINDS = {report: kind for kind, report in _REPORTS.items()}
_ENCODER = msgspec.msgpack.Encoder()
_PLANS = msgspec.msgpack.Decoder(_WirePlan)
_RESULTS = msgspec.msgpack.Decoder(_WireResult)
_REPORT_DECODERS = {kind: msgspec.msgpack.Decoder(report) for kind, report in _REPORTS.items()}


def pack_ints(values: Iterable[int]) -> bytes:
    """Write integers below 2^31 as int32."""
    return array("i", values).tobytes()


def unpack_ints(data: bytes) -> list[int]:
    """Read what `pack_ints` wrote."""
    values = array("i")
    values.frombytes(data)
    return values.tolist()


class PlanEncoder:
    """Writes plans as differences."""

    def __init__(self) -> None:
        self._last: tuple[list[int], list[int], list[bool]] | None = None

    def encode(self, plan: ExecutionPlan, sampled: SampledTokens | None = None) -> bytes:
        """Encode the next plan, and tokens that the ranks are to append before they run it."""
        shape = (plan.rows, plan.num_scheduled, plan.samples)
        wire = _WirePlan(plan.step_id, shape == self._last)
        if not wire.is_same:
            self._last = (plan.rows.copy(), plan.num_scheduled.copy(), plan.samples.copy())
            wire.rows, wire.num_scheduled, wire.samples = shape
        if plan.admits:
            wire.admits = [_to_wire(row) for row in plan.admits]
        wire.new_blocks, wire.released = plan.new_blocks, plan.released
        if sampled is not None and sampled.rows:
            wire.sampled = sampled
        return _ENCODER.encode(wire)


class PlanDecoder:
    """Reads what one PlanEncoder wrote, every plan of it."""

    def __init__(self) -> None:
        self._last: tuple[list[int], list[int], list[bool]] = ([], [], [])

    def decode(self, body: bytes) -> tuple[ExecutionPlan, list[tuple[int, int]]]:
        """Decode the next plan; returns it and the (row, token) pairs to append first. Raises: MessageError."""
        try:
            wire = _PLANS.decode(body)
            if not wire.is_same:
                self._last = (wire.rows, wire.num_scheduled, wire.samples)
            rows, counts, samples = self._last
            plan = ExecutionPlan(
                wire.step_id,
                rows,
                counts,
                samples,
                [_from_wire(row) for row in wire.admits],
                wire.new_blocks,
                wire.released,
            )
            sampled = wire.sampled
            pairs = zip(unpack_ints(sampled.rows), unpack_ints(sampled.token_ids), strict=True) if sampled else ()
            return plan, list(pairs)
        except (msgspec.DecodeError, ValueError) as error:
            raise MessageError(f"not a plan: {error}") from error


def _to_wire(row: AdmittedRow) -> _WireRow:
    return _WireRow(
        row.row,
        row.generation,
        row.request_id,
        pack_ints(row.token_ids),
        row.num_prompt_tokens,
        row.num_computed_tokens,
        [pack_ints(ids) for ids in row.block_ids],
        row.params,
        row.seed,
        row.stop_token_ids,
    )


def _from_wire(wire: _WireRow) -> AdmittedRow:
    return AdmittedRow(
        wire.row,
        wire.generation,
        wire.request_id,
        unpack_ints(wire.token_ids),
        wire.num_prompt_tokens,
        wire.num_computed_tokens,
        tuple(unpack_ints(ids) for ids in wire.block_ids),
        wire.params,
        wire.seed,
        wire.stop_token_ids,
    )


def encode_result(result: StepResult) -> bytes:
    """Encode one step's outcome."""
    return _ENCODER.encode(
        _WireResult(
            result.step_id,
            result.device_seconds,
            pack_ints(result.rows),
            pack_ints(result.token_ids),
            bytes(result.flags) if any(result.flags) else b"",
            result.logprobs,
        )
    )


def decode_result(body: bytes) -> StepResult:
    """Decode what `encode_result` wrote. Raises: MessageError."""
    try:
        wire = _RESULTS.decode(body)
        rows = unpack_ints(wire.rows)
        flags: Sequence[int] = wire.flags or bytes(len(rows))
        tokens = unpack_ints(wire.token_ids)
        return StepResult(wire.step_id, rows, tokens, list(flags), wire.logprobs, wire.device_seconds)
    except (msgspec.DecodeError, ValueError) as error:
        raise MessageError(f"not a result: {error}") from error


def encode_report(report: Report) -> tuple[Kind, bytes]:
    """Encode what a rank tells of itself."""
    return _KINDS[type(report)], _ENCODER.encode(report)


def decode_report(kind: int, body: bytes) -> Report:
    """Decode what `encode_report` wrote. Raises: MessageError."""
    try:
        report: Report = _REPORT_DECODERS[Kind(kind)].decode(body)
    except (msgspec.DecodeError, ValueError, KeyError) as error:
        raise MessageError(f"not a report of kind {kind}: {error}") from error
    return report
