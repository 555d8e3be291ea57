"""A store gives back what was put in, bit for bit as the codec decodes it, and names what is not whole."""

import dataclasses
import json
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from raykd.errors import ConfigError, SourceError
from raykd.exchange import store, store_files
from raykd.exchange.codec import decode, encode, parse
from raykd.exchange.sources import Done, Stats
from raykd.exchange.store import Header, KeptTeacher, Place
from raykd.exchange.stored import StoreSource, derive, export, keepable, kept_for
from raykd.parts.derived import derived_signals
from raykd.signals import Signal

SAMPLES, ROWS, BATCH, EPOCHS = 50, 16, 8, 2
LOGITS, FEATURE, POOLED = Signal("logits"), Signal("feature", "stage2"), Signal("embedding")
GRAM, SIMILARITY = Signal("gram", "stage2"), Signal("similarity")
MAP = Signal("attention", "stage2", (("power", 2.0),))
SIGNALS = (LOGITS, FEATURE, POOLED)
CODECS = ("dense", "fp16", "int8", "topk:3")


def views(epoch: int, rows) -> dict[str, torch.Tensor]:
    """What a teacher says of the samples `rows` in an epoch: a function of both."""
    found = {}
    for place, (signal, shape) in enumerate({LOGITS: (7,), FEATURE: (4, 3, 3), POOLED: (5,)}.items()):
        drawn = np.random.default_rng((place, epoch)).normal(size=(SAMPLES, *shape)).astype(np.float32)
        found[signal.key] = torch.from_numpy(drawn[np.asarray(rows)])
    return found


def make(folder, codec="dense", varies=True, epochs=EPOCHS) -> Header:
    chosen = parse(codec, temperature=4.0)
    kept = store.layout(SIGNALS, encode(views(0, range(BATCH)), chosen).signals)
    teacher = KeptTeacher({"model": "tiny", "weights": "0" * 64}, codec, 4.0, kept)
    header = Header(3, {"flip": True}, varies, epochs, "f" * 32, SAMPLES, ROWS, BATCH, {"big": teacher})
    for place in header.places():
        write(folder, header, place, chosen)
    store.write_header(folder, header)
    return header


def write(folder, header, place, codec, spoil=lambda found: found):
    first, stop = header.span(place.shard)
    batches = [np.arange(start, start + BATCH) % SAMPLES for start in range(first, stop, BATCH)]
    return store_files.write_shard(folder, header, place, (encode(spoil(views(place.epoch, rows)), codec) for rows in batches))


def fields(rows, epochs):
    seeds = np.broadcast_to(np.asarray(epochs, np.int32), (len(rows),)).copy()
    return {"sample_index": torch.tensor(rows, dtype=torch.int64), "augmentation_seed": torch.from_numpy(seeds)}


def flip_byte(path, at=-200):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("codec", CODECS)
def test_rows_come_back_as_the_codec_decodes_them(codec, tmp_path):
    make(tmp_path, codec)
    source = StoreSource(tmp_path, "big", SIGNALS)
    rows, epochs = np.array([49, 0, 17, 33, 16, 15, 48, 5]), np.array([1, 0, 0, 1, 1, 0, 0, 1])
    found = source.request(fields(rows, epochs)).result()["big"]
    live = {e: decode(encode(views(e, rows), parse(codec, 4.0)).signals) for e in (0, 1)}
    for signal in SIGNALS:
        wanted = torch.stack([live[e][signal.key][i] for i, e in enumerate(epochs)])
        assert torch.equal(found[signal.key], wanted), signal.key
        assert found[signal.key].is_contiguous()
    assert source.stats.requests == 1
    assert source.stats.bytes_in == len(rows) * source.header.teachers["big"].row_bytes


def test_lossy_codecs_stay_within_their_bounds(tmp_path):
    rows = np.arange(SAMPLES)
    for codec in ("fp16", "int8"):
        make(tmp_path / codec, codec)
        found = StoreSource(tmp_path / codec, "big", SIGNALS).request(fields(rows, 0)).result()["big"]
        for key, exact in views(0, rows).items():
            peak = exact.flatten(1).abs().amax(1).reshape(-1, *[1] * (exact.ndim - 1))
            bound = exact.abs() * 2**-11 + 2**-24 if codec == "fp16" else peak / 127 / 2 * 1.0001
            assert ((found[key] - exact).abs() <= bound).all(), (codec, key)
            assert not torch.equal(found[key], exact)


