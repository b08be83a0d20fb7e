# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint carries the code of its own layers, and says what is missing when asked for others."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from test_checkpoint_peer import TRAVELLING_FILES

import modeling_peer
from modeling_peer import PeerConfig, PeerForCausalLM, PeerModel
from modeling_peer.configuration_peer import SPARSE_MLPS
from modeling_peer.sparse_mlps_peer import sparse_mlp_class
from modeling_peer.travelling_code_peer import LAYER_FILES, keep_own_layers

PACKAGE = Path(modeling_peer.__file__).parent
PRODUCT_KEYS, MIXTURE = {"layer_peer.py", "one_call_peer.py"}, {"moe_experts_peer.py"}
OWN_FILES = {
    "peer": PRODUCT_KEYS,
    "product_key_memory": PRODUCT_KEYS | {"product_key_memory_peer.py"},
    "hashed_memory": {"hashed_memory_peer.py"},
    "top_k_moe": MIXTURE | {"top_k_moe_peer.py"},
    "expert_choice_moe": MIXTURE | {"expert_choice_moe_peer.py"},
    "soft_moe": MIXTURE | {"soft_moe_peer.py"},
    "multilinear_moe": MIXTURE | {"multilinear_moe_peer.py"},
}


@pytest.fixture
def new_config(tiny_config):
    def build(sparse_mlp, **overrides):
        sizes = {"num_hidden_layers": 1, "num_moe_experts": 4, "moe_intermediate_size": 16}
        return tiny_config(sparse_mlp=sparse_mlp, is_causal=sparse_mlp != "soft_moe", **{**sizes, **overrides})

    return build


def code_in(folder):
    return {path.name for path in Path(folder).glob("*.py")}


def test_every_layer_has_its_files_here_and_all_exist():
    assert OWN_FILES.keys() == set(SPARSE_MLPS)
    assert set().union(*OWN_FILES.values()) == LAYER_FILES
    assert all((PACKAGE / name).is_file() for name in LAYER_FILES)


@pytest.mark.parametrize("sparse_mlp", SPARSE_MLPS)
def test_a_checkpoint_carries_the_code_of_its_own_layers_alone(new_config, tmp_path, sparse_mlp):
    config = new_config(sparse_mlp)
    PeerModel(config).save_pretrained(tmp_path / "model")
    config.save_pretrained(tmp_path / "configuration")
    expected = TRAVELLING_FILES - LAYER_FILES | OWN_FILES[sparse_mlp]
    assert code_in(tmp_path / "model") == expected
    assert code_in(tmp_path / "configuration") == expected
    for name in expected - {"sparse_mlps_peer.py"}:
        assert (tmp_path / "model" / name).read_bytes() == (PACKAGE / name).read_bytes(), name
    package = (PACKAGE / "sparse_mlps_peer.py").read_text().splitlines()
    lines = (tmp_path / "model" / "sparse_mlps_peer.py").read_text().splitlines()
    left_out = [line for line in package if line not in lines]
    assert len(left_out) == len(SPARSE_MLPS) - 1
    assert all(line.startswith("    from .") for line in left_out)


def test_a_hashed_memory_beside_another_layer_brings_its_code(new_config, tmp_path):
    PeerModel(new_config("peer", parallel_hashed_memory=True)).save_pretrained(tmp_path)
    assert code_in(tmp_path) == TRAVELLING_FILES - LAYER_FILES | PRODUCT_KEYS | OWN_FILES["hashed_memory"]


def test_another_layer_saved_into_the_folder_replaces_the_code_of_the_first(new_config, tmp_path):
    (tmp_path / "mine_peer.py").write_text("precious")
    for sparse_mlp in ("top_k_moe", "peer", "product_key_memory", "peer"):
        PeerModel(new_config(sparse_mlp)).save_pretrained(tmp_path)
        assert code_in(tmp_path) & LAYER_FILES == OWN_FILES[sparse_mlp]
    new_config("soft_moe").save_pretrained(tmp_path)
    assert code_in(tmp_path) & LAYER_FILES == OWN_FILES["soft_moe"]
    assert (tmp_path / "mine_peer.py").read_text() == "precious"


def test_a_pushed_configuration_has_its_code_and_no_more(new_config, tmp_path, monkeypatch):
    uploaded = []
    hub = type("Hub", (), {"create_repo": lambda self, repo_id, **options: type("Url", (), {"repo_id": repo_id})})
    monkeypatch.setattr("transformers.configuration_utils.hf_api", hub, raising=False)
    monkeypatch.setattr("huggingface_hub.create_repo", hub().create_repo)
    monkeypatch.setattr(
        "transformers.utils.hub.PushToHubMixin._upload_modified_files",
        lambda self, folder, *args, **options: uploaded.append(code_in(folder)),
    )
    new_config("peer").save_pretrained(str(tmp_path / "pushed"), push_to_hub=True)
    assert uploaded == [TRAVELLING_FILES]


