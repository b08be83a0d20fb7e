"""Where the text comes from: Hub or local data set, files, or the interpreter's own sources, as one kind of corpus."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

from modeling_peer.console.errors import SettingsError, nearest
from modeling_peer.console.secrets import without_secrets
from modeling_peer.training.names import locate_data_set
from modeling_peer.training.python_sources import PYTHON_STDLIB, find_python_sources
from modeling_peer.training.recipes import DataArguments
from modeling_peer.training.text_files import find_text_files, read_pieces, require_text

ENDS_DOCUMENT = "ends_document"
# our rows; data sets from elsewhere have their own columns and no ends_document
FEATURES = datasets.Features({"text": datasets.Value("string"), ENDS_DOCUMENT: datasets.Value("bool")})


@dataclass
class Corpus:
    """Text to train on and text held out.

    `train` and `validation` have a string column named `text_column`; where the column `ends_document` is present it
    is false for a row whose document continues in the next one. `validation` is None when there is none.
    """

    train: datasets.Dataset | datasets.IterableDataset
    validation: datasets.Dataset | datasets.IterableDataset | None
    description: str
    text_column: str = "text"
    rows_are_lines: bool = False
    dataset_id: str | None = None

    def documents(self, split: str, max_bytes: int | None = None) -> list[str]:
        """The whole documents of `split`, the last one cut so that all together have at most `max_bytes` of UTF-8."""
        rows = getattr(self, split)
        return list(_limit_bytes(_join_pieces(rows, self.text_column, self.rows_are_lines), max_bytes))


def load_corpus(arguments: DataArguments) -> Corpus:
    """Open what the arguments name, and check that there is text in it, without reading it all.

    Raises:
        SettingsError: missing, empty, not text, no such split or column; the message says which.
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
            raise SettingsError("--validation_file goes with --train_file; the embedded corpus holds out its own.")
        train, validation = find_python_sources()
        corpus = _from_files(arguments, train, validation, "Python standard library sources, held out by file")
    else:
        corpus = _from_dataset(arguments)
    if corpus.validation is None and 0 < arguments.validation_percent < 100:
        _hold_out(corpus, arguments.validation_percent)
    return corpus


def _from_files(arguments: DataArguments, train: list[Path], validation: list[Path], description: str) -> Corpus:
    # .jsonl keeps its column's name in the file; our rows always say "text"
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
    # size and time are part of the cache's key: a file that changed is read again
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
    except Exception as error:  # the library raises a dozen kinds; each names the cause
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
    # from the end, not at random: pieces of one document would otherwise stand on both sides
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
            # ignore: a character cut in two is dropped
            yield encoded[: int(left)].decode("utf-8", errors="ignore") if len(encoded) > left else document
            return
        left -= len(encoded)
        yield document
