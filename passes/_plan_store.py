"""What a plan needs beside its recipe, in one safetensors file: trained heads, and parameters of a mended trunk.

With it a plan can be applied without the run, or the data, that it came from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from eexform.errors import OptionError, RunError, need, suggest
from eexform.files import write_bytes
from eexform.ir.digest import digest_arrays
from eexform.ir.exit_nodes import head_digest
from eexform.passes._contract import HeadStore, TrainedHead

FORMAT = 2
_HEADS_ALONE = 1
"""Format of files without parameter sets, which older versions read, too."""
_KEY = "eexform.heads"


class PlanStore:
    """A :class:`HeadStore` that holds the heads of one plan for one trunk, and stored parameters of the trunk.

    In the file, array ``head2|classifier.weight`` belongs to the third head of the list in the header's
    ``eexform.heads`` (JSON: format, trunk digest, and per head site, canonical text, temperature and digest), and
    ``set0|conv1.weight`` to the first parameter set of its list ``parameters`` (digests).

    Attributes:
        trunk_digest: digest of the trunk that the heads were trained on; empty where there are no heads.
        arrays: parameter sets by digest, for :attr:`PassContext.arrays`.
    """

    def __init__(
        self,
        trunk_digest: str = "",
        heads: Mapping[tuple[str, str], TrainedHead] | None = None,
        arrays: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    ) -> None:
        self.trunk_digest = trunk_digest
        self._heads = dict(heads or {})
        self.arrays = {digest: dict(values) for digest, values in (arrays or {}).items()}

    def with_arrays(self, arrays: Mapping[str, Mapping[str, np.ndarray]]) -> PlanStore:
        """The same heads, with exactly these parameter sets."""
        return PlanStore(self.trunk_digest, self._heads, arrays)

    @property
    def empty(self) -> bool:
        """Whether it holds neither heads nor parameters."""
        return not (self._heads or self.arrays)

    @classmethod
    def collect(cls, source: HeadStore, trunk_digest: str, chosen: Iterable[tuple[str, str]]) -> PlanStore:
        """The store with the ``chosen`` (site, head text) pairs out of ``source``, e.g. a bank."""
        return cls(trunk_digest, {(site, head): source.trained(trunk_digest, site, head) for site, head in chosen})

    # -- the HeadStore protocol ---------------------------------------------------------------------------------------

    def sites(self, trunk_digest: str) -> tuple[str, ...]:
        """Sites with a head, in the order of the file; none for another trunk."""
        return tuple(dict.fromkeys(site for site, _ in self._heads)) if trunk_digest == self.trunk_digest else ()

    def heads(self, trunk_digest: str, site: str) -> tuple[str, ...]:
        """Canonical texts of the heads at ``site``."""
        return tuple(head for at, head in self._heads if at == site) if trunk_digest == self.trunk_digest else ()

    def trained(self, trunk_digest: str, site: str, head: str) -> TrainedHead:
        """The trained head.

        Raises:
            OptionError: the heads belong to another trunk, or this one is not among them.
        """
        need(bool(self._heads), f"the plan's weights hold no heads, one is wanted at {site!r}", OptionError)
        need(
            trunk_digest == self.trunk_digest,
            f"the plan's heads were trained on trunk {self.trunk_digest[:12]}, this graph is {trunk_digest[:12]}; "
            "apply the recipe to the model that was searched, with the same passes in front of insert_exits",
            OptionError,
        )
        known = {f"{at} with {text}" for at, text in self._heads}
        need(
            (site, head) in self._heads,
            f"the plan's weights hold no head {head!r} at {site!r}: {suggest(f'{site} with {head}', known)}",
            OptionError,
        )
        return self._heads[site, head]

    # -- the file -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        arrays: dict[str, np.ndarray] = {}
        described = []
        for place, ((site, head), trained) in enumerate(self._heads.items()):
            described.append({"site": site, "head": head, "temperature": trained.temperature, "digest": trained.digest})
            for name, values in trained.parameters.items():
                arrays[f"head{place}|{name}"] = np.ascontiguousarray(values)
        header: dict[str, Any] = {"format": _HEADS_ALONE, "trunk": self.trunk_digest, "heads": described}
        if self.arrays:
            header.update(format=FORMAT, parameters=list(self.arrays))
        for place, stored in enumerate(self.arrays.values()):
            arrays.update({f"set{place}|{name}": np.ascontiguousarray(values) for name, values in stored.items()})
        write_bytes(path, save(arrays, {_KEY: json.dumps(header)}))

    @classmethod
    def load(cls, path: str | Path) -> PlanStore:
        """Read a file that :meth:`save` wrote.

        Raises:
            OptionError: there is no such file, or it is no plan's weights.
            RunError: damaged, or written by a newer version.
        """
        path = Path(path)
        need(path.is_file(), f"{path}: no such file; it holds the parameters that the recipe needs", OptionError)
        try:
            with safe_open(path, framework="numpy") as stored:
                header = (stored.metadata() or {}).get(_KEY)
                arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise RunError(f"{path}: cannot be read as safetensors ({error}); it may be damaged") from error
        need(header is not None, f"{path}: holds no trained heads of a plan", OptionError)
        try:
            return cls._read(path, json.loads(header or ""), arrays)
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}: its header is damaged ({error!r})") from error

    @classmethod
    def _read(cls, path: Path, header: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> PlanStore:
        version = int(header["format"])
        need(version <= FORMAT, f"{path}: format {version} is newer than this eexform reads ({FORMAT})", RunError)
        heads = {}
        for place, item in enumerate(header["heads"]):
            parameters = _with_prefix(arrays, f"head{place}|")
            trained = TrainedHead(parameters, float(item["temperature"]), str(item["digest"]))
            need(
                head_digest(parameters) == trained.digest,
                f"{path}: the parameters of head {item['head']!r} at {item['site']!r} do not match their digest; "
                "the file is damaged",
                RunError,
            )
            heads[str(item["site"]), str(item["head"])] = trained
        sets = {}
        for place, digest in enumerate(map(str, header.get("parameters", ()))):
            sets[digest] = _with_prefix(arrays, f"set{place}|")
            need(
                digest_arrays(sets[digest]) == digest,
                f"{path}: the stored parameters {digest[:12]} do not match their digest; the file is damaged",
                RunError,
            )
        return cls(str(header["trunk"]), heads, sets)


def _with_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names start with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)}
