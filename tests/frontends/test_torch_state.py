"""What a module keeps besides parameters and buffers: forgotten while it is exported, and there again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import eexform as ee
from eexform.backends import ort
from eexform.errors import ModelError

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class InDictionary:
    """Where a result is kept between calls."""

    name, empty = "cache", staticmethod(dict)

    @staticmethod
    def look(kept: Any, make: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        if "biases" not in kept:
            kept["biases"] = make()
        return kept, kept["biases"]


class InPrivateDictionary(InDictionary):
    name = "_cache"


class InList(InDictionary):
    name, empty = "results", staticmethod(list)

    @staticmethod
    def look(kept: Any, make: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        if not kept:
            kept.append(make())
        return kept, kept[0]


class InAttribute(InDictionary):
    name, empty = "biases_now", staticmethod(lambda: None)

    @staticmethod
    def look(kept: Any, make: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        kept = make() if kept is None else kept
        return kept, kept


class Cached(nn.Module):
    """Biases are looked up once in eval mode; ``train()`` forgets them."""

    def __init__(self, place: type[InDictionary]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.place = place
        self.biases = nn.Parameter(torch.randn(3))
        self.layer, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        setattr(self, place.name, place.empty())

    def train(self, mode: bool = True) -> Cached:
        super().train(mode)
        if mode:
            setattr(self, self.place.name, self.place.empty())
        return self

    def forward(self, x: Tensor) -> Tensor:
        def made() -> Tensor:
            return self.biases[torch.arange(8) % 3]

        biases = made()
        if not self.training:
            kept, biases = self.place.look(getattr(self, self.place.name), made)
            setattr(self, self.place.name, kept)
        scores: Tensor = self.last(self.norm(torch.tanh(self.layer(x) + biases)))
        return scores


PLACES = (InDictionary, InPrivateDictionary, InList, InAttribute)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("used", [False, True])
def test_results_are_computed_in_the_graph_and_kept_in_the_module(
    place: type[InDictionary], used: bool, recwarn: pytest.WarningsRecorder
) -> None:
    module = Cached(place).eval()
    if used:
        module(X)
    kept = getattr(module, place.name)
    inside = kept.copy() if isinstance(kept, (dict, list)) else kept
    raised = ee.to_torch(ee.load(module, (X[:1],)))
    assert not recwarn.list
    assert getattr(module, place.name) is kept
    assert kept is inside if kept is None or isinstance(kept, Tensor) else kept == inside
    assert raised.state_dict().keys() == module.state_dict().keys()
    torch.testing.assert_close(raised(X), module(X))
    raised(X).square().sum().backward()
    assert raised.get_parameter("biases").grad is not None


@pytest.mark.parametrize("fails", [False, True])
def test_a_module_in_the_middle_of_training_goes_on_as_if_nothing_had_been(fails: bool) -> None:
    class Failing(Cached):
        def forward(self, x: Tensor) -> Tensor:
            scores = super().forward(x)
            return scores if scores.sum() > 1e9 else scores[:, :3]  # refused, after everything in front has run

    module = (Failing if fails else Cached)(InDictionary).train()
    module.norm.eval()  # by hand, as where statistics stand still
    if fails:
        with pytest.raises(ModelError):
            ee.load(module, (X[:1],))
    else:
        ee.load(module, (X[:1],))
    assert {name for name, part in module.named_modules() if not part.training} == {"norm"}
    with torch.no_grad():
        module.biases += 1.0
    assert module.cache == {}  # what was looked up meanwhile would be out of date
    module.eval()
    module.layer.train()
    ee.load(module.requires_grad_(True), (X[:1],)) if not fails else None
    assert {name for name, part in module.named_modules() if part.training} == {"layer"}


class Merging(nn.Linear):
    """Adds a low-rank product to its weight in eval mode and takes it off again to train, as LoRA layers do."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.down, self.up = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(4, 1))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged is mode:
            self.weight.data += (self.up @ self.down) * (-1.0 if mode else 1.0)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.functional.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ (self.up @ self.down).T


def test_weights_that_eval_mode_merges_are_apart_again() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Merging(), nn.ReLU(), nn.Linear(4, 3)).train()
    expected, state = module(X).detach(), {name: value.clone() for name, value in module.state_dict().items()}
    graph = ee.load(module, (X[:1],))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert not module[0].merged
    assert torch.equal(module(X), expected)
    found = ort.run(ort.session(graph), {graph.inputs[0]: X.numpy()})[graph.final]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


def test_what_forward_notes_down_is_as_before() -> None:
    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls, self.sizes = nn.Linear(4, 3), 0, [7]

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.sizes.append(x.shape[1])
            self.last = x.shape[1]
            return self.linear(x)

    module = Noting()
    sizes = module.sizes
    ee.load(module, (X[:1],))
    assert (module.calls, module.sizes) == (0, [7])
    assert module.sizes is sizes
    assert not hasattr(module, "last")
