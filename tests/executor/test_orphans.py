"""A process that starts after whoever started it has died ends at once: the kernel has no death left to tell it of."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from executor_support import HERE


@pytest.mark.parametrize(
    "command",
    [
        ("engine.server", "--config", "/nowhere"),
        ("engine.executor.node_agent", "--config", "/nowhere"),
        ("engine.executor.node_host",),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("is_orphan", [True, False])
def test_who_starts_as_an_orphan_ends_without_a_word(command: tuple[str, ...], is_orphan: bool) -> None:
    read_end, write_end = os.pipe()
    if is_orphan:
        os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", *command, "--status-fd", str(write_end)],
        pass_fds=(write_end,),
        cwd=HERE.parents[1],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
        check=False,
    )
    os.close(write_end)
    if is_orphan:
        assert (done.returncode, done.stderr) == (1, b"")
    else:
        os.close(read_end)
        assert done.stderr != b"", "with a parent it reads its task, of which there is none"
