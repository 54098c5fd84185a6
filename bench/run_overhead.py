"""What an operator costs before its kernel starts: microseconds per eager call on tensors too small to matter."""

from typing import Any

import torch
import torch.nn.functional as F

import llmcore
from bench.timing import interleaved
from llmcore import ops


def run() -> list[dict[str, Any]]:
    """rms_norm of (4, 64), one thread: without gradients, forward with gradients, forward and backward."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, w = torch.randn(4, 64), torch.randn(64)
    xg, wg, one = x.clone().requires_grad_(), w.clone().requires_grad_(), torch.ones(4, 64)

    def forced(x, w):
        with llmcore.backend("cpu"):
            return ops.rms_norm(x, w)

    functions = {
        "llmcore": ops.rms_norm,
        "llmcore, backend forced": forced,
        "F.rms_norm": lambda x, w: F.rms_norm(x, (64,), w, 1e-6),
    }
    records = []
    for what, call in (
        ("no gradients", lambda f: lambda: f(x, w)),
        ("forward", lambda f: lambda: f(xg, wg)),
        ("forward + backward", lambda f: lambda: torch.autograd.grad(f(xg, wg), (xg, wg), one)),
    ):
        timings, _ = interleaved({name: call(f) for name, f in functions.items()}, round_seconds=0.05)
        record: dict[str, Any] = {
            "pass": what,
            "microseconds": {n: round(t.median * 1e6, 1) for n, t in timings.items()},
        }
        records.append(record)
        print(f"{what:20} " + "  ".join(f"{n} {t}" for n, t in record["microseconds"].items()))
    torch.set_num_threads(threads)
    return records
