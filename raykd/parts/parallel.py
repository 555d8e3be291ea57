"""What memory needs under data parallelism: every rank must write the same rows in the same order."""

import torch
import torch.distributed as dist
from torch import Tensor


def gather(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, joined along the first axis in rank order; the tensor itself in a single process.

    The first axis may differ between ranks; the others may not. No gradient flows back.
    """
    tensor = tensor.detach()
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tensor
    own = torch.tensor([len(tensor)], device=tensor.device)
    counts = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    sizes = [int(count) for count in counts]
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes)])
