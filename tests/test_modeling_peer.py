# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The decoder and its heads: what a user of Transformers does with any model, done with PEER."""

import copy

import pytest
import torch
import torch._dynamo.testing
from model_helpers import learn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM
from transformers.models.llama import LlamaConfig

import modeling_peer
from modeling_peer import (
    PeerForCausalLM,
    PeerForQuestionAnswering,
    PeerForSequenceClassification,
    PeerForTokenClassification,
    PeerModel,
)
from modeling_peer.backends_peer import EXPERT_MIXTURE_FUNCTIONS
from modeling_peer.experts_peer import PeerExperts, expert_mixture
from modeling_peer.transformers_names_peer import CACHE

HEADS = [
    PeerModel,
    PeerForCausalLM,
    PeerForSequenceClassification,
    PeerForTokenClassification,
    PeerForQuestionAnswering,
]
VARIANTS = {
    "paper": {},
    "every layer sparse": {"mlp_layer_types": ["sparse"] * 3},
    "no layer sparse": {"mlp_layer_types": ["dense"] * 3},
    "beside the dense MLP": {"parallel_dense_mlp": True},
    "shared gated tables": {
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "share_expert_tables": True,
        "gated_experts": True,
    },
    "per-head, sigmoid, rms": {"share_sub_keys": False, "gate_activation": "sigmoid", "query_norm": "rms_norm"},
    "layer norm": {"query_norm": "layer_norm"},
    "no norm, identity": {"query_norm": "none", "expert_act": "identity"},
}


@pytest.fixture
def tokens():
    return torch.randint(1, 99, (3, 12))


@pytest.fixture
def model(tiny_config):
    return PeerForCausalLM(tiny_config()).eval()


def test_public_names_are_the_designs_and_those_for_masked_tokens_checksums_and_quantisation():
    assert set(modeling_peer.__all__) == {
        "PeerConfig",
        "PeerForCausalLM",
        "PeerForMaskedLM",
        "PeerForQuestionAnswering",
        "PeerForSequenceClassification",
        "PeerForTokenClassification",
        "PeerLayer",
        "PeerModel",
        "PeerPreTrainedModel",
        "quantise_expert_tables",
        "verify_checkpoint",
    }


def test_parameter_names_are_the_designs(tiny_config):
    names = dict(PeerForCausalLM(tiny_config(gated_experts=True)).state_dict())
    prefix = "model.layers.1.mlp."
    assert {name.removeprefix(prefix): tuple(p.shape) for name, p in names.items() if name.startswith(prefix)} == {
        "retrieval.query_proj.weight": (2 * 16, 32),
        "retrieval.query_proj.bias": (2 * 16,),
        "retrieval.query_norm.weight": (2 * 16,),
        "retrieval.query_norm.bias": (2 * 16,),
        "retrieval.query_norm.running_mean": (2 * 16,),
        "retrieval.query_norm.running_var": (2 * 16,),
        "retrieval.sub_keys": (2, 8, 8),
        "experts.down_embed": (64, 32),
        "experts.up_embed": (64, 32),
        "experts.gate_embed": (64, 32),
    }


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_learns_a_sentence(tiny_config, options, tokens):
    model = PeerForCausalLM(tiny_config(**options))
    losses, _ = learn(model, tokens)
    assert losses[-1] < losses[0] / 2


def test_a_model_without_sparse_layers_is_llama(tiny_config, tokens):
    """Same blocks, same names: nothing but the feed-forward differs from the host's decoder."""
    config = tiny_config(mlp_layer_types=["dense"] * 3)
    fields = {n: getattr(config, n) for n in LlamaConfig().to_dict() if hasattr(config, n) and n != "model_type"}
    llama = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    model = PeerForCausalLM(config).eval()
    model.load_state_dict(llama.state_dict())
    torch.testing.assert_close(model(tokens).logits, llama(tokens).logits)


def test_the_dense_mlp_beside_the_sparse_one_is_added(tiny_config):
    layer = PeerModel(tiny_config(parallel_dense_mlp=True)).layers[1].eval()
    seen = {}
    layer.mlp.register_forward_hook(lambda m, args, out: seen.update(sparse=out))
    layer.dense_mlp.register_forward_hook(lambda m, args, out: seen.update(dense=out))
    layer.post_attention_layernorm.register_forward_hook(lambda m, args, out: seen.update(residual=args[0]))
    output = layer(torch.randn(1, 4, 32), position_embeddings=(torch.ones(1, 4, 8), torch.zeros(1, 4, 8)))
    assert seen["dense"].any()
    torch.testing.assert_close(output, seen["residual"] + seen["sparse"] + seen["dense"])


