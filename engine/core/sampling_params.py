"""How one request wants its tokens chosen.

Knows: the options, their ranges, and which of them the sampler must look at. Knows nothing of text: stop strings
travel here because they belong to the request, but only `engine.text` reads them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

MAX_N = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_STOP_TOKEN_IDS = 256


class InvalidSamplingParams(ValueError):
    """A sampling option is out of range. `param` names it as the API does."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param
        self.message = message


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling options of one request, validated on construction.

    Units: `max_tokens` and `min_tokens` count output tokens; `max_tokens=None` means the room left in the context.
    `temperature=0` is greedy. `top_k=0` keeps all. `logprobs=k` returns the sampled token and the k most likely ones.
    `seed=None` lets the engine draw one; the generator is keyed by (seed, token position), so batching,
    preemption and run-ahead cannot change the outcome.

    Raises: InvalidSamplingParams, naming the option.
    """

    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0, None)
        _integer("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidSamplingParams("min_tokens", f"{self.min_tokens} is above max_tokens {self.max_tokens}")
        _number("temperature", self.temperature, 0.0, 2.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidSamplingParams("top_p", "must be above 0")
        _integer("top_k", self.top_k, 0, None)
        _number("min_p", self.min_p, 0.0, 1.0)
        _integer("n", self.n, 1, MAX_N)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidSamplingParams("logit_bias", f"at most {MAX_LOGIT_BIAS} entries, got {len(self.logit_bias)}")
        for token_id, bias in self.logit_bias.items():
            _integer("logit_bias", token_id, 0, None)
            _number("logit_bias", bias, -100.0, 100.0)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidSamplingParams("stop", f"at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}")
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
                raise InvalidSamplingParams("stop", f"each string has 1 to {MAX_STOP_STRING_CHARS} characters")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidSamplingParams("stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids")
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, None)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def has_filters(self) -> bool:
        """Whether a top-k, top-p or min-p cut applies."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


def sequence_seed(seed: int, index: int) -> int:
    """Derive the seed of the `index`-th of `n` sequences; the first keeps the request's own.

    The stride is odd, so that the seeds of one request never meet (a Weyl sequence).
    """
    return seed if index == 0 else (seed + index * 0x9E3779B97F4A7C15) % (1 << 63)


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidSamplingParams(name, f"must be a finite number, got {value!r}")
    if not low <= value <= high:
        raise InvalidSamplingParams(name, f"must be between {low:g} and {high:g}, got {value!r}")


def _integer(name: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidSamplingParams(name, f"must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidSamplingParams(name, f"must be {bound}, got {value!r}")
