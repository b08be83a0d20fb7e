# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The checkpoint in examples/checkpoints: small, without code that could go stale, as good as its card says."""

import json
import os
import re
import subprocess
import sys

import pytest
from hub_server import find_errors
from training_helpers import (
    REPOSITORY,
    private_cache,  # noqa: F401  a fixture
)

from modeling_peer.evaluation.checkpoints import EvaluationArguments, evaluate_checkpoint
from modeling_peer.hub.export import ExportArguments, export_model

pytestmark = pytest.mark.usefixtures("private_cache")
FOLDER = REPOSITORY / "examples" / "checkpoints" / "peer_bytes"
TEXT = FOLDER.parent / "held_out.txt"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
MIB = 2**20
# The window of `peer evaluate`, without the package: each token is scored once, with half a window before it.
SCORE = """
import math, sys
sys.modules["modeling_peer"] = None  # unimportable
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text, width = sys.argv[1], open(sys.argv[2], encoding="utf-8").read(), 256
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules.")
tokenizer = AutoTokenizer.from_pretrained(folder)
tokens = torch.tensor([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]])
total = scored = 0
with torch.no_grad():
    for end in range(width, len(tokens), width // 2):
        window = tokens[end - width : end + 1]
        scores = model(window[None, :-1]).logits[0].log_softmax(-1)
        losses = -scores.gather(1, window[1:, None])[:, 0]
        new = losses if end == width else losses[width // 2 :]
        total, scored = total + new.sum().item(), scored + len(new)
print(math.exp(total / scored))
"""


def perplexity_of_card():
    return float(re.search(r"\| `held_out\.txt`, perplexity per byte \| ([0-9.]+) \|", CARD)[1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The files as they would be sent: the package's code of today is added."""
    folder = tmp_path_factory.mktemp("exported") / "peer_bytes"
    arguments = ExportArguments(str(FOLDER), "someone/peer-bytes", dry_run=True, output_dir=str(folder))
    return folder, export_model(arguments)


def test_it_holds_no_code_and_with_code_is_smaller_than_a_mebibyte(exported):
    assert not list(FOLDER.glob("*.py"))
    folder, facts = exported
    assert (folder / "modeling_peer.py").is_file()
    assert facts["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < MIB
    assert facts["left_out"] == []
    assert len(facts["checked"]["generated"]) == 8


def test_with_the_package_it_scores_as_its_card_says():
    result = evaluate_checkpoint(EvaluationArguments(model=str(FOLDER), file=str(TEXT), context_length=256))
    # other releases of torch add in another order
    assert result["perplexity"] == pytest.approx(perplexity_of_card(), rel=1e-3)


@pytest.mark.slow
def test_without_the_package_it_scores_as_its_card_says(exported, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", SCORE, str(exported[0]), str(TEXT)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    # the last part of a window is left out here: a hundred bytes of 20,000
    assert float(process.stdout.split()[-1]) == pytest.approx(perplexity_of_card(), rel=1e-2)


def test_its_card_has_the_numbers_of_its_run():
    results = json.loads((REPOSITORY / "results" / "peer_bytes.json").read_text())
    assert find_errors(CARD) == []
    assert f"| bits per byte | {results['validation_bits_per_byte']:.4g} |" in CARD
    assert f"{results['steps']} steps, {results['tokens']:,} tokens" in CARD


@pytest.mark.parametrize("path", sorted((REPOSITORY / "model_cards").glob("peer_*.md")), ids=lambda path: path.stem)
def test_the_hub_takes_the_cards_of_presets(path):
    assert find_errors(path.read_text(encoding="utf-8")) == []
