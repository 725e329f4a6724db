"""Draws the next token of each sequence. Stateless: the same row gives the same token alone, in a batch, anywhere.

Order, as in transformers: repetition, presence and frequency penalty; temperature; top-k, top-p, min-p. Log-probabilities
are those of the model itself, before any of these (as OpenAI and vLLM report them).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.model.noise import MAX_GUMBEL, draw_key, gumbel
from dejavu.params import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What decides one draw besides the logits. `position` is that of the token to be drawn; the ids are read only
    where a penalty is on."""

    params: SamplingParams
    choice: int
    position: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    eos_token_ids: Sequence[int]
    num_output_tokens: int

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature == 0.0

    @property
    def has_penalty(self) -> bool:
        p = self.params
        return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0

    @property
    def forbidden(self) -> list[int]:
        """Ids that would end the sequence before `min_tokens`."""
        if self.num_output_tokens >= self.params.min_tokens:
            return []
        eos = [] if self.params.ignore_eos else list(self.eos_token_ids)
        return eos + self.params.stop_token_ids


@dataclass(frozen=True, slots=True)
class SampledToken:
    """`top_logprobs` are (token id, log-probability) pairs, the likeliest first."""

    token_id: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """logits [rows, vocab] -> one token a row."""
    best: list[int] = logits.argmax(dim=-1).tolist()
    tokens = [
        best[index] if row.is_greedy and not row.has_penalty and not row.forbidden else _draw(logits[index], row)
        for index, row in enumerate(rows)
    ]
    return [_with_logprobs(logits[i], token, row) for i, (token, row) in enumerate(zip(tokens, rows, strict=True))]


def _draw(logits: Tensor, row: SamplingRow) -> int:
    scores = logits.float()
    if row.has_penalty:
        scores = _penalised(scores, row)
    if row.forbidden:
        scores = scores.clone()
        scores[row.forbidden] = float("-inf")
    if row.is_greedy:
        return int(scores.argmax())
    scores, candidates = _candidates(scores / row.params.temperature, row.params)
    key = draw_key(row.params.seed or 0, row.choice, row.position)
    return _perturbed_best(scores, candidates, key)


def _penalised(scores: Tensor, row: SamplingRow) -> Tensor:
    scores = scores.clone()
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*row.prompt_ids, *row.output_ids}), device=scores.device)
        found = scores[seen]
        scores[seen] = torch.where(found < 0, found * params.repetition_penalty, found / params.repetition_penalty)
    if row.output_ids and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(row.output_ids)
        ids = torch.tensor(list(counts), device=scores.device)
        times = torch.tensor(list(counts.values()), device=scores.device, dtype=scores.dtype)
        scores[ids] -= params.presence_penalty + params.frequency_penalty * times
    return scores


def _candidates(scores: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """(scores, token ids) of what the filters leave. Equal scores at a limit stay together in id order."""
    ids = torch.arange(scores.shape[0], device=scores.device)
    if 0 < params.top_k < scores.shape[0]:
        limit = torch.topk(scores, params.top_k).values[-1]
        ids = torch.nonzero(scores >= limit)[:, 0]
        scores = scores[ids]
    if params.top_p < 1.0:
        order = torch.argsort(scores, descending=True, stable=True)
        probabilities = torch.softmax(scores[order], dim=-1)
        # a token stays while those before it have not reached top_p; the first always stays
        order = order[probabilities.cumsum(-1) - probabilities < params.top_p]
        scores, ids = scores[order], ids[order]
    if params.min_p > 0.0:
        keep = scores >= scores.max() + torch.log(torch.tensor(params.min_p, device=scores.device))
        scores, ids = scores[keep], ids[keep]
    return scores, ids


def _perturbed_best(scores: Tensor, ids: Tensor, key: int) -> int:
    """argmax of score + noise. Only ids that could still win get noise: the likeliest one's perturbed score is a
    bound that others must reach with at most `MAX_GUMBEL`."""
    top = int(scores.argmax())
    bound = float(scores[top]) + float(gumbel(key, ids[top]))
    hopeful = torch.nonzero(scores >= bound - MAX_GUMBEL)[:, 0]
    if hopeful.numel() == 0:
        return int(ids[top])
    chances = ids[hopeful]
    return int(chances[(scores[hopeful].double() + gumbel(key, chances)).argmax()])


def _with_logprobs(logits: Tensor, token_id: int, row: SamplingRow) -> SampledToken:
    count = row.params.logprobs
    if count is None:
        return SampledToken(token_id, None, ())
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = torch.topk(logprobs, count) if count else (logprobs[:0], torch.zeros(0))
    top = tuple((int(i), float(v)) for i, v in zip(ids.tolist(), values.tolist(), strict=True))
    return SampledToken(token_id, float(logprobs[token_id]), top)
