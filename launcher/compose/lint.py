"""What Compose accepts without a word and Docker refuses later, or never: found before anything starts.

Knows: the traps of Compose v2, one code each. Refuses to know: the schema (Compose checks that itself). Works on any
compose file, also one that somebody edited; every finding has its line and column.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.errors import Issue, Severity
from launcher.registry.document import DocumentError, Node, Scalar, Sequence, read_tree
from launcher.registry.document import Mapping as Branch

_RESTART = re.compile(r"no|always|unless-stopped|on-failure(:[0-9]+)?", re.ASCII)
_VARIABLE = re.compile(
    r"\$(?:(?P<escaped>\$)|(?P<bare>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<rest>[^}]*)\})",
    re.ASCII,
)
_HOST_MODES = frozenset({"host"})


def lint(
    text: str, source: str, *, folder: Path | None = None, environ: Mapping[str, str] | None = None
) -> list[Issue]:
    """Check one compose file. `folder` and `environ` given: also what it needs of this host.

    Never raises for what the text says; a file that is not YAML is one issue.
    """
    try:
        root = read_tree(text, source)
    except DocumentError as error:
        return [error.issue]
    if not isinstance(root, Branch):
        return [Issue("error", "not-a-mapping", source, 1, 1, "", "a compose file is a mapping")]
    return list(_Lint(source, folder, environ).document(root))


def _is_unpinned(image: str) -> bool:
    """Whether an image has no version: no tag, or `latest`. A colon before a slash is a registry's port."""
    if "@" in image:
        return False
    tag = image.rpartition("/")[2].partition(":")[2]
    return tag in ("", "latest")


