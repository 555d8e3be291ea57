import json

import pytest

from raykd.report import peer_tables, runs, tables
from raykd.report.page import changed_settings, write_page
from raykd.report.peer_plots import plots
from raykd.report.peer_watch import PeersWatch, advice
from raykd.report.terminal import Terminal
from raykd.resolve import to_dict
from tests.report.folders import (
    PEERS,
    accuracy,
    evaluation,
    lines,
    make_peers,
    peer_job,
    peer_metrics,
    peer_step,
    peers_result,
    step,
    student,
)
from tests.report.test_page import page
from tests.report.test_terminal import Clock, console


def append(folder, name, *records):
    place = folder / "peers" / name
    place.mkdir(parents=True, exist_ok=True)
    with (place / "metrics.jsonl").open("a") as file:
        file.write(lines(records))


def texts(watch, kind):
    return [r.text for r in watch.poll() if r.kind == kind]


def test_one_line_for_all_peers(tmp_path):
    clock = Clock()
    watch = PeersWatch("", peer_job(), tmp_path, 60, clock)
    for number in range(1, 12):
        for place, name in enumerate(PEERS):
            if name != "c" or number < 8:
                append(tmp_path, name, peer_step(number, (0.4, 0.1, 0.0)[place], 3.0 + place))
        clock.now += 1.0
        assert watch.poll() == []
    line = watch.line()  # c: 10 s for 6 steps, 53 to go
    assert line == (
        "mutual · 3 peers · epoch 1/3 · step 7/60 (c; the first at 11) · ETA 1 min 28 s · 800 img/s each · "
        "loss a 0.824, b 1.1, c 1.85 · peer wait a 40 %, b 10 %, c 0 %"
    )
    assert watch.progress.step == 7


def test_many_peers_are_told_by_both_ends(tmp_path):
    names = tuple(f"p{i}" for i in range(8))
    watch = PeersWatch("", peer_job(names), tmp_path, 60)
    for place, name in enumerate(names):
        append(tmp_path, name, peer_step(1, place / 10, 1.0 + place), evaluation(0, 0.5 + place / 100))
    assert texts(watch, "eval") == ["mutual: epoch 1/3, eval top-1 p0 50.00 % (least) to p7 57.00 % (most); mean 53.50 %"]
    assert "loss p0 1 (least) to p7 8 (most) · peer wait p0 0 % (least) to p7 70 % (most)" in watch.line()


def test_an_epoch_is_told_once_all_have_come_past_it(tmp_path):
    watch = PeersWatch("", peer_job(), tmp_path, 60)
    append(tmp_path, "a", evaluation(0, 0.5), evaluation(1, 0.6))
    append(tmp_path, "b", evaluation(0, 0.4))
    assert watch.poll() == []
    append(tmp_path, "c", evaluation(1, 0.7))  # it came back in epoch 1
    assert texts(watch, "eval") == ["mutual: epoch 1/3, eval top-1 a 50.00 %, b 40.00 %; mean 45.00 %"]
    assert [r.text for r in watch.finish()] == ["mutual: epoch 2/3, eval top-1 a 60.00 %, c 70.00 %; mean 65.00 %"]
    assert watch.finish() == []


def test_who_is_lost_and_who_comes_back_is_said_once(tmp_path):
    watch = PeersWatch("", peer_job(), tmp_path, 60)
    append(tmp_path, "a", peer_step(1), {"kind": "dropped", "step": 5, "peers": ["b"]})
    assert texts(watch, "warn") == ["mutual: peer b is lost; a went on without it from step 5"]
    append(tmp_path, "c", {"kind": "dropped", "step": 6, "peers": ["b"]}, {"kind": "rejoined", "step": 9, "version": 4})
    assert texts(watch, "warn") == ["mutual: peer c was started again; it joined at step 9 with weights 5 steps behind"]
    assert watch.line().startswith("mutual · 2 peers · epoch 1/3 · step 0/60 · ")
    resumed = PeersWatch("", peer_job(), tmp_path, 60)
    assert resumed.poll() == []


