"""The waiting queue: who is admitted next, and how much may wait.

Knows: order, lengths. Refuses to know: budgets, blocks, rows.
"""

from __future__ import annotations

from bisect import insort

from engine.config import SchedulerConfig
from engine.core.request import EngineRequest, Request

# More queued prompt tokens than this many pools full are refused: they would wait longer than clients do.
# The bound belongs to the default queue of that many requests; a longer queue may hold more tokens in proportion.
QUEUE_POOLS = 2
QUEUE_REQUESTS = 256


def order_of(request: Request) -> tuple[float, ...]:
    """Sort key of requests: smallest is admitted first, largest is preempted first."""
    return request.order


class WaitingQueue:
    """Waiting and preempted requests, sorted by arrival (fcfs) or by priority and arrival.

    Under fcfs a preempted request thereby stands at the head: all that wait arrived after all that run.
    `kv_tokens` is how many tokens the KV pool holds at most.
    """

    def __init__(self, config: SchedulerConfig, kv_tokens: int) -> None:
        self._max_requests = config.max_queue
        self._max_tokens = QUEUE_POOLS * kv_tokens * max(config.max_queue, QUEUE_REQUESTS) // QUEUE_REQUESTS
        self._is_priority = config.policy == "priority"
        self._next_order = 0
        self.requests: list[Request] = []
        self.num_tokens = 0

    def can_take(self, num_prompt_tokens: int) -> bool:
        """Whether a new prompt of that many tokens may wait. An empty queue takes any prompt."""
        if not self.requests:
            return True
        if len(self.requests) >= self._max_requests:
            return False
        return self.num_tokens + num_prompt_tokens <= self._max_tokens

    def next_order(self, source: EngineRequest) -> tuple[float, ...]:
        """Place a new request among all others, for as long as it lives."""
        self._next_order += 1
        if self._is_priority:
            return (source.priority, source.arrival_time, self._next_order)
        return (self._next_order,)

    def push(self, request: Request) -> None:
        """Queue a new or a preempted request at its place."""
        insort(self.requests, request, key=order_of)
        self.num_tokens += request.num_prompt_tokens

    def remove(self, request: Request) -> None:
        """Take a request out: it is admitted, or over."""
        self.requests.remove(request)
        self.num_tokens -= request.num_prompt_tokens
