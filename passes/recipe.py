"""Recipes: ordered passes with parameters, as TOML or JSON files, read with every mistake named.

A recipe file::

    weights = "plan.safetensors"          # optional: trained heads, relative to the recipe's own folder

    [[pass]]
    name = "fold_batch_norm"

    [[pass]]
    name = "insert_exits"
    sites = ["relu_3", "relu_5"]
    [pass.heads]
    relu_3 = "conv:1x32/avg/s2"
    relu_5 = "none/avg"
    [pass.thresholds]
    relu_3 = 0.9
    relu_5 = "never"

Tunables that are left out are free: a search chooses them; ``apply`` takes their default, and complains about those
that have none.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import tomli_w

from eexform.errors import OptionError, need, suggest
from eexform.files import write_bytes
from eexform.ir.graph import Graph
from eexform.passes._contract import Pass, PassContext, plain_value
from eexform.passes._pipeline import Pipeline
from eexform.passes._plan_store import PlanStore
from eexform.passes._registry import get, make
from eexform.tunables import Domain, missing_parameters, tunable_fields

_KEYS = ("pass", "weights")


@dataclass(frozen=True)
class Step:
    """One pass of a recipe and the parameters it is given; the others are free or at their defaults."""

    name: str
    given: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "given", get(self.name).checked(self.given))

    @property
    def cls(self) -> type[Pass]:
        return get(self.name)

    def free(self) -> tuple[str, ...]:
        """Tunables that are not given: what a search may choose."""
        return tuple(name for name in tunable_fields(self.cls) if name not in self.given)

    def unbound(self) -> tuple[str, ...]:
        """Parameters without a default that are not given."""
        return missing_parameters(self.cls, self.given)

    def space(self, graph: Graph, context: PassContext) -> dict[str, Domain]:
        """Domain of every free tunable on ``graph``."""
        free = self.free()
        return {name: domain for name, domain in self.cls.space(graph, context).items() if name in free}

    def bind(self, **chosen: Any) -> Step:
        """This step with more parameters given."""
        return Step(self.name, {**self.given, **chosen})

    def make(self) -> Pass:
        """The pass; raises ``OptionError`` where a required parameter is missing."""
        return make(self.name, **self.given)


@dataclass(frozen=True)
class Recipe:
    """An ordered list of passes: what a search optimises and what ``apply`` replays.

    Attributes:
        steps: the passes.
        weights: file with trained heads, relative to ``folder``; ``None`` where no pass needs any.
        folder: where the recipe was read from; ``None`` for one that is not a file.
    """

    steps: tuple[Step, ...]
    weights: str | None = None
    folder: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.weights is not None:
            _inside(self.weights)

    @classmethod
    def of(cls, passes: Sequence[Pass], weights: str | None = None) -> Recipe:
        """The recipe that replays ``passes``."""
        return cls(tuple(Step(step.name, step.to_plain()) for step in _flat(passes)), weights)

    @classmethod
    def parse(cls, plain: Mapping[str, Any], *, folder: Path | None = None, where: str = "recipe") -> Recipe:
        """Read a recipe from plain values, e.g. parsed TOML.

        Raises:
            OptionError: not a recipe, or a pass, parameter or value in it is not valid; says which.
        """
        need(isinstance(plain, Mapping), f"{where}: expected a table, found {plain!r}", OptionError)
        for key in plain:
            need(key in _KEYS, f"{where}: {key!r} is not a key of a recipe: {suggest(key, _KEYS)}", OptionError)
        entries = plain.get("pass", [])
        need(isinstance(entries, list), f"{where}: 'pass' must be a list of tables ([[pass]])", OptionError)
        weights = plain.get("weights")
        need(weights is None or isinstance(weights, str), f"{where}: 'weights' must be a file name", OptionError)
        steps = []
        for place, entry in enumerate(entries):
            named = isinstance(entry, Mapping) and isinstance(entry.get("name"), str)
            need(named, f'{where}: pass {place + 1} has no name (name = "fold_batch_norm")', OptionError)
            given = {key: value for key, value in entry.items() if key != "name"}
            try:
                steps.append(Step(entry["name"], given))
            except OptionError as error:
                raise OptionError(f"{where}: pass {place + 1}: {error}") from error
        return cls(tuple(steps), weights, folder)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a ``.toml`` or ``.json`` file.

        Raises:
            OptionError: missing, not TOML/JSON, or not a recipe; says where.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise OptionError(f"{path}: the recipe cannot be read: no such file") from error
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"{path}: the recipe cannot be read: {error}") from error
        try:
            plain = json.loads(text) if _suffix(path) == ".json" else tomllib.loads(text)
        except ValueError as error:
            raise OptionError(f"{path}: not valid {_suffix(path)[1:].upper()}: {error}") from error
        return cls.parse(plain, folder=path.parent, where=path.name)

    def save(self, path: str | Path) -> None:
        """Write as TOML or JSON, by the file's suffix, whole or not at all."""
        path = Path(path)
        plain = self.to_plain()
        if _suffix(path) == ".toml":
            text = tomli_w.dumps(plain)
        else:
            try:
                text = json.dumps(plain, indent=2, allow_nan=False) + "\n"
            except ValueError as error:
                raise OptionError(f"{path}: JSON holds no infinite numbers; write a .toml recipe") from error
        write_bytes(path, text.encode())

    def to_plain(self) -> dict[str, Any]:
        """Plain values, as in the file."""
        plain: dict[str, Any] = {} if self.weights is None else {"weights": self.weights}
        plain["pass"] = [{"name": step.name, **plain_value(_spelled(step))} for step in self.steps]
        return plain

    def unbound(self) -> tuple[tuple[str, str], ...]:
        """(pass, parameter) pairs that have no value and no default."""
        return tuple((step.name, name) for step in self.steps for name in step.unbound())

    def passes(self) -> list[Pass]:
        """The passes, every parameter bound.

        Raises:
            OptionError: parameters are missing; lists them all.
        """
        absent = [f"{name}.{missing}" for name, missing in self.unbound()]
        if absent:
            raise OptionError(
                "the recipe leaves parameters without a value: " + ", ".join(absent) + "; "
                "give them in the file, or let `eexform search` choose them"
            )
        return [step.make() for step in self.steps]

    def pipeline(self) -> Pipeline:
        """The passes as one."""
        return Pipeline(self.passes())

    def store(self) -> PlanStore | None:
        """The trained heads beside the recipe; ``None`` where it names none.

        Raises:
            OptionError: the file is missing or is no plan's weights.
        """
        if self.weights is None:
            return None
        return PlanStore.load((self.folder or Path()) / self.weights)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file (see :meth:`Recipe.load`)."""
    return Recipe.load(path)


def parse_recipe(source: str | Path | Mapping[str, Any]) -> list[Pass]:
    """The passes of a recipe file or of plain values, every parameter bound."""
    return (Recipe.parse(source) if isinstance(source, Mapping) else Recipe.load(source)).passes()


def _spelled(step: Step) -> Mapping[str, Any]:
    """The given parameters as the pass itself writes them (it may know better names for some values)."""
    if step.unbound():
        return step.given
    written = step.make().to_plain()
    return {name: written.get(name, value) for name, value in step.given.items()}


def _flat(passes: Sequence[Pass]) -> Iterator[Pass]:
    for step in passes:
        if isinstance(step, Pipeline):
            yield from _flat(step.steps)
        else:
            yield step


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    need(suffix in (".toml", ".json"), f"{path}: a recipe is a .toml or a .json file", OptionError)
    return suffix


def _inside(name: str) -> None:
    """Refuse a weights path that leads out of the recipe's folder, on any system."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    escapes = posix.is_absolute() or windows.drive or windows.root or ".." in posix.parts or ".." in windows.parts
    need(bool(name) and not escapes, f"weights {name!r} must be a file inside the recipe's folder", OptionError)
