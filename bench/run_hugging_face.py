"""A training step of the state-space models against Hugging Face's on the same weights, in one run.

Hugging Face's models run as they do without mamba-ssm, causal-conv1d and a GPU: in plain PyTorch, eager.
"""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.run_step import step_of
from bench.timing import interleaved
from llmcore import models
from llmcore.data import Batches, load_corpus
from llmcore.train.config import TrainConfig

PRESETS = ("tiny_mamba", "tiny_mamba2")
# Of logits, relative to the largest: two float32 computations of the same sums in another order.
AGREEMENT = 1e-4


class Theirs(torch.nn.Module):
    """A Hugging Face model with the same weights, called as llmcore's is: its loss, with targets already shifted."""

    def __init__(self, model: models.Decoder) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        logging.getLogger("transformers").setLevel(logging.ERROR)
        with tempfile.TemporaryDirectory() as folder:
            models.save(model, Path(folder) / "model", format="hugging_face")
            self.model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model")
        self.train()

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model(tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().long())


def run(presets: tuple[str, ...] = PRESETS, batch_size: int = 0, seq_len: int = 0) -> Iterator[dict[str, Any]]:
    """Seconds per step in float32; batch and length are those of the default run where none are given."""
    config = TrainConfig()
    corpus = load_corpus(config.data.train, config.data.valid)
    B, T = batch_size or config.batch_size, seq_len or config.seq_len
    batch = Batches(corpus.train, B, T, config.seed)(0, 0, 1)
    for preset in presets:
        torch.manual_seed(0)
        ours = models.build(models.ModelConfig.from_preset(preset))
        theirs = Theirs(ours)
        with torch.no_grad():
            a, b = ours(batch[0]).logits, theirs.model(batch[0], use_cache=False).logits
        apart = ((a - b).abs().max() / a.abs().max()).item()
        if apart > AGREEMENT:
            raise RuntimeError(f"{preset}: the two models' logits differ by {apart:.1e} of the largest")
        candidates = {
            "llmcore": step_of(ours, config, False, False, batch),
            "transformers": step_of(theirs, config, False, True, batch),
        }
        timings, ratios = interleaved(candidates, rounds=5, round_seconds=0.01)
        milliseconds = {n: round(t.median * 1e3, 2) for n, t in timings.items()}
        print(f"{preset:12} " + "  ".join(f"{n} {m} ms" for n, m in milliseconds.items()), flush=True)
        yield {
            "model": preset, "batch": B, "length": T, "precision": "fp32", "logits apart": apart,
            "milliseconds": milliseconds, "times faster than": {"transformers": round(ratios["transformers"], 2)},
        }  # fmt: skip
