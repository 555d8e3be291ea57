"""Every kind of data set gives the pixels that were stored."""

from __future__ import annotations

import hashlib
import io
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import ROOT, SHARED, pixels, png, table
from PIL import Image

from raykd.data.decoding import decode
from raykd.data.packaged import _CIFAR, CifarSource
from raykd.data.sets import DataSet, StoredSet, open_split, probe
from raykd.data.views import noisy_labels, subset
from raykd.errors import DataError


@pytest.mark.parametrize("cache", ["disk", "memory", "none"])
def test_parquet_gives_the_stored_pixels(shards, cache):
    dataset = open_split(shards(23, cache=cache), "train")
    rows = np.array([22, 0, 13, 13, 9, 10])
    assert isinstance(dataset, DataSet)
    assert (len(dataset), dataset.num_classes, dataset.shape) == (23, 5, (3, 8, 8))
    assert np.array_equal(dataset.read(rows), pixels(23)[rows])
    assert dataset.labels.tolist() == [i % 5 for i in range(23)]
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy.read(rows), pixels(23)[rows])
    assert copy.fingerprint == dataset.fingerprint
    assert dataset.where(15) == "train-1.parquet, row group 1, row 1"


def test_disk_cache_is_a_memory_map_made_once(shards, cache_folder, monkeypatch):
    dataset = open_split(shards(20, cache="disk"), "train")
    before = set(cache_folder.glob("*.npy"))
    dataset.read(np.arange(3))
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 20_000
    assert len(set(cache_folder.glob("*.npy")) - before) <= 1
    assert not list(cache_folder.glob("*.tmp"))
    monkeypatch.setattr("raykd.data.sets.decode_all", None)
    assert np.array_equal(pickle.loads(pickled).read(np.arange(20)), pixels(20))


def test_processes_may_build_one_cache_together(shards, tmp_path, monkeypatch):
    spec = shards(40, cache="disk")
    monkeypatch.setenv("RAYKD_CACHE", str(tmp_path / "cache"))
    code = (
        "import numpy as np, types, hashlib\nfrom raykd.data.sets import open_split\n"
        f"d = open_split(types.SimpleNamespace(**{vars(spec)!r}), 'train')\n"
        "print(hashlib.md5(d.read(np.arange(40)).tobytes()).hexdigest())"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].strip() for process in running]
    assert outputs == [hashlib.md5(pixels(40).tobytes()).hexdigest()] * 2
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".lock", ".npy"]


def test_fingerprint_follows_content_and_decoding(shards, tmp_path):
    spec = shards(20)
    first = open_split(spec, "train").fingerprint
    assert open_split(SimpleNamespace(**{**vars(spec), "size": (4, 4)}), "train").fingerprint != first
    pq.write_table(
        table([png(image) for image in pixels(10, seed=5)], [0] * 10), tmp_path / "train-0.parquet", row_group_size=4
    )
    assert open_split(spec, "train").fingerprint != first


@pytest.mark.parametrize("layout", ["file", "stream"])
@pytest.mark.parametrize("cache", ["memory", "none"])
def test_arrow_ipc(tmp_path, layout, cache):
    content = table([png(image) for image in pixels(12)], list(range(12)))
    new = pa.ipc.new_file if layout == "file" else pa.ipc.new_stream
    with new(str(tmp_path / "a.arrow"), content.schema) as writer:
        writer.write_table(content, max_chunksize=5)
    dataset = open_split(SimpleNamespace(kind="parquet", root=str(tmp_path), train="*.arrow", cache=cache), "train")
    assert np.array_equal(dataset.read(np.array([11, 2])), pixels(12)[[11, 2]])
    assert dataset.labels.tolist() == list(range(12))
    assert dataset.where(6) == "a.arrow, row group 1, row 1"


def _binary(images):
    return pa.array([png(image) for image in images], pa.binary())


def _tensor(images):
    return pa.FixedShapeTensorArray.from_numpy_ndarray(images)


def _hwc(images):
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images.transpose(0, 2, 3, 1)))


