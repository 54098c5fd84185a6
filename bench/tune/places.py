"""A place in a table of configurations: what stands there, and how something else is put there for a while.

The launch functions look their table up by its name at every call, so another table under that name is all it takes;
Triton caches what it compiled by the values themselves, so nothing is to be cleared.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """`table` of kernels/`module`.py, and the keys and indices that lead to the value."""

    module: str
    table: str
    path: tuple[Any, ...]


def _module(place: Place) -> Any:
    return importlib.import_module(f"llmcore.kernels.{place.module}")


def value_at(place: Place) -> Any:
    value = getattr(_module(place), place.table)
    for key in place.path:
        value = value[key]
    return value


def _with(container: Any, path: Sequence[Any], value: Any) -> Any:
    """A copy of nested dictionaries and tuples with another value at the end of the path."""
    if not path:
        return value
    inner = _with(container[path[0]], path[1:], value)
    if isinstance(container, dict):
        return {**container, path[0]: inner}
    return (*container[: path[0]], inner, *container[path[0] + 1 :])


def put(places: Sequence[Place], values: Sequence[Any]) -> None:
    """Gives the places other values in this process, not in the source."""
    for place, value in zip(places, values, strict=True):
        module = _module(place)
        setattr(module, place.table, _with(getattr(module, place.table), place.path, value))


@contextmanager
def injected(places: Sequence[Place], values: Sequence[Any]) -> Iterator[None]:
    before = [(_module(place), place.table, getattr(_module(place), place.table)) for place in places]
    put(places, values)
    try:
        yield
    finally:
        for module, name, table in before:
            setattr(module, name, table)
