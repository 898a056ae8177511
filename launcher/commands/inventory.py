"""`hlaunch inventory`: what a machine or a declared cluster has. Knows how it is shown, nothing of how it is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import Invocation, invocation_of
from launcher.sizes import GIB, counted

if TYPE_CHECKING:
    from launcher.console import Console
    from launcher.plan.inventory import Inventory


def register(app: typer.Typer) -> None:
    @app.command("inventory")
    def inventory(
        ctx: typer.Context,
        measure: Annotated[bool, typer.Option("--measure", help="Measure memory bandwidth, about a second.")] = False,
        cluster: Annotated[str | None, typer.Option("--cluster", metavar="NAME", help="A declared cluster.")] = None,
        saved: Annotated[
            Path | None, typer.Option("--inventory", metavar="FILE", help="One that was saved with --json.")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON, to save for another host.")] = False,
    ) -> None:
        """Show cores, memory, GPUs and NICs."""
        from launcher.errors import UsageError

        if sum((measure, cluster is not None, saved is not None)) > 1:
            raise UsageError("--measure, --cluster and --inventory exclude each other", hint="use one of them")
        invocation = invocation_of(ctx)
        console = invocation.console
        if cluster is not None:
            import json

            from launcher.plan.inventory import declared_inventories
            from launcher.registry import resolve_cluster

            declared = declared_inventories(resolve_cluster(invocation.load_registry(), cluster, invocation.environ))
            if as_json:
                console.json({name: json.loads(item.to_json()) for name, item in declared.items()})
            else:
                for number, item in enumerate(declared.values()):
                    if number:
                        console.data()
                    _print(console, item)
            return
        found = _found(invocation, saved, measure=measure)
        if as_json:
            console.raw(found.to_json() + "\n")
        else:
            _print(console, found)


def _found(invocation: Invocation, saved: Path | None, *, measure: bool) -> Inventory:
    """This host's inventory with its measured bandwidth, if any; or the saved one."""
    from launcher.plan.gather import saved_inventories
    from launcher.plan.inventory import read_inventory
    from launcher.plan.inventory.bandwidth import (
        cache_file,
        load_bandwidth,
        measure_read_bandwidth,
        save_bandwidth,
    )

    if saved is not None:
        return next(iter(saved_inventories([saved]).values()))
    found = read_inventory()
    path = cache_file(invocation.environ, found.node, found.cpu_name, found.cpu_cores)
    rate = load_bandwidth(path)
    if measure:
        rate = measure_read_bandwidth(found.cpu_cores, found.memory_available_bytes)
        save_bandwidth(path, rate)
    return replace(found, memory_bandwidth=rate)


def _print(console: Console, found: Inventory) -> None:
    from launcher.plan.inventory.values import THIS_HOST

    free, total = found.memory_available_bytes / GIB, found.memory_total_bytes / GIB
    nodes = counted(found.numa_nodes, "NUMA node")
    rows = [("processor", f"{found.cpu_name}, {found.cpu_cores} cores, {nodes}")]
    if found.cpu_features:
        rows.append(("features", ", ".join(found.cpu_features)))
    rows.append(("memory", f"{free:.1f} of {total:.1f} GiB free"))
    if found.memory_bandwidth:
        rows.append(("bandwidth", f"{found.memory_bandwidth / 1e9:.1f} GB/s read, measured"))
    elif found.source == THIS_HOST:
        rows.append(("bandwidth", "not measured yet: hlaunch inventory --measure"))
    if found.driver_version:
        rows.append(("driver", f"NVIDIA {found.driver_version}"))
    if found.torch_cuda is not None:
        rows.append(("torch", f"built for CUDA {found.torch_cuda}" if found.torch_cuda else "built without CUDA"))
    if not found.gpus:
        rows.append(("GPUs", "none"))
    console.table(("WHAT", "HAS"), rows, title=f"{found.node} ({found.source})")
    if found.gpus:
        console.data()
        console.table(*_told((">GPU", "NAME", ">GIB", ">FREE", "CC", "BUS", "NUMA", "LINKS"), _gpu_rows(found)))
    ports = [
        (port.device, str(port.port), port.state, port.link_layer, f"{port.rate_gbps:g}", port.netdev)
        for port in found.rdma_ports
    ]
    if ports:
        console.data()
        console.table(("RDMA", ">PORT", "STATE", "LAYER", ">GBIT/S", "INTERFACE"), ports)
    nics = [
        (nic.name, nic.state, _number(nic.speed_gbps), _number(nic.mtu), ", ".join(nic.addresses)) for nic in found.nics
    ]
    if nics:
        console.data()
        console.table(("NIC", "STATE", ">GBIT/S", ">MTU", "ADDRESSES"), nics)
    for finding in found.findings:
        console.warning(f"{finding.message} [{finding.code}]", hint=finding.fix)


def _told(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> tuple[list[str], list[list[str]]]:
    """Leave out the columns of which no row says anything, as a declared node's do."""
    kept = [at for at in range(len(columns)) if any(row[at] for row in rows)]
    return [columns[at] for at in kept], [[row[at] for at in kept] for row in rows]


def _number(value: float) -> str:
    """Write a number, nothing for an unknown one."""
    return f"{value:g}" if value else ""


def _gpu_rows(found: Inventory) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for gpu in found.gpus:
        links: dict[str, list[int]] = {}
        for link in gpu.links:
            words = f"{link.kind} x{link.lanes}" if link.lanes else f"{link.kind} {link.detail}"
            links.setdefault(words.strip(), []).append(link.peer)
        rows.append(
            (
                str(gpu.index),
                gpu.name + (" (unified)" if gpu.is_unified else ""),
                f"{gpu.memory_bytes / GIB:.1f}" if gpu.memory_bytes else "?",
                f"{gpu.free_bytes / GIB:.1f}" if gpu.memory_bytes else "?",
                gpu.capability_text,
                gpu.bus_id,
                "" if gpu.numa_node is None else str(gpu.numa_node),
                "; ".join(f"{words} to {','.join(map(str, peers))}" for words, peers in links.items()),
            )
        )
    return rows
