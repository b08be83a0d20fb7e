# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Which experts a new text uses and a background text does not: those to train if the rest is not to be forgotten.

background = record_importance(model, background_batches)
new = record_importance(model, new_batches)
with train_only_experts(model, rank_experts(background, new, 256)):
    ...
"""

from collections.abc import Sequence

import torch

from modeling_peer.analysis.expert_importance import ExpertImportance

# tf_idf: as Lin et al. 2025 choose slots of a memory (arXiv:2510.15103): the share of the new text's retrievals that
# an expert has, times log((N + 1) / (n + 1)). There n of N background batches used the slot; here n of N tokens.
# kl: the expert's term in the divergence of the new text's retrievals from the background's, p · log(p / q).
RANKINGS = ("tf_idf", "kl")


def specificity(background: ExpertImportance, new: ExpertImportance, measure: str = "tf_idf") -> torch.Tensor:
    """How much an expert is the new text's own, `(num_experts,)`, float64; -inf if the new text did not retrieve it.

    Several heads of a token may retrieve an expert. It counts as one token for each, but never as more tokens than
    there are.

    Args:
        background, new: what `record_importance` found for one layer, of the same model.

    Raises:
        ValueError: `measure` is none of `RANKINGS`, or the layers differ.
    """
    if measure not in RANKINGS:
        raise ValueError(f"the measure {measure!r} is unknown. Known: {', '.join(RANKINGS)}.")
    if background.name != new.name or background.counts.shape != new.counts.shape:
        raise ValueError(
            f"{background.name} with {len(background.counts):,} experts and {new.name} with {len(new.counts):,} are "
            "not the same layer. Record both texts with one model."
        )
    share = new.counts.double() / max(1, int(new.counts.sum()))
    if measure == "tf_idf":
        num_tokens = background.num_tokens
        scores = share * ((num_tokens + 1) / (background.counts.clamp(max=num_tokens).double() + 1)).log()
    else:
        # one retrieval of each expert more, so that none has a share of zero
        expected = (background.counts.double() + 1) / (int(background.counts.sum()) + len(background.counts))
        scores = torch.xlogy(share, share / expected)
    return scores.masked_fill(new.counts == 0, float("-inf"))


def rank_experts(
    background: Sequence[ExpertImportance], new: Sequence[ExpertImportance], num_chosen: int, measure: str = "tf_idf"
) -> dict[str, torch.Tensor]:
    """The experts of each layer that are most the new text's own, best first.

    Args:
        background, new: results of `record_importance` on two texts.
        num_chosen: experts per layer, at most. A layer of which the new text used fewer has those.

    Returns:
        Ids, `(at most num_chosen,)`, int64, by the name of the layer.

    Raises:
        ValueError: the two are of different layers, or `num_chosen` is below 1.
    """
    if num_chosen < 1:
        raise ValueError(f"num_chosen ({num_chosen}) must be at least 1.")
    if [entry.name for entry in background] != [entry.name for entry in new]:
        names = (", ".join(entry.name for entry in entries) for entries in (background, new))
        raise ValueError(f"background and new must have the same layers; got {' and '.join(names)}.")
    chosen = {}
    for before, after in zip(background, new, strict=True):
        scores, ids = specificity(before, after, measure).sort(descending=True, stable=True)
        chosen[after.name] = ids[: min(num_chosen, int(scores.isfinite().sum()))]
    return chosen
