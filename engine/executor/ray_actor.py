"""The actor that runs one node's host of ranks: made by the driver on its bundle, at home in a Ray worker process.

Knows: what this worker is (address, GPUs, priority), how the host's environment is put together. Refuses to know: what
the host does, and when it ends. Arguments and answers are bytes and integers; nothing of ours is pickled.

`run` stays on the main thread until the host ends: ranks ask the kernel to die with the thread that spawned them. They
need no other watch: a killed actor, a killed raylet or a dead driver (whose actors Ray ends) takes its ranks along.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec

from engine.executor.ray_environment import node_host_environment

MODEL_FOLDER_VARIABLE = "HLAUNCH_MODEL_FOLDER"
"""Where the model lies on this node, if its supervisor said so; else where it lies on the head."""


class HostOrder(msgspec.Struct, frozen=True):
    """What an actor is told to run. `secret` proves itself to the head's door; `carried` is the driver's environment
    as far as it travels; `load_format` says how weights are read, for the digest that must be the head's."""

    node: str
    order_id: str
    host: str
    port: int
    secret: bytes
    carried: dict[str, str]
    load_format: str = "auto"


class ActorFacts(msgspec.Struct, frozen=True):
    """What a worker process is, as it says itself. `gpus` are the numbers that Ray gave it; `niceness` 0 is normal."""

    address: str
    pid: int
    gpus: tuple[int, ...] = ()
    niceness: int = 0


class NodeHostActor:
    """Call `look`, then `run` once."""

    def look(self) -> bytes:
        """Tell what this worker is: ActorFacts."""
        return msgspec.msgpack.encode(own_actor_facts())

    def run(self, order: bytes) -> int:
        """Host the node's ranks until the engine ends them (0) or is gone (1). Blocks."""
        from engine.executor.node_host import HostTask, run_node_host

        told = msgspec.msgpack.decode(order, type=HostOrder)
        address = own_actor_facts().address
        become_node_host(told.carried)
        task = HostTask(
            host=told.host,
            port=told.port,
            secret=told.secret,
            node=told.node,
            order_id=told.order_id,
            model=os.environ.get(MODEL_FOLDER_VARIABLE, ""),
            address=address,
            load_format=told.load_format,
        )
        return int(run_node_host(task))


def own_actor_facts() -> ActorFacts:
    """Ask Ray about the worker process that this is."""
    import ray

    given: Any = ray.get_runtime_context().get_accelerator_ids()
    util: Any = ray.util
    return ActorFacts(
        address=util.get_node_ip_address(),
        pid=os.getpid(),
        gpus=tuple(sorted(int(gpu) for gpu in given.get("GPU", ()) if str(gpu).isdigit())),
        niceness=os.nice(0),
    )


def become_node_host(carried: dict[str, str]) -> None:
    """Give this process the environment that ranks inherit. Ray has read its own variables long ago."""
    joined = node_host_environment(os.environ, carried)
    for name in set(os.environ) - set(joined):
        del os.environ[name]
    os.environ.update(joined)
