# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A baseline that uses the frequencies of tokens, but not their order."""

import math
from collections.abc import Iterable

import numpy as np

from modeling_peer.data.tokenizers import encode_texts


def unigram_bits_per_byte(training_counts: np.ndarray, texts: Iterable[str], tokenizer) -> float:
    """Bits per UTF-8 byte of `texts` under add-one smoothed token frequencies of the training text.

    Args:
        training_counts: `(vocab_size,)`, number of occurrences of each token.
        texts: held-out documents.
        tokenizer: the tokenizer that produced the counts.
    """
    probabilities = (training_counts + 1) / (training_counts.sum() + len(training_counts))
    bits = -np.log2(probabilities)
    total_bits, num_bytes = 0.0, 0
    for text in texts:
        (ids,) = encode_texts(tokenizer, [text])
        total_bits += math.fsum(bits[ids])
        num_bytes += len(text.encode("utf-8"))
    return total_bits / num_bytes