def test_later_tokens_never_change_earlier_outputs(model, tokens):
    model.train()(tokens)  # running statistics that are not the initial ones
    model.eval()
    changed = tokens.clone()
    changed[:, 8:] = 1
    torch.testing.assert_close(model(changed).logits[:, :8], model(tokens).logits[:, :8])


def test_a_sequence_does_not_depend_on_its_batch_neighbours_or_padding(model, tokens):
    alone = model(tokens[:1]).logits
    torch.testing.assert_close(model(tokens).logits[:1], alone)
    left = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens[:1]], dim=1)
    mask = (left != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(left, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def test_padding_does_not_enter_the_batch_statistics(tiny_config, tokens):
    config = tiny_config(mlp_layer_types=["sparse", "dense", "dense"])
    padded, plain = PeerForCausalLM(config), PeerForCausalLM(config)
    plain.load_state_dict(padded.state_dict())
    right = torch.cat([tokens, torch.full((3, 6), 98)], dim=1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros(3, 6, dtype=torch.long)], dim=1)
    labels = right.masked_fill(mask == 0, -100)
    padded(right, attention_mask=mask, labels=labels).loss.backward()
    plain(tokens, labels=tokens).loss.backward()
    for (name, a), (_, b) in zip(padded.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    for (name, a), (_, b) in zip(padded.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tiny_config, tokens, use_reentrant):
    model = PeerForCausalLM(tiny_config(mlp_layer_types=["sparse"] * 3))
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for m in (model, checkpointed):
        m.train()(tokens, labels=tokens, use_cache=False).loss.backward()
    for (name, a), (_, b) in zip(model.named_parameters(), checkpointed.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, name=name: f"{name}: {m}")
    for (name, a), (_, b) in zip(model.named_buffers(), checkpointed.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_implementations_agree(tiny_config, tokens, name):
    model = PeerForCausalLM(tiny_config()).eval()
    left = torch.cat([torch.zeros(3, 4, dtype=torch.long), tokens], dim=1)
    inputs = {"input_ids": left, "attention_mask": (left != 0).long()}
    outputs = {}
    for implementation in ("eager", name):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        with torch.no_grad():  # flex attention has no backward on CPU, and is compiled
            outputs[implementation] = model(**inputs).logits[:, 4:]
    torch.testing.assert_close(outputs[name], outputs["eager"], rtol=1e-4, atol=1e-5)


def test_a_registered_attention_is_reached(model, tokens):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls = []

    def counting_attention(*args, **kwargs):
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("counting", counting_attention)
    model.set_attn_implementation("counting")
    model(tokens)
    assert len(calls) == 3


class TestGeneration:
    def test_cached_steps_equal_the_whole_forward(self, model, tokens):
        whole = model(tokens).logits
        out = model(tokens[:, :5], use_cache=True)
        steps = [out.logits]
        for i in range(5, tokens.shape[1]):
            out = model(tokens[:, i : i + 1], use_cache=True, **{CACHE: out[CACHE]})
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-5)

    def test_greedy_equals_argmax_of_growing_prompts(self, model, tokens):
        expected = tokens
        for _ in range(6):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
        generated = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(generated, expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"num_beams": 3},
            {"do_sample": True, "top_k": 5},
            {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
            {"prompt_lookup_num_tokens": 2},
            {"cache_implementation": "static"},
            {"use_cache": False},
        ],
        ids=str,
    )
    def test_every_way_to_decode_gives_tokens(self, model, tokens, options):
        prompt = tokens[:1]  # assisted decoding takes one sequence
        out = model.generate(prompt, max_new_tokens=5, eos_token_id=None, **options)
        assert out.shape == (options.get("num_return_sequences", 1), 17)
        assert torch.equal(out[:, :12], prompt.expand(len(out), -1))

    @pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
    def test_caches_agree_with_the_dynamic_one(self, model, tokens, options):
        expected = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)
        actual = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None, **options)
        assert torch.equal(actual, expected)

    def test_assisted_decoding_gives_the_greedy_tokens(self, model, tiny_config, tokens):
        assistant = PeerForCausalLM(tiny_config(num_hidden_layers=1)).eval()
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        expected = model.generate(tokens[:1], **options)
        assert torch.equal(model.generate(tokens[:1], assistant_model=assistant, **options), expected)

    def test_left_padding_does_not_change_the_continuation(self, model, tokens):
        left = torch.cat([torch.zeros(3, 4, dtype=torch.long), tokens], dim=1)
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        padded = model.generate(left, attention_mask=(left != 0).long(), **options)
        assert torch.equal(padded[:, 16:], model.generate(tokens, **options)[:, 12:])

    def test_generation_from_embeddings(self, model, tokens):
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        generated = model.generate(inputs_embeds=model.get_input_embeddings()(tokens), **options)
        assert torch.equal(generated, model.generate(tokens, **options)[:, 12:])


