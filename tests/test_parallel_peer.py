# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Expert tables sharded over processes: the same training as in one process, and the same checkpoints."""

from functools import partial
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from parallel_training import gradients, load, sent_bytes, train
from rank_groups import run_ranks
from safetensors import safe_open
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from modeling_peer import PeerForCausalLM, quantise_expert_tables
from modeling_peer.costs.many_processes import bytes_per_token, tables
from modeling_peer.experts_peer import PeerExperts, expert_mixture, own_assignments
from modeling_peer.parallel_peer import EXPERT_ROWS, require_dense_gradients

SHARED_OUT = {"num_key_value_heads": 4, "vocab_size": 100}  # numbers that 4 ranks can share out
RMS = {"query_norm": "rms_norm"}
SHARED = {"mlp_layer_types": ["sparse", "dense", "sparse"], "share_expert_tables": True, "gated_experts": True}
MEMORY = {"sparse_mlp": "product_key_memory", "gated_memory": True}
HASHED = {"sparse_mlp": "hashed_memory"}
POOL = {
    "num_sub_keys": 6,
    "num_retrieval_heads": 2,
    "num_experts_per_head": 4,
    "query_dim": 8,
    "query_norm": "rms_norm",
}
GROWN = {
    "mlp_layer_types": ["dense", "sparse", "dense"],
    "grown_pools": [{"layers": [1], **POOL}, {"layers": [1], **POOL}],
}
ROW_SPARSE = {"row_sparse_gradients": True}
DOUBLE = {"dtype": torch.float64, "experts_implementation": "eager"}


@pytest.fixture
def checkpoint(tmp_path, tiny_config):
    """Saves a new model with these fields; the folder."""

    def save(**fields):
        PeerForCausalLM(tiny_config(**SHARED_OUT, **fields)).save_pretrained(tmp_path / "start")
        return tmp_path / "start"

    return save


def require(sizes):
    if "ep_size" not in DistributedConfig.__dataclass_fields__ and set(sizes) != {"tp_size"}:
        pytest.skip("Transformers of this age shards by tensor parallelism only")


def weights(folder, dtype=torch.float64):
    return PeerForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()


# float64, so that no score is near enough to another for a different order of summation to retrieve another expert
# (after which two runs have nothing in common). Losses are computed in float32.
@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    ("num_ranks", "sizes", "fields"),
    [
        (2, {"tp_size": 2}, RMS),
        (4, {"tp_size": 4}, {}),  # BatchNorm: every rank sees every token
        (4, {"tp_size": 4}, SHARED),
        (4, {"tp_size": 4}, {"num_sub_keys": 9}),  # 81 experts: the last rank has fewer
        (2, {"tp_size": 2}, ROW_SPARSE),
        (4, {"tp_size": 4}, SHARED | ROW_SPARSE),
        (2, {"tp_size": 2}, MEMORY | ROW_SPARSE),  # one table a layer, and a gate that every rank has
        (2, {"tp_size": 2}, HASHED | ROW_SPARSE),
        (4, {"tp_size": 4}, {"parallel_hashed_memory": True}),  # 150 rows: the last rank has fewer
        (4, {"tp_size": 4}, {"num_kept_experts": 30}),  # a slice: ids are looked up before rows are shared out
        (2, {"tp_size": 2}, RMS | GROWN),  # 36 experts in each grown pool
        (4, {"tp_size": 4}, GROWN | ROW_SPARSE),
        (4, {"tp_size": 4, "ep_size": 4}, {}),  # the same traffic, asked for by the other name
        (2, {"fsdp_size": 2}, RMS),  # tables as any other parameter
        (4, {"tp_size": 2, "fsdp_size": 2}, RMS),  # rows of rows: FSDP2 shards what tensor parallelism left
        (4, {"tp_size": 2, "fsdp_size": 2, "ep_size": 2}, RMS),
        (4, {"fsdp_size": 4, "ep_size": 2}, RMS),  # ranks have tokens of their own
        (4, {"fsdp_size": 4, "ep_size": 2}, RMS | SHARED),
        (4, {"fsdp_size": 4, "ep_size": 2}, RMS | MEMORY),
        (4, {"fsdp_size": 4, "ep_size": 2}, HASHED),
        (4, {"fsdp_size": 4, "ep_size": 2}, RMS | GROWN),
        (4, {"fsdp_size": 4, "ep_size": 2}, RMS | {"num_kept_experts": 30}),
    ],
    ids=str,
)
def test_twenty_steps_of_ranks_equal_those_of_one_process(tmp_path, checkpoint, num_ranks, sizes, fields):
    require(sizes)
    start = checkpoint(**fields)
    losses = train(start, save_to=tmp_path / "one", **DOUBLE)
    results = run_ranks(num_ranks, tmp_path, partial(train, start, sizes, save_to=tmp_path / "many", **DOUBLE))
    for losses_of_rank in results:
        torch.testing.assert_close(losses_of_rank, losses, rtol=0, atol=2e-6)  # measured 5e-7: of float32
    torch.testing.assert_close(
        weights(tmp_path / "many"), weights(tmp_path / "one"), rtol=0, atol=1e-11
    )  # measured 5e-14


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "sizes", "fields", "implementation"),
    [
        (2, {"tp_size": 2}, {}, "cpu"),
        (4, {"tp_size": 4}, SHARED | ROW_SPARSE, "cpu"),
        # so many rows that gradients stay the products they are made of
        (2, {"tp_size": 2}, {"num_sub_keys": 64} | ROW_SPARSE, "cpu"),
        # FSDP2 of torch 2.13 divides float64 gradients of a group of one twice: so these in float32, and `cpu` with it
        (4, {"fsdp_size": 4, "ep_size": 4}, RMS, "cpu"),
        (4, {"tp_size": 2, "fsdp_size": 2, "ep_size": 4}, RMS, "eager"),
    ],
    ids=str,
)
def test_ranks_equal_one_process_in_float32(tmp_path, checkpoint, num_ranks, sizes, fields, implementation):
    require(sizes)
    if implementation == "cpu":
        pytest.importorskip("numba")
    options = {"experts_implementation": implementation, "learning_rate": 1e-4}
    start = checkpoint(**fields)
    losses = train(start, save_to=tmp_path / "one", **options)
    results = run_ranks(num_ranks, tmp_path, partial(train, start, sizes, save_to=tmp_path / "many", **options))
    for losses_of_rank in results:
        torch.testing.assert_close(losses_of_rank, losses, rtol=0, atol=3e-6)  # measured 7e-7
    one, many = weights(tmp_path / "one"), weights(tmp_path / "many")
    torch.testing.assert_close(many, one, rtol=0, atol=2e-6)  # measured below 1e-6


