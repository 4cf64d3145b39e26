"""Domains: what a parameter may be, and how a search samples, mutates and crosses it.

A pass declares its parameters as dataclass fields; a field made with :func:`tunable` carries a domain. From the domains
come the genome, validation, command-line help and documentation. A domain may depend on the graph: a field's domain is
either a :class:`Domain` or a function ``graph -> Domain``.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eexform.errors import OptionError, suggest

Rng = np.random.Generator
_META = "eexform.tunable"


class Domain(ABC):
    """The set of values of one parameter."""

    @abstractmethod
    def sample(self, rng: Rng) -> Any:
        """A value drawn from the domain."""

    @abstractmethod
    def mutate(self, value: Any, rng: Rng) -> Any:
        """A neighbour of ``value``."""

    def cross(self, left: Any, right: Any, rng: Rng) -> tuple[Any, Any]:
        """Two children of two values (uniform exchange unless a domain knows better)."""
        return (left, right) if rng.random() < 0.5 else (right, left)

    @abstractmethod
    def validate(self, value: Any, name: str) -> Any:
        """``value`` in canonical form.

        Raises:
            OptionError: not in the domain; ``name`` says which parameter.
        """

    @abstractmethod
    def describe(self) -> str:
        """One line for help and listings."""


@dataclass(frozen=True)
class Choice(Domain):
    """One of a few values, in no order."""

    values: tuple[Any, ...]

    def __init__(self, values: Sequence[Any]) -> None:
        if not values:
            raise OptionError("Choice needs at least one value")
        object.__setattr__(self, "values", tuple(values))

    def sample(self, rng: Rng) -> Any:
        return self.values[int(rng.integers(len(self.values)))]

    def mutate(self, value: Any, rng: Rng) -> Any:
        others = [other for other in self.values if other != value]
        return others[int(rng.integers(len(others)))] if others else value

    def validate(self, value: Any, name: str) -> Any:
        if value not in self.values:
            raise OptionError(f"{name}: {value!r} is not a choice: {suggest(str(value), map(str, self.values))}")
        return self.values[self.values.index(value)]

    def describe(self) -> str:
        shown = [str(value) for value in self.values[:8]]
        return "one of {" + ", ".join(shown) + (", ..." if len(self.values) > 8 else "") + "}"


@dataclass(frozen=True)
class Integer(Domain):
    """Whole numbers ``low..high``, both included, ``step`` apart."""

    low: int
    high: int
    step: int = 1

    def __post_init__(self) -> None:
        if self.low > self.high or self.step < 1:
            raise OptionError(f"Integer({self.low}, {self.high}, {self.step}): low <= high and step >= 1 are needed")

    def sample(self, rng: Rng) -> int:
        return self.low + self.step * int(rng.integers((self.high - self.low) // self.step + 1))

    def mutate(self, value: int, rng: Rng) -> int:
        span = max(1, (self.high - self.low) // self.step // 8)
        moved = value + self.step * int(rng.integers(1, span + 1)) * (1 if rng.random() < 0.5 else -1)
        return min(max(moved, self.low), self.low + (self.high - self.low) // self.step * self.step)

    def validate(self, value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise OptionError(f"{name}: expected a whole number, found {value!r}")
        if not self.low <= value <= self.high or (value - self.low) % self.step:
            raise OptionError(f"{name}: {value} is not {self.describe()}")
        return int(value)

    def describe(self) -> str:
        return f"integer {self.low}..{self.high}" + (f" step {self.step}" if self.step > 1 else "")


@dataclass(frozen=True)
class Real(Domain):
    """Real numbers ``low..high``; ``log`` samples and steps on a logarithmic scale."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not -math.inf < self.low <= self.high < math.inf:
            raise OptionError(f"Real({self.low}, {self.high}): finite bounds with low <= high are needed")
        if self.log and self.low <= 0:
            raise OptionError(f"Real({self.low}, {self.high}, log=True): a logarithmic scale begins above 0")

    def sample(self, rng: Rng) -> float:
        return self._at(rng.random())

    def mutate(self, value: float, rng: Rng) -> float:
        place = self._place(value) + rng.normal(0.0, 0.1)
        return self._at(min(max(place, 0.0), 1.0))

    def cross(self, left: float, right: float, rng: Rng) -> tuple[float, float]:
        blend = rng.random()
        a, b = self._place(left), self._place(right)
        return self._at(a + blend * (b - a)), self._at(b + blend * (a - b))

    def validate(self, value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
            raise OptionError(f"{name}: expected a number, found {value!r}")
        if math.isnan(value) or not self.low <= value <= self.high:
            raise OptionError(f"{name}: {value} is not {self.describe()}")
        return float(value)

    def describe(self) -> str:
        return f"real {self.low:g}..{self.high:g}" + (" (log)" if self.log else "")

    def _place(self, value: float) -> float:
        if self.low == self.high:
            return 0.0
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def _at(self, place: float) -> float:
        value = self.low * (self.high / self.low) ** place if self.log else self.low + place * (self.high - self.low)
        return float(min(max(value, self.low), self.high))  # rounding may lead out at the ends


@dataclass(frozen=True)
class Subset(Domain):
    """An ordered selection of ``items``, from ``least`` to ``most`` of them; values keep the items' order."""

    items: tuple[Any, ...]
    least: int = 0
    most: int | None = None

    def __init__(self, items: Sequence[Any], least: int = 0, most: int | None = None) -> None:
        object.__setattr__(self, "items", tuple(items))
        object.__setattr__(self, "least", least)
        object.__setattr__(self, "most", most)
        if not 0 <= least <= self._most():
            raise OptionError(f"Subset of {len(self.items)} items cannot hold at least {least}")

    def sample(self, rng: Rng) -> tuple[Any, ...]:
        size = int(rng.integers(self.least, self._most() + 1))
        return self._pick(set(rng.choice(len(self.items), size=size, replace=False).tolist()))

    def mutate(self, value: tuple[Any, ...], rng: Rng) -> tuple[Any, ...]:
        chosen = {self.items.index(item) for item in value}
        others = sorted(set(range(len(self.items))) - chosen)
        moves = []
        if others and len(chosen) < self._most():
            moves.append("add")
        if len(chosen) > self.least:
            moves.append("drop")
        if others and chosen:
            moves.append("swap")
        if not moves:
            return value
        move = moves[int(rng.integers(len(moves)))]
        if move != "add":
            chosen.remove(sorted(chosen)[int(rng.integers(len(chosen)))])
        if move != "drop":
            chosen.add(others[int(rng.integers(len(others)))])
        return self._pick(chosen)

    def cross(self, left: tuple[Any, ...], right: tuple[Any, ...], rng: Rng) -> tuple[Any, Any]:
        children: tuple[set[int], set[int]] = (set(), set())
        for place, item in enumerate(self.items):
            pair = (item in left, item in right)
            first, second = pair if rng.random() < 0.5 else pair[::-1]
            if first:
                children[0].add(place)
            if second:
                children[1].add(place)
        return self._repair(children[0], rng), self._repair(children[1], rng)

    def validate(self, value: Any, name: str) -> tuple[Any, ...]:
        if isinstance(value, str) or not isinstance(value, (Sequence, set, frozenset)):
            raise OptionError(f"{name}: expected a list, found {value!r}")
        for item in value:
            if item not in self.items:
                raise OptionError(f"{name}: {item!r} cannot be chosen: {suggest(str(item), map(str, self.items))}")
        chosen = {self.items.index(item) for item in value}
        if len(chosen) != len(value):
            raise OptionError(f"{name}: an item is listed twice in {list(value)!r}")
        if not self.least <= len(chosen) <= self._most():
            raise OptionError(f"{name}: {len(chosen)} items chosen, expected {self.least}..{self._most()}")
        return self._pick(chosen)

    def describe(self) -> str:
        return f"{self.least}..{self._most()} of {len(self.items)} items"

    def _most(self) -> int:
        return len(self.items) if self.most is None else min(self.most, len(self.items))

    def _pick(self, places: set[int]) -> tuple[Any, ...]:
        return tuple(self.items[place] for place in sorted(places))

    def _repair(self, places: set[int], rng: Rng) -> tuple[Any, ...]:
        while len(places) > self._most():
            places.remove(sorted(places)[int(rng.integers(len(places)))])
        while len(places) < self.least:
            others = sorted(set(range(len(self.items))) - places)
            places.add(others[int(rng.integers(len(others)))])
        return self._pick(places)


@dataclass(frozen=True)
class Each(Domain):
    """One value per item of another parameter: conditional on it.

    ``over`` names the :class:`Subset` field of the same pass; ``domains`` maps every item that could be chosen there to
    the domain of its value. A value is a dict over all items; only the chosen items' entries count.
    """

    over: str
    domains: Mapping[Any, Domain]

    def sample(self, rng: Rng) -> dict[Any, Any]:
        return {item: domain.sample(rng) for item, domain in self.domains.items()}

    def mutate(self, value: Mapping[Any, Any], rng: Rng, active: Sequence[Any] | None = None) -> dict[Any, Any]:
        """Change one entry (of ``active`` items, where given) and, with falling odds, more."""
        items = [item for item in (active if active else self.domains) if item in self.domains]
        changed = dict(value)
        if not items:
            return changed
        sure = int(rng.integers(len(items)))
        for place, item in enumerate(items):
            if place == sure or rng.random() < 1.0 / (2 * len(items)):
                changed[item] = self.domains[item].mutate(changed[item], rng)
        return changed

    def cross(self, left: Mapping[Any, Any], right: Mapping[Any, Any], rng: Rng) -> tuple[Any, Any]:
        first, second = dict(left), dict(right)
        for item, domain in self.domains.items():
            first[item], second[item] = domain.cross(left[item], right[item], rng)
        return first, second

    def validate(self, value: Any, name: str) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise OptionError(f"{name}: expected a table of item = value, found {value!r}")
        unknown = [item for item in value if item not in self.domains]
        if unknown:
            raise OptionError(
                f"{name}: {unknown[0]!r} is not an item: {suggest(str(unknown[0]), map(str, self.domains))}"
            )
        return {item: self.domains[item].validate(entry, f"{name}[{item}]") for item, entry in value.items()}

    def describe(self) -> str:
        kinds = sorted({domain.describe() for domain in self.domains.values()})
        return f"for each of {self.over}: " + (kinds[0] if len(kinds) == 1 else f"{len(kinds)} different domains")


DomainLike = Domain | Callable[[Any], Domain]


def tunable(domain: DomainLike, *, default: Any = dataclasses.MISSING, help: str = "", domain_help: str = "") -> Any:
    """A dataclass field whose value a search may choose.

    Args:
        domain: the domain, or a function of the graph that gives it.
        default: the value where the recipe gives none; without it, the parameter is required (or searched).
        help: one line for listings.
        domain_help: how to describe a graph-dependent domain where no graph is at hand.
    """
    metadata = {_META: domain, "help": help, "domain_help": domain_help}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, (dict, list, set)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parameter(*, default: Any = dataclasses.MISSING, help: str = "") -> Any:
    """A documented dataclass field that no search may change."""
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata={"help": help})
    if isinstance(default, (dict, list, set)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def tunable_fields(cls: type) -> dict[str, DomainLike]:
    """Name and domain (or function of the graph) of each tunable field of a dataclass, in order of declaration."""
    return {field.name: field.metadata[_META] for field in dataclasses.fields(cls) if _META in field.metadata}


def describe_field(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """``{name, type, tunable, domain, default, help}`` of one parameter, for listings and ``--json``."""
    domain = field.metadata.get(_META)
    described = domain.describe() if isinstance(domain, Domain) else field.metadata.get("domain_help", "")
    default: Any = None
    if field.default is not dataclasses.MISSING:
        default = field.default
    elif field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return {
        "name": field.name,
        "type": _type_name(field),
        "tunable": domain is not None,
        "domain": (described or "depends on the graph") if domain is not None else None,
        "default": default,
        "required": field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
        "help": field.metadata.get("help", ""),
    }


def describe_fields(cls: type) -> list[dict[str, Any]]:
    """:func:`describe_field` of every parameter, in order of declaration."""
    return [describe_field(item) for item in dataclasses.fields(cls)]


def _type_name(field: dataclasses.Field[Any]) -> str:
    """The field's type as written, whether or not its module postpones annotations."""
    return field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))


