# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A model goes to a Hub on this machine with the real client, and comes back where the package is absent."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
import yaml
from hub_server import USER, Hub
from huggingface_hub import ModelCard
from test_checkpoint_peer import TRAVELLING_FILES
from training_helpers import REPOSITORY, last_json

from modeling_peer import PeerForCausalLM, quantise_expert_tables, table_shards_peer
from modeling_peer.data.tokenizers import byte_tokenizer

REPO = f"{USER}/tiny-peer"
CARD = """---
license: mit
datasets: [Salesforce/wikitext]
model-index:
- name: mine
  results:
  - task: {type: text-generation}
    dataset: {type: Salesforce/wikitext, name: WikiText-2}
    metrics:
    - {type: bits_per_byte, value: 1.98}
---

# Mine

My own words.
"""
# Someone who has Transformers, and never heard of this package.
WITHOUT_PACKAGE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_peer":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""
LOAD_ONE = (
    WITHOUT_PACKAGE
    + """
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
torch.save(model(torch.arange(1, 13).view(2, 6)).logits.detach(), sys.argv[2])
"""
)
LOAD = (
    WITHOUT_PACKAGE
    + """
import torch, transformers
name, first, second, results = sys.argv[1:]
options = {"trust_remote_code": True}
tokens = torch.arange(1, 13).view(2, 6)
load = transformers.AutoModelForCausalLM.from_pretrained
tokenizer = transformers.AutoTokenizer.from_pretrained(name)
assert tokenizer.decode(tokenizer("caf\\u00e9")["input_ids"]) == "caf\\u00e9"
computed = {"newest": load(name, **options), "first": load(name, revision=first, **options)}
computed["second"] = load(name, revision=second, **options)
for head in ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification",
             "AutoModelForQuestionAnswering"):
    computed[head] = getattr(transformers, head).from_pretrained(name, **options)
assert all(type(model).__module__.startswith("transformers_modules.") for model in computed.values())
assert len(computed["newest"].generate(tokens, max_new_tokens=3, eos_token_id=None)[0]) == 9
torch.save({name: model.eval()(tokens)[0].detach() for name, model in computed.items()}, results)
"""
)
# Two large files are stored; the next never arrives, and the process is killed while it waits.
SEND = """
import sys
from pathlib import Path
from modeling_peer.hub.uploading import upload_files
folder = Path(sys.argv[1])
files = {path.name: path for path in folder.iterdir()}
print(upload_files(files, sys.argv[2]).commit)
"""


@pytest.fixture(params=[False, True], ids=["whole files", "chunks"])
def hub(request):
    """Without storage of chunks, and with it, which is what the client asks for by default."""
    if request.param:
        pytest.importorskip(
            "hf_xet", reason="hf_xet is not installed; huggingface_hub needs it on x86-64 and ARM only"
        )
    with Hub(xet=request.param) as server:
        yield server


def start(hub, cache, *words, package=True):
    environment = {**os.environ, **hub.environment(cache), "PYTHONPATH": str(REPOSITORY) if package else ""}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=environment,
        cwd=cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def run(hub, cache, *words, **options):
    process = start(hub, cache, *words, **options)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def export(hub, cache, folder, *words):
    return run(hub, cache, REPOSITORY / "scripts" / "export_model.py", "--model", folder, "--repo_id", REPO, *words)


def build(tiny_config, seed, **overrides):
    torch.manual_seed(seed)
    return PeerForCausalLM(tiny_config(vocab_size=257, **overrides)).eval()


