# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What Trainer and Accelerate can be asked for, asked of a PEER model."""

import shutil

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from modeling_peer import PeerForCausalLM


def losses_of(model, folder, **options):
    """Three steps of Trainer on the CPU; the loss of each."""
    draw = torch.Generator().manual_seed(0)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(1, 99, (32, 12), generator=draw)]
    settings = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    trainer = Trainer(
        model, TrainingArguments(folder, disable_tqdm=True, **{**settings, **options}), train_dataset=data
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"auto_find_batch_size": True}, 0.0),
        ({"gradient_checkpointing": True}, 1e-6),
        ({"bf16": True}, 0.02),  # measured: 0.006 of 4.6
        ({"torch_compile": True, "torch_compile_backend": "eager"}, 1e-4),
        ({"neftune_noise_alpha": 5, "label_smoothing_factor": 0.1}, 0.1),
    ],
    ids=str,
)
def test_trainer_options_change_the_loss_no_more_than_they_say(tiny_config, tmp_path, options, tolerance):
    losses = []
    for chosen in ({}, options):
        torch.manual_seed(0)
        losses.append(losses_of(PeerForCausalLM(tiny_config()), tmp_path, **chosen))
    torch.testing.assert_close(losses[1], losses[0], atol=tolerance, rtol=0)


@pytest.mark.slow
def test_trainer_compiles_a_step_with_inductor(tiny_config, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler (g++) for inductor")
    config = tiny_config(num_hidden_layers=1)
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        losses.append(losses_of(PeerForCausalLM(config), tmp_path, torch_compile=compiled, max_steps=1))
    torch.testing.assert_close(losses[1], losses[0], atol=1e-4, rtol=0)


class TestLayersOnDisk:
    DEVICES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"} | dict.fromkeys(
        ["model.layers.2", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )

    @pytest.fixture
    def model(self, tiny_config, tmp_path):
        model = PeerForCausalLM(tiny_config()).train()
        model(torch.randint(1, 99, (3, 12)))  # running statistics that are not the initial ones
        model.eval().save_pretrained(tmp_path / "model")
        return model

    @pytest.mark.parametrize("where", [DEVICES, {"": "disk"}], ids=["a layer", "everything"])
    def test_from_pretrained_leaves_layers_on_disk_and_computes_the_same(self, model, tmp_path, where):
        offloaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=where, offload_folder=tmp_path / "disk"
        )
        assert offloaded.model.layers[1].mlp.experts.down_embed.device.type == "meta"
        tokens = torch.randint(1, 99, (2, 9))
        assert torch.equal(offloaded(tokens).logits, model(tokens).logits)

    def test_accelerates_own_loader_does_so_when_it_keeps_the_buffers(self, model, tmp_path):
        # without `offload_buffers` it forgets the statistics of every BatchNorm that it leaves on disk
        with init_empty_weights():
            empty = PeerForCausalLM(model.config)
        offloaded = load_checkpoint_and_dispatch(
            empty, tmp_path / "model", self.DEVICES, offload_folder=tmp_path / "disk", offload_buffers=True
        ).eval()
        tokens = torch.randint(1, 99, (2, 9))
        assert torch.equal(offloaded(tokens).logits, model(tokens).logits)
