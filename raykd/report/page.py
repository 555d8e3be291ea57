"""report.html: one self-contained page a run. Plots are inlined; no scripts, no network."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from raykd.report import peer_plots, peer_tables, plots, runs, tables, words
from raykd.report.follow import wait_share

CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #222; background: #fff;
       max-width: 1080px; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.lead { margin: .2rem 0 1.4rem; color: #555; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: #555; border-bottom: 2px solid #ccc; }
th, td { padding: .4rem .8rem .4rem 0; vertical-align: top; } td { border-bottom: 1px solid #eee; }
tr.main td { font-weight: 600; } td:last-child, .note { color: #555; font-size: .9em; }
.flag { background: #fff4e5; border-left: 4px solid #e69f00; padding: .6rem .9rem; margin: .8rem 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem; }
.plots img { width: 100%; border: 1px solid #eee; border-radius: 6px; }
details { margin: .6rem 0; } summary { cursor: pointer; color: #0072b2; }
pre { background: #f7f7f7; padding: .9rem; border-radius: 6px; overflow-x: auto; font-size: .85em; }
.made { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1.6rem; align-items: start; }
.made figure { margin: 0; } .made img { width: 100%; image-rendering: pixelated; } .made td, .made th { padding-top: .2rem;
       padding-bottom: .2rem; }
.earlier { display: grid; grid-template-columns: repeat(3, 1fr); gap: .8rem; margin-top: .8rem; }
figcaption { color: #555; font-size: .9em; }
.scroll { overflow-x: auto; } code { font-size: .92em; }
"""
LARGE, SMALL = 1024, 320  # px, of a grid of images
EARLIER = 3  # grids shown beside the last
ALL_CLASSES = 20  # up to so many, those that no image is of are told too
CAPTIONS = {
    "loss": "Loss terms by step",
    "accuracy": "Top-1 on the eval split by epoch",
    "rate": "Learning rate by step",
    "wait": "Share of the step time spent waiting for teachers",
    "branches": "Top-1 of each branch on the eval split by epoch",
    "peers_loss": "Loss of each peer by step",
    "peers_accuracy": "Top-1 of each peer on the eval split by epoch",
    "peers_rate": "Learning rate of each peer by step",
    "peers_wait": "Share of the step time that each peer spent waiting for peers",
}


def write_page(folder: Path) -> Path:
    """Writes <folder>/report.html and <folder>/plots/, from what the run folder holds; an unfinished run gets a page too.

    Returns:
        The page's path.

    Raises:
        ConfigError: this is no run folder.
    """
    run = runs.load(folder)
    text = _document(run, peer_plots.plots(run) if run.peers else plots.plots(folder))
    path = folder / "report.html"
    part = folder / f".report.{os.getpid()}"
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path


def _document(run: runs.Run, pictures: Sequence[Path]) -> str:
    name = str((run.result or run.job).get("name") or run.folder.name)
    result = run.result or {}
    parts = [f"<h1>{_escape(name)}</h1>", f'<p class="lead">{_escape(_lead(run))}</p>']
    parts += [f'<div class="flag">{_escape(flag)}</div>' for flag in tables.flags(result)]
    if run.result is not None:
        parts += _accuracies(result)
    parts += ["<h2>Curves</h2>", *_curves(run, pictures), *_images(run), *_exchange(run, result)]
    traffic = tables.exchange(result, runs.images_per_request(run))
    if traffic:
        wait = f"Waiting for teachers took {words.percent(wait_share(run.steps), 1)} of the step time. "
        note = f"{wait}Bytes a sample: signals received, protocol left out; counts since the last resume. Measured here."
        parts += ["<h2>Exchange with the teachers</h2>", _table(tables.EXCHANGE_HEAD, traffic), f'<p class="note">{note}</p>']
    parts += _settings(run.job)
    if run.result is not None:
        parts += ["<h2>Where this comes from</h2>", _table(("", ""), list(tables.origin(result).items()), head_row=False)]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f"<title>{_escape(name)}</title>\n<style>{CSS}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _lead(run: runs.Run) -> str:
    if run.result is None and run.peers:
        done = ", ".join(f"{name} {peer.steps[-1]['step'] if peer.steps else 0:,}" for name, peer in run.peers.items())
        return f"Not finished: steps recorded: {done}."
    if run.result is None:
        steps = run.steps[-1]["step"] if run.steps else 0
        return f"Not finished: {steps:,} steps recorded."
    found = tables.origin(run.result)
    return ", ".join(f"{name} {found[name]}" for name in ("started", "took", "seed", "commit") if name in found)


def _accuracies(result: tables.Result) -> list[str]:
    rows = tables.rows(result)
    last = len(rows) - 1
    parts = ["<h2>Accuracy</h2>", _table(tables.HEAD, [row.cells() for row in rows], strong=last)]
    parts += [f"<p>{_escape(text)}</p>" for text in tables.comparisons(result)]
    note = (
        "Top-1 / top-5 in per cent. Best is the best epoch on the eval split, chosen after the fact; last is what training "
        "ended with. Epochs are counted from 1 here, from 0 in the files. The last column says where each number comes from."
    )
    parts.append(f'<p class="note">{note}</p>')
    several = peer_tables.branches(result)
    if several:
        note = "Branch 0 is the plain model, which is exported; the ensemble is the mean of the probabilities. Measured here."
        parts += ["<h2>Branches</h2>", _table(peer_tables.BRANCHES, several), f'<p class="note">{note}</p>']
    return parts


