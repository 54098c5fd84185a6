"""The default training run against the same architecture in plain PyTorch: equal time, data, optimizer and schedule.

The figure is bits per byte on the held-out text after that time. One run after the other, in one process.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bench.plain_model import PlainTwin
from llmcore import models
from llmcore.data import Batches, Corpus, load_corpus
from llmcore.train.config import TrainConfig, model_config
from llmcore.train.distributed import World
from llmcore.train.machine import use_bf16
from llmcore.train.optimizer import build_optimizer
from llmcore.train.schedule import learning_rate, progress
from train_minimal import bits_per_byte, forward_backward


def train(model: nn.Module, config: TrainConfig, corpus: Corpus, bf16: bool, seconds: float) -> tuple[int, float]:
    """Trains for `seconds`; returns the steps made and the held-out bits per byte."""
    optimizer = build_optimizer(model, config.optimizer)
    batches = Batches(corpus.train, config.batch_size, config.seq_len, config.seed)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    step, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        inputs, targets = batches(step, 0, 1)
        forward_backward(model, inputs, targets, config.batch_size, autocast)
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.set_learning_rate(learning_rate(config.optimizer, step, progress(step, elapsed, None, seconds)))
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    world = World(0, 1, torch.device("cpu"))
    return step, bits_per_byte(model, corpus, config.final_eval_tokens, config.seq_len, config.batch_size, world)


def run(seconds: float) -> Iterator[dict[str, Any]]:
    config = TrainConfig()
    corpus = load_corpus(config.data.train, config.data.valid)
    settings = model_config(config)
    bf16 = use_bf16(config.precision, torch.device("cpu"))
    for name, low in (("llmcore", bf16), ("plain PyTorch", bf16), ("plain PyTorch", not bf16)):
        torch.manual_seed(config.seed)
        model: nn.Module = models.build(settings)
        if name != "llmcore":
            model = PlainTwin(settings, model.state_dict())
        steps, bits = train(model, config, corpus, low, seconds)
        record = {
            "candidate": f"{name} {'bf16' if low else 'fp32'}",
            "seconds": seconds,
            "steps": steps,
            "tokens": steps * config.batch_size * config.seq_len,
            "held-out bits per byte": round(bits, 4),
        }
        print("  ".join(f"{k}: {v}" for k, v in record.items()), flush=True)
        yield record
