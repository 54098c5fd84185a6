"""The default training run against the same architecture in plain PyTorch: equal wall time, data, optimizer and schedule.

The figure is bits per byte on the held-out text after that time. One run after the other, in one process.
"""

import math
import time
from typing import Any

import torch
from torch import nn

from bench.plain_model import PlainDecoder
from llmcore import models
from llmcore.data import Batches, Corpus, gather, load_corpus, validation_windows
from llmcore.train.config import TrainConfig, model_config
from llmcore.train.machine import use_bf16
from llmcore.train.optimizer import build_optimizer
from llmcore.train.schedule import learning_rate, progress


class Plain(nn.Module):
    def __init__(self, config: models.ModelConfig) -> None:
        super().__init__()
        self.decoder = PlainDecoder(config)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> models.decoder.DecoderOutput:
        return models.decoder.DecoderOutput(loss=self.decoder(x, y))


@torch.no_grad()
def bits_per_byte(model: nn.Module, corpus: Corpus, config: TrainConfig) -> float:
    windows = validation_windows(corpus.valid, config.seq_len, config.final_eval_tokens)
    total = 0.0
    for i in range(0, len(windows), config.batch_size):
        inputs, targets = gather(corpus.valid, windows[i : i + config.batch_size], config.seq_len)
        total += model(inputs, targets).loss.item() * len(inputs)
    return total / len(windows) / math.log(2)


def train(model: nn.Module, config: TrainConfig, corpus: Corpus, bf16: bool, seconds: float) -> tuple[int, float]:
    """Trains for `seconds`; returns the steps made and the held-out bits per byte."""
    optimizer = build_optimizer(model, config.optimizer)
    batches = Batches(corpus.train, config.batch_size, config.seq_len, config.seed)
    step, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        inputs, targets = batches(step, 0, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(inputs, targets).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, progress(step, elapsed, None, seconds))
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return step, bits_per_byte(model, corpus, config)


def run(seconds: float) -> list[dict[str, Any]]:
    config = TrainConfig()
    corpus = load_corpus(config.data.train, config.data.valid)
    settings = model_config(config)
    bf16 = use_bf16(config.precision, torch.device("cpu"))
    records = []
    for name, low in (("llmcore", bf16), ("plain PyTorch", bf16), ("plain PyTorch", not bf16)):
        torch.manual_seed(config.seed)
        ours = models.build(settings)
        model: nn.Module = ours
        if name != "llmcore":
            plain = Plain(settings)
            plain.decoder.load_state_dict(ours.state_dict())
            model = plain
        steps, bits = train(model, config, corpus, low, seconds)
        record = {
            "candidate": f"{name} {'bf16' if low else 'fp32'}",
            "seconds": seconds,
            "steps": steps,
            "tokens": steps * config.batch_size * config.seq_len,
            "held-out bits per byte": round(bits, 4),
        }
        records.append(record)
        print("  ".join(f"{k}: {v}" for k, v in record.items()), flush=True)
    return records