def test_a_shard_is_read_without_a_copy(tmp_path):
    header = make(tmp_path)
    kept = header.teachers["big"].signals[1]
    column = store_files.open_shard(tmp_path, header, Place("big", 1, 0), kept)["dense"]
    assert column.shape == (ROWS, 4, 3, 3)
    assert not column.flags.writeable
    assert not column.flags.owndata


def test_what_couples_the_batch_is_derived_when_it_is_read(tmp_path):
    make(tmp_path)
    rows = np.array([3, 40, 21])
    found = StoreSource(tmp_path, "big", (GRAM, SIMILARITY, MAP)).request(fields(rows, 1)).result()["big"]
    exact, functions = views(1, rows), derived_signals()
    assert torch.equal(found[GRAM.key], functions["gram"](exact[FEATURE.key]))
    assert torch.equal(found[SIMILARITY.key], functions["similarity"](exact[POOLED.key]))
    assert torch.equal(found[MAP.key], functions["attention"](exact[FEATURE.key], power=2.0))


def test_what_is_kept_for_a_signal():
    assert keepable(GRAM) == FEATURE
    assert keepable(SIMILARITY) == POOLED
    assert keepable(MAP) == MAP
    assert kept_for(MAP, [FEATURE, MAP]) == MAP
    assert kept_for(MAP, [FEATURE]) == FEATURE
    assert kept_for(FEATURE, [MAP, Signal("feature", "stage3")]) is None
    assert derive(LOGITS, LOGITS, "as it is") == "as it is"


def test_the_bytes_are_known_beforehand(tmp_path):
    for codec in CODECS:
        header = make(tmp_path / codec, codec)
        written = sum(p.stat().st_size for p in (tmp_path / codec).rglob("*.arrow"))
        assert store_files.total_bytes(header) == written


def test_a_header_is_read_as_it_was_written(tmp_path):
    header = make(tmp_path)
    signals = (dataclasses.replace(header.teachers["big"].signals[0], signal=MAP),)
    teacher = dataclasses.replace(header.teachers["big"], signals=signals, errors={"int8_scale": 0.25})
    header = dataclasses.replace(header, teachers={"big": teacher})
    store.write_header(tmp_path, header)
    assert store.read_header(tmp_path) == header


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda p: p.write_text("{"), "cannot be read"),
        (lambda p: p.write_text(json.dumps({"format": "raykd store", "version": 99})), "version 1, got raykd store 99"),
        (lambda p: p.unlink(), "no header.json in it"),
    ],
)
def test_a_header_that_is_none(spoil, told, tmp_path):
    make(tmp_path)
    spoil(tmp_path / store.HEADER)
    with pytest.raises(ConfigError, match=told):
        store.read_header(tmp_path)


SPOILS = {
    "damaged": (lambda arrow, marker: flip_byte(arrow), r"logits/epoch-000/shard-00001.arrow: expected sha256 .* damaged"),
    "truncated": (
        lambda arrow, marker: arrow.write_bytes(arrow.read_bytes()[:-7]),
        r"shard-00001.arrow: expected \d+ bytes, got",
    ),
    "gone": (lambda arrow, marker: arrow.unlink(), r"shard-00001.arrow: expected \d+ bytes, got none"),
    "unfinished": (lambda arrow, marker: marker.unlink(), r"done/epoch-000/shard-00001.json: expected a marker, got none"),
    "no marker": (lambda arrow, marker: marker.write_text("{"), r"done/epoch-000/shard-00001.json: expected a marker"),
}


@pytest.mark.parametrize("name", SPOILS)
def test_what_is_not_whole_is_named_with_its_rows(name, tmp_path):
    spoil, told = SPOILS[name]
    header = make(tmp_path)
    place = Place("big", 0, 1)
    spoil(store_files.shard_file(tmp_path, place, header.teachers["big"].signals[0]), store_files.marker_file(tmp_path, place))
    source = StoreSource(tmp_path, "big", (LOGITS,))
    whole = source.request(fields(np.array([0, 40, 31]), 1)).result()["big"]
    assert torch.equal(whole["logits"], views(1, [0, 40, 31])["logits"])
    with pytest.raises(SourceError, match=told) as error:
        source.request(fields(np.array([0, 17, 40, 31]), 0))
    assert "2 of the 4 rows" in str(error.value)
    assert "sample_index 17 (epoch 0), 31 (epoch 0)" in str(error.value)
    assert "teachers.big.fill" in str(error.value)
    others = [p for p in header.places() if p != place]
    assert all(store_files.fault(tmp_path, header, p) is None for p in others)


class Live:
    """A live teacher that counts its requests."""

    window, drop = 3, False

    def __init__(self):
        self.stats, self.closed = Stats(), False

    def request(self, asked):
        self.stats.requests += 1
        return Done({"big": views(int(asked["augmentation_seed"][0]), asked["sample_index"].numpy())})

    def close(self):
        self.closed = True


