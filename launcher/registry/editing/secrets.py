"""Which values of a registry's text are secrets.

Knows: the names that they stand under. Refuses to know: who shows them.
"""

from __future__ import annotations

from typing import Any

from launcher.registry.editing.content import content_of
from launcher.registry.values import is_secret_name


def secret_values(text: str) -> dict[str, str]:
    """Return the secrets that stand in a text, each by its own name; references to variables and files are none."""
    found: dict[str, str] = {}
    _collect(content_of(text), found)
    return found


def _collect(node: Any, found: dict[str, str]) -> None:
    if isinstance(node, list):
        for item in node:
            _collect(item, found)
    elif isinstance(node, dict):
        for key, value in node.items():
            if not isinstance(value, str):
                _collect(value, found)
            elif is_secret_name(key.replace("-", "_")) and not value.startswith(("${", "file:")):
                found[f"{len(found)}_{key.replace('-', '_')}"] = value
