"""CIFAR-10: networks that start from nothing teach each other.

    raykd run jobs/cifar10_dml.py --set data.root=path/to/cifar10                    # three peers, mutual learning
    raykd run jobs/cifar10_dml.py:short --set data.root=path/to/cifar10              # two peers, minutes on two cores
    raykd run jobs/cifar10_dml.py:codistillation --set data.root=path/to/cifar10     # copies of weights, parts of the data
    raykd run jobs/cifar10_dml.py:compare --set data.root=path/to/cifar10 --seeds 3  # together against alone

Each peer is an actor of its own and reserves a core; on fewer cores let them share one (`--set peers.wrn.actor=home`, of each),
or take `--set launch.backend=local`: the result is the same. What the settings mean: docs/online.md.
"""

from raykd import Augmentation, Data, Job, Loss, Training
from raykd.config import Exchange, Peer


def job(root: str = "data/cifar10") -> Job:
    """The full setting: 300 epochs on shards 0-3, measured on shard 4; the test images are touched once."""
    return Job(
        name="cifar10-dml",
        data=Data(
            kind="parquet",
            root=root,
            train="train-0000[0-3]-of-00005.parquet",
            eval="train-00004-of-00005.parquet",
            test="test_first1000.parquet",
            normalise="cifar10",
            augmentation=Augmentation(crop=4, flip=True),
        ),
        peers={
            "resnet20": Peer(model="crd_resnet20"),
            "resnet32": Peer(model="crd_resnet32"),
            "wrn": Peer(model="wrn_16_2", training={"lr": 0.05}),
        },
        exchange=Exchange(graph="all", on_loss="respawn"),
        losses={"dml": Loss("dml")},
        training=Training(recipe="online"),
    )


def short(root: str = "data/cifar10") -> Job:
    """Two peers, two passes over 3,200 images, each peer alone too."""
    whole = job(root)
    return whole.replace(
        **{
            "name": "cifar10-dml-short",
            "peers": {"resnet8": Peer(model="crd_resnet8"), "resnet20": Peer(model="crd_resnet20")},
            "baseline": True,
            "data.limit": 3200,
            "data.eval_limit": 1000,
            "training.epochs": 2,
            "training.scheduler": "cosine",
        }
    )


def codistillation(root: str = "data/cifar10") -> Job:
    """Anil et al. 2018: two of a kind learn from halves of the data, each from a copy of the other, renewed every 50 steps.

    A copy is 50 to 99 steps old: nobody waits for weights that are still being learnt. The loss begins with the third epoch.
    """
    return short(root).replace(
        **{
            "name": "cifar10-codistillation",
            "peers": {"one": Peer(model="crd_resnet20"), "two": Peer(model="crd_resnet20")},
            "exchange": Exchange(what="weights", every=50, staleness=50, shards="disjoint"),
            "losses": {"codistillation": Loss("codistillation", schedule="start(2)")},
            "data.limit": 12800,
            "training.epochs": 6,
            "training.batch_size": 64,
        }
    )


def compare(root: str = "data/cifar10") -> Job:
    """Two peers by dml against each alone at the same budget: 5 epochs of 4,000 images; measured on the test images."""
    return job(root).replace(
        **{
            "name": "cifar10-dml-compare",
            "peers": {"resnet8": Peer(model="crd_resnet8"), "resnet14": Peer(model="crd_resnet14")},
            "exchange.on_loss": "stop",
            "baseline": True,
            "data.train": "train-00000-of-00005.parquet",
            "data.eval": "train-00004-of-00005.parquet",
            "data.limit": 4000,
            "data.eval_limit": 1000,
            "training.epochs": 5,
            "training.batch_size": 64,
            "training.scheduler": "cosine",
            "training.eval_every": 2,
        }
    )
