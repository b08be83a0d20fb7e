# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A training of a sharded model that is interrupted and resumed is the one that nobody disturbed."""

import errno
import os
from pathlib import Path

import pytest
import torch
from cpu_as_device import take_cpus_for_devices
from rank_groups import run_ranks
from torch.distributed.checkpoint import FileSystemWriter
from training_helpers import logged_losses
from transformers.distributed import DistributedConfig

from modeling_peer import PeerForCausalLM
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.run_files import list_checkpoints
from modeling_peer.training import PeerTrainer, PeerTrainingArguments, sharded_checkpoints
from modeling_peer.training.checkpoint_folders import find_damage

if "ep_size" not in DistributedConfig.__dataclass_fields__:
    pytest.skip("Transformers of this age saves no optimizer that can be resumed sharded", allow_module_level=True)

TEXT = torch.randint(1, 100, (64, 12), generator=torch.Generator().manual_seed(1))
BLOCKS = [{"input_ids": tokens, "labels": tokens} for tokens in TEXT]
OWN_TOKENS = {"fsdp_size": 2, "ep_size": 2}
SAME_TOKENS = {"tp_size": 2}
BOTH = {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}


def train(start: Path, out: Path, sizes: dict | None, resume_from: str | bool | None = None, **settings) -> None:
    """Steps of 8 sequences, of a model sharded over the processes that call this, or whole in this one."""
    options = {}
    if sizes:
        take_cpus_for_devices()
        os.environ |= {"LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"], "MASTER_ADDR": "127.0.0.1"}
        options["distributed_config"] = DistributedConfig(**sizes)
    model = PeerForCausalLM.from_pretrained(start, **options)
    defaults = {
        "per_device_train_batch_size": 8 // (sizes or {}).get("fsdp_size", 1),
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-5,  # a gradient of nothing but rounding is no step of the whole learning rate
        "lr_scheduler_type": "linear",
        "table_learning_rate_multiple": 4.0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = PeerTrainer(model, PeerTrainingArguments(str(out), **(defaults | settings)), train_dataset=BLOCKS)
    trainer.train(resume_from)
    trainer.save_state()


@pytest.fixture
def start(tmp_path, tiny_config):
    """Saves a new model with these fields; the folder."""

    def save(**fields):
        sizes = {"num_key_value_heads": 4, "vocab_size": 100, "query_norm": "rms_norm"}  # that ranks can share out
        PeerForCausalLM(tiny_config(**sizes, **fields)).save_pretrained(tmp_path / "start")
        return tmp_path / "start"

    return save


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return PeerForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        # dropout: a step needs the random numbers it would have had
        (OWN_TOKENS, {"expert_dropout": 0.1}),
        (SAME_TOKENS, {"expert_dropout": 0.1}),
        (SAME_TOKENS, {"share_expert_tables": True, "mlp_layer_types": ["sparse"] * 3, "tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_a_resumed_run_of_two_processes_is_the_undisturbed_one(tmp_path, start, sizes, fields):
    folder = start(**fields)
    run_ranks(2, tmp_path, train, folder, tmp_path / "whole", sizes)
    assert find_damage(tmp_path / "whole" / "checkpoint-2") is None
    run_ranks(2, tmp_path, train, folder, tmp_path / "resumed", sizes, str(tmp_path / "whole" / "checkpoint-2"))
    assert logged_losses(tmp_path / "resumed") == logged_losses(tmp_path / "whole")
    whole, resumed = (tmp_path / name / "checkpoint-6" for name in ("whole", "resumed"))
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.distcp"))
    assert len(files) == 2, "each process writes its part of the optimizer's state"
    for name in ("model.safetensors", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth", *files):
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (OWN_TOKENS, BOTH),
        (BOTH, SAME_TOKENS),
        (BOTH, None),
    ],
    ids=str,
)
def test_a_run_is_resumed_on_another_number_of_processes(tmp_path, start, before, after):
    folder, last = start(), str(tmp_path / "many" / "checkpoint-4")
    train(folder, tmp_path / "whole", None)
    run_ranks(num_ranks(before), tmp_path, train, folder, tmp_path / "many", before)
    if after:
        run_ranks(num_ranks(after), tmp_path, train, folder, tmp_path / "resumed", after, last)
    else:
        train(folder, tmp_path / "resumed", None, last)
    losses = [logged_losses(tmp_path / name) for name in ("resumed", "whole")]
    torch.testing.assert_close(*losses, rtol=0, atol=3e-6)  # measured 5e-7
    resumed, whole = (weights(tmp_path / name / "checkpoint-6") for name in ("resumed", "whole"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=2e-6)  # measured 3e-7


def num_ranks(sizes):
    return sizes.get("tp_size", 1) * sizes.get("fsdp_size", 1)


def fail_to_save(start: Path, out: Path, sizes: dict) -> str:
    """The disk of the second process is full at the second save."""
    write_data = FileSystemWriter.write_data

    def write(self, *args, **kwargs):
        if os.environ["RANK"] == "1" and "checkpoint-4" in str(self.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_data(self, *args, **kwargs)

    FileSystemWriter.write_data = write
    try:
        with pytest.raises(SettingsError) as error:
            train(start, out, sizes)
    finally:
        FileSystemWriter.write_data = write_data
    return str(error.value)


@pytest.mark.slow
def test_a_part_that_cannot_be_written_leaves_the_checkpoint_before(tmp_path, start):
    folder, out = start(), tmp_path / "out"
    for told in run_ranks(2, tmp_path, fail_to_save, folder, out, OWN_TOKENS):
        assert "checkpoint-4: RuntimeError" in told
        assert "No space left on device" in told
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-2"]
    run_ranks(2, tmp_path, train, folder, out, OWN_TOKENS, True)
    assert find_damage(out / "checkpoint-6") is None


def resume_from_whole(start: Path, out: Path, sizes: dict) -> str:
    with pytest.raises(SettingsError) as error:
        train(start, out, sizes, str(out / "checkpoint-2"))
    return str(error.value)


@pytest.mark.slow
def test_a_sharded_run_does_not_resume_one_that_was_not(tmp_path, start):
    folder, out = start(), tmp_path / "out"
    train(folder, out, None, max_steps=2)
    for told in run_ranks(2, tmp_path, resume_from_whole, folder, out, OWN_TOKENS):
        assert "Resume without sharding, or start a new run with its weights" in told


def test_what_could_not_be_resumed_is_refused_before_the_first_step(tmp_path, start, monkeypatch):
    monkeypatch.setattr(sharded_checkpoints, "save_optimizer_distributed", None)  # as in Transformers before 5.23
    model = PeerForCausalLM.from_pretrained(start())
    model._device_mesh = object()
    with pytest.raises(SettingsError, match=r"needs Transformers 5\.23 .*--save_only_model true"):
        PeerTrainer(model, PeerTrainingArguments(str(tmp_path / "out"), use_cpu=True), train_dataset=BLOCKS)
