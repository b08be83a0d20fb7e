# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Base and patch are the tuned model bit by bit, and the base after its removal; other bases are refused."""

import json
import shutil
import time

import pytest
import torch
from model_helpers import load_weights, write_single_file
from safetensors.torch import load_file

from modeling_peer import PeerForCausalLM, PeerModel, quantise_expert_tables
from modeling_peer.adaptation import checkpoint_differences
from modeling_peer.adaptation.patch_command import run_patch_command
from modeling_peer.adaptation.patch_files import open_patch, write_patch
from modeling_peer.adaptation.patches import apply_patch, merge_patches, remove_patch, save_patch
from modeling_peer.adaptation.slicing import slice_experts
from modeling_peer.console.errors import SettingsError

TWO_LAYERS = {"mlp_layer_types": ["sparse", "dense", "sparse"]}
KINDS = [
    TWO_LAYERS,
    {"gated_experts": True, "tie_word_embeddings": True},
    {"sparse_mlp": "product_key_memory"},
    {"parallel_hashed_memory": True},
    {"share_expert_tables": True, **TWO_LAYERS},
]
DOWN, UP = (f"model.layers.1.mlp.experts.{name}_embed" for name in ("down", "up"))


def bits(model):
    """Copies of all tensors of a model, as bytes: NaNs of the same bits are equal."""
    return {
        name: tensor.detach().clone().flatten().view(torch.uint8)
        for name, tensor in model.state_dict().items()
        if tensor.numel()
    }


def assert_same_bits(model, expected):
    found = bits(model)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def change(model, rows, tables=("down_embed", "up_embed", "gate_embed"), factor=-3.0):
    """Change these rows of every pool."""
    with torch.no_grad():
        seen = set()
        for layer in model.model.layers:
            for name in tables:
                table = getattr(layer.mlp.experts, name, None) if layer.is_sparse else None
                if table is not None and id(table) not in seen:
                    seen.add(id(table))
                    table[rows] *= factor
    return model


