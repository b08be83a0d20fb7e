# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A whole run: it learns, saves what loads, resumes on the same curve, and refuses early what cannot work."""

import json
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers.trainer
from huggingface_hub import ModelCard, RepoUrl
from training_helpers import (
    TINY_LLAMA,
    TINY_PEER,
    last_json,
    logged_losses,
    private_cache,  # noqa: F401  a fixture
    run_script,
    train,
    write_inputs,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl

from modeling_peer.configuration_peer import SPARSE_MLPS
from modeling_peer.console.errors import SettingsError
from modeling_peer.hub import model_card
from modeling_peer.top_k_moe_peer import ROUTERS
from modeling_peer.training import language_modeling
from modeling_peer.training.language_model_trainer import TimeLimit

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path)


def test_a_run_learns_and_leaves_a_model_a_card_logs_and_its_results(tmp_path, inputs):
    out = tmp_path / "out"
    result = train(inputs, output_dir=out, max_steps=40, eval_strategy="steps", eval_steps=20, report_to="tensorboard")
    history = logged_losses(out)
    assert len(history) == 40
    assert sum(history[-5:]) < 0.8 * sum(history[:5])

    assert json.loads((out / "train_lm_results.json").read_text()) == result.summary
    assert result.summary["tokens"] == 40 * 4 * 32
    assert result.summary["validation_bits_per_byte"] < 6
    assert result.summary["eval_loss"] is not None
    assert list(out.rglob("events.out.tfevents.*"))

    loaded = AutoModelForCausalLM.from_pretrained(out)
    for name, value in result.model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(out)("é")["input_ids"] == result.tokenizer("é")["input_ids"]

    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    assert {"peer", "mixture-of-experts"} <= set(card.data.tags)
    measured = {entry.metric_type: entry.metric_value for entry in card.data.eval_results}
    assert measured["bits_per_byte"] == pytest.approx(result.summary["validation_bits_per_byte"], abs=1e-4)
    assert "64 experts of one neuron each, of which a token uses 8" in card.content
    assert "learning_rate: 0.01" in card.content
    assert str(tmp_path) not in card.content  # a published card names no folder of this machine


@pytest.mark.slow
def test_a_run_resumed_in_a_new_process_continues_the_same_losses(tmp_path, inputs):
    train(inputs, output_dir=tmp_path / "whole", max_steps=8)
    train(inputs, output_dir=tmp_path / "halves", max_steps=4, save_steps=4)
    words = ["--output_dir", str(tmp_path / "halves"), "--max_steps", "8", "--resume_from_checkpoint", "last"]
    summary = last_json(run_script("train_lm.py", *inputs, *words))
    assert summary["steps"] == 8
    # equal but for the order in which another number of threads sums
    assert logged_losses(tmp_path / "halves") == pytest.approx(logged_losses(tmp_path / "whole"), rel=1e-4)


def test_peer_and_dense_runs_that_differ_in_one_override_see_the_same_data(tmp_path, inputs):
    seen = {}
    for kind in ("sparse", "dense"):
        words = [*inputs, "--model_overrides", json.dumps({"mlp_layer_types": [kind, "dense"]})]
        result = train(words, output_dir=tmp_path / kind, max_steps=2)
        assert result.model.config.mlp_layer_types[0] == kind
        seen[kind] = [block["input_ids"].tolist() for block in result.training_blocks]
    assert seen["sparse"] == seen["dense"]
    assert logged_losses(tmp_path / "sparse") != logged_losses(tmp_path / "dense")


def test_the_same_seed_gives_the_same_run(tmp_path, inputs):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(inputs, output_dir=tmp_path / name, max_steps=3, seed=seed)
    assert logged_losses(tmp_path / "a") == logged_losses(tmp_path / "b")
    assert logged_losses(tmp_path / "a") != logged_losses(tmp_path / "c")


