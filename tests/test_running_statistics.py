# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What training learns without a gradient: who teaches it, who freezes it, and what holds where it is frozen."""

import copy
import warnings

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, update_bn
from transformers import DynamicCache

from modeling_peer import PeerForCausalLM, PeerForTokenClassification
from modeling_peer.configuration_peer import SPARSE_MLPS
from modeling_peer.query_norms_peer import PeerBatchNorm, RunningStatistics
from modeling_peer.sparse_mlps_peer import sparse_mlp_class

# Every kind of statistics that a layer may have.
WITH_STATISTICS = {
    "BatchNorm": {},
    "BatchNorm in a memory": {"sparse_mlp": "product_key_memory"},
    "thresholds": {"sparse_mlp": "expert_choice_moe", "num_moe_experts": 4, "moe_intermediate_size": 16},
}


@pytest.fixture(params=WITH_STATISTICS.values(), ids=WITH_STATISTICS.keys())
def model(request, tiny_config):
    """In training mode, with statistics that have learned."""
    model = PeerForCausalLM(tiny_config(**request.param)).train()
    for _ in range(3):
        model(texts())
    return model


@pytest.fixture
def loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    return PeerForCausalLM.from_pretrained(tmp_path).train()


def texts(batch_size=4, length=20):
    return torch.randint(1, 99, (batch_size, length))


def statistics(model):
    found = {name: b.clone() for name, b in model.named_buffers() if "running" in name}
    assert found
    return found


def assert_taught(model, before, taught):
    for name, value in statistics(model).items():
        assert torch.equal(value, before[name]) != taught, name


def query_norm(model):
    (norm,) = (module for module in model.modules() if isinstance(module, PeerBatchNorm))
    return norm


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}, {"do_sample": True}], ids=str)
def test_generation_in_training_mode_teaches_nothing(model, options):
    before, modes = statistics(model), [module.training for module in model.modules()]
    prompt = texts(length=5)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, **options}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert_taught(model, before, taught=False)
    assert [module.training for module in model.modules()] == modes
    model(texts())
    assert_taught(model, before, taught=True)


def test_generation_that_fails_leaves_the_statistics_learning(model):
    before = statistics(model)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(texts(length=5), max_new_tokens=-1)
    model(texts())
    assert_taught(model, before, taught=True)


@pytest.mark.parametrize("length", [1, 7], ids=["a decoding step", "a prefill"])
def test_a_step_with_a_cache_and_no_gradient_equals_evaluation(model, length):
    before, tokens = statistics(model), texts(length=length)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model.eval()(texts(), past_key_values=cache)
        expected, logits = (
            model.train(mode)(tokens, past_key_values=copy.deepcopy(cache)).logits for mode in (False, True)
        )
    torch.testing.assert_close(logits, expected)
    assert_taught(model, before, taught=False)


def test_a_loaded_model_computes_in_training_what_it_computes_in_evaluation(model, loaded):
    """So policy and reference are one function, whatever trainer holds them."""
    before, tokens = statistics(loaded), texts()
    torch.testing.assert_close(loaded(tokens).logits, loaded.eval()(tokens).logits)
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits)
    assert_taught(loaded, before, taught=False)


def test_a_loaded_model_trains_all_its_parameters(loaded):
    loaded(texts(), labels=texts()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in loaded.parameters())


def test_micro_batches_of_a_loaded_model_have_the_gradients_of_the_batch(loaded):
    tokens, gradients = texts(batch_size=8), []
    for size in (8, 2):
        loaded.zero_grad()
        for part in tokens.split(size):
            (loaded(part, labels=part).loss * len(part) / 8).backward()
        gradients.append([p.grad.clone() for p in loaded.parameters()])
    for whole, summed in zip(*gradients, strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-6)


def test_one_call_lets_a_loaded_model_learn_again_and_freezes_it_again(loaded):
    before = statistics(loaded)
    loaded.freeze_running_statistics(False)
    loaded(texts())
    assert_taught(loaded, before, taught=True)
    before = statistics(loaded)
    loaded.freeze_running_statistics()
    copy.deepcopy(loaded)(texts())
    loaded(texts())
    assert_taught(loaded, before, taught=False)


def test_an_untrained_model_still_learns_once_it_is_loaded(tiny_config, tmp_path):
    """Else training from a saved initialisation would normalise by mean 0 and variance 1 for ever."""
    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path)
    model = PeerForCausalLM.from_pretrained(tmp_path).train()
    before = statistics(model)
    model(texts())
    assert_taught(model, before, taught=True)


