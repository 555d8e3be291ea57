"""What one of two ranks does in test_ranks; a module of its own, so that a spawned process finds it."""

import torch
import torch.distributed as dist
from torch import nn

from raykd.config import Loss
from raykd.roles import checkpoints
from raykd.roles.evaluator import evaluate
from raykd.roles.optimisation import average_buffers, sync_gradients
from tests.roles import small

LOSSES = {"kd": Loss("kd"), "vid": Loss("vid")}
STEPS = 3


def share(given, number):
    """A rank's half of a batch."""
    half = len(given["labels"]) // 2
    return {name: value[number * half : (number + 1) * half] for name, value in given.items()}


def gradients(number):
    """Parameters of two types, one without a gradient, and the flags."""
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(4).double())]
    parameters[0].grad = torch.arange(6.0).view(2, 3) * (number + 1)
    parameters[2].grad = torch.full((4,), 0.25 + number).double()
    flags = sync_gradients(parameters, torch.tensor([float(number), 1.0]))
    return {"first": parameters[0].grad, "none": parameters[1].grad is None, "third": parameters[2].grad, "flags": flags}


def buffers(number):
    """A batch norm after averaging."""
    norm = nn.BatchNorm1d(2)
    norm.running_mean += 2 * number + 1
    norm.num_batches_tracked += number
    average_buffers(norm)
    return norm.running_mean, int(norm.num_batches_tracked)


def trained(number):
    """The student after STEPS steps on this rank's halves, and the reports."""
    learner, taught = small.learner(small.job(LOSSES, training={"grad_norms_every": 1}), rank=number)
    reports = []
    for step in range(STEPS):
        mine = share(small.batch(step), number)
        reports.append(learner.step(mine, taught.request(mine).result(), small.BATCH, stop=(number == 1 and step == 1)))
    return {
        "weights": small.weights(learner),
        "connectors": dict(learner.losses["vid"].state_dict()),
        "reports": [(r.loss, r.terms, r.grad_norms, r.stop) for r in reports],
    }


def diverges(number):
    """One rank's loss is not finite: what both say, and whether anything moved."""
    learner, taught = small.learner(small.job(LOSSES), rank=number)
    before = small.weights(learner)
    mine = share(small.batch(), number)
    signals = taught.request(mine).result()
    if number == 1:
        signals["big"]["logits"][0, 0] = torch.nan
    try:
        learner.step(mine, signals, small.BATCH)
    except Exception as error:
        return type(error).__name__, torch.equal(before, small.weights(learner))
    return "", False


def accuracy(number):
    """Rank 0 holds three images, rank 1 one; the last of them is wrong."""
    scores = torch.eye(7)[[0, 1, 2]] if number == 0 else torch.eye(7)[[6]]
    labels = torch.tensor([0, 1, 2]) if number == 0 else torch.tensor([0])
    found = evaluate(lambda _: scores, [{"images": torch.zeros(len(labels)), "labels": labels}])
    return found.top1, found.top5, found.count


def averaged_copy(number):
    """Statistics of the averaged copy that is evaluated, after one step on unlike batches."""
    made = small.job({}, training={"ema": 0.5, "evaluate": "ema"}, student={"norm": True})
    learner, _ = small.learner(made, rank=number)
    learner.step(share(small.batch(), number), {"big": {}}, small.BATCH)
    learner.settle()
    return learner.evaluated_model().stage1[1].running_mean


def rank(number, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=number, world_size=2)
    found = {
        "gradients": gradients(number),
        "buffers": buffers(number),
        "trained": trained(number),
        "diverges": diverges(number),
        "accuracy": accuracy(number),
        "averaged": averaged_copy(number),
    }
    folder = results / "checkpoints"
    checkpoints.save(folder, 5, number, 2, {"rank": number}, dist.barrier, keep=1)
    found["loaded"] = checkpoints.load(folder, checkpoints.newest(folder), number, 2)
    torch.save(found, results / f"{number}.pt")
    dist.barrier()  # gloo may abort where one rank takes the group down while the other is at work
    dist.destroy_process_group()
