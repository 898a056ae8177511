"""Everything `up` is going to do, as one frozen value: made before anything starts, printed by the dry run.

Knows: resolved entry + inventory -> engine configuration, placement, memory fit, environment, argv. Refuses to know:
how it is printed, how processes run. Building a plan reads files; it starts, binds and writes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import engine
from engine.config import ConfigError, EngineConfig, ModelConfig, NodesConfig, load_model_config
from engine.placement import HostSpec, Placement, PlacementError, place, single_rank
from launcher.errors import DoesNotFit, HlaunchError, Issue, PreflightError
from launcher.fabric.declared import launch_findings, problem_of, warnings_of
from launcher.plan import settings
from launcher.plan.environment import Variable, as_mapping, engine_environment, engine_packages_missing
from launcher.plan.fit import FitReport, live_margin, report_fit
from launcher.plan.gpus import DeviceChoice, choose_device, memory_note, usable_gpus, visible_gpus
from launcher.plan.inventory import Gpu, Inventory
from launcher.plan.joined_nodes import (
    fullest_node,
    hosts_of_nodes,
    join_remarks,
    node_problems,
    secret_blockers,
    secret_variables,
    with_nodes,
)
from launcher.plan.known_models import known_model
from launcher.plan.placing import (
    entry_sizes,
    expert_notes,
    no_placement,
    placement_options,
    this_host,
    threads_per_rank,
    whole_value,
    with_placement,
)
from launcher.plan.rank_memory import RankMemory, Sizing, memory_of, ranks_do_not_fit, report_memory
from launcher.plan.weights import ModelFiles, find_model_files
from launcher.registry.types import ResolvedEntry
from launcher.sizes import GIB, counted

CONFIG_FILE = "engine.json"
STATUS_FD_PLACEHOLDER = "N"
NODE_MODULE = "engine.executor.node_agent"
"""What runs on a node that joins another one's engine."""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """One launch. `problems` make the plan itself impossible; `blockers` are repaired outside it (files, secrets).

    `model`, `placement` and `fit` are None when nothing tells the model's shape, and then a problem says so; `fit` also
    with several ranks, whose bytes stand in `memory`, in rank order. `gpu` is the one that `config.device` names.
    `argv` has `N` where the number of the status pipe will stand. `warnings` are about variables.
    """

    entry: ResolvedEntry
    inventory: Inventory
    files: ModelFiles
    model: ModelConfig | None
    config: EngineConfig
    placement: Placement | None
    fit: FitReport | None
    gpu: Gpu | None
    environment: tuple[Variable, ...]
    instance_folder: Path
    working_folder: Path
    argv: tuple[str, ...]
    problems: tuple[HlaunchError, ...]
    blockers: tuple[HlaunchError, ...]
    notes: tuple[str, ...]
    memory: tuple[RankMemory, ...] = ()
    warnings: tuple[Issue, ...] = ()

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def is_head(self) -> bool:
        """Whether the engine and its server run here; a node that joins another one has only ranks."""
        return self.config.nodes.rank == 0

    @property
    def ready_timeout_seconds(self) -> float:
        return self.entry.number("ready.timeout")

    @property
    def environment_mapping(self) -> dict[str, str]:
        return as_mapping(self.environment)

    def check_problems(self) -> None:
        """Raise the first problem of the plan itself, if there is one."""
        for error in self.problems:
            raise error

    def check(self) -> None:
        """Raise the first reason why `up` must not start, if there is one."""
        for error in (*self.problems, *self.blockers):
            raise error


def make_plan(
    entry: ResolvedEntry,
    inventory: Inventory,
    environ: Mapping[str, str],
    instance_folder: Path,
    *,
    base: Path | None = None,
    nodes: NodesConfig | None = None,
) -> LaunchPlan:
    """Plan the launch of `entry` on this machine, or on several `nodes` like it, of which this is one.

    `base` is where relative model folders count from (default: the registry file's folder). Reads the model's small
    files. Raises: DoesNotFit when the entry's values contradict each other.
    """
    problems: list[HlaunchError] = []
    blockers: list[HlaunchError] = []
    if (lacking := engine_packages_missing()) is not None and inventory.is_this_host:
        blockers.append(lacking)
    files = find_model_files(entry.model, entry.text_or_none("revision"), environ, base or entry.registry.parent)
    needs_weights = entry.text("load-format") != "dummy"
    model = _model_shape(entry, files, problems)
    if (missing := files.missing(needs_weights=needs_weights)) is not None:
        # A known shape is planned without its files; of a model that nobody knows, nothing can be.
        (problems if files.folder is None and model is None else blockers).append(missing)
    digests, key_error = settings.api_key_digests(entry, environ)
    is_head = nodes is None or nodes.rank == 0
    if key_error is not None and is_head:
        blockers.append(key_error)
    choice = choose_device(entry.text("device"), inventory, environ, model)
    sizes = entry_sizes(entry)
    gpus = usable_gpus(inventory, environ) if choice.gpu is not None else {}
    problems += settings.refusals(entry, choice.device)
    problems += settings.rank_refusals(entry, sizes)
    for error in choice.problems:
        (problems if isinstance(error, DoesNotFit) else blockers).append(error)
    config = settings.engine_config(entry, files.folder, digests, choice.device)
    placement, report = None, None
    lint = launch_findings(entry, None)
    memory: tuple[RankMemory, ...] = ()
    notes = [*settings.notes(entry, choice.device), *choice.notes]
    environment = engine_environment(entry, environ)
    if nodes is not None:
        config = with_nodes(config, nodes)
        blockers += secret_blockers(environ)
        environment = tuple(sorted((*environment, *secret_variables(environ)), key=lambda item: item.name))
    # What is placed where, the head decides for all.
    if model is not None and is_head:
        problems += _context_problem(config, model)
        notes += expert_notes(entry, sizes)
        if sizes.world > 1 or nodes is not None:
            hosts = (
                (this_host(inventory, gpus, sizes.world),)
                if nodes is None
                else hosts_of_nodes(nodes, inventory, gpus, sizes.world)
            )
            placement = _place_ranks(entry, model, hosts, problems)
            problems += [] if nodes is None else node_problems(nodes, sizes, placement)
            if placement is not None:
                config = _with_threads(with_placement(config, placement), placement, inventory)
                seen = replace(inventory, gpus=visible_gpus(inventory.gpus, environ))
                spare = whole_value(entry, "ready.min-free-memory", 0)
                inventories = {host.name: seen for host in hosts}
                memory = _fit_ranks(placement, Sizing(config, model, inventories, files.folder, spare), problems)
                config = _with_pool(config, memory)
                notes += _core_notes(config, placement, inventory)
                notes += [] if nodes is None else join_remarks(nodes, placement.crossing(placement.tp_groups))
        else:
            placement = _place(config, model, inventory)
            budget = rank_budget(entry, config, inventory, choice)
            report = _fit(config, model, files, budget, problems)
            memory = () if report is None else (memory_of(report, 0, config.device),)
            notes += [budget.note] if budget.note else []
    if (problem := problem_of(lint)) is not None:
        problems.append(problem)
    return LaunchPlan(
        entry=entry,
        inventory=inventory,
        files=files,
        model=model,
        config=config,
        placement=placement,
        fit=report,
        gpu=choice.gpu,
        environment=environment,
        instance_folder=instance_folder,
        working_folder=Path(engine.__file__).parent.parent,
        argv=engine_argv(instance_folder, STATUS_FD_PLACEHOLDER, "engine.server" if is_head else NODE_MODULE),
        problems=tuple(problems),
        blockers=tuple(blockers),
        notes=tuple(notes),
        memory=memory,
        warnings=warnings_of(lint),
    )


def engine_argv(instance_folder: Path, status_fd: str, module: str = "engine.server") -> tuple[str, ...]:
    """The engine's command line."""
    config_path = str(instance_folder / CONFIG_FILE)
    return (sys.executable, "-m", module, "--config", config_path, "--status-fd", status_fd)


def _model_shape(entry: ResolvedEntry, files: ModelFiles, problems: list[HlaunchError]) -> ModelConfig | None:
    if files.folder is None:
        return known_model(entry.model)
    try:
        return load_model_config(files.folder)
    except ConfigError as error:
        problems.append(PreflightError(str(error), hint=error.hint))
        return None


def _context_problem(config: EngineConfig, model: ModelConfig) -> list[HlaunchError]:
    limit = model.max_position_embeddings
    if config.max_model_len <= limit:
        return []
    return [
        DoesNotFit(
            f"max-model-len {config.max_model_len} is above the model's {limit} positions",
            hint=f"add --set max-model-len={limit}, or leave it at auto",
        )
    ]


def _place(config: EngineConfig, model: ModelConfig, inventory: Inventory) -> Placement:
    return single_rank(
        node=inventory.node,
        device=config.device,
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        intermediate_size=model.intermediate_size,
        num_experts=model.num_experts,
    )


def _place_ranks(
    entry: ResolvedEntry, model: ModelConfig, hosts: Sequence[HostSpec], problems: list[HlaunchError]
) -> Placement | None:
    """Place several ranks on this host, or on nodes like it. Named nodes and CPU ranks beside GPUs are a cluster's."""
    try:
        return place(model, entry_sizes(entry), hosts, replace(placement_options(entry), nodes=(), cpu_ranks=0))
    except PlacementError as error:
        problems.append(no_placement(error, entry_sizes(entry)))
        return None


def _with_threads(config: EngineConfig, placement: Placement, inventory: Inventory) -> EngineConfig:
    """Give each CPU rank its part of the cores unless the entry says how many."""
    if config.device != "cpu" or config.cpu_threads:
        return config
    return replace(config, cpu_threads=threads_per_rank(fullest_node(placement), inventory))


def _with_pool(config: EngineConfig, memory: Sequence[RankMemory]) -> EngineConfig:
    """Fix the pool where several engines share this host's memory: each would count on all that it sees free.

    An engine that is started again, beside others that hold theirs, then gets what it had.
    """
    blocks = [rank.num_blocks for rank in memory if rank.num_blocks]
    if config.device != "cpu" or config.data_parallel_size == 1 or not blocks or not all(rank.fits for rank in memory):
        return config
    return replace(config, cache=replace(config.cache, num_blocks=min(blocks)))


def _core_notes(config: EngineConfig, placement: Placement, inventory: Inventory) -> list[str]:
    """Say how CPU ranks share the cores."""
    if config.device != "cpu":
        return []
    ranks, cores, threads = len(fullest_node(placement)), inventory.cpu_cores, config.cpu_threads
    said = f"{ranks} rank{'s share' if ranks > 1 else ' has'} {counted(cores, 'core')}"
    said += f", {counted(threads, 'thread')} each"
    said = f"on each node {said}" if len(placement.nodes) > 1 else said
    if ranks * threads > cores:
        said += ": more threads than cores, and in every step all wait for the last of them"
    return [said]


def _fit_ranks(placement: Placement, sizing: Sizing, problems: list[HlaunchError]) -> tuple[RankMemory, ...]:
    try:
        report = report_memory(placement, sizing)
    except ConfigError as error:
        problems.append(PreflightError(str(error), hint=error.hint))
        return ()
    if not report.fits:
        problems.append(ranks_do_not_fit(report, report.suggestions))
    return report.ranks


@dataclass(frozen=True, slots=True)
class Budget:
    """What a rank may take: `bytes`, of a GPU with `gpu_bytes` in all (0 on a CPU). `note`: who holds the rest.

    `margin_bytes` of it are free only now, and no suggestion counts on them.
    """

    bytes: int
    gpu_bytes: int = 0
    note: str = ""
    margin_bytes: int = 0


def rank_budget(entry: ResolvedEntry, config: EngineConfig, inventory: Inventory, choice: DeviceChoice) -> Budget:
    """Give the budget of the one rank: free memory on a CPU, else the entry's share of the GPU, as far as it is free.

    Unified memory is the host's too: what the entry wants left free there is left.
    """
    gpu = choice.gpu
    if gpu is None:
        free = inventory.memory_available_bytes
        return Budget(free, margin_bytes=live_margin(inventory, free))
    share = int(config.cache.gpu_memory_utilization * gpu.memory_bytes)
    free = gpu.free_bytes or gpu.memory_bytes
    if gpu.is_unified:
        spare = entry.values.get("ready.min-free-memory")
        free = inventory.memory_available_bytes - (spare.value if spare and isinstance(spare.value, int) else 0)
    budget = max(0, min(share, free))
    return Budget(budget, gpu.memory_bytes, memory_note(gpu, share) or "", live_margin(inventory, budget, share))


def _fit(
    config: EngineConfig, model: ModelConfig, files: ModelFiles, budget: Budget, problems: list[HlaunchError]
) -> FitReport | None:
    folder = files.folder if config.load_format != "dummy" else None
    try:
        report = report_fit(
            config, model, folder, budget.bytes, total_bytes=budget.gpu_bytes, margin_bytes=budget.margin_bytes
        )
    except ConfigError as error:
        problems.append(PreflightError(str(error), hint=error.hint))
        return None
    if not report.fits:
        problems.append(does_not_fit(report, budget.note))
    return report


def does_not_fit(report: FitReport, note: str = "") -> DoesNotFit:
    """Make the error of a fit that fails: the cause, and the smallest changes that would fit."""
    if report.suggestions:
        hint = "would fit: " + "  or  ".join(str(suggestion) for suggestion in report.suggestions)
    else:
        kind = "GPU" if report.is_gpu else "machine"
        hint = f"no setting helps: this needs a {kind} with {report.minimum_bytes / GIB:.1f} GiB free"
    return DoesNotFit(f"does not fit: {report.cause()}", hint=hint, details=(note,) if note else ())
