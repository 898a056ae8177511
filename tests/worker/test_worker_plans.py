"""Plans straight into a Worker: however a request is cut, shared, preempted or accompanied, its tokens are the same."""

from __future__ import annotations

from pathlib import Path

import model_helpers
import pytest
import torch
from worker_helpers import Driver, make_worker

from engine.core.plan import FLAG_NAN, AdmittedRow, ExecutionPlan
from engine.core.sampling_params import SamplingParams
from engine.memory import loaded_weight_bytes
from engine.models.dummy import write_checkpoint
from engine.worker.input_batch import RowError
from engine.worker.worker import Worker

COUNT = 40


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, model_helpers.small_config(), seed=11)
    return make_worker(folder)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 331, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(worker: Worker, tokens: list[int], count: int = COUNT) -> list[int]:
    driver = Driver(worker)
    out = driver.generate(0, tokens, count)
    driver.release(0)
    driver.step({})
    return out


@pytest.mark.parametrize("chunk", [1, 7, 128])
@pytest.mark.parametrize("block_size", [16, 32])
def test_chunk_size_changes_nothing(worker: Worker, chunk: int, block_size: int, tmp_path: Path) -> None:
    tokens = prompt(137)
    expected = alone(worker, tokens)
    if block_size == 16:
        assert Driver(worker).generate(0, tokens, COUNT, chunk=chunk) == expected
    else:
        write_checkpoint(tmp_path, model_helpers.small_config(), seed=11)
        other = make_worker(tmp_path, block_size=block_size)
        assert Driver(other, block_size=block_size).generate(0, tokens, COUNT, chunk=chunk) == expected


