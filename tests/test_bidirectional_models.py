# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Models with `is_causal=False`: every token sees every other, padding is seen by none, and nothing is generated."""

import pytest
import torch
from test_checkpoint_peer import run_remote
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
)

from modeling_peer import (
    PeerForCausalLM,
    PeerForMaskedLM,
    PeerForQuestionAnswering,
    PeerForSequenceClassification,
    PeerForTokenClassification,
    PeerModel,
)
from modeling_peer.transformers_names_peer import CACHE

SPARSE_MLPS = ("peer", "soft_moe")
HEADS = {
    PeerForMaskedLM: (AutoModelForMaskedLM, {"labels": torch.arange(36).view(3, 12) % 3}),
    PeerForSequenceClassification: (AutoModelForSequenceClassification, {"labels": torch.tensor([0, 1, 2])}),
    PeerForTokenClassification: (AutoModelForTokenClassification, {"labels": torch.arange(36).view(3, 12) % 3}),
    PeerForQuestionAnswering: (
        AutoModelForQuestionAnswering,
        {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 4, 5])},
    ),
}


@pytest.fixture
def tokens():
    return torch.randint(1, 99, (3, 12))


@pytest.fixture
def build(tiny_config):
    def build(model_class=PeerModel, sparse_mlp="soft_moe", is_causal=False, attention="sdpa", **options):
        config = tiny_config(sparse_mlp=sparse_mlp, is_causal=is_causal, num_labels=3, num_moe_experts=4, **options)
        model = model_class(config).eval()
        model.set_attn_implementation(attention)
        return model

    return build


def padded(tokens, left, right):
    """The same sequences with padding on both sides, and their attention mask."""
    inputs = torch.nn.functional.pad(tokens, (left, right))
    return inputs, (inputs != 0).long()


@pytest.mark.parametrize("with_padding", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("sparse_mlp", "is_causal"), [("peer", False), ("soft_moe", False), ("peer", True)])
def test_later_tokens_change_earlier_outputs_only_where_a_model_is_not_causal(
    build, tokens, sparse_mlp, is_causal, attention, with_padding
):
    model = build(sparse_mlp=sparse_mlp, is_causal=is_causal, attention=attention)
    tokens, mask = padded(tokens, 2, 0) if with_padding else (tokens, None)
    changed = tokens.clone()
    changed[:, -1] = 1 + tokens[:, -1] % 98
    with torch.no_grad():
        before, after = (model(ids, attention_mask=mask).last_hidden_state[:, 2:-1] for ids in (tokens, changed))
    if is_causal:
        torch.testing.assert_close(after, before)
    else:
        # Every earlier token of every sequence.
        assert ((after - before).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("sparse_mlp", SPARSE_MLPS)
@pytest.mark.parametrize(("left", "right"), [(4, 0), (0, 4)], ids=["left", "right"])
def test_a_sequence_does_not_depend_on_padding_or_batch_neighbours(build, tokens, sparse_mlp, left, right):
    model = build(sparse_mlp=sparse_mlp)
    inputs, mask = padded(tokens, left, right)
    inputs[1, left + 8 : left + 12] = mask[1, left + 8 : left + 12] = 0  # sequences of unequal lengths
    with torch.no_grad():
        together = model(inputs, attention_mask=mask).last_hidden_state
        for row, length in ((0, 12), (1, 8)):
            alone = model(tokens[row : row + 1, :length]).last_hidden_state[0]
            torch.testing.assert_close(together[row, left : left + length], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_attention_implementations_agree(build, tokens):
    model = build()
    inputs, mask = padded(tokens, 2, 3)
    outputs = []
    for attention in ("eager", "sdpa", "flex_attention"):
        model.set_attn_implementation(attention)
        with torch.no_grad():  # flex attention has no backward on CPU
            outputs.append(model(inputs, attention_mask=mask).last_hidden_state[:, 2:14])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-4, atol=1e-5)


def test_a_sequence_that_is_all_padding_spoils_nothing(build, tokens):
    model = build(PeerForTokenClassification)
    mask = torch.ones_like(tokens)
    mask[1] = 0
    labels = tokens % 3
    model(tokens, attention_mask=mask, labels=labels.masked_fill(mask == 0, -100)).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("sparse_mlp", SPARSE_MLPS)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_learns_saves_and_loads(build, tokens, tmp_path, head, sparse_mlp):
    model, (auto_class, labels) = build(head, sparse_mlp).train(), HEADS[head]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model(tokens, **labels).loss
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    model.eval().save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is head
    assert not loaded.config.is_causal
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])


def test_gradient_checkpointing_changes_nothing(build, tokens):
    gradients = []
    model = build(PeerForTokenClassification).train()
    for _ in range(2):
        model.zero_grad()
        model(tokens, labels=tokens % 3).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients[1], gradients[0])


def test_no_cache_is_made_and_none_is_asked_for(build, tokens):
    model = build(PeerForSequenceClassification)
    assert model.config.use_cache  # the default is for causal models
    assert model(tokens).get(CACHE) is None
    assert model(tokens, use_cache=True).get(CACHE) is None


