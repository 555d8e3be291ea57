"""Three real teachers, one student: wherever they live, the losses are equal bit for bit; and what happens when one is lost.

Real CIFAR-10 images with crop, flip and mixup; aggregates, a loss of one teacher, a loss applied to each; CPU, float32, dense.
"""

import json
import os
import signal
import warnings

import pytest
import ray

from raykd.config import Loss, Teacher
from raykd.errors import LostError
from raykd.parts.aggregators import aggregators
from tests.spine.small import At, assert_equal_states, cifar, final_state, go, steps_seen, trace
from tests.spine.test_resume import born, own_workers

RAY = {"launch.backend": "ray", "launch.cpus": 0.5}
FILES = {56: "resnet56-4bfd9763.th", 32: "resnet32-d509ac18.th", 20: "resnet20-12fca82f.th"}
SHARED = {"teachers.r32.actor": "small", "teachers.r20.actor": "small"}
ALL = {f"teachers.r{depth}.actor": "all" for depth in FILES}
STEPS = 16


def many(root, depths=(56, 32, 20), **settings):
    """A ResNet-8 taught by real ResNets."""
    teachers = {
        f"r{depth}": Teacher(
            model=f"cifar_resnet{depth}",
            weights=str(root / "weights" / "cifar10" / FILES[depth]),
            normalise="imagenet",
            weight=1.0 + (depth == 56),
        )
        for depth in depths
    }
    losses = {
        "mean": Loss("kd", aggregate="mean_probs"),
        "drawn": Loss("kd", temperature=2.0, aggregate="random"),
        "trusted": Loss("kd", teachers=("r32", "r20"), aggregate="label"),
        "each": Loss("dist"),
        "at": Loss("at", teachers="r56", layers=("stage2", "stage3"), weight=100.0),
    }
    return cifar(root).replace(
        **{
            "teachers": teachers,
            "losses": losses,
            "data.limit": 256,
            "training.epochs": 2,
            "training.checkpoint_every": 4,
            **settings,
        }
    )


@pytest.fixture(scope="module")
def reference(real_data, tmp_path_factory):
    """Trace with all teachers in the student's process."""
    folder = tmp_path_factory.mktemp("many") / "inline"
    result = go(many(real_data, **{f"teachers.r{d}.placement": "inline" for d in FILES}), folder)
    found = trace(folder)
    assert len(found) == STEPS
    assert set(found[0][1]) == {"ce", "mean", "drawn", "trusted", "at"} | {
        f"each.r{d}.{part}" for d in FILES for part in ("inter", "intra")
    }
    return found, final_state(folder), result


@pytest.mark.parametrize("name", ["apart", "two share", "all share, recipes"])
def test_local(name, reference, real_data, tmp_path):
    settings = {
        "apart": {},
        "two share": SHARED,
        "all share, recipes": ALL | {f"teachers.r{d}.inputs": "recipe" for d in FILES},
    }
    go(many(real_data, **settings[name]), tmp_path / "run")
    assert trace(tmp_path / "run") == reference[0]
    assert_equal_states(final_state(tmp_path / "run"), reference[1])


@pytest.mark.ray
@pytest.mark.parametrize("name", ["two share", "all share, two replicas, recipes"])
@pytest.mark.slow
def test_on_ray(name, reference, real_data, tmp_path, ray_cluster):
    both = {f"teachers.r{d}.{key}": value for d in FILES for key, value in {"inputs": "recipe", "replicas": 2}.items()}
    settings = {"two share": SHARED, "all share, two replicas, recipes": ALL | both}
    result = go(many(real_data, **RAY, **settings[name]), tmp_path / "run")
    assert trace(tmp_path / "run") == reference[0]
    assert set(result["exchange"]) == ({"r56", "small"} if name == "two share" else {"all"})
    for one in (*FILES, ""):
        here, there = ((r["teachers"][f"r{one}"] if one else r["ensemble"]) for r in (result, reference[2]))
        assert (here["top1"], here["count"]) == (there["top1"], there["count"]), "measured alike in one process and on replicas"
    assert result["ensemble"]["aggregate"] == "mean_probs"
    assert min(t["top1"] for t in result["teachers"].values()) > 0.85


def test_teachers_that_share_an_actor_send_one_tensor(real_data, tmp_path):
    """Ten logits of float32 a sample for the aggregate of three, in place of thirty."""
    alone = {"losses": {"kd": Loss("kd", aggregate="mean_probs")}, "training.max_steps": 3, "ce_weight": 0.1}
    apart, shared = go(many(real_data, **alone), tmp_path / "a"), go(many(real_data, **alone, **ALL), tmp_path / "b")
    assert trace(tmp_path / "a") == trace(tmp_path / "b")
    sent = [sum(s["bytes_in"] for s in r["exchange"].values()) / (4 * 32) for r in (apart, shared)]
    assert sent == [120, 40]


def kill_all_of(actor):
    def kill(_):
        named = ray.util.list_named_actors(all_namespaces=True)
        newest = max(n["name"].split(":")[0] for n in named if f":{actor}:" in n["name"])
        for one in named:
            if one["name"].startswith(f"{newest}:{actor}:"):
                ray.kill(ray.get_actor(**one), no_restart=True)

    return kill


