# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A dense model becomes a PEER model that computes the same, or is refused with the reason."""

import json

import pytest
import torch
from training_helpers import REPOSITORY, private_cache  # noqa: F401  a fixture
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from modeling_peer import PeerForCausalLM
from modeling_peer.adaptation.added_layers import chosen_layers, neurons_of
from modeling_peer.adaptation.retrofit import compare_logits, retrofit
from modeling_peer.adaptation.retrofit_checkpoint import RetrofitArguments, retrofit_checkpoint
from modeling_peer.adaptation.retrofit_cost import RetrofitBenchmark, bench_retrofit
from modeling_peer.console.errors import SettingsError
from modeling_peer.hub.loading import parse_with_checkpoint
from peer_command import COMMANDS

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LAYER = {"num_sub_keys": 8, "num_retrieval_heads": 2, "num_experts_per_head": 4, "query_dim": 16}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def dense_model(config_class=LlamaConfig, **fields):
    """A tiny dense model whose norms and biases are not those of a new one."""
    model = AutoModelForCausalLM.from_config(config_class(**{**SIZES, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("config_class", "fields"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
        (LlamaConfig, {"rope_parameters": YARN, "rms_norm_eps": 1e-3}),
        (MistralConfig, {"sliding_window": None, "head_dim": 16}),  # heads wider than hidden_size / num_heads
        (Qwen2Config, {"tie_word_embeddings": True}),  # biases of q, k and v, none of o
    ],
    ids=["llama", "llama-biases", "llama-yarn", "mistral", "qwen2"],
)
def test_logits_are_the_same_before_and_after_saving(tmp_path, config_class, fields):
    dense = dense_model(config_class, **fields)
    model = retrofit(dense, layers=[0, 2], **LAYER)
    assert model.config.mlp_layer_types == ["sparse", "dense", "sparse"]
    assert model.config.parallel_dense_mlp
    assert compare_logits(dense, model)["largest_difference"] == 0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is PeerForCausalLM
    tokens = torch.randint(99, (2, 40))
    assert compare_logits(dense, loaded, tokens) == compare_logits(dense, model, tokens)
    assert compare_logits(dense, loaded, tokens)["largest_difference"] < 1e-6


def test_weights_are_shared_and_keep_dtype_mode_and_what_trains():
    dense = dense_model().to(torch.bfloat16)
    dense.model.embed_tokens.weight.requires_grad_(False)
    dense.generation_config.temperature = 0.25
    model = retrofit(dense, **LAYER)
    ours = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        assert ours[name.replace("layers.1.mlp.", "layers.1.dense_mlp.")] is parameter
    assert not ours["model.embed_tokens.weight"].requires_grad
    assert ours["model.layers.1.mlp.experts.up_embed"].dtype == model.dtype == torch.bfloat16
    assert model.generation_config.temperature == 0.25
    assert not model.training
    assert retrofit(dense.train(), **LAYER).training
    assert dense.training
    assert compare_logits(dense, model)["equal"]


def test_the_receipt_sees_a_difference():
    dense = dense_model()
    model = retrofit(dense, **LAYER)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.up_embed.normal_()
    receipt = compare_logits(dense, model)
    assert receipt["largest_difference"] > 1e-3
    assert not receipt["equal"]


@pytest.mark.parametrize("fields", [{}, {"gated_experts": True}, {"share_expert_tables": True}])
@pytest.mark.parametrize("readers", ["random", "neurons", "inputs"])
def test_the_new_layers_learn(tmp_path, readers, fields):
    dense = dense_model()
    for parameter in dense.parameters():
        parameter.requires_grad_(False)
    tokens = torch.randint(99, (4, 32))
    sample = {"sample": tokens} if readers == "inputs" else {}
    model = retrofit(dense, layers=[0, 1], readers=readers, **sample, **LAYER, **fields).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(one, p) for one, p in zip(before, trained, strict=True))
    model.eval().save_pretrained(tmp_path)
    assert compare_logits(model, AutoModelForCausalLM.from_pretrained(tmp_path))["largest_difference"] < 1e-5


def test_readers_are_the_neurons_of_the_mlp_at_the_scale_of_random_ones():
    dense = dense_model()
    neurons = torch.cat(list(neurons_of(dense.model.layers[1].mlp, 32).values()))
    assert neurons.shape == (2 * 48, 32)  # gate_proj and up_proj
    readers = retrofit(dense, readers="neurons", **LAYER).model.layers[1].mlp.experts.down_embed
    random = retrofit(dense, **LAYER).model.layers[1].mlp.experts.down_embed
    similarity = torch.nn.functional.normalize(readers, dim=-1) @ torch.nn.functional.normalize(neurons, dim=-1).T
    assert similarity.amax(1).min() > 0.7
    assert len(similarity.argmax(1).unique()) > 50  # 64 experts of 96 neurons
    torch.testing.assert_close(readers.norm(dim=-1).mean(), random.norm(dim=-1).mean(), rtol=0.1, atol=0)


@pytest.mark.parametrize("fields", [{}, {"gated_experts": True}])
def test_readers_have_the_covariance_of_the_inputs_at_the_length_of_random_ones(fields):
    dense = dense_model().train()
    tokens = torch.randint(99, (6, 40))
    read = []
    hook = dense.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    dense.eval()(tokens)
    hook.remove()
    inputs = read[0].detach().flatten(0, 1)
    sizes = {**LAYER, "num_sub_keys": 64}
    model = retrofit(dense.train(), readers="inputs", sample=tokens, **sizes, **fields)
    assert dense.training
    assert not dense.model.layers[1].mlp._forward_pre_hooks
    assert compare_logits(dense, model)["equal"]
    experts = model.model.layers[1].mlp.experts
    expected = torch.cov(inputs.T)
    tables = [experts.down_embed] + ([experts.gate_embed] if fields else [])
    for table in tables:
        torch.testing.assert_close(table.norm(dim=-1), torch.full((4096,), 4.0))  # expert_init_gain
        assert table.mean(0).norm() < 0.2  # the mean of the inputs is left out: theirs is longer than this
        # only the directions are drawn: their second moments, beside those of a Gaussian drawn by torch itself
        drawn = torch.distributions.MultivariateNormal(torch.zeros(32), expected + 1e-6 * torch.eye(32)).sample(
            (40000,)
        )
        drawn = torch.nn.functional.normalize(drawn, dim=-1)
        got = table.T @ table / (16 * len(table))
        assert (got - drawn.T @ drawn / len(drawn)).norm() < 0.1 * got.norm()
        assert (got - torch.eye(32) / 32).norm() > 0.3 * got.norm()  # random readers would be this
    if fields:
        assert not torch.equal(experts.down_embed, experts.gate_embed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readers": "inputs"}, "readers='inputs' needs a text to read: give sample"),
        ({"sample": torch.ones(4, 16, dtype=torch.int64)}, "readers='random' takes no sample"),
        ({"readers": "inputs", "sample": torch.ones(64, dtype=torch.int64)}, r"token ids .*; got \(64,\)"),
        ({"readers": "inputs", "sample": "a text"}, "token ids .*; got str"),
        ({"readers": "inputs", "sample": torch.ones(1, 31, dtype=torch.int64)}, "31 tokens, .* needs at least 32"),
        ({"readers": "inputs", "sample": torch.ones(1, 65, dtype=torch.int64)}, "65 tokens, and the model reads 64"),
        ({"readers": "inputs", "sample": torch.full((1, 40), 99)}, "ids 99 to 99; the model has 99 tokens"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(options, message):
    model = dense_model()
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        retrofit(model, **{**LAYER, **options})
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_inputs_that_are_not_finite_are_refused():
    model = dense_model()
    torch.nn.init.constant_(model.model.layers[1].post_attention_layernorm.weight, torch.nan)
    with pytest.raises(ValueError, match="an MLP reads NaN"):
        retrofit(model, readers="inputs", sample=torch.randint(99, (2, 32)), **LAYER)


def test_both_vectors_of_a_gated_neuron_go_to_one_expert():
    dense = dense_model()
    experts = retrofit(dense, readers="neurons", gated_experts=True, **LAYER).model.layers[1].mlp.experts
    mlp = dense.model.layers[1].mlp
    gates = (experts.gate_embed @ mlp.gate_proj.weight.T).argmax(1)
    downs = (experts.down_embed @ mlp.up_proj.weight.T).argmax(1)
    assert (gates == downs).float().mean() > 0.9


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (lambda: dense_model(MistralConfig), {}, "sliding_window=4096: a PEER decoder has no window"),
        (lambda: dense_model(final_logit_softcapping=30.0), {}, "final_logit_softcapping=30.0: a PEER decoder has no"),
        (lambda: dense_model(Qwen3Config), {}, "Qwen3ForCausalLM cannot become a PEER checkpoint.*PeerAdapterConfig"),
        (lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES)), {}, "cannot become a PEER checkpoint"),
        (lambda: retrofit(dense_model(), **LAYER), {}, "is a PEER model already"),
        (dense_model, {"layers": [1, 3]}, r"decoder layers 0 to 2; got \[3\]"),
        (dense_model, {"layers": []}, "name one or more"),
        (dense_model, {"readers": "neuron"}, "readers must be one of random, neurons"),
        (dense_model, {"num_head": 3}, "no field of a new PEER layer"),
        (dense_model, {"num_retrieval_head": 3}, "Did you mean 'num_retrieval_heads'"),
        (dense_model, {"num_experts_per_head": 9}, r"num_experts_per_head \(9\) exceeds num_sub_keys \(8\)"),
        (dense_model, {"expert_table_format": "int8"}, "no field of a new PEER layer"),
    ],
)
def test_what_cannot_be_retrofitted_is_refused_and_left_as_it_was(build, options, message):
    model = build()
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        retrofit(model, **{**LAYER, **options})
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_changed_models_are_refused():
    model = dense_model()
    model.lm_head = torch.nn.Linear(32, 99)  # a bias that Llama has not
    with pytest.raises(ValueError, match=r"lm_head.bias.*no place"):
        retrofit(model, **LAYER)
    model = dense_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="embeddings are one tensor"):
        retrofit(model, **LAYER)
    model = dense_model()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match=r"is quantised.*adapter"):
        retrofit(model, **LAYER)
    model = dense_model()
    model.model.layers[0].mlp.to("meta")
    with pytest.raises(ValueError, match="on meta"):
        retrofit(model, **LAYER)


