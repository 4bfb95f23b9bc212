"""The sampler: every filter against a plain definition, distributions, and what a seed promises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexllm.core import Request, SamplingParams
from flexllm.model.sampler import Sampler, token_logprobs

DRAWS = 4000


def request(id: str = "r", prompt: Sequence[int] = (), output: Sequence[int] = (), **sampling: Any) -> Request:
    return Request(id=id, prompt_ids=list(prompt), sampling=SamplingParams(**sampling), arrival=0.0, output_ids=list(output))


def pick(logits: Tensor, *requests: Request, sampler: Sampler | None = None) -> list[int]:
    return [t.token_id for t in (sampler or Sampler(0))(logits, requests)]


def frequencies(logits: Tensor, draws: int = DRAWS, **sampling: Any) -> np.ndarray:
    """Share of each token among many draws from one row of logits [V]."""
    tokens = pick(logits.expand(draws, -1).contiguous(), *[request(str(i), **sampling) for i in range(draws)])
    return np.bincount(tokens, minlength=len(logits)) / draws


def reference(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> np.ndarray:
    """The distribution a row is drawn from, written as the filters are defined; ties excepted."""
    p = (logits.double() / temperature).softmax(-1)
    p[p < min_p * p.max()] = 0
    order = p.argsort(descending=True, stable=True)
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    before = p[order].cumsum(-1) - p[order]
    p[order[before >= top_p]] = 0
    return (p / p.sum()).numpy()


def assert_drawn_from(shares: np.ndarray, expected: np.ndarray, draws: int = DRAWS) -> None:
    """Nothing impossible was drawn, and Pearson's chi-square is within five of its standard deviations of its mean."""
    assert not shares[expected == 0].any()
    likely = expected * draws >= 5
    observed = np.append(shares[likely], shares[~likely].sum()) * draws
    wanted = np.append(expected[likely], expected[~likely].sum()) * draws
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi_square, freedom = ((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom) + 1e-9


@pytest.fixture
def logits() -> Tensor:
    return 2 * torch.randn(300, generator=torch.Generator().manual_seed(0))


# ----------------------------------------------------------------------------------------------------------------- greedy
def test_greedy_takes_the_first_of_the_best_and_leaves_logits_alone() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    before = logits.clone()
    assert pick(logits, request("a", temperature=0), request("b", temperature=1e-6)) == [1, 0]
    assert torch.equal(logits, before)


def test_one_candidate_is_greedy_whatever_the_temperature(logits: Tensor) -> None:
    best = int(logits.argmax())
    for sampling in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-4}):
        assert pick(logits[None], request(**{"temperature": 5.0, **sampling})) == [best]  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- distributions
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 7},
        {"top_k": 299},
        {"top_k": 5000},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 4.0},  # far more than the candidates that are looked at first
        {"min_p": 0.1},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "temperature": 1.5},
        {"top_k": 200, "top_p": 0.95, "temperature": 4.0},
    ],
)
def test_draws_follow_the_distribution(logits: Tensor, sampling: dict[str, Any]) -> None:
    expected = reference(logits, **{**sampling, "top_k": min(sampling.get("top_k", 0), len(logits))})
    assert_drawn_from(frequencies(logits, **sampling), expected)


@pytest.mark.parametrize("vocab", [2, 255, 256, 257, 1000])
def test_every_vocabulary_size_is_covered_to_its_ends(vocab: int) -> None:
    expected = np.full(vocab, 1 / vocab)
    assert_drawn_from(frequencies(torch.zeros(vocab)), expected)
    assert_drawn_from(frequencies(torch.zeros(vocab), top_p=1 - 1e-9), expected)


def test_seeds_one_after_another_draw_from_the_distribution_too(logits: Tensor) -> None:
    requests = [request(str(i), seed=i) for i in range(DRAWS)]
    tokens = pick(logits.expand(DRAWS, -1).contiguous(), *requests)
    assert_drawn_from(np.bincount(tokens, minlength=300) / DRAWS, reference(logits))
    positions = [request(str(i), seed=7, output=[0] * (i % 500)) for i in range(500)]
    tokens = pick(torch.zeros(500, 2), *positions)
    assert 200 < sum(tokens) < 300


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 0.999), st.sampled_from([3, 70, 600]), st.floats(0.1, 5.0))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(seed: int, top_p: float, vocab: int, spread: float) -> None:
    logits = spread * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))
    p = logits.double().softmax(-1)
    drawn = sorted(set(pick(logits.expand(500, -1).contiguous(), *[request(str(i), top_p=top_p) for i in range(500)])))
    outside = p.clone()
    outside[p >= p[drawn].min()] = 0
    # All that is more probable than the least probable token drawn does not reach top_p: without that token it is too small.
    assert float(p[p > p[drawn].min()].sum()) < top_p + 1e-6
    assert set(drawn) <= set((p >= p[drawn].min()).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}, {"temperature": 0.01}])
def test_extreme_logits_never_draw_the_impossible(sampling: dict[str, Any]) -> None:
    logits = torch.tensor([-math.inf, 1e4, -1e4, 1e4, -math.inf])
    shares = frequencies(logits, draws=500, **sampling)
    assert shares[[0, 2, 4]].sum() == 0
    assert 0.4 < shares[1] < 0.6


# ------------------------------------------------------------------------------------------------------ bias and penalties
def test_logit_bias() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    assert pick(logits, request(temperature=0, logit_bias={0: 2.5})) == [0]
    assert pick(logits, request(temperature=0, logit_bias={2: -100, 1: -100})) == [0]
    assert frequencies(logits[0], 500, logit_bias={1: 100})[1] == 1


