"""The main process of a node, in a container or as plain processes.

    python -m launcher.node head --plan node.json               in the foreground, log on stdout (containers)
    python -m launcher.node start --plan node.json --log FILE   in the background, restarted up to three times
    python -m launcher.node stop --folder RUN_FOLDER            until nothing of it is left

Knows: how a node's files become its supervisor's arguments. Refuses to know: the order of events (`node_supervisor`).
The cause of a failure is the last line of the log.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from engine.config import ConfigError, EngineConfig
from launcher.errors import HlaunchError, PreflightError
from launcher.exit_codes import ExitCode
from launcher.supervise.control import make_private_folder
from launcher.supervise.instance import write_private
from launcher.supervise.node_records import KEEPER_FILE, keeper_of, read_record
from launcher.supervise.node_spec import MAX_SPEC_BYTES, NodeSpec
from launcher.supervise.node_supervisor import NodeSupervisor
from launcher.supervise.procfs import ProcessIdentity, age_seconds
from launcher.supervise.remains import MARK, end_processes, remove_shared_memory

ENGINE_FILE = "engine.json"
MODEL_FOLDER_VARIABLE = "HLAUNCH_MODEL_FOLDER"
"""Read by the host of this node's ranks (`engine.executor.ray_actor`)."""
_STOP_GRACE_SECONDS = 15.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="launcher.node", description=__doc__)
    parser.add_argument("verb", choices=("head", "worker", "keep", "start", "stop"))
    parser.add_argument("--plan", type=Path, help="the node plan, JSON")
    parser.add_argument("--environment", type=Path, help="start: variables of this node, JSON")
    parser.add_argument("--log", type=Path, help="start: where the log goes")
    parser.add_argument("--folder", type=Path, help="stop: the node's run folder")
    arguments = parser.parse_args()
    try:
        if arguments.verb == "stop":
            if arguments.folder is None:
                parser.error("stop needs --folder")
            return stop(arguments.folder)
        if arguments.plan is None:
            parser.error(f"{arguments.verb} needs --plan")
        spec = read_spec(arguments.plan)
        if arguments.environment is not None:
            os.environ.update(_variables(arguments.environment))
        if arguments.verb in ("keep", "start"):
            if arguments.log is None:
                parser.error(f"{arguments.verb} needs --log")
            run = _keep if arguments.verb == "keep" else _start
            return run(spec, arguments.plan, arguments.log)
        return serve(spec, arguments.verb)
    except HlaunchError as error:
        print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return int(error.exit_code)


def read_spec(path: Path) -> NodeSpec:
    """Read a node plan. Raises: PreflightError."""
    try:
        if path.stat().st_size > MAX_SPEC_BYTES:
            raise PreflightError(f"{path} is larger than {MAX_SPEC_BYTES >> 20} MiB")
        return NodeSpec.from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise PreflightError(f"{path} cannot be read: {error}") from error


def _variables(path: Path) -> dict[str, str]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): str(value) for name, value in loaded.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise PreflightError(f"{path} is not a set of variables: {error}") from error


def serve(spec: NodeSpec, role: str) -> int:
    """Be this node until it ends. Blocks; belongs on the main thread."""
    if spec.role != role:
        raise PreflightError(f"this plan is for the {spec.role} {spec.node}, not for a {role}", hint="wrong folder?")
    make_private_folder(Path(spec.run_folder))
    config = _engine_config(spec)
    environ = {**os.environ, **_rank_environment(spec)}
    supervisor = NodeSupervisor(spec, environ, config, lambda line: print(line, flush=True))
    code = supervisor.run()
    report = supervisor.report
    if report.cause:
        if report.hint:
            print(f"hint: {report.hint}", flush=True)
        print(f"error: {spec.role} {spec.node}: {report.cause}", flush=True)
    return code


def _rank_environment(spec: NodeSpec) -> dict[str, str]:
    """Tell ranks that the head starts on this node where the model lies here; its path on the head may be another."""
    if spec.is_head or not spec.num_ranks:
        return {}
    files = spec.model_files(os.environ)
    if (missing := files.missing(needs_weights=False)) is not None:
        raise missing
    return {MODEL_FOLDER_VARIABLE: str(files.folder)}


def _engine_config(spec: NodeSpec) -> Path | None:
    """Complete the engine's configuration with what only this node knows: the model's folder, the key's digest."""
    if not spec.engine_config:
        return None
    try:
        config = EngineConfig.from_json(Path(spec.engine_config).read_text(encoding="utf-8"), spec.engine_config)
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise PreflightError(f"{spec.engine_config}: {error}", hint="render it again: hlaunch render") from error
    files = spec.model_files(os.environ)
    if (missing := files.missing(needs_weights=config.load_format != "dummy")) is not None:
        raise missing
    server = config.server
    if spec.api_key_file:
        server = replace(server, api_key_sha256=(hashlib.sha256(_secret(spec.api_key_file).encode()).hexdigest(),))
    path = Path(spec.run_folder) / ENGINE_FILE
    write_private(path, replace(config, model=str(files.folder), server=server).to_json())
    return path


def _secret(path: str) -> str:
    try:
        secret = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PreflightError(f"the API key {path} cannot be read: {error}") from error
    if not secret:
        raise PreflightError(f"the API key {path} is empty", hint="export its variable before: docker compose up")
    return secret


def _start(spec: NodeSpec, plan: Path, log: Path) -> int:
    """Start the keeper in a session of its own and return; its record is how `stop` finds it."""
    folder = Path(spec.run_folder)
    make_private_folder(folder)
    if (running := keeper_of(read_record(folder / KEEPER_FILE))) is not None and running.is_alive:
        raise PreflightError(f"{spec.node} runs already (pid {running.pid})", hint="hlaunch down NAME")
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher.node", "keep", "--plan", str(plan), "--log", str(log)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, MARK: str(folder)},
    )
    identity = ProcessIdentity.of(process.pid)
    if identity is None:
        raise PreflightError(f"{spec.node} ended at once", hint=f"see {log}")
    record = {**identity.to_data(), "drain": spec.drain_timeout_seconds, "ray": spec.ray_folder}
    write_private(folder / KEEPER_FILE, json.dumps(record))
    print(json.dumps({"pid": identity.pid}))
    process.returncode = 0  # It goes on; init inherits it.
    return ExitCode.OK


def _keep(spec: NodeSpec, plan: Path, log: Path) -> int:
    from launcher.supervise.keeper import keep

    return keep([sys.executable, "-u", "-m", "launcher.node", spec.role, "--plan", str(plan)], log)


def stop(folder: Path) -> int:
    """End a node that was started here, wait until nothing of it is left, remove its folders. Idempotent."""
    record = read_record(folder / KEEPER_FILE)
    keeper = keeper_of(record)
    if keeper is not None:
        keeper.send(signal.SIGTERM)
        deadline = time.monotonic() + float(record.get("drain", 30.0)) + _STOP_GRACE_SECONDS
        while keeper.is_alive and time.monotonic() < deadline:
            time.sleep(0.05)
        if keeper.is_alive:
            keeper.send(signal.SIGKILL)
    killed, left = end_processes(folder)
    # Its age is known by its record, whether it lives or not.
    since = None if keeper is None else time.time() - age_seconds(keeper)
    stuck, doubtful = remove_shared_memory(folder, since)
    shutil.rmtree(folder, ignore_errors=True)
    if ray_folder := str(record.get("ray", "")):
        shutil.rmtree(ray_folder, ignore_errors=True)
    told = {"was_running": keeper is not None, "killed": killed, "left": [*left, *stuck], "doubtful": doubtful}
    print(json.dumps(told))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
