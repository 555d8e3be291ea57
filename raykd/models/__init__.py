"""Models by name, their layers by name, their weights by file. No Ray here.

model = build("cifar_resnet20", num_classes=10)
load_weights(model, "resnet20.th")
with Taps(model, ["stage-1", "logits"]) as taps:
    model(images)
    features = taps["stage-1"]
"""

from raykd.models.addresses import Layer, classifier, layers, resolve, stages
from raykd.models.branching import Branched, branched
from raykd.models.cutting import blocks, tails
from raykd.models.factory import build, build_default, check_published
from raykd.models.generators import generator, generators
from raykd.models.measure import Cost, cost, fingerprint
from raykd.models.norms import norm_statistics, norms
from raykd.models.taps import Taps
from raykd.models.weights import load_weights, pretrained, resolve_pretrained
from raykd.models.zoo import names

__all__ = [
    "Branched",
    "Cost",
    "Layer",
    "Taps",
    "blocks",
    "branched",
    "build",
    "build_default",
    "check_published",
    "classifier",
    "cost",
    "fingerprint",
    "generator",
    "generators",
    "layers",
    "load_weights",
    "names",
    "norm_statistics",
    "norms",
    "pretrained",
    "resolve",
    "resolve_pretrained",
    "stages",
    "tails",
]
