"""Engines with ranks on several nodes, all of them this host: node hosts that a test starts, stops and kills."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
from executor_support import CONFIG, HERE, STAND_IN

from engine.comm.node_listener import NodeArrival, NodeListener
from engine.config import EngineConfig, NodesConfig
from engine.engine_core import open_model
from engine.executor.multinode import MultiNodeExecutor
from engine.executor.node_host import HostTask
from engine.executor.node_starter import LostCallback, NodeOrder
from engine.placement import Device, HostSpec, ParallelSizes, Placement, place

SECRET = b"a secret of the test"


class HostStarter:
    """Runs node hosts as children of the test. `hosts` are their processes by node.

    With `logs`, a folder, each host has a log of its own there, `NODE.log`, as it has on a node of its own.
    """

    def __init__(
        self,
        command: Sequence[str] = STAND_IN,
        environment: dict[str, dict[str, str]] | None = None,
        logs: Path | None = None,
    ) -> None:
        self._logs = logs
        self.listener = NodeListener("127.0.0.1", 0, SECRET)
        self.hosts: dict[str, subprocess.Popen[bytes]] = {}
        self.lost: LostCallback = lambda node, why: None
        self._command = tuple(command)
        self._environment = environment or {}

    def start(self, orders: Sequence[NodeOrder], on_lost: LostCallback) -> None:
        self.lost = on_lost
        for order in orders:
            task = HostTask("127.0.0.1", self.listener.port, SECRET, order.node, order.order_id, command=self._command)
            with contextlib.ExitStack() as stack:
                log = stack.enter_context((self._logs / f"{order.node}.log").open("wb")) if self._logs else None
                self.hosts[order.node] = process = subprocess.Popen(
                    [sys.executable, "-m", "engine.executor.node_host"],
                    stdin=subprocess.PIPE,
                    stderr=log,
                    cwd=HERE.parents[1],
                    env={**os.environ, **self._environment.get(order.node, {})},
                )
            assert process.stdin is not None
            process.stdin.write(msgspec.json.encode(task))
            process.stdin.close()

    def accept(self, timeout_seconds: float) -> NodeArrival | None:
        return self.listener.accept(timeout_seconds)

    def advice(self, node: str) -> str:
        return f"start {node}"

    def stop(self) -> None:
        self.listener.close()

    def end(self) -> dict[str, int]:
        """Wait for every host to end by itself; returns their exit codes."""
        codes = {}
        for node, process in self.hosts.items():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            codes[node] = process.poll()
            process.kill()
            process.wait()
        return codes  # type: ignore[return-value]


def nodes_placement(config: EngineConfig, sizes: ParallelSizes, num_nodes: int = 2) -> Placement:
    """Spread the ranks of all engines over nodes of equally many CPU ranks."""
    each = -(-sizes.world // num_nodes)
    hosts = [HostSpec(f"node{n}", tuple(Device(f"cpu:{i}") for i in range(each))) for n in range(num_nodes)]
    return place(open_model(config)[1], sizes, hosts)


def nodes_config(config: EngineConfig, placement: Placement, **options: float) -> EngineConfig:
    sizes = placement.sizes
    nodes = NodesConfig(names=placement.nodes, head_host="127.0.0.1", **options)  # type: ignore[arg-type]
    return replace(
        config,
        placement=placement.to_json(),
        tensor_parallel_size=sizes.tensor,
        pipeline_parallel_size=sizes.pipeline,
        data_parallel_size=sizes.data,
        nodes=nodes,
    )


def start_on_nodes(
    sizes: ParallelSizes,
    *,
    num_nodes: int = 2,
    environment: dict[str, dict[str, str]] | None = None,
    on_nodes: Callable[[str], None] = lambda _: None,
    silence_seconds: float = 5.0,
    logs: Path | None = None,
    **options: float,
) -> tuple[MultiNodeExecutor, HostStarter]:
    """Start stand-in ranks on nodes, ready for plans. Options are the configuration's."""
    os.environ["PYTHONPATH"] = str(HERE.parents[1])
    base = replace(CONFIG, **options)  # type: ignore[arg-type]
    placement = nodes_placement(base, sizes, num_nodes)
    config = nodes_config(base, placement, silence_seconds=silence_seconds)
    starter = HostStarter(environment=environment, logs=logs)
    try:
        executor = MultiNodeExecutor(
            config, placement, command=STAND_IN, starter=starter, node="node0", on_nodes=on_nodes
        )
        try:
            executor.wait_loaded()
            executor.allocate_kv(64)
            executor.warm_up()
        except BaseException:
            executor.stop()
            raise
    except BaseException:
        starter.end()
        raise
    return executor, starter
