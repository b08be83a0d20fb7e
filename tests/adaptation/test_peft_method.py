# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""PEER layers as an adapter of PEFT, in models of several architectures."""

import copy
import importlib
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

peft = pytest.importorskip("peft")

from modeling_peer.adaptation import peft_method  # noqa: E402
from modeling_peer.adaptation.peft_method import (  # noqa: E402
    PeerAdapterConfig,
    PeerAdapterLayer,
    start_from_inputs,
)

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MIXTURE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LAYER = {"num_sub_keys": 8, "num_retrieval_heads": 2, "num_experts_per_head": 4, "query_dim": 16}


def base_model(model_type="llama", auto_class=AutoModelForCausalLM, **fields):
    return auto_class.from_config(AutoConfig.for_model(model_type, **{**SIZES, **fields})).eval()


def adapt(model, **options):
    return peft.get_peft_model(model, PeerAdapterConfig(task_type="CAUSAL_LM", **{**LAYER, **options}))


def train(model, tokens, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def tokens():
    return torch.randint(1, 99, (2, 16))


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("qwen3", {}),
        ("gemma3_text", {}),  # norms after the MLP
        ("olmo2", {}),  # no norm before the MLP
        ("gpt_neox", {}),  # attention and MLP side by side
        pytest.param("phi", {}, marks=pytest.mark.slow),
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 3, "num_hidden_layers": 3}),  # weights are transposed
        ("mixtral", MIXTURE),
        pytest.param("qwen3_moe", MIXTURE, marks=pytest.mark.slow),
        ("gpt_oss", MIXTURE),  # the MLP returns a tuple
    ],
)
def test_an_adapter_changes_nothing_until_trained_and_is_saved_loaded_and_removed(
    tmp_path, tokens, model_type, fields
):
    base = base_model(model_type, **fields)
    expected = base(tokens).logits
    before = copy.deepcopy(base.state_dict())
    adapted = adapt(copy.deepcopy(base), layers=[0, 2]).eval()
    assert torch.equal(adapted(input_ids=tokens).logits, expected)
    train(adapted, tokens)
    trained = adapted(input_ids=tokens).logits
    assert (trained - expected).abs().max() > 0.01
    adapted.save_pretrained(tmp_path)

    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, trained, rtol=0, atol=1e-6)
    with loaded.disable_adapter():
        assert torch.equal(loaded(input_ids=tokens).logits, expected)
    left = loaded.unload()
    assert left is base
    assert not any(isinstance(module, PeerAdapterLayer) for module in left.modules())
    assert left.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in left.state_dict().items())


def test_the_file_holds_retrieval_and_tables_and_the_card_names_the_base(tmp_path):
    base = base_model()
    base.save_pretrained(tmp_path / "base")
    adapted = adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), layers=[1])
    adapted.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.peer_layers."
    assert {name.removeprefix(prefix) for name in tensors} == {
        "experts.down_embed",
        "experts.up_embed",
        "retrieval.query_norm.weight",
        "retrieval.query_proj.bias",
        "retrieval.query_proj.weight",
        "retrieval.sub_keys",
    }
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "PEER"
    assert saved["target_modules"] == ["model.layers.1.mlp"]
    assert saved["base_model_name_or_path"] == str(tmp_path / "base")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"base_model: {tmp_path / 'base'}" in card
    assert "library_name: peft" in card
    # what the card's reader does
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.peft_config["default"].layers == [1]
    for name, tensor in adapted.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_only_the_adapter_and_the_modules_to_save_train(tokens, tmp_path):
    adapted = adapt(base_model(), modules_to_save=["lm_head"])
    names = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(".peer_layers.default." in name or "modules_to_save" in name for name in names)
    assert any("lm_head" in name for name in names)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    train(adapted, tokens)
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert changed == names
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path)
    for name, tensor in adapted.state_dict().items():
        if ".peer_layers." in name or "modules_to_save" in name:
            assert torch.equal(tensor, loaded.state_dict()[name])


