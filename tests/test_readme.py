"""What the documents say is true: commands parse, snippets fit the interface, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import typer

import eexform
from eexform.cli.app import app
from eexform.heads.blocks import HeadEmitter, conv_bn_relu
from eexform.ir.graph import Graph
from eexform.passes import WellFormed, instruments
from tests.documents import ROOT, Block, anchors, blocks, commands, documents, inline, links

PAGES = documents()
CLI: Any = typer.main.get_command(app)


def _names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _options(name: str) -> set[str]:
    return {option for item in CLI.commands[name].params for option in (*item.opts, *item.secondary_opts)}


# -- set-up ------------------------------------------------------------------------------------------------------------


def test_exactly_two_set_up_commands() -> None:
    found = re.findall(r"^    (python3 -m venv .*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert found == [
        "python3 -m venv .venv && .venv/bin/pip install -c constraints.txt . && .venv/bin/eexform quickstart",
        'python3 -m venv .venv-dev && .venv-dev/bin/pip install -c constraints.txt -e ".[dev]" '
        "&& .venv-dev/bin/python -m pytest -n auto --dist loadfile",
    ]
    assert (ROOT / "constraints.txt").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "dev" in project["optional-dependencies"]
    assert "quickstart" in CLI.commands


def test_readme_is_short_enough_to_read() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 260


# -- the command line --------------------------------------------------------------------------------------------------

COMMANDS = [pytest.param(command, id=f"{where} {command[:40]}") for page in PAGES for where, command in commands(page)]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command: str) -> None:
    _, *words = shlex.split(command.split(";")[0])
    while words and words[0].startswith("-"):  # options of the program itself
        assert words[0] in {option for item in CLI.params for option in item.opts}, words[0]
        words = words[1:]
    name, *arguments = words
    assert name in CLI.commands, f"there is no command {name!r}"
    CLI.commands[name].make_context(name, arguments)  # raises a usage error


def test_every_command_is_documented() -> None:
    shown = {command.split()[1] for page in PAGES for _, command in commands(page)}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in CLI.commands if name not in shown and f"eexform {name}" not in text]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=_names)
def test_inline_commands_and_options_exist(page: Path) -> None:
    everything = {option for name in CLI.commands for option in _options(name)}
    everything |= {option for item in CLI.params for option in item.opts} | {"--help"}
    for code in inline(page):
        known = everything
        if code.startswith("eexform ") and code.split()[1][0].isalpha():
            name = code.split()[1]
            assert name in CLI.commands, f"{code!r}: there is no command {name!r}"
            known = _options(name) | {"--help"}
        elif not code.startswith("-"):
            continue
        for option in re.findall(r"(?<![\w-])(--[a-z][a-z-]*)", code):
            assert option in known, f"{code!r}: there is no option {option!r}"


def test_a_wrong_command_is_noticed() -> None:
    with pytest.raises(Exception, match=r"No such option.*--pickle"):
        CLI.commands["export"].make_context("export", ["runs/r1", "--pickle", "knee", "-o", "x.onnx"])


# -- Python ------------------------------------------------------------------------------------------------------------

SNIPPETS = [pytest.param(b, id=str(b)) for page in PAGES for b in blocks(page) if b.language == "python"]


@pytest.mark.parametrize("block", SNIPPETS)
def test_snippet_fits_the_interface(block: Block) -> None:
    tree = ast.parse(block.text)
    aliases: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                importlib.import_module(item.name)
                if item.name == "eexform":
                    aliases.add(item.asname or item.name)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            module = importlib.import_module(node.module)
            for item in node.names:
                assert hasattr(module, item.name), f"{node.module} has no {item.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            assert hasattr(eexform, node.attr), f"eexform has no {node.attr}"
        if isinstance(node, ast.Call):
            _check_keywords(node, aliases)


def _check_keywords(call: ast.Call, aliases: set[str]) -> None:
    function = call.func
    if not (isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)):
        return
    if function.value.id not in aliases:
        return
    known = inspect.signature(getattr(eexform, function.attr)).parameters
    for keyword in call.keywords:
        assert keyword.arg in known, f"ee.{function.attr} has no parameter {keyword.arg!r}"


def _first(page: str, having: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The first Python block of a page with ``having`` in it, imported as a module."""
    chosen = next(b for b in blocks(ROOT / "docs" / page) if b.language == "python" and having in b.text)
    name = "documented_" + page.partition(".")[0].replace("-", "_")
    (folder / f"{name}.py").write_text(chosen.text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module(name)


@pytest.fixture
def small() -> Graph:
    image = gs.Variable("image", np.float32, ["N", 3, 8, 8])
    draft = gs.Graph(inputs=[image], opset=17)
    emitter = HeadEmitter(draft, np.random.default_rng(0))
    value = conv_bn_relu(emitter, image, 3, 4, kernel=3)
    pooled = emitter.reduce("ReduceMean", value, [2, 3], name="pool", shape=["N", 4])
    draft.outputs = [pooled]
    return Graph(draft)


def test_the_documented_pass_works(small: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = _first("writing-a-pass.md", "class ClipActivations", tmp_path, monkeypatch).ClipActivations
    with instruments(WellFormed()):
        result = clip(ceiling=2.0)(small)
    assert result.changed
    assert "Clip" in [node.op for node in result.graph.nodes]
    assert clip.space(small, None)["ceiling"].describe() == "real 1..20 (log)"


def test_the_documented_cost_model_works(small: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _first("writing-a-cost-model.md", "class Traffic", tmp_path, monkeypatch).Traffic
    total = sum(constant.values.size for constant in small.constants.values() if constant.dtype == np.float32)
    assert model().cost(small).total == 4 * total
    assert model(bytes_per_number=1).cost(small).total == total


def test_the_documented_source_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _first("data.md", "ArraySource", tmp_path, monkeypatch).data
    assert data.splits.head_train.part == "train"
    assert data.splits.test.part == "test"


# -- other blocks, links -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=_names)
def test_toml_blocks_parse(page: Path) -> None:
    for block in blocks(page):
        if block.language == "toml":
            tomllib.loads(block.text)


@pytest.mark.parametrize("page", PAGES, ids=_names)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{_names(page)}: {target} does not exist"
        assert found.is_relative_to(ROOT), f"{_names(page)}: {target} leads out of the repository"
        if anchor:
            assert anchor in anchors(found), f"{_names(page)}: no heading for {target}"


def test_every_page_can_be_reached() -> None:
    reached = {(page.parent / target.partition("#")[0]).resolve() for page in PAGES for target in links(page)}
    lost = [_names(page) for page in PAGES if page != ROOT / "README.md" and page not in reached]
    assert not lost


@pytest.mark.parametrize(
    ("text", "languages"),
    [
        ("a\n\n    one\n    two\n\nb\n", ["indented"]),
        ("a\n\n```python\nx = 1\n```\n\n    eexform costs\n", ["python", "indented"]),
        ("- item\n  more\n", []),
    ],
)
def test_blocks_are_found(tmp_path: Path, text: str, languages: list[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    assert [block.language for block in blocks(page)] == languages
