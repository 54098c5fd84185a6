"""`llmcore plot RUN ...`: the curves of runs, from their log.jsonl, as a picture."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

CURVES = {
    "loss": "training loss, nats per token", "val_bpb": "held-out text, bits per byte", "lr": "learning rate",
    "grad_norm": "gradient norm", "tokens_per_second": "tokens a second", "tflops": "TFLOP/s",
    "mfu": "MFU, share of the peak", "memory_gb": "largest memory, GB", "routing_loss": "loss that balances experts",
    "expert_load": "largest load of an expert / mean", "expert_entropy": "entropy of the loads / largest",
}  # fmt: skip


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("plot", help="draw the curves of training runs to a PNG file")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, drawn over each other")
    parser.add_argument("--out", type=Path, help="the file to write; RUN/curves.png of the first run by default")
    parser.set_defaults(run=run)


def read(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name; where a run was resumed, what it wrote last of a step. Raises ValueError."""
    path = run / "log.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{run} is no run: {path} cannot be read ({error.strerror}).") from None
    found: dict[str, dict[int, float]] = {name: {} for name in CURVES}
    for number, line in enumerate(lines, start=1):
        try:
            values: dict[str, Any] = json.loads(line)
        except ValueError:
            if number == len(lines):  # the run was cut off while it wrote
                break
            raise ValueError(f"{path} is damaged: line {number} is not the JSON that was written.") from None
        for name in CURVES:
            if isinstance(values.get(name), int | float):
                found[name][values["step"]] = values[name]
    return {name: sorted(points.items()) for name, points in found.items() if points}


def run(options: argparse.Namespace) -> int:
    try:
        curves = {path: read(path) for path in options.runs}
        if not any(curves.values()):
            raise ValueError(f"{options.runs[0]} has nothing to draw yet: no step has been logged.")
        import matplotlib
    except ImportError:
        print("llmcore plot: matplotlib is not installed: pip install 'llmcore[bench]'.", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"llmcore plot: {error}", file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in CURVES if any(name in found for found in curves.values())]
    figure, axes = plt.subplots(2, -(-len(names) // 2), figsize=(10, 5.5), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        for path, found in curves.items():
            if name in found:
                axis.plot(*zip(*found[name], strict=True), label=path.name, linewidth=1.2)
        axis.set_title(CURVES[name], fontsize=9, loc="left")
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=8)
    out = options.out or options.runs[0] / "curves.png"
    try:
        figure.savefig(out, dpi=120)
    except OSError as error:
        print(f"llmcore plot: {out} cannot be written: {error.strerror}.", file=sys.stderr)
        return 2
    print(f"written: {out}")
    return 0
