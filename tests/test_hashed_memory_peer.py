# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Hashed n-gram memory: against a loop over tokens, and with the tokens before these carried by the cache."""

import pytest
import reference
import torch
from huggingface_hub.errors import StrictDataclassError
from model_helpers import assert_equals_oracle, context, learn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from modeling_peer import PeerForCausalLM, PeerForMaskedLM, quantise_expert_tables
from modeling_peer.hashed_memory_peer import (
    PeerHashedMemory,
    hash_multipliers,
    hash_table_sizes,
    set_canonical_tokens,
)
from modeling_peer.optim import RowSparseAdamW, parameter_groups
from modeling_peer.optim.parameter_groups import expert_tables
from modeling_peer.transformers_names_peer import CACHE

HASHED = {"sparse_mlp": "hashed_memory"}
KINDS = {
    "paper": HASHED,
    "2-grams": {**HASHED, "max_ngram_size": 2},
    "no convolution": {**HASHED, "ngram_conv_size": 1},
    "beside PEER": {"parallel_hashed_memory": True},
    "beside a dense MLP": {**HASHED, "parallel_dense_mlp": True},
    "one table for all layers": {**HASHED, "mlp_layer_types": ["sparse"] * 3, "share_expert_tables": True},
}
PROMPT = 7
MULTIPLIERS = (1495704295, 3222745113, 722759123)
ROWS = [24, 36, 108, 146]


@pytest.fixture
def tokens():
    return torch.randint(1, 99, (3, 12))


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def model(request, tiny_config, tokens):
    """In evaluation, after steps that moved every weight."""
    model = PeerForCausalLM(tiny_config(**request.param)).train()
    learn(model, tokens, steps=3)
    return model.eval()


