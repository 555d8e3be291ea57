import base64
import html.parser
import io
import json
import struct

import pytest
from rich.console import Console

from raykd.errors import ConfigError
from raykd.report import runs
from raykd.report.page import changed_settings, write_page
from raykd.report.plots import plots, thin
from raykd.resolve import to_dict
from tests.report.folders import grid, job, make, metrics, result, shown, step


class Text(html.parser.HTMLParser):
    """Text and images of a page; complains of tags that do not match."""

    def __init__(self, page):
        super().__init__()
        self.text, self.images, self.open = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page(folder):
    text = write_page(folder).read_text()
    assert "http" not in text
    assert "<script" not in text
    return Text(text)


def test_the_page_of_a_finished_run(tmp_path):
    found = page(make(tmp_path / "run", found=result(0.6, 0.65)))
    text = " ".join(found.text)
    for wanted in ("small", "student distilled", "60.00 / 99.00", "measured here (eval, 360 images)", "below the student alone",
                   "abc1234", "2 cores", "2026-01-02", "losses.kd.temperature", "teachers.big.replicas", "40"):  # fmt: skip
        assert wanted in text, wanted
    assert len(found.images) == 4
    assert all(i["src"].startswith("data:image/png;base64,") and i["alt"] for i in found.images)


@pytest.mark.parametrize(
    "records, images", [([], 0), ([step(1)], 3), (metrics(5, ()), 3), ([step(1, wait_s=0.0, loss=float("nan"), terms={})], 2)]
)
def test_runs_that_are_short_unfinished_or_not_evaluated(tmp_path, records, images):
    found = page(make(tmp_path / "run", records=records))
    assert len(found.images) == images
    assert "Not finished" in " ".join(found.text)


def test_a_run_without_eval_and_job(tmp_path):
    bare = result(baseline=None)
    bare["student"] |= {"last": None, "best": None, "test": None}
    found = page(make(tmp_path / "run", records=metrics(5, ()), found=bare, with_job=False))
    assert "No evaluation was recorded" in " ".join(found.text)


def test_names_are_escaped(tmp_path):
    assert "<b>x" in " ".join(page(make(tmp_path / "run", found=result() | {"name": "<b>x"})).text)


def test_no_run_folder(tmp_path):
    with pytest.raises(ConfigError, match="expected a run folder"):
        write_page(tmp_path)


def test_plots_are_png_files_and_the_baseline_is_drawn_too(tmp_path):
    folder = make(tmp_path / "run", found=result())
    make(folder / "baseline", with_job=False)
    found = plots(folder)
    assert [p.name for p in found] == ["loss.png", "accuracy.png", "rate.png", "wait.png"]
    for path in found:
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", head[16:24]) == (960, 525)


def test_thinning_keeps_the_mean_and_drops_what_is_not_finite():
    xs, ys = thin([float(i) for i in range(1000)], [float(i) for i in range(1000)], most=100)
    assert len(xs) == 100
    assert sum(ys) / 100 == pytest.approx(499.5)
    assert thin([1.0, 2.0], [float("nan"), 3.0]) == ([2.0], [3.0])


def test_settings_that_differ_from_the_defaults():
    found = dict(changed_settings(json.loads(json.dumps(to_dict(job())))))
    assert found["losses.kd.temperature"] == 2.0
    assert found["teachers.big.replicas"] == 2
    assert "teachers.big.max_restarts" not in found
    assert "data.kind" not in found
    assert "seed" not in found


def test_curves_in_numbers(tmp_path):
    found = runs.curves(runs.load(make(tmp_path / "run")))
    assert found["best_eval"]["epoch"] == 1
    assert found["last_eval"]["top1"] == 0.7
    assert found["images_per_s"] == pytest.approx(800)
    assert found["epoch_s"] == pytest.approx(0.2)
    assert found["wait_share"] == pytest.approx(0.1)
    assert found["loss"][0] == pytest.approx(sum(3 / n for n in range(1, 21)) / 20)


def test_images_in_a_request(tmp_path):
    assert runs.images_per_request(runs.load(make(tmp_path / "run"))) == 4  # batch 8 over two workers


def making(folder, epochs=3, **more):
    """A run that has made images, with a grid for each evaluation."""
    records = metrics()
    evaluated = [record for record in records if record["kind"] == "eval"]
    for record in evaluated[:epochs]:
        record |= shown(record["epoch"], **more)
    for epoch in range(epochs):
        grid(folder, epoch)
    return make(folder, records=records, found=result())


def test_grids_of_made_images_and_what_teachers_see_in_the_last(tmp_path):
    found = page(making(tmp_path / "run"))
    text = " ".join(found.text)
    assert "Images made" in text
    assert "Epoch 3: 9 of 10 classes, confidence 0.83, 71 % as wanted" in text
    assert [image["alt"] for image in found.images if "made" in image["alt"]] == [f"Images made, epoch {n}" for n in (3, 1, 2)]
    place = found.text.index("confidence")
    rows = [row.split() for row in " ".join(found.text[place + 1 :]).split("Counts are")[0].split("\n")]
    cells = [cell for row in rows for cell in row]
    assert cells[:9] == ["0", "1", "0.50", "1", "2", "0.90", "2", "0", "-"]
    assert len(cells) == 3 * 10


def test_of_many_classes_only_those_are_told_that_images_are_of(tmp_path):
    text = " ".join(page(making(tmp_path / "run", 1, classes=100)).text)
    assert "Classes without an image: 1." in text


@pytest.mark.parametrize("epochs, earlier", [(1, []), (2, [1]), (3, [1, 2])])
def test_earlier_grids(epochs, earlier, tmp_path):
    found = page(making(tmp_path / "run", epochs))
    alts = [image["alt"] for image in found.images if "made" in image["alt"]]
    assert alts == [f"Images made, epoch {n}" for n in (epochs, *earlier)]


def test_what_the_bank_held_is_told(tmp_path):
    more = {"batches": 4, "made": 10, "stale": 2, "damaged": 1}
    text = " ".join(page(making(tmp_path / "run", **more)).text)
    assert "The bank: 4 batches of 10 made; 2 came too late, 1 damaged on disk." in text


def test_a_large_grid_is_made_smaller_and_a_missing_or_broken_one_left_out(tmp_path):
    folder = making(tmp_path / "run")
    grid(folder, 2, (1810, 905))
    (folder / "images" / "epoch-0001.png").unlink()
    (folder / "images" / "epoch-0002.png").write_bytes(b"cut off")
    (made,) = (image for image in page(folder).images if "made" in image["alt"])
    raw = base64.b64decode(made["src"].partition(",")[2])
    assert struct.unpack(">II", raw[16:24]) == (1024, 512)


def test_a_run_that_made_images_says_so_in_show(tmp_path):
    run = runs.load(making(tmp_path / "run"))
    assert runs.as_json(run)["images"]["file"] == "images/epoch-0003.png"
    screen = Console(file=io.StringIO(), width=160)
    runs.print_run(screen, run)
    assert "Images made, epoch 3: 9 of 10 classes, confidence 0.83, 71 % as wanted" in screen.file.getvalue()
