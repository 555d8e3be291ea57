"""Records of activations: what they keep, against NumPy on all activations at once; files that are none."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from raykd.errors import ConfigError, DataError, SignalError
from raykd.parts.records import Records, load, pooled

RNG = np.random.default_rng(0)
MAPS, VECTORS = torch.from_numpy(RNG.normal(3.0, 2.0, (40, 2, 3, 4))), torch.from_numpy(RNG.normal(size=(40, 3)))
LABELS = torch.arange(40) % 3
ROWS = np.concatenate([MAPS.numpy().mean((2, 3)), VECTORS.numpy()], 1)


def kept(path, num_classes=None, rows=40):
    """Records of the first rows, in batches of unlike size."""
    found = Records(num_classes)
    for start, end in ((0, 1), (1, 2), (2, 17), (17, rows)):
        found.add([MAPS[start:end], VECTORS[start:end].float().double()], LABELS[start:end])
    found.save(path)
    return load(str(path), "test")


def test_of_all_images(tmp_path):
    mean, covariance = kept(tmp_path / "records.safetensors")
    np.testing.assert_allclose(mean, ROWS.mean(0), atol=1e-6)
    np.testing.assert_allclose(covariance, np.cov(ROWS.T), atol=1e-6)


def test_of_each_class(tmp_path):
    mean, covariance = kept(tmp_path / "records.safetensors", 3)
    assert mean.shape == (3, 5)
    assert covariance.shape == (3, 5, 5)
    for label in range(3):
        own = ROWS[LABELS.numpy() == label]
        np.testing.assert_allclose(mean[label], own.mean(0), atol=1e-6)
        np.testing.assert_allclose(covariance[label], np.cov(own.T), atol=1e-6)


def test_far_from_zero_nothing_is_lost(tmp_path):
    record = Records()
    for part in (VECTORS[:13], VECTORS[13:]):
        record.add([part + 1e7])
    record.save(tmp_path / "records.safetensors")
    np.testing.assert_allclose(load(str(tmp_path / "records.safetensors"), "test")[1], np.cov(VECTORS.numpy().T), rtol=1e-6)


def test_what_cannot_be_recorded(tmp_path):
    record = Records(3)
    with pytest.raises(DataError, match="labels below 3, got none"):
        record.add([VECTORS])
    with pytest.raises(DataError, match="got 40 from 0 to 3"):
        record.add([VECTORS], torch.arange(40) % 4)
    with pytest.raises(DataError, match="40 labels below 3, got 39"):
        record.add([VECTORS], LABELS[1:])
    record.add([VECTORS], LABELS * 0)
    with pytest.raises(SignalError, match="expected 3 activations as before, got 2"):
        record.add([MAPS], LABELS)
    with pytest.raises(DataError, match="two images of class 1, got 0"):
        record.save(tmp_path / "records.safetensors")
    with pytest.raises(DataError, match="at least two images, got 0"):
        Records().save(tmp_path / "records.safetensors")
    with pytest.raises(SignalError, match=r"\[b d\] or \[b d h w\], got \[40, 2, 3\]"):
        pooled([MAPS[..., 0]])


def test_files_that_are_no_records(tmp_path):
    bad = tmp_path / "bad.safetensors"
    for path in ("", "records.safetensors"):
        with pytest.raises(ConfigError, match=r"absolute path .*\(df-lopes\)"):
            load(path, "df-lopes")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(str(bad), "df-lopes")
    bad.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(str(bad), "df-lopes")
    save_file({"mean": np.zeros(3)}, str(bad))
    with pytest.raises(ConfigError, match="covariance"):
        load(str(bad), "df-lopes")
    save_file({"mean": np.zeros(3), "covariance": np.zeros((2, 2))}, str(bad))
    with pytest.raises(ConfigError, match=r"got \[3\] and \[2, 2\]"):
        load(str(bad), "df-lopes")
