"""The process of one rank: `python -m engine.executor.multiproc_rank --fd N --parent PID`.

It reads its setup from the socket it was given, loads its share of the model, and runs plans from the ring until it is
told to stop, its engine is gone, or something breaks: then it says what, and ends.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import msgspec

from engine.comm.board import BoardLine
from engine.comm.ends import Rendezvous
from engine.comm.ring import RingClosed, RingReader, RingWriter
from engine.comm.segment import Segment
from engine.config import EngineConfig, ModelConfig
from engine.core.plan import ExecutionPlan, StepResult
from engine.executor.messages import (
    DoneReport,
    FaultReport,
    Kind,
    LoadedReport,
    PhaseReport,
    PlanDecoder,
    Report,
    encode_report,
    encode_result,
)
from engine.executor.multiproc_wiring import RankSetup
from engine.executor.rank_answers import Answers, PendingStep
from engine.executor.steps_under_way import StepsUnderWay
from engine.placement import Placement, RankSpec
from engine.process import Repeating, die_with_parent, dump_stacks_on_signal, say_trace
from engine.usage import USAGE_INTERVAL_SECONDS, DeviceUsage

if TYPE_CHECKING:
    from engine.comm.ranks import RankLinks

FRAME = struct.Struct("<IB")
EXIT_FAILED = 1


class RankWorker(Protocol):
    """What this process drives; `engine.worker.worker.Worker` is one."""

    weight_bytes: int
    device_name: str

    @property
    def kv_dtype_name(self) -> str: ...

    @property
    def dtype_name(self) -> str: ...

    def load(self, progress: Callable[[float, str], None]) -> None: ...

    def available_memory(self) -> int: ...

    def allocate_kv(self, num_blocks: int) -> None: ...

    def warm_up(self) -> None: ...

    def usage(self) -> DeviceUsage: ...

    def append_tokens(self, pairs: Sequence[tuple[int, int]]) -> None: ...

    def execute(self, plan: ExecutionPlan) -> StepResult: ...


@runtime_checkable
class LaunchingWorker(RankWorker, Protocol):
    """A worker whose device runs ahead: plans are launched, and their results come later, in order."""

    def launch(self, plan: ExecutionPlan) -> PendingStep: ...


@dataclass(frozen=True, slots=True)
class Rank:
    """What a worker is made from."""

    config: EngineConfig
    placement: Placement
    spec: RankSpec
    setup: RankSetup
    line: BoardLine
    enter: Callable[[str], None] = lambda _: None
    """Says which phase it is in."""


MakeWorker = Callable[[Rank], RankWorker]


def make_model_worker(rank: Rank) -> RankWorker:
    """Make the worker that serves the rank's share of the model. Loads torch."""
    from engine.config import load_model_config, resolve_model_folder

    folder = resolve_model_folder(rank.config.model)
    if folder is None:
        raise FileNotFoundError(f"{rank.config.model!r} is not on this node")
    model: ModelConfig = load_model_config(folder)
    if rank.spec.backend == "cuda":
        from engine.worker.gpu_worker import GpuWorker

        return GpuWorker(rank.config, model, rank.spec, connect(rank))
    from engine.worker.worker import Worker

    return Worker(rank.config, model, rank.spec, connect(rank))


def connect(rank: Rank) -> RankLinks:
    """Take the rank's places in its group and its pipeline: in shared memory where it has an end, else over TCP."""
    from engine.comm.edges import tell_edges
    from engine.comm.group import SharedGroup
    from engine.comm.link import RingReceiver, RingSender
    from engine.comm.ranks import RankLinks

    setup = rank.setup
    links = RankLinks(
        stage=rank.placement.stage(rank.spec.dp_rank, rank.spec.pp_rank),
        group=SharedGroup(setup.group, notes=rank.line) if setup.group is not None else None,
        receiver=RingReceiver(setup.previous, notes=rank.line) if setup.previous is not None else None,
        sender=RingSender(setup.next) if setup.next is not None else None,
    )
    if setup.rendezvous is not None:
        rank.enter("rendezvous")
        _connect_over_tcp(rank, links, setup.rendezvous)
    tell_edges(rank.placement, rank.spec, links)
    return links


def _connect_over_tcp(rank: Rank, links: RankLinks, rendezvous: Rendezvous) -> None:
    """Make what is missing. All ranks go in the same order: group, stage before, next stage."""
    from engine.comm.gloo import GlooGroup, GlooReceiver, GlooSender, open_gloo, open_store

    spec, host, size = rank.spec, rank.config.node_address, len(links.stage)
    store = links.store = open_store(rendezvous)
    if links.group is None and size > 1:
        gloo = open_gloo(store, f"stage {spec.pp_rank}", spec.tp_rank, size, host)
        links.group = GlooGroup(gloo, spec.tp_rank, size, rank.line)
    # A group of two for each hop: a mesh of all ranks would open far more connections than are used.
    if links.receiver is None and spec.pp_rank > 0:
        gloo = open_gloo(store, f"hop {spec.pp_rank - 1} {spec.tp_rank}", 1, 2, host)
        links.receiver = GlooReceiver(gloo, 0, rank.line)
    if links.sender is None and spec.pp_rank < rank.placement.pipeline_parallel_size - 1:
        gloo = open_gloo(store, f"hop {spec.pp_rank} {spec.tp_rank}", 0, 2, host)
        links.sender = GlooSender(gloo, 1)


class _Control:
    """Frames to the engine over the inherited socket."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)

    def receive_setup(self) -> RankSetup:
        length, _ = FRAME.unpack(self._read(FRAME.size))
        return msgspec.msgpack.decode(self._read(length), type=RankSetup)

    def send(self, report: Report) -> None:
        kind, body = encode_report(report)
        try:
            self._socket.sendall(FRAME.pack(len(body), kind) + body)
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)  # the engine is gone

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self._socket.recv(size - len(data))
            if not piece:
                os._exit(0)
            data += piece
        return bytes(data)


def main(argv: Sequence[str] | None = None, make_worker: MakeWorker = make_model_worker) -> int:
    """Be a rank until the end. `make_worker` is for tests; what it returns does the work."""
    parser = argparse.ArgumentParser(prog="engine.executor.multiproc_rank")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args(argv)
    die_with_parent(arguments.parent)
    dump_stacks_on_signal()
    # Ctrl-C reaches the whole foreground group; the engine decides when a rank ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    control = _Control(arguments.fd)
    setup = control.receive_setup()
    process = _RankProcess(control, setup)
    try:
        process.run(make_worker)
    except RingClosed:
        return 0
    except Exception as error:  # noqa: BLE001 - the process border: the cause travels, then the process ends
        control.send(_fault(setup.rank, process.phase, error))
        say_trace(error)
        return EXIT_FAILED
    return 0


class _RankProcess:
    def __init__(self, control: _Control, setup: RankSetup) -> None:
        self._control = control
        self._setup = setup
        self._board = Segment(setup.board)
        self._line = BoardLine(self._board.view, setup.index)
        self.phase = "spawn"

    def run(self, make_worker: MakeWorker) -> None:
        setup = self._setup
        config = EngineConfig.from_json(setup.config)
        placement = Placement.from_json(setup.placement)
        spec = placement.ranks[setup.rank]
        # A container, or who started us, may allow fewer cores than the plan thought; never take more.
        if allowed := os.sched_getaffinity(0).intersection(spec.cores):
            os.sched_setaffinity(0, allowed)
        self._enter("import")
        worker = make_worker(Rank(config, placement, spec, setup, self._line, self._enter))
        self._enter("load")
        worker.load(self._report_load)
        self._control.send(
            LoadedReport(
                setup.rank,
                worker.weight_bytes,
                worker.available_memory(),
                worker.kv_dtype_name,
                worker.dtype_name,
                worker.device_name,
            )
        )
        self._serve(worker)

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self._line.phase(phase)
        self._control.send(PhaseReport(self._setup.rank, phase))

    def _report_load(self, fraction: float, detail: str) -> None:
        self._line.phase("load")
        self._control.send(PhaseReport(self._setup.rank, "load", fraction, detail))

    def _serve(self, worker: RankWorker) -> None:
        setup, steps = self._setup, StepsUnderWay(self._line)
        plans = RingReader(setup.plans)
        results = RingWriter(setup.results) if setup.results is not None else None
        decoder = PlanDecoder()

        def answer(result: StepResult) -> None:
            if results is not None:
                results.write(encode_result(result))
            steps.end()

        answers = Answers(answer, self._fail) if isinstance(worker, LaunchingWorker) else None
        while True:
            got = plans.read()
            if got is None:
                continue
            kind, body = got
            if kind == Kind.PLAN:
                plan, sampled = decoder.decode(body)
                steps.begin(plan.step_id)
                worker.append_tokens(sampled)
                if answers is not None and isinstance(worker, LaunchingWorker):
                    answers.give(worker.launch(plan))
                else:
                    answer(worker.execute(plan))
            elif kind == Kind.STOP:
                return
            else:
                self._call(Kind(kind), body, worker)

    def _fail(self, error: Exception) -> None:
        """End the process from the thread that met the error: the main one may be waiting for a plan."""
        if not isinstance(error, RingClosed):
            self._control.send(_fault(self._setup.rank, self.phase, error))
            say_trace(error)
        os._exit(EXIT_FAILED)

    def _call(self, kind: Kind, body: bytes, worker: RankWorker) -> None:
        argument: Any = msgspec.msgpack.decode(body)
        if kind is Kind.ALLOCATE_KV:
            self._enter("kv")
            worker.allocate_kv(argument)
        elif kind is Kind.WARM_UP:
            self._enter("warmup")
            worker.warm_up()
            self._enter("serve")
            Repeating(partial(_measure, worker, self._line), USAGE_INTERVAL_SECONDS, "usage")
            # Objects of the start-up never die: keep the collector from walking them in every step.
            gc.collect()
            gc.freeze()
        else:
            raise ValueError(f"a rank is not called to {kind.name}")
        self._control.send(DoneReport(self._setup.rank, kind))


def _measure(worker: RankWorker, line: BoardLine) -> None:
    measured = worker.usage()
    line.holds(measured.memory_bytes, measured.watts)


def _fault(rank: int, phase: str, error: BaseException) -> FaultReport:
    name = type(error).__name__
    hint = getattr(error, "hint", "")
    return FaultReport(
        rank,
        phase,
        name,
        str(error).splitlines()[0] if str(error) else name,
        hint if isinstance(hint, str) else "",
        does_not_fit=isinstance(error, MemoryError) or name in ("OutOfMemoryPlan", "OutOfGpuMemory"),
        is_echo=name in ("GroupError", "LinkError"),
    )


if __name__ == "__main__":
    sys.exit(main())
