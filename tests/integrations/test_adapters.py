# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""PEFT around PEER: adapters on attention, queries and expert tables, and what they must not touch."""

import copy

import peft
import pytest
import torch

from modeling_peer import PeerForCausalLM
from modeling_peer.optim.parameter_groups import expert_tables
from modeling_peer.training import RowSparseAdamW

TABLES = ["mlp.experts.down_embed", "mlp.experts.up_embed"]


@pytest.fixture
def tokens():
    return torch.randint(1, 99, (3, 12))


# Where nothing learns, "cpu" adds up the experts of a few tokens in another order: 9e-8 apart.
OTHER_ORDER = {"atol": 1e-6, "rtol": 0}


def adapt(model, **options):
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "o_proj", "query_proj"], "r": 4, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def train(adapted, tokens, optimizer_class=torch.optim.AdamW):
    optimizer = optimizer_class([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    adapted.train()
    for _ in range(5):
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


@pytest.mark.parametrize("experts_implementation", ["eager", "cpu"])
@pytest.mark.parametrize(
    ("config", "modules", "parameters"),
    [
        ({}, ["q_proj", "o_proj", "query_proj"], TABLES),
        ({"gated_experts": True}, ["q_proj", "o_proj"], [*TABLES, "mlp.experts.gate_embed"]),
        # three dimensions: PEFT takes the codebooks for experts; query_proj, in the same module, would stay unmerged
        ({}, ["q_proj", "o_proj"], ["mlp.retrieval.sub_keys"]),
    ],
    ids=["tables", "gated", "sub-keys"],
)
def test_an_adapter_trains_itself_alone_loads_and_merges(
    tiny_config, tokens, tmp_path, config, modules, parameters, experts_implementation
):
    base = PeerForCausalLM(tiny_config(**config))
    base.set_experts_implementation(experts_implementation)
    before = copy.deepcopy(base.state_dict())
    adapted = train(adapt(copy.deepcopy(base), target_modules=modules, target_parameters=parameters), tokens)
    assert all(p.abs().sum() > 0 for name, p in adapted.named_parameters() if "lora_B" in name)
    # the queries' BatchNorm is frozen, so it counts nothing and acts as in evaluation
    logits = adapted(input_ids=tokens).logits
    assert torch.equal(adapted.train()(input_ids=tokens).logits, logits)
    with adapted.eval().disable_adapter():
        torch.testing.assert_close(adapted(input_ids=tokens).logits, base.eval()(tokens).logits, **OTHER_ORDER)

    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, logits, **OTHER_ORDER)

    merged = adapted.merge_and_unload()
    adapted_weights = tuple(parameters) + tuple(f"{name}.weight" for name in modules)
    for name, value in merged.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith(adapted_weights), name
    merged.save_pretrained(tmp_path / "merged")
    reloaded = PeerForCausalLM.from_pretrained(tmp_path / "merged")
    # measured: 4e-7 of logits up to 0.6; products of sums for sums of products
    torch.testing.assert_close(reloaded(tokens).logits, logits, atol=4e-6, rtol=0)


def test_an_adapter_may_train_the_query_norm(tiny_config, tokens):
    adapted = adapt(PeerForCausalLM(tiny_config()), modules_to_save=["mlp.retrieval.query_norm"]).train()
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    trained = [name for name, p in adapted.named_parameters() if "query_norm" in name and p.grad is not None]
    assert len(trained) == 2


def test_the_tables_themselves_train_beside_an_adapter_with_row_sparse_gradients(tiny_config, tokens, tmp_path):
    model = PeerForCausalLM(tiny_config(row_sparse_gradients=True))
    before = model.model.layers[1].mlp.experts.down_embed.clone()
    adapted = adapt(model, modules_to_save=["experts"])
    assert len(expert_tables(adapted)) == 2  # the trained copies, under names of PEFT's
    train(adapted, tokens, RowSparseAdamW)
    logits = adapted(input_ids=tokens).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, logits, atol=4e-6, rtol=0)
    touched = (merged.model.layers[1].mlp.experts.down_embed != before).any(-1)
    assert 0 < touched.sum() < len(touched)


def test_an_adapter_of_tables_is_refused_where_it_cannot_be_trained_or_merged(tiny_config, tokens):
    adapted = adapt(PeerForCausalLM(tiny_config(row_sparse_gradients=True)), target_parameters=TABLES)
    with pytest.raises(ValueError, match=r"row_sparse_gradients=True: an adapter .* row_sparse_gradients=False"):
        adapted(input_ids=tokens)
    adapted.requires_grad_(False)
    adapted(input_ids=tokens)  # trained elsewhere, used here
    config = tiny_config(mlp_layer_types=["sparse"] * 3, share_expert_tables=True)
    adapted = adapt(PeerForCausalLM(config), target_parameters=TABLES)
    with pytest.raises(ValueError, match=r"share_expert_tables=True: an adapter .* one update per layer"):
        adapted(input_ids=tokens)
    train(adapt(PeerForCausalLM(config)), tokens)  # other weights may be adapted
