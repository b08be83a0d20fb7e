# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Quantised tables in models: quantising, saving, loading, casting, training the rest, and what is refused."""

import copy
import json
import shutil

import peft
import pytest
import reference
import torch
from huggingface_hub.errors import StrictDataclassError
from model_helpers import load_weights, write_single_file
from training_helpers import last_json, run_script, train, write_inputs
from transformers import AutoModelForCausalLM

import modeling_peer
from modeling_peer import PeerConfig, PeerForCausalLM, PeerForSequenceClassification, PeerLayer, quantise_expert_tables
from modeling_peer.console.errors import SettingsError
from modeling_peer.costs.counting import model_parts, sum_of_parts
from modeling_peer.hub.quantise_checkpoint import QuantisationArguments, quantise_checkpoint
from modeling_peer.optim import RowSparseAdamW
from modeling_peer.row_formats_peer import TABLE_FORMATS

FORMATS = tuple(TABLE_FORMATS)
BYTES = {"int8": 1, "int4": 0.5, "float8_e4m3": 1}


@pytest.fixture
def tokens():
    return torch.randint(1, 99, (2, 9))


def experts_of(model, layer=1):
    return model.model.layers[layer].mlp.experts


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


def with_values_of(model):
    """A float model that computes what a quantised one computes: its tables have the same values."""
    config = copy.deepcopy(model.config)
    config.expert_table_format = None
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("_scale")}
    for name in state:
        if name.endswith("_embed"):
            scales = model.state_dict()[name.replace("_embed", "_scale")]
            state[name] = reference.dequantised(state[name], scales).float()
    plain = PeerForCausalLM(config).eval()
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("experts_implementation", ["eager", "cpu"])
@pytest.mark.parametrize("table_format", FORMATS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gated_experts": True, "mlp_layer_types": ["sparse"] * 3},
        {"share_expert_tables": True, "mlp_layer_types": ["sparse"] * 3},
        {"sparse_mlp": "product_key_memory"},
        {"parallel_hashed_memory": True},
    ],
    ids=str,
)
def test_a_quantised_model_computes_what_its_tables_values_do_and_loads_bit_by_bit(
    tiny_config, tokens, tmp_path, table_format, options, experts_implementation
):
    model = PeerForCausalLM(tiny_config(**options)).eval()
    model.set_experts_implementation(experts_implementation)
    before = sum(p.nbytes for name, p in model.named_parameters() if name.endswith("_embed"))
    assert quantise_expert_tables(model, table_format) is model
    assert model.config.expert_table_format == table_format
    after = sum(p.nbytes for name, p in model.named_parameters() if name.endswith("_embed"))
    assert after == before * BYTES[table_format] / 4
    logits = model(tokens).logits
    plain = with_values_of(model)
    plain.set_experts_implementation(experts_implementation)
    # measured: 1e-7 of logits up to 0.5; scales multiply sums rather than their terms
    torch.testing.assert_close(logits, plain(tokens).logits, rtol=0, atol=4e-6)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=experts_implementation)
    assert loaded.config.expert_table_format == table_format
    assert torch.equal(loaded(tokens).logits, logits)
    for (name, one), other in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert torch.equal(bits(one), bits(other)), name
    if options.get("share_expert_tables"):
        for one in (model, loaded):
            assert experts_of(one, 0).up_scale is experts_of(one, 2).up_scale
        assert sum(name.endswith("up_scale") for name in load_weights(tmp_path)) == 1


@pytest.mark.slow_but_first
@pytest.mark.parametrize("table_format", FORMATS)
def test_a_checkpoints_own_code_loads_it_without_the_package(tiny_config, tokens, tmp_path, table_format):
    model = quantise_expert_tables(PeerForCausalLM(tiny_config()).eval(), table_format)
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path / "model")
    torch.save((tokens, model(tokens).logits), tmp_path / "expected.pt")
    (tmp_path / "load.py").write_text(
        "import sys, torch\n"
        "sys.modules['modeling_peer'] = sys.modules['numba'] = sys.modules['triton'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r}, trust_remote_code=True)\n"
        f"tokens, logits = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        "assert torch.equal(model(tokens).logits, logits)\n"
        "assert not model.model.layers[1].mlp.experts.up_scale.requires_grad\n"
    )
    done = reference_process(tmp_path / "load.py")
    assert done.returncode == 0, done.stderr