def test_only_statistics_that_the_checkpoint_has_are_frozen(tiny_config, tmp_path):
    model = PeerForCausalLM(tiny_config(mlp_layer_types=["sparse", "dense", "dense"])).train()
    model(texts())
    model.save_pretrained(tmp_path)
    more, info = PeerForTokenClassification.from_pretrained(
        tmp_path, mlp_layer_types=["sparse", "dense", "sparse"], output_loading_info=True
    )
    assert info["missing_keys"]
    frozen = [module.statistics_frozen for module in more.modules() if isinstance(module, RunningStatistics)]
    assert frozen == [True, False]


def test_update_bn_measures_the_statistics_of_averaged_weights(tiny_config):
    model = PeerForCausalLM(tiny_config()).train()
    averaged = AveragedModel(model)
    batches = [texts(length=10 + i) for i in range(3)]
    for _ in range(2):  # the second starts anew
        update_bn(batches, averaged)
    queries = []
    hook = query_norm(averaged).register_forward_pre_hook(lambda module, args: queries.append(args[0]))
    averaged.train()
    with torch.no_grad():
        for batch in batches:
            averaged(batch)
    hook.remove()
    update_bn(batches, averaged)
    norm = query_norm(averaged)
    assert norm.momentum == 0.1
    torch.testing.assert_close(norm.running_mean, torch.stack([q.mean(0) for q in queries]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([q.var(0) for q in queries]).mean(0))


@pytest.mark.parametrize("freeze", ["statistics", "weights"])
def test_update_bn_measures_also_where_statistics_are_frozen(tiny_config, freeze):
    """It has set them to 0 and 1 before: not to measure would leave the model without any."""
    learning, batches = PeerForCausalLM(tiny_config()).train(), [texts()]
    frozen = copy.deepcopy(learning)
    frozen.freeze_running_statistics() if freeze == "statistics" else frozen.requires_grad_(False)
    for model in (learning, frozen):
        update_bn(batches, model)
    assert query_norm(learning).running_mean.any()
    for name, value in statistics(learning).items():
        assert torch.equal(statistics(frozen)[name], value), name


def test_a_plain_mean_passes_over_batches_that_are_all_padding():
    norm = PeerBatchNorm(6)
    norm.momentum = None
    queries = torch.randn(2, 9, 6)
    norm(queries[0])
    norm(queries[0], torch.zeros(9, dtype=torch.bool))
    norm(queries[1])
    torch.testing.assert_close(norm.running_mean, queries.mean(1).mean(0))


def test_averaging_of_buffers_averages_the_statistics(tiny_config):
    model = PeerForCausalLM(tiny_config()).train()
    averaged, seen = AveragedModel(model, use_buffers=True), []
    for _ in range(3):
        model(texts())
        averaged.update_parameters(model)
        seen.append(query_norm(model).running_mean.clone())
    torch.testing.assert_close(query_norm(averaged).running_mean, torch.stack(seen).mean(0))


def test_checkpoints_name_the_same_tensors_as_before(tiny_config):
    names = {name for name in PeerForCausalLM(tiny_config()).state_dict() if "query_norm" in name}
    ours = {name.rpartition(".")[2] for name in names}
    assert ours == {"weight", "bias", "running_mean", "running_var"}


def test_a_state_without_metadata_loads_strictly():
    norm, state = PeerBatchNorm(6), dict(PeerBatchNorm(6).state_dict())
    state["running_mean"] = torch.arange(6.0)
    norm.load_state_dict(state, strict=True)
    assert torch.equal(norm.running_mean, torch.arange(6.0))


def test_a_converted_sync_batch_norm_is_refused_by_name(tiny_config):
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(PeerForCausalLM(tiny_config()))
    with pytest.raises(ValueError, match=r"query_norm is a SyncBatchNorm.*rms_norm.*freeze_running_statistics"):
        model(texts())


@pytest.mark.parametrize("sparse_mlp", SPARSE_MLPS)
def test_every_buffer_of_a_sparse_layer_is_of_running_statistics(tiny_config, sparse_mlp):
    """Else freezing, generation and loading would pass over it."""
    config = tiny_config(sparse_mlp=sparse_mlp, is_causal=sparse_mlp != "soft_moe")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = sparse_mlp_class(sparse_mlp)(config)
    for name, module in layer.named_modules():
        if any(buffer.is_floating_point() for buffer in module.buffers(recurse=False)):
            assert isinstance(module, RunningStatistics), name
