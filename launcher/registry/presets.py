"""What a platform changes of the built-in values. Data; refuses to know variables (`launcher.fabric` has those)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from launcher.registry.types import Value

PRESETS: Mapping[str, Mapping[str, Value]] = MappingProxyType(
    {
        # CPU and GPU share one memory: at the usual 0.9 the system starves while weights load, and the kernel kills.
        "gb10": MappingProxyType({"gpu-memory-utilization": 0.85}),
    }
)
"""Platform -> key -> value, between the built-in values and `defaults`."""
