# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Embeddings of any model trained by rows: dense AdamW's steps where every row is read; refusals with a way out."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from modeling_peer.optim import RowSparseAdamW, clip_gradients, parameter_groups, train_rows_sparsely

VOCAB_SIZE = 25
EVERY_TOKEN = torch.arange(1, VOCAB_SIZE).view(2, 12)  # but padding: with its row of zeros, Gemma 3n becomes NaN


def build_llama(**overrides):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(sizes | {"vocab_size": VOCAB_SIZE, "pad_token_id": 0} | overrides))).train()


# With per-layer embeddings, and input and output embeddings that are tied.
GEMMA = {
    "vocab_size": VOCAB_SIZE,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size": 16,
    "hidden_size_per_layer_input": 4,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "pad_token_id": 0,
}


def build_gemma():
    own = {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 2}
    return Gemma3nForCausalLM(Gemma3nTextConfig(**GEMMA, **own)).train()


def build_gemma4():
    return Gemma4ForCausalLM(Gemma4TextConfig(**GEMMA)).train()


MODELS = {"llama": build_llama, "gemma3n": build_gemma, "gemma4": build_gemma4}


@pytest.fixture(params=MODELS)
def architecture(request):
    return request.param


@pytest.fixture
def name(architecture):
    return "embed_tokens" if architecture == "llama" else "embed_tokens_per_layer"


def groups_of(model):
    return parameter_groups(model, 0.01, weight_decay=0.0)


def train(model, optimizer, batches, max_norm=math.inf):
    """The losses of the steps, and the norms of the tables' gradients."""
    losses, norms = [], []
    for tokens in batches:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norms.append(clip_gradients(model, max_norm).tables.item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def test_steps_that_read_every_row_are_those_of_dense_adamw(architecture, name):
    # float64: Gemma 4 turns float32's rounding of small gradients into differences of 1e-4 within four steps
    model = MODELS[architecture]().double()
    twin = copy.deepcopy(model)
    (full_name,) = train_rows_sparsely(model, name)
    assert full_name.endswith(f".{name}")
    expected, _ = train(twin, torch.optim.AdamW(groups_of(twin)), [EVERY_TOKEN] * 4)
    losses, norms = train(model, RowSparseAdamW(groups_of(model)), [EVERY_TOKEN] * 4)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]
    assert max(norms) > 0  # that of Gemma's first step is 0: its per-layer inputs first have a weight of 0
    table = model.get_parameter(f"{full_name}.weight")
    torch.testing.assert_close(table, twin.get_parameter(f"{full_name}.weight"), atol=1e-12, rtol=0)


@pytest.mark.parametrize("row_state", ["float32", "row"])
def test_only_the_rows_that_were_read_change_and_the_state_is_as_computed(architecture, name, row_state):
    model = MODELS[architecture]()
    (full_name,) = train_rows_sparsely(model, [name])
    table = model.get_parameter(f"{full_name}.weight")
    before = table.detach().clone()
    groups = {group["name"]: group for group in groups_of(model)}
    assert groups["sparse_embeddings"]["params"] == [table]
    assert groups["sparse_embeddings"]["row_sparse"]
    optimizer = RowSparseAdamW(groups.values(), row_state=row_state)
    tokens = torch.tensor([[3, 5, 9, 3]])  # the last one has no gradient: nothing follows it
    train(model, optimizer, [tokens] * 3)
    assert (table != before).any(1).nonzero().flatten().tolist() == [3, 5, 9]
    num_bytes = sum(value.nbytes for value in optimizer.state[table].values() if value.dim())
    width = table.shape[1]
    assert num_bytes == VOCAB_SIZE * {"float32": 4 + 8 * width, "row": 8}[row_state]


def test_gradients_of_micro_batches_are_coalesced_and_their_sum_is_the_dense_one():
    model = build_llama()
    twin = copy.deepcopy(model)
    train_rows_sparsely(model, model.model.embed_tokens)
    train_rows_sparsely(model, "model.embed_tokens")  # twice is as once
    table, expected = (one.model.embed_tokens.weight for one in (model, twin))
    assert len(table._post_accumulate_grad_hooks) == 1
    for tokens in (torch.tensor([[3, 5, 3, 9]]), torch.tensor([[9, 9, 2, 3]])):
        for one in (model, twin):
            one(input_ids=tokens, labels=tokens).loss.backward()
        assert table.grad.is_sparse
        assert table.grad.is_coalesced()
    assert table.grad.indices().tolist() == [[2, 3, 5, 9]]
    torch.testing.assert_close(table.grad.to_dense(), expected.grad)


def test_the_row_of_padding_has_no_gradient_and_does_not_change():
    model = build_llama(tie_word_embeddings=False)
    train_rows_sparsely(model, "embed_tokens")
    table = model.model.embed_tokens.weight
    assert model.model.embed_tokens.padding_idx == 0
    before = table.detach().clone()
    groups = parameter_groups(model, 0.01, table_weight_decay=0.1)
    model(input_ids=torch.tensor([[0, 4, 0, 7]])).logits.sum().backward()
    assert table.grad.indices().tolist() == [[4, 7]]
    RowSparseAdamW(groups, row_state="row").step()
    assert torch.equal(table[0], before[0])
    assert not torch.equal(table[4], before[4])


def test_a_run_with_one_scalar_per_row_continues_from_its_saved_state_to_the_bit(architecture, name):
    model = MODELS[architecture]()
    train_rows_sparsely(model, name)
    optimizer = RowSparseAdamW(groups_of(model), row_state="row")
    batches = torch.randint(1, VOCAB_SIZE, (6, 2, 5)).unbind()
    train(model, optimizer, batches[:3], max_norm=0.1)
    again = copy.deepcopy(model)  # without the hook that coalesces
    other = RowSparseAdamW(groups_of(again), row_state="row")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its_optimizer in ((model, optimizer), (again, other)):
        train(one, its_optimizer, batches[3:], max_norm=0.1)
    for expected, actual in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(actual, expected)


