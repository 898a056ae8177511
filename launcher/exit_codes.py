"""What a shell learns from hlaunch: one documented enum, used by every command.

Knows: the meaning of each exit status. Refuses to know: who raises it (`launcher.errors` maps exceptions to these).
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of the `hlaunch` process. A number, once released, never changes its meaning."""

    OK = 0
    ENGINE_FAILED = 1
    """The engine, or something at run time, failed; the engine's own code passes through when it has one."""
    USAGE = 2
    """The command line or an `HLAUNCH_*` variable is wrong."""
    REGISTRY_INVALID = 3
    UNKNOWN_MODEL = 4
    """Unknown model, profile, cluster or node."""
    PREFLIGHT = 5
    """A check before the start failed: a port in use, weights missing."""
    DOES_NOT_FIT = 6
    """Not enough memory, or no valid placement."""
    REMOTE_FAILED = 7
    NOT_READY = 8
    """The readiness deadline passed."""
    TRANSPORT = 9
    PLAN_CHANGED = 10
    INTERNAL = 70
    """A bug of ours: one line, the traceback with `--debug` only. Also an engine that was restarted too often."""
    INTERRUPTED = 130
