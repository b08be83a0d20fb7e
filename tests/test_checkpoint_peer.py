# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Saving and loading: all or nothing, everything that is needed, and clear words for what is damaged."""

import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification
from transformers.utils import logging

from modeling_peer import PeerConfig, PeerForCausalLM, PeerForSequenceClassification, PeerModel
from modeling_peer.exchange_peer import STAGING_PREFIX
from modeling_peer.travelling_code_peer import LAYER_FILES

# The code of a PEER model.
TRAVELLING_FILES = {
    "auto_classes_peer.py",
    "transformers_names_peer.py",
    "configuration_peer.py",
    "grown_pools_peer.py",
    "part_config_peer.py",
    "token_context_peer.py",
    "backends_peer.py",
    "auxiliary_losses_peer.py",
    "product_keys_peer.py",
    "retrieval_peer.py",
    "experts_peer.py",
    "layer_peer.py",
    "sparse_mlps_peer.py",
    "travelling_code_peer.py",
    "outputs_peer.py",
    "parallel_peer.py",
    "checkpoint_peer.py",
    "exchange_peer.py",
    "checksums_peer.py",
    "damage_peer.py",
    "files_peer.py",
    "one_call_peer.py",
    "query_norms_peer.py",
    "balance_loss_peer.py",
    "masks_peer.py",
    "row_formats_peer.py",
    "row_overlay_peer.py",
    "quantised_tables_peer.py",
    "table_shards_peer.py",
    "table_placement_peer.py",
    "file_names_peer.py",
    "mapped_memory_peer.py",
    "modeling_peer.py",
}


@pytest.fixture
def model(tiny_config):
    return PeerForCausalLM(tiny_config()).eval()


@pytest.fixture
def tokens():
    return torch.randint(1, 99, (2, 9))


def assert_same_logits(model, other, tokens):
    assert torch.equal(model(tokens).logits, other(tokens).logits)


