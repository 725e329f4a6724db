"""Draws the next token of each row of logits, without state: a row gives the same token in every batch.

In order, as transformers and vLLM do:

1. repetition penalty over prompt and output ids (a positive logit is divided, a negative one multiplied),
   then frequency penalty (times the count) and presence penalty over output ids;
2. while fewer than `min_tokens` tokens are out: no EOS (unless `ignore_eos`) and no stop token;
3. temperature 0 (below 1e-5) ends here, with the largest logit;
4. divide by temperature; then `min_p`, `top_k`, `top_p`, each on what the one before left. Tokens that tie
   with the last one kept are kept too, so that the set does not depend on a sorting order;
5. the largest log-probability + noise, where the noise is `common.model.noise`'s function of seed, choice,
   position and token id: exactly a draw from the distribution. No seed counts as seed 0.

Log-probabilities are of the model's own distribution: the log-softmax of its logits before penalties, masks
and temperature. A logit that is not a number counts as impossible.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.model.noise import MAX_GUMBEL, MIN_GUMBEL, gumbel, gumbel_of_vocabulary
from dejavu.params import SamplingParams

_MIN_TEMPERATURE = 1e-5
_IMPOSSIBLE = -1e30
# no token this far below the likeliest can win, whatever its noise
_HOPELESS = MIN_GUMBEL - MAX_GUMBEL
_GROUP_ELEMENTS = {"cpu": 1 << 15}  # logits handled at once: what stays in the cache
_GROUP_ELEMENTS_DEVICE = 1 << 24


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What the draw of one row depends on besides its logits.

    `position` is the drawn token's place in the whole sequence: prompt tokens + `num_output_tokens`.
    `prompt_ids` and `output_ids` are read only where a penalty is on.
    """

    params: SamplingParams
    choice: int
    position: int
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()
    eos_token_ids: Sequence[int] = ()
    num_output_tokens: int = 0

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature < _MIN_TEMPERATURE

    @property
    def changes_logits(self) -> bool:
        """Whether a penalty or a mask is on."""
        return has_penalty(self.params) or self.num_output_tokens < (self.params.min_tokens or 0)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """`logprob`, and the likeliest `top_logprobs` (token id, logprob), best first, where the row asks."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """One token per row of `logits` [rows, vocabulary], of any float type, on any device; changes nothing."""
    if logits.dim() != 2 or logits.shape[0] != len(rows):
        raise ValueError(f"{len(rows)} rows do not fit logits of shape {tuple(logits.shape)}")
    plain = [i for i, row in enumerate(rows) if row.is_greedy and not row.changes_logits]
    adjusted = [i for i, row in enumerate(rows) if row.is_greedy and row.changes_logits]
    random = [i for i, row in enumerate(rows) if not row.is_greedy]
    token_ids = logits.argmax(-1).tolist() if plain else [0] * len(rows)
    for group in _groups(adjusted, logits):
        best = _adjust(logits[group], [rows[i] for i in group]).argmax(-1)
        for i, token_id in zip(group, best.tolist(), strict=True):
            token_ids[i] = token_id
    for group in _groups(random, logits):
        for i, token_id in zip(group, _draw(logits[group], [rows[i] for i in group]), strict=True):
            token_ids[i] = token_id
    sampled = [SampledToken(token_id) for token_id in token_ids]
    for group in _groups([i for i, row in enumerate(rows) if row.params.logprobs is not None], logits):
        counts = [rows[i].params.logprobs or 0 for i in group]
        measured = _with_logprobs(logits[group], [token_ids[i] for i in group], counts)
        for i, token in zip(group, measured, strict=True):
            sampled[i] = token
    return sampled


def _groups(indices: list[int], logits: torch.Tensor) -> Iterator[list[int]]:
    elements = _GROUP_ELEMENTS.get(logits.device.type, _GROUP_ELEMENTS_DEVICE)
    size = max(1, elements // logits.shape[1])
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _adjust(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """A float32 copy, finite, with penalties and masks applied."""
    adjusted = logits.float().nan_to_num(nan=_IMPOSSIBLE).clamp_(_IMPOSSIBLE, -_IMPOSSIBLE)
    for scores, row in zip(adjusted, rows, strict=True):
        if has_penalty(row.params):
            _penalise(scores, row)
        if row.num_output_tokens < (row.params.min_tokens or 0):
            _forbid_ends(scores, row)
    return adjusted


def _forbid_ends(scores: torch.Tensor, row: SamplingRow) -> None:
    ends = [*row.params.stop_token_ids, *(() if row.params.ignore_eos else row.eos_token_ids)]
    ends = [token_id for token_id in ends if 0 <= token_id < len(scores)]
    scores[torch.tensor(ends, dtype=torch.int64, device=scores.device)] = _IMPOSSIBLE


def has_penalty(params: SamplingParams) -> bool:
    """Whether the ids so far matter."""
    return bool((params.repetition_penalty or 1.0) != 1.0 or params.frequency_penalty or params.presence_penalty)


def _penalise(scores: torch.Tensor, row: SamplingRow) -> None:
    params = row.params
    counts = Counter(row.output_ids)
    penalty = params.repetition_penalty or 1.0
    if penalty != 1.0:
        seen = torch.tensor(list({*row.prompt_ids, *counts}), dtype=torch.int64, device=scores.device)
        before = scores[seen]
        scores[seen] = torch.where(before < 0, before * penalty, before / penalty)
    if counts and (params.frequency_penalty or params.presence_penalty):
        written = torch.tensor(list(counts), dtype=torch.int64, device=scores.device)
        times = torch.tensor(list(counts.values()), dtype=torch.float32, device=scores.device)
        scores[written] -= params.frequency_penalty * times
        scores[written] -= params.presence_penalty


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    temperature = torch.tensor([row.params.temperature for row in rows], device=logits.device)
    scores = _adjust(logits, rows)
    # log-probabilities but for a constant, which no comparison needs; the largest is 0
    scores = scores.sub_(scores.amax(-1, keepdim=True)).div_(temperature[:, None])
    cutoffs = [_row_cutoff(row_scores, row.params) for row_scores, row in zip(scores, rows, strict=True)]
    can_win = scores >= torch.tensor(cutoffs, device=logits.device)[:, None]
    seed, choice, position = _noise_keys(rows, logits.device)
    if int(can_win.count_nonzero()) * 4 > can_win.numel():
        noisy = gumbel_of_vocabulary(seed, choice, position, scores.shape[1]).add_(scores)
        return [int(i) for i in noisy.masked_fill_(~can_win, -math.inf).argmax(-1).tolist()]
    row, token_id = can_win.nonzero(as_tuple=True)
    noisy = gumbel(seed[row], choice[row], position[row], token_id).add_(scores[row, token_id])
    return _best_of_each(row, token_id, noisy, len(rows))


def _noise_keys(rows: Sequence[SamplingRow], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys = [(row.params.seed or 0, row.choice, row.position) for row in rows]
    seed, choice, position = torch.tensor(keys, dtype=torch.int64, device=device).unbind(1)
    return seed, choice, position


def _best_of_each(row: torch.Tensor, token_id: torch.Tensor, noisy: torch.Tensor, num_rows: int) -> list[int]:
    """The best candidate of each row, the smallest id among equals; `row` and `token_id` ascend."""
    best = noisy.new_full((num_rows,), -math.inf).scatter_reduce(0, row, noisy, "amax")
    wins = noisy == best[row]
    winners = list(zip(row[wins].tolist(), token_id[wins].tolist(), strict=True))
    token_of = dict(reversed(winners))
    return [token_of[i] for i in range(num_rows)]


def _row_cutoff(scores: torch.Tensor, params: SamplingParams) -> float:
    if params.min_p == 0.0 and params.top_k <= 0 and params.top_p == 1.0:
        return _HOPELESS
    return max(_HOPELESS, cutoff(np.sort(scores.cpu().numpy()), params))


def cutoff(ascending: np.ndarray[tuple[int], np.dtype[np.float32]], params: SamplingParams) -> float:
    """The smallest score that `min_p`, `top_k`, `top_p` keep of `ascending` ones, which end with 0."""
    first = 0
    if params.min_p > 0.0:
        first = int(np.searchsorted(ascending, np.float32(math.log(params.min_p))))
    if 0 < params.top_k < len(ascending):
        first = max(first, len(ascending) - params.top_k)
    if params.top_p < 1.0:
        # ties with the k-th stay in the mass
        first = int(np.searchsorted(ascending, ascending[first]))
        mass = np.cumsum(np.exp(ascending[first:]), dtype=np.float64)
        dropped = int(np.searchsorted(mass, (1.0 - params.top_p) * mass[-1], side="right"))
        first = min(first + dropped, len(ascending) - 1)
    return float(ascending[first])


def _with_logprobs(logits: torch.Tensor, token_ids: list[int], counts: list[int]) -> list[SampledToken]:
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None]).squeeze(1).tolist()
    top = logprobs.topk(min(max(counts), logprobs.shape[1]), dim=-1)
    likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        SampledToken(token_id, logprob, tuple(zip(ids[:count], values[:count], strict=True)))
        for token_id, logprob, (ids, values), count in zip(token_ids, chosen, likeliest, counts, strict=True)
    ]