def test_logits_to_keep(model, tokens):
    whole = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, whole[:, -2:])
    positions = torch.tensor([0, 3])
    torch.testing.assert_close(model(tokens, logits_to_keep=positions).logits, whole[:, positions])
    per_row = torch.tensor([[0, 3], [1, 4], [2, 5]])
    expected = torch.stack([row[p] for row, p in zip(whole, per_row, strict=True)])
    torch.testing.assert_close(model(tokens, logits_to_keep=per_row).logits, expected)
    mask = tokens > 50
    torch.testing.assert_close(model(tokens, logits_to_keep=mask).logits, whole[mask])


def test_exactly_one_of_ids_and_embeddings(model, tokens):
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(tokens)).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(input_ids=tokens, inputs_embeds=model.get_input_embeddings()(tokens))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_an_empty_batch_is_refused_with_its_shape(model, shape):
    with pytest.raises(ValueError, match=f"empty: {shape[0]} sequences of {shape[1]} tokens"):
        model(torch.empty(shape, dtype=torch.long))


def test_router_outputs_are_the_experts_that_were_used(tiny_config, tokens):
    model = PeerForCausalLM(tiny_config(mlp_layer_types=["sparse", "dense", "sparse"])).eval()
    seen = []
    for module in model.modules():
        if isinstance(module, PeerExperts):
            module.register_forward_hook(lambda m, args, out: seen.append(args))
    outputs = model(tokens, output_expert_ids=True, output_expert_gates=True)
    assert len(outputs.expert_ids) == len(outputs.expert_gates) == 2
    for (_, ids, gates), recorded_ids, recorded_gates in zip(
        seen, outputs.expert_ids, outputs.expert_gates, strict=True
    ):
        assert recorded_ids.shape == recorded_gates.shape == (3, 12, 2, 4)
        assert torch.equal(recorded_ids.view(36, 8), ids)
        assert torch.equal(recorded_gates.view(36, 8), gates)
        torch.testing.assert_close(recorded_gates.sum(-1), torch.ones(3, 12, 2))
    assert model(tokens).expert_ids is None


def test_generation_takes_the_options_that_a_forward_takes(model, tokens):
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    plain = model.generate(tokens, **options)
    assert torch.equal(model.generate(tokens, output_expert_ids=True, output_expert_gates=True, **options), plain)


@pytest.mark.parametrize(
    ("head", "sizes", "option", "way_out"),
    [
        (PeerForCausalLM, {}, "output_router_logits", "output_expert_ids"),
        (PeerForCausalLM, {"sparse_mlp": "top_k_moe"}, "output_router_logits", "Leave it unset"),
        (PeerForCausalLM, {"sparse_mlp": "top_k_moe"}, "output_expert_ids", "product_key_memory"),
        (PeerModel, {"sparse_mlp": "multilinear_moe"}, "output_expert_gates", "product_key_memory"),
        (PeerForSequenceClassification, {}, "output_expert_ids", "model.model"),
    ],
)
def test_outputs_that_are_not_recorded_are_refused(tiny_config, tokens, head, sizes, option, way_out):
    model = head(tiny_config(**sizes)).eval()
    model(tokens, **{option: False})
    with pytest.raises(ValueError, match=f"{option}=True.*{way_out}"):
        model(tokens, **{option: True})
    setattr(model.config, option, True)  # as a keyword of from_pretrained
    with pytest.raises(ValueError, match=option):
        model(tokens)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_trains(tiny_config, tokens, head):
    model = head(tiny_config(num_labels=3)).train()
    labels = {
        PeerModel: {},
        PeerForCausalLM: {"labels": tokens},
        PeerForSequenceClassification: {"labels": torch.tensor([0, 1, 2])},
        PeerForTokenClassification: {"labels": tokens % 3},
        PeerForQuestionAnswering: {
            "start_positions": torch.tensor([0, 1, 2]),
            "end_positions": torch.tensor([3, 4, 5]),
        },
    }[head]
    outputs = model(tokens, **labels)
    (outputs.loss if labels else outputs.last_hidden_state.sum()).backward()
    without_gradient = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without_gradient


