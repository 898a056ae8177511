"""ClusterPlan -> compose files for head and workers: pure, byte-stable, with nothing in them that a value could inject.

    files = render(plan)                 # {"head/docker-compose.yml": b"...", "head/.env.example": b"...", ...}
    issues = lint(text, "head/docker-compose.yml")
    override = host_override(facts)      # what this host cannot do, taken out again, with the reasons

Refuses to know: ssh, Docker's daemon, processes (`launcher.supervise`).
"""

from __future__ import annotations
