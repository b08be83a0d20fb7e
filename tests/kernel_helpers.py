"""Inputs of an expert mixture, and its output with every gradient."""

import torch


def mixture_inputs(device, num_tokens=5, num_active=6, width=7, num_experts=9, gated=False, dtype=torch.float32):
    sizes = {"hidden_states": num_tokens, "down_embed": num_experts, "up_embed": num_experts}
    if gated:
        sizes["gate_embed"] = num_experts
    inputs = {name: torch.randn(size, width, device=device, dtype=dtype) for name, size in sizes.items()}
    inputs["gates"] = torch.rand(num_tokens, num_active, device=device)
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    return {"expert_ids": torch.randint(num_experts, (num_tokens, num_active), device=device), **inputs}


def output_and_gradients(function, inputs, **options):
    """Gradients come dense: of row-sparse ones the rows that are not there are zero."""
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    output = function(**inputs, **options)
    upstream = (torch.arange(output.numel(), device=output.device) % 5 - 2).to(output.dtype).view_as(output)
    gradients = torch.autograd.grad(output, list(leaves.values()), upstream)
    return output, {name: g.to_dense() if g.is_sparse else g for name, g in zip(leaves, gradients, strict=True)}
