from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from registry_support import REGISTRY, Here  # noqa: E402


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """`hlaunch` in a folder that holds a small registry."""
    command = Here(tmp_path, monkeypatch, capsys)
    command.write(REGISTRY)
    return command
