"""`hlaunch topo`: every way to split a model over a cluster, ranked; or the seven known topologies, explained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.commands import Invocation, invocation_of
from launcher.sizes import counted

if TYPE_CHECKING:
    from launcher.console import Console
    from launcher.plan.splits import Case, Split, Study
    from launcher.registry.cluster import Cluster


def register(app: typer.Typer) -> None:
    @app.command("topo")
    def topo(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name or alias.")],
        overrides: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may repeat.")
        ] = None,
        cluster: Annotated[str | None, typer.Option("--cluster", metavar="NAME", help="Split over this one.")] = None,
        inventory: Annotated[
            list[Path] | None,
            typer.Option("--inventory", metavar="FILE", help="A saved inventory of a node; may repeat."),
        ] = None,
        by: Annotated[str, typer.Option("--by", metavar="ORDER", help="throughput or latency.")] = "throughput",
        requests: Annotated[int, typer.Option("--requests", min=1, help="Requests at once, over all engines.")] = 64,
        context: Annotated[int, typer.Option("--context", min=1, help="Tokens that each request holds.")] = 1024,
        experts: Annotated[bool, typer.Option("--expert-parallel", help="Share out whole experts.")] = False,
        case: Annotated[
            int, typer.Option("--case", min=0, max=7, help="Explain topology 1 to 7 of two nodes with 8 GPUs.")
        ] = 0,
        cases: Annotated[bool, typer.Option("--cases", help="Explain all seven of them.")] = False,
        svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw the best, or --case.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    ) -> None:
        """Rank the ways to split a model over a cluster."""
        from launcher.errors import UsageError
        from launcher.plan.splits import CASES, split_data

        if by not in ("throughput", "latency"):
            raise UsageError(f"--by {by}: no such order", hint="use throughput or latency")
        invocation = invocation_of(ctx)
        console = invocation.console
        cluster_name = None if case or cases else cluster
        study, declared = _study(
            invocation,
            name,
            list(overrides or []),
            cluster_name,
            list(inventory or []),
            requests,
            context,
            is_reference=bool(case or cases),
        )
        if case or cases:
            chosen = [item for item in CASES if cases or item.number == case]
            splits = [_split(study, item) for item in chosen]
            if as_json:
                both = zip(chosen, splits, strict=True)
                data = [{"case": c.number, "title": c.title, "why": c.why, **split_data(s)} for c, s in both]
                console.json({"cases": data, "assumptions": _assumptions(study, declared)})
            else:
                for item, split in zip(chosen, splits, strict=True):
                    _explain(console, study, declared, item, split)
                _print_assumptions(console, study, declared)
        else:
            splits = list(study.splits("latency" if by == "latency" else "throughput", expert_parallel=experts))
            if as_json:
                data = [split_data(split) for split in splits]
                console.json({"by": by, "splits": data, "assumptions": _assumptions(study, declared)})
            else:
                _rank(console, study, declared, splits, by)
        if svg is not None and splits:
            from launcher.commands.plan import write_svg

            title = f"{name} on {declared.name}"
            write_svg(console, study.picture(title, splits[0], _roles(declared)), svg)


def _split(study: Study, case: Case) -> Split:
    """Place one of the seven. Raises: DoesNotFit for a model that is too small for it."""
    from engine.placement import PlacementError
    from launcher.plan.placing import no_placement

    try:
        return study.split(case.sizes)
    except PlacementError as error:
        raise no_placement(error, case.sizes) from error


def _study(
    invocation: Invocation,
    name: str,
    overrides: list[str],
    cluster_name: str | None,
    paths: list[Path],
    requests: int,
    context: int,
    *,
    is_reference: bool,
) -> tuple[Study, Cluster]:
    """Gather model, hosts and links. Raises: HlaunchError when the model's shape is not known."""
    from launcher.plan.cost import Load
    from launcher.plan.gather import cluster_of, inventories_for, resolved
    from launcher.plan.inventory import declared_inventories
    from launcher.plan.known_models import shape_of
    from launcher.plan.links import between_link
    from launcher.plan.placing import hosts_of
    from launcher.plan.settings import engine_config
    from launcher.plan.splits import REFERENCE, study_of

    entry = resolved(invocation, name, overrides, cluster_name)
    declared = REFERENCE if is_reference else (cluster_of(invocation, entry) or _this_host(paths))
    model = shape_of(entry, invocation.environ)
    hardware = {**declared_inventories(declared), **(_own(declared, paths) or inventories_for(declared, paths))}
    # The seven topologies are of GPUs, whatever the entry runs on here.
    is_cpu = entry.text("device") == "cpu" and not is_reference
    is_gpu = any(item.gpus for item in hardware.values()) and not is_cpu
    cores = sum(item.numa_nodes for item in hardware.values())
    hosts = hosts_of(declared, hardware, cores, is_gpu=is_gpu)
    config = engine_config(entry, None, (), "cuda:0" if is_gpu else "cpu")
    study = study_of(model, config, hosts, hardware, between_link(declared, hardware), Load(requests, context))
    if declared is REFERENCE and not is_reference:
        invocation.console.note("no cluster named, and this host has less than two GPUs: two nodes of 8 H100 stand in")
    return study, declared


def _this_host(paths: list[Path]) -> Cluster:
    """This host, or the saved one, as a cluster of one node; the reference where there is nothing to split over."""
    from launcher.plan.gather import one_inventory
    from launcher.plan.splits import REFERENCE
    from launcher.registry.cluster import Cluster, Node

    found = one_inventory(paths)
    if len(found.gpus) < 2 and not paths:
        return REFERENCE
    return Cluster(found.node, (Node(found.node, "head", "127.0.0.1", gpus=len(found.gpus)),))


