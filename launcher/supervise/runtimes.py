"""A node of a cluster as containers or as plain processes: stage, start, watch, log, stop. One small class each.

Knows: the commands of either runtime. Refuses to know: order between nodes, deadlines, terminals (`cluster_up`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from launcher.compose.host import OVERRIDE_FILE, host_override
from launcher.compose.labels import LABEL
from launcher.compose.render import (
    COMPOSE_FILE,
    ENV_FILE,
    compose_text,
    host_variables,
    is_hidden_variable,
    project_of,
)
from launcher.compose.specs import Layout, engine_config, node_environment, node_spec
from launcher.errors import PreflightError
from launcher.fabric.environment import carried_environment
from launcher.plan.cluster_plan import ClusterPlan, NodePlan
from launcher.supervise.docker import FACTS_SCRIPT, parse_containers, parse_host_facts
from launcher.supervise.shell import RemoteFailed, Shell, Unreachable
from launcher.supervise.status import one_line

WATCH_WAIT_SECONDS = 120
_COMPOSE = (
    'cd "$1" && shift && if [ -n "$HLAUNCH_COMPOSE" ]; then exec "$HLAUNCH_COMPOSE" "$@"; '
    'elif docker compose version >/dev/null 2>&1; then exec docker compose "$@"; else exec docker-compose "$@"; fi'
)


# A container that Docker starts again cannot be asked; Docker itself still knows how it ended.
_STATUS = (
    'project=$1 between=$2; shift 2; label="label=com.docker.compose.project=$project"; '
    '[ -n "$(docker ps -q --filter "$label" --filter status=running)" ] && exec "$@"; '
    'id=$(docker ps -aq --filter "$label" | head -1); [ -n "$id" ] && exec docker inspect --format "$between" "$id"'
)
_BETWEEN_RUNS = (
    '{"state": "{{if eq .State.Status "restarting"}}restarting{{else}}failed{{end}}", '
    '"cause": "its container ended with status {{.State.ExitCode}}", '
    '"previous": {"cause": "its container ended with status {{.State.ExitCode}}", "restarts": {{.RestartCount}}}}'
)


@dataclass(frozen=True, slots=True)
class NodeHandle:
    """Where one node of a launch lies: enough to ask it and to end it, also from another process later."""

    name: str
    role: str
    ip: str
    ssh: str | None
    folder: str
    run_folder: str
    project: str
    network: str
    drain_seconds: float

    @property
    def stop_seconds(self) -> float:
        return self.drain_seconds + 45.0


@dataclass(frozen=True, slots=True)
class Secrets:
    """What travels as files of mode 0600 and is printed nowhere."""

    ray_token: str
    api_key: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """What the end of a node could not take away (`left`), and what may be of it or not (`doubtful`)."""

    left: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()

    @classmethod
    def parse(cls, said: str) -> Stopped:
        """Read what `launcher.node stop` says in its last line; anything else says nothing."""
        try:
            data = json.loads(said.strip().splitlines()[-1])
            return cls(tuple(map(one_line, data["left"])), tuple(map(one_line, data["doubtful"])))
        except (ValueError, IndexError, KeyError, TypeError, AttributeError):
            return cls()


class Runtime(Protocol):
    """How one node runs."""

    name: str

    def check(self, shell: Shell) -> None:
        """Raise RemoteFailed when a node cannot run in this way at all; leave nothing there."""

    def stage(self, shell: Shell, plan: ClusterPlan, node: NodePlan, secrets: Secrets) -> list[str]: ...
    def start(self, shell: Shell, handle: NodeHandle) -> None: ...
    def watch_argv(self, shell: Shell, handle: NodeHandle) -> list[str]: ...
    def status_argv(self, shell: Shell, handle: NodeHandle) -> list[str]: ...
    def logs_argv(self, shell: Shell, handle: NodeHandle, num_lines: int, *, follow: bool) -> list[str]: ...
    def stop(self, shell: Shell, handle: NodeHandle) -> Stopped: ...
    def leftovers(self, shell: Shell, handle: NodeHandle) -> list[str]: ...


def handle_of(plan: ClusterPlan, node: NodePlan) -> NodeHandle:
    """Name a node's places. The same launch and node always get the same ones."""
    tag = hashlib.sha256(f"{plan.name}\0{plan.cluster.name}\0{node.name}".encode()).hexdigest()[:10]
    return NodeHandle(
        name=node.name,
        role=node.role,
        ip=node.node.ip,
        ssh=node.node.ssh,
        folder=f".local/state/hlaunch/nodes/{tag}",
        run_folder=f"/tmp/hl-{tag}",
        project=project_of(plan, node),
        network=plan.cluster.container.network,
        drain_seconds=node.config.server.drain_timeout_seconds,
    )


