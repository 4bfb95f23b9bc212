"""On a quantized base everything is as Hugging Face + PEFT have it on the dequantized weights (QLoRA)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from flexllm.config import QUANTIZATIONS, FinetuneConfig
from flexllm.core import JobStatus, Request, SamplingParams
from flexllm.peft.config import LoraConfig
from tests.oracle.engines import (
    Run,
    assert_idle,
    assert_same_greedy,
    final_adapter,
    job_spec,
    open_engine,
    oracle_logits,
    random_adapter,
    random_texts,
    train_oracle,
    with_adapter,
)
from tests.oracle.harness import VOCAB, Bench, random_hf_model
from tests.oracle.test_gradients import compare, make_examples, run_to_end
from tests.oracle.test_logits import forced_request, rows_of, token_ids

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
FORMATS = pytest.mark.parametrize("format", QUANTIZATIONS)


def dequantized_hf_model(family: str, folder: Path, dtype: torch.dtype, format: str) -> torch.nn.Module:
    """The folder has the model as it was; what is returned has each layer's matrices as the format keeps them."""
    hf = random_hf_model(family, folder, dtype, **SIZES)
    kind = GGMLQuantizationType[format.upper()]
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if name.endswith("proj.weight"):
                p.copy_(torch.from_numpy(dequantize(quantize(p.float().numpy(), kind), kind)))
    return hf


@FORMATS
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("level", ["keep", "recompute"])
def test_gradients(format: str, family: str, level: str, tmp_path: Path) -> None:
    hf = dequantized_hf_model(family, tmp_path / "model", torch.float64, format)
    bench = Bench(tmp_path / "model", torch.float64, quantization=format)
    examples = make_examples([23, 1, 40], seed=1)
    training = bench.add_job("job", examples, LoraConfig(r=5, lora_alpha=7), level, tmp_path)
    run_to_end(bench, bench.start(training), random.Random(3), longest=9)
    compare(bench, hf, training, examples, 1e-10)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reference_ops", [True, False], ids=["reference", "device"])
def test_logits(format: str, dtype: torch.dtype, reference_ops: bool, tmp_path: Path) -> None:
    hf = dequantized_hf_model("qwen2", tmp_path, dtype, format)
    bench = Bench(tmp_path, dtype, reference_ops, quantization=format)
    ids = token_ids(random.Random(0), 60)
    chunks = rows_of(forced_request(bench, 0, ids, prompt=45), random.Random(1))
    logits = torch.cat([bench.logits([chunk]) for chunk in chunks])
    assert float((logits - oracle_logits(hf, ids)).abs().max()) <= (1e-10 if dtype == torch.float64 else 1e-4)


@FORMATS
def test_an_engine_serves_and_finetunes(format: str, tmp_path: Path) -> None:
    """Greedy answers of the base and the whole curve of a job beside them."""
    hf = dequantized_hf_model("llama", tmp_path / "model", torch.float32, format)
    rng, lora = random.Random(2), LoraConfig(r=4, lora_alpha=6)
    config = FinetuneConfig(learning_rate=5e-3, num_epochs=2, batch_size=4, lr_schedule="constant", warmup_ratio=0.0)
    texts = random_texts(rng, [5, 40, 17, 33, 28, 9, 12], VOCAB)
    start = random_adapter(hf, tmp_path / "start", lora, seed=1, spread=0.1)
    curve = train_oracle(with_adapter(hf, start, trainable=True), texts, config)

    run = Run(open_engine(tmp_path / "model", quantization=format))
    assert run.engine._profile_path().name.endswith(f"-cpu-float32-{format}-1.json")
    dense = sum(p.nbytes for n, p in hf.named_parameters() if "norm" not in n)
    assert run.engine.stats()["memory"]["weights"] < (0.6 if format == "q8_0" else 0.5) * dense
    spec = job_spec("job", tmp_path, texts, config, lora, init_adapter=str(start))
    run.engine.add_job(spec)
    prompts = [token_ids(rng, rng.randint(3, 50)) for _ in range(5)]
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    run.serve([(3 * i, Request(f"r{i}", prompt, sampling, 0.0)) for i, prompt in enumerate(prompts)])
    assert run.shared > 0
    assert run.status("job") is JobStatus.SUCCEEDED
    assert run.losses("job") == pytest.approx(curve.losses, abs=1e-4)
    assert final_adapter(spec, len(curve.losses))
    for i, prompt in enumerate(prompts):
        want = list(prompt)
        for _ in range(12):
            want.append(int(oracle_logits(hf, want)[-1].argmax()))
        assert_same_greedy(run.tokens[f"r{i}"], want[len(prompt) :], prompt, hf)
    assert_idle(run.engine)
