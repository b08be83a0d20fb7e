# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Text of several domains for `specialisation.py`: read from files or drawn, and cut into sequences of tokens."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modeling_peer.console.errors import SettingsError
from modeling_peer.data.text_files import find_text_files, read_pieces
from modeling_peer.data.tokenizers import encode_texts, train_byte_level_bpe
from modeling_peer.studies.classics.translation_data import draw_pairs

SPLITS = ("train", "validation")
DRAWN_SENTENCES, DRAWN_WORDS, DRAWN_HELD_OUT = 4000, 100, 0.2


class Domains(NamedTuple):
    """Sequences of every domain, as token ids."""

    names: list[str]
    tokenizer: PreTrainedTokenizerBase
    train: list[Tensor]  # of each domain, (sequences, sequence_length), int64
    held_out: Tensor  # (domains * sequences, sequence_length), int64, equally many of each domain, in their order
    source: str  # where the text is from

    @property
    def held_out_domains(self) -> Tensor:
        """The number of the domain of each held-out sequence, `(domains * sequences,)`."""
        return torch.arange(len(self.names)).repeat_interleave(len(self.held_out) // len(self.names))

    def digest(self) -> str:
        """A number that changes with any token."""
        summed = hashlib.sha256(" ".join(self.names).encode())
        for ids in (*self.train, self.held_out):
            summed.update(str(tuple(ids.shape)).encode() + ids.numpy().tobytes())
        return summed.hexdigest()


def load_domains(
    text_folder: str | None, vocab_size: int, sequence_length: int, held_out_tokens: int, seed: int
) -> Domains:
    """Read or draw the text, learn a byte-level BPE from its training part, and cut it into sequences.

    Args:
        text_folder: with `train/NAME.txt` and `validation/NAME.txt` for each domain; None: made-up languages.
        held_out_tokens: of each domain, at most; all domains get as many as the shortest has.

    Raises:
        SettingsError: the folder has not this form, a file is empty or cannot be read, there is one domain only, or a
            domain has less than one sequence.
    """
    if text_folder:
        texts, source = read_texts(text_folder), "read"
    else:
        texts, source = draw_texts(seed), "drawn from made-up languages"
    names = list(texts["train"])
    tokenizer = train_byte_level_bpe((text for pieces in texts["train"].values() for text in pieces), vocab_size)
    ids = {
        split: [
            torch.tensor([token for row in encode_texts(tokenizer, texts[split][name]) for token in row])
            for name in names
        ]
        for split in SPLITS
    }
    for split in SPLITS:
        for name, tokens in zip(names, ids[split], strict=True):
            if len(tokens) < sequence_length:
                raise SettingsError(
                    f"{split} text of {name} has {len(tokens)} tokens, less than one sequence of "
                    f"--sequence_length ({sequence_length})."
                )
    most = min(held_out_tokens, *(len(tokens) for tokens in ids["validation"])) // sequence_length
    train = [_cut(tokens, sequence_length, len(tokens) // sequence_length) for tokens in ids["train"]]
    held_out = torch.cat([_cut(tokens, sequence_length, max(1, most)) for tokens in ids["validation"]])
    return Domains(names, tokenizer, train, held_out, source)


def _cut(tokens: Tensor, length: int, number: int) -> Tensor:
    return tokens[: number * length].view(number, length).long()


def read_texts(text_folder: str) -> dict[str, dict[str, list[str]]]:
    """Pieces of text by split and by domain, which is the name of the file without its ending.

    Raises:
        SettingsError: as `load_domains`.
    """
    texts: dict[str, dict[str, list[str]]] = {}
    for split in SPLITS:
        folder = Path(text_folder, split)
        if not folder.is_dir():
            raise SettingsError(
                f"--text_folder {text_folder} has no folder {split}. It needs train/NAME.txt and validation/NAME.txt "
                "for each domain, as examples/mixed_corpus.py writes them."
            )
        texts[split] = {}
        for path in find_text_files(folder):
            pieces = [piece for piece, _ in read_pieces(path, "text")]
            if not any(pieces):
                raise SettingsError(f"--text_folder: {path} is empty.")
            texts[split].setdefault(path.name.split(".")[0], []).extend(pieces)
    _require_domains(text_folder, texts)
    return texts


def _require_domains(text_folder: str, texts: Mapping[str, Mapping[str, list[str]]]) -> None:
    train, held_out = (sorted(texts[split]) for split in SPLITS)
    if train != held_out:
        raise SettingsError(
            f"--text_folder {text_folder} has {', '.join(train)} in train and {', '.join(held_out)} in validation. "
            "The files must have the same names."
        )
    if len(train) < 2:
        raise SettingsError(
            f"--text_folder {text_folder} has one domain, {train[0]}. Experts can divide by domain from two on."
        )


def draw_texts(seed: int) -> dict[str, dict[str, list[str]]]:
    """Sentences of three made-up languages, by split and language; each language is a domain. See `draw_pairs`."""
    pairs = draw_pairs(DRAWN_SENTENCES, DRAWN_WORDS, seed)
    sentences = {
        "English": [pair.english for pair in pairs if pair.language == "French"],
        **{name: [pair.translation for pair in pairs if pair.language == name] for name in ("French", "German")},
    }
    first = round(DRAWN_HELD_OUT * DRAWN_SENTENCES)
    parts = {"train": slice(first, None), "validation": slice(first)}
    return {
        split: {name: [f"{sentence}.\n" for sentence in of_language[part]] for name, of_language in sentences.items()}
        for split, part in parts.items()
    }
