import os

import pytest

from raykd.report.watch import Watch, advice, norms_text
from tests.report.folders import evaluation, job, lines, shown, step


def append(folder, *records):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(lines(records))


def texts(watch, kind):
    return [r.text for r in watch.poll() if r.kind == kind]


def test_evaluations_are_said_once(tmp_path):
    watch = Watch("", job(), tmp_path, 60)
    append(tmp_path, step(20), evaluation(0, 0.5))
    assert texts(watch, "eval") == ["small: epoch 1/3, eval top-1 50.00 %, top-5 99.00 % (360 images)"]
    append(tmp_path, step(40), evaluation(1, 0.4))
    assert texts(watch, "eval")[0].endswith("best so far 50.00 % (epoch 1)")
    assert watch.poll() == []


def test_what_an_earlier_run_wrote_is_taken_in_silence(tmp_path):
    append(tmp_path, step(20, grad_norms={"ce": 1.0, "kd": 0.0}), evaluation(0, 0.5))
    watch = Watch("", job(), tmp_path, 60)
    assert watch.poll() == []
    assert watch.progress.step == 20


def test_a_file_cut_back_is_not_said_again(tmp_path):
    watch = Watch("", job(), tmp_path, 60)
    append(tmp_path, *(step(n) for n in range(1, 21)), evaluation(0, 0.5), step(21), step(22))
    assert len(texts(watch, "eval")) == 1
    part = tmp_path / "part"
    part.write_text(lines([*(step(n) for n in range(1, 21)), evaluation(0, 0.5), *(step(n) for n in range(21, 26))]))
    os.replace(part, tmp_path / "metrics.jsonl")
    assert watch.poll() == []
    assert (watch.progress.step, watch.progress.live_steps) == (25, 3)


def test_gradient_norms_are_shown_once_and_a_dead_term_warns(tmp_path):
    watch = Watch("", job(), tmp_path, 60)
    append(tmp_path, step(1, grad_norms={"ce": 2.0, "kd": 0.0}))
    note, warning = watch.poll()
    assert note.text == "small: gradient norms on the student: ce 2, kd 0 (0 x ce)"
    assert warning.kind == "warn"
    assert "the term is dead" in warning.text
    assert "losses.kd" in warning.text
    append(tmp_path, step(50, grad_norms={"ce": 2.0, "kd": 0.0}))
    assert watch.poll() == []


def test_a_term_that_warms_up_is_judged_at_its_second_norm(tmp_path):
    watch = Watch("", job(), tmp_path, 60)  # dkd's schedule is linear(20)
    append(tmp_path, step(1, grad_norms={"ce": 2.0, "dkd.tckd": 0.0, "dkd.nckd": 0.0}))
    assert texts(watch, "warn") == []
    append(tmp_path, step(50, grad_norms={"ce": 2.0, "dkd.tckd": 0.0, "dkd.nckd": 0.5}))
    found = texts(watch, "warn")
    assert len(found) == 1
    assert "'dkd.tckd'" in found[0]


def test_the_student_alone_has_no_terms_to_compare(tmp_path):
    watch = Watch("baseline", job(), tmp_path, 60)
    append(tmp_path, step(1, grad_norms={"ce": 2.0}))
    assert watch.poll() == []


def test_advice_once_after_fifty_steps(tmp_path):
    watch = Watch("", job(), tmp_path, 60)
    append(tmp_path, *(step(n, wait=0.38) for n in range(1, 50)))
    assert watch.poll() == []
    append(tmp_path, step(50, wait=0.38))
    assert "waiting 38 % for teachers: add replicas (teachers.big.replicas: 2 now, 4 would keep up" in texts(watch, "note")[0]
    append(tmp_path, step(51, wait=0.9))
    assert watch.poll() == []


@pytest.mark.parametrize(
    "share, settings",
    [(0.15, {}), (0.5, {"teachers.big.placement": "inline"}), (0.5, {"launch.backend": "local", "launch.workers": 1})],
)
def test_no_advice_where_nothing_can_be_gained(share, settings):
    assert advice(job(**settings), share) is None


def test_the_line(tmp_path):
    watch = Watch("", job(), tmp_path, 1060)
    append(tmp_path, *(step(n, wait=0.38) for n in range(1, 22)))
    watch.poll()
    line = watch.line()
    assert line.startswith("small · epoch 2/3 · step 21/1,060 · 800 img/s · loss ")
    assert "ce 0." in line
    assert "teacher wait 38 %" in line


def test_norms_without_cross_entropy():
    assert norms_text({"kd": 1.0}) == "kd 1"
    assert norms_text({"ce": 0.0, "kd": 1.0}) == "ce 0, kd 1"


def test_damaged_files_of_a_bank_are_told(tmp_path):
    watch = Watch("", job(), tmp_path, 60)
    append(tmp_path, step(1, bank=4), step(2, bank=3, damaged=1))
    assert texts(watch, "warn") == ["small: damaged files of the bank: 1; batches are made in their place"]


def test_images_that_are_shown_are_told_once_with_an_evaluation_or_without(tmp_path):
    watch = Watch("", job(), tmp_path, 60)
    append(tmp_path, step(20), evaluation(0, 0.5) | shown(0))
    seen = "small: images: 9 of 10 classes, confidence 0.83, 71 % as wanted -> images/epoch-0001.png"
    assert texts(watch, "eval")[1:] == [seen]
    append(tmp_path, {"kind": "shown", "step": 40, "epoch": 1} | shown(1, wanted=None))
    assert texts(watch, "eval") == ["small: images: 9 of 10 classes, confidence 0.83 -> images/epoch-0002.png"]
    append(tmp_path, {"kind": "shown", "step": 40, "epoch": 1} | shown(1))
    assert watch.poll() == []
    assert Watch("", job(), tmp_path, 60).poll() == [], "of an earlier start"


def test_what_comes_before_the_first_step_is_in_the_line(tmp_path):
    parts = {"parts": "updates of the generator"}
    now = [0.0]
    append(tmp_path, *({"kind": "prepared", "step": 0, "done": n, "total": 20000, **parts} for n in (50, 100)))
    watch = Watch("", job(), tmp_path, 60, lambda: now[0])
    assert watch.line() == "small · 100/20,000 updates of the generator before the first step"
    append(tmp_path, {"kind": "prepared", "step": 0, "done": 200, "total": 20000, **parts})
    watch.poll()
    now[0] = 10.0
    append(tmp_path, {"kind": "prepared", "step": 0, "done": 1200, "total": 20000, **parts})
    assert watch.poll() == []
    assert watch.line() == "small · 1,200/20,000 updates of the generator before the first step · 3 min 08 s left"
    append(tmp_path, step(1))
    watch.poll()
    assert "step 1/60" in watch.line()


def test_images_of_which_nobody_noted_what_teachers_see(tmp_path):
    watch = Watch("", job(), tmp_path, 60)
    old = {"classes": [50, 60], "batches": 4, "file": "images/epoch-0001.png"}
    append(tmp_path, {"kind": "shown", "step": 20, "epoch": 0, "shown": old})
    assert texts(watch, "eval") == ["small: images: nobody noted what teachers see -> images/epoch-0001.png"]