@pytest.mark.parametrize("make", [_binary, _tensor, _hwc])
def test_image_columns(tmp_path, make):
    pq.write_table(pa.table({"img": make(pixels(6)), "fine": pa.array([0, 1] * 3, pa.int8())}), tmp_path / "x.parquet")
    spec = SimpleNamespace(
        kind="parquet", root=str(tmp_path), train=["x.parquet"], image_column="img", label_column="fine", cache="memory"
    )
    dataset = open_split(spec, "train")
    assert np.array_equal(dataset.read(np.arange(6)), pixels(6))
    assert dataset.num_classes == 2


def test_fixed_size_list_takes_its_shape_from_the_metadata(tmp_path):
    grey = pixels(4, (1, 5, 6))
    column = pa.FixedSizeListArray.from_arrays(pa.array(grey.reshape(-1)), 30)
    schema = pa.schema([pa.field("image", column.type, metadata={"shape": "[5, 6]"}), pa.field("label", pa.int64())])
    pq.write_table(pa.table([column, pa.array([0, 1, 2, 3])], schema=schema), tmp_path / "x.parquet")
    dataset = open_split(SimpleNamespace(kind="parquet", root=str(tmp_path), train="x.parquet", cache="memory"), "train")
    assert np.array_equal(dataset.read(np.arange(4)), grey)


def test_fsspec_uri():
    import fsspec

    system = fsspec.filesystem("memory")
    file = io.BytesIO()
    pq.write_table(table([png(image) for image in pixels(5)], [0, 1, 2, 3, 4]), file)
    system.pipe("/bucket/set/train-0.parquet", file.getvalue())
    spec = SimpleNamespace(kind="parquet", root="memory://bucket/set", train="train-*.parquet", cache="memory")
    dataset = open_split(spec, "train")
    assert np.array_equal(dataset.read(np.arange(5)), pixels(5))
    assert "Did you mean 'train-0.parquet'" in probe(SimpleNamespace(**{**vars(spec), "train": "trian-0.parquet"}), "train")[0]


def test_file_uri_absolute_and_nested_patterns(shards, tmp_path):
    spec, rows = shards(20), np.array([19, 4])
    roots = [
        ("file://" + spec.root, "train-*.parquet"),
        (None, spec.root + "/train-[01].parquet"),
        (spec.root, "**/train-?.parquet"),
    ]
    for root, train in roots:
        found = open_split(SimpleNamespace(**{**vars(spec), "root": root, "train": train}), "train")
        assert np.array_equal(found.read(rows), pixels(20)[rows])
    (tmp_path / "more" / "deep").mkdir(parents=True)
    (tmp_path / "train-1.parquet").rename(tmp_path / "more" / "deep" / "train-1.parquet")
    nested = open_split(SimpleNamespace(**{**vars(spec), "train": "**/train-?.parquet"}), "train")
    assert nested.where(0) == "more/deep/train-1.parquet, row group 0, row 0"
    assert len(open_split(SimpleNamespace(**{**vars(spec), "train": "train-?.parquet"}), "train")) == 10


def test_grey_images_become_rgb_unless_one_channel_is_asked_for():
    grey = pixels(1, (1, 8, 8))[0]
    assert np.array_equal(decode(png(grey)), np.repeat(grey, 3, 0))
    assert np.array_equal(decode(png(grey), channels=1), grey)
    assert decode(png(grey, "JPEG")).shape == (3, 8, 8)
    assert np.array_equal(decode(grey), grey)
    assert decode(grey, channels=3).shape == (3, 8, 8)


