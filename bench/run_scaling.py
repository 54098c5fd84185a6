"""A training step of the default model on 1, 2, 4 ... threads: tokens a second of llmcore and of plain PyTorch."""

import os
from collections.abc import Iterator
from typing import Any

import torch

from bench.plain_model import PlainTwin
from bench.run_step import step_of
from bench.timing import interleaved, threads
from llmcore import models
from llmcore.data import Batches, load_corpus
from llmcore.train.config import TrainConfig, model_config
from llmcore.train.machine import use_bf16


def counts() -> list[int]:
    """Powers of two up to the processors there are, and their number."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({2**i for i in range(available.bit_length()) if 2**i <= available} | {available})


def run() -> Iterator[dict[str, Any]]:
    config = TrainConfig()
    settings = model_config(config)
    corpus = load_corpus(config.data.train, config.data.valid)
    batch = Batches(corpus.train, config.batch_size, config.seq_len, config.seed)(0, 0, 1)
    bf16 = use_bf16(config.precision, torch.device("cpu"))
    ours = models.build(settings)
    plain = PlainTwin(settings, ours.state_dict())
    candidates = {n: step_of(m, config, bf16, False, batch) for n, m in (("llmcore", ours), ("plain PyTorch", plain))}
    for count in counts():
        with threads(count):
            timings, _ = interleaved(candidates, rounds=7, round_seconds=0.01)
        tokens = {n: round(config.batch_size * config.seq_len / t.median) for n, t in timings.items()}
        print(f"{count:3} threads: " + "  ".join(f"{n} {t:,} tokens/s" for n, t in tokens.items()), flush=True)
        yield {"threads": count, "precision": "bf16" if bf16 else "fp32", "tokens per second": tokens}
