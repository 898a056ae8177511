"""Which of several equal engines takes a request. Pure: figures come in, a number goes out.

Knows: the engines' last figures, which conversations and prefixes went where. Refuses to know: processes, clocks.

Order of the rules: the conversation's engine; the engine that holds at least half of the prompt's blocks, unless it is
much busier than the best; the lowest score. Among equal scores the turn goes round. Above 16 engines two are drawn and
the better one is taken: as good in the mean, and a stale figure cannot draw the whole burst.

    score = max(in flight, waiting + running) + waiting · 6 · max(0, KV usage - 0.5)

What is in flight is counted here and exact; the rest is up to 100 ms old, so a burst is spread by the former.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.core.request import EngineRequest, SchedulerStats

AFFINITY_SLACK = 8.0
"""How much busier than the best an engine may be and still get a prompt whose prefix it holds."""
AFFINITY_SHARE = 0.5
MAX_SCANNED = 16
MAX_PREFIX_BLOCKS = 256
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


@dataclass(slots=True)
class _Memory:
    """What went to one engine: hashes of prompt prefixes, the longest unused first."""

    prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def holds(self, chain: Sequence[int]) -> int:
        """Count the leading blocks that were sent here."""
        count = 0
        for key in chain:
            if key not in self.prefixes:
                break
            count += 1
        return count

    def remember(self, chain: Sequence[int]) -> None:
        # From the end, so that a prefix outlives what was built on it.
        for key in reversed(chain):
            self.prefixes[key] = None
            self.prefixes.move_to_end(key)
        while len(self.prefixes) > MAX_REMEMBERED:
            self.prefixes.popitem(last=False)


class LoadBalancer:
    """Chooses among `num_engines`. Keep `loads` up to date, and call `forget` for an engine that lost its cache."""

    def __init__(self, num_engines: int, block_size: int) -> None:
        self.loads = [EngineLoad() for _ in range(num_engines)]
        self._block_size = block_size
        self._memories = [_Memory() for _ in range(num_engines)]
        self._conversations: OrderedDict[str, int] = OrderedDict()
        self._turn = 0
        self._draws = 0

    def choose(self, request: EngineRequest) -> int | None:
        """Choose an engine for a request, and remember that it went there; None when no engine is available."""
        candidates = [i for i, load in enumerate(self.loads) if load.is_available]
        if not candidates:
            return None
        chain = self._chain(request)
        chosen = self._of_conversation(request.conversation)
        if chosen is None:
            best = self._least_loaded(candidates)
            chosen = self._of_prefix(chain, candidates, self.loads[best].score)
            if chosen is None:
                chosen = best
                self._turn = (best + 1) % len(self.loads)
        self._memories[chosen].remember(chain)
        if request.conversation:
            self._conversations[request.conversation] = chosen
            self._conversations.move_to_end(request.conversation)
            if len(self._conversations) > MAX_REMEMBERED:
                self._conversations.popitem(last=False)
        # Until the engine reports again, what was just sent counts as waiting.
        self.loads[chosen].waiting += 1
        return chosen

    def forget(self, engine: int) -> None:
        """Drop what is known of an engine: it starts anew, with an empty cache."""
        self._memories[engine] = _Memory()
        self.loads[engine] = EngineLoad()
        for conversation in [key for key, value in self._conversations.items() if value == engine]:
            del self._conversations[conversation]

    def _of_conversation(self, conversation: str) -> int | None:
        engine = self._conversations.get(conversation) if conversation else None
        return engine if engine is not None and self.loads[engine].is_available else None

    def _of_prefix(self, chain: Sequence[int], candidates: Sequence[int], best_score: float) -> int | None:
        if not chain:
            return None
        limit = best_score + AFFINITY_SLACK
        held = {i: self._memories[i].holds(chain) for i in candidates if self.loads[i].score <= limit}
        longest = max(held.values(), default=0)
        if longest < AFFINITY_SHARE * len(chain):
            return None
        return min((i for i, count in held.items() if count == longest), key=lambda i: self.loads[i].score)

    def _least_loaded(self, candidates: Sequence[int]) -> int:
        count = len(self.loads)
        if len(candidates) > MAX_SCANNED:
            self._draws += 2
            candidates = [candidates[_mix(self._draws + i) % len(candidates)] for i in range(2)]
        return min(candidates, key=lambda i: (self.loads[i].score, (i - self._turn) % count))

    def _chain(self, request: EngineRequest) -> list[int]:
        """Hash the prompt's full blocks, each with all before it. Python's hash of bytes is keyed per process."""
        size = 4 * self._block_size
        data = array("i", request.prompt_token_ids[: MAX_PREFIX_BLOCKS * self._block_size]).tobytes()
        key = hash(request.cache_salt)
        chain = []
        for begin in range(0, len(data) - size + 1, size):
            key = hash((key, data[begin : begin + size]))
            chain.append(key)
        return chain


def _mix(number: int) -> int:
    """Draw from a counter: the finalizer of splitmix64. Equal inputs make equal choices, as everywhere in the core."""
    number = number * 0x9E3779B97F4A7C15 & _MASK
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _MASK
    return number ^ number >> 31
