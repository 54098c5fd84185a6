"""The command `llmcore`: sub-commands that parse their arguments and call the library."""

import argparse
import sys

from llmcore.cli import bench, doctor


def main(arguments: list[str] | None = None) -> int:
    """Runs one sub-command. Returns 0 (fine), 1 (the answer is no) or 2 (bad arguments)."""
    parser = argparse.ArgumentParser(
        prog="llmcore", description="Kernels for language models: look after this installation, measure it."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (bench, doctor):
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