@pytest.fixture(autouse=True)
def _no_flushes(monkeypatch):
    """What reaches the disk is the subject of other tests. On a busy disk each flush takes long."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def pair(tiny_config, tmp_path):
    """Saves a base and a tuned model in two folders: (base, tuned, bits of both)."""

    def build(fields=None, rows=(3, 17, 63), **options):
        model = PeerForCausalLM(tiny_config(**fields or {}))
        model.save_pretrained(tmp_path / "base")
        before = bits(model)
        change(model, list(rows), **options).save_pretrained(tmp_path / "tuned")
        return tmp_path / "base", tmp_path / "tuned", before, bits(model)

    return build


@pytest.mark.parametrize(("fields", "dtype"), [*((kind, torch.float32) for kind in KINDS), ({}, torch.bfloat16)])
def test_base_and_patch_are_the_tuned_model_and_without_it_the_base(tiny_config, tmp_path, fields, dtype):
    model = PeerForCausalLM(tiny_config(**fields)).to(dtype)
    model.save_pretrained(tmp_path / "base")
    before = bits(model)
    with torch.no_grad():
        change(model, [0, 5, 63])
        pool = next(layer.mlp.experts for layer in model.model.layers if layer.is_sparse)
        pool.up_embed[7, 1] = float("nan")
        pool.up_embed[8, 2] = -0.0
        pool.up_embed[9, :] = 0.0
    model.save_pretrained(tmp_path / "tuned")
    tuned = bits(model)
    for source in (tmp_path / "tuned", model):
        patch = save_patch(tmp_path / "base", source, tmp_path / "fine.safetensors")
        up = next(one for name, one in patch.tensors.items() if name.endswith("up_embed"))
        assert up.row_ids.tolist() == [0, 5, 7, 8, 9, 63]
        assert patch.base.name == "base"
    loaded = PeerForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    applied = apply_patch(loaded, tmp_path / "fine.safetensors")
    assert_same_bits(loaded, tuned)
    remove_patch(loaded, applied)
    assert_same_bits(loaded, before)
    assert_same_bits(PeerForCausalLM.from_pretrained(tmp_path / "base", dtype="auto"), before)  # the file is as it was


def test_a_patched_model_is_saved_as_the_tuned_one(pair, tmp_path):
    base, tuned, *_ = pair()
    save_patch(base, tuned, tmp_path / "fine.safetensors")
    model = PeerForCausalLM.from_pretrained(base)
    apply_patch(model, tmp_path / "fine.safetensors")
    model.save_pretrained(tmp_path / "again")
    found, expected = load_weights(tmp_path / "again"), load_weights(tuned)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_tables_are_compared_and_stored_chunk_by_chunk(pair, tmp_path, monkeypatch):
    base, tuned, *_ = pair(TWO_LAYERS, rows=(0, 1, 40))
    whole = save_patch(base, tuned, tmp_path / "whole.safetensors")
    monkeypatch.setattr(checkpoint_differences, "CHUNK_ELEMENTS", 3 * 32)
    save_patch(base, tuned, tmp_path / "chunks.safetensors")
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "chunks.safetensors").read_bytes()
    assert len(whole.tensors) == 4
    stored = load_file(tmp_path / "whole.safetensors")
    name = "model.layers.0.mlp.experts.up_embed"
    assert stored[name].shape == (3, 32)
    assert stored[name + ".row_ids"].dtype == torch.int32
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("base", "chunks.safetensors", "tuned", "whole.safetensors")
    ]


def test_tables_in_files_of_their_own(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_peer.table_shards_peer.MIN_BYTES", 1)
    model = PeerForCausalLM(tiny_config(**TWO_LAYERS))
    model.save_pretrained(tmp_path / "base")
    change(model, [2]).save_pretrained(tmp_path / "tuned")
    patch = save_patch(tmp_path / "base", tmp_path / "tuned", tmp_path / "fine.safetensors")
    assert len(patch.base.checksums) == 3
    loaded = PeerForCausalLM.from_pretrained(tmp_path / "base")
    apply_patch(loaded, tmp_path / "fine.safetensors")
    assert_same_bits(loaded, bits(model))


def test_other_tensors_are_refused_or_stored(tiny_config, tmp_path):
    model = PeerForCausalLM(tiny_config())
    model.save_pretrained(tmp_path / "base")
    before = bits(model)
    with torch.no_grad():
        model.model.norm.weight[3] = 2.0
        model.model.embed_tokens.weight[4] = 2.0
        model.model.layers[1].mlp.retrieval.sub_keys[0] *= 2
        model.model.layers[1].mlp.retrieval.query_norm.running_mean.add_(1)
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"4 tensors other than expert tables differ: model\.embed.*other_tensors"):
        save_patch(tmp_path / "base", tmp_path / "tuned", tmp_path / "fine.safetensors")
    assert not (tmp_path / "fine.safetensors").exists()
    patch = save_patch(tmp_path / "base", model, tmp_path / "fine.safetensors", other_tensors="store")
    rows = {name: None if one.row_ids is None else one.row_ids.tolist() for name, one in patch.tensors.items()}
    assert rows == {
        "model.embed_tokens.weight": [4],
        "model.norm.weight": None,
        "model.layers.1.mlp.retrieval.sub_keys": None,
        "model.layers.1.mlp.retrieval.query_norm.running_mean": None,
    }
    loaded = PeerForCausalLM.from_pretrained(tmp_path / "base")
    apply_patch(loaded, tmp_path / "fine.safetensors")
    assert_same_bits(loaded, bits(model))
    remove_patch(loaded)
    assert_same_bits(loaded, before)
    with pytest.raises(ValueError, match="must be one of refuse, store"):
        save_patch(tmp_path / "base", model, tmp_path / "fine.safetensors", other_tensors="ignore")


def test_a_model_without_its_head_takes_the_patch_of_one_with_it(pair, tmp_path):
    base, tuned, *_ = pair()
    save_patch(base, tuned, tmp_path / "fine.safetensors")
    model = PeerModel.from_pretrained(base)
    apply_patch(model, tmp_path / "fine.safetensors")
    assert torch.equal(model.layers[1].mlp.experts.up_embed, load_weights(tuned)[UP])


def test_patches_stack_and_are_removed_in_reverse_order(pair, tmp_path):
    base, first, before, after_first = pair(rows=(1, 2))
    save_patch(base, first, tmp_path / "first.safetensors")
    second = change(PeerForCausalLM.from_pretrained(base), [2, 3], factor=7.0)
    save_patch(base, second, tmp_path / "second.safetensors")
    model = PeerForCausalLM.from_pretrained(base)
    one = apply_patch(model, tmp_path / "first.safetensors")
    two = apply_patch(model, tmp_path / "second.safetensors")
    up, mine = (one.model.layers[1].mlp.experts.up_embed for one in (model, second))
    assert torch.equal(up[2:4], mine[2:4])  # the last one counts
    assert torch.equal(up[:2], load_weights(first)[UP][:2])
    with pytest.raises(ValueError, match=r"first\.safetensors is not .* last\. Remove second\.safetensors first"):
        remove_patch(model, one)
    remove_patch(model, two)
    assert_same_bits(model, after_first)
    with pytest.raises(ValueError, match=r"second\.safetensors is not applied to this PeerForCausalLM"):
        remove_patch(model, two)
    remove_patch(model)
    assert_same_bits(model, before)
    with pytest.raises(ValueError, match="no patch is applied"):
        remove_patch(model)


def test_disjoint_patches_merge_and_others_are_refused(pair, tmp_path):
    base, first, *_ = pair(TWO_LAYERS, rows=(5, 1))
    save_patch(base, first, tmp_path / "a.safetensors")
    for name, rows in (("b", [60, 0]), ("c", [9, 5, 1])):
        save_patch(base, change(PeerForCausalLM.from_pretrained(base), rows), tmp_path / f"{name}.safetensors")
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    merged = merge_patches([a, b], tmp_path / "ab.safetensors")
    both = change(PeerForCausalLM.from_pretrained(base), [0, 1, 5, 60])
    expected = save_patch(base, both, tmp_path / "both.safetensors")
    for name, one in expected.tensors.items():
        assert torch.equal(one.rows, merged.tensors[name].rows)
        assert torch.equal(one.row_ids, merged.tensors[name].row_ids)
        assert one.base_sums == merged.tensors[name].base_sums
    model = PeerForCausalLM.from_pretrained(base)
    apply_patch(model, tmp_path / "ab.safetensors")
    assert_same_bits(model, bits(both))
    with pytest.raises(
        ValueError,
        match=r"experts\.down_embed: 2 rows are in .* rows \[1, 5\] \(a\.safetensors and c\.saf.* one after",
    ):
        merge_patches([a, b, c], tmp_path / "abc.safetensors")
    with pytest.raises(ValueError, match="at least two patches; got 1"):
        merge_patches([a], tmp_path / "out.safetensors")
    other = open_patch(b)
    other.base.checksums["model.safetensors"] = "00000000"
    write_patch(b, other.base, other.tensors.items())
    with pytest.raises(ValueError, match="only patches for one base merge"):
        merge_patches([a, b], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_patch_of_another_base_is_refused(pair, tiny_config, tmp_path):
    base, tuned, *_ = pair()
    patch = tmp_path / "fine.safetensors"
    save_patch(base, tuned, patch)
    other = PeerForCausalLM(tiny_config())
    other.save_pretrained(tmp_path / "other")
    loaded = PeerForCausalLM.from_pretrained(tmp_path / "other")
    before = bits(loaded)
    with pytest.raises(ValueError, match=r"a patch for 'base' \(model.safetensors with checksum \w{8}\), .* 'other'"):
        apply_patch(loaded, patch)
    with pytest.raises(ValueError, match=r"the model is another: model\.layers\.1.* differs from the base"):
        apply_patch(other, patch)  # built in memory: the rows tell
    assert_same_bits(loaded, before)
    moved = shutil.copytree(base, tmp_path / "moved")
    apply_patch(PeerForCausalLM.from_pretrained(moved), patch)  # a copy is the same base
    write_single_file(moved, load_weights(moved))  # as another program writes it: no checksum
    unknown = PeerForCausalLM.from_pretrained(moved)
    apply_patch(unknown, patch)
    save_patch(base, change(PeerForCausalLM.from_pretrained(base), [3, 4]), tmp_path / "second.safetensors")
    apply_patch(unknown, tmp_path / "second.safetensors")  # row 3 as it was before the first patch


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_sub_keys": 16}, r"has the shape \(64, 32\), and the model's has \(256, 32\)"),
        ({"num_kept_experts": 20}, r"the model's has \(20, 32\)\. The model is a slice \(num_kept_experts=20\)"),
        ({"mlp_layer_types": ["sparse", "dense", "dense"]}, "is not a tensor of this PeerForCausalLM"),
    ],
)
def test_a_model_with_other_tensors_is_refused(pair, tiny_config, tmp_path, fields, message):
    base, tuned, *_ = pair()
    save_patch(base, tuned, tmp_path / "fine.safetensors")
    with pytest.raises(ValueError, match=message):
        apply_patch(PeerForCausalLM(tiny_config(**fields)), tmp_path / "fine.safetensors")


def test_other_dtypes_and_places_are_refused(pair, tmp_path):
    base, tuned, *_ = pair()
    patch = tmp_path / "fine.safetensors"
    save_patch(base, tuned, patch)
    with pytest.raises(ValueError, match=r"is torch.float32, and the model's is torch.bfloat16\. .*leave dtype unset"):
        apply_patch(PeerForCausalLM.from_pretrained(base, dtype=torch.bfloat16), patch)
    with pytest.raises(ValueError, match="is on meta in the model"):
        apply_patch(PeerForCausalLM.from_pretrained(base).to("meta"), patch)
    half = PeerForCausalLM.from_pretrained(tuned).bfloat16()
    with pytest.raises(ValueError, match=r"has the dtype torch.float32 in .* Save the fine-tune in the dtype"):
        save_patch(base, half, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="no tensor differs from the base 'base'"):
        save_patch(base, base, tmp_path / "out.safetensors")
    for name in ("fine.bin", "model.safetensors", "model-layer-001-experts.safetensors"):
        with pytest.raises(ValueError, match=f"not as the weights of a model; got {name}"):
            save_patch(base, tuned, tmp_path / name)
    with pytest.raises(ValueError, match=r"no .*safetensors weights"):
        save_patch(tmp_path / "absent", tuned, patch)


def test_slices_have_patches_of_their_own(pair, tiny_config, tmp_path):
    base, tuned, *_ = pair()
    slices = {}
    for name, kept in (("slice", [1, 3, 17, 40]), ("other", [1, 3, 18, 40])):
        slices[name] = slice_experts(PeerForCausalLM.from_pretrained(base), {1: kept})
        slices[name].save_pretrained(tmp_path / name)
    tuned_slice = change(PeerForCausalLM.from_pretrained(tmp_path / "slice"), [2])
    patch = save_patch(tmp_path / "slice", tuned_slice, tmp_path / "of_slice.safetensors")
    assert patch.tensors[UP].row_ids.tolist() == [2]  # rows of the slice, not ids of experts
    loaded = PeerForCausalLM.from_pretrained(tmp_path / "slice")
    apply_patch(loaded, tmp_path / "of_slice.safetensors")
    assert_same_bits(loaded, bits(tuned_slice))
    save_patch(base, tuned, tmp_path / "of_whole.safetensors")
    for patch_file, model in (("of_whole", "slice"), ("of_slice", "base"), ("of_slice", "other")):
        with pytest.raises(ValueError, match=r"num_kept_experts=4|has the shape|is a patch for 'slice'"):
            apply_patch(PeerForCausalLM.from_pretrained(tmp_path / model), tmp_path / f"{patch_file}.safetensors")
    with pytest.raises(ValueError, match="keep other experts"):
        save_patch(tmp_path / "slice", tmp_path / "other", tmp_path / "out.safetensors", other_tensors="store")
    with pytest.raises(ValueError, match=r"has 'model.layers.1.mlp.experts.row_of_expert'"):
        save_patch(base, tmp_path / "slice", tmp_path / "out.safetensors")


def test_quantised_tables_that_differ_are_refused(pair, tmp_path):
    base, tuned, *_ = pair()
    for folder in (base, tuned):
        quantise_expert_tables(PeerForCausalLM.from_pretrained(folder), "int8").save_pretrained(f"{folder}-int8")
    with pytest.raises(ValueError, match=r"is quantised and differs. Make the patch of the float checkpoints"):
        save_patch(f"{base}-int8", f"{tuned}-int8", tmp_path / "fine.safetensors")


def test_damaged_files_are_refused(pair, tmp_path):
    base, tuned, *_ = pair()
    patch = tmp_path / "fine.safetensors"
    save_patch(base, tuned, patch)
    content, model = patch.read_bytes(), PeerForCausalLM.from_pretrained(base)
    before = bits(model)
    flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
    for damaged, message in ((content[:-1], "less than|announces"), (content[:100], "long"), (flipped, "checksum")):
        patch.write_bytes(damaged)
        with pytest.raises(OSError, match=message):
            apply_patch(model, patch)
    patch.unlink()
    with pytest.raises(FileNotFoundError, match="there is no patch"):
        apply_patch(model, patch)
    with pytest.raises(ValueError, match="is not a patch"):
        apply_patch(model, base / "model.safetensors")
    assert_same_bits(model, before)


@pytest.mark.parametrize(
    ("row_ids", "message"),
    [
        ([3, 17, 64], r"has 64 rows; row ids \[64\] are outside"),
        ([-1, 3, 17], r"row ids \[-1\] are outside"),
        ([3, 3, 17], r"must ascend; \[3\] are repeated"),
        ([17, 3, 63], r"must ascend; \[3\] are repeated or out of order"),
        ([3, 17], r"rows \(3, 32\) and row ids \(2,\)"),
    ],
)
def test_impossible_row_ids_are_refused(pair, tmp_path, row_ids, message):
    base, tuned, *_ = pair()
    patch = save_patch(base, tuned, tmp_path / "fine.safetensors")
    one = patch.tensors[UP]
    object.__setattr__(one, "row_ids", torch.tensor(row_ids))
    write_patch(tmp_path / "fine.safetensors", patch.base, patch.tensors.items())
    with pytest.raises(ValueError, match=message):
        apply_patch(PeerForCausalLM.from_pretrained(base), tmp_path / "fine.safetensors")


def test_a_later_version_and_tensors_without_entry_are_refused(pair, tmp_path, monkeypatch):
    base, tuned, *_ = pair()
    patch = tmp_path / "fine.safetensors"
    monkeypatch.setattr("modeling_peer.adaptation.patch_files.VERSION", 2)
    save_patch(base, tuned, patch)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="version 2; this release reads 1"):
        open_patch(patch)


def test_no_path_of_the_machine_is_in_a_patch(pair, tmp_path):
    base, tuned, *_ = pair()
    patch = save_patch(base, tuned, tmp_path / "fine.safetensors")
    assert str(tmp_path).encode() not in (tmp_path / "fine.safetensors").read_bytes()
    assert json.loads(json.dumps(patch.describe()))["num_rows"] == 6


def test_the_command_saves_merges_shows_and_applies(pair, tmp_path, capsys):
    base, tuned, *_ = pair(rows=(1, 2))
    second = change(PeerForCausalLM.from_pretrained(base), [9])
    save_patch(base, second, tmp_path / "b.safetensors")
    a, b, both = (str(tmp_path / f"{name}.safetensors") for name in ("a", "b", "both"))
    saved = run_patch_command(["save", "--base", str(base), "--tuned", str(tuned), "--output_file", a])
    assert saved["num_rows"] == 4
    assert saved["base"] == "base"
    assert run_patch_command(["merge", a, b, "--output_file", both])["num_rows"] == 6
    assert run_patch_command(["show", both])["tensors"][0]["rows"] == 3
    assert "| 64 x 32 |" in capsys.readouterr().out
    run_patch_command(["apply", a, b, "--model", str(base), "--output_dir", str(tmp_path / "out")])
    loaded = PeerForCausalLM.from_pretrained(base)
    apply_patch(loaded, both)
    assert_same_bits(loaded, bits(PeerForCausalLM.from_pretrained(tmp_path / "out")))
    for words, message in (
        ([], "the first word must be one of save, apply, merge, show"),
        (["sho"], "Did you mean 'show'"),
        (["show", a, b], "show takes one patch; got 2"),
        (["show", str(tmp_path / "absent.safetensors")], "there is no patch"),
        (["merge", a, a, "--output_file", both], "are in several patches"),
        (["apply", a, "--model", str(base)], "apply: --output_dir is missing"),
        (["apply", a, "--model", str(base), "--output_dir", str(base)], "is the folder of the model"),
        (["save", "--base", str(base), "--tuned", str(base), "--output_file", a], "no tensor differs"),
    ):
        with pytest.raises(SettingsError, match=message):
            run_patch_command(words)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["memory", "mapped"])
def test_a_thousandth_of_a_million_experts_is_a_thousandth_of_the_checkpoint(tiny_config, tmp_path, placement):
    """`pytest -m slow -s -k thousandth tests/adaptation/test_patches.py` prints bytes and seconds."""
    sizes = {"hidden_size": 256, "num_sub_keys": 1024, "query_dim": 256, "dtype": torch.bfloat16}
    model = PeerForCausalLM._from_config(tiny_config(**sizes))
    model.save_pretrained(tmp_path / "base")
    pool = model.model.layers[1].mlp.experts
    assert pool.up_embed.dtype == torch.bfloat16
    rows = torch.randperm(1024**2)[: 1024**2 // 1000]
    change(model, rows)
    started = time.perf_counter()
    save_patch(tmp_path / "base", model, tmp_path / "fine.safetensors")
    saved = time.perf_counter() - started
    changed = {name: getattr(pool, name)[rows].clone() for name in ("down_embed", "up_embed")}
    del model, pool
    loaded = PeerForCausalLM.from_pretrained(tmp_path / "base", dtype="auto", table_placement=placement)
    started, cpu = time.perf_counter(), time.process_time()
    applied = apply_patch(loaded, tmp_path / "fine.safetensors")
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    pool = loaded.model.layers[1].mlp.experts
    for number, (name, expected) in enumerate(changed.items()):
        found = getattr(pool, name).detach()[rows]
        if pool.overlay is not None:
            found = pool.overlay.replace(rows, number, found)
        assert torch.equal(found, expected)
    started = time.perf_counter()
    remove_patch(loaded, applied)
    removed = time.perf_counter() - started
    checkpoint = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    size = (tmp_path / "fine.safetensors").stat().st_size
    shutil.rmtree(tmp_path / "base")
    print(
        f"\n{placement}: checkpoint {checkpoint:,} bytes, patch {size:,} ({size / checkpoint:.4%}), "
        f"save {saved:.1f} s, apply {seconds:.3f} s ({cpu_seconds:.3f} s of CPU), remove {removed:.3f} s"
    )
    assert size < 0.0011 * checkpoint
    assert cpu_seconds < 1  # wall time depends on what else runs
