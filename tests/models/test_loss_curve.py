"""The kernels and plain PyTorch train alike: the same loss curve from the same start, step by step."""

import sys
from pathlib import Path

import pytest
import torch

import llmcore
from llmcore.models import ModelConfig, build

STEPS = 200


def curve(backend, dtype):
    """Losses of 200 AdamW steps on real text (this Python's own argparse and inspect modules)."""
    text = b"".join(
        (Path(sys.modules["os"].__file__).parent / f"{name}.py").read_bytes() for name in ("argparse", "inspect")
    )
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    torch.manual_seed(0)
    model = build(ModelConfig.from_preset("tiny", num_hidden_layers=2, num_key_value_heads=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with llmcore.backend(backend):
        for step in range(STEPS):
            starts = torch.randint(0, len(tokens) - 97, (4,), generator=torch.Generator().manual_seed(step))
            rows = torch.stack([tokens[s : s + 97] for s in starts])
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(rows[:, :-1], rows[:, 1:]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-3), pytest.param(torch.bfloat16, 2e-2, marks=pytest.mark.slow)],
    ids=["float32", "bfloat16"],
)
def test_same_loss_curve_over_200_steps(dtype, tolerance):
    from llmcore.ops._dispatch import missing

    if missing("attention", "cpu", "cpu") is not None:
        pytest.skip("the cpu kernels are not built, so there is nothing to compare with PyTorch")
    kernels, plain = curve("cpu", dtype), curve("torch", dtype)
    assert plain[-20:].mean() < plain[:5].mean() - 2
    difference = (kernels - plain).abs().max().item()
    assert difference < tolerance, f"largest difference {difference}"
