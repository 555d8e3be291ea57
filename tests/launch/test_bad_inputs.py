# ruff: noqa: E501 (the tables read best one case a line)
"""Bad input: each kind gives one clear error that names the place; static ones are told together, before anything starts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from raykd import Augmentation, Job, Loss, Student, Teacher
from raykd.config import Edge, Peer
from raykd.data.batches import Plan as Order
from raykd.errors import ConfigError, DataError, DivergenceError, JobFaults, RaykdError, SourceError
from raykd.launch.checks import inspect
from raykd.launch.run import run
from raykd.resolve import from_dict, to_dict
from raykd.roles import checkpoints
from tests.launch import scene

W = "{root}/weights/"
BIG = "teachers.big."
MINE = "bad_user_code:"


def also(name: str, *args, **options) -> dict:
    """A second loss beside kd."""
    return {f"losses.{name}": Loss(*args, **options), "ce_weight": 0.5}


def only(method: str, **options) -> dict:
    """Another loss instead of kd."""
    return {"losses": {method: Loss(method, **options)}}


BESIDE = {
    "teachers": {"big": Teacher(model="cifar_resnet8")},
    "losses": {"dml": Loss("dml"), "kd": Loss("kd")},
    "ce_weight": 1.0,
}


def making(method: str = "dfad", **settings) -> dict:
    """A job that makes its own images, and then what is wrong; names of settings of `synthesis` without that word."""
    own = {name if "." in name else f"synthesis.{name}": value for name, value in settings.items()}
    return {"data.train": None, "data.augmentation": Augmentation(), "losses": {method: Loss(method)}, **own}


def banking(**settings) -> dict:
    """The same with a bank."""
    return making(mode="bank", **settings)


GOOD = {BIG + "weights": W + "good.safetensors"}


def among(names, settings: dict | None = None, **parts) -> dict:
    """Peers in the place of student and teacher, and then what is wrong."""
    peers = {"peers": {name: Peer(model="cifar_resnet8") for name in names}}
    return {"student": Student(), "teachers": {}, "losses": {"dml": Loss("dml")}, **peers, **parts, **(settings or {})}


# what is wrong -> (settings, how the fault begins, what else it says)
DATA = {
    "missing folder": ({"data.root": "{root}/dat"}, "data.root: expected a directory", "which does not exist. Did you mean 'data'"),
    "pattern without files": ({"data.train": "trian.parquet"}, "data.train: ", "to name at least one file, got none", "'train.parquet'"),
    "empty folder": ({"data.root": "{root}/data/emptydir", "data.eval": None, "data.test": "train.parquet"}, "data.", "is empty"),
    "no pattern": ({"data.train": None}, "data.train: expected a value for kind 'parquet'", "Set data.train"),
    "corrupt shard": ({"data.train": "corrupt.parquet"}, "data.train: ", "corrupt or truncated (corrupt.parquet)"),
    "truncated shard": ({"data.train": "truncated.parquet"}, "data.train: ", "(truncated.parquet)", "Copy it again"),
    "missing column": ({"data.image_column": "imag", "data.eval": "train.parquet"}, "data.", "image_column", "'imag'", "'image'"),
    "labels no integers": ({"data.train": "floats.parquet"}, "data.train: label_column: expected integers", "got double"),
    "label out of range": ({"data.train": "range.parquet"}, "data.train: labels: expected 0..3, got 0..7", "(range.parquet)"),
    "label out of range in eval": ({"data.eval": "range.parquet"}, "data.eval: labels: expected 0..3, got 0..7"),
    "label out of range, no statistics": ({"data.train": "hidden.parquet"}, "data.train: labels: ", "got 9 (hidden.parquet, row group 2, row 8"),
    "too few classes": ({"data.num_classes": 3, "data.eval": None, "data.test": None, "teachers": {}, "losses": {}}, "data.train: labels: expected 0..2, got 0..3"),
    "first image undecodable": ({"data.train": "first.parquet"}, "data.train: image: ", "(first.parquet, row group 0, row 0)"),
    "unknown data kind": ({"data.kind": "parqet"}, "data.kind: expected one of parquet", "Did you mean 'parquet'"),
    "unknown torchvision set": ({"data.kind": "torchvision:CIFAR1O"}, "data.train, data.eval: torchvision set", "'CIFAR10'"),
    "data factory not importable": ({"data.kind": "nomodule:data"}, "data.kind: expected an importable module", "'nomodule'"),
    "data factory misspelt": ({"data.kind": f"{MINE}dta"}, "data.kind: expected a factory", "Did you mean 'data'"),
    "data factory without a data set": ({"data.kind": f"{MINE}data"}, "data.kind: ", "to return a DataSet", "num_classes"),
    "too few images a class": ({"data.per_class": 1000}, "data: per_class: expected at least 1000", "got 16 in class 0"),
    "two limits": ({"data.limit": 32, "data.per_class": 8}, "data.limit: expected either limit or per_class"),
    "nothing to measure teachers on": ({"data.eval": None}, "data.eval: the teachers are measured"),
    "unknown normalisation": ({"data.normalise": "cifar11"}, "data.normalise: expected a known preset", "'cifar10'"),
    "means of another number": ({"data.normalise": ((0.5, 0.5), (1.0, 1.0))}, "data.normalise: ", "expected 2 channels", "got 3"),
    "crop twice": ({"data.augmentation.crop": 2, "data.augmentation.resized_crop": 8}, "data.augmentation.resized_crop: "),
}  # fmt: skip
MODELS = {
    "unknown model": ({"student.model": "convnet"}, "student: model 'convnet': expected a known architecture"),
    "misspelt zoo model": ({"student.model": "cifar_resnet9"}, "student: model 'cifar_resnet9'", "'cifar_resnet8'"),
    "timm name without prefix": ({"student.model": "resnet18"}, "student: model 'resnet18'", "Write timm:resnet18"),
    "misspelt timm model": ({"student.model": "timm:resnet19"}, "student: timm:resnet19", "'resnet18'"),
    "unknown model option": ({"student.options": {"in_chanels": 3}}, "student: cifar_resnet8: ", "Did you mean 'in_channels'"),
    "classes as an option": ({"student.options": {"num_classes": 4}}, "student.options.num_classes: "),
    "factory not importable": ({"student.model": "nomodule:net"}, "student: model 'nomodule:net'", "No module named 'nomodule'"),
    "factory's own import fails": ({"student.model": "bad_import:net"}, "student: ", "'a_package_that_is_not_there'"),
    "factory misspelt": ({"student.model": f"{MINE}twise"}, "student: ", "Did you mean 'twice'"),
    "factory returns no model": ({"student.model": f"{MINE}not_a_model"}, "student: ", "a torch.nn.Module, got str"),
    "factory raises": ({"student.model": f"{MINE}failing_model"}, "student: ", "KeyError: 'no such block' (", "bad_user_code.py:"),
    "model does not take the images": ({"student.model": "mlp"}, "student: mlp: expected a model that takes images of 3 x 8 x 8"),
    "student with other classes": ({"student.model": f"{MINE}twice"}, "student.model: expected logits of 4 classes", "got 8"),
    "weights of another architecture": ({BIG + "weights": W + "other.safetensors"}, "teachers.big.weights: ", "36 unexpected"),
    "weights of other classes": ({BIG + "weights": W + "ten.safetensors"}, "teachers.big.weights: ", "model (4,), file (10,)"),
    "missing weights": ({BIG + "weights": W + "god.safetensors"}, "teachers.big.weights: ", "god.safetensors: expected a file, got none"),
    "truncated safetensors": ({BIG + "weights": W + "truncated.safetensors"}, "teachers.big.weights: ", "It is truncated"),
    "truncated pickle": ({BIG + "weights": W + "truncated.pt"}, "teachers.big.weights: ", "It is truncated"),
    "pickle that runs code": ({BIG + "weights": W + "evil.pt"}, "teachers.big.weights: ", "expected plain tensors", "GLOBAL print"),
    "pickle without weights": ({BIG + "weights": W + "empty.pt"}, "teachers.big.weights: ", "got a dict of epoch"),
    "weights are a folder": ({BIG + "weights": W}, "teachers.big.weights: ", "got a folder"),
    "wrong sha256": ({BIG + "weights_sha256": "0" * 64}, "teachers.big.weights: ", "expected sha256 0000"),
    "sha256 of nothing": ({"student.weights_sha256": "0" * 64}, "student.weights_sha256: expected a file"),
    "teacher without weights": ({BIG + "weights": None}, "teachers.big.weights: a teacher needs weights"),
    "published weights of our own model": ({BIG + "weights": "pretrained"}, "teachers.big: pretrained 'cifar_resnet8'"),
    "unknown stage": ({BIG + "weights": "stage:wide"}, "teachers.big.weights: no stage 'wide' in this job"),
}  # fmt: skip
LOSSES = {
    "unknown layer": (also("at", "at", layers=("stge2",)), "losses.at: layer 'stge2'", "Did you mean 'stage2'"),
    "layer counts differ": (also("at", "at", layers={"student": ("stage1", "stage2"), "teacher": "stage1"}), "losses.at: layers: expected as many"),
    "layers of an unknown role": (also("at", "at", layers={"studnt": "stage1", "teacher": "stage1"}), "losses.at.layers: no role 'studnt'", "'student'"),
    "layers for a loss that reads none": (only("kd", layers=("stage1",)), "losses.kd: layers: kd reads no layers"),
    "feature maps that do not fit": (also("hint", "fitnet", layers={"student": "stage3", "teacher": "stage1"}), "losses.hint: student_feature: expected a map of at least 8x8", "got 2x2"),
    "a vector instead of a map": (also("hint", "fitnet", layers=("linear",)), "losses.hint: ", "feature@linear [16, 4]"),
    "teacher with other classes": ({BIG + "model": f"{MINE}twice", BIG + "weights": W + "twice.safetensors"}, "losses.kd: teacher_logits: expected [b=16 *p c=4], got [16, 8]"),
    "unknown method": (also("x", "kdd"), "losses.x: Method 'kdd': no such method", "'kd'"),
    "misspelt option": ({"losses.kd.temprature": 2.0}, "losses.kd.temprature: kd has no such option", "'temperature'"),
    "ill-typed option": ({"losses.kd.temperature": "hot"}, "losses.kd.temperature: expected float, got 'hot'"),
    "temperature of zero": ({"losses.kd.temperature": 0.0}, "losses.kd.temperature: expected a temperature above 0"),
    "negative weight": ({"losses.kd.weight": -1.0}, "losses.kd.weight: expected a weight of at least 0"),
    "option among words": (also("hint", "fitnet", regressor="cnv"), "losses.hint: regressor: expected 'conv_bn_relu' or 'conv'", "'conv'"),
    "unknown weight schedule": ({"losses.kd.schedule": "linaer(5)"}, "losses.kd.schedule: expected constant, linear(E)"),
    "topk for dkd": ({BIG + "codec": "topk:2", **only("dkd")}, "teachers.big.codec: expected one that keeps every class for dkd"),
    "topk for dist": ({BIG + "codec": "topk:2", **only("dist")}, "teachers.big.codec: ", "for dist"),
    "topk for kd-mse": ({BIG + "codec": "topk:2", **only("kd-mse")}, "teachers.big.codec: ", "for kd-mse"),
    "unknown codec": ({BIG + "codec": "fp61"}, "teachers.big.codec: ", "Did you mean 'fp16'"),
    "topk at two temperatures": ({BIG + "codec": "topk:2", **also("warm", "kd", temperature=8.0)}, "teachers.big.codec: ", "[4.0, 8.0]"),
    "teachers without a loss": ({"losses": {}}, "losses: the job has teachers and no loss"),
    "a loss without teachers": ({"teachers": {}}, "losses.kd: kd listens to a teacher and the job has none"),
    "a loss of an absent teacher": ({"losses.kd.teachers": ("bg",)}, "losses.kd.teachers: no teacher 'bg'", "'big'"),
    "nothing to learn from": ({"losses": {}, "teachers": {}, "ce_weight": 0.0}, "ce_weight: 0 without any other loss"),
    "losses that disagree": ({"losses.dist": Loss("dist")}, "ce_weight: the losses want different weights"),
    "a loss of the user's that raises": (also("x", f"{MINE}raising_loss"), "losses.x: ", "KeyError: 'margin'", "bad_user_code.py:"),
    "a loss of the user's of a wrong shape": (also("x", f"{MINE}shape_loss"), "losses.x: expected one value a sample [16]", "got [16, 4]"),
    "a loss of the user's without return": (also("x", f"{MINE}none_loss"), "losses.x: ", "got NoneType", "`return`"),
    "a loss of the user's without the student": (also("x", f"{MINE}constant_loss"), "losses.x: ", "without a gradient"),
    "a loss of the user's with a syntax error": (also("x", "bad_syntax:my_loss"), "losses.x: Method file ", "bad_syntax.py, line 1"),
    "a loss of the user's that is not there": (also("x", f"{MINE}god_loss"), "losses.x: ", "Did you mean 'good_loss'"),
    "a loss of the user's in no module": (also("x", "nomodule:my_loss"), "losses.x: ", "no Python module 'nomodule'"),
    "a loss of the user's that cannot be imported": (also("x", "bad_import:net"), "losses.x: ", "'a_package_that_is_not_there'"),
    "a misspelt signal": (also("x", f"{MINE}misnamed_loss"), "losses.x: Signal 'logit'", "Did you mean 'logits'"),
    "an unknown role": (also("x", f"{MINE}unknown_loss"), "losses.x: Parameter 'pupil_logits'", "student, teacher"),
}  # fmt: skip
SETTINGS = {
    "ill-typed setting": ({"training.lr": "fast"}, "training.lr: expected a valid number", "got 'fast'"),
    "negative learning rate": ({"training.lr": -0.1}, "training.lr: expected a number greater than 0, got -0.1"),
    "no epochs": ({"training.epochs": 0}, "training.epochs: ", "got 0"),
    "momentum above one": ({"training.momentum": 2.0}, "training.momentum: ", "got 2.0"),
    "half a sample": ({"training.batch_size": 16.5}, "training.batch_size: expected a valid integer", "got 16.5"),
    "misspelt word": ({BIG + "placement": "pol"}, "teachers.big.placement: expected 'pool', 'inline' or 'store'", "Did you mean 'pool'"),
    "misspelt aggregator": ({"losses.kd.aggregate": "mean_prob"}, "losses.kd: aggregate: no aggregator 'mean_prob'", "'mean_probs'"),
    "one teacher twice": ({"losses.kd.teachers": ["big", "big"]}, "losses.kd.teachers: expected each teacher once, got big twice"),
    "the only teacher may be dropped": ({BIG + "on_loss": "drop"}, "teachers.big.on_loss: losses.kd listens to nobody else"),
    "an actor for an inline teacher": ({BIG + "actor": "x", BIG + "placement": "inline"}, "teachers.big.actor: only teachers in a pool"),
    "a class the student has not": ({BIG + "label_map": [0, 1, 2, 7]}, "teachers.big.label_map: expected classes 0..3"),
    "held out of nothing": ({"data.eval": "holdout"}, "data.eval: 'holdout' needs data.holdout"),
    "a model's name for a student": ({"student": "cifar_resnet8"}, "student: expected ", "an instance of Student"),
    "batch larger than the data": ({"training.batch_size": 100}, "training.batch_size: expected at most the 64 training samples", "got 100"),
    "batch not divisible by workers": ({"training.batch_size": 15, "launch.workers": 2, "launch.backend": "ray"}, "training.batch_size: 15 is not divisible by launch.workers=2"),
    "accumulation that does not divide": ({"training.accumulate": 3}, "training.accumulate: 3 does not divide"),
    "accumulation of sp": ({"training.accumulate": 2, **only("sp")}, "training.accumulate: sp couples the whole batch"),
    "accumulation of rkd": ({"training.accumulate": 2, **only("rkd")}, "training.accumulate: rkd couples the whole batch"),
    "two local workers": ({"launch.workers": 2}, "launch.workers: the local backend has one worker"),
    "a GPU that is not there": ({"launch.backend": "ray", "launch.device": "cuda"}, "launch.device: 'cuda' needs a GPU"),
    "averaged student without ema": ({"training.evaluate": "ema"}, "training.evaluate: 'ema' needs training.ema"),
    "unknown optimizer": ({"training.optimizer": "sgdd"}, "training.optimizer: no optimizer 'sgdd'", "'sgd'"),
    "unknown optimizer option": ({"training.optimizer_options": {"dampning": 0.1}}, "training.optimizer_options: ", "'dampening'"),
    "ill-typed optimizer option": ({"training.optimizer_options": {"dampening": "x"}}, "training.optimizer_options: sgd: TypeError"),
    "unknown scheduler": ({"training.scheduler": "cosin"}, "training.scheduler: no scheduler 'cosin'", "'cosine'"),
    "unknown timm scheduler": ({"training.scheduler": "timm:cosin"}, "training.scheduler: ", "'cosin'"),
    "unknown recipe": ({"training.recipe": "crdd"}, "training.recipe: no recipe 'crdd'", "'crd'"),
    "nesterov without momentum": ({"training.nesterov": True, "training.momentum": 0.0}, "training.nesterov: ", "needs a momentum above 0"),
    "a name that is a path": ({"name": "a/b"}, "name: expected a name of letters", "'a/b'"),
    "a teacher called student": ({"teachers": {"student": Teacher(model="cifar_resnet8", weights="x")}}, "teachers.student: this name is raykd's own"),
    "runs at a URI": ({"runs": "s3://bucket/runs"}, "runs: expected a path that all nodes share"),
    "a fault in a stage": ({"stages": {"pre": Job(data=scene.Data(), losses={"x": Loss("kdd")})}}, "stages.pre.losses.x: ", "'kd'"),
}  # fmt: skip
WEIGHTS = {"exchange.what": "weights"}
PEERS = {
    "one peer": (among("a"), "peers: expected two or more, got one"),
    "peers and a student": (among("ab", student=Student(model="cifar_resnet14")), "student: a job with peers has no student"),
    "a peer called student": (among(("a", "student")), "peers.student: this name is raykd's own"),
    "a peer with a teacher's name": (among(("a", "big"), GOOD, **BESIDE), "peers.big: a teacher has this name"),
    "an exchange without peers": ({"exchange.graph": "ring"}, "exchange: expected peers that exchange something, got none"),
    "peers without a loss of theirs": (among("ab", {"exchange.graph": "ring"}, losses={}), "exchange: no loss listens to a peer"),
    "a loss of peers without peers": ({"teachers": {}, **only("dml")}, "losses.dml: dml listens to peers and the job has none. Add two or more to `peers`"),
    "misspelt graph": (among("ab", {"exchange.graph": "rnig"}), "exchange.graph: expected one of all, ring, leader:<peer>, star:<peer>, got 'rnig'"),
    "a leader that is not there": (among("ab", {"exchange.graph": "leader:c"}), "exchange.graph: no peer 'c' in this job"),
    "an edge to nobody": (among("ab", {"exchange.edges": {"a>c": Edge()}}), "exchange.edges.a>c: expected 'a>b' of two peers"),
    "an edge without direction": (among("ab", {"exchange.edges": {"a-b": Edge()}}), "exchange.edges.a-b: expected 'a>b'"),
    "an edge to itself": (among("ab", {"exchange.edges": {"a>a": Edge()}}), "exchange.edges.a>a: expected two different peers"),
    "edges without weight": (among("ab", {"exchange.edges": {"a>b": Edge(weight=0.0)}}), "exchange.edges: all peers that 'b' listens to have weight 0"),
    "an edge of an absent loss": (among("ab", {"exchange.edges": {"a>b": Edge(losses=("dlm",))}}), "exchange.edges: no loss 'dlm' in this job", "'dml'"),
    "an absent peer in a loss": (among("ab", losses={"dml": Loss("dml", teachers=("c",))}), "losses.dml.teachers: ", "'c'"),
    "stale signals": (among("ab", {"exchange.staleness": 2}), "exchange.staleness: signals are of the same step", "exchange.what='weights'"),
    "signals of different images": (among("ab", {"exchange.shards": "disjoint"}), "exchange.shards: peers that see different images"),
    "topk among peers": (among("ab", {"exchange.codec": "topk:2"}), "exchange.codec: expected dense, fp16 or int8 among peers"),
    "misspelt codec among peers": (among("ab", {"exchange.codec": "fp61"}), "exchange.codec: ", "Did you mean 'fp16'"),
    "weights in another codec": (among("ab", WEIGHTS | {"exchange.codec": "fp16"}), "exchange.codec: weights travel as they are"),
    "views of their own, mixed": (among("ab", {"exchange.views": "own", "data.augmentation": Augmentation(mixup=0.4)}), "exchange.views: 'own' mixes other images"),
    "accumulating peers": (among("ab", {"training.accumulate": 2}), "training.accumulate: peers exchange whole batches"),
    "misspelt mode": (among("ab", {"exchange.what": "wieghts"}), "exchange.what: expected 'signals' or 'weights'", "Did you mean 'weights'"),
    "misspelt policy": (among("ab", {"exchange.on_loss": "respwan"}), "exchange.on_loss: ", "Did you mean 'respawn'"),
    "never an exchange": (among("ab", {"exchange.every": 0}), "exchange.every: ", "got 0"),
    "epochs of a peer's own": (among("ab", {"peers.b.training": {"epochs": 2}}), "peers.b.training.epochs: expected a setting that a peer may have of its own"),
    "misspelt setting of a peer": (among("ab", {"peers.b.training": {"lrr": 2}}), "peers.b.training.lrr: ", "'lr'"),
    "ill-typed setting of a peer": (among("ab", {"peers.b.training": {"lr": "fast"}}), "peers.b.training.lr: ", "'fast'"),
    "misspelt model of a peer": (among("ab", {"peers.b.model": "cifar_resnet9"}), "peers.b: model 'cifar_resnet9'", "'cifar_resnet8'"),
    "a peer with other classes": (among("ab", {"peers.a.model": f"{MINE}twice"}), "peers.a.model: expected logits of 4 classes", "got 8"),
    "an actor called as a peer": (among("abc", {"peers.a.actor": "c"}), "peers.a.actor: 'c' is the name of a peer"),
    "workers of a shared actor": (among("ab", {"peers.a.actor": "x", "peers.b.actor": "x", "launch.workers": 2, "launch.backend": "ray"}), "peers.*.actor: peers that share an actor"),
    "a store beside peers": (among("ab", GOOD | {BIG + "placement": "store", BIG + "store": "x"}, **BESIDE), "teachers.big.placement: peers are taught by live teachers"),
}  # fmt: skip
RAY = {"launch.backend": "ray"}
SYNTHESIS = {
    "synthesis without a method that makes images": ({"synthesis.lr": 0.1}, "synthesis: no loss of this job makes images", "such as dfad"),
    "two methods that make images": (making(**{"losses.zskt": Loss("zskt")}), "losses: expected one that makes images, got dfad, zskt"),
    "images to learn from, and none wanted": (making(**{"data.train": "train.parquet"}), "data.train: this job makes its own images, got 'train.parquet'"),
    "augmented images that are made": (making(**{"data.augmentation.flip": True}), "data.augmentation: these images are made anew"),
    "mixed images of a bank": (banking(**{"data.augmentation.mixup": 0.2}), "data.augmentation: images of a bank, or beside made ones, are not mixed"),
    "images of a bank of another size": (banking(**{"data.augmentation.resized_crop": 4}), "data.augmentation.resized_crop: expected 8, as images are without it, got 4"),
    "a limit of images that are made": (making(**{"data.limit": 32}), "data.limit: it is of training images"),
    "a student alone without images": (making() | {"baseline": True}, "baseline: without images to learn from there is no student alone"),
    "a recipe of made images": (making(**{BIG + "inputs": "recipe"}), "teachers.big.inputs: images that are made need 'pixels'"),
    "a lossy codec of made images": (making(**{BIG + "codec": "fp16"}), "teachers.big.codec: images that are made need 'dense'"),
    "a teacher that may go while images are made": (making(**{"teachers.small": Teacher(model="cifar_resnet8"), "teachers.small.weights": W + "good.safetensors", BIG + "on_loss": "drop"}), "teachers.big.on_loss: images that are made need 'stop'"),
    "a store of made images": (making(**GOOD, **{BIG + "placement": "store", BIG + "store": "x"}), "teachers.big.placement: nothing is kept of images that are made"),
    "a memory of images that are made": (making(**{"losses.crd": Loss("crd", num_negatives=4)}) | {"ce_weight": 0.5}, "losses.crd: crd keeps something of each training image"),
    "misspelt generator": (making(generator="dcgn"), "synthesis.generator: no generator 'dcgn'", "'dcgan'"),
    "misspelt option of a generator": (making(options={"widht": 4}), "synthesis: dcgan: expected an option among", "'width'"),
    "misspelt setting of synthesis": (making() | {"synthesis": {"generator_step": 1}}, "synthesis.generator_step: ", "'generator_steps'"),
    "ill-typed setting of synthesis": (banking(capacity="many"), "synthesis.capacity: ", "'many'"),
    "unknown mode of synthesis": (making(mode="banks"), "synthesis.mode: ", "'bank'"),
    "unknown priority": (banking(priority="recnt"), "synthesis.priority: ", "'recent'"),
    "a bank of no batches": (banking(capacity=0), "synthesis.capacity: "),
    "a student that begins with more than the bank holds": (banking(capacity=4, start=5), "synthesis.start: expected at most synthesis.capacity, 4 batches, got 5"),
    "workers without a synthesizer": (banking(**RAY, **{"launch.workers": 2}), "synthesis.synthesizers: expected one for each of 2 workers"),
    "a generator that goes on in two places": (banking(**RAY, reset="never", synthesizers=2, max_restarts=0), "synthesis.reset: a generator that goes on cannot be moved"),
    "a generator that goes on elsewhere": (banking(reset="never", max_restarts=3), "synthesis.reset: a generator that goes on cannot be moved", "max_restarts=0"),
    "free pixels in turn with a student": (making(generator="pixels"), "synthesis.mode: free pixels are made a batch at a time", "'bank'"),
    "pixels bounded that are not free": (banking(clip=True), "synthesis.clip: it is of free pixels"),
}  # fmt: skip
CASES = DATA | MODELS | LOSSES | SETTINGS | PEERS | SYNTHESIS


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The files of the scene, made once."""
    folder = tmp_path_factory.mktemp("scene")
    scene.write_data(folder / "data")
    scene.write_weights(folder / "weights")
    scene.write_modules(folder)
    return folder