def test_a_peer_that_is_cut_back_and_joins_again_is_told(tmp_path):
    watch = PeersWatch("", peer_job(), tmp_path, 60)
    for name in PEERS:
        append(tmp_path, name, *(peer_step(n) for n in range(1, 10)))
    watch.poll()
    part = tmp_path / "part"
    part.write_text(lines([*(peer_step(n) for n in range(1, 5)), {"kind": "rejoined", "step": 9, "version": 4}]))
    part.replace(tmp_path / "peers" / "b" / "metrics.jsonl")
    assert "peer b was started again; it joined at step 9 with weights 5 steps behind" in texts(watch, "warn")[0]


def test_a_term_that_starts_late_is_not_dead_before(tmp_path):
    job = peer_job(**{"losses.dml.schedule": "start(1)"})
    watch = PeersWatch("", job, tmp_path, 60)
    append(tmp_path, "a", peer_step(1, grad_norms={"ce": 1.0, "dml": 0.0}))
    assert texts(watch, "warn") == []
    append(tmp_path, "a", peer_step(21, grad_norms={"ce": 1.0, "dml": 0.0}))
    found = texts(watch, "warn")
    assert found[0].startswith("mutual, peer a: the gradient of 'dml'")
    assert "whether the peers say anything" in found[0]


@pytest.mark.parametrize(
    "shares, settings, words",
    [
        ({"a": 0.4, "b": 0.02}, {}, "a waits 40 % of its time for peers; b waits least (2 %) and sets the pace"),
        ({"a": 0.4, "b": 0.02}, {"exchange.what": "weights", "exchange.staleness": 2}, "Give it more (peers.b.cpus, .gpus)."),
        ({"a": 0.4, "b": 0.3}, {}, None),
        ({"a": 0.1, "b": 0.0}, {}, None),
        ({"a": 0.4, "b": 0.0}, {"launch.backend": "local"}, None),
    ],
)
def test_advice(shares, settings, words):
    found = advice(peer_job(("a", "b"), **settings), shares)
    assert found is None if words is None else words in found


def test_advice_comes_once_when_all_have_settled(tmp_path):
    watch = PeersWatch("", peer_job(), tmp_path, 200)
    for name in ("a", "b"):
        append(tmp_path, name, *(peer_step(n, 0.5 if name == "a" else 0.0) for n in range(1, 51)))
    assert texts(watch, "note") == []
    append(tmp_path, "c", *(peer_step(n, 0.2) for n in range(1, 51)))
    assert "a waits 50 % of its time for peers; b waits least" in texts(watch, "note")[0]
    assert watch.poll() == []


def test_rows_of_peers_alone_and_together():
    rows = tables.rows(peers_result())
    expected = [f"peer {name} {kind}" for name in PEERS for kind in ("alone", "together")]
    assert [r.who for r in rows] == [*expected, "ensemble of 2 peers"]
    assert rows[3].source == "lost at step 29"
    assert rows[-1].cells()[3] == "82.00 / 99.00"
    assert rows[-1].source == "measured here (eval, 360 images)"
    assert [r.who for r in tables.rows(peers_result(baseline=False))][:2] == ["peer a", "peer b"]
    assert tables.rows({"stages": {"s": peers_result(False)}})[0].who == "s: peer a"


def test_gains_ensemble_and_difference():
    gain, ensemble, apart = tables.comparisons(peers_result())
    assert gain == (
        "Gain of each peer over itself alone: a -2.00 points, c +8.00 points; mean +3.00 points (eval, last epoch)."
    )
    assert "2.00 points above the best peer, c (eval, last epoch)" in ensemble
    assert "differ on 10.00 % of the images" in apart
    assert tables.comparisons(peers_result(baseline=False, together=None)) == []


def test_flags_of_peers():
    lost, back, below = tables.flags(peers_result())
    assert "Peer b was lost at step 29" in lost
    assert "Peer c was lost and started again from its checkpoint, once." in back
    assert "a 70.00 % against 72.00 %" in below
    assert "c 80" not in below