def test_code_without_the_layer_is_named_with_the_way_out(new_config, tmp_path, monkeypatch):
    new_config("peer").save_pretrained(tmp_path)
    message = r"sparse_mlp='soft_moe' needs soft_moe_peer\.py, .*config\.json\. Or install the package modeling_peer"
    with pytest.raises(ValueError, match=message):
        keep_own_layers(tmp_path, ["soft_moe"])
    monkeypatch.setattr("modeling_peer.sparse_mlps_peer.__package__", "modeling_peer.console")  # has no such module
    with pytest.raises(ValueError, match=message):
        sparse_mlp_class("soft_moe")


def test_an_import_that_fails_inside_a_layer_is_not_taken_for_a_missing_layer(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr("modeling_peer.sparse_mlps_peer.import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        sparse_mlp_class("peer")


REMOTE = """
    import os, sys
    order, *folders, out = sys.argv[1:]
    if order == "without the package":
        class Hidden:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("modeling_peer", "numba", "triton"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Hidden())
    if order == "package first":
        import modeling_peer
    import torch
    from transformers import AutoConfig, AutoModel

    tokens, states = torch.arange(1, 13).view(2, 6), {}
    for folder in folders:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        # Transformers prefers classes that were registered before. The code of the first folder imports the package,
        # where it is installed, for its kernels.
        from_folder = order == "without the package" or (order == "package last" and folder == folders[0])
        assert type(model).__module__.startswith("transformers_modules.") == from_folder, type(model)
        states[folder] = model(tokens)[0]
        model.save_pretrained(f"{folder}-again")
        AutoConfig.from_pretrained(folder, trust_remote_code=True).save_pretrained(f"{folder}-configuration")

        if order != "without the package":
            continue  # the package has every layer
        # A layer that this checkpoint's code does not have.
        other = "multilinear_moe"
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        config.sparse_mlp = other
        calls = [
            lambda: AutoModel.from_pretrained(folder, trust_remote_code=True, sparse_mlp=other),
            lambda: AutoModel.from_config(config, trust_remote_code=True),
            lambda: config.save_pretrained(f"{folder}-other"),
        ]
        for call in calls:
            try:
                call()
            except ValueError as error:
                assert f"sparse_mlp='{other}' needs {other}_peer.py" in str(error), error
            else:
                raise SystemExit(f"{folder} took another layer")

    if order != "without the package":
        import modeling_peer
        for folder in folders:
            own = modeling_peer.PeerModel.from_pretrained(folder).eval()
            torch.testing.assert_close(own(tokens)[0], states[folder])
            assert type(own).__module__ == "modeling_peer.modeling_peer"
    torch.save(states, out)
"""


def run_remote(tmp_path, order, *folders):
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(PACKAGE.parent)
    command = [sys.executable, "-c", textwrap.dedent(REMOTE), order, *map(str, folders), tmp_path / "states.pt"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    return torch.load(tmp_path / "states.pt")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["without the package", "package first", "package last"])
def test_checkpoints_of_several_layers_load_by_their_own_code_in_one_process(new_config, tmp_path, order):
    models = {name: PeerModel(new_config(name)).eval() for name in ("peer", "product_key_memory", "top_k_moe")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    states = run_remote(tmp_path, order, *(tmp_path / name for name in models))
    tokens = torch.arange(1, 13).view(2, 6)
    for name, model in models.items():
        torch.testing.assert_close(states[str(tmp_path / name)], model(tokens).last_hidden_state)
        assert code_in(tmp_path / f"{name}-again") == code_in(tmp_path / name)
        assert code_in(tmp_path / f"{name}-configuration") == code_in(tmp_path / name)


@pytest.mark.slow
def test_a_checkpoint_that_carries_all_code_loads_and_saves_its_own(new_config, tmp_path):
    """As earlier releases saved them: with every layer, and without a list of their own."""
    model = PeerModel(new_config("peer")).eval()
    model.save_pretrained(tmp_path / "whole")
    for path in PACKAGE.glob("*_peer.py"):
        shutil.copy(path, tmp_path / "whole")
    script = REMOTE.partition("        if order !=")[0] + "    torch.save(states, out)\n"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script), "without the package", tmp_path / "whole", "states.pt"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    states = torch.load(tmp_path / "states.pt")[str(tmp_path / "whole")]
    torch.testing.assert_close(states, model(torch.arange(1, 13).view(2, 6)).last_hidden_state)
    assert code_in(tmp_path / "whole-again") == TRAVELLING_FILES
    assert isinstance(PeerForCausalLM.from_pretrained(tmp_path / "whole").config, PeerConfig)
