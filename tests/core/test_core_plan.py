"""What a plan costs on the wire, and that its order never comes from a set."""

from __future__ import annotations

import ast
import copy
from dataclasses import astuple
from pathlib import Path

import msgspec
import pytest
from core_support import Loop, make_request

import engine.core
from engine.core.plan import ExecutionPlan

CORE = sorted(Path(engine.core.__file__).parent.glob("*.py"))
# Calls that only ask a question of a set, or put it in order.
ORDERLESS = {"len", "sorted", "min", "max", "sum", "any", "all", "set", "frozenset", "bool", "_check"}


def wire_bytes(plan: ExecutionPlan) -> int:
    return len(msgspec.msgpack.encode(astuple(plan)))


def test_steady_decode_is_small_and_crossings_are_bounded() -> None:
    loop = Loop(
        num_blocks=256 * 20,
        block_size=16,
        windows=(32, None),
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        max_queue=256,
    )
    for i in range(256):
        loop.add(make_request(f"r{i}", [i % 11, i // 11, *range(10)], 40))
    loop.step()
    assert len(loop.plans[0].admits) == 256
    while loop.scheduler.has_unfinished:
        loop.step()
    steady = [plan for plan in loop.plans[1:] if not plan.new_blocks]
    crossing = [plan for plan in loop.plans[1:] if plan.new_blocks]
    assert len(steady) > 30
    for plan in steady:
        assert (plan.admits, plan.released) == ([], [])
        assert wire_bytes(plan) <= 5 * 256 + 64
    assert max(len(plan.new_blocks) for plan in crossing) == 512
    assert max(wire_bytes(plan) for plan in crossing) <= 8192


def test_a_plan_does_not_change_after_it_was_made() -> None:
    loop = Loop(depth=2, num_blocks=24, max_num_batched_tokens=12)
    copies = []
    for i in range(6):
        loop.add(make_request(f"r{i}", [*range(5 + i)], 20))
    while loop.scheduler.has_unfinished:
        made = len(loop.plans)
        loop.step()
        copies += [copy.deepcopy(plan) for plan in loop.plans[made:]]
    assert loop.scheduler.stats().num_preemptions
    assert loop.plans == copies


def _sets_iterated(tree: ast.AST) -> list[int]:
    """Lines where something known to be a set is iterated into an order."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None and _is_set(node.value, names):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {ast.unparse(target).rpartition(".")[2] for target in targets}
    lines = []
    for node in ast.walk(tree):
        iterated: list[ast.expr] = []
        if isinstance(node, ast.For | ast.comprehension):
            iterated = [node.iter]
        elif isinstance(node, ast.Starred):
            iterated = [node.value]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            iterated = [] if name in ORDERLESS or name in ("add", "discard", "update") else list(node.args)
        elif isinstance(node, ast.AugAssign):
            iterated = [] if _is_set(node.target, names) else [node.value]
        lines += [expression.lineno for expression in iterated if _is_set(expression, names)]
    return lines


def _is_set(node: ast.expr, names: set[str]) -> bool:
    if isinstance(node, ast.Set | ast.SetComp):
        return True
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id in ("set", "frozenset")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr | ast.Sub | ast.BitXor):
        return _is_set(node.left, names) or _is_set(node.right, names)
    return isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node).rpartition(".")[2] in names


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_no_set_feeds_a_batch(path: Path) -> None:
    assert _sets_iterated(ast.parse(path.read_text())) == []


def test_the_set_check_sees_what_it_is_for() -> None:
    for source in (
        "for x in {1, 2}: f(x)",
        "s = set()\nlist(s)",
        "a.s = frozenset(b)\n[x for x in a.s]",
        "r += {1} | t",
    ):
        assert _sets_iterated(ast.parse(source)), source
    for source in ("s = {1}\nx in s", "s = set()\ns.add(2)\nlen(s)", "sorted({1} & t)", "for x in [1]: f(x)"):
        assert not _sets_iterated(ast.parse(source)), source
