"""A launch on several nodes: start all of them with one view, ask all, end all and look that nothing is left.

Knows: order between nodes, deadlines, the record by which later commands find the nodes. Refuses to know: terminals and
how one node is started (`runtimes`). One thread per node reads its reports; only the caller's thread draws.
"""

from __future__ import annotations

import contextlib
import json
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from launcher.compose.render import render
from launcher.errors import HlaunchError, NotReady, PreflightError, UsageError
from launcher.exit_codes import ExitCode
from launcher.fabric.facts import NodeFacts
from launcher.fabric.transports import PairTransport, check, read_pairs, silence
from launcher.plan.cluster_plan import ClusterPlan
from launcher.registry.values import BadValue
from launcher.supervise.cluster_logs import known_failures, last_lines, transports_in_use
from launcher.supervise.cluster_traffic import check_silent_pairs, read_counters, traffic_lines, traffic_of
from launcher.supervise.instance import InstanceFolder, write_private
from launcher.supervise.kept_logs import KEPT_LINES, forget, keep
from launcher.supervise.node_spec import HEAD
from launcher.supervise.node_versions import SHOULD, differences
from launcher.supervise.running_files import forget_files, keep_files
from launcher.supervise.runtimes import RUNTIMES, NodeHandle, Runtime, Secrets, handle_of
from launcher.supervise.shell import Shell
from launcher.supervise.status import one_line

_PERMANENT = (ExitCode.USAGE, ExitCode.REGISTRY_INVALID, ExitCode.PREFLIGHT, ExitCode.DOES_NOT_FIT, ExitCode.NOT_READY)
"""Exit codes of a node that starting it again cannot change."""
_REATTACH_SECONDS = 0.5
_NAMED = 3
READY = "ready"


@dataclass(frozen=True, slots=True)
class ClusterRun:
    """What was started where. `url` is the API's address once it is ready."""

    name: str
    model: str
    cluster: str
    runtime: str
    plan: str
    nodes: tuple[NodeHandle, ...]
    started_at: float
    url: str = ""
    placement: str = ""
    transports: tuple[PairTransport, ...] = ()
    """What connects the ranks, as their logs said when all was ready."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    @property
    def head(self) -> NodeHandle:
        return next(node for node in self.nodes if node.role == HEAD)


@dataclass(frozen=True, slots=True)
class NodeSaid:
    """One report of one node, as it arrives."""

    node: NodeHandle
    report: Mapping[str, Any]


def read_run(folder: InstanceFolder) -> ClusterRun | None:
    """Read the record of a launch on a cluster; None when there is none."""
    try:
        data = json.loads(folder.cluster_file.read_text(encoding="utf-8"))
        nodes = tuple(NodeHandle(**node) for node in data["nodes"])
        return ClusterRun(**{**data, "nodes": nodes, "transports": read_pairs(data.get("transports", []))})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def make_secrets(plan: ClusterPlan, environ: Mapping[str, str]) -> Secrets:
    """Make the cluster's token, 256 bits, and read the API key. Raises: PreflightError when the key is missing."""
    reference = plan.entry.secret("api-key")
    try:
        key = reference.reveal(environ) if reference is not None else ""
    except BadValue as error:
        raise PreflightError(f"api-key: {error.message}", hint=error.hint) from error
    return Secrets(secrets.token_urlsafe(32), key)


