# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Tables that stay in their file: the same bits, no memory of the process, and rows requested before they are read."""

import copy
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from modeling_peer import PeerForCausalLM, experts_peer, table_placement_peer
from modeling_peer.mapped_memory_peer import PAGE, is_mapped_file
from modeling_peer.table_placement_peer import MappedTables

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
