# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""`peer finetune-rows` trains what it ranked, and nothing else; killed, it goes on; the rest is refused."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from training_helpers import TINY_LLAMA, TINY_PEER, as_command_line, private_cache, some_text  # noqa: F401  a fixture
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from modeling_peer import PeerConfig, PeerForCausalLM, quantise_expert_tables
from modeling_peer.adaptation.finetune_rows import finetune_rows
from modeling_peer.adaptation.patches import apply_patch, open_patch, remove_patch
from modeling_peer.adaptation.retrofit import retrofit
from modeling_peer.adaptation.rows_arguments import parse_rows
from modeling_peer.adaptation.saved_counts import load_counts, save_counts
from modeling_peer.adaptation.trained_rows import train_only_experts
from modeling_peer.analysis.expert_importance import record_importance
from modeling_peer.analysis.routing_trace import TokenBatch
from modeling_peer.console.errors import SettingsError
from modeling_peer.data.tokenizers import byte_tokenizer

pytestmark = pytest.mark.usefixtures("private_cache")
FIELDS = {name: value for name, value in TINY_PEER.items() if name != "model_type"}
LAYERS = {"mlp_layer_types": ["sparse", "sparse"]}


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def base(tmp_path):
    """A model of two sparse layers, 64 experts each; texts of letters and of digits."""
    numbers = random.Random(0)
    sums = ((numbers.randrange(1000), numbers.randrange(1000)) for _ in range(400))
    (tmp_path / "new.txt").write_text("".join(f"{a} + {b} = {a + b}\n" for a, b in sums))
    (tmp_path / "old.txt").write_text(some_text(800))
    return save(PeerForCausalLM(PeerConfig(**FIELDS, **LAYERS)), tmp_path / "base")


def words_of(base, folder, *words, name="sums", **settings):
    fields = {
        "train_file": folder / "new.txt",
        "background": folder / "old.txt",
        "num_rows": 6,
        "output_file": folder / f"{name}.safetensors",
        "max_tokens": 2000,
        "max_evaluation_bytes": 600,
        "block_size": 32,
        "max_steps": 6,
        "learning_rate": 0.03,
        "use_cpu": True,
        "disable_tqdm": True,
    } | settings
    return [base, *as_command_line(**{name: value for name, value in fields.items() if value is not None}), *words]


def run(base, folder, *words, callbacks=(), **settings):
    return finetune_rows(*parse_rows(words_of(base, folder, *words, **settings)), callbacks)


class KilledAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_base_and_patch_are_the_tuned_model_and_all_else_is_the_base(base, tmp_path, capsys):
    receipt = run(base, tmp_path)
    before, tuned = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", tmp_path / "sums"))
    patch = open_patch(tmp_path / "sums.safetensors")
    assert len(patch.tensors) == 4
    assert receipt["num_rows"] == 4 * 6
    for name, tensor in before.items():
        changed = (tuned[name] != tensor).flatten(1).any(1) if tensor.dim() > 1 else torch.zeros(1)
        if name in patch.tensors:
            assert changed.nonzero().squeeze(1).tolist() == patch.tensors[name].row_ids.tolist()
        else:
            assert torch.equal(tuned[name], tensor), name  # running statistics too
    model = PeerForCausalLM.from_pretrained(base)
    applied = apply_patch(model, patch.file)
    assert all(torch.equal(tuned[name], tensor) for name, tensor in model.state_dict().items() if name in tuned)
    remove_patch(model, applied)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items() if name in before)

    new, old = receipt["scores"]["new, held out"], receipt["scores"]["background"]
    assert new["after"] < 0.95 * new["before"]
    assert new["change"] < old["change"]
    assert {row["trained"] for row in receipt["layers"].values()} == {6}
    assert all(row["share_of_background"] < row["share_of_new"] for row in receipt["layers"].values())
    assert json.loads((tmp_path / "sums.json").read_text()) == receipt
    printed = capsys.readouterr().out
    assert "| layer_1 | 64 | 6 |" in printed
    assert "| new, held out |" in printed


