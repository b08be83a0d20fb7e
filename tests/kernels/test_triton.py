# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""What is special to the Triton kernels: blocks, splits, runs and their borders; and on a GPU, graphs and sizes.

Without a GPU they run in Triton's interpreter: tests/conftest.py chooses it, before anything imports Triton.
"""

import pytest
import reference
import torch
from kernel_helpers import assert_sums_close

pytest.importorskip("triton")

from modeling_peer.kernels.triton import experts as triton_experts
from modeling_peer.kernels.triton import retrieval as triton_retrieval
from modeling_peer.kernels.triton.experts import (
    group_by_expert,
    read_experts,
    row_gradients,
    write_experts,
    write_experts_gradients,
)
from modeling_peer.kernels.triton.retrieval import product_key_top_k, product_key_top_k_backward

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_device(function, *args):
    """Call with tensors moved to the tested device; results come back."""
    moved = [arg.to(DEVICE) if isinstance(arg, torch.Tensor) else arg for arg in args]
    results = function(*moved)
    return results.cpu() if isinstance(results, torch.Tensor) else tuple(result.cpu() for result in results)


def assert_is_exact_top_k(query, sub_keys, top_k):
    scores, expert_ids = on_device(product_key_top_k, query, sub_keys, top_k)
    expected_scores, _ = reference.exhaustive_top_k(query, sub_keys.float(), top_k)
    torch.testing.assert_close(scores, expected_scores)
    torch.testing.assert_close(reference.score_of(query, sub_keys.float(), expert_ids), scores)
    assert all(len(set(ids)) == top_k for ids in expert_ids.flatten(0, 1).tolist()), "an expert retrieved twice"


@pytest.mark.parametrize("share_sub_keys", [True, False])
@pytest.mark.parametrize(
    ("num_sub_keys", "top_k", "half"),
    [
        (2, 1, 1),  # one head's best expert of four, by a dot product of one number
        (16, 16, 4),  # a block is full, and nothing is pruned
        (17, 5, 12),  # the second split has a single sub-key, fewer than k
        (33, 20, 40),  # three blocks, fewer than the splits' next power of two; the query in two pieces
    ],
)
def test_top_k_is_exact_across_blocks_and_splits(monkeypatch, num_sub_keys, top_k, half, share_sub_keys):
    monkeypatch.setattr(triton_retrieval, "BLOCK_R", 16)
    monkeypatch.setattr(triton_retrieval, "BLOCK_N", 16)
    query = torch.randn(3, 2, 2 * half)
    sub_keys = torch.randn(2, num_sub_keys, half) if share_sub_keys else torch.randn(2, 2, num_sub_keys, half)
    assert_is_exact_top_k(query, sub_keys, top_k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sub_keys_meet_a_float32_query(dtype):
    assert_is_exact_top_k(torch.randn(2, 2, 16), torch.randn(2, 9, 8).to(dtype), 4)


def test_bfloat16_sub_keys_meet_every_bit_of_a_query():
    most = 1 + 2**-10  # two pieces; the last bit is in a third
    query = torch.tensor([most + 2**-23, -most]).view(1, 1, 2)
    scores, _ = on_device(product_key_top_k, query, torch.ones(2, 3, 1, dtype=torch.bfloat16), 2)
    assert scores.flatten().tolist() == [2**-23, 2**-23]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_of_sub_keys_and_queries_rank_as_they_are(dtype):
    sub_keys = torch.tensor([[1.0, -torch.inf, 2.0], [1.0, 0.5, 2.0]]).unsqueeze(-1).to(dtype)
    # What bfloat16 leaves of 0.7876 is negative where it rounds to nearest, which only a GPU does.
    query = torch.tensor([[1.3, 1.0], [0.7876, 1.0], [torch.inf, 1.0]]).unsqueeze(1)
    scores, expert_ids = on_device(product_key_top_k, query, sub_keys, 2)
    expected = torch.tensor([[4.6, 3.6], [3.5752, 2.7876], [torch.inf, torch.inf]])
    torch.testing.assert_close(scores[:, 0], expected)
    assert expert_ids[:2, 0].tolist() == [[8, 6], [8, 2]]
    assert (expert_ids[2] // 3 != 1).all()


def test_more_rows_than_a_program_takes(monkeypatch):
    monkeypatch.setattr(triton_retrieval, "BLOCK_R", 16)
    monkeypatch.setattr(triton_retrieval, "JOIN_CODES", 8)
    assert_is_exact_top_k(torch.randn(7, 3, 8), torch.randn(2, 5, 4), 3)


def test_scores_are_the_same_bits_however_sub_keys_are_split(monkeypatch):
    monkeypatch.setattr(triton_retrieval, "BLOCK_N", 16)
    query, sub_keys = torch.randn(5, 2, 16), torch.randn(2, 70, 8)
    results = []
    for num_programs in (1, 4, 1000):  # one split, two, and one for each of five blocks
        monkeypatch.setattr(triton_retrieval, "NUM_PROGRAMS", num_programs)
        results.append(on_device(product_key_top_k, query, sub_keys, 6))
    for scores, expert_ids in results[1:]:
        assert torch.equal(scores, results[0][0])
        assert torch.equal(expert_ids, results[0][1])


@pytest.mark.parametrize("value", [1.0, 0.0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_equal_scores_give_distinct_experts_that_exist(value):
    """Ties everywhere; also what a diverged model must not turn into an illegal address."""
    query, sub_keys = torch.full((2, 1, 8), value), torch.ones(2, 6, 4)
    scores, expert_ids = on_device(product_key_top_k, query, sub_keys, 5)
    torch.testing.assert_close(scores, torch.full((2, 1, 5), 8 * value), equal_nan=True)
    assert ((expert_ids >= 0) & (expert_ids < 36)).all()
    assert all(len(set(ids)) == 5 for ids in expert_ids.flatten(0, 1).tolist())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_nan_sub_key_shows_in_the_scores(sign):
    sub_keys = torch.randn(2, 6, 4)
    sub_keys[1, 3] = torch.copysign(torch.tensor(float("nan")), torch.tensor(sign))
    scores, expert_ids = on_device(product_key_top_k, torch.randn(2, 1, 8), sub_keys, 5)
    assert scores.isnan().all()  # six rows meet the NaN column, and five are retrieved
    assert (expert_ids % 6 == 3).all()


@pytest.mark.parametrize("sub_keys_shape", [(2, 5, 4), (3, 2, 5, 4)], ids=["shared", "per head"])
def test_top_k_gradients_match_autograd_of_the_scores(sub_keys_shape):
    query = torch.randn(4, 3, 8, requires_grad=True)
    sub_keys = torch.randn(sub_keys_shape, requires_grad=True)
    expert_ids, grad_scores = torch.randint(25, (4, 3, 6)), torch.randn(4, 3, 6)
    expected = torch.autograd.grad(reference.score_of(query, sub_keys, expert_ids), (query, sub_keys), grad_scores)
    actual = on_device(product_key_top_k_backward, grad_scores, expert_ids, query.detach(), sub_keys.detach())
    torch.testing.assert_close(actual, expected)


def assignments(num_tokens=3, num_active=5, width=7, num_experts=9, dtype=torch.float32):
    """tokens, weights, expert_ids, table."""
    tokens, table = torch.randn(num_tokens, width).to(dtype), torch.randn(num_experts, width).to(dtype)
    return tokens, torch.randn(num_tokens, num_active), torch.randint(num_experts, (num_tokens, num_active)), table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes",
    [
        {"width": 1},
        {"num_active": 1},
        {"width": 96, "num_active": 3},
        {"num_active": 70},  # several blocks of experts, the last one not full
        {"width": 1500, "num_tokens": 2},  # several blocks of width, the last one not full
        {"num_tokens": 0},
    ],
    ids=str,
)
def test_read_and_write_across_blocks(sizes, dtype):
    tokens, weights, expert_ids, table = assignments(**sizes, dtype=dtype)
    rows = table.double()[expert_ids]  # (t, a, d)
    pre = on_device(read_experts, tokens, expert_ids, table)
    # Sums in float32, of up to 1500 exact products.
    assert_sums_close(pre, *sums_and_magnitudes("td,tad->ta", tokens, rows))
    out = on_device(write_experts, weights, expert_ids, table)
    assert_sums_close(out, *sums_and_magnitudes("ta,tad->td", weights, rows))


def test_nan_stays_with_the_token_and_the_row_that_have_it():
    """Lanes without work point at token 0 and row 0: their NaN times zero would still be NaN."""
    tokens, weights, expert_ids, table = assignments(num_active=3)
    expert_ids, table[0] = expert_ids.clamp(min=1, max=7), float("nan")
    assert on_device(read_experts, tokens, expert_ids, table).isfinite().all()
    assert on_device(write_experts, weights, expert_ids, table).isfinite().all()
    tokens[0], expert_ids[0] = float("nan"), 8
    order = group_by_expert(expert_ids)
    grad_weights, _, values = on_device(write_experts_gradients, tokens, weights, expert_ids, order, table, False)
    assert grad_weights[1:].isfinite().all()
    assert values[:8].isfinite().all()


def sums_and_magnitudes(equation, *factors):
    """Exact sums of products, and what they would be if no term were negative."""
    factors = [factor.double() for factor in factors]
    return torch.einsum(equation, *factors), torch.einsum(equation, *(factor.abs() for factor in factors))


def assert_gradients_are_right(tokens, weights, expert_ids, table, row_sparse):
    num_experts, width = table.shape
    order = group_by_expert(expert_ids)
    terms = weights.double().unsqueeze(-1) * tokens.double().unsqueeze(1)  # (t, a, d)
    zeros = torch.zeros(num_experts, width).double()
    expected = zeros.index_add(0, expert_ids.flatten(), terms.flatten(0, 1))
    magnitudes = zeros.index_add(0, expert_ids.flatten(), terms.abs().flatten(0, 1))
    expected_rows = expert_ids.unique() if row_sparse else torch.empty(0, dtype=torch.int64)
    if row_sparse:
        expected, magnitudes = expected[expected_rows], magnitudes[expected_rows]
    one_rounding = 0.0 if table.dtype == torch.float32 else torch.finfo(table.dtype).eps

    rows, values = on_device(row_gradients, weights, tokens, expert_ids, order, num_experts, table.dtype, row_sparse)
    torch.testing.assert_close(rows, expected_rows)
    assert values.dtype == table.dtype
    assert_sums_close(values, expected, magnitudes, one_rounding)

    grad_weights, same_rows, same_values = on_device(
        write_experts_gradients, tokens, weights, expert_ids, order, table, row_sparse
    )
    assert_sums_close(grad_weights, *sums_and_magnitudes("td,tad->ta", tokens, table[expert_ids]))
    assert torch.equal(same_rows, rows)
    assert_sums_close(same_values, expected, magnitudes, one_rounding)


@pytest.mark.parametrize("row_sparse", [False, True])
@pytest.mark.parametrize("window", [1, 16])
@pytest.mark.parametrize(
    "lengths",  # of the segments of experts 1, 2, ...
    [
        [12],  # one expert for all, cut at 4 and 8, ends at a border
        [1, 1, 1, 1, 1, 1],  # nothing to cut
        [3, 1, 4, 4],  # borders where segments begin and end anyway
        [3, 2, 1],  # inside a segment, a border
        [2, 7, 3],  # pieces: before a border, between two, after the last
        [4, 9, 1, 2, 5],  # begins at a border and passes two more, then a segment passes one
        [1, 90, 5],  # more pieces than are joined at a time
    ],
    ids=str,
)
def test_gradients_of_segments_cut_into_runs(monkeypatch, lengths, window, row_sparse):
    monkeypatch.setattr(triton_experts, "MAX_RUN", 4)
    monkeypatch.setattr(triton_experts, "RUN_PROGRAMS", 1)
    monkeypatch.setattr(triton_experts, "MAX_WINDOW", window)
    expert_ids = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))
    expert_ids = expert_ids[torch.randperm(len(expert_ids))].unsqueeze(1)
    tokens, weights, _, table = assignments(len(expert_ids), num_active=1, width=3)
    assert_gradients_are_right(tokens, weights, expert_ids, table, row_sparse)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_tokens": 0},
        {"width": 1},
        {"width": 1000, "num_active": 12, "num_experts": 2},  # a run takes several turns
        {"num_tokens": 150, "num_experts": 1, "num_active": 2},  # runs of the real length
        {"dtype": torch.bfloat16, "num_tokens": 70, "num_experts": 2},  # pieces stay float32 until joined
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_gradients_across_sizes(sizes):
    inputs = assignments(**sizes)
    assert_gradients_are_right(*inputs, row_sparse=False)
    assert_gradients_are_right(*inputs, row_sparse=True)


def test_group_by_expert_is_a_stable_sort():
    expert_ids = torch.tensor([[2, 0, 2], [0, 2, 1]])
    assert on_device(group_by_expert, expert_ids).tolist() == [1, 3, 5, 0, 2, 4]


# ---------------------------------------------------------------------------------------------- on a GPU only


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("num_tokens", [1, 3000])
@pytest.mark.parametrize("query_dim", [256, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_on_tensor_cores_are_accurate_to_float32(num_tokens, query_dim, dtype):
    """Plain tf32 would be off by 1e-3 here; sums of 256 float32 products, by about 1e-6."""
    query = torch.randn(num_tokens, 8, query_dim, device="cuda")
    sub_keys = (torch.randn(2, 1024, query_dim // 2, device="cuda") * query_dim**-0.5).to(dtype)
    scores, expert_ids = product_key_top_k(query, sub_keys, 16)
    halves = query.double().unflatten(-1, (2, -1))
    row_scores, column_scores = torch.einsum("thcd,cnd->cthn", halves, sub_keys.double())
    rows, columns = expert_ids // 1024, expert_ids % 1024
    exact = row_scores.gather(-1, rows) + column_scores.gather(-1, columns)
    torch.testing.assert_close(scores, exact.float(), rtol=5e-6, atol=5e-6)
    best = (row_scores.topk(16).values.unsqueeze(-1) + column_scores.topk(16).values.unsqueeze(-2)).flatten(2)
    torch.testing.assert_close(scores, best.topk(16).values.float(), rtol=5e-6, atol=5e-6)
    for _ in range(50):  # a product read before it is done would differ now and then
        again, again_ids = product_key_top_k(query, sub_keys, 16)
        assert torch.equal(again, scores)
        assert torch.equal(again_ids, expert_ids)


@pytest.mark.gpu
@needs_gpu
def test_a_cuda_graph_captures_a_layer_and_its_dense_gradients():
    torch.use_deterministic_algorithms(False)  # its fills are not what is captured here
    num_experts, width = 64**2, 256
    query, token = torch.randn(1, 8, 32, device="cuda"), torch.randn(1, width, device="cuda", dtype=torch.bfloat16)
    sub_keys = torch.randn(2, 64, 16, device="cuda")
    down, up = torch.randn(2, num_experts, width, device="cuda", dtype=torch.bfloat16)

    def layer():
        scores, expert_ids = product_key_top_k(query, sub_keys, 16)
        expert_ids, gates = expert_ids.flatten(1), scores.softmax(-1).flatten(1)
        weights = gates * torch.nn.functional.gelu(read_experts(token, expert_ids, down))
        output = write_experts(weights, expert_ids, up)
        order = group_by_expert(expert_ids)
        grad_weights, _, grad_up = write_experts_gradients(token, weights, expert_ids, order, up, False)
        _, grad_down = row_gradients(grad_weights, token, expert_ids, order, num_experts, torch.bfloat16, False)
        grads = product_key_top_k_backward(grad_weights.view_as(scores), expert_ids.view_as(scores), query, sub_keys)
        return output, grad_weights, grad_up, grad_down, *grads

    layer()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    query.normal_()
    token.normal_()
    graph.replay()
    for result, expected in zip(captured, layer(), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.gpu
@needs_gpu
def test_tables_of_more_than_2_to_the_31_elements():
    num_experts, width = 2**20 + 8, 2048
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    table = torch.zeros(num_experts, width, device="cuda", dtype=torch.bfloat16)
    table[-4:] = torch.randn(4, width)
    expert_ids = torch.arange(num_experts - 4, num_experts, device="cuda").expand(6, 4).contiguous()
    tokens, weights = torch.randn(6, width, device="cuda"), torch.randn(6, 4, device="cuda")
    pre, out = read_experts(tokens, expert_ids, table), write_experts(weights, expert_ids, table)
    assert_sums_close(pre, *sums_and_magnitudes("td,ad->ta", tokens, table[-4:]))
    assert_sums_close(out, *sums_and_magnitudes("ta,ad->td", weights, table[-4:]))
    order = group_by_expert(expert_ids)
    _, values = row_gradients(weights, tokens, expert_ids, order, num_experts, torch.bfloat16, False)
    expected = sums_and_magnitudes("ta,td->ad", weights, tokens)
    assert_sums_close(values[-4:], *expected, rtol=2**-8)
    assert not values[:-4].any()


@pytest.mark.gpu
@needs_gpu
def test_more_tokens_than_a_grid_axis_takes():
    num_tokens = 70_000  # the second and third axes of a CUDA grid end at 65535
    tokens, weights, expert_ids, table = (x.cuda() for x in assignments(num_tokens, 2, 16, 32))
    rows = table[expert_ids]
    assert_sums_close(read_experts(tokens, expert_ids, table), *sums_and_magnitudes("td,tad->ta", tokens, rows))
    assert_sums_close(write_experts(weights, expert_ids, table), *sums_and_magnitudes("ta,tad->td", weights, rows))
    scores, _ = product_key_top_k(torch.randn(num_tokens, 1, 8, device="cuda"), torch.randn(2, 4, 4).cuda(), 2)
    assert scores.isfinite().all()


@pytest.mark.gpu
@needs_gpu
def test_gradients_are_the_same_bits_from_run_to_run():
    tokens, weights, expert_ids, table = (x.cuda() for x in assignments(5000, 128, 256, 4096, torch.bfloat16))
    expert_ids[:, ::2] = 7  # half of all assignments on one expert
    order = group_by_expert(expert_ids)
    first = write_experts_gradients(tokens, weights, expert_ids, order, table, False)
    for _ in range(3):
        again = write_experts_gradients(tokens, weights, expert_ids, order, table, False)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_memory_does_not_grow_with_scores_of_all_sub_keys():
    torch.use_deterministic_algorithms(False)
    sub_keys = torch.randn(2, 1024, 128, device="cuda")

    def peak(num_tokens):
        query = torch.randn(num_tokens, 8, 256, device="cuda")
        product_key_top_k(query, sub_keys, 16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        product_key_top_k(query, sub_keys, 16)
        return torch.cuda.max_memory_allocated() - before

    scores_of_one_token = 2 * 8 * 1024 * 4  # bytes
    # Codes, scores and ids of 16 experts a head: 3.5 KiB a token.
    assert (peak(8192) - peak(4096)) / 4096 < scores_of_one_token / 10
