# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What a run cannot go on from: an error that says why, a status that is not 0, and a checkpoint to resume from."""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import datasets
import pytest
import torch
import transformers
from packaging.version import Version
from training_helpers import (
    as_command_line,
    last_json,
    logged_losses,
    path_of_tests,
    private_cache,  # noqa: F401  a fixture
    train,
    write_inputs,
)
from transformers import TrainerCallback

from modeling_peer.console.errors import SettingsError
from modeling_peer.console.run_files import UNFINISHED, list_checkpoints
from modeling_peer.console.scripts import run_script
from modeling_peer.training import language_modeling
from modeling_peer.training.checkpoint_folders import find_damage
from modeling_peer.training.language_model_trainer import LanguageModelTrainer

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def inputs(tmp_path):
    return write_inputs(tmp_path)


@pytest.fixture
def undisturbed(tmp_path, inputs):
    """The losses of six steps."""
    train(inputs, output_dir=tmp_path / "undisturbed", max_steps=6, save_strategy="no")
    return logged_losses(tmp_path / "undisturbed")


def assert_resumable(out, inputs, undisturbed, whole=2):
    """Nothing half written stands there, and the run goes on from the last checkpoint as if nothing had happened."""
    assert [path.name for path in list_checkpoints(out)] == [f"checkpoint-{whole}"]
    assert find_damage(out / f"checkpoint-{whole}") is None
    assert not (out / UNFINISHED).exists()
    train(inputs, output_dir=out, max_steps=6, save_steps=2, resume_from_checkpoint="last")
    assert logged_losses(out) == undisturbed


@contextmanager
def files_of_at_most(num_bytes):
    """Writing more is an error of the operating system, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (100_000, r"SafetensorError: .*File too large.*"),  # model.safetensors has 148 kB
        (200_000, "RuntimeError: .*"),  # optimizer.pt has 311 kB; torch.save says nothing of the cause
    ],
)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, inputs, undisturbed, limit, message):
    out = tmp_path / "out"
    train(inputs, output_dir=out, max_steps=2, save_steps=2)
    told = rf"(?s)cannot save .*/checkpoint-4: {message}. Free in .*: [\d,]+ bytes"
    with files_of_at_most(limit), pytest.raises(SettingsError, match=told):
        train(inputs, output_dir=out, max_steps=6, save_steps=2, resume_from_checkpoint="last")
    assert_resumable(out, inputs, undisturbed)


def test_a_final_model_that_cannot_be_written_is_told_as_plainly(tmp_path, inputs):
    with files_of_at_most(100_000), pytest.raises(SettingsError, match=r"cannot save .*/out: .*File too large"):
        train(inputs, output_dir=tmp_path / "out", max_steps=1, save_strategy="no")
    assert not (tmp_path / "out" / "model.safetensors").exists()


class At(TrainerCallback):
    """Does something once, after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def do_at(monkeypatch, step, action):
    class Disturbed(LanguageModelTrainer):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.add_callback(At(step, action))

    monkeypatch.setattr(language_modeling, "LanguageModelTrainer", Disturbed)


def test_an_output_folder_that_disappears_is_told_and_what_was_in_it_can_be_resumed(
    tmp_path, inputs, undisturbed, monkeypatch
):
    out = tmp_path / "out"

    def disappear():  # as when a disk is unmounted
        out.rename(tmp_path / "elsewhere")
        out.write_text("")

    with monkeypatch.context() as patch:
        do_at(patch, 3, disappear)
        with pytest.raises(SettingsError, match=r"cannot save .*out/checkpoint-4: .*Not a directory"):
            train(inputs, output_dir=out, max_steps=6, save_steps=2)
    assert_resumable(tmp_path / "elsewhere", inputs, undisturbed)


