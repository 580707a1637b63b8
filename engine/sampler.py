"""From logits to tokens. A token depends on its row's logits and on `(seed, choice, position)`, never on the batch.

Order of operations (those of Hugging Face, with the OpenAI penalties as vLLM applies them):
repetition penalty (prompt and output) → frequency and presence penalties (output only) → logit bias → temperature → top-k →
top-p → min-p → draw. Ties at the edge of top-k or top-p are kept, so that no sort order decides.

The draw: u = the first 53 bits of BLAKE2b-64 over (seed, choice, position) as three little-endian 64-bit words, divided by
2^53; the token is the first one, in the order of ids, at which the cumulated probability (fp64) exceeds u times the whole.
Counter-based, so any worker continues any request; no generator state exists.

Log-probabilities are those of the model: log-softmax of the logits before penalties, bias, temperature and filters.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.step import SampleSpec
from tandem.sampling import SamplingParams

_COUNTER = struct.Struct("<QQQ")
_HEAD_TOKENS = 64  # top-p looks among this many best tokens first, then among eight times as many
GREEDY_BELOW = 1e-5


class Pick(NamedTuple):
    token_id: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]


class Sampler:
    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def sample(self, logits: Tensor, specs: Sequence[SampleSpec]) -> list[Pick]:
        """One pick per row of `logits` [rows, vocab] fp32, which is left as it was."""
        assert logits.shape == (len(specs), self._vocab_size), f"{tuple(logits.shape)} logits for {len(specs)} rows"
        shaped = self._shaped(logits, specs)
        tokens = torch.argmax(shaped, -1).tolist()
        drawn = [index for index, spec in enumerate(specs) if spec.params.temperature >= GREEDY_BELOW]
        if drawn:
            chosen = shaped if len(drawn) == len(specs) else shaped[drawn]
            for index, token in zip(drawn, _draw(chosen, [specs[index] for index in drawn]), strict=True):
                tokens[index] = token
        return _with_logprobs(logits, specs, tokens)

    def _shaped(self, logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
        """Logits after penalties and bias; the same tensor when no row asks for any."""
        shaped = logits
        for index, spec in enumerate(specs):
            if _untouched(spec.params):
                continue
            if shaped is logits:
                shaped = logits.clone()
            self._shape_row(shaped[index], spec)
        return shaped

    def _shape_row(self, row: Tensor, spec: SampleSpec) -> None:
        params, history = spec.params, np.asarray(spec.history, np.int64)
        if params.repetition_penalty != 1.0 and history.size:
            seen = torch.from_numpy(np.unique(history))
            score = row[seen]
            row[seen] = torch.where(score > 0, score / params.repetition_penalty, score * params.repetition_penalty)
        output = history[spec.prompt_len :]
        if output.size and (params.frequency_penalty or params.presence_penalty):
            ids, counts = np.unique(output, return_counts=True)
            row[torch.from_numpy(ids)] -= torch.from_numpy(counts * params.frequency_penalty + params.presence_penalty).float()
        biased = [(token, bias) for token, bias in params.logit_bias.items() if 0 <= token < self._vocab_size]
        if biased:
            row[torch.tensor([token for token, _ in biased])] += torch.tensor([bias for _, bias in biased])


def uniform(seed: int, choice: int, position: int) -> float:
    """The draw of `(seed, choice, position)` in [0, 1); see the head of this file."""
    digest = blake2b(_COUNTER.pack(seed, choice, position), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def filtered(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities [rows, vocab] fp32 after temperature, top-k, top-p and min-p.

    Every operation works on one row alone or is exact, so that a row never feels its neighbours.
    """
    scores = logits / _column(params, lambda p: p.temperature)
    if any(p.top_k for p in params):
        scores = _keep_top_k(scores, [p.top_k for p in params])
    probabilities = torch.softmax(scores, -1)
    floor = torch.zeros(len(params), 1)
    nucleus = [index for index, p in enumerate(params) if p.top_p < 1.0]
    if nucleus:
        floor[nucleus] = _nucleus_floor(probabilities[nucleus], _column([params[i] for i in nucleus], lambda p: p.top_p))
    if any(p.min_p for p in params):
        floor = torch.maximum(floor, probabilities.amax(-1, keepdim=True) * _column(params, lambda p: p.min_p))
    return probabilities.masked_fill_(probabilities < floor, 0.0)


def _draw(logits: Tensor, specs: Sequence[SampleSpec]) -> list[int]:
    cumulated = filtered(logits, [spec.params for spec in specs]).cumsum(-1, dtype=torch.float64)
    draws = [uniform(spec.params.seed or 0, spec.choice, spec.position) for spec in specs]
    target = torch.tensor(draws, dtype=torch.float64).unsqueeze(1) * cumulated[:, -1:]
    # right=True: the first token whose cumulated mass exceeds the target, hence never one of probability zero
    picks = torch.searchsorted(cumulated, target, right=True).squeeze(1)
    last = (cumulated < cumulated[:, -1:]).sum(-1)  # u·whole may round up to the whole: then the last token with mass
    tokens: list[int] = torch.minimum(picks, last).tolist()
    return tokens


def _keep_top_k(scores: Tensor, top_k: Sequence[int]) -> Tensor:
    vocab = scores.shape[1]
    wanted = [min(k, vocab) or vocab for k in top_k]
    widest = max((k for k in wanted if k < vocab), default=0)
    if not widest:
        return scores
    best = torch.topk(scores, widest, -1).values
    edge = best.gather(1, torch.tensor([[min(k, widest) - 1] for k in wanted]))
    edge[torch.tensor([k == vocab for k in wanted])] = -torch.inf
    return scores.masked_fill(scores < edge, -torch.inf)


def _nucleus_floor(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Smallest probability [rows, 1] still inside the nucleus: tokens are taken, best first, until their mass reaches top-p."""
    vocab = probabilities.shape[1]
    count = min(_HEAD_TOKENS, vocab)
    while True:
        best = torch.topk(probabilities, count, -1).values
        before = best.cumsum(-1, dtype=torch.float64)
        if count == vocab or bool((before[:, -1:] >= top_p).all()):
            inside = (before - best < top_p).sum(-1, keepdim=True)
            return best.gather(1, (inside - 1).clamp_(min=0))
        count = min(8 * count, vocab)


def _with_logprobs(logits: Tensor, specs: Sequence[SampleSpec], tokens: list[int]) -> list[Pick]:
    wanted = [index for index, spec in enumerate(specs) if spec.params.logprobs is not None]
    picks = [Pick(token, None, ()) for token in tokens]
    if not wanted:
        return picks
    logprobs = torch.log_softmax(logits[wanted], -1)
    most = max(specs[index].params.logprobs or 0 for index in wanted)
    values, ids = torch.topk(logprobs, min(most, logprobs.shape[1]), -1)
    own = logprobs.gather(1, torch.tensor([[tokens[index]] for index in wanted])).squeeze(1).tolist()
    for at, (index, row_ids, row_values) in enumerate(zip(wanted, ids.tolist(), values.tolist(), strict=True)):
        top = tuple(zip(row_ids, row_values, strict=True))[: specs[index].params.logprobs]
        picks[index] = Pick(tokens[index], own[at], top)
    return picks


def _column(params: Sequence[SamplingParams], of: Callable[[SamplingParams], float]) -> Tensor:
    return torch.tensor([[of(p)] for p in params], dtype=torch.float32)


def _untouched(params: SamplingParams) -> bool:
    return not (params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty or params.logit_bias)