class _Lint:
    def __init__(self, source: str, folder: Path | None, environ: Mapping[str, str] | None) -> None:
        self._source = source
        self._folder = folder
        self._environ = environ

    def document(self, root: Branch) -> Iterator[Issue]:
        yield from self._variables(root, "")
        for name, service in _pairs(_get(root, "services")):
            if isinstance(service, Branch):
                yield from self._service(service, f"services.{name}")
        for name, secret in _pairs(_get(root, "secrets")):
            yield from self._secret(secret, f"secrets.{name}")

    def _service(self, service: Branch, path: str) -> Iterator[Issue]:
        restart = _get(service, "restart")
        if isinstance(restart, Scalar) and not _RESTART.fullmatch(restart.text):
            yield self._issue(
                "error", "restart-word", restart, f"{path}.restart",
                f"{restart.text!r} is no restart policy", "write no, always, unless-stopped or on-failure:3",
            )  # fmt: skip
        image = _get(service, "image")
        if isinstance(image, Scalar) and "$" not in image.text and _is_unpinned(image.text):
            yield self._issue(
                "info", "image-unpinned", image, f"{path}.image",
                f"{image.text} may be another image on each host, and another tomorrow",
                "name a version, or a digest: IMAGE@sha256:…",
            )  # fmt: skip
        yield from self._shared_memory(service, path)
        yield from self._gpus(service, path)
        ports, mode = _get(service, "ports"), _get(service, "network_mode")
        if ports is not None and _text(mode) in _HOST_MODES:
            yield self._issue(
                "error", "ports-on-host-network", ports, f"{path}.ports",
                "ports are ignored with network_mode: host", "remove ports; the service listens on the host itself",
            )  # fmt: skip
        privileged = _get(service, "privileged")
        if privileged is not None and _text(privileged) == "true":
            yield self._issue(
                "warning", "privileged", privileged, f"{path}.privileged",
                "the container is root on the host", "name the devices and capabilities that it needs",
            )  # fmt: skip
        yield from self._devices(service, path)

    def _shared_memory(self, service: Branch, path: str) -> Iterator[Issue]:
        size = _get(service, "shm_size")
        if size is not None and _text(_get(service, "ipc")) == "host":
            yield self._issue(
                "warning", "shm-inert", size, f"{path}.shm_size",
                "no effect with ipc: host, which brings the host's /dev/shm", "remove one of the two",
            )  # fmt: skip

    def _gpus(self, service: Branch, path: str) -> Iterator[Issue]:
        """One GPU mechanism: two of them reserve twice, or one hides the other."""
        found = []
        if _get(service, "gpus") is not None:
            found.append("gpus")
        if _get(service, "deploy", "resources", "reservations", "devices") is not None:
            found.append("deploy.resources.reservations.devices")
        if _text(_get(service, "runtime")) == "nvidia":
            found.append("runtime: nvidia")
        if any("nvidia.com/gpu" in item for item in _texts(_get(service, "devices"))):
            found.append("devices (CDI)")
        names = _names(_get(service, "environment"))
        if found and "CUDA_VISIBLE_DEVICES" in names:
            found.append("CUDA_VISIBLE_DEVICES")
        if found and "NVIDIA_VISIBLE_DEVICES" in names:
            found.append("NVIDIA_VISIBLE_DEVICES")
        if len(found) > 1:
            yield self._issue(
                "error", "gpu-twice", service, path, f"several GPU mechanisms: {', '.join(found)}", "keep one of them"
            )

    def _devices(self, service: Branch, path: str) -> Iterator[Issue]:
        devices = _get(service, "devices")
        if self._folder is None or not isinstance(devices, Sequence):
            return
        for item in devices.items:
            host = _text(item).partition(":")[0]
            if host.startswith("/") and "$" not in host and not Path(host).exists():
                yield self._issue(
                    "error", "device-missing", item, f"{path}.devices",
                    f"{host} is not on this host, and the container cannot be created", "is the driver loaded?",
                )  # fmt: skip

    def _secret(self, secret: Node, path: str) -> Iterator[Issue]:
        file, variable = _get(secret, "file"), _get(secret, "environment")
        if file is not None and self._folder is not None and not (self._folder / _text(file)).is_file():
            yield self._issue(
                "error", "secret-file-missing", file, f"{path}.file", f"{_text(file)} is not there",
                "make it with mode 0600; hlaunch up does",
            )  # fmt: skip
        if variable is not None and self._environ is not None and not self._environ.get(_text(variable)):
            yield self._issue(
                "error", "secret-unset", variable, f"{path}.environment",
                f"{_text(variable)} is not set: the secret would be an empty file",
                f"run: export {_text(variable)}=...",
            )  # fmt: skip

    def _variables(self, node: Node, path: str) -> Iterator[Issue]:
        """`$HOME` expands, and an unset `${FOO}` becomes nothing with a warning that scrolls away."""
        if isinstance(node, Branch):
            for key, value in node.pairs:
                yield from self._variables(value, f"{path}.{_text(key)}".lstrip("."))
        elif isinstance(node, Sequence):
            for item in node.items:
                yield from self._variables(item, path)
        elif "$" in node.text:
            for match in _VARIABLE.finditer(node.text):
                name = match["bare"] or match["name"]
                if name is None:
                    continue
                if match["bare"]:
                    yield self._issue(
                        "warning", "bare-variable", node, path, f"${name} is replaced by Compose",
                        f"write $${name} for the text itself, or ${{{name}:?message}}",
                    )  # fmt: skip
                elif not match["rest"]:
                    yield self._issue(
                        "warning", "may-be-unset", node, path, f"${{{name}}} becomes nothing when unset",
                        f"write ${{{name}:?message}} or ${{{name}:-default}}",
                    )  # fmt: skip

    def _issue(self, severity: Severity, code: str, node: Node, path: str, message: str, hint: str) -> Issue:
        return Issue(severity, code, self._source, node.mark.line, node.mark.column, path, message, hint)


def _pairs(node: Node | None) -> list[tuple[str, Node]]:
    return [(_text(key), value) for key, value in node.pairs] if isinstance(node, Branch) else []


def _get(node: Node | None, *path: str) -> Node | None:
    for key in path:
        node = dict(_pairs(node)).get(key)
    return node


def _text(node: Node | None) -> str:
    return node.text if isinstance(node, Scalar) else ""


def _texts(node: Node | None) -> list[str]:
    return [_text(item) for item in node.items] if isinstance(node, Sequence) else []


def _names(node: Node | None) -> set[str]:
    """Names of variables, in either form of `environment`."""
    if isinstance(node, Sequence):
        return {text.partition("=")[0] for text in _texts(node)}
    return {name for name, _ in _pairs(node)}
