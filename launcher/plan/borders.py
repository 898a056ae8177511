"""Tensor groups that cross nodes, weighed: what the sums over the border cost, and whether another split is faster.

Knows: the estimates that also rank `topo`. Refuses to know: how remarks are printed. Only splits of the devices in use
are compared, so a remark never proposes what it would take other machines to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.placement import Device, HostSpec, Placement, Remark
from launcher.plan.cost import Estimate, Load
from launcher.plan.links import Link
from launcher.plan.rank_memory import Sizing
from launcher.plan.splits import Split, Study

CODE = "tp-over-slow-link"


def weighed(
    found: Sequence[Remark], placement: Placement, sizing: Sizing, between: Link, load: Load | None = None
) -> tuple[Remark, ...]:
    """Give the remark on tensor groups that cross nodes its figures, and the faster split where there is one.

    Over RDMA it is an info; over anything else a warning. Other remarks stay as they are, warnings first.
    """
    is_mixed = len({rank.backend for rank in placement.ranks}) > 1
    if is_mixed or all(remark.code != CODE for remark in found):
        return tuple(found)
    study = Study(sizing, _hosts(placement), between, load or Load())
    own = study.judge(placement)
    others = [
        split
        for split in study.splits(expert_parallel=placement.expert_parallel)
        if split.fits and not split.placement.crossing(split.placement.tp_groups)
    ]
    changed = [
        remark
        if remark.code != CODE
        else replace(
            remark,
            severity="info" if between.name == "RDMA" else "warning",
            message=f"{remark.message}, an estimated {_figures(own.estimate)}",
            hint=_hint(own, others),
        )
        for remark in found
    ]
    return tuple(sorted(changed, key=lambda remark: remark.severity != "warning"))


def _hosts(placement: Placement) -> tuple[HostSpec, ...]:
    return tuple(
        HostSpec(node, tuple(Device(rank.device, rank.numa_node, rank.cores) for rank in placement.on_node(node)))
        for node in placement.nodes
    )


def _hint(own: Split, others: Sequence[Split]) -> str:
    """Name what is faster than `own` at many requests, or for a lone one; else say that nothing is."""
    if not others:
        return "no other split of these devices fits"
    most = max(others, key=lambda split: split.estimate.tokens_per_second)
    soonest = min(others, key=lambda split: split.estimate.latency_seconds)
    better = {}
    if most.estimate.tokens_per_second > own.estimate.tokens_per_second:
        better[most.sizes] = most
    if soonest.estimate.latency_seconds < own.estimate.latency_seconds:
        better[soonest.sizes] = soonest
    if not better:
        return f"other splits are estimated slower: {_named(most)}"
    return f"better: {', or '.join(_named(split) for split in better.values())}"


def _named(split: Split) -> str:
    return f"{split.sizes} at {_figures(split.estimate)}"


def _figures(estimate: Estimate) -> str:
    return f"{estimate.tokens_per_second:,.0f} tok/s and {1e3 * estimate.latency_seconds:.2f} ms a token"
