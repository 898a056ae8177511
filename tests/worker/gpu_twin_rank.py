"""The process of one rank of the GPU's code on a CPU: the real rank's, with the twins behind the kernels' door."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

import kernels
from tests.worker import gpu_twins

sys.modules["kernels.gpu"] = gpu_twins
kernels.gpu = gpu_twins  # type: ignore[attr-defined]

from engine.config import load_model_config, resolve_model_folder  # noqa: E402 - after the twins
from engine.core.plan import ExecutionPlan, StepResult  # noqa: E402
from engine.executor.multiproc_rank import Rank, connect, main  # noqa: E402
from engine.models.checkpoint import Checkpoint  # noqa: E402
from engine.models.gpt_oss_gpu_weights import load_gpt_oss_gpu  # noqa: E402
from engine.usage import DeviceUsage  # noqa: E402
from engine.worker.gpu_runner import GpuModelRunner, PendingStep  # noqa: E402
from engine.worker.worker import groups_of_stage  # noqa: E402


class TwinWorker:
    """Drives the GPU's runner as `GpuWorker` does, on the CPU."""

    dtype_name = kv_dtype_name = "bfloat16"
    device_name = "twin"
    weight_bytes = 0

    def __init__(self, rank: Rank) -> None:
        folder = resolve_model_folder(rank.config.model)
        assert folder is not None
        self._rank, self._links, self._folder = rank, connect(rank), folder
        self._shape = load_model_config(folder)

    @torch.inference_mode()
    def load(self, progress: Callable[[float, str], None]) -> None:
        links, spec = self._links, self._rank.spec
        self._model = load_gpt_oss_gpu(
            self._shape, Checkpoint.open(self._folder), torch.device("cpu"), num_positions=256, num_threads=1, seed=0,
            progress=progress, rank=spec, stage=links.stage,
        )  # fmt: skip
        if links.group is not None:
            rows = tuple(other.vocab[1] - other.vocab[0] for other in links.stage)
            self._model.group = gpu_twins.TwinGroup(links.group, rows)
        self._model.receiver, self._model.sender = links.receiver, links.sender

    def available_memory(self) -> int:
        return 1 << 34

    def usage(self) -> DeviceUsage:
        return DeviceUsage()

    @torch.inference_mode()
    def allocate_kv(self, num_blocks: int) -> None:
        spec, config = self._rank.spec, self._rank.config
        size, groups = config.cache.block_size, groups_of_stage(self._shape, spec)
        shape = (num_blocks * size, 2, spec.kv_heads[1] - spec.kv_heads[0], self._shape.head_dim)
        storage = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(max(len(g.layers) for g in groups))]
        self._runner = GpuModelRunner(
            self._model, groups, storage, num_rows=config.scheduler.max_num_seqs, block_size=size, max_model_len=256,
            is_eager=True,
        )  # fmt: skip

    def warm_up(self) -> None:
        pass

    def append_tokens(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._runner.append_tokens(pairs)

    def launch(self, plan: ExecutionPlan) -> PendingStep:
        return self._runner.launch(plan)

    def execute(self, plan: ExecutionPlan) -> StepResult:
        return self.launch(plan).wait()


if __name__ == "__main__":
    sys.exit(main(make_worker=TwinWorker))
