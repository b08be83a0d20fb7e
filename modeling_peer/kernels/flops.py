# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""FLOPs that `torch.utils.flop_counter.FlopCounterMode` counts for each operator, by name: two per multiply-add.

Retrieval counts the products of the readable formula: all sub-keys and, in the backward, a dense gradient of their
scores. A model thus counts the same with every implementation. Reading a row and writing one count its width.
"""

from math import prod


def product_key_top_k(query, sub_keys, *_, **__):
    num_queries, query_dim, num_sub_keys = prod(query[:2]), query[2], sub_keys[-2]
    return 2 * num_queries * query_dim * num_sub_keys


def product_key_top_k_backward(grad_scores, expert_ids, query, sub_keys, *_, **__):
    return 2 * product_key_top_k(query, sub_keys)


def read_experts(tokens, expert_ids, *_, **__):
    return 2 * prod(expert_ids) * tokens[1]


def write_experts(weights, expert_ids, table, *_, out_shape, **__):
    return 2 * prod(expert_ids) * out_shape[1]  # a row of int4 is half as long in memory


def row_gradients(weights, tokens, expert_ids, *_, **__):
    return 2 * prod(expert_ids) * tokens[1]


def write_experts_gradients(grad_outputs, weights, expert_ids, *_, **__):
    return 2 * 2 * prod(expert_ids) * grad_outputs[1]  # for the weights and for the table
