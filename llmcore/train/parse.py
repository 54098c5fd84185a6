"""From the command line and a YAML file to a TrainConfig; whatever is wrong becomes a ConfigError of one sentence.

Later wins: the defaults, the configuration of the checkpoint that is resumed, --config FILE, the other options.
"""

import argparse
import difflib
import re
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from llmcore.models import PRESETS, ModelConfig
from llmcore.train.config import ConfigError, DataConfig, LogConfig, OptimizerConfig, SampleConfig, TrainConfig

MODEL_FIELDS = [item.name for item in fields(ModelConfig)]
GROUPS: dict[str, Any] = {"data": DataConfig, "optimizer": OptimizerConfig, "log": LogConfig, "sample": SampleConfig}
NOT_INHERITED = ("out_dir", "name", "resume", "dry_run")  # by a run that goes on from another


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Types and defaults after each description, and the text at the top as it is."""


def parse(argv: list[str], description: str, resumed: dict[str, Any] | None = None) -> TrainConfig:
    """What `argv` asks for, on top of the configuration `resumed` if there is one. Ranges are left to
    TrainConfig.check. Ends the process for --help and --print_config."""
    parser = _parser(description)
    if resumed is not None:
        _check_keys(resumed, "the checkpoint's configuration")
        parser.set_defaults(flat({key: value for key, value in resumed.items() if key not in NOT_INHERITED}))
    for file in _config_files(argv):
        _check_keys(_read(file), file)
    for argument in argv:
        if argument.startswith("--") and len(argument) > 2:
            _check_option(argument[2:].split("=")[0])
    try:
        values = parser.parse_args(argv).as_dict()
    except argparse.ArgumentError as error:
        raise ConfigError(_sentence(str(error))) from error
    values = {item.name: values[item.name] for item in fields(TrainConfig)}
    return TrainConfig(**{key: GROUPS[key](**value) if key in GROUPS else value for key, value in values.items()})


def _parser(description: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        usage="python train_minimal.py [--key value ...]",
        description=description,
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below, dots as nesting.")
    parser.add_argument("--dry_run", action="store_true", help="Check everything and describe the run; train nothing.")
    parser.add_class_arguments(TrainConfig, skip={"dry_run"})
    for action in parser._actions:
        if action.dest in GROUPS:
            action.help = argparse.SUPPRESS  # a YAML file per group is of no use here
    return parser


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in reversed(node.value):
            if keys.count(key.value) > 1 and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} comes twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _config_files(argv: list[str]) -> list[str]:
    files = [value for option, value in zip(argv, argv[1:], strict=False) if option == "--config"]
    return files + [argument.removeprefix("--config=") for argument in argv if argument.startswith("--config=")]


def _read(file: str) -> dict[str, Any]:
    try:
        content = yaml.load(Path(file).read_text(encoding="utf-8"), _UniqueKeys)
    except FileNotFoundError as error:
        raise ConfigError(f"the configuration file {file} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {file} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        place = f" at line {where.line + 1}, column {where.column + 1}" if where else ""
        raise ConfigError(
            f"the configuration file {file} is not YAML{place}: {getattr(error, 'problem', None) or error}."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"the configuration file {file} holds {content!r}; allowed are keys such as 'seed: 1'.")
    return content


def _check_keys(content: dict[str, Any], source: str) -> None:
    for key, value in content.items():
        if key in GROUPS or key == "model":
            if not isinstance(value, dict):
                given = "empty" if value is None else repr(value)
                raise ConfigError(f"{key} in {source} is {given}; allowed are keys and values, or to leave {key} out.")
            wrong = [name for name in value if not isinstance(name, str)]
            if wrong:
                raise ConfigError(f"{key} in {source} has the key {wrong[0]!r}; allowed is the name of a field.")
        inner = value if key in GROUPS and isinstance(value, dict) else None
        for name in [str(key)] if inner is None else [f"{key}.{name}" for name in inner]:
            if name not in {*_keys(), *GROUPS}:
                raise ConfigError(f"unknown key {name} in {source}{_did_you_mean(name, _keys())}")
            given, kind = value if inner is None else inner[name.partition(".")[2]], _type_of(name)
            if given is None and type(None) not in typing.get_args(kind):
                raise ConfigError(f"{name} in {source} is null; allowed is {_allowed(kind)}.")


def _check_option(name: str) -> None:
    known = ["help", "config", "print_config", *_keys()]
    if name in MODEL_FIELDS and name not in known:
        raise ConfigError(f"unknown option --{name}; did you mean --model.{name}?")
    if name == "model.preset" or (name not in known and not name.startswith("model.")):
        raise ConfigError(f"unknown option --{name}{_did_you_mean(name, known, '--')}")


def flat(content: dict[str, Any]) -> dict[str, Any]:
    """Nested groups as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update({f"{key}.{name}": inner for name, inner in value.items()} if key in GROUPS else {key: value})
    return flat


def _keys() -> list[str]:
    """All keys, with dots: preset, ..., data.train, ..."""
    keys = [item.name for item in fields(TrainConfig) if item.name not in GROUPS]
    return keys + [f"{group}.{item.name}" for group, members in GROUPS.items() for item in fields(members)]


def _did_you_mean(name: str, known: list[str], prefix: str = "") -> str:
    near = [key for key in known if key.split(".")[-1] == name] or difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    return f"; allowed are {', '.join(prefix + key for key in known)}."


def _sentence(message: str) -> str:
    """jsonargparse's message, which spreads over lines and speaks of Python types, in one sentence of ours."""
    key = re.search(r'Parser key "([\w.]+)"', message)
    given = re.search(r"(?:Got value|Given value): (.*)", message)
    type_hint = _type_of(key[1]) if key else None
    if key and given and type_hint is not None:
        if key[1] == "model" and given[1] in PRESETS:
            return f"model is {given[1]!r}; allowed is {_allowed(type_hint)}; did you mean --preset {given[1]}?"
        return f"{key[1]} is {given[1]!r}; allowed is {_allowed(type_hint)}."
    missing = re.match(r"argument (--[\w.]+): expected one argument", message)
    if missing:
        return f"{missing[1]} has no value; allowed is {_allowed(_type_of(missing[1][2:]))}."
    unexpected = re.match(r"unrecognized arguments: (.*)", message)
    if unexpected:
        return f"unexpected argument {unexpected[1]!r}; options are written as --key value, and --help lists them."
    return " ".join(message.split()).rstrip(".") + "."


def _type_of(key: str) -> Any:
    owner: Any = TrainConfig
    for name in key.split("."):
        owner = typing.get_type_hints(owner).get(name) if is_dataclass(owner) else None
    return owner


def _allowed(type_hint: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    if typing.get_origin(type_hint) in (types.UnionType, typing.Union):
        return " or ".join(_allowed(option) for option in typing.get_args(type_hint))
    if typing.get_origin(type_hint) is Literal:
        words_of = typing.get_args(type_hint)
        return ", ".join(words_of) if len(words_of) == 1 else "one of " + ", ".join(words_of)
    return words.get(type_hint, "a set of keys and values")
