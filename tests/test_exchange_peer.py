# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A save replaces the files of a folder or leaves them, whatever call of the file system fails and wherever it is
killed."""

import contextlib
import errno
import functools
import json
import multiprocessing
import os
import stat
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from modeling_peer import PeerConfig, PeerForCausalLM, quantise_expert_tables
from modeling_peer.exchange_peer import STAGING_PREFIX, restore_old_files, staged_save
from modeling_peer.files_peer import write_text

OPERATIONS = ("replace", "rename", "unlink", "mkdir", "rmdir", "chmod", "fsync")
INDEX = "model.safetensors.index.json"
ONE = {"config.json": "1", "generation_config.json": "1", "layer_peer.py": "1", "model.safetensors": "1"}
TWO = dict.fromkeys(ONE, "2")
IN_THREE = {"config.json": "3", INDEX: "3", "model-00001-of-00002.safetensors": "3", "layer_peer.py": "1"}
IN_THREE["model-00002-of-00002.safetensors"] = "3"
ADAPTER = {"adapter_config.json": "1", "adapter_model.safetensors": "1"}
PAIRS = {
    "another model": (ONE, TWO),
    "other weights": (ONE, ONE | {"model.safetensors": "2"}),
    "other weights and generation": (ONE, ONE | {"model.safetensors": "2", "generation_config.json": "2"}),
    "a base model, which does not generate": (
        ONE,
        {"config.json": "2", "model.safetensors": "2", "layer_peer.py": "2"},
    ),
    "shards": (ONE, IN_THREE),
    "shards of the same configuration": (ONE, IN_THREE | {"config.json": "1", "generation_config.json": "1"}),
    "one file for shards": (IN_THREE, ONE),
    "other shards": (IN_THREE, {name.replace("2.s", "3.s"): "1" for name in IN_THREE}),
    "a model where none was": ({}, ONE),
    "another adapter": (ADAPTER, dict.fromkeys(ADAPTER, "2")),
    "an adapter in a folder": (ADAPTER, ADAPTER | {"named/adapter_model.safetensors": "2", "named/x.json": "2"}),
}
BYSTANDER = {"tokenizer.json": "not ours"}


def save(folder, files):
    with staged_save(folder) as staging:
        for name, text in files.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(text)


def read(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = {path.relative_to(folder).as_posix(): path.read_text() for path in files}
    return {name: found[name] for name in found if not name.startswith(STAGING_PREFIX) and name not in BYSTANDER}


def loads(files):
    return "config.json" in files or "adapter_config.json" in files


def counted(act):
    """Each of the file system's calls, `act(n)` before the n-th."""
    calls = iter(range(10_000))

    def wrap(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            act(next(calls))
            return function(*args, **kwargs)

        return call

    return {name: wrap(getattr(os, name)) for name in OPERATIONS}


@contextlib.contextmanager
def patched(functions):
    genuine = {name: getattr(os, name) for name in functions}
    for name, function in functions.items():
        setattr(os, name, function)
    try:
        yield
    finally:
        for name, function in genuine.items():
            setattr(os, name, function)


@pytest.fixture(params=PAIRS, ids=lambda name: name.replace(" ", "-"))
def pair(request):
    return PAIRS[request.param]


@pytest.fixture
def folders(tmp_path, pair, monkeypatch):
    """New folders with the old files and one that is not ours, until the test has seen every moment."""

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the operating system lives on

    def one_more():
        for number in range(200):
            folder = tmp_path / str(number)
            folder.mkdir()
            for name, text in (pair[0] | BYSTANDER).items():
                (folder / name).write_text(text)
            yield number, folder
        raise AssertionError("a save takes more than 200 calls")

    return one_more()


def save_and_die(folder, files, moment):
    with patched(counted(lambda number: os._exit(9) if number == moment else None)):
        save(folder, files)
    os._exit(0)


@pytest.mark.slow_but_first
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_save_killed_at_any_moment_leaves_old_files_new_files_or_what_does_not_load(pair, folders):
    old, new = pair
    changes = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    for moment, folder in folders:
        process = multiprocessing.get_context("fork").Process(target=save_and_die, args=(folder, new, moment))
        process.start()
        process.join()
        found = read(folder)
        assert found in (old, new) or not loads(found), (moment, found)
        if len(changes) == 1:
            assert found in (old, new), (moment, found)  # in one step
        restore_old_files(folder)
        if loads(old):
            assert read(folder) in (old, new), (moment, read(folder))
        assert not list(folder.glob(f"{STAGING_PREFIX}*")), moment
        save(folder, new)
        assert read(folder) == new, moment
        assert (folder / "tokenizer.json").read_text() == "not ours"
        if process.exitcode == 0:
            break


@pytest.mark.parametrize("how_often", ["once", "from then on"])
def test_a_save_of_which_any_call_fails_leaves_old_files_new_files_or_what_does_not_load(pair, folders, how_often):
    old, new = pair
    for moment, folder in folders:
        seen = []

        def fail(number, moment=moment, seen=seen):
            seen.append(number)
            if number == moment or (number > moment and how_often == "from then on"):
                raise OSError(errno.EIO, "Input/output error")

        raised = None
        with patched(counted(fail)):
            try:
                save(folder, new)
            except OSError as error:
                raised = str(error)
        assert raised is None or "Input/output error" in raised
        found = read(folder)
        if how_often == "once":
            assert found in (old, new), (moment, found)
        assert found in (old, new) or not loads(found), (moment, found)
        assert raised is not None or found == new, "it failed in silence"
        restore_old_files(folder)
        if loads(old):
            assert read(folder) in (old, new), (moment, read(folder))
        # what could not be cleared holds no file that is missed
        assert not list(folder.glob(f"{STAGING_PREFIX}*/old/*")) or found == new, moment
        if moment not in seen:
            break


def test_what_a_dead_save_left_is_not_put_back_over_what_came_after_it(tmp_path):
    for name, text in ONE.items():
        (tmp_path / name).write_text(text)
    for moment in range(200):  # until one is in the midst of the exchange
        process = multiprocessing.get_context("fork").Process(target=save_and_die, args=(tmp_path, TWO, moment))
        process.start()
        process.join()
        if not loads(read(tmp_path)):
            break
        save(tmp_path, ONE)
    assert process.exitcode == 9
    for name in ONE:
        (tmp_path / name).write_text("downloaded again")
    restore_old_files(tmp_path)
    assert read(tmp_path) == dict.fromkeys(ONE, "downloaded again")


def test_a_folder_by_the_name_of_a_file_stops_a_save_before_anything_changes(tmp_path):
    save(tmp_path, ONE)
    (tmp_path / "layer_peer.py").unlink()
    (tmp_path / "layer_peer.py").mkdir()
    (tmp_path / "layer_peer.py" / "mine").write_text("precious")
    before = read(tmp_path)
    with pytest.raises(IsADirectoryError, match=r"the model has a file layer_peer\.py, and a folder"):
        save(tmp_path, TWO)
    assert read(tmp_path) == before


def test_only_staging_folders_that_nobody_holds_are_cleared(tmp_path):
    """Whoever holds the lock lives, in this container or another; a process id may be of someone else by now."""
    fcntl = pytest.importorskip("fcntl")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "precious").mkdir(parents=True)
    model = tmp_path / "model"
    names = {
        "held": f"{STAGING_PREFIX}another-host-1-abc",
        "released": f"{STAGING_PREFIX}third-host-{os.getpid()}-abc",
        "odd": f"{STAGING_PREFIX}a\nb-99999999999999999999999-c",
        "no number": f"{STAGING_PREFIX}",
    }
    for name in names.values():
        (model / name).mkdir(parents=True)
    (model / f"{STAGING_PREFIX}link").symlink_to(elsewhere)
    (model / f"{STAGING_PREFIX}file").write_text("")
    for name in ("held", "released"):
        (model / names[name] / "lock").write_text("")
    outside = {"new": ["x"], "old": ["../../elsewhere/precious"], "last": "config.json"}
    (model / names["released"] / "exchange.json").write_text(json.dumps(outside))
    with open(model / names["held"] / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        save(model, ONE)
    left = {path.name for path in model.glob(f"{STAGING_PREFIX}*")}
    assert left == {names["held"], names["odd"], names["no number"], f"{STAGING_PREFIX}link", f"{STAGING_PREFIX}file"}
    assert (elsewhere / "precious").is_dir()
    assert read(model)["config.json"] == "1"


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
@pytest.mark.parametrize("kind", ["one file", "files of tables", "quantised"])
def test_files_get_the_permissions_that_the_umask_leaves(tiny_config, tmp_path, monkeypatch, umask, kind):
    monkeypatch.setattr("modeling_peer.table_shards_peer.MIN_BYTES", 2**20 if kind == "one file" else 0)
    model = PeerForCausalLM(tiny_config(num_hidden_layers=1))
    if kind == "quantised":
        quantise_expert_tables(model, "int4")
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    files = list((tmp_path / "model").iterdir())
    assert ("model-layer-000-experts.safetensors" in {path.name for path in files}) == (kind != "one file")
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o777 & ~umask


def test_everything_is_on_the_disk_before_the_first_file_is_replaced(tmp_path, monkeypatch):
    save(tmp_path, ONE)
    flushed, moved = set(), []

    def fsync(descriptor):
        flushed.add(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    def replace(source, target, replace=os.replace):
        moved.append((os.path.basename(target), set(flushed)))
        replace(source, target)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save(tmp_path, TWO)
    assert [name for name, _ in moved][-1] == "config.json"
    for name, before in moved:
        assert set(TWO) <= before, name
    assert tmp_path.name in flushed


def test_a_text_file_is_as_it_was_when_writing_it_fails(tmp_path, monkeypatch):
    write_text(tmp_path / "results.json", "old")

    def full_disk(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "results.json", "new")
    assert read(tmp_path) == {"results.json": "old"}


class TestReadingBesideASave:
    @pytest.fixture
    def models(self, tiny_config):
        return [PeerForCausalLM(tiny_config(num_hidden_layers=layers)).eval() for layers in (2, 3)]

    def saves_during_next_read(self, monkeypatch, save):
        """`save()` comes after the configuration is read and before the weights are."""
        genuine = PreTrainedModel.from_pretrained.__func__
        times = []

        def from_pretrained(cls, *args, **kwargs):
            if kwargs.get("config") is None:
                kwargs["config"] = PeerConfig.from_pretrained(args[0])
            if not times:
                times.append(1)
                save()
            kwargs["ignore_mismatched_sizes"] = True
            return genuine(cls, *args, **kwargs)

        monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))

    def test_the_model_is_read_again_when_its_files_were_replaced(self, models, tmp_path, monkeypatch):
        models[0].save_pretrained(tmp_path)
        self.saves_during_next_read(monkeypatch, lambda: models[1].save_pretrained(tmp_path))
        loaded = PeerForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.num_hidden_layers == 3
        for name, value in models[1].state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name

    def test_a_configuration_read_before_is_not_used_with_weights_that_came_after(self, models, tmp_path, monkeypatch):
        models[0].save_pretrained(tmp_path)
        self.saves_during_next_read(monkeypatch, lambda: models[1].save_pretrained(tmp_path))
        with pytest.raises(OSError, match=r"replaced during loading.*Load it again"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
        assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 3

    def test_weights_replaced_in_one_step_are_the_old_ones_or_the_new(self, models, tmp_path, monkeypatch):
        models[0].save_pretrained(tmp_path)
        other = PeerForCausalLM(models[0].config)
        self.saves_during_next_read(monkeypatch, lambda: other.save_pretrained(tmp_path))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded.lm_head.weight, other.lm_head.weight)


