"""Every method that PEFT has, both ways: what PEFT saved gives the same logits here, what was trained here gives the same in PEFT;
and all of them at once in one engine, requests and jobs mixed."""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path

import peft
import pytest
import torch

from flexllm.config import FinetuneConfig
from flexllm.core import JobStatus, Request, SamplingParams
from flexllm.peft.config import BottleneckConfig, LoraConfig
from flexllm.peft.io import load_adapter
from tests.oracle.engines import SCHEDULER, Run, engine_logits, job_spec, open_engine, oracle_logits, random_texts, with_adapter
from tests.oracle.harness import VOCAB, random_hf_model

TOLERANCE = 1e-4  # fp32, absolute
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASK = {"task_type": "CAUSAL_LM"}
PEFT = {
    "rslora, patterns": peft.LoraConfig(
        r=4,
        use_rslora=True,
        target_modules=LINEARS,
        rank_pattern={"q_proj": 6, "layers.1.mlp.up_proj": 2},
        alpha_pattern={"o_proj": 3},
        **TASK,
    ),
    "some layers": peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2], **TASK),
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=LINEARS, **TASK),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
    "vera": peft.VeraConfig(r=8, target_modules=LINEARS, **TASK),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=6, **TASK),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=5, **TASK),
}


def random_peft(hf: torch.nn.Module, name: str, folder: Path) -> Path:
    """An adapter that PEFT made and saved; everything that trains is random."""
    twin = peft.get_peft_model(copy.deepcopy(hf), copy.deepcopy(PEFT[name]), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in twin.named_parameters():
            if p.requires_grad:
                drawn = torch.randn(p.shape, generator=generator) * 0.2
                p.copy_(p + drawn if "magnitude" in key or "ia3" in key else drawn)
    twin.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", PEFT)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_there_and_back(name: str, family: str, tmp_path: Path) -> None:
    hf = random_hf_model(family, tmp_path / "model", torch.float32)
    theirs = random_peft(hf, name, tmp_path / "theirs")
    ids = [random.Random(2).randrange(VOCAB) for _ in range(60)]
    base = oracle_logits(hf, ids)
    run = Run(open_engine(tmp_path / "model"))

    def assert_alike(folder: Path) -> torch.Tensor:
        run.engine.register_adapter(folder.name, folder)
        want = oracle_logits(with_adapter(hf, folder), ids)[-len(ids) :]
        assert float((engine_logits(run.engine, ids, folder.name) - want).abs().max()) <= TOLERANCE
        return want

    before = assert_alike(theirs)
    assert float((before - base).abs().max()) > 100 * TOLERANCE, "the adapter does something"
    texts = random_texts(random.Random(3), [20, 33, 7], VOCAB)
    config = FinetuneConfig(learning_rate=1e-2, num_epochs=3, batch_size=3, warmup_ratio=0.0)
    settings = load_adapter(theirs).config
    spec = job_spec("job", tmp_path, texts, config, settings, init_adapter=str(theirs))
    run.engine.add_job(spec)
    run.finish()
    assert run.status("job") is JobStatus.SUCCEEDED
    losses = run.losses("job")
    assert losses[-1] < losses[0]
    trained = assert_alike(Path(spec.output_dir) / "checkpoint-3")
    assert float((trained - before).abs().max()) > 10 * TOLERANCE, "training changed it"
    assert float((engine_logits(run.engine, ids) - base).abs().max()) <= TOLERANCE, "the base model is as it was"


def test_all_methods_in_one_batch(tmp_path: Path) -> None:
    """Greedy answers of every method, asked at once while two jobs train, are those of Hugging Face with that adapter alone."""
    hf = random_hf_model("llama", tmp_path / "model", torch.float32)
    run = Run(open_engine(tmp_path / "model", num_blocks=256))
    folders = {name: random_peft(hf, name, tmp_path / f"adapter-{i}") for i, name in enumerate(PEFT)}
    texts = random_texts(random.Random(3), [30, 21, 40, 12], VOCAB)
    config = FinetuneConfig(learning_rate=1e-3, num_epochs=3, batch_size=2)
    run.engine.add_job(job_spec("lora", tmp_path, texts, config, load_adapter(folders["rslora, patterns"]).config))
    run.engine.add_job(job_spec("serial", tmp_path, texts, config, BottleneckConfig(bottleneck=5)))
    prompt = [random.Random(7).randrange(VOCAB) for _ in range(17)]
    greedy = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    for name, folder in folders.items():
        run.engine.register_adapter(name, folder)
        run.engine.add_request(Request(name, list(prompt), greedy, 0.0, adapter=name))
    run.engine.add_request(Request("base", list(prompt), greedy, 0.0))
    run.finish()
    for name in (*folders, "base"):
        model = with_adapter(hf, folders[name]) if name in folders else hf
        ids = list(prompt)
        for token in run.tokens[name]:
            logits = oracle_logits(model, ids)[-1]
            assert float(logits.max() - logits[token]) <= TOLERANCE, name
            ids.append(token)
        assert len(run.tokens[name]) == 12
    assert run.status("lora") is run.status("serial") is JobStatus.SUCCEEDED


def test_dropout_is_the_same_whenever_a_row_is_computed(tmp_path: Path) -> None:
    """With dropout a step's loss depends on seed and step, not on how its rows were cut or at which level they were rebuilt."""
    random_hf_model("llama", tmp_path / "model", torch.float32)
    texts = random_texts(random.Random(3), [30, 21], VOCAB)
    losses = {}
    for key, dropout, level, rows in (
        ("a", 0.4, "keep", 64),
        ("b", 0.4, "checkpoint", 7),
        ("c", 0.4, "kv", 11),
        ("plain", 0.0, "keep", 64),
    ):
        config = FinetuneConfig(learning_rate=1e-2, num_epochs=4, batch_size=2, save_level=level)
        run = Run(open_engine(tmp_path / "model", scheduler=dataclasses.replace(SCHEDULER, max_window_rows=rows)))
        run.engine.add_job(job_spec(f"job-{key}", tmp_path, texts, config, LoraConfig(r=4, lora_dropout=dropout)))
        run.finish()
        losses[key] = run.losses(f"job-{key}")
    assert losses["b"] == pytest.approx(losses["a"], rel=1e-4)
    assert losses["c"] == pytest.approx(losses["a"], rel=1e-4)
    assert losses["plain"][1:] != pytest.approx(losses["a"][1:], rel=1e-3)


def test_a_sequence_goes_to_the_level_that_fits_and_one_that_fits_nowhere_is_refused(tmp_path: Path) -> None:
    """The same losses at a tenth of the memory; the engine says at which level."""
    random_hf_model("llama", tmp_path / "model", torch.float32)
    texts = random_texts(random.Random(3), [60, 60, 60, 60], VOCAB)
    config = FinetuneConfig(learning_rate=1e-2, num_epochs=2, batch_size=2)
    roomy = Run(open_engine(tmp_path / "model"))
    roomy.engine.add_job(job_spec("job", tmp_path, texts, config, LoraConfig(r=4)))
    job = roomy.engine.trainer.jobs["job"].job
    levels, rows = job.levels, max(job.lengths)
    roomy.finish()
    assert {e.save_level for e in roomy.of("job")} == {"recompute"}
    for level in levels[1:]:
        run = Run(open_engine(tmp_path / "model", finetune_bytes=rows * level.bytes_per_token))
        run.engine.add_job(job_spec("job", tmp_path, texts, config, LoraConfig(r=4)))
        while not run.of("job"):
            run.step()
            held = run.engine.stats()["memory"]["activations"]
            assert held <= rows * level.bytes_per_token, "what is held was reserved"
        run.finish()
        assert {e.save_level for e in run.of("job")} == {level.name}
        assert run.losses("job") == pytest.approx(roomy.losses("job"), rel=1e-4)
    short = Run(open_engine(tmp_path / "model", finetune_bytes=rows * levels[-1].bytes_per_token - 1))
    with pytest.raises(
        ValueError, match=f"{rows} tokens do not fit in the finetuning memory: 1 bytes short at save level '{levels[-1].name}'"
    ):
        short.engine.add_job(job_spec("job", tmp_path, texts, config, LoraConfig(r=4)))
    assert not short.engine.trainer.jobs
