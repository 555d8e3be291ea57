"""What one of two data-parallel ranks does in test_crd; a module of its own, so that a spawned process finds it."""

import torch
import torch.distributed as dist

from raykd.methods.relation import crd

LABELS = torch.arange(12) % 3
OPTIONS = {"embed_dim": 4, "num_negatives": 400}


def batch():
    rng = torch.Generator().manual_seed(5)
    index = torch.tensor([3, 8, 1, 10, 4])
    return torch.randn(5, 6, generator=rng), torch.randn(5, 7, generator=rng), LABELS[index], index


def module():
    torch.manual_seed(0)
    made = crd.Module((6,), (7,), len(LABELS), 3, **OPTIONS)
    crd.prepare(made, LABELS)
    return made


def rank(number, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=number, world_size=2)
    own = slice(0, 3) if number == 0 else slice(3, 5)
    made = module()
    for step in range(2):
        made(*(t[own] for t in batch()), torch.Generator().manual_seed(10 * step + number), temperature=0.07)
    torch.save(made.state_dict(), f"{results}/{number}.pt")
    dist.barrier()  # gloo may abort where one rank takes the group down while the other is at work
    dist.destroy_process_group()
