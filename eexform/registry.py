"""Things that are found by name, have settings and are listed: passes, cost models, terms of a loss.

Each is a dataclass registered in an entry-point group; its fields are its settings. What differs between the kinds is
said once, when their :class:`Registry` is made.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from eexform import plugins
from eexform.errors import EexformError, OptionError
from eexform.tunables import check_parameters, describe_fields, missing_parameters

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """One entry-point group.

    Attributes:
        group: its name.
        kind: what a member is called in messages, e.g. ``cost model``.
        base: class that members derive from.
        home: where users import that class from.
        facts: class attributes that the listing shows, each with its value for a member that cannot be loaded.
        settings: what the listing calls a member's fields.
        plain: leave out of the listing what concerns searching (``tunable``, ``domain``).
        checked: puts given settings into canonical form; takes the class, a label for messages, and the settings.
    """

    group: str
    kind: str
    base: type[T]
    home: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: str = "settings"
    plain: bool = True
    checked: Callable[[Any, str, Mapping[str, Any]], dict[str, Any]] = check_parameters

    def names(self) -> tuple[str, ...]:
        """Every registered member, sorted."""
        return plugins.names(self.group)

    def get(self, name: str) -> type[T]:
        """The member registered as ``name``.

        Raises:
            OptionError: there is none, or what is registered is something else.
        """
        found: Any = plugins.load(self.group, name)
        if not (isinstance(found, type) and issubclass(found, self.base) and dataclasses.is_dataclass(found)):
            raise OptionError(
                f"{self.kind} {name!r} from {plugins.origin(self.group, name)} is not a dataclass derived from "
                f"{self.home}.{self.base.__name__}"
            )
        return cast(type[T], found)

    def make(self, name: str, /, **settings: Any) -> T:
        """The member ``name`` with these settings.

        Raises:
            OptionError: unknown member or setting, value of the wrong kind or out of range, or a required one missing.
        """
        cls = self.get(name)
        label = f"{self.kind} {name!r}"
        checked = self.checked(cls, label, settings)
        absent = missing_parameters(cls, checked)
        if absent:
            raise OptionError(f"{label} needs a value for " + ", ".join(map(repr, absent)))
        try:
            return cls(**checked)
        except EexformError as error:
            raise OptionError(f"{label}: {error}") from error

    def parse(self, text: str) -> T:
        """The member written as on the command line: ``macs``, or ``latency_ort:threads=2,batch=32``.

        Raises:
            OptionError: not written like that, or as for :meth:`make`.
        """
        name, _, rest = text.partition(":")
        settings: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if not equals:
                raise OptionError(f"{text!r}: {part!r} is no setting; write NAME:SETTING=VALUE,SETTING=VALUE")
            try:
                settings[key.strip()] = json.loads(value)
            except ValueError:
                settings[key.strip()] = value
        return self.make(name.strip(), **settings)

    def listing(self) -> list[dict[str, Any]]:
        """What is registered: name, summary, distribution, the kind's facts, settings, and the reason as ``error``
        where a member cannot be loaded (else ``None``)."""
        found: list[dict[str, Any]] = []
        for name in self.names():
            entry: dict[str, Any] = {
                "name": name,
                "summary": "",
                "distribution": plugins.origin(self.group, name),
                **self.facts,
                self.settings: [],
                "error": None,
            }
            try:
                cls: Any = self.get(name)
            except EexformError as error:
                entry["error"] = str(error)
            else:
                entry["summary"] = cls.summary()
                entry.update({key: getattr(cls, key) for key in self.facts})
                hidden = ("tunable", "domain") if self.plain else ()
                entry[self.settings] = [
                    {key: value for key, value in described.items() if key not in hidden}
                    for described in describe_fields(cls)
                ]
            found.append(entry)
        return found