def test_a_loss_that_is_no_number_ends_the_run_and_the_checkpoint_before_it_is_good(
    tmp_path, inputs, undisturbed, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        compute_loss = LanguageModelTrainer.compute_loss

        def poisoned(self, *args, **kwargs):
            return compute_loss(self, *args, **kwargs) * (float("nan") if self.state.global_step == 3 else 1)

        patch.setattr(LanguageModelTrainer, "compute_loss", poisoned)
        with pytest.raises(SettingsError, match=r"training diverged: .* at step 4\. Lower --learning_rate"):
            train(inputs, output_dir=out, max_steps=6, save_steps=2)
    assert_resumable(out, inputs, undisturbed)


def of_a_small_disk(folder):
    """In a process that may mount: a disk that becomes read-only, and one that fills up during a save."""
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    inputs, disk, out = write_inputs(folder), folder / "disk", folder / "disk" / "out"
    train(inputs, output_dir=folder / "undisturbed", max_steps=6, save_strategy="no")
    disk.mkdir()

    def mount(*options):
        subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "none", disk], check=True)

    mount("size=9m")
    with pytest.MonkeyPatch.context() as patch:
        do_at(patch, 3, lambda: mount("remount", "ro"))
        with pytest.raises(SettingsError, match=r"cannot save .*/checkpoint-4: ") as read_only:
            train(inputs, output_dir=out, max_steps=6, save_steps=2)
    mount("remount", "rw")
    assert_resumable(out, inputs, logged_losses(folder / "undisturbed"))

    shutil.rmtree(out)
    mount("remount", "size=1m")  # a checkpoint has 0.6 MB
    with pytest.raises(SettingsError, match=r"cannot save .*/checkpoint-4: ") as full:
        train(inputs, output_dir=out, max_steps=6, save_steps=2)
    mount("remount", "size=9m")
    assert_resumable(out, inputs, logged_losses(folder / "undisturbed"))
    print(json.dumps([str(full.value), str(read_only.value)]))


def run_this_file(function, folder, *prefix):
    environment = {**os.environ, "PYTHONPATH": path_of_tests(), "OMP_NUM_THREADS": "1"}
    code = f"import pathlib, test_failures as t; t.{function.__name__}(pathlib.Path({str(folder)!r}))"
    command = [*prefix, sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def one_of_two(rank, folder, words, port, death):
    """A process as torchrun starts it, that may die after a step."""
    for number, stream in ((1, "out"), (2, "err")):
        with open(folder / f"{rank}.{stream}", "w") as file:
            os.dup2(file.fileno(), number)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if death == rank:
            do_at(patch, 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
        run_script(lambda: train(words).summary)


def two_processes(folder, words, death=None):
    """Their exit codes, and how many seconds the first one outlived the second."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    arguments = [(rank, folder, words, port, death) for rank in (0, 1)]
    processes = [context.Process(target=one_of_two, args=each) for each in arguments]
    for process in processes:
        process.start()
    processes[1].join()
    began = time.monotonic()
    processes[0].join(100)
    seconds = time.monotonic() - began
    processes[0].kill()
    return [process.exitcode for process in processes], seconds


def of_two_processes(folder):
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    words = [*write_inputs(folder), *as_command_line(max_steps=10, save_steps=2, ddp_backend="gloo")]
    codes, _ = two_processes(folder, [*words, f"--output_dir={folder / 'undisturbed'}"])
    assert codes == [0, 0], (folder / "0.err").read_text()
    words.append(f"--output_dir={folder / 'out'}")
    codes, seconds = two_processes(folder, words, death=1)
    error = (folder / "0.err").read_text().splitlines()[-1]
    assert [path.name for path in list_checkpoints(folder / "out")] == ["checkpoint-2", "checkpoint-4"]
    if Version(transformers.__version__) >= Version("5.18"):  # before, Trainer loads no optimizer on two CPU processes
        resumed, _ = two_processes(folder, [*words, "--resume_from_checkpoint=last"])
        assert resumed == [0, 0], (folder / "0.err").read_text()
        assert logged_losses(folder / "out") == logged_losses(folder / "undisturbed")
    print(json.dumps([codes, seconds, error]))


@pytest.mark.slow
def test_when_one_of_two_processes_is_killed_the_other_ends_with_an_error_and_both_can_resume(tmp_path):
    codes, seconds, error = last_json(run_this_file(of_two_processes, tmp_path))
    assert codes == [2, -signal.SIGKILL]
    assert seconds < 60, "1 s on an idle machine; what remains is for a busy one"
    lost = r"error: process 0 lost the connection to the others after step 5: .*by peer.*--resume_from_checkpoint last"
    assert re.match(lost, error)


MOUNTS = ("unshare", "--user", "--map-root-user", "--mount")


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run([*MOUNTS, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode != 0,
    reason="mounting a small disk needs user namespaces",
)
def test_a_full_and_a_read_only_disk_leave_the_checkpoint_before(tmp_path):
    full, read_only = last_json(run_this_file(of_a_small_disk, tmp_path, *MOUNTS))
    assert "Free in" in full
    assert "Read-only file system" in read_only
