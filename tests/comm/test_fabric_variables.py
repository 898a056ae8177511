"""The variables that ranks on several nodes must read alike: which they are, and what a node tells of its own."""

from __future__ import annotations

import msgspec
import pytest

from engine.comm.fabric_variables import MAX_VALUE_CHARS, NAMES, first_difference, own_values
from engine.comm.node_messages import MAX_HELLO_BYTES, Hello, NodeFacts, encode, own_facts
from launcher.fabric.catalogue import find, names
from launcher.fabric.spec import Scope


def test_they_are_those_of_the_catalogue() -> None:
    rows = [row for name in names() if (row := find(name)) is not None]
    assert sorted(NAMES) == sorted(
        row.name for row in rows if row.scope is Scope.CLUSTER and row.owner in ("NCCL", "Gloo")
    )


def test_a_node_tells_its_own_and_nothing_else() -> None:
    environ = {"NCCL_ALGO": "Ring", "NCCL_SOCKET_IFNAME": "=eth0", "HF_TOKEN": "secret", "PATH": "/bin", "NCCL_NET": ""}
    assert own_values(environ) == {"NCCL_ALGO": "Ring", "NCCL_NET": ""}
    long, longer = ("x" * MAX_VALUE_CHARS + end for end in ("a", "b"))
    told = [own_values({"NCCL_PROTO": value})["NCCL_PROTO"] for value in (long, longer, long, "\x1b[2J", "\udcff")]
    assert all(text.startswith("sha256:") and len(text) == 23 for text in told)
    assert told[0] == told[2]
    assert len(set(told)) == 4
    everything = own_values(dict.fromkeys(NAMES, "x" * MAX_VALUE_CHARS))
    assert len(encode(Hello("n" * 255, "1", NodeFacts(fabric=everything)))) < MAX_HELLO_BYTES


def test_the_own_environment_is_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    facts = own_facts()
    assert facts.fabric["NCCL_ALGO"] == "Tree"
    assert msgspec.msgpack.decode(encode(facts), type=NodeFacts) == facts


@pytest.mark.parametrize(
    ("ours", "theirs", "with_gpus", "without"),
    [
        ({}, {}, None, None),
        ({"NCCL_ALGO": "Ring"}, {"NCCL_ALGO": "Ring"}, None, None),
        ({"NCCL_ALGO": "Ring"}, {"NCCL_ALGO": "Tree"}, ("NCCL_ALGO", "Ring", "Tree"), ("NCCL_ALGO", "Ring", "Tree")),
        # A node without GPUs lacks what is made for them.
        ({"NCCL_NVLS_ENABLE": "0"}, {}, ("NCCL_NVLS_ENABLE", "0", None), None),
        ({}, {"GLOO_DEVICE_TRANSPORT": "TCP"}, *[("GLOO_DEVICE_TRANSPORT", None, "TCP")] * 2),
    ],
)
def test_the_first_difference(ours: dict[str, str], theirs: dict[str, str], with_gpus: object, without: object) -> None:
    assert first_difference(ours, theirs, both_have_gpus=True) == with_gpus
    assert first_difference(ours, theirs, both_have_gpus=False) == without