_PLAIN: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "Mapping": (Mapping,),
    "dict": (Mapping,),
    "tuple": (tuple, list, set, frozenset),
}
_SAID = {"Mapping": "a table", "dict": "a table", "tuple": "a list"}


def check_parameters(cls: type, label: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` in canonical form; parameters may be missing.

    Args:
        cls: dataclass whose fields are the parameters.
        label: what it is called in messages, e.g. ``pass 'insert_exits'``.
        given: values by parameter name.

    Raises:
        OptionError: unknown parameter or value out of range; names both and the valid choices. Domains that depend on a
            graph are not checked here.
    """
    fields = {item.name: item for item in dataclasses.fields(cls)}
    domains = tunable_fields(cls)
    checked = {}
    for key, value in given.items():
        if key not in fields:
            known = f": {suggest(key, fields)}" if fields else " (it has none)"
            raise OptionError(f"{label} has no parameter {key!r}{known}")
        where, domain = f"{label}, parameter {key!r}", domains.get(key)
        if isinstance(domain, Domain):
            value = domain.validate(value, where)
        kind = _type_name(fields[key]).partition("[")[0]
        kinds = _PLAIN.get(kind)
        if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise OptionError(f"{where}: expected {_SAID.get(kind, kind)}, found {value!r}")
        checked[key] = value
    return checked


def missing_parameters(cls: type, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Parameters without a default that ``given`` leaves out."""
    return tuple(
        item.name for item in dataclasses.fields(cls) if describe_field(item)["required"] and item.name not in given
    )
