import json
import math

import pytest

from raykd.report import tables, words
from tests.report.folders import accuracy, result, student


def test_rows_name_every_model_and_where_its_numbers_come_from():
    rows = tables.rows(result(test=0.71))
    assert [r.who for r in rows] == ["teacher big", "student alone", "student distilled"]
    assert rows[0].cells() == ("teacher big", "digits_cnn", "-", "90.00 / 99.00", "-", "-", "measured here (eval, 360 images)")
    last, best, test, source = rows[2].cells()[3:]
    assert (last, best, test) == ("70.00 / 99.00", "71.00 / 99.00 (epoch 2)", "71.00 / 99.00")
    assert source == "measured here (eval, 360 images; test, 5,000 images)"


def test_a_quoted_number_says_from_where():
    found = result()
    found["teachers"]["big"]["source"] = "quoted from arXiv:1910.10699, table 1"
    assert tables.rows(found)[0].source.startswith("quoted from arXiv:1910.10699, table 1")


def test_a_teacher_measured_on_test_stands_under_test():
    found = result()
    found["teachers"]["big"]["split"] = "test"
    row = tables.rows(found)[0]
    assert (row.last, row.test["top1"]) == (None, 0.9)


def test_stages_come_first_and_a_run_without_teachers_is_not_distilled():
    found = result() | {"stages": {"big": result(baseline=None) | {"teachers": {}}}}
    assert [r.who for r in tables.rows(found)] == ["big: student", "teacher big", "student alone", "student distilled"]


def test_missing_measurements_are_dashes():
    found = result(baseline=None)
    found["student"] |= {"last": None, "best": None, "test": None}
    assert tables.rows(found)[-1].cells()[3:6] == ("-", "-", "-")
    assert tables.comparisons(found) == []
    assert tables.flags(found) == []


def test_a_student_below_its_baseline_is_flagged_on_test_before_eval():
    assert tables.flags(result(0.7, 0.65)) == []
    assert "60.00 % against 65.00 % (eval, last epoch)" in tables.flags(result(0.6, 0.65))[0]
    found = result(0.6, 0.65, test=0.7)
    assert tables.flags(found) == []
    assert tables.flags({"stages": {"a": result(0.6, 0.65)}})[0].startswith("stage a: ")


def test_gain_and_gap():
    gain, gap = tables.comparisons(result(0.7, 0.65))
    assert "+5.00 points" in gain
    assert "20.00 points below (eval, last epoch)" in gap
    assert "above" in tables.comparisons(result(0.95, 0.65))[1]


def test_bytes_a_sample():
    row = tables.exchange(result(), images_per_request=4)[0]
    assert dict(zip(tables.EXCHANGE_HEAD, row))["bytes a sample"] == "40"  # 9600 bytes / (60 requests x 4 images)
    assert tables.exchange(result(), None)[0][3] == "-"
    assert row[-1] == "kl 0.0012"


def test_spread_by_hand():
    found = words.spread([1.0, 2.0, None, 4.0])
    assert found["n"] == 3
    assert found["mean"] == pytest.approx(7 / 3)
    assert found["std"] == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2))
    assert words.spread([0.5]) == {"mean": 0.5, "std": None, "n": 1, "values": [0.5]}
    assert words.spread([None])["mean"] is None


def test_seeds():
    found = tables.seeds([result(0.7, seed=3), result(0.8, seed=4)])
    assert found["seeds"] == [3, 4]
    assert found["student"]["last"]["mean"] == pytest.approx(0.75)
    assert found["student"]["test"]["n"] == 0
    assert tables.seed_rows(found)[1] == ("student", "75.00 ± 7.07 (n = 2)", "76.00 ± 7.07 (n = 2)", "-")
    assert tables.seeds([result(baseline=None)])["baseline"] is None


@pytest.mark.parametrize(
    "number, text", [(855_770, "0.86 M"), (125_750_000, "125.8 M"), (4.09e9, "4.09 G"), (1922, "1.9 k"), (12, "12")]
)
def test_quantities_as_papers_print_them(number, text):
    assert words.quantity(number) == text


def test_durations():
    assert [words.duration(s) for s in (8.25, 725, 12_000)] == ["8.2 s", "12 min 05 s", "3 h 20 min"]


@pytest.mark.parametrize(
    "path, title", [("", "job"), ("baseline", "student alone"), ("stages.a", "stage a"), ("stages.baseline", "stage baseline")]
)
def test_titles(path, title):
    assert words.title(path, "job") == title


def test_plain_data_is_strict_json():
    found = words.plain({"a": (1, float("nan")), 2: object, "c": [True, None, float("inf")]})
    assert json.loads(json.dumps(found, allow_nan=False))["a"] == [1, None]
    assert found["c"] == [True, None, None]


def test_accuracy_without_top5():
    assert words.accuracy({"top1": 0.5}) == "50.00"
    assert words.sentence({"top1": 0.5}) == "top-1 50.00 %"
    assert words.accuracy(None) == "-"


def test_origin_of_a_number():
    found = tables.origin(result() | {"started": 0.0, "hardware": {"gpu": "H100"}})
    assert found["commit"] == "abc1234"
    assert found["hardware"] == "gpu H100"
    assert found["took"] == "1 min 23 s"
    assert found["started"].startswith("19")
    assert tables.origin({"student": student(0.5) | {"last": accuracy(0.5)}})["commit"] == "not a git checkout"
