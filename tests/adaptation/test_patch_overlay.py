# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A patch of mapped or quantised tables is read beside them, at every call, and neither table nor file is written."""

import copy
import sys

import pytest
import torch

from modeling_peer import PeerForCausalLM, quantise_expert_tables
from modeling_peer.adaptation.patches import apply_patch, remove_patch, save_patch
from modeling_peer.adaptation.slicing import scale_expert_rows, slice_experts
from modeling_peer.adaptation.trained_rows import train_only_experts
from modeling_peer.analysis.expert_weights import table_rows
from modeling_peer.analysis.routing_hooks import find_routed_layer
from modeling_peer.mapped_memory_peer import is_mapped_file
from modeling_peer.row_formats_peer import TABLE_FORMATS, dequantise_rows
from modeling_peer.row_overlay_peer import RowOverlay

TOKENS = torch.arange(1, 19).view(2, 9)
TWO_LAYERS = {"mlp_layer_types": ["sparse", "dense", "sparse"]}
KINDS = [
    {"gated_experts": True, **TWO_LAYERS},
    {"sparse_mlp": "product_key_memory"},
    {"parallel_hashed_memory": True},
    {"share_expert_tables": True, **TWO_LAYERS},
]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="tables are mapped on Linux only")


@pytest.fixture(autouse=True)
def _no_flushes(monkeypatch):
    """What reaches the disk is the subject of other tests. On a busy disk each flush takes long."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(tokens).logits


def pools_of(model):
    return [layer.mlp.experts for layer in model.model.layers if layer.is_sparse]


def save_pair(tiny_config, folder, fields, slice_to=None):
    """A base in a folder, a patch of it, and the tuned model. Readers and writers change in different rows."""
    model = PeerForCausalLM(tiny_config(**fields))
    if slice_to is not None:
        slice_experts(model, slice_to)
    model.save_pretrained(folder / "base")
    num_rows = len(pools_of(model)[0].up_embed)
    with torch.no_grad():
        for pool in pools_of(model)[:1] if fields.get("share_expert_tables") else pools_of(model):
            for number, name in enumerate(("down_embed", "up_embed", "gate_embed")):
                if getattr(pool, name) is not None:
                    getattr(pool, name)[number : num_rows : 2 + number] *= -2
    save_patch(folder / "base", model, folder / "fine.safetensors")
    return model


@pytest.mark.slow_but_first
@on_linux
@pytest.mark.parametrize("implementation", ["eager", "cpu"])
@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_mapped_tables_stay_mapped_and_compute_with_the_patch(tiny_config, tmp_path, fields, implementation):
    if implementation == "cpu":
        pytest.importorskip("numba")
    tuned = save_pair(tiny_config, tmp_path, fields)
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").glob("*.safetensors")}
    model = PeerForCausalLM.from_pretrained(
        tmp_path / "base", table_placement="mapped", experts_implementation=implementation
    )
    tuned.set_experts_implementation(implementation)
    base, base_token = logits(model), logits(model, TOKENS[:1, :1])
    tables = {name: p.data_ptr() for name, p in model.named_parameters() if "experts" in name}
    applied = apply_patch(model, tmp_path / "fine.safetensors")
    assert not applied.replaced
    for tokens in (TOKENS, TOKENS[:1, :1]):  # decoding, whose one call takes no overlay
        torch.testing.assert_close(logits(model, tokens), logits(tuned, tokens))
    assert not torch.allclose(logits(model), base)
    assert tables == {name: p.data_ptr() for name, p in model.named_parameters() if "experts" in name}
    assert all(is_mapped_file(address) for address in tables.values())
    remove_patch(model, applied)
    assert torch.equal(logits(model), base)
    assert torch.equal(logits(model, TOKENS[:1, :1]), base_token)
    assert all((tmp_path / "base" / name).read_bytes() == content for name, content in files.items())


@pytest.mark.slow_but_first
@pytest.mark.parametrize("table_format", TABLE_FORMATS)
def test_quantised_tables_take_float_rows(tiny_config, tmp_path, table_format):
    tuned = save_pair(tiny_config, tmp_path, TWO_LAYERS)
    model = quantise_expert_tables(PeerForCausalLM.from_pretrained(tmp_path / "base"), table_format)
    model.save_pretrained(tmp_path / "quantised")
    model = PeerForCausalLM.from_pretrained(tmp_path / "quantised")
    base = logits(model)
    # the oracle: a float model with the values of the quantised rows, and the patch's rows
    expected = PeerForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        for pool, quantised, other in zip(*map(pools_of, (expected, model, tuned)), strict=True):
            for number, name in enumerate(("down", "up")):
                table, scale = (getattr(quantised, f"{name}_{kind}") for kind in ("embed", "scale"))
                mine, theirs = (getattr(one, f"{name}_embed") for one in (pool, other))
                mine.copy_(dequantise_rows(table, scale))
                mine[number :: 2 + number] = theirs[number :: 2 + number]
    applied = apply_patch(model, tmp_path / "fine.safetensors")
    torch.testing.assert_close(logits(model), logits(expected))
    layer = find_routed_layer(model, 0)
    assert torch.equal(table_rows(layer, "down_embed", torch.arange(64)), pools_of(expected)[0].down_embed)
    remove_patch(model, applied)
    assert torch.equal(logits(model), base)
    with torch.no_grad():
        pools_of(model)[1].up_scale[1] *= 2
    with pytest.raises(ValueError, match=r"the model is another: model\.layers\.2\.mlp\.experts\.up_embed"):
        apply_patch(model, tmp_path / "fine.safetensors")
    assert all(pool.overlay is None for pool in pools_of(model))


@on_linux
def test_overlays_stack(tiny_config, tmp_path):
    save_pair(tiny_config, tmp_path, {})
    second = PeerForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        pools_of(second)[0].up_embed[1:9] *= 5
    save_patch(tmp_path / "base", second, tmp_path / "second.safetensors")
    in_memory, mapped = (
        PeerForCausalLM.from_pretrained(tmp_path / "base", table_placement=placement)
        for placement in ("memory", "mapped")
    )
    expected = []
    for name in ("fine", "second"):
        expected.append(logits(in_memory))
        for model in (in_memory, mapped):
            apply_patch(model, tmp_path / f"{name}.safetensors")
        torch.testing.assert_close(logits(mapped), logits(in_memory))
    twin = copy.deepcopy(mapped)  # its tables are in memory; the overlay is still read
    torch.testing.assert_close(logits(twin), logits(in_memory))
    for before in reversed(expected):
        remove_patch(mapped)
        torch.testing.assert_close(logits(mapped), before)
    torch.testing.assert_close(logits(twin), logits(in_memory))


@on_linux
def test_a_mapped_slice_takes_its_patch(tiny_config, tmp_path):
    tuned = save_pair(tiny_config, tmp_path, {}, slice_to={1: range(20, 60)})
    model = PeerForCausalLM.from_pretrained(tmp_path / "base", table_placement="mapped")
    apply_patch(model, tmp_path / "fine.safetensors")
    torch.testing.assert_close(logits(model), logits(tuned))
    layer = find_routed_layer(model, 1)
    rows = table_rows(layer, "up_embed", torch.tensor([3, 20, 21]))
    assert not rows[0].any()
    assert torch.equal(rows[1:], pools_of(tuned)[0].up_embed[:2])


@on_linux
def test_what_would_leave_an_overlay_out_is_refused(tiny_config, tmp_path):
    save_pair(tiny_config, tmp_path, {})
    model = PeerForCausalLM.from_pretrained(tmp_path / "base", table_placement="mapped")
    apply_patch(model, tmp_path / "fine.safetensors")
    for leave_out in (
        lambda: model.save_pretrained(tmp_path / "out"),
        lambda: quantise_expert_tables(model, "int8"),
        lambda: slice_experts(model, {1: [1]}),
        lambda: scale_expert_rows(model, 1, [1]),
        lambda: save_patch(tmp_path / "base", model, tmp_path / "out.safetensors"),
        lambda: train_only_experts(model, {1: [1]}),
    ):
        with pytest.raises(ValueError, match=r"a patch is applied as an overlay, and .* Remove it \(remove_patch\)"):
            leave_out()
    assert not (tmp_path / "out").exists()
    model.train().requires_grad_(False).lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match="Such a model is not trained"):
        model(TOKENS, labels=TOKENS)
    remove_patch(model)
    model(TOKENS, labels=TOKENS).loss.backward()
    model.save_pretrained(tmp_path / "out")


@on_linux
def test_a_compiled_model_computes_with_the_overlay(tiny_config, tmp_path):
    tuned = save_pair(tiny_config, tmp_path, {})
    model = PeerForCausalLM.from_pretrained(tmp_path / "base", table_placement="mapped")
    apply_patch(model, tmp_path / "fine.safetensors")
    torch._dynamo.reset()
    experts = torch.compile(pools_of(model)[0], backend="eager")
    hidden, ids, gates = torch.randn(5, 32), torch.randint(64, (5, 8)), torch.rand(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(experts(hidden, ids, gates), pools_of(tuned)[0](hidden, ids, gates))
        empty = pools_of(model)[0](hidden[:0], ids[:0], gates[:0])
    assert empty.shape == (0, 32)


def test_places_are_those_of_an_exhaustive_search():
    ids = torch.tensor([2, 5, 9])
    overlay = RowOverlay(ids, (None, torch.arange(12.0).view(3, 4), None))
    rows = torch.tensor([[-1, 0, 2], [5, 9, 10]])
    expected = [[ids.tolist().index(row) if row in ids else -1 for row in some] for some in rows.tolist()]
    assert overlay.places_of(rows).tolist() == expected
    values = overlay.replace(torch.tensor([5, 6]), 1, torch.zeros(2, 4))
    assert values.tolist() == [[4.0, 5.0, 6.0, 7.0], [0.0] * 4]
