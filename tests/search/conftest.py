"""One finished search for all tests that only look at it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from eexform.ir.sites import find_sites
from eexform.search.run import Run
from tests import tiny
from tests.search.retraining import content, tune
from tests.search.running import start


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return start(tmp_path_factory.mktemp("done") / "run")


@pytest.fixture
def copy(done: Run, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    return Path(shutil.copytree(done.folder.path, tmp_path / "copy"))


@pytest.fixture(scope="session")
def sites() -> list[str]:
    return [site.value for site in find_sites(tiny.trained()).sites]


@pytest.fixture(scope="session")
def before(done: Run) -> dict[str, bytes]:
    """The old run's files as they were before anybody trained from it."""
    return content(done.folder.path)


@pytest.fixture(scope="session")
def tuned(done: Run, before: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tune(done, tmp_path_factory.mktemp("tuned") / "run")
