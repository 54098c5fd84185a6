"""Writes a value into a table of configurations in the source, and touches nothing else in the file.

The tables are literals: the syntax tree says at which line and column the value stands, and only those characters are
replaced. Entries are as long as they ever get well within a line, so the file stays formatted.
"""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.compile.record import ROOT
from bench.tune.places import Place

KERNELS = ROOT / "kernels"


def _table(tree: ast.Module, name: str) -> ast.expr:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            value = getattr(node, "value", None)
            if value is not None:
                return value
    raise KeyError(f"there is no table {name}")


def _entry(node: ast.expr, path: Sequence[Any]) -> ast.expr:
    for key in path:
        if isinstance(node, ast.Dict):
            found = [v for k, v in zip(node.keys, node.values, strict=True) if k is not None and _is(k, key)]
            if len(found) != 1:
                raise KeyError(f"there are {len(found)} entries {key!r}")
            node = found[0]
        elif isinstance(node, ast.Tuple):
            node = node.elts[key]
        else:
            raise KeyError(f"{ast.unparse(node)} holds no {key!r}")
    return node


def _is(node: ast.expr, key: Any) -> bool:
    try:
        return ast.literal_eval(node) == key
    except ValueError:  # a name, like that of the interpreter's row
        return False


def _text(old: ast.expr, value: Any) -> str:
    """As the value would be written by hand: a product where a product of kilobytes stood."""
    if isinstance(old, ast.BinOp) and isinstance(value, int) and value % 1024 == 0:
        return f"{value // 1024} * 1024"
    return repr(value)


def write(places: Sequence[Place], values: Sequence[Any], folder: Path = KERNELS) -> None:
    """Raises KeyError where a place is not in its file."""
    for place, value in zip(places, values, strict=True):
        path = folder / f"{place.module}.py"
        source = path.read_text().encode()
        node = _entry(_table(ast.parse(source), place.table), place.path)
        assert node.end_lineno is not None and node.end_col_offset is not None
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        path.write_bytes(source[:begin] + _text(node, value).encode() + source[end:])