# Upstream compares norms of bfloat16 gradients, to 2 %, and this model misses that (tests/upstream/compare.py). Scores
# that were rounded retrieve other experts, on one device too. Over ten seeds one device is 9 to 30 % off float32,
# and two ranks are 0.80 to 1.14 times as far, 1.01 in the mean. In float32 ranks and one device agree to 5e-7.
@pytest.mark.slow_but_first
@pytest.mark.parametrize("seed", [42, 1, 2])
def test_ranks_are_as_near_to_float32_as_one_process_in_bfloat16(tmp_path, tiny_config, seed):
    sizes = {"fsdp_size": 2, "ep_size": 2}
    require(sizes)
    config = tiny_config(**RMS | SHARED | SHARED_OUT | {"vocab_size": 256, "hidden_size": 64})
    torch.manual_seed(seed)
    PeerForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "start")
    tokens = torch.randint(256, (4, 64))
    exact = gradients(tmp_path / "start", tokens, torch.float32)

    def errors(of):
        return [((of[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact]

    one = mean(errors(gradients(tmp_path / "start", tokens, torch.bfloat16)))
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1.5 * one)):
        for many in run_ranks(2, tmp_path, gradients, tmp_path / "start", tokens, dtype, sizes):
            assert mean(errors(many)) < bound
            assert max(errors(many)) < 0.9  # measured at most 0.54; of zeros it would be 1


@pytest.mark.slow
def test_a_checkpoint_of_four_ranks_loads_on_one_two_and_four(tmp_path, checkpoint):
    start = checkpoint(**SHARED)
    run_ranks(4, tmp_path, partial(train, start, {"tp_size": 4}, steps=1, save_to=tmp_path / "saved"))
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} == {".json", ".py", ".safetensors"}
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        names = [name for name in list(file.keys()) if "experts" in name]
        shapes = {name: file.get_slice(name).get_shape() for name in names}
    # whole, and those that two layers share only once
    assert shapes == {f"model.layers.0.mlp.experts.{name}_embed": [64, 32] for name in ("down", "gate", "up")}
    with torch.no_grad():
        expected = PeerForCausalLM.from_pretrained(tmp_path / "saved")(torch.arange(8).view(1, -1)).logits
    for num_ranks in (2, 4):
        loaded = run_ranks(num_ranks, tmp_path, load, tmp_path / "saved", {"tp_size": num_ranks})
        for rows, logits, _ in loaded:
            assert {table.shape for table in rows.values()} == {(64 // num_ranks, 32)}
            torch.testing.assert_close(logits, expected, rtol=0, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"fsdp_size": 2, "ep_size": 2}], ids=str)
def test_tables_of_grown_pools_are_sharded(tmp_path, checkpoint, sizes):
    require(sizes)
    start = checkpoint(**GROWN)
    for rows, _, _ in run_ranks(2, tmp_path, load, start, sizes):
        assert {table.shape for name, table in rows.items() if "grown_pools" in name} == {(18, 32)}  # of 36
        assert len(rows) == 6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read as Linux gives it")
