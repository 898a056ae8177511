"""The options of `docker run` before a vLLM command -> what they are here, or why they are nothing.

Knows: which of them take a value, which say something that a registry says too. Refuses to know: vLLM's own options.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launcher.registry.importing.changes import Change, Entry
from launcher.registry.importing.options import apply_option, quoted_option
from launcher.registry.values import is_secret_name

_PROGRAMS = frozenset({"docker", "podman", "nerdctl"})
_SWITCHES = frozenset(
    {"--rm", "-d", "--detach", "-i", "--interactive", "-t", "--tty", "-it", "-ti", "-itd", "-dit", "--init",
     "--privileged", "--read-only", "-P", "--publish-all", "--no-healthcheck", "-q", "--quiet"}
)  # fmt: skip
_SHORT = {"-p": "--publish", "-v": "--volume", "-e": "--env", "--net": "--network", "-u": "--user", "-w": "--workdir"}
_REASONS = {
    "--gpus": "device, tensor-parallel-size and the node's gpus say it",
    "--volume": "models are read from the host's own folders; on a cluster HLAUNCH_MODEL_DIR names them",
    "--mount": "models are read from the host's own folders; on a cluster HLAUNCH_MODEL_DIR names them",
    "--ipc": "no container on this host; on a cluster: container.ipc",
    "--shm-size": "no container on this host; on a cluster: container.shm-size",
    "--network": "no container on this host; on a cluster: container.network",
    "--runtime": "the GPUs are the host's; on a cluster: container.gpu-mode",
    "--privileged": "nothing here needs it",
    "--env-file": "its variables are not read: export them, or write them under env",
    "--restart": "hlaunch starts an engine that died again by itself",
}
_OTHER = "an option of the container, which hlaunch makes by itself on a cluster"
_SERVER_PORT = "8000"


def container_changes(words: Sequence[str], entry: Entry) -> list[Change]:
    """Report every option of a `docker run` and take its published port into the entry; empty for another command."""
    programs = [index for index, word in enumerate(words) if word.rsplit("/", 1)[-1] in _PROGRAMS]
    if not programs or "run" not in words[programs[-1] + 1 :]:
        return []
    rest = list(words[words.index("run", programs[-1] + 1) + 1 :])
    inner = entry.settings.get("port", _SERVER_PORT)
    changes = []
    for written, value in _options(rest):
        name = _SHORT.get(written, written)
        source = quoted_option(written, value)
        if name == "--publish" and value is not None:
            changes.append(_published(value, inner, entry, source))
        elif name == "--env" and value is not None and ("=" in value or is_secret_name(value)):
            # Variables have rows of their own.
            continue
        elif name == "--env":
            changes.append(
                Change("dropped", source, "", "exported variables reach the engine by themselves", entry.name)
            )
        else:
            changes.append(Change("dropped", source, "", _REASONS.get(name, _OTHER), entry.name))
    return changes


def _options(rest: list[str]) -> Iterator[tuple[str, str | None]]:
    """Give the options up to the image, each with its value."""
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if equals:
            yield name, value
        elif not name.startswith("--") and name[:2] in _SHORT and len(name) > 2:
            yield name[:2], name[2:]
        elif name in _SWITCHES or not rest:
            yield name, None
        else:
            yield name, rest.pop(0)


def _published(value: str, inner: str, entry: Entry, source: str) -> Change:
    """`9000:8000` makes the server listen on 9000, if 8000 is where it listens inside."""
    outside, _, inside = value.rpartition("/")[0].rpartition(":") if "/" in value else value.rpartition(":")
    port = outside.rpartition(":")[2]
    if inside != inner or not port.isdigit():
        return Change(
            "dropped", source, "", f"the server listens on port {inner}, which it does not publish", entry.name
        )
    change = apply_option(entry, "port", port, source)
    reason = change.reason or "host stays 127.0.0.1 unless the line names one"
    return Change("renamed" if change.action == "kept" else change.action, source, change.result, reason, entry.name)
