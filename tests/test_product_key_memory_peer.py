# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Product-key memory against a loop over its values, and as the expert table that everything else takes it for."""

import pytest
import reference
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from model_helpers import assert_equals_oracle
from transformers import AutoModelForCausalLM

from modeling_peer import PeerConfig, PeerForCausalLM
from modeling_peer.optim import parameter_groups
from modeling_peer.optim.parameter_groups import expert_tables
from modeling_peer.product_key_memory_peer import PeerProductKeyMemory
from modeling_peer.training import RowSparseAdamW

MEMORY = {"sparse_mlp": "product_key_memory"}
OPTIONS = {
    "paper": {},
    "Memory+": {"gated_memory": True},
    "PEER's codebooks": {"share_sub_keys": True},
    "sigmoid gate": {"gate_activation": "sigmoid", "query_norm": "rms_norm"},
    "one head": {"num_retrieval_heads": 1, "num_experts_per_head": 8},
}


@pytest.fixture
def tokens():
    return torch.randint(1, 99, (3, 12))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_memory_and_every_gradient_equal_the_loop(tiny_config, options):
    layer = PeerProductKeyMemory(tiny_config(**MEMORY, **options)).double().eval()
    torch.nn.init.normal_(layer.retrieval.query_proj.weight)
    hidden = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    assert_equals_oracle(layer, hidden, layer(hidden), reference.product_key_memory(layer, hidden))


def test_memory_reads_as_the_authors_code_does(tiny_config):
    """`nn.EmbeddingBag` over the values of all heads, weighted by gates."""
    layer = PeerProductKeyMemory(tiny_config(**MEMORY)).eval()
    x = torch.randn(2, 6, 32)
    gates, ids = (result.view(12, 8) for result in layer.retrieval(x))
    bags = F.embedding_bag(ids, layer.experts.up_embed, per_sample_weights=gates, mode="sum")
    torch.testing.assert_close(layer(x).view(12, 32), bags)


def test_keys_are_per_head_and_values_start_as_in_the_paper(tiny_config):
    layer = PeerProductKeyMemory(tiny_config(**MEMORY, num_sub_keys=64, hidden_size=64, gated_memory=True))
    assert layer.retrieval.sub_keys.shape == (2, 2, 64, 8)
    assert [name for name, _ in layer.experts.named_parameters()] == ["up_embed"]
    gate = layer.output_gate
    for weights in (layer.experts.up_embed, gate.token_proj.weight, gate.output_proj.weight):
        assert abs(weights.std() / 64**-0.5 - 1) < 0.05
    assert layer.retrieval.config.expert_dropout == 0
    assert tiny_config().share_sub_keys  # of PEER


@pytest.mark.parametrize("row_sparse", [False, True])
def test_memory_gives_the_same_with_the_fast_implementation(tiny_config, row_sparse):
    """What each implementation does without readers is in kernels/test_operators.py."""
    pytest.importorskip("numba")
    config = tiny_config(**MEMORY, query_norm="rms_norm", row_sparse_gradients=row_sparse, gated_memory=True)
    layer, x = PeerProductKeyMemory(config), torch.randn(9, 32)
    results = {}
    for name in ("eager", "cpu"):
        config._experts_implementation = name
        layer.zero_grad()
        output = layer(x)
        output.square().sum().backward()
        assert layer.experts.up_embed.grad.is_sparse == row_sparse
        gradients = (parameter.grad for parameter in layer.parameters())
        results[name] = [output, *(g.to_dense() if g.is_sparse else g for g in gradients)]
    for fast, eager in zip(results["cpu"], results["eager"], strict=True):
        torch.testing.assert_close(fast, eager, atol=1e-5, rtol=1e-5)


def test_values_train_as_an_expert_table_in_rows(tiny_config, tokens):
    model = PeerForCausalLM(tiny_config(**MEMORY, row_sparse_gradients=True)).train()
    values = model.model.layers[1].mlp.experts.up_embed
    assert len(expert_tables(model)) == 1
    assert expert_tables(model)[0] is values
    groups = parameter_groups(model, 0.01, table_learning_rate_multiple=4.0)
    assert [group["name"] for group in groups] == ["dense", "without_decay", "retrieval", "expert_tables"]
    before = values.detach().clone()
    optimizer = RowSparseAdamW(groups)
    losses = []
    for _ in range(20):
        outputs = model(tokens, labels=tokens, output_expert_ids=True)
        outputs.loss.backward()
        if not losses:
            (ids,) = outputs.expert_ids
            assert torch.equal(values.grad.coalesce().indices()[0], ids.unique())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(values, before)


def test_layers_with_one_pool_of_values_save_and_load_it_once(tiny_config, tokens, tmp_path):
    """The form that Memory+ found best."""
    config = tiny_config(**MEMORY, gated_memory=True, mlp_layer_types=["sparse"] * 3, share_expert_tables=True)
    model = PeerForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    first, _, last = [layer.mlp for layer in loaded.model.layers]
    assert first.experts.up_embed is last.experts.up_embed
    assert first.output_gate.token_proj.weight is not last.output_gate.token_proj.weight
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_an_untrained_gate_is_initialised_where_a_checkpoint_has_none(tiny_config, tmp_path):
    PeerForCausalLM(tiny_config(**MEMORY)).save_pretrained(tmp_path)
    model = PeerForCausalLM.from_pretrained(tmp_path, gated_memory=True)
    for proj in model.model.layers[1].mlp.output_gate.children():
        assert abs(proj.weight.std() / 32**-0.5 - 1) < 0.1


def test_memory_has_the_balance_loss_of_product_keys_and_drops_values_in_training(tiny_config, tokens):
    model = PeerForCausalLM(tiny_config(**MEMORY, balance_loss="switch", expert_dropout=0.5)).train()
    assert model(tokens, labels=tokens).aux_loss > 0
    layer, x = model.model.layers[1].mlp, torch.randn(4, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_memory_keeps_the_dtype_of_its_input(tiny_config):
    x = torch.randn(2, 3, 32)
    layer = PeerProductKeyMemory(tiny_config(**MEMORY, gated_memory=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.float32
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**MEMORY, "gated_experts": True}, "gated_experts=True gates neurons.*gated_memory=True"),
        ({"gated_memory": True}, "gated_memory=True gates a product-key memory, but sparse_mlp is 'peer'"),
    ],
    ids=str,
)
def test_a_gate_of_the_wrong_kind_is_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=f"(?s){message}"):
        PeerConfig(**fields)