def test_an_adapted_model_is_refused():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(dense_model(), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(ValueError, match="Merge or unload adapters"):
            retrofit(model, **LAYER)
    assert compare_logits(adapted.unload(), retrofit(adapted.unload(), **LAYER))["equal"]


def test_a_field_without_effect_can_be_ignored():
    dense = dense_model(rope_interleaved=False, is_llama_config=True, note="a note")  # the first two are SmolLM's
    with pytest.raises(ValueError, match=r"note='a note'.*ignored_fields"):
        retrofit(dense, **LAYER)
    assert compare_logits(dense, retrofit(dense, ignored_fields=["note"], **LAYER))["equal"]


def test_the_middle_layer_is_the_default():
    assert [chosen_layers(None, number) for number in (1, 2, 3, 12)] == [[0], [0], [1], [5]]
    assert retrofit(dense_model(), **LAYER).config.mlp_layer_types == ["dense", "sparse", "dense"]


@pytest.fixture
def checkpoint(tmp_path, private_cache):  # noqa: F811  the fixture above
    model = dense_model(vocab_size=257)
    model.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(REPOSITORY / "examples" / "checkpoints" / "peer_bytes").save_pretrained(
        tmp_path / "dense"
    )
    return tmp_path / "dense"


def command(checkpoint, *words):
    return retrofit_checkpoint(parse_with_checkpoint(RetrofitArguments, [str(checkpoint), *map(str, words)]))


def test_the_command_saves_checkpoint_tokenizer_and_receipt(checkpoint, tmp_path, capsys):
    folder = tmp_path / "peer"
    sizes = ["--num_sub_keys", 8, "--layer_fields", "num_experts_per_head=4", "query_dim=16", "query_norm=rms_norm"]
    sample = ["--sample_file", REPOSITORY / "README.md", "--readers", "neurons"]
    receipt = command(checkpoint, "--output_dir", folder, "--layers", 0, 2, *sizes, *sample)
    assert json.loads((folder / "retrofit.json").read_text()) == receipt
    assert receipt["layers"] == [0, 2]
    assert receipt["num_experts"] == 64
    assert receipt["logits"]["tokens"] == "256 text"
    assert receipt["reader_tokens"] is None
    assert receipt["logits"]["largest_difference"] == 0
    assert receipt["versions"]["torch"] == torch.__version__
    assert "Largest difference of logits on 256 text tokens: 0" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == receipt["parameters_after"] > receipt["parameters_before"]
    assert model.config.query_norm == "rms_norm"
    assert len(AutoTokenizer.from_pretrained(folder)) == 257
    assert "base_model" not in (folder / "README.md").read_text()  # a folder has no Hub id
    assert "retrofit" in COMMANDS


def test_the_command_reads_the_sample_for_readers_of_inputs(checkpoint, tmp_path, capsys):
    sample = tmp_path / "sample.txt"
    sample.write_text("A short text, read by the model. " * 40)  # 1,320 bytes, sequences of 64
    sizes = ["--num_sub_keys", 8, "--layer_fields", "num_experts_per_head=4", "query_dim=16"]
    words = ["--output_dir", tmp_path / "peer", *sizes, "--readers", "inputs", "--sample_file", sample]
    receipt = command(checkpoint, *words)
    assert receipt["readers"] == "inputs"
    assert receipt["reader_tokens"] == 20 * 64
    assert receipt["logits"]["tokens"] == "256 text"
    assert receipt["logits"]["largest_difference"] == 0
    sample.write_text("Too short.")
    with pytest.raises(SettingsError, match="10 tokens, and the covariance of 32 features needs at least 32"):
        command(checkpoint, "--output_dir", tmp_path / "other", *words[2:])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--output_dir is missing"),
        (["--output_dir", "x", "--readers", "text"], "--readers must be one of random, neurons, inputs"),
        (["--output_dir", "x", "--readers", "inputs"], "--readers inputs needs a text .*--sample_file"),
        (["--output_dir", "x", "--layers", "7"], "cannot retrofit .* decoder layers 0 to 2"),
        (["--output_dir", "x", "--layer_fields", "sparse_mlp=top_k_moe"], "no field of a new PEER layer"),
        (["--output_dir", "x", "--sample_file", "absent.txt"], "cannot read --sample_file"),
    ],
)
def test_bad_words_are_refused(checkpoint, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=message):
        command(checkpoint, *words)
    assert not (tmp_path / "x").exists()


def test_the_folder_of_the_dense_model_is_not_overwritten(checkpoint):
    with pytest.raises(SettingsError, match="the dense model would be overwritten"):
        command(checkpoint, "--output_dir", checkpoint)


def test_the_cost_of_a_step_is_measured_against_the_dense_model(capsys):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 64, "num_sub_keys": 16, "sequence_length": 16, "repeats": 3}
    result = bench_retrofit(RetrofitBenchmark(**sizes))
    medians = {name: one["median_ms"] for name, one in result["milliseconds"].items()}
    assert result["ratio"] == pytest.approx(medians["with a PEER layer"] / medians["dense"], rel=1e-3)
    assert "256 experts: a step takes" in capsys.readouterr().out
    with pytest.raises(SettingsError, match="attention heads"):
        bench_retrofit(RetrofitBenchmark(**{**sizes, "num_attention_heads": 5}))
