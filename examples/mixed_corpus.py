# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Domains of text, one file each: English, French, mathematics, Python, and German and plays if their files are given.

python examples/mixed_corpus.py FOLDER --english wiki.txt.xz --french eng-fra.txt.xz --mathematics gsm8k.jsonl
peer train mixed --train_file FOLDER/train --validation_file FOLDER/validation --output_dir runs/mixed

English is plain text, also with the `<doc>` lines of WikiExtractor. French and German are the second column of
tab-separated sentence pairs, as Tatoeba's are distributed. Mathematics is JSON lines with `question` and `answer`, as
GSM8K's. Plays are plain text. Python is the standard library of the running interpreter. Each file may be compressed
(.gz or .xz).
"""

import json
import random
import re
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

from modeling_peer.data.python_sources import find_python_sources
from modeling_peer.data.text_files import open_text

SEED = 0


def english(path: Path) -> Iterator[str]:
    """Articles, without the lines that mark them up."""
    article = []
    with open_text(path) as lines:
        for line in lines:
            if line.startswith("</doc>"):
                yield "".join(article).strip() + "\n\n"
                article = []
            elif not line.startswith("<doc "):
                article.append(line)
    yield "".join(article)


def translations(path: Path) -> Iterator[str]:
    """Sentences of the second language, each once, shuffled: the source is sorted and repeats sentences."""
    with open_text(path) as lines:
        sentences = sorted({columns[1].strip() for line in lines if len(columns := line.split("\t")) > 1})
    random.Random(SEED).shuffle(sentences)
    yield from (sentence + "\n" for sentence in sentences)


def mathematics(path: Path) -> Iterator[str]:
    """Problems with their solutions."""
    with open_text(path) as lines:
        for row in map(json.loads, lines):
            answer = re.sub(r"<<.*?>>", "", row["answer"])  # marks for a calculator
            yield f"{row['question']}\n{answer}\n\n"


def plays(path: Path) -> Iterator[str]:
    """Speeches: what blank lines separate, in the order of the file."""
    with open_text(path) as lines:
        yield from (speech + "\n\n" for speech in lines.read().split("\n\n"))


def python() -> Iterator[str]:
    """Modules of the standard library, shuffled."""
    paths = [path for split in find_python_sources() for path in split]
    random.Random(SEED).shuffle(paths)
    yield from (path.read_text(encoding="utf-8") + "\n" for path in paths)


def write_corpus(folder: Path, domains: dict[str, Iterator[str]], max_bytes: int, validation_percent: float) -> None:
    """Write `folder/train/<domain>.txt` and `folder/validation/<domain>.txt`; the last documents are held out."""
    for domain, documents in domains.items():
        kept, size = [], 0
        for document in documents:
            kept.append(document)
            size += len(document.encode())
            if size >= max_bytes:
                break
        left = size * validation_percent / 100
        held_out = []
        while left > 0 and len(kept) > 1:
            held_out.append(kept.pop())
            left -= len(held_out[-1].encode())
        for split, texts in {"train": kept, "validation": held_out[::-1]}.items():
            path = folder / split / f"{domain}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(texts), encoding="utf-8")
            print(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    """Read the command line and write the folder."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    for source in ("english", "french", "mathematics"):
        parser.add_argument(f"--{source}", type=Path, required=True)
    parser.add_argument("--german", type=Path)
    parser.add_argument("--plays", type=Path)
    parser.add_argument("--max_bytes", type=int, default=4_000_000, help="bytes of each domain")
    parser.add_argument("--validation_percent", type=float, default=5.0)
    given = parser.parse_args()
    domains = {
        "english": english(given.english),
        "french": translations(given.french),
        "mathematics": mathematics(given.mathematics),
        "python": python(),
    }
    if given.german:
        domains["german"] = translations(given.german)
    if given.plays:
        domains["plays"] = plays(given.plays)
    write_corpus(given.folder, domains, given.max_bytes, given.validation_percent)


if __name__ == "__main__":
    main()