def test_several_adapters_are_added_switched_and_deleted(tokens, tmp_path):
    base = base_model()
    expected = base(tokens).logits
    adapted = train(adapt(base, layers=[0]), tokens)
    first = adapted(input_ids=tokens).logits
    other = {**LAYER, "num_sub_keys": 4}
    adapted.add_adapter("other", PeerAdapterConfig(task_type="CAUSAL_LM", layers=[0, 2], **other))
    assert torch.equal(adapted(input_ids=tokens).logits, first)
    adapted.set_adapter("other")
    assert torch.equal(adapted(input_ids=tokens).logits, expected)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all(".other." in name for name in trained)
    second = train(adapted, tokens)(input_ids=tokens).logits
    adapted.set_adapter("default")
    assert torch.equal(adapted(input_ids=tokens).logits, first)

    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(adapted.unload(), tmp_path, adapter_name="one").eval()
    loaded.load_adapter(tmp_path / "other", adapter_name="two")
    torch.testing.assert_close(loaded(input_ids=tokens).logits, first)
    loaded.set_adapter("two")
    torch.testing.assert_close(loaded(input_ids=tokens).logits, second)
    loaded.delete_adapter("two")
    loaded.set_adapter("one")
    torch.testing.assert_close(loaded(input_ids=tokens).logits, first)


def test_merging_is_refused_with_the_reason(tokens):
    adapted = adapt(base_model())
    assert not adapted.base_model.model.model.layers[1].mlp.peer_layers["default"].training  # as its base
    for merge in (adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged: a token retrieves its experts"):
            merge()
    adapted(input_ids=tokens)  # as it was


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_adapter_of_a_bfloat16_model_is_float32_unless_it_should_not_be(tokens, autocast, dtype):
    base = base_model().to(torch.bfloat16)
    expected = base(tokens).logits
    config = PeerAdapterConfig(**LAYER)
    adapted = peft.get_peft_model(base, config, autocast_adapter_dtype=autocast).eval()
    layer = adapted.base_model.model.model.layers[1].mlp.peer_layers["default"]
    assert layer.experts.up_embed.dtype == layer.retrieval.query_proj.weight.dtype == dtype
    assert layer.retrieval.query_norm.weight.dtype == torch.float32
    assert torch.equal(adapted(input_ids=tokens).logits, expected)
    train(adapted, tokens)
    assert adapted(input_ids=tokens).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(tokens, use_reentrant):
    adapted = train(adapt(base_model()), tokens).train()

    def gradients():
        adapted.zero_grad()
        adapted(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}

    expected = gradients()
    adapted.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    adapted.base_model.model.enable_input_require_grads()
    for name, gradient in gradients().items():
        assert gradient.any()
        torch.testing.assert_close(gradient, expected[name])


def test_trainer_trains_and_saves_the_adapter_alone(tmp_path, tokens):
    from transformers import Trainer, TrainingArguments

    settings = TrainingArguments(tmp_path / "run", max_steps=2, save_steps=2, report_to="none", use_cpu=True)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(adapt(base_model()), settings, train_dataset=data)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    for folder in (tmp_path / "adapter", tmp_path / "run" / "checkpoint-2"):
        assert (folder / "adapter_model.safetensors").exists()
        assert not (folder / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path / "adapter")
    assert loaded.base_model.model.model.layers[1].mlp.peer_layers["default"].experts.up_embed.any()


def test_an_empty_adapter_is_loaded_without_drawing_its_tables(tmp_path):
    adapted = adapt(base_model())
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model(), tmp_path, low_cpu_mem_usage=True)
    for name, tensor in adapted.state_dict().items():
        if ".peer_layers." in name:
            assert torch.equal(tensor, loaded.state_dict()[name])


def test_row_sparse_gradients_train_the_tables(tokens):
    from modeling_peer.optim.row_sparse_adamw import RowSparseAdamW

    adapted = adapt(base_model(), row_sparse_gradients=True).train()
    optimizer = RowSparseAdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    assert adapted.base_model.model.model.layers[1].mlp.peer_layers["default"].experts.up_embed.grad.is_sparse
    optimizer.step()


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [("qwen3", {}), ("gpt_neox", {}), ("mixtral", MIXTURE)],  # the last has no neurons to start from
)
def test_a_new_adapter_starts_from_the_inputs_of_the_mlps(tokens, model_type, fields, tmp_path):
    base = base_model(model_type, **fields)
    expected = base(tokens).logits
    adapted = adapt(base, layers=[0, 2])
    layers = [module.peer_layers["default"] for module in adapted.modules() if isinstance(module, PeerAdapterLayer)]
    before = copy.deepcopy(adapted.state_dict())
    start_from_inputs(adapted, tokens)
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(changed) == len(layers) == 2
    assert all(name.endswith("peer_layers.default.experts.down_embed") for name in changed)
    for layer in layers:
        torch.testing.assert_close(layer.experts.down_embed.norm(dim=-1), torch.full((64,), 4.0))
    assert torch.equal(adapted(input_ids=tokens).logits, expected)
    train(adapted, tokens)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base_model(model_type, **fields), tmp_path)
    for name in changed:
        assert torch.equal(loaded.state_dict()[name], adapted.state_dict()[name])


