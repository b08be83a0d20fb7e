# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Benchmark the cost of measuring, recording and balancing expert usage: the function behind `peer bench-usage`."""

from typing import Any

import torch

from modeling_peer.analysis.expert_usage import ExpertUsage, find_retrievals
from modeling_peer.analysis.routing_trace import RoutingRecorder, TokenBatch
from modeling_peer.benchmarks.model import ModelBenchmark, build_models, make_call, make_input, row_sparse
from modeling_peer.benchmarks.report import save
from modeling_peer.costs.provenance import describe_machine, describe_versions
from modeling_peer.costs.timing import Clock, interleave, set_threads

LOGGING_STEPS = 10  # the default of `peer train`
BALANCE_LOSSES = ("switch", "uniformity")


def bench_expert_usage(settings: ModelBenchmark) -> dict[str, Any]:
    """Time a training step, the work that `ExpertUsageCallback` adds, and the same step with a balance loss.

    The callback counts in each step and measures once in `LOGGING_STEPS`. The step has row-sparse gradients. It is the
    shortest one, so the costs are the largest share of it.

    Also time a forward of the decoder without gradients, and the same with the recording of `peer inspect`.
    """
    set_threads(settings.threads)
    name = row_sparse(settings.device)
    model = build_models([name], settings)[name]
    train = make_call(name, model, "training", settings)
    retrieved, watched = {}, []
    for layer, retrieval in find_retrievals(model):
        retrieval.register_forward_hook(lambda module, args, output, layer=layer: retrieved.update({layer: output}))
        watched.append((layer, ExpertUsage(model.config.num_peer_experts, settings.torch_device)))

    def train_balanced(tokens, kind):
        model.config.balance_loss = kind
        train(tokens)
        model.config.balance_loss = None

    calls = {
        "step": train,
        "count": lambda _: [usage.add(*retrieved[layer]) for layer, usage in watched],
        "figures": lambda _: [usage.measure() for _, usage in watched],
        **{kind: lambda tokens, kind=kind: train_balanced(tokens, kind) for kind in BALANCE_LOSSES},
    }
    recorder = RoutingRecorder(model)

    @torch.no_grad()
    def forward(tokens):
        model.eval()
        model.get_decoder()(input_ids=tokens, use_cache=False)

    def record(tokens):
        with recorder:
            recorder.read(TokenBatch(tokens.cpu(), torch.zeros(len(tokens), dtype=torch.int64)))

    calls |= {"forward": forward, "record": record}
    clock = Clock(settings.torch_device)

    def new_input(number):
        return make_input(model.config.vocab_size, "training", settings, number)

    summaries = interleave(calls, new_input, clock, settings.repeats, settings.max_seconds)
    milliseconds = {call: round(summary.median_ms, 3) for call, summary in summaries.items()}
    step = milliseconds["step"]
    percent = {"usage": (milliseconds["count"] + milliseconds["figures"] / LOGGING_STEPS) / step}
    percent |= {kind: milliseconds[kind] / step - 1 for kind in BALANCE_LOSSES}
    result = {
        "benchmark": "expert_usage",
        "machine": describe_machine(settings.torch_device),
        "versions": describe_versions(settings.commit),
        "shape": settings.shape("training"),
        "num_experts": model.config.num_peer_experts,
        "layers": [layer for layer, _ in watched],
        "milliseconds": milliseconds,
        "percent_of_a_step": {cost: round(100 * share, 2) for cost, share in percent.items()},
        "percent_of_a_forward": {"record": round(100 * (milliseconds["record"] / milliseconds["forward"] - 1), 2)},
    }
    save(result, settings.output_file)
    return {"path": settings.output_file, **result}
