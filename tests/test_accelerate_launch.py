"""`accelerate launch` with the files of configuration/accelerate/, on a tiny model, two processes and no GPU."""

import json
import os
import socket
import subprocess
import sys

import pytest
from training_helpers import REPOSITORY, private_cache, write_inputs  # noqa: F401
from transformers.distributed import DistributedConfig

from modeling_peer import PeerForCausalLM

FOLDER = REPOSITORY / "configuration" / "accelerate"
CHANGES = {
    "one_machine": ["--num_processes=1"],
    "experts_and_data": ["--parallelism_config_dp_shard_size=2"],
}

# Trainer cannot save the optimiser of a model that was sharded when it was loaded.
WORDS = {"experts_and_data": ["--save_only_model=True"]}


def launch(name: str, *words: str) -> subprocess.CompletedProcess:
    """Run scripts/train_lm.py under one of the files, its number of processes made 2."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--num_processes=2", f"--main_process_port={port}", *CHANGES.get(name, [])]
    command = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={FOLDER / name}.yaml", *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    script = [str(REPOSITORY / "scripts" / "train_lm.py"), *words]
    return subprocess.run([*command, *script], capture_output=True, encoding="utf-8", env=environment, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.yaml"))])
def test_a_tiny_model_trains_as_the_file_launches_it(tmp_path, private_cache, name):  # noqa: F811
    if name == "experts_and_data" and "ep_size" not in DistributedConfig.__dataclass_fields__:
        pytest.skip("Transformers of this age has no expert parallelism with data parallelism")
    words = write_inputs(tmp_path)
    done = launch(name, *words, f"--output_dir={tmp_path / 'run'}", "--max_steps=3", "--seed=1", *WORDS.get(name, []))
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    num_processes = 1 if name == "one_machine" else 2
    assert summary["tokens"] == 3 * 4 * 32 * num_processes  # steps x sequences of one process x their length
    saved = PeerForCausalLM.from_pretrained(tmp_path / "run")
    assert saved.model.layers[0].mlp.experts.down_embed.shape == (64, 32)
