"""Answers of a rank that runs ahead: in order, from a thread; what goes wrong is told once, and nothing follows it."""

from __future__ import annotations

import threading

from engine.core.plan import StepResult
from engine.executor.rank_answers import Answers


class Step:
    """A step that ends when it is told to."""

    def __init__(self, step_id: int, error: Exception | None = None) -> None:
        self._result, self._error = StepResult(step_id, [], [], []), error
        self.over = threading.Event()

    def wait(self) -> StepResult:
        assert self.over.wait(10)
        if self._error is not None:
            raise self._error
        return self._result


def ended(threads: set[threading.Thread]) -> None:
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_steps_are_answered_in_order_while_more_are_launched() -> None:
    answered: list[int] = []
    all_there = threading.Event()

    def answer(result: StepResult) -> None:
        answered.append(result.step_id)
        if len(answered) == 3:
            all_there.set()

    answers = Answers(answer, lambda _: None)
    steps = [Step(number) for number in range(3)]
    for step in steps:
        answers.give(step)
    steps[1].over.set()
    assert answered == []  # the first is still under way
    steps[0].over.set()
    steps[2].over.set()
    assert all_there.wait(10)
    assert answered == [0, 1, 2]


def test_a_step_that_fails_is_told_once_and_nothing_follows() -> None:
    answered: list[int] = []
    told: list[Exception] = []
    failed = threading.Event()

    def fail(error: Exception) -> None:
        told.append(error)
        failed.set()

    before = set(threading.enumerate())
    answers = Answers(lambda result: answered.append(result.step_id), fail)
    threads = set(threading.enumerate()) - before
    steps = [Step(0), Step(1, RuntimeError("an illegal address")), Step(2)]
    for step in steps:
        step.over.set()
        answers.give(step)
    assert failed.wait(10)
    ended(threads)
    assert answered == [0]
    assert [str(error) for error in told] == ["an illegal address"]
