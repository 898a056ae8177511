"""The offline face: `from engine import LLM, SamplingParams`."""

from __future__ import annotations

import pytest

from engine import LLM, SamplingParams
from engine.executor.base import ExecutorError
from engine.llm import GenerationError


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny-oss", max_model_len=512)


def test_a_list_of_prompts_comes_back_in_order(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["ROMEO:", "JULIET:", "First Citizen:\nBefore"]
    results = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12))
    assert [result.prompt for result in results] == prompts
    assert all(len(result.outputs[0].token_ids) == 12 for result in results)
    assert [r.outputs[0].finish_reason for r in results] == ["length"] * 3
    assert "Generating" in capsys.readouterr().err
    alone = llm.generate(prompts[1], SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False)
    assert alone[0].outputs == results[1].outputs


def test_n_stop_seed_and_logprobs(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=7, max_tokens=30, stop=(" the", "."), logprobs=2)
    first, second = (llm.generate("KING RICHARD III:", params, use_tqdm=False)[0] for _ in range(2))
    assert first.outputs == second.outputs
    assert [output.index for output in first.outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in first.outputs}) > 1
    for output in first.outputs:
        assert output.logprobs is not None
        assert len(output.logprobs) == len(output.token_ids)
        assert " the" not in output.text
        assert "." not in output.text


def test_token_ids_are_a_prompt(llm: LLM) -> None:
    ids = llm.tokenizer.encode("ROMEO:")
    params = SamplingParams(temperature=0.0, max_tokens=5)
    by_ids, by_text = (llm.generate(prompt, params, use_tqdm=False)[0] for prompt in (ids, "ROMEO:"))
    assert by_ids.outputs == by_text.outputs
    assert by_ids.prompt is None


def test_chat_answers_and_calls(llm: LLM) -> None:
    result = llm.chat([{"role": "user", "content": "What is 1 + 2?"}], SamplingParams(temperature=0.0, max_tokens=80))
    assert "3" in result[0].outputs[0].text


@pytest.mark.parametrize(
    ("prompt", "complaint"), [("", "prompt 0 is empty"), ([1 << 20], "token id"), ([1] * 512, "512 tokens")]
)
def test_a_bad_prompt_is_refused_and_nothing_runs(llm: LLM, prompt: str | list[int], complaint: str) -> None:
    with pytest.raises(GenerationError, match=complaint):
        llm.generate([prompt], SamplingParams(), use_tqdm=False)
    assert not llm._core.has_work


def test_a_prompt_that_asks_for_no_tokens_gets_none_beside_one_that_does(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=0), SamplingParams(temperature=0.0, max_tokens=3)]
    nothing, something = llm.generate(["ROMEO:", "ROMEO:"], params, use_tqdm=False)
    assert (nothing.outputs[0].token_ids, nothing.outputs[0].finish_reason) == ([], "length")
    assert len(something.outputs[0].token_ids) == 3


@pytest.mark.timeout(60)
@pytest.mark.parametrize("is_overlapped", [False, True])
def test_a_step_that_fails_ends_the_call_with_its_cause(is_overlapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM("tiny-oss", max_model_len=128, async_scheduling=is_overlapped)
    execute = llm._core.executor._worker.execute  # type: ignore[attr-defined]

    def fail_at_the_third(plan: object) -> object:
        if plan.step_id == 2:  # type: ignore[attr-defined]
            raise RuntimeError("no memory")
        return execute(plan)

    monkeypatch.setattr(llm._core.executor._worker, "execute", fail_at_the_third)  # type: ignore[attr-defined]
    with pytest.raises((ExecutorError, RuntimeError), match="no memory"):
        llm.generate("ROMEO:", SamplingParams(max_tokens=20), use_tqdm=False)
    with pytest.raises(GenerationError, match="failed earlier .*no memory"):
        llm.generate("ROMEO:", use_tqdm=False)
    llm.close()