def test_auto_classes_know_peer(tiny_config):
    config = tiny_config()
    assert type(AutoModel.from_config(config)) is PeerModel
    assert type(AutoModelForCausalLM.from_config(config)) is PeerForCausalLM
    assert type(AutoModelForSequenceClassification.from_config(config)) is PeerForSequenceClassification


class TestCompilation:
    @pytest.fixture(autouse=True)
    def _forget_other_models(self):
        torch._dynamo.reset()

    @pytest.mark.slow_but_first
    @pytest.mark.parametrize("name", ["paper", "shared gated tables", "per-head, sigmoid, rms"])
    def test_forward_compiles_to_one_graph(self, tiny_config, tokens, name):
        model = PeerForCausalLM(tiny_config(**VARIANTS[name])).eval()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_one_compilation_serves_many_lengths(self, tiny_config):
        model = PeerForCausalLM(tiny_config()).eval()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for length in (7, 9, 12, 20, 33):
            tokens = torch.randint(1, 99, (2, length))
            torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
        assert counter.frame_count <= 2  # the first length, then any

    @pytest.mark.slow
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_training_compiles_to_one_graph(self, tiny_config, tokens, checkpointing):
        model = PeerForCausalLM(tiny_config()).train()
        reference = copy.deepcopy(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        mask = torch.ones_like(tokens)
        mask[0, 9:] = 0
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for m in (compiled, reference):
            m(tokens, attention_mask=mask, labels=tokens, use_cache=False).loss.backward()
        for (name, a), (_, b) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        for (name, a), (_, b) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")

    @pytest.mark.slow
    def test_inductor_gives_the_same_logits(self, tiny_config, tokens):
        model = PeerForCausalLM(tiny_config(gated_experts=True)).eval()
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_export_serves_any_batch_and_length(self, tiny_config):
        model = PeerForCausalLM(tiny_config(gated_experts=True)).eval()
        example = {"input_ids": torch.randint(1, 99, (2, 9)), "use_cache": False}
        dynamic = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}, "use_cache": None}
        program = torch.export.export(model, (), kwargs=example, dynamic_shapes=dynamic, strict=False)
        other = torch.randint(1, 99, (3, 17))
        exported = program.module()(input_ids=other, use_cache=False)
        torch.testing.assert_close(exported.logits, model(other).logits, rtol=1e-4, atol=1e-5)


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_loading_in_half_precision_keeps_the_query_norm_in_float32(self, model, tokens, tmp_path, dtype):
        model.train()(tokens)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        statistics = dict(model.named_buffers())
        for name, tensor in {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}.items():
            expected = torch.float32 if "query_norm" in name or "rotary" in name else dtype
            assert tensor.dtype == expected, name
            if "running" in name:
                assert torch.equal(tensor, statistics[name]), name
        logits = loaded(tokens).logits
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), model.eval()(tokens).logits, rtol=0.1, atol=0.05)

    @pytest.mark.parametrize("query_norm", ["batch_norm", "rms_norm", "layer_norm", "none"])
    def test_a_model_built_in_half_precision_has_its_query_norm_in_float32(self, tiny_config, tokens, query_norm):
        config = tiny_config(query_norm=query_norm)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        assert model.dtype == torch.bfloat16
        norm = model.model.layers[1].mlp.retrieval.query_norm
        assert all(tensor.dtype == torch.float32 for tensor in norm.state_dict().values())
        model(tokens, labels=tokens).loss.backward()

    def test_half_precision_training_step(self, tiny_config, tokens):
        model = PeerForCausalLM(tiny_config()).bfloat16().train()
        hidden = model.model(tokens).last_hidden_state
        assert hidden.dtype == torch.bfloat16  # no float32 leaks into the residual stream
        model(tokens, labels=tokens).loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())

    def test_autocast_keeps_gates_and_statistics_in_float32(self, tiny_config, tokens):
        model = PeerForCausalLM(tiny_config()).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(tokens, labels=tokens, output_expert_gates=True)
        outputs.loss.backward()
        assert outputs.expert_gates[0].dtype == torch.float32
        assert model.model.layers[1].mlp.experts.down_embed.grad.dtype == torch.float32


