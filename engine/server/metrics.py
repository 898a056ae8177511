"""What the server counts, in Prometheus text: vLLM's names where vLLM has them, ours under `hlaunch_`.

Knows: names, buckets, labels. What an engine counts, and what this process counts of the requests that an engine had,
carries its data-parallel rank as `engine`, as in vLLM; what belongs to no engine alone has no such label. The hot path
pays an integer addition or a bisection per token; names and labels are put together only when somebody scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.core.request import SchedulerStats
from engine.server.rank_metrics import collect_ranks
from engine.usage import EngineUsage

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_E2E = (
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
_N = (1, 2, 5, 10, 16)
_OWN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Histogram:
    """Fixed buckets; `observe` costs one bisection."""

    __slots__ = ("_bounds", "_counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(float(bound) for bound in bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Return cumulative (upper bound, count) pairs, the last one at +Inf."""
        total = 0
        found: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            found.append(("+Inf" if bound == float("inf") else repr(bound), total))
        return found


class EngineMetrics:
    """What this process counts of the requests that one engine had, through all its restarts."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(_TTFT)
        self.inter_token_latency = Histogram(_ITL)
        self.time_per_output_token = Histogram(_ITL)
        self.e2e_latency = Histogram(_E2E)
        self.prompt_tokens = Histogram(_TOKENS)
        self.generation_tokens = Histogram(_TOKENS)
        self.params_n = Histogram(_N)
        self.params_max_tokens = Histogram(_TOKENS)
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_cached_tokens = 0
        self.finished: dict[str, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.num_nan = 0


class Metrics:
    """Counters of one API process. All methods run on the event loop."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._by_engine: list[EngineMetrics] = []
        self.prepare_seconds = Histogram(_OWN)
        self.refused: dict[str, int] = {}
        self.num_disconnects = 0
        self.responses: dict[tuple[str, int], int] = {}

    def of_engine(self, rank: int) -> EngineMetrics:
        """Return the counters of one engine's requests."""
        while len(self._by_engine) <= rank:
            self._by_engine.append(EngineMetrics())
        return self._by_engine[rank]

    def count_response(self, route: str, status: int) -> None:
        key = (route, status)
        self.responses[key] = self.responses.get(key, 0) + 1

    def count_refusal(self, code: str) -> None:
        self.refused[code] = self.refused.get(code, 0) + 1

    def render(
        self, engines: Sequence[SchedulerStats], usages: Sequence[EngineUsage], num_open: int, state: str
    ) -> bytes:
        """Write the exposition text.

        `engines` are the data-parallel engines' figures and `usages` their ranks', both by data-parallel rank;
        `num_open` counts generations under way here.
        """
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Snapshot(lambda: self._collect(engines, usages, num_open, state)))
        return generate_latest(registry)

    def _collect(
        self, engines: Sequence[SchedulerStats], usages: Sequence[EngineUsage], num_open: int, state: str
    ) -> Iterator[Metric]:
        yield from self._collect_engines(engines)
        yield from collect_ranks(self._model_name, usages)
        yield from self._collect_requests([self.of_engine(rank) for rank in range(len(engines))])
        labels, values = ("model_name",), (self._model_name,)
        refused = CounterMetricFamily(
            "vllm:admission_rejections", "Requests refused before the engine.", labels=[*labels, "reason"]
        )
        for code, count in self.refused.items():
            refused.add_metric([*values, code], count)
        yield refused
        responses = CounterMetricFamily(
            "hlaunch_http_responses", "Answers by route and status.", labels=["route", "status"]
        )
        for (route, status), count in self.responses.items():
            responses.add_metric([route, str(status)], count)
        yield responses
        left = CounterMetricFamily("hlaunch_client_disconnects", "Generations whose client left.", labels=labels)
        left.add_metric(values, self.num_disconnects)
        yield left
        is_open = GaugeMetricFamily(
            "hlaunch_open_generations", "Generations under way in the API process.", labels=labels
        )
        is_open.add_metric(values, num_open)
        yield is_open
        state_metric = GaugeMetricFamily("hlaunch_state", "1 for the state the server is in.", labels=["state"])
        state_metric.add_metric([state], 1)
        yield state_metric
        prepare = HistogramMetricFamily(
            "hlaunch_prepare_seconds", "From arrival to submission: parse, render, tokenize.", labels=labels
        )
        prepare.add_metric(values, self.prepare_seconds.buckets(), self.prepare_seconds.sum)
        yield prepare

    def _collect_requests(self, engines: Sequence[EngineMetrics]) -> Iterator[Metric]:
        """What this process counts of each engine's requests."""
        names = ("model_name", "engine")
        counters: tuple[tuple[str, str, Callable[[EngineMetrics], float]], ...] = (
            ("vllm:prompt_tokens", "Prompt tokens of admitted requests.", lambda own: own.num_prompt_tokens),
            ("vllm:generation_tokens", "Generated tokens.", lambda own: own.num_generation_tokens),
            (
                "vllm:prompt_tokens_cached",
                "Prompt tokens found in the prefix cache.",
                lambda own: own.num_cached_tokens,
            ),
            ("vllm:corrupted_requests", "Requests that ended on a value that is not finite.", lambda own: own.num_nan),
            ("hlaunch_nan", "Rows whose logits were not finite.", lambda own: own.num_nan),
        )
        for name, text, read in counters:
            counter = CounterMetricFamily(name, text, labels=names)
            for rank, own in enumerate(engines):
                counter.add_metric((self._model_name, str(rank)), read(own))
            yield counter
        finished = CounterMetricFamily(
            "vllm:request_success", "Finished sequences.", labels=[*names, "finished_reason"]
        )
        for rank, own in enumerate(engines):
            for reason, count in own.finished.items():
                finished.add_metric([self._model_name, str(rank), reason], count)
        yield finished
        histograms: tuple[tuple[str, str, Callable[[EngineMetrics], Histogram]], ...] = (
            (
                "vllm:time_to_first_token_seconds",
                "From arrival to the first token.",
                lambda own: own.time_to_first_token,
            ),
            (
                "vllm:inter_token_latency_seconds",
                "Between two tokens of a sequence.",
                lambda own: own.inter_token_latency,
            ),
            (
                "vllm:request_time_per_output_token_seconds",
                "Mean per token, by request.",
                lambda own: own.time_per_output_token,
            ),
            ("vllm:e2e_request_latency_seconds", "From arrival to the last token.", lambda own: own.e2e_latency),
            ("vllm:request_prompt_tokens", "Prompt tokens by sequence.", lambda own: own.prompt_tokens),
            ("vllm:request_generation_tokens", "Generated tokens by sequence.", lambda own: own.generation_tokens),
            ("vllm:request_params_n", "`n` by request.", lambda own: own.params_n),
            ("vllm:request_params_max_tokens", "`max_tokens` by request.", lambda own: own.params_max_tokens),
        )
        for name, text, pick in histograms:
            family = HistogramMetricFamily(name, text, labels=names)
            for rank, own in enumerate(engines):
                histogram = pick(own)
                family.add_metric((self._model_name, str(rank)), histogram.buckets(), histogram.sum)
            yield family

    def _collect_engines(self, engines: Sequence[SchedulerStats]) -> Iterator[Metric]:
        """What each engine counts by itself."""
        names = ("model_name", "engine")
        gauges: tuple[tuple[str, str, Callable[[SchedulerStats], float]], ...] = (
            ("vllm:num_requests_running", "Requests in the running batch.", lambda stats: stats.num_running),
            ("vllm:num_requests_waiting", "Requests that wait to be scheduled.", lambda stats: stats.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", _kv_usage),
        )
        counters: tuple[tuple[str, str, Callable[[SchedulerStats], float]], ...] = (
            (
                "vllm:prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache.",
                lambda stats: stats.prefix_queries_tokens,
            ),
            ("vllm:prefix_cache_hits", "Prompt tokens found by look-up.", lambda stats: stats.prefix_hits_tokens),
            (
                "vllm:num_preemptions",
                "Requests sent back to the queue for lack of blocks.",
                lambda stats: stats.num_preemptions,
            ),
            ("hlaunch_engine_steps", "Steps of the engine.", lambda stats: stats.num_steps),
        )
        for kind, wanted in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, text, read in wanted:
                family = kind(name, text, labels=names)
                for rank, stats in enumerate(engines):
                    family.add_metric((self._model_name, str(rank)), read(stats))
                yield family
        info = GaugeMetricFamily("vllm:cache_config_info", "Sizes of the KV cache.", labels=[*names, "num_gpu_blocks"])
        for rank, stats in enumerate(engines):
            info.add_metric([self._model_name, str(rank), str(stats.num_blocks)], 1)
        yield info


def _kv_usage(stats: SchedulerStats) -> float:
    return stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0


class _Snapshot(Collector):
    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        return self._collect()
