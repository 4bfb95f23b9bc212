"""Prompts and training texts of a given length. Arrivals and recorded traces are in `flexllm.simulate.workload`."""

from __future__ import annotations

import random
from collections.abc import Iterable

FIRST_ORDINARY_TOKEN = 1000  # below it live special tokens and single bytes in the vocabularies we use


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
