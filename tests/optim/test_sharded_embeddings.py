# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Embeddings trained by rows on two processes: refused where they are sharded, averaged under DDP."""

import pytest
import torch
from rank_groups import run_ranks
from sharded_embeddings import refusals, three_steps
from torch import nn

from modeling_peer.optim import parameter_groups, train_rows_sparsely


@pytest.mark.slow
def test_sharded_embeddings_are_refused_and_the_way_out_works(tmp_path):
    for said in run_ranks(2, tmp_path, refusals):
        for name in ("rows", "before"):
            assert "0 is sharded over processes" in said[name]
            assert "Leave this embedding out" in said[name]
        for name in ("groups", "clip", "average"):
            assert "0 has row-sparse gradients and is sharded over processes" in said[name]
            assert "Set 0.sparse = False, or use DistributedDataParallel" in said[name]
        assert said["way out"] == "torch.Size([10, 4])"


@pytest.mark.slow
def test_two_processes_of_ddp_take_the_steps_of_one(tmp_path):
    expected = three_steps(in_processes=False)
    for table in run_ranks(2, tmp_path, three_steps, True):
        torch.testing.assert_close(table, expected, atol=1e-6, rtol=1e-5)


def test_an_embedding_that_was_sharded_afterwards_is_refused_by_whatever_reads_the_tables():
    class Sharded(nn.Parameter):
        device_mesh = "two processes"

    model = nn.Sequential(nn.Embedding(10, 4))
    train_rows_sparsely(model, "0")
    model[0].weight = Sharded(torch.zeros(10, 4))
    with pytest.raises(ValueError, match=r"0 has row-sparse gradients and is sharded.*0.sparse = False"):
        parameter_groups(model, 0.01)
    model[0].sparse = False
    assert len(parameter_groups(model, 0.01)) == 1