def reference_process(script):
    import os
    import subprocess
    import sys

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_HOME"] = str(script.parent / "cache")
    return subprocess.run([sys.executable, "-P", script], capture_output=True, text=True, env=environment, cwd="/")


@pytest.mark.parametrize("table_format", FORMATS)
def test_casts_leave_rows_and_scales_as_they_are(tiny_config, tokens, tmp_path, table_format):
    model = quantise_expert_tables(PeerForCausalLM(tiny_config(expert_act="gelu")).eval(), table_format)
    model.save_pretrained(tmp_path)
    dtypes = {"up_embed": TABLE_FORMATS[table_format].dtype, "up_scale": torch.float32}
    casts = [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()]
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)]
    for one in [*(cast(copy.deepcopy(model)) for cast in casts), *loaded]:
        assert one.lm_head.weight.dtype != torch.float32
        for name, dtype in dtypes.items():
            assert getattr(experts_of(one), name).dtype == dtype
            assert torch.equal(bits(getattr(experts_of(one), name)), bits(getattr(experts_of(model), name)))
        assert one(tokens).logits.isfinite().all()


def test_a_new_model_of_a_quantised_configuration_has_random_rows(tiny_config, tokens):
    for table_format in FORMATS:
        model = PeerForCausalLM(tiny_config(expert_table_format=table_format)).eval()
        values = reference.dequantised(experts_of(model).down_embed, experts_of(model).down_scale)
        gain = model.config.expert_init_gain * model.config.hidden_size**-0.5
        assert values.std() == pytest.approx(gain, rel=0.1)
        assert not any(p.requires_grad for p in experts_of(model).parameters())
        assert model(tokens).logits.isfinite().all()


@pytest.mark.parametrize("experts_implementation", ["eager", "cpu"])
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, RowSparseAdamW])
def test_everything_but_the_tables_trains(tiny_config, tokens, experts_implementation, optimizer_class):
    config = tiny_config(row_sparse_gradients=optimizer_class is RowSparseAdamW)
    model = quantise_expert_tables(PeerForCausalLM(config), "int8").train()
    model.set_experts_implementation(experts_implementation)
    model.requires_grad_(False).requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        losses.append(model(tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
    for name, parameter in model.named_parameters():
        is_frozen = name.endswith(("_embed", "_scale"))
        assert parameter.requires_grad != is_frozen, name
        assert torch.equal(parameter, before[name]) == is_frozen, name


@pytest.mark.parametrize("experts_implementation", ["eager", "cpu"])
def test_gradients_of_the_rest_are_those_of_the_float_model_with_these_values(
    tiny_config, tokens, experts_implementation
):
    model = quantise_expert_tables(PeerForCausalLM(tiny_config()).eval(), "int4")
    plain = with_values_of(model)
    for one in (model, plain):
        one.set_experts_implementation(experts_implementation)
        one(tokens, labels=tokens).loss.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = expected[name].grad
            # measured: 3e-6 of the largest
            atol = 4e-5 * float(gradient.abs().max())
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_training_the_tables_is_refused_with_the_way_out(tiny_config, tokens):
    for table_format in FORMATS:
        model = quantise_expert_tables(PeerForCausalLM(tiny_config()), table_format)
        with pytest.raises(ValueError, match=r"quantised expert tables do not train\. Train the other parameters"):
            experts_of(model).requires_grad_(True)
        experts_of(model).up_scale.requires_grad = True
        with pytest.raises(ValueError, match="quantised expert tables do not train"):
            model(tokens, labels=tokens)
        with torch.no_grad():
            model(tokens)


def test_adapters_train_on_the_dense_part_and_are_refused_on_the_tables(tiny_config, tokens, tmp_path):
    model = quantise_expert_tables(PeerForCausalLM(tiny_config()), "int8")
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "query_proj"], r=4)
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        adapted(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    logits = adapted.eval()(input_ids=tokens).logits
    adapted.save_pretrained(tmp_path / "adapter")
    base = PeerForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, logits, rtol=0, atol=1e-6)
    # by PyTorch: PEFT lets each parameter train by itself
    with pytest.raises((RuntimeError, ValueError), match=r"can require gradients|do not train"):
        peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"]))