def test_edges_by_hand():
    rows = peer_tables.edges(peers_result())
    first = dict(zip(peer_tables.EDGES, rows[1]))
    assert (first["edge"], first["bytes a message"], first["bytes a step"]) == ("c > a", "320 B", "320 B")  # 60 and the probe
    assert first["share of the time"] == "20.0 %"  # 0.3 s of 1.5 s
    found = peers_result()
    found["edges"] = {"a>b": found["edges"]["a>c"], "c>a": found["edges"]["c>a"] | {"stale_steps": 150, "stalest": 4}}
    assert [row[-1] for row in peer_tables.edges(found)] == ["0", "2.5, most 4"]
    assert peer_tables.edges(found)[0][3] == "-"  # b was lost
    assert peer_tables.edges({}) == []


def test_branches_of_a_student_and_of_peers():
    measured = {"each": [accuracy(0.7), accuracy(0.6)], "ensemble": accuracy(0.75), "split": "test"}
    found = {"student": student(0.7) | {"branches": measured}}
    assert [row[0] for row in peer_tables.branches(found)] == ["branch 0, the plain model", "branch 1", "ensemble of 2"]
    found = {"peers": {"a": student(0.7) | {"branches": measured}, "b": student(0.7)}}
    assert peer_tables.branches(found)[-1] == ("peer a: ensemble of 2", "75.00 / 99.00", "test")
    assert peer_tables.branches({"student": {"branches": {"each": [accuracy(0.7)]}}}) == []


def test_events_of_several_witnesses():
    found = peer_tables.events({name: peer_metrics()[name] for name in PEERS})
    assert found == [
        {"kind": "dropped", "peer": "b", "step": 29, "by": ["a"]},
        {"kind": "rejoined", "peer": "c", "step": 44, "version": 40},
    ]


def test_seeds_of_peers():
    found = tables.seeds([peers_result(seed=0), peers_result(seed=1, together=peers_result()["together"] | {"top1": 0.84})])
    assert found["peers"]["c"]["gain"]["last"]["mean"] == pytest.approx(0.08)
    assert found["peers"]["b"]["together"]["last"]["n"] == 0
    assert found["ensemble"]["top1"]["mean"] == pytest.approx(0.83)
    shown = {row[0]: row[1:] for row in tables.seed_rows(found)}
    assert shown["peer c, gain"][0] == "+8.00 ± 0.00 (n = 2)"
    assert shown["ensemble of the peers"] == ("83.00 ± 1.41 (n = 2)", "-", "-")
    assert json.loads(json.dumps(found)) == found


def test_where_a_result_of_peers_comes_from():
    found = tables.origin(peers_result())
    assert found["peer a trained"] == "60 steps, 3 epochs"
    assert "peer b trained" not in found
    assert "student trained" not in found


@pytest.mark.parametrize("finished", [True, False])
def test_the_page_of_peers(tmp_path, finished):
    found = page(make_peers(tmp_path / "run", peers_result() if finished else None))
    text = " ".join(found.text)
    assert len(found.images) == 4
    for wanted in (
        "mutual",
        "peer b is lost; a went on without it from step 29",
        "Peer c: 60 steps",
        "Waiting for peers: 40.0 %",
    ):
        assert wanted in text, wanted
    if finished:
        for wanted in ("peer a together", "ensemble of 2 peers", "c > a", "measured here", "Exchange among the peers"):
            assert wanted in text, wanted
    else:
        assert "Not finished: steps recorded: a 60, b 29, c 60." in text


@pytest.mark.parametrize("records", [{name: [] for name in PEERS}, {"a": [peer_step(1)], "b": [], "c": [step(1)]}])
def test_the_page_of_peers_that_hardly_began(tmp_path, records):
    found = page(make_peers(tmp_path / "run", records=records, with_job=False))
    assert "Not finished" in " ".join(found.text)