class NgramModel(nn.Module):
    """A table of tokens, and hashed tables of the bigrams and trigrams that end at a token; their sum predicts."""

    def __init__(self, num_rows=64, width=8):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, width)
        self.ngram_tables = nn.ModuleList(nn.Embedding(num_rows, width) for _ in range(2))
        self.head = nn.Linear(width, VOCAB_SIZE)

    def rows(self, tokens):
        hashed, rows = tokens, []
        for distance, table in enumerate(self.ngram_tables, start=1):
            hashed = hashed * 31 + nn.functional.pad(tokens, (distance, 0))[:, : tokens.shape[1]]
            rows.append(hashed % table.num_embeddings)
        return rows

    def forward(self, tokens):
        tables = zip(self.ngram_tables, self.rows(tokens), strict=True)
        return self.head(self.embed_tokens(tokens) + sum(table(rows) for table, rows in tables))


def test_hashed_tables_of_ngrams_take_the_first_step_of_dense_adamw_and_change_only_rows_that_were_read():
    model = NgramModel()
    twin, before = copy.deepcopy(model), copy.deepcopy(model)
    train_rows_sparsely(model, ["ngram_tables.*", "embed_tokens"])
    optimizer = RowSparseAdamW(groups_of(model))
    dense = torch.optim.AdamW(groups_of(twin))
    tokens = torch.randint(1, VOCAB_SIZE, (2, 6))
    for one, its_optimizer in ((model, optimizer), (twin, dense)):
        one(tokens).square().mean().backward()
        clip_gradients(one, math.inf)
        its_optimizer.step()
    for (name, parameter), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, msg=name)
    tables = (model.embed_tokens, *model.ngram_tables)
    old = (before.embed_tokens, *before.ngram_tables)
    for table, previous, rows in zip(tables, old, (tokens, *model.rows(tokens)), strict=True):
        changed = (table.weight != previous.weight).any(1).nonzero().flatten()
        assert changed.tolist() == rows.unique().tolist()
        assert optimizer.state[table.weight]["exp_avg"].shape == table.weight.shape


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.ngram_tables = nn.ModuleList(nn.Embedding(9, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.renormalised = nn.Embedding(9, 4, max_norm=1.0)
        self.by_frequency = nn.Embedding(9, 4, scale_grad_by_freq=True)
        self.frozen = nn.Embedding(9, 4).requires_grad_(False)
        self.quantised = nn.Embedding(9, 4)
        self.quantised.weight = nn.Parameter(torch.ones(9, 4, dtype=torch.int8), requires_grad=False)


def test_wildcards_choose_several_tables():
    model = Tables()
    names = train_rows_sparsely(model, "ngram_tables.*")
    assert names == ["ngram_tables.0", "ngram_tables.1", "ngram_tables.2"]
    assert [group["name"] for group in groups_of(model)] == ["dense", "without_decay", "sparse_embeddings"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("embed", r"Tables has no module 'embed'. It has these embeddings: ngram_tables.0, .*, quantised\."),
        (nn.Embedding(2, 2), "Tables has no module this Embedding"),
        ("norm", "norm is a LayerNorm, and only an nn.Embedding can"),
        ("renormalised", r"renormalised has max_norm=1.0.*Set it to None, or leave"),
        ("by_frequency", "by_frequency has scale_grad_by_freq=True.*Set it to False, or leave"),
        ("frozen", r"frozen is frozen.*requires_grad_\(True\)"),
        ("quantised", r"quantised is quantised \(Parameter of torch.int8\)"),
    ],
)
def test_what_cannot_be_trained_by_rows_is_refused_and_nothing_is_changed(wanted, message):
    model = Tables()
    with pytest.raises(ValueError, match=message):
        train_rows_sparsely(model, ["ngram_tables.0", wanted])
    assert not any(module.sparse for module in model.modules() if isinstance(module, nn.Embedding))
    assert not model.ngram_tables[0].weight._post_accumulate_grad_hooks


def test_a_tied_embedding_is_refused_and_the_way_out_works():
    model = build_llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"model.embed_tokens shares its weight with lm_head.weight.*untie them"):
        train_rows_sparsely(model, "embed_tokens")
    assert not model.model.embed_tokens.sparse
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    train_rows_sparsely(model, "embed_tokens")
    train(model, RowSparseAdamW(groups_of(model)), [EVERY_TOKEN])


def test_embeddings_that_share_a_weight_are_trained_together():
    model = nn.ModuleDict({"first": nn.Embedding(9, 4), "second": nn.Embedding(9, 4)})
    model["second"].weight = model["first"].weight
    with pytest.raises(ValueError, match=r"first shares its weight with second.weight"):
        train_rows_sparsely(model, "first")
    train_rows_sparsely(model, ["first", "second"])
    (model["first"](torch.tensor([1])) + model["second"](torch.tensor([2]))).sum().backward()
    assert model["first"].weight.grad.coalesce().indices().tolist() == [[1, 2]]


def test_an_optimizer_of_torch_that_cannot_take_them_is_refused_with_the_way_out():
    model = build_llama()
    train_rows_sparsely(model, "embed_tokens")
    model(input_ids=EVERY_TOKEN, labels=EVERY_TOKEN).loss.backward()
    message = r"An embedding \(25, 16\) has a row-sparse gradient \(sparse=True\).*AdamW supports.*sparse=False on"
    with pytest.raises(ValueError, match=message):
        torch.optim.AdamW(model.parameters()).step()