@pytest.mark.parametrize("config", [TINY_PEER, TINY_LLAMA], ids=["peer", "llama"])
def test_a_checkpoint_is_fine_tuned_with_its_own_tokenizer(tmp_path, config):
    words = write_inputs(tmp_path, config)
    first = train(words, output_dir=tmp_path / "first", max_steps=20)
    words = [word for word in words if not word.startswith("--tokenizer")]
    second = train(words, model=tmp_path / "first", output_dir=tmp_path / "second", max_steps=3)
    assert type(second.model) is type(first.model)
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert logged_losses(tmp_path / "second")[0] < logged_losses(tmp_path / "first")[0] - 1  # not from scratch
    assert "Fine-tuned from `first`" in (tmp_path / "second" / "README.md").read_text()


def test_a_run_from_a_checkpoint_goes_on_learning_the_running_statistics(tmp_path, inputs):
    """Loading freezes them, for trainers that fine-tune; this command's runs may be long."""
    first = train(inputs, output_dir=tmp_path / "first", max_steps=2)
    words = [word for word in inputs if not word.startswith("--tokenizer")]
    second = train(words, model=tmp_path / "first", output_dir=tmp_path / "second", max_steps=2)
    before = dict(first.model.named_buffers())
    for name, value in second.model.named_buffers():
        assert "running" not in name or not torch.equal(value, before[name]), name


def test_a_new_model_named_by_its_preset_is_based_on_no_other(tmp_path, inputs):
    words = [word for word in inputs if not word.startswith("--model=")]
    small = ["--model", "peer_tiny", "--model_overrides", "hidden_size=32", "num_attention_heads=2", "num_sub_keys=8"]
    train([*words, *small], output_dir=tmp_path / "out", max_steps=1)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None
    assert "Fine-tuned" not in card.content


def test_a_stream_is_trained_on_and_a_tokenizer_learned_from_it(tmp_path, inputs):
    words = [*inputs, "--streaming", "--tokenizer", "train"]
    result = train(words, output_dir=tmp_path / "out", max_steps=3)
    assert result.summary["steps"] == 3
    assert result.model.config.vocab_size == len(result.tokenizer) == 300


def test_a_new_models_vocabulary_is_its_tokenizers(tmp_path, inputs):
    config = train(inputs, output_dir=tmp_path / "out", max_steps=1).model.config
    assert config.vocab_size == 257
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)


def test_expert_usage_is_logged_in_training_and_evaluation_unless_told(tmp_path, inputs):
    logged = {}
    for choice in ("true", "false"):
        out = tmp_path / choice
        train(inputs, output_dir=out, log_expert_usage=choice, max_steps=2, eval_strategy="steps", eval_steps=2)
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        logged[choice] = {key for entry in history for key in entry}
    assert {"unevenness_layer_0", "dead_experts_layer_0", "eval_expert_usage_layer_0"} <= logged["true"]
    assert not any("layer_0" in key for key in logged["false"])


def test_training_stops_at_the_time_limit_and_still_saves(tmp_path, inputs):
    result = train(inputs, output_dir=tmp_path / "out", max_steps=10_000, max_train_minutes=0.01)
    assert 0 < result.summary["steps"] < 10_000
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_card_of_a_rival_does_not_say_that_it_is_peer(tmp_path, inputs):
    out = tmp_path / "out"
    rival = ["--model_overrides", "sparse_mlp=top_k_moe", "moe_router=switch"]
    train([*inputs, *rival], output_dir=out, max_steps=1)
    card = ModelCard.load(out / "README.md")
    assert "In 1 of its 2 layers the feed-forward is not PEER but `top_k_moe` ([arXiv:2101.03961]" in card.content
    assert "arxiv:2101.03961" in card.data.tags
    assert "2407.04153" not in str(card)


def test_the_papers_of_a_card_are_those_of_everything_that_may_stand_in_a_sparse_layer():
    assert set(model_card.PAPERS) == set(SPARSE_MLPS) - {"top_k_moe"} | set(ROUTERS)


