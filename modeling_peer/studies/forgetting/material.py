# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""New material to learn, and the old text on which forgetting is measured.

A domain is a text in `folder/train/NAME.txt` and `folder/validation/NAME.txt`, as `examples/mixed_corpus.py` writes
them. Facts are made up: people who do not exist, and a city, a profession and an instrument of each. A fact is trained
in three wordings and scored in two others, so that repeating a sentence does not count as knowing the fact.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from modeling_peer.console.errors import SettingsError
from modeling_peer.data.text_files import find_text_files, read_pieces
from modeling_peer.data.tokenizers import encode_texts

FACTS = "facts"
IGNORED = -100  # a label that is not scored
TOKENS_PER_PIECE = 512  # about: a piece has 2,048 characters

SYLLABLES = ("bra", "del", "fen", "gor", "hal", "jun", "kel", "lor", "mav", "nis", "pol", "quen", "rud", "sil", "tor")
CITIES = ("London", "Paris", "Berlin", "Rome", "Vienna", "Moscow", "Madrid", "Athens", "Dublin", "Boston", "Chicago")
PROFESSIONS = ("teacher", "lawyer", "painter", "soldier", "priest", "farmer", "sailor", "singer", "writer", "judge")
INSTRUMENTS = ("piano", "violin", "guitar", "drums", "flute", "trumpet", "cello", "harp", "organ", "clarinet")
# Objects of a relation, wordings to train, and wordings to score. An object ends its sentence.
RELATIONS = (
    (
        CITIES,
        ("{} was born in {}.", "The birthplace of {} is {}.", "The home town of {} is {}."),
        ("{} is a native of {}.", "The city where {} was born is {}."),
    ),
    (
        PROFESSIONS,
        ("{} works as a {}.", "The profession of {} is that of a {}.", "For a living, {} is a {}."),
        ("{} earns money as a {}.", "The job of {} is that of a {}."),
    ),
    (
        INSTRUMENTS,
        ("{} plays the {}.", "The instrument of {} is the {}.", "In the band, {} plays the {}."),
        ("{} performs on the {}.", "The favourite instrument of {} is the {}."),
    ),
)


@dataclass
class Material:
    """Something to learn, in tokens.

    Args:
        name: of the domain, or `"facts"`.
        train: `(num_sequences, sequence_length)`, int64.
        held_out: what is scored, same width or less.
        labels: of `held_out`, same shape: its tokens, or `IGNORED`. The model shifts them.
        asks: whether a sequence of `held_out` is a question, which is answered if all its labels are predicted.
    """

    name: str
    train: torch.Tensor
    held_out: torch.Tensor
    labels: torch.Tensor
    asks: bool = False


def read_domain(
    folder: Path,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    num_train: int,
    num_held_out: int,
) -> Material:
    """At most so many sequences of a domain, spread evenly over each of its two files.

    Raises:
        SettingsError: a file is missing, or has less text than one sequence.
    """
    train, held_out = (
        _sequences(folder / split / f"{name}.txt", tokenizer, sequence_length, number)
        for split, number in (("train", num_train), ("validation", num_held_out))
    )
    return Material(name, train, held_out, held_out)


def _sequences(path: Path, tokenizer: PreTrainedTokenizerBase, length: int, number: int) -> torch.Tensor:
    pieces = [text for file in find_text_files(path) for text, _ in read_pieces(file, "text")]
    # pieces from the whole file, twice as many as are probably needed: no more is tokenized
    step = max(1, len(pieces) * TOKENS_PER_PIECE // (2 * number * length))
    tokens = [token for row in encode_texts(tokenizer, pieces[::step]) for token in row]
    count = len(tokens) // length
    if not count:
        raise SettingsError(f"{path} has {len(tokens)} tokens, less than one sequence of {length}.")
    sequences = torch.tensor(tokens[: count * length]).view(count, length)
    return sequences[torch.linspace(0, count - 1, min(count, number)).long()]


def make_facts(
    num_people: int, seed: int, tokenizer: PreTrainedTokenizerBase, sequence_length: int, num_orders: int = 8
) -> Material:
    """Three facts about each of some people who do not exist, drawn from a seed.

    Sequences for training are the sentences one after another, in `num_orders` random orders.

    Raises:
        SettingsError: there are not so many names, or a sentence is longer than a sequence.
    """
    draw = random.Random(seed)
    names = sorted({f"{first}{second}".capitalize() for first in SYLLABLES for second in SYLLABLES})
    surnames = sorted({f"{first}{second}".capitalize() for first in SYLLABLES for second in ("man", "ton", "ley")})
    if not 1 <= num_people <= len(names):
        raise SettingsError(f"--num_people ({num_people}) must be between 1 and {len(names)}.")
    people = [f"{name} {draw.choice(surnames)}" for name in draw.sample(names, num_people)]
    statements, questions = [], []
    for person in people:
        for objects, trained, scored in RELATIONS:
            known = draw.choice(objects)
            statements += [wording.format(person, known) for wording in trained]
            questions += [(wording.format(person, known), known) for wording in scored]
    tokens = []
    for _ in range(num_orders):
        draw.shuffle(statements)
        tokens += encode_texts(tokenizer, ["\n".join(statements) + "\n"])[0]
    count = len(tokens) // sequence_length
    if not count:
        raise SettingsError(f"{num_people} people give {len(tokens)} tokens, less than {sequence_length}.")
    train = torch.tensor(tokens[: count * sequence_length]).view(count, sequence_length)
    return Material(FACTS, train, *_as_questions(questions, tokenizer, sequence_length), asks=True)


def _as_questions(
    questions: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sentences in rows of equal length, after a line end as in training, and labels of their objects alone."""
    rows, labels = [], []
    for sentence, known in questions:
        before = sentence[: sentence.rindex(known)].rstrip()
        start, whole = encode_texts(tokenizer, ["\n" + before, f"\n{before} {known}"])
        if whole[: len(start)] != start:
            raise SettingsError(
                f"the tokenizer gives {before!r} other tokens before {known!r} than alone, so its loss cannot be "
                "scored. Leave facts out of --tasks."
            )
        rows.append(whole)
        labels.append([IGNORED] * len(start) + whole[len(start) :])
    width = max(map(len, rows))
    if width > longest:
        raise SettingsError(f"--sequence_length ({longest}) is less than the {width} tokens of a question.")

    def padded(lists: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (width - len(row)) for row in lists])

    return padded(rows, 0), padded(labels, IGNORED)