@pytest.mark.slow
@pytest.mark.ray
def test_a_lost_teacher_is_dropped_and_the_others_share_its_weight(reference, real_data, tmp_path, ray_cluster):
    settings = {"teachers.r32.on_loss": "drop", "teachers.r20.on_loss": "drop", **SHARED}
    settings |= {f"teachers.{t}.replicas": 2 for t in ("r32", "r20")} | {"launch.cpus": 0.5, "launch.backend": "ray"}
    losses = {"losses": {"mean": Loss("kd", aggregate="mean_probs"), "each": Loss("dist")}, "ce_weight": 0.1}
    killer = At(5, kill_all_of("small"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = go(many(real_data, **losses, **settings), tmp_path / "run", killer)
    dropped = result["teachers"]["r32"]["dropped_at"]
    assert killer.fired_at <= dropped == result["teachers"]["r20"]["dropped_at"] <= killer.fired_at + 6
    assert "dropped_at" not in result["teachers"]["r56"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["teachers"]) for r in lines if r["kind"] == "dropped"] == [(dropped, ["r32", "r20"])]
    steps = trace(tmp_path / "run")
    assert [s for s, _ in steps] == list(range(1, STEPS + 1)), "no step lost, none doubled"
    before, after = [set(terms) for s, terms in steps if s <= dropped], [set(terms) for s, terms in steps if s > dropped]
    assert all({"mean", "each.r56.inter", "each.r32.inter"} <= terms for terms in before)
    assert after
    assert all(terms == {"ce", "mean", "each.r56.inter", "each.r56.intra"} for terms in after)


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_teacher_stops_the_run_and_it_resumes_to_the_same_weights(reference, real_data, tmp_path, ray_cluster):
    job = many(real_data, **RAY, **SHARED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(LostError, match="'small': all of its 1 replicas are gone"):
            go(job, tmp_path / "run", At(6, kill_all_of("small")))
    assert 4 <= steps_seen(tmp_path / "run") < STEPS
    go(job, tmp_path / "run", resume=True)
    assert trace(tmp_path / "run") == reference[0]
    assert_equal_states(final_state(tmp_path / "run"), reference[1])


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_that_dies_after_a_teacher_goes_on_without_it(real_data, tmp_path, ray_cluster):
    settings = RAY | {"launch.host": "actors", "teachers.r20.on_loss": "drop", "training.epochs": 4}
    job = many(real_data, (32, 20), **settings, losses={"each": Loss("kd")}, ce_weight=0.1)

    class Then(At):
        """Kills the worker some steps after the teacher."""

        def poll(self):
            super().poll()
            if self.fired_at is not None and not self.second and steps_seen(self.folder) >= self.fired_at + 9:
                self.second = True
                os.kill(max(own_workers(b"ray::_Worker"), key=born), signal.SIGKILL)

    killer = Then(4, kill_all_of("r20"))
    killer.second = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = go(job, tmp_path / "run", killer)
    assert killer.second
    steps = trace(tmp_path / "run")
    assert [s for s, _ in steps] == list(range(1, 2 * STEPS + 1))
    dropped = result["teachers"]["r20"]["dropped_at"]
    assert all(set(terms) == {"ce", "each.r32"} for s, terms in steps if s > dropped)


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_drop_a_teacher_at_the_same_step(real_data, tmp_path, ray_cluster):
    losses = {"losses": {"each": Loss("kd")}, "ce_weight": 0.1, "launch.workers": 2, "teachers.r20.on_loss": "drop"}
    job = many(real_data, (32, 20), **RAY, **losses)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = go(job, tmp_path / "run", At(5, kill_all_of("r20")))
    assert result["student"]["steps"] == STEPS
    dropped = result["teachers"]["r20"]["dropped_at"]
    terms = {step: set(found) for step, found in trace(tmp_path / "run")}
    assert terms[dropped] == {"ce", "each.r32", "each.r20"}
    assert terms[dropped + 1] == {"ce", "each.r32"}


def test_a_teacher_of_some_classes_is_measured_on_those(real_data, tmp_path):
    """A ResNet whose first classes alone are kept is as good on their images as the whole one among them."""
    import torch
    from safetensors.torch import save_file

    whole = torch.load(real_data / "weights" / "cifar10" / FILES[20], map_location="cpu", weights_only=True)["state_dict"]
    part = {name.removeprefix("module."): value.clone() for name, value in whole.items()}
    kept = [8, 1, 9]
    part |= {"linear.weight": part["linear.weight"][kept].clone(), "linear.bias": part["linear.bias"][kept].clone()}
    save_file(part, tmp_path / "part.safetensors")
    settings = {
        "teachers.r20.weights": str(tmp_path / "part.safetensors"),
        "teachers.r20.label_map": kept,
        "losses": {"kd": Loss("kd")},
        "ce_weight": 0.1,
        "training.max_steps": 2,
    }
    result = go(many(real_data, (32, 20), **settings), tmp_path / "run")
    found = result["teachers"]["r20"]
    assert found["count"] < 128 / 2
    assert found["top1"] > 0.95
    assert result["ensemble"] is None, "one teacher that knows all classes is no ensemble"
    assert trace(tmp_path / "run")[0][1]["kd.r20"] > 0


@pytest.mark.parametrize("how", sorted(aggregators()))
def test_every_aggregator_runs(how, real_data, tmp_path):
    losses = {"losses": {"kd": Loss("kd", aggregate=how)}, "ce_weight": 0.1, "training.max_steps": 1, "data.eval_limit": 32}
    result = go(many(real_data, (32, 20), **losses), tmp_path / "run")
    assert trace(tmp_path / "run")[0][1]["kd"] > 0
    assert result["ensemble"]["count"] == 32
