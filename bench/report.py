"""The report of a folder of records: report.md with every row, plots, and the tables in the READMEs.

A README names the folder in a comment and everything up to the closing comment is generated:
<!-- figures: FOLDER --> ... <!-- /figures -->
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.compare import read

PASSES = ("forward", "forward + backward")
PEERS = ("eager", "torch.compile")
WORDS = {
    "README.md": {
        "where": "{processor}, {threads} threads, {kernels} kernels, PyTorch {torch}, {date}.",
        "ops": "op, times faster than", "forward": "forward", "forward + backward": "fwd + bwd",
        "step": "a training step of `tiny`, 8 × 256 tokens", "faster": "llmcore is faster by",
        "race": "equal wall time, {seconds:.0f} s", "tokens": "tokens", "bits": "held-out bits per byte",
    },
    "README.zh.md": {
        "where": "{processor}，{threads} 线程，{kernels} 内核，PyTorch {torch}，{date}。",
        "ops": "算子，快多少倍", "forward": "前向", "forward + backward": "前向 + 反向",
        "step": "`tiny` 的一个训练步，8 × 256 个 token", "faster": "llmcore 快",
        "race": "相同时间，{seconds:.0f} 秒", "tokens": "token 数", "bits": "留出文本，每字节比特数",
    },
}  # fmt: skip
MARKED = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- /figures -->)", re.DOTALL)
COLORS = {"eager": "#4c72b0", "torch.compile": "#dd8452"}


def measured(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in record["records"] if "microseconds" in row]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def dtype_of(row: dict[str, Any]) -> str:
    return {"float32": "fp32", "bfloat16": "bf16"}[row["case"].split()[-1]]


def figures(folder: Path, words: dict[str, str]) -> str:
    """The tables of a README."""
    ops, step, race = (read(folder / f"{name}.json") for name in ("ops", "step", "race"))
    ratios = defaultdict(list)
    for row in measured(ops):
        for peer in PEERS:
            if peer in row["times faster than"]:
                ratios[row["op"], dtype_of(row), peer, row["pass"]].append(row["times faster than"][peer])
    kinds = list(dict.fromkeys(key[:2] for key in ratios))
    columns = [(peer, direction) for peer in PEERS for direction in PASSES]
    body = []
    for op, dtype in kinds:
        ranges = [ratios[op, dtype, peer, direction] for peer, direction in columns]
        body.append([f"`{op}` {dtype}", *(f"{min(r):.2f}–{max(r):.2f}" for r in ranges)])
    machine = ops["machine"]
    where = words["where"].format(
        processor=machine["processor"], threads=machine["threads"], kernels=machine["cpu kernels"],
        torch=machine["torch"], date=machine["date"],
    )  # fmt: skip
    seconds = race["records"][0]["seconds"]
    return "\n".join(
        (
            where + "\n",
            table([words["ops"], *(f"{peer}, {words[direction]}" for peer, direction in columns)], body),
            table(
                [words["step"], "ms", words["faster"]],
                [
                    [r["candidate"], f"{r['milliseconds']:.1f}", f"{r['llmcore is faster by']:.2f}×"]
                    for r in step["records"]
                ],
            ),
            table(
                [words["race"].format(seconds=seconds), words["tokens"], words["bits"]],
                [[r["candidate"], f"{r['tokens']:,}", f"{r['held-out bits per byte']:.4f}"] for r in race["records"]],
            ),
        )
    )


def with_figures(text: str, words: dict[str, str], results: Path) -> str:
    """A README's text with its marked part made again from the records."""
    return MARKED.sub(lambda m: m[1] + figures(results / m[2], words) + m[3], text)


def rows_of(record: dict[str, Any]) -> str:
    """Every row as a table."""
    peers = list(dict.fromkeys(n for row in measured(record) for n in row["microseconds"]))
    body = []
    for row in measured(record):
        rates = row.get("GFLOP/s") or row.get("GB/s") or {}
        unit = "GFLOP/s" if "GFLOP/s" in row else "GB/s" if rates else ""
        share = row.get("share of matrix product", row.get("share of copy bandwidth"))
        body.append(
            [row["op"], row["case"], row["pass"]]
            + [f"{row['microseconds'][n]:.1f}" if n in row["microseconds"] else "–" for n in peers]
            + [f"{rates['llmcore']:.0f} {unit}" if rates else "–", f"{share:.2f}" if share is not None else "–"]
            + ["; ".join(f"{n}: {why}" for n, why in row.get("absent", {}).items())]
        )
    return table(
        ["op", "case", "pass", *(f"{n}, µs" for n in peers), "llmcore", "of the ceiling", "absent peers"], body
    )


def plot(record: dict[str, Any], path: Path) -> None:
    """How many times faster than each peer, a panel for each op."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = measured(record)
    ops = list(dict.fromkeys(row["op"] for row in rows))
    heights = [sum(row["op"] == op for row in rows) for op in ops]
    figure, panels = plt.subplots(
        len(ops), 1, figsize=(9, 0.22 * sum(heights) + 1.2 * len(ops)), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for panel, op in zip(panels[:, 0], ops, strict=True):
        own = [row for row in rows if row["op"] == op]
        for offset, peer in ((-0.2, "eager"), (0.2, "torch.compile")):
            places = [i + offset for i, row in enumerate(own) if peer in row["times faster than"]]
            values = [row["times faster than"][peer] for row in own if peer in row["times faster than"]]
            beyond = [value - 1 for value in values]
            panel.barh(places, beyond, left=1, height=0.4, color=COLORS[peer], label=f"than {peer}")
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_xlim(0.8, 20)
        panel.set_xticks([1, 2, 4, 8, 16], ["1×", "2×", "4×", "8×", "16×"])
        panel.set_yticks(range(len(own)), [f"{r['case']}, {r['pass']}" for r in own], fontsize=6)
        panel.set_ylim(len(own) - 0.4, -0.6)
        panel.set_title(f"{op}: times faster", fontsize=9, loc="left")
    panels[0, 0].legend(fontsize=7)
    machine = record["machine"]
    where = machine.get("gpu", f"{machine['processor']}, {machine['threads']} threads")
    figure.suptitle(f"{where}, PyTorch {machine['torch']}, {machine['date']}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(root: Path, results: Path) -> int:
    for folder in sorted(path.parent for path in results.glob("*/ops.json")):
        record = read(folder / "ops.json")
        facts = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
        ceilings = [json.dumps(r["ceilings"]) for r in record["records"] if "ceilings" in r]
        text = "\n\n".join([f"# {folder.name}", facts, *ceilings, rows_of(record)])
        (folder / "report.md").write_text(text)
        plot(record, folder / "ratios.png")
        print(f"written: {folder / 'report.md'} and ratios.png")
    for name, words in WORDS.items():
        readme = root / name
        readme.write_text(with_figures(readme.read_text(), words, results))
        print(f"written: {readme}")
    return 0
