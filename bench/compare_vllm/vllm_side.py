"""vLLM's side of the comparison: one JSON request on stdin, JSON lines on stdout. Runs under vLLM's own Python.

    in   {"model", "points": [[requests, input, output], …], "runs", "warm_up", "seed", "started", "deadline_seconds",
          "backend": "triton" | "marlin", "vocab_size", "tensor_parallel_size", "max_model_len", "max_num_seqs",
          "gpu_memory_utilization", "graph_sizes": [..] or null, "options": more arguments of vllm.LLM}

Stands alone: nothing of hlaunch is imported, so that neither side's packages reach the other. The prompts are those of
`engine.benchmark.protocol.random_prompts`, and a test holds the two functions against each other.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any


def random_prompts(seed: str, count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Draw the same prompts as the other side."""
    source = random.Random(seed)
    return [[source.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


def say(event: str, **fields: Any) -> None:
    sys.__stdout__.write(json.dumps({"event": event, **fields}) + "\n")
    sys.__stdout__.flush()


def engine_options(request: dict[str, Any]) -> dict[str, Any]:
    """vLLM's options: nothing that would slow it down, no prefix reuse, no text."""
    options: dict[str, Any] = {
        "model": request["model"],
        "skip_tokenizer_init": True,
        "max_model_len": request["max_model_len"],
        "max_num_seqs": request["max_num_seqs"],
        "tensor_parallel_size": request.get("tensor_parallel_size", 1),
        "gpu_memory_utilization": request["gpu_memory_utilization"],
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    if request.get("graph_sizes"):
        options["compilation_config"] = {"cudagraph_capture_sizes": request["graph_sizes"]}
    if request["backend"] == "marlin":
        options["moe_backend"] = "marlin"
    return options | request.get("options", {})


def run(request: dict[str, Any]) -> None:
    started = float(request["started"])
    end = None if request.get("deadline_seconds") is None else started + float(request["deadline_seconds"])
    import torch
    import vllm

    imported = time.time()
    llm = vllm.LLM(**engine_options(request))
    ready = time.time()
    say(
        "ready",
        ready_seconds=ready - started,
        import_seconds=imported - started,
        init_seconds=ready - imported,
        versions={"vllm": vllm.__version__, "torch": torch.__version__},
        device={"name": torch.cuda.get_device_name(0)},
    )

    def seconds(n: int, length: int, number: int, phase: str, tokens: int) -> float:
        ids = random_prompts(f"{request['seed']}/{n}/{length}/{number}/{phase}", n, length, request["vocab_size"])
        prompts = [{"prompt_token_ids": one} for one in ids]
        params = vllm.SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0, detokenize=False)
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - begin
        made = sum(len(output.outputs[0].token_ids) for output in outputs)
        if made != n * tokens:
            raise RuntimeError(f"{made} tokens came instead of {n * tokens}")
        return took

    def measure(n: int, length: int, out: int, number: int) -> dict[str, Any]:
        first = seconds(n, length, number, "first", 1)
        found: dict[str, Any] = {"first_seconds": first, "prefill_tokens_per_second": n * length / first}
        if out > 1:
            full = seconds(n, length, number, "full", out)
            rate = n * (out - 1) / (full - first) if full > first else None
            found |= {
                "full_seconds": full,
                "decode_tokens_per_second": rate,
                "output_tokens_per_second": n * out / full,
            }
        return found

    for n, length, out in request["points"]:
        facts = {"num_requests": n, "input_tokens": length, "output_tokens": out}
        last = 0.0
        for number in range(-int(request["warm_up"]), int(request["runs"])):
            if end is not None and time.time() + 1.1 * last > end:
                say("skipped", **facts, run=number, reason="the deadline")
                break
            begin = time.perf_counter()
            figures = measure(n, length, out, number)
            last = time.perf_counter() - begin
            if number < 0:
                say("warm-up", **facts, seconds=last)
            else:
                say("run", **facts, run=number, **figures)
    say("done")


def main() -> int:
    request = json.load(sys.stdin)
    # vLLM prints to stdout as it likes; ours is for JSON lines alone.
    sys.stdout = sys.stderr
    try:
        run(request)
    except Exception as error:  # noqa: BLE001 - the process boundary: the parent shows one line
        import traceback

        traceback.print_exc()
        message = str(error).splitlines()[0] if str(error) else ""
        say("error", kind=type(error).__name__, message=message, hint="")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
