"""What a placement costs that one might not expect: borders crossed, shares that do not divide, copies held.

Knows: a placement and the model's shape. Refuses to know: measured speed; factors here follow from counts alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.config import ModelConfig
from engine.placement.shares import MLP_UNIT
from engine.placement.values import Placement


@dataclass(frozen=True, slots=True)
class Remark:
    """One finding: a stable code, how serious it is, what it says, what would be better."""

    code: str
    severity: Literal["info", "warning"]
    message: str
    hint: str = ""


def remarks(placement: Placement, model: ModelConfig, *, has_rdma: bool = True) -> tuple[Remark, ...]:
    """List the remarks on a placement, warnings first."""
    found = [
        *_tensor_borders(placement, model, has_rdma=has_rdma),
        *_mixed_groups(placement),
        *_stage_borders(placement, model),
        *_uneven_units(placement, model),
        *_uneven_experts(placement, model),
        *_uneven_layers(placement),
        *_copied_heads(placement, model),
    ]
    return tuple(sorted(found, key=lambda remark: remark.severity != "warning"))


def _tensor_borders(placement: Placement, model: ModelConfig, *, has_rdma: bool) -> list[Remark]:
    crossing = placement.crossing(placement.tp_groups)
    if not crossing:
        return []
    nodes = len({placement.ranks[rank].node for rank in crossing[0]})
    per_node = placement.tensor_parallel_size // nodes
    stages = placement.pipeline_parallel_size * nodes
    link = "RDMA" if has_rdma else "TCP"
    better = f"tp {per_node} pp {stages} crosses it once per step and stage border"
    return [
        Remark(
            "tp-over-slow-link",
            "info" if has_rdma else "warning",
            f"tensor groups cross nodes: {2 * model.num_layers} all-reduces per step go over {link}",
            better if stages <= model.num_layers else f"tp {per_node} stays inside a node",
        )
    ]


def _mixed_groups(placement: Placement) -> list[Remark]:
    mixed = any(len({placement.ranks[rank].backend for rank in group}) > 1 for group in placement.tp_groups)
    if not mixed:
        return []
    return [
        Remark(
            "cpu-in-tensor-group",
            "warning",
            "CPU and GPU ranks share a tensor group: every layer waits for the slower kind",
            "give the CPU ranks experts or a stage of their own, or shares by measured speed",
        )
    ]


def _stage_borders(placement: Placement, model: ModelConfig) -> list[Remark]:
    borders = [
        (one, other)
        for dp in range(placement.data_parallel_size)
        for pp in range(placement.pipeline_parallel_size - 1)
        for one, other in [(placement.stage(dp, pp)[0], placement.stage(dp, pp + 1)[0])]
        if one.node != other.node
    ]
    if not borders:
        return []
    bytes_per_token = 2 * model.hidden_size
    count = len(borders)
    return [
        Remark(
            "pp-crosses-nodes",
            "info",
            f"{count} stage border{'s' if count > 1 else ''} between nodes: one hidden state per token, "
            f"{bytes_per_token / 1000:.2f} kB in bfloat16",
        )
    ]


def _uneven_units(placement: Placement, model: ModelConfig) -> list[Remark]:
    tp = placement.tensor_parallel_size
    counts = [rank.mlp_units[1] - rank.mlp_units[0] for rank in placement.stage(0, 0)]
    units = -(-model.intermediate_size // MLP_UNIT)
    if placement.expert_parallel or len(set(counts)) == 1:
        return []
    largest = max(counts)
    return [
        Remark(
            "mxfp4-blocks",
            "info",
            f"{units} blocks of {MLP_UNIT} columns over {tp} ranks: {_runs(counts)}; the slowest rank does "
            f"{largest * tp / units:.2f} of an equal share (padding all to {largest} would waste "
            f"{100 * (largest * tp / units - 1):.1f} % of the experts' bytes)",
        )
    ]


def _uneven_experts(placement: Placement, model: ModelConfig) -> list[Remark]:
    counts = [rank.experts[1] - rank.experts[0] for rank in placement.stage(0, 0)]
    if not placement.expert_parallel or len(set(counts)) == 1:
        return []
    message = f"{model.num_experts} experts over {placement.tensor_parallel_size} ranks: {_runs(counts)}"
    return [Remark("uneven-experts", "info", message)]


def _uneven_layers(placement: Placement) -> list[Remark]:
    counts = [placement.stage(0, pp)[0].num_layers for pp in range(placement.pipeline_parallel_size)]
    if len(set(counts)) == 1:
        return []
    ideal = sum(counts) / len(counts)
    return [
        Remark(
            "uneven-layers",
            "info",
            f"layers per stage: {_runs(counts)}; the longest stage has {max(counts) / ideal:.2f} of an equal share",
        )
    ]


def _copied_heads(placement: Placement, model: ModelConfig) -> list[Remark]:
    copies = placement.tensor_parallel_size // model.num_kv_heads
    owners = sum(rank.kv_heads[0] < rank.kv_heads[1] for rank in placement.stage(0, 0))
    if copies < 2 or owners <= model.num_kv_heads:
        return []
    return [
        Remark(
            "kv-replicated",
            "info",
            f"{model.num_kv_heads} KV heads over {placement.tensor_parallel_size} ranks: each is held {copies} times",
            f"tp {model.num_kv_heads} or less keeps one copy",
        )
    ]


def _runs(counts: list[int]) -> str:
    """Write counts briefly: `12 x2, 11 x6`."""
    runs: list[list[int]] = []
    for count in counts:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    return ", ".join(f"{count} x{times}" if times > 1 else str(count) for count, times in runs)
