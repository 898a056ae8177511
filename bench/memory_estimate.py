"""Hold `hlaunch plan`'s memory against what engine processes really take, on CPUs, and print the table.

    python bench/memory_estimate.py [--case NAME]... [--json]

Each case is a real engine in a process of its own (`bench/memory_probe.py`), driven to its limits. PLAN is what the
launcher counts before anything starts, REAL the largest resident size while loading or serving. True widths are those
of gpt-oss-20b, with few layers, few experts and a part of the vocabulary; weights are made up, by `load-format: dummy`
or as a checkpoint of `hlaunch synth`'s values.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, SchedulerConfig, load_model_config, resolve_model_folder
from launcher.plan.fit import report_fit
from launcher.plan.known_models import KNOWN_CONFIGS

ROOT = Path(__file__).resolve().parent.parent
PROBE = ROOT / "bench" / "memory_probe.py"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """One engine. `shape` changes gpt-oss-20b's; None is tiny-oss. `available_bytes` stands for the machine's memory:
    little keeps experts packed."""

    name: str
    shape: dict[str, Any] | None
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    is_checkpoint: bool = False
    dtype: str = "auto"
    available_bytes: int = 16 << 30


def _shape(num_layers: int, num_experts: int, vocab_size: int, **other: Any) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"]
    return {
        **KNOWN_CONFIGS["openai/gpt-oss-20b"],
        "num_hidden_layers": num_layers,
        "layer_types": [kinds[layer % 2] for layer in range(num_layers)],
        "num_local_experts": num_experts,
        "num_experts_per_tok": min(4, num_experts),
        "experts_per_token": min(4, num_experts),
        "vocab_size": vocab_size,
        "eos_token_id": 2,
        "pad_token_id": 1,
        **other,
    }


CASES = (
    Case("tiny-oss", None, 1024, 6, 1024),
    Case("true-widths-dummy", _shape(2, 4, 8192), 256, 2, 256),
    Case("true-widths-checkpoint", _shape(2, 2, 16384), 256, 2, 256, is_checkpoint=True),
    Case(
        "true-widths-packed-checkpoint", _shape(2, 2, 16384), 256, 1, 256, is_checkpoint=True, available_bytes=1 << 30
    ),
    Case("tiny-oss-defaults", None, 2048, 16, 2048),
    Case(
        "quarter-widths",
        _shape(4, 8, 32768, hidden_size=736, intermediate_size=736, num_attention_heads=16),
        2048,
        4,
        512,
    ),
    Case("tiny-oss-many-rows", None, 512, 64, 512),
    Case("tiny-oss-chunked", None, 2048, 8, 256),
    Case("tiny-oss-alone", None, 2048, 1, 2048),
    Case(
        "quarter-widths-many-rows",
        _shape(2, 8, 32768, hidden_size=736, intermediate_size=736, num_attention_heads=16),
        1024,
        24,
        2048,
    ),
    Case("true-widths-long-steps", _shape(2, 2, 8192), 2048, 4, 2048),
    Case("true-widths-vocab", _shape(2, 4, 32768), 512, 2, 512),
    Case("true-widths-bfloat16", _shape(2, 4, 32768), 256, 2, 256, dtype="bfloat16"),
)


@dataclass(frozen=True, slots=True)
class Result:
    """Bytes planned and measured."""

    case: str
    planned: dict[str, int]
    measured: dict[str, int]

    @property
    def real_bytes(self) -> int:
        return max(self.measured["loading_bytes"], self.measured["serving_bytes"])

    @property
    def ratio(self) -> float:
        return self.real_bytes / self.planned["required_bytes"]


def measure(case: Case, folder: Path) -> Result:
    """Plan a case and run it; `folder` is for its files."""
    config = EngineConfig(
        model="tiny-oss" if case.shape is None else str(folder),
        dtype=case.dtype,  # type: ignore[arg-type]
        max_model_len=case.max_model_len,
        cpu_threads=2,
        scheduler=SchedulerConfig(max_num_seqs=case.max_num_seqs, max_num_batched_tokens=case.max_num_batched_tokens),
    )
    if case.shape is not None:
        (folder / "config.json").write_text(json.dumps(case.shape))
        if case.is_checkpoint:
            _run([sys.executable, str(PROBE), "--write", str(folder)], "")
        else:
            config = replace(config, load_format="dummy")
    found = resolve_model_folder(config.model)
    if found is None:
        raise FileNotFoundError(config.model)
    files = None if config.load_format == "dummy" else found
    report = report_fit(config, load_model_config(found), files, case.available_bytes)
    memory = report.memory
    planned = {
        "weight_bytes": memory.weight_bytes,
        "held_bytes": memory.held_bytes,
        "activation_bytes": memory.activation_bytes,
        "kv_bytes": memory.kv_bytes,
        "runtime_bytes": memory.runtime_bytes,
        "load_bytes": memory.load_bytes,
        "required_bytes": memory.required_bytes,
    }
    command = [sys.executable, str(PROBE), "--available", str(case.available_bytes)]
    return Result(case.name, planned, json.loads(_run(command, config.to_json())))


def _run(command: list[str], text: str) -> str:
    # A clean environment: allocators and thread pools obey variables.
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, env=environment, timeout=900, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def table(results: list[Result]) -> str:
    """Lay the results out, in MiB."""
    columns = ("weight", "held", "activation", "kv", "runtime", "required")
    heads = ("WEIGHTS", "HELD", "STEP", "KV", "RUNTIME", "PLAN")
    lines = [
        f"{'CASE':<30}" + "".join(f"{head:>9}" for head in heads) + f"{'LOADING':>9}{'SERVING':>9}{'REAL/PLAN':>11}"
    ]
    for result in results:
        planned = "".join(f"{result.planned[f'{column}_bytes'] / MIB:9.0f}" for column in columns)
        real = "".join(f"{result.measured[f'{phase}_bytes'] / MIB:9.0f}" for phase in ("loading", "serving"))
        lines.append(f"{result.case:<30}{planned}{real}{result.ratio:11.3f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = []
    for case in CASES:
        if arguments.case and case.name not in arguments.case:
            continue
        with tempfile.TemporaryDirectory(prefix="hlaunch-memory-") as folder:
            results.append(measure(case, Path(folder)))
        if not arguments.json:
            print(f"{case.name}: {results[-1].ratio:.3f}", file=sys.stderr)
    if arguments.json:
        found = [{"case": r.case, "planned": r.planned, "measured": r.measured, "ratio": r.ratio} for r in results]
        print(json.dumps(found, indent=2))
    else:
        print(table(results))


if __name__ == "__main__":
    main()
