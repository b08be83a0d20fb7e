# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Sources of text: Hub or local data set, files, or the interpreter's own sources, all as one kind of corpus."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from modeling_peer.console.errors import SettingsError, nearest, require_numbers
from modeling_peer.console.names import locate_data_set
from modeling_peer.console.secrets import without_secrets
from modeling_peer.data.python_sources import PYTHON_STDLIB, find_python_sources
from modeling_peer.data.text_files import find_text_files, read_pieces, require_text

ENDS_DOCUMENT = "ends_document"
# columns of our rows; other data sets have their own columns and no ends_document
FEATURES = datasets.Features({"text": datasets.Value("string"), ENDS_DOCUMENT: datasets.Value("bool")})


@dataclass
class DataArguments:
    """Training and validation text, and how it is split into blocks."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub data set id or local data set folder. If this and train_file are unset: 'python_stdlib', the "
            "sources of the running interpreter, which need no download."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, for those that have several."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of the data set to train on."})
    validation_split: str = field(
        default="validation",
        metadata={"help": "Split to evaluate on. Without such a split, validation_percent of the rows is held out."},
    )
    train_file: str | None = field(
        default=None,
        metadata={"help": "Text to train on: a folder or a UTF-8 file (also .jsonl with a text column, .gz and .xz)."},
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Text to evaluate on, in the same forms. Unset: see validation_percent."}
    )
    validation_percent: float = field(
        default=5.0, metadata={"help": "Percentage of rows held out from the end when no validation text is named."}
    )
    text_column: str = field(default="text", metadata={"help": "Column (or .jsonl key) that holds the text."})
    rows_are_lines: bool = field(
        default=False,
        metadata={"help": "Rows of the data set are lines of continuous text, not documents (as in WikiText)."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the training text while training, and never store it. Needs max_steps."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Examples among which a stream is shuffled; 0 keeps its order."}
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens per example. Unset: the model's max_position_embeddings, at most 1024."},
    )
    preprocessing_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenize. Unset: one (the tokenizer itself is threaded)."}
    )
    masking_probability: float = field(
        default=0.15,
        metadata={"help": "Share of tokens that a model with is_causal=false must predict, masked as in BERT."},
    )
    max_evaluation_examples: int | None = field(
        default=None,
        metadata={"help": "Evaluations during training use this many examples, evenly spaced. Unset: all of them."},
    )
    max_evaluation_bytes: int | None = field(
        default=None,
        metadata={"help": "Final perplexity and bits per byte use this much validation text. Unset: all of it."},
    )

    def __post_init__(self):
        require_numbers(self)


@dataclass
class TextForm:
    """How the rows of a text are read."""

    text_column: str = field(default="text", metadata={"help": "Column (or .jsonl key) that holds the text."})
    rows_are_lines: bool = field(
        default=False,
        metadata={"help": "Join the rows to one text. For data sets whose rows are lines, such as WikiText."},
    )


@dataclass
class TextArguments(TextForm):
    """Text to read without training: a file if one is named, otherwise a split of a data set."""

    dataset_name: str = field(
        default=PYTHON_STDLIB,
        metadata={
            "help": "Hub id or local folder of a data set. Default: the sources of the Python standard library."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, if it has several."}
    )
    split: str = field(default="validation", metadata={"help": "Split of the data set."})


@dataclass
class Corpus:
    """Text to train on and text held out.

    `train` and `validation` have a string column named `text_column`. If there is a column `ends_document`, it is
    false for a row whose document continues in the next one. `validation` may be None.
    """

    train: datasets.Dataset | datasets.IterableDataset
    validation: datasets.Dataset | datasets.IterableDataset | None
    description: str
    text_column: str = "text"
    rows_are_lines: bool = False
    dataset_id: str | None = None

    def documents(self, split: str, max_bytes: int | None = None) -> list[str]:
        """The documents of `split`, whole. The last one is cut so that the total is at most `max_bytes` of UTF-8."""
        rows = getattr(self, split)
        return list(_limit_bytes(_join_pieces(rows, self.text_column, self.rows_are_lines), max_bytes))


def load_corpus(arguments: DataArguments) -> Corpus:
    """Open the corpus that the arguments name, and check that it has text, without reading all of it.

    Raises:
        SettingsError: the corpus is missing, empty or not text, or has no such split or column.
    """
    if arguments.dataset_name and arguments.train_file:
        raise SettingsError(
            f"--dataset_name {arguments.dataset_name} and --train_file {arguments.train_file}: name one of the two."
        )
    if arguments.train_file:
        train = find_text_files(arguments.train_file)
        validation = find_text_files(arguments.validation_file) if arguments.validation_file else []
        corpus = _from_files(arguments, train, validation, f"local text: {Path(arguments.train_file).name}")
    elif arguments.dataset_name in (None, PYTHON_STDLIB):
        if arguments.validation_file:
            raise SettingsError("--validation_file needs --train_file; the embedded corpus holds out its own files.")
        train, validation = find_python_sources()
        corpus = _from_files(arguments, train, validation, "Python standard library sources, held out by file")
    else:
        corpus = _from_dataset(arguments)
    if corpus.validation is None and 0 < arguments.validation_percent < 100:
        _hold_out(corpus, arguments.validation_percent)
    return corpus


def load_text(arguments: TextForm, file: str | None = None, streaming: bool = False) -> Corpus:
    """The text of a file or folder or, without one, of the data set: as split `train` of a corpus without others.

    Args:
        arguments: `TextArguments`, if there is no file.
        streaming: read rows when they are used. The embedded corpus is small, and read at once.

    Raises:
        SettingsError: as `load_corpus`.
    """
    is_library = file is None and arguments.dataset_name == PYTHON_STDLIB
    if is_library and arguments.split not in ("train", "validation"):
        raise SettingsError(f"{PYTHON_STDLIB} has the splits train and validation, not {arguments.split!r}.")
    data = DataArguments(
        train_file=file,
        text_column=arguments.text_column,
        rows_are_lines=arguments.rows_are_lines,
        streaming=streaming,
    )
    data.validation_percent = 0.0
    if file is None:
        data.dataset_name, data.dataset_config = arguments.dataset_name, arguments.dataset_config
        data.train_split = "train" if is_library else arguments.split
        data.streaming = streaming and not is_library
    corpus = load_corpus(data)
    if is_library:
        corpus.train = getattr(corpus, arguments.split)
    corpus.validation = None
    if file is None:
        corpus.description += f", {arguments.split}"
    return corpus


def _from_files(arguments: DataArguments, train: list[Path], validation: list[Path], description: str) -> Corpus:
    # text_column is the key in a .jsonl file; the column of our rows is always "text"
    parts = []
    for files in (train, validation):
        if not files:
            parts.append(None)
            continue
        require_text(files, arguments.text_column)
        parts.append(_open_files(files, arguments.text_column, arguments.streaming and files is train))
    count = f"{len(train)} {'files' if train[1:] else 'file'}"
    return Corpus(
        *parts, description=f"{description} ({count}{f', {len(validation)} held out' if validation else ''})"
    )


def _open_files(files: list[Path], text_column: str, streaming: bool):
    # size and time are part of the cache key, so a changed file is read again
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    try:
        return kind.from_generator(
            _generate_rows, features=FEATURES, gen_kwargs={"stamps": stamps, "text_column": text_column}
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, SettingsError):
            raise SettingsError(str(error.__cause__)) from error
        raise


def _generate_rows(stamps: list[tuple[str, int, int]], text_column: str) -> Iterator[dict]:
    for path, _, _ in stamps:
        for text, ends_document in read_pieces(Path(path), text_column):
            yield {"text": text, ENDS_DOCUMENT: ends_document}


def _from_dataset(arguments: DataArguments) -> Corpus:
    name = arguments.dataset_name
    try:
        source = locate_data_set(name, (PYTHON_STDLIB,))
        splits = datasets.load_dataset(source, arguments.dataset_config, streaming=arguments.streaming)
    except Exception as error:  # the library raises many kinds, and each message has the cause
        kind = "" if isinstance(error, SettingsError) else f"{type(error).__name__}: "
        raise SettingsError(f"cannot open data set {name!r}: {kind}{error}") from error
    if arguments.train_split not in splits:
        raise SettingsError(
            f"data set {name!r} has no split {arguments.train_split!r}; it has: {', '.join(splits)}. "
            "Set --train_split."
        )
    train = splits[arguments.train_split]
    columns = train.column_names or list(next(iter(train), {}))
    if arguments.text_column not in columns:
        raise SettingsError(
            f"data set {name!r} has no column {arguments.text_column!r}; it has: {', '.join(columns)}. "
            f"Set --text_column.{nearest(arguments.text_column, columns)}"
        )
    validation = splits.get(arguments.validation_split)
    for split, rows in ((arguments.train_split, train), (arguments.validation_split, validation)):
        if rows is not None:
            _require_text(rows, arguments.text_column, f"split {split!r} of data set {name!r}")
    config = f" ({arguments.dataset_config})" if arguments.dataset_config else ""
    return Corpus(
        train,
        validation,
        description=f"data set {without_secrets(name)}{config}",
        text_column=arguments.text_column,
        rows_are_lines=arguments.rows_are_lines,
        dataset_id=None if Path(name).exists() else name,
    )


def _require_text(rows: Iterable[dict], text_column: str, place: str) -> None:
    first = next((row[text_column] for row in rows if row.get(text_column)), None)
    if first is None:
        raise SettingsError(f"no text in column {text_column!r} of {place}: empty.")
    if not isinstance(first, str):
        raise SettingsError(
            f"column {text_column!r} of {place} holds {type(first).__name__}, not text. Set --text_column."
        )


def _hold_out(corpus: Corpus, percent: float) -> None:
    # from the end, not at random: otherwise pieces of one document would be on both sides
    if isinstance(corpus.train, datasets.IterableDataset):
        return
    rows = len(corpus.train)
    held_out = max(1, round(rows * percent / 100))
    if held_out < rows:
        corpus.validation = corpus.train.select(range(rows - held_out, rows))
        corpus.train = corpus.train.select(range(rows - held_out))
        corpus.description += f", the last {held_out} of {rows} rows held out"


def _join_pieces(rows: Iterable[dict], text_column: str, rows_are_lines: bool) -> Iterator[str]:
    pieces = []
    for row in rows:
        pieces.append(row[text_column] or "")
        if row.get(ENDS_DOCUMENT, not rows_are_lines):
            yield "".join(pieces)
            pieces = []
    if pieces:
        yield "".join(pieces)


def _limit_bytes(documents: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    left = float("inf") if max_bytes is None else max_bytes
    for document in documents:
        encoded = document.encode("utf-8")
        if len(encoded) >= left:
            # ignore: drops a character cut in two
            yield encoded[: int(left)].decode("utf-8", errors="ignore") if len(encoded) > left else document
            return
        left -= len(encoded)
        yield document
