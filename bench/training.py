"""The default run's training loop for models that are compared: the same batches, optimizer and schedule for each."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmcore.data import Batches, Corpus
from llmcore.train.config import TrainConfig
from llmcore.train.distributed import World
from llmcore.train.engine import Engine, Plan
from llmcore.train.schedule import learning_rate, progress
from train_minimal import bits_per_byte, forward_backward


def engine_for(model: Any, config: TrainConfig, bf16: bool) -> Engine:
    """model: a Decoder, or one that is called like it."""
    return Engine(model, config, Plan("single", "bf16" if bf16 else "fp32"), World(0, 1, torch.device("cpu")))


def train(engine: Engine, corpus: Corpus, steps: int | None, seconds: float | None) -> Iterator[Tensor]:
    """Makes steps up to either limit and yields the loss of each."""
    config = engine.config
    batches = Batches(corpus.train, config.global_batch(1), config.seq_len, config.seed)
    step, began = 0, time.perf_counter()
    while (done := progress(step, time.perf_counter() - began, steps, seconds)) < 1:
        loss = forward_backward(engine, *batches(step, 0, 1), step)
        engine.step(learning_rate(config.optimizer, step, done), step)
        step += 1
        yield loss


def held_out(engine: Engine, corpus: Corpus) -> float:
    """Bits per byte of held-out text."""
    config = engine.config
    return bits_per_byte(engine, corpus, config.final_eval_tokens, config.seq_len, config.batch_size)
