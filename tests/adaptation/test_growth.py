# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A grown pool changes nothing until it is trained, trains alone, and is saved and loaded like any model's."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import TINY_LLAMA, TINY_PEER, as_command_line, private_cache, run_processes, some_text, train  # noqa: F401
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from modeling_peer import PeerConfig, PeerForCausalLM, PeerLayer, quantise_expert_tables, verify_checkpoint
from modeling_peer.adaptation.grow_checkpoint import GrowthArguments, grow_checkpoint
from modeling_peer.adaptation.growth import grow
from modeling_peer.adaptation.patches import apply_patch, save_patch
from modeling_peer.adaptation.slicing import slice_experts
from modeling_peer.analysis.routing_hooks import find_routed_layers
from modeling_peer.console.errors import SettingsError
from modeling_peer.costs.counting import model_cost
from modeling_peer.data.tokenizers import byte_tokenizer
from modeling_peer.hub.loading import parse_with_checkpoint
from modeling_peer.optim import RowSparseAdamW, parameter_groups

TOKENS = torch.arange(1, 41).view(2, 20)
SIZES = {"num_sub_keys": 6, "num_retrieval_heads": 3, "num_experts_per_head": 2, "query_dim": 8}
TWO_LAYERS = {"mlp_layer_types": ["sparse", "dense", "sparse"]}


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def step(model, row_sparse=False, number=3):
    """Some steps of the parameters that train."""
    model.config.row_sparse_gradients = row_sparse
    optimizer = RowSparseAdamW(parameter_groups(model, 1e-2))
    for _ in range(number):
        model.train()(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def of_pool(name, number):
    return f".grown_pools.{number}." in name


@pytest.mark.parametrize("implementation", ["eager", "cpu"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"parallel_dense_mlp": True, "gated_experts": True},  # as a retrofit has it
        {"share_expert_tables": True, "query_norm": "rms_norm", "balance_loss": "switch"},
    ],
    ids=["plain", "beside an MLP", "shared"],
)
def test_logits_stay_as_they_were_and_only_the_new_pool_trains(tiny_config, implementation, fields):
    if implementation == "cpu":
        pytest.importorskip("numba")
    model = PeerForCausalLM(tiny_config(**TWO_LAYERS, **fields))
    model.set_experts_implementation(implementation)
    step(model, number=1)  # running statistics are not those of a new model
    expected = logits(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert grow(model, layers=[2], **SIZES) is model
    assert torch.equal(logits(model), expected)
    model.train_only_newest_pool()
    assert {of_pool(name, 0) for name, p in model.named_parameters() if p.requires_grad} == {True}
    for row_sparse in (False, True):
        loss = model.eval()(TOKENS, labels=TOKENS, router_aux_loss_coef=0.0).loss
        step(model, row_sparse)
        assert model.eval()(TOKENS, labels=TOKENS, router_aux_loss_coef=0.0).loss < loss
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    # 36 experts, and a token uses 6 of them
    assert (after["model.layers.2.grown_pools.0.experts.up_embed"] != 0).any(1).sum() > 6


def test_both_implementations_and_both_kinds_of_gradient_agree(tiny_config):
    pytest.importorskip("numba")
    model = grow(PeerForCausalLM(tiny_config()), **SIZES)
    torch.nn.init.normal_(model.model.layers[1].grown_pools[0].experts.up_embed)
    found = []
    for implementation, row_sparse in (("eager", False), ("cpu", False), ("cpu", True)):
        model.set_experts_implementation(implementation)
        model.config.row_sparse_gradients = row_sparse
        model.zero_grad()
        output = model.eval()(TOKENS, labels=TOKENS)
        output.loss.backward()
        gradients = [p.grad.to_dense() for name, p in model.named_parameters() if of_pool(name, 0)]
        found.append([output.logits, *gradients])
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_copy_of_a_grown_model_has_a_configuration_of_its_own(tiny_config):
    model = grow(PeerForCausalLM(tiny_config()), **SIZES)
    other = copy.deepcopy(model)
    other.set_experts_implementation("eager")
    pools = [one.model.layers[1].grown_pools[0].experts for one in (model, other)]
    assert [pool.config._experts_implementation for pool in pools] == [None, "eager"]
    assert torch.equal(logits(pickle.loads(pickle.dumps(other))), logits(other))


@pytest.mark.slow
def test_a_grown_model_compiles_without_a_graph_break(tiny_config):
    model = grow(PeerForCausalLM(tiny_config()), **SIZES).eval()
    torch.nn.init.normal_(model.model.layers[1].grown_pools[0].experts.up_embed)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, logits(model), atol=1e-5, rtol=1e-4)