@pytest.mark.slow_but_first
@pytest.mark.slow
def test_a_model_is_exported_and_comes_back_without_the_package(hub, tiny_config, tmp_path):
    first, second = build(tiny_config, 1), build(tiny_config, 2)
    folder, cache = tmp_path / "model", tmp_path / "cache"
    cache.mkdir()
    first.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "training_args.bin").write_bytes(b"\x80\x04 a pickle")
    one = last_json(export(hub, cache, folder, "--language", "en", "--private"))
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    names |= {"README.md", ".eval_results/wikitext.yaml", ".gitattributes", *TRAVELLING_FILES}
    assert set(hub.files(REPO)) == names
    for path in folder.glob("*.safetensors"):
        assert hub.files(REPO)[path.name] == path.read_bytes()
    assert hub.repositories[REPO].private
    assert one["left_out"] == ["training_args.bin"]
    assert one["commit"] == hub.repositories[REPO].commits[-1][0]
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    block = card.data.to_dict()
    assert {name: block[name] for name in ("license", "language", "library_name", "pipeline_tag", "datasets")} == {
        "license": "mit",
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "datasets": "Salesforce/wikitext",
    }
    assert "My own words." in card.text
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in card.text
    assert "import modeling_peer" in card.text
    results = yaml.safe_load(hub.files(REPO)[".eval_results/wikitext.yaml"])
    assert results[0]["dataset"] == {"id": "Salesforce/wikitext", "task_id": "bits_per_byte"}
    assert results[0]["value"] == 1.98

    # another model in parts: the files of the first must not stay beside them
    before = {path.name for path in folder.glob("*.safetensors")}
    second.save_pretrained(folder, max_shard_size="50KB")
    two = last_json(export(hub, cache, folder))
    after = {path.name for path in folder.glob("*.safetensors")}
    assert two["deleted"] == sorted(before - after)
    assert {name for name in hub.files(REPO) if name.endswith(".safetensors")} == after != before
    assert len(hub.stored) == len(set(hub.stored))  # no large file was sent twice

    process = run(hub, cache, "-c", LOAD, REPO, one["commit"], two["commit"], tmp_path / "out.pt", package=False)
    assert process.returncode == 0, process.stderr[-3000:]
    computed = torch.load(tmp_path / "out.pt")
    tokens = torch.arange(1, 13).view(2, 6)
    torch.testing.assert_close(computed["first"], first(tokens).logits)
    torch.testing.assert_close(computed["second"], second(tokens).logits)
    torch.testing.assert_close(computed["newest"], second(tokens).logits)
    torch.testing.assert_close(computed["AutoModel"], second.model(tokens).last_hidden_state)
    assert computed["AutoModelForSequenceClassification"].shape == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("table_format", ["int8", "int4"])
def test_quantised_tables_in_files_of_their_own_are_sent_and_come_back(
    hub, tiny_config, tmp_path, table_format, monkeypatch
):
    monkeypatch.setattr(table_shards_peer, "MIN_BYTES", 0)  # any table is large
    model = build(tiny_config, 1, mlp_layer_types=["sparse", "dense", "sparse"])
    num_parameters = model.num_parameters()
    quantise_expert_tables(model, table_format).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    cache = tmp_path / "cache"
    cache.mkdir()
    last_json(export(hub, cache, tmp_path / "model", "--license", "mit", "--language", "en"))
    sent = hub.files(REPO)
    weights = {path.name: path.read_bytes() for path in (tmp_path / "model").glob("*.safetensors")}
    assert {"model-layer-000-experts.safetensors", "model-layer-002-experts.safetensors"} < weights.keys()
    assert {name: content for name, content in sent.items() if name.endswith(".safetensors")} == weights
    index = json.loads(sent["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == weights.keys()
    assert "model.layers.2.mlp.experts.up_scale" in index["weight_map"]
    card = sent["README.md"].decode()
    assert f"A causal language model of {num_parameters:,} parameters. In 2 of its 3 layers" in card
    assert f"are stored as {table_format}, with a scale for each row" in card
    process = run(hub, cache, "-c", LOAD_ONE, REPO, tmp_path / "out.pt", package=False)
    assert process.returncode == 0, process.stderr[-3000:]
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), model(torch.arange(1, 13).view(2, 6)).logits)


@pytest.mark.slow
def test_an_upload_that_was_killed_goes_on_and_sends_no_large_file_again(hub, tiny_config, tmp_path):
    model = build(tiny_config, 1)
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 3
    hub.before_large = lambda count: "drop" if count == 2 else None
    cache = tmp_path / "cache"
    cache.mkdir()
    process = start(hub, cache, "-c", SEND, tmp_path / "model", REPO)
    page = "/storage/" if hub.xet is None else "/v1/xorbs/"
    while not (len(hub.stored) == 2 and sum(path.startswith(page) for _, path in hub.requests) > 2):
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.1)
    process.kill()
    process.communicate()
    assert set(hub.files(REPO)) == {".gitattributes"}  # nothing is half there
    sent = list(hub.stored)
    hub.before_large = lambda count: None
    done = run(hub, cache, "-c", SEND, tmp_path / "model", REPO)
    assert done.returncode == 0, done.stderr[-3000:]
    assert hub.stored[:2] == sent
    assert len(hub.stored) == len(set(hub.stored)) == len(shards)
    assert len(hub.xorbs_sent) == len(set(hub.xorbs_sent))  # no chunk was sent twice
    assert bool(hub.xorbs_sent) == (hub.xet is not None)
    assert {path.name for path in (tmp_path / "model").iterdir()} < set(hub.files(REPO))
    assert len(hub.repositories[REPO].commits) == 2  # the one that made it, and one for all files
    # and once more: nothing is new, so that there is no empty commit
    assert run(hub, cache, "-c", SEND, tmp_path / "model", REPO).stdout.split()[-1] == done.stdout.split()[-1]