@pytest.mark.parametrize("new", [False, True], ids=["a checkpoint", "a new model"])
@pytest.mark.parametrize("sizes", [{"tp_size": 4}, {"fsdp_size": 4, "ep_size": 4}], ids=str)
def test_no_rank_holds_a_whole_table_while_it_loads(tmp_path, tiny_config, sizes, new):
    require(sizes)
    config = tiny_config(**SHARED_OUT, num_sub_keys=1024)
    bytes_of_table = config.num_peer_experts * config.hidden_size * 4
    if not new:
        PeerForCausalLM(config).save_pretrained(tmp_path / "start")
    loaded = run_ranks(4, tmp_path, load, None if new else tmp_path / "start", sizes, config if new else None)
    for _, _, memory in loaded:
        # measured 0.19 to 0.64 (what is mapped from a file counts), 0.68: half, a quarter of each of the two tables
        assert memory < 0.9 * bytes_of_table
    if new:
        first, *others = [rows for rows, _, _ in loaded]
        for name, table in first.items():
            for other in others:
                assert (other[name] == table).float().mean() < 1e-3, "another rank drew the same numbers"


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("shared", [True, False], ids=["tokens shared", "tokens own"])
def test_ranks_send_what_the_arithmetic_says(tmp_path, tiny_config, num_ranks, shared):
    require({"tp_size": num_ranks} if shared else {"ep_size": num_ranks})
    config = tiny_config()
    sent = sum(run_ranks(num_ranks, tmp_path, sent_bytes, config, shared, 6))
    expected = bytes_per_token(num_ranks, config.hidden_size, config.num_active_experts, value_bytes=4)
    tokens = 6 if shared else 6 * num_ranks
    assert sent == tokens * expected["rows, tokens shared" if shared else "rows, tokens own"]


def test_an_expert_of_another_rank_costs_nothing_and_adds_nothing():
    num_tokens, num_active, num_rows = 7, 12, 5
    ids, gates = torch.randint(-10, 15, (num_tokens, num_active)), torch.rand(num_tokens, num_active)
    ids[0], ids[1] = -1, torch.arange(num_active) % num_rows  # none of its own, and all
    tokens, down, up = torch.randn(num_tokens, 4), torch.randn(num_rows, 4), torch.randn(num_rows, 4)
    own = (ids >= 0) & (ids < num_rows)
    packed_ids, packed_gates = own_assignments(ids, gates, num_rows)
    torch.testing.assert_close(
        expert_mixture(tokens, packed_ids, packed_gates, down, up),
        expert_mixture(tokens, ids.where(own, 0), gates.where(own, 0.0), down, up),
    )
    ids[1] = -1
    packed_ids, _ = own_assignments(ids, gates, num_rows)
    assert packed_ids.shape[1] == ((ids >= 0) & (ids < num_rows)).sum(-1).max()
    assert set(packed_ids.flatten().tolist()) == set(ids[(ids >= 0) & (ids < num_rows)].tolist())


def test_more_ranks_than_blocks_of_experts_are_refused(tiny_config):
    experts = PeerExperts(tiny_config(num_sub_keys=9))
    style, ranks = ALL_PARALLEL_STYLES[EXPERT_ROWS], SimpleNamespace(size=lambda: 64)
    with pytest.raises(ValueError, match=r"81 experts, 2 per rank, .* Use at most 41 ranks"):
        style.shard_param(experts, "down_embed", ranks)


def test_row_sparse_gradients_are_refused_where_fsdp_would_reduce_them():
    require_dense_gradients(SimpleNamespace(fsdp_size=1, dp_replicate_size=1, ep_size=1))
    with pytest.raises(ValueError, match="dp_replicate_size = 4, ep_size = 2"):
        require_dense_gradients(SimpleNamespace(fsdp_size=2, dp_replicate_size=2, ep_size=2))


def test_the_tables_on_paper_are_those_that_the_command_prints():
    page = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
    assert tables() in page.read_text(encoding="utf-8")


def logits_of_ranks(folder, sizes, tokens):
    model = (
        PeerForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))
        if sizes
        else (PeerForCausalLM.from_pretrained(folder))
    )
    rows = model.model.layers[1].mlp.experts.up_embed.shape[0]
    with torch.no_grad():
        return model(tokens).logits, rows


@pytest.mark.slow_but_first
@pytest.mark.parametrize("table_format", ["int4", "int8", "float8_e4m3"])
def test_quantised_tables_are_sharded_with_their_scales(tmp_path, tiny_config, table_format):
    model = quantise_expert_tables(PeerForCausalLM(tiny_config(**SHARED_OUT)), table_format)
    model.save_pretrained(tmp_path / "start")
    tokens = torch.randint(1, 99, (2, 9))
    expected, _ = logits_of_ranks(tmp_path / "start", None, tokens)
    for logits, _ in run_ranks(2, tmp_path, logits_of_ranks, tmp_path / "start", {"tp_size": 2}, tokens):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
