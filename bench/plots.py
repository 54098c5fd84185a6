"""Plots of a folder of records; each is left out where its record is missing."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
COLORS = {
    "llmcore": "#111111", "eager": "#4c72b0", "plain PyTorch": "#4c72b0", "torch.compile": "#dd8452",
    "transformers": "#55a868", "SDPA flash": "#4c72b0", "SDPA cuDNN": "#c44e52", "FlexAttention": "#8172b3",
    "Liger": "#937860", "flash-linear-attention": "#da8bc3", "flash-attn": "#8c8c8c", "flash-attn 3": "#ccb974",
    "xformers": "#64b5cd", "mamba-ssm": "#2f7f5f", "plain PyTorch, one ulp away": "#9fb8d9",
}  # fmt: skip
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}
PASSES = ("forward", "forward + backward")


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.titlesize": 9, "axes.titlelocation": "left", "legend.fontsize": 7})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    return plt


def panels(count: int, columns: int, height: float = 2.6) -> tuple[Any, list[Any]]:
    """A figure of so many panels; those left over are hidden."""
    columns = min(columns, count)
    lines = -(-count // columns)
    size = (4.0 * columns + 0.5, height * lines + 0.6)
    figure, axes = pyplot().subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for unused in axes.flat[count:]:
        unused.set_visible(False)
    return figure, list(axes.flat[:count])


def legend(figure: Any, axes: Iterable[Any]) -> None:
    """One legend for all panels."""
    found = {label: handle for a in axes for handle, label in zip(*a.get_legend_handles_labels(), strict=True)}
    columns = max(1, int(figure.get_figwidth() / 2.1))
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns)


def finish(figure: Any, title: str, path: Path) -> Path:
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot().close(figure)
    return path


def candidates_in(rows: Rows, field: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row[field]))


def grouped(rows: Rows, key: Callable[[dict[str, Any]], Any]) -> dict[Any, Rows]:
    groups: dict[Any, Rows] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def lines(axis: Any, rows: Rows, x: str, field: str, factor: float = 1.0) -> None:
    """A line for each candidate, over the rows in order of x."""
    for name in candidates_in(rows, field):
        points = sorted((row[x], row[field][name] * factor) for row in rows if name in row[field])
        style = {"linewidth": 3.0, "alpha": 0.8} if name == "llmcore" else {"linewidth": 1.2, "linestyle": "--"}
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=COLORS.get(name), label=name, **style)


def powers(axis: Any, values: Iterable[int]) -> None:
    """A logarithmic x axis that names the values measured."""
    values = sorted(set(values))
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [f"{v // 1024}k" if v >= 1024 and v % 1024 == 0 else str(v) for v in values])
    axis.minorticks_off()


def ratios(rows: Rows, title: str, path: Path) -> Path:
    """How many times faster than eager PyTorch and torch.compile, a panel for each op."""
    by_op = grouped(rows, lambda row: row["op"])
    heights = [len(own) for own in by_op.values()]
    figure, axes = pyplot().subplots(
        len(by_op), 1, figsize=(9, 0.22 * sum(heights) + 1.2 * len(by_op)), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axis, (op, own) in zip(axes[:, 0], by_op.items(), strict=True):
        for offset, peer in ((-0.2, "eager"), (0.2, "torch.compile")):
            found = [(i + offset, row["times faster than"].get(peer)) for i, row in enumerate(own)]
            places = [(place, value - 1) for place, value in found if value is not None]
            if places:
                axis.barh(*zip(*places, strict=True), left=1, height=0.4, color=COLORS[peer], label=f"than {peer}")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log")
        values = [v for row in own for v in row["times faster than"].values()]
        axis.set_xlim(min(0.8, 0.9 * min(values)), 1.1 * max(values))
        ticks = [t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if axis.get_xlim()[0] <= t <= axis.get_xlim()[1]]
        axis.set_xticks(ticks, [f"{t:g}×" for t in ticks])
        axis.minorticks_off()
        axis.set_yticks(range(len(own)), [f"{r['case']}, {r['pass']}" for r in own], fontsize=6)
        axis.set_ylim(len(own) - 0.4, -0.6)
        axis.set_title(f"{op}: times faster")
    axes[0, 0].legend()
    return finish(figure, title, path)


def throughput(rows: Rows, title: str, path: Path) -> Path | None:
    """Attention: FLOP a second by length."""
    by_panel = grouped(
        [row for row in rows if row["op"] == "attention"], lambda r: (r["dtype"], r["head_dim"], r["causal"], r["pass"])
    )
    chosen = {k: v for k, v in by_panel.items() if len({r["length"] for r in v}) > 1}
    if not chosen:
        return None
    large = max(max(r["GFLOP/s"].values()) for own in chosen.values() for r in own) > 10_000
    figure, axes = panels(len(chosen), 2)
    for axis, ((dtype, D, causal, direction), own) in zip(axes, chosen.items(), strict=True):
        best = {r["length"]: r for r in sorted(own, key=lambda r: -r["bytes"])}  # equal heads before grouped ones
        lines(axis, list(best.values()), "length", "GFLOP/s", 1e-3 if large else 1.0)
        powers(axis, best)
        axis.set_ylim(bottom=0)
        axis.set_title(f"attention {SHORT[dtype]}, D = {D}, {'causal' if causal else 'full'}, {direction}")
        axis.set_xlabel("tokens")
        axis.set_ylabel("TFLOP/s" if large else "GFLOP/s")
    legend(figure, axes)
    return finish(figure, title, path)


def bandwidth(rows: Rows, title: str, path: Path) -> Path | None:
    """The ops bound by memory: share of the copy's bandwidth by width."""
    chosen = grouped(
        [row for row in rows if "width" in row and row["bound by"] == "memory"],
        lambda r: (r["op"] + (" + residual" if r.get("residual") else ""), r["dtype"], r["pass"]),
    )
    if not chosen:
        return None
    figure, axes = panels(len(chosen), 4, 2.3)
    for axis, ((op, dtype, direction), own) in zip(axes, chosen.items(), strict=True):
        lines(axis, own, "width", "share of the ceiling")
        powers(axis, [r["width"] for r in own])
        axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
        axis.set_ylim(bottom=0)
        axis.set_title(f"{op} {SHORT[dtype]}, {direction}")
        axis.set_xlabel("columns")
        axis.set_ylabel("share of a copy's bandwidth")
    legend(figure, axes)
    return finish(figure, title, path)


