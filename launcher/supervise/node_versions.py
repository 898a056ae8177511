"""What must be of one version on all nodes of a launch, and what differs.

Pure. Knows: which parts talk to each other across nodes. Refuses to know: how versions are read (`node_fabric`).
"""

from __future__ import annotations

from collections.abc import Mapping

MUST = ("hlaunch", "python", "torch", "ray", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "model")
"""Ray refuses even another patch of Python; NCCL of another release may hang; another model answers nonsense."""
SHOULD = ("driver",)
_WORDS = {"python": "Python", "nvidia-nccl-cu12": "NCCL", "nvidia-nccl-cu13": "NCCL", "model": "the model's files"}
_SHOWN_DIGEST = 12


def differences(versions: Mapping[str, Mapping[str, str]], names: tuple[str, ...] = MUST) -> list[str]:
    """Name what differs: `torch differs: one 2.11.0, two 2.10.1`. Nodes that do not say are not compared."""
    found = []
    for name in names:
        said = {node: known[name] for node, known in versions.items() if known.get(name)}
        if len(set(said.values())) > 1:
            shown = {node: value[:_SHOWN_DIGEST] if name == "model" else value for node, value in said.items()}
            values = ", ".join(f"{node} {value}" for node, value in shown.items())
            found.append(f"{_WORDS.get(name, name)} differ{'' if name == 'model' else 's'}: {values}")
    return found
