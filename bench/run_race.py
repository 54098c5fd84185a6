"""The default training run against the same architecture in plain PyTorch: equal time, data, optimizer and schedule.

The figure is bits per byte on the held-out text after that time. One run after the other, in one process.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bench.plain_model import PlainTwin
from bench.training import train
from llmcore import models
from llmcore.data import load_corpus
from llmcore.train.config import TrainConfig, model_config
from llmcore.train.distributed import World
from llmcore.train.machine import use_bf16
from train_minimal import bits_per_byte


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
        steps = sum(1 for _ in train(model, config, corpus, low, None, seconds))
        world = World(0, 1, torch.device("cpu"))
        bits = bits_per_byte(model, corpus, config.final_eval_tokens, config.seq_len, config.batch_size, world)
        record = {
            "candidate": f"{name} {'bf16' if low else 'fp32'}",
            "seconds": seconds,
            "steps": steps,
            "tokens": steps * config.batch_size * config.seq_len,
            "held-out bits per byte": round(bits, 4),
        }
        print("  ".join(f"{k}: {v}" for k, v in record.items()), flush=True)
        yield record