class TestInitialisation:
    @pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
    def test_from_the_meta_device_nothing_stays_uninitialised(self, tiny_config, options):
        with torch.device("meta"):
            model = PeerForCausalLM(tiny_config(**options))
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.fill_(float("nan"))
        model.init_weights()
        for name, tensor in model.state_dict().items():
            assert torch.isfinite(tensor).all(), name

    def test_the_forward_runs_on_the_meta_device(self, tiny_config):
        with torch.device("meta"):
            model = PeerForCausalLM(tiny_config())
            assert model(torch.ones(2, 5, dtype=torch.long)).logits.shape == (2, 5, 99)

    def test_the_paper_sized_model_fits_on_the_meta_device(self):
        with torch.device("meta"):
            model = PeerForCausalLM(modeling_peer.PeerConfig())
        experts = model.model.layers[5].mlp.experts
        assert experts.down_embed.shape == (1024**2, 1024)

    def test_sub_keys_and_queries_give_scores_of_variance_one(self, tiny_config):
        config = tiny_config(num_sub_keys=64, query_dim=64, hidden_size=64)
        retrieval = PeerForCausalLM(config).model.layers[1].mlp.retrieval
        query = torch.randn(500, 64)
        row = query[:, :32] @ retrieval.sub_keys[0].T
        column = query[:, 32:] @ retrieval.sub_keys[1].T
        assert 0.8 < (row[:, :32] + column[:, 32:]).var().item() < 1.2


def test_the_tensor_parallel_plan_names_only_modules_that_exist(tiny_config):
    plan = PeerForCausalLM(tiny_config(mlp_layer_types=["sparse"] * 3)).tp_plan
    assert "model.layers.*.self_attn.q_proj" in plan
    names = [name for name in plan if any(word in name for word in ("mlp", "grown", "hashed"))]
    assert names == ["model.layers.*.mlp.experts"]
    assert "model.layers.*.dense_mlp.up_proj" in PeerForCausalLM(tiny_config(parallel_dense_mlp=True)).tp_plan
    pool = {"num_sub_keys": 6, "num_retrieval_heads": 1, "num_experts_per_head": 2, "query_dim": 8}
    grown = tiny_config(grown_pools=[{"layers": [1], "query_norm": "none", **pool}])
    assert PeerForCausalLM(grown).tp_plan["model.layers.*.grown_pools.*.experts"] == "expert_rows"


def test_embeddings_resize(tiny_config, tokens):
    model = PeerForCausalLM(tiny_config(tie_word_embeddings=True))
    model.resize_token_embeddings(120)
    assert model(tokens + 20).logits.shape[-1] == 120
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shared_tables_are_one_parameter_and_get_the_gradient_of_every_layer(tiny_config, tokens):
    config = tiny_config(mlp_layer_types=["sparse"] * 3, share_expert_tables=True)
    model = PeerForCausalLM(config).eval()
    experts = [layer.mlp.experts for layer in model.model.layers]
    assert experts[0].down_embed is experts[1].down_embed is experts[2].down_embed
    assert experts[0].up_embed is experts[2].up_embed
    separate = PeerForCausalLM(tiny_config(mlp_layer_types=["sparse"] * 3)).eval()
    separate.load_state_dict(model.state_dict())
    for m in (model, separate):
        m(tokens, labels=tokens).loss.backward()
    total = sum(layer.mlp.experts.down_embed.grad for layer in separate.model.layers)
    torch.testing.assert_close(experts[0].down_embed.grad, total)


def test_an_unknown_experts_implementation_is_refused_with_what_is_there(tiny_config):
    with pytest.raises(ValueError, match=r'experts_implementation="cuda" is not available.*eager, cpu, triton'):
        AutoModelForCausalLM.from_config(tiny_config(), experts_implementation="cuda")
    model = PeerForCausalLM(tiny_config())
    with pytest.raises(ValueError, match='experts_implementation="grouped_mm" is not available'):
        model.set_experts_implementation("grouped_mm")
    model.set_experts_implementation("eager")
    assert model.get_experts_implementation() == {"": "eager"}
    model.set_experts_implementation(None)
    assert model.get_experts_implementation() == {"": None}


def test_a_registered_experts_implementation_is_reached_by_its_name(monkeypatch, model, tokens):
    calls = []

    def counting_mixture(*args):
        calls.append(1)
        return expert_mixture(*args)

    monkeypatch.setitem(EXPERT_MIXTURE_FUNCTIONS, "counting", counting_mixture)
    model.set_experts_implementation("eager")
    expected = model(tokens).logits
    assert not calls
    model.set_experts_implementation("counting")
    assert torch.equal(model(tokens).logits, expected)
    assert calls == [1]
