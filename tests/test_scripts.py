# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The scripts as a user runs them: each in a process of its own."""

import json
import shutil

import pytest
from training_helpers import (
    REPOSITORY,
    TINY_LLAMA,
    TINY_PEER,
    last_json,
    private_cache,  # noqa: F401  a fixture
    run_script,
    some_text,
    train,
    write_inputs,
)

from modeling_peer.console import scripts as console
from modeling_peer.console.command_line import parse_arguments
from modeling_peer.console.errors import SettingsError
from modeling_peer.costs.show_costs import CostArguments, show_costs
from modeling_peer.data.tokenizers import train_byte_level_bpe
from modeling_peer.evaluation.checkpoints import EvaluationArguments, evaluate_checkpoint
from modeling_peer.evaluation.generation import GenerationArguments, generate_from_checkpoint
from modeling_peer.training import quickstart
from modeling_peer.training.quickstart import QuickstartFailed, run_quickstart
from modeling_peer.training.recipe import parse_recipe

pytestmark = pytest.mark.usefixtures("private_cache")
TRAINING_SCRIPTS = (
    "train_lm",
    "compare_feed_forwards",
    "evaluate_lm",
    "generate_text",
    "quantise_tables",
    "quickstart",
    "list_presets",
    "show_costs",
    "export_model",
)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "new_process"), [(TINY_PEER, True), (TINY_LLAMA, False)], ids=["peer", "llama"])
def test_a_saved_checkpoint_scores_as_training_measured_it(tmp_path, config, new_process):
    words = write_inputs(tmp_path, config)
    (tmp_path / "held_out.txt").write_text(some_text(200, seed=1))
    words += ["--validation_file", str(tmp_path / "held_out.txt")]
    summary = train(words, output_dir=tmp_path / "out", max_steps=5).summary
    words = ["--model", str(tmp_path / "out"), "--file", str(tmp_path / "held_out.txt"), "--max_bytes", "500"]
    words += ["--context_length", "32", "--output_file", str(tmp_path / "results.json")]
    if new_process:
        result = last_json(run_script("evaluate_lm.py", *words))
    else:
        result = evaluate_checkpoint(parse_arguments(EvaluationArguments, words))
    assert result == json.loads((tmp_path / "results.json").read_text())
    for name in ("perplexity", "bits_per_byte", "num_tokens", "num_bytes"):
        assert result[name] == pytest.approx(summary[f"validation_{name}"], rel=1e-5)


def test_the_script_generates_from_every_prompt_and_the_seed_repeats_it(tmp_path):
    train(write_inputs(tmp_path), output_dir=tmp_path / "out", max_steps=5)
    options = {"model": str(tmp_path / "out"), "max_new_tokens": 8}
    words = ["--model", options["model"], "--prompt", "the ", "caf", "--max_new_tokens", "8"]
    texts = last_json(run_script("generate_text.py", *words))["texts"]
    assert [text[:3] for text in texts] == ["the", "caf"]
    assert generate_from_checkpoint(GenerationArguments(prompt=["the ", "caf"], **options))["texts"] == texts
    other = generate_from_checkpoint(GenerationArguments(prompt=["the ", "caf"], seed=1, **options))
    assert other["texts"] != texts
    greedy = [
        generate_from_checkpoint(GenerationArguments(temperature=0, seed=seed, **options))["texts"] for seed in (1, 2)
    ]
    assert greedy[0] == greedy[1]  # and the prompt may be left out
    with pytest.raises(SettingsError, match=r"max_new_tokens \(63\) exceed the model's 64 positions"):
        generate_from_checkpoint(GenerationArguments(prompt=["ab"], model=options["model"], max_new_tokens=63))


def test_a_mistake_is_one_line_and_exit_status_two(capsys):
    with pytest.raises(SystemExit) as stopped:
        console.run_script(lambda: parse_recipe(["quickstart", "--learning-rat", "1"]))
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "error: unknown argument '--learning-rat'. Did you mean 'learning_rate'?\n"


def test_only_the_first_process_prints_the_result_and_never_nan(capsys, monkeypatch):
    console.run_script(lambda: {"a": 1})
    monkeypatch.setenv("RANK", "1")  # as torchrun sets it
    console.run_script(lambda: {"a": 2})
    assert capsys.readouterr().out == '{"a": 1}\n'
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="not JSON compliant"):
        console.run_script(lambda: {"a": float("nan")})


