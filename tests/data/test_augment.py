"""Augmentation against plain per-sample references; the same view in any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_samples import pixels
from PIL import Image, ImageEnhance, ImageOps

from raykd.config import Augmentation
from raykd.data.augment import Keys, augment, crop_boxes
from raykd.data.randaugment import OPERATIONS

ALL = Augmentation(crop=4, flip=True, randaugment=(2, 9), erase=0.5)


def keys(rows, epoch=3, view=0):
    rows = np.asarray(rows, np.int64)
    return Keys(11, np.full(len(rows), epoch, np.int64), rows, view)


@pytest.mark.parametrize("pad_mode, numpy_mode", [("zero", "constant"), ("reflect", "reflect")])
def test_crop_and_flip_are_slices_of_the_padded_image(pad_mode, numpy_mode):
    images, of = pixels(64, (3, 12, 10)), keys(range(64))
    offsets = np.floor(of.uniform(2, "crop") * 7).astype(int)
    mirrored = of.uniform(1, "flip")[:, 0] < 0.5
    expected = np.empty_like(images)
    for i, image in enumerate(images):
        padded = np.pad(image, ((0, 0), (3, 3), (3, 3)), mode=numpy_mode)
        y, x = offsets[i]
        part = padded[:, y : y + 12, x : x + 10]
        expected[i] = part[:, :, ::-1] if mirrored[i] else part
    spec = Augmentation(crop=3, pad_mode=pad_mode, flip=True)
    assert np.array_equal(augment(images.copy(), of, spec), expected)
    assert 20 < mirrored.sum() < 44


def test_crop_offsets_cover_their_range_evenly():
    offsets = np.floor(keys(range(9000)).uniform(2, "crop") * 9).astype(int)
    counts = np.stack([np.bincount(column, minlength=9) for column in offsets.T])
    assert counts.shape == (2, 9)
    assert counts.min() > 850
    assert counts.max() < 1150


@pytest.mark.parametrize("spec", [ALL, Augmentation(resized_crop=9, flip=True), Augmentation(randaugment=(3, 30))])
def test_a_view_does_not_depend_on_its_batch(spec):
    images = pixels(40, (3, 16, 16))
    whole = augment(images.copy(), keys(range(40)), spec)
    order = np.random.default_rng(0).permutation(40)
    assert np.array_equal(augment(images[order].copy(), keys(order), spec), whole[order])
    alone = [augment(images[i : i + 1].copy(), keys([i]), spec)[0] for i in range(40)]
    assert np.array_equal(np.stack(alone), whole)


@pytest.mark.parametrize("spec", [ALL, Augmentation(resized_crop=16), Augmentation(erase=1.0)])
def test_epochs_and_views_differ(spec):
    images = pixels(8, (3, 16, 16))
    first = augment(images.copy(), keys(range(8)), spec)
    for other in (keys(range(8), epoch=4), keys(range(8), view=1)):
        assert not np.array_equal(augment(images.copy(), other, spec), first)


def test_epochs_may_differ_within_a_batch():
    images = pixels(2, (3, 16, 16))
    of = Keys(11, np.array([3, 4]), np.array([0, 1]))
    both = augment(images.copy(), of, ALL)
    assert np.array_equal(both[:1], augment(images[:1].copy(), keys([0], 3), ALL))
    assert np.array_equal(both[1:], augment(images[1:].copy(), keys([1], 4), ALL))


def test_resized_crop_boxes():
    boxes = crop_boxes(keys(range(4000)), (40, 60), (0.08, 1.0), (3 / 4, 4 / 3))
    top, left, height, width = boxes.T
    assert (boxes >= 0).all()
    assert ((top + height <= 40) & (left + width <= 60)).all()
    area, ratio = height * width / 2400, width / height
    assert 0.07 < area.min() < 0.1
    assert 0.7 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.45


def test_resized_crop_falls_back_to_the_centre():
    boxes = crop_boxes(keys(range(5)), (10, 100), (1.0, 1.0), (3 / 4, 4 / 3))
    assert boxes.tolist() == [[0, 43, 10, 13]] * 5


def test_resized_crop_resizes_the_part():
    images, of = pixels(6, (3, 24, 24)), keys(range(6))
    out = augment(images, of, Augmentation(resized_crop=12))
    for i, (top, left, height, width) in enumerate(crop_boxes(of, (24, 24), (0.08, 1.0), (3 / 4, 4 / 3)).tolist()):
        part = Image.fromarray(images[i, :, top : top + height, left : left + width].transpose(1, 2, 0))
        expected = np.asarray(part.resize((12, 12), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        assert np.abs(out[i].astype(int) - expected).max() <= 1


def test_erase_fills_one_rectangle_with_one_colour():
    images = np.zeros((2000, 3, 20, 20), np.uint8)
    out = augment(images, keys(range(2000)), Augmentation(erase=0.25))
    touched = out.any((1, 2, 3))
    assert 0.2 < touched.mean() < 0.3
    shares = []
    for image in out[touched][:50]:
        inside = image.any(0)
        ys, xs = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        assert inside[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1].all()
        assert len(np.unique(image[:, inside], axis=1).T) == 1
        shares.append(inside.mean())
    assert min(shares) > 0.01
    assert max(shares) < 0.37


def _shift(image, x, y):
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, -x, 0, 1, -y))


def _shear(image, x, y):
    return image.transform(image.size, Image.Transform.AFFINE, (1, x, 0, y, 1, 0))


PIL_REFERENCES = {
    "identity": lambda image, s: image,
    "shear-x": lambda image, s: _shear(image, s, 0),
    "shear-y": lambda image, s: _shear(image, 0, s),
    "translate-x": lambda image, s: _shift(image, int(s), 0),
    "translate-y": lambda image, s: _shift(image, 0, int(s)),
    "rotate": lambda image, s: image.rotate(s),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(1 + s),
    "color": lambda image, s: ImageEnhance.Color(image).enhance(1 + s),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(1 + s),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + s),
    "posterize": lambda image, s: ImageOps.posterize(image, int(s)),
    "solarize": lambda image, s: ImageOps.solarize(image, s),
    "autocontrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
}


def _smooth_image():
    ys, xs = np.mgrid[0:32, 0:32]
    return np.stack([40 + 5 * xs, 30 + 4 * ys, 60 + 2 * xs + 3 * ys]).astype(np.uint8)


@pytest.mark.parametrize("operation", OPERATIONS, ids=[operation.name for operation in OPERATIONS])
@pytest.mark.parametrize("sign", [1, -1])
def test_operations_are_the_papers(operation, sign):
    image = _smooth_image()
    strength = operation.strength(9 / 30, 32) * (sign if operation.signed else 1)
    out = operation.apply(torch.from_numpy(image)[None], strength)[0].numpy().astype(int)
    reference = PIL_REFERENCES[operation.name](Image.fromarray(image.transpose(1, 2, 0)), strength)
    far = np.abs(out - np.asarray(reference).transpose(2, 0, 1)) > 6  # a nearest neighbour may fall one pixel aside
    assert far.mean() < 0.02


def test_randaugment_draws_every_operation_and_sign_equally(monkeypatch):
    from raykd.data import randaugment as module

    seen = []

    def counting(operation):
        def apply(images, strength):
            seen.extend([(operation.name, strength < 0)] * len(images))
            return images

        return operation._replace(apply=apply)

    monkeypatch.setattr(module, "OPERATIONS", tuple(counting(operation) for operation in OPERATIONS))
    module.randaugment(pixels(2800, (3, 2, 2)), keys(range(2800)).uniform(2, "randaugment"), 9)
    names = [name for name, _ in seen]
    counts = {operation.name: names.count(operation.name) for operation in OPERATIONS}
    assert min(counts.values()) > 150
    assert max(counts.values()) < 250
    assert 0.4 < sum(negative for name, negative in seen if name == "rotate") / counts["rotate"] < 0.6


@pytest.mark.parametrize("channels", [1, 3])
def test_all_operations_take_grey_images(channels):
    out = augment(pixels(60, (channels, 8, 8)), keys(range(60)), Augmentation(randaugment=(3, 15)))
    assert out.shape == (60, channels, 8, 8)
    assert out.dtype == np.uint8
