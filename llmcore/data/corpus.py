"""Text as byte-level tokens: which files are read, and which of them are held out for validation.

A token is a byte; each document ends with a zero byte, which text does not hold, so that a model learns where one
stops. The default text is the standard library of the running Python: about 10 MB that every machine has.

A file of a folder is held out when the first byte of the SHA-1 of its path (relative to the folder, with forward
slashes) is below 13: about 5 % of the files, and a file keeps its side when others come or go. The split is by hash and
not by position because neighbours in a folder are often near-copies. Of a single file the last 5 % are held out.
"""

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np

HELD_OUT_BELOW = 13  # of 256
END_OF_DOCUMENT = b"\0"
LEFT_OUT_OF_THE_LIBRARY = frozenset(
    ["test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "site-packages", "dist-packages"]
)


class DataError(ValueError):
    """A text that is missing, empty, unreadable or no text; the message is one sentence that names it."""


@dataclass(frozen=True)
class Corpus:
    """Token ids (uint8, one per byte) for training and for validation, and where they come from."""

    train: np.ndarray
    valid: np.ndarray
    source: str

    @cached_property
    def fingerprint(self) -> dict[str, dict[str, int | str]]:
        """Size and SHA-256 of both parts, by which a run that goes on knows its text again."""
        parts = {"train": self.train, "valid": self.valid}
        return {
            name: {"bytes": part.size, "sha256": hashlib.sha256(part.data).hexdigest()} for name, part in parts.items()
        }

    def describe(self) -> str:
        return f"{self.source}: {self.train.size:,} bytes to train on, {self.valid.size:,} held out"

    def require(self, seq_len: int) -> None:
        """Raise DataError unless both parts can fill sequences of this many tokens."""
        for part, tokens, needed in (("train on", self.train, 2 * seq_len), ("validate on", self.valid, seq_len + 1)):
            if tokens.size < needed:
                raise DataError(
                    f"{self.source} gives {tokens.size} bytes to {part}; seq_len={seq_len} needs at least {needed}."
                )


def load_corpus(train: str | None = None, valid: str | None = None) -> Corpus:
    """Read the text at `train`, a file or a folder (None: Python's standard library). The validation text is `valid`,
    or what is held out of `train`. Raises DataError."""
    if train is None:
        train_path, files = Path(sysconfig.get_path("stdlib")), standard_library()
        source = f"the standard library of Python {sysconfig.get_python_version()}"
    else:
        train_path = Path(train)
        files = text_files(train_path)
        source = train
    if valid is not None:
        valid_path = Path(valid)
        return Corpus(read(train_path, files), read(valid_path, text_files(valid_path)), f"{source} and {valid}")
    if train_path.is_file():
        text = read(train_path, files)
        cut = text.size - text.size * HELD_OUT_BELOW // 256
        return Corpus(text[:cut], text[cut:], source)
    kept = [file for file in files if not is_held_out(file)]
    held_out = [file for file in files if is_held_out(file)]
    if not kept or not held_out:
        raise DataError(
            f"data.train is {train}, whose {len(files)} files are too few to hold some out; give data.valid as well."
        )
    return Corpus(read(train_path, kept), read(train_path, held_out), f"{source} ({len(kept)} + {len(held_out)} files)")


def standard_library() -> list[str]:
    """The library's Python files, relative to its folder: no tests, no tables, nothing installed on top."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in _walk(root, LEFT_OUT_OF_THE_LIBRARY) if file.endswith(".py")]
    if not files:
        raise DataError(f"this Python has no source files of its standard library in {root}; give data.train.")
    return files


def text_files(path: Path) -> list[str]:
    """The files of a folder, relative to it and sorted, without hidden ones; for a file, its name."""
    if path.is_file():
        return [path.name]
    if not path.is_dir():
        raise DataError(f"the text {path} does not exist; allowed is a text file or a folder of text files.")
    files = _walk(path, frozenset())
    if not files:
        raise DataError(f"the folder {path} holds no files; allowed is a text file or a folder of text files.")
    return files


def is_held_out(relative_path: str) -> bool:
    return hashlib.sha1(os.fsencode(relative_path), usedforsecurity=False).digest()[0] < HELD_OUT_BELOW


def read(path: Path, files: list[str]) -> np.ndarray:
    """The bytes of `files`, each followed by END_OF_DOCUMENT. `path` is their folder, or the one file itself."""
    parts = []
    for name in files:
        file = path if path.is_file() else path / name
        try:
            text = file.read_bytes()
        except OSError as error:
            raise DataError(f"the text {file} cannot be read: {error.strerror or error}.") from error
        if END_OF_DOCUMENT in text:
            raise DataError(f"{file} is no text: it holds a zero byte at {text.index(END_OF_DOCUMENT)}.")
        parts += [text, END_OF_DOCUMENT]
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def _walk(root: Path, left_out: frozenset[str]) -> list[str]:
    """The files below `root`, through links as well. A folder that is there twice is read once: no endless round, and
    no text on both sides of the split."""
    found: list[str] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=_unreadable, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(
            name for name in folders if name not in left_out and not name.startswith((".", "__pycache__"))
        )
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in names if not name.startswith(".")]
    return sorted(found)


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(f"the folder {error.filename} cannot be read: {error.strerror or error}.") from error
