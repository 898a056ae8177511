"""Where ranks of several nodes meet: on the one address that was declared, of either family."""

from __future__ import annotations

import socket

import pytest

from engine.comm.ends import create_rendezvous
from engine.comm.gloo import open_store


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "host", ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here"))]
)
def test_ranks_meet_at_an_address_of_either_family(host: str) -> None:
    keeper, guest = create_rendezvous(host, 2)
    with socket.socket(fileno=socket.dup(keeper.listener)) as listener:
        assert listener.getsockname()[0] == host
    kept, visited = open_store(keeper, 10), open_store(guest, 10)
    kept.set("key", "value")
    assert visited.get("key") == b"value"
