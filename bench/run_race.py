"""The default training run against the same architecture in plain PyTorch: equal time, data, optimizer and schedule.

The figure is bits per byte on the held-out text after that time. One run after the other, in one process.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bench.plain_model import PlainTwin
from bench.training import engine_for, held_out, train
from llmcore import models
from llmcore.data import load_corpus
from llmcore.train.config import TrainConfig, model_config
from llmcore.train.machine import use_bf16


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
        engine = engine_for(model, config, low)
        steps = sum(1 for _ in train(engine, corpus, None, seconds))
        record = {
            "candidate": f"{name} {'bf16' if low else 'fp32'}",
            "seconds": seconds,
            "steps": steps,
            "tokens": steps * config.batch_size * config.seq_len,
            "held-out bits per byte": round(held_out(engine, corpus), 4),
        }
        print("  ".join(f"{k}: {v}" for k, v in record.items()), flush=True)
        yield record
