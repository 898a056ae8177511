"""Metrics as servers write them, with figures of the test's choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

BOUNDS = ("0.001", "0.005", "0.01", "0.02", "0.04", "0.1", "1.0", "+Inf")


def histogram(name: str, labels: str, counts: Sequence[int]) -> str:
    """Counts per bucket, not cumulative; one per bound."""
    lines, total = [f"# HELP {name} Histogram.", f"# TYPE {name} histogram"], 0
    for bound, count in zip(BOUNDS, counts, strict=True):
        total += count
        lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {float(total)}')
    return "\n".join([*lines, f"{name}_count{{{labels}}} {float(total)}", f"{name}_sum{{{labels}}} 1.5"]) + "\n"


def vllm(
    tokens: Sequence[float] = (1000.0, 500.0),
    *,
    values: Mapping[str, float] | None = None,
    first_token: Sequence[int] = (0, 0, 0, 0, 0, 0, 0, 0),
) -> str:
    """What vLLM 0.1x writes with one engine per entry of `tokens`, among the metrics of Python's client itself."""
    text = (
        "# HELP python_gc_objects_collected_total Objects collected during gc\n"
        "# TYPE python_gc_objects_collected_total counter\n"
        'python_gc_objects_collected_total{generation="0"} 12207.0\n'
        "# HELP process_virtual_memory_bytes Virtual memory size in bytes.\n"
        "# TYPE process_virtual_memory_bytes gauge\n"
        "process_virtual_memory_bytes 3.7238489088e+010\n"
    )
    base = {
        "num_requests_running": 8.0, "num_requests_waiting": 3.0, "kv_cache_usage_perc": 0.25,
        "num_preemptions_total": 2.0, "prompt_tokens_total": 4000.0, "prefix_cache_queries_total": 4000.0,
        "prefix_cache_hits_total": 1000.0, **(values or {}),
    }  # fmt: skip
    for name, value in base.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        text += f"# HELP vllm:{name} Words.\n# TYPE vllm:{name} {kind}\n"
        for engine in range(len(tokens)):
            text += f'vllm:{name}{{engine="{engine}",model_name="openai/gpt-oss-20b"}} {value}\n'
    text += "# TYPE vllm:generation_tokens_total counter\n"
    for engine, count in enumerate(tokens):
        text += f'vllm:generation_tokens_total{{engine="{engine}",model_name="openai/gpt-oss-20b"}} {count}\n'
        for reason, ended in (("stop", 5), ("length", 2), ("abort", 0)):
            text += (
                f'vllm:request_success_total{{engine="{engine}",finished_reason="{reason}",'
                f'model_name="openai/gpt-oss-20b"}} {float(ended)}\n'
            )
    text += 'vllm:request_success_created{engine="0",finished_reason="stop"} 1.7e+09\n'
    for engine in range(len(tokens)):
        text += histogram("vllm:time_to_first_token_seconds", f'engine="{engine}",model_name="x"', first_token)
    return text


def ranks(seconds: float, *, num_ranks: int = 4, num_engines: int = 1) -> str:
    """What hlaunch writes of its ranks after `seconds`: half of them on another node, each a little less busy."""
    text = ""
    for rank in range(num_ranks):
        node, engine = f"node{2 * rank // num_ranks}", rank * num_engines // num_ranks
        place = f'device="cuda:{rank % 8}",engine="{engine}",model_name="x",node="{node}",rank="{rank}"'
        is_last = rank == num_ranks - 1
        state, lasts = ("stopped by a signal", 5.0) if is_last else ("computing", 0.004)
        for name, value in (
            ("idle_seconds_total", seconds * 0.1),
            ("computing_seconds_total", seconds * (0.9 - 0.2 * rank / num_ranks)),
            ("waiting_seconds_total", seconds * 0.2 * rank / num_ranks),
            ("state_seconds", lasts), ("memory_bytes", float(70 + rank) * 2**30), ("power_watts", 400.0 + rank),
        ):  # fmt: skip
            text += f"hlaunch_rank_{name}{{{place}}} {value}\n"
        text += f'hlaunch_rank_state{{{place},state="{state}"}} 1.0\n'
    for node in ("node0", "node1"):
        text += f'hlaunch_node_rdma_clock_seconds_total{{node="{node}"}} {1e6 + seconds}\n'
        for word, rate in (("sent", 12.5e9), ("received", 11e9)):
            text += f'hlaunch_node_rdma_{word}_bytes_total{{node="{node}"}} {rate * seconds}\n'
    return text


SGLANG = """\
# HELP sglang:generation_tokens_total Number of generation tokens processed.
# TYPE sglang:generation_tokens_total counter
sglang:generation_tokens_total{model_name="meta/llama"} 7.557572e+06
sglang:prompt_tokens_total{model_name="meta/llama"} 8.0e+06
sglang:cached_tokens_total{model_name="meta/llama"} 2.0e+06
sglang:token_usage{dp_rank="0",model_name="meta/llama",tp_rank="0"} 0.28
sglang:token_usage{dp_rank="0",model_name="meta/llama",tp_rank="1"} 0.28
sglang:num_running_reqs{dp_rank="0",model_name="meta/llama",tp_rank="0"} 6
sglang:num_running_reqs{dp_rank="0",model_name="meta/llama",tp_rank="1"} 6
sglang:num_queue_reqs{dp_rank="0",model_name="meta/llama",tp_rank="0"} 1
sglang:time_to_first_token_seconds_bucket{le="0.1",model_name="meta/llama"} 50
sglang:time_to_first_token_seconds_bucket{le="+Inf",model_name="meta/llama"} 100
"""
