"""Architecture: how another package's configuration and parameter names correspond to llmcore's, as a table."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmcore.models.config import ModelConfig, suggest
from llmcore.models.files import WEIGHTS

Values = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Field:
    """One quantity: its name there, its name in ModelConfig, and what they mean when config.json is silent. "auto" is
    ModelConfig's None."""

    theirs: str
    ours: str
    default: Any


def _as_is(values: Values, where: Path) -> Values:
    return values


def _nothing_more(values: Values, dtype: torch.dtype) -> Values:
    return values


@dataclass(frozen=True)
class Architecture:
    """A model that another package has a name for.

    name: what they call it. mixer: what all its layers mix time with; feed_forwards: the kinds that they have, the last
        of which at least one layer must have.
    fields: what both configurations say.
    only: what llmcore computes for some of their values alone, by name; silence means the first, which is written.
    implied: fields of ModelConfig for which they have one value and no name.
    unread: fields of ModelConfig that such a model does not read, or that are lost there without a change in what it
        computes; the values that they get here.
    ignored: their names that change nothing that is computed from given weights: how these were initialised, how the
        same is computed, how their code is to be called.
    always: names that are written even where their value is what silence means; None: all are.
    closed: whether a name that stands in none of these is refused.
    renames: how parameters' names begin, here and there; {} is the number of a layer. aliases: names they also read.
    weights: the file that is written. writes_tied_head: whether an output layer that is the embedding is written too.
    split, join: what else is done to the tensors, by their names: written, and read from a file.
    prepare: what else is done to their config.json before the table is read. finish: what is done to what the table
        wrote, given a dtype in which every weight keeps its value.
    """

    name: str
    mixer: str
    fields: tuple[Field, ...]
    renames: tuple[tuple[str, str], ...]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    unread: Mapping[str, Any] = field(default_factory=dict)
    ignored: Collection[str] = ()
    always: Collection[str] | None = None
    closed: bool = False
    feed_forwards: tuple[str, ...] = ("none",)
    aliases: Mapping[str, str] = field(default_factory=dict)
    weights: str = WEIGHTS
    writes_tied_head: bool = False
    split: Callable[[Tensors], Tensors] = dict
    join: Callable[[Tensors, Path], Tensors] = _as_is
    prepare: Callable[[Values, Path], Values] = _as_is
    finish: Callable[[Values, torch.dtype], Values] = _nothing_more

    def to_ours(self, values: Values, where: Path) -> ModelConfig:
        """The ModelConfig that their config.json, read from `where`, is.

        Raises:
            ValueError: it asks for what llmcore does not compute, or is wrong; in their names.
        """
        values = self.prepare(values, where)
        for name, allowed in self.only.items():
            if values.get(name, allowed[0]) not in allowed:
                raise refusal(where, name, values[name], *allowed)
        names = [*self._silence(), *self.ignored]
        for name in values if self.closed else ():
            if name not in names:
                hint = suggest(name, names)
                raise ValueError(
                    f"load: {where}: {self.name} has no field {name!r}; {hint}allowed: {', '.join(names)}."
                )
        given = {f.ours: values.get(f.theirs, f.default) for f in self.fields}
        given = {name: None if value == "auto" else value for name, value in given.items()}
        try:
            return ModelConfig(**{"layer_pattern": [self.mixer], **self.unread, **self.implied, **given})
        except ValueError as error:
            sentence = str(error).removeprefix("ModelConfig: ")
            for f in self.fields:
                sentence = re.sub(rf"\b{f.ours}\b", f.theirs, sentence)
            raise ValueError(f"load: {where}: {sentence}") from error

    def to_theirs(self, config: ModelConfig, dtypes: Collection[torch.dtype]) -> Values:
        """Their config.json for `config` and weights of these dtypes."""
        dtype = next(iter(dtypes))
        for other in dtypes:
            dtype = torch.promote_types(dtype, other)
        silence = self._silence()
        values = {**silence, **{f.theirs: getattr(config, f.ours) for f in self.fields}}
        if self.always is not None:
            values = {name: value for name, value in values.items() if name in self.always or value != silence[name]}
        return self.finish(values, dtype)

    def _silence(self) -> Values:
        """What each name means when it is not there."""
        return {f.theirs: f.default for f in self.fields} | {name: allowed[0] for name, allowed in self.only.items()}

    def has_layers_of(self, config: ModelConfig) -> bool:
        layers = range(config.num_hidden_layers)
        kinds = {config.feed_forward(i) for i in layers}
        return all(config.mixer(i) == self.mixer for i in layers) and self.feed_forwards[-1] in kinds <= set(
            self.feed_forwards
        )

    def require_expressible(self, config: ModelConfig, format: str) -> None:
        for name, value in self.implied.items():
            given = getattr(config, name)
            if given != value:
                raise ValueError(
                    f"save: {name} is {given}, for which format {format!r} has no field; allowed: {value}."
                )

    def name_of(self, parameter: str) -> str:
        """Their name of llmcore's `parameter`."""
        layer = re.match(r"model\.layers\.(\d+)\.", parameter)
        number = layer[1] if layer else ""
        for ours, theirs in self.renames:
            beginning = ours.format(number)
            if parameter.startswith(beginning):
                return theirs.format(number) + parameter.removeprefix(beginning)
        raise KeyError(f"{self.name} has no name for {parameter}")


def refusal(where: Path, name: str, given: Any, *allowed: Any) -> ValueError:
    """In JSON's words, as they stand in the file."""
    return ValueError(f"load: {where}: {name} is {json.dumps(given)}; allowed: {', '.join(map(json.dumps, allowed))}.")
