"""One rank on a CPU: loads its weights, holds its KV pool, executes plans. Its twin is `gpu_worker`.

Knows: the configuration, the model's files, the device. Refuses to know: scheduling policy, text, processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from engine.comm.ranks import RankLinks
from engine.config import ConfigError, EngineConfig, ModelConfig, resolve_model_folder
from engine.core.plan import AdmittedRow, ExecutionPlan, StepResult
from engine.core.sampling_params import SamplingParams
from engine.memory import KVCacheGroup, MemoryFit, cpu_dtype, fit_engine, kv_cache_groups, should_expand_experts
from engine.models.checkpoint import Checkpoint, CheckpointError, TensorSource
from engine.models.dummy import DummySource
from engine.models.gpt_oss import GptOss
from engine.models.gpt_oss_weights import LoadOptions, load_gpt_oss, open_source
from engine.placement import RankSpec, shard
from engine.usage import DeviceUsage
from engine.worker import cpu
from engine.worker.model_runner import ModelRunner
from kernels.ops import probe

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Worker:
    """A rank of a placement. Call `load`, `allocate_kv`, `warm_up`, then `execute` for each plan, in order.

    With `links` it holds and computes the share that `rank` names; without, it is alone with the whole model.
    """

    def __init__(
        self, config: EngineConfig, model: ModelConfig, rank: RankSpec, links: RankLinks | None = None
    ) -> None:
        if not rank.device.startswith("cpu"):
            raise ConfigError("device", f"{rank.device!r} is neither cpu nor cuda:N")
        self.spec = rank
        self._config = config
        self._model_config = model
        self._rank = None if links is None else rank
        self._links = links or RankLinks()
        # The shape of what this rank holds.
        self._share = model if links is None else shard(model, rank)
        self.device_name = "cpu"
        self.dtype_name = cpu_dtype(config.dtype)
        self.kv_dtype_name = self.dtype_name if config.cache.dtype == "auto" else config.cache.dtype
        cpu.settle_allocator(model.hidden_size)
        self.num_threads = cpu.use_threads(config.cpu_threads)
        self.weight_bytes = 0
        self._is_expanded = False
        self._model: GptOss | None = None
        self._runner: ModelRunner | None = None

    @torch.inference_mode()
    def load(self, progress: Callable[[float, str], None]) -> None:
        """Read the weights. Raises: CheckpointError before anything is allocated, but for a scale above 252."""
        model = self._model_config
        folder = resolve_model_folder(self._config.model)
        if self._config.load_format == "dummy":
            source: TensorSource = DummySource(model, self._config.seed or 0)
        else:
            if folder is None:
                raise CheckpointError(self._config.model, "", "a checkpoint folder", "none")
            source = open_source(Checkpoint.open(folder), model)
        self._is_expanded = should_expand_experts(self._share, self.dtype_name, self.available_memory())
        options = LoadOptions(
            dtype=_DTYPES[self.dtype_name],
            expand_experts=self._is_expanded,
            num_positions=self._config.max_model_len or model.max_position_embeddings,
            where=str(folder or Path(self._config.model)),
        )

        def report(fraction: float, detail: str) -> None:
            # A layer's load leaves holes behind that the next one's tensors do not fit into.
            cpu.give_back_freed()
            progress(fraction, detail)

        self._model = load_gpt_oss(source, model, options, report, self._links, self._rank)
        self.weight_bytes = self._model.num_bytes
        cpu.give_back_freed()

    def available_memory(self) -> int:
        """Bytes that this rank may still take."""
        return cpu.available_memory()

    def usage(self) -> DeviceUsage:
        """Measure the memory of this process. From any thread."""
        return DeviceUsage(cpu.resident_memory())

    def fit_memory(self, max_model_len: int) -> MemoryFit:
        """Size the KV pool from the memory at hand."""
        return fit_engine(
            self._config,
            self._model_config,
            max_model_len,
            budget_bytes=self.available_memory() + self.weight_bytes,
            weight_bytes=self.weight_bytes,
            kv_dtype=self.kv_dtype_name,
            is_expanded=self._is_expanded,
        )

    def allocate_kv(self, num_blocks: int) -> None:
        """Make the KV pool, zeroed: block 0 stays so."""
        if self._model is None:
            raise RuntimeError("load() comes before allocate_kv()")
        config, size = self._model_config, self._config.cache.block_size
        groups = kv_cache_groups(config) if self._rank is None else groups_of_stage(config, self._rank)
        shape = (num_blocks * size, 2, self._share.num_kv_heads, config.head_dim)
        slots = range(max(len(group.layers) for group in groups))
        storage = [torch.zeros(shape, dtype=_DTYPES[self.kv_dtype_name]) for _ in slots]
        platform = probe("cpu", _DTYPES[self.dtype_name])
        self._runner = ModelRunner(self._model, platform, groups, storage, size, config.vocab_size, self._links)
        self._num_groups = len(groups)
        self._num_blocks = num_blocks

    def warm_up(self) -> None:
        """Run a short prompt and one decode step, so that the first request finds libraries and buffers ready."""
        count = min(8, self._config.cache.block_size)
        if self._num_blocks <= self._num_groups:
            return
        row = AdmittedRow(
            row=0,
            generation=0,
            request_id="warm-up",
            token_ids=[0] * count,
            num_prompt_tokens=count,
            num_computed_tokens=0,
            block_ids=tuple([1 + group] for group in range(self._num_groups)),
            params=SamplingParams(temperature=0.0, max_tokens=2),
            seed=0,
            stop_token_ids=(),
        )
        self.execute(ExecutionPlan(-3, [0], [count - 1], [True], admits=[row]))
        self.execute(ExecutionPlan(-2, [0], [1], [True]))
        self.execute(ExecutionPlan(-1, [], [], [], released=[0]))
        cpu.give_back_freed()

    def append_tokens(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Take (row, token) pairs that the last stage sampled; of use to the stages before it."""
        if self._runner is not None and pairs:
            self._runner.append_tokens(pairs)

    def execute(self, plan: ExecutionPlan) -> StepResult:
        """Run one plan. Plans must come in the order in which they were made."""
        if self._runner is None:
            raise RuntimeError("allocate_kv() comes before execute()")
        return self._runner.execute(plan)


def groups_of_stage(model: ModelConfig, rank: RankSpec) -> tuple[KVCacheGroup, ...]:
    """Give the whole model's groups, each with the layers that this stage has of it: perhaps none.

    Block tables are the engine's, made for the groups of the whole model; so a stage must not group its layers anew.
    """
    begin, end = rank.layers
    return tuple(
        KVCacheGroup(group.window, tuple(layer for layer in group.layers if begin <= layer < end))
        for group in kv_cache_groups(model)
    )
