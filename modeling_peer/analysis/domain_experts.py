# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Experts that belong to one domain, and what a model loses without them: the functions behind `peer domains`.

An expert belongs to a domain if most of what it adds, per token of each text, it adds there. As in Monet (Park et al.
2024, arXiv:2412.04139) the experts of a domain are then switched off in all layers, and every domain is scored.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from modeling_peer.analysis.expert_importance import ExpertImportance, record_importance
from modeling_peer.analysis.named_texts import ReadingArguments, load_named_texts, score_texts
from modeling_peer.analysis.routing_hooks import scale_experts
from modeling_peer.analysis.routing_trace import token_batches
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.files import require_writable
from modeling_peer.console.tables import as_markdown
from modeling_peer.files_peer import write_text

WHOLE = "none"


@dataclass
class DomainArguments(ReadingArguments):
    """A text of each domain (--text) to find its experts, others to score, and what counts as an expert of one."""

    score_text: list[str] = field(
        default_factory=list,
        metadata={"help": "Another text of each domain to score, with the same names, in any order.", "nargs": "+"},
    )
    least_share: float = field(
        default=0.5,
        metadata={"help": "Share of what an expert adds, per token of each text, that its domain must have."},
    )
    least_count: int = field(
        default=10, metadata={"help": "Times an expert must have been retrieved, in all texts, to belong to a domain."}
    )
    max_tokens: int = field(default=100_000, metadata={"help": "Tokens of each text to find experts on, at most."})
    max_bytes: int | None = field(default=100_000, metadata={"help": "Bytes of each text to score, at most."})
    output_file: str | None = field(default=None, metadata={"help": "Write the result to this JSON file."})

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.least_share <= 1:
            raise SettingsError(f"--least_share must be above 0 and at most 1; got {self.least_share}.")


def domain_experts(
    importance: Mapping[str, Sequence[ExpertImportance]], least_share: float = 0.5, least_count: int = 10
) -> dict[str, dict[str, torch.Tensor]]:
    """The experts of each domain, by layer.

    Args:
        importance: result of `record_importance` on a text of each domain.
        least_share: of what an expert adds, summed over the domains and per token of each, the share that its domain
            must have. From 0.5 on, no expert belongs to two domains, except if both have exactly half.
        least_count: times that it was retrieved, in all texts.

    Returns:
        Sorted ids, int64, by domain and name of the layer.
    """
    names = list(importance)
    result: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for layers in zip(*importance.values(), strict=True):
        added = torch.stack([layer.output_sums / max(1, layer.num_tokens) for layer in layers])  # (domains, experts)
        shares = added / added.sum(0).clamp(min=torch.finfo(added.dtype).tiny)
        often = sum(layer.counts for layer in layers) >= least_count
        for name, share in zip(names, shares, strict=True):
            result[name][layers[0].name] = ((share >= least_share) & often).nonzero().squeeze(1)
    return result


def inspect_domains(arguments: DomainArguments) -> dict[str, Any]:
    """Find the experts of each domain, and score every domain without the experts of each.

    Returns:
        `model`, `data`, `experts` (numbers by domain and layer), `perplexity` (by the domain whose experts are off, or
        "none", and the domain that is scored), `seconds`.

    Raises:
        SettingsError: a checkpoint or a text does not exist or cannot be used, or names of texts do not agree.
    """
    started = time.perf_counter()
    arguments.require("model", "text", "score_text")
    if arguments.output_file:
        require_writable("output_file", arguments.output_file)
    texts = load_named_texts(arguments, arguments.text)
    scored = load_named_texts(arguments, arguments.score_text, streaming=False)
    if len(texts.names) < 2 or sorted(texts.names) != sorted(scored.names):
        raise SettingsError(
            f"--text has {', '.join(texts.names)} and --score_text {', '.join(scored.names)}. Name at least two texts "
            "in each, in files of the same names, such as train/french.txt and held_out/french.txt."
        )
    model, tokenizer = arguments.load()
    length = arguments.sequence_length(model)
    try:
        importance = {}
        for name, corpus in zip(texts.names, texts.corpora, strict=True):
            print(f"finding experts of {name}")
            batches = token_batches([corpus], tokenizer, length, arguments.batch_size)
            importance[name] = record_importance(model, batches, arguments.max_tokens)
        experts = domain_experts(importance, arguments.least_share, arguments.least_count)
        perplexity = {}
        for name, chosen in {WHOLE: {}, **experts}.items():
            print(f"scoring without the experts of {name}")
            with ExitStack() as stack:
                for layer, ids in chosen.items():
                    stack.enter_context(scale_experts(model, layer, ids))
                perplexity[name] = score_texts(
                    model, tokenizer, scored, arguments.max_bytes, length, arguments.batch_size
                )
    except ValueError as error:
        raise SettingsError(str(error)) from error
    result = {
        "model": arguments.model,
        "data": texts.description,
        "experts": {name: {layer: len(ids) for layer, ids in found.items()} for name, found in experts.items()},
        "perplexity": perplexity,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(as_markdown(domain_table(result)))
    if arguments.output_file:
        write_text(Path(arguments.output_file), json.dumps(result, indent=2) + "\n")
    return result


def domain_table(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each domain whose experts are off: how many they are, and the change of each domain's perplexity."""
    whole = result["perplexity"][WHOLE]
    table = [{"without the experts of": "-", "experts": "-", **{name: f"{whole[name]:.2f}" for name in whole}}]
    for off, scores in result["perplexity"].items():
        if off != WHOLE:
            number = sum(result["experts"][off].values())
            cells = {name: f"{scores[name] / whole[name] - 1:+.1%}" for name in whole}
            table.append({"without the experts of": off, "experts": f"{number:,}", **cells})
    return table
