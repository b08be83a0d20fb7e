# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Kill -9 at twenty moments of a training, half of them while it saves: it ends as if nothing had happened.

python tests/training/test_kills.py          # prints where each kill hit and what it cost

Weights, optimizer, schedule, random numbers and every logged number equal those of a run that nobody killed, bit by
bit: with dense gradients and AdamW, with row-sparse ones and RowSparseAdamW, and for an embedding of a Llama that is
trained by rows with one scalar per row.
"""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import pytest
import torch
from training_helpers import TINY_LLAMA, as_command_line, path_of_tests, some_text, train, write_inputs
from transformers import TrainerCallback

from modeling_peer.console.run_files import UNFINISHED, list_checkpoints
from modeling_peer.training import language_modeling
from modeling_peer.training.language_model_trainer import LanguageModelTrainer

KILLS = 20
EMBEDDING = "RowSparseAdamW of an embedding"
OPTIMIZERS = ("AdamW", "RowSparseAdamW", EMBEDDING)
SETTINGS = {
    "max_steps": 60,  # two and a half passes over the text
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 3,  # what is logged is not what is saved
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "log_expert_usage": False,  # counted anew by every process
}
LAST = f"checkpoint-{SETTINGS['max_steps']}"
EQUAL = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


class Watched(LanguageModelTrainer):
    """Says in `step` how far it is."""

    step = None

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.add_callback(SaysStep())


class SaysStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        Watched.step.value = state.global_step


def train_watched(folder, words, step):
    """In a process of its own."""
    with open(folder / "log.txt", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    Watched.step = step
    language_modeling.LanguageModelTrainer = Watched
    train(words)


class Runs:
    """One training that is left alone and one that is killed, with the same settings."""

    def __init__(self, folder: Path, optimizer_name: str):
        self.folder = folder
        # dropout, in the experts and in attention: a step needs the random numbers it would have had
        overrides, config, settings = {"attention_dropout": 0.1}, None, dict(SETTINGS)
        if optimizer_name == EMBEDDING:
            config = {**TINY_LLAMA, "tie_word_embeddings": False}
            settings |= {"row_sparse_modules": "embed_tokens", "table_optimizer_state": "row"}
        else:
            overrides["expert_dropout"] = 0.1
            settings["row_sparse_gradients"] = optimizer_name == "RowSparseAdamW"
        self.words = write_inputs(folder, config, text=some_text(1300))
        self.words += as_command_line(**settings)
        self.words += ["--model_overrides", json.dumps(overrides)]

    def start(self, name, resume=False):
        # forked: each would otherwise spend its time on imports
        context = multiprocessing.get_context("fork")
        words = [*self.words, "--output_dir", str(self.folder / name)]
        words += ["--resume_from_checkpoint", "last"] if resume else []
        step = context.Value("i", 0, lock=False)
        process = context.Process(target=train_watched, args=(self.folder, words, step))
        process.start()
        return process, step

    def finish(self, name, resume=False):
        process, _ = self.start(name, resume)
        process.join()
        assert process.exitcode == 0, (self.folder / "log.txt").read_text()[-3000:]

    def kill_once(self, moments: random.Random, while_saving: bool) -> dict:
        """Resume, kill at a random moment after the first step; say what was going on and what is to be done again."""
        out = self.folder / "killed"
        unfinished, left_by_the_last = out / UNFINISHED, newest_change(out / UNFINISHED)
        process, step = self.start("killed", resume=bool(list_checkpoints(out)))
        self.wait(process, lambda: step.value)
        if while_saving:
            self.wait(process, lambda: newest_change(unfinished) not in (None, left_by_the_last))
            num_files = moments.randint(0, 20)  # a checkpoint has 19; with 20 it is being flushed or has its name
            self.wait(process, lambda: len(files_in(unfinished)) >= num_files or not unfinished.exists())
        else:
            last = step.value + moments.randint(0, 8)
            self.wait(process, lambda: step.value >= last)
        time.sleep(moments.uniform(0, 0.01))
        process.kill()
        process.join()
        files = files_in(unfinished)
        newest = max(files, key=lambda path: path.stat().st_mtime_ns).name if files else None
        whole = [int(path.name.partition("-")[2]) for path in list_checkpoints(out)]
        redone = step.value - max(whole, default=0)
        return {"step": step.value, "files": len(files), "newest": newest, "redone": redone}

    def wait(self, process, condition):
        while not condition():
            assert process.is_alive(), (self.folder / "log.txt").read_text()[-3000:]
            time.sleep(0.0005)

    def differences(self) -> list[str]:
        whole, killed = (self.folder / name / LAST for name in ("whole", "killed"))
        return [name for name in EQUAL if (whole / name).read_bytes() != (killed / name).read_bytes()]


def newest_change(folder: Path) -> int | None:
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def files_in(folder: Path) -> list[Path]:
    # unlike rglob, it bears that files come and go
    return [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]


def kill_and_compare(folder: Path, optimizer_name: str) -> dict:
    """The tally of one optimizer, printed as it grows."""
    folder.mkdir()
    runs, moments, kills = Runs(folder, optimizer_name), random.Random(0), []
    runs.finish("whole")
    for attempt in range(KILLS):
        kill = runs.kill_once(moments, while_saving=attempt % 2 == 1)
        kills.append(kill)
        doing = f"saving, file {kill['files']} is {kill['newest']}" if kill["files"] else "training"
        what = f"{optimizer_name}, kill {attempt + 1}: after step {kill['step']}, {doing}"
        print(f"{what}; {kill['redone']} steps redone", flush=True)
    runs.finish("killed", resume=bool(list_checkpoints(folder / "killed")))
    tally = {
        "kills": len(kills),
        "while_saving": sum(kill["files"] > 0 for kill in kills),
        "steps": SETTINGS["max_steps"],
        "steps_redone": sum(kill["redone"] for kill in kills),
        "files_that_differ": runs.differences(),
    }
    print(f"{optimizer_name}: {json.dumps(tally)}", flush=True)
    return tally


@pytest.fixture(scope="module")
def tallies(tmp_path_factory):
    """From a process that has computed nothing before it forks: threads of kernels do not survive a fork."""
    environment = {**os.environ, "PYTHONPATH": path_of_tests(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("kills"))]
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    print(process.stdout)
    assert process.returncode == 0
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_a_training_killed_twenty_times_ends_as_one_that_nobody_killed(tallies, optimizer_name):
    tally = tallies[optimizer_name]
    assert tally["files_that_differ"] == []
    assert tally["kills"] == KILLS
    assert KILLS / 4 < tally["while_saving"] < KILLS, "the kills hit too few kinds of moments to show anything"


def main():
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as folder:
        print(json.dumps({name: kill_and_compare(Path(folder, name), name) for name in OPTIMIZERS}))


if __name__ == "__main__":
    main()