def test_what_cannot_be_evaluated_is_refused_before_it_is_scored(tmp_path):
    train(write_inputs(tmp_path), output_dir=tmp_path / "out", max_steps=1)
    settings = {"model": str(tmp_path / "out"), "file": str(tmp_path / "text.txt"), "max_bytes": 50}
    (tmp_path / "large").mkdir()
    train_byte_level_bpe([some_text()], 300).save_pretrained(tmp_path / "large")
    cases = {
        r"must be one of auto, .*got 'bfloat61'.*Did you mean 'bfloat16'\?": {"dtype": "bfloat61"},
        r"--output_file .*: Is a directory": {"output_file": str(tmp_path)},
        r"--output_file .*: No such file": {"output_file": str(tmp_path / "no" / "such")},
        r"has 300 tokens, the one of .* 257; 43 differ": {"tokenizer": str(tmp_path / "large")},
    }
    for message, wrong in cases.items():
        with pytest.raises(SettingsError, match=message):
            evaluate_checkpoint(EvaluationArguments(**{**settings, **wrong}))
    for name in ("tokenizer.json", "tokenizer_config.json"):  # the checkpoint's own does not fit it either
        shutil.copy(tmp_path / "large" / name, tmp_path / "out" / name)
    with pytest.raises(SettingsError, match="tokenizer has 300 tokens, the model 257 embeddings"):
        evaluate_checkpoint(EvaluationArguments(**settings))
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(SettingsError, match=r"cannot load .*out'"):
        evaluate_checkpoint(EvaluationArguments(**settings))


def test_a_quickstart_that_is_resumed_overwrites_nothing(monkeypatch):
    monkeypatch.setattr(quickstart, "train_language_model", lambda recipe: recipes.append(recipe) or 1 / 0)
    recipes = []
    for words in ([], ["--resume_from_checkpoint", "last"]):
        with pytest.raises(ZeroDivisionError):
            run_quickstart(words)
    assert [recipe.run.overwrite_output_dir for recipe in recipes] == [True, False]


def test_the_quickstart_goes_through_and_fails_when_a_baseline_is_not_beaten(tmp_path):
    # the same steps on a model and a text so small that it takes seconds
    words = ["--model_overrides", "hidden_size=32", "intermediate_size=64", "num_sub_keys=8", "query_dim=16"]
    words += ["num_attention_heads=2", "num_hidden_layers=2"]
    words += ["--train_file", str(REPOSITORY / "modeling_peer" / "training"), "--tokenizer_vocab_size", "400"]
    words += ["--output_dir", str(tmp_path / "out"), "--max_evaluation_bytes", "3000", "--eval_strategy", "no"]
    words += ["--warmup_steps", "10", "--learning_rate", "0.01", "--use_cpu", "true", "--report_to", "none"]
    result = run_quickstart([*words, "--max_steps", "100"])
    bits = result["bits_per_byte"]
    assert bits["trained"] < bits["unigram"] < bits["untrained"]
    assert {"seconds", "tokens", "parameters", "versions", "path"} <= set(result)
    with pytest.raises(QuickstartFailed, match="not better"):
        run_quickstart([*words, "--max_steps", "1"])


@pytest.mark.parametrize("name", TRAINING_SCRIPTS)
def test_a_script_opens_with_the_command_to_copy(name):
    text = (REPOSITORY / "scripts" / f"{name}.py").read_text()
    assert f"python scripts/{name}.py" in text.split('"""')[1]
    assert len(text.splitlines()) < 40  # the logic is in the package


def test_costs_are_printed_by_part_and_the_budget_is_that_of_the_dense_twin(capsys):
    words = ["--model", "peer_tiny", "--model_overrides", "sparse_mlp=top_k_moe", "--sequence_length", "64"]
    result = show_costs(parse_arguments(CostArguments, [*words, "--fit", "flops"]))
    dense = ["--model", "peer_tiny", "--model_overrides", 'mlp_layer_types=["dense","dense","dense","dense"]']
    twin = show_costs(parse_arguments(CostArguments, [*dense, "--sequence_length", "64"]))
    assert result["fields"] == {"moe_intermediate_size": 176}  # half the dense width, two experts a token
    assert result["ratio"] == pytest.approx(
        result["total"]["forward_flops"] / twin["total"]["forward_flops"], abs=1e-6
    )
    assert sum(part["forward_flops"] for part in result["parts"].values()) == result["total"]["forward_flops"]
    assert f"| all | {result['total']['parameters']:,} |" in capsys.readouterr().out
    with pytest.raises(SettingsError, match="num_sub_keys does not change the flops"):
        show_costs(parse_arguments(CostArguments, [*words, "--fit", "flops", "--knobs", "num_sub_keys"]))
    with pytest.raises(SettingsError, match=r"--fit \(energy\) must be one of flops, parameters, time"):
        parse_arguments(CostArguments, ["--fit", "energy"])


@pytest.mark.slow
def test_the_plain_loop_learns_and_says_what_it_cannot_resume(tmp_path):
    words = [*write_inputs(tmp_path), "--row_sparse_gradients", "true", "--output_dir", str(tmp_path / "out")]
    process = run_script("train_lm_accelerate.py", *words, "--max_steps", "40", "--logging_steps", "20")
    result = last_json(process)
    assert result["train_loss"] < 4
    assert result["tokens"] == 40 * 4 * 32
    assert "step 20 of 40: loss" in process.stdout
    assert evaluate_checkpoint(EvaluationArguments(model=result["path"], file=str(tmp_path / "text.txt")))
    process = run_script("train_lm_accelerate.py", *words, "--resume_from_checkpoint", "last")
    assert process.stderr.splitlines()[-1].startswith("error: nothing to resume: no checkpoint-* in")
