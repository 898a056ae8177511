"""A plan as text and as data: the memory bar, the summary, the curl line. Pure; knows no terminal.

Everything fits 80 columns except what must stay pasteable: paths, argv, JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from launcher.addresses import host_and_port
from launcher.errors import HlaunchError
from launcher.plan.fit import FitReport
from launcher.plan.joined_nodes import head_to_join
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.picture import nics_of
from launcher.plan.rank_memory import RankMemory
from launcher.plan.settings import shown_config
from launcher.registry.types import ResolvedEntry
from launcher.sizes import size

BAR_WIDTH = 60


def memory_bar(report: FitReport, width: int = BAR_WIDTH) -> str:
    """Draw the budget of one rank: `W` weights, `A` activations, `R` runtime, `K` KV cache, `.` free, `!` too much."""
    memory = report.memory
    parts = (
        ("W", memory.weight_bytes + memory.held_bytes),
        ("A", memory.activation_bytes),
        ("R", memory.runtime_bytes),
        ("K", memory.kv_bytes),
    )
    scale = max(memory.budget_bytes, memory.required_bytes, 1)
    cells = ""
    done = 0
    for letter, amount in parts:
        done += amount
        # Something that exists is at least one cell, and rounding never adds up to more than the whole.
        cells += letter * max(round(done / scale * width) - len(cells), 1 if amount else 0)
    budget_cells = round(memory.budget_bytes / scale * width)
    cells = cells[:width]
    over = max(0, len(cells) - budget_cells) if memory.required_bytes > memory.budget_bytes else 0
    if over:
        cells = cells[: len(cells) - over] + "!" * over
    return "[" + cells.ljust(width, ".") + "]"


def fit_lines(report: FitReport) -> Iterator[str]:
    """Describe a fit: the bar, its terms, what the KV cache holds."""
    memory = report.memory
    yield memory_bar(report)
    form = "expanded once at load" if report.is_expanded else "packed as in the checkpoint"
    origin = "from the files" if report.is_from_files else "from the shape, no files here"
    yield f"W weights      {size(memory.weight_bytes):>10}  {report.dtype}, experts {form}"
    yield f"  checkpoint   {size(report.checkpoint_bytes):>10}  {origin}"
    if report.cpu is not None:
        yield f"  held beside  {size(memory.held_bytes):>10}  second layouts {size(report.cpu.packed_bytes)}, tables"
    yield f"A activations  {size(memory.activation_bytes):>10}  {report.limits.max_num_batched_tokens} tokens a step"
    yield f"R runtime      {size(memory.runtime_bytes):>10}"
    tokens = report.limits.max_model_len
    yield f"K KV cache     {size(memory.kv_bytes):>10}  {memory.num_blocks} blocks of {memory.block_size} tokens"
    yield (
        f"               {'':>10}  = {max(0.0, memory.max_full_requests):.1f} requests of {tokens} tokens, "
        f"{size(report.full_request_bytes)} each"
    )
    source = "of the GPU's memory" if report.is_gpu else "available memory of this machine"
    yield f"budget         {size(memory.budget_bytes):>10}  {source}"
    yield "fits" if report.fits else f"DOES NOT FIT: {report.cause()}"


def placement_lines(plan: LaunchPlan) -> Iterator[str]:
    """Describe who runs what, one line per rank."""
    inventory = plan.inventory
    gpus = ", ".join(gpu.name for gpu in inventory.gpus) or "none"
    yield (
        f"{inventory.node}: {inventory.cpu_cores} cores ({inventory.cpu_name}), "
        f"{size(inventory.memory_available_bytes)} of {size(inventory.memory_total_bytes)} free, GPUs: {gpus}"
    )
    for rank in plan.placement.ranks if plan.placement is not None else ():
        yield (
            f"rank {rank.rank}: {rank.node} {rank.device}  layers {rank.layers[0]}-{rank.layers[1] - 1}, "
            f"KV heads {rank.kv_heads[0]}-{rank.kv_heads[1] - 1}, experts {rank.experts[0]}-{rank.experts[1] - 1}"
        )


def base_url(plan: LaunchPlan) -> str:
    """The address a client on this machine uses."""
    host = plan.config.server.host.strip("[]")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{host_and_port(host, plan.config.server.port)}"


def curl_line(plan: LaunchPlan, url: str) -> str:
    """A request to paste into a shell; a key is named, never shown."""
    body = {"model": plan.config.server.served_model_names[0], "messages": [{"role": "user", "content": "Hello!"}]}
    key = plan.entry.secret("api-key")
    header = ""
    if key is not None:
        reading = {"env": f"${key.name}", "file": f"$(cat {key.name})"}.get(key.kind, "YOUR_KEY")
        header = f' -H "Authorization: Bearer {reading}"'
    # No single quote can occur: served names have none by the schema's pattern.
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} -d '{json.dumps(body)}'"


def plan_data(plan: LaunchPlan) -> dict[str, Any]:
    """The plan as plain values, for `--json`. Secrets are references; variables named like secrets are hidden."""
    report = plan.fit
    return {
        "name": plan.name,
        "model": plan.entry.model,
        "folder": None if plan.files.folder is None else str(plan.files.folder),
        "values": entry_values(plan.entry),
        "fit": None if report is None else _fit_data(report),
        "memory": [memory_data(memory) for memory in plan.memory],
        "placement": [
            {
                "rank": rank.rank,
                "node": rank.node,
                "device": rank.device,
                "layers": list(rank.layers),
                "copied_experts": list(rank.copied_experts),
                "nics": list(nics_of(plan.inventory, rank)),
            }
            for rank in (plan.placement.ranks if plan.placement is not None else ())
        ],
        "environment": {item.name: {"value": item.shown, "origin": item.origin} for item in plan.environment},
        "url": base_url(plan) if plan.is_head else "",
        "head_addr": head_to_join(plan.config.nodes) or None,
        "engine_config": json.loads(shown_config(plan.config)),
        "working_folder": str(plan.working_folder),
        "argv": list(plan.argv),
        "notes": list(plan.notes),
        "warnings": [issue.as_dict() for issue in plan.warnings],
        "problems": [error_data(error) for error in plan.problems],
        "blockers": [error_data(error) for error in plan.blockers],
    }


def entry_values(entry: ResolvedEntry) -> dict[str, Any]:
    """Every key of an entry with its value and origin, as plain values."""
    return {key: {"value": plain_value(item.value), "origin": str(item.origin)} for key, item in entry.values.items()}


def error_data(error: HlaunchError) -> dict[str, Any]:
    """An error as plain values."""
    return {"exit_code": int(error.exit_code), "message": error.message, "hint": error.hint}


def memory_data(memory: RankMemory) -> dict[str, Any]:
    """The memory of a rank as plain values."""
    return {**asdict(memory), "required_bytes": memory.required_bytes, "room_requests": memory.room_requests}


def _fit_data(report: FitReport) -> dict[str, Any]:
    memory = report.memory
    return {
        "fits": report.fits,
        "budget_bytes": memory.budget_bytes,
        "weight_bytes": memory.weight_bytes,
        "checkpoint_bytes": report.checkpoint_bytes,
        "activation_bytes": memory.activation_bytes,
        "runtime_bytes": memory.runtime_bytes,
        "held_bytes": memory.held_bytes,
        "load_bytes": memory.load_bytes,
        "kv_bytes": memory.kv_bytes,
        "kv_blocks": memory.num_blocks,
        "full_request_bytes": report.full_request_bytes,
        "max_full_requests": round(max(0.0, memory.max_full_requests), 3),
        "dtype": report.dtype,
        "kv_dtype": report.kv_dtype,
        "suggestions": [dict(suggestion.settings) for suggestion in report.suggestions],
    }


def plain_value(value: object) -> object:
    """A registry value as JSON has it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return list(value) if isinstance(value, tuple) else str(value)


def span_bar(began: float, seconds: float, total: float, width: int = 30) -> str:
    """Draw one phase of a start as its stretch of the whole, in `width` characters; a moment gets a thin mark."""
    scale = width / max(total, 1e-9)
    first = min(width - 1, max(0, round(began * scale)))
    length = min(width - first, round(seconds * scale))
    return "·" * first + ("█" * length or "▏") + "·" * (width - first - max(1, length))
