"""Each way in which data can be wrong gives a DataError that names the place and, for static faults, all at once."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import pixels, png, table

from raykd.data.sets import open_split, probe
from raykd.errors import DataError


def test_whole_set_has_no_faults(shards):
    assert probe(shards(), "train") == []


def test_missing_root_names_near_ones(shards, tmp_path):
    spec = shards()
    spec.root += "x"
    assert probe(spec, "train")[0].startswith(f"data.root: expected a directory, got '{tmp_path}x'")
    assert f"Did you mean '{tmp_path.name}'" in probe(spec, "train")[0]


def test_pattern_that_matches_nothing(shards):
    spec = shards()
    spec.train = ["train-0.parquet", "trian-1.parquet", "other*"]
    faults = probe(spec, "train")
    assert len(faults) == 2
    assert "'trian-1.parquet' to name at least one file, got none" in faults[0]
    assert "Did you mean 'train-1.parquet'" in faults[0]


def test_split_that_is_not_set(shards):
    assert "data.test: expected a value" in probe(shards(), "test")[0]
    assert "expected one of train, eval, test, got 'tests'" in probe(shards(), "tests")[0]


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_truncated_file_is_named(shards, tmp_path, keep):
    spec = shards()
    path = tmp_path / "train-1.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    faults = probe(spec, "train")
    assert len(faults) == 1
    assert "corrupt or truncated (train-1.parquet)" in faults[0]


def test_corrupt_arrow_file_is_named(tmp_path):
    (tmp_path / "a.arrow").write_bytes(b"ARROW1 and then nothing of the kind")
    spec = SimpleNamespace(kind="parquet", root=str(tmp_path), train="a.arrow")
    assert "corrupt or truncated (a.arrow)" in probe(spec, "train")[0]


def test_missing_columns_name_near_ones(shards):
    faults = probe(shards(image_column="imag", label_column="lable"), "train")
    assert len(faults) == 4  # two columns in two files
    assert "image_column: expected a column of the file, got 'imag' (train-0.parquet). Did you mean 'image'" in faults[0]
    assert "Did you mean 'label'" in faults[1]


def test_column_without_images(shards):
    assert "image_column: expected struct<bytes, path>" in probe(shards(image_column="label"), "train")[0]


def test_labels_must_be_integers(tmp_path):
    whole = table([png(image) for image in pixels(4)], [0, 1, 2, 3])
    pq.write_table(whole.set_column(1, "label", pa.array([0.0, 1.0, 2.0, 3.0])), tmp_path / "x.parquet")
    spec = SimpleNamespace(kind="parquet", root=str(tmp_path), train="x.parquet")
    assert "label_column: expected integers, got double in 'label' (x.parquet)" in probe(spec, "train")[0]


def test_labels_out_of_range_are_found_in_the_footer(shards):
    faults = probe(shards(num_classes=4), "train")
    assert "labels: expected 0..3, got 0..4 in 'label' (train-0.parquet)" in faults[0]


def test_labels_out_of_range_without_statistics(tmp_path):
    part = table([png(image) for image in pixels(6)], [0, 1, 2, 7, 4, -1])
    pq.write_table(part, tmp_path / "x.parquet", row_group_size=2, write_statistics=False)
    spec = SimpleNamespace(kind="parquet", root=str(tmp_path), train="x.parquet", num_classes=5)
    assert "expected 0..4, got 7 (x.parquet, row group 1, row 1; 2 in all)" in probe(spec, "train")[0]
    with pytest.raises(DataError, match=r"expected 0..4, got 7 \(x.parquet, row group 1, row 1; 2 in all\)"):
        open_split(spec, "train").labels


def test_null_labels(tmp_path):
    part = table([png(image) for image in pixels(3)], [0, 1, 2]).set_column(1, "label", pa.array([0, None, 2]))
    pq.write_table(part, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="1 nulls"):
        open_split(SimpleNamespace(kind="parquet", root=str(tmp_path), train="x.parquet"), "train").labels


@pytest.mark.parametrize("cache", ["disk", "memory", "none"])
@pytest.mark.parametrize("bad", [b"", b"not an image", None], ids=["empty", "text", "cut"])
def test_bad_image_is_named_with_its_row_group(shards, cache_folder, cache, bad):
    def change(contents):
        contents[16] = contents[16][:60] if bad is None else bad

    dataset = open_split(shards(20, change, cache=cache), "train")
    with pytest.raises(DataError, match=r"image: expected PNG.*\(train-1.parquet, row group 1, row 2\)"):
        dataset.read(np.array([16]))
    assert not list(cache_folder.glob("*.tmp"))


def test_damaged_page_is_named_with_its_row_group(shards, tmp_path):
    spec = shards(20)
    path = tmp_path / "train-1.parquet"
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + group.total_compressed_size] = b"\xff" * group.total_compressed_size
    path.write_bytes(bytes(content))
    assert probe(spec, "train") == []
    with pytest.raises(DataError, match=r"\(train-1.parquet, row group 1\)"):
        open_split(spec, "train").read(np.arange(20))


def test_sample_index_out_of_range(shards):
    with pytest.raises(DataError, match=r"expected 0..19, got -1..3"):
        open_split(shards(), "train").read(np.array([3, -1]))


def test_cache_without_room(shards, monkeypatch):
    monkeypatch.setenv("RAYKD_CACHE_BYTES", "100")
    with pytest.raises(DataError, match=r"decoded cache: expected .* of room"):
        open_split(shards(30, cache="disk", size=(9, 9)), "train").read(np.arange(3))


def test_unknown_kind_and_cache(shards):
    assert "Did you mean 'parquet'" in probe(SimpleNamespace(kind="parqet"), "train")[0]
    assert "cache: expected one of disk, memory, none, got 'disc'" in probe(shards(cache="disc"), "train")[0]
    assert "in_channels: expected 1 or 3, got 2" in probe(shards(in_channels=2), "train")[0]


def test_sixteen_bits_are_refused():
    import io

    from PIL import Image

    from raykd.data.decoding import decode

    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(file, "PNG")
    with pytest.raises(DataError, match="8 bits a channel"):
        decode(file.getvalue())
