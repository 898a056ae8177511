"""What a node's processes leave in its run folder for whoever asks when nobody answers there.

Knows: two small records, and what they say together. Refuses to know: who writes them, and when. The probe reads them:
nothing is imported here that takes time to start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.supervise.procfs import ProcessIdentity

LAST_END_FILE = "last_end.json"
KEEPER_FILE = "keeper.json"
"""Who restarts a node that runs without a container, how long draining may take, where Ray's session lies."""


def read_record(path: Path) -> dict[str, Any]:
    """Read one record; empty without one."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def keeper_of(record: Mapping[str, Any]) -> ProcessIdentity | None:
    """Say who the keeper of a record is, dead or alive; None when it does not tell."""
    try:
        return ProcessIdentity.from_data(record)
    except (ValueError, KeyError, TypeError):
        return None


def between_runs(folder: Path) -> dict[str, Any]:
    """Say what is known of a node that does not answer: it has ended, and is started again or not. Empty: nothing."""
    previous, record = read_record(folder / LAST_END_FILE), read_record(folder / KEEPER_FILE)
    if not previous.get("cause") and not record:
        return {}
    keeper = keeper_of(record)
    is_kept = keeper is None or keeper.is_alive
    cause = str(previous.get("cause", ""))
    return {"state": "restarting" if is_kept else "failed", "cause": cause, "previous": previous or None}
