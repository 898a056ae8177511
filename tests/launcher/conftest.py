from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
# Fixture trees in the place of hosts.
sys.path.append(str(Path(__file__).parents[1] / "fabric"))
pytest.register_assert_rewrite("screens_support")

from launcher_support import Launcher  # noqa: E402


@pytest.fixture
def hlaunch(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path)
    yield launcher
    launcher.close()
