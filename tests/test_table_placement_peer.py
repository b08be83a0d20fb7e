# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Tables that stay in their file: the same bits, no memory of the process, and rows requested before they are read."""

import copy
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers.utils import logging

from modeling_peer import (
    PeerForCausalLM,
    experts_peer,
    mapped_memory_peer,
    quantise_expert_tables,
    table_placement_peer,
)
from modeling_peer.mapped_memory_peer import PAGE, is_mapped_file
from modeling_peer.row_formats_peer import TABLE_FORMATS
from modeling_peer.table_placement_peer import MappedTables, device_beside_mapped_tables

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tables are mapped on Linux only")
TOKENS = torch.arange(1, 19).view(2, 9)
PLACEMENTS = (None, "mapped", "memory")


@pytest.fixture(params=[{}, {"gated_experts": True}, {"sparse_mlp": "product_key_memory"}], ids=str)
def folder(request, tiny_config, tmp_path):
    PeerForCausalLM(tiny_config(**request.param)).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def requests(monkeypatch):
    """Ranges of pages that were requested, with the disk in use all the time."""
    found = []
    monkeypatch.setattr(table_placement_peer, "advise", lambda *advice: found.append(advice))
    monkeypatch.setattr(
        table_placement_peer,
        "advise_all",
        lambda starts, lengths, advice: found.extend(
            (*one, advice) for one in zip(starts.tolist(), lengths.tolist(), strict=True)
        ),
    )
    monkeypatch.setattr(table_placement_peer._disk, "is_in_use", lambda: True)
    return found


