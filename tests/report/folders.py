"""Run folders as a run leaves them, made by hand: the inputs of every report."""

import json
from pathlib import Path

from raykd.config import Data, Job, Launch, Loss, Student, Teacher, Training
from raykd.resolve import resolve, write

EPOCH_STEPS = 20


def job(**settings):
    """A job with one teacher in a pool and two losses."""
    made = Job(
        name="small",
        data=Data(kind="digits"),
        student=Student(model="digits_cnn"),
        teachers={"big": Teacher(model="digits_cnn", weights="big.th", replicas=2)},
        losses={"kd": Loss("kd", temperature=2.0), "dkd": Loss("dkd")},
        ce_weight=0.5,
        training=Training(epochs=3, batch_size=8),
        launch=Launch(workers=2),
    )
    return resolve(made.replace(**settings) if settings else made)


def step(number, wait=0.1, **more):
    """One step record, as roles.recorder writes it."""
    values = {
        "epoch": (number - 1) // EPOCH_STEPS,
        "loss": 3.0 / number,
        "terms": {"ce": 1.0 / number, "kd": 2.0 / number},
        "lr": 0.1,
        "images": 8,
        "wait_s": wait * 0.01,
        "step_s": 0.01,
    }
    return {"kind": "step", "step": number, **values, **more}


def evaluation(epoch, top1, count=360):
    """One evaluation record."""
    return {"kind": "eval", "step": (epoch + 1) * EPOCH_STEPS, "epoch": epoch, "top1": top1, "top5": 0.99, "count": count}


def metrics(steps=3 * EPOCH_STEPS, top1=(0.5, 0.75, 0.7)):
    """Records of a run with an evaluation after each epoch."""
    found = []
    for number in range(1, steps + 1):
        found.append(step(number, **({"grad_norms": {"ce": 2.0, "kd": 1.0}} if number == 1 else {})))
        if number % EPOCH_STEPS == 0 and number // EPOCH_STEPS <= len(top1):
            found.append(evaluation(number // EPOCH_STEPS - 1, top1[number // EPOCH_STEPS - 1]))
    return found


def accuracy(top1, count=360, **more):
    """An accuracy of result.json."""
    return {"top1": top1, "top5": 0.99, "count": count, **more}


def student(top1, test=None):
    """A student of result.json; the best epoch is one point above the last."""
    best = accuracy(top1 + 0.01, epoch=1)
    numbers = {"last": accuracy(top1), "best": best, "test": None if test is None else accuracy(test, 5000)}
    return {"model": "digits_cnn", "parameters": 1922, **numbers, "steps": 60, "epochs": 3.0, "seconds": 1.5}


def result(top1=0.7, baseline=0.65, test=None, seed=0):
    """result.json of a finished run."""
    teacher = accuracy(0.9, split="eval", model="digits_cnn", weights="big.th", source="measured here")
    traffic = {"requests": 60, "retries": 1, "bytes_in": 9600, "bytes_out": 480, "teacher_s": 1.0, "client_s": 0.1}
    return {
        "name": "small",
        "seed": seed,
        "folder": "runs/small-001",
        "commit": "abc1234",
        "hardware": "x86_64, 2 cores, no GPU",
        "started": "2026-01-02 03:04:05",
        "seconds": 83.0,
        "teachers": {"big": teacher},
        "baseline": None if baseline is None else student(baseline, test and test - 0.02),
        "student": student(top1, test),
        "exchange": {"big": traffic | {"errors": {"kl": 0.0012}}},
        "stages": {},
    }


def lines(records):
    """Records as the text of metrics.jsonl."""
    return "".join(json.dumps(r) + "\n" for r in records)


def make(folder: Path, records=None, found=None, with_job=True) -> Path:
    """Writes a run folder; `found` None: not finished."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(lines(metrics() if records is None else records))
    if found is not None:
        (folder / "result.json").write_text(json.dumps(found | {"folder": str(folder)}))
    if with_job:
        write(job(), folder / "job.json")
    return folder
