"""Decode speed on a CPU against transformers' `generate`, side by side in one run, on the same weights.

    python bench/cpu_vs_transformers.py [--model tiny-oss] [--threads 2] [--repeats 3] [--out result.json]

One request: 128 tokens in, 128 out, greedy. Sixteen requests of unequal length: prompts of 16 to 240 tokens, 16 to 240
tokens out; transformers runs them as one left-padded batch until the longest has ended, which is what its `generate`
offers, and only the tokens that were asked for count. Each side runs in its best form: transformers with each of its
expert implementations, of which the fastest counts. Rounds alternate between the sides, so that a busy machine slows
both; the figures are medians. Greedy tokens must be equal, or the run fails (near-ties excepted, and counted).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine import LLM, SamplingParams
from engine.config import load_model_config, parse_model_config, resolve_model_folder
from engine.models.checkpoint import Checkpoint
from engine.models.gpt_oss_weights import expected_tensors, open_source
from kernels.ops import mxfp4_expand

EXPERT_IMPLEMENTATIONS = ("eager", "grouped_mm")
SINGLE_TOKENS = 128


def transformers_model(folder: Path) -> Any:
    """Build transformers' model in float32 with the folder's weights, MXFP4 expanded."""
    from transformers import GptOssConfig, GptOssForCausalLM

    raw = json.loads((folder / "config.json").read_text())
    model = parse_model_config(raw)
    source = open_source(Checkpoint.open(folder), model)
    dropped = ("quantization_config", "architectures", "torch_dtype", "transformers_version", "eos_token_id")
    config = GptOssConfig(**{key: value for key, value in raw.items() if key not in dropped})
    config.eos_token_id = None
    oracle = GptOssForCausalLM(config)
    state = {}
    for name in expected_tensors(model):
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            values = mxfp4_expand(source.get(name), source.get(base + "_scales"), torch.float32)
            state[base] = values.transpose(1, 2).contiguous()
        elif not name.endswith("_scales"):
            state[name] = source.get(name).float()
    oracle.load_state_dict(state)
    return oracle.eval()


def transformers_generate(
    oracle: Any, prompts: list[list[int]], counts: list[int], implementation: str
) -> list[list[int]]:
    """Greedy tokens of one left-padded batch, cut to what each request asked for."""
    oracle.config._experts_implementation = implementation
    for layer in oracle.model.layers:
        layer.mlp.experts.config._experts_implementation = implementation
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        out = oracle.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(counts),
            min_new_tokens=max(counts),
            do_sample=False,
            pad_token_id=0,
        )
    return [row[longest : longest + count].tolist() for row, count in zip(out, counts, strict=True)]


def our_generate(llm: LLM, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
    """Greedy tokens of the same requests through the engine: scheduler, worker, detokenizer."""
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in counts]
    return [result.outputs[0].token_ids for result in llm.generate(prompts, params, use_tqdm=False)]


def timed(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    tokens = run()
    return time.perf_counter() - started, tokens


def count_forks(oracle: Any, prompts: list[list[int]], ours: list[list[int]], theirs: list[list[int]]) -> int:
    """Count requests whose tokens part at a near-tie; any other difference is an error."""
    forks = 0
    for prompt, mine, other in zip(prompts, ours, theirs, strict=True):
        if mine == other:
            continue
        at = next(i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + mine[:at]])).logits[0, -1]
        if abs(float(logits[mine[at]] - logits[other[at]])) > 1e-3:
            raise SystemExit(f"error: tokens differ at {at} without a tie: {mine[at]} against {other[at]}")
        forks += 1
    return forks


def compare(
    name: str, oracle: Any, llm: LLM, prompts: list[list[int]], counts: list[int], repeats: int
) -> dict[str, Any]:
    """Run one scenario on all sides, in turn."""
    seconds: dict[str, list[float]] = {"hlaunch": [], **{impl: [] for impl in EXPERT_IMPLEMENTATIONS}}
    ours: list[list[int]] = []
    theirs: list[list[int]] = []
    our_generate(llm, prompts, [2] * len(prompts))
    for impl in EXPERT_IMPLEMENTATIONS:
        transformers_generate(oracle, prompts, [2] * len(prompts), impl)
    for _ in range(repeats):
        took, ours = timed(lambda: our_generate(llm, prompts, counts))
        seconds["hlaunch"].append(took)
        for impl in EXPERT_IMPLEMENTATIONS:
            took, theirs = timed(lambda impl=impl: transformers_generate(oracle, prompts, counts, impl))  # type: ignore[misc]
            seconds[impl].append(took)
    useful = sum(counts)
    rates = {side: useful / statistics.median(times) for side, times in seconds.items()}
    best = max(EXPERT_IMPLEMENTATIONS, key=lambda impl: rates[impl])
    result = {
        "requests": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "useful_tokens": useful,
        "tokens_per_second": {side: round(rate, 1) for side, rate in rates.items()},
        "seconds": {side: [round(value, 4) for value in times] for side, times in seconds.items()},
        "best_transformers": best,
        "ratio": round(rates["hlaunch"] / rates[best], 2),
        "requests_forked_at_a_near_tie": count_forks(oracle, prompts, ours, theirs),
    }
    print(
        f"{name}: hlaunch {rates['hlaunch']:.0f} tok/s, transformers {rates[best]:.0f} tok/s ({best}), "
        f"ratio {result['ratio']}",
        file=sys.stderr,
    )
    return result


def fingerprint(threads: int) -> dict[str, Any]:
    """Say what machine and code this was."""
    from importlib.metadata import version

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), cpu)
    return {
        "commit": commit.stdout.strip(),
        "cpu": cpu,
        "threads": threads,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-oss", help="a bundled name or a checkpoint folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the JSON here instead of standard output")
    arguments = parser.parse_args()
    folder = resolve_model_folder(arguments.model)
    if folder is None:
        raise SystemExit(f"error: no checkpoint folder {arguments.model!r}")
    llm = LLM(arguments.model, cpu_threads=arguments.threads, enable_prefix_caching=False)
    oracle = transformers_model(folder)
    torch.set_num_threads(arguments.threads)
    vocab_size = load_model_config(folder).vocab_size
    generator = torch.Generator().manual_seed(0)

    def prompt(length: int) -> list[int]:
        # The upper ids are control tokens.
        drawn: list[int] = torch.randint(1, vocab_size - 64, (length,), generator=generator).tolist()
        return drawn

    lengths = [16 + 224 * (i * 7 % 16) // 15 for i in range(16)]
    counts = [16 + 224 * (i * 11 % 16) // 15 for i in range(16)]
    report = {
        "machine": fingerprint(arguments.threads),
        "model": arguments.model,
        "single": compare("1 request", oracle, llm, [prompt(128)], [SINGLE_TOKENS], arguments.repeats),
        "batch": compare("16 requests", oracle, llm, [prompt(n) for n in lengths], counts, arguments.repeats),
    }
    text = json.dumps(report, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