def plain(text: str) -> str:
    """The text, having seen that it is a message for people."""
    assert "Traceback" not in text
    assert "object at 0x" not in text
    assert len(text) < 700
    return text


def test_the_job_itself_is_right(root):
    assert inspect(scene.job(root)).faults == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_one_clear_fault(name, root):
    settings, begins, *says = CASES[name]
    job = scene.job(root, **settings)
    faults = inspect(job).faults
    assert len(faults) == 1, faults
    fault = plain(faults[0])
    assert fault.startswith(begins), fault
    assert all(word in fault for word in says), fault
    with pytest.raises(JobFaults) as caught:
        run(job)
    assert fault in str(caught.value)
    assert not (root / "runs").exists()


def test_faults_of_every_part_are_told_together(root):
    wrong = {
        "data.eval": "evl.parquet",
        "student.model": "cifar_resnet9",
        "teachers.big.weights": W + "truncated.pt",
        "teachers.big.codec": "fp61",
        "losses.kd.temprature": 2.0,
        "training.lr": "fast",
        "training.scheduler": "cosin",
        "launch.workers": 2,
        "stages": {"pre": Job(losses={"x": Loss("kdd")})},
    }
    begins = [
        "data.eval", "student", "teachers.big.weights", "teachers.big.codec", "losses.kd.temprature", "training.lr",
        "training.scheduler", "launch.workers", "stages.pre.losses.x",
    ]  # fmt: skip
    faults = inspect(scene.job(root, **wrong)).faults
    assert sorted(f.partition(":")[0] for f in faults) == sorted(begins), faults


