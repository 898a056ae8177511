"""hlaunch's launcher: decides what to run and keeps it running.

Knows: the registry, the plan, the child processes. Refuses to know: torch, ray, cupy, fastapi; of the engine it
imports `engine.config`, `engine.placement` and `engine.memory`, nothing else.
"""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
