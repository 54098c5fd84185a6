"""Loss curves of llmcore and of the same model in plain PyTorch: the same data, weights, seed and schedule.

Two runs that differ only in the order of rounding part after a while, as training amplifies any difference. So there
is a third run, plain PyTorch from weights moved by one unit in the last place: what it strays from plain PyTorch is
what nobody can tell apart.
"""

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.plain_model import PlainTwin
from bench.training import engine_for, held_out, train
from llmcore import models
from llmcore.data import load_corpus
from llmcore.train.config import TrainConfig, model_config
from llmcore.train.machine import use_bf16

CANDIDATES = ("llmcore", "plain PyTorch", "plain PyTorch, one ulp away")
EVERY = 10  # steps of which the mean loss is kept


def moved_by_one_ulp(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every weight one representable number up or down, at random."""
    generator = torch.Generator().manual_seed(seed)
    upwards = {n: torch.randint(2, w.shape, generator=generator) * 2 - 1 for n, w in weights.items()}
    return {n: torch.nextafter(w, upwards[n] * torch.full_like(w, torch.inf)) for n, w in weights.items()}


def run(steps: int, done: set[str], config: TrainConfig | None = None) -> Iterator[dict[str, Any]]:
    """A record for each run that is not done: the loss, a mean over EVERY steps each, and held-out bits per byte."""
    config = config or TrainConfig()
    corpus, settings = load_corpus(config.data.train, config.data.valid), model_config(config)
    for bf16 in (False, True) if use_bf16("auto", torch.device("cpu")) else (False,):
        for candidate in CANDIDATES:
            name = f"{candidate}, {'bf16' if bf16 else 'fp32'}"
            if name in done:
                continue
            torch.manual_seed(config.seed)
            model: nn.Module = models.build(settings)
            if candidate != "llmcore":
                weights = model.state_dict()
                away = moved_by_one_ulp(weights, config.seed) if candidate.endswith("away") else weights
                model = PlainTwin(settings, away)
            engine = engine_for(model, config, bf16)
            losses = [float(loss) for loss in train(engine, corpus, steps, None)]
            means = [round(statistics.fmean(losses[i : i + EVERY]), 5) for i in range(0, steps, EVERY)]
            bits = held_out(engine, corpus)
            print(f"{name:40} {steps} steps, last loss {means[-1]:.4f}, held-out bits per byte {bits:.4f}", flush=True)
            yield {
                "candidate": candidate,
                "name": name,
                "precision": "bf16" if bf16 else "fp32",
                "steps": steps,
                "every": EVERY,
                "loss": means,
                "held-out bits per byte": round(bits, 4),
            }