def test_only_a_new_adapter_can_start_from_inputs(tokens):
    with pytest.raises(ValueError, match=r"call .*start_from_inputs\(model, tokens\) on what get_peft_model"):
        PeerAdapterConfig(readers="inputs")
    adapted = adapt(base_model())
    with pytest.raises(ValueError, match="no PEER adapter 'other'"):
        start_from_inputs(adapted, tokens, "other")
    with pytest.raises(ValueError, match="4 tokens, and the covariance of 32 features"):
        start_from_inputs(adapted, tokens[:1, :4])
    train(adapted, tokens)
    before = copy.deepcopy(adapted.state_dict())
    with pytest.raises(ValueError, match="the adapter 'default' is trained"):
        start_from_inputs(adapted, tokens)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (lambda: base_model("mamba"), {}, "no decoder layers with a module 'mlp'.*mixer"),
        (base_model, {"mlp_name": "feed_forward"}, "mlp_name=.*: input_layernorm, mlp"),
        (base_model, {"layers": [0, 3]}, r"decoder layers 0 to 2; got \[3\]"),
        (base_model, {"num_experts_per_head": 9}, r"num_experts_per_head \(9\) exceeds num_sub_keys \(8\)"),
        (lambda: base_model("mixtral", **MIXTURE), {"readers": "neurons"}, "whose rows are neurons"),
        (lambda: base_model(auto_class=AutoModelForSequenceClassification), {}, "not a causal language model"),
        (lambda: torch.nn.Linear(2, 2), {}, "no configuration of Transformers"),
        (base_model, {"target_modules": ["q_proj"]}, "Leave target_modules unset"),
    ],
)
def test_bad_places_are_refused_and_the_model_is_left_as_it_was(build, options, message):
    model = build()
    before = {name: type(module) for name, module in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, PeerAdapterConfig(**{**LAYER, **options}))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert [p.requires_grad for p in model.parameters()] == flags


def test_an_adapter_over_an_adapter_is_refused(tokens):
    lora = peft.get_peft_model(base_model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"another adapter already \(Linear\)"):
        adapt(lora)
    adapted = adapt(base_model())
    config = adapted.peft_config["default"]
    with pytest.raises(ValueError, match="add_adapter"):
        adapt(adapted)
    assert adapted.peft_config["default"] is config
    with pytest.raises(ValueError, match="is that of a module"):
        adapted.add_adapter("experts", PeerAdapterConfig(task_type="CAUSAL_LM", **LAYER))
    assert list(adapted.peft_config) == ["default"]
    adapted(input_ids=tokens)


def test_layers_that_share_their_mlp_are_refused():
    model = base_model()
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match="layers 0 and 2 of LlamaForCausalLM share one mlp"):
        adapt(model)


def test_batch_norm_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="padding"):
        PeerAdapterConfig(query_norm="batch_norm")


def test_importing_twice_registers_once():
    first, before = peft_method.PeerAdapterConfig, dict(vars(peft_method))
    again = importlib.reload(peft_method)
    try:
        assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["PEER"] is again.PeerAdapterConfig is not first
        assert peft.get_peft_config({"peft_type": "PEER"}).num_sub_keys == 256
        assert [str(name) for name in peft.PeftType].count("PeftType.PEER") == 1
        assert peft.PeftType("PEER") is peft.PeftType.PEER
    finally:
        # other tests hold the first import's classes
        vars(peft_method).update(before)
        peft_method.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.PEER] = first
        peft_method.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.PEER] = peft_method.PeerAdapterModel


def test_a_method_of_the_same_name_is_not_replaced(monkeypatch):
    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, peft.PeftType.PEER, peft.LoraConfig)
    with pytest.raises(ImportError, match="PEFT has a method 'PEER' already"):
        peft_method._register()
