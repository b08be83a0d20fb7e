# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Row-sparse gradients between backward and step: clipped like dense ones, and switched on for a while only."""

import copy

import pytest
import torch
from parallel_training import average_gradients
from rank_groups import run_ranks
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_peer import PeerForCausalLM
from modeling_peer.optim import parameter_groups, row_sparse_gradients
from modeling_peer.optim.parameter_groups import expert_tables
from modeling_peer.training import RowSparseAdamW, clip_gradients

TOKENS = torch.arange(40).view(2, 20)


@pytest.fixture
def model(tiny_config):
    return PeerForCausalLM(tiny_config(row_sparse_gradients=True)).train()


def accumulate(model, num_batches=3):
    for i in range(num_batches):
        tokens = TOKENS + i
        model(tokens, labels=tokens).loss.backward()


def dense_twin(model):
    twin = copy.deepcopy(model)
    twin.config.row_sparse_gradients = False
    return twin


@pytest.mark.parametrize("max_norm", [0.01, 1.0, float("inf")])
def test_accumulated_gradients_are_clipped_apart_and_as_dense_ones_are(model, max_norm):
    twin = dense_twin(model)
    accumulate(model)
    accumulate(twin)
    apart = {id(table) for table in expert_tables(twin)}
    expected = [
        torch.nn.utils.clip_grad_norm_([p for p in twin.parameters() if (id(p) in apart) == tables], max_norm)
        for tables in (True, False)
    ]
    norms = clip_gradients(model, max_norm)
    torch.testing.assert_close([norms.tables, norms.others], expected)
    for sparse, dense in zip(model.parameters(), twin.parameters(), strict=True):
        gradient = sparse.grad.to_dense() if sparse.grad.is_sparse else sparse.grad
        torch.testing.assert_close(gradient, dense.grad, atol=1e-7, rtol=1e-4)


def test_clipping_dense_gradients_and_none_at_all(model):
    model.config.row_sparse_gradients = False
    assert clip_gradients(model, 1.0) == (0.0, 0.0)
    accumulate(model)
    clip_gradients(model, 0.01)
    norms = clip_gradients(model, 1.0)
    torch.testing.assert_close(norms.tables, torch.tensor(0.01), atol=0, rtol=1e-3)


def test_clipping_waits_for_no_device(model):
    model.to("meta")  # where there are no values to wait for
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    assert clip_gradients(model, 1.0).others.is_meta


def test_gradients_are_row_sparse_inside_the_context_and_the_configuration_stays(tiny_config, tmp_path):
    model = PeerForCausalLM(tiny_config()).train()
    with row_sparse_gradients(model):
        accumulate(model, 1)
        assert not model.config.row_sparse_gradients
        model.save_pretrained(tmp_path)
    assert all(table.grad.is_sparse for table in expert_tables(model))
    model.zero_grad()
    accumulate(model, 1)
    assert not any(table.grad.is_sparse for table in expert_tables(model))
    assert not PeerForCausalLM.from_pretrained(tmp_path).config.row_sparse_gradients
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no expert tables"), row_sparse_gradients(llama):
        pass


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_row_sparse_gradient(model, use_reentrant):
    twin = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    accumulate(model)
    accumulate(twin)
    for checkpointed, plain in zip(expert_tables(model), expert_tables(twin), strict=True):
        torch.testing.assert_close(checkpointed.grad.to_dense(), plain.grad.to_dense())


def test_float16_with_a_gradient_scaler_unscales_rows_and_skips_steps_that_overflow(model):
    optimizer, scaler = RowSparseAdamW(parameter_groups(model, 0.01)), torch.amp.GradScaler("cpu", init_scale=2.0**20)
    before = [table.detach().clone() for table in expert_tables(model)]
    for step in range(30):
        with torch.autocast("cpu", torch.float16):
            loss = model(TOKENS, labels=TOKENS).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms = clip_gradients(model, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 0:
            assert scaler.get_scale() == 2.0**19, "the first step overflows"
            assert all(map(torch.equal, expert_tables(model), before))
    assert max(norms) < 10, "norms of the loss, not of the scaled loss"
    assert loss < 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_experts", "who_looks", "lazy"),
    [(1000, None, True), (1000, 1, False), (60, None, False)],
    ids=["of products", "of rows, since one rank looked", "of rows, since products would be larger"],
)
def test_ranks_average_what_gradients_are_made_of_where_all_can(tmp_path, num_experts, who_looks, lazy):
    pytest.importorskip("numba")
    results = run_ranks(2, tmp_path, average_gradients, num_experts, who_looks)
    expected = sum(own for _, _, own in results)  # of two backwards, divided by two ranks
    for averaged, was_lazy, _ in results:
        assert was_lazy == lazy
        torch.testing.assert_close(averaged, expected)
