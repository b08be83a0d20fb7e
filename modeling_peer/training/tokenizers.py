"""Tokenizers learned from the training text, byte-level BPE or one token a byte, and whether one fits a model."""

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from modeling_peer.training.recipes import SettingsError

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
NUM_BYTES = 256
# merges settle long before; more text costs time and memory for the same tokens
MAX_TRAINING_CHARACTERS = 50_000_000


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int, with_mask: bool = False) -> PreTrainedTokenizerFast:
    """Learn merges of bytes, most frequent pair first (Sennrich et al. 2016; bytes as in GPT-2).

    Every text can be encoded and decoded back, since all 256 bytes are tokens.

    Args:
        texts: read up to `MAX_TRAINING_CHARACTERS`.
        vocab_size: tokens in all: special ones, 256 bytes, and merges. Small texts may give fewer.
        with_mask: have a mask token beside the end-of-text token, for masked language models.
    """
    special_tokens = _special_tokens(with_mask)
    smallest = NUM_BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size ({vocab_size}) must be at least {smallest}: 256 bytes and {', '.join(special_tokens)}."
        )
    tokenizer = _empty_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
    )
    tokenizer.train_from_iterator(_first_characters(texts), trainer)
    return _wrap(tokenizer, with_mask)


def byte_tokenizer(with_mask: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, and the special ones: nothing to learn, and bits per token are bits per byte."""
    special_tokens = _special_tokens(with_mask)
    tokenizer = _empty_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_BYTES + len(special_tokens),
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    return _wrap(tokenizer, with_mask)


def require_own_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str, model: str, trust_remote_code: bool) -> None:
    """Raise SettingsError unless `tokenizer` has the tokens of the one saved with the checkpoint, if there is one."""
    try:
        own = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code).get_vocab()
    except (OSError, ValueError):
        return
    given = tokenizer.get_vocab()
    if differing := sorted(token for token in own.keys() | given.keys() if own.get(token) != given.get(token)):
        raise SettingsError(
            f"tokenizer {name!r} has {len(given)} tokens, the one of {model!r} {len(own)}; {len(differing)} differ, "
            f"such as {', '.join(map(repr, differing[:3]))}. Use the checkpoint's own: leave --tokenizer unset."
        )


def require_embeddings(tokenizer: PreTrainedTokenizerBase, num_embeddings: int, way_out: str) -> None:
    """Raise SettingsError when some token has no embedding."""
    if len(tokenizer) > num_embeddings:
        raise SettingsError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {num_embeddings} embeddings. {way_out}"
        )


def _special_tokens(with_mask: bool) -> list[str]:
    return [END_OF_TEXT, MASK] if with_mask else [END_OF_TEXT]


def _empty_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer, with_mask: bool) -> PreTrainedTokenizerFast:
    # one token begins, ends and pads: packed training never pads, and the start of a text follows the end of another
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        mask_token=MASK if with_mask else None,
        clean_up_tokenization_spaces=False,
    )


def _first_characters(texts: Iterable[str]) -> Iterator[str]:
    left = MAX_TRAINING_CHARACTERS
    for text in texts:
        yield text
        left -= len(text)
        if left <= 0:
            return
