"""Tiny nets with branches, written out again: branch 0 is the plain net, parameters are named as raykd names them.

`branching` of a row's setting has `kind`: "split" (`count`, `at`), "exits" (`at`: "hidden", "stages" or names; `classes`) or
"heads" (`outputs`); `rescale` divides the gradient that the branches send into what they share by their number; `views="own"`
gives each branch its own images.
"""

import torch
from torch import nn

STAGES = ("stage1", "stage2", "stage3")


class StillNorm(nn.BatchNorm2d):
    """Batch normalisation by its running statistics, in training too: a forward more or less changes nothing."""

    def __init__(self, width):
        super().__init__(width)
        self.training = False

    def train(self, mode=True):  # noqa: ARG002
        return super().train(False)


def exit_of(widths, sides, stage, outputs):
    """Convolutions of stride 2 down to the last stage's size (one of stride 1 at that), and a linear classifier."""
    width, side, blocks = widths[stage], sides[stage], []
    while side > sides[-1] or not blocks:
        stride = 2 if side > sides[-1] else 1
        blocks += [nn.Conv2d(width, stride * width, 3, stride, 1, bias=False), StillNorm(stride * width), nn.ReLU()]
        width, side = stride * width, -(-side // stride)
    return nn.ModuleDict({"blocks": nn.Sequential(*blocks), "linear": nn.Linear(width, outputs)})


class TinyBranches(nn.Module):
    """A net of `make()`, and further branches."""

    def __init__(self, make, sides, kind, *, count=3, at=None, classes=1, outputs=128, rescale=False, views="same"):
        super().__init__()
        self.plain, self.kind, self.rescale, self.own = make(), kind, rescale, views == "own"
        widths, labels = [getattr(self.plain, name).out_channels for name in STAGES], self.plain.classifier.out_features
        if kind == "split":
            self.count, self.shared = count, STAGES.index(at or "stage2") + 1
            parts = [*STAGES[self.shared :], "classifier"]
            tails = [make() for _ in range(count - 1)]
            self.tails = nn.ModuleList(nn.ModuleDict({name: getattr(tail, name) for name in parts}) for tail in tails)
        elif kind == "exits":
            names = {None: STAGES[:-1], "hidden": STAGES[:-1], "stages": STAGES}.get(at, at)
            self.at = [STAGES.index(name) for name in names]
            self.count = 1 + len(self.at)
            self.exits = nn.ModuleList(exit_of(widths, sides, stage, classes * labels) for stage in self.at)
        else:
            assert kind == "heads", kind
            self.count, width = 2, widths[-1]
            self.heads = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))])

    def forward(self, images):
        return [found["logits"] for found in self.answers(images)]

    def answers(self, images):
        """Signals of every branch; `images` may be a list of what each branch sees."""
        views = images if isinstance(images, list) else [images] * self.count
        return [self.branch(i, view) for i, view in enumerate(views)]

    def branch(self, i, images):
        """Signals of one branch, all of its path computed anew."""
        stages, classifier = [], self.plain.classifier
        for number, name in enumerate(STAGES):
            alone = self.kind == "split" and i > 0 and number >= self.shared
            images = torch.relu((self.tails[i - 1][name] if alone else getattr(self.plain, name))(images))
            if self.kind == "split" and self.rescale and number == self.shared - 1 and images.requires_grad:
                images.register_hook(lambda gradient: gradient / self.count)
            stages.append(images)
            classifier = self.tails[i - 1]["classifier"] if alone else classifier
            if self.kind == "exits" and i > 0 and number == self.at[i - 1]:
                images, classifier = self.exits[i - 1]["blocks"](images), self.exits[i - 1]["linear"]
                stages.append(images)
                break
        embedding = images.mean((2, 3))
        if self.kind == "heads" and i > 0:
            classifier = self.heads[0]
        return {"logits": classifier(embedding), "embedding": embedding, "stages": stages}
