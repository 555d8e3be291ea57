"""Teachers flow into the student while it learns; what is measured and exported is the plain student, on its own."""

import torch
from safetensors.torch import load_file

from raykd import Job, Loss, Teacher, models
from raykd.data.normalise import Normalise
from raykd.data.splits import open_data
from raykd.resolve import resolve
from raykd.roles.recorder import read
from tests.spine.links import DIGITS, LOCAL, TRAINING, digits
from tests.spine.small import final_state, go


def job(**options) -> Job:
    """Two teachers of other widths than the student's."""
    widths = {"wide": 12, "narrow": 10}
    return Job(
        name="flow",
        data=DIGITS,
        stages={n: Job(name=n, data=DIGITS, training=TRAINING, launch=LOCAL, student=digits(w)) for n, w in widths.items()},
        teachers={n: Teacher(model="digits_cnn", options={"width": w}, weights=f"stage:{n}") for n, w in widths.items()},
        student=digits(6),
        losses={"flow": Loss("knowledge-flow", **options)},
        training=TRAINING,
        launch=LOCAL,
    )


def own_shares(folder):
    """The weight of the student's own output at each layer."""
    state = final_state(folder)
    (scores,) = [value for name, value in state.items() if name.startswith(".losses.flow") and name.endswith("scores")]
    return scores.softmax(1)[:, 0]


def test_the_student_stands_alone(tmp_path):
    result = go(job(dependence=1.0, independent_after=2.0), tmp_path / "run")
    exported = load_file(tmp_path / "run" / "student.safetensors")
    plain = models.build("digits_cnn", 10, width=6).eval()
    assert exported.keys() == plain.state_dict().keys()
    plain.load_state_dict(exported)
    held = open_data(resolve(job()).data, "eval")
    with torch.no_grad():
        images = Normalise.preset("digits")(torch.from_numpy(held.read(torch.arange(len(held)).numpy())))
        right = plain(images).argmax(1) == torch.tensor(held.labels)
    assert result["student"]["last"]["top1"] == int(right.sum()) / len(held)
    assert result["student"]["last"]["top1"] > 0.8
    terms = [step["terms"] for step in read(tmp_path / "run" / "metrics.jsonl", "step")]
    assert terms[-1]["flow.dependence"] < terms[0]["flow.dependence"]


def test_dependence_drives_the_shares(tmp_path):
    go(job(dependence=0.0), tmp_path / "free")
    go(job(dependence=1.0), tmp_path / "driven")
    assert bool((own_shares(tmp_path / "driven") > own_shares(tmp_path / "free")).all())
    assert bool((own_shares(tmp_path / "driven") > 0.9).all())