def test_sizes():
    image = pixels(1, (3, 12, 20))[0]
    reference = Image.fromarray(image.transpose(1, 2, 0))
    stretched = np.asarray(reference.resize((7, 5), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(decode(png(image), (5, 7)), stretched)
    square = np.asarray(reference.resize((10, 6), Image.Resampling.BILINEAR).crop((2, 0, 8, 6))).transpose(2, 0, 1)
    assert np.array_equal(decode(image, 6), square)


def test_images_of_differing_size_need_a_size(shards):
    def change(contents):
        contents[13] = png(pixels(1, (3, 9, 8))[0])

    with pytest.raises(
        DataError, match=r"expected \(3, 8, 8\).*got \(3, 9, 8\) \(train-1.parquet, row group 0, row 3\).*size="
    ):
        open_split(shards(20, change), "train").read(np.arange(20))
    assert open_split(shards(20, change, size=(4, 6)), "train").read(np.arange(20)).shape == (20, 3, 4, 6)


def test_folder(tmp_path):
    for label, name in enumerate(["cat", "ant", "bee"]):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "train" / name / f"{i}.png").write_bytes(png(pixels(6)[2 * label + i]))
    dataset = open_split(SimpleNamespace(kind="folder", root=str(tmp_path), cache="memory"), "train")
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2, 2]  # ant, bee, cat
    assert np.array_equal(dataset.read(np.arange(6)), pixels(6)[[2, 3, 4, 5, 0, 1]])
    assert dataset.where(4) == "cat/0.png"
    assert "Did you mean 'train'" in probe(SimpleNamespace(kind="folder", root=str(tmp_path), train="trian"), "train")[0]


def test_digits_splits_do_not_overlap():
    spec = SimpleNamespace(kind="digits")
    train, rest = open_split(spec, "train"), open_split(spec, "eval")
    assert (len(train), len(rest), train.num_classes, train.shape) == (1437, 360, 10, (1, 8, 8))
    from sklearn.datasets import load_digits

    both = np.concatenate([train.read(np.arange(1437)), rest.read(np.arange(360))]).reshape(1797, -1)
    stored = np.round(load_digits().data * 255 / 16).astype(np.uint8)
    assert np.array_equal(np.unique(both, axis=0), np.unique(stored, axis=0))
    assert np.bincount(rest.labels).min() > 20


def test_user_factory(monkeypatch):
    def factory(spec, split):
        return open_split(SimpleNamespace(kind="digits"), split)

    monkeypatch.setitem(sys.modules, "my_sets", SimpleNamespace(mine=factory, broken=lambda spec, split: []))
    assert len(open_split(SimpleNamespace(kind="my_sets:mine"), "eval")) == 360
    with pytest.raises(DataError, match="Did you mean 'mine'"):
        open_split(SimpleNamespace(kind="my_sets:mien"), "eval")
    with pytest.raises(DataError, match="without num_classes"):
        open_split(SimpleNamespace(kind="my_sets:broken"), "eval")
    with pytest.raises(DataError, match="importable module"):
        open_split(SimpleNamespace(kind="no_such_sets:mine"), "eval")


def test_views():
    dataset = open_split(SimpleNamespace(kind="digits"), "train")
    first = subset(dataset, limit=50)
    assert np.array_equal(first.read(np.array([3])), dataset.read(np.array([3])))
    balanced = subset(dataset, per_class=4)
    assert np.bincount(balanced.labels).tolist() == [4] * 10
    chosen = subset(dataset, np.array([9, 2]))
    assert chosen.labels.tolist() == dataset.labels[[9, 2]].tolist()
    assert chosen.where(1) == dataset.where(2)
    assert len({dataset.fingerprint, first.fingerprint, balanced.fingerprint, chosen.fingerprint}) == 4
    with pytest.raises(DataError, match="positions"):
        subset(dataset, limit=5000)
    with pytest.raises(DataError, match="per_class"):
        subset(dataset, per_class=1000)


def test_noisy_labels_know_nothing():
    dataset = open_split(SimpleNamespace(kind="digits"), "train")
    noisy = noisy_labels(dataset, 1)
    assert 0.05 < (noisy.labels == dataset.labels).mean() < 0.15
    assert np.bincount(noisy.labels, minlength=10).min() > 100
    assert np.array_equal(noisy.labels, noisy_labels(dataset, 1).labels)
    assert np.array_equal(noisy.read(np.arange(5)), dataset.read(np.arange(5)))
    assert noisy.fingerprint != dataset.fingerprint


def _write_bins(folder, n_files, records, label_bytes, names):
    folder.mkdir()
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (n_files, records, label_bytes + 3072), dtype=np.uint8)
    data[:, :, :label_bytes] %= 10
    for name, part in zip(names, data):
        (folder / name).write_bytes(part.tobytes())
    return data.reshape(-1, label_bytes + 3072)


