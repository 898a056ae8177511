"""The page that lies beside a rendered compose file. Knows: the four commands a person types. Refuses to know: YAML."""

from __future__ import annotations

import shlex

from launcher.plan.cluster_plan import ClusterPlan, NodePlan


def node_readme(plan: ClusterPlan, node: NodePlan) -> str:
    """Say what this folder starts, in which order, and how to see that it works."""
    after = (
        "Start this one first; the workers join it."
        if node.is_head
        else f"Start it after the head, `{_code(plan.head.name)}`; it waits for the head up to 5 minutes."
    )
    return (
        f"# {_code(plan.name)}: {node.role}\n\nRendered by `hlaunch render`; do not edit.\n"
        f"Node `{_code(node.name)}` of cluster `{_code(plan.cluster.name)}`, "
        f"address {_code(node.node.ip)}. {after}\n"
        f"`hlaunch up` does all of this on every node; by hand:\n\n"
        f"{_token(plan, node)}"
        "```\n(umask 077; cp .env.example .env)          # and fill it in\n"
        "docker compose up -d\n"
        "docker compose logs -f                     # the cause of an end is the last line\n"
        "docker compose down\n```\n\n"
        "A host without CAP_SYS_RESOURCE (a virtual machine, rootless Docker) refuses `memlock: -1`;\n"
        "`hlaunch render --for-host` writes an override file without it, which Compose reads by itself.\n"
    )


def _token(plan: ClusterPlan, node: NodePlan) -> str:
    """One secret for all: made on the head, copied by the others, readable by nobody else at any time."""
    if plan.cluster.ray is None:
        return ""
    shared = "The nodes share one secret, the file `ray_token`, mode 0600, in no repository."
    if node.is_head:
        make = "(umask 077; python3 -c 'import secrets; print(secrets.token_urlsafe(32))' > ray_token)"
        others = " It is made here, once; the workers copy it." if plan.workers else ""
        return f"{shared}{others}\n\n```\n{make}\n```\n\n"
    head = plan.head.node
    source = shlex.quote(f"{_code(head.ssh or (f'[{head.ip}]' if ':' in head.ip else head.ip))}:deploy/head/ray_token")
    return (
        f"{shared} It is made on the head; copy that one,\nfrom where the head's folder lies there "
        f"(`deploy/head` below your home, as written here):\n\n```\n(umask 077; scp {source} ray_token)\n```\n\n"
    )


def _code(text: str) -> str:
    """A name inside Markdown: no backtick, no line break, nothing that a reader would take for markup."""
    return "".join(ch if ch.isprintable() and ch not in "`<>|[]*_\\" or ch == "_" else "?" for ch in text)
