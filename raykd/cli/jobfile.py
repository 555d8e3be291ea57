"""A job out of a file: `jobs/kd.py`, `jobs/kd.py:make`, `runs/kd-001/job.json` or the run folder itself.

A job file is Python with a function `job` (or a single other one) that returns a `raykd.Job`. Its keyword arguments with
defaults can be given from outside. The working directory and the parent of the file's folder are put on sys.path, so that the
user's own modules import. Every mistake in such a file is one clear line: file, line, what.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from raykd import config, resolve
from raykd.config import Job
from raykd.errors import ConfigError, RaykdError, near

DEFAULT = "job"
_WORDS = {"true": True, "false": False, "none": None}


def load(spec: str, arguments: Mapping[str, str] | None = None) -> Job:
    """The job that `FILE[:function]` names; types of its settings are not checked yet.

    Args:
        spec: a Python file, with or without `:function`; a job.json; a run folder.
        arguments: keyword arguments of the function, as text.

    Raises:
        ConfigError: no such file or function, a mistake in the file, an argument the function does not take.
    """
    path, function = split_spec(spec)
    find_modules(path)
    if path.is_dir():
        if not (path / "job.json").is_file():
            raise ConfigError(
                f"Folder {path}: expected a run folder with a job.json, got none. Name a job file or a run folder."
            )
        path = path / "job.json"
    elif not path.is_file():
        raise ConfigError(f"Job file {path}: no such file. {near_files(path)}")
    if path.suffix != ".py":
        if function or arguments:
            raise ConfigError(f"Job file {path}: holds a finished job; functions and --arg go with Python files. Use --set.")
        return resolve.read(path)
    return _call(path, _function(path, import_file(path), function), arguments or {})


def parse_arguments(pairs: list[str]) -> dict[str, str]:
    """`["temperature=2"]` -> `{"temperature": "2"}`.

    Raises:
        ConfigError: an entry is not `name=value`.
    """
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(f"--arg {pair}: expected name=value, for example --arg temperature=2.")
    return dict(pair.split("=", 1) for pair in pairs)


def split_spec(spec: str) -> tuple[Path, str | None]:
    """`FILE[:function]` as its two parts."""
    file, colon, function = spec.rpartition(":")
    if colon and (file.endswith(".py") or function.isidentifier()) and not Path(spec).exists():
        return Path(file), function
    return Path(spec), None


def find_modules(path: Path) -> None:
    """Makes the user's modules importable: those of the working directory and of the job folder's parent."""
    for folder in (path.absolute().parent.parent, Path.cwd()):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def near_files(path: Path) -> str:
    """A hint for a file that is not there."""
    if not path.parent.is_dir():
        return f"There is no folder {path.parent} either."
    known = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".py", ".json") or (p / "job.json").is_file())
    return near(path.name, known) if known else f"Folder {path.parent} holds no job files."


def import_file(path: Path) -> ModuleType:
    """Imports a Python file by its path.

    Raises:
        ConfigError: it cannot be imported; says where.
    """
    name = f"raykd_job_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}:{error.lineno}: {error.msg}: {(error.text or '').strip()!r}.") from None
    except Exception as error:
        raise ConfigError(place_of(path, error)) from error
    return module


def _function(path: Path, module: ModuleType, name: str | None) -> Callable[..., Any]:
    public = {
        n: f
        for n, f in vars(module).items()
        if inspect.isfunction(f) and f.__module__ == module.__name__ and not n.startswith("_")
    }
    if name is not None:
        if name not in public:
            raise ConfigError(f"{path}: no function {name!r}. {near(name, public)}")
        return public[name]
    if DEFAULT in public:
        return public[DEFAULT]
    returning = {n: f for n, f in public.items() if _returns_job(f)} or public
    if len(returning) == 1:
        return next(iter(returning.values()))
    if not returning:
        raise ConfigError(f"{path}: no function that returns a job. Write `def job() -> raykd.Job: return raykd.Job(...)`.")
    raise ConfigError(
        f"{path}: several functions may return the job: {', '.join(returning)}. Name one: {path}:{next(iter(returning))}."
    )


def _returns_job(function: Callable[..., Any]) -> bool:
    annotation = function.__annotations__.get("return")
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return name.rsplit(".", 1)[-1] == "Job"


def _call(path: Path, function: Callable[..., Any], arguments: Mapping[str, str]) -> Job:
    where = f"{path}:{function.__name__}"
    values = _arguments(where, function, arguments)
    try:
        found = function(**values)
    except Exception as error:
        raise ConfigError(place_of(path, error)) from error
    if not isinstance(found, Job):
        raise ConfigError(f"{where}: expected a raykd.Job, got {type(found).__name__}. End it with `return raykd.Job(...)`.")
    return found


def _arguments(where: str, function: Callable[..., Any], given: Mapping[str, str]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
    for name in given:
        if name not in named and not takes_all:
            hint = near(name, named) if named else "It takes none."
            raise ConfigError(f"--arg {name}: {where} has no such argument. {hint}")
    missing = [n for n, p in named.items() if p.default is p.empty and n not in given]
    if missing:
        raise ConfigError(f"{where}: needs {', '.join(missing)}. Give --arg {missing[0]}=<value>.")
    return {name: _value(name, text, named.get(name)) for name, text in given.items()}


def _value(name: str, text: str, parameter: inspect.Parameter | None) -> Any:
    """The text as the type of the default; as JSON where that parses and the default says nothing."""
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    if isinstance(default, str):
        return text
    value = _literal(text)
    if default is None:
        return value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(value)
    if isinstance(default, Path) and isinstance(value, str):
        return Path(value)
    if value is not None and not (type(value) is type(default) or (isinstance(default, Mapping) and isinstance(value, dict))):
        raise ConfigError(f"--arg {name}: expected {type(default).__name__} like the default {default!r}, got {text!r}.")
    return value


def _literal(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def place_of(path: Path, error: Exception) -> str:
    """`jobs/kd.py:12: NameError: ...`, at the innermost line of the user's file."""
    lines = [
        f.lineno
        for f in traceback.extract_tb(error.__traceback__)
        if Path(f.filename) == path.absolute() or f.filename == str(path)
    ]
    place = f"{path}:{lines[-1]}" if lines else str(path)
    kind = "" if isinstance(error, RaykdError) else f"{type(error).__name__}: "
    text = str(error)
    return f"{place}: {kind}{text}{'' if text.endswith('.') else '.'}{_near_keyword(text)}"


def _near_keyword(text: str) -> str:
    """A hint for a setting that does not exist: `Job.__init__() got an unexpected keyword argument 'nme'`."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    kind = getattr(config, found[1], None) if found else None
    if found is None or not inspect.isclass(kind):
        return ""
    return " " + near(found[2], [n for n in inspect.signature(kind).parameters if n != "self"])
