# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What is special to the CPU kernels: threads, forks, ids that do not exist, memory, sizes."""

import os
import threading
import weakref
from functools import partial

import numpy as np
import pytest
import reference
import torch
from kernel_helpers import mixture_inputs, output_and_gradients
from torch import nn

from modeling_peer.backends_peer import EXPERT_MIXTURE_FUNCTIONS, RETRIEVAL_FUNCTIONS

pytest.importorskip("numba")

from modeling_peer.kernels.cpu import memory as cpu_memory


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_bits(threads):
    inputs = mixture_inputs("cpu", num_tokens=200, num_active=32, width=20, num_experts=300)
    query, sub_keys = torch.randn(200, 4, 16), torch.randn(2, 30, 8)
    results = []
    for number in (1, 2, 5):
        threads(number)
        output, gradients = output_and_gradients(EXPERT_MIXTURE_FUNCTIONS["cpu"], inputs)
        results.append([output, *gradients.values(), *RETRIEVAL_FUNCTIONS["cpu"](query, sub_keys, 4)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_several_threads_of_a_program_may_call_at_once(threads):
    threads(2)
    inputs = mixture_inputs("cpu", num_tokens=100, num_active=32)
    expected = EXPERT_MIXTURE_FUNCTIONS["cpu"](**inputs)
    outputs = [None] * 4

    def call(i):
        outputs[i] = EXPERT_MIXTURE_FUNCTIONS["cpu"](**inputs)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(output, expected) for output in outputs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_computes_too(threads):
    threads(2)
    # Nothing but the kernel: PyTorch's own parallel operations may hang in a forked process.
    arguments = (torch.randn(100, 7), torch.randint(9, (100, 32)), torch.randn(9, 7), None, False, "cpu")
    expected = torch.ops.modeling_peer.read_experts(*arguments)
    child = os.fork()
    if child == 0:
        products = torch.ops.modeling_peer.read_experts(*arguments)
        os._exit(0 if bool((products.numpy() == expected.numpy()).all()) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_storages_stay_resizable_as_fsdp_needs_them():
    inputs = mixture_inputs("cpu")
    output_and_gradients(EXPERT_MIXTURE_FUNCTIONS["cpu"], inputs)
    query, sub_keys = torch.randn(70, 2, 8), torch.randn(2, 9, 4)
    RETRIEVAL_FUNCTIONS["cpu"](query, sub_keys, 3)
    assert all(tensor.untyped_storage().resizable() for tensor in (*inputs.values(), query, sub_keys))


def test_a_table_of_more_than_2_to_the_31_elements(monkeypatch):
    monkeypatch.setattr(cpu_memory, "MIN_BYTES", 2**60)  # only the pages of the rows in use are ever touched
    memory = np.zeros((2**20, 2056), np.uint16)
    table = torch.from_numpy(memory).view(torch.bfloat16).requires_grad_()
    ids = torch.tensor([[2**20 - 1, 3, 2**20 - 1]])
    with torch.no_grad():
        table[ids[0, 0]], table[3] = 2.0, 1.0
    tokens, gates = torch.ones(1, 2056, requires_grad=True), torch.tensor([[1.0, 2.0, 3.0]])
    output = EXPERT_MIXTURE_FUNCTIONS["cpu"](
        tokens, ids, gates, table, table, activation=nn.Identity(), row_sparse_gradients=True
    )
    assert (output == (1 + 3) * 2 * 2056 * 2 + 2 * 2056 * 1).all()
    output.sum().backward()
    assert table.grad.coalesce().indices().tolist() == [[3, 2**20 - 1]]


@pytest.mark.parametrize(("wrong", "numbers"), [(-1, "from -1 to"), (9, "to 9.*9 experts")])
def test_an_expert_that_does_not_exist_is_refused_with_the_numbers(wrong, numbers):
    inputs = mixture_inputs("cpu")
    inputs["expert_ids"][3, 2] = wrong
    with pytest.raises(IndexError, match=numbers):
        EXPERT_MIXTURE_FUNCTIONS["cpu"](**inputs)


def test_memory_of_a_training_step_depends_on_touched_rows_and_not_on_the_pool():
    def peak(num_experts):
        inputs = mixture_inputs("cpu", num_tokens=8, num_active=16, width=64, num_experts=num_experts)
        step = partial(EXPERT_MIXTURE_FUNCTIONS["cpu"], **inputs, row_sparse_gradients=True)
        return reference.peak_memory(lambda: step().sum().backward())

    rows = 8 * 16 * 64 * 4  # bytes of all rows a step can touch in one table
    assert abs(peak(100_000) - peak(1_000)) < rows
    assert peak(100_000) < 6 * rows


def test_a_table_is_moved_to_huge_pages_once_and_so_is_the_next_in_its_place(monkeypatch):
    monkeypatch.setattr(cpu_memory, "MIN_BYTES", 1000)
    moved = []
    monkeypatch.setattr(cpu_memory, "_move", lambda storage, *memory: moved.append(memory))
    before = set(cpu_memory._moved)
    for _ in range(2):
        table = nn.Parameter(torch.empty(300, 1))
        for _ in range(3):
            cpu_memory.move_to_huge_pages(table.detach())  # as an operator sees it
        cpu_memory.wait_for_huge_pages()
        assert len(cpu_memory._moved - before) == 1
        assert moved[-1] == (table.data_ptr(), 1200)
        del table
        assert cpu_memory._moved == before
    assert len(moved) == 2


def test_only_whole_huge_pages_within_a_table_are_moved_and_no_freed_table(monkeypatch):
    advised = []
    monkeypatch.setattr(cpu_memory, "advise", lambda *advice: advised.append(advice))
    monkeypatch.setattr(cpu_memory, "MOVED_AT_ONCE", 2 * cpu_memory.BYTES_OF_HUGE_PAGE)
    table = torch.empty(5 * 2**21 // 4)
    address, size = table.data_ptr(), cpu_memory.BYTES_OF_HUGE_PAGE
    storage = weakref.ref(table.untyped_storage())
    cpu_memory._move(storage, address, table.nbytes)
    assert {advice for *_, advice in advised} == {cpu_memory.HUGE_PAGE, cpu_memory.COLLAPSE}
    assert all(start % size == 0 and length % size == 0 for start, length, _ in advised)
    assert address <= min(start for start, *_ in advised)
    assert max(start + length for start, length, _ in advised) <= address + table.nbytes
    assert sum(length for *_, length, advice in advised if advice == cpu_memory.COLLAPSE) >= 4 * size
    advised.clear()
    del table
    cpu_memory._move(storage, address, 5 * 2**21)
    assert advised == []


def test_a_mapped_table_is_not_moved(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_memory, "MIN_BYTES", 1000)
    monkeypatch.setattr(cpu_memory, "_move", lambda *_: pytest.fail("the file would be read into memory"))
    table = torch.from_file(str(tmp_path / "table"), shared=True, size=2000).view(20, 100)
    cpu_memory.move_to_huge_pages(table)
    cpu_memory.wait_for_huge_pages()
    assert cpu_memory.is_mapped_file(table.data_ptr())
