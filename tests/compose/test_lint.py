"""What Compose lets pass and our lint does not: each trap planted once, with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from compose_support import compose

from launcher.compose.lint import lint

BASE = "services:\n  node:\n    image: x:1\n"
TRAPS = {
    "restart-word": "    restart: sometimes\n",
    "shm-inert": "    ipc: host\n    shm_size: 1g\n",
    "gpu-twice": (
        "    gpus: all\n    runtime: nvidia\n    deploy: {resources: {reservations: {devices: "
        "[{driver: nvidia, count: all, capabilities: [gpu]}]}}}\n"
    ),
    "ports-on-host-network": '    network_mode: host\n    ports: ["8000:8000"]\n',
    "bare-variable": "    environment: {A: $HOME}\n",
    "may-be-unset": "    environment: {A: '${FOO}'}\n",
    "device-missing": '    devices: ["/dev/no-such-device:/dev/x"]\n',
    "secret-file-missing": "    secrets: [t]\nsecrets: {t: {file: ./absent}}\n",
    "secret-unset": "    secrets: [t]\nsecrets: {t: {environment: NOT_SET}}\n",
    "privileged": "    privileged: true\n",
}


@pytest.mark.parametrize("code", TRAPS)
def test_compose_accepts_it_and_we_name_it(code: str, tmp_path: Path) -> None:
    text = BASE + TRAPS[code]
    (tmp_path / "docker-compose.yml").write_text(text)
    accepted = compose("config", "-q", cwd=tmp_path, variables={})
    assert accepted.returncode == 0, accepted.stderr
    found = lint(text, "docker-compose.yml", folder=tmp_path, environ={})
    assert [issue.code for issue in found] == [code]
    assert found[0].line is not None
    assert found[0].line >= 2
    assert found[0].hint


@pytest.mark.parametrize(
    "text",
    [
        BASE,
        BASE + "    restart: on-failure:3\n",
        BASE + "    environment: {A: $$HOME, B: '${X:-y}', C: '${Y:?set Y}'}\n",
        BASE + "    ipc: private\n    shm_size: 1g\n",
        BASE + "    gpus: all\n",
        BASE + "    network_mode: host\n",
    ],
)
def test_clean_files_are_clean(text: str, tmp_path: Path) -> None:
    assert lint(text, "docker-compose.yml", folder=tmp_path, environ={}) == []


@pytest.mark.parametrize(
    ("image", "is_named"),
    [
        ("x", True),
        ("host:5000/x", True),
        ("x:latest", True),
        ("host:5000/x:1.2", False),
        ("x@sha256:0", False),
        ("x:latest@sha256:0", False),
        ("${IMAGE:?run: export IMAGE=...}", False),
    ],
)
def test_an_image_without_a_version_is_told(image: str, is_named: bool) -> None:
    found = lint(BASE.replace("x:1", f'"{image}"'), "f")
    assert [(issue.code, issue.severity) for issue in found] == [("image-unpinned", "info")] * is_named


def test_a_list_of_variables_is_read_too() -> None:
    text = BASE + "    gpus: all\n    environment: [CUDA_VISIBLE_DEVICES=0]\n"
    assert [issue.code for issue in lint(text, "f")] == ["gpu-twice"]


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "services: 3", "services: {node: 3}", "secrets: [x]"])
def test_lint_never_raises(text: str) -> None:
    lint(text, "f")
