"""Which of several equal engines takes a request. Pure: figures come in, a number goes out.

Knows: the engines' last figures, which conversations and prefixes went where. Refuses to know: processes, clocks.

Order of the rules: the conversation's engine; the engine that holds at least half of the prompt's blocks; the lowest
score. The first two count only unless that engine is much busier than the best, and an engine that turns a request away
passes it on to the next. Among equal scores the turn goes round. Above 16 engines two are drawn and the better one is
taken: as good in the mean, and a stale figure cannot draw the whole burst.

    score = max(in flight, waiting + running) + waiting · 6 · max(0, KV usage - 0.5)

What is in flight is counted here and exact; the rest is up to 100 ms old, so a burst is spread by the former.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.core.request import EngineRequest, SchedulerStats

AFFINITY_SLACK = 8.0
"""How much busier than the best an engine may be and still get a prompt whose prefix it holds."""
AFFINITY_SHARE = 0.5
MAX_SCANNED = 16
FINE_BLOCKS = 256
COARSE_BLOCKS = 16
MAX_REMEMBERED = 8192
_KV_WEIGHT = 6.0
_MASK = (1 << 64) - 1


@dataclass(slots=True)
class EngineLoad:
    """One engine's figures. `is_available`: it takes requests now."""

    is_available: bool = False
    in_flight: int = 0
    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0

    @property
    def score(self) -> float:
        """The lower, the sooner a request runs."""
        pressure = self.waiting * _KV_WEIGHT * max(0.0, self.kv_usage - 0.5)
        return max(self.in_flight, self.waiting + self.running) + pressure

    def update(self, stats: SchedulerStats) -> None:
        """Take over an engine's own gauges."""
        self.waiting, self.running = stats.num_waiting, stats.num_running
        self.kv_usage = stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0


class _Link(NamedTuple):
    """The hash of a prompt's first `num_blocks` blocks."""

    key: int
    num_blocks: int


