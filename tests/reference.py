# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""The dumb oracles: loops and exhaustive search, straight from the paper's equations."""

import math

import torch


def exhaustive_top_k(query, sub_keys, top_k):
    """Score every product key of every head and take the best (He 2024, eqs. 1 and 4).

    Shapes as in `product_key_top_k`; experts are numbered `row * num_sub_keys + column`.
    """
    all_scores = torch.stack(
        [
            torch.stack([_all_scores(query[t, h], _codebooks(sub_keys, h)) for h in range(query.shape[1])])
            for t in range(query.shape[0])
        ]
    )  # (num_tokens, num_heads, num_peer_experts)
    return all_scores.topk(top_k, dim=-1)


def _codebooks(sub_keys, head):
    return sub_keys[head] if sub_keys.dim() == 4 else sub_keys


def _all_scores(query, codebooks):
    half = query.shape[-1] // 2
    row_scores, column_scores = codebooks[0] @ query[:half], codebooks[1] @ query[half:]
    return torch.cat([row_score + column_scores for row_score in row_scores])


def score_of(query, sub_keys, expert_ids):
    """Scores of the given experts, one by one; ties make ids ambiguous, never scores."""
    num_sub_keys = sub_keys.shape[-2]
    half = query.shape[-1] // 2
    scores = torch.empty(expert_ids.shape, dtype=query.dtype)
    for (t, h, k), expert_id in zip(
        torch.ones_like(expert_ids).nonzero().tolist(), expert_ids.flatten().tolist(), strict=True
    ):
        rows, columns = _codebooks(sub_keys, h)
        row, column = divmod(expert_id, num_sub_keys)
        scores[t, h, k] = query[t, h, :half] @ rows[row] + query[t, h, half:] @ columns[column]
    return scores


def expert_mixture(hidden_states, expert_ids, gates, down_embed, up_embed, gate_embed=None, activation=None):
    """Sum the retrieved experts of each token one by one (He 2024, eqs. 3 and 6)."""
    activation = activation or torch.nn.functional.gelu
    outputs = []
    for x, ids, token_gates in zip(hidden_states, expert_ids.tolist(), gates, strict=True):
        y = torch.zeros_like(x)
        for expert_id, gate in zip(ids, token_gates, strict=True):
            neuron = x @ down_embed[expert_id]
            neuron = activation(neuron) if gate_embed is None else activation(x @ gate_embed[expert_id]) * neuron
            y = y + gate * neuron * up_embed[expert_id]
        outputs.append(y)
    return torch.stack(outputs) if outputs else hidden_states * 1.0


