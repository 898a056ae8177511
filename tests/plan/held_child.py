"""Run in a process of its own: load a model, serve every kind of step, print what memory that took.

Arguments: the model folder, `expand` or `pack`. Prints JSON of byte counts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import random
import sys
from pathlib import Path

from engine.config import EngineConfig, ModelConfig, SchedulerConfig
from engine.core.plan import AdmittedRow, ExecutionPlan
from engine.core.sampling_params import SamplingParams
from engine.engine_core import open_model, place
from engine.worker.worker import Worker

BLOCK, ROWS, PROMPT = 16, 4, 480


def resident() -> int:
    """Resident bytes of this process, after what is free was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise OSError("no Rss line")


def load(model: str, available: int | None = None) -> tuple[Worker, ModelConfig]:
    config = EngineConfig(
        model=model, cpu_threads=2, scheduler=SchedulerConfig(max_num_seqs=ROWS, max_num_batched_tokens=512)
    )
    _, shape = open_model(config)
    worker = Worker(config, shape, place(config, shape).ranks[0])
    if available is not None:
        worker.available_memory = lambda: available  # type: ignore[method-assign]
    worker.load(lambda *_: None)
    return worker, shape


def serve(worker: Worker, model: ModelConfig) -> int:
    """Serve prompts and decode steps of all batch sizes; returns the bytes of the KV pool, all of it touched."""
    groups = worker._num_groups if hasattr(worker, "_num_groups") else 2
    per_row = -(-PROMPT // BLOCK) + 2
    worker.allocate_kv(1 + ROWS * groups * per_row)
    runner = worker._runner
    assert runner is not None
    pool = {cache.data_ptr(): cache for cache in runner._caches}
    for cache in pool.values():
        cache.fill_(0)
    worker.warm_up()
    groups = worker._num_groups
    chance = random.Random(0)
    step = 0
    for row in range(ROWS):
        first = 1 + row * groups * per_row
        admitted = AdmittedRow(
            row=row,
            generation=0,
            request_id=str(row),
            token_ids=[chance.randrange(model.vocab_size) for _ in range(PROMPT)],
            num_prompt_tokens=PROMPT,
            num_computed_tokens=0,
            block_ids=tuple(list(range(first + g * per_row, first + (g + 1) * per_row)) for g in range(groups)),
            params=SamplingParams(temperature=0.0, max_tokens=20),
            seed=0,
            stop_token_ids=(),
        )
        worker.execute(ExecutionPlan(step, [row], [PROMPT], [True], admits=[admitted]))
        step += 1
    # Few rows and many, so that each expert meets both.
    for count in (1, 2, 3, 4) * 6:
        rows = list(range(count))
        worker.execute(ExecutionPlan(step, rows, [1] * count, [True] * count))
        step += 1
    return sum(cache.nbytes for cache in pool.values())


def main() -> None:
    folder, form = sys.argv[1:]
    # Libraries, threads and buffers of torch come first, on a model that is gone afterwards.
    worker, model = load("tiny-oss")
    serve(worker, model)
    del worker
    before = resident()
    worker, model = load(folder, None if form == "expand" else 1)
    loaded = resident()
    kv_bytes = serve(worker, model)
    after = resident()
    tables = sum(table.tensor.nbytes for table in worker._runner._batch._tables) if worker._runner else 0
    print(
        json.dumps(
            {
                "weight_bytes": worker.weight_bytes,
                "loaded": loaded - before,
                "served": after - before,
                "kv_bytes": kv_bytes,
                "table_bytes": tables,
            }
        )
    )


if __name__ == "__main__":
    main()
