"""The kernels and plain PyTorch train alike: the same loss curve from the same start, step by step."""

import sys
from pathlib import Path

import pytest
import torch

import llmcore
from llmcore.models import ModelConfig, build
from llmcore.ops._dispatch import missing

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


def rms(differences):
    return differences.square().mean().sqrt().item()


needs_kernels = pytest.mark.skipif(
    missing("attention", "cpu", "cpu") is not None, reason="the cpu kernels are not built: nothing to compare"
)


@needs_kernels
def test_same_loss_curve_over_200_steps():
    kernels, plain = curve("cpu", torch.float32), curve("torch", torch.float32)
    assert plain[-20:].mean() < plain[:5].mean() - 2
    difference = (kernels - plain).abs().max().item()
    assert difference < 2e-3, f"largest difference {difference}"


@needs_kernels
@pytest.mark.slow
def test_bfloat16_stays_as_near_to_float32_as_plain_pytorch():
    """In bfloat16 two curves part after some hundred steps whatever computes them; each is held against float32."""
    kernels, plain = curve("cpu", torch.bfloat16), curve("torch", torch.bfloat16)
    exact = curve("torch", torch.float32)
    assert rms(kernels - exact) <= 2 * rms(plain - exact) + 2e-3
