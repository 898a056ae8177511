"""`hlaunch render`: write the compose files of a launch, or say how written ones differ. Starts nothing, asks nobody.

Knows: folders, drift, lint. Refuses to know: what stands in the files (`launcher.compose`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.commands import Invocation, invocation_of

if TYPE_CHECKING:
    from launcher.plan.cluster_plan import ClusterPlan
    from launcher.plan.diff import Change


def register(app: typer.Typer) -> None:
    @app.command("render")
    def render(
        ctx: typer.Context,
        name: Annotated[str, typer.Argument(metavar="NAME", help="A model's name or alias.")],
        cluster: Annotated[str | None, typer.Option("--cluster", metavar="NAME", help="The cluster to run on.")] = None,
        output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to write.")] = Path("deploy"),
        overrides: Annotated[
            list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may repeat.")
        ] = None,
        check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 10 when DIR differs.")] = False,
        for_host: Annotated[
            bool, typer.Option("--for-host", help="Also an override file with what this host cannot do.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print the files as JSON; write nothing.")] = False,
    ) -> int:
        """Write the compose files of head and workers."""
        from launcher.compose.lint import lint
        from launcher.compose.render import render as render_files
        from launcher.exit_codes import ExitCode

        invocation = invocation_of(ctx)
        plan = cluster_plan_for(invocation, name, list(overrides or []), cluster)
        for problem in plan.problems:
            raise problem
        files = render_files(plan)
        found = [issue for path in files if path.endswith(".yml") for issue in lint(files[path].decode(), path)]
        # What is no fault is said once, not for every node.
        first = {(issue.code, issue.message): issue for issue in reversed(found) if issue.severity == "info"}
        invocation.console.issues([issue for issue in found if issue.severity != "info" or issue in first.values()])
        if as_json:
            invocation.console.json({path: content.decode() for path, content in files.items()})
            return ExitCode.OK
        if check:
            return _check(invocation, plan, files, output)
        if for_host:
            files |= _overrides(invocation, files)
        _write(invocation, plan, files, output)
        invocation.console.note(f"next: hlaunch up {name}")
        invocation.console.note("or copy each folder to its node, and there: docker compose up -d --wait")
        return ExitCode.OK


def cluster_plan_for(invocation: Invocation, name: str, overrides: list[str], cluster: str | None) -> ClusterPlan:
    """Plan a launch that has a cluster. Raises: UsageError when it has none."""
    from launcher.errors import UsageError
    from launcher.plan.cluster_plan import ClusterPlan
    from launcher.plan.gather import plan_for

    plan = plan_for(invocation, name, overrides, cluster, [])
    if not isinstance(plan, ClusterPlan):
        raise UsageError(
            f"{name} has no cluster: it runs on this host without compose files",
            hint="add --cluster NAME, and declare it under 'clusters:' (examples/two-nodes.yml)",
        )
    return plan


_DRIFT = {"create": "is missing", "recreate": "differs"}
# As `launcher.compose` writes it, near the top.
_OLD_NODE = re.compile(r'^x-hlaunch:\n(?:  .*\n){0,20}?  node: "([^"\n]+)"$', re.MULTILINE)


def _check(invocation: Invocation, plan: ClusterPlan, files: dict[str, bytes], folder: Path) -> int:
    from launcher.exit_codes import ExitCode
    from launcher.plan.diff import diff_files

    changed = [item for item in diff_files(files, folder) if item.action != "none"]
    for item in changed:
        if item.action != "remove":
            invocation.console.data(f"{folder / item.path}: {_DRIFT[item.action]}")
    for left, (said, _) in _left_over(plan, changed, folder).items():
        invocation.console.data(f"{left}: {said}")
    if not changed:
        invocation.console.note(f"{folder} is what the registry says")
        return ExitCode.OK
    invocation.console.note(f"line by line: hlaunch plan {plan.name} --diff --against {folder}")
    return ExitCode.PLAN_CHANGED


def _left_over(plan: ClusterPlan, changes: Sequence[Change], folder: Path) -> dict[Path, tuple[str, str]]:
    """Say of each folder that the plan no longer makes what it is, and what to do with it.

    A node may still be in the plan, under another folder: what runs there is stopped and started as ever.
    """
    from launcher.compose.render import COMPOSE_FILE
    from launcher.plan.diff import MAX_FILE_BYTES

    found = {}
    for left in dict.fromkeys((folder / item.path).parent for item in changes if item.action == "remove"):
        try:
            with (left / COMPOSE_FILE).open(encoding="utf-8", errors="replace") as file:
                node = _OLD_NODE.search(file.read(MAX_FILE_BYTES))
        except OSError:
            node = None
        if node is not None and node[1] not in {item.name for item in plan.nodes}:
            found[left] = (f"is of node '{node[1]}', which is not in the plan", "stop it there, remove it")
        else:
            found[left] = ("is of an earlier plan", "remove it")
    return found


def _overrides(invocation: Invocation, files: dict[str, bytes]) -> dict[str, bytes]:
    from launcher.compose.host import OVERRIDE_FILE, host_override
    from launcher.supervise.docker import read_host_facts

    override = host_override(read_host_facts(invocation.environ))
    if not override.text:
        invocation.console.note("this host needs no override file")
        return {}
    for reason in override.reasons:
        invocation.console.note(f"override: {reason}")
    folders = {path.partition("/")[0] for path in files}
    return {f"{folder}/{OVERRIDE_FILE}": override.text.encode() for folder in sorted(folders)}


def _write(invocation: Invocation, plan: ClusterPlan, files: dict[str, bytes], folder: Path) -> None:
    from launcher.errors import PreflightError
    from launcher.plan.diff import diff_files

    for left, (said, fix) in _left_over(plan, diff_files(files, folder), folder).items():
        invocation.console.note(f"{left} {said}: {fix}")
    for path, content in files.items():
        target = folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        except OSError as error:
            raise PreflightError(f"{target} cannot be written: {error.strerror}") from error
        invocation.console.data(str(target))