def roofline(rows: Rows, ceilings: dict[str, Any], title: str, path: Path) -> Path:
    """Every row of llmcore under the two ceilings: a copy's bandwidth, and a matrix product."""
    dtypes = [d for d in SHORT if any(row["dtype"] == d for row in rows)]
    figure, axes = panels(len(dtypes), 2, 3.2)
    marks = {"forward": "o", "forward + backward": "^"}
    ops = list(dict.fromkeys(row["op"] for row in rows))
    for axis, dtype in zip(axes, dtypes, strict=True):
        own = [row for row in rows if row["dtype"] == dtype]
        product, copy = ceilings["matrix product GFLOP/s"][dtype], ceilings["copy GB/s"]
        intensities = [row["flops"] / row["bytes"] for row in own]
        low, high = min(0.1, *intensities) / 2, max(product / copy, *intensities) * 4
        axis.plot([low, product / copy, high], [low * copy, product, product], color="black", linewidth=1)
        axis.text(high, product, f"matrix product {product:,.0f} GFLOP/s", ha="right", va="bottom", fontsize=7)
        axis.text(low * 2, low * copy * 1.3, f"copy {copy:.0f} GB/s", va="top", fontsize=7)
        for i, op in enumerate(ops):
            for direction, mark in marks.items():
                points = [
                    (r["flops"] / r["bytes"], r["GFLOP/s"]["llmcore"])
                    for r in own
                    if r["op"] == op and r["pass"] == direction
                ]
                if points:
                    x, y = zip(*points, strict=True)
                    axis.scatter(x, y, s=16, marker=mark, color=f"C{i}", alpha=0.7, label=f"{op}, {direction}")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("FLOP per byte")
        axis.set_ylabel("GFLOP/s")
        axis.set_title(SHORT[dtype])
    legend(figure, axes)
    return finish(figure, title, path)


