"""Weights that a model keeps in files beside it: checked, then mapped into memory, never read whole.

A model file comes from anywhere, so a location may only name a file inside the model's own folder.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

from eexform.errors import ModelError

_TYPES = frozenset(onnx.TensorProto.DataType.values()) - {onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING}
_MOST = 2**48  # elements; no file is larger


class ExternalData:
    """The side files of one model, each mapped once.

    Args:
        folder: the model's folder; ``None`` for a model that came from memory and can have no side file.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._maps: dict[Path, mmap.mmap] = {}

    def array(self, tensor: onnx.TensorProto) -> np.ndarray:
        """The tensor's elements; a read-only view of the file for ordinary types.

        Raises:
            ModelError: the location leaves the model's folder, or the file is missing or too short.
        """
        entries = {entry.key: entry.value for entry in tensor.external_data}
        path = self._path(tensor.name, entries.get("location", ""))
        try:
            offset, length = int(entries.get("offset", 0)), entries.get("length")
            wanted = None if length is None else int(length)
        except ValueError as error:
            raise ModelError(f"parameter {tensor.name!r}: its external data entry is damaged: {entries}") from error
        if tensor.data_type not in _TYPES:
            raise ModelError(f"parameter {tensor.name!r}: external data of element type {tensor.data_type} is unknown")
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        count = math.prod(tensor.dims)
        if min(tensor.dims, default=0) < 0 or count > _MOST:
            raise ModelError(f"parameter {tensor.name!r}: shape {list(tensor.dims)} is not possible; it may be damaged")
        if not count:
            return np.zeros(tuple(tensor.dims), dtype)
        mapped = self._mapped(path)
        end = len(mapped) if wanted is None else offset + wanted
        if offset < 0 or end > len(mapped) or end < offset:
            raise ModelError(
                f"parameter {tensor.name!r}: needs bytes {offset} to {end} of {path.name!r}, which has {len(mapped)}: "
                "the file is truncated or belongs to another model"
            )
        if dtype.kind in "fiub":
            if (wanted is not None and wanted != count * dtype.itemsize) or count * dtype.itemsize > end - offset:
                raise ModelError(
                    f"parameter {tensor.name!r}: shape {list(tensor.dims)} of {dtype} takes {count * dtype.itemsize} "
                    f"bytes, its external data has {end - offset}"
                )
            return np.frombuffer(mapped, dtype.newbyteorder("<"), count, offset).reshape(tuple(tensor.dims))
        inline = onnx.TensorProto()
        inline.CopyFrom(tensor)
        inline.ClearField("external_data")
        inline.data_location = onnx.TensorProto.DEFAULT
        inline.raw_data = mapped[offset:end]
        try:
            return onnx.numpy_helper.to_array(inline)
        except ValueError as error:
            raise ModelError(f"parameter {tensor.name!r}: its external data does not fit its shape: {error}") from error

    def _path(self, name: str, location: str) -> Path:
        if self._folder is None:
            raise ModelError(
                f"parameter {name!r} lies in the external file {location!r}, but the model came from memory: load the "
                "model from its path"
            )
        relative = Path(location)
        odd = not location or "\0" in location or "\\" in location
        inside = not odd and not relative.is_absolute() and ".." not in relative.parts
        path = self._folder / relative
        if not inside or not path.resolve().is_relative_to(self._folder.resolve()):
            raise ModelError(
                f"parameter {name!r}: its external data {location!r} is outside the model's folder, which is refused; "
                "put the data beside the model and name it by a relative path"
            )
        return path

    def _mapped(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            try:
                with open(path, "rb") as stream:
                    self._maps[path] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except FileNotFoundError as error:
                raise ModelError(
                    f"the model keeps weights in {path.name!r}, which is not in its folder: copy it beside the model"
                ) from error
            except (OSError, ValueError) as error:
                raise ModelError(f"the model's weights in {path.name!r} cannot be read: {error}") from error
        return self._maps[path]


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor stored in a graph: initialisers and attributes, sub-graphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from tensors(attribute.g)
            for body in attribute.graphs:
                yield from tensors(body)


def is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL
