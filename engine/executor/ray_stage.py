"""The actor that is one rank of a compiled graph: it holds its share of the model, and steps when its channels fill.

Knows: how a rank's hand-overs to other stages become arguments and return values of `step`, which Ray carries over the
graph's channels. Refuses to know: the graph, other ranks; sums inside a stage go over Gloo as they do between nodes.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from engine.comm.ends import Rendezvous
from engine.config import EngineConfig, load_model_config, resolve_model_folder
from engine.executor.messages import LoadedReport, PlanDecoder, encode_report, encode_result
from engine.executor.ray_actor import MODEL_FOLDER_VARIABLE, become_node_host, own_actor_facts
from engine.placement import Placement
from engine.process import say_trace

if TYPE_CHECKING:
    from torch import Tensor

    from engine.comm.ranks import RankLinks
    from engine.worker.worker import Worker


class StageOrder(msgspec.Struct, frozen=True):
    """What an actor is to be: one rank of a placement. `store` is where its stage meets; None when it is alone."""

    config: str
    placement: str
    rank: int
    carried: dict[str, str]
    store: tuple[str, int] | None = None


class StageFault(Exception):
    """A rank cannot go on; the text names the rank and the cause, since Ray's own words name neither.

    `is_echo`: it waited in vain for another rank, whose fault it is.
    """

    is_echo = False


class StageActor:
    """Call `look`, perhaps `open_store`, then `load` and `allocate_kv`; from then on only the graph calls `step`."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None
        self._inlet: _Inlet | None = None
        self._outlet: _Outlet | None = None
        self._worker: Worker | None = None
        self._decoder = PlanDecoder()
        self._rank = -1

    def look(self) -> bytes:
        """Tell what this worker process is: ActorFacts."""
        return msgspec.msgpack.encode(own_actor_facts())

    def open_store(self) -> tuple[str, int]:
        """Listen where the ranks of this one's stage will meet; this one keeps the store."""
        host = own_actor_facts().address
        self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        return host, int(self._listener.getsockname()[1])

    def load(self, order: bytes) -> bytes:
        """Become the rank and read its weights; returns a LoadedReport. Raises: StageFault."""
        told = msgspec.msgpack.decode(order, type=StageOrder)
        self._rank = told.rank
        address = own_actor_facts().address
        become_node_host(told.carried)
        with self._naming():
            worker = self._worker = self._make_worker(told, address)
            worker.load(lambda *_: None)
        report = LoadedReport(
            told.rank,
            worker.weight_bytes,
            worker.available_memory(),
            worker.kv_dtype_name,
            worker.dtype_name,
            worker.device_name,
        )
        return encode_report(report)[1]

    def allocate_kv(self, num_blocks: int) -> int:
        """Make the KV pool. Raises: StageFault."""
        with self._naming():
            self._ready_worker().allocate_kv(num_blocks)
        return num_blocks

    def step(self, plan: bytes, hidden: Tensor | None = None) -> Tensor | bytes:
        """Run one plan; `hidden` is what the stage before gave. Returns what the next stage takes, or the result.

        A plan without rows passes no tensor on: an empty one stands for it. Raises: StageFault.
        """
        import torch

        worker, inlet, outlet = self._ready_worker(), self._inlet, self._outlet
        with self._naming():
            if inlet is not None:
                inlet.tensor = hidden
            decoded, sampled = self._decoder.decode(plan)
            worker.append_tokens(sampled)
            result = worker.execute(decoded)
        if outlet is None:
            return encode_result(result)
        given, outlet.tensor = outlet.tensor, None
        return torch.empty(0) if given is None else given

    def _make_worker(self, told: StageOrder, address: str) -> Worker:
        from engine.comm.ranks import RankLinks
        from engine.worker.worker import Worker

        config, placement = EngineConfig.from_json(told.config), Placement.from_json(told.placement)
        folder = resolve_model_folder(os.environ.get(MODEL_FOLDER_VARIABLE, "") or config.model)
        if folder is None:
            raise FileNotFoundError(f"{config.model!r} is not on this node")
        config = replace(config, model=str(folder), node_address=address)
        spec = placement.ranks[told.rank]
        if allowed := os.sched_getaffinity(0).intersection(spec.cores):
            os.sched_setaffinity(0, allowed)
        stage = placement.stage(spec.dp_rank, spec.pp_rank)
        links = RankLinks(stage=stage)
        if told.store is not None:
            self._join_stage(links, told.store, spec.pp_rank, spec.tp_rank, address)
        if spec.pp_rank > 0:
            links.receiver = self._inlet = _Inlet()
        if spec.pp_rank < placement.pipeline_parallel_size - 1:
            links.sender = self._outlet = _Outlet()
        return Worker(config, load_model_config(folder), spec, links)

    def _join_stage(self, links: RankLinks, store: tuple[str, int], stage: int, tp_rank: int, address: str) -> None:
        from engine.comm.gloo import GlooGroup, open_gloo, open_store

        listener = self._listener.detach() if self._listener is not None else -1
        met = open_store(Rendezvous(*store, listener))
        size = len(links.stage)
        links.group = GlooGroup(open_gloo(met, f"stage {stage}", tp_rank, size, address), tp_rank, size)

    def _ready_worker(self) -> Worker:
        if self._worker is None:
            raise StageFault("the rank has not loaded")
        return self._worker

    @contextlib.contextmanager
    def _naming(self) -> Iterator[None]:
        """Put the rank's number before whatever goes wrong, and the trace into this process's log."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the process border: the cause travels in one line
            say_trace(error)
            text = str(error).splitlines()
            fault = StageFault(f"rank {self._rank}: {type(error).__name__}: {text[0] if text else ''}")
            fault.is_echo = type(error).__name__ in ("GroupError", "LinkError")
            raise fault from None


class _Inlet:
    """Stands where a rank receives from the stage before: the graph has brought the tensor already."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def receive(self, x: Tensor) -> None:
        if self.tensor is None:
            raise StageFault("the stage before gave no tensor")
        # It lies in the channel's memory, which the next step will overwrite.
        x.copy_(self.tensor)
        self.tensor = None

    def close(self) -> None:
        self.tensor = None


class _Outlet:
    """Stands where a rank sends to the next stage: `step` returns what was left here."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def send(self, x: Tensor) -> None:
        self.tensor = x

    def close(self) -> None:
        self.tensor = None