def _own(declared: Cluster, paths: list[Path]) -> dict[str, Any]:
    """The inventory of a cluster that is this one host."""
    from launcher.plan.gather import one_inventory

    if len(declared.nodes) == 1 and declared.nodes[0].ip == "127.0.0.1":
        return {declared.name: one_inventory(paths)}
    return {}


def _rank(console: Console, study: Study, declared: Cluster, splits: list[Split], by: str) -> None:
    from dataclasses import replace
    from textwrap import wrap

    from launcher.commands.plan import show_remarks, show_topology
    from launcher.plan.splits import best_reason

    if not splits:
        console.data(f"no split of this model uses all devices of {declared.name}")
        return
    rows = []
    for number, split in enumerate(splits, 1):
        estimate = split.estimate
        rows.append(
            (
                str(number),
                *(str(size) for size in (split.sizes.tensor, split.sizes.pipeline, split.sizes.data)),
                f"{estimate.tokens_per_second:,.0f}",
                f"{1e3 * estimate.latency_seconds:.2f}",
                f"{1e3 * estimate.ttft_seconds:.0f}",
                f"{split.memory.max_full_requests:.0f}" if split.fits else "no fit",
                split.crossing.replace("nothing but requests and answers", "nothing"),
            )
        )
    columns = (">#", ">TP", ">PP", ">DP", ">TOK/S", ">MS/TOKEN", ">TTFT MS", ">FULL REQ", "CROSSES NODES")
    console.table(columns, rows, title=f"splits over {declared.name}, by {by}")
    console.data()
    best = splits[0]
    reason = best_reason(best, splits, "latency" if by == "latency" else "throughput")
    for line in wrap(reason, console.width, break_on_hyphens=False):
        console.heading(line)
    picture = study.picture("", best, _roles(declared))
    show_topology(console, picture)
    console.data()
    _print_assumptions(console, study, declared)
    show_remarks(console, picture.remarks)
    for split in splits:
        if split is not best and split.placement.crossing(split.placement.tp_groups):
            found = [item for item in study.picture("", split, {}).remarks if item.code == "tp-over-slow-link"]
            show_remarks(console, [replace(item, message=f"{split.sizes}: {item.message}") for item in found])


def _explain(console: Console, study: Study, declared: Cluster, case: Case, split: Split) -> None:
    """Draw and explain one of the seven."""
    import textwrap

    from launcher.commands.plan import show_remarks, show_topology

    estimate = split.estimate
    console.heading(f"{case.number}. {case.title}: {split.sizes}")
    for line in textwrap.wrap(case.why, 80):
        console.data(line)
    picture = study.picture("", split, _roles(declared))
    show_topology(console, picture)
    console.data(f"crosses nodes  {split.crossing}")
    console.data(
        f"expected       {estimate.tokens_per_second:,.0f} tok/s at {counted(estimate.requests, 'request')}, "
        f"{1e3 * estimate.latency_seconds:.2f} ms a token alone"
    )
    console.data("               of which " + ", ".join(f"{name} {1e3 * part:.2f}" for name, part in estimate.parts))
    largest = max(rank.required_bytes for rank in split.memory.ranks) / (1 << 30)
    verdict = "fits" if split.fits else "DOES NOT FIT"
    console.data(f"memory         {verdict}: {largest:.1f} GiB in the fullest rank")
    show_remarks(console, picture.remarks)
    console.data()


def _roles(cluster: Cluster) -> dict[str, tuple[str, str]]:
    return {node.name: (node.role, node.ip) for node in cluster.nodes}


def _assumptions(study: Study, declared: Cluster) -> dict[str, str]:
    """What every figure rests on, by name."""
    from launcher.plan.cost import gpu_speed, launches_of
    from launcher.plan.inventory import assumption
    from launcher.plan.links import inside_link

    load = study.load
    found: dict[str, str] = {
        "load": f"{counted(load.requests, 'request')}, {load.context} tokens each, prompts of {load.prompt}",
        "experts": "uniform routing, the worst case",
    }
    kind = launches_of("cuda" if any(host.of("cuda") for host in study.hosts) else "cpu")
    each = f"{1e6 * kind.layer_seconds:.0f} us a layer and {1e6 * kind.step_seconds:.0f} us a step"
    found["launches"] = f"{each}: {kind.source}"
    for name, inventory in study.sizing.inventories.items():
        for gpu in inventory.gpus[:1]:
            read, flops = gpu_speed(gpu)
            found[f"{name} GPU"] = f"{gpu.name}: reads {read / 1e12:.2f} TB/s, {flops / 1e12:.0f} TFLOP/s"
        inside = inside_link(inventory, is_gpu=bool(inventory.gpus))
        found[f"{name} inside"] = f"{inside.name}, {inside.bytes_per_second / 1e9:.0f} GB/s: {inside.source}"
    backends = {host.name: {device.backend for device in host.devices} for host in study.hosts}
    if assumed := assumption(declared, study.sizing.inventories, backends):
        found["hardware"] = assumed
    if len(declared.nodes) > 1:
        link = study.between
        found["between nodes"] = f"{link.name}, {link.bytes_per_second / 1e9:.1f} GB/s: {link.source}"
    return found


def _print_assumptions(console: Console, study: Study, declared: Cluster) -> None:
    rows = list(_assumptions(study, declared).items())
    console.table(("WHAT", "ASSUMED"), rows, title="assumptions: figures rank splits, a benchmark will show less")
