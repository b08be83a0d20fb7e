# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What must hold on every release of Transformers, in about a minute: `run.py` runs this file in one environment each.

RELEASE_RESULTS, a path, receives logits and generated tokens, which `run.py` compares between releases.
"""

import copy
import logging
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from modeling_peer import PeerConfig, PeerForCausalLM, PeerForMaskedLM

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
RETRIEVAL = {"num_sub_keys": 8, "num_retrieval_heads": 2, "num_experts_per_head": 4, "query_dim": 16}
CAUSAL = ("llama", "peer", "product_key_memory", "hashed_memory", "top_k_moe", "expert_choice_moe", "multilinear_moe")
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
PROMPT = torch.tensor([[5, 17, 3, 88, 41, 60], [9, 2, 73, 11, 30, 4]])
LONG = torch.arange(2 * 24).view(2, 24) * 37 % 98 + 1

_results = {}


@pytest.fixture(scope="module", autouse=True)
def _keep_results():
    yield
    if path := os.environ.get("RELEASE_RESULTS"):
        save_file({name: value.clone().contiguous() for name, value in _results.items()}, path)


@pytest.fixture(autouse=True)
def warnings_of_transformers():
    """What Transformers logs as a warning: a deprecated name that we use would be there."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    torch.manual_seed(0)
    yield messages
    logger.removeHandler(handler)
    assert not [message for message in messages if "deprecated" in message]


def build(name, **overrides):
    """A model whose weights do not depend on the order in which a release draws them."""
    if name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, **overrides))
    else:
        masked = {"is_causal": False} if name == "soft_moe" else {}
        config = PeerConfig(sparse_mlp=name, **SIZES, **RETRIEVAL, **masked, **overrides)
        model = (PeerForMaskedLM if masked else PeerForCausalLM)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def greedy_by_hand(model, tokens, mask=None):
    for _ in range(GREEDY["max_new_tokens"]):
        logits = model(tokens, attention_mask=mask, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
    return tokens


@pytest.mark.parametrize("name", [*CAUSAL, "soft_moe"])
@torch.no_grad()
def test_forward(name):
    logits = build(name)(LONG).logits
    assert torch.isfinite(logits).all()
    _results[f"logits/{name}"] = logits


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_greedy_with_a_cache(name):
    model = build(name)
    mask = torch.ones_like(PROMPT)
    expected = greedy_by_hand(model, PROMPT)
    assert torch.equal(model.generate(PROMPT, attention_mask=mask, **GREEDY), expected)
    assert torch.equal(model.generate(PROMPT, attention_mask=mask, use_cache=False, **GREEDY), expected)
    _results[f"greedy/{name}"] = expected


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_beams(name):
    model, options = build(name), {**GREEDY, "num_beams": 3, "attention_mask": torch.ones_like(PROMPT)}
    with_cache = model.generate(PROMPT, **options)
    assert torch.equal(with_cache, model.generate(PROMPT, use_cache=False, **options))
    _results[f"beams/{name}"] = with_cache


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_static_cache(name):
    model, options = build(name), {**GREEDY, "cache_implementation": "static", "disable_compile": True}
    generated = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **options)
    assert torch.equal(generated, greedy_by_hand(model, PROMPT))


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_left_padding(name):
    model = build(name)
    padded = torch.nn.functional.pad(PROMPT[:1], (4, 0))
    mask = (padded != 0).long()
    assert torch.equal(
        model.generate(padded, attention_mask=mask, **GREEDY)[:, 4:],
        model.generate(PROMPT[:1], attention_mask=mask[:, 4:], **GREEDY),
    )


@pytest.mark.parametrize("name", [*CAUSAL[1:], "soft_moe"])
@torch.no_grad()
def test_save_and_load_with_the_package(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(LONG).logits, model(LONG).logits)
    if name != "soft_moe":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is PeerForCausalLM


