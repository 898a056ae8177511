"""/metrics is Prometheus text with vLLM's names, and counts what happened."""

from __future__ import annotations

import httpx
from fake_engine import scripted
from prometheus_client.parser import text_string_to_metric_families
from server_support import TOKENIZER, running

from engine.core.request import SchedulerStats
from engine.server.metrics import Metrics
from launcher.top.exposition import parse
from launcher.top.reading import read

WORDS = [[i] for i in TOKENIZER.encode("all the world is a stage, and all the men")]

VLLM_NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:prompt_tokens_cached",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:num_preemptions",
    "vllm:request_success",
    "vllm:corrupted_requests",
    "vllm:admission_rejections",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_params_n",
    "vllm:request_params_max_tokens",
}


def scrape(client: httpx.Client) -> dict[str, float]:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(answer.text))
    assert {family.name for family in families} >= VLLM_NAMES
    samples: dict[str, float] = {}
    for family in families:
        assert family.documentation
        for sample in family.samples:
            if family.name.startswith("vllm:"):
                assert sample.labels["model_name"] == "tiny-oss"
            key = sample.name + "".join(
                f"{{{k}={v}}}" for k, v in sample.labels.items() if k not in ("model_name", "engine")
            )
            samples[key] = sample.value
    return samples


def test_counts() -> None:
    with running(scripted(WORDS)) as server, server.http() as client:
        before = scrape(client)
        body = {"model": "tiny-oss", "prompt": [5, 6, 7], "max_tokens": 4, "n": 2}
        assert client.post("/v1/completions", json=body).status_code == 200
        assert client.post("/v1/completions", json=body | {"temperature": 9}).status_code == 400
        after = scrape(client)

        def grown(name: str) -> float:
            return after[name] - before.get(name, 0.0)

        assert grown("vllm:prompt_tokens_total") == 6
        assert grown("vllm:generation_tokens_total") == 8
        assert grown("vllm:request_success_total{finished_reason=length}") == 2
        assert grown("vllm:time_to_first_token_seconds_count") == 2
        assert grown("vllm:inter_token_latency_seconds_count") == 6
        assert grown("vllm:request_params_n_bucket{le=2.0}") == 1
        assert grown("vllm:request_generation_tokens_bucket{le=5.0}") == 2
        assert grown("hlaunch_http_responses_total{route=/v1/completions}{status=200}") == 1
        assert grown("hlaunch_http_responses_total{route=/v1/completions}{status=400}") == 1
        assert after["vllm:num_requests_running"] == 0


def test_every_engine_has_its_own_label() -> None:
    engines = [
        SchedulerStats(num_running=3, num_waiting=1, num_blocks=100, num_used_blocks=25, num_steps=7),
        SchedulerStats(num_running=5, num_blocks=100, num_used_blocks=50, num_preemptions=2),
    ]
    metrics = Metrics("m")
    metrics.of_engine(1).num_generation_tokens = 11
    metrics.of_engine(0).time_to_first_token.observe(0.3, 2)
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(metrics.render(engines, [], 8, "ready").decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[sample.labels.get("engine", "")] = sample.value
    assert found["vllm:num_requests_running"] == {"0": 3, "1": 5}
    assert found["vllm:num_requests_waiting"] == {"0": 1, "1": 0}
    assert found["vllm:kv_cache_usage_perc"] == {"0": 0.25, "1": 0.5}
    assert found["vllm:num_preemptions_total"] == {"0": 0, "1": 2}
    assert found["hlaunch_engine_steps_total"] == {"0": 7, "1": 0}
    assert found["vllm:generation_tokens_total"] == {"0": 0, "1": 11}
    assert found["vllm:time_to_first_token_seconds_count"] == {"0": 2, "1": 0}
    ours = {"hlaunch_open_generations", "hlaunch_prepare_seconds_sum", "hlaunch_client_disconnects_total"}
    assert {name for name, by_engine in found.items() if name in ours and list(by_engine) == [""]} == ours
    # `hlaunch top` shows a row for each.
    reading = read(parse(metrics.render(engines, [], 8, "ready").decode()))
    assert [row.engine for row in reading.rows] == ["0", "1"]
    assert (reading.values["running"], reading.values["generated_tokens"]) == (8, 11)


def test_a_single_engine_is_number_0() -> None:
    text = Metrics("m").render([SchedulerStats()], [], 0, "ready").decode()
    assert 'vllm:generation_tokens_total{engine="0",model_name="m"} 0.0' in text


def test_what_came_of_requests_is_told_by_engine() -> None:
    with running(scripted(WORDS)) as server, server.http() as client:
        server.engine.num_engines = 2
        body = {"model": "tiny-oss", "prompt": [5, 6, 7], "max_tokens": 4, "n": 3}
        assert client.post("/v1/completions", json=body).status_code == 200
        found: dict[str, dict[str, float]] = {}
        for family in text_string_to_metric_families(client.get("/metrics").text):
            for sample in family.samples:
                if sample.name.startswith("vllm:") and sample.value:
                    found.setdefault(sample.name, {})[sample.labels.get("engine", "")] = sample.value
    # Engine 0 has the first and the third sequence; options of the whole request are told once.
    assert found["vllm:prompt_tokens_total"] == {"0": 6, "1": 3}
    assert found["vllm:generation_tokens_total"] == {"0": 8, "1": 4}
    assert found["vllm:request_success_total"] == {"0": 2, "1": 1}
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_generation_tokens"):
        assert found[f"vllm:{name}_count"] == {"0": 2, "1": 1}
    assert found["vllm:inter_token_latency_seconds_count"] == {"0": 6, "1": 3}
    assert found["vllm:request_params_n_count"] == {"0": 1}


def test_ranks_are_told_with_their_places_and_top_shows_them() -> None:
    with running(scripted(WORDS)) as server, server.http() as client:
        server.engine.num_engines = 2
        text = client.get("/metrics").text
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if "rank" in sample.labels:
                    place = tuple(sample.labels[name] for name in ("engine", "rank", "node", "device"))
                    found.setdefault(sample.name, {})[place] = sample.value
    places = [("0", "0", "node0", "cuda:0"), ("0", "1", "node1", "cpu:0")]
    places += [("1", "2", "node0", "cuda:0"), ("1", "3", "node1", "cpu:0")]
    assert list(found["hlaunch_rank_state"]) == places
    assert [found["hlaunch_rank_computing_seconds_total"][place] for place in places] == [10.0, 9.0, 11.0, 9.0]
    assert set(found["hlaunch_rank_idle_seconds_total"].values()) == {1.0}
    assert [found["hlaunch_rank_waiting_seconds_total"][place] for place in places] == [2.0, 3.0, 2.0, 3.0]
    # What is not known is not told.
    assert found["hlaunch_rank_power_watts"] == {places[0]: 412.5, places[2]: 412.5}
    assert found["hlaunch_rank_memory_bytes"] == {places[0]: 8 << 30, places[2]: 8 << 30}
    ranks = read(parse(text)).ranks
    assert [(rank.engine, rank.rank, rank.state) for rank in ranks.ranks] == [
        ("0", "0", "computing"), ("0", "1", "stopped by a signal"),
        ("1", "2", "computing"), ("1", "3", "stopped by a signal"),
    ]  # fmt: skip
    # Both engines have a part on the node, whose ports are its own.
    assert ranks.traffic == {"node0": {"clock": 6.0, "sent": 1001, "received": 3000}}