def penalized(logits: Tensor, prompt: Sequence[int], output: Sequence[int], p: SamplingParams) -> Tensor:
    """vLLM's definition, dense."""
    out = logits.clone()
    counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=len(logits)).to(logits)
    seen = torch.zeros(len(logits), dtype=torch.bool)
    seen[list({*prompt, *output})] = True
    out = torch.where(seen, torch.where(out > 0, out / p.repetition_penalty, out * p.repetition_penalty), out)
    return out - p.frequency_penalty * counts - p.presence_penalty * (counts > 0)


def test_penalties_follow_the_output_as_it_grows() -> None:
    generator = torch.Generator().manual_seed(0)
    r = request(prompt=[3, 4, 4], temperature=0, repetition_penalty=1.7, frequency_penalty=0.6, presence_penalty=-0.4, logit_bias={2: 0.5})
    sampler = Sampler()
    for step in range(60):
        logits = torch.randn(12, generator=generator)
        biased = logits.clone()
        biased[2] += 0.5
        expected = int(penalized(biased, r.prompt_ids, r.output_ids, r.sampling).argmax())
        assert pick(logits[None], r, sampler=sampler) == [expected]
        assert pick(logits[None], r, sampler=Sampler()) == [expected]  # rebuilt from the request
        r.output_ids.append(expected)
        if step == 30:
            sampler.forget(r.id)


def test_a_repetition_penalty_counts_the_prompt_and_the_others_do_not() -> None:
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    assert pick(logits, request(prompt=[0], temperature=0, repetition_penalty=1.5)) == [1]
    assert pick(logits, request(prompt=[0], temperature=0, presence_penalty=2.0, frequency_penalty=2.0)) == [0]


# ------------------------------------------------------------------------------------------------------------------- seeds
SEEDED: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 64, "top_p": 0.9},
    {"top_p": 0.9},
    {"top_p": 0.99, "temperature": 3.0},
    {"min_p": 0.05, "top_p": 0.95},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"logit_bias": {5: 1.0}},
)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.sampled_from(range(len(SEEDED))), max_size=12), st.sampled_from([50, 700, 4096]))
def test_a_seeded_request_gets_the_same_tokens_in_any_company(seed: int, others: list[int], vocab: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # bfloat16 values: ties are frequent, as in a served model
    logits = (3 * torch.randn(len(SEEDED) + len(others), vocab, generator=generator)).bfloat16().float()
    own = [request(f"own-{i}", prompt=[1, 2], output=[3], seed=seed, **s) for i, s in enumerate(SEEDED)]
    company = [request(f"other-{i}", prompt=[1], **SEEDED[o]) for i, o in enumerate(others)]
    alone = [pick(logits[i : i + 1], r, sampler=Sampler(1))[0] for i, r in enumerate(own)]
    order = torch.randperm(len(logits), generator=generator).tolist()
    requests = own + company
    together = pick(logits[order], *[requests[i] for i in order], sampler=Sampler(2))
    assert [together[order.index(i)] for i in range(len(own))] == alone


def test_a_seed_gives_a_sequence_and_other_seeds_others() -> None:
    logits = torch.zeros(1, 1000)

    def run(seed: int | None) -> list[int]:
        r = request(seed=seed)
        for _ in range(20):
            r.output_ids += pick(logits, r, sampler=Sampler())  # a new sampler each time: there is no state to lose
        return r.output_ids

    assert run(1) == run(1)
    assert len(set(run(1))) > 10
    assert run(1) != run(2)
    assert run(-1) != run(1)
    assert run(-(2**63)) == run(-(2**63))
    assert run(None) != run(None)


# ---------------------------------------------------------------------------------------------------------------- logprobs
def test_logprobs_are_of_the_raw_logits_and_only_for_those_who_ask(logits: Tensor) -> None:
    batch = logits.expand(4, -1).contiguous()
    raw = logits.double().log_softmax(-1)
    requests = [
        request("a", temperature=0),
        request("b", temperature=0, logprobs=0),
        request("c", temperature=0, logprobs=3, logit_bias={4: 100.0}),
        request("d", temperature=0.3, top_k=2, logprobs=20, seed=1),
    ]
    a, b, c, d = Sampler(0)(batch, requests)
    assert math.isnan(a.logprob)
    assert (b.token_id, b.top) == (int(logits.argmax()), ())
    assert b.logprob == pytest.approx(float(raw.max()), abs=1e-5)
    assert c.token_id == 4
    assert c.logprob == pytest.approx(float(raw[4]), abs=1e-5)
    best = raw.argsort(descending=True)
    assert [t for t, _ in c.top] == best[:3].tolist()
    assert [lp for _, lp in c.top] == pytest.approx(raw[best[:3]].tolist(), abs=1e-5)
    assert len(d.top) == 20
    assert d.logprob == pytest.approx(float(raw[d.token_id]), abs=1e-5)


def test_logprobs_of_given_tokens(logits: Tensor) -> None:
    rows = torch.stack([logits, logits.flip(0), torch.zeros(300)])
    found = token_logprobs(rows, [0, 299, 17], num_top=2)
    assert [f.token_id for f in found] == [0, 299, 17]
    assert found[0].logprob == pytest.approx(found[1].logprob, abs=1e-6)
    assert found[2].logprob == pytest.approx(-math.log(300), abs=1e-5)
    assert [len(f.top) for f in found] == [2, 2, 2]
    assert [f.top for f in token_logprobs(rows, [0, 299, 17], num_top=0)] == [(), (), ()]
    assert token_logprobs(rows[:0], [], num_top=2) == []
    assert len(token_logprobs(torch.zeros(1, 3), [0], num_top=20)[0].top) == 3
