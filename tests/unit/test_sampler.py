import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.model import noise
from common.model.noise import MAX_GUMBEL, MIN_GUMBEL, gumbel, gumbel_of_vocabulary, philox
from common.model.sampler import SamplingRow, cutoff, sample
from dejavu.params import SamplingParams

VOCAB_SIZE = 997


def row(position: int = 10, choice: int = 0, **params: Any) -> SamplingRow:
    return SamplingRow(SamplingParams(**{"seed": 1, **params}), choice, position)


def random_logits(num_rows: int, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * spread


def ids_of(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    return [token.token_id for token in sample(logits, rows)]


# ---------------------------------------------------------------- the noise


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_its_authors_known_answers(counter: list[int], key: list[int], expected: str) -> None:
    c0, c1, c2, c3, k0, k1 = (torch.tensor(word) for word in counter + key)
    tensors = [int(word) for word in philox((c0, c1, c2, c3), (k0, k1))]
    a0, a1, a2, a3, b0, b1 = (np.array([word]) for word in counter + key)
    arrays = [int(word[0]) for word in philox((a0, a1, a2, a3), (b0, b1))]
    assert " ".join(f"{word:08x}" for word in tensors) == expected
    assert arrays == tensors


@pytest.mark.parametrize(("seed", "choice", "position"), [(0, 0, 0), (81985529216486, 3, 1000), (2**63 - 1, 7, 131071)])
def test_noise_is_as_published(seed: int, choice: int, position: int) -> None:
    keys = [torch.tensor([number]) for number in (seed, choice, position)]
    published = next(
        line.split()[3:]
        for line in (noise.__doc__ or "").replace("2^63 - 1", str(2**63 - 1)).splitlines()
        if line.split()[:3] == [str(seed), str(choice), str(position)]
    )
    expected = [-math.log(-math.log((int(word, 16) + 0.5) / 2**32)) for word in published]
    assert gumbel_of_vocabulary(keys[0], keys[1], keys[2], 4)[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_noise_of_some_tokens_is_that_of_the_vocabulary() -> None:
    seed, choice, position = torch.tensor([5, 2**62]), torch.tensor([0, 3]), torch.tensor([1, 9999])
    dense = gumbel_of_vocabulary(seed, choice, position, VOCAB_SIZE)
    assert dense.shape == (2, VOCAB_SIZE)
    assert MIN_GUMBEL <= dense.min() < dense.max() <= MAX_GUMBEL
    token_ids = torch.tensor([0, 1, 2, 3, 500, VOCAB_SIZE - 1])
    for i in range(2):
        keys = [key[i].expand(len(token_ids)) for key in (seed, choice, position)]
        assert torch.allclose(gumbel(keys[0], keys[1], keys[2], token_ids), dense[i, token_ids], rtol=1e-14)


def test_noise_is_bounded_at_the_extreme_words() -> None:
    extremes = noise._to_gumbel(torch.tensor([0, 0xFFFFFFFF]))
    assert extremes.tolist() == pytest.approx([MIN_GUMBEL, MAX_GUMBEL], rel=1e-6)


# ---------------------------------------------------------------- the draw


@pytest.mark.parametrize("spread", [0.1, 2.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruning_never_changes_the_draw(spread: float, dtype: torch.dtype) -> None:
    logits = random_logits(40, spread).to(dtype)
    rows = [row(position=i, choice=i % 3, seed=i, temperature=0.5 + i / 20) for i in range(40)]
    for got, row_logits, each in zip(ids_of(logits, rows), logits, rows, strict=True):
        keys = [torch.tensor([number]) for number in (each.params.seed or 0, each.choice, each.position)]
        noisy = row_logits.double() / each.params.temperature
        assert got == int((noisy + gumbel_of_vocabulary(keys[0], keys[1], keys[2], VOCAB_SIZE)[0]).argmax())


def test_draws_follow_the_distribution() -> None:
    probabilities = [0.5, 0.25, 0.15, 0.1]
    logits = torch.tensor(probabilities).log().mul(1.7).expand(20_000, 4)
    for varied in ("position", "seed"):
        rows = [row(**{varied: i}, temperature=1.7) for i in range(20_000)]
        counts = Counter(ids_of(logits, rows))
        for token_id, probability in enumerate(probabilities):
            deviation = math.sqrt(probability * (1 - probability) / 20_000)
            assert abs(counts[token_id] / 20_000 - probability) < 4 * deviation


def test_a_row_gives_the_same_token_alone_and_in_any_batch() -> None:
    logits = random_logits(48)
    options: list[dict[str, Any]] = [
        {}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.8}, {"min_p": 0.1}, {"temperature": 0.0},
        {"logprobs": 2}, {"temperature": 0.0, "frequency_penalty": 0.5}, {"seed": 2**63 - 1},
    ]  # fmt: skip
    rows = [row(position=i, **options[i % 8]) for i in range(48)]
    together = sample(logits, rows)
    assert [sample(logits[i : i + 1], [rows[i]])[0] for i in range(48)] == together
    assert sample(logits.flip(0), rows[::-1]) == together[::-1]


def test_choices_seeds_and_positions_differ() -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    rows = [row(), row(choice=1), row(position=11), row(seed=2), row(seed=1 + 2**32)]
    assert len({ids_of(logits, [each])[0] for each in rows}) == len(rows)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9}, {"top_p": 0.01}, {"top_p": 0.9999}, {"top_k": 1}, {"top_k": 40}, {"top_k": 5000},
        {"min_p": 0.05}, {"min_p": 1.0}, {"min_p": 0.001, "top_k": 60, "top_p": 0.7},
        {"min_p": 0.02, "top_p": 0.95}, {"top_k": -1, "top_p": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_filters_keep_what_the_warpers_of_transformers_keep(options: dict[str, Any]) -> None:
    warpers = LogitsProcessorList()
    if "min_p" in options:
        warpers.append(MinPLogitsWarper(options["min_p"]))
    if options.get("top_k", 0) > 0:
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    for spread in (0.2, 3.0, 10.0):
        logits = random_logits(20, spread, seed=3)
        theirs = warpers(torch.zeros(20, 1, dtype=torch.int64), logits) > -math.inf
        for row_logits, kept in zip(logits, theirs, strict=True):
            scores = row_logits - row_logits.max()
            least = cutoff(np.sort(scores.numpy()), SamplingParams(**options))
            assert (scores >= least).tolist() == kept.tolist()


def test_filtered_tokens_are_never_drawn() -> None:
    logits = random_logits(1).expand(500, VOCAB_SIZE)
    allowed = set(logits[0].topk(5).indices.tolist())
    drawn = set(ids_of(logits, [row(position=i, top_k=5, temperature=3.0) for i in range(500)]))
    assert drawn == allowed


def test_ties_with_the_last_kept_token_stay() -> None:
    scores = np.array([-9.0, -1.0, -1.0, -1.0, 0.0], dtype=np.float32)
    assert cutoff(scores, SamplingParams(top_k=2)) == -1.0
    assert cutoff(scores, SamplingParams(top_p=0.6)) == -1.0


# ---------------------------------------------------------------- greedy, penalties, masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_the_first_largest_logit(dtype: torch.dtype) -> None:
    logits = random_logits(6).to(dtype)
    logits[2, 5] = logits[2, 9] = 100.0
    expected = logits.argmax(-1).tolist()
    before = logits.clone()
    assert ids_of(logits, [row(temperature=0.0)] * 6) == expected
    assert ids_of(logits, [row(temperature=1e-7), *[row()] * 4, row(temperature=0.0)])[::5] == expected[::5]
    assert expected[2] == 5
    assert torch.equal(logits, before)


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = random_logits(30)
    ids = torch.randint(0, VOCAB_SIZE, (30, 400), generator=torch.Generator().manual_seed(1))
    for penalty in (1.3, 0.5):
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone()).argmax(-1).tolist()
        params = SamplingParams(temperature=0.0, repetition_penalty=penalty)
        rows = [SamplingRow(params, 0, 400, seen[:350].tolist(), seen[350:].tolist()) for seen in ids]
        assert ids_of(logits, rows) == theirs


def test_presence_and_frequency_count_output_only() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 3.5]])

    def best(output_ids: list[int], **params: Any) -> int:
        penalised = SamplingParams(temperature=0.0, **params)
        return ids_of(logits, [SamplingRow(penalised, 0, 9, [3, 3, 3], output_ids)])[0]

    assert best([], presence_penalty=2.0, frequency_penalty=2.0) == 3
    assert best([3], presence_penalty=0.6) == 2
    assert best([3, 3, 2], presence_penalty=0.6) == 3
    assert best([3, 3, 2], frequency_penalty=0.6) == 2
    assert best([3, 3, 3, 2, 2], frequency_penalty=0.9) == 1
    assert best([2], presence_penalty=-2.0) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_forbids_ends(temperature: float) -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0, -50.0]])

    def token(num_output_tokens: int, **params: Any) -> int:
        limited = SamplingParams(
            temperature=temperature, top_k=1, seed=0, min_tokens=2, stop_token_ids=[1, 999], **params
        )
        only = SamplingRow(limited, 0, 9, eos_token_ids=(0,), num_output_tokens=num_output_tokens)
        return ids_of(logits, [only])[0]

    assert [token(0), token(1), token(2)] == [2, 2, 0]
    assert token(1, ignore_eos=True) == 0