def retrieve(retrieval, hidden_states):
    """Gates and ids of a `PeerRetrieval` without query BatchNorm in training, all heads side by side: `(num_tokens,
    num_active)`; `hidden_states` is `(num_tokens, hidden_size)`."""
    config = retrieval.config
    query = hidden_states @ retrieval.query_proj.weight.T + retrieval.query_proj.bias
    norm = retrieval.query_norm
    if config.query_norm == "batch_norm":
        query = (query - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    query = query.view(len(hidden_states), config.num_retrieval_heads, config.query_dim)
    if config.query_norm == "rms_norm":
        query = query / (query.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    if config.query_norm == "layer_norm":
        centred = query - query.mean(-1, keepdim=True)
        query = centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    scores, expert_ids = exhaustive_top_k(query, retrieval.sub_keys, config.num_experts_per_head)
    gates = scores.sigmoid() if config.gate_activation == "sigmoid" else scores.exp() / scores.exp().sum(-1, True)
    return gates.flatten(1), expert_ids.flatten(1)


def peer_layer(layer, hidden_states):
    """A whole `PeerLayer`, as `retrieve`."""
    gates, expert_ids = retrieve(layer.retrieval, hidden_states)
    experts = layer.experts
    tables = (experts.down_embed, experts.up_embed, experts.gate_embed)
    return expert_mixture(hidden_states, expert_ids, gates, *tables, experts.activation)


def product_key_memory(layer, hidden_states):
    """Values of one token after the other (Lample et al. 2019, section 3.1); with a gate, eq. 2 of Berges et al."""
    outputs = []
    for x, gates, ids in zip(hidden_states, *retrieve(layer.retrieval, hidden_states), strict=True):
        y = sum(gate * layer.experts.up_embed[i] for gate, i in zip(gates, ids.tolist(), strict=True))
        if layer.output_gate is not None:
            gate = layer.output_gate.token_proj.weight @ x
            y = layer.output_gate.output_proj.weight @ (y * gate * gate.sigmoid())
        outputs.append(y)
    return torch.stack(outputs)


def ngram_rows(tokens, max_ngram_size, table_sizes, multipliers):
    """Rows that the n-grams ending at the last of `tokens` address: Engram's hash, one n-gram and table at a time.

    Args:
        tokens: ids of the tokens of one sequence so far.
    """
    rows, first_row = [], 0
    num_heads = len(table_sizes) // (max_ngram_size - 1)
    for number, size in enumerate(table_sizes):
        mix = 0
        for place in range(2 + number // num_heads):
            token = 1 + tokens[-1 - place] if place < len(tokens) else 0
            mix ^= token * multipliers[place]
        rows.append(first_row + mix % size)
        first_row += size
    return rows


def hashed_memory(layer, hidden_states, sequences, multipliers):
    """A `PeerHashedMemory`, token after token and tap after tap (Cheng et al. 2026, sections 2.2 and 2.3)."""
    outputs = []
    for states, tokens in zip(hidden_states, sequences, strict=True):
        values = []
        for t, h in enumerate(states):
            rows = ngram_rows(tokens[: t + 1], layer.max_ngram_size, layer.table_sizes, multipliers)
            e = torch.cat([layer.experts.up_embed[row] for row in rows])
            key = layer.key_norm(layer.key_proj.weight @ e)
            gate = (layer.hidden_norm(h) @ key / len(h) ** 0.5).sigmoid()
            values.append(gate * (layer.value_proj.weight @ e))
        for t, value in enumerate(values):
            convolved = 0
            for tap, weight in enumerate(layer.conv_weight):
                source = t - tap * layer.max_ngram_size
                if source >= 0:
                    convolved = convolved + weight * layer.value_norm(values[source])
            outputs.append(value + convolved * convolved.sigmoid())
    return torch.stack(outputs).view(hidden_states.shape)


def entmax15(logits):
    """Of one vector: bisection for the threshold at which the squares of what exceeds it, halved, sum to 1."""
    halves = logits / 2
    low, high = halves.max() - 1, halves.max()
    for _ in range(100):
        threshold = (low + high) / 2
        total = (halves - threshold).clamp(min=0).square().sum()
        low, high = (threshold, high) if total > 1 else (low, threshold)
    return (halves - low).clamp(min=0).square()


def multilinear_moe(layer, hidden_states):
    """A `PeerMultilinearMoe` by its tensors of experts, formed whole, and autograd through each token's sum."""
    outputs = []
    for x in hidden_states:
        logits = x @ layer.gating
        centred = logits - logits.mean()
        coefficients = _entmax15_of_support(centred / (centred.square().mean() + 1e-5).sqrt())
        inner = torch.nn.functional.gelu(_multilinear(layer.first, x, coefficients))
        outputs.append(_multilinear(layer.second, inner, coefficients))
    return torch.stack(outputs)


def _entmax15_of_support(logits):
    """Differentiable: with the support known, the threshold solves a quadratic equation."""
    support = entmax15(logits.detach()) > 0
    halves = logits[support] / 2
    size, mean = len(halves), halves.mean()
    threshold = mean - ((1 - (halves - mean).square().sum()) / size).clamp(min=0).sqrt()
    return torch.where(support, logits / 2 - threshold, 0.0).square()


def _multilinear(linear, x, coefficients):
    """Mixes the matrices of all experts, then multiplies by the token and a one."""
    return torch.cat([x, x.new_ones(1)]) @ torch.einsum("n,nio->io", coefficients, experts_tensor(linear))


def experts_tensor(linear):
    """The matrices of all experts, `(num_experts, in_features + 1, out_features)`, entry by entry."""
    if hasattr(linear, "expert_core"):
        experts, inputs, outputs = (
            [core[:, i] for i in range(core.shape[1])]
            for core in (linear.expert_core, linear.input_core, linear.output_core)
        )
        return torch.stack(
            [torch.stack([torch.stack([torch.trace(a @ b @ c) for c in outputs]) for b in inputs]) for a in experts]
        )
    factors = linear.expert_factor, linear.input_factor, linear.output_factor
    return sum(torch.einsum("n,i,o->nio", *columns) for columns in zip(*(f.unbind(1) for f in factors), strict=True))


def peak_memory(function):
    """Most bytes of CPU tensors alive at one time during `function()`, beyond those alive before: the allocator's own
    events, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler recorded no allocation"
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def balance_loss(kind, query, sub_keys, expert_ids, token_mask):
    """Softmax over every product key of every head of each real token, then sums over rows and over columns."""
    num_tokens, num_heads, _ = expert_ids.shape
    num_sub_keys = sub_keys.shape[-2]
    probabilities, hits = torch.zeros(2, num_sub_keys, num_sub_keys, dtype=query.dtype).unbind()
    for t in range(num_tokens):
        for h in range(num_heads):
            if token_mask[t]:
                scores = _all_scores(query[t, h], _codebooks(sub_keys, h))
                probabilities = probabilities + scores.softmax(-1).view(num_sub_keys, num_sub_keys)
                for expert_id in expert_ids[t, h].tolist():
                    hits[divmod(expert_id, num_sub_keys)] += 1
    pairs = [(probabilities.sum(axis) / probabilities.sum(), hits.sum(axis) / hits.sum()) for axis in (1, 0)]
    if kind == "switch":
        return sum(num_sub_keys * (f * p).sum() for p, f in pairs) / 2
    return sum((p * (p * num_sub_keys).log()).sum() for p, _ in pairs)


def expert_usage(forwards, num_experts):
    """The figures of He 2024, section 3.3, expert by expert; `forwards` are gates, expert ids and token mask each."""
    sums, best = [0.0] * num_experts, set()
    for gates, expert_ids, token_mask in forwards:
        for token in token_mask.nonzero().tolist():
            for head_gates, head_ids in zip(
                gates[tuple(token)].tolist(), expert_ids[tuple(token)].tolist(), strict=True
            ):
                best.add(head_ids[0])
                for gate, expert_id in zip(head_gates, head_ids, strict=True):
                    sums[expert_id] += gate
    shares = [value / sum(sums) for value in sums if value > 0]
    return {
        "expert_usage": len(shares) / num_experts,
        "top_1_usage": len(best) / num_experts,
        "unevenness": math.log(num_experts) + sum(share * math.log(share) for share in shares),
        "dead_experts": num_experts - len(shares),
    }


def moe_expert(experts, expert, x):
    """One MLP of a `PeerMoeExperts`, on one token."""
    gate, up = (experts.gate_up_proj[expert] @ x).view(2, -1)
    return experts.down_proj[expert] @ (experts.act_fn(gate) * up)


def noisy_top_k_moe(layer, hidden_states, token_mask, noise=None):
    """Shazeer et al. 2017, eqs. 3-11, token by token; `noise` is `(num_tokens, num_experts)`, None in evaluation.

    Returns:
        output, and the importance and load losses added.
    """
    router, experts = layer.router, layer.experts
    num_experts, k = len(router.score_weight), router.top_k
    importance, load = [0 * hidden_states.sum()] * num_experts, [0 * hidden_states.sum()] * num_experts
    outputs = []
    for t, x in enumerate(hidden_states):
        scores = noisy = router.score_weight @ x
        if noise is not None:
            std = (router.noise_weight @ x).exp().log1p() + 0.01
            noisy = scores + noise[t] * std
        chosen = sorted(range(num_experts), key=lambda i, noisy=noisy: -noisy[i].item())[:k]
        total = sum(noisy[i].exp() for i in chosen)
        gates = {i: noisy[i].exp() / total for i in chosen}
        outputs.append(sum(gate * moe_expert(experts, i, x) for i, gate in gates.items()))
        for i in range(num_experts if token_mask[t] else 0):
            importance[i] = importance[i] + gates.get(i, 0)
            if noise is None or k == num_experts:
                load[i] = load[i] + (i in gates)
            else:
                others = sorted((noisy[j] for j in range(num_experts) if j != i), reverse=True)
                load[i] = load[i] + (1 + torch.erf((scores[i] - others[k - 1]) / std[i] / 2**0.5)) / 2
    loss = 0
    for values in (importance, load):
        mean = sum(values) / num_experts
        loss = loss + sum((value - mean) ** 2 for value in values) / num_experts / (mean**2 + 1e-10)
    return torch.stack(outputs), loss


def switch_moe(layer, hidden_states, token_mask, jitter=None, capacity=math.inf):
    """Fedus et al. 2021, eqs. 1-6, token by token; `jitter` is what the router's input is multiplied by in training.

    Returns:
        output, and the balance loss without its weight.
    """
    router, experts = layer.router, layer.experts
    num_experts, num_real = len(router.weight), int(token_mask.sum())
    outputs, taken, probabilities = [], [0] * num_experts, 0
    for t, x in enumerate(hidden_states):
        p = (router.weight @ (x if jitter is None else x * jitter[t])).softmax(-1)
        i = max(range(num_experts), key=lambda i, p=p: p[i].item())
        if token_mask[t]:
            probabilities = probabilities + p
            taken[i] += 1
        outputs.append(x * 0 if taken[i] > capacity else p[i] * moe_expert(experts, i, x))
    loss = num_experts * sum(taken[i] / num_real * probabilities[i] / num_real for i in range(num_experts))
    return torch.stack(outputs), loss


def soft_moe(layer, hidden_states, token_mask):
    """Slot by slot and token by token, one sequence after the other (Puigcerver et al. 2023, section 2)."""
    phi = layer.slot_embed / (layer.slot_embed.square().sum(1, keepdim=True) + 1e-6).sqrt() * layer.scale
    outputs = []
    for tokens, is_real in zip(hidden_states, token_mask, strict=True):
        unit = tokens / (tokens.square().sum(1, keepdim=True) + 1e-6).sqrt()
        exp = (unit @ phi.T).exp()  # (tokens, slots)
        written = []
        for slot in range(len(phi)):
            weights = exp[is_real, slot] / exp[is_real, slot].sum()
            mixture = sum(w * x for w, x in zip(weights, tokens[is_real], strict=True))
            written.append(moe_expert(layer.experts, slot // layer.num_slots, mixture))
        outputs.append(torch.stack([sum(w * y for w, y in zip(row / row.sum(), written, strict=True)) for row in exp]))
    return torch.stack(outputs)


def expert_choice_moe(layer, tokens, is_chosen):
    """`is_chosen(expert, scores)` says which tokens an expert takes (Zhou et al. 2022, section 3.2)."""
    scores = (tokens @ layer.router.T).softmax(-1)
    outputs = [torch.zeros_like(token) for token in tokens]
    for expert in range(len(layer.router)):
        for t in is_chosen(expert, scores):
            outputs[t] = outputs[t] + scores[t, expert] * moe_expert(layer.experts, expert, tokens[t])
    return torch.stack(outputs)


def dequantised(rows, scales):
    """Values of quantised rows, number by number: the dtype says the format, int4 packs two numbers into a byte."""
    values = []
    for row, scale in zip(rows, scales.tolist(), strict=True):
        if row.dtype == torch.uint8:
            numbers = [byte % 16 - 8 for byte in row.tolist()] + [byte // 16 - 8 for byte in row.tolist()]
        elif row.dtype == torch.float8_e4m3fn:
            numbers = [_float8(bits) for bits in row.view(torch.uint8).tolist()]
        else:
            numbers = row.tolist()
        values.append([number * scale for number in numbers])
    return torch.tensor(values, dtype=torch.float64)


def _float8(bits):
    """OCP's e4m3: a sign, four bits of exponent with bias 7, three of mantissa; no infinity."""
    sign, exponent, mantissa = -1.0 if bits & 128 else 1.0, bits >> 3 & 15, bits & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def rms_normalised_sgd(table, gradients_by_step, lr, beta2, eps, weight_decay):
    """SGD on rows, each gradient divided by a running root mean square of its row; decay is decoupled.

    Every step decays the weights and the mean square of every row: a row without a gradient has one of zeros. A row's
    steps after its last gradient are left out: `RowSparseAdamW` does them when the row is next touched.

    Args:
        table: `(num_rows, width)`.
        gradients_by_step: for every step a dict from row to its gradient, `(width,)`.

    Returns:
        the rows, `(num_rows, width)`, and their mean squares, `(num_rows,)`.
    """
    table, squares = table.clone(), torch.zeros(len(table))
    for row in range(len(table)):
        touched = [step for step, gradients in enumerate(gradients_by_step) if row in gradients]
        for step in range(max(touched, default=-1) + 1):
            gradient = gradients_by_step[step].get(row, torch.zeros(table.shape[1]))
            squares[row] = beta2 * squares[row] + (1 - beta2) * gradient.square().mean()
            root = (squares[row] / (1 - beta2 ** (step + 1))).sqrt()
            table[row] = (1 - lr * weight_decay) * table[row] - lr * gradient / (root + eps)
    return table, squares
