"""Firewall lines that let the nodes of a cluster reach each other's pinned ports, and nobody else.

Pure: text for a person to read and paste; hlaunch never changes a firewall. Ray's services listen on every address
whatever they are told, so what is not opened here has to be closed; ranks and links listen on the node's own.
"""

from __future__ import annotations

from typing import Literal

from launcher.fabric.ports import CONNECTIONS, closed_ranges, open_ranges
from launcher.plan.joined_nodes import DEFAULT_HEAD_PORT
from launcher.registry.cluster import Cluster, Node

Tool = Literal["iptables", "nft", "ufw"]
TOOLS: tuple[Tool, ...] = ("iptables", "nft", "ufw")
CHAIN = "HLAUNCH"


def firewall_lines(cluster: Cluster, node: Node, tool: Tool = "iptables") -> list[str]:
    """Return the commands for one node, comments included; running them twice gives the same rules."""
    peers = [other.ip for other in cluster.nodes if other.name != node.name]
    ephemeral = _span(*CONNECTIONS, "-")
    if not peers:
        return [
            f"# {node.name}: the only node, nothing to open",
            f"# nodes that join by hand (hlaunch up --nnodes) come to port {DEFAULT_HEAD_PORT} of the head,",
            f"# and their ranks to ports {ephemeral} of each other",
        ]
    head = [
        f"# on {node.name} ({node.ip}): from {', '.join(peers)}",
        f"# ranks listen on ports of {ephemeral} that the kernel picks, none can be set;",
        "# where sysctl net.ipv4.ip_local_port_range says another range, open that one",
    ]
    makers = {"iptables": _iptables, "nft": _nft, "ufw": _ufw}
    return [*head, *makers[tool](cluster, node, peers)]


def _span(first: int, last: int, separator: str) -> str:
    return str(first) if first == last else f"{first}{separator}{last}"


def _iptables(cluster: Cluster, node: Node, peers: list[str]) -> list[str]:
    program, ping = ("ip6tables", "ipv6-icmp") if ":" in node.ip else ("iptables", "icmp")
    ranges = open_ranges(cluster, node)
    lines = [
        f"sudo {program} -N {CHAIN} 2>/dev/null || sudo {program} -F {CHAIN}",
        f"sudo {program} -C INPUT -j {CHAIN} 2>/dev/null || sudo {program} -I INPUT -j {CHAIN}",
        f"sudo {program} -A {CHAIN} -i lo -j ACCEPT",
        f"sudo {program} -A {CHAIN} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
    ]
    for peer in peers:
        for first, last, use in ranges:
            lines.append(
                f"sudo {program} -A {CHAIN} -s {peer} -p tcp --dport {_span(first, last, ':')} -j ACCEPT  # {use}"
            )
        lines.append(f"sudo {program} -A {CHAIN} -s {peer} -p {ping} -j ACCEPT  # packet size, hlaunch doctor")
    for first, last in closed_ranges(cluster, node):
        lines.append(f"sudo {program} -A {CHAIN} -p tcp --dport {_span(first, last, ':')} -j DROP")
    return lines


def _nft(cluster: Cluster, node: Node, peers: list[str]) -> list[str]:
    family = "ip6" if ":" in node.ip else "ip"
    ranges = open_ranges(cluster, node)
    others = ", ".join(peers)
    opened = ", ".join(_span(first, last, "-") for first, last, _ in ranges)
    closed = ", ".join(_span(first, last, "-") for first, last in closed_ranges(cluster, node))
    lines = [
        "sudo nft add table inet hlaunch",
        "sudo nft flush table inet hlaunch",
        "sudo nft 'add chain inet hlaunch input { type filter hook input priority -10; policy accept; }'",
        "sudo nft add rule inet hlaunch input iif lo accept",
        "sudo nft add rule inet hlaunch input ct state established,related accept",
        f"sudo nft 'add rule inet hlaunch input {family} saddr {{ {others} }} tcp dport {{ {opened} }} accept'",
    ]
    if closed:
        lines.append(f"sudo nft 'add rule inet hlaunch input tcp dport {{ {closed} }} drop'")
    return lines


def _ufw(cluster: Cluster, node: Node, peers: list[str]) -> list[str]:
    lines = [
        f"sudo ufw allow proto tcp from {peer} to any port {_span(first, last, ':')} comment 'hlaunch: {use}'"
        for peer in peers
        for first, last, use in open_ranges(cluster, node)
    ]
    closed = [_span(first, last, ":") for first, last in closed_ranges(cluster, node)]
    # ufw takes the first rule that matches, so what is denied to everybody comes last.
    return [*lines, *(f"sudo ufw deny proto tcp to any port {span}" for span in closed)]