def test_plots_of_peers_with_their_baseline(tmp_path):
    folder = make_peers(tmp_path / "run", peers_result())
    make_peers(folder / "baseline", with_job=False)
    assert [p.stem for p in plots(runs.load(folder))] == ["peers_loss", "peers_accuracy", "peers_rate", "peers_wait"]


def test_a_run_of_peers_as_data(tmp_path):
    found = json.loads(json.dumps(runs.as_json(runs.load(make_peers(tmp_path / "run", peers_result())))))
    assert found["peers"]["a"]["peer_wait_share"] == pytest.approx(0.4)
    assert found["events"][0]["peer"] == "b"
    assert found["result"]["together"]["top1"] == 0.82


def test_settings_of_peers_that_differ_from_the_defaults():
    made = json.loads(json.dumps(to_dict(peer_job(**{"peers.a.training": {"lr": 0.2}}))))
    found = dict(changed_settings(made))
    assert found["peers.a.training.lr"] == 0.2
    assert found["peers.b.model"] == "digits_cnn"
    assert "peers.b.actor" not in found


def test_the_terminal_follows_peers_and_their_baseline(tmp_path):
    clock, screen, out = Clock(), console(), console()
    terminal = Terminal(screen, out=out, clock=clock)
    terminal.begin("baseline", peer_job(), tmp_path / "baseline", 60)
    terminal.end("baseline", tmp_path / "baseline", peers_result(False))
    terminal.begin("", peer_job(), tmp_path, 60)
    for number in range(1, 22):
        for name in PEERS:
            append(tmp_path, name, peer_step(number))
        clock.now += 1.0
        terminal.poll()
    terminal.end("", tmp_path, peers_result())
    text = screen.file.getvalue()
    assert "peers alone: finished, eval top-1 a 70.00 %, c 80.00 %" in text
    assert [line.split(" · ")[3] for line in text.splitlines() if " · step " in line] == [
        "step 10/60",
        "step 20/60",
        "step 21/60",
    ]
    closing = out.file.getvalue()
    for wanted in ("peer c together", "Exchange among the peers", "warning: Peer b was lost at step 29"):
        assert wanted in closing, wanted


def test_a_terminal_gets_one_live_line_for_all(tmp_path):
    clock, screen = Clock(), console(terminal=True)
    with Terminal(screen, clock=clock) as terminal:
        terminal.begin("", peer_job(), tmp_path, 60)
        for name in PEERS:
            append(tmp_path, name, peer_step(1))
        terminal.poll()
    assert "step 1/60" in screen.file.getvalue()
    assert screen.file.getvalue().count("\x1b[?25l") == 1


def test_write_page_says_no_network(tmp_path):
    assert "http" not in write_page(make_peers(tmp_path / "run", peers_result())).read_text()


def test_a_peer_that_nobody_heard_is_told_by_its_own_note(tmp_path):
    watch = PeersWatch("", peer_job(), tmp_path, 60)
    append(tmp_path, "b", peer_step(1))
    (tmp_path / "peers" / "b" / "dropped.json").write_text('{"step": 7}')
    assert texts(watch, "warn") == ["mutual: peer b is lost after its step 7; the others went on without it"]
    append(tmp_path, "a", {"kind": "dropped", "step": 8, "peers": ["b"]})
    assert texts(watch, "warn") == []
    assert runs.load(tmp_path).events == [{"kind": "dropped", "peer": "b", "step": 8, "by": ["a"]}]


def test_very_many_edges_are_summed_by_learner():
    names = [f"p{i}" for i in range(7)]
    edge = {"messages": 61, "bytes_in": 61 * 320, "wait_s": 0.015, "stale_steps": 0, "stalest": 0}
    found = {"peers": {n: student(0.7) | {"steps_this_time": 60} for n in names}}
    found["edges"] = {f"{a}>{b}": edge for b in names for a in names if a != b}
    rows = peer_tables.edges(found)
    assert len(rows) == 7
    assert rows[0] == ("p0 from 6 peers", "366", "320 B", "1.9 kB", "117.1 kB", "0.1 s", "6.0 %", "0")
