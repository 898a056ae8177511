"""One rank on a GPU: loads its share of the weights, holds its KV pool, launches plans.

Knows: the configuration, the model's files, the device and what may be wrong with it. Refuses to know: scheduling,
text, processes.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from engine.comm.ranks import RankLinks
from engine.config import ConfigError, EngineConfig, ModelConfig, resolve_model_folder
from engine.core.plan import AdmittedRow, ExecutionPlan, StepResult
from engine.core.sampling_params import SamplingParams
from engine.device import GPU_CAPABILITY
from engine.memory import MemoryFit, fit_engine, kv_cache_groups
from engine.models.checkpoint import Checkpoint, CheckpointError
from engine.placement import RankSpec, shard
from engine.usage import DeviceUsage
from engine.worker.gpu_usage import GpuMeter
from engine.worker.worker import groups_of_stage

if TYPE_CHECKING:
    from engine.comm.custom_all_reduce import GpuGroup
    from engine.comm.nccl import NcclReceiver, NcclSender
    from engine.worker.gpu_runner import PendingStep

USE_CPU = "use device cpu"
# Prompt lengths whose kernels differ; see kernels.triton.router.choose_block_t.
WARM_UP_LENGTHS = (8, 128, 1024, 8192)


class GpuError(ConfigError):
    """This machine's GPU, driver or packages cannot serve the model."""


class OutOfGpuMemory(ConfigError):
    """The GPU has less memory free than was planned with."""