class ProcessRuntime:
    """Plain processes: `launcher.node start` and `stop`."""

    name = "process"

    def check(self, shell: Shell) -> None:
        """Nothing is needed but what the first command needs too."""

    def stage(self, shell: Shell, plan: ClusterPlan, node: NodePlan, secrets: Secrets) -> list[str]:
        handle = handle_of(plan, node)
        folder = shell.folder(handle.folder)
        layout = Layout(
            run_folder=handle.run_folder,
            # Inside what only we may enter: Ray opens its own folders to everyone on the host.
            ray_folder=f"{handle.run_folder}/ray",
            node_file=f"{folder}/node.json",
            engine_file=f"{folder}/engine.json",
            token_file=f"{folder}/ray_token",
            api_key_file=f"{folder}/api_key",
        )
        environment = dict(node_environment(node))
        environment = {**carried_environment(plan.cluster, node.node, shell.environ, environment), **environment}
        environment.pop("RAY_AUTH_TOKEN_PATH", None)
        files = {
            "node.json": node_spec(plan, node, layout).to_json().encode(),
            "engine.json": engine_config(plan, node, layout).to_json().encode(),
            "environment.json": json.dumps(environment).encode(),
            "ray_token": secrets.ray_token.encode(),
        }
        if node.is_head and secrets.api_key:
            files["api_key"] = secrets.api_key.encode()
        shell.stage(handle.folder, files)
        return []

    def start(self, shell: Shell, handle: NodeHandle) -> None:
        folder = shell.folder(handle.folder)
        files = ["--plan", f"{folder}/node.json", "--environment", f"{folder}/environment.json"]
        shell.run(
            [shell.python, "-m", "launcher.node", "start", *files, "--log", f"{folder}/node.log"],
            what="starting the node",
        )

    def watch_argv(self, shell: Shell, handle: NodeHandle) -> list[str]:
        return [*self._probe(shell, handle, "watch"), "--wait", str(WATCH_WAIT_SECONDS)]

    def status_argv(self, shell: Shell, handle: NodeHandle) -> list[str]:
        return self._probe(shell, handle, "status")

    def _probe(self, shell: Shell, handle: NodeHandle, question: str) -> list[str]:
        return [shell.python, "-m", "launcher.probe", question, "--folder", handle.run_folder]

    def logs_argv(self, shell: Shell, handle: NodeHandle, num_lines: int, *, follow: bool) -> list[str]:
        script = 'cd && exec tail -n "$1" $2 -- "$3/node.log"'
        return ["sh", "-c", script, "sh", str(num_lines), "-F" if follow else "-q", handle.folder]

    def stop(self, shell: Shell, handle: NodeHandle) -> Stopped:
        said = shell.run(
            [shell.python, "-m", "launcher.node", "stop", "--folder", handle.run_folder],
            seconds=handle.stop_seconds,
            what="stopping the node",
        )
        shell.remove(handle.folder)
        return Stopped.parse(said)

    def leftovers(self, shell: Shell, handle: NodeHandle) -> list[str]:
        # Who only asks the node, such as the `watch` of an `up` that ends right now, is no part of it.
        script = 'ls -d "$1" 2>/dev/null; pgrep -af -- "$1" | grep -v "pgrep\\|sh -c\\|launcher.probe" ; true'
        found = shell.run(["sh", "-c", script, "sh", handle.run_folder], is_checked=False)
        return [line for line in found.splitlines() if line.strip() and " -c " not in line]


