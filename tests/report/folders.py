"""Run folders as a run leaves them, made by hand: the inputs of every report."""

import json
from pathlib import Path

from PIL import Image

from raykd.config import Data, Job, Launch, Loss, Peer, Student, Teacher, Training
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


CLASSES = 10


def shown(epoch, classes=CLASSES, wanted=0.71, **more):
    """What a record says of images that were shown; of class 2 there is none."""
    counts = [0 if c == 2 else 1 + c % 3 for c in range(classes)]
    confidences = [None if c == 2 else 0.5 + 0.4 * (c % 2) for c in range(classes)]
    found = {"shown": sum(counts), "classes": counts, "confidences": confidences, "confidence": 0.834, "wanted": wanted}
    return {"shown": found | {"file": f"images/epoch-{epoch + 1:04d}.png"} | more}


def grid(folder: Path, epoch: int, size=(242, 122)) -> None:
    """A grid of images as a run puts it out."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (epoch, 0, 0)).save(folder / "images" / f"epoch-{epoch + 1:04d}.png")


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


PEERS = ("a", "b", "c")


def peer_job(names=PEERS, **settings):
    """A job of peers on actors."""
    made = Job(
        name="mutual",
        data=Data(kind="digits"),
        peers={name: Peer(model="digits_cnn") for name in names},
        losses={"dml": Loss("dml")},
        training=Training(epochs=3, batch_size=8),
    )
    return resolve(made.replace(**settings) if settings else made)


def peer_step(number, wait=0.1, loss=3.0, **more):
    """One step record of a peer."""
    return step(number, 0.0, loss=loss / number, terms={"ce": 1.0 / number, "dml": 2.0 / number}) | {
        "peers_wait_s": wait * 0.01,
        "versions": {},
        **more,
    }


def peer_metrics():
    """Records of three peers: b is lost for a and c at step 30 and c comes back at step 41 with weights of step 40."""
    found = {}
    for place, name in enumerate(PEERS):
        records = []
        for number in range(1, 30 if name == "b" else 3 * EPOCH_STEPS + 1):
            if name != "b" and number == 30:
                records.append({"kind": "dropped", "step": 29 + (name == "c"), "peers": ["b"]})
            if name == "c" and number == 41:
                records.append({"kind": "rejoined", "step": 44, "version": 40})
            if name == "c" and 41 <= number <= 44:
                continue
            records.append(peer_step(number, (0.4, 0.0, 0.2)[place], 3.0 + place))
            if number % EPOCH_STEPS == 0:
                epoch = number // EPOCH_STEPS - 1
                records.append(evaluation(epoch, 0.5 + 0.1 * epoch + 0.05 * place))
        found[name] = records
    return found


def peers_result(baseline=True, seed=0, **more):
    """result.json of the run of `peer_metrics`."""
    peers = {name: student(0.7 + 0.05 * place) | {"steps_this_time": 60} for place, name in enumerate(PEERS)}
    peers["b"] = {"model": "digits_cnn", "parameters": 1922, "dropped_at": 29}
    peers["c"]["respawned"] = 1
    edge = {"messages": 61, "bytes_in": 61 * 320, "wait_s": 0.3, "stale_steps": 0, "stalest": 0}
    together = {
        "top1": 0.82,
        "top5": 0.99,
        "count": 360,
        "split": "eval",
        "peers": ["a", "c"],
        "distance": 0.25,
        "disagree": 0.1,
    }
    kept = {k: v for k, v in result(seed=seed).items() if k not in ("student", "exchange", "baseline", "teachers")}
    return kept | {
        "name": "mutual",
        "teachers": {},
        "peers": peers,
        "together": together,
        "edges": {"b>a": edge | {"messages": 29, "bytes_in": 29 * 320}, "c>a": edge, "a>c": edge},
        "baseline": {name: student(0.72) for name in PEERS} if baseline else None,
        **more,
    }


def make_peers(folder: Path, found=None, records=None, with_job=True) -> Path:
    """Writes the run folder of an online job; `found` None: not finished."""
    for name, own in (peer_metrics() if records is None else records).items():
        (folder / "peers" / name).mkdir(parents=True, exist_ok=True)
        (folder / "peers" / name / "metrics.jsonl").write_text(lines(own))
    if found is not None:
        (folder / "result.json").write_text(json.dumps(found | {"folder": str(folder)}))
    if with_job:
        write(peer_job(), folder / "job.json")
    return folder
