"""NCCL's own lines and RDMA counters, turned into the transport of each pair of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from trees import healthy

from launcher.fabric.attest import (
    Transport,
    attest,
    carried_by_rdma,
    edges_of,
    network_of,
    traffic_between,
)
from launcher.fabric.facts import NodeFacts
from launcher.fabric.remote import read_tree

P = "spark-01:4711:4790 [0] NCCL INFO "

RDMA_228 = f"""\
{P}NET/IB : Using [0]rocep1s0f0:1/RoCE [1]roceP2p1s0f0:1/RoCE [RO]; OOB enP2p1s0f0np0:192.168.100.1<0>
{P}Using network IB
{P}Channel 00/0 : 1[0] -> 0[0] [receive] via NET/IB/0
{P}Channel 00/0 : 0[0] -> 1[0] [send] via NET/IB/0
{P}Channel 01/0 : 0[0] -> 1[0] [send] via NET/IB/1(0)
{P}Connected all rings, use ring PXN 0 GDR 0
"""
GDR_230 = f"""\
{P}NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB bond0:10.0.0.1<0>
{P}Assigned NET plugin IB to comm
{P}Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
{P}Channel 00/0 : 3[3] -> 8[0] [send] via NET/IB/0/GDRDMA
{P}Channel 01/0 : 3[3] -> 8[0] [send] via NET/IB/1(8)/GDRDMA(PCI)/Shared
{P}Channel 00 : 2[b3000] -> 3[c4000] via SHM/direct/direct
"""
SOCKET_228 = f"""\
{P}NET/IB : No device found.
{P}NET/Socket : Using [0]eth0:10.0.0.1<0>
{P}Using network Socket
{P}Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0
"""
TWO_GPUS_228 = """\
vm:784:784 [0] NCCL INFO NET/IB : No device found.
vm:784:784 [0] NCCL INFO NET/IB : Using [RO]; OOB lo:127.0.0.1<0>
vm:784:784 [0] NCCL INFO NET/Socket : Using [0]lo:127.0.0.1<0>
vm:784:784 [0] NCCL INFO Assigned NET plugin Socket to comm
vm:784:784 [0] NCCL INFO Using network Socket
vm:784:784 [0] NCCL INFO NET/Socket : GPU Direct RDMA Disabled for HCA 0 'lo'
vm:784:784 [0] NCCL INFO GPU/0-60 :GPU/0-60 (0/5000.0/LOC) NVS/0-0 (1/370.8/NVL) NET/0-0 (3/1.2/PHB)
vm:784:784 [0] NCCL INFO  0 : NET/0-0 GPU/0-60 NET/0-0
vm:784:784 [0] NCCL INFO Channel 00/0 : 1[1] -> 0[0] [receive] via NET/Socket/0
vm:784:784 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] [send] via NET/Socket/0
vm:784:784 [0] NCCL INFO Connected all rings, use ring PXN 0 GDR 0
vm:690:690 [0] NCCL INFO Channel 03 : 0[0] -> 1[1] via SHM/direct/direct
"""
"""As two H200 wrote it with torch 2.11: twice TCP between two made-up hosts, and shared memory within one."""
PLUGIN = f"{P}Channel 00/0 : 0[0] -> 1[0] [send] via NET/AWS Libfabric/0\n{P}Channel 00/0 : 0[0] -> 1[0] via MNNVL/x\n"


def test_rdma_without_gpudirect() -> None:
    found = attest(RDMA_228.splitlines())
    assert found.pairs == {(0, 1): Transport.RDMA}
    assert found.network.chosen == "IB"
    assert found.network.hcas == ("rocep1s0f0", "roceP2p1s0f0")
    assert found.network.link_layers == {"RoCE"}
    assert found.network.out_of_band == "enP2p1s0f0np0"
    assert found.describe() == (
        "net IB; HCAs rocep1s0f0, roceP2p1s0f0 (RoCE); bootstrap on enP2p1s0f0np0; ranks 0-1 RDMA"
    )


def test_every_kind_of_edge_and_both_spellings() -> None:
    found = attest(GDR_230.splitlines())
    assert found.pairs == {(0, 1): Transport.P2P, (2, 3): Transport.SHM, (3, 8): Transport.RDMA_GDR}
    assert found.network.chosen == "IB"
    assert [edge.device for edge in found.edges] == [None, 0, 1, None]
    assert found.describe().endswith("ranks 0-1 P2P; ranks 2-3 shared memory; ranks 3-8 RDMA with GPUDirect")


def test_a_silent_fallback_to_tcp_is_told() -> None:
    found = attest(SOCKET_228.splitlines())
    assert found.pairs == {(0, 1): Transport.SOCKET}
    assert found.network.complaints == ("NET/IB : No device found",)
    assert found.describe() == "net Socket; ranks 0-1 TCP; NET/IB : No device found"


def test_a_recorded_log_of_two_gpus() -> None:
    lines = TWO_GPUS_228.splitlines()
    found = attest(lines)
    assert found.network.chosen == "Socket"
    assert found.network.hcas == ()
    assert found.network.out_of_band == "lo"
    assert [edge.way for edge in found.edges] == ["NET/Socket/0", "NET/Socket/0", "SHM/direct/direct"]
    assert found.pairs == {(0, 1): Transport.SOCKET}
    assert attest(lines[-1:]).pairs == {(0, 1): Transport.SHM}
    assert found.unknown == ()


def test_one_slow_channel_decides_the_pair() -> None:
    found = attest([*RDMA_228.splitlines(), *SOCKET_228.splitlines()])
    assert found.pairs == {(0, 1): Transport.SOCKET}


def test_a_way_that_nobody_knows_is_kept() -> None:
    found = attest(PLUGIN.splitlines())
    assert found.pairs == {(0, 1): Transport.UNKNOWN}
    assert found.unknown == ("NET/AWS Libfabric/0", "MNNVL/x")


def test_lines_of_others_are_no_edges() -> None:
    assert edges_of(["[2] INFO: GET /via NET/", "0 -> 1 via nothing", "", "\x00\xff"]) == ()
    empty = network_of([])
    assert (empty.chosen, empty.hcas, empty.complaints) == (None, (), ())


@pytest.fixture
def facts(tmp_path: Path) -> NodeFacts:
    read = read_tree(healthy(tmp_path / "host", 1).root)
    assert isinstance(read, NodeFacts)
    return read


def _sent(facts: NodeFacts, words: int, errors: int = 0) -> NodeFacts:
    """The same host after `words` of four bytes left each HCA."""
    hcas = []
    for hca in facts.hcas:
        port = hca.ports[0]
        counters = dict(port.counters) | {
            "port_xmit_data": port.counters["port_xmit_data"] + words,
            "packet_seq_err": errors,
        }
        hcas.append(replace(hca, ports=(replace(port, counters=MappingProxyType(counters)),)))
    return replace(facts, hcas=tuple(hcas))


def test_counters_prove_that_rdma_carried_the_bytes(facts: NodeFacts) -> None:
    traffic = traffic_between(facts, _sent(facts, 131072, errors=2))
    assert [(item.sent_bytes, item.received_bytes) for item in traffic] == [(524288, 0), (524288, 0)]
    assert traffic[0].errors == {"packet_seq_err": 2}
    assert carried_by_rdma(traffic, 1 << 20)
    assert not carried_by_rdma(traffic_between(facts, facts), 1 << 20)
    assert not carried_by_rdma((), 0)


def test_a_reset_counter_or_a_new_device_is_no_traffic(facts: NodeFacts) -> None:
    later = _sent(facts, 500)
    assert all(item.sent_bytes == 0 for item in traffic_between(later, facts))
    assert traffic_between(replace(facts, hcas=()), later) == ()