def test_a_cache_that_is_given_is_a_prefix_that_all_tokens_see(build, tokens):
    """What prefix tuning does; attention sees the keys and values wherever they come from."""
    model = build(PeerModel, "peer")
    layers = range(model.config.num_hidden_layers)

    def with_prefix(scale):
        cache = DynamicCache(config=model.config)
        generator = torch.Generator().manual_seed(0)
        for layer in layers:
            keys, values = (scale * torch.randn(3, 2, 5, 8, generator=generator) for _ in range(2))
            cache.update(keys, values, layer)
        return model(tokens, attention_mask=torch.ones(3, 17), **{CACHE: cache}).last_hidden_state

    assert ((with_prefix(1.0) - with_prefix(2.0)).abs().amax(-1) > 1e-4).all()


def test_a_model_for_generation_is_refused_with_the_reason(build, tiny_config, tmp_path):
    message = r"PeerForCausalLM predicts the next token.*is_causal=False.*PeerForMaskedLM or a classification head"
    with pytest.raises(ValueError, match=message):
        PeerForCausalLM(tiny_config(is_causal=False))
    build(PeerForTokenClassification).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not build(PeerForTokenClassification).can_generate()


@pytest.mark.parametrize("sparse_mlp", SPARSE_MLPS)
def test_masked_tokens_are_predicted_from_both_sides(build, tokens, sparse_mlp):
    model = build(PeerForMaskedLM, sparse_mlp)
    labels = torch.full_like(tokens, -100)
    labels[:, 5] = tokens[:, 5]
    outputs = model(tokens, labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, 5], tokens[:, 5])
    torch.testing.assert_close(outputs.loss, expected)
    for side in (4, 6):
        changed = tokens.clone()
        changed[:, side] = 1 + tokens[:, side] % 98
        assert ((model(changed).logits - outputs.logits)[:, 5].abs().amax(-1) > 1e-7).all()


def test_masked_tokens_need_a_model_that_sees_both_sides(build, tiny_config, tmp_path):
    message = r"PeerForMaskedLM predicts a token from both its sides.*Set is_causal=False"
    with pytest.raises(ValueError, match=message):
        PeerForMaskedLM(tiny_config())
    build(PeerForCausalLM, "peer", is_causal=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert not AutoModelForMaskedLM.from_pretrained(tmp_path, is_causal=False).config.is_causal


def test_auxiliary_losses_count_once_however_a_step_is_cut(build, tokens):
    """As Trainer adds them up: each micro-batch's loss is its share of all masked tokens."""
    model = build(PeerForMaskedLM, "top_k_moe", moe_router="switch", router_aux_loss_coef=0.5)
    labels = tokens.where(torch.arange(12) % 3 == 0, -100)
    labels[0, :6] = -100
    count = (labels != -100).sum()
    parts = [model(tokens[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count) for i in range(3)]
    shares = [(labels[i] != -100).sum() / count for i in range(3)]
    expected = sum(share * part.aux_loss for share, part in zip(shares, parts, strict=True))
    model.config.router_aux_loss_coef = 0.0
    task = sum(model(tokens[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(3))
    torch.testing.assert_close(sum(part.loss for part in parts), task + 0.5 * expected)
    torch.testing.assert_close(task, model(tokens, labels=labels).loss)


def test_a_causal_checkpoint_becomes_a_bidirectional_classifier(build, tokens, tmp_path):
    """One keyword, with the weights as they are."""
    model = build(PeerForCausalLM, "peer", is_causal=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, is_causal=False, num_labels=3)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    changed = tokens.clone()
    changed[:, 5] = 1 + tokens[:, 5] % 98
    first = [loaded.model(ids).last_hidden_state[:, 0] for ids in (tokens, changed)]
    assert ((first[0] - first[1]).abs().amax(-1) > 1e-6).all()


REMOTE_LOAD = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_peer":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import torch, transformers
folder, tokens = sys.argv[1], torch.arange(1, 13).view(2, 6)
names = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering",
         "AutoModelForMaskedLM")
models = {name: getattr(transformers, name).from_pretrained(folder, trust_remote_code=True) for name in names}
assert all(type(model).__module__.startswith("transformers_modules.") for model in models.values())
torch.save({name: model.eval()(tokens)[0] for name, model in models.items()}, sys.argv[2])
"""


@pytest.mark.slow
def test_remote_code_loads_every_head_where_the_package_cannot_be_imported(build, tmp_path):
    model, tokens = build(PeerForTokenClassification), torch.arange(1, 13).view(2, 6)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "cache").mkdir()
    process = run_remote(REMOTE_LOAD, tmp_path / "model", tmp_path / "results.pt", cache=tmp_path / "cache")
    assert process.returncode == 0, process.stderr
    remote = torch.load(tmp_path / "results.pt")
    torch.testing.assert_close(remote["AutoModelForTokenClassification"], model(tokens).logits)
    assert remote["AutoModelForSequenceClassification"].shape == (2, 3)
    assert remote["AutoModelForQuestionAnswering"].shape == (2, 6)
    assert remote["AutoModelForMaskedLM"].shape == (2, 6, model.config.vocab_size)
