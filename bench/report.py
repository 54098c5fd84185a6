"""The report of a folder of records: report.md with every row, plots, and the tables in the READMEs.

A README names the folder in a comment and everything up to the closing comment is generated:
<!-- figures: FOLDER --> ... <!-- /figures -->
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench import plots
from bench.compare import read

PASSES = ("forward", "forward + backward")
PEERS = ("eager", "torch.compile")
HUGGING_FACE = ("llmcore", "transformers")
DRAWN = {"errors": plots.errors, "curves": plots.curves, "scaling": plots.scaling, "lengths": plots.lengths}
OPS = (
    "Microseconds are medians of interleaved rounds on inputs that rotate over twice the last cache, at most 256 MiB. "
    "The ceiling is a copy beyond the caches or a matrix product, whichever binds. A share above 1 is reached where "
    "the cache is larger than the rotation, or an output is written to memory that is still in it. peak MiB is beyond "
    "the inputs."
)
ERRORS = (
    "Root mean square of the error over that of the exact values, the largest over the sizes; same inputs, float64 by "
    "the reference."
)
CURVES = (
    "The same data, weights and seed. Training amplifies any difference, so the measure is plain PyTorch against "
    "itself from weights moved by one unit in the last place."
)
WORDS = {
    "README.md": {
        "where": "{processor}, {threads} threads, {kernels} kernels, PyTorch {torch}, {date}.",
        "ops": "op, times faster than", "forward": "forward", "forward + backward": "fwd + bwd",
        "step": "a training step of `tiny`, 8 × 256 tokens", "faster": "llmcore is faster by",
        "race": "equal wall time, {seconds:.0f} s", "tokens": "tokens", "bits": "held-out bits per byte",
        "hugging_face": "a training step in fp32 against Hugging Face's model, same weights",
        "loop": "Outside model, optimizer and data the loop of `train_minimal.py` takes {share:.1%} of such a step.",
    },
    "README.zh.md": {
        "where": "{processor}，{threads} 线程，{kernels} 内核，PyTorch {torch}，{date}。",
        "ops": "算子，快多少倍", "forward": "前向", "forward + backward": "前向 + 反向",
        "step": "`tiny` 的一个训练步，8 × 256 个 token", "faster": "llmcore 快",
        "race": "相同时间，{seconds:.0f} 秒", "tokens": "token 数", "bits": "留出文本，每字节比特数",
        "hugging_face": "fp32 的一个训练步，对照权重相同的 Hugging Face 模型",
        "loop": "除模型、优化器和数据之外，`train_minimal.py` 的循环占这样一步的 {share:.1%}。",
    },
}  # fmt: skip
MARKED = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- /figures -->)", re.DOTALL)


def measured(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in record["records"] if "microseconds" in row]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def dtype_of(row: dict[str, Any]) -> str:
    return next(plots.SHORT[word] for word in row["case"].split() if word in plots.SHORT)


def figures(folder: Path, words: dict[str, str]) -> str:
    """The tables of a README."""
    ops = read(folder / "ops.json")
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
        body.append([f"`{op}` {dtype}", *(f"{min(r):.2f}–{max(r):.2f}" if r else "–" for r in ranges)])
    machine = ops["machine"]
    where = words["where"].format(
        processor=machine["processor"], threads=machine["threads"], kernels=machine["cpu kernels"],
        torch=machine["torch"], date=machine["date"],
    )  # fmt: skip
    parts = [where + "\n", table([words["ops"], *(f"{peer}, {words[direction]}" for peer, direction in columns)], body)]
    if (folder / "step.json").exists():
        steps = read(folder / "step.json")["records"]
        rows = [[r["candidate"], f"{r['milliseconds']:.1f}", f"{r['llmcore is faster by']:.2f}×"] for r in steps]
        parts.append(table([words["step"], "ms", words["faster"]], rows))
    if (folder / "hugging_face.json").exists():
        steps = read(folder / "hugging_face.json")["records"]
        rows = [
            [f"`{r['model']}`, {r['batch']} × {r['length']}", *(f"{r['milliseconds'][n]:.1f}" for n in HUGGING_FACE)]
            + [f"{r['times faster than']['transformers']:.1f}×"]
            for r in steps
        ]
        parts.append(table([words["hugging_face"], "llmcore, ms", "transformers, ms", words["faster"]], rows))
    if (folder / "loop.json").exists():
        share = read(folder / "loop.json")["records"][-1]["median of the shares"]
        parts.append(words["loop"].format(share=share) + "\n")
    if (folder / "race.json").exists():
        races = read(folder / "race.json")["records"]
        rows = [[r["candidate"], f"{r['tokens']:,}", f"{r['held-out bits per byte']:.4f}"] for r in races]
        head = [words["race"].format(seconds=races[0]["seconds"]), words["tokens"], words["bits"]]
        parts.append(table(head, rows))
    return "\n".join(parts)


def with_figures(text: str, words: dict[str, str], results: Path) -> str:
    """A README's text with its marked part made again from the records."""
    return MARKED.sub(lambda m: m[1] + figures(results / m[2], words) + m[3], text)


