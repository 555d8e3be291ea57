"""Deep mutual learning as a plain PyTorch loop in one process: what a trace of raykd is compared with.

Of raykd it takes the batches, and the models with their initial weights; all else is written here from the papers:

    DML, eq. 5 and 8:  L_k = CE_k + 1/(K-1) sum_{l != k} KL(p_l || p_k)
    codistillation (Anil et al., algorithm 2): the others' predictions are made by stale copies of their weights
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from raykd import models
from raykd.config import Job
from raykd.data.batches import Plan, batch_of
from raykd.data.keys import derive
from raykd.data.splits import open_data

STATS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Alone:
    """One network with its optimizer."""

    def __init__(self, job: Job, name: str) -> None:
        peer = job.peers[name]
        torch.manual_seed(derive(derive(job.seed, "peer", name) >> 8, "student"))
        self.net = models.build(peer.model, 10, **peer.options)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in STATS[peer.normalise or "cifar10"])
        self.scale, self.offset = 1 / (255 * std), -mean / std
        set_to = {"lr": 0.05, "nesterov": True, "weight_decay": 5e-4, "optimizer": "sgd", "scheduler": "multistep"} | dict(
            peer.training
        )
        self.lr, self.cosine, self.epochs = set_to["lr"], set_to["scheduler"] == "cosine", job.training.epochs
        if set_to["optimizer"] == "adamw":
            self.optimizer = torch.optim.AdamW(self.net.parameters(), self.lr, weight_decay=5e-4)
        else:
            self.optimizer = torch.optim.SGD(
                self.net.parameters(),
                self.lr,
                momentum=0.9,
                nesterov=set_to["nesterov"],
                weight_decay=set_to["weight_decay"],
            )

    def inputs(self, images):
        return images.float() * self.scale + self.offset

    def set_rate(self, epoch: float) -> None:
        """Cosine over all epochs, or a tenth from epoch 1.5 on."""
        factor = 0.5 * (1 + math.cos(math.pi * epoch / self.epochs)) if self.cosine else (0.1 if epoch >= 1.5 else 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor


def divergence(student, teacher, temperature):
    """T^2 KL(p_teacher || p_student) a sample."""
    log_q, log_p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def run(
    job: Job,
    steps: int,
    graph: Mapping[str, Mapping[str, float]] | Callable[[int], Mapping[str, Mapping[str, float]]],
    every: int = 1,
    staleness: int | None = None,
    temperature: float = 2.0,
    label: str = "dml",
):
    """Trains all peers of a job.

    Args:
        job: whose data, models and optimizers they are.
        steps: of the training.
        graph: peer -> those it learns from, each with its share; or such a mapping for each step.
        every: steps between exchanges.
        staleness: of the copies that answer; None: the peers' own logits of the step.
        temperature: of the divergence.
        label: of the loss in the trace.

    Returns:
        Peer -> trace, and peer -> network.
    """
    torch.set_num_threads(1)
    data = open_data(job.data, "train", job.seed)
    names, count = list(job.peers), len(job.peers)
    disjoint, own = job.exchange.shards == "disjoint", job.exchange.views == "own"
    parts = {n: list(range(i, len(data), count)) if disjoint else None for i, n in enumerate(names)}
    alone = {n: Alone(job, n) for n in names}
    at = graph if callable(graph) else lambda _: graph
    found = {n: [] for n in names}
    kept = {n: {} for n in names}  # step -> weights
    plans, sets = {}, {}
    for i, n in enumerate(names):
        sets[n] = data if parts[n] is None else _Part(data, parts[n])
        plans[n] = Plan(len(sets[n]), 16, job.seed, first_view=i if own else 0)
    for step in range(steps):
        batches, logits = {}, {}
        for n, one in alone.items():
            epoch, place = plans[n].position(step)
            batches[n] = batch_of(sets[n], plans[n], job.data.augmentation, epoch, place)
            one.set_rate(step / plans[n].steps_per_epoch)
            one.net.train()
            logits[n] = one.net(one.inputs(batches[n]["images"]))
            if step % every == 0:
                kept[n][step] = copy.deepcopy(one.net.state_dict())
        for n, one in alone.items():
            terms = {"ce": F.cross_entropy(logits[n], batches[n]["labels"], reduction="none").sum() / 16}
            for other, share in at(step).get(n, {}).items():
                if staleness is not None:
                    teacher = _stale(job, other, kept[other][max(0, step - staleness) // every * every], alone, batches[n])
                elif step % every == 0:
                    teacher = logits[other].detach()
                else:
                    continue
                value = share * (divergence(logits[n], teacher, temperature).sum() / 16)
                terms[label if len(at(0)[n]) == 1 else f"{label}.{other}"] = value
            one.optimizer.zero_grad()
            sum(terms.values()).backward()
            found[n].append((step + 1, {name: float(term.detach()) for name, term in terms.items()}))
        for one in alone.values():
            one.optimizer.step()
    return found, {n: one.net for n, one in alone.items()}


def _stale(job, name, weights, alone, batch):
    """What an old copy says of a batch, in evaluation mode."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        net = models.build(job.peers[name].model, 10, **job.peers[name].options)
        net.load_state_dict(weights)
        return net.eval()(alone[name].inputs(batch["images"]))


class _Part:
    """Some samples of a data set, numbered anew."""

    def __init__(self, data, rows) -> None:
        self.data, self.rows = data, torch.tensor(rows).numpy()
        self.labels = data.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows):
        return self.data.read(self.rows[rows])
