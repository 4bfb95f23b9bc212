"""The engine on a CUDA device against the same engine on the CPU: requests and a job in the same iterations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexllm.config import JobSpec
from tests.oracle.engines import Run, assert_idle
from tests.oracle.test_coserving import World, assert_same_training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def coserve(world: World, device: str) -> tuple[Run, JobSpec]:
    run, spec = Run(world.engine(device=device)), world.spec()
    run.engine.add_job(spec)
    run.serve(world.requests())
    assert_idle(run.engine)
    return run, spec


def test_answers_and_training_are_the_cpus(tmp_path: Path) -> None:
    world = World(tmp_path, torch.float64)
    (on_cuda, spec), (on_cpu, cpu_spec) = coserve(world, "cuda"), coserve(world, "cpu")
    assert on_cuda.shared > 20
    assert_same_training(on_cuda, spec, on_cpu, cpu_spec)
    world.assert_same_answers(on_cuda, on_cpu, world.requests())


def test_bf16_learns_the_same(tmp_path: Path) -> None:
    """Flash attention and Triton, which float64 does not go through. Two ways to round: not more than a few roundings apart."""
    world = World(tmp_path, torch.bfloat16)
    (on_cuda, _), (on_cpu, _) = coserve(world, "cuda"), coserve(world, "cpu")
    assert len(on_cuda.losses("job")) == len(on_cpu.losses("job"))
    assert on_cuda.losses("job") == pytest.approx(on_cpu.losses("job"), rel=1e-2)