class ComposeRuntime:
    """Containers by Docker Compose, found again by label."""

    name = "compose"

    def check(self, shell: Shell) -> None:
        """Raise RemoteFailed unless Docker's daemon answers and Compose v2 is there."""
        try:
            shell.run(["docker", "version", "--format", "{{.Server.Version}}"], what="Docker")
        except Unreachable:
            raise
        except RemoteFailed as error:
            error.hint = "install and start Docker there: sudo systemctl start docker; or without it: --runtime process"
            raise
        try:
            shell.run(["sh", "-c", _COMPOSE, "sh", ".", "version"], what="Docker Compose")
        except Unreachable:
            raise
        except RemoteFailed as error:
            error.hint = "install docker-compose-plugin there, or set HLAUNCH_COMPOSE; or without it: --runtime process"
            raise

    def stage(self, shell: Shell, plan: ClusterPlan, node: NodePlan, secrets: Secrets) -> list[str]:
        handle = handle_of(plan, node)
        facts = parse_host_facts(shell.run(["sh", "-c", FACTS_SCRIPT], what="reading the host"))
        override = host_override(facts)
        user, group = shell.run(["sh", "-c", "id -u; id -g"], what="asking who we are").split()
        values = {"HLAUNCH_UID": user, "HLAUNCH_GID": group}
        for name in host_variables(plan, node):
            if name in values:
                continue
            value = (
                secrets.api_key if is_hidden_variable(plan, name) and secrets.api_key else shell.environ.get(name, "")
            )
            if not value or "\n" in value or "'" in value:
                raise PreflightError(
                    f"{name} is not set, or cannot stand in a .env file", hint=f"run: export {name}=..."
                )
            values[name] = value
        files = {
            COMPOSE_FILE: compose_text(plan, node),
            ".env": "".join(f"{name}='{value}'\n" for name, value in values.items()).encode(),
            "ray_token": secrets.ray_token.encode(),
        }
        carried = carried_environment(plan.cluster, node.node, shell.environ, node_environment(node))
        if travelling := {name: value for name, value in carried.items() if "\n" not in value}:
            # Below the file's own `environment`, as Compose merges the two.
            files[ENV_FILE] = "".join(f"{name}={value}\n" for name, value in travelling.items()).encode()
        if override.text:
            files[OVERRIDE_FILE] = override.text.encode()
        shell.stage(handle.folder, files)
        if handle.network != "host":
            self._make_network(shell, plan, handle)
        return [f"{node.name}: {reason}" for reason in override.reasons]

    def _make_network(self, shell: Shell, plan: ClusterPlan, handle: NodeHandle) -> None:
        subnet = plan.cluster.fabric.subnet
        known = shell.run(["docker", "network", "ls", "--format", "{{.Name}}"], what="asking Docker").split()
        if handle.network in known:
            return
        options = ["--subnet", subnet] if subnet else []
        label = ["--label", f"{LABEL}.cluster={plan.cluster.name}"]
        shell.run(["docker", "network", "create", *label, *options, "--", handle.network], what="making the network")

    def start(self, shell: Shell, handle: NodeHandle) -> None:
        self._compose(shell, handle, "up", ["--detach", "--force-recreate"], 300.0)

    def _compose(self, shell: Shell, handle: NodeHandle, verb: str, options: list[str], seconds: float) -> None:
        # By its project's name, which does not depend on a file that may be gone.
        args = ["--project-name", handle.project, verb, *options]
        folder = shell.folder(handle.folder)
        shell.run(["sh", "-c", _COMPOSE, "sh", folder, *args], seconds=seconds, what=f"docker compose {verb}")

    def container_argv(self, handle: NodeHandle, question: list[str]) -> list[str]:
        """Run a program inside the node's container, whatever its number is by now."""
        script = (
            'id=$(docker ps -q --filter "label=com.docker.compose.project=$1" | head -1) && shift && '
            'exec docker exec "$id" "$@"'
        )
        return ["sh", "-c", script, "sh", handle.project, *question]

    def watch_argv(self, shell: Shell, handle: NodeHandle) -> list[str]:
        return self.container_argv(handle, ["python", "-m", "launcher.probe", "watch", "--wait", "30"])

    def status_argv(self, shell: Shell, handle: NodeHandle) -> list[str]:
        argv = self.container_argv(handle, ["python", "-m", "launcher.probe", "status"])
        return ["sh", "-c", _STATUS, "sh", handle.project, _BETWEEN_RUNS, *argv]

    def logs_argv(self, shell: Shell, handle: NodeHandle, num_lines: int, *, follow: bool) -> list[str]:
        script = (
            'id=$(docker ps -aq --filter "label=com.docker.compose.project=$1" | head -1) && '
            'exec docker logs --tail "$2" $3 "$id" 2>&1'
        )
        return ["sh", "-c", script, "sh", handle.project, str(num_lines), *(["--follow"] if follow else [])]

    def stop(self, shell: Shell, handle: NodeHandle) -> Stopped:
        self._compose(shell, handle, "down", ["--remove-orphans", "--volumes"], handle.stop_seconds + 30)
        shell.remove(handle.folder)
        if handle.network != "host":
            # Fails while another node's container is on it: the last one removes it.
            shell.run(["docker", "network", "rm", handle.network], is_checked=False)
        # Processes and shared memory were the container's.
        return Stopped()

    def leftovers(self, shell: Shell, handle: NodeHandle) -> list[str]:
        argv = ["docker", "ps", "-a", "--filter", f"label=com.docker.compose.project={handle.project}"]
        return [
            f"container {item.get('Names', '')}"
            for item in parse_containers(shell.run([*argv, "--format", "{{json .}}"], what="asking Docker"))
        ]


RUNTIMES: Mapping[str, Runtime] = {"compose": ComposeRuntime(), "process": ProcessRuntime()}
