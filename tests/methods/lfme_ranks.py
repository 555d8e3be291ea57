"""What one of two data-parallel ranks does in the test of LFME's weights; a module of its own, so that a process finds it."""

from datetime import timedelta

import torch
import torch.distributed as dist

from raykd.methods.multi_teacher import lfme

CLASSES = [torch.tensor([0, 1]), torch.tensor([3, 2])]


def module():
    return lfme.Module([(2,), (2,)], threshold=0.25).double()


def batch():
    """Eight samples, two of each class; the experts are right but for one, the student is right of class 0 and once of 2."""
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    said = torch.tensor([0, 0, 2, 0, 0, 0, 0, 0])
    experts = [torch.tensor([[9.0, 0.0], [0.0, 9.0]] * 4), torch.tensor([[0.0, 9.0]] * 2 + [[0.0, 9.0], [9.0, 0.0]] * 3)]
    experts[1][7] = torch.tensor([0.0, 9.0])  # a 3 taken for a 2
    return torch.nn.functional.one_hot(said, 4).double(), [e.double() for e in experts], CLASSES, labels


def count(one, part=slice(None)):
    student, experts, classes, labels = batch()
    one(student[part], [e[part] for e in experts], classes, labels[part], 0, temperature=2.0, curriculum_epochs=1)


def rank(number, rendezvous, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=number, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        one = module()
        count(one, slice(0, 3) if number == 0 else slice(3, 8))
        lfme.on_epoch(one, 1)
        torch.save(one.state_dict(), folder / f"{number}.pt")
    finally:
        dist.destroy_process_group()
