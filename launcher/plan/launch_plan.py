"""Everything `up` is going to do, as one frozen value: made before anything starts, printed by the dry run.

Knows: resolved entry + inventory -> engine configuration, placement, memory fit, environment, argv. Refuses to know:
how it is printed, how processes run. Building a plan reads files; it starts, binds and writes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import engine
from engine.config import ConfigError, EngineConfig, ModelConfig, load_model_config
from engine.placement import Placement, single_rank
from launcher.errors import DoesNotFit, HlaunchError, PreflightError
from launcher.plan import settings
from launcher.plan.environment import Variable, as_mapping, engine_environment, engine_packages_missing
from launcher.plan.fit import FitReport, report_fit
from launcher.plan.inventory import Inventory
from launcher.plan.known_models import known_model
from launcher.plan.weights import ModelFiles, find_model_files
from launcher.registry.types import ResolvedEntry

CONFIG_FILE = "engine.json"
STATUS_FD_PLACEHOLDER = "N"


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """One launch. `problems` make the plan itself impossible; `blockers` are repaired outside it (files, secrets).

    `model`, `placement` and `fit` are None when nothing tells the model's shape. `argv` has `N` where the number of the
    status pipe will stand.
    """

    entry: ResolvedEntry
    inventory: Inventory
    files: ModelFiles
    model: ModelConfig | None
    config: EngineConfig
    placement: Placement | None
    fit: FitReport | None
    environment: tuple[Variable, ...]
    instance_folder: Path
    working_folder: Path
    argv: tuple[str, ...]
    problems: tuple[HlaunchError, ...]
    blockers: tuple[HlaunchError, ...]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def ready_timeout_seconds(self) -> float:
        return self.entry.number("ready.timeout")

    @property
    def environment_mapping(self) -> dict[str, str]:
        return as_mapping(self.environment)

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
) -> LaunchPlan:
    """Plan the launch of `entry` on this machine.

    `base` is where relative model folders count from (default: the registry file's folder). Reads the model's small
    files. Raises: DoesNotFit when the entry's values contradict each other.
    """
    problems = list(settings.refusals(entry, inventory))
    blockers: list[HlaunchError] = []
    if (lacking := engine_packages_missing()) is not None:
        blockers.append(lacking)
    files = find_model_files(entry.model, entry.text_or_none("revision"), environ, base or entry.registry.parent)
    needs_weights = entry.text("load-format") != "dummy"
    if (missing := files.missing(needs_weights=needs_weights)) is not None:
        blockers.append(missing)
    digests, key_error = settings.api_key_digests(entry, environ)
    if key_error is not None:
        blockers.append(key_error)
    config = settings.engine_config(entry, files.folder, digests)
    model = _model_shape(entry, files, problems)
    placement, report = None, None
    if model is not None:
        problems += _context_problem(config, model)
        placement = _place(config, model, inventory)
        report = _fit(config, model, files, inventory, problems)
    return LaunchPlan(
        entry=entry,
        inventory=inventory,
        files=files,
        model=model,
        config=config,
        placement=placement,
        fit=report,
        environment=engine_environment(entry, environ),
        instance_folder=instance_folder,
        working_folder=Path(engine.__file__).parent.parent,
        argv=engine_argv(instance_folder, STATUS_FD_PLACEHOLDER),
        problems=tuple(problems),
        blockers=tuple(blockers),
        notes=settings.notes(entry),
    )


def engine_argv(instance_folder: Path, status_fd: str) -> tuple[str, ...]:
    """The engine's command line."""
    config_path = str(instance_folder / CONFIG_FILE)
    return (sys.executable, "-m", "engine.server", "--config", config_path, "--status-fd", status_fd)


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


def _fit(
    config: EngineConfig, model: ModelConfig, files: ModelFiles, inventory: Inventory, problems: list[HlaunchError]
) -> FitReport | None:
    folder = files.folder if config.load_format != "dummy" else None
    try:
        report = report_fit(config, model, folder, inventory.memory_available_bytes)
    except ConfigError as error:
        problems.append(PreflightError(str(error), hint=error.hint))
        return None
    if not report.fits:
        problems.append(_does_not_fit(report))
    return report


def _does_not_fit(report: FitReport) -> DoesNotFit:
    if report.suggestions:
        hint = "would fit: " + "  or  ".join(str(suggestion) for suggestion in report.suggestions)
    else:
        hint = f"no setting helps: this needs a machine with {report.minimum_bytes / (1 << 30):.1f} GiB free"
    return DoesNotFit(f"does not fit: {report.cause()}", hint=hint)
