# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The callback in a plain Trainer: what it counts, when, and who is told."""

import pytest
import reference
import torch
import transformers.trainer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from training_helpers import as_command_line, last_json, run_processes
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_peer import PeerForCausalLM, PeerForSequenceClassification
from modeling_peer.analysis.expert_usage import find_retrievals
from modeling_peer.data.tokenizers import byte_tokenizer
from modeling_peer.training.expert_usage_callback import ExpertUsageCallback

FIGURES = ["expert_usage", "top_1_usage", "unevenness", "dead_experts"]


def some_rows(num_rows, seed=0):
    """Rows of 12 tokens, of which the last few are padding."""
    tokens = torch.randint(1, 99, (num_rows, 12), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(12) < torch.arange(num_rows).remainder(5).unsqueeze(1) + 6).long()
    return [
        {"input_ids": row, "attention_mask": real, "labels": row.masked_fill(real == 0, -100)}
        for row, real in zip(tokens, mask, strict=True)
    ]


@pytest.fixture
def trainer(tiny_config, tmp_path):
    """Builds a Trainer of a model with two sparse layers; keywords are TrainingArguments, or `model` or `callback`."""

    def build(model=None, callback=None, **settings):
        model = model or PeerForCausalLM(tiny_config(mlp_layer_types=["sparse", "dense", "sparse"]))
        defaults = {
            "per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 2, "report_to": "none", "use_cpu": True,
            "disable_tqdm": True, "save_strategy": "no",
        }  # fmt: skip
        return Trainer(
            model,
            TrainingArguments(str(tmp_path), **{**defaults, **settings}),
            train_dataset=some_rows(16),
            eval_dataset=some_rows(5, seed=1),
            callbacks=[callback or ExpertUsageCallback()],
        )

    return build


def record(model):
    """What each layer retrieves from now on, in training and in evaluation: `{(layer, training): [forwards]}`."""
    forwards = {}
    for name, retrieval in find_retrievals(model):

        def keep(module, args, output, name=name):
            gates, expert_ids = (tensor.detach().clone() for tensor in output)
            forwards.setdefault((name, module.training), []).append((gates, expert_ids, args[1]))

        retrieval.register_forward_hook(keep)
    return forwards


def expected(forwards, training, prefix=""):
    return {
        f"{prefix}{figure}_{name}": value
        for name in ("layer_0", "layer_2")
        for figure, value in reference.expert_usage(forwards[name, training], 64).items()
    }


def usage_keys(entry):
    return {key: value for key, value in entry.items() if any(figure in key for figure in FIGURES)}


def test_each_log_has_the_figures_of_the_tokens_since_the_last_one_padding_left_out(trainer):
    trainer = trainer(gradient_accumulation_steps=2)
    forwards = record(trainer.model)
    trainer.train()
    first, second, summary = trainer.state.log_history
    for entry, batches in ((first, slice(0, 4)), (second, slice(4, 8))):  # two steps of two micro-batches each
        window = {layer: seen[batches] for layer, seen in forwards.items()}
        assert usage_keys(entry) == pytest.approx(expected(window, True), rel=1e-5, abs=1e-6)
    assert not usage_keys(summary)


def test_an_evaluation_counts_apart_and_returns_its_figures(trainer):
    trainer = trainer(eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_unevenness_layer_0")
    forwards = record(trainer.model)
    trainer.train()
    assert trainer.state.best_metric is not None
    trained = [entry for entry in trainer.state.log_history if "loss" in entry]
    window = {layer: seen[2:] for layer, seen in forwards.items()}
    assert usage_keys(trained[1]) == pytest.approx(expected(window, True), rel=1e-5, abs=1e-6)

    forwards.clear()
    trainer.predict(trainer.eval_dataset)  # logs nothing, and leaves nothing behind
    forwards.clear()
    metrics = trainer.evaluate(some_rows(3, seed=2), metric_key_prefix="test")
    assert usage_keys(metrics) == pytest.approx(expected(forwards, False, "test_"), rel=1e-5, abs=1e-6)


def test_several_evaluation_sets_have_figures_each(trainer):
    trainer = trainer()
    sets = {"few": some_rows(1), "many": some_rows(5, seed=1)}
    metrics = trainer.evaluate(sets)
    assert metrics["eval_few_dead_experts_layer_0"] > metrics["eval_many_dead_experts_layer_0"]


def test_whoever_trainer_reports_to_is_told_in_time(trainer, monkeypatch):
    told = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.append(dict(logs))

    monkeypatch.setattr(transformers.trainer, "get_reporting_integration_callbacks", lambda report_to: [Reporter])
    trainer(max_steps=2, eval_strategy="steps", eval_steps=2).train()
    assert {f"{figure}_layer_2" for figure in FIGURES} <= set(told[0])
    assert {f"eval_{figure}_layer_2" for figure in FIGURES} <= set(told[1])


@pytest.mark.slow_but_first
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"torch_compile_backend": "aot_eager"}])
def test_every_token_counts_once(trainer, settings):
    callback = ExpertUsageCallback(window_steps=100)
    trainer(callback=callback, max_steps=8, **settings).train()  # all 16 rows
    num_tokens = sum(row["attention_mask"].sum().item() for row in some_rows(16))
    for name in ("layer_0", "layer_2"):
        given = callback.usage[name, True].sums[0].sum().item()
        assert given == pytest.approx(2 * num_tokens)  # the gates of each of two heads sum to 1


