# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Sentence pairs for `translation_2017.py`: read or drawn, split by their English sentence, and cut into batches.

One model translates into all languages. A token of the target language stands before the English sentence (Johnson et
al. 2016, arXiv:1611.04558; section 5.4 of the 2017 paper trains on their data).
"""

import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modeling_peer.console.errors import SettingsError
from modeling_peer.data.text_files import open_text
from modeling_peer.data.tokenizers import encode_texts, train_byte_level_bpe

END = 0  # the end-of-text token of `train_byte_level_bpe`
PADDING = -100  # of targets: the value that PyTorch's cross entropy ignores

# Syllables of drawn words: English, French, German.
CONSONANTS = ("bdfgklmnprst", "vzcjqxlmnr", "hwgkprstbd")
VOWELS = ("aeo", "aiu", "eou")


class Pair(NamedTuple):
    """An English sentence and its translation."""

    english: str
    translation: str
    language: str


class EncodedPair(NamedTuple):
    """A pair as token ids."""

    source: list[int]  # target language, English sentence, end
    target: list[int]  # translation, end
    language: int  # its number


class Batch(NamedTuple):
    """Pairs whose sources are equally long, so that the encoder has no padding."""

    sources: Tensor  # (pairs, source length), int64
    targets: Tensor  # (pairs, target length), int64, `PADDING` behind the end
    languages: Tensor  # (pairs,), int64

    @property
    def inputs(self) -> Tensor:
        """What the decoder reads: the end token, then the targets but the last."""
        shifted = self.targets.roll(1, 1)
        shifted[:, 0] = END
        return shifted.masked_fill(shifted == PADDING, END)


def read_pairs(path: str | Path, option: str, language: str) -> list[Pair]:
    """Read lines of an English sentence, a tab and its translation; further columns are ignored.

    Args:
        option: the argument that named the file, for messages.

    Raises:
        SettingsError: the file cannot be read, or a line has no tab.
    """
    pairs = []
    try:
        with open_text(Path(path)) as file:
            for number, line in enumerate(file, start=1):
                columns = [" ".join(column.split()) for column in line.split("\t")]
                if len(columns) < 2 or not all(columns[:2]):
                    raise SettingsError(
                        f"--{option} {path} line {number} must be a sentence, a tab and its translation; "
                        f"got {line.strip()[:40]!r}."
                    )
                pairs.append(Pair(columns[0], columns[1], language))
    except (OSError, UnicodeDecodeError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise SettingsError(f"cannot read --{option} {path}: {getattr(error, 'strerror', None) or error}.") from error
    return pairs


def draw_pairs(num_sentences: int, num_words: int, seed: int) -> list[Pair]:
    """Draw sentences of made-up languages, each translated into two others.

    An English sentence is article, adjective, noun, verb, article, adjective, noun. "French" puts adjectives behind
    their nouns; "German" puts the verb last. Every word has one translation into each, except verbs: theirs depends on
    the noun before them.

    Args:
        num_words: adjectives, and as many nouns and verbs. The n-th is drawn with a probability of about 1/n.
    """
    generator = torch.Generator().manual_seed(seed)
    shares = 1 / torch.arange(1, num_words + 1, dtype=torch.float64)
    kinds = torch.tensor([0, 1, 2, 0, 1])  # adjective, noun, verb

    def draw(count: int) -> list[list[int]]:
        words = torch.multinomial(shares, num_sentences * count, replacement=True, generator=generator)
        return words.view(num_sentences, count).tolist()

    def spell(language: int, kind: int, word: int, form: int = 0) -> str:
        number, syllables = ((word * 3 + kind) * 2 + form) * 7 + 11, ""
        consonants, vowels = CONSONANTS[language], VOWELS[language]
        while number:
            number, consonant = divmod(number, len(consonants))
            number, vowel = divmod(number, len(vowels))
            syllables += consonants[consonant] + vowels[vowel]
        return syllables

    pairs = []
    for words in draw(len(kinds)):
        form = words[1] % 2  # of the verb's translation
        for language, name in ((1, "French"), (2, "German")):
            english = [spell(0, int(kind), word) for kind, word in zip(kinds, words, strict=True)]
            a, b, verb, c, d = (
                spell(language, int(kind), word, form if kind == 2 else 0)
                for kind, word in zip(kinds, words, strict=True)
            )
            order = ["la", b, a, verb, "la", d, c] if language == 1 else ["das", a, b, "das", c, d, verb]
            english = ["the", english[0], english[1], english[2], "the", *english[3:]]
            pairs.append(Pair(" ".join(english), " ".join(order), name))
    return pairs


def split_pairs(pairs: Sequence[Pair], num_test: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and test pairs without repetitions. All pairs of `num_test` English sentences are the test.

    Raises:
        SettingsError: there are not more English sentences than that.
    """
    sentences = sorted({pair.english for pair in pairs})
    if num_test >= len(sentences):
        raise SettingsError(
            f"--test_sentences ({num_test}) must be less than the {len(sentences)} English sentences of the data."
        )
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed))
    held_out = {sentences[place] for place in order[:num_test].tolist()}
    distinct = list(dict.fromkeys(pairs))
    return [p for p in distinct if p.english not in held_out], [p for p in distinct if p.english in held_out]


