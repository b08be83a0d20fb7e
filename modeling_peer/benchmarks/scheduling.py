"""Whether to read experts token by token or expert by expert: what `scripts/bench_scheduling.py` runs.

Token-centric, a token's rows are gathered from all over the table. Expert-centric, assignments are sorted, a row is
loaded once for all its tokens, and the tokens are gathered instead. The second is what `write_experts_gradients` does
beside the row gradients; its time less theirs, plus the sorting, is the time of an expert-centric read.
"""

from typing import Any

import torch

from modeling_peer.benchmarks.contestants import FAST
from modeling_peer.benchmarks.machine import announce, describe_run
from modeling_peer.benchmarks.report import headline, table
from modeling_peer.benchmarks.settings import LayerArguments, parse_cases
from modeling_peer.benchmarks.timing import Clock, interleave, set_threads

TOKEN_CENTRIC, SORTING, EXPERT_CENTRIC = "token-centric", "of that, sorting", "expert-centric"


def bench_scheduling(settings: LayerArguments) -> dict[str, Any]:
    """Measure reading in both orders, at every size among the forward cases; print the table."""
    set_threads(settings.threads)
    announce("reading experts, token-centric and expert-centric ...")
    cases = [case for case in parse_cases(settings.cases, settings.hidden_size) if case.task in ("decode", "forward")]
    rows = [_measure(case, settings) for case in cases]
    result = {"benchmark": "scheduling", **describe_run(settings), "kernel_tests": "not run", "cases": rows}
    print(f"{headline(result)}\n\n{table(rows)}", flush=True)
    return result


def _measure(case, settings: LayerArguments) -> dict[str, Any]:
    device, implementation = settings.torch_device, FAST[settings.device]
    operators = torch.ops.modeling_peer
    num_active = settings.num_retrieval_heads * settings.num_experts_per_head
    torch.manual_seed(settings.seed)
    experts = torch.randn(case.num_experts, case.hidden_size, device=device, dtype=settings.torch_dtype)
    tokens = torch.randn(case.num_tokens, case.hidden_size, device=device, dtype=settings.torch_dtype)
    weights = torch.rand(case.num_tokens, num_active, device=device)

    def new_ids(number):
        ids = torch.randint(case.num_experts, weights.shape, device=device)
        return ids, operators.group_by_expert(ids, implementation)

    def row_gradients(inputs):
        ids, order = inputs
        operators.row_gradients(weights, tokens, ids, order, case.num_experts, experts.dtype, True, implementation)

    def gradients_and_read(inputs):
        ids, order = inputs
        operators.write_experts_gradients(tokens, weights, ids, order, experts, True, implementation)

    calls = {
        TOKEN_CENTRIC: lambda inputs: operators.read_experts(tokens, inputs[0], experts, None, False, implementation),
        SORTING: lambda inputs: operators.group_by_expert(inputs[0], implementation),
        "row gradients": row_gradients,
        "row gradients and read": gradients_and_read,
    }
    summaries = interleave(calls, new_ids, Clock(device), settings.repeats, settings.max_seconds)
    milliseconds = {name: summary.median_ms for name, summary in summaries.items()}
    expert_centric = milliseconds["row gradients and read"] - milliseconds["row gradients"] + milliseconds[SORTING]
    return {
        "tokens": case.num_tokens,
        "experts": case.num_experts,
        "assignments per expert": f"{case.num_tokens * num_active / case.num_experts:.3g}",
        f"{TOKEN_CENTRIC}, ms": round(milliseconds[TOKEN_CENTRIC], 3),
        f"{EXPERT_CENTRIC}, ms": round(expert_centric, 3),
        f"{SORTING}, ms": round(milliseconds[SORTING], 3),
    }