@pytest.mark.slow
def test_a_watched_model_compiles_to_one_graph(trainer):
    torch._dynamo.reset()
    callback = ExpertUsageCallback()
    model = trainer(callback=callback).model
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(1, 99, (3, 12))
    for training in (True, False):
        model.train(training)
        for _ in range(2):
            compiled(tokens, labels=tokens, use_cache=False)
        given = callback.usage["layer_2", training].sums[0].sum().item()
        assert given == pytest.approx(2 * 2 * tokens.numel())  # twice, two heads


def test_training_again_counts_nothing_twice(trainer):
    callback = ExpertUsageCallback(window_steps=100)
    trainer = trainer(callback=callback)
    forwards = record(trainer.model)
    trainer.train()
    forwards.clear()
    trainer.train()
    sums = sum((gates * mask[..., None, None]).sum() for gates, _, mask in forwards["layer_0", True])
    torch.testing.assert_close(callback.usage["layer_0", True].sums[0].sum(), sums)


def test_a_window_covers_the_steps_asked_for(trainer):
    trainer = trainer(callback=ExpertUsageCallback(window_steps=3), logging_steps=1, max_steps=7)
    trainer.train()
    reported = [entry["step"] for entry in trainer.state.log_history if usage_keys(entry)]
    assert reported == [3, 6]
    with pytest.raises(ValueError, match="window_steps must be at least 1, got 0"):
        ExpertUsageCallback(window_steps=0)


def test_a_classifier_is_watched_too_and_a_dense_model_has_nothing_to_log(trainer, tiny_config):
    classifier = PeerForSequenceClassification(tiny_config(num_labels=3))
    rows = [{**row, "labels": torch.tensor(1)} for row in some_rows(4)]
    assert "eval_unevenness_layer_1" in trainer(classifier).evaluate(rows)
    dense = trainer(PeerForCausalLM(tiny_config(mlp_layer_types=["dense"] * 3)))
    dense.train()
    assert not any(usage_keys(entry) for entry in dense.state.log_history)


def test_a_model_of_a_checkpoints_own_code_is_watched_by_its_class_names():
    elsewhere = type("PeerRetrieval", (torch.nn.Linear,), {})(1, 1)
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"retrieval": elsewhere})])})
    assert find_retrievals(model) == [("layer_0", elsewhere)]
    assert find_retrievals(torch.nn.ModuleDict({"peer": elsewhere})) == [("peer", elsewhere)]


SCRIPT = """
import json, sys
import torch
from test_expert_usage_callback import some_rows
from transformers import HfArgumentParser, Trainer, TrainingArguments
from modeling_peer import PeerForCausalLM
from modeling_peer.training.expert_usage_callback import ExpertUsageCallback

arguments, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
model = PeerForCausalLM.from_pretrained(arguments.output_dir)
rows = some_rows(8)
trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[ExpertUsageCallback()])
trainer.train()
if trainer.is_world_process_zero():
    print(json.dumps(trainer.state.log_history))
"""


@pytest.mark.slow
def test_the_tokens_of_all_processes_count(tiny_config, tmp_path):
    """At a learning rate of zero and without statistics of batches, every run retrieves the same experts."""
    PeerForCausalLM(tiny_config(query_norm="rms_norm")).save_pretrained(tmp_path)
    words = as_command_line(
        output_dir=tmp_path, max_steps=1, logging_steps=1, learning_rate=0.0, eval_strategy="steps", eval_steps=1,
        report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no", per_device_eval_batch_size=1,
    )  # fmt: skip
    alone, together = (
        last_json(run_processes(n, SCRIPT, *words, f"--per_device_train_batch_size={8 // n}")) for n in (1, 2)
    )
    for one, two in zip(alone[:2], together[:2], strict=True):  # of training, of evaluation
        assert usage_keys(one)
        assert usage_keys(two) == pytest.approx(usage_keys(one), rel=1e-5)


def test_a_model_with_adapters_logs_the_usage_of_its_layers(trainer, tiny_config):
    model = PeerForCausalLM(tiny_config(mlp_layer_types=["sparse", "dense", "sparse"]))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["retrieval"]))
    trainer = trainer(adapted)
    forwards = record(trainer.model)
    trainer.train()
    window = {layer: seen[2:] for layer, seen in forwards.items()}  # the last two steps
    assert usage_keys(trainer.state.log_history[1]) == pytest.approx(expected(window, training=True), rel=1e-5)


@pytest.mark.slow  # TRL takes long to import
def test_the_trainer_of_trl_logs_the_usage_too(tiny_config, tmp_path):
    import trl

    tokenizer = byte_tokenizer()
    model = PeerForCausalLM(tiny_config(vocab_size=len(tokenizer)))
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, logging_steps=1, max_length=32, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", bf16=False,
    )  # fmt: skip
    rows = Dataset.from_dict({"text": ["A line of text to learn from.", "Another line, as plain as that."] * 8})
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[ExpertUsageCallback()]
    )
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert {f"{figure}_layer_1" for figure in FIGURES} <= entry.keys()
        assert 0 < entry["expert_usage_layer_1"] <= 1
