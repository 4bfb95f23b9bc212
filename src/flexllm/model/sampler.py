"""From logits to tokens.

Legend: n rows, V vocabulary, K candidates. A row passes through, in vLLM's order: logit bias, penalties, temperature,
min-p, top-k, top-p, the draw. Rows of one call are grouped by what they need, so that a row pays for nothing it did not ask.

One draw consumes one uniform number, by inverting the distribution function. For a seeded request the number is a function of
(seed, position in the output) alone (Philox, a counter-based generator), and every operation below is local to its row:
a seeded request gets the same tokens in any company, after a preemption, and after a restart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexllm.core import Request, SamplingParams, TokenLogprob

_GREEDY_BELOW = 1e-5  # temperatures under it are greedy, as in vLLM
_CANDIDATES = 64  # how many best tokens top-p looks at first; sharp distributions need no more
_CHUNK = 256  # tokens per chunk of a two-level search over the vocabulary
_BELOW_ONE = float(np.nextafter(1.0, 0.0))


@dataclass(slots=True)
class _History:
    """The tokens a penalized request has seen. Rebuilt from the request when missing."""

    ids: Tensor  # [prompt + output so far], as they came
    counts: Tensor  # [V] float32: occurrences in the output
    outputs: int = 0  # how many output tokens are in


class Sampler:
    """Picks the next token of each row. `seed` is for the draws of requests that bring none."""

    def __init__(self, seed: int | None = None) -> None:
        self._rng = np.random.default_rng(seed)
        self._histories: dict[str, _History] = {}

    def __call__(self, logits: Tensor, requests: Sequence[Request]) -> list[TokenLogprob]:
        """logits [n, V] float32, row i belonging to requests[i]; left as they are.

        Log probabilities are those of the raw logits, for requests that ask (`logprobs` not None); NaN for the others.
        """
        assert logits.shape[:-1] == (len(requests),), "one row per request"
        greedy = [i for i, r in enumerate(requests) if _is_greedy(r.sampling) and not _is_edited(r.sampling)]
        others = sorted(set(range(len(requests))) - set(greedy))
        tokens = np.empty(len(requests), np.int64)
        if greedy:
            tokens[greedy] = _argmax(_rows(logits, greedy)).cpu().numpy()
        if others:
            tokens[others] = self._sample(_rows(logits, others), [requests[i] for i in others]).cpu().numpy()
        return _report(logits, tokens.tolist(), requests)

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._histories.pop(request_id, None)

    def _sample(self, logits: Tensor, requests: list[Request]) -> Tensor:
        """[n] token ids for rows that are edited, drawn at random, or both."""
        params = [r.sampling for r in requests]
        edited = [i for i, p in enumerate(params) if _is_edited(p)]
        if edited:
            logits = logits.clone()
            for i in edited:
                self._edit(logits[i], requests[i])
        tokens = torch.empty(len(requests), dtype=torch.int64, device=logits.device)
        uniform = torch.from_numpy(self._uniform(requests)).to(logits.device)
        for (greedy, top_k, nucleus), rows in _alike(params, logits.shape[1]).items():
            mine = [params[i] for i in rows]
            if greedy:
                tokens[rows] = _argmax(_rows(logits, rows))
                continue
            weights, ids = _weights(_rows(logits, rows), mine), None
            if top_k:
                weights, ids = weights.topk(top_k)
            picked = _draw_nucleus(weights, uniform[rows], [p.top_p for p in mine]) if nucleus else _draw(weights, uniform[rows])
            tokens[rows] = picked if ids is None else ids.gather(1, picked[:, None])[:, 0]
        return tokens

    def _edit(self, row: Tensor, request: Request) -> None:
        """Logit bias and penalties on one row [V], in place; tokens that are in neither are not touched."""
        p = request.sampling
        if p.logit_bias:
            ids = torch.tensor(list(p.logit_bias), device=row.device)
            row[ids] += torch.tensor(list(p.logit_bias.values()), dtype=row.dtype, device=row.device)
        if _is_penalized(p):
            history = self._update_history(request, row)
            values, counts = row[history.ids], history.counts[history.ids]
            values = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
            row[history.ids] = values - p.frequency_penalty * counts - p.presence_penalty * (counts > 0)

    def _update_history(self, request: Request, row: Tensor) -> _History:
        history = self._histories.get(request.id)
        if history is None:
            prompt = torch.tensor(request.prompt_ids[request.virtual_tokens :], dtype=torch.int64, device=row.device)
            history = self._histories[request.id] = _History(prompt, torch.zeros_like(row))
        new = torch.tensor(request.output_ids[history.outputs :], dtype=torch.int64, device=row.device)
        history.counts.index_add_(0, new, torch.ones_like(new, dtype=row.dtype))
        history.ids = torch.cat([history.ids, new])
        history.outputs = len(request.output_ids)
        return history

    def _uniform(self, requests: list[Request]) -> np.ndarray:
        """[n] float64 in [0, 1)."""
        u = self._rng.random(len(requests))
        for i, request in enumerate(requests):
            if request.sampling.seed is not None:
                philox = np.random.Philox(key=request.sampling.seed % 2**64, counter=len(request.output_ids))
                u[i] = np.random.Generator(philox).random()
        return u


def token_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Log probability of token_ids[i] under row i of logits [m, V], and of the `num_top` best tokens of that row."""
    if not len(token_ids):
        return []
    logits = logits.float()
    norm = logits.logsumexp(-1, keepdim=True)
    ids = torch.as_tensor(token_ids, device=logits.device)
    chosen = (logits.gather(1, ids[:, None]) - norm)[:, 0].tolist()
    if not num_top:
        return [TokenLogprob(int(t), lp) for t, lp in zip(token_ids, chosen, strict=True)]
    best, best_ids = logits.topk(min(num_top, logits.shape[1]))
    tops = zip((best - norm).tolist(), best_ids.tolist(), strict=True)
    return [
        TokenLogprob(int(t), lp, tuple(zip(top_ids, top, strict=True)))
        for t, lp, (top, top_ids) in zip(token_ids, chosen, tops, strict=True)
    ]


