# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""EleutherAI's lm-evaluation-harness scores checkpoints as the model itself and `peer evaluate` do, with this package
and without it."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from training_helpers import REPOSITORY
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling_peer import PeerConfig, PeerForCausalLM
from modeling_peer.data.tokenizers import byte_tokenizer
from modeling_peer.evaluation.checkpoints import EvaluationArguments, evaluate_checkpoint

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not in this package's extras: pip install lm_eval")

WITHOUT_PACKAGE = "import sys; sys.modules['modeling_peer'] = None; "
HARNESS = "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
CHOICES = ["red", "a blue one", "green", "none of these"]
QUESTIONS = [{"question": f"Which is number {i}?", "choices": CHOICES, "answer": i % 4} for i in range(12)]
SHIPPED = REPOSITORY / "examples" / "checkpoints" / "peer_bytes"
HELD_OUT = SHIPPED.parent / "held_out.txt"
# each fits into a window of 256 bytes: the harness and `peer evaluate` then score each byte given the same ones
PARAGRAPHS = [text for text in HELD_OUT.read_text(encoding="utf-8").split("\n\n") if 100 < len(text.encode()) < 250]
PAGES = [{"page": text} for text in PARAGRAPHS[:12]]
# a task of each kind; `{folder}` is where the questions are
CHOICE_TASK = """
task: local_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/questions.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
"""
PERPLEXITY_TASK = """
task: local_perplexity
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/pages.jsonl
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks, and the checkpoints of a PEER model, of a Llama of its sizes, and of the trained model with its code."""
    folder = tmp_path_factory.mktemp("harness")
    for name, rows in (("questions", QUESTIONS), ("pages", PAGES)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, task in (("choices", CHOICE_TASK), ("perplexity", PERPLEXITY_TASK)):
        (folder / "tasks" / f"{name}.yaml").write_text(task.format(folder=folder))
    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    sizes |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sparse = {"num_sub_keys": 8, "num_retrieval_heads": 2, "num_experts_per_head": 4, "query_dim": 16}
    # weights large enough to tell answers apart
    torch.manual_seed(0)
    PeerForCausalLM(PeerConfig(**sizes, **sparse, initializer_range=0.3)).save_pretrained(folder / "peer")
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).save_pretrained(folder / "llama")
    for name in ("peer", "llama"):
        tokenizer.save_pretrained(folder / name)
    PeerForCausalLM.from_pretrained(SHIPPED).save_pretrained(folder / "peer_bytes")
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(folder / "peer_bytes")
    return folder


@torch.no_grad()
def log_likelihood(model, tokenizer, context, text):
    """Of the tokens of `text` after `context`, both given as text, summed."""
    tokens = tokenizer(context + text, return_tensors="pt").input_ids
    num_context = len(tokenizer(context).input_ids)
    scores = model(tokens).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(-1, tokens[0, 1:, None]).squeeze(-1)[num_context - 1 :].sum().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "has_package"), [("llama", True), ("peer", True), ("peer", False), ("peer_bytes", False)]
)
def test_scores_are_those_of_the_model(folder, tmp_path, kind, has_package):
    command = [sys.executable, "-c", ("" if has_package else WITHOUT_PACKAGE) + HARNESS]
    command += ["--model", "hf", "--model_args", f"pretrained={folder / kind},trust_remote_code=True,dtype=float32"]
    command += ["--tasks", "local_choices,local_perplexity", "--include_path", str(folder / "tasks")]
    command += ["--device", "cpu", "--batch_size", "4", "--output_path", str(tmp_path / "out")]
    caches = {name: str(tmp_path / name) for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE")}
    environment = {**os.environ, **caches, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]

    model, tokenizer = (auto.from_pretrained(folder / kind) for auto in (AutoModelForCausalLM, AutoTokenizer))
    best = []
    for row in QUESTIONS:
        prompt = f"Question: {row['question']}\nAnswer:"
        scores = [log_likelihood(model, tokenizer, prompt, f" {choice}") for choice in row["choices"]]
        best.append(scores.index(max(scores)) == row["answer"])
    assert results["local_choices"]["acc,none"] == pytest.approx(sum(best) / len(best))
    pages = [row["page"] for row in PAGES]
    total = sum(log_likelihood(model, tokenizer, tokenizer.eos_token, page) for page in pages)
    bits = -total / math.log(2) / sum(len(page.encode()) for page in pages)
    assert results["local_perplexity"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    arguments = EvaluationArguments(model=str(folder / kind), file=str(folder / "pages.jsonl"), text_column="page")
    own = evaluate_checkpoint(arguments)
    assert results["local_perplexity"]["bits_per_byte,none"] == pytest.approx(own["bits_per_byte"], rel=1e-4)
    # a token is a byte
    assert results["local_perplexity"]["byte_perplexity,none"] == pytest.approx(own["perplexity"], rel=1e-4)
    print(done.stdout)
