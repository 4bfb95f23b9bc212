import random
from typing import NamedTuple

import pytest

from flexllm.core import BackwardSlice, InferenceChunk, PlanFeatures, Sequence, SlicePart, StepPlan, TokenWindow
from flexllm.scheduler.latency import LatencyModel, features_of
from tests.scheduler.fake import LAYERS, make_job, make_request


class Slowdown(NamedTuple):
    """Factors on the terms of the machine below."""

    fixed: float = 1.0  # what does not depend on how many rows there are: weights to read, the decode step
    rows: float = 1.0  # prefill and windows
    backward: float = 1.0


def machine(f: PlanFeatures, slow: Slowdown = Slowdown()) -> float:
    """A machine with a GEMM ridge at 16 rows, so not one of straight lines."""
    fixed = 0.002 + 0.012 * (f.rows > 0) + 1e-4 * min(f.rows, 16)
    fixed += 1e-5 * f.decode_rows + 3e-8 * f.decode_context + 1e-4 * f.sampled_rows
    rows = 1e-3 * max(0, f.rows - 16) + 4e-9 * f.prefill_pairs + 4e-4 * f.label_rows + 4e-3 * f.windows
    backward = 8e-5 * f.backward_rows + 2e-9 * f.backward_pairs + 3e-4 * f.backward_slices + 6e-3 * f.optimizer_steps
    return slow.fixed * fixed + slow.rows * rows + slow.backward * backward


def random_plan(rng: random.Random) -> PlanFeatures:
    decode, prefill, window = rng.choice([0, 1, 3, 8, 20]), rng.choice([0, 0, 20, 200]), rng.choice([0, 0, 16, 100, 300])
    slices, rows = rng.choice([0, 1, 3, 8]), rng.randint(16, 400)
    return PlanFeatures(
        rows=decode + prefill + window,
        decode_rows=decode,
        decode_context=decode * rng.randint(20, 800),
        prefill_pairs=(prefill**2 + window**2) // 2,
        prefills=int(prefill > 0),
        sampled_rows=decode + (prefill > 0),
        label_rows=window // 2,
        windows=int(window > 0),
        backward_rows=slices * rows,
        backward_pairs=slices * rows * 300,
        backward_slices=slices,
        optimizer_steps=int(rng.random() < 0.05),
    )


def profile(max_rows: int = 512, num_layers: int = 30) -> list[PlanFeatures]:
    """What a profiler measures: one kind of work at a time, at powers of two."""
    grid = [PlanFeatures(optimizer_steps=1)]
    for n in (1 << i for i in range(max_rows.bit_length())):
        pairs = n * (n + 1) // 2
        grid += [PlanFeatures(rows=n, decode_rows=n, decode_context=n * context, sampled_rows=n) for context in (64, 512)]
        grid += [
            PlanFeatures(rows=n, prefill_pairs=pairs, prefills=1, sampled_rows=1),
            PlanFeatures(rows=n, prefill_pairs=pairs, label_rows=n, windows=1),
        ]
        grid += [PlanFeatures(backward_rows=n * k, backward_pairs=pairs * k, backward_slices=k) for k in (1, 4, num_layers)]
    return grid


def errors(model: LatencyModel, rng: random.Random, slow: Slowdown = Slowdown(), n: int = 200) -> list[float]:
    plans = [p for p in (random_plan(rng) for _ in range(n)) if not p.is_empty]
    return sorted(abs(model.predict(p) / machine(p, slow) - 1) for p in plans)


def observe(model: LatencyModel, rng: random.Random, n: int, slow: Slowdown = Slowdown(), outliers: float = 0.0) -> None:
    for _ in range(n):
        plan = random_plan(rng)
        noise = 6.0 if rng.random() < outliers else rng.lognormvariate(0, 0.03)
        model.observe(plan, machine(plan, slow) * noise)


def profiled() -> LatencyModel:
    model = LatencyModel.default()
    model.fit([(f, machine(f)) for f in profile()])
    return model