def start(
    plan: ClusterPlan,
    runtime: Runtime,
    folder: InstanceFolder,
    environ: Mapping[str, str],
    on_report: Callable[[NodeSaid], None],
    note: Callable[[str], None],
) -> ClusterRun:
    """Start every node and wait until all are ready. What was started is ended again when one cannot be.

    Raises: HlaunchError with the first permanent cause, NotReady at the deadline, TransportWrong when something else
    than the declared fabric connects the ranks. Ctrl-C leaves the nodes running.
    """
    keys = make_secrets(plan, environ)
    run = ClusterRun(
        plan.name, plan.entry.model, plan.cluster.name, runtime.name, plan.digest,
        tuple(handle_of(plan, node) for node in plan.nodes), round(time.time(), 1),
        placement="" if plan.placement is None else plan.placement.to_json(),
    )  # fmt: skip
    shells = {node.name: Shell(node.name, node.ssh, environ) for node in run.nodes}
    for shell in shells.values():
        # Before the record, which `down` can only take away by the same means.
        runtime.check(shell)
    write_private(folder.cluster_file, run.to_json())
    forget(folder)
    # Plain processes take values that no compose file may hold; then there is nothing to compare with.
    with contextlib.suppress(UsageError):
        keep_files(folder, render(plan))
    try:
        for node in plan.nodes:
            for reason in runtime.stage(shells[node.name], plan, node, keys):
                note(reason)
        counters = read_counters(plan.cluster, environ)
        # The head first; workers wait for it by themselves, so nothing here sleeps in between.
        for handle in sorted(run.nodes, key=lambda item: item.role != HEAD):
            runtime.start(shells[handle.name], handle)
        url = _await_ready(run, runtime, shells, plan.ready_timeout_seconds, on_report, note)
        pairs = _attest(run, plan, counters, environ, note)
    except HlaunchError as error:
        # Before the logs go with their nodes.
        error.details = (*error.details, *known_failures(run.runtime, run.nodes, environ))
        with contextlib.suppress(HlaunchError):
            stop(run, folder, environ, note)
        raise
    ready = replace(run, url=url, transports=pairs)
    write_private(folder.cluster_file, ready.to_json())
    return ready


def _attest(
    run: ClusterRun,
    plan: ClusterPlan,
    counters: Mapping[str, NodeFacts],
    environ: Mapping[str, str],
    note: Callable[[str], None],
) -> tuple[PairTransport, ...]:
    """Find what connects the ranks, by their logs and by what the counters moved. Raises: TransportWrong."""
    pairs = transports_in_use(run.placement, run.runtime, run.nodes, environ)
    if not pairs:
        return ()
    traffic = traffic_of(counters, read_counters(plan.cluster, environ)) if counters else {}
    pairs = check_silent_pairs(pairs, traffic)
    check(pairs, plan.cluster)
    for line in traffic_lines(traffic):
        note(f"RDMA {line}")
    if quiet := silence(pairs, plan.cluster):
        note(f"warning: {quiet}")
    return pairs


def _await_ready(
    run: ClusterRun,
    runtime: Runtime,
    shells: Mapping[str, Shell],
    seconds: float,
    on_report: Callable[[NodeSaid], None],
    note: Callable[[str], None],
) -> str:
    said: queue.Queue[NodeSaid] = queue.Queue()
    is_over = threading.Event()
    for handle in run.nodes:
        argv = runtime.watch_argv(shells[handle.name], handle)
        thread = threading.Thread(target=_listen, args=(shells[handle.name], handle, argv, said, is_over), daemon=True)
        thread.start()
    deadline = time.monotonic() + seconds
    states: dict[str, str] = {handle.name: "not answering" for handle in run.nodes}
    url = ""
    causes: dict[str, str] = {}
    versions: dict[str, Mapping[str, str]] = {}
    try:
        while set(states.values()) != {READY}:
            left = deadline - time.monotonic()
            if left <= 0:
                table = ", ".join(f"{name}: {causes.get(name, state)}" for name, state in states.items())
                raise NotReady(f"{run.name} was not ready on all nodes after {seconds:g} s: {table}")
            try:
                item = said.get(timeout=min(1.0, left))
            except queue.Empty:
                continue
            states[item.node.name] = _standing(item.report)
            url = str(item.report.get("url") or "") if item.node.role == HEAD else url
            on_report(item)
            if isinstance(told := item.report.get("versions"), dict) and told:
                versions[item.node.name] = told
                in_order = {node.name: versions[node.name] for node in run.nodes if node.name in versions}
                if differs := differences(in_order):
                    raise PreflightError(
                        differs[0], details=differs[1:], hint="use one image, or one environment, on every node"
                    )
            if cause := item.report.get("cause"):
                code = item.report.get("exit_code")
                text = one_line(f"{item.node.role} {item.node.name}: {cause}")
                if code in _PERMANENT:
                    raise HlaunchError(text, hint=one_line(str(item.report.get("hint", ""))), exit_code=code)
                if causes.get(item.node.name) != text:
                    note(f"{text}; its node is started again")
                causes[item.node.name] = text
    finally:
        is_over.set()
    for line in differences(versions, SHOULD):
        note(f"warning: {line}")
    return url


