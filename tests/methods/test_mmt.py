"""Pseudo labels of MMT: clusters of what all averaged copies remember, alike at every peer."""

import pytest
import torch

from raykd.errors import ConfigError
from raykd.methods.online import mmt

SAMPLES, WIDTHS = 12, (3, 5, 3)
OPTIONS = {"soft_ce_share": 0.5, "soft_triplet_share": 0.8, "label_smoothing": 0.0}
GROUPS = torch.arange(SAMPLES) % 3


def module(own, clusters=None):
    peers = [(width,) for i, width in enumerate(WIDTHS) if i != own]
    return mmt.Module((4,), (WIDTHS[own],), peers, SAMPLES, pseudo_labels=True, clusters=clusters)


def hear(made, own, index, seed=0):
    """One batch of samples whose embeddings lie in three groups; returns the loss."""
    rng = torch.Generator().manual_seed(seed)
    corners = [torch.randn(3, width, generator=rng) * 5 for width in WIDTHS]
    noise = [torch.randn(SAMPLES, width, generator=rng) / 10 for width in WIDTHS]
    found = [corner[GROUPS[index]] + off[index] for corner, off in zip(corners, noise)]
    logits = [torch.randn(SAMPLES, 4, generator=rng)[index] for _ in WIDTHS]
    others = [i for i in range(len(WIDTHS)) if i != own]
    signals = logits[own], found[own], found[own], [logits[i] for i in others], [found[i] for i in others]
    return made(*signals, torch.full((len(index),), 3), index, **OPTIONS)


def test_clusters_are_the_groups_and_alike_at_every_peer():
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))
    peers = [module(own, clusters=3) for own in range(len(WIDTHS))]
    for own, made in enumerate(peers):
        for part in order.split(4):
            hear(made, own, part)
        mmt.on_epoch(made, 1)
    labels = peers[0].pseudo
    assert torch.equal(labels[:, None] == labels, GROUPS[:, None] == GROUPS)
    assert all(torch.equal(made.pseudo, labels) for made in peers)
    columns = [mmt._columns(made.bank, made.widths) for made in peers]
    for made, places in zip(peers, columns):
        assert torch.equal(made.centres[:, places], peers[0].centres[:, columns[0]])


def test_pseudo_labels_stand_for_labels_once_there_are_some():
    made, every = module(0, clusters=3), torch.arange(SAMPLES)
    first = hear(made, 0, every)
    assert not first["ce"].any()
    assert first["triplet"] == 0
    mmt.on_epoch(made, 1)
    then = hear(made, 0, every)
    assert then["ce"].all()
    assert then["triplet"] > 0
    kept = made.pseudo.clone()
    mmt.on_epoch(made, 2)
    assert torch.equal(made.pseudo, kept)  # clusters keep their numbers


def test_too_few_seen_samples_are_not_clustered():
    made = module(0, clusters=3)
    hear(made, 0, torch.tensor([4, 5]))
    mmt.on_epoch(made, 1)
    assert (made.pseudo == -1).all()


def test_a_lost_peer_leaves_the_memory_alone():
    made, every = module(0, clusters=3), torch.arange(SAMPLES)
    logits, own = torch.zeros(SAMPLES, 4), torch.ones(SAMPLES, 3)
    made(logits, own, own, [logits], [torch.ones(SAMPLES, 5)], GROUPS, every, **OPTIONS)
    assert not made.bank.any()


def test_more_clusters_than_classes_are_refused():
    with pytest.raises(ConfigError, match="clusters: expected 1 to 4"):
        module(0, clusters=5)
