"""When an engine that died is started again: the waits, the limit, and what comes after it."""

from __future__ import annotations

from engine.restarts import Restarts


def test_the_wait_doubles_while_starts_come_to_nothing() -> None:
    restarts = Restarts(9)
    waits = [restarts.next_wait(0.0, has_served=False) for _ in range(9)]
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert not restarts.is_given_up


def test_an_engine_that_has_served_is_soon_back_and_still_counted() -> None:
    restarts = Restarts(5)
    served = [False, False, True, False, True]
    assert [restarts.next_wait(0.0, has_served=it) for it in served] == [1.0, 2.0, 1.0, 2.0, 1.0]
    assert not restarts.is_given_up
    restarts.next_wait(1.0, has_served=True)
    assert restarts.is_given_up


def test_who_is_given_up_is_tried_again_when_the_first_start_is_ten_minutes_old() -> None:
    restarts = Restarts(2)
    assert restarts.next_wait(0.0, has_served=True) == 1.0
    restarts.begin()
    assert restarts.next_wait(100.0, has_served=True) == 1.0
    restarts.begin()
    # The starts were at 1 and 101 s.
    assert restarts.next_wait(200.0, has_served=True) == 401.0
    assert restarts.is_given_up
    restarts.begin()
    assert not restarts.is_given_up
    assert restarts.next_wait(602.0, has_served=True) == 99.0
    assert restarts.is_given_up
    restarts.begin()
    assert restarts.next_wait(5000.0, has_served=True) == 1.0
    assert not restarts.is_given_up


def test_a_limit_of_nothing_is_for_ever() -> None:
    restarts = Restarts(0)
    assert restarts.next_wait(0.0, has_served=True) is None
    assert restarts.is_given_up
    assert restarts.next_wait(1e6, has_served=True) is None
