"""A roofline has figures of the right size, and `flexllm plan` finds the fewest replicas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flexllm.cli.main import run
from flexllm.compiler.report import report_compiler
from flexllm.config import SLO, SchedulerConfig
from flexllm.core import PlanFeatures
from flexllm.model.config import ModelConfig
from flexllm.peft.config import LoraConfig
from flexllm.simulate.capacity import fewest, plan_capacity
from flexllm.simulate.roofline import DEVICES, example_job, layer_parameters, machine_of, roofline, save_levels
from flexllm.simulate.simulator import SimulationResult
from flexllm.simulate.workload import poisson_arrivals
from tests.shapes import LLAMA_8B

A100, H100 = DEVICES["a100-80gb"], DEVICES["h100-80gb"]
MODEL_8B = ModelConfig.from_hf(LLAMA_8B)


def decode(batch: int, context: int = 512) -> PlanFeatures:
    return PlanFeatures(rows=batch, decode_rows=batch, decode_context=batch * context, sampled_rows=batch)


def prefill(rows: int) -> PlanFeatures:
    return PlanFeatures(rows=rows, prefill_pairs=rows * (rows + 1) // 2, prefills=1, sampled_rows=1)


def test_decoding_is_bound_by_bandwidth_and_prefill_by_compute():
    base = roofline(A100, MODEL_8B).predict
    more_flops = roofline(replace(A100, flops=2 * A100.flops), MODEL_8B).predict
    more_bandwidth = roofline(replace(A100, bytes_per_second=2 * A100.bytes_per_second), MODEL_8B).predict
    assert base(decode(8)) == pytest.approx(0.010, rel=0.3)  # seconds: 15 GB of weights at 1.6 TB/s
    assert more_bandwidth(decode(8)) < 0.6 * base(decode(8)) < 0.6 * 1.02 * more_flops(decode(8))
    assert more_flops(prefill(2048)) < 0.6 * base(prefill(2048)) < 0.6 * 1.02 * more_bandwidth(prefill(2048))
    assert base(decode(16)) < 1.1 * base(decode(8))  # rows below the ridge share the weights' way


def test_flops_are_those_of_the_8b_model():
    assert 2 * layer_parameters(MODEL_8B) == pytest.approx(436.2e6, rel=1e-3)  # per row and layer


@pytest.mark.parametrize("targets", [("down_proj",), LoraConfig().target_modules])
def test_save_levels_are_those_of_the_compiler(targets: tuple[str, ...]):
    compiler = report_compiler(MODEL_8B, LoraConfig(r=16, target_modules=targets), seq_length=8192)
    found = {level.name: level for level in save_levels(MODEL_8B, context=4096)}
    for name in ("recompute", "remat 1", "checkpoint"):
        (real,) = compiler.levels(name)
        assert found[name].bytes_per_token == pytest.approx(real.level.bytes_per_token, rel=0.03)
    sizes, costs = zip(*((level.bytes_per_token, level.cost) for level in found.values()), strict=True)
    assert sorted(sizes, reverse=True) == list(sizes)
    assert sorted(costs) == list(costs)


def test_more_devices_are_faster_but_not_by_their_number():
    one, four = roofline(A100, MODEL_8B), roofline(A100, MODEL_8B, tensor_parallel=4)
    for features in (decode(8), prefill(512), PlanFeatures(backward_rows=512 * 32, backward_slices=32)):
        assert one.predict(features) / 4 < four.predict(features) < one.predict(features)
    assert roofline(H100, MODEL_8B).predict(decode(8)) < one.predict(decode(8))
    with pytest.raises(ValueError, match="tensor_parallel"):
        roofline(A100, MODEL_8B, tensor_parallel=3)


def test_memory_is_what_the_weights_leave():
    serving, both = machine_of(A100, MODEL_8B), machine_of(A100, MODEL_8B, finetune_tokens=8192)
    kv = 131_072  # bytes per token
    assert serving.num_blocks * 16 * kv == pytest.approx(0.9 * 80e9 - 2 * MODEL_8B.num_parameters, rel=1e-3)
    assert both.num_blocks * 16 * kv + both.finetune_bytes == pytest.approx(serving.num_blocks * 16 * kv, rel=1e-3)
    large = replace(MODEL_8B, num_layers=160)
    with pytest.raises(ValueError, match="leave no room"):
        machine_of(A100, large)
    assert machine_of(A100, large, tensor_parallel=2).num_blocks > 0


@pytest.mark.parametrize("answer", [*range(1, 20), 1024])
def test_the_fewest_is_found(answer: int):
    def run_with(n: int) -> SimulationResult:
        return SimulationResult([], 1.0, n, {}, 0, 0)

    for start in {1, min(answer, 3), answer}:
        assert fewest(run_with, lambda r: r.finetune_tokens >= answer, 1024, start)[0] == answer
    with pytest.raises(ValueError, match="not enough"):
        fewest(run_with, lambda _: False, 1024)


def test_a_plan_is_enough_and_one_replica_less_is_not():
    config = SchedulerConfig(slo=SLO(2.0, 0.1))
    trace = poisson_arrivals(12, 15, 500, 30, length_cv=0.3)
    found = plan_capacity(trace, example_job(MODEL_8B, [512] * 64), 3000.0, config, machine_of(A100, MODEL_8B, finetune_tokens=4096))
    assert found.inference.attainment(config.slo) >= 0.99 <= found.coserve.attainment(config.slo)
    assert found.coserve.finetune_rate >= 3000.0
    assert 0 <= found.finetuning * found.dedicated_rate - 3000.0 < found.dedicated_rate
    assert found.serving <= found.coserving


def test_the_command_prints_a_table_and_json(llama_8b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trace = tmp_path / "trace.csv"
    arrivals = poisson_arrivals(2, 20, 300, 20, seed=1)
    rows = [f"{a.time},{a.prompt_tokens},{a.output_tokens}\n" for a in arrivals]
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(rows))
    args = ["plan", "--trace", str(trace), "--model", str(llama_8b.parent), "--finetune-tokens-per-second", "1000"]
    assert run([*args, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["separate"]["replicas"] == report["separate"]["serving"] + report["separate"]["finetuning"] == 2
    assert report["coserve"]["replicas"] == 1
    assert report["coserve"]["finetune_rate"] >= 1000
    assert report["coserve"]["requests"] == len(arrivals)
    assert run([*args, "--seconds", "5"]) == 0
    assert "co-serving" in capsys.readouterr().out


def test_objectives_out_of_reach_are_said(llama_8b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,100,10\n1,100,10\n")
    args = ["plan", "--trace", str(trace), "--model", str(llama_8b), "--slo-tpot", "0.001", "--max-replicas", "4"]
    assert run(args) == 2
    assert "not enough" in capsys.readouterr().err