def _exchange(run: runs.Run, result: tables.Result) -> list[str]:
    """Peers: what travelled, who was lost and who came back."""
    parts, rows = [], peer_tables.edges(result)
    if rows:
        note = f"{peer_tables.EDGES_NOTE} Measured here."
        parts += ["<h2>Exchange among the peers</h2>", _table(peer_tables.EDGES, rows), f'<p class="note">{note}</p>']
    if run.events:
        lines = "".join(f"<li>{_escape(peer_tables.event_text(event))}</li>" for event in run.events)
        parts += ["<h2>Lost and back</h2>", f"<ul>{lines}</ul>"]
    return parts


def _curves(run: runs.Run, pictures: Sequence[Path]) -> list[str]:
    if not pictures:
        return ['<p class="note">Nothing was recorded.</p>']
    images = []
    for path in pictures:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        images.append(f'<img alt="{CAPTIONS[path.stem]}" src="data:image/png;base64,{data}">')
    evaluated = run.evals or any(peer.evals for peer in run.peers.values())
    missing = [] if evaluated else ['<p class="note">No evaluation was recorded: the job has no eval split.</p>']
    told = runs.all_curve_lines(run) if run.peers else [" ".join(runs.all_curve_lines(run))]
    lines = [f'<p class="note">{_escape(line)} Measured here.</p>' for line in told]
    return [f'<div class="plots">{"".join(images)}</div>', *missing, *lines]


def _images(run: runs.Run) -> list[str]:
    """The grids of a run that makes its images: the last, some before it, and what teachers see in the last."""
    grids = [shown for shown in run.shown if _is_whole(run.folder / shown["file"])]
    if not grids:
        return []
    last, counts = grids[-1], words.seen(grids[-1])
    told = [c for c in range(len(counts)) if counts[c] or len(counts) <= ALL_CLASSES]
    rows = [(str(c), f"{counts[c]}", _share(last["confidences"][c])) for c in told]
    note = "Counts are of the classes that teachers see in the last images; confidence is how sure they are, 1 at most."
    note += f" Classes without an image: {len(counts) - len(told)}." if len(told) < len(counts) else ""
    if "batches" in last:
        note += f" The bank: {last['batches']} batches of {last['made']} made; {last['stale']} came too late"
        note += f", {last['damaged']} damaged on disk." if last.get("damaged") else "."
    before = [grids[i] for i in sorted({round(k * (len(grids) - 1) / EARLIER) for k in range(EARLIER)}) if i < len(grids) - 1]
    small = "".join(_grid(run, shown, SMALL) for shown in before)
    left = _grid(run, last, LARGE) + (f'<div class="earlier">{small}</div>' if before else "")
    right = (_table(("class", "images", "confidence"), rows) if rows else "") + f'<p class="note">{note} Measured here.</p>'
    return ["<h2>Images made</h2>", f'<div class="made"><div>{left}</div><div>{right}</div></div>']


def _grid(run: runs.Run, shown: Mapping[str, Any], width: int) -> str:
    """A grid, no wider than so many pixels, and what is to be seen."""
    kept = io.BytesIO()
    with Image.open(run.folder / shown["file"]) as grid:
        grid.thumbnail((width, 16 * width))
        grid.save(kept, "PNG")
    epoch = f"Epoch {shown['epoch'] + 1}"
    text = f"{epoch}: {words.images(shown)}" if width == LARGE else epoch
    data = base64.b64encode(kept.getvalue()).decode("ascii")
    alt = f"Images made, {epoch.lower()}"
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{_escape(text)}</figcaption></figure>'


def _is_whole(picture: Path) -> bool:
    try:
        with Image.open(picture) as found:
            found.verify()
    except (OSError, SyntaxError):  # PIL calls a broken PNG so
        return False
    return True


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _settings(job: Mapping[str, Any]) -> list[str]:
    if not job:
        return []
    changed = [(path, json.dumps(value)) for path, value in changed_settings(job)]
    return [
        "<h2>Settings</h2>",
        f"<details open><summary>What differs from the defaults ({len(changed)})</summary>",
        _table(("setting", "value"), changed),
        "</details>",
        "<details><summary>The whole job, resolved (job.json)</summary>",
        f"<pre>{_escape(json.dumps(job, indent=2))}</pre></details>",
    ]


def changed_settings(job: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(path, value) of every setting of a job.json that is not the default; of teachers and peers, against theirs."""
    from raykd.config import Job, Peer, Teacher
    from raykd.resolve import to_dict

    plain = json.loads(json.dumps(to_dict(Job())))
    default = dict(words.flatten(plain))
    defaults = {
        room: dict(words.flatten(json.loads(json.dumps(to_dict(kind))), "*"))
        for room, kind in (("teachers", Teacher()), ("peers", Peer()))
    }
    found = []
    for path, value in words.flatten(job):
        head, _, rest = path.partition(".")
        of, place = (defaults[head], f"*.{rest.partition('.')[2]}") if head in defaults else (default, path)
        known, wanted = path in default or place in of, of.get(place)
        if not path.startswith("stages.") and not (known and wanted == value) and value != {}:
            found.append((path, value))
    return found


def _table(head: Sequence[str], body: Sequence[Sequence[str]], strong: int = -1, head_row: bool = True) -> str:
    top = "<tr>" + "".join(f"<th>{_escape(name)}</th>" for name in head) + "</tr>" if head_row else ""
    lines = []
    for place, row in enumerate(body):
        mark = ' class="main"' if place == strong else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>")
    return f'<div class="scroll"><table>{top}{"".join(lines)}</table></div>'


def _escape(text: Any) -> str:
    return html.escape(str(text))