@dataclass(slots=True)
class _Memory:
    """What went to one engine: hashes of prompt prefixes, the longest unused first."""

    prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def holds(self, chain: Sequence[_Link]) -> int:
        """Count the leading blocks that were sent here."""
        count = 0
        for link in chain:
            if link.key not in self.prefixes:
                break
            count = link.num_blocks
        return count

    def remember(self, chain: Sequence[_Link]) -> None:
        # From the end, so that a prefix outlives what was built on it.
        for link in reversed(chain):
            self.prefixes[link.key] = None
            self.prefixes.move_to_end(link.key)
        while len(self.prefixes) > MAX_REMEMBERED:
            self.prefixes.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request may go: `engines`, the best first; the leading `num_affine` are there for what they hold.

    `chain` are the prompt's blocks, as `LoadBalancer` counts them.
    """

    engines: tuple[int, ...]
    num_affine: int
    conversation: str
    chain: Sequence[_Link]


class LoadBalancer:
    """Ranks `num_engines` for a request. Keep `loads` up to date, `record` where each request went, and call `forget`
    for an engine that lost its cache.

    `conversation_slack` is how much busier than the best an engine may be and still get its conversations' next turns.
    """

    def __init__(self, num_engines: int, block_size: int, conversation_slack: float) -> None:
        self.loads = [EngineLoad() for _ in range(num_engines)]
        self._block_size = block_size
        self._conversation_slack = conversation_slack
        self._memories = [_Memory() for _ in range(num_engines)]
        self._conversations: OrderedDict[str, int] = OrderedDict()
        self._turn = 0
        self._draws = 0
        self._last: tuple[list[int], str, list[_Link]] = ([], "", [])

    def route(self, request: EngineRequest) -> Route:
        """Put the engines that are available in the order in which to try them. Remembers nothing."""
        candidates = [i for i, load in enumerate(self.loads) if load.is_available]
        if not candidates:
            return Route((), 0, request.conversation, ())
        # With one engine there is nothing to choose by.
        chain = self._chain(request) if len(self.loads) > 1 else []
        scores = {i: self.loads[i].score for i in candidates}
        best = min(scores.values())
        affine: list[int] = []
        home = self._conversations.get(request.conversation) if request.conversation else None
        if home in scores and scores[home] <= best + self._conversation_slack:
            affine.append(home)
        holder = self._of_prefix(chain, {i: score for i, score in scores.items() if score <= best + AFFINITY_SLACK})
        if holder is not None and holder not in affine:
            affine.append(holder)
        rest = sorted((i for i in candidates if i not in affine), key=lambda i: (scores[i], self._steps_to(i)))
        if len(rest) > MAX_SCANNED:
            first = min(self._draw_two(rest), key=lambda i: (scores[i], self._steps_to(i)))
            rest.remove(first)
            rest.insert(0, first)
        return Route((*affine, *rest), len(affine), request.conversation, chain)

    def record(self, route: Route, engine: int) -> None:
        """Remember that a request has gone to an engine of its route."""
        if engine not in route.engines[: route.num_affine]:
            self._turn = (engine + 1) % len(self.loads)
        self._memories[engine].remember(route.chain)
        if route.conversation:
            self._conversations[route.conversation] = engine
            self._conversations.move_to_end(route.conversation)
            if len(self._conversations) > MAX_REMEMBERED:
                self._conversations.popitem(last=False)
        # Until the engine reports again, what was just sent counts as waiting.
        self.loads[engine].waiting += 1

    def forget(self, engine: int) -> None:
        """Drop what is known of an engine: it starts anew, with an empty cache."""
        self._memories[engine] = _Memory()
        self.loads[engine] = EngineLoad()
        for conversation in [key for key, value in self._conversations.items() if value == engine]:
            del self._conversations[conversation]

    def _of_prefix(self, chain: Sequence[_Link], scores: Mapping[int, float]) -> int | None:
        if not chain:
            return None
        held = {i: self._memories[i].holds(chain) for i in scores}
        longest = max(held.values(), default=0)
        if longest < AFFINITY_SHARE * chain[-1].num_blocks:
            return None
        return min((i for i, count in held.items() if count == longest), key=lambda i: scores[i])

    def _steps_to(self, engine: int) -> int:
        """Count the engines whose turn comes before this one's."""
        return (engine - self._turn) % len(self.loads)

    def _draw_two(self, candidates: Sequence[int]) -> tuple[int, int]:
        """Draw two different ones."""
        self._draws += 2
        count = len(candidates)
        first = _mix(self._draws) % count
        second = (first + 1 + _mix(self._draws + 1) % (count - 1)) % count
        return candidates[first], candidates[second]

    def _chain(self, request: EngineRequest) -> list[_Link]:
        """Hash the prompt's full blocks, each with all before it. Python's hash of bytes is keyed per process.

        Behind the first `FINE_BLOCKS` they are taken `COARSE_BLOCKS` at a time: always at the same places, so that
        prompts of any lengths meet, and a prompt of 131,072 tokens has 752 links instead of 8,192.
        """
        ids, salt, known = self._last
        if ids is request.prompt_token_ids and salt == request.cache_salt:
            return known  # the next of several answers to one prompt
        size = 4 * self._block_size
        data = memoryview(array("i", request.prompt_token_ids)).cast("B")
        num_blocks = len(data) // size
        key = hash(request.cache_salt)
        chain: list[_Link] = []
        done = 0
        while (end := done + (1 if done < FINE_BLOCKS else COARSE_BLOCKS)) <= num_blocks:
            key = hash((key, bytes(data[done * size : end * size])))
            chain.append(_Link(key, end))
            done = end
        self._last = (request.prompt_token_ids, request.cache_salt, chain)
        return chain


def _mix(number: int) -> int:
    """Draw from a counter: the finalizer of splitmix64. Equal inputs make equal choices, as everywhere in the core."""
    number = number * 0x9E3779B97F4A7C15 & _MASK
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _MASK
    return number ^ number >> 31
