"""A training step of the default model against the same model in plain PyTorch, eager and compiled, in one run."""

from typing import Any

import torch
from torch import nn

from bench.plain_model import PlainDecoder
from bench.timing import interleaved
from llmcore import models
from llmcore.data import Batches, load_corpus
from llmcore.train.config import TrainConfig, model_config
from llmcore.train.machine import use_bf16
from llmcore.train.optimizer import build_optimizer


def step_of(model: Any, config: TrainConfig, bf16: bool, plain: bool, batch: tuple[torch.Tensor, torch.Tensor]):
    optimizer = build_optimizer(model, config.optimizer)
    optimizer.set_learning_rate(0.0)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(*batch) if plain else model(*batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def run() -> list[dict[str, Any]]:
    """Seconds per step; the peers run as llmcore does (its choice of bf16), and in the other precision."""
    config = TrainConfig()
    settings = model_config(config)
    corpus = load_corpus(config.data.train, config.data.valid)
    batch = Batches(corpus.train, config.batch_size, config.seq_len, config.seed)(0, 0, 1)
    ours = models.build(settings)
    peers = {name: PlainDecoder(settings) for name in ("eager", "compiled", "other precision")}
    for peer in peers.values():
        peer.load_state_dict(ours.state_dict())
    bf16 = use_bf16(config.precision, torch.device("cpu"))
    label = {True: "bf16", False: "fp32"}
    difference = abs(ours(*batch).loss.item() - peers["eager"](*batch).item())
    if difference > 1e-4:
        raise RuntimeError(f"the two models' losses differ by {difference}")
    candidates = {
        f"llmcore {label[bf16]}": step_of(ours, config, bf16, False, batch),
        f"plain PyTorch {label[bf16]}": step_of(peers["eager"], config, bf16, True, batch),
        f"plain PyTorch {label[bf16]}, torch.compile": step_of(
            torch.compile(peers["compiled"]), config, bf16, True, batch
        ),
        f"plain PyTorch {label[not bf16]}": step_of(peers["other precision"], config, not bf16, True, batch),
    }
    timings, ratios = interleaved(candidates, rounds=9, round_seconds=0.01)
    records = [
        {"candidate": n, "milliseconds": round(t.median * 1e3, 2), "llmcore is faster by": round(ratios[n], 3)}
        for n, t in timings.items()
    ]
    for record in records:
        print(f"{record['candidate']:40} {record['milliseconds']:9.1f} ms   {record['llmcore is faster by']:.2f}x")
    return records
