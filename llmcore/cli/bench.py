"""`llmcore bench`: this machine's figures, op by op, or those of one's own model. Needs the repository's bench/."""

import argparse
import importlib
import sys
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure the operators beside their peers",
        description="Measure the operators beside their peers, correctness first; the record goes to bench/results/.",
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these operators")
    parser.add_argument(
        "--mine", metavar="CONFIG",
        help="the shapes of a model: a preset, a training configuration, or a Hugging Face config.json",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=1, help="with --mine: sequences")
    parser.add_argument("--seq_len", type=int, default=2048, help="with --mine: tokens of each sequence")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="with --mine")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.add_argument("--short", action="store_true", help="without --mine: the short set")
    parser.add_argument("--results", type=Path, help="the folder of the records")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / "__main__.py").is_file():
        print(
            "llmcore bench needs the repository's folder bench/, which an installed package does not hold; "
            "install from a checkout with pip install -e .",
            file=sys.stderr,
        )
        return 2
    if options.mine and options.ops:
        print(f"llmcore bench: --mine measures every op, so {options.ops[0]} cannot be named too.", file=sys.stderr)
        return 2
    arguments = ["mine", options.mine] if options.mine else ["ops", *options.ops]
    for name in ("batch_size", "seq_len", "dtype", "device", "results"):
        if getattr(options, name) is not None:
            arguments += [f"--{name}", str(getattr(options, name))]
    if options.short:
        arguments.append("--short")
    sys.path.insert(0, str(root))
    return importlib.import_module("bench.__main__").main(arguments)
