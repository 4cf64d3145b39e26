"""One trained network and one finished run for all tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.support import SEARCH, fine, save_network


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of everything; its name must not turn up in an exported file."""
    return tmp_path_factory.mktemp("private-folder")


@pytest.fixture(scope="session")
def model(place: Path) -> Path:
    return save_network(place / "model.onnx")


@pytest.fixture(scope="session")
def run(place: Path, model: Path) -> Path:
    folder = place / "runs" / "r1"
    done = fine("search", model, *SEARCH, "--out", folder)
    (place / "search.txt").write_text(done.out)
    (place / "search.err").write_text(done.err)
    return folder


@pytest.fixture(scope="session")
def exported(place: Path, run: Path) -> Path:
    """A plan with at least one exit, as one file."""
    target = place / "ee.onnx"
    fine("export", run, "--pick", "3", "-o", target)
    return target
