# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Small texts, models and command lines for the tests of training and scripts."""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from modeling_peer.training.language_modeling import train_language_model
from modeling_peer.training.recipe import parse_recipe

REPOSITORY = Path(__file__).resolve().parents[1]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run", "far", "away", "from", "here"]
TINY_PEER = {
    "model_type": "peer",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "num_sub_keys": 8,
    "num_retrieval_heads": 2,
    "num_experts_per_head": 4,
    "query_dim": 16,
}
# no model_type of ours: the scripts must not care
TINY_LLAMA = {
    name: TINY_PEER[name]
    for name in TINY_PEER
    if name not in ("num_sub_keys", "num_retrieval_heads", "num_experts_per_head", "query_dim")
} | {"model_type": "llama"}


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    """Data sets are cached in the test's own folder, and the Hub is out of reach."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # for processes started by the test
    # the variable is read at import: set it for new processes, and what it sets for this one
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def some_text(num_words: int = 3000, seed: int = 0) -> str:
    """Text with something to learn: few words, short lines, and characters of more than one byte."""
    words = random.Random(seed).choices([*WORDS, "café", "naïve"], k=num_words)
    return "".join(word + ("\n" if i % 9 == 8 else " ") for i, word in enumerate(words))


def write_inputs(folder: Path, config: dict | None = None, text: str | None = None) -> list[str]:
    """Write text and configuration; the settings of a short run on them, but for its length and output_dir."""
    Path(folder, "text.txt").write_text(some_text() if text is None else text, encoding="utf-8", newline="")
    Path(folder, "model.json").write_text(json.dumps(config or TINY_PEER))
    return as_command_line(
        model=folder / "model.json",
        train_file=folder / "text.txt",
        tokenizer="bytes",
        block_size=32,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        logging_steps=1,
        eval_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        max_evaluation_bytes=500,
    )


def as_command_line(**settings) -> list[str]:
    """Settings as words of a command line."""
    return [f"--{name}={value}" for name, value in settings.items()]


def logged_losses(folder: Path) -> list[float]:
    """Training losses of a run, one for each log."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def train(words: list[str], **settings):
    """Run the training of `scripts/train_lm.py` in this process."""
    return train_language_model(parse_recipe(words + as_command_line(**settings)))


def run_script(name: str, *words: str, num_processes: int = 1) -> subprocess.CompletedProcess:
    """Run a script in new processes, each on one thread: the tests around it use the other cores."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    launcher = launcher if num_processes > 1 else []
    (path,) = (path for folder in ("scripts", "examples") if (path := REPOSITORY / folder / name).exists())
    command = [sys.executable, *launcher, str(path), *words]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300)


def path_of_tests() -> str:
    """For PYTHONPATH: the package, and every folder of tests, whose modules import each other."""
    tests = REPOSITORY / "tests"
    return os.pathsep.join(map(str, [REPOSITORY, tests, *(path for path in tests.iterdir() if path.is_dir())]))


def run_processes(num_processes: int, script: str, *words: str) -> subprocess.CompletedProcess:
    """Run Python text in new processes that form a group; it finds the modules of the tests."""
    environment = {**os.environ, "PYTHONPATH": path_of_tests(), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(script)
        file.flush()
        return subprocess.run(
            [*launch, file.name, *words], capture_output=True, encoding="utf-8", env=environment, timeout=300
        )


def last_json(process: subprocess.CompletedProcess) -> dict:
    """The one line of JSON that a script ends with."""
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.strip().splitlines()[-1])
