# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""PeerTrainer trains embeddings of other models by rows: `row_sparse_modules`."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_peer.console.errors import SettingsError
from modeling_peer.training import PeerTrainer, PeerTrainingArguments, RowSparseAdamW

TEXT = torch.randint(1, 30, (32, 16), generator=torch.Generator().manual_seed(0))
BLOCKS = [{"input_ids": tokens, "labels": tokens} for tokens in TEXT]


def build_trainer(folder, tied=False, **settings):
    torch.manual_seed(1)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied))
    defaults = {
        "learning_rate": 0.01,
        "max_steps": 4,
        "per_device_train_batch_size": 8,  # of 16 tokens: they read every row
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return PeerTrainer(model, PeerTrainingArguments(str(folder), **(defaults | settings)), train_dataset=BLOCKS)


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_a_llama_trains_as_with_dense_gradients(tmp_path):
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}  # measured and not clipped
    trainers = [build_trainer(tmp_path, row_sparse_modules=names, **settings) for names in (None, ["embed_tokens"])]
    for trainer in trainers:
        trainer.train()
    dense, sparse = trainers
    assert isinstance(sparse.optimizer.optimizer, RowSparseAdamW)
    assert logged(sparse, "loss") == pytest.approx(logged(dense, "loss"), rel=1e-5)
    assert min(logged(sparse, "table_grad_norm")) > 0
    assert not logged(dense, "table_grad_norm")


def test_a_resumed_run_of_a_llama_equals_an_uninterrupted_one_to_the_bit(tmp_path):
    settings = {"row_sparse_modules": ["embed_tokens"], "table_optimizer_state": "row", "save_strategy": "steps"}
    settings |= {"per_device_train_batch_size": 1, "save_steps": 2, "table_learning_rate_multiple": 3.0}
    whole, again = (build_trainer(tmp_path / name, **settings) for name in ("whole", "again"))
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(again, "loss") == logged(whole, "loss")
    for name in ("model.safetensors", "optimizer.pt"):
        whole_file, again_file = (tmp_path / run / "checkpoint-4" / name for run in ("whole", "again"))
        assert whole_file.read_bytes() == again_file.read_bytes(), name
    settings |= {"row_sparse_modules": None, "table_optimizer_state": "float32"}
    other = build_trainer(tmp_path / "other", **settings)
    with pytest.raises(SettingsError, match="row_sparse_modules was \\['embed_tokens'\\], is None"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_modules_that_cannot_be_trained_by_rows_are_refused_with_the_argument(tmp_path):
    with pytest.raises(SettingsError, match=r"--row_sparse_modules embed_tokens: .*shares its weight with lm_head"):
        build_trainer(tmp_path, tied=True, row_sparse_modules=["embed_tokens"]).train()
    with pytest.raises(SettingsError, match=r"--row_sparse_modules tables: LlamaForCausalLM has no module 'tables'"):
        build_trainer(tmp_path, row_sparse_modules=["tables"]).train()
    with pytest.raises(SettingsError, match=r"row needs --row_sparse_gradients true or --row_sparse_modules"):
        build_trainer(tmp_path, table_optimizer_state="row").train()
