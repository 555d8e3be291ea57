"""What one of two ranks does in test_critics; a module of its own, so that a spawned process finds it."""

import torch
import torch.distributed as dist

from raykd.parts.critics import VectorCritic


def rows():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def critic():
    torch.manual_seed(0)
    return VectorCritic(3, width=4)


def rank(number, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=number, world_size=2)
    own, mine = critic(), rows()[3:] if number else rows()[:3]
    for _ in range(2):
        own.update((1 - own(mine)).square())
    torch.save(own.state_dict(), f"{results}/{number}.pt")
    dist.barrier()  # gloo may abort where one rank takes the group down while the other is at work
    dist.destroy_process_group()
