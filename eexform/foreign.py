"""What a file is that was given for an ONNX model and is none, seen from its first bytes and the names in it."""

from __future__ import annotations

import zipfile
from pathlib import Path

_LENGTH = 8
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_SKIPPED = (
    "torch's loader runs what such a file tells it to, so eexform never opens one. Give the module that it was made "
    "from: package.module:factory. Of a plan that eexform exported take the form 'if' (eexform export --form if), or "
    "in Python, for a program that you trust, eexform.verify(torch.export.load(FILE), plan, data)"
)


def about(path: str | Path) -> str:
    """A sentence on what ``path`` is and what to do instead; empty where that is not known."""
    file = Path(path)
    if file.is_dir():
        return f"{file}: is a folder, not a file; give the .onnx file itself"
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            start = stream.read(64)
    except OSError:
        return ""
    if not size:
        return f"{file}: the file is empty: it was cut off as it was written or copied; make it again"
    weights = (
        f"{file}: holds PyTorch weights and no network; give the module that they belong to: package.module:factory "
        f"--weights {file}"
    )
    if start.startswith(b"PK"):
        return _archive(file, weights)
    if start.startswith(_PICKLES):
        return weights
    if len(start) > _LENGTH and start[_LENGTH : _LENGTH + 1] == b"{" and _length(start) < size:
        return weights
    if start.startswith(b"version https://git-lfs"):
        return f"{file}: is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"
    if start.startswith(b"\x89HDF") or start[4:8] == b"TFL3":
        return f"{file}: is a model of Keras or TensorFlow; convert it to ONNX (tf2onnx) and give that file"
    return ""


def _archive(file: Path, weights: str) -> str:
    """Of a zip archive, from the names in it."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return f"{file}: is the beginning of an archive, cut off"
    parts = [name.split("/", 1)[-1] for name in names]
    if any(part.startswith("models/") and part.endswith(".json") for part in parts):
        return f"{file}: is a program of torch.export (.pt2); {_SKIPPED}"
    if any(part.startswith("code/") for part in parts):
        return f"{file}: is a TorchScript module; give the module that it was made from: package.module:factory"
    if "data.pkl" in parts:
        return weights
    if any(part.endswith(".npy") for part in parts):
        return f"{file}: is an archive of arrays, no network; give it as --data"
    return f"{file}: is an archive, no network; unpack it"


def _length(start: bytes) -> int:
    """Length of the header, as safetensors has it in front."""
    return int.from_bytes(start[:_LENGTH], "little")
