# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""docs/finetuning.md: every program in it runs as printed, on a slice of the data it names and on a twin made here."""

import csv
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from training_helpers import REPOSITORY, TINY_PEER, private_cache  # noqa: F401  a fixture
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from modeling_peer import PeerConfig, PeerForCausalLM
from modeling_peer.data.tokenizers import byte_tokenizer

DATA = REPOSITORY.parent / "shared" / "data"
PAGE = (REPOSITORY / "docs" / "finetuning.md").read_text(encoding="utf-8")
NUM_INTENTS = 10
UNTRAINED_LOSS = math.log(TINY_PEER["vocab_size"])  # nats a byte

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("private_cache")]


def run(heading: str) -> dict:
    """Run the program under the heading that ends so, here; what it leaves."""
    (program,) = re.findall(rf"^##+ [^\n]*{heading}\n.*?```python\n(.*?)```", PAGE, flags=re.DOTALL | re.MULTILINE)
    namespace = {}
    exec(compile(program, f"docs/finetuning.md, {heading}", "exec"), namespace)
    return namespace


def final_loss(trainer) -> float:
    return trainer.state.log_history[-1]["eval_loss"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return tmp_path


@pytest.fixture(params=["made here", "banking77"])
def intents(request, folder):
    """Queries of ten intents, 40 and 8 of each, as BANKING77 has them."""
    if request.param == "made here":
        names = [f"intent_{i}" for i in range(NUM_INTENTS)]
        draw = random.Random(0)
        rows = [[f"{draw.choice(['how', 'why'])} {chr(97 + i) * 3} {draw.random():.2f}?", names[i]]
                for i in range(NUM_INTENTS) for _ in range(48)]  # fmt: skip
    else:
        if not (DATA / "banking77").is_dir():
            pytest.skip("no BANKING77 beside the repository (../shared/data/banking77)")
        names = json.loads((DATA / "banking77" / "categories.json").read_text())[:NUM_INTENTS]
        with open(DATA / "banking77" / "train.csv", newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row[1] in names]
    (folder / "banking77").mkdir()
    (folder / "banking77" / "categories.json").write_text(json.dumps(names))
    of_intent = {name: [row for row in rows if row[1] == name] for name in names}
    for split, part in (("train", slice(0, 40)), ("test", slice(40, 48))):
        with open(folder / "banking77" / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [["text", "category"], *(row for name in names for row in of_intent[name][part])]
            )
    return names


@pytest.fixture(params=["made here", "gsm8k"])
def questions(request, folder):
    """48 questions and 8 for evaluation, as GSM8K has them, and a small model to start from."""
    (folder / "gsm8k").mkdir()
    for split, num_rows in (("train", 48), ("test", 8)):
        if request.param == "made here":
            rows = [{"question": f"What is {i} and {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"}
                    for i in range(num_rows)]  # fmt: skip
            lines = [json.dumps(row) for row in rows]
        else:
            if not (DATA / "gsm8k").is_dir():
                pytest.skip("no GSM8K beside the repository (../shared/data/gsm8k)")
            lines = (DATA / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:num_rows]
        (folder / "gsm8k" / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    PeerForCausalLM(PeerConfig(**{**TINY_PEER, "max_position_embeddings": 256})).save_pretrained("runs/quickstart")
    byte_tokenizer().save_pretrained("runs/quickstart")


def test_trainer_makes_a_classifier_that_a_pipeline_runs(intents):
    trainer = run("Trainer")["trainer"]
    accuracy = trainer.evaluate()["eval_accuracy"]
    assert accuracy > 0.5  # chance is 0.1
    classify = pipeline("text-classification", model="runs/banking77")
    with open("banking77/test.csv", newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    answers = [answer["label"] for answer in classify([text for text, _ in rows])]  # one by one: no padding
    right = sum(answer == intent for answer, (_, intent) in zip(answers, rows, strict=True))
    assert right / len(rows) == pytest.approx(accuracy, abs=1.5 / len(rows))  # a tie may fall either way
    model = AutoModelForSequenceClassification.from_pretrained("runs/banking77")
    assert [model.config.id2label[i] for i in range(NUM_INTENTS)] == intents


def test_trl_trains_the_answers(questions):
    trainer = run("TRL")["trainer"]
    assert final_loss(trainer) < UNTRAINED_LOSS - 1
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0]
    learned = AutoTokenizer.from_pretrained("runs/gsm8k").decode(labels[labels != -100])
    answers = [
        json.loads(line)["answer"] + "<|endoftext|>" for line in Path("gsm8k/train.jsonl").read_text().splitlines()
    ]
    assert learned
    assert any(answer.startswith(learned) for answer in answers)  # a long one is cut off
    assert isinstance(AutoModelForCausalLM.from_pretrained("runs/gsm8k"), PeerForCausalLM)


@pytest.fixture
def trained(folder):
    """A folder with a small model whose running statistics have learned, and its tokenizer."""
    tokenizer = byte_tokenizer()
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = PeerForCausalLM(PeerConfig(**{**TINY_PEER, "vocab_size": len(tokenizer), **special})).train()
    for _ in range(5):
        model(torch.randint(1, 250, (8, 24)))
    model.save_pretrained("trained")
    tokenizer.save_pretrained("trained")
    return model


def test_dpo_starts_at_log_2_since_policy_and_reference_are_one_function(trained):
    rows = [{"prompt": f"q {i} ", "chosen": f"good answer {i}", "rejected": "bad" * (1 + i % 3)} for i in range(8)]
    settings = trl.DPOConfig(
        "runs/dpo", max_steps=2, learning_rate=0.0, per_device_train_batch_size=4, logging_steps=1, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        PeerForCausalLM.from_pretrained("trained"), None, settings, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained("trained"),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-4)  # they are logged to four digits


@pytest.mark.parametrize("source", ["loaded", "as it is"])
def test_grpo_leaves_the_statistics_of_evaluation_alone(trained, source):
    """Between its steps it generates in training mode. A model that still learns is taught by the steps alone, and
    there is none before the first generation."""
    model = PeerForCausalLM.from_pretrained("trained") if source == "loaded" else trained
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    generated = []
    settings = trl.GRPOConfig(
        "runs/grpo", max_steps=2, learning_rate=0.0, per_device_train_batch_size=4, num_generations=2, use_cpu=True,
        max_completion_length=8, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
    )  # fmt: skip

    def reward(completions, **kwargs):
        # right after generation
        generated.append([torch.equal(value, before[name]) for name, value in model.named_buffers() if name in before])
        return [float(len(text)) for text in completions]

    trainer = trl.GRPOTrainer(
        model, reward, settings, train_dataset=Dataset.from_list([{"prompt": f"q {i}"} for i in range(8)]),
        processing_class=AutoTokenizer.from_pretrained("trained"),
    )  # fmt: skip
    trainer.train()
    assert all(generated[0])
    if source == "loaded":
        assert all(all(same) for same in generated)


def test_peft_trains_an_adapter_that_loads_and_merges(questions):
    trainer = run("PEFT")["trainer"]
    assert final_loss(trainer) < UNTRAINED_LOSS - 0.1  # embeddings stay untrained; measured: 0.16 less on GSM8K
    tokens = byte_tokenizer()("What is 3 and 4?", return_tensors="pt").input_ids
    adapted = AutoPeftModelForCausalLM.from_pretrained("runs/lora").eval()
    merged = AutoModelForCausalLM.from_pretrained("runs/merged").eval()
    with torch.no_grad():
        expected = adapted(input_ids=tokens).logits
        torch.testing.assert_close(merged(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    size = Path("runs/lora/adapter_model.safetensors").stat().st_size
    assert size < Path("runs/merged/model.safetensors").stat().st_size


def test_what_an_adapter_of_a_table_costs_is_printed(capsys):
    run("table costs")
    printed = capsys.readouterr().out
    if printed.count("MiB\n") != 3:
        pytest.skip(f"no peak memory here: {printed}")
    modules, adapters, tables = map(int, re.findall(r"(\d+) MiB\n", printed))
    assert adapters > modules + 4 * 16 * 0.9  # two tables of 16 MiB, twice each
    assert tables < adapters