def test_a_checkpoint_of_another_format_is_refused(tiny_config, tmp_path):
    model = PeerForCausalLM(tiny_config())
    model.save_pretrained(tmp_path / "float")
    quantise_expert_tables(model, "int8").save_pretrained(tmp_path / "int8")
    for folder, table_format in (("float", "int8"), ("int8", None), ("int8", "float8_e4m3")):
        with pytest.raises(ValueError, match=r"stored with expert_table_format=|loaded without the scales"):
            PeerForCausalLM.from_pretrained(tmp_path / folder, expert_table_format=table_format)
    state = load_weights(tmp_path / "int8")
    del state["model.layers.1.mlp.experts.up_scale"]
    write_single_file(tmp_path / "int8", state)
    with pytest.raises(ValueError, match="up_embed was loaded without the scales of its rows"):
        PeerForCausalLM.from_pretrained(tmp_path / "int8")
    del state["model.layers.1.mlp.experts.up_embed"]
    write_single_file(tmp_path / "int8", state)
    loaded, info = PeerForCausalLM.from_pretrained(tmp_path / "int8", output_loading_info=True)
    assert {name.rpartition(".")[2] for name in info["missing_keys"]} == {"up_embed", "up_scale"}
    assert experts_of(loaded).up_embed.any()


def test_what_cannot_be_quantised_is_refused_and_stays_as_it_was(tiny_config):
    with pytest.raises(StrictDataclassError, match="int5"):
        PeerConfig(expert_table_format="int5")
    with pytest.raises(
        StrictDataclassError, match=r"int4' packs two numbers into a byte, so hidden_size \(33\) must be even"
    ):
        PeerConfig(hidden_size=33, num_attention_heads=3, head_dim=4, expert_table_format="int4")
    with pytest.raises(StrictDataclassError, match="is for tables that a token reads few rows of"):
        PeerConfig(sparse_mlp="top_k_moe", expert_table_format="int8")
    model = PeerForCausalLM(tiny_config(mlp_layer_types=["sparse"] * 3))
    with pytest.raises(ValueError, match=r"expert_table_format='int3' is unknown\. Known: int8, int4, float8_e4m3"):
        quantise_expert_tables(model, "int3")
    with torch.no_grad():
        experts_of(model, 2).up_embed[7, 3] = torch.inf
    with pytest.raises(
        ValueError, match=r"model\.layers\.2\.mlp\.experts\.up_embed: row 7 has values that are not finite"
    ):
        quantise_expert_tables(model, "int8")
    assert model.config.expert_table_format is None
    assert all(p.is_floating_point() for p in model.parameters())
    with pytest.raises(ValueError, match="has no expert tables to quantise"):
        quantise_expert_tables(PeerForCausalLM(tiny_config(mlp_layer_types=["dense"] * 3)), "int8")
    on_tables = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_embed"])
    adapted = peft.get_peft_model(PeerForCausalLM(tiny_config()), on_tables)
    with pytest.raises(ValueError, match=r"experts\.base_layer: an adapter .* is on it\. Merge adapters first"):
        quantise_expert_tables(adapted, "int8")
    assert all(p.is_floating_point() for p in adapted.parameters())
    layer = quantise_expert_tables(PeerLayer(tiny_config()), "int8")
    with pytest.raises(ValueError, match="quantised already"):
        quantise_expert_tables(layer, "int8")
    with torch.device("meta"), pytest.raises(ValueError, match="down_embed is on meta"):
        quantise_expert_tables(PeerLayer(tiny_config()), "int8")


