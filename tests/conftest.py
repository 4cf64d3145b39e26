"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: more threads than that would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from eexform.passes import WellFormed, instruments


@pytest.fixture(autouse=True)
def well_formed(request: pytest.FixtureRequest) -> Iterator[None]:
    """The well-formedness check around every pass in every test; off where a test is marked ``malformed``."""
    if request.node.get_closest_marker("malformed") is not None:
        yield
        return
    with instruments(WellFormed()):
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real models and data: ``EEXFORM_SHARED``, or ``shared`` beside the repository."""
    named = os.environ.get("EEXFORM_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "models").is_dir():
        pytest.skip(f"real models and data are not here ({'EEXFORM_SHARED' if named else 'EEXFORM_SHARED is not set'})")
    return folder