def test_a_saved_folder_holds_weights_code_and_every_auto_class(model, tmp_path):
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"} | TRAVELLING_FILES
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_peer.PeerConfig",
        "AutoModel": "modeling_peer.PeerModel",
        "AutoModelForCausalLM": "modeling_peer.PeerForCausalLM",
        "AutoModelForMaskedLM": "modeling_peer.PeerForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_peer.PeerForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_peer.PeerForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_peer.PeerForQuestionAnswering",
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"mlp_layer_types": ["sparse"] * 3, "share_expert_tables": True},
        {"mlp_layer_types": ["sparse"] * 3, "share_expert_tables": True, "tie_word_embeddings": True},
        {"gated_experts": True, "parallel_dense_mlp": True, "share_sub_keys": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("max_shard_size", ["50GB", "10KB"])
def test_round_trip_keeps_every_value_and_every_tie(tiny_config, tokens, tmp_path, options, max_shard_size):
    model = PeerForCausalLM(tiny_config(**options)).train()
    model(tokens)  # running statistics that are not the initial ones
    model.eval().save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "10KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_logits(model, loaded, tokens)
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert loaded.num_parameters() == model.num_parameters()  # counts a tied tensor once
    if options.get("share_expert_tables"):
        layers = loaded.model.layers
        assert layers[0].mlp.experts.up_embed is layers[2].mlp.experts.up_embed
        stored = [name for file in tmp_path.glob("*.safetensors") for name in load_file(file)]
        assert sum("up_embed" in name for name in stored) == 1


def test_heads_load_from_each_others_checkpoints(tiny_config, model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base.eval()(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    classifier = AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=5)
    assert torch.equal(classifier.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert classifier.score.out_features == 5
    base.save_pretrained(tmp_path / "base")
    again = PeerForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(("first", "second"), [("50GB", "10KB"), ("10KB", "50GB"), ("10KB", "20KB")])
def test_saving_over_another_model_leaves_nothing_of_it(tiny_config, tokens, tmp_path, first, second):
    """A stale `model.safetensors` beside new shards would be loaded in their place."""
    PeerForCausalLM(tiny_config(num_hidden_layers=2)).save_pretrained(tmp_path, max_shard_size=first)
    (tmp_path / "tokenizer.json").write_text("not ours")
    new = PeerForCausalLM(tiny_config()).eval()
    new.save_pretrained(tmp_path, max_shard_size=second)
    assert_same_logits(new, AutoModelForCausalLM.from_pretrained(tmp_path), tokens)
    index = tmp_path / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    assert {path.name for path in tmp_path.glob("*.safetensors")} == named
    assert (tmp_path / "tokenizer.json").read_text() == "not ours"


def test_a_variant_lives_beside_the_main_weights(model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    other = PeerForCausalLM(model.config).eval()
    other.save_pretrained(tmp_path, variant="other")
    assert_same_logits(model, AutoModelForCausalLM.from_pretrained(tmp_path), tokens)
    assert_same_logits(other, AutoModelForCausalLM.from_pretrained(tmp_path, variant="other"), tokens)


def test_a_save_that_fails_changes_nothing(monkeypatch, model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        PeerForCausalLM(model.config).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_to_a_file_is_refused(model, tmp_path):
    file = tmp_path / "model"
    file.write_text("precious")
    with pytest.raises(NotADirectoryError, match=r"is a file\. Give the path of a folder"):
        model.save_pretrained(file)
    assert file.read_text() == "precious"


def save_two_models_in_turn(folder, ready):
    """Runs until killed. Every parameter of a model is its number of layers, so that a mixture shows."""
    torch.set_num_threads(1)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_sub_keys": 8, "num_experts_per_head": 4}
    models = [PeerForCausalLM(PeerConfig(vocab_size=99, num_hidden_layers=layers, **sizes)) for layers in (2, 3)]
    for model in models:
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, model.config.num_hidden_layers)
    while True:
        for model in models:
            for size in ("50GB", "20KB"):
                model.save_pretrained(folder, max_shard_size=size)
        ready.set()  # from now on, every save replaces another


@pytest.mark.slow
def test_a_killed_save_never_leaves_a_mixture_of_two_models(tmp_path):
    """Kill -9 at random moments of saves that alternate between two models: what loads is one of them, whole."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modeling_peer"])
    outcomes = []
    for attempt in range(20):
        folder, ready = tmp_path / str(attempt), context.Event()
        process = context.Process(target=save_two_models_in_turn, args=(folder, ready))
        process.start()
        assert ready.wait(120)
        time.sleep(random.Random(attempt).uniform(0, 0.8))
        process.kill()
        process.join()
        try:
            model = AutoModelForCausalLM.from_pretrained(folder)
        except (OSError, ValueError):
            assert not (folder / "config.json").exists()  # between two models: loads as neither
            outcomes.append("nothing")
            continue
        layers = model.config.num_hidden_layers
        assert {value for p in model.parameters() for value in p.unique().tolist()} == {layers}
        outcomes.append(f"{layers} layers")
        model.save_pretrained(folder)
        assert not list(folder.glob(f"{STAGING_PREFIX}*"))  # the next save cleans up after the killed one
    assert {"2 layers", "3 layers"} <= set(outcomes), f"the kills hit too few moments to show anything: {outcomes}"


def test_pushing_uploads_what_was_saved_and_a_card_and_nothing_else(monkeypatch, model, tmp_path):
    calls = {}

    def create_repo(repo_id, **options):
        calls["create_repo"] = {"repo_id": repo_id, **options}
        return types.SimpleNamespace(repo_id=f"someone/{repo_id}")

    class Hub:
        def create_commit(self, operations, **options):
            calls["create_commit"] = {"files": {operation.path_in_repo for operation in operations}, **options}

    folder = tmp_path / "my-peer"
    folder.mkdir()
    (folder / "secret.env").write_text("not for the Hub")
    monkeypatch.setattr("huggingface_hub.create_repo", create_repo)
    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr(
        "modeling_peer.checkpoint_peer.create_and_tag_model_card", lambda *args, **options: ModelCard("# A card")
    )
    model.save_pretrained(folder, push_to_hub=True, private=True, token="t", commit_message="first")
    assert calls["create_repo"] == {"repo_id": "my-peer", "private": True, "token": "t", "exist_ok": True}
    commit = calls["create_commit"]
    saved = {"config.json", "generation_config.json", "model.safetensors", "README.md"} | TRAVELLING_FILES
    assert commit["files"] == saved
    assert commit["repo_id"] == "someone/my-peer"
    assert commit["commit_message"] == "first"


def test_a_checkpoint_is_not_loaded_with_fields_that_it_could_not_be_saved_with(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names 3 layers, but num_hidden_layers is 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)


def test_a_save_leaves_alone_what_other_processes_are_saving(model, tmp_path):
    """Ranks and jobs that save into one folder: only what a dead process of this host left is removed."""
    host = platform.node()
    running = tmp_path / f"{STAGING_PREFIX}{host}-{os.getppid()}-abc"
    elsewhere = tmp_path / f"{STAGING_PREFIX}{host}-2-1-abc"  # process 1 of the host called {host}-2
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    abandoned = tmp_path / f"{STAGING_PREFIX}{host}-{process.pid}-abc"
    for folder in (running, elsewhere, abandoned):
        folder.mkdir()
    model.save_pretrained(tmp_path)
    assert running.exists()
    assert elsewhere.exists()
    assert not abandoned.exists()


def test_a_process_that_is_not_the_main_one_writes_nothing(model, tmp_path):
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.iterdir())


class TestDamage:
    @pytest.fixture
    def folder(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, PeerModel.from_pretrained])
    def test_a_truncated_file_is_named_with_its_sizes(self, folder, load):
        file = folder / "model.safetensors"
        size = file.stat().st_size
        os.truncate(file, size - 100)
        with pytest.raises(OSError, match=rf"(?s)model.safetensors is {size - 100} bytes.*announces {size}.*again"):
            load(folder)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "model.safetensors is 0 bytes long"),
            (b"\x08\x00\x00\x00\x00\x00\x00\x00not json", "header of model.safetensors is not readable"),
            (b"<html>404</html>", "model.safetensors is 16 bytes long"),
        ],
    )
    def test_a_file_that_is_not_safetensors_is_named(self, folder, content, message):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(OSError, match=message):
            AutoModelForCausalLM.from_pretrained(folder)

    def test_a_missing_shard_is_named(self, model, folder):
        model.save_pretrained(folder, max_shard_size="10KB")
        shard = sorted(folder.glob("model-*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(OSError, match=shard.name):
            AutoModelForCausalLM.from_pretrained(folder)

    def test_tables_of_another_size_are_refused_with_both_shapes(self, folder, caplog):
        logging.enable_propagation()
        try:
            with pytest.raises(RuntimeError, match=r"do not fit the configuration.*ignore_mismatched_sizes=True"):
                AutoModelForCausalLM.from_pretrained(folder, num_sub_keys=16)
        finally:
            logging.disable_propagation()
        report = re.sub(r"\s+", " ", caplog.text)
        assert re.search(r"experts.up_embed.*\[64, 32\].*\[256, 32\]", report)

    def test_missing_expert_tables_are_reported_not_passed_over(self, folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        del tensors["model.layers.1.mlp.experts.up_embed"]
        save_file(tensors, file, metadata={"format": "pt"})
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert info["missing_keys"] == {"model.layers.1.mlp.experts.up_embed"}
        assert torch.isfinite(model.model.layers[1].mlp.experts.up_embed).all()

    def test_a_config_that_is_not_json_is_named(self, folder):
        (folder / "config.json").write_text('{"model_type": "peer", ')
        with pytest.raises(OSError, match=r"config\.json"):
            AutoModelForCausalLM.from_pretrained(folder)

    def test_a_folder_without_config_is_refused(self, folder):
        (folder / "config.json").unlink()
        with pytest.raises((OSError, ValueError), match=r"config\.json|model_type"):
            AutoModelForCausalLM.from_pretrained(folder)


REMOTE_LOAD = """
import sys

class Hidden:
    '''Makes the names unimportable, as on a machine that never heard of them.'''
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_peer", "triton", "numba"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import torch, transformers
folder, tokens = sys.argv[1], torch.arange(1, 13).view(2, 6)
for name in ("modeling_peer", "triton", "numba"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is importable: the test shows nothing")
torch.save({
    auto: getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()(tokens)[0]
    for auto in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification",
                 "AutoModelForTokenClassification", "AutoModelForQuestionAnswering")
}, sys.argv[2])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert model.__module__.startswith("transformers_modules."), model.__module__
assert len(model.generate(tokens, max_new_tokens=3, eos_token_id=None)[0]) == 9
model.save_pretrained(sys.argv[3])
print("AutoModelForCausalLM is", type(model))
"""


def run_remote(script, *args, cache):
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], env=environment, capture_output=True, text=True, cwd=cache
    )


@pytest.mark.slow  # tests/hub/test_clean_check.py loads one in every run
@pytest.mark.parametrize(
    "fields",
    [
        {"share_expert_tables": True, "gated_experts": True},
        {"sparse_mlp": "product_key_memory", "gated_memory": True},
        {"sparse_mlp": "top_k_moe"},
    ],
    ids=str,
)
def test_remote_code_loads_where_the_package_cannot_be_imported(tiny_config, tmp_path, fields):
    model = PeerForCausalLM(tiny_config(mlp_layer_types=["sparse"] * 3, **fields)).eval()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "cache").mkdir()
    results, copy = tmp_path / "results.pt", tmp_path / "copy"
    process = run_remote(REMOTE_LOAD, tmp_path / "model", results, copy, cache=tmp_path / "cache")
    assert process.returncode == 0, process.stderr
    remote = torch.load(results)
    tokens = torch.arange(1, 13).view(2, 6)
    torch.testing.assert_close(remote["AutoModelForCausalLM"], model(tokens).logits)
    torch.testing.assert_close(remote["AutoModel"], model.model(tokens).last_hidden_state)

    # What remote code saved is as complete as what the package saves, and loads here and there.
    assert {p.name for p in copy.iterdir()} == {p.name for p in (tmp_path / "model").iterdir()}
    assert_same_logits(model, AutoModelForCausalLM.from_pretrained(copy), tokens)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    process = run_remote(REMOTE_LOAD, copy, results, tmp_path / "copy2", cache=tmp_path / "cache")
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
def test_a_subclass_of_somebody_else_loads_as_the_model_it_is(tiny_config, tmp_path):
    Mine = type("Mine", (PeerForCausalLM,), {"__module__": "__main__"})  # as in a notebook, whose code cannot travel
    model = Mine(tiny_config(mlp_layer_types=["sparse"] * 3)).eval()
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} >= TRAVELLING_FILES
    (tmp_path / "cache").mkdir()
    results = tmp_path / "results.pt"
    process = run_remote(REMOTE_LOAD, tmp_path / "model", results, tmp_path / "copy", cache=tmp_path / "cache")
    assert process.returncode == 0, process.stderr
    tokens = torch.arange(1, 13).view(2, 6)
    torch.testing.assert_close(torch.load(results)["AutoModelForCausalLM"], model(tokens).logits)


def test_every_travelling_file_imports_only_what_a_checkpoint_can_rely_on():
    from transformers.dynamic_module_utils import check_imports, get_imports, get_relative_imports

    import modeling_peer

    package = os.path.dirname(modeling_peer.__file__)
    flat = {name for name in os.listdir(package) if name.endswith(".py") and name != "__init__.py"}
    assert flat - LAYER_FILES == TRAVELLING_FILES - LAYER_FILES
    allowed = {"torch", "transformers", "safetensors", "huggingface_hub"} | set(sys.stdlib_module_names)
    for name in flat:
        file = os.path.join(package, name)
        assert set(get_imports(file)) <= allowed, name
        assert {f"{module}.py" for module in get_relative_imports(file)} <= flat, name
        check_imports(file)
        source = Path(file).read_text(encoding="utf-8")
        assert "from . import" not in source, name
        assert "from .." not in source, name
