"""What the processes of the tests of parallelism run: the same short training, whole or sharded."""

from pathlib import Path

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from modeling_peer import PeerForCausalLM
from modeling_peer.training import RowSparseAdamW

BATCH_SIZE = 4


def train(folder: Path, sizes: dict[str, int] | None = None, steps: int = 20, save_to: Path | None = None, **options):
    """Train the checkpoint in `folder` on seeded batches; the losses of the steps.

    Args:
        sizes: `DistributedConfig`'s; ranks of a data-parallel group share each batch out. None: in this process alone.
        save_to: where the trained model goes.
        options: of `from_pretrained`.
    """
    if sizes:
        options["distributed_config"] = DistributedConfig(**sizes)
    model = PeerForCausalLM.from_pretrained(folder, **options).train()
    optimizer_class = RowSparseAdamW if model.config.row_sparse_gradients else torch.optim.AdamW
    optimizer = optimizer_class(model.parameters(), lr=1e-2, eps=1e-5)
    dp_size = sizes.get("fsdp_size", 1) * sizes.get("dp_replicate_size", 1) if sizes else 1
    dp_rank = dist.get_rank() * dp_size // dist.get_world_size() if sizes else 0
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(1, model.config.vocab_size, (BATCH_SIZE, 12), generator=generator)
        tokens = tokens.chunk(dp_size)[dp_rank]
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if save_to is not None:
        model.save_pretrained(save_to)
    if dp_size > 1:
        total = torch.tensor(losses, dtype=torch.float64)
        dist.all_reduce(total)
        losses = (total / dist.get_world_size()).tolist()
    return losses