def logits_step_by_step(model, tokens, first, **inputs):
    """Logits of a prefill of `first` tokens, then of one token after another."""
    cache = DynamicCache(config=model.config)
    steps = [model(tokens[:, :first], **{CACHE: cache})]
    steps += [model(tokens[:, i : i + 1], **{CACHE: cache}) for i in range(first, tokens.shape[1])]
    return torch.cat([step.logits for step in steps], dim=1)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_ngram_size": 2},
        {"max_ngram_size": 5, "num_hash_heads": 1, "ngram_dim": 12},
        {"ngram_conv_size": 1},  # no neighbours
        {"num_rows_per_hash_head": 1},  # the smallest tables: 2 and 3 rows, and so on
    ],
    ids=str,
)
def test_memory_and_every_gradient_equal_the_loop(tiny_config, fields):
    layer = PeerHashedMemory(tiny_config(**HASHED, **fields)).double()
    for weight in layer.parameters():
        torch.nn.init.normal_(weight)
    hidden = torch.randn(2, 11, 32, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(99, (2, 11))
    expected = reference.hashed_memory(layer, hidden, ids.tolist(), hash_multipliers(layer.max_ngram_size))
    assert_equals_oracle(layer, hidden, layer(hidden, tokens=context(ids)), expected)


def test_tables_have_different_primes_and_the_hash_never_changes():
    assert hash_table_sizes(30, 4) == (31, 37, 41, 43)
    assert hash_table_sizes(2, 3) == (2, 3, 5)
    # checkpoints depend on these numbers
    assert hash_multipliers(3) == MULTIPLIERS
    assert reference.ngram_rows([5, 98, 7], 3, (31, 37, 41, 43), MULTIPLIERS) == ROWS


def test_ids_of_any_vocabulary_hash_without_overflow(tiny_config):
    layer = PeerHashedMemory(tiny_config(**HASHED))
    layer.canonical_ids = torch.arange(2**31 - 4, 2**31 - 1, dtype=torch.int32)
    ids = torch.tensor([[0, 1, 2, 1]])
    rows = layer.row_ids(context(ids))
    large = layer.canonical_ids[ids[0]].tolist()
    for t in range(4):
        assert rows[0, t].tolist() == reference.ngram_rows(large[: t + 1], 3, layer.table_sizes, hash_multipliers(3))


@pytest.mark.parametrize("first", [1, 2, PROMPT])
@torch.no_grad()
def test_one_token_after_another_gives_the_logits_of_the_whole(model, tokens, first):
    torch.testing.assert_close(logits_step_by_step(model, tokens, first), model(tokens, use_cache=False).logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_left_padding_changes_nothing_in_one_forward_or_in_generation(model, tokens, cache):
    padded = torch.cat([torch.zeros(3, 5, dtype=torch.long), tokens], dim=1)
    mask = (padded > 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = model(tokens, use_cache=False).logits
    for position_ids in (positions, None):
        found = model(padded, attention_mask=mask, position_ids=position_ids, use_cache=False).logits[:, 5:]
        if position_ids is not None:
            torch.testing.assert_close(found, alone)
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = tokens
    for _ in range(6):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    generated = model.generate(padded, attention_mask=mask, cache_implementation=cache, **greedy)
    assert torch.equal(generated[:, 5:], expected)


@torch.no_grad()
def test_padding_hides_itself_from_n_grams_without_positions(tiny_config, tokens):
    layer = PeerHashedMemory(tiny_config(**HASHED))
    padded = torch.cat([torch.full((3, 5), 9), tokens], dim=1)
    mask = torch.arange(17).expand(3, -1) >= 5
    assert torch.equal(layer.row_ids(context(padded), mask)[:, 5:], layer.row_ids(context(tokens)))


@torch.no_grad()
def test_beams_and_rejected_candidates_take_their_tokens_with_them(model, tokens):
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    beams = {**greedy, "num_beams": 3}
    assert torch.equal(model.generate(tokens, **beams), model.generate(tokens, **beams, use_cache=False))
    looked_up = model.generate(tokens[:1], **greedy, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, model.generate(tokens[:1], **greedy))


@torch.no_grad()
def test_sequences_packed_in_a_row_do_not_see_each_other(model, tokens):
    packed = torch.cat([tokens[:1, :5], tokens[1:2]], dim=1)
    positions = torch.cat([torch.arange(5), torch.arange(12)]).unsqueeze(0)
    found = model(packed, position_ids=positions, use_cache=False).logits[:, 5:]
    torch.testing.assert_close(found, model(tokens[1:2], use_cache=False).logits)


def test_a_cache_without_a_place_for_tokens_is_refused(model, tokens):
    with pytest.raises(ValueError, match=r"DynamicCache cannot carry tokens.*DynamicCache\(config=model\.config\)"):
        model(tokens, **{CACHE: DynamicCache()})


@torch.no_grad()
def test_a_static_cache_that_would_have_to_drop_candidates_is_refused(tiny_config, tokens):
    model = PeerForCausalLM(tiny_config(**HASHED)).eval()
    cache = StaticCache(config=model.config, max_cache_len=64)
    # the second is what 5.17 says, which supports no static cache there
    with pytest.raises(ValueError, match=r"static cache cannot drop|generate is not supported with Static"):
        model.generate(tokens[:1], **{CACHE: cache}, prompt_lookup_num_tokens=3, do_sample=False, max_new_tokens=8)


@torch.no_grad()
def test_continuous_batching_is_refused(model):
    for begin in (model.init_continuous_batching, lambda: model.generate_batch([[3, 4, 5]])):
        with pytest.raises(ValueError, match=r"keeps none for it\. Use generate\(\)"):
            begin()


def test_a_cache_of_another_batch_or_configuration_is_refused(tiny_config, tokens):
    model = PeerForCausalLM(tiny_config(**HASHED)).eval()
    cache = DynamicCache(config=model.config)
    model(tokens, **{CACHE: cache})
    cache.batch_select_indices(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"tokens of 3 sequences, and 2 are given.*batch_select_indices"):
        model(tokens[:2, :1], **{CACHE: cache})
    without = DynamicCache(config=tiny_config(**HASHED, ngram_conv_size=1))
    with pytest.raises(ValueError, match="cannot carry tokens"):
        model(tokens, **{CACHE: without})


def test_states_that_an_offloaded_cache_moved_away_come_back(tiny_config, tokens):
    """`Cache.update` moves a layer's states away with its keys, before the layer reads them."""
    cache = DynamicCache(config=tiny_config(**HASHED))
    context(tokens, cache=cache, layer=1).with_past(tokens, 2, state=0)
    on_device = context(tokens.to("meta"), cache=cache, layer=1)
    assert on_device.with_past(tokens[:, :1].to("meta"), 2, state=0).device.type == "meta"


def test_tokens_move_to_the_device_of_a_layer(tokens):
    moved = context(tokens).to("meta", non_blocking=True)
    assert (moved.input_ids.device.type, moved.position_ids.device.type) == ("meta", "meta")


def test_without_sparse_layers_there_is_nothing_to_carry(tiny_config, tokens):
    dense = PeerForCausalLM(tiny_config(**HASHED, mlp_layer_types=["dense"] * 3)).eval()
    assert not hasattr(dense.config, "layer_types")
    expected = dense.generate(tokens, max_new_tokens=4, do_sample=False)
    static = dense.generate(tokens, max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert torch.equal(static, expected)
    embeddings = dense.get_input_embeddings()(tokens)
    torch.testing.assert_close(dense(inputs_embeds=embeddings).logits, dense(tokens).logits)


def test_an_adapter_of_the_rows_learns(tiny_config, tokens):
    peft = pytest.importorskip("peft")
    model = PeerForCausalLM(tiny_config(**HASHED)).train()
    adapter = peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts.up_embed"], r=2)
    adapted = peft.get_peft_model(model, adapter)
    adapted(tokens, labels=tokens).loss.backward()
    assert any(p.grad is not None and p.grad.any() for n, p in adapted.named_parameters() if "lora_B" in n)


def test_embeddings_in_place_of_tokens_are_refused(model, tiny_config, tokens):
    with pytest.raises(ValueError, match=r"pass input_ids in place of inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(tokens))
    layer = PeerHashedMemory(tiny_config(**HASHED))
    with pytest.raises(ValueError, match=r"needs input_ids of shape \(3, 12\); got None"):
        layer(torch.randn(3, 12, 32))
    with pytest.raises(ValueError, match=r"needs input_ids of shape \(3, 12\); got \(3, 4\)"):
        layer(torch.randn(3, 12, 32), tokens=context(tokens[:, :4]))
    with pytest.raises(IndexError):
        layer.row_ids(context(-tokens))


@torch.no_grad()
def test_a_bidirectional_model_hashes_what_came_before(tiny_config, tokens):
    model = PeerForMaskedLM(tiny_config(**HASHED, is_causal=False)).eval()
    assert model(tokens).logits.isfinite().all()


def test_tables_train_with_row_sparse_gradients_as_with_dense_ones(tiny_config, tokens):
    def after_steps(row_sparse):
        torch.manual_seed(0)
        model = PeerForCausalLM(tiny_config(**HASHED, row_sparse_gradients=row_sparse)).train()
        optimizer = RowSparseAdamW(parameter_groups(model, 1e-2, 0.0))
        for _ in range(4):
            model(tokens, labels=tokens).loss.backward()
            assert all(table.grad.is_sparse == row_sparse for table in expert_tables(model))
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict()

    torch.testing.assert_close(after_steps(True), after_steps(False))


@torch.no_grad()
def test_tables_are_mapped_quantised_and_in_a_file_of_their_own(tiny_config, tokens, tmp_path):
    for beside, stem in ((False, "experts"), (True, "hashed-memory-experts")):
        fields = {"parallel_hashed_memory": True} if beside else HASHED
        model = PeerForCausalLM(tiny_config(**fields, num_rows_per_hash_head=40_000)).eval()
        folder = tmp_path / stem
        model.save_pretrained(folder)
        assert (folder / f"model-layer-001-{stem}.safetensors").is_file()
        expected = model(tokens).logits
        mapped = AutoModelForCausalLM.from_pretrained(folder, table_placement="mapped").eval()
        assert torch.equal(mapped(tokens).logits, expected)
        quantise_expert_tables(model, "int8")
        model.save_pretrained(folder / "int8")
        quantised = AutoModelForCausalLM.from_pretrained(folder / "int8").eval()
        assert torch.equal(quantised(tokens).logits, model(tokens).logits)
        # half a step of int8 in each row, seen through a few matrices
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=0.01 * float(expected.abs().max()))


@torch.no_grad()
def test_tokens_that_mean_the_same_address_the_same_rows(tiny_config, tmp_path):
    model = PeerForCausalLM(tiny_config(**HASHED)).eval()
    canonical = torch.arange(99)
    canonical[50:] = torch.arange(49)
    set_canonical_tokens(model, canonical)
    memory, ids = model.model.layers[1].mlp, torch.randint(49, (2, 6))
    assert torch.equal(memory.row_ids(context(ids)), memory.row_ids(context(ids + 50)))
    model.save_pretrained(tmp_path)
    loaded = PeerForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.layers[1].mlp.canonical_ids.long(), canonical)
    for wrong in (canonical[:-1], canonical.float(), canonical + 60, canonical > 3, [0] * 98):
        with pytest.raises(ValueError, match=r"canonical_ids must be 99 ids below 99"):
            set_canonical_tokens(model, wrong)
    with pytest.raises(ValueError, match="has no hashed memory"):
        set_canonical_tokens(PeerForCausalLM(tiny_config()), canonical)


@torch.no_grad()
def test_new_tokens_of_a_larger_vocabulary_have_n_grams_too(tiny_config, tmp_path):
    model = PeerForCausalLM(tiny_config(**HASHED)).eval()
    model.resize_token_embeddings(104)
    model.save_pretrained(tmp_path)
    loaded = PeerForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[5, 103, 100]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    memory = model.model.layers[1].mlp
    assert memory.row_ids(context(ids))[0, 1].tolist() == reference.ngram_rows(
        [5, 103], 3, memory.table_sizes, hash_multipliers(3)
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ngram_dim": 30}, r"ngram_dim \(30\) is not a multiple of .* \(4\).*Try 28"),
        ({"max_ngram_size": 1}, "max_ngram_size must be at least 2"),
        ({"num_hash_heads": 0}, "num_hash_heads must be at least 1"),
        ({"parallel_hashed_memory": True}, "parallel_hashed_memory=True puts a hashed memory beside another layer"),
        ({"expert_table_format": "int4", "ngram_dim": 12}, r"width of a row, .* = 3, must be even"),
        ({"num_kept_experts": 3}, "num_kept_experts=3 is for what product keys retrieve"),
        ({"num_rows_per_hash_head": 2**31 - 1, "hidden_size": 2**31, "num_attention_heads": 1}, "at most 2147483647"),
    ],
    ids=str,
)
def test_sizes_that_cannot_work_are_refused(tiny_config, fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_config(**HASHED, **fields)