def test_a_run_refuses_all_of_them_before_anything_starts(root):
    wrong = {
        "data.eval": "evl.parquet",
        "student.model": "cifar_resnet9",
        "teachers.big.codec": "fp61",
        "training.scheduler": "cosin",
        "launch.workers": 2,
    }
    with pytest.raises(JobFaults) as caught:
        run(scene.job(root, **wrong))
    assert str(caught.value).startswith("5 faults in this job; nothing was started.")
    assert not (root / "runs").exists()


def test_a_run_tells_ill_typed_settings_beside_the_others(root):
    with pytest.raises(JobFaults, match="2 faults"):
        run(scene.job(root, **{"training.lr": "fast", "student.model": "cifar_resnet9"}))


def test_what_rests_on_a_wrong_setting_is_not_told(root):
    """A model that is not there has no layers to be wrong about, data that is not there no classes."""
    job = scene.job(root, **{"student": 3, **also("at", "at", layers=("stge2",))})
    assert [f.partition(":")[0] for f in inspect(job).faults] == ["student"]
    job = scene.job(root, **{"data.num_classes": "many"})
    assert [f.partition(":")[0] for f in inspect(job).faults] == ["data.num_classes"]


def test_misspelt_settings(root):
    data = to_dict(scene.job(root))
    data["training"]["lrr"] = 1
    data["teachers"]["big"]["replica"] = 2
    with pytest.raises(JobFaults) as caught:
        from_dict(data)
    assert "training.lrr: no such setting. Did you mean 'lr'" in str(caught.value)
    assert "teachers.big.replica: no such setting. Did you mean 'replicas'" in str(caught.value)


