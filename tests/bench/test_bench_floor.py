"""The floor's arithmetic against published tables of gpt-oss on H100 and H200."""

from __future__ import annotations

import pytest

from engine.config import load_model_config, parse_model_config, resolve_model_folder
from engine.memory import model_bytes
from launcher.benchmark import floor
from launcher.plan.known_models import KNOWN_CONFIGS

SMALL = parse_model_config(KNOWN_CONFIGS["openai/gpt-oss-20b"])
LARGE = parse_model_config(KNOWN_CONFIGS["openai/gpt-oss-120b"])
H100, H200 = floor.DEVICES["H100 80GB HBM3"], floor.DEVICES["H200"]

# n: experts per layer, weights GB, KV GB at 1k, ms H100, tok/s H100 spec / copy, ms H200, tok/s H200 spec / copy.
GPT_OSS_20B = {
    1: (4.0, 3.71, 0.03, 1.115, 897, 803, 0.778, 1285, 1151),
    2: (7.5, 4.82, 0.06, 1.456, 1374, 1230, 1.016, 1969, 1764),
    4: (13.2, 6.64, 0.11, 2.017, 1983, 1776, 1.408, 2841, 2545),
    8: (21.0, 9.11, 0.23, 2.787, 2870, 2571, 1.945, 4113, 3684),
    16: (28.2, 11.40, 0.45, 3.539, 4521, 4049, 2.470, 6478, 5803),
    32: (31.6, 12.46, 0.91, 3.990, 8020, 7182, 2.785, 11491, 10294),
    64: (32.0, 12.60, 1.81, 4.302, 14876, 13321, 3.003, 21314, 19094),
    128: (32.0, 12.60, 3.62, 4.844, 26425, 23664, 3.381, 37863, 33919),
    256: (32.0, 12.60, 7.25, 5.926, 43202, 38689, 4.136, 61902, 55454),
    512: (32.0, 12.60, 14.5, 8.089, 63295, 56682, 5.646, 90691, 81244),
}
# n: experts per layer, weights GB, KV GB at 1k, ms H100, ms H200.
GPT_OSS_120B = {
    1: (4.0, 5.00, 0.04, 1.506, 1.051),
    8: (28.7, 16.78, 0.34, 5.110, 3.566),
    32: (81.7, 42.01, 1.36, 12.945, 9.035),
    256: (128.0, 64.07, 10.87, 22.371, 15.613),
}


@pytest.mark.parametrize(("n", "row"), GPT_OSS_20B.items())
def test_decode_floor_of_gpt_oss_20b(n: int, row: tuple[float, ...]) -> None:
    found = floor.step_bytes(SMALL, n, 1024)
    assert found.distinct_experts == pytest.approx(row[0], abs=0.06)
    assert found.weights / 1e9 == pytest.approx(row[1], abs=0.006)
    assert found.kv / 1e9 == pytest.approx(row[2], abs=0.006)
    for device, (milliseconds, spec, copy) in ((H100, row[3:6]), (H200, row[6:9])):
        assert device.spec is not None
        assert device.copy is not None
        seconds = floor.decode_floor_seconds(SMALL, n, 1024, device.spec, device.flops)
        assert 1e3 * seconds == pytest.approx(milliseconds, rel=1e-3)
        assert n / seconds == pytest.approx(spec, rel=1e-3)
        assert n / floor.decode_floor_seconds(SMALL, n, 1024, device.copy) == pytest.approx(copy, rel=1.5e-3)


@pytest.mark.parametrize(("n", "row"), GPT_OSS_120B.items())
def test_decode_floor_of_gpt_oss_120b(n: int, row: tuple[float, ...]) -> None:
    found = floor.step_bytes(LARGE, n, 1024)
    assert found.distinct_experts == pytest.approx(row[0], abs=0.06)
    assert found.weights / 1e9 == pytest.approx(row[1], abs=0.006)
    assert found.kv / 1e9 == pytest.approx(row[2], abs=0.006)
    assert 1e3 * floor.decode_floor_seconds(LARGE, n, 1024, 3.35e12) == pytest.approx(row[3], rel=2e-3)
    assert 1e3 * floor.decode_floor_seconds(LARGE, n, 1024, 4.8e12) == pytest.approx(row[4], rel=2e-3)


@pytest.mark.parametrize(
    ("n", "h100", "h200"), [(1, 856, 1227), (8, 2494, 3573), (32, 5641, 8082), (256, 13204, 18920)]
)
def test_decode_floor_at_8k_context(n: int, h100: float, h200: float) -> None:
    assert n / floor.decode_floor_seconds(SMALL, n, 8192, 3.35e12) == pytest.approx(h100, rel=2e-3)
    assert n / floor.decode_floor_seconds(SMALL, n, 8192, 4.8e12) == pytest.approx(h200, rel=2e-3)