def test_pushing_goes_through_the_trainer_and_carries_our_card(tmp_path, inputs, monkeypatch):
    uploads = []

    def upload_folder(*args, repo_id, folder_path, **kwargs):
        uploads.append((repo_id, os.listdir(folder_path)))
        done = Future()
        done.set_result(None)
        return done

    url = RepoUrl("https://huggingface.co/someone/tiny-peer")
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda *args, **kwargs: {"name": "someone"})
    for place in (huggingface_hub.HfApi, transformers.trainer):  # the latter holds them in older versions
        monkeypatch.setattr(place, "create_repo", lambda *args, **kwargs: url, raising=False)
        monkeypatch.setattr(place, "upload_folder", upload_folder, raising=False)
    words = [*inputs, "--push_to_hub", "--hub_model_id", "someone/tiny-peer", "--hub_token", "secret-token"]
    train(words, output_dir=tmp_path / "out", max_steps=2)
    repo_id, files = uploads[-1]
    assert repo_id == "someone/tiny-peer"
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json", "modeling_peer.py"} <= set(files)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained("someone/tiny-peer"' in card
    assert "bits per byte" in card
    assert "secret-token" not in card


class NothingMayStart:
    """Stands for Trainer where a run must have been refused before."""

    def __init__(self, *args, **kwargs):
        raise AssertionError("training began")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train_file=nope.txt"], "no such file or folder: nope.txt"),
        (["--model=nope"], "cannot open 'nope'"),
        (["--model=./nope"], r"cannot open './nope': no such folder"),
        (["--model_overrides", "num_experts_per_head=9"], r"num_experts_per_head \(9\) exceeds num_sub_keys \(8\)"),
        (["--model_overrides", "num_subkeys=9"], r"no field 'num_subkeys'. Did you mean 'num_sub_keys'"),
        (["--model_overrides", "expert_table_format=int8"], r"quantised tables are not trained.*`peer quantise`"),
        (["--model_overrides", "vocab_size=100"], "tokenizer has 257 tokens, the model 100 embeddings"),
        (["--tokenizer=./nope"], r"cannot load a tokenizer from './nope': no such folder"),
        (["--tokenizer=train", "--tokenizer_vocab_size=100"], r"tokenizer_vocab_size \(100\) must be at least 257"),
        (["--block_size=65"], r"block_size \(65\) must be from 2 to max_position_embeddings \(64\)"),
        (["--streaming"], "set --max_steps"),
        (["--resume_from_checkpoint=last"], "nothing to resume: no checkpoint-"),
        (["--resume_from_checkpoint=./nope"], "cannot resume from ./nope: "),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path, inputs, monkeypatch, words, message):
    monkeypatch.setattr(language_modeling, "LanguageModelTrainer", NothingMayStart)
    with pytest.raises(SettingsError, match=message):
        train([*inputs, *words], output_dir=tmp_path / "out")


def test_text_shorter_than_one_block_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(language_modeling, "LanguageModelTrainer", NothingMayStart)
    with pytest.raises(SettingsError, match="has 6 tokens, less than one block of 32"):
        train(write_inputs(tmp_path, text="short"), output_dir=tmp_path / "out")


def test_another_vocabulary_than_the_checkpoints_is_refused(tmp_path, inputs):
    train(inputs, output_dir=tmp_path / "first", max_steps=1, tokenizer="train")
    settings = {"model": tmp_path / "first", "max_steps": 1}
    with pytest.raises(SettingsError, match=r"'bytes' has 257 tokens, .* 300; 43 differ, such as .*own: leave"):
        train(inputs, output_dir=tmp_path / "second", **settings)
    train(inputs, output_dir=tmp_path / "second", tokenizer=tmp_path / "first", **settings)


def test_an_override_that_a_checkpoints_weights_do_not_fit_is_refused(tmp_path, inputs):
    train(inputs, output_dir=tmp_path / "first", max_steps=1)
    words = ["--model_overrides", "num_sub_keys=16"]
    with pytest.raises(SettingsError, match=r"'num_sub_keys': 16.* the weights do not fit") as refused:
        train([*inputs, *words], model=tmp_path / "first", output_dir=tmp_path / "second")
    assert "ignore_mismatched_sizes" not in str(refused.value)


CARD_SNIPPET = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_peer":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""


