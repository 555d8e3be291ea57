"""What `raykd list` and `raykd show <method>` print. Methods and signals are read without importing torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from raykd import catalogue, signals
from raykd.catalogue import Method
from raykd.errors import ConfigError, near
from raykd.report.console import print_table
from raykd.report.words import plain

KINDS = ("methods", "models", "recipes", "signals", "aggregators")
BASE_SIGNALS = {
    "logits": "class scores, [b c]",
    "embedding": "pooled input of the classifier, [b d]",
    "feature": "output of a layer of the job's choice, [b c h w] or [b l d]",
    "input_grad": "gradient with respect to the images",
}
WHOM = {
    "teacher": "each teacher in turn, or each peer in a job without teachers",
    "teachers": "all teachers at once, or all peers it hears in a job without teachers",
    "peer": "each neighbouring peer in turn",
    "peers": "all neighbouring peers at once",
    "ema": "its own averaged copy",
    "previous": "itself at an earlier step",
}
ELSEWHERE = "Also timm:<name>, torchvision:<name>, wrn_<depth>_<width> and your own package.module:factory."


def listing(kind: str, section: str | None = None) -> dict[str, Any]:
    """One catalogue as plain data: {kind: [...]}."""
    if section is not None and kind != "methods":
        raise ConfigError(f"--section {section}: only methods have sections, not {kind}.")
    if kind == "methods":
        return {"methods": [method_data(m) for m in _section(section)]}
    if kind == "models":
        from raykd import models

        return {"models": list(models.names()), "also": ELSEWHERE}
    if kind == "recipes":
        from raykd.resolve import RECIPES

        return {"recipes": {name: plain(settings) for name, settings in RECIPES.items()}}
    if kind == "aggregators":
        return {"aggregators": _aggregators()}
    return {"signals": _signals(), "roles": list(signals.ROLES), "other_parameters": list(signals.PLAIN_NAMES)}


def print_listing(console: Console, kind: str, found: Mapping[str, Any]) -> None:
    """Prints what `listing` found."""
    if kind == "methods":
        head = ("method", "section", "folder", "scheme", "signals", "options", "paper")
        body = [
            (m["slug"], m["section"], m["folder"], _scheme(m), _lines(m["signals"]), _options(m), _short(m["paper"]))
            for m in found["methods"]
        ]
        print_table(console, head, body)
        console.print(Text(f"{len(body)} methods. `raykd show <method>` says more; your own: package.module:my_loss."))
    elif kind == "models":
        console.print(Text(", ".join(found["models"])))
        console.print(Text(found["also"]))
    elif kind == "recipes":
        names = list(found["recipes"])
        settings = list(dict.fromkeys(s for r in found["recipes"].values() for s in r))
        body = [(s, *(str(found["recipes"][n].get(s, "-")) for n in names)) for s in settings]
        print_table(console, ("training.*", *names), body)
    elif kind == "aggregators":
        body = [(a["name"], _lines(a["reads"]), a["about"]) for a in found["aggregators"]]
        print_table(console, ("aggregator", "reads beside logits", "what"), body)
        console.print(Text('Loss("kd", aggregate="mean_probs") hears several teachers as one. docs/many-teachers.md'))
    else:
        body = [(s["name"], s["parent"] or "-", _lines(s["options"]) or "-", s["about"]) for s in found["signals"]]
        print_table(console, ("signal", "derived from", "options", "what"), body)
        console.print(Text(f"A loss asks for <role>_<signal>[s][_<view|head>] with a role of {', '.join(found['roles'])},"))
        console.print(Text(f"or for {', '.join(found['other_parameters'])}."))


def method_data(method: Method) -> dict[str, Any]:
    """A method as plain data."""
    return {
        "slug": method.slug,
        "name": method.name,
        "section": method.section,
        "folder": method.path.parent.name,
        "scheme": method.scheme,
        "signals": list(method.parameters),
        "options": {name: _option(option) for name, option in method.options.items()},
        "roles": [role for role in signals.ROLES if role in method.roles],
        "branching": plain(dict(method.branching)),
        "layers": list(method.layers),
        "trains": method.trains,
        "hooks": list(method.hooks),
        "paper": method.paper,
        "file": str(method.path),
    }


def method_page(method: Method) -> dict[str, Any]:
    """A method as plain data, with the docstring of its loss and its module's first line."""
    tree = ast.parse(method.path.read_text())
    named = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    node = named.get(method.attribute)
    doc = (ast.get_docstring(node) if node is not None else None) or ast.get_docstring(tree) or ""
    return method_data(method) | {"summary": (ast.get_docstring(tree) or doc).split("\n")[0], "doc": doc}