@pytest.mark.parametrize(
    ("n", "milliseconds"), [(1, 1.116), (2, 1.458), (8, 2.795), (32, 4.020), (64, 4.362), (128, 4.964), (256, 6.166)]
)
def test_decode_floor_at_the_mean_context_of_1024_in_256_out(n: int, milliseconds: float) -> None:
    assert 1e3 * floor.decode_floor_seconds(SMALL, n, 1152, 3.35e12) == pytest.approx(milliseconds, rel=1e-3)


def test_parts_of_the_bytes() -> None:
    assert floor.expert_bytes(SMALL) == pytest.approx(13.236e6, rel=1e-4)
    assert floor.attention_bytes(SMALL) == pytest.approx(53.30e6, rel=1e-3)
    assert floor.attention_bytes(LARGE) == pytest.approx(53.85e6, rel=1e-3)
    assert floor.kv_bytes(SMALL, 1024) / 1e6 == pytest.approx(28.3, abs=0.05)
    assert floor.kv_bytes(SMALL, 8192) / 1e6 == pytest.approx(204.5, abs=0.05)
    assert floor.kv_bytes(LARGE, 131072) / 1e9 == pytest.approx(4.84, abs=0.01)


@pytest.mark.parametrize("model", [SMALL, LARGE], ids=["20b", "120b"])
def test_all_experts_make_the_whole_checkpoint_but_the_embedding(model: object) -> None:
    """The sum of the parts is the file: another count of the same bytes, made for the memory plan."""
    assert model in (SMALL, LARGE)
    config = SMALL if model is SMALL else LARGE
    rest = config.hidden_size * 2 * (config.vocab_size + 1)
    whole = floor.step_bytes(config, 1, 1024, experts=config.num_experts).weights
    assert whole + rest == model_bytes(config)


@pytest.mark.parametrize(("length", "rate"), [(1024, 129e3), (4096, 123e3), (8192, 116e3), (32768, 86e3)])
def test_prefill_floor(length: int, rate: float) -> None:
    seconds = floor.prefill_floor_seconds(SMALL, 1, length, 3.35e12, 798e12)
    assert length / seconds == pytest.approx(rate, rel=0.02)


def test_short_prompts_are_bound_by_weights() -> None:
    seconds = floor.prefill_floor_seconds(SMALL, 1, 300, 3.35e12, 798e12)
    assert 1e3 * seconds == pytest.approx(3.8, abs=0.05)


def test_large_batches_are_bound_by_arithmetic() -> None:
    """A sequence at 1k context costs 8.4 µs of bytes and 9.3 of arithmetic; the weights' 3.8 ms last until 4,400."""

    def memory(n: int) -> float:
        return floor.decode_floor_seconds(SMALL, n, 1024, 3.35e12)

    def both(n: int) -> float:
        return floor.decode_floor_seconds(SMALL, n, 1024, 3.35e12, 798e12)

    assert both(256) == memory(256)
    assert both(4096) == memory(4096)
    assert both(4800) > memory(4800)


def test_a_report_states_what_it_rests_on() -> None:
    report = floor.decode_report(SMALL, 8, 1152, 1431.0, H100)
    assert report["fraction_spec"] == pytest.approx(0.5, abs=2e-3)
    assert report["fraction_copy"] == pytest.approx(0.5 * 3.35 / 3.0, abs=3e-3)
    assert report["experts_counted"] is False
    counted = floor.decode_report(SMALL, 8, 1152, 1431.0, H100, experts=15.0)
    assert counted["experts_counted"] is True
    assert counted["fraction_spec"] < report["fraction_spec"]
    unknown = floor.decode_report(SMALL, 8, 1152, 1431.0, floor.Device("cpu", None, None, None))
    assert unknown["fraction_spec"] is unknown["fraction_copy"] is None
    prefill = floor.prefill_report(SMALL, 16, 8192, 70_400, H100)
    assert prefill["fraction"] == pytest.approx(0.61, abs=0.01)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("GT 710", None),
    ],
)
def test_devices_are_found_by_their_own_names(name: str, found: str | None) -> None:
    device = floor.find_device(name)
    assert (device.name if device else None) == found


def test_a_model_without_quantised_experts_counts_bfloat16() -> None:
    folder = resolve_model_folder("tiny-oss")
    assert folder is not None
    tiny = load_model_config(folder)
    values = 3 * tiny.intermediate_size * tiny.hidden_size
    expected = values * 17 // 32 if tiny.quantization == "mxfp4" else values * 2
    assert floor.expert_bytes(tiny) == expected + 2 * (2 * tiny.intermediate_size + tiny.hidden_size)