def test_a_profile_predicts_mixtures_it_has_not_seen():
    found = errors(profiled(), random.Random(0))
    assert found[len(found) // 2] < 0.02
    assert found[int(len(found) * 0.95)] < 0.05


def test_observations_alone_are_enough():
    model, rng = LatencyModel.default(), random.Random(1)
    observe(model, rng, 400)
    found = errors(model, rng)
    assert found[len(found) // 2] < 0.05
    assert found[int(len(found) * 0.95)] < 0.15


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "slow",
    [
        pytest.param(Slowdown(2.0, 2.0, 2.0), id="everything"),
        pytest.param(Slowdown(6.0, 6.0, 6.0), id="everything-by-far"),
        pytest.param(Slowdown(fixed=2.0), id="decode"),
        pytest.param(Slowdown(rows=2.0), id="prefill-and-windows"),
        pytest.param(Slowdown(backward=2.0), id="backward"),
        pytest.param(Slowdown(3.0, 1.5, 1.5), id="unevenly"),
    ],
)
def test_a_machine_that_changes_is_followed_within_fifty_iterations(slow, seed):
    model, rng = profiled(), random.Random(seed)
    observe(model, rng, 300, outliers=0.01)
    for now in (slow, Slowdown()):  # a neighbour comes, and goes
        observe(model, rng, 50, now, outliers=0.01)
        found = errors(model, rng, now)
        assert found[len(found) // 2] < 0.1


def test_a_single_slow_iteration_moves_no_prediction():
    model, rng = profiled(), random.Random(6)
    observe(model, rng, 64)
    plan = PlanFeatures(rows=8, decode_rows=8, decode_context=800, sampled_rows=8)
    before = model.predict(plan)
    model.observe(plan, 30 * before)
    assert model.predict(plan) == pytest.approx(before, rel=0.03)


def test_serving_for_long_does_not_make_finetuning_dearer():
    """What is not seen for an hour is still believed to cost what it did, on a machine whose iterations scatter."""
    model, rng = profiled(), random.Random(5)

    def decodes(n: int) -> PlanFeatures:
        return PlanFeatures(rows=n, decode_rows=n, decode_context=200 * n, sampled_rows=n)

    def beside_decodes(work: PlanFeatures) -> float:
        return model.predict(decodes(4) + work) - model.predict(decodes(4))

    finetuning = [
        PlanFeatures(rows=200, prefill_pairs=200 * 100, label_rows=200, windows=1),
        PlanFeatures(backward_rows=2000, backward_pairs=200_000, backward_slices=10),
        PlanFeatures(optimizer_steps=1),
    ]
    before = [beside_decodes(f) for f in finetuning]
    for _ in range(3000):
        plan = decodes(rng.randint(1, 8))
        model.observe(plan, machine(plan) * rng.lognormvariate(0.0, 0.25))
    assert [beside_decodes(f) for f in finetuning] == pytest.approx(before, rel=0.3)


def test_outliers_do_not_disturb_the_model():
    model, rng = profiled(), random.Random(3)
    observe(model, rng, 300, outliers=0.02)
    assert errors(model, rng)[100] < 0.05
    assert model.error_quantile(0.5) < 0.05
    assert model.error_quantile(0.999) > 1


def test_more_work_never_costs_less():
    model, rng = LatencyModel.default(), random.Random(4)
    observe(model, rng, 200)
    curve = [model.predict(PlanFeatures(rows=n)) for n in range(1, 3000)]
    assert curve == sorted(curve)
    assert all(value >= 0 for value in model.coefficients().values())


def test_nothing_takes_no_time_and_teaches_nothing():
    model = LatencyModel.default()
    assert model.predict(PlanFeatures()) == 0
    model.observe(PlanFeatures(), 1.0)
    assert model.error_quantile(0.99) == 0.1


def test_a_device_on_which_decode_rows_alone_are_cheap():
    """A GPU that replays them as one graph, and takes six times as long to be told of anything else, whatever its rows."""

    def seconds(f: PlanFeatures) -> float:
        return (6e-3 if f.rows == f.decode_rows else 36e-3) + 2e-5 * f.rows + 3e-3 * f.backward_slices

    model = LatencyModel.default()
    model.fit([(f, seconds(f)) for f in profile()])
    decodes = PlanFeatures(rows=32, decode_rows=32, decode_context=3200, sampled_rows=32)
    with_prompt = decodes + PlanFeatures(rows=100, prefill_pairs=5000, prefills=1, sampled_rows=1)
    for features in (decodes, with_prompt):
        assert model.predict(features) == pytest.approx(seconds(features), rel=0.1)


@pytest.mark.parametrize("budget", [0.0, 0.03, 0.1, 0.4, 100.0])
def test_inverses_are_the_most_that_fits(budget):
    model = profiled()
    base = PlanFeatures(rows=8, decode_rows=8, decode_context=800, sampled_rows=8)

    job = make_job("j", [1000])
    job.label_counts = [500]
    sequence = Sequence(0, job, 0, 1000, forward=50)

    def with_window(n: int, layer: int) -> float:
        return model.predict(base + features_of(StepPlan(windows=(TokenWindow(sequence, 50, 50 + n, layer),))))

    def with_prompt(n: int) -> float:
        return model.predict(base + features_of(StepPlan(inference=(InferenceChunk(make_request("p", 600), 50, 50 + n, False),))))

    n = model.most_prefill_rows(base, 50, 500, budget)
    assert n == max([k for k in range(1, 501) if with_prompt(k) <= budget + 1e-12], default=0)

    def with_slice(n: int) -> float:
        return model.predict(base + PlanFeatures(backward_rows=n, backward_pairs=n * n, backward_slices=1))

    for layer in range(LAYERS + 1):
        n = model.most_window_rows(base, TokenWindow(sequence, 50, 550, layer), budget)
        assert n == max([k for k in range(1, 501) if with_window(k, layer) <= budget + 1e-12], default=0)
    n = model.most_backward_rows(base, 1.0, lambda n: n * n, 500, budget)
    assert n == max([k for k in range(1, 501) if with_slice(k) <= budget + 1e-12], default=0)

    def with_slices(n: int) -> float:
        return model.predict(base + PlanFeatures(backward_rows=50 * n, backward_pairs=2500 * n, backward_slices=n))

    n = model.most_backward_slices(base, [(50, 2500)] * 40, budget)
    assert n == max([k for k in range(1, 41) if with_slices(k) <= budget + 1e-12], default=0)


def test_a_profile_survives_on_disk_without_the_drift_of_the_day(tmp_path):
    model, rng = profiled(), random.Random(5)
    observe(model, rng, 100, Slowdown(1.5, 1.5, 1.5))
    model.save(tmp_path / "profile.json")
    loaded = LatencyModel.load(tmp_path / "profile.json")
    drifts = {round(model.predict(plan) / loaded.predict(plan), 9) for plan in (random_plan(rng) for _ in range(20)) if not plan.is_empty}
    assert len(drifts) == 1
    assert 1.2 < drifts.pop() < 1.8


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 3, "coefficients": {"t0": 1}, "slopes": []}'])
def test_a_broken_profile_is_refused(tmp_path, text):
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(ValueError, match=r"profile\.json is not a latency profile"):
        LatencyModel.load(tmp_path / "profile.json")


def test_no_samples_fit_nothing():
    with pytest.raises(ValueError, match="no samples"):
        LatencyModel.default().fit([])


def test_features_count_what_a_plan_holds():
    job = make_job("j", [40, 40])
    job.label_counts = [20, 20]
    train, valid = Sequence(0, job, 0, 40), Sequence(1, job, 0, 40, train=False)
    request = make_request("r", prompt=10)
    plan = StepPlan(
        inference=(InferenceChunk(request, 12, 13, True), InferenceChunk(make_request("p"), 2, 6, False)),
        windows=(TokenWindow(train, 10, 20), TokenWindow(valid, 0, 5)),
        backward=(BackwardSlice(2, (SlicePart(train, 30, 40), SlicePart(train, 0, 2))), BackwardSlice(1, (SlicePart(train, 39, 40),))),
        optimizer_steps=(job,),
    )
    assert features_of(plan) == PlanFeatures(
        rows=1 + 4 + 10 + 5,
        decode_rows=1,
        decode_context=13,
        prefill_pairs=(3 + 4 + 5 + 6) + sum(range(11, 21)) + 15,
        prefills=1,
        sampled_rows=1,
        label_rows=5 + 5,
        windows=2,
        backward_rows=13,
        backward_pairs=sum(range(31, 41)) + 3 + 40,
        backward_slices=2,
        optimizer_steps=1,
    )
