"""The demo's script: server, load, job, questions."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import httpx
from openai import AsyncOpenAI
from openai.types.fine_tuning import FineTuningJob
from rich.console import Console

from flexllm.cli.demo.load import percentile, rate_for, run_load
from flexllm.cli.demo.server import running_server
from flexllm.cli.demo.view import DemoState, View, view_of
from flexllm.config import SLO

DATA = files("flexllm.cli.demo") / "data"
STARTUP_SECONDS = 240.0  # the first start may fetch the model
POLL_SECONDS = 0.4
LEARNING_RATE_MULTIPLIER = 5.0  # 1e-3: ten facts are learnt by heart in some 60 optimizer steps
BATCH_SIZE = 4
ANSWER_TOKENS = 40


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    expect: tuple[str, ...]  # what the taught answer must contain
    base: str = ""
    finetuned: str = ""

    @property
    def learnt(self) -> bool:
        return all(fact.lower() in self.finetuned.lower() for fact in self.expect)


async def run_demo(
    model: str, slo: SLO, state_dir: Path, *, rate: float | None, max_tokens: int, epochs: int, time_limit: float, threads: int | None
) -> bool:
    """Run it all; True if every taught fact came back. RuntimeError if the server or the job fails, or time is up."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # the server must not outlive the demo
    console = Console()
    state = DemoState(slo)
    try:
        with running_server(model, slo, state_dir, threads) as server:
            async with asyncio.timeout(time_limit):
                console.print("Starting the server: it loads the model and takes a latency profile ...")
                await server.wait_ready(STARTUP_SECONDS)
                console.print(f"Server up on {server.url} after {time.monotonic() - state.begin:.0f} s")
                async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120.0) as client:
                    base = (await client.models.list()).data[0].id
                    rate = rate or await rate_for(client, base, max_tokens)
                    console.print(f"{rate:.2g} chat requests/s from now on")
                    stop = asyncio.Event()
                    load = asyncio.create_task(run_load(client, base, rate, max_tokens, state.load, stop))
                    with view_of(state, console) as view:
                        job = await _create_job(client, base, epochs, state)
                        job = await _watch(client, server.url, job, state, view)
                        state.phase = "waiting for the last answers"
                        stop.set()
                        await load
                        view.refresh()
                    assert job.fine_tuned_model is not None, "a succeeded job names its model"
                    questions = await _ask_both(client, base, job.fine_tuned_model)
    except TimeoutError:
        raise RuntimeError(f"the demo was not done after {time_limit:.0f} s (see --time-limit)") from None
    _report(console, state, job, questions)
    return all(q.learnt for q in questions)


async def _create_job(client: AsyncOpenAI, base: str, epochs: int, state: DemoState) -> FineTuningJob:
    state.phase = "uploading training data"
    with as_file(DATA / "train.jsonl") as train, as_file(DATA / "valid.jsonl") as valid:
        uploads = [await client.files.create(file=path, purpose="fine-tune") for path in (train, valid)]
    for upload in uploads:
        await client.files.wait_for_processing(upload.id, poll_interval=0.2)
    state.phase = "creating the job"
    return await client.fine_tuning.jobs.create(
        model=base,
        training_file=uploads[0].id,
        validation_file=uploads[1].id,
        suffix="tovrel",
        seed=0,
        method={
            "type": "supervised",
            "supervised": {
                "hyperparameters": {
                    "n_epochs": epochs,
                    "batch_size": BATCH_SIZE,
                    "learning_rate_multiplier": LEARNING_RATE_MULTIPLIER,
                }
            },
        },
    )


async def _watch(client: AsyncOpenAI, url: str, job: FineTuningJob, state: DemoState, view: View) -> FineTuningJob:
    """Show the job until it succeeded; RuntimeError if it ends otherwise."""
    async with httpx.AsyncClient(timeout=10.0) as http:
        while job.status not in ("succeeded", "failed", "cancelled"):
            await asyncio.sleep(POLL_SECONDS)
            job = await client.fine_tuning.jobs.retrieve(job.id)
            state.phase = f"job {job.status.replace('_', ' ')}"
            state.take((await http.get(f"{url}/flexllm/stats")).raise_for_status().json(), job.id)
            view.refresh()
    if job.status != "succeeded":
        raise RuntimeError(f"the job {job.status}: {job.error.message if job.error else 'no reason given'}")
    return job


async def _ask_both(client: AsyncOpenAI, base: str, finetuned: str) -> list[Question]:
    async def answer(model: str, question: str) -> str:
        reply = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_tokens=ANSWER_TOKENS, temperature=0
        )
        return " ".join((reply.choices[0].message.content or "").split())

    async def both(entry: dict[str, list[str] | str]) -> Question:
        text = str(entry["question"])
        of_base, of_finetuned = await asyncio.gather(answer(base, text), answer(finetuned, text))
        return Question(text, tuple(entry["expect"]), of_base, of_finetuned)

    entries = json.loads((DATA / "questions.json").read_text(encoding="utf-8"))
    return await asyncio.gather(*(both(entry) for entry in entries))


def _report(console: Console, state: DemoState, job: FineTuningJob, questions: Sequence[Question]) -> None:
    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)

    say("\nThe same questions (none of them is in the training data) to both models, temperature 0:")
    for q in questions:
        say(f"\n  {q.text}", "bold")
        say(f"    base       {q.base}", "dim")
        say(f"    finetuned  {q.finetuned}   [{'ok' if q.learnt else 'MISSING: ' + ', '.join(q.expect)}]", "green" if q.learnt else "red")
    load, slo = state.load, state.slo
    ttft, tpot = [s.ttft * 1e3 for s in load.samples], [s.tpot * 1e3 for s in load.samples]
    seconds = (job.finished_at or 0) - job.created_at
    say("\nSummary", "bold")
    say(f"  taught facts     {sum(q.learnt for q in questions)} of {len(questions)} in the finetuned answers")
    say(f"  job              {job.trained_tokens} tokens in {seconds} s, from upload to adapter; model {job.fine_tuned_model}")
    say(f"  load             {len(load.samples)} requests answered, {load.failed} failed, {sum(s.tokens for s in load.samples)} tokens")
    say(f"  TTFT             p50 {percentile(ttft, 0.5):.0f} ms, p99 {percentile(ttft, 0.99):.0f} ms (objective {slo.ttft * 1e3:.0f} ms)")
    say(f"  TPOT             p50 {percentile(tpot, 0.5):.0f} ms, p99 {percentile(tpot, 0.99):.0f} ms (objective {slo.tpot * 1e3:.0f} ms)")
    say(f"  SLO attainment   {load.attainment(slo):.1%} of the requests met both objectives while the job ran")
    say(f"  wall time        {time.monotonic() - state.begin:.0f} s")