def test_a_grown_layer_is_the_sum_of_its_pools(tiny_config):
    model = grow(PeerForCausalLM(tiny_config()), **SIZES)
    layer = model.eval().model.layers[1]
    torch.nn.init.normal_(layer.grown_pools[0].experts.up_embed)
    alone = PeerLayer(tiny_config(**SIZES)).eval()
    alone.load_state_dict(layer.grown_pools[0].state_dict())
    seen = []
    layer.mlp.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    embedded = []
    layer.register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
    with torch.no_grad():
        model(TOKENS)
    attended, (hidden, first), output = seen
    torch.testing.assert_close(output, embedded[0] + attended + first + alone(hidden))


def test_outputs_have_the_experts_of_each_pool_in_order(tiny_config):
    model = grow(grow(PeerForCausalLM(tiny_config(**TWO_LAYERS)), layers=[2], **SIZES), num_sub_keys=5)
    output = model.eval()(TOKENS, output_expert_ids=True, output_expert_gates=True)
    shapes = [(2, 20, 2, 4), (2, 20, 2, 4), (2, 20, 2, 4), (2, 20, 3, 2), (2, 20, 2, 4)]
    assert [tuple(ids.shape) for ids in output.expert_ids] == shapes
    assert [tuple(gates.shape) for gates in output.expert_gates] == shapes
    sizes = [64, 25, 64, 36, 25]
    assert all(ids.max() < size for ids, size in zip(output.expert_ids, sizes, strict=True))
    layers = find_routed_layers(model)
    assert [layer.num_experts for layer in layers] == sizes
    assert [layer.name for layer in layers] == [
        "layer_0",
        "layer_0_grown_0",
        "layer_2",
        "layer_2_grown_0",
        "layer_2_grown_1",
    ]
    assert sum(p.numel() for p in model.parameters()) == model_cost(model.config, 20).parameters


def test_a_third_pool_trains_beside_two_frozen_ones(tiny_config, tmp_path):
    model = grow(PeerForCausalLM(tiny_config()), **SIZES)
    model.train_only_newest_pool()
    step(model)
    grow(model, num_sub_keys=5, query_norm="none")
    model.train_only_newest_pool()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(of_pool(name, 1) for name in changed)
    model.save_pretrained(tmp_path)
    loaded = PeerForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.grown_pools == model.config.grown_pools


