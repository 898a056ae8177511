"""Drive a Worker by plans written by hand, without a scheduler: a block allocator of a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.config import CacheConfig, EngineConfig, load_model_config
from engine.core.plan import AdmittedRow, ExecutionPlan, StepResult
from engine.core.sampling_params import SamplingParams
from engine.memory import kv_cache_groups
from engine.placement import single_rank
from engine.worker.worker import Worker

GREEDY = SamplingParams(temperature=0.0)


def make_worker(folder: Path, num_blocks: int = 200, block_size: int = 16, **changes: Any) -> Worker:
    """Load a checkpoint folder into a worker with a KV pool."""
    model = load_model_config(folder)
    config = EngineConfig(model=str(folder), cache=CacheConfig(block_size=block_size), cpu_threads=1, **changes)
    placement = single_rank(
        node="local",
        device="cpu:0",
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        intermediate_size=model.intermediate_size,
        num_experts=model.num_experts,
    )
    worker = Worker(config, model, placement.ranks[0])
    worker.load(lambda *_: None)
    worker.allocate_kv(num_blocks)
    return worker


class Driver:
    """Plans for a worker. Blocks below a window are taken back as a scheduler would, and handed out again."""

    def __init__(self, worker: Worker, num_blocks: int = 200, block_size: int = 16) -> None:
        self.worker = worker
        self.size = block_size
        self.windows = [group.window for group in kv_cache_groups(worker._model_config)]
        self.free = list(range(num_blocks - 1, 0, -1))
        self.tables: dict[int, list[list[int]]] = {}
        self.computed: dict[int, int] = {}
        self.length: dict[int, int] = {}
        self.released: list[int] = []
        self.step_id = 0

    def _extend(self, row: int, end: int) -> list[tuple[int, int, list[int]]]:
        grown = []
        for group, table in enumerate(self.tables[row]):
            window = self.windows[group]
            if window is not None:
                for i in range(max(0, self.computed[row] - window + 1) // self.size):
                    if table[i]:
                        self.free.insert(0, table[i])
                        table[i] = 0
            fresh = [self.free.pop() for _ in range(-(-end // self.size) - len(table))]
            table += fresh
            if fresh:
                grown.append((row, group, fresh))
        return grown

    def admit(
        self,
        row: int,
        tokens: list[int],
        params: SamplingParams = GREEDY,
        *,
        num_prompt: int | None = None,
        blocks: list[list[int]] | None = None,
        computed: int = 0,
        seed: int = 0,
        stop: tuple[int, ...] = (),
    ) -> AdmittedRow:
        """Make the admission of a row; its blocks cover nothing but the prefix until it is scheduled."""
        self.tables[row] = [list(ids) for ids in blocks] if blocks else [[] for _ in self.windows]
        self.computed[row] = computed
        self.length[row] = len(tokens)
        return AdmittedRow(
            row=row,
            generation=0,
            request_id=f"r{row}",
            token_ids=list(tokens),
            num_prompt_tokens=len(tokens) if num_prompt is None else num_prompt,
            num_computed_tokens=computed,
            block_ids=tuple(list(ids) for ids in self.tables[row]),
            params=params,
            seed=seed,
            stop_token_ids=stop,
        )

    def release(self, row: int) -> None:
        """Give a row's blocks back; the next plan tells the worker."""
        for table in self.tables.pop(row):
            self.free[:0] = [block for block in table if block]
        self.released.append(row)

    def step(self, counts: dict[int, int], admits: list[AdmittedRow] | None = None) -> StepResult:
        """Compute `counts[row]` tokens of each row, sampling where that catches up with its tokens."""
        plan = ExecutionPlan(self.step_id, [], [], [], admits=admits or [], released=self.released)
        self.released = []
        for row, count in counts.items():
            plan.new_blocks += self._extend(row, self.computed[row] + count)
            self.computed[row] += count
            plan.rows.append(row)
            plan.num_scheduled.append(count)
            samples = self.computed[row] == self.length[row]
            plan.samples.append(samples)
            self.length[row] += samples
        self.step_id += 1
        return self.worker.execute(plan)

    def generate(self, row: int, tokens: list[int], count: int, *, chunk: int = 0, **admit: Any) -> list[int]:
        """Prefill a row in chunks, then decode alone until `count` tokens are there."""
        admits = [self.admit(row, tokens, **admit)]
        out: list[int] = []
        while len(out) < count:
            left = self.length[row] - self.computed[row]
            result = self.step({row: min(left, chunk) if chunk else left}, admits)
            admits = []
            out += result.token_ids
        return out