def test_a_model_that_reads_values_is_still_looked_at(root):
    """Its forward cannot run on the meta device; its shapes are found on the CPU, its faults too."""
    (root / "reading.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self, n):\n        super().__init__()\n"
        "        self.linear = nn.Linear(192, n)\n\n    def forward(self, x):\n        x = x if float(x.sum()) > 0 else -x\n"
        "        return self.linear(x.flatten(1))\n\n\ndef net(num_classes):\n    return Net(num_classes)\n"
    )
    assert inspect(scene.job(root, **{"student.model": "reading:net"})).faults == []
    faults = inspect(scene.job(root, **{"student.model": "reading:net", **also("at", "at", layers=("stage1",))})).faults
    assert len(faults) == 1
    assert faults[0].startswith("losses.at: layer 'stage1'")


def test_weights_of_a_stage_that_trains_another_model(root):
    stage = scene.put(scene.job(root), {"teachers": {}, "losses": {}, "student": Student(model="cifar_resnet14")})
    faults = inspect(scene.job(root, **{"stages": {"pre": stage}, BIG + "weights": "stage:pre"})).faults
    assert len(faults) == 1
    assert "teachers.big.weights: expected the model that stage:pre trains, cifar_resnet14, got cifar_resnet8" in faults[0]


def test_a_check_is_quick(root, real_data):
    from tests.spine.small import cifar

    inspect(scene.job(root))
    started = time.monotonic()
    assert inspect(cifar(real_data)).faults == []
    assert time.monotonic() - started < 5


