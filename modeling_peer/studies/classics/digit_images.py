# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Images of handwritten digits that scikit-learn ships, for classics on images.

They are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998, UCI): 1,797 images of
8 x 8 pixels with 17 levels, about 180 of each digit.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IMAGE_SIDE, NUM_CLASSES, MAX_LEVEL = 8, 10, 16
NUM_TRAIN = 1200  # the other 597 are for testing


class Digits(NamedTuple):
    """Images and labels of one part of the data."""

    images: Tensor  # (n, 64), rows of pixels one after the other, from 0 to 1, float32
    labels: Tensor  # (n,), int64, 0 to 9


def read_digits() -> Digits:
    """All images, in the order of the source. It reads a file of the installed package, nothing from the net.

    Raises:
        ModuleNotFoundError: scikit-learn, of the extra `bench`, is missing.
    """
    from sklearn.datasets import load_digits  # optional: extra bench

    source = load_digits()
    return Digits(torch.tensor(source.data / MAX_LEVEL, dtype=torch.float32), torch.tensor(source.target))


def split_digits(digits: Digits, seed: int) -> tuple[Digits, Digits]:
    """Images for training and for testing, drawn anew for each seed."""
    order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return Digits(*(values[train] for values in digits)), Digits(*(values[test] for values in digits))


def is_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the logit of the label is above all others: `(n, classes)` and `(n,)` to `(n,)`.

    A tie counts as wrong. `argmax` would take the first class if all logits are equal, as they are for an image whose
    only expert was removed.
    """
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
    return (own > others).squeeze(1)