class Vocabulary:
    """One byte-level BPE of all languages, and a token for each language to translate into.

    Args:
        pairs: to learn from.
        size: tokens without those of the languages.
    """

    def __init__(self, pairs: Sequence[Pair], size: int):
        self.languages = sorted({pair.language for pair in pairs})
        texts = dict.fromkeys(text for pair in pairs for text in (pair.english, pair.translation))
        self.tokenizer: PreTrainedTokenizerBase = train_byte_level_bpe(texts, size)
        self.num_words = len(self.tokenizer)
        self._pieces = [self.tokenizer.decode([token]).strip() for token in range(self.num_words)]
        self._of_words = torch.tensor([token != END and piece != "" for token, piece in enumerate(self._pieces)])

    def __len__(self) -> int:
        return self.num_words + len(self.languages)

    def encode(self, pairs: Sequence[Pair], max_tokens: int) -> list[EncodedPair]:
        """Encode those whose both sentences have at most `max_tokens` tokens."""
        english = list(dict.fromkeys(pair.english for pair in pairs))
        ids = dict(zip(english, encode_texts(self.tokenizer, english), strict=True))
        translations = encode_texts(self.tokenizer, [pair.translation for pair in pairs])
        encoded = []
        for pair, target in zip(pairs, translations, strict=True):
            source, language = ids[pair.english], self.languages.index(pair.language)
            if max(len(source), len(target)) <= max_tokens:
                encoded.append(EncodedPair([self.num_words + language, *source, END], [*target, END], language))
        return encoded

    def spell(self, token: int) -> str:
        """One token as text, without spaces around it."""
        if token >= self.num_words:
            return f"<{self.languages[token - self.num_words]}>"
        return self._pieces[token]

    def is_word(self, ids: Tensor) -> Tensor:
        """Whether tokens are pieces of words or signs: not end, language or white space."""
        return (ids < self.num_words) & self._of_words[ids.clamp(max=self.num_words - 1)]


def make_batches(pairs: Sequence[EncodedPair], batch_tokens: int, generator: torch.Generator) -> list[Batch]:
    """Cut pairs into batches of similar lengths, in random order.

    Args:
        batch_tokens: of the targets with their padding, at most, unless one pair alone has more.
    """
    order = torch.randperm(len(pairs), generator=generator).tolist()
    order.sort(key=lambda i: (len(pairs[i].source), len(pairs[i].target)))
    groups: list[list[EncodedPair]] = []
    for pair in (pairs[i] for i in order):
        fits = (
            groups
            and len(groups[-1][0].source) == len(pair.source)
            and (len(groups[-1]) + 1) * len(pair.target) <= batch_tokens
        )
        if fits:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    shuffled = torch.randperm(len(groups), generator=generator).tolist()
    return [_as_batch(groups[place]) for place in shuffled]


def _as_batch(pairs: Sequence[EncodedPair]) -> Batch:
    targets = torch.full((len(pairs), max(len(pair.target) for pair in pairs)), PADDING)
    for row, pair in zip(targets, pairs, strict=True):
        row[: len(pair.target)] = torch.tensor(pair.target)
    sources = torch.tensor([pair.source for pair in pairs])
    return Batch(sources, targets, torch.tensor([pair.language for pair in pairs]))


def endless_batches(pairs: Sequence[EncodedPair], batch_tokens: int, generator: torch.Generator) -> Iterator[Batch]:
    """Batches of one pass over the pairs after the other, each in another order."""
    while True:
        yield from make_batches(pairs, batch_tokens, generator)
