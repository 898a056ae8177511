"""Several ranks on one host: placement in engine.json, memory that adds up, cores shared out, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.engine_core import place
from engine.executor.messages import LoadedReport
from engine.executor.multiproc_fit import fit_ranks
from engine.memory import CPU_KV_CAP_BYTES, CPU_RUNTIME_BYTES, model_bytes
from engine.placement import Placement
from launcher.errors import DoesNotFit
from launcher.plan import LaunchPlan, make_plan, topology
from launcher.plan.inventory import Gpu, Inventory, NumaNode
from launcher.plan.rank_memory import RankMemory
from launcher.registry import load_registry, resolve

GIB = 1 << 30
CPU = Inventory("host", "CPU", 8, 1, 256 * GIB, 200 * GIB, source="saved")
TWO_SOCKETS = replace(
    CPU, cpu_cores=16, numa_nodes=2, numa=(NumaNode(0, tuple(range(8))), NumaNode(1, tuple(range(8, 16))))
)
GPUS = replace(
    CPU,
    gpus=tuple(Gpu(n, "NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, (9, 0), uuid=f"GPU-{n}") for n in range(2)),
    driver_version="580.65.06",
    torch_cuda="13.0",
)


def plan_of(
    folder: Path, *overrides: str, inventory: Inventory = CPU, model: str = "tiny", **environ: str
) -> LaunchPlan:
    path = folder / "model_registry.yml"
    path.write_text("models: {tiny: {model: tiny-oss}, oss20: {model: openai/gpt-oss-20b, max-num-seqs: 8}}\n")
    entry = resolve(load_registry(path), model, environ, overrides)
    return make_plan(entry, inventory, environ, folder / "state" / entry.name)


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        (("tp=2",), "tp 2 pp 1 dp 1"),
        (("pp=2",), "tp 1 pp 2 dp 1"),
        (("dp=2",), "tp 1 pp 1 dp 2"),
        (("tp=2", "pp=2", "dp=2"), "tp 2 pp 2 dp 2"),
        (("tp=2", "ep=true"), "tp 2 pp 1 dp 1 ep"),
        (("tp=2", "distributed-executor-backend=mp"), "tp 2 pp 1 dp 1"),
    ],
)
def test_the_engine_runs_the_placement_that_was_shown(tmp_path: Path, overrides: tuple[str, ...], sizes: str) -> None:
    plan = plan_of(tmp_path, *overrides)
    plan.check()
    assert plan.placement is not None
    assert plan.model is not None
    assert str(plan.placement.sizes) == sizes
    read = EngineConfig.from_json(plan.config.to_json())
    assert read == plan.config
    assert Placement.from_json(read.placement) == plan.placement
    # The engine's own word: it takes every engine of this placement, and finds what the sizes in the file say.
    for engine in range(plan.placement.data_parallel_size):
        assert place(replace(read, data_parallel_rank=engine), plan.model) == plan.placement
    assert (read.tensor_parallel_size, read.pipeline_parallel_size) == (
        plan.placement.tensor_parallel_size,
        plan.placement.pipeline_parallel_size,
    )
    assert [memory.device for memory in plan.memory] == [rank.device for rank in plan.placement.ranks]


def test_one_rank_is_handed_over_as_before(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.config.placement == ""
    assert not plan.config.has_several_ranks
    assert plan.config.cpu_threads == 0
    assert plan.fit is not None
    assert plan.memory[0].kv_bytes == plan.fit.memory.kv_bytes


@pytest.mark.parametrize(
    ("overrides", "layers"),
    # A block spans the three layers of a group; two stages hold two and one of them, and keep room for two each.
    [(("tp=2",), 3), (("pp=3",), 3), (("dp=3",), 3), (("tp=2", "pp=2"), 4), (("tp=4", "ep=true"), 3)],
)
def test_memory_of_ranks_adds_up(tmp_path: Path, overrides: tuple[str, ...], layers: int) -> None:
    plan, whole = plan_of(tmp_path, *overrides), plan_of(tmp_path).fit
    assert plan.placement is not None
    assert whole is not None
    assert sum(memory.budget_bytes for memory in plan.memory) <= CPU.memory_available_bytes
    engines = plan.placement.data_parallel_size
    weights = sum(memory.weight_bytes for memory in plan.memory)
    # Shares of one model, and what every rank holds for itself: embedding, norms, routers, rotary tables.
    copied = weights - engines * whole.memory.weight_bytes
    assert 0 <= copied < 0.2 * len(plan.memory) * whole.memory.weight_bytes
    assert len({memory.num_blocks for memory in plan.memory}) == 1, "an engine's ranks follow the same block tables"
    # Heads are shared, or kept twice where ranks outnumber them.
    copies = max(1, plan.placement.tensor_parallel_size // 2)
    blocks = plan.memory[0].num_blocks
    per_block = sum(memory.kv_bytes for memory in plan.memory) / blocks
    assert per_block == engines * copies * whole.memory.kv_block_bytes * layers // 3


@pytest.mark.parametrize("overrides", [("tp=2", "ep=true"), ("pp=2",), ("tp=2", "pp=2", "dp=2", "ep=true")])
def test_the_engine_sizes_the_pool_as_the_plan_does_where_memory_is_short(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    ample = plan_of(tmp_path, *overrides).memory
    # Room for about half of the blocks that they would take.
    each = max(memory.required_bytes - memory.kv_bytes // 2 for memory in ample)
    short = replace(CPU, memory_available_bytes=len(ample) * each)
    plan = plan_of(tmp_path, *overrides, inventory=short)
    plan.check()
    assert plan.placement is not None
    assert plan.model is not None
    # What is free on the node once all ranks of all engines hold their weights.
    left = short.memory_available_bytes - sum(memory.weight_bytes for memory in plan.memory)
    first = plan.placement.engine(0)
    loaded = [
        LoadedReport(rank.rank, plan.memory[rank.rank].weight_bytes, left, "float32", "float32", "cpu")
        for rank in first
    ]
    assert plan.config.cache.num_blocks == (plan.memory[0].num_blocks if "dp=2" in overrides else 0)
    config = replace(plan.config, cache=replace(plan.config.cache, num_blocks=0))
    found = fit_ranks(config, plan.model, plan.placement, first, loaded, plan.model.max_position_embeddings)
    # The engine shares out what is left, the plan shares first: they differ as much as the ranks' weights do.
    assert found.num_blocks == pytest.approx(plan.memory[0].num_blocks, rel=0.12)
    assert found.num_blocks < 0.7 * ample[0].num_blocks


def test_engines_that_share_memory_get_a_pool_of_fixed_size(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "dp=2")
    assert plan.config.cache.num_blocks == plan.memory[0].num_blocks == plan.memory[1].num_blocks
    assert plan_of(tmp_path, "tp=2").config.cache.num_blocks == 0, "one engine takes what it finds"
    gpus = plan_of(tmp_path, "dp=2", inventory=GPUS, model="oss20")
    assert gpus.config.cache.num_blocks == 0, "GPUs share nothing"


def test_ranks_that_do_not_fit_say_which_and_what_would(tmp_path: Path) -> None:
    short = replace(CPU, memory_available_bytes=2 * (CPU_RUNTIME_BYTES + (100 << 20)))
    plan = plan_of(tmp_path, "tp=2", inventory=short)
    (problem,) = plan.problems
    assert isinstance(problem, DoesNotFit)
    assert problem.message.startswith("does not fit: ")
    assert "(cpu:0)" in problem.message
    settings = problem.hint.removeprefix("would fit: ").split("  or  ")
    assert settings
    for way in settings:
        overrides = [word for word in way.split() if word != "--set"]
        assert plan_of(tmp_path, "tp=2", *overrides, inventory=short).problems == ()


@pytest.mark.parametrize(
    ("inventory", "overrides", "threads"),
    [
        (CPU, ("tp=2",), 3),  # one core is the server's
        (CPU, ("dp=2",), 3),
        (CPU, ("tp=2", "pp=2", "dp=2"), 1),
        (CPU, ("tp=2", "cpu-threads=2"), 2),
        (TWO_SOCKETS, ("tp=2",), 7),
        (TWO_SOCKETS, ("pp=3",), 4),  # two of three are on the first socket
        (replace(CPU, cpu_cores=1), ("tp=2",), 1),
    ],
)
def test_cores_are_shared_out(tmp_path: Path, inventory: Inventory, overrides: tuple[str, ...], threads: int) -> None:
    plan = plan_of(tmp_path, *overrides, inventory=inventory)
    assert plan.config.cpu_threads == threads
    (note,) = [note for note in plan.notes if "share" in note]
    assert ("more threads than cores" in note) == (threads * len(plan.memory) > inventory.cpu_cores)


@pytest.mark.parametrize(
    ("overrides", "is_told"),
    [
        (("ep=true",), True),
        (("ep=true", "dp=2"), True),
        (("ep=true", "pp=2"), True),
        (("ep=true", "tp=2"), False),
        (("dp=2",), False),
    ],
)
def test_expert_parallel_without_tensor_ranks_is_told(
    tmp_path: Path, overrides: tuple[str, ...], is_told: bool
) -> None:
    told = "expert parallel shares experts within a tensor group, and tp is 1: it changes nothing; set tp"
    plan = plan_of(tmp_path, *overrides)
    plan.check()
    assert plan.notes.count(told) == is_told


def test_expert_parallel_for_all_models_is_no_word_about_one(tmp_path: Path) -> None:
    path = tmp_path / "model_registry.yml"
    path.write_text("defaults: {enable-expert-parallel: true}\nmodels: {tiny: {model: tiny-oss}}\n")
    entry = resolve(load_registry(path), "tiny", {})
    assert not any("expert" in note for note in make_plan(entry, CPU, {}, tmp_path / "state").notes)


def test_ranks_take_sockets_in_turn(tmp_path: Path) -> None:
    placement = plan_of(tmp_path, "tp=4", inventory=TWO_SOCKETS).placement
    assert placement is not None
    assert [rank.numa_node for rank in placement.ranks] == [0, 1, 0, 1]
    assert placement.ranks[1].cores == tuple(range(8, 16))


def test_sizes_without_a_placement_name_those_that_have_one(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "tp=3")
    (problem,) = plan.problems
    assert problem.message == "no placement: tp 3: 16 attention heads do not divide by it"
    assert problem.exit_code == 6
    for way in problem.hint.removeprefix("possible: ").split("  or  "):
        plan_of(tmp_path, "tp=3", *(word for word in way.split() if word != "--set")).check()


# GPUs: one for each rank.


@pytest.mark.parametrize("overrides", [("tp=2",), ("pp=2",), ("tp=2", "ep=true")])
def test_ranks_of_one_engine_take_a_gpu_each(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    plan = plan_of(tmp_path, *overrides, inventory=GPUS, model="oss20")
    assert plan.problems == ()
    assert plan.placement is not None
    assert plan.model is not None
    assert [rank.device for rank in plan.placement.ranks] == ["cuda:0", "cuda:1"]
    assert [memory.budget_bytes for memory in plan.memory] == [int(0.9 * 80 * GIB)] * 2
    assert all(memory.weight_bytes < 0.7 * model_bytes(plan.model) for memory in plan.memory), "a share each"
    (problem,) = plan_of(tmp_path, "tp=4", inventory=GPUS, model="oss20").problems
    assert problem.message == "no placement: tp 4 pp 1 dp 1 needs 4 GPUs, host has 2"
    assert "tp=2" in problem.hint


def test_engines_take_a_gpu_each_and_no_more_than_are_seen(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "dp=2", inventory=GPUS, model="oss20")
    assert plan.problems == ()
    assert plan.placement is not None
    assert plan.model is not None
    assert [rank.device for rank in plan.placement.ranks] == ["cuda:0", "cuda:1"]
    assert [memory.budget_bytes for memory in plan.memory] == [int(0.9 * 80 * GIB)] * 2
    assert all(memory.weight_bytes > model_bytes(plan.model) for memory in plan.memory), "a whole model each"
    assert plan.config.cpu_threads == 0
    (problem,) = plan_of(tmp_path, "dp=3", inventory=GPUS, model="oss20").problems
    assert problem.message == "no placement: tp 1 pp 1 dp 3 needs 3 GPUs, host has 2"
    assert problem.hint.startswith("possible: --set dp=2")
    hidden = plan_of(tmp_path, "dp=2", inventory=GPUS, model="oss20", CUDA_VISIBLE_DEVICES="1")
    assert hidden.problems[0].message.endswith("needs 2 GPUs, host has 1")


def test_memory_says_how_many_requests_it_has_room_for(tmp_path: Path) -> None:
    def first(asked: int) -> RankMemory:
        return plan_of(tmp_path, "tp=2", f"max-num-seqs={asked}", inventory=GPUS, model="oss20").memory[0]

    few = first(8)
    assert (few.asked_requests, round(few.max_full_requests)) == (8, 8)
    room = few.room_requests
    assert room > 16
    assert few.is_capped
    # As many can be asked for, and not many more: activations grow a little with what is asked.
    enough = first(room - 1)
    assert enough.max_full_requests >= room - 1
    many = first(2 * room)
    assert many.max_full_requests == pytest.approx(room, rel=0.05)
    assert not many.is_capped
    text = "\n".join(topology._rank_bar("", few, 80))
    assert f"8 asked (max-num-seqs), room for {room}" in text
    assert "room for" not in "\n".join(topology._rank_bar("", many, 80))


def test_room_on_a_cpu_ends_where_the_pool_does(tmp_path: Path) -> None:
    (memory,) = plan_of(tmp_path, "max-num-seqs=4").memory
    each = memory.kv_bytes / memory.max_full_requests
    assert memory.room_requests == int(CPU_KV_CAP_BYTES / each) > 4
