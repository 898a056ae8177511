"""What connects the ranks of an instance on this host, from its own configuration and log.

Knows: where the two lie. Refuses to know: what the lines mean (`launcher.fabric.transports`).
"""

from __future__ import annotations

from engine.config import ConfigError, EngineConfig
from engine.placement import Placement
from launcher.fabric.transports import PairTransport, transports_of
from launcher.supervise.instance import InstanceFolder
from launcher.supervise.logfile import START_LINES, tail_of_run


def transports_here(folder: InstanceFolder) -> tuple[PairTransport, ...]:
    """List the transport of every connected pair of ranks; nothing where there is one rank, or no record."""
    try:
        config = EngineConfig.from_json(folder.config_file.read_text(encoding="utf-8"), str(folder.config_file))
        placement = Placement.from_json(config.placement) if config.placement else None
    except (OSError, ValueError, ConfigError):
        return ()
    if placement is None or len(placement.ranks) < 2:
        return ()
    return transports_of(placement, [tail_of_run(folder.log_file, START_LINES)])