def test_cifar100_binary_takes_the_fine_label(tmp_path):
    data = _write_bins(tmp_path / "cifar-100-binary", 1, 10000, 2, ["test.bin"])
    dataset = StoredSet(CifarSource("CIFAR100", str(tmp_path), "test"), num_classes=100, cache="none")
    assert np.array_equal(dataset.labels, data[:, 1])
    assert np.array_equal(dataset.read(np.array([9999])), data[9999:, 2:].reshape(1, 3, 32, 32))


def test_cifar10_binary_is_hash_checked(tmp_path):
    _write_bins(tmp_path / "cifar-10-batches-bin", 5, 10000, 1, list(_CIFAR["CIFAR10"].files["train"]))
    spec = SimpleNamespace(kind="torchvision:CIFAR10", root=str(tmp_path))
    with pytest.raises(DataError, match=r"expected MD5 5dd7e06a.*data_batch_1.bin"):
        open_split(spec, "train").labels
    (tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin").unlink()
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"not an archive")
    with pytest.raises(DataError, match="expected MD5 c32a1d4a"):
        open_split(spec, "train").labels


def test_cifar10_binary_equals_the_parquet_copy(tmp_path, cifar10):
    parquet = open_split(cifar10, "train")
    images, labels = parquet.read(np.arange(50000)), parquet.labels
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for i in range(5):
        part = slice(10000 * i, 10000 * (i + 1))
        records = np.concatenate([labels[part, None].astype(np.uint8), images[part].reshape(10000, -1)], 1)
        (folder / f"data_batch_{i + 1}.bin").write_bytes(records.tobytes())
    binary = open_split(SimpleNamespace(kind="torchvision:CIFAR10", root=str(tmp_path), cache="none", num_classes=10), "train")
    rows = np.array([0, 10000, 49999, 23456])
    assert np.array_equal(binary.read(rows), images[rows])
    assert np.array_equal(binary.labels, labels)
    assert binary.where(10001) == "data_batch_2.bin, record 1"


def test_torchvision_mnist_reads_idx_files(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    grey = pixels(7, (1, 28, 28))
    for name in ("train", "t10k"):
        head = b"".join(v.to_bytes(4, "big") for v in (0x803, 7, 28, 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + grey.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes((0x801).to_bytes(4, "big") + (7).to_bytes(4, "big") + bytes(range(7)))
    dataset = open_split(SimpleNamespace(kind="torchvision:MNIST", root=str(tmp_path), cache="memory"), "train")
    assert np.array_equal(dataset.read(np.arange(7)), grey)
    assert dataset.labels.tolist() == list(range(7))


def test_torchvision_refuses_what_unpickles_or_is_missing(tmp_path):
    faults = probe(SimpleNamespace(kind="torchvision:ImageNet", root=str(tmp_path)), "train")
    assert "without unpickling, got 'ImageNet'" in faults[0]
    assert "cifar-10-binary.tar.gz" in probe(SimpleNamespace(kind="torchvision:CIFAR10", root=str(tmp_path)), "train")[0]
    assert "Set download=True" in probe(SimpleNamespace(kind="torchvision:MNIST", root=str(tmp_path)), "train")[0]


def test_real_cifar10_statistics(cifar10):
    dataset = open_split(cifar10, "train")
    assert np.bincount(dataset.labels).tolist() == [5000] * 10
    images = dataset.read(np.arange(0, 50000, 5)) / 255.0
    assert images.mean((0, 2, 3)) == pytest.approx([0.4914, 0.4822, 0.4465], abs=4e-3)
    assert images.std((0, 2, 3)) == pytest.approx([0.2470, 0.2435, 0.2616], abs=3e-3)
    evaluation = open_split(cifar10, "eval")
    assert evaluation.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]


def test_real_mnist_has_one_channel_when_asked():
    if not (SHARED / "mnist").is_dir():
        pytest.skip("needs the real MNIST at ../shared/data/mnist")
    spec = SimpleNamespace(kind="parquet", root=str(SHARED / "mnist"), train="test.parquet", in_channels=1, cache="none")
    dataset = open_split(spec, "train")
    assert dataset.shape == (1, 28, 28)
    assert dataset.read(np.arange(500)).mean() / 255 == pytest.approx(0.1307, abs=0.02)
