# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What PEER layers beside MLPs cost in training: the function behind `peer bench-retrofit`."""

import copy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_peer.adaptation.retrofit import retrofit
from modeling_peer.console.errors import SettingsError, require_numbers
from modeling_peer.console.tables import as_markdown
from modeling_peer.costs.provenance import describe_versions
from modeling_peer.costs.timing import Clock, interleave
from modeling_peer.costs.training_steps import make_token_ids, make_training_step


@dataclass
class RetrofitBenchmark:
    """Sizes of a Llama with random weights, and of the PEER layer beside the MLP of its middle layer."""

    hidden_size: int = field(default=576, metadata={"help": "Width; SmolLM-135M's."})
    intermediate_size: int = field(default=1536, metadata={"help": "Width of an MLP; SmolLM-135M's."})
    num_hidden_layers: int = field(default=12, metadata={"help": "Decoder layers."})
    num_attention_heads: int = field(default=9, metadata={"help": "Heads of attention; SmolLM-135M's."})
    vocab_size: int = field(default=8192, metadata={"help": "Tokens of the vocabulary."})
    num_sub_keys: int = field(default=256, metadata={"help": "n: the pool has n * n experts."})
    batch_size: int = field(default=2, metadata={"help": "Sequences per step."})
    sequence_length: int = field(default=256, metadata={"help": "Tokens per sequence."})
    repeats: int = field(default=9, metadata={"help": "Steps of each model that are measured, in turn."})
    max_seconds: float = field(default=120.0, metadata={"help": "Time for all of them."})

    def __post_init__(self):
        require_numbers(self)


def bench_retrofit(arguments: RetrofitBenchmark) -> dict[str, Any]:
    """Time steps of a dense model and of the same model with a PEER layer, in turn, and print the table.

    Both train all parameters. The gradients of the tables are row-sparse.

    Returns:
        `milliseconds` of a step (medians and quartiles), `ratio` of the medians, `settings`, `versions`, `threads`.

    Raises:
        SettingsError: sizes do not fit.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        dense = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=arguments.vocab_size,
                hidden_size=arguments.hidden_size,
                intermediate_size=arguments.intermediate_size,
                num_hidden_layers=arguments.num_hidden_layers,
                num_attention_heads=arguments.num_attention_heads,
                max_position_embeddings=arguments.sequence_length,
                tie_word_embeddings=True,
            )
        ).to(device)
        model = retrofit(copy.deepcopy(dense), num_sub_keys=arguments.num_sub_keys, row_sparse_gradients=True)
    except (ValueError, StrictDataclassError) as error:
        raise SettingsError(str(error)) from error
    steps = {
        "dense": make_training_step(dense, row_sparse_gradients=False),
        "with a PEER layer": make_training_step(model, row_sparse_gradients=True),
    }
    with torch.no_grad():  # as after some steps: with zeros, readers would have no gradient
        for layer in model.model.layers:
            if layer.is_sparse:
                layer.mlp.experts.up_embed.normal_(std=model.config.initializer_range)

    def new_input(number):
        shape = (arguments.batch_size, arguments.sequence_length)
        return make_token_ids(arguments.vocab_size, shape, seed=0, number=number, device=device)

    summaries = interleave(steps, new_input, Clock(torch.device(device)), arguments.repeats, arguments.max_seconds)
    ratio = summaries["with a PEER layer"].median_ms / summaries["dense"].median_ms
    print(
        as_markdown(
            [
                {
                    "step": name,
                    "median, ms": f"{one.median_ms:,.0f}",
                    "quartiles": f"{one.lower_quartile_ms:,.0f} to {one.upper_quartile_ms:,.0f}",
                    "repeats": one.repeats,
                    "parameters": f"{owner.num_parameters():,}",
                }
                for (name, one), owner in zip(summaries.items(), (dense, model), strict=True)
            ]
        )
    )
    print(f"{model.config.num_peer_experts:,} experts: a step takes {ratio:.2f} times as long.")
    return {
        "ratio": round(ratio, 4),
        "milliseconds": {name: one.as_dict() for name, one in summaries.items()},
        "settings": asdict(arguments),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": describe_versions(),
    }
