"""What a node's actor is told, from the engine's configuration to the host that it runs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from ray_engine import on_ray

from engine.comm.node_listener import NodeListener
from engine.comm.node_messages import Hello, NodeKind, encode
from engine.comm.secure_link import LinkLost, connect
from engine.executor import node_host, ray_actor
from engine.executor.node_host import HostTask
from engine.executor.node_starter import NodeOrder
from engine.executor.ray_actor import MODEL_FOLDER_VARIABLE, ActorFacts, NodeHostActor
from engine.executor.ray_starter import RayStarter
from engine.placement import ParallelSizes, Placement


def test_a_host_takes_its_digest_as_the_head_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dummy weights have only a shape: a node that looked at files would be refused for what nobody reads."""
    pair = SimpleNamespace(address="127.0.0.1:1")
    config = replace(on_ray(pair, ParallelSizes(tensor=2)), load_format="dummy")  # type: ignore[arg-type]
    placement = Placement.from_json(config.placement)
    starter = RayStarter(config, placement)
    starter._listener = NodeListener("127.0.0.1", 0, starter._secret)
    tasks: list[HostTask] = []
    monkeypatch.setattr(node_host, "run_node_host", lambda task: tasks.append(task) or 0)
    monkeypatch.setattr(ray_actor, "own_actor_facts", lambda: ActorFacts("127.0.0.3", 1))
    monkeypatch.setattr(ray_actor, "become_node_host", lambda carried: None)
    monkeypatch.setenv(MODEL_FOLDER_VARIABLE, "/models/here")
    try:
        order = NodeOrder("two", 0, tuple(placement.on_node("two")), "7")
        assert NodeHostActor().run(starter._task(order)) == 0
        (task,) = tasks
        assert (task.port, task.secret) == (starter._listener.port, starter._secret)
        assert (task.node, task.order_id, task.address) == ("two", "7", "127.0.0.3")
        assert (task.model, task.load_format) == ("/models/here", "dummy")
    finally:
        starter.stop()


def test_the_door_is_shut_once_all_hosts_have_come() -> None:
    pair = SimpleNamespace(address="127.0.0.1:1")
    config = on_ray(pair, ParallelSizes(tensor=2))  # type: ignore[arg-type]
    starter = RayStarter(config, Placement.from_json(config.placement))
    starter._listener = door = NodeListener("127.0.0.1", 0, starter._secret)
    starter._awaited = {"two": "7"}
    links = []
    try:
        for order_id in ("of an earlier run", "7"):
            links.append(connect("127.0.0.1", door.port, starter._secret))
            links[-1].send(NodeKind.HELLO, encode(Hello("two", order_id)))
            arrival = starter.accept(5)
            assert arrival is not None
            assert arrival.hello.order_id == order_id
            links.append(arrival.link)
        with pytest.raises(LinkLost, match="nobody answers"):
            connect("127.0.0.1", door.port, starter._secret)
        links[2].send(1, b"who is in stays in")
        assert links[3].receive(5) == (1, b"who is in stays in")
    finally:
        starter.stop()
        for link in links:
            link.dispose()