def print_method(console: Console, page: Mapping[str, Any]) -> None:
    """Prints a method's page."""
    console.print(Text(f"{page['slug']} ({page['name']}): section {page['section']}, {page['scheme']}", style="bold"))
    console.print(Text(page["summary"]))
    facts = {
        "paper": page["paper"],
        "signals": ", ".join(page["signals"]),
        "learns from": _teachers(page),
        "branches": branching_words(page["branching"]) or "none",
        "layers": ", ".join(page["layers"]) or "none",
        "trains or remembers": "yes, see its Module" if page["trains"] else "nothing beside the student",
        "hooks": ", ".join(page["hooks"]) or "none",
        "file": page["file"],
    }
    for name, value in facts.items():
        console.print(Text(f"{name}: {value}"), soft_wrap=True)
    body = [(n, o["type"] or "-", "required" if o["required"] else repr(o["default"])) for n, o in page["options"].items()]
    if body:
        print_table(console, ("option", "type", "default"), body, "Options: losses.<name>.<option>")
    console.print(Text(page["doc"]))


def branching_words(branching: Mapping[str, Any]) -> str:
    """How a model has several branches, short: `split in 3 after stage1`; empty where it has one."""
    kind, at = branching.get("kind"), branching.get("at")
    own = ", each on its own view" if branching.get("views") == "own" else ""
    places = at if isinstance(at, str) or at is None else ", ".join(at)
    if kind == "split":
        return f"split in {branching.get('count') or 2}" + (f" after {places}" if places else "") + own
    if kind == "exits":
        after = {None: "the hidden stages", "hidden": "the hidden stages", "stages": "all stages"}.get(places, places)
        outputs = f" of {branching['classes']} outputs a class" if branching.get("classes", 1) > 1 else ""
        return f"exits after {after}{outputs}{own}"
    if kind == "widths":
        return f"{branching.get('count') or 2} widths, {branching.get('least', 0.25):g} to 1{own}"
    return f"head of {branching.get('outputs', 128)} axes{own}" if kind == "heads" else ""


def _scheme(method: Mapping[str, Any]) -> str:
    kind = method["branching"].get("kind")
    return f"{method['scheme']}, {kind}" if kind else str(method["scheme"])


def _teachers(method: Mapping[str, Any]) -> str:
    """Whom a method's loss listens to, in words."""
    found = [WHOM[role] for role in method["roles"] if role in WHOM]
    nobody = "the branches of its own model" if method["branching"] else "nobody else"
    return "; ".join(found) or nobody


def _section(section: str | None) -> list[Method]:
    methods = list(catalogue.methods().values())
    if section is None:
        return methods
    found = [m for m in methods if m.path.parent.name == section or f"{m.section}.".startswith(f"{section.rstrip('.')}.")]
    if not found:
        known = sorted({m.section for m in methods} | {m.path.parent.name for m in methods})
        raise ConfigError(f"--section {section}: no method in it. {near(section, known)}")
    return found


def _aggregators() -> list[dict[str, Any]]:
    tree = ast.parse((catalogue.PACKAGE / "parts" / "aggregators.py").read_text())
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.args.args and n.args.args[0].arg == "logits"]
    return [
        {
            "name": n.name,
            "reads": [a.arg for a in (*n.args.args[1:], *n.args.kwonlyargs)],
            "about": (ast.get_docstring(n) or "").split("\n")[0],
        }
        for n in functions
        if not n.name.startswith("_")
    ]


def _signals() -> list[dict[str, Any]]:
    tree = ast.parse((catalogue.PACKAGE / "parts" / "derived.py").read_text())
    docs = {n.name: (ast.get_docstring(n) or "").split("\n")[0] for n in tree.body if isinstance(n, ast.FunctionDef)}
    found: list[dict[str, Any]] = [
        {"name": n, "parent": None, "options": [], "per_batch": False, "about": BASE_SIGNALS.get(n, "")}
        for n in signals.BASE_KINDS
    ]
    for name, derived in catalogue.derived().items():
        about = docs.get(name, "")
        found.append(
            {
                "name": name,
                "parent": derived.parent,
                "options": list(derived.options),
                "per_batch": derived.per_batch,
                "about": about,
            }
        )
    return found


def _option(option: catalogue.Option) -> dict[str, Any]:
    required = option.default is catalogue.REQUIRED
    return {"type": option.annotation, "required": required, "default": None if required else plain(option.default)}


def _options(method: Mapping[str, Any]) -> str:
    return _lines([f"{n} (required)" if o["required"] else f"{n}={o['default']}" for n, o in method["options"].items()])


def _short(paper: str) -> str:
    """The arXiv number of a reference, or all of it where it has none."""
    found = re.search(r"arXiv:[\w./-]+", paper)
    return found[0].rstrip(".") if found else paper


def _lines(words: list[str]) -> str:
    return ", ".join(words)