def _standing(report: Mapping[str, Any]) -> str:
    """Say how far a node is: its state, and what it is about."""
    state = str(report.get("state", ""))
    phases = [phase for phase in report.get("phases") or () if isinstance(phase, dict) and phase.get("state") != "end"]
    if state == READY or not phases:
        return state
    detail = str(phases[-1].get("detail") or "")
    return one_line(f"{state}, {phases[-1].get('name')}" + (f": {detail}" if detail else ""))


def _listen(
    shell: Shell, handle: NodeHandle, argv: list[str], said: queue.Queue[NodeSaid], is_over: threading.Event
) -> None:
    """Follow one node's reports; attach again when its supervisor was restarted."""
    while not is_over.is_set():
        process = shell.popen(argv)
        assert process.stdout is not None
        reader = threading.Thread(target=_copy, args=(process.stdout, handle, said), daemon=True)
        reader.start()
        while process.poll() is None and not is_over.is_set():
            is_over.wait(0.1)
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        process.wait()
        reader.join(timeout=2.0)
        process.stdout.close()
        is_over.wait(_REATTACH_SECONDS)


def _copy(lines: Any, handle: NodeHandle, said: queue.Queue[NodeSaid]) -> None:
    with contextlib.suppress(ValueError, OSError):
        for line in lines:
            report = _report(line)
            if report:
                said.put(NodeSaid(handle, report))


def _report(line: str) -> dict[str, Any]:
    try:
        loaded = json.loads(line)
    except ValueError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def ask_all(run: ClusterRun, environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Ask every node at once; a node that does not answer has an empty report."""

    def ask(handle: NodeHandle) -> dict[str, Any]:
        shell = Shell(handle.name, handle.ssh, environ)
        try:
            argv = RUNTIMES[run.runtime].status_argv(shell, handle)
            return _report(shell.run(argv, seconds=15.0, is_checked=False).strip())
        except HlaunchError:
            return {}

    with ThreadPoolExecutor(max_workers=max(1, len(run.nodes))) as pool:
        return dict(zip((node.name for node in run.nodes), pool.map(ask, run.nodes), strict=True))


def stop(
    run: ClusterRun, folder: InstanceFolder, environ: Mapping[str, str], note: Callable[[str], None] = lambda _: None
) -> list[str]:
    """End every node, the head (whose engine drains) first; return what is left, which should be nothing. Idempotent.

    A node that cannot be reached is named among what is left; then the record stays, so that `down` can be said again.
    The end of every node's log is kept here, since it goes with the node. `note` hears what may be the launch's or not.
    """
    runtime, left = RUNTIMES[run.runtime], []
    with contextlib.suppress(HlaunchError):
        keep(folder, last_lines(run.runtime, run.nodes, KEPT_LINES, environ), environ)
    for handle in sorted(run.nodes, key=lambda item: item.role != HEAD):
        shell = Shell(handle.name, handle.ssh, environ)
        try:
            ended = runtime.stop(shell, handle)
            left += [f"{handle.name}: {item}" for item in (*ended.left, *runtime.leftovers(shell, handle))]
            if count := len(ended.doubtful):
                names = ", ".join(ended.doubtful[:_NAMED]) + (f" and {count - _NAMED} more" if count > _NAMED else "")
                note(f"{handle.name}: made while it ran, held by nobody, and perhaps of another program: {names}")
        except HlaunchError as error:
            left.append(error.message)
    if not left:
        with contextlib.suppress(OSError):
            folder.cluster_file.unlink()
        forget_files(folder)
    return left