def test_counts_of_the_background_are_read_in_place_of_the_text(base, tmp_path):
    first = run(base, tmp_path)
    counts = tmp_path / "sums" / "counts" / "background.safetensors"
    (tmp_path / "old.txt").unlink()
    again = run(base, tmp_path, name="again", background=counts)
    assert again["layers"] == first["layers"]
    assert [*again["scores"]] == ["new, held out"]
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("sums", "again"))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())

    other = save(PeerForCausalLM(PeerConfig(**FIELDS, **LAYERS)), tmp_path / "other")
    with pytest.raises(SettingsError, match=r"counts of 'base' \(model.safetensors with checksum .* Count the text"):
        run(other, tmp_path, name="third", background=counts)
    counts.write_bytes(counts.read_bytes()[:-8])
    with pytest.raises(SettingsError, match="Count the text again"):
        run(base, tmp_path, name="damaged", background=counts)
    with pytest.raises(SettingsError, match="has no counts of experts"):
        run(base, tmp_path, name="wrong", background=tmp_path / "base" / "model.safetensors")


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(base, tmp_path, capsys):
    run(base, tmp_path, name="whole")
    for step in (1, 5):  # before the first checkpoint, and after it
        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path, save_steps=2, callbacks=[KilledAt(step)])
        assert not (tmp_path / "sums.safetensors").exists()
    capsys.readouterr()
    receipt = run(base, tmp_path, save_steps=2)
    printed = capsys.readouterr().out
    assert printed.count("counts of an earlier session") == 2
    assert "resuming from" in printed
    assert "checkpoint-4" in printed
    assert receipt["steps"] == 6
    whole, resumed = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("whole", "sums"))
    assert whole == resumed
    (tmp_path / "sums.safetensors").unlink()  # as if killed before the patch was written
    run(base, tmp_path, save_steps=2)
    assert (tmp_path / "sums.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_a_run_that_was_begun_with_other_settings_is_not_mixed_with_this_one(base, tmp_path):
    run(base, tmp_path)
    with pytest.raises(SettingsError, match=r"num_rows was 6, is 7.*--overwrite_output_dir true"):
        run(base, tmp_path, num_rows=7)
    (tmp_path / "old.txt").write_text(some_text(700, seed=1))
    with pytest.raises(SettingsError, match="background has another content"):
        run(base, tmp_path)
    counts = tmp_path / "sums" / "counts" / "background.safetensors"
    with pytest.raises(SettingsError, match="which --overwrite_output_dir clears"):
        run(base, tmp_path, "--overwrite_output_dir=true", background=counts)
    assert counts.exists()
    receipt = run(base, tmp_path, "--overwrite_output_dir=true", num_rows=7)
    assert receipt["num_rows"] == 4 * 7


def test_a_retrofitted_checkpoint_learns_from_zero_writers_by_share_and_kl(base, tmp_path):
    dense = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA))
    model = retrofit(dense, num_sub_keys=8, num_retrieval_heads=2, num_experts_per_head=4, query_dim=16)
    fitted = save(model, tmp_path / "retrofitted")
    receipt = run(fitted, tmp_path, num_rows=None, share=0.25, rank_by="kl")
    assert receipt["layers"]["layer_0"]["trained"] == 16
    assert receipt["scores"]["new, held out"]["change"] < 0
    writers = load_file(tmp_path / "sums" / "model.safetensors")["model.layers.0.mlp.experts.up_embed"]
    assert (writers != 0).any(1).sum() == 16


@pytest.mark.slow
def test_rows_are_trained_in_float32_and_stored_in_the_dtype_of_the_base(base, tmp_path):
    half = save(PeerForCausalLM.from_pretrained(base, dtype=torch.bfloat16), tmp_path / "half")
    receipt = run(half, tmp_path, row_sparse_gradients=False)
    patch = open_patch(tmp_path / "sums.safetensors")
    assert {one.rows.dtype for one in patch.tensors.values()} == {torch.bfloat16}
    assert receipt["scores"]["new, held out"]["change"] < 0
    tuned = load_file(tmp_path / "sums" / "model.safetensors")
    model = PeerForCausalLM.from_pretrained(half)
    apply_patch(model, patch.file)
    state = model.state_dict()
    assert all(torch.equal(tensor.to(state[name].dtype), state[name]) for name, tensor in tuned.items())