@pytest.mark.parametrize("hit", [16, 96])
def test_prefix_hit_changes_nothing(worker: Worker, hit: int) -> None:
    """A second row starts on the first one's blocks; its window group may name null blocks below the window."""
    tokens = prompt(110)
    expected = alone(worker, tokens)
    driver = Driver(worker)
    driver.step({0: hit}, [driver.admit(0, tokens)])
    shared = [list(table[: hit // 16]) for table in driver.tables[0]]
    window = next(i for i, w in enumerate(driver.windows) if w is not None)
    for block in range(max(0, hit - 24 + 1) // 16):
        shared[window][block] = 0
    out = driver.generate(1, tokens, COUNT, blocks=shared, computed=hit)
    assert out == expected


def test_preemption_and_recompute_change_nothing(worker: Worker) -> None:
    tokens = prompt(60)
    expected = alone(worker, tokens)
    driver = Driver(worker)
    out = driver.generate(0, tokens, 13)
    driver.release(0)
    noise = driver.admit(1, prompt(80, seed=9))  # takes the freed blocks over
    driver.step({1: 80}, [noise])
    again = driver.admit(0, tokens + out, num_prompt=len(tokens))
    result = driver.step({1: 1, 0: len(tokens) + 13}, [again])
    out.append(result.token_ids[1])
    while len(out) < COUNT:
        out += driver.step({0: 1}).token_ids
    assert out == expected


@pytest.mark.parametrize("num_rows", [2, 3, 5, 9])
def test_neighbours_change_nothing(worker: Worker, num_rows: int) -> None:
    """Rows of unequal length join one after the other, so decode and chunks mix in every way."""
    prompts = [prompt(5 + 29 * i % 97, seed=i) for i in range(num_rows)]
    expected = [alone(worker, tokens) for tokens in prompts]
    driver = Driver(worker)
    found: list[list[int]] = [[] for _ in prompts]
    admitted = 0
    while min(len(out) for out in found) < COUNT:
        admits = []
        if admitted < num_rows:
            admits = [driver.admit(admitted, prompts[admitted])]
            admitted += 1
        counts = {}
        for row in reversed(range(admitted)):  # prefills come first in the plan: the runner sorts them itself
            left = driver.length[row] - driver.computed[row]
            if len(found[row]) < COUNT:
                counts[row] = min(left, 11)
        sampling = [row for row, n in counts.items() if driver.computed[row] + n == driver.length[row]]
        result = driver.step(counts, admits)
        assert result.rows == sampling
        for row, token in zip(result.rows, result.token_ids, strict=True):
            found[row].append(token)
    assert [out[:COUNT] for out in found] == expected


def test_sampled_rows_are_the_same_alone_and_among_others(worker: Worker) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, presence_penalty=0.5)
    tokens = prompt(30)
    driver = Driver(worker)
    expected = driver.generate(0, tokens, COUNT, params=params, seed=77)
    driver = Driver(worker)
    mixed = [
        driver.admit(0, prompt(12, seed=5), SamplingParams(temperature=0.7), seed=1),
        driver.admit(1, tokens, params, seed=77),
        driver.admit(2, prompt(40, seed=6), SamplingParams(temperature=0.0, logprobs=3)),
    ]
    result = driver.step({0: 12, 1: 30, 2: 40}, mixed)
    out = [result.token_ids[1]]
    assert result.logprobs is not None
    assert result.logprobs[:2] == [None, None]
    while len(out) < COUNT:
        result = driver.step({2: 1, 1: 1, 0: 1})
        out.append(result.token_ids[1])
        assert result.rows == [2, 1, 0]
        assert [entry is not None for entry in result.logprobs or []] == [True, False, False]
    assert out == expected


def test_a_nan_row_is_flagged_and_leaves_no_trace(worker: Worker) -> None:
    """NaN keys of one request stay in its blocks; a later owner of those blocks is not touched."""
    tokens = prompt(50)
    expected = alone(worker, tokens)
    runner = worker._runner
    assert runner is not None
    embedding = runner._model.embedding
    poison = next(i for i in range(331) if i not in tokens and i not in expected)
    kept = embedding[poison].clone()
    driver = Driver(worker)
    try:
        with torch.inference_mode():
            embedding[poison] = float("nan")
        bad = driver.admit(0, prompt(48, seed=3) + [poison, 5])
        good = driver.admit(1, tokens)
        result = driver.step({0: 50, 1: 50}, [bad, good])
        assert [flag & FLAG_NAN for flag in result.flags] == [FLAG_NAN, 0]
        out = [result.token_ids[1]]
        for _ in range(9):
            result = driver.step({0: 1, 1: 1})
            assert [flag & FLAG_NAN for flag in result.flags] == [FLAG_NAN, 0]
            assert 0 <= result.token_ids[0] < 331
            out.append(result.token_ids[1])
    finally:
        with torch.inference_mode():
            embedding[poison] = kept
    assert out == expected[:10]
    driver.release(0)
    assert driver.generate(2, tokens, COUNT) == expected


def test_logits_are_computed_for_sampling_rows_only(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.models.gpt_oss import GptOss

    sizes = []
    inner = GptOss.logits

    def recording(model: GptOss, ops: object, hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return inner(model, ops, hidden)  # type: ignore[arg-type]

    monkeypatch.setattr(GptOss, "logits", recording)
    driver = Driver(worker)
    assert driver.step({0: 20}, [driver.admit(0, prompt(40))]).token_ids == []
    driver.step({0: 20, 1: 8}, [driver.admit(1, prompt(30))])
    assert sizes == [1]


def test_a_reused_row_takes_nothing_over(worker: Worker) -> None:
    tokens = prompt(33, seed=4)
    expected = alone(worker, tokens)
    driver = Driver(worker)
    driver.generate(0, prompt(150, seed=8), 5, params=SamplingParams(temperature=0.0, repetition_penalty=3.0))
    driver.release(0)
    assert driver.generate(0, tokens, COUNT) == expected


def test_plans_that_contradict_the_rows_are_refused(worker: Worker) -> None:
    driver = Driver(worker)
    with pytest.raises(RowError, match="row 77 was never admitted"):
        worker.execute(ExecutionPlan(0, [77], [1], [True]))
    row = driver.admit(5, prompt(4))
    with pytest.raises(RowError, match="row 5 has 4 tokens, the plan computes up to 5"):
        worker.execute(ExecutionPlan(0, [5], [5], [True], admits=[row], new_blocks=[(5, 0, [1]), (5, 1, [2])]))
    with pytest.raises(RowError, match="row 5 has blocks for 0 tokens, the plan computes up to 1"):
        worker.execute(ExecutionPlan(0, [5], [1], [False], admits=[row]))
    worker.execute(ExecutionPlan(1, [], [], [], released=[5]))


def test_warm_up_leaves_no_row_and_no_trace(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, model_helpers.small_config(), seed=11)
    fresh = make_worker(tmp_path)
    expected = alone(fresh, prompt(20))
    warm = make_worker(tmp_path)
    warm.warm_up()
    assert warm._runner is not None
    assert warm._runner.num_rows == 0
    assert alone(warm, prompt(20)) == expected
    assert bool((warm._runner._caches[0][:16] == 0).all())


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_held_weights_match_the_arithmetic(tmp_path: Path, dtype: str, size: int) -> None:
    model = write_checkpoint(tmp_path, model_helpers.small_config(), seed=11)
    found = make_worker(tmp_path, dtype=dtype).weight_bytes
    rope = model.max_position_embeddings * model.head_dim // 2 * 8
    expected = loaded_weight_bytes(model, dtype, expand_experts=True)
    assert abs(found - rope - expected) <= 0.02 * expected


def test_dummy_weights_serve(tmp_path: Path) -> None:
    folder = tmp_path / "config only"
    write_checkpoint(folder, model_helpers.small_config(), seed=0)
    expected = alone(make_worker(folder), prompt(20), 8)
    (folder / "model.safetensors").unlink()
    assert alone(make_worker(folder, load_format="dummy"), prompt(20), 8) == expected


def test_a_row_may_be_admitted_anew_without_release(worker: Worker) -> None:
    """The scheduler may take a row back before any rank saw its release; the admission is what counts."""
    tokens = prompt(20, seed=2)
    expected = alone(worker, tokens, 6)
    driver = Driver(worker)
    driver.step({0: 50}, [driver.admit(0, prompt(50, seed=1))])
    admitted: AdmittedRow = driver.admit(0, tokens)
    out = driver.step({0: 20}, [admitted]).token_ids
    while len(out) < 6:
        out += driver.step({0: 1}).token_ids
    assert out == expected
