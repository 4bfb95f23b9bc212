"""A new PEFT method is one short file: it is trained, saved, loaded, served and configured like the others, with no change elsewhere."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import msgspec
import pytest
import torch

from flexllm.config import FinetuneConfig, JobSpec
from flexllm.core import JobStatus, Request, SamplingParams
from flexllm.finetune.job import TrainingJob
from flexllm.peft.config import LoraConfig, peft_config, peft_settings
from flexllm.peft.io import AdapterFile, load_adapter, save_adapter
from flexllm.server.job_options import resolve_options, show_method
from flexllm.server.protocol import AddJob, decode_command, encode
from flexllm.server.wire import JobRequest
from tests.compiler.graphs import assert_same
from tests.oracle.engines import (
    Run,
    assert_idle,
    assert_same_greedy,
    engine_logits,
    job_spec,
    open_engine,
    oracle_logits,
    random_adapter,
    random_texts,
    with_adapter,
)
from tests.oracle.harness import VOCAB, Bench, BottleneckTwin, adapter_file, oracle_gradients, random_hf_model
from tests.oracle.test_gradients import Examples, compare, make_examples, run_to_end
from tests.peft import toy_method
from tests.peft.toy_method import ToyConfig

TOY = ToyConfig(r=3, scaling=1.5, target_modules=("q_proj", "k_proj", "o_proj", "down_proj"))


class ToyTwin(BottleneckTwin):
    """The same by hooks on a copy of the Hugging Face model, differentiated by autograd."""

    def __init__(self, model: torch.nn.Module, config: ToyConfig, parameters: dict[str, torch.Tensor]) -> None:
        torch.nn.Module.__init__(self)
        self.model = copy.deepcopy(model)
        self.values = {n: p.detach().clone().requires_grad_() for n, p in parameters.items()}
        for i, layer in enumerate(self.model.model.layers):
            for site in config.target_modules:
                module = getattr(layer.self_attn if hasattr(layer.self_attn, site) else layer.mlp, site)

                def after(_module, args, y, key=f"layers.{i}.{site}"):
                    a, b, gate = (self.values[f"{key}.{n}"] for n in ("A", "B", "gate"))
                    return gate[0] * (y + config.scaling * torch.relu(args[0] @ a.t()) @ b)

                module.register_forward_hook(after)


def compare_toy(bench: Bench, hf: torch.nn.Module, training: TrainingJob, examples: Examples) -> None:
    twin = ToyTwin(hf, training.spec.peft, bench.pool.parameters(training.slot))
    loss, want = oracle_gradients(twin, training, examples)
    assert sum(bench.trainer._sums[s].loss for s in training.job.group) == pytest.approx(loss, rel=1e-12)
    training.ledger.label_count = 1
    assert_same(training.ledger.mean(), want)


def test_one_short_file() -> None:
    assert len(Path(toy_method.__file__).read_text().splitlines()) < 60


# ------------------------------------------------------------------------------------------------------------ gradients
def test_gradients_at_every_level(tmp_path: Path) -> None:
    hf = random_hf_model("llama", tmp_path / "model")
    examples = make_examples([23, 1, 31], seed=1)

    for name in ("keep", "auto"):
        bench = Bench(tmp_path / "model", torch.float64, num_blocks=256)
        training = bench.add_job("job", examples, TOY, name, tmp_path)
        for index in range(len(training.levels)):
            training.job.group.clear()
            training.ledger.zero()
            run_to_end(bench, bench.start(training, index), random.Random(index), longest=9)
            compare_toy(bench, hf, training, examples)


def test_next_to_a_lora_job(tmp_path: Path) -> None:
    """Both in the same iterations, with requests of a third adapter, of another toy and of the base model."""
    rng = random.Random(0)
    hf = random_hf_model("qwen2", tmp_path / "model")  # whose linears have biases
    bench = Bench(tmp_path / "model", torch.float64, num_blocks=128)
    slots = [bench.pool.allocate(c) for c in (LoraConfig(r=5), ToyConfig(r=2))]
    for slot in slots:
        for p in bench.pool.parameters(slot).values():
            p.copy_(torch.randn(p.shape, dtype=torch.float64) * 0.2)
    examples = [make_examples([26, 7], seed=5), make_examples([19, 12], seed=6)]
    toy = bench.add_job("toy", examples[0], TOY, "recompute", tmp_path)
    lora = bench.add_job("lora", examples[1], LoraConfig(r=4), "checkpoint", tmp_path)
    requests = [bench.request(i, 20, rng, slot) for i, slot in enumerate((slots[0].id, slots[1].id, -1))]
    sequences = [s for j in (toy, lora) for s in bench.start(j)]
    run_to_end(bench, sequences, rng, 9, lambda: bench.prefill(requests, rng))
    compare_toy(bench, hf, toy, examples[0])
    compare(bench, hf, lora, examples[1], 1e-10)


# ---------------------------------------------------------------------------------------------------------------- files
def test_saved_and_loaded(tmp_path: Path) -> None:
    random_hf_model("llama", tmp_path / "model")
    bench = Bench(tmp_path / "model", torch.float64)
    adapter = adapter_file(bench, bench.add_job("job", make_examples([5], seed=1), TOY, "recompute", tmp_path))
    save_adapter(tmp_path / "toy", adapter, bench.model.config)
    loaded = load_adapter(tmp_path / "toy")
    assert (loaded.config, loaded.base_model) == (TOY, "tiny")
    fitted: AdapterFile = loaded.fitted(bench.model.config)
    assert fitted.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(tensor, adapter.tensors[name]) for name, tensor in fitted.tensors.items())


# ----------------------------------------------------------------------------------------------------------- the engine
def test_engine_trains_and_serves(tmp_path: Path) -> None:
    """A job of it, then its adapter in the same batches as LoRA's and the base model's; a second job goes on from it."""
    hf = random_hf_model("llama", tmp_path / "model", torch.float32)
    lora = random_adapter(hf, tmp_path / "lora", LoraConfig(r=4), seed=0)
    run = Run(open_engine(tmp_path / "model"))
    config = FinetuneConfig(learning_rate=2e-2, num_epochs=5, batch_size=2, warmup_ratio=0.0)
    spec = job_spec("job", tmp_path, random_texts(random.Random(3), [20, 40, 33, 7], VOCAB), config, TOY)
    run.engine.add_job(spec)
    run.finish()
    assert run.status("job") is JobStatus.SUCCEEDED
    losses = run.losses("job")
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])

    folder = Path(spec.output_dir) / "checkpoint-10"
    run.engine.register_adapter("toy", folder)
    run.engine.register_adapter("lora", lora)
    toy = ToyTwin(hf, TOY, {n: t.float() for n, t in load_adapter(folder).tensors.items()})
    oracles = {None: hf, "lora": with_adapter(hf, lora), "toy": toy}
    prompts = {name: [random.Random(i).randrange(VOCAB) for _ in range(30)] for i, name in enumerate(oracles)}
    for name, oracle in oracles.items():
        off = (engine_logits(run.engine, prompts[name], name) - oracle_logits(oracle, prompts[name])).abs().max()
        assert float(off) <= 1e-4
    run.engine.add_job(job_spec("next", tmp_path, random_texts(random.Random(4), [30, 30], VOCAB), config, TOY, init_adapter=str(folder)))
    before = len(run.plans)
    for name, prompt in prompts.items():
        sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
        run.add(Request(str(name), prompt, sampling, 0.0, adapter=name))
    run.finish()
    assert any(len(p.inference) == 3 for p in run.plans[before:])
    for name, oracle in oracles.items():
        assert len(run.tokens[str(name)]) == 12
        assert_same_greedy(run.tokens[str(name)], want=greedy(oracle, prompts[name], 12), prompt=prompts[name], oracle=oracle)
    assert run.status("next") is JobStatus.SUCCEEDED
    assert_idle(run.engine)


def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(oracle_logits(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


# ------------------------------------------------------------------------------------------------------------- the wire
def test_settings_over_the_wire() -> None:
    """HTTP's body, the engine's socket, and what a client is shown."""
    assert peft_config({"type": "toy", "r": 3}) == ToyConfig(r=3)
    assert peft_config(peft_settings(TOY)) == TOY
    with pytest.raises(ValueError, match="lora_alpha"):
        peft_config({"type": "toy", "lora_alpha": 3})
    body = msgspec.convert({"type": "supervised", "supervised": {"hyperparameters": {"peft": peft_settings(TOY)}}}, dict)
    request = JobRequest(model="m", training_file="f", method=body)
    options = resolve_options(request, examples=10, seed=0, max_model_len=256, continued=None)
    assert options.peft == TOY
    assert show_method(options)["supervised"]["hyperparameters"]["peft"] == {"type": "toy", **peft_settings(TOY)}
    spec = JobSpec("job", "train.npz", "out", peft=TOY)
    assert decode_command(encode(AddJob(1, spec))) == AddJob(1, spec)
