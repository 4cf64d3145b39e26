"""Recipes: round trips, what is free, and messages that name the mistake."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from eexform.errors import OptionError, RunError
from eexform.passes import PassContext, PlanStore, Recipe, Step, listing, load_recipe, make, parse_recipe
from tests.passes.helpers import CHAIN, graph_of
from tests.passes.test_insert_exits import HEADS, insert, store_of

TEXT = """
weights = "plan.safetensors"

[[pass]]
name = "fold_batch_norm"

[[pass]]
name = "insert_exits"
sites = ["r1", "r2"]
carry = 0
[pass.heads]
r1 = "conv:1x4/avg/s2"
"r2" = "none/avg"
[pass.thresholds]
r1 = 1
r2 = "never"
"""


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    recipe = Recipe.parse(tomllib.loads(TEXT))
    path = tmp_path / f"recipe.{suffix}"
    recipe.save(path)
    again = load_recipe(path)
    assert again == recipe
    assert again.to_plain() == recipe.to_plain()
    assert again.passes() == recipe.passes()
    assert Recipe.of(again.passes(), "plan.safetensors").passes() == recipe.passes()


def test_infinite_numbers_without_a_name(tmp_path: Path) -> None:
    """A recipe that leaves parameters open is written as given; TOML holds infinity, JSON does not."""
    recipe = Recipe((Step("insert_exits", {"sites": ["r1"], "thresholds": {"r1": math.inf}}),))
    recipe.save(tmp_path / "open.toml")
    assert Recipe.load(tmp_path / "open.toml").steps == recipe.steps
    with pytest.raises(OptionError, match=r"open\.json: JSON holds no infinite numbers; write a \.toml"):
        recipe.save(tmp_path / "open.json")
    assert not (tmp_path / "open.json").exists()


def test_applied_with_its_weights(tmp_path: Path) -> None:
    graph = graph_of(CHAIN)
    store = store_of(graph)
    (tmp_path / "recipe.toml").write_text(TEXT)
    store.save(tmp_path / "plan.safetensors")
    recipe = load_recipe(tmp_path / "recipe.toml")
    result = recipe.pipeline()(graph, PassContext(heads=recipe.store()))
    expected = insert(thresholds={"r1": 1.0, "r2": "never"})(graph, PassContext(heads=store)).graph
    assert result.graph.digest == expected.digest


def test_plan_store_round_trip(tmp_path: Path) -> None:
    graph = graph_of(CHAIN)
    store = store_of(graph)
    path = tmp_path / "plan.safetensors"
    PlanStore.collect(store, graph.digest, HEADS.items()).save(path)
    again = PlanStore.load(path)
    assert again.sites(graph.digest) == ("r1", "r2")
    assert again.heads(graph.digest, "r2") == ("none/avg",)
    assert again.sites("another") == again.heads("another", "r1") == ()
    for site, head in HEADS.items():
        one, other = (s.trained(graph.digest, site, head) for s in (store, again))
        assert (one.digest, one.temperature) == (other.digest, other.temperature)
    with pytest.raises(OptionError, match="hold no head 'conv:1x8/avg' at 'r1'"):
        again.trained(graph.digest, "r1", "conv:1x8/avg")


def test_damaged_weights_are_noticed(tmp_path: Path) -> None:
    graph = graph_of(CHAIN)
    path = tmp_path / "plan.safetensors"
    store_of(graph).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RunError, match="do not match their digest"):
        PlanStore.load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match="cannot be read as safetensors"):
        PlanStore.load(path)
    path.write_bytes(whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(RunError, match="newer"):
        PlanStore.load(path)
    with pytest.raises(OptionError, match="no such file"):
        PlanStore.load(tmp_path / "absent.safetensors")


def test_free_tunables() -> None:
    graph = graph_of(CHAIN)
    recipe = Recipe.parse({"pass": [{"name": "insert_exits", "measure": "entropy", "sites": ["r1"]}]})
    (step,) = recipe.steps
    assert step.free() == ("heads", "thresholds", "carry")
    assert list(step.space(graph, PassContext())) == ["heads", "thresholds", "carry"]
    assert recipe.unbound() == (("insert_exits", "heads"), ("insert_exits", "thresholds"))
    with pytest.raises(OptionError, match=r"without a value: insert_exits\.heads, insert_exits\.thresholds; .* search"):
        recipe.passes()
    bound = step.bind(heads={"r1": "none/avg"}, thresholds={"r1": 0.25})
    assert bound.unbound() == ()
    assert bound.make() == make(
        "insert_exits", sites=["r1"], measure="entropy", heads={"r1": "none/avg"}, thresholds={"r1": 0.25}
    )


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown pass": ({"pass": [{"name": "fold_bn"}]}, "pass 1: no pass is called 'fold_bn': did you mean"),
    "unknown parameter": (
        {"pass": [{"name": "remove_dead"}, {"name": "simplify", "compar": True}]},
        "pass 2: pass 'simplify' has no parameter 'compar': did you mean 'compare'?",
    ),
    "a pass without parameters": (
        {"pass": [{"name": "remove_dead", "x": 1}]}, "pass 'remove_dead' has no parameter 'x' (it has none)",
    ),
    "bad value": (
        {"pass": [{"name": "insert_exits", "carry": 2}]},
        "pass 1: pass 'insert_exits', parameter 'carry': 2 is not a choice: choose from '0.0', '0.25'",
    ),
    "no name": ({"pass": [{"form": "if"}]}, "pass 1 has no name"),
    "unknown key": ({"passes": []}, "'passes' is not a key of a recipe: did you mean 'pass'?"),
    "no list": ({"pass": {"name": "lower"}}, "'pass' must be a list of tables"),
    "weights outside": ({"weights": "../plan.safetensors"}, "must be a file inside the recipe's folder"),
    "weights absolute": ({"weights": "/plan.safetensors"}, "must be a file inside the recipe's folder"),
    "weights on a drive": ({"weights": "C:plan.safetensors"}, "must be a file inside the recipe's folder"),
    "weights no text": ({"weights": 3}, "'weights' must be a file name"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named(case: str) -> None:
    plain, message = BAD[case]
    with pytest.raises(OptionError) as caught:
        Recipe.parse(plain)
    assert message in str(caught.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    cases = {"a.toml": "[[pass", "b.json": "{", "c.yaml": "", "d.toml": "[[pass]]\nname = 'lower'\nform = 'iff'"}
    messages = ["not valid TOML", "not valid JSON", "a .toml or a .json file", "form: 'iff' does not exist"]
    for (name, text), message in zip(cases.items(), messages, strict=True):
        (tmp_path / name).write_text(text)
        with pytest.raises(OptionError, match=message):
            parse_recipe(tmp_path / name)
    with pytest.raises(OptionError, match="cannot be read"):
        parse_recipe(tmp_path / "absent.toml")


def test_listing_names_what_can_be_chosen() -> None:
    found = {entry["name"]: entry for entry in listing()}
    assert {"insert_exits", "fold_batch_norm", "simplify", "remove_dead", "drop_idle_exits", "lower"} <= set(found)
    entry = found["insert_exits"]
    assert entry["distribution"].startswith("eexform ")
    assert entry["error"] is None
    parameters = {item["name"]: item for item in entry["parameters"]}
    assert parameters["carry"]["domain"] == "one of {0.0, 0.25, 0.5, 0.75, 1.0}"
    assert parameters["sites"]["tunable"]
    assert parameters["sites"]["required"]
    assert not parameters["untrained"]["tunable"]
    assert json.dumps(listing())
