"""What ranks say of their connections, in the form that the launcher reads."""

from __future__ import annotations

import socket
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from engine.comm.edges import ask_nccl, edge_lines, members_line, own_addresses
from engine.comm.ranks import RankLinks
from engine.config import ModelConfig, load_model_config, resolve_model_folder
from engine.placement import Device, HostSpec, ParallelSizes, Placement, place
from launcher.fabric.attest import Transport, attest


def placement() -> Placement:
    folder = resolve_model_folder("tiny-oss")
    assert folder is not None
    model: ModelConfig = load_model_config(folder)
    host = HostSpec("here", tuple(Device(f"cpu:{index}", 0, (index,)) for index in range(4)))
    return place(model, ParallelSizes(pipeline=2, tensor=2), [host])


def links(number: int, **ways: str) -> RankLinks:
    spec = placement().ranks[number]
    made: dict[str, Any] = {name: SimpleNamespace(way=way) for name, way in ways.items()}
    return RankLinks(placement().stage(0, spec.pp_rank), **made)


def test_a_rank_names_its_group_and_its_neighbours_in_the_pipeline() -> None:
    plan = placement()
    first = edge_lines(plan, plan.ranks[0], links(0, group="SHM/group", sender="SHM/ring"))
    assert first == ["0[0] -> 1[1] via SHM/group", "0[0] -> 2[2] via SHM/ring"]
    assert edge_lines(plan, plan.ranks[3], links(3, group="SHM/group", receiver="SHM/ring")) == [], "said by the others"
    second = edge_lines(plan, plan.ranks[1], links(1, group="SHM/group", sender="SHM/ring"))
    third = edge_lines(plan, plan.ranks[2], links(2, group="SHM/group", receiver="SHM/ring"))
    found = attest([*first, *second, *third])
    assert found.pairs == dict.fromkeys([(0, 1), (0, 2), (1, 3), (2, 3)], Transport.SHM)
    assert edge_lines(plan, plan.ranks[0], RankLinks()) == []
    # A group that does not say what it is made of (NCCL speaks for itself) is not guessed at.
    silent = replace(links(0), group=SimpleNamespace())  # type: ignore[arg-type]
    assert edge_lines(plan, plan.ranks[0], silent) == []


def test_the_address_of_gloo_is_the_kernels_word_for_it() -> None:
    plan = placement()
    assert "127.0.0.9" not in own_addresses()
    with socket.create_server(("127.0.0.9", 0)) as server:
        listening = own_addresses()
        with socket.create_connection(server.getsockname(), source_address=("127.0.0.9", 0)):
            assert "127.0.0.9" not in listening, "a listener connects nobody"
            assert "127.0.0.9" in own_addresses()
            (line, *_) = edge_lines(plan, plan.ranks[0], links(0, group="NET/Gloo"))
    assert line.startswith("0[0] -> 1[1] via NET/Gloo/")
    assert "127.0.0.9" in line.rpartition("/")[2].split(",")
    assert attest([line]).pairs == {(0, 1): Transport.SOCKET}
    with socket.socket(socket.AF_INET6) as server6:
        server6.bind(("::1", 0))
        server6.listen()
        with socket.create_connection(server6.getsockname()[:2]):
            assert "::1" in own_addresses()


def test_nccl_counts_within_its_communicator() -> None:
    said = members_line([2, 3])
    host, pid = said.split(":")[:2]
    lines = [
        f"engine: {said}",
        f"{host}:{pid}:77 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM",
        f"(NodeHost pid=9) other:{pid}:77 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] [send] via NET/Socket/0",
    ]
    assert attest(lines).pairs == {(0, 1): Transport.SOCKET, (2, 3): Transport.P2P}


def test_nccl_is_asked_unless_somebody_set_its_log() -> None:
    environ: dict[str, str] = {}
    ask_nccl(environ)
    assert environ == {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT"}
    mine = {"NCCL_DEBUG": "WARN"}
    ask_nccl(mine)
    assert mine == {"NCCL_DEBUG": "WARN"}
