"""Levels of real shapes, without weights: those of algorithms.md 3.2 as special cases, and what the ladder promises."""

from __future__ import annotations

import itertools

import pytest

from flexllm.compiler.levels import JobCompiler
from flexllm.compiler.report import compile_report, job_flops, report_compiler
from flexllm.model.config import ModelConfig
from flexllm.peft.config import Ia3Config, LoraConfig, PeftConfig, PromptConfig
from tests.oracle.methods import METHODS

LLAMA_8B = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, max_len=131072)
SMALL = ModelConfig("llama", 1000, 64, 160, 5, 4, 2, 16)
KV = 4096  # bytes of K and V per token and layer; the table counts them, here they are the pages'
NORMS = 8  # it also counts two fp32 scalars that are recomputed here
LAYERS = 32


def compiler(peft: PeftConfig, config: ModelConfig = LLAMA_8B, tokens: int = 1024) -> JobCompiler:
    return report_compiler(config, peft, tokens)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("x", "q", "attn_out", "lse", "mid", "gate_proj", "up_proj"), 94344 - KV - NORMS),  # P1
        (("x", "attn_out", "lse", "gate_proj", "up_proj"), 77952 - KV),  # P2
        (("x", "attn_out", "lse"), 20608 - KV),  # P3
        (("x",), 12288 - KV),  # P4
    ],
)
@pytest.mark.parametrize("peft", [LoraConfig(), LoraConfig(target_modules=("q_proj", "v_proj")), Ia3Config()])
def test_the_levels_of_the_specification(names: tuple[str, ...], expected: int, peft: PeftConfig) -> None:
    plan = compiler(peft).named(names)
    top = plan.choices[-1]
    assert top.bytes_per_token == expected
    assert plan.program().layer(LAYERS - 1).saved_names == set(names)


def test_nothing_but_pages_is_a_level_too() -> None:
    """P5: slices start from the token ids; every other slice from the input of its segment."""
    job = compiler(LoraConfig())
    (kv,), (segments,) = job.levels("kv"), job.levels("segments")
    assert kv.saved_bytes == 0
    assert kv.level.depth == LAYERS
    assert segments.level.depth == 6
    assert segments.saved_bytes == 5 * 8192, "six segments, the lowest of which starts from the token ids"
    assert segments.level.bytes_per_token < kv.level.bytes_per_token, "accumulators of all layers weigh more than a few inputs"


def test_pruning_stops_at_the_lowest_adapted_layer() -> None:
    job = compiler(LoraConfig(layers_to_transform=(10, 20)))
    program = job.levels("recompute")[0].program()
    assert job.lowest_layer == 10
    assert all(program.stored(i) == () for i in range(10))
    down_only = compiler(LoraConfig(target_modules=("down_proj",)))
    lowest = down_only.levels("keep")[0].program().layer(0)
    assert lowest.saved_names == {"act", "down_proj.lora_u"}, "no gradient leaves the lowest layer"
    assert "linear_dx" not in lowest.emitted.source
    assert compiler(PromptConfig()).levels("checkpoint")[0].program().layer(0).saved, "prompt tuning has no early stop"


@pytest.mark.parametrize("method", [m for m, peft in METHODS.items() if len(peft.layers(SMALL.num_layers)) in (1, SMALL.num_layers)])
def test_a_ladder_goes_down(method: str) -> None:
    """Each level takes fewer bytes and more time than the one before; the first is as good as keeping everything."""
    peft = METHODS[method]
    job = compiler(peft, SMALL, 512)
    keep, *ladder = (*job.levels("keep"), *job.levels("auto"))
    assert ladder[0].saved_bytes <= keep.saved_bytes
    for before, after in itertools.pairwise(ladder):
        assert after.level.bytes_per_token < before.level.bytes_per_token
        assert after.level.cost >= before.level.cost * (1 - 1e-9)
    assert ladder[0].recomputed_flops < 0.02 * job_flops(job)
    assert ladder[-1].recomputed_flops < 0.6 * job_flops(job)


def test_unknown_levels_are_named() -> None:
    with pytest.raises(ValueError, match=r"save_level must be one of auto, keep, recompute, .*checkpoint, segments, kv, got 'P7'"):
        compiler(LoraConfig(), SMALL).levels("P7")


def test_a_report_accounts_for_every_byte() -> None:
    """The kept tensors of a layer are the level's bytes, and the totals are those of all layers."""
    report = compile_report(LLAMA_8B, LoraConfig(), "keep", 8192, batch=2)
    kept = sum(row.bytes_per_token for row in report.rows if row.decision in ("kept", "compressed"))
    (level,) = report.levels
    assert kept * (LAYERS - 1) < level.saved_bytes <= kept * LAYERS
    assert level.total_bytes == (level.saved_bytes + level.gradient_bytes) * 2 * 8192
    assert level.extra_flops == 0
    assert report.kv_bytes_per_token == LAYERS * KV
    # algorithms.md 2.5: linears of 872 MFLOP per token and layer, and a head of 1.051 GFLOP per pass, twice
    assert report.flops_per_token > LAYERS * 872e6 + 2 * 1.05e9
