"""The whole course of grafting in the Learner, block by block and then the chain: as a loop of torch.optim written out."""

import copy
from dataclasses import replace

import pytest
import torch
import tracing
from test_trace_learner import CPU, FACTS, asked, connected, uint8_batches

from raykd.errors import ConfigError
from raykd.exchange.sources import InlineSource
from raykd.launch.assembly import asks, make_committee
from raykd.roles.learner import Learner

STEPS, LR, MOMENTUM = 14, 0.05, 0.9
TURNS = [0, 0, 1, 1, 2, 2, 3, 4, 4, 4, 5, 5, 6, 6]  # seven steps for four blocks alone, seven for three chains
GRAFTS = [(0, 0), (1, 1), (2, 2), (3, 3), (0, 1), (0, 2), (0, 3)]


@pytest.fixture
def course(tmp_path):
    """(job and sources, a learner before its first step, batches)."""
    setting = {"steps_per_epoch": STEPS}
    made = connected("network-grafting", setting, tmp_path)
    made.job = replace(made.job, ce_weight=0.0, training=replace(made.job.training, momentum=MOMENTUM))
    sources = {
        name: InlineSource(make_committee(made.job, (name,), FACTS), asks(made.job, made.parts["student"].plans, (name,)))
        for name in made.job.teachers
    }
    steps = [batch for _ in range(5) for batch in uint8_batches(setting)][:STEPS]
    learner = Learner(made.job, made.parts["student"].plans, FACTS, tracing.DATASET_LABELS, CPU, STEPS)
    learner.bind(steps[0], asked(sources, steps[0]))
    return made, sources, learner, steps


def plainly(student, teacher, adapters, steps, weight):
    """The paper's two stages, with an adapter on either side of every cut; those between joined blocks go into the second."""
    parts = [student.stage1, student.stage2, student.stage3, student.classifier]
    for number, (first, last) in enumerate(GRAFTS):
        if number >= len(parts):
            inward, outward = (adapters[f"{way}.{last - 1}.weight"].detach()[:, :, 0, 0] for way in ("inward", "outward"))
            weight_of = parts[last].weight.data
            parts[last].weight.data = torch.einsum("oi...,ij->oj...", weight_of, inward @ outward)
        trained = [p for part in parts[first : last + 1] for p in part.parameters()]
        trained += [adapters[f"inward.{first - 1}.weight"]] if first else []
        trained += [adapters[f"outward.{last}.weight"]] if last < 3 else []
        optimizer = torch.optim.SGD(trained, lr=LR, momentum=MOMENTUM)
        for batch in (batch for turn, batch in zip(TURNS, steps) if turn == number):
            images = batch["images"].double() / 256
            theirs = tracing.signals(teacher, images)
            maps = images if not first else conv(adapters[f"inward.{first - 1}.weight"], theirs["stages"][first - 1])
            for place in range(first, last + 1):
                maps = parts[place](maps.mean((2, 3))) if place == 3 else torch.relu(parts[place](maps))
            if last < 3:
                maps = conv(adapters[f"outward.{last}.weight"], maps)
                maps = tracing.signals(teacher, images, {last: lambda _, maps=maps: maps})["logits"]
            wanted = theirs["logits"]
            apart = maps / maps.norm(dim=1, keepdim=True) - wanted / wanted.norm(dim=1, keepdim=True)
            optimizer.zero_grad()
            (weight * (apart**2).sum(1).mean()).backward()
            optimizer.step()


def conv(weight, maps):
    return torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], maps)


def test_both_stages(course):
    made, sources, learner, steps = course
    (loss,) = learner.losses.values()
    student = tracing.learner_net({}).double()
    student.load_state_dict(learner.student.state_dict())
    adapters = {n: p.detach().clone().requires_grad_() for n, p in loss.module.named_parameters()}
    assert len(adapters) == 6, "widths differ at every stage"
    plainly(student, made.teacher, adapters, steps, loss.weight)
    for batch in steps:
        learner.step(batch, asked(sources, batch), tracing.BATCH)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(learner.student.state_dict()[name], value, rtol=1e-10, atol=1e-10)
    for name, value in adapters.items():
        torch.testing.assert_close(loss.module.get_parameter(name), value, rtol=1e-10, atol=1e-10)


def test_only_what_is_grafted_learns(course):
    made, sources, learner, steps = course
    (loss,) = learner.losses.values()
    places = ("stage1", "stage2", "stage3", "classifier")
    adapters = {"inward": lambda first, last: first - 1, "outward": lambda first, last: last}
    for number, batch in enumerate(steps):
        before = copy.deepcopy({"student": learner.student.state_dict(), "module": loss.module.state_dict()})
        learner.step(batch, asked(sources, batch), tracing.BATCH)
        first, last = GRAFTS[TURNS[number]]
        for place, name in enumerate(places):
            same = torch.equal(before["student"][f"{name}.weight"], learner.student.get_parameter(f"{name}.weight"))
            assert same != (first <= place <= last), (number, name)
        for way, place in adapters.items():
            for cut in range(3):
                same = torch.equal(before["module"][f"{way}.{cut}.weight"], loss.module.get_parameter(f"{way}.{cut}.weight"))
                assert same != (cut == place(first, last)), (number, way, cut)


def test_joining_two_blocks_changes_no_answer(course):
    """The chain of two, before its first step: as with the adapters between them."""
    made, sources, learner, steps = course
    (loss,) = learner.losses.values()
    for batch in steps[:7]:
        learner.step(batch, asked(sources, batch), tracing.BATCH)
    images = steps[0]["images"].double() / 256
    module, student = loss.module, copy.deepcopy(learner.student)
    with torch.no_grad():
        first = torch.relu(student.stage1(images))
        second = torch.relu(student.stage2(conv(module.inward[0].weight, conv(module.outward[0].weight, first))))
        module.enter(4)
        joined = torch.relu(learner.student.stage2(torch.relu(learner.student.stage1(images))))
    torch.testing.assert_close(joined, second, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(student.stage2.weight, learner.student.stage2.weight)


def test_too_few_steps(course):
    made, sources, learner, steps = course
    learner.steps_per_epoch = 6
    with pytest.raises(
        ConfigError, match=r"training\.epochs: expected a step or more for each of 7 grafts, got 6 steps in all"
    ):
        learner.step(steps[0], asked(sources, steps[0]), tracing.BATCH)
