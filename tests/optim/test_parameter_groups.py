# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Who shares a learning rate and a decay, and how the rate of expert tables runs beside the others'."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

from modeling_peer import PeerForCausalLM
from modeling_peer.optim import parameter_groups
from modeling_peer.optim.parameter_groups import EXPERT_TABLES
from modeling_peer.training import schedule_tables


def by_group(model, **settings):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.01, weight_decay=0.1, **settings)
    return {g["name"]: ({names[id(p)] for p in g["params"]}, g["lr"], g["weight_decay"]) for g in groups}


def test_every_parameter_is_in_one_of_four_groups(tiny_config):
    model = PeerForCausalLM(tiny_config(gated_experts=True, attention_bias=True))
    groups = by_group(model, table_learning_rate_multiple=4.0, retrieval_learning_rate_multiple=0.1)
    assert list(groups) == ["dense", "without_decay", "retrieval", "expert_tables"]
    assert [settings for _, *settings in groups.values()] == [[0.01, 0.1], [0.01, 0.0], [0.001, 0.0], [0.04, 0.0]]
    dense, plain, retrieval, tables = (names for names, *_ in groups.values())
    assert {name.rpartition(".")[2] for name in tables} == {"down_embed", "up_embed", "gate_embed"}
    assert {"model.layers.1.mlp.retrieval.sub_keys", "model.layers.1.mlp.retrieval.query_proj.weight"} <= retrieval
    assert "model.norm.weight" in plain
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= dense
    assert not [name for name in dense if "norm" in name or "bias" in name]
    assert len(dense | plain | retrieval | tables) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out_and_shared_tables_come_once(tiny_config):
    model = PeerForCausalLM(tiny_config(mlp_layer_types=["sparse"] * 3, share_expert_tables=True))
    model.model.layers[0].mlp.experts.down_embed.requires_grad_(False)
    assert by_group(model)["expert_tables"][0] == {"model.layers.0.mlp.experts.up_embed"}


def test_a_model_without_expert_tables_has_no_group_of_them():
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
    assert list(by_group(model)) == ["dense", "without_decay"]


def rates(name, schedule, num_steps=10, multiple=4.0):
    """Learning rates of other weights and of tables, step after step."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}]
    groups.append({"params": [nn.Parameter(torch.ones(1))], "lr": 0.1 * multiple, "name": EXPERT_TABLES})
    optimizer = torch.optim.SGD(groups)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=num_steps)
    scheduler = schedule_tables(scheduler, schedule, multiple, num_steps)
    result = []
    for _ in range(num_steps):
        result.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return scheduler, torch.tensor(result).T


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "inverse_sqrt", "cosine_with_restarts"])
def test_the_tables_have_their_own_schedule_under_any_scheduler_of_transformers(name):
    _, (others, tables) = rates(name, "multiple")
    torch.testing.assert_close(tables, 4 * others)
    _, (others, tables) = rates(name, "constant")
    assert set(tables.tolist()) == {tables.new_tensor(0.4).item()}
    _, (others, tables) = rates(name, "decaying")
    torch.testing.assert_close(tables, others * torch.linspace(4, 1, 11)[:10])
    _, (expected, _) = rates(name, "multiple")
    assert torch.equal(others, expected)


def test_a_schedules_state_is_saved_and_loaded_like_that_of_the_scheduler_alone(tmp_path):
    scheduler, _ = rates("cosine", "decaying")
    torch.save(scheduler.state_dict(), tmp_path / "scheduler.pt")
    again, _ = rates("cosine", "decaying", num_steps=5)
    again.load_state_dict(torch.load(tmp_path / "scheduler.pt", weights_only=True))
    assert (again.last_epoch, again.get_last_lr()) == (10, scheduler.get_last_lr())


def test_a_schedule_that_cannot_be_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="must be one of multiple, decaying, constant; got 'rising'"):
        rates("linear", "rising")
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    plateau = get_scheduler("reduce_lr_on_plateau", optimizer)
    assert schedule_tables(plateau, "multiple", 4.0, 10) is plateau
    with pytest.raises(ValueError, match=r'LambdaLR.*got ReduceLROnPlateau. Use "multiple"'):
        schedule_tables(plateau, "decaying", 4.0, 10)
