"""The default text and its split; a user's text; text that is wrong."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from llmcore.data import DataError, load_corpus
from llmcore.data.corpus import is_held_out, standard_library, text_files


def test_standard_library_leaves_out_tests_and_tables():
    files = standard_library()
    parts = {part for file in files for part in file.split("/")}
    assert not parts & {"test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3", "site-packages"}
    assert {"argparse.py", "json/decoder.py"} <= set(files)
    assert files == sorted(files) and all(file.endswith(".py") for file in files)


def test_split_is_by_the_hash_of_the_path():
    files = standard_library()
    held_out = {file for file in files if is_held_out(file)}
    assert held_out == {file for file in files if int(hashlib.sha1(file.encode()).hexdigest()[:2], 16) < 13}
    assert 0.02 < len(held_out) / len(files) < 0.1


def test_default_corpus():
    corpus = load_corpus()
    assert corpus.train.dtype == np.uint8 and 4e6 < corpus.train.size < 4e7
    assert 0.01 < corpus.valid.size / corpus.train.size < 0.2
    files = standard_library()
    assert (corpus.train == 0).sum() + (corpus.valid == 0).sum() == len(files), "one end of document per file"


def test_no_file_is_on_both_sides(tmp_path: Path):
    for i in range(200):
        (tmp_path / f"folder{i % 7}").mkdir(exist_ok=True)
        (tmp_path / f"folder{i % 7}" / f"{i}.txt").write_text(f"text number {i}")
    (tmp_path / ".hidden").write_text("not read")
    corpus = load_corpus(str(tmp_path))
    train, valid = (set(bytes(part).split(b"\0")[:-1]) for part in (corpus.train, corpus.valid))
    assert not train & valid
    assert train | valid == {f"text number {i}".encode() for i in range(200)}


def test_single_file_is_cut_at_its_end(tmp_path: Path):
    file = tmp_path / "book.txt"
    file.write_bytes(bytes(range(1, 129)) * 20)
    corpus = load_corpus(str(file))
    assert bytes(corpus.train) + bytes(corpus.valid) == file.read_bytes() + b"\0"
    assert corpus.valid.size == 2561 * 13 // 256


def test_separate_validation_text(tmp_path: Path):
    (tmp_path / "train.txt").write_text("train on this")
    (tmp_path / "valid.txt").write_text("validate on this")
    corpus = load_corpus(str(tmp_path / "train.txt"), str(tmp_path / "valid.txt"))
    assert (bytes(corpus.train), bytes(corpus.valid)) == (b"train on this\0", b"validate on this\0")


def test_wrong_texts_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_corpus(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no files"):
        load_corpus(str(tmp_path / "empty"))
    (tmp_path / "model.bin").write_bytes(b"ab\0c")
    with pytest.raises(DataError, match=r"model\.bin is no text: it holds a zero byte at 2"):
        load_corpus(str(tmp_path / "model.bin"))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("a")
    with pytest.raises(DataError, match="too few to hold some out; give data.valid"):
        load_corpus(str(tmp_path / "one"))
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match="6 bytes to train on; seq_len=256 needs at least 512"):
        load_corpus(str(tmp_path / "short.txt")).require(256)


def test_links_are_followed_once(tmp_path: Path):
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root" / "a" / "1.txt").write_text("one")
    (tmp_path / "elsewhere" / "2.txt").write_text("two")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "linked_again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "a" / "round").symlink_to(tmp_path / "root")
    assert text_files(tmp_path / "root") == ["a/1.txt", "linked/2.txt"]


def test_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: str):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.scandir", refuse)  # root may read anything
    with pytest.raises(DataError, match="the folder .* cannot be read: Permission denied"):
        text_files(tmp_path)


def test_fingerprint_tells_texts_apart(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text " * 100)
    first = load_corpus(str(tmp_path / "a.txt")).fingerprint
    assert first["train"]["bytes"] == 501 - 501 * 13 // 256 and len(str(first["valid"]["sha256"])) == 64
    (tmp_path / "a.txt").write_text("text " * 99 + "texT ")
    second = load_corpus(str(tmp_path / "a.txt")).fingerprint
    assert second["train"] == first["train"] and second["valid"] != first["valid"]
