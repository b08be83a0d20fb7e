# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Traffic and memory of many processes, counted: bytes per token for each sharding, and memory per rank.

python -m modeling_peer.costs.many_processes
python -m modeling_peer.costs.many_processes --hidden_size 256 --num_active 64
"""

import argparse

from modeling_peer.console.tables import counted

FLOAT32 = 4
RANKS = (2, 4, 8, 16, 32, 64)
POOLS = (2**20, 10**9)


def bytes_per_token(num_ranks: int, hidden_size: int, num_active: int, value_bytes: int = 2) -> dict[str, int]:
    """Bytes that all ranks of a group together send for one token of one layer, forward and backward.

    `docs/scaling.md` derives the formulas. Collectives are rings. For `v` bytes over `r` ranks, an all-reduce sends
    `2 (r - 1) v`. An all-gather or a reduce-scatter sends `(r - 1) v`.

    Args:
        num_active: retrieved experts of a token, all heads together. Each has a gate and a dot product in float32.
        value_bytes: bytes of one value of a hidden state.
    """
    hops, hidden, active = num_ranks - 1, hidden_size * value_bytes, num_active * FLOAT32
    return {
        "rows, tokens shared": hops * (4 * hidden + 2 * active),
        "columns, tokens shared": hops * (2 * hidden + 4 * active),
        "rows, tokens own": hops * (4 * hidden + 3 * active),
        "token to each expert": 4 * num_active * hidden * hops // num_ranks,
    }


def bytes_per_rank(num_experts: int, num_ranks: int, hidden_size: int, training: bool) -> int:
    """Memory of one layer's two tables on a rank: bfloat16 weights, or float32 weights and both moments of AdamW.

    Gradients need more memory. A row-sparse one has only the rows of a step. A dense one has four bytes per value.
    """
    rows = -(-num_experts // num_ranks)
    return 2 * rows * hidden_size * (3 * FLOAT32 if training else 2)


def tables(hidden_size: int = 1024, num_active: int = 128) -> str:
    """Both tables, as Markdown."""
    names = list(bytes_per_token(1, hidden_size, num_active))
    lines = [f"| KiB per token, d = {hidden_size:,}, h·k = {num_active} | " + " | ".join(names) + " |"]
    lines.append("|---|" + "---:|" * len(names))
    for ranks in RANKS:
        sent = bytes_per_token(ranks, hidden_size, num_active).values()
        lines.append(f"| {counted(ranks, 'rank')} | " + " | ".join(f"{value / 2**10:,.1f}" for value in sent) + " |")
    uses = [(experts, training) for experts in POOLS for training in (False, True)]
    header = [f"{experts:,} experts, {'AdamW, float32' if training else 'bfloat16'}" for experts, training in uses]
    lines += ["", f"| GiB per rank, d = {hidden_size:,} | " + " | ".join(header) + " |", "|---|" + "---:|" * len(uses)]
    for ranks in (1, *RANKS):
        held = [bytes_per_rank(experts, ranks, hidden_size, training) / 2**30 for experts, training in uses]
        lines.append(f"| {counted(ranks, 'rank')} | " + " | ".join(f"{value:,.2f}" for value in held) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--num_active", type=int, default=128, help="retrieved experts of a token, all heads together")
    print(tables(**vars(parser.parse_args())))
