"""Hosts and ports as they are written, and who can reach them.

Pure. Knows: the brackets of IPv6, loopback. Refuses to know: names' addresses, which host is meant.
"""

from __future__ import annotations

import ipaddress


def host_and_port(host: str, port: int) -> str:
    """Write `host:port` as it stands in addresses and URLs: an IPv6 address in brackets."""
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost counts as public."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