_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["modeling_peer"] = None
import torch, transformers
from safetensors.torch import save_file
auto = transformers.AutoModelForMaskedLM if sys.argv[3] == "soft_moe" else transformers.AutoModelForCausalLM
model = auto.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokens = torch.arange(2 * 24).view(2, 24) * 37 % 98 + 1
with torch.no_grad():
    results = {"logits": model(tokens).logits}
    if model.config.is_causal:
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        results["greedy"] = model.generate(tokens[:, :6].contiguous(), attention_mask=torch.ones(2, 6), **options)
        model.save_pretrained(sys.argv[1] + "-again")
save_file(results, sys.argv[2])
"""


@pytest.mark.parametrize("name", [*CAUSAL[1:], "soft_moe"])
@torch.no_grad()
def test_remote_code_without_the_package(name, tmp_path):
    model, folder = build(name), tmp_path / "model"
    model.save_pretrained(folder)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _WITHOUT_THE_PACKAGE, str(folder), str(tmp_path / "results"), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    results = load_file(tmp_path / "results")
    scale = model(LONG).logits.abs().max()
    assert (results["logits"] - model(LONG).logits).abs().max() <= 1e-5 * scale
    if "greedy" in results:
        assert torch.equal(results["greedy"], greedy_by_hand(model, LONG[:, :6]))
        again = PeerForCausalLM.from_pretrained(f"{folder}-again").eval()
        assert torch.equal(again(LONG).logits, model(LONG).logits)


class _Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        row = LONG[index % 2] * (index + 1) % 98 + 1
        return {"input_ids": row, "labels": row}


@pytest.mark.parametrize("name", ["peer", "top_k_moe"])
@pytest.mark.parametrize("kind", ["Trainer", "PeerTrainer"])
def test_trainer_resumes(name, kind, tmp_path):
    trainer_class = Trainer
    if kind == "PeerTrainer":
        trainer_class = pytest.importorskip("modeling_peer.training").PeerTrainer

    def train(model, folder, steps, resume=None):
        settings = {"report_to": "none", "use_cpu": True, "per_device_train_batch_size": 4, "disable_tqdm": True}
        settings |= {"max_steps": steps, "save_steps": 2, "logging_steps": 1, "lr_scheduler_type": "constant"}
        arguments = TrainingArguments(str(tmp_path / folder), **settings)
        trainer = trainer_class(model, arguments, train_dataset=_Rows())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    model = build(name).train()
    begun, whole = copy.deepcopy(model), copy.deepcopy(model)
    train(begun, "begun", 2)
    resumed = train(copy.deepcopy(model), "begun", 4, resume=str(tmp_path / "begun" / "checkpoint-2"))
    straight = train(whole, "whole", 4)
    assert resumed.state.global_step == straight.state.global_step == 4
    for key, weight in whole.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], weight), key
    if kind == "PeerTrainer" and name == "peer":  # the hooks that it overrides were called
        assert all("table_grad_norm" in entry for entry in straight.state.log_history if "grad_norm" in entry)


def test_label_smoothing_shifts_the_labels(tmp_path):
    model = build("peer")
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=1e-6, report_to="none", use_cpu=True)
    smoothed = Trainer(model, arguments).compute_loss(model, {"input_ids": LONG, "labels": LONG.clone()})
    plain = model(LONG, labels=LONG).loss
    assert abs(smoothed - plain) <= 1e-4 * plain


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model = build("peer")
    expected = model(LONG).logits.detach()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "query_proj"], task_type="CAUSAL_LM")
    )
    torch.testing.assert_close(adapted(LONG).logits, expected)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    adapted(LONG, labels=LONG).loss.backward()
    optimizer.step()
    adapted.eval()
    changed = adapted(LONG).logits.detach()
    assert not torch.equal(changed, expected)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("peer"), tmp_path).eval()
    assert torch.equal(loaded(LONG).logits, changed)
    generated = loaded.generate(input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), **GREEDY)
    assert torch.equal(generated, greedy_by_hand(loaded, PROMPT))


def test_this_is_the_release_that_was_asked_for():
    assert transformers.__version__.startswith(os.environ.get("RELEASE", ""))
