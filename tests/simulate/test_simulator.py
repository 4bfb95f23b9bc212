"""The simulator keeps the books: every token is counted once, time goes forward, the same seed gives the same run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexllm.config import SLO, SchedulerConfig
from flexllm.core import FinetuneJob, SaveLevel
from flexllm.scheduler.latency import LINEAR, SEGMENTS, LatencyModel
from flexllm.simulate.cluster import PATIENCE, Router, fleet
from flexllm.simulate.replica import KINDS, Machine
from flexllm.simulate.simulator import simulate
from flexllm.simulate.workload import Arrival, gamma_arrivals, poisson_arrivals

LAYERS = 4
SEQUENCE = 2048
ROW, BACKWARD_ROW = 1e-4, 5e-5  # seconds; a backward row is of one layer
CONFIG = SchedulerConfig(slo=SLO(ttft=1.0, tpot=0.05))


def latency(t0: float = 2e-3) -> LatencyModel:
    coefficients = dict.fromkeys(LINEAR, 0.0) | {"t0": t0, "backward_rows": BACKWARD_ROW}
    return LatencyModel(coefficients, [ROW] * SEGMENTS)


def machine(num_blocks: int = 512, t0: float = 2e-3) -> Machine:
    return Machine(latency(t0), num_blocks, block_size=16, finetune_bytes=1 << 20)


def job(tokens: int = 128) -> FinetuneJob:
    lengths = [tokens] * 8
    levels = (SaveLevel("keep", 64),)
    return FinetuneJob("job", lengths, lengths, group_size=2, epochs=1 << 20, num_layers=LAYERS, levels=levels)


@pytest.mark.parametrize("mode", ["coserve", "temporal", "inference"])
def test_every_request_gets_its_tokens_and_no_time_runs_backwards(mode: str):
    trace = gamma_arrivals(8, 10, 100, 20, cv=2.0, length_cv=0.5, seed=3)
    config = SchedulerConfig(slo=CONFIG.slo, mode=mode)
    result = simulate(trace, [job()], config, machine(), noise=0.1, check=True)
    assert [(r.arrival, r.prompt_tokens, r.output_tokens) for r in result.records] == [
        (a.time, a.prompt_tokens, a.output_tokens) for a in trace
    ]
    for record in result.records:
        assert record.finished
        assert record.arrival < record.first <= record.last
        assert record.max_gap <= record.last - record.first
        assert record.max_gap >= record.tpot - 1e-9
    assert (result.finetune_tokens > 0) == (mode != "inference")
    assert set(result.shares) == set(KINDS)
    assert sum(result.shares.values()) == pytest.approx(1.0)
    assert all(share > -1e-9 for share in result.shares.values())


def test_pages_that_run_out_cost_time_but_no_tokens():
    trace = [Arrival(0.01 * i, 100, 60) for i in range(20)]
    result = simulate(trace, [job()], CONFIG, machine(num_blocks=40), check=True)
    assert all(r.finished for r in result.records)
    assert result.preemptions > 0


def test_what_never_fits_is_refused_and_attains_nothing():
    result = simulate([Arrival(0.0, 10_000, 1), Arrival(1.0, 10, 2)], [], CONFIG, machine(num_blocks=16))
    assert [r.refused for r in result.records] == [True, False]
    assert result.attainment(CONFIG.slo) == 0.5


def test_the_seed_decides_everything():
    trace = poisson_arrivals(5, 10, 100, 20, seed=1)
    first, again, other = (simulate(trace, [job()], CONFIG, machine(), noise=0.2, seed=seed) for seed in (7, 7, 8))
    assert first == again
    assert first.records != other.records


def test_the_machine_and_the_job_that_are_given_stay_as_they_are():
    given, template = machine(), job()
    before = given.latency.coefficients()
    simulate(poisson_arrivals(5, 10, 100, 20), [template], CONFIG, given, noise=0.5)
    assert given.latency.coefficients() == before
    assert (template.step, template.group) == (0, [])


def test_an_idle_replica_finetunes_as_fast_as_the_latency_model_says():
    result = simulate([], [job()], CONFIG, machine(t0=0.0), seconds=60.0)
    assert result.finetune_rate == pytest.approx(1 / (ROW + LAYERS * BACKWARD_ROW), rel=0.05)
    assert result.shares["finetuning"] == pytest.approx(1.0, abs=0.01)


def test_finetuning_counts_halves_of_tokens():
    once = SEQUENCE * (ROW + LAYERS * BACKWARD_ROW)  # seconds of one sequence, forward and back
    endless = replace(job(SEQUENCE), group_size=8)
    one_at_a_time = replace(machine(t0=0.0), finetune_bytes=64 * SEQUENCE)
    for part, tokens in ((0.5 * ROW, 0.25), (ROW, 0.5), (ROW + 0.5 * LAYERS * BACKWARD_ROW, 0.75)):
        result = simulate([], [endless], CONFIG, one_at_a_time, seconds=4 * once + SEQUENCE * part)
        assert result.finetune_tokens == pytest.approx((4 + tokens) * SEQUENCE), "four sequences and a part, no optimizer step"


def test_counting_begins_when_the_warmup_is_over():
    forward, seconds = SEQUENCE * ROW, 0.2
    trace = [Arrival(seconds, 100, 11)]
    one_at_a_time = replace(machine(t0=0.0), finetune_bytes=64 * SEQUENCE)
    cold, warm = (simulate(trace, [job(SEQUENCE)], CONFIG, one_at_a_time, seconds=seconds, warmup=w) for w in (0.0, forward))
    assert cold.finetune_tokens == pytest.approx(0.5 * seconds / ROW), "its first sequence goes forward"
    assert warm.finetune_tokens == pytest.approx(0.5 * seconds / (LAYERS * BACKWARD_ROW)), "and has gone, here"
    assert warm.shares["finetuning"] <= 1.0
    assert all(r.arrival == seconds and r.finished for r in warm.records)


def test_a_lone_request_takes_what_the_latency_model_says():
    (record,) = simulate([Arrival(5.0, 100, 11)], [], CONFIG, machine()).records
    assert record.ttft == pytest.approx(2e-3 + 100 * ROW)
    assert record.tpot == pytest.approx(2e-3 + ROW)


def test_light_load_keeps_the_objectives_and_overload_loses_them():
    def attainment(rate: float) -> float:
        trace = poisson_arrivals(rate, 30, 200, 10, length_cv=0.3)
        return simulate(trace, [job()], CONFIG, machine()).attainment(CONFIG.slo)

    assert attainment(2) >= 0.99
    assert attainment(80) < 0.5  # 80 x 200 rows of 0.1 ms are 1.6 seconds of work per second


def test_each_class_is_judged_by_its_own_objectives():
    slow = SLO(ttft=60.0, tpot=2.0)
    trace = [Arrival(0.0, 4000, 2, priority="batch"), Arrival(5.0, 100, 2)]
    result = simulate(trace, [], replace(CONFIG, slo=SLO(0.1, 0.05), class_slos={"batch": slow}), machine())
    batch, interactive = (result.of_class(name) for name in ("batch", "interactive"))
    assert [r.arrival for r in batch.records + interactive.records] == [0.0, 5.0]
    judged = [r.attainment(SLO(0.1, 0.05), class_slos) for r in (result, batch) for class_slos in (None, {"batch": slow})]
    assert judged == [0.5, 1.0, 0.0, 1.0]
    assert result.summary(SLO(0.1, 0.05), {"batch": slow})["attainment"] == 1.0


def test_interactive_requests_keep_their_objectives_beside_a_heavy_batch_load():
    """The batch requests alone are more than the machine can do: they take what the others leave."""
    chat = poisson_arrivals(5, 20, 200, 10, length_cv=0.3, seed=1)
    bulk = [replace(a, priority="batch") for a in poisson_arrivals(20, 20, 400, 100, length_cv=0.3, seed=2)]
    trace = sorted([*chat, *bulk], key=lambda a: a.time)
    config = replace(CONFIG, class_slos={"batch": SLO(ttft=60.0, tpot=2.0)})
    classes = simulate(trace, [job()], config, machine(num_blocks=8192))
    assert classes.of_class("interactive").attainment(config.slo) >= 0.9
    assert classes.of_class("batch").attainment(config.slo, config.class_slos) >= 0.99
    alike = simulate([replace(a, priority="interactive") for a in trace], [job()], config, machine(num_blocks=8192))
    of_chat = [r.attains(config.slo) for r, a in zip(alike.records, trace, strict=True) if a.priority == "interactive"]
    assert sum(of_chat) / len(of_chat) < 0.5


# -------------------------------------------------------------------------------------------------------------- cluster
def test_replicas_share_the_load_and_each_finetunes():
    trace = poisson_arrivals(20, 10, 200, 10, length_cv=0.3)
    one, four = (simulate(trace, [job()], fleet("coserve", n, CONFIG), machine(), check=True) for n in (1, 4))
    assert all(r.finished for r in four.records)
    counts = [sum(r.replica == i for r in four.records) for i in range(4)]
    assert min(counts) > 0.6 * len(trace) / 4
    assert four.finetune_rate > 2 * one.finetune_rate
    assert four.attainment(CONFIG.slo) >= one.attainment(CONFIG.slo)


def test_separate_replicas_do_one_thing_each():
    trace = poisson_arrivals(5, 20, 100, 20)
    result = simulate(trace, [job()], fleet("separate", 3, CONFIG, finetuning=1), machine(t0=0.0))
    assert {r.replica for r in result.records} == {0, 1}
    assert result.shares["mixed"] == 0
    assert result.shares["finetuning"] == pytest.approx(1 / 3, abs=0.01)


def test_hundreds_of_replicas_are_no_trouble():
    trace = poisson_arrivals(100, 5, 50, 5)
    result = simulate(trace, [], fleet("coserve", 500, CONFIG), machine(num_blocks=64))
    assert result.attainment(CONFIG.slo) == 1.0


def test_an_adapter_stays_where_it_is_until_that_replica_is_much_busier():
    router = Router(3)
    assert router.choose("a") == 0
    router.load[:] = [PATIENCE, 1, 0]
    assert (router.choose("a"), router.choose(None)) == (0, 2)
    router.load[0] += 1
    assert (router.choose("a"), router.choose("a")) == (2, 2)
    assert router.moves == 2


def test_a_split_that_is_none_is_refused():
    with pytest.raises(ValueError, match="split"):
        fleet("half", 2, CONFIG)
    with pytest.raises(ValueError, match="no replica serves"):
        simulate([Arrival(0.0, 1, 1)], [], fleet("separate", 1, CONFIG, finetuning=1), machine())
