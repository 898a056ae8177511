"""Logits and greedy tokens against transformers on random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_helpers
import pytest
import torch

import kernels
from engine.models.dummy import DummySource, write_checkpoint
from engine.models.gpt_oss import GptOss
from engine.worker.worker import Worker

CONFIGS = {
    "as gpt-oss, small": {},
    "no YaRN": {"rope_scaling": None},
    "4:1 heads, head 32, window 8": {
        "num_attention_heads": 8,
        "head_dim": 32,
        "sliding_window": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 4,
    },
    "one head per kv head, window 100, expanded": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "sliding_window": 100,
        "quantization_config": None,
        "num_local_experts": 9,
        "num_experts_per_tok": 3,
    },
    "full first, truncated ramp": {
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 256,
            "truncate": True,
        },
    },
}


class LogitRecorder:
    """Keeps the logits that a model computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[torch.Tensor] = []
        inner = GptOss.logits

        def recording(model: GptOss, ops: Any, hidden: torch.Tensor) -> torch.Tensor:
            logits = inner(model, ops, hidden)
            self.seen.append(logits.clone())
            return logits

        monkeypatch.setattr(GptOss, "logits", recording)


def forced_logits(worker: Worker, tokens: list[int], recorder: LogitRecorder, chunk: int) -> torch.Tensor:
    """The logits of the last position of every chunk, feeding `tokens` whatever is sampled."""
    from worker_helpers import Driver

    rows = []
    for end in range(chunk, len(tokens) + 1, chunk):
        driver = Driver(worker)
        driver.generate(0, tokens[:end], 1)
        driver.release(0)
        driver.step({})
        rows.append(recorder.seen[-1][0])
    return torch.stack(rows)


def test_our_package_is_not_hugging_faces() -> None:
    root = Path(__file__).parents[2]
    assert Path(str(kernels.__file__)).parent == root / "kernels"
    from transformers import GptOssForCausalLM

    assert GptOssForCausalLM.__name__ == "GptOssForCausalLM"


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_logits_and_greedy_tokens_match_transformers(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker_helpers import Driver, make_worker

    config = model_helpers.small_config(**changes)
    model = write_checkpoint(tmp_path, config, seed=3)
    oracle = model_helpers.transformers_model(config, DummySource(model, 3))
    worker = make_worker(tmp_path)
    recorder = LogitRecorder(monkeypatch)
    prompt = torch.randint(0, model.vocab_size, (150,), generator=torch.Generator().manual_seed(5)).tolist()
    with torch.inference_mode():
        expected = oracle(torch.tensor([prompt])).logits[0]
    found = forced_logits(worker, prompt, recorder, chunk=25)
    assert float((found - expected[24::25]).abs().max()) <= 1e-4

    recorder.seen.clear()
    tokens = Driver(worker).generate(0, prompt, 200)
    with torch.inference_mode():
        sequence = torch.tensor([prompt + tokens])
        logits = oracle(sequence).logits[0, len(prompt) - 1 : -1]
    assert float((torch.cat(recorder.seen) - logits).abs().max()) <= 1e-4
    assert tokens == logits.argmax(-1).tolist()