def pages_of(requests):
    assert all(address % PAGE == 0 for address, *_ in requests)
    return {page for address, length, _ in requests for page in range(address // PAGE, -(-(address + length) // PAGE))}


def experts_of(model):
    return next(layer.mlp.experts for layer in model.model.layers if layer.is_sparse)


@pytest.mark.parametrize("implementation", ["eager", "cpu"])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_every_placement_gives_the_same_bits(folder, implementation, num_tokens):
    logits, tokens = [], TOKENS[:1, :num_tokens]
    for placement in PLACEMENTS:
        model = PeerForCausalLM.from_pretrained(
            folder, table_placement=placement, experts_implementation=implementation
        )
        with torch.no_grad():
            logits.append(model(tokens).logits)
        mapped = is_mapped_file(experts_of(model).up_embed.data_ptr())
        assert mapped == (placement != "memory")
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("implementation", ["eager", "cpu"])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_the_rows_of_a_call_are_requested_and_only_their_pages(folder, requests, implementation, num_tokens):
    model = PeerForCausalLM.from_pretrained(folder, table_placement="mapped", experts_implementation=implementation)
    requests.clear()  # those of loading
    with torch.no_grad():
        model(TOKENS[:1, :num_tokens])  # one call of the whole layer, if it is a single token on "cpu"
        found = pages_of(requests)
        ids = model(TOKENS[:1, :num_tokens], output_expert_ids=True).expert_ids[0]
    tables = [table for table in experts_of(model).tables() if table is not None]
    row_bytes = tables[0].stride(0) * 4
    expected = {
        (table.data_ptr() + row * row_bytes + offset) // PAGE
        for table in tables
        for row in ids.unique().tolist()
        for offset in (0, row_bytes - 1)
    }
    assert found == expected


def test_rows_that_lie_on_several_pages_are_requested_whole(requests):
    table = torch.empty(50, 3 * PAGE)  # float32: 12 pages a row
    tables = MappedTables([table], only_mapped=False)
    requests.clear()
    tables.request(torch.tensor([[3, 4], [9, 3]]))
    first = [(table.data_ptr() + row * 12 * PAGE) // PAGE for row in (3, 4, 9)]
    straddles = table.data_ptr() % PAGE > 0
    assert pages_of(requests) == {page + i for page in first for i in range(12 + straddles)}


def test_rows_on_one_page_and_on_neighbouring_pages_are_one_request(requests):
    table = torch.empty(64, PAGE // 4 // 4)  # float32: four rows a page
    tables = MappedTables([table], only_mapped=False)
    tables.tables = [(0, 64, PAGE // 4)]
    requests.clear()
    tables.request(torch.tensor([[0, 1, 3, 5, 40, 63, 60]]))
    assert [(start // PAGE, length // PAGE) for start, length, _ in requests] == [(0, 2), (10, 1), (15, 1)]
    requests.clear()
    tables.request(torch.tensor([[]], dtype=torch.int64))
    assert requests == []


@pytest.mark.parametrize("together", [True, False])
def test_advice_on_many_ranges_is_given_together_or_one_by_one(tmp_path, monkeypatch, together):
    if not together:
        monkeypatch.setattr(mapped_memory_peer, "_advise_together", lambda ranges, advice: False)
    monkeypatch.setattr(mapped_memory_peer, "MAX_RANGES", 3)
    advice = []
    monkeypatch.setattr(mapped_memory_peer, "advise", lambda *one: advice.append(one))
    file = tmp_path / "table"
    file.write_bytes(bytes(64 * PAGE))
    table = torch.from_file(str(file), size=64 * PAGE, dtype=torch.uint8)
    starts = table.data_ptr() + PAGE * torch.tensor([0, 5, 9, 20, 33])
    mapped_memory_peer.advise_all(starts, torch.full_like(starts, 2 * PAGE), mapped_memory_peer.WILL_NEED)
    if together and advice:
        pytest.skip("this system takes advice on one range at a time")
    expected = [] if together else [(start, 2 * PAGE, mapped_memory_peer.WILL_NEED) for start in starts.tolist()]
    assert advice == expected


def test_ids_that_do_not_exist_are_left_to_the_function_that_reads(folder, requests):
    model = PeerForCausalLM.from_pretrained(folder, table_placement="mapped", experts_implementation="cpu")
    experts = experts_of(model)
    width = model.config.hidden_size
    for wrong in (-1, 10**12):
        with pytest.raises(IndexError), torch.no_grad():
            experts(torch.randn(1, width), torch.tensor([[wrong, 3]]), torch.ones(1, 2))


def test_requests_stop_while_nothing_is_read_from_the_disk(monkeypatch):
    faults = iter([5, 5, *[5] * 63, 5, 5, 6, 6])

    class Usage:
        @property
        def ru_majflt(self):
            return next(faults)

    monkeypatch.setattr(table_placement_peer, "getrusage", lambda who: Usage())
    disk = table_placement_peer._Disk()
    in_use = [disk.is_in_use() for _ in range(69)]
    assert in_use[:64] == [True] * 64
    assert in_use[64:67] == [False] * 3
    assert in_use[67:] == [True] * 2


def test_the_last_call_with_requests_leaves_some_rows_out_so_that_a_fault_shows(requests, monkeypatch):
    monkeypatch.setattr(table_placement_peer, "PROBING_ROWS", 2)
    table = torch.empty(50, PAGE)  # float32: 4 pages a row
    tables = MappedTables([table], only_mapped=False)
    monkeypatch.setattr(table_placement_peer._disk, "calls_left", 2)
    ids = torch.tensor([[30, 9, 20, 40]])
    requests.clear()
    tables.request(ids)
    all_rows = pages_of(requests)
    requests.clear()
    monkeypatch.setattr(table_placement_peer._disk, "calls_left", 1)
    tables.request(ids)
    first = [(table.data_ptr() + row * 4 * PAGE) // PAGE for row in (30, 40)]
    straddles = table.data_ptr() % PAGE > 0
    assert pages_of(requests) == {page + i for page in first for i in range(4 + straddles)}
    assert len(all_rows) == 2 * len(pages_of(requests))


@pytest.mark.slow
def test_pages_of_a_cached_file_are_mapped_before_their_first_use(tmp_path):
    """In a process of its own, where nothing else touches pages."""
    script = """
        import mmap, resource, sys
        import numpy as np
        from modeling_peer.mapped_memory_peer import PAGE, map_cached_pages

        def faults_of(use):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            use()
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        size = 2**24
        with open(sys.argv[1], "wb") as file:
            file.write(bytes(size))  # and so it is in the page cache
        with open(sys.argv[1], "rb") as file:
            views = [np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8) for _ in range(2)]
        for view in views:
            view[:PAGE].sum()
        map_cached_pages(views[1].ctypes.data, size)
        print(*(faults_of(lambda view=view: view[::PAGE].sum()) for view in views))
    """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path / "table"], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    unmapped, mapped = map(int, process.stdout.split())
    if mapped == unmapped:
        pytest.skip("this kernel has no MADV_POPULATE_READ (Linux 5.14)")
    assert mapped < unmapped / 4


class TestTraining:
    @pytest.mark.parametrize("implementation", ["eager", "cpu"])
    def test_mapped_tables_are_not_trained_and_the_way_out_is_named(self, folder, implementation):
        model = PeerForCausalLM.from_pretrained(
            folder, table_placement="mapped", experts_implementation=implementation
        ).train()
        with pytest.raises(ValueError, match=r"cannot be trained\. Load the model without it .*freeze"):
            model(TOKENS, labels=TOKENS)
        model.eval()(TOKENS, labels=TOKENS)  # without a word: gradients are on by default

    def test_the_rest_trains_beside_frozen_tables_and_the_file_stays(self, folder):
        model = PeerForCausalLM.from_pretrained(folder, table_placement="mapped").train()
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        for table in experts_of(model).tables():
            if table is not None:
                table.requires_grad_(False)
        twin = PeerForCausalLM.from_pretrained(folder, table_placement="memory").train()
        for one in (model, twin):
            one(TOKENS, labels=TOKENS).loss.backward()
        for (name, mine), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            if mine.requires_grad:
                assert torch.equal(mine.grad, other.grad), name
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before

    def test_tables_that_happen_to_be_mapped_train_as_any(self, folder):
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        model = PeerForCausalLM.from_pretrained(folder).train()
        assert is_mapped_file(experts_of(model).up_embed.data_ptr())
        model(TOKENS, labels=TOKENS).loss.backward()
        torch.optim.AdamW(model.parameters()).step()
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_casting_and_moving_a_model_leave_mapped_tables_where_they_are(folder):
    model = PeerForCausalLM.from_pretrained(folder, table_placement="mapped")
    addresses = [table.data_ptr() for table in experts_of(model).tables() if table is not None]
    model.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    tables = [table for table in experts_of(model).tables() if table is not None]
    assert [table.data_ptr() for table in tables] == addresses
    assert {table.dtype for table in tables} == {torch.float32}
    with torch.no_grad():
        assert torch.isfinite(model(TOKENS).logits).all()


@pytest.mark.parametrize("table_format", [None, "int8", "int4"])
@pytest.mark.parametrize("implementation", ["eager", "cpu"])
def test_moving_only_the_retrieved_rows_gives_the_same_bits(
    tiny_config, tmp_path, monkeypatch, implementation, table_format
):
    """As for a model on an accelerator, which this test does without."""
    config = tiny_config(gated_experts=True, expert_table_format=table_format)
    PeerForCausalLM(config).save_pretrained(tmp_path)
    model = PeerForCausalLM.from_pretrained(tmp_path, table_placement="mapped", experts_implementation=implementation)
    experts, width = experts_of(model), config.hidden_size
    hidden, gates = torch.randn(5, width), torch.rand(5, 6)
    ids = torch.randint(config.num_peer_experts, (5, 6))
    monkeypatch.setitem(experts_peer.MAX_TILE_ELEMENTS, "cpu", 2 * 6 * width)  # two tokens
    with torch.no_grad():
        assert torch.equal(experts._mix_fetched_rows(hidden, ids, gates), experts(hidden, ids, gates))
        assert experts._mix_fetched_rows(hidden[:0], ids[:0], gates[:0]).shape == (0, width)


def test_a_copy_of_a_model_has_its_tables_in_memory_and_trains(folder):
    model = copy.deepcopy(PeerForCausalLM.from_pretrained(folder, table_placement="mapped")).train()
    assert experts_of(model).mapped_tables is None
    model(TOKENS, labels=TOKENS).loss.backward()
    assert experts_of(model).up_embed.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table_placement": "disk"}, r"must be one of None, mapped, memory; got 'disk'"),
        ({"table_placement": "mapped", "dtype": torch.bfloat16}, r"torch.bfloat16 on cpu.*leave dtype unset"),
    ],
    ids=["name", "dtype"],
)
def test_a_placement_that_is_not_possible_is_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        PeerForCausalLM.from_pretrained(folder, **options)


def test_a_mapped_table_takes_no_memory_of_the_process(tiny_config, tmp_path):
    """Neither by loading, nor by a move to huge pages at the first token, nor by readahead."""
    config = tiny_config(num_sub_keys=512, hidden_size=64, num_attention_heads=4)  # 64 MiB a table
    PeerForCausalLM(config).save_pretrained(tmp_path)
    script = """
        import sys, torch
        from modeling_peer import PeerForCausalLM

        def anonymous():
            with open("/proc/self/status") as status:
                return int(next(line for line in status if line.startswith("RssAnon")).split()[1]) * 1024

        small = PeerForCausalLM.from_pretrained(sys.argv[1], table_placement="mapped", experts_implementation="cpu")
        with torch.no_grad():
            small(torch.tensor([[1]])), small(torch.tensor([[1, 2, 3]]))  # kernels are loaded
        del small
        before = anonymous()
        model = PeerForCausalLM.from_pretrained(sys.argv[1], experts_implementation="cpu")
        with torch.no_grad():
            for _ in range(3):
                model(torch.tensor([[1]])), model(torch.tensor([[1, 2, 3]]))
        print(anonymous() - before)
    """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    assert int(process.stdout.splitlines()[-1]) < 2**24


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class TestQuantisedTables:
    @pytest.fixture(params=TABLE_FORMATS)
    def model(self, request, tiny_config):
        model = PeerForCausalLM(tiny_config(gated_experts=True)).eval()
        return quantise_expert_tables(model, request.param)

    @torch.no_grad()
    @pytest.mark.parametrize("implementation", ["eager", "cpu"])
    def test_every_placement_gives_the_bits_of_the_model_in_memory(self, model, tmp_path, implementation):
        model.set_experts_implementation(implementation)
        model.save_pretrained(tmp_path)
        for placement in PLACEMENTS:
            loaded = PeerForCausalLM.from_pretrained(
                tmp_path, table_placement=placement, experts_implementation=implementation
            )
            for table, saved in zip(experts_of(loaded).tables(), experts_of(model).tables(), strict=True):
                assert table.dtype == saved.dtype
                assert is_mapped_file(table.data_ptr()) == (placement != "memory")
            for num_tokens in (1, 9):
                tokens = TOKENS[:1, :num_tokens]
                assert torch.equal(loaded(tokens).logits, model(tokens).logits)

    def test_the_rest_trains_and_the_tables_refuse_with_the_way_out(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        before = bytes_of(tmp_path)
        mapped = PeerForCausalLM.from_pretrained(tmp_path, table_placement="mapped").train()
        twin = PeerForCausalLM.from_pretrained(tmp_path, table_placement="memory").train()
        for one in (mapped, twin):
            one(TOKENS, labels=TOKENS).loss.backward()
        for (name, mine), (_, other) in zip(mapped.named_parameters(), twin.named_parameters(), strict=True):
            if mine.requires_grad:
                assert torch.equal(mine.grad, other.grad), name
        with pytest.raises(ValueError, match=r"quantised expert tables do not train\. Train the other parameters"):
            experts_of(mapped).requires_grad_(True)
        assert bytes_of(tmp_path) == before

    @torch.no_grad()
    @pytest.mark.parametrize("target", ["its own folder", "another"])
    def test_a_mapped_model_is_saved_into(self, model, tmp_path, target):
        model.save_pretrained(tmp_path / "model")
        mapped = PeerForCausalLM.from_pretrained(tmp_path / "model", table_placement="mapped")
        mapped.lm_head.weight.mul_(2)
        logits = mapped(TOKENS).logits
        folder = tmp_path / ("model" if target == "its own folder" else "another")
        mapped.save_pretrained(folder)
        again = PeerForCausalLM.from_pretrained(folder, table_placement="mapped")
        assert torch.equal(again(TOKENS).logits, logits)
        assert torch.equal(mapped(TOKENS).logits, logits)  # whose file has no name any more


class TestAFileThatChangesWhileItIsMapped:
    """Without reading a row: that of a truncated file would end the process with SIGBUS."""

    @pytest.fixture
    def tables(self, folder):
        model = PeerForCausalLM.from_pretrained(folder, table_placement="mapped")
        tables = experts_of(model).mapped_tables
        tables.next_check = 0
        self.model = model
        return tables

    def test_a_truncated_one_is_refused_and_stays_refused(self, folder, tables):
        file = folder / "model.safetensors"
        size = file.stat().st_size
        os.truncate(file, size - 4096)
        message = (
            rf"model\.safetensors was changed while .* has {size - 4096} bytes, and had {size}\. Load the model again"
        )
        for _ in range(2):
            with pytest.raises(OSError, match=message):
                tables.waits_for_disk()

    def test_one_that_is_written_in_place_is_refused_by_a_forward(self, folder, tables):
        with open(folder / "model.safetensors", "r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(b"12345678")
        with pytest.raises(OSError, match=r"its content is another\. Load the model again"), torch.no_grad():
            self.model(TOKENS)

    def test_one_that_another_replaces_is_read_on(self, folder, tables):
        with torch.no_grad():
            logits = self.model(TOKENS).logits
            PeerForCausalLM(self.model.config).save_pretrained(folder)
            tables.next_check = 0
            assert torch.equal(self.model(TOKENS).logits, logits)
            (folder / "model.safetensors").unlink()
            tables.next_check = 0
            assert torch.equal(self.model(TOKENS).logits, logits)

    def test_a_time_alone_is_no_change(self, folder, tables):
        os.utime(folder / "model.safetensors", (0, 0))
        tables.waits_for_disk()
        assert tables.next_check > 0
        tables.next_check = 0
        tables.waits_for_disk()


class TestDeviceMap:
    @pytest.mark.parametrize(
        ("device_map", "device"),
        [
            (None, None),
            ("auto", None),  # Transformers decides
            ("cuda", "cuda"),
            (0, 0),
            ({"": 0}, 0),
            ({"": 0, "model.layers.1.mlp.experts": "cpu"}, 0),  # what users of Accelerate write
            ({"model.embed_tokens": 1, "model.layers": 1, "model.norm": 1, "lm_head": 1}, 1),
            ({"": 0, "model.layers.1.mlp.experts": "disk"}, None),
            ({"": 0, "model.layers.1.mlp.experts": 0}, None),
            ({"model.layers.0": 0, "model.layers.1": 1}, None),
            ({"": "disk"}, None),
        ],
        ids=str,
    )
    def test_the_device_of_everything_but_the_tables(self, device_map, device):
        assert device_beside_mapped_tables(device_map) == device

    @pytest.mark.parametrize(
        "device_map", ["meta", {"": "meta"}, {"": torch.device("meta"), "model.layers.1.mlp.experts": "cpu"}], ids=str
    )
    def test_mapped_tables_stay_and_the_rest_goes_to_the_device(self, folder, device_map):
        """Meta stands for an accelerator: it shows where tensors are, and computes nothing."""
        model = PeerForCausalLM.from_pretrained(folder, table_placement="mapped", device_map=device_map)
        tables = [table for table in experts_of(model).tables() if table is not None]
        assert all(is_mapped_file(table.data_ptr()) for table in tables)
        others = [one for one in model.parameters() if all(one is not table for table in tables)]
        assert {one.device.type for one in others} == {"meta"}

    @torch.no_grad()
    @pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
    @pytest.mark.skipif(torch.accelerator.is_available(), reason="auto would choose the accelerator")
    def test_maps_that_end_on_the_cpu_give_the_same_bits_in_every_placement(self, folder, device_map):
        expected = PeerForCausalLM.from_pretrained(folder)(TOKENS).logits
        for placement in PLACEMENTS:
            model = PeerForCausalLM.from_pretrained(folder, device_map=device_map, table_placement=placement)
            assert torch.equal(model(TOKENS).logits, expected)
            assert is_mapped_file(experts_of(model).up_embed.data_ptr()) == (placement != "memory")

    @torch.no_grad()
    @pytest.mark.parametrize("on_disk", ["model.layers.1", "model.layers.1.mlp", "model.layers.1.mlp.experts"])
    def test_layers_on_disk_work_as_accelerate_does_it_and_a_warning_names_the_better_way(
        self, folder, tmp_path, caplog, on_disk
    ):
        in_memory = PeerForCausalLM.from_pretrained(folder)
        # Accelerate refuses "" beside a module on the disk, for Llama too: the map must name every module once
        above = ["", *(on_disk[: dot.start()] for dot in re.finditer(r"\.", on_disk))]
        names = [name for name, _ in in_memory.named_modules() if name and name.rpartition(".")[0] in above]
        devices = {name: "disk" if name == on_disk else "cpu" for name in names if name not in above}
        options = {"device_map": devices, "offload_folder": tmp_path / "offload"}
        logging.enable_propagation()
        try:
            model = PeerForCausalLM.from_pretrained(folder, **options)
        finally:
            logging.disable_propagation()
        assert "offloads the expert tables of model.layers.1.mlp.experts" in caplog.text
        assert 'table_placement="mapped"' in caplog.text
        torch.testing.assert_close(model(TOKENS).logits, in_memory(TOKENS).logits)
        with pytest.raises(ValueError, match=r"on meta, which is not a view of a file.*In device_map give one device"):
            PeerForCausalLM.from_pretrained(folder, table_placement="mapped", **options)
        with pytest.raises(
            ValueError, match=r"device_map offloads model\.layers\.1\.mlp\.experts.*Leave device_map unset"
        ):
            PeerForCausalLM.from_pretrained(folder, table_placement="memory", **options)