def test_impossible_logits_neither_win_nor_crash() -> None:
    logits = torch.zeros(4, 8)
    logits[0, :7] = math.nan
    logits[1, :7] = -math.inf
    logits[2, 7] = math.inf
    logits[3] = math.nan
    several: list[dict[str, Any]] = [
        {}, {"top_p": 0.9}, {"top_k": 2, "min_p": 0.1}, {"repetition_penalty": 1.2, "temperature": 0.0}
    ]  # fmt: skip
    for options in several:
        drawn = ids_of(logits, [row(position=i, **options) for i in range(4)])
        assert drawn[:3] == [7, 7, 7]
        assert 0 <= drawn[3] < 8


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = random_logits(3)
    expected = logits.log_softmax(-1)
    hot = row(logprobs=3, temperature=5.0, top_k=4)
    bare = row(logprobs=0, temperature=0.0)
    first, second, third = sample(logits, [hot, bare, row()])
    assert first.logprob == pytest.approx(float(expected[0, first.token_id]))
    assert [token_id for token_id, _ in first.top_logprobs] == expected[0].topk(3).indices.tolist()
    assert [value for _, value in first.top_logprobs] == pytest.approx(expected[0].topk(3).values.tolist())
    assert second.logprob == pytest.approx(float(expected[1].max()))
    assert second.top_logprobs == third.top_logprobs == ()
    assert third.logprob is None


def test_the_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="rows"):
        sample(torch.zeros(2, 8), [row()])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_draws_the_same_tokens() -> None:
    logits = random_logits(64)
    options: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 20, "min_p": 0.01}, {"temperature": 0.0}]
    rows = [row(position=i, **options[i % 4]) for i in range(64)]
    assert ids_of(logits.cuda(), rows) == ids_of(logits, rows)
