"""What one of two ranks does in test_parallel; a module of its own, so that a spawned process finds it."""

import torch
import torch.distributed as dist

from raykd.parts.memory import blend_rows
from raykd.parts.parallel import gather


def rank(number, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=number, world_size=2)
    rows = torch.full((3 - 2 * number, 2), float(number), requires_grad=True)
    joined = gather(rows)
    index = gather(torch.arange(number))  # none on rank 0
    bank = torch.zeros(4, 2)
    blend_rows(bank, torch.tensor([1, 2]) + number, torch.eye(2)[[number, number]], momentum=0.0)  # both write row 2
    torch.save({"rows": joined, "index": index, "bank": bank}, f"{results}/{number}.pt")
    dist.barrier()  # gloo may abort where one rank takes the group down while the other is at work
    dist.destroy_process_group()
