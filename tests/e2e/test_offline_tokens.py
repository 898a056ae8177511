"""The offline face without a tokenizer: token ids in, token ids out, also with made-up weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import LLM, SamplingParams
from engine.config import resolve_model_folder
from engine.llm import GenerationError


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    bundled = resolve_model_folder("tiny-oss")
    assert bundled is not None
    config = json.loads((bundled / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = LLM(str(tmp_path), max_model_len=128, device="cpu", load_format="dummy", skip_tokenizer=True)
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    [first], [again] = ([r.outputs[0] for r in llm.generate([[1, 2, 3]], params, use_tqdm=False)] for _ in range(2))
    assert len(first.token_ids) == 5
    assert first.token_ids == again.token_ids
    assert first.text == ""
    with pytest.raises(GenerationError, match="give token ids"):
        llm.generate("text", params, use_tqdm=False)
    with pytest.raises(GenerationError, match="chat needs a tokenizer"):
        llm.chat([{"role": "user", "content": "hi"}], use_tqdm=False)
    llm.close()