def test_a_grown_model_is_saved_with_files_of_its_own_and_loaded_like_any(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_peer.table_shards_peer.MIN_BYTES", 1)
    model = grow(PeerForCausalLM(tiny_config()), **SIZES)
    model.train_only_newest_pool()
    step(model)
    model.save_pretrained(tmp_path / "grown")
    file = tmp_path / "grown" / "model-layer-001-grown-0-experts.safetensors"
    assert set(load_file(file)) == {f"model.layers.1.grown_pools.0.experts.{name}_embed" for name in ("down", "up")}
    assert (tmp_path / "grown" / "model-layer-001-experts.safetensors").exists()
    index = json.loads((tmp_path / "grown" / "model.safetensors.index.json").read_text())
    assert file.name in index["metadata"]["checksums"]
    verify_checkpoint(tmp_path / "grown")
    for placement in (None, "mapped", "memory"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", table_placement=placement)
        assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path / "again")  # without a grown pool: no file is left over
    assert not (tmp_path / "again" / file.name).exists()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(OSError, match=file.name):
        PeerForCausalLM.from_pretrained(tmp_path / "grown")


@pytest.mark.slow
def test_a_grown_model_loads_without_the_package(tiny_config, tmp_path):
    model = grow(PeerForCausalLM(tiny_config()), **SIZES)
    model.train_only_newest_pool()
    step(model)
    model.save_pretrained(tmp_path / "grown")
    torch.save(logits(model), tmp_path / "logits.pt")
    script = f"""
import sys, torch
sys.modules["modeling_peer"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "grown")!r}, trust_remote_code=True).eval()
with torch.no_grad():
    found = model(torch.arange(1, 41).view(2, 20)).logits
torch.testing.assert_close(found, torch.load({str(tmp_path / "logits.pt")!r}), atol=1e-5, rtol=1e-5)
model.train_only_newest_pool()
"""
    process = run_processes(1, script)
    assert process.returncode == 0, process.stderr[-3000:]


def test_missing_tensors_of_a_pool_start_as_zero_writers(tiny_config, tmp_path):
    model = PeerForCausalLM(tiny_config())
    model.save_pretrained(tmp_path)
    loaded = PeerForCausalLM.from_pretrained(tmp_path, grown_pools=[{"layers": [1], **SIZES, "query_norm": "none"}])
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.model.layers[1].grown_pools[0].experts.down_embed.std() > 0


def test_quantised_mapped_and_patched_tables_work_in_all_pools(tiny_config, tmp_path):
    model = grow(PeerForCausalLM(tiny_config()), **SIZES)
    model.train_only_newest_pool()
    model.save_pretrained(tmp_path / "grown")
    step(model)
    patch = save_patch(tmp_path / "grown", model, tmp_path / "fine.safetensors", other_tensors="store")
    assert "model.layers.1.grown_pools.0.experts.up_embed" in patch.tensors
    base = PeerForCausalLM.from_pretrained(tmp_path / "grown")
    apply_patch(base, patch.file)
    assert torch.equal(logits(base), logits(model))
    quantised = quantise_expert_tables(base, "int8")
    assert quantised.model.layers[1].grown_pools[0].experts.up_embed.dtype == torch.int8
    quantised.save_pretrained(tmp_path / "int8")
    loaded = PeerForCausalLM.from_pretrained(tmp_path / "int8", table_placement="mapped")
    assert torch.equal(logits(loaded), logits(quantised))


def test_what_cannot_grow_is_refused_and_unchanged(tiny_config):
    model = PeerForCausalLM(tiny_config())
    for fields, message in (
        ({"layers": [0]}, r"layers must name one or more of the PEER layers \[1\]; got \[0\]"),
        ({"layers": []}, "must name one or more"),
        ({"num_sub_keys": 3}, r"num_experts_per_head \(4\) exceeds num_sub_keys \(3\)"),
        ({"num_sub_keys": 0}, "num_sub_keys must be an integer from 1"),
        ({"query_dim": 7}, r"query_dim \(7\) must be even"),
        ({"query_norm": "group_norm"}, "query_norm must be one of"),
        ({"num_subkeys": 8}, "Did you mean 'num_sub_keys'"),
    ):
        with pytest.raises(ValueError, match=message):
            grow(model, **fields)
    assert model.config.grown_pools is None
    assert model.model.layers[1].grown_pools is None
    with pytest.raises(ValueError, match=r"has no grown pools. grow\(model"):
        model.train_only_newest_pool()
    with pytest.raises(ValueError, match="a slice does not grow"):
        grow(slice_experts(PeerForCausalLM(tiny_config()), {1: [1, 2]}))
    with pytest.raises(ValueError, match="is not sliced"):
        slice_experts(grow(PeerForCausalLM(tiny_config())), {1: [1, 2]})
    with pytest.raises(ValueError, match="Grow the float model, and quantise it afterwards"):
        grow(quantise_expert_tables(PeerForCausalLM(tiny_config()), "int8"))
    with pytest.raises(ValueError, match="stand beside PEER layers, and sparse_mlp is 'product_key_memory'"):
        grow(PeerForCausalLM(tiny_config(sparse_mlp="product_key_memory")))
    dense = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA))
    with pytest.raises(ValueError, match=r"is not a PEER model. `peer retrofit`"):
        grow(dense)


@pytest.mark.usefixtures("private_cache")
def test_peer_grow_writes_a_checkpoint_that_peer_train_trains(tmp_path, capsys):
    fields = {name: value for name, value in TINY_PEER.items() if name != "model_type"}
    base = str(tmp_path / "base")
    PeerForCausalLM(PeerConfig(**fields)).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    words = [base, "--output_dir", str(tmp_path / "grown"), "--num_sub_keys", "6", "--query_norm", "rms_norm"]
    receipt = grow_checkpoint(parse_with_checkpoint(GrowthArguments, words))
    assert receipt["equal_logits"]
    assert receipt["num_experts"] == 36
    assert json.loads((tmp_path / "grown" / "grow.json").read_text()) == receipt
    (tmp_path / "text.txt").write_text(some_text(800))
    settings = {"train_file": tmp_path / "text.txt", "model": tmp_path / "grown", "output_dir": tmp_path / "out"}
    settings |= {"max_steps": 3, "block_size": 32, "use_cpu": True, "report_to": "none", "eval_strategy": "no"}
    settings |= {"max_evaluation_bytes": 300, "disable_tqdm": True, "row_sparse_gradients": True, "logging_steps": 1}
    train(as_command_line(**settings))
    assert "the newest one trains" in capsys.readouterr().out
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("grown", "out"))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert "model.layers.0.grown_pools.0.experts.up_embed" in changed
    assert all(".grown_pools.0." in name for name in changed)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert 0 < state["log_history"][0]["expert_usage_layer_0_grown_0"] <= 1
    assert "A pool of 36 more experts was grown in 1 of them." in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SettingsError, match=r"cannot grow .*exceeds num_sub_keys"):
        grow_checkpoint(parse_with_checkpoint(GrowthArguments, [*words[:3], "--num_sub_keys", "2"]))
