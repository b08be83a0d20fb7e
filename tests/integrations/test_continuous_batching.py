# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Continuous batching: prompts of many lengths in one packed row generate what each generates alone."""

import copy
import sys

import pytest
import torch
from transformers import ContinuousBatchingConfig

from modeling_peer import PeerForCausalLM, quantise_expert_tables
from modeling_peer.mapped_memory_peer import is_mapped_file
from modeling_peer.quantised_tables_peer import expert_pools

NEW_TOKENS = 6
MODELS = {
    "peer": {},
    "dense": {"mlp_layer_types": ["dense"] * 3},
    "PEER beside the MLP": {"parallel_dense_mlp": True},
    "product_key_memory": {"sparse_mlp": "product_key_memory"},
    "Memory+": {"sparse_mlp": "product_key_memory", "gated_memory": True},
    "top_k_moe": {"sparse_mlp": "top_k_moe"},
    "expert_choice_moe": {"sparse_mlp": "expert_choice_moe"},
    "multilinear_moe": {"sparse_mlp": "multilinear_moe"},
}


def assert_batches_are_greedy_search(model):
    prompts = [torch.randint(1, 99, (length,)).tolist() for length in (1, 9, 4, 17, 2)]
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
        for prompt in prompts
    ]
    options = copy.deepcopy(model.generation_config)
    options.update(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
    # fewer tokens a batch than the prompts have together: some wait, and one is read in two parts
    cache = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)
    outputs = model.generate_batch(prompts, generation_config=options, continuous_batching_config=cache)
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    for prompt, (tokens,) in zip(prompts, expected, strict=True):
        assert by_prompt[tuple(prompt)] == tokens[len(prompt) :].tolist()


@pytest.mark.slow_but_first
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS.keys())
def test_continuous_batching_generates_what_greedy_search_does(tiny_config, fields):
    assert_batches_are_greedy_search(PeerForCausalLM(tiny_config(**fields, initializer_range=0.3)).eval())


@pytest.mark.slow_but_first
@pytest.mark.parametrize("placement", ["mapped", "memory"])
@pytest.mark.parametrize("table_format", ["int8", None, "int4", "float8_e4m3"])
def test_tables_may_stay_in_their_file_and_be_quantised(tiny_config, tmp_path, table_format, placement):
    if placement == "mapped" and sys.platform != "linux":
        pytest.skip("tables are mapped on Linux only")
    model = PeerForCausalLM(tiny_config(initializer_range=0.3))
    if table_format is not None:
        quantise_expert_tables(model, table_format)
    model.save_pretrained(tmp_path)
    loaded = PeerForCausalLM.from_pretrained(tmp_path, table_placement=placement).eval()
    assert_batches_are_greedy_search(loaded)
    (pool,) = expert_pools(loaded).values()
    for table in (pool.down_embed, pool.up_embed):
        assert is_mapped_file(table.data_ptr()) == (placement == "mapped")