class GpuWorker:
    """A rank of a placement on a CUDA device. Call `load`, `allocate_kv`, `warm_up`, then `launch` for each plan.

    With `links`, which join it to its peers' hosts, it holds the share that `rank` names and makes the same links
    between the devices; all ranks then call the same methods in the same order. Without, it is alone.
    """

    def __init__(
        self, config: EngineConfig, model: ModelConfig, rank: RankSpec, links: RankLinks | None = None
    ) -> None:
        if config.dtype not in ("auto", "bfloat16") or config.cache.dtype not in ("auto", "bfloat16"):
            raise GpuError("dtype", "a GPU computes in bfloat16", "leave dtype and kv-cache-dtype at auto")
        self.spec = rank
        self._config = config
        self._model_config = model
        self._rank = None if links is None else rank
        self._links = links or RankLinks()
        self._share = model if links is None else shard(model, rank)
        self._check_share()
        self.device = open_device(rank.device)
        self.device_name = torch.cuda.get_device_name(self.device)
        self._meter = GpuMeter(self.device.index)
        # What an engine before this one in the same process has left behind is free again.
        gc.collect()
        torch.cuda.empty_cache()
        self.dtype_name = self.kv_dtype_name = "bfloat16"
        self._free_at_start, self._total = torch.cuda.mem_get_info(self.device)
        self._max_model_len = config.max_model_len or model.max_position_embeddings
        self.weight_bytes = 0
        self._group: GpuGroup | None = None
        self._receiver: NcclReceiver | None = None
        self._sender: NcclSender | None = None

    @torch.inference_mode()
    def load(self, progress: Callable[[float, str], None]) -> None:
        """Put the weights on the GPU. Raises: CheckpointError, GpuError, OutOfGpuMemory."""
        with _packages():
            from engine.models.gpt_oss_gpu_weights import load_gpt_oss_gpu

        self._connect()
        # Compilers work while weights travel.
        self._build = ThreadPoolExecutor(1, "kernels").submit(self._build_kernels)
        config = self._config
        checkpoint = None
        if config.load_format != "dummy":
            folder = resolve_model_folder(config.model)
            if folder is None:
                raise CheckpointError(config.model, "", "a checkpoint folder", "none")
            checkpoint = Checkpoint.open(folder)
        with self._memory("weights"):
            self._model = load_gpt_oss_gpu(
                self._model_config,
                checkpoint,
                self.device,
                num_positions=self._max_model_len,
                num_threads=len(os.sched_getaffinity(0)),
                seed=config.seed or 0,
                progress=progress,
                rank=self._rank,
                stage=self._links.stage,
            )
        self._model.group, self._model.receiver, self._model.sender = self._group, self._receiver, self._sender
        self.weight_bytes = self._model.num_bytes

    def available_memory(self) -> int:
        """Bytes that this rank may still take of its device: what is left of `gpu_memory_utilization`."""
        share = int(self._config.cache.gpu_memory_utilization * self._total)
        return min(share, self._free_at_start) - self.weight_bytes

    def fit_memory(self, max_model_len: int) -> MemoryFit:
        """Size the KV pool from what the GPU has left within `gpu_memory_utilization`."""
        return fit_engine(
            self._config,
            self._model_config,
            max_model_len,
            budget_bytes=self.available_memory() + self.weight_bytes,
            weight_bytes=self.weight_bytes,
            kv_dtype=self.kv_dtype_name,
            is_gpu=True,
        )

    @torch.inference_mode()
    def allocate_kv(self, num_blocks: int) -> None:
        """Make the KV pool and everything that steps use at fixed addresses. Raises: OutOfGpuMemory."""
        from engine.worker.gpu_runner import GpuModelRunner

        config, model = self._config, self._model_config
        size = config.cache.block_size
        groups = kv_cache_groups(model) if self._rank is None else groups_of_stage(model, self._rank)
        shape = (num_blocks * size, 2, self._share.num_kv_heads, model.head_dim)
        slots = range(max(len(group.layers) for group in groups))
        with self._memory("the KV cache"):
            storage = [torch.zeros(shape, dtype=torch.bfloat16, device=self.device) for _ in slots]
            self.runner = GpuModelRunner(
                self._model,
                groups,
                storage,
                num_rows=config.scheduler.max_num_seqs,
                block_size=size,
                max_model_len=self._max_model_len,
                is_eager=config.enforce_eager,
            )
        self._num_groups, self._num_blocks = len(groups), num_blocks

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run prompts of every kind of length and capture the graphs of all batch sizes.

        Graphs for rows that cut by top-k, top-p or min-p follow on first use. Raises: GpuError, OutOfGpuMemory.
        """
        scheduler, decode = self._config.scheduler, self.runner.decode
        with self._memory("activations"), _kernels(), torch.cuda.device(self.device):
            self._build.result()
            if self._links.group is not None:
                self._links.group.all_reduce(torch.zeros(1))  # nobody waits on a device for another's compilers
            for graph_rows in decode.sizes:
                decode.prepare(graph_rows, has_filters=False)
            room = (self._num_blocks - 1) // self._num_groups * self._config.cache.block_size
            longest = min(scheduler.max_num_batched_tokens, self._max_model_len - 1, room)
            for length in sorted({min(length, longest) for length in (*WARM_UP_LENGTHS, longest)}):
                if length > 1:
                    self._run_prompt(length)
            torch.cuda.synchronize(self.device)

    def usage(self) -> DeviceUsage:
        """Measure the device's memory in use and its power. From any thread."""
        return self._meter.read()

    def append_tokens(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Take (row, token) pairs that the last stage sampled; of use to the stages before it."""
        with torch.cuda.device(self.device):
            self.runner.append_tokens(pairs)

    def launch(self, plan: ExecutionPlan) -> PendingStep:
        """Start a plan's step; its `wait` gives the result. Raises: OutOfGpuMemory."""
        with self._memory("a step"), torch.cuda.device(self.device):
            return self.runner.launch(plan)

    def execute(self, plan: ExecutionPlan) -> StepResult:
        """Run one plan, and wait for its result."""
        return self.launch(plan).wait()

    def close(self) -> None:
        """Give the device's memory back; nothing can be launched afterwards."""
        if hasattr(self, "runner"):
            torch.cuda.synchronize(self.device)
            del self.runner
        if hasattr(self, "_model"):
            del self._model
        for link in (self._group, self._receiver, self._sender):
            if link is not None:
                link.close()
        gc.collect()
        torch.cuda.empty_cache()

    @property
    def _has_all_experts(self) -> bool:
        return self._share.num_experts == self._model_config.num_experts

    def _check_share(self) -> None:
        """Refuse a share that the kernels do not serve. Raises: GpuError."""
        share = self._share
        if not (share.num_kv_heads and share.intermediate_size and share.num_experts):
            raise GpuError(
                "placement",
                "a rank on a GPU has no KV head, no column or no expert",
                "give every GPU rank a part of each",
            )

    def _connect(self) -> None:
        """Make the links of this rank's device beside those of its host. Raises: GroupError, LinkError, GpuError."""
        links = self._links
        if links.group is None and links.receiver is None and links.sender is None:
            return
        assert self._rank is not None
        from engine.comm.custom_all_reduce import open_gpu_group
        from engine.comm.edges import tell_members
        from engine.comm.nccl import open_receiver, open_sender

        with torch.cuda.device(self.device), _kernels():
            # The ranks of a stage stand side by side, those of the stages beside it as far away as they are many.
            own, apart = self._rank.rank, max(1, len(links.stage))
            if links.group is not None:
                tell_members([other.rank for other in links.stage])
                hidden = self._model_config.hidden_size
                self._group = open_gpu_group(links.group, links.stage, self._rank, hidden, self.device)
            if links.receiver is not None:
                tell_members([own - apart, own])
                self._receiver = open_receiver(links.receiver)
            if links.sender is not None:
                tell_members([own, own + apart])
                self._sender = open_sender(links.sender)

    def _build_kernels(self) -> None:
        """Compile what is not in the kernel cache, on all cores."""
        from engine.models.gpt_oss_gpu import decode_shape
        from engine.worker.gpu_decode import batch_sizes
        from kernels import gpu

        torch.cuda.set_device(self.device)
        scheduler = self._config.scheduler
        shape = decode_shape(self._share, self._config.cache.block_size)
        exchange = None if self._group is None else self._group.exchange
        has_small = self._has_all_experts and (self._group is None or exchange is not None)
        sizes = batch_sizes(scheduler.max_num_seqs, has_small=has_small)
        small = [size for size in sizes if size in gpu.BATCH_SIZES]
        large = [size for size in sizes if size not in gpu.BATCH_SIZES]
        gpu.use_cache()
        with ThreadPoolExecutor(1, "nvrtc") as pool:
            ranks = 1 if exchange is None else exchange.num_ranks
            prebuilt = pool.submit(gpu.prebuild, shape, small, self.device, ranks=ranks)
            gpu.compile_all(shape, decode_rows=large, max_tokens=scheduler.max_num_batched_tokens, device=self.device)
            prebuilt.result()

    def _run_prompt(self, length: int) -> None:
        """Compute a prompt of zeros in blocks that nobody has yet, and one token after it."""
        blocks = -(-length // self._config.cache.block_size)
        row = AdmittedRow(
            row=0,
            generation=0,
            request_id="warm-up",
            token_ids=[0] * length,
            num_prompt_tokens=length,
            num_computed_tokens=0,
            block_ids=tuple(
                list(range(1 + group * blocks, 1 + (group + 1) * blocks)) for group in range(self._num_groups)
            ),
            params=SamplingParams(temperature=0.0, max_tokens=2),
            seed=0,
            stop_token_ids=(),
        )
        self.runner.launch(ExecutionPlan(-2, [0], [length], [True], admits=[row])).wait()
        self.runner.launch(ExecutionPlan(-1, [], [], [], released=[0])).wait()

    @contextmanager
    def _memory(self, what: str) -> Iterator[None]:
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.device)
            raise OutOfGpuMemory(
                "memory",
                f"{self.device} ran out of memory for {what}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
                "lower gpu-memory-utilization, max-num-batched-tokens or max-num-seqs, or free the GPU",
            ) from error


def open_device(name: str) -> torch.device:
    """Open a CUDA device such as `cuda:0`. Raises: GpuError, which says what is wrong with it and what to do."""
    if torch.version.cuda is None:
        raise GpuError("device", f"{name}: this torch was built without CUDA", "install torch for CUDA, or " + USE_CPU)
    try:
        index = torch.device(name).index or 0
        torch.zeros(1, device=name)  # opens the driver
        torch.cuda.set_device(index)
        major, minor = torch.cuda.get_device_capability(index)
    except (RuntimeError, AssertionError) as error:
        # torch says here: no driver, one too old for this CUDA, no such device, or one that other processes hold.
        cause = str(error).splitlines()[0].removeprefix("CUDA error: ")
        raise GpuError(
            "device",
            f"{name} cannot be opened: {cause}",
            f"see nvidia-smi and CUDA_VISIBLE_DEVICES; the driver must serve CUDA {torch.version.cuda}; or {USE_CPU}",
        ) from error
    if major != GPU_CAPABILITY:
        raise GpuError(
            "device",
            f"{torch.cuda.get_device_name(index)} is sm_{major}{minor}; the GPU kernels need sm_90 (H100, H200)",
            USE_CPU,
        )
    return torch.device("cuda", index)


@contextmanager
def _packages() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise GpuError(
            "device", f"a GPU needs a package that is missing: {error}", "pip install 'hlaunch[cuda]'"
        ) from error


@contextmanager
def _kernels() -> Iterator[None]:
    from kernels.contract import KernelError

    try:
        yield
    except KernelError as error:
        raise GpuError("kernels", str(error), USE_CPU) from error
    except Exception as error:
        # Triton has no common root of its errors: a compiler's, the assembler's, a kernel too large for the device.
        if not type(error).__module__.startswith("triton"):
            raise
        lines = str(error).strip().splitlines()
        cause = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        raise GpuError("kernels", f"a Triton kernel cannot be built or started here: {cause}", USE_CPU) from error