def _report(logits: Tensor, tokens: list[int], requests: Sequence[Request]) -> list[TokenLogprob]:
    out = [TokenLogprob(t, math.nan) for t in tokens]
    asked: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        if request.sampling.logprobs is not None:
            asked.setdefault(request.sampling.logprobs, []).append(i)
    for num_top, rows in asked.items():
        for i, logprob in zip(rows, token_logprobs(_rows(logits, rows), [tokens[i] for i in rows], num_top), strict=True):
            out[i] = logprob
    return out


# ------------------------------------------------------------------------------------------------------- what a row needs
def _is_greedy(p: SamplingParams) -> bool:
    return p.temperature < _GREEDY_BELOW


def _is_penalized(p: SamplingParams) -> bool:
    return bool(p.repetition_penalty != 1.0 or p.frequency_penalty or p.presence_penalty)


def _is_edited(p: SamplingParams) -> bool:
    return bool(p.logit_bias) or _is_penalized(p)


def _alike(params: list[SamplingParams], vocab: int) -> dict[tuple[bool, int, bool], list[int]]:
    """Rows by (greedy, top-k or 0, whether top-p applies). What a row goes through depends on that row alone."""
    groups: dict[tuple[bool, int, bool], list[int]] = {}
    for i, p in enumerate(params):
        key = (True, 0, False) if _is_greedy(p) else (False, p.top_k if p.top_k < vocab else 0, p.top_p < 1.0)
        groups.setdefault(key, []).append(i)
    return groups


# ------------------------------------------------------------------------------------------------------------- arithmetic
def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[rows]


def _argmax(logits: Tensor) -> Tensor:
    """argmax over the last dimension. torch's own compares one by one on the CPU; numpy's is vectorized, 5 times as fast."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)


def _weights(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """Probabilities [n, V] after temperature; 0 where min-p cuts, the rest left as they are (a draw needs no norm)."""
    temperatures, min_p = [p.temperature for p in params], [p.min_p for p in params]
    if any(t != 1.0 for t in temperatures):
        logits = logits / torch.tensor(temperatures, device=logits.device)[:, None]
    weights = logits.softmax(-1)
    if any(min_p):
        weights.masked_fill_(weights < weights.amax(-1, keepdim=True) * torch.tensor(min_p, device=logits.device)[:, None], 0.0)
    return weights


def _draw(weights: Tensor, u: Tensor) -> Tensor:
    """An index per row of weights [n, m], in proportion to them: first a chunk of the row, then an index in it."""
    chunks = _chunks(weights)
    chunk, u = _invert(chunks.sum(-1), u)
    inside, _ = _invert(chunks[torch.arange(len(u), device=u.device), chunk], u)
    return chunk * _CHUNK + inside


def _draw_nucleus(weights: Tensor, u: Tensor, top_p: list[float]) -> Tensor:
    """An index per row of weights [n, m], among the fewest best whose share of the sum reaches top-p < 1."""
    total = _chunks(weights).sum(-1).double().sum(-1)
    goal = torch.tensor(top_p, dtype=torch.float64, device=u.device) * total
    best, ids = weights.topk(min(_CANDIDATES, weights.shape[1]))
    picked = ids.gather(1, _invert(_nucleus(best, goal), u)[0][:, None])[:, 0]
    for row in (best.double().sum(-1) < goal).nonzero()[:, 0].tolist():  # too flat for so few
        # Of m weights, those below (total - goal) / m add up to less than total - goal: the nucleus is among the others.
        ids = (weights[row] >= (total[row] - goal[row]) / weights.shape[1]).nonzero()[:, 0]
        best, order = weights[row, ids].sort(descending=True, stable=True)
        picked[row] = ids[order[_invert(_nucleus(best[None], goal[row, None]), u[row, None])[0]]]
    return picked


def _nucleus(best: Tensor, goal: Tensor) -> Tensor:
    """Descending weights [n, K], float64, with 0 in the place of those that come after the sum has reached goal [n]."""
    best = best.double()
    return best.masked_fill(best.cumsum(-1) - best >= goal[:, None], 0.0)


def _chunks(weights: Tensor) -> Tensor:
    """[n, m] -> [n, chunks, _CHUNK], padded with zeros. Sums over short chunks round the same whatever n is; those over rows do not."""
    return torch.nn.functional.pad(weights, (0, -weights.shape[1] % _CHUNK)).unflatten(1, (-1, _CHUNK))


def _invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse distribution function of each row of weights [n, m] >= 0 at u [n] in [0, 1).

    Returns the index, never one of weight 0, and how far into that index's own share u fell, again in [0, 1).
    """
    weights = weights.double()
    ends = weights.cumsum(-1)
    goal = u[:, None] * ends[:, -1:]
    index = torch.searchsorted(ends, goal, right=True).clamp_max_(weights.shape[1] - 1)
    share = weights.gather(1, index)
    inside = (goal - (ends.gather(1, index) - share)) / share
    return index[:, 0], inside.clamp(0.0, _BELOW_ONE)[:, 0]
