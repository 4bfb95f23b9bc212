"""What is asked of a server: prompts and training texts of a given length, and traces to take requests from, a load at a time."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from flexllm.simulate.workload import Arrival, gamma_arrivals, load_trace

FIRST_ORDINARY_TOKEN = 1000  # below it live special tokens and single bytes in the vocabularies we use
# So that recorded requests fit a small machine; the longest prompt takes half of the strict TTFT there if it is alone, so that what is held
# against whom is what schedulers do, and not whether the machine has a good moment.
PROMPT_SCALE, MAX_PROMPT = 1 / 8, 256
OUTPUT_SCALE, MIN_OUTPUT, MAX_OUTPUT = 1 / 4, 4, 64
USUAL_H = 2.2  # of the machine they were chosen on (grid.py); on slower ones requests are shorter
LENGTH_CV = 0.5
SYNTHETIC_SECONDS = 4000.0  # of a made-up trace, at one request per second
SKIPPED = 500  # the first arrivals of a recorded trace: it begins with gaps
# name: (file of a recording, or none; what stands in where it is missing: burstiness and mean lengths, as scaled)
TRACES: dict[str, tuple[str | None, float, int, int]] = {
    "azure-conv": ("azure2023_conv_min00-30.csv", 1.0, 125, 45),
    "azure-code": ("azure2023_code_min00-30.csv", 3.0, 160, 7),
    "bursty": (None, 3.0, 128, 48),
}


@dataclass(frozen=True)
class Load:
    """Requests of `seconds` seconds, and what they ask. No arrivals: nothing is asked for so long."""

    arrivals: list[Arrival]
    prompts: list[list[int]]
    seconds: float

    def first(self, seconds: float) -> Load:
        """What is asked in the first `seconds`."""
        count = sum(a.time < seconds for a in self.arrivals)
        return Load(self.arrivals[:count], self.prompts[:count], seconds)


@dataclass(frozen=True)
class Trace:
    """Arrivals to take loads from, and in words where they come from and how they were scaled."""

    name: str
    source: str
    arrivals: list[Arrival]

    @staticmethod
    def named(name: str, folder: Path, seed: int, shorter: int = 1) -> Trace:
        """One of TRACES: recorded, if its file is in `folder`, else from a seeded Gamma process; requests `shorter` times shorter."""
        recording, cv, prompt, output = TRACES[name]
        if recording and (folder / recording).exists():
            arrivals = [_fit(a, shorter) for a in load_trace(folder / recording)[SKIPPED:]]
            prompts = f"prompts x {PROMPT_SCALE / shorter:.3g}, at most {MAX_PROMPT // shorter}"
            outputs = f"outputs x {OUTPUT_SCALE / shorter:.3g}, {MIN_OUTPUT} to {MAX_OUTPUT // shorter}"
            return Trace(name, f"{recording}, from arrival {SKIPPED}; {prompts}; {outputs}; time stretched", arrivals)
        prompt, output = prompt // shorter, max(MIN_OUTPUT, output // shorter)
        made = gamma_arrivals(1.0, SYNTHETIC_SECONDS, prompt, output, cv=cv, length_cv=LENGTH_CV, seed=seed)
        stand_in = f", in place of {recording}, which is not here" if recording else ""
        return Trace(name, f"Gamma arrivals, cv {cv:g}, {prompt} / {output} tokens on average, seed {seed}{stand_in}", made)

    def take(self, start: int, rate: float, seconds: float) -> list[Arrival]:
        """The next `rate * seconds` arrivals from the `start`-th (at least one; past the end it begins again), stretched over
        `seconds`. Taking so many rather than so long keeps the rate; thinning at random would destroy the bursts."""
        count = max(1, round(rate * seconds))
        if count >= len(self.arrivals):
            raise ValueError(f"trace {self.name} has {len(self.arrivals)} arrivals, {count} are wanted")
        start %= len(self.arrivals) - count
        first, end = self.arrivals[start].time, self.arrivals[start + count].time
        stretch = seconds / (end - first) if end > first else 0.0
        return [replace(a, time=(a.time - first) * stretch) for a in self.arrivals[start : start + count]]


def shorter_here(h: float) -> int:
    """By what lengths are divided on a machine whose decode step is `h` times the reference's: objectives allow each token `h` times as
    long, so an answer takes as many seconds, and a prompt stays within a TTFT that does not grow with `h`."""
    return max(1, round(h / USUAL_H))


def _fit(arrival: Arrival, shorter: int) -> Arrival:
    prompt = min(MAX_PROMPT // shorter, max(1, round(arrival.prompt_tokens * PROMPT_SCALE / shorter)))
    output = min(MAX_OUTPUT // shorter, max(MIN_OUTPUT, round(arrival.output_tokens * OUTPUT_SCALE / shorter)))
    return replace(arrival, prompt_tokens=prompt, output_tokens=output)


def load_of(arrivals: list[Arrival], seconds: float, vocab_size: int, seed: int) -> Load:
    return Load(arrivals, random_prompts([a.prompt_tokens for a in arrivals], vocab_size, seed), seconds)


def random_prompts(lengths: Iterable[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random ordinary token ids: no two share a prefix, so no server's prefix cache can help."""
    rng = random.Random(seed)
    return [rng.choices(range(min(FIRST_ORDINARY_TOKEN, vocab_size // 2), vocab_size), k=n) for n in lengths]


def training_texts(count: int, words: int, seed: int = 0) -> list[str]:
    """Made-up prose: sentences of pronounceable words, so that a tokenizer sees ordinary letters."""
    rng = random.Random(seed)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(500)]
    return [" ".join(rng.choices(vocabulary, k=words)).capitalize() + "." for _ in range(count)]
