# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What a wheel installs works without a checkout, and what an extra brings is asked for by the extra's name."""

import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from peer_command import COMMANDS, EXTRAS

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
# Run before anything else where extras are to be absent.
WITHOUT_EXTRAS = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(package for packages in EXTRAS.values() for package in packages)}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel holds; nothing else of this repository is on the path."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(REPOSITORY)]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(installed, folder, code, *options, extras=True):
    """Python in a folder of its own, with the wheel before this checkout, which is installed to be edited."""
    words = [*options, "-c", ("" if extras else WITHOUT_EXTRAS) + code]
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def command(name, *words):
    return f"import peer_command, sys; sys.exit(peer_command.main({[name, *words]}))"


@pytest.mark.slow
def test_presets_recipes_and_the_card_are_in_the_wheel(installed):
    for path in [*REPOSITORY.glob("configuration/*/*"), *REPOSITORY.glob("model_cards/*.md")]:
        assert (installed / "modeling_peer" / path.relative_to(REPOSITORY)).read_bytes() == path.read_bytes()
    assert (installed / "modeling_peer" / "py.typed").exists()


@pytest.mark.slow
def test_importing_warns_of_nothing_without_extras(installed, tmp_path):
    code = "import modeling_peer; print(modeling_peer.PeerConfig.from_preset('peer_million').num_peer_experts)"
    done = run(installed, tmp_path, code, "-W", "error", extras=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1048576"


@pytest.mark.slow
@pytest.mark.parametrize("extras", [False, True], ids=["no extra", "all extras"])
def test_the_python_of_the_readme_runs(installed, tmp_path, extras):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    done = run(installed, tmp_path, "\n".join(blocks), extras=extras)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my-peer" / "modeling_peer.py").exists()


@pytest.mark.slow
def test_a_run_is_trained_and_scored(installed, tmp_path):
    (tmp_path / "text.txt").write_text("a sentence, and another one. " * 400)
    words = ["quickstart", "--train_file", "text.txt", "--output_dir", "out", "--max_steps", "1", "--use_cpu", "true"]
    words += ["--validation_percent", "5", "--block_size", "32", "--tokenizer", "bytes", "--report_to", "none"]
    done = run(installed, tmp_path, command("train", *words))
    assert done.returncode == 0, done.stderr
    done = run(installed, tmp_path, command("evaluate", "--model", "out", "--file", "text.txt"))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "extra"), [("train", "train"), ("compare", "train"), ("bench-layer", "bench"), ("serve", "serve")]
)
def test_what_an_extra_brings_is_asked_for_in_one_sentence(installed, tmp_path, name, extra):
    words = {"bench-layer": ["smoke"], "compare": ["smoke"]}.get(name, [])
    done = run(installed, tmp_path, command(name, *words), extras=False)
    assert done.returncode == 2, done.stderr
    assert re.search(rf"^error: .*which is not installed.*{extra}", done.stderr.strip().splitlines()[-1])


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_comes_without_torch(name, tmp_path):
    """Two seconds are what it may take; a quarter of one is usual."""
    words = [*filter(None, [name]), "--help"]
    code = f"import peer_command, sys; peer_command.main({words}); print('torch' in sys.modules)"
    began = time.monotonic()
    done = run(REPOSITORY, tmp_path, code)
    took = time.monotonic() - began
    *text, has_torch = done.stdout.strip().splitlines()
    assert text[0].startswith(f"usage: peer {name or 'COMMAND'}"), done.stderr
    assert has_torch == "False"
    assert took < 10  # on a machine whose cores are taken


def test_help_names_every_field_of_a_command():
    from dataclasses import fields

    from modeling_peer.data.corpus import DataArguments
    from modeling_peer.hub.loading import ModelArguments
    from peer_command import describe

    text = describe("train")
    for group in (DataArguments, ModelArguments):
        for one in fields(group):
            assert f"--{one.name} " in text
            assert " ".join(one.metadata["help"].split()) in " ".join(text.split())


def test_help_of_the_server_names_the_options_of_transformers():
    from peer_command import describe

    text = describe("serve")
    assert re.search(r"^  --port int \(default 8000\)\n +\w", text, flags=re.MULTILINE)
    assert "--continuous-batching | --no-continuous-batching (default False)" in text
    assert "non-blocking" not in text  # hidden there


def test_an_unknown_command_is_refused_with_those_there_are(capsys):
    from peer_command import main

    assert main(["trian"]) == 2
    assert "no command 'trian'. Commands: quickstart, train" in capsys.readouterr().err