def test_run_folders(root, tmp_path):
    job = scene.job(root, runs=str(tmp_path / "runs"))
    with pytest.raises(ConfigError, match=r"Resume: no run of 'bad'"):
        run(job, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"Run folder .*cannot be made.*Set `runs` or --folder"):
        run(job, folder=tmp_path / "file" / "run")
    run(job, folder=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds a run already\. Resume it with --resume"):
        run(job, folder=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"the job has changed \(training\.lr: was 0\.05, is 0\.1\)"):
        run(job.replace(**{"training.lr": 0.1}), folder=tmp_path / "run", resume=True)


def fails(kind: type[RaykdError], job: Job, folder: Path, *says: str, resume: bool = False) -> str:
    """The message of a run that ends with this error."""
    with pytest.raises(kind) as caught:
        run(job, folder=folder, resume=resume)
    text = plain(str(caught.value))
    assert all(word in text for word in says), text
    return text


def steps(folder: Path) -> int:
    """Steps that were recorded."""
    path = folder / "metrics.jsonl"
    return sum(json.loads(line)["kind"] == "step" for line in path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(
    "settings, kind, says",
    [
        ({BIG + "weights": W + "nan.safetensors"}, SourceError, ("'big'", "signal logits", "NaN or infinite")),
        ({BIG + "weights": W + "large.safetensors", BIG + "codec": "fp16"}, SourceError, ("logits", "fp16's +-65504")),
        ({"data.train": "undecodable.parquet"}, DataError, ("image: ", "(undecodable.parquet, row group 2, row 5)")),
        (
            {"data.train": "sizes.parquet"},
            DataError,
            ("image size: ", "(sizes.parquet, row group 2, row 1)", "Set size=(h, w)"),
        ),
    ],
    ids=["NaN teacher", "fp16 overflow", "undecodable row", "images of two sizes"],
)
def test_the_probe_finds_it_before_the_first_step(settings, kind, says, root, tmp_path):
    fails(kind, scene.job(root, **settings), tmp_path / "run", *says)
    assert steps(tmp_path / "run") == 0


def test_a_bad_row_met_late_leaves_a_checkpoint(root, tmp_path):
    """Without a cache the row is read in its turn; the run goes on from its checkpoint once the row is mended."""
    seed = next(s for s in range(99) if 37 in Order(64, 4, s).global_batch(0, 14))
    late = {"data.train": "undecodable.parquet", "data.cache": "none", "training.batch_size": 4, "training.checkpoint_every": 1}
    job = scene.job(root, **late, seed=seed)
    fails(DataError, job, tmp_path, "(undecodable.parquet, row group 2, row 5)")
    step, _ = checkpoints.committed(tmp_path / "checkpoints")[-1]
    assert 8 <= step <= 14
    assert steps(tmp_path) == step


def test_a_loss_of_the_users_that_raises_on_real_tensors_only(root, tmp_path):
    job = scene.job(root, **also("x", f"{MINE}late_loss"))
    fails(RaykdError, job, tmp_path, "losses.x", "KeyError: 'margin'", "bad_user_code.py:")


def test_a_diverging_loss(root, tmp_path):
    job = scene.job(root, **{"training.lr": 1e38, "training.checkpoint_every": 1, "training.epochs": 2})
    text = fails(DivergenceError, job, tmp_path, "Step ", "not finite", "kd ", "ce ", "checkpoint is intact")
    found = checkpoints.committed(tmp_path / "checkpoints")
    assert f"Step {found[-1][0]}:" in text
    state = checkpoints.load(tmp_path / "checkpoints", found[-1][0], 0, 1)
    assert all(bool(torch.isfinite(v).all()) for v in state["optimizer"]["state"][0].values() if isinstance(v, torch.Tensor))
    assert fails(DivergenceError, job, tmp_path, resume=True) == text
    assert checkpoints.committed(tmp_path / "checkpoints") == found