class TestWithoutConfiguration:
    @pytest.fixture
    def folder(self, tiny_config, tmp_path):
        PeerForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "config.json").unlink()
        return tmp_path / "model"

    @pytest.mark.parametrize("load", [PeerForCausalLM.from_pretrained, PeerConfig.from_pretrained])
    def test_a_folder_is_no_model_of_the_default_sizes(self, folder, load):
        with pytest.raises(OSError, match=r"has no config\.json"):
            load(folder)
        (folder / "config.json").write_text("{}")
        with pytest.raises(OSError, match="or an empty one"):
            load(folder)

    def test_a_configuration_that_is_passed_in_is_used(self, folder, tiny_config):
        assert PeerForCausalLM.from_pretrained(folder, config=tiny_config()).config.hidden_size == 32


LOADS = {
    "remote code": "from transformers import AutoModelForCausalLM\n"
    "model = AutoModelForCausalLM.from_pretrained('.', trust_remote_code=True)",
    "package": "from modeling_peer import PeerForCausalLM\nmodel = PeerForCausalLM.from_pretrained('.')",
}


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False], ids=["with-the-package", "without-it"])
@pytest.mark.parametrize("load", LOADS)
def test_a_checkpoint_loads_where_its_folder_is_the_working_directory(tiny_config, tmp_path, load, installed):
    """It holds a modeling_peer.py, which Python takes for the package of that name."""
    import modeling_peer

    PeerForCausalLM(tiny_config()).save_pretrained(tmp_path / "my-peer")
    script = f"{LOADS[load]}\nmodel.save_pretrained('../again')\nimport modeling_peer\nprint(modeling_peer.__file__)"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    root = os.path.dirname(os.path.dirname(modeling_peer.__file__))
    environment["PYTHONPATH"] = root if installed else ""
    if not installed:
        hide = "import sys, site; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in repr(f)]\n"
        hide += f"sys.path[:] = [p for p in sys.path if p != {root!r}]\n"
        script = hide + script
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "my-peer", env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    expected = modeling_peer.__file__ if installed else str(tmp_path / "my-peer" / "modeling_peer.py")
    assert process.stdout.splitlines()[-1] == expected
    assert {"modeling_peer.py", "checkpoint_peer.py", "config.json"} <= set(os.listdir(tmp_path / "again"))