def rows_of(record: dict[str, Any]) -> str:
    """Every row as a table."""
    peers = list(dict.fromkeys(n for row in measured(record) for n in row["microseconds"]))
    body = []
    for row in measured(record):
        bound = row.get("bound by", "memory")
        unit = "GB/s" if bound == "memory" else "GFLOP/s"
        rate = row.get(unit, {}).get("llmcore")
        share = row.get("share of the ceiling", {}).get("llmcore")
        peaks = row.get("peak MiB", {})
        body.append(
            [row["op"], row["case"], row["pass"]]
            + [f"{row['microseconds'][n]:.1f}" if n in row["microseconds"] else "–" for n in peers]
            + [f"{rate:.0f} {unit}" if rate else "–", f"{share:.2f}, {bound}" if share is not None else "–"]
            + [", ".join(f"{n} {peak:.1f}" for n, peak in peaks.items()) or "–"]
            + ["; ".join(f"{n}: {why}" for n, why in row.get("absent", {}).items())]
        )
    head = ["op", "case", "pass", *(f"{n}, µs" for n in peers), "llmcore", "share of the ceiling", "peak MiB"]
    return table([*head, "absent peers"], body)


def errors_of(record: dict[str, Any]) -> str:
    """The largest error over the sizes, by op, dtype and value."""
    rows = record["records"]
    names = list(dict.fromkeys(n for row in rows for n in row["rms"]))
    found: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        largest = found[row["op"], row["dtype"], row["value"]]
        for name, error in row["rms"].items():
            largest[name] = max(error, largest.get(name, 0.0))
    body = [[*key, *(f"{e[n]:.2e}" if n in e else "–" for n in names)] for key, e in found.items()]
    return table(["op", "dtype", "value", *names], body)


def loop_of(record: dict[str, Any]) -> str:
    """The parts of a step in every run."""
    rows = [row for row in record["records"] if "milliseconds" in row]
    names = list(rows[0]["milliseconds"])
    body = [[*(f"{r['milliseconds'][n]:.3f}" for n in names), f"{r['share outside']:.2%}"] for r in rows]
    return table([*(f"{name}, ms" for name in names), "share outside"], body)


def strays(rows: list[dict[str, Any]]) -> list[str]:
    """How far each run's loss strays from plain PyTorch's, root mean square over the run and over its last tenth."""
    sentences = []
    for row in rows:
        plain = next(r for r in rows if r["candidate"] == "plain PyTorch" and r["precision"] == row["precision"])
        if row is plain:
            continue
        apart = [(a - b) ** 2 for a, b in zip(row["loss"], plain["loss"], strict=True)]
        tail = apart[-max(1, len(apart) // 10) :]
        rms, late = ((sum(part) / len(part)) ** 0.5 for part in (apart, tail))
        bits = row["held-out bits per byte"], plain["held-out bits per byte"]
        sentences.append(
            f"- {row['name']}: {rms:.4f} rms over {row['steps']} steps, {late:.4f} over the last tenth; held-out "
            f"{bits[0]:.4f} bits per byte, plain PyTorch {bits[1]:.4f}."
        )
    return sentences


def report_of(folder: Path) -> list[Path]:
    """Writes report.md and the plots of one device's records."""
    record = read(folder / "ops.json")
    machine = record["machine"]
    where = machine.get("gpu", f"{machine['processor']}, {machine['threads']} threads")
    title = f"{where}, PyTorch {machine['torch']}, {machine['date']}"
    rows = measured(record)
    detailed = [row for row in rows if "flops" in row]
    ceilings = [r["ceilings"] for r in record["records"] if "ceilings" in r]
    drawn: list[Path | None] = [plots.ratios(rows, title, folder / "ratios.png")]
    if detailed:
        drawn += [
            plots.throughput(detailed, title, folder / "throughput.png"),
            plots.bandwidth(detailed, title, folder / "bandwidth.png"),
            plots.roofline(detailed, ceilings[-1], title, folder / "roofline.png"),
            plots.memory(detailed, title, folder / "memory.png"),
        ]
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    text = [f"# {folder.name}", facts, *map(json.dumps, ceilings), "## Ops", OPS, rows_of(record)]
    others = {name: read(path) for name in DRAWN if (path := folder / f"{name}.json").exists()}
    for name, other in others.items():
        drawn.append(DRAWN[name](other["records"], title, folder / f"{name}.png"))
    if "errors" in others:
        text += ["## Errors against float64", ERRORS, errors_of(others["errors"])]
    if "curves" in others:
        text += ["## Loss curves", CURVES, "\n".join(strays(plots.beside_plain(others["curves"]["records"])))]
    if (folder / "loop.json").exists():
        text += ["## The training loop", loop_of(read(folder / "loop.json"))]
    done = [path for path in drawn if path]
    text += ["## Plots", "\n\n".join(f"![{path.stem}]({path.name})" for path in done)]
    (folder / "report.md").write_text("\n\n".join(text) + "\n")
    return [folder / "report.md", *done]


def main(root: Path, results: Path) -> int:
    for folder in sorted(path.parent for path in results.glob("*/ops.json")):
        for path in report_of(folder):
            print(f"written: {path}")
    for name, words in WORDS.items():
        readme = root / name
        readme.write_text(with_figures(readme.read_text(), words, results))
        print(f"written: {readme}")
    return 0