@pytest.mark.slow
def test_the_cards_own_snippet_runs_where_the_package_is_not_installed(tmp_path, inputs):
    train(inputs, output_dir=tmp_path / "out", max_steps=1)
    snippet = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert 'from_pretrained("out"' in snippet
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    snippet = CARD_SNIPPET + snippet.replace("max_new_tokens=50", "max_new_tokens=5")
    command = [sys.executable, "-c", snippet]
    process = subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-2000:]
    assert "[y/N]" not in process.stdout  # nobody is asked anything
    assert process.stdout.startswith("The ")


def test_without_the_cards_template_nothing_is_trained(tmp_path, inputs, monkeypatch):
    monkeypatch.setattr(model_card, "TEMPLATE", tmp_path / "TEMPLATE.md")  # as where the package is not editable
    with pytest.raises(SettingsError, match=r"no model card template.*Run from a clone"):
        train(inputs, output_dir=tmp_path / "out")


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e30},  # the weights overflow: the next loss is no number
        {"learning_rate": 1e30, "logging_steps": 100, "save_steps": 1},  # seen before it is saved
    ],
)
def test_a_run_that_diverges_ends_with_an_error_and_keeps_what_was_saved(tmp_path, inputs, settings):
    out = tmp_path / "out"
    with pytest.raises(SettingsError, match=r"training diverged: .*Lower --learning_rate"):
        train(inputs, output_dir=out, max_steps=5, **settings)
    assert not (out / "model.safetensors").exists()
    for folder in out.glob("checkpoint-*"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_weight_decay_leaves_the_experts_that_no_token_retrieves(tmp_path, inputs):
    words = [*inputs, "--model_overrides", "num_sub_keys=32", "--weight_decay", "0.9"]
    before = train([*words, "--learning_rate", "0"], output_dir=tmp_path / "before", max_steps=1).model.state_dict()
    after = train(words, output_dir=tmp_path / "after", max_steps=1).model.state_dict()
    for name in (f"model.layers.0.mlp.experts.{table}_embed" for table in ("down", "up")):
        unchanged = (after[name] == before[name]).all(dim=1)
        assert 0 < unchanged.sum() < len(unchanged)


@pytest.mark.parametrize("first_says", [False, True])
def test_the_first_processs_clock_ends_training_for_all(monkeypatch, first_says):
    limit, control = TimeLimit(seconds=-1 if not first_says else 1000), TrainerControl()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda decision, src: decision.fill_(first_says))
    arguments = SimpleNamespace(device="cpu")
    limit.on_train_begin(arguments, None, control)
    limit.on_step_end(arguments, None, control)
    assert control.should_training_stop == first_says


def test_a_folder_that_holds_a_run_is_kept_unless_told(tmp_path, inputs):
    out = tmp_path / "out"
    train(inputs, output_dir=out, max_steps=2, save_steps=1)
    with pytest.raises(SettingsError, match=r"already holds a run.*--resume_from_checkpoint last.*--overwrite_output"):
        train(inputs, output_dir=out, max_steps=1)
    assert (out / "checkpoint-2").is_dir()
    train(inputs, output_dir=out, max_steps=1, overwrite_output_dir=True)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1"]


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path, inputs):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"is a file. Name a folder"):
        train(inputs, output_dir=tmp_path / "file")
    with pytest.raises(SettingsError, match=r"cannot write to --output_dir .*: Not a directory"):
        train(inputs, output_dir=tmp_path / "file" / "below")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o500)
    if not os.access(tmp_path / "locked", os.W_OK):  # root may write anywhere
        with pytest.raises(SettingsError, match=r"cannot write to --output_dir .*: Permission denied"):
            train(inputs, output_dir=tmp_path / "locked")


def test_wikitext_2_trains_from_its_local_files(tmp_path):
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext-2"
    if not folder.is_dir():
        pytest.skip("no WikiText-2 beside the repository (../shared/data/wikitext-2)")
    words = write_inputs(tmp_path)
    words += ["--train_file", str(folder / "valid.txt.xz"), "--validation_file", str(folder / "test.txt.xz")]
    result = train(["wikitext2", *words], output_dir=tmp_path / "out", max_steps=1)
    assert len(result.corpus.documents("train")) == 1
    assert sum(len(text.encode("utf-8")) for text in result.corpus.documents("train")) == 1_121_681
