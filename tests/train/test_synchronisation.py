"""A GPU would be waited for at most once per line of the log: nothing else fetches a value from the device."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_minimal
from llmcore.models import Decoder
from llmcore.train.progress import Meter

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"}


class Fetches(TorchDispatchMode):
    """Counts what would make a GPU's caller wait."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.__name__.split(".")[0]
        if name in WAITS:
            self.names.append(name)
        return function(*arguments, **(options or {}))


OPTIONS = {
    "plain": [],
    "fp16": ["--precision", "fp16"],
    "muon": ["--optimizer.kind", "muon"],
    "average, dropout, accumulation": [
        "--ema_decay", "0.9", "--model.dropout", "0.1", "--batch_size", "2", "--gradient_accumulation", "2"
    ],
    "recomputed": ["--activation_checkpointing", "all"],
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_is_fetched_between_two_lines(options: list[str], small: list[str], tmp_path: Path, monkeypatch):
    fetches, found, lines = Fetches(), [], []
    forward_backward, read, to_list = train_minimal.forward_backward, Meter.read, torch.Tensor.tolist

    def watched(*arguments):
        if not lines and not found:
            fetches.__enter__()
        found.append(len(fetches.names))
        return forward_backward(*arguments)

    def line(*arguments):
        lines.append(len(fetches.names))
        return read(*arguments)

    def counted(tensor: torch.Tensor):
        fetches.names.append("tolist")
        return to_list(tensor)

    monkeypatch.setattr(Decoder, "_check", lambda *_: None)  # looks at values on the CPU only
    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    monkeypatch.setattr(train_minimal, "forward_backward", watched)
    monkeypatch.setattr(Meter, "read", line)
    monkeypatch.setattr(train_minimal, "bits_per_byte", lambda *_: 1.0)
    try:
        intervals = ["--log_interval", "5", "--max_steps", "10", "--eval_interval", "0", "--checkpoint_interval", "0"]
        assert train_minimal.main([*small, *options, *intervals, "--sample.tokens", "0", "--name", "a"]) == 0
    finally:
        fetches.__exit__(None, None, None)
    assert len(found) == 10 and len(lines) == 2
    assert lines[0] == 0 and found[4] == 0, fetches.names
    assert found[5] == found[9] == lines[1] <= 2, "the figures of a line, and the guard's, which are ready then"