def memory(rows: Rows, title: str, path: Path) -> Path | None:
    """Peak memory beyond the inputs, forward + backward, over what llmcore needs."""
    chosen = [
        row
        for row in rows
        if row["pass"] == PASSES[1] and row.get("peak MiB", {}).get("llmcore", 0) >= 1 and len(row["peak MiB"]) > 1
    ]
    if not chosen:
        return None
    by_op = grouped(chosen, lambda row: row["op"])
    figure, axes = panels(len(by_op), 2, 3.0)
    for axis, (op, own) in zip(axes, by_op.items(), strict=True):
        names = candidates_in(own, "peak MiB")
        for i, name in enumerate(names):
            places = [
                (j + (i - len(names) / 2) * 0.8 / len(names), r["peak MiB"][name])
                for j, r in enumerate(own)
                if name in r["peak MiB"]
            ]
            x, y = zip(*places, strict=True)
            axis.bar(x, y, width=0.8 / len(names), align="edge", color=COLORS.get(name), label=name)
        axis.set_xticks(range(len(own)), [r["case"] for r in own], rotation=40, ha="right", fontsize=5)
        axis.set_ylabel("MiB beyond the inputs")
        axis.set_title(f"{op}, {PASSES[1]}")
    legend(figure, axes)
    return finish(figure, title, path)


def scaling(rows: Rows, title: str, path: Path) -> Path:
    figure, (axis,) = panels(1, 1, 3.0)
    lines(axis, rows, "threads", "tokens per second")
    powers(axis, [row["threads"] for row in rows])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("threads")
    axis.set_ylabel("tokens a second")
    axis.set_title(f"a training step of tiny, {rows[0]['precision']}")
    axis.legend()
    return finish(figure, title, path)


def lengths(rows: Rows, title: str, path: Path) -> Path:
    """What a token costs by the length of its sequence: a level line is a cost that grows as the length does."""
    figure, axes = panels(len(PASSES), 2, 3.0)
    for axis, direction in zip(axes, PASSES, strict=True):
        for op, own in grouped(rows, lambda row: row["op"]).items():
            points = sorted((row["length"], row["nanoseconds a token"][direction]) for row in own)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=op)
        powers(axis, [row["length"] for row in rows])
        axis.set_yscale("log")
        axis.set_xlabel("tokens in the sequence")
        axis.set_ylabel("nanoseconds a token")
        axis.set_title(f"256 channels, fp32, {direction}")
    legend(figure, axes)
    return finish(figure, title, path)


def errors(rows: Rows, title: str, path: Path) -> Path:
    """Error against float64 by size, in epsilons of the dtype: the worst of the outputs, and of the gradients."""
    chosen = grouped(rows, lambda r: (r["op"], r["dtype"], "gradients" if "gradient" in r["value"] else "outputs"))
    figure, axes = panels(len(chosen), 6, 2.2)
    for axis, ((op, dtype, kind), own) in zip(axes, chosen.items(), strict=True):
        epsilon = EPSILON[dtype]
        worst = [
            {
                "size": size,
                "rms": {n: max(r["rms"].get(n, 0.0) for r in same) / epsilon for n in candidates_in(same, "rms")},
            }
            for size, same in grouped(own, lambda r: r["size"]).items()
        ]
        lines(axis, worst, "size", "rms")
        powers(axis, [row["size"] for row in worst])
        axis.set_ylim(bottom=0)
        axis.set_title(f"{op} {SHORT[dtype]}, {kind}")
        axis.set_ylabel("rms error, epsilons")
    legend(figure, axes)
    return finish(figure, title, path)


def beside_plain(rows: Rows) -> Rows:
    """The curves in a precision in which plain PyTorch's has been measured too."""
    known = {row["precision"] for row in rows if row["candidate"] == "plain PyTorch"}
    return [row for row in rows if row["precision"] in known]


def curves(rows: Rows, title: str, path: Path) -> Path | None:
    """The losses, and how far each strays from plain PyTorch."""
    by_precision = grouped(beside_plain(rows), lambda r: r["precision"])
    if not by_precision:
        return None
    figure, axes = panels(2 * len(by_precision), 2, 2.8)
    for i, (precision, own) in enumerate(by_precision.items()):
        loss, apart = axes[2 * i], axes[2 * i + 1]
        plain = next(r for r in own if r["candidate"] == "plain PyTorch")
        for row in own:
            steps = [row["every"] * (j + 1) for j in range(len(row["loss"]))]
            style = {"color": COLORS[row["candidate"]], "label": row["candidate"], "linewidth": 1.0}
            loss.plot(steps, row["loss"], **style)
            if row is not plain:
                apart.plot(steps, [a - b for a, b in zip(row["loss"], plain["loss"], strict=True)], **style)
        loss.set_title(f"training loss of tiny, {precision}, means of {plain['every']} steps")
        apart.set_title("loss minus plain PyTorch's")
        for axis in (loss, apart):
            axis.set_xlabel("steps")
    legend(figure, axes)
    return finish(figure, title, path)
