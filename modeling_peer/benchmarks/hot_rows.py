# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What a cache of hot rows would bring: how much of a trained model's reading falls on the experts it reads most."""

from typing import Any

import torch

from modeling_peer.analysis.expert_usage import find_retrievals
from modeling_peer.benchmarks.circumstances import announce
from modeling_peer.console.errors import SettingsError
from modeling_peer.data.corpus import TextArguments, load_text
from modeling_peer.hub.loading import load_checkpoint

CACHED_SHARES = (0.001, 0.003, 0.01, 0.03, 0.1)
WINDOW = 256  # tokens of a forward, or the model's positions if it has fewer


@torch.no_grad()
def shares_of_hot_rows(model: str, text_file: str, max_tokens: int) -> dict[str, Any]:
    """The share of reads that a fixed cache of the most used experts would serve, on text it was not chosen by.

    A cache of C experts holds those that the first half of the text reads most. Its share is that of the reads of the
    second half. Layers have a cache each.

    Args:
        model: a trained checkpoint with PEER layers: a folder or a Hub id.
        text_file: text as `peer evaluate` reads it.

    Returns:
        "shares" has one entry per layer and cache size: the experts held, their part of the pool, the share of reads
        that they serve, and the share that the best choice for the second half itself would serve.

    Raises:
        SettingsError: the text is too short, or the model has no PEER layer.
    """
    network, tokenizer = load_checkpoint(model)
    retrievals = find_retrievals(network)
    if not retrievals:
        raise SettingsError(f"--trained_model {model} has no PEER layer.")
    documents = load_text(TextArguments(), text_file).documents("train", 16 * max_tokens)
    ids = [token_id for document in documents for token_id in tokenizer(document)["input_ids"]]
    window = min(WINDOW, network.config.max_position_embeddings)
    windows = torch.tensor(ids[: min(max_tokens, len(ids)) // window * window]).view(-1, window)
    if len(windows) < 2:
        raise SettingsError(f"--text_file {text_file} has {len(ids)} tokens; at least {2 * window} are needed.")
    counts = torch.zeros(2, len(retrievals), network.config.num_peer_experts, dtype=torch.int64)
    network.eval()
    for i, tokens in enumerate(windows):
        half = int(i >= len(windows) // 2)
        for layer, found in enumerate(network(tokens[None], output_expert_ids=True, logits_to_keep=1).expert_ids):
            counts[half, layer] += found.flatten().bincount(minlength=counts.shape[-1])
    shares = []
    for layer, (name, _) in enumerate(retrievals):
        first, second = counts[:, layer]
        for part in CACHED_SHARES:
            held = max(1, round(part * len(first)))
            served = second[first.topk(held).indices].sum() / second.sum()
            best = second.topk(held).values.sum() / second.sum()
            shares.append(
                {
                    "layer": name,
                    "experts": held,
                    "part_of_pool": part,
                    "share_of_reads": round(float(served), 4),
                    "best_possible": round(float(best), 4),
                }
            )
    announce(f"hot rows of {model}: {windows.numel():,} tokens of {text_file}")
    return {
        "model": model,
        "text_file": text_file,
        "tokens": windows.numel(),
        "num_experts": counts.shape[-1],
        "shares": shares,
    }
