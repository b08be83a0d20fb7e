# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Where training text comes from: files, data sets, the interpreter's own sources."""

import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from training_helpers import private_cache, some_text  # noqa: F401  a fixture

from modeling_peer.console.errors import SettingsError
from modeling_peer.data import text_files
from modeling_peer.data.corpus import DataArguments, load_corpus
from modeling_peer.data.python_sources import find_python_sources, is_validation

pytestmark = pytest.mark.usefixtures("private_cache")


def corpus_of(path, **settings):
    return load_corpus(DataArguments(train_file=str(path), validation_percent=0.0, **settings))


@pytest.mark.parametrize(
    ("name", "opener"),
    [
        ("text.txt", open),
        ("text.txt.gz", gzip.open),
        ("text.xz", lzma.open),
        ("anything.log", open),  # a file named by itself may have any suffix
    ],
)
def test_a_file_is_one_document_with_every_byte_of_it(tmp_path, name, opener):
    text = "first\r\nsecond é\n\nlast without end of line"
    with opener(tmp_path / name, "wb") as handle:
        handle.write(text.encode("utf-8"))
    assert corpus_of(tmp_path / name).documents("train") == [text]


def test_each_line_of_jsonl_is_a_document_and_the_column_can_be_named(tmp_path):
    rows = [{"body": "one\ntwo", "id": 1}, {"body": "three", "id": 2}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert corpus_of(tmp_path / "rows.jsonl", text_column="body").documents("train") == ["one\ntwo", "three"]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    for name in ("b.txt", "a/z.md", "c.txt.xz", "ignored.bin"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        opener = lzma.open if name.endswith("xz") else open
        with opener(path, "wb") as handle:
            handle.write(name.encode())
    assert corpus_of(tmp_path).documents("train") == ["a/z.md", "b.txt", "c.txt.xz"]


def test_a_long_document_becomes_several_rows_that_join_to_the_same_text(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE_CHARACTERS", 100)
    text = some_text(300) + "x" * 1000  # the end has no line ends to cut at
    (tmp_path / "long.txt").write_text(text, newline="")
    pieces = list(text_files.read_pieces(tmp_path / "long.txt", "text"))
    assert "".join(piece for piece, _ in pieces) == text
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece) for piece, _ in pieces) <= 200


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("before")
    assert corpus_of(path).documents("train") == ["before"]
    path.write_text("after!")
    os.utime(path, ns=(1, 1))  # as when a clock is coarse: the size alone does not tell
    assert corpus_of(path).documents("train") == ["after!"]


def test_streaming_gives_the_same_documents(tmp_path):
    (tmp_path / "text.txt").write_text(some_text())
    assert corpus_of(tmp_path / "text.txt", streaming=True).documents("train") == [some_text()]


def test_the_end_of_the_rows_is_held_out_when_no_validation_text_is_named(tmp_path):
    rows = [{"text": f"document {i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = load_corpus(DataArguments(train_file=str(tmp_path / "rows.jsonl"), validation_percent=10))
    assert corpus.documents("validation") == [f"document {i}" for i in range(36, 40)]
    assert len(corpus.documents("train")) == 36


def test_a_limit_in_bytes_never_cuts_a_character(tmp_path):
    (tmp_path / "text.txt").write_text("ééé", encoding="utf-8")
    corpus = corpus_of(tmp_path / "text.txt")
    assert corpus.documents("train", max_bytes=5) == ["éé"]
    assert corpus.documents("train", max_bytes=6) == ["ééé"]


def test_a_local_data_set_folder_is_read_like_one_of_the_hub(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for split, texts in {"train": ["a", "b"], "test": ["c"]}.items():
        datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / f"{split}.parquet")
    settings = {"dataset_name": str(folder), "validation_split": "test"}
    corpus = load_corpus(DataArguments(**settings))
    assert (corpus.documents("train"), corpus.documents("validation")) == (["a", "b"], ["c"])
    lines = load_corpus(DataArguments(**settings, rows_are_lines=True))
    assert lines.documents("train") == ["ab"]
    with pytest.raises(SettingsError, match="no split 'training'; it has: train, test"):
        load_corpus(DataArguments(**settings, train_split="training"))
    with pytest.raises(SettingsError, match=r"no column 'txt'; it has: text.*Did you mean 'text'"):
        load_corpus(DataArguments(**settings, text_column="txt"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file or folder"),
        ("empty.txt", b"", "no text in .*empty.txt: empty"),
        ("latin.txt", "é".encode("latin-1"), "not UTF-8 text"),
        ("table.parquet", b"PAR1", "Put the file in a folder and set --dataset_name to it"),
        ("broken.txt.xz", b"not xz", "cannot be decompressed"),
        ("broken.jsonl", b"{", "line 1 is not JSON"),
        ("other.jsonl", b'{"body": "x"}', "no text under 'text'; it has: body. Set --text_column"),
        ("folder/picture.png", b"x", r"holds no text files .* it holds: .png"),
    ],
)
def test_a_file_that_cannot_be_read_as_text_is_refused_with_the_way_out(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=message):
        corpus_of(path.parent if "/" in name else path)


LATER = 100_000  # bytes of good text before: past what is read when the file is opened
GOOD = some_text(LATER // 5).encode("utf-8")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("late.txt", GOOD + b"\xff", "not UTF-8 text: invalid start byte"),
        ("cut.txt.xz", lzma.compress(os.urandom(LATER).hex().encode())[:LATER], "cannot be decompressed"),
        ("cut.txt.gz", gzip.compress(os.urandom(LATER).hex().encode())[:LATER], "cannot be decompressed"),
        ("bad.txt.gz", gzip.compress(GOOD, 0)[:LATER] + b"\xff" * LATER, "cannot be decompressed"),  # zlib.error
        ("late.jsonl", b'{"text": "x"}\n{', "line 2 is not JSON"),
        ("null.jsonl", b'{"text": "x"}\n{"text": null}', "line 2 has no text under 'text' but null"),
        ("half.jsonl", b'{"text": "x"}\n{"text": "\\ud800"}', r"line 2 holds half a character, '.ud800'"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_wrong_further_down_a_file_is_said_as_plainly(tmp_path, name, content, message, streaming):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError, match=rf"{name}.*{message}"):
        corpus_of(tmp_path / name, streaming=streaming).documents("train")


def test_the_description_counts_the_files(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    assert corpus_of(tmp_path / "a.txt").description == "local text: a.txt (1 file)"
    held_out = corpus_of(tmp_path, validation_file=str(tmp_path / "a.txt"))
    assert held_out.description == f"local text: {tmp_path.name} (2 files, 1 held out)"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (["a"], [""], "no text in column 'text' of split 'validation'"),
        ([1], [2], "column 'text' of split 'train' .* holds int, not text. Set --text_column"),
    ],
)
def test_a_split_without_text_is_refused(tmp_path, streaming, train, validation, message):
    for split, texts in {"train": train, "validation": validation}.items():
        datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(SettingsError, match=message):
        load_corpus(DataArguments(dataset_name=str(tmp_path), streaming=streaming))


def test_a_data_set_out_of_reach_is_named_with_the_cause():
    with pytest.raises(SettingsError, match="cannot open data set 'nobody/nothing'"):
        load_corpus(DataArguments(dataset_name="nobody/nothing"))


def test_two_sources_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="name one of the two"):
        load_corpus(DataArguments(dataset_name="a/b", train_file="c.txt"))


def test_the_library_sources_have_no_tests_no_packages_and_a_fixed_order():
    train, validation = find_python_sources()
    names = [path.as_posix() for path in train]
    assert names == sorted(names)
    assert not set(train) & set(validation)
    assert not [n for n in names if "/test/" in n or "site-packages" in n or "_sysconfigdata" in n]
    assert sum(path.stat().st_size for path in train) > 2_000_000
    assert 0.01 < len(validation) / len(train) < 0.15


def test_which_library_file_is_held_out_depends_on_its_name_alone(tmp_path):
    # fixed by the hash: the same files are held out on every machine and in every Python that has them
    names = ["argparse.py", "asyncio/threads.py", "calendar.py", "pprint.py", "statistics.py", "unittest/mock.py"]
    assert [n for n in names if is_validation(n)] == [
        "asyncio/threads.py",
        "pprint.py",
        "statistics.py",
        "unittest/mock.py",
    ]
    for name in (*names, "test/pprint.py", "site-packages/pprint.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    train, validation = find_python_sources(tmp_path)
    assert [path.name for path in train] == ["argparse.py", "calendar.py"]
    assert [path.name for path in validation] == ["threads.py", "pprint.py", "statistics.py", "mock.py"]


def test_a_python_without_its_sources_is_refused_with_another_way(tmp_path):
    (tmp_path / "lonely.py").write_text("x = 1\n")
    with pytest.raises(SettingsError, match=r"has 1 library sources under .*zipped or stripped.*--train_file"):
        find_python_sources(tmp_path)


def test_the_library_sources_are_found_from_a_virtual_environment(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    code = "import sysconfig; print(sysconfig.get_path('stdlib'))"
    printed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert Path(printed, "argparse.py").is_file()
    assert find_python_sources(printed) == find_python_sources()