@pytest.mark.slow
def test_experts_that_a_slice_lacks_are_not_chosen(base, tmp_path):
    from modeling_peer.adaptation.slicing import slice_experts

    kept = {number: list(range(0, 64, 2)) for number in (0, 1)}
    sliced = save(slice_experts(PeerForCausalLM.from_pretrained(base), kept), tmp_path / "slice")
    receipt = run(sliced, tmp_path, num_rows=32)
    assert receipt["num_rows"] <= 4 * 32
    assert 1 <= receipt["layers"]["layer_1"]["trained"] <= 32
    with pytest.raises(SettingsError, match=r"--num_rows \(33\) exceeds the 32 experts of layer_0"):
        run(sliced, tmp_path, name="more", num_rows=33)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rows": 65}, r"--num_rows \(65\) exceeds the 64 experts of layer_0"),
        ({"num_rows": 0}, r"--num_rows \(0\) must be at least 1"),
        ({"num_rows": None, "share": 1.5}, r"--share \(1.5\) must be above 0 and at most 1"),
        ({"share": 0.5}, "got both"),
        ({"num_rows": None}, "got neither"),
        ({"rank_by": "tfidf"}, "Did you mean 'tf_idf'"),
        ({"background": None}, "--background is missing"),
        ({"train_file": None}, "--train_file is missing"),
        ({"output_file": "model.safetensors"}, "not as the weights of a model"),
        ({"output_file": "patch.pt"}, r"--output_file: a patch is a file named \*.safetensors"),
        ({"background": "absent.txt"}, "absent.txt"),
        ({"background": "absent.safetensors"}, "there are no counts"),
        ({"model_overrides": "num_experts_per_head=2"}, "a patch belongs to the checkpoint as it is"),
        ({"learning_rat": 1}, "Did you mean 'learning_rate'"),
        ({"learning_rate": -1}, "learning_rate"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_counted(base, tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=message):
        run(base, tmp_path, **settings)
    assert not list(tmp_path.rglob("background.safetensors"))


def test_checkpoints_without_trainable_rows_are_refused_with_the_way_out(base, tmp_path):
    dense = save(LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)), tmp_path / "dense")
    with pytest.raises(SettingsError, match=r"peer retrofit .*dense --output_dir"):
        run(dense, tmp_path)
    coarse = PeerConfig(**FIELDS, sparse_mlp="top_k_moe")
    with pytest.raises(SettingsError, match="experts are whole MLPs"):
        run(save(PeerForCausalLM(coarse), tmp_path / "coarse"), tmp_path)
    quantised = save(quantise_expert_tables(PeerForCausalLM.from_pretrained(base), "int8"), tmp_path / "int8")
    with pytest.raises(SettingsError, match=r"'int8': quantised tables do not train. Name the float"):
        run(quantised, tmp_path)
    mapped = PeerForCausalLM.from_pretrained(base, table_placement="mapped")
    with pytest.raises(ValueError, match=r'do not train. Load the model without table_placement="mapped"'):
        train_only_experts(mapped, {1: [1]})
    with pytest.raises(SettingsError, match="is the folder of the model"):
        run(base, tmp_path, output_dir=base)


def test_saved_counts_are_what_was_recorded(base, tmp_path):
    model = PeerForCausalLM.from_pretrained(base)
    batch = TokenBatch(torch.randint(1, 250, (2, 16)), torch.zeros(2, dtype=torch.int64))
    importance = record_importance(model, [batch], show_progress=False)
    file = save_counts(tmp_path / "counts.safetensors", importance, base, {"text": "random"})
    for one, other in zip(importance, load_counts(file, base), strict=True):
        assert (one.name, one.index, one.num_tokens) == (other.name, other.index, other.num_tokens)
        assert torch.equal(one.counts, other.counts)
        assert torch.equal(one.output_sums, other.output_sums)
    content = json.loads(file.with_suffix(".json").read_text())
    assert content["facts"] == {"text": "random"}
    assert content["base"]["name"] == "base"