def test_a_quantised_layer_compiles_to_one_graph(tiny_config):
    tokens = torch.randn(1, 5, 32)
    for implementation in ("eager", "cpu"):
        layer = quantise_expert_tables(PeerLayer(tiny_config(experts_implementation=implementation)).eval(), "int4")
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(tokens), layer(tokens))


def test_the_command_quantises_a_checkpoint_with_its_tokenizer(tmp_path):
    folder = tmp_path / "out"
    train(write_inputs(tmp_path), output_dir=folder, max_steps=2)
    words = ["--model", str(folder), "--format", "int4", "--output_dir", str(tmp_path / "int4")]
    result = last_json(run_script("quantise_tables.py", *words))
    assert result["bytes_after"]["expert tables"] < result["bytes_before"]["expert tables"] / 5
    model = AutoModelForCausalLM.from_pretrained(result["output_dir"])
    assert model.config.expert_table_format == "int4"
    assert json.loads((tmp_path / "int4" / "tokenizer.json").read_text())
    for arguments, message in (
        ({"model": str(folder)}, "--output_dir is missing"),
        ({"model": str(folder), "output_dir": str(folder / ".." / "out")}, "is the folder of the model"),
        ({"model": str(tmp_path / "int4"), "output_dir": str(tmp_path / "b")}, "is quantised already .int4."),
    ):
        with pytest.raises(SettingsError, match=message):
            quantise_checkpoint(QuantisationArguments(**arguments))
    with pytest.raises(SettingsError, match=r"--format must be one of int8, int4, float8_e4m3; got 'int'. Did you"):
        QuantisationArguments(format="int")
    shutil.rmtree(tmp_path / "int4")
    fields = model.config.to_dict() | {"mlp_layer_types": ["dense"] * 2, "expert_table_format": None}
    dense = PeerForCausalLM(PeerConfig(**fields))
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(SettingsError, match="has no expert tables to quantise"):
        quantise_checkpoint(QuantisationArguments(model=str(tmp_path / "dense"), output_dir=str(tmp_path / "b")))
    assert not (tmp_path / "b").exists()


def test_the_command_keeps_the_head_of_a_classifier(tiny_config, tmp_path):
    PeerForSequenceClassification(tiny_config(num_labels=5)).save_pretrained(tmp_path / "float")
    quantise_checkpoint(QuantisationArguments(model=str(tmp_path / "float"), output_dir=str(tmp_path / "int8")))
    loaded = modeling_peer.PeerForSequenceClassification.from_pretrained(tmp_path / "int8")
    assert loaded.score.weight.shape == (5, 32)
    assert experts_of(loaded).up_embed.dtype == torch.int8


@pytest.mark.parametrize("options", [{}, {"share_expert_tables": True, "gated_experts": True}], ids=str)
def test_a_model_has_as_many_parameters_in_every_format(tiny_config, options):
    """By `num_parameters`, which model cards and summaries print, and by `peer costs`."""
    config = tiny_config(mlp_layer_types=["sparse"] * 3, **options)
    model = PeerForCausalLM(config)
    expected = model.num_parameters()
    without = model.num_parameters(exclude_embeddings=True)
    tables = {id(p): p.numel() for i in range(3) for p in experts_of(model, i).tables() if p is not None}
    assert sum_of_parts(model_parts(config, 8)).parameters == expected
    for table_format in FORMATS:
        quantised = quantise_expert_tables(copy.deepcopy(model), table_format)
        assert quantised.num_parameters() == expected
        assert quantised.num_parameters(exclude_embeddings=True) == without
        assert quantised.num_parameters(only_trainable=True) == expected - sum(tables.values())
        assert sum_of_parts(model_parts(quantised.config, 8)).parameters == expected


@pytest.mark.parametrize(
    "settings", [{"quant_method": "rows_of_another"}, {"quant_method": "rows", "bits": 3}], ids=str
)
def test_a_quantisation_method_that_transformers_skips_is_refused(tiny_config, tmp_path, settings):
    PeerForCausalLM(tiny_config(num_hidden_layers=1)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": settings}))
    for load in (PeerForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=rf"of the method '{settings['quant_method']}', which this release"):
            load(tmp_path)
