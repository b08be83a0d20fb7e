# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The check before an export: what people would meet who load the folder is met here first."""

import pytest
import torch

from modeling_peer import PeerForCausalLM, PeerForMaskedLM, PeerForTokenClassification
from modeling_peer.console.errors import SettingsError
from modeling_peer.hub.clean_check import check_model
from modeling_peer.hub.export import ExportArguments, export_model

CAUSAL = ["AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"]
CAUSAL += ["AutoModelForQuestionAnswering"]
MASKED = ["AutoModelForMaskedLM", *CAUSAL[1:]]
TAGGING = ["AutoModelForTokenClassification", "AutoModel", "AutoModelForCausalLM", *CAUSAL[2:3], *CAUSAL[4:]]


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    ("kind", "fields", "auto_classes"),
    [
        (PeerForCausalLM, {}, CAUSAL),
        (PeerForMaskedLM, {"is_causal": False}, MASKED),
        (PeerForTokenClassification, {"sparse_mlp": "top_k_moe", "num_labels": 5}, TAGGING),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_class_loads_and_computes_what_the_package_computes(tiny_config, tmp_path, kind, fields, auto_classes):
    model = kind(tiny_config(**fields)).eval()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    checked = check_model(tmp_path)
    assert sorted(checked.auto_classes) == sorted(auto_classes)
    assert checked.auto_classes[0] == auto_classes[0]
    assert checked.difference < 1e-5
    assert set(checked.versions) == {"python", "torch", "transformers"}
    assert all(checked.checksums.values())
    assert len(checked.generated) == (8 if kind is PeerForCausalLM else 0)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(checked.model.state_dict()[name], value, rtol=0, atol=0)


def test_a_damaged_file_is_named_before_anything_is_loaded(tiny_config, tmp_path):
    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(SettingsError, match=r"model\.safetensors was saved with the checksum"):
        check_model(tmp_path)


@pytest.mark.slow
def test_code_that_does_not_load_is_refused_and_the_packages_code_may_take_its_place(tiny_config, tmp_path):
    folder = tmp_path / "model"
    PeerForCausalLM(tiny_config()).save_pretrained(folder)
    path = folder / "experts_peer.py"
    path.write_text("from modeling_peer import nothing\n" + path.read_text())
    (folder / "outputs_peer.py").unlink()
    settings = {"model": str(folder), "repo_id": "someone/model", "license": "mit", "dry_run": True}
    with pytest.raises(SettingsError, match="does not load without the package") as error:
        export_model(ExportArguments(**settings))
    assert "--code package" in str(error.value)
    lines = []
    facts = export_model(ExportArguments(**settings, code="package", output_dir=str(tmp_path / "out")), lines.append)
    assert facts["dry_run"]
    assert (tmp_path / "out" / "outputs_peer.py").is_file()
    assert "import nothing" in path.read_text()  # the folder itself is not changed
    assert not (folder / "README.md").exists()
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()
    assert lines[-1] == "dry run: nothing was sent to someone/model"


@pytest.mark.slow
def test_code_that_computes_something_else_is_refused(tiny_config, tmp_path):
    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path)
    path = tmp_path / "modeling_peer.py"
    path.write_text(path.read_text().replace("logits = self.lm_head(", "logits = 1.5 * self.lm_head("))
    with pytest.raises(SettingsError, match=r"compute other values, relative difference 0\.\d+, allowed 0\.0001"):
        check_model(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": None}, "--model is missing"),
        ({"repo_id": None}, "--repo_id is missing"),
        ({"repo_id": "model"}, r"--repo_id \(model\) must be owner/name"),
        ({"repo_id": "a//b"}, "--repo_id 'a//b' is not a valid name"),
        ({"model": "runs/nope"}, "--model 'runs/nope': no such folder"),
        ({"code": "mine"}, r"--code \(mine\) must be one of folder, package"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_at_once(tiny_config, tmp_path, settings, message):
    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path)
    given = {"model": str(tmp_path), "repo_id": "someone/model", "license": "mit", **settings}
    with pytest.raises(SettingsError, match=message):
        export_model(ExportArguments(**given))


def test_nothing_is_loaded_before_licence_files_and_folder_are_known_to_do(tiny_config, tmp_path, monkeypatch):
    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("modeling_peer.hub.export.check_model", lambda folder: 1 / 0)
    settings = {"model": str(tmp_path / "model"), "repo_id": "someone/model", "dry_run": True}
    with pytest.raises(SettingsError, match="states no licence"):
        export_model(ExportArguments(**settings))
    with pytest.raises(SettingsError, match="must be a new or empty folder"):
        export_model(ExportArguments(**settings, license="mit", output_dir=str(tmp_path / "model")))