def test_a_live_teacher_answers_for_missing_rows(tmp_path):
    header = make(tmp_path)
    store_files.marker_file(tmp_path, Place("big", 0, 1)).unlink()
    live = Live()
    source = StoreSource(tmp_path, "big", (LOGITS,), live)
    with pytest.warns(UserWarning, match="the live teacher answers"):
        found = source.request(fields(np.array([0, 17]), 0)).result()["big"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.request(fields(np.array([18, 3]), 0))
        whole = source.request(fields(np.array([0, 40]), 0)).result()["big"]
    assert torch.equal(found["logits"], views(0, [0, 17])["logits"])
    assert torch.equal(whole["logits"], views(0, [0, 40])["logits"])
    assert source.stats.filled == 2
    assert source.stats.requests == 3, "each request once, whoever answered"
    assert header.shards == 4
    source.close()
    assert live.closed


def test_epochs_that_are_not_kept(tmp_path):
    make(tmp_path, epochs=2)
    with pytest.raises(SourceError, match="keeps the views of 2 epochs, and those of epoch 2 are asked for"):
        StoreSource(tmp_path, "big", (LOGITS,)).request(fields(np.array([1]), 2))


def test_without_augmentation_one_epoch_stands_for_all(tmp_path):
    make(tmp_path, varies=False, epochs=1)
    found = StoreSource(tmp_path, "big", (LOGITS,)).request(fields(np.array([9, 2]), 5)).result()["big"]
    assert torch.equal(found["logits"], views(0, [9, 2])["logits"])


def test_an_answer_that_is_not_finite_is_not_kept(tmp_path):
    header = make(tmp_path)
    place = Place("big", 1, 0)
    store_files.marker_file(tmp_path, place).unlink()

    def spoil(found):
        found["logits"][2, 1] = float("nan")
        return found

    with pytest.raises(SourceError, match=r"signal logits: expected finite values, .* 2 samples, sample_index 2 of epoch 1"):
        write(tmp_path, header, place, parse("dense"), spoil)
    assert store_files.read_marker(tmp_path, place) is None
    assert not list(tmp_path.rglob(f"*{store.PART}"))


def test_too_few_answers_make_no_shard(tmp_path):
    header = make(tmp_path)
    place = Place("big", 0, 0)
    store_files.marker_file(tmp_path, place).unlink()
    with pytest.raises(SourceError, match="expected 16 rows of shard 0, got 8"):
        store_files.write_shard(tmp_path, header, place, [encode(views(0, range(BATCH)), parse("dense"))])
    assert store_files.read_marker(tmp_path, place) is None


@pytest.mark.parametrize("codec", CODECS)
def test_parquet_holds_the_same_values(codec, tmp_path):
    make(tmp_path / "store", codec)
    files = list(export(tmp_path / "store", tmp_path / "out"))
    assert len(files) == 8
    for epoch in range(EPOCHS):
        tables = [pq.read_table(p) for p in sorted((tmp_path / "out" / "big" / f"epoch-{epoch:03d}").glob("*.parquet"))]
        rows = np.concatenate([t["sample_index"].to_numpy() for t in tables])
        assert (rows == np.arange(SAMPLES)).all()
        live = StoreSource(tmp_path / "store", "big", SIGNALS).request(fields(rows, epoch)).result()["big"]
        for signal in SIGNALS:
            column = np.concatenate([np.stack(t[signal.key].to_pylist()).astype(np.float32) for t in tables])
            assert np.array_equal(column, live[signal.key].flatten(1).numpy()), signal.key


def test_a_damaged_store_is_not_exported(tmp_path):
    header = make(tmp_path / "store")
    flip_byte(store_files.shard_file(tmp_path / "store", Place("big", 1, 2), header.teachers["big"].signals[1]))
    with pytest.raises(SourceError, match=r"feature-stage2/epoch-001/shard-00002.arrow: expected sha256"):
        list(export(tmp_path / "store", tmp_path / "out"))


def test_shards_are_whole_batches_and_fit_memory():
    assert store_files.rows_a_shard(50_000, 128, 40) == 4096
    assert store_files.rows_a_shard(50_000, 36, 40) == 4068
    assert store_files.rows_a_shard(3200, 128, 40) == 384
    assert store_files.rows_a_shard(100, 64, 40) == 64
    assert store_files.rows_a_shard(50_000, 128, 2**20) == 256
    assert store_files.rows_a_shard(50_000, 128, 2**30) == 128
