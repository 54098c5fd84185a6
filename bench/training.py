"""The default run's training loop for models that are compared: the same batches, optimizer and schedule for each."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from llmcore.data import Batches, Corpus
from llmcore.train.config import TrainConfig
from llmcore.train.optimizer import build_optimizer
from llmcore.train.schedule import learning_rate, progress
from train_minimal import forward_backward


def train(
    model: nn.Module, config: TrainConfig, corpus: Corpus, bf16: bool, steps: int | None, seconds: float | None
) -> Iterator[Tensor]:
    """Makes steps up to either limit and yields the loss of each."""
    optimizer = build_optimizer(model, config.optimizer)
    batches = Batches(corpus.train, config.batch_size, config.seq_len, config.seed)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    step, began = 0, time.perf_counter()
    while (done := progress(step, time.perf_counter() - began, steps, seconds)) < 1:
        inputs, targets = batches(step, 0, 1)
        loss = forward_backward(model, inputs, targets, config.batch_size, autocast)
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.set_learning_rate(learning_rate(config.optimizer, step, done))
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        yield loss
