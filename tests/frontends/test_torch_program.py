"""Habits of code that torch's ONNX exporter cannot write, or writes as if samples met: graphs say what modules say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import eexform as ee
from eexform.backends import ort
from eexform.errors import ModelError
from eexform.ir.kinds import kinds

LENGTH, WIDTH = 6, 8
Habit = Callable[["Masked", Tensor, Tensor], Tensor]


class Masked(nn.Module):
    """Token numbers and a mask of integers; ``habit`` says what is done with them."""

    def __init__(self, habit: Habit) -> None:
        super().__init__()
        self.habit = habit
        self.embedding = nn.Embedding(11, WIDTH)
        self.mask_token = nn.Parameter(torch.randn(WIDTH))
        self.bias = nn.Embedding(4, LENGTH)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH), persistent=False)
        self.classifier = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.habit(self, self.embedding(input_ids) * self.scale, attention_mask)
        scores: Tensor = self.classifier(hidden.square().sum(1))
        return scores


def from_one(module: Masked, hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden * (1.0 - mask).unsqueeze(-1)


def from_one_bool(module: Masked, hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden * torch.rsub(mask.bool().to(torch.int32), 1.5).unsqueeze(-1)


def number(module: Masked, hidden: Tensor, mask: Tensor) -> Tensor:
    hidden = hidden.clone()
    hidden[mask == 0] = 0.5
    return hidden


def number_everywhere(module: Masked, hidden: Tensor, mask: Tensor) -> Tensor:
    hidden = hidden.clone()
    hidden[(mask == 0).unsqueeze(-1) & (hidden > 0)] = -1.0
    return hidden


def row(module: Masked, hidden: Tensor, mask: Tensor) -> Tensor:
    hidden = hidden.clone()
    hidden[mask == 0] = module.mask_token
    return hidden


def row_of_one(module: Masked, hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.index_put(((mask == 0),), module.mask_token.unsqueeze(0))


def through_a_view(module: Masked, hidden: Tensor, mask: Tensor) -> Tensor:
    hidden = hidden.clone()
    part = hidden[:, 2:]
    part[mask[:, 2:] == 0] = 0.25
    return hidden


def whole_samples(module: Masked, hidden: Tensor, mask: Tensor) -> Tensor:
    hidden = hidden.clone()
    hidden[mask.sum(1) > 3] = 0.25
    return hidden


def learned_mask(module: Masked, hidden: Tensor, mask: Tensor) -> Tensor:
    """Attention with a bias that is computed from a parameter, as with relative positions, then a reshape."""
    batch = hidden.shape[0]
    query = hidden.reshape(batch, LENGTH, 4, 2).transpose(1, 2)
    bias = module.bias.weight.reshape(1, 4, 1, LENGTH) + (1 - mask[:, None, None]) * -1e4
    made = functional.scaled_dot_product_attention(query, query, query, attn_mask=bias)
    return made.transpose(1, 2).reshape(batch, LENGTH, WIDTH)


def windows(module: Masked, hidden: Tensor, mask: Tensor) -> Tensor:
    """Attention with five axes: [samples, windows, heads, positions, width]."""
    batch = hidden.shape[0]
    query = hidden.reshape(batch, 2, 3, 4, 2).transpose(2, 3)
    made = functional.scaled_dot_product_attention(query, query, query).transpose(2, 3)
    return made.reshape(batch, LENGTH, WIDTH) * mask.unsqueeze(-1)


def one_head(module: Masked, hidden: Tensor, mask: Tensor) -> Tensor:
    made: Tensor = functional.scaled_dot_product_attention(hidden, hidden, hidden, is_causal=True, scale=0.3)
    return made * mask.unsqueeze(-1)


HABITS = (
    from_one,
    from_one_bool,
    number,
    number_everywhere,
    row,
    row_of_one,
    through_a_view,
    whole_samples,
    learned_mask,
    windows,
    one_head,
)


def examples(batch: int) -> tuple[Tensor, Tensor]:
    dice = torch.Generator().manual_seed(batch)
    mask = torch.randint(0, 2, (batch, LENGTH), generator=dice)
    mask[:, 0] = 1
    return torch.randint(0, 11, (batch, LENGTH), generator=dice), mask


@pytest.mark.parametrize("habit", HABITS, ids=lambda habit: habit.__name__)
def test_the_graph_and_its_module_say_what_the_module_says(habit: Habit) -> None:
    torch.manual_seed(0)
    module = Masked(habit).eval()
    graph = ee.load(module, examples(1))
    session, raised = ort.session(graph), ee.to_torch(graph)
    for batch in (1, 7):
        ids, mask = examples(batch)
        expected = module(ids, mask).detach()
        found = ort.run(session, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[graph.final]
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(raised(ids, mask).detach(), expected, rtol=1e-5, atol=1e-5)
    assert not module(ids, mask).equal(module(ids, torch.ones_like(mask)))  # the mask counts


def test_windows_that_share_a_query_are_refused() -> None:
    """Axes that broadcast cannot be flattened into one."""

    def shared(module: Masked, hidden: Tensor, mask: Tensor) -> Tensor:
        keys = hidden.reshape(hidden.shape[0], 2, 3, 4, 2).transpose(2, 3)
        query = module.mask_token.reshape(1, 1, 4, 1, 2).expand(1, 2, 4, 1, 2)
        made = functional.scaled_dot_product_attention(query, keys, keys).reshape(-1, 2, WIDTH)
        return made * mask[:, :1].unsqueeze(-1)

    with pytest.raises(ModelError, match="cannot be written as ONNX"):
        ee.load(Masked(shared), examples(1))


def test_one_value_per_place_is_left_to_the_exporter() -> None:
    def per_place(module: Masked, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[mask == 0] = -hidden[mask == 0]
        return hidden

    with pytest.raises(ModelError, match=r"samples of a batch|cannot be"):
        ee.load(Masked(per_place), examples(1))


def test_buffers_that_no_state_dict_holds_are_no_keys_either() -> None:
    module = Masked(row).eval()
    graph = ee.load(module, examples(1))
    assert kinds(graph.metadata)["scale"] == "constant"
    raised = ee.to_torch(graph)
    assert set(raised.state_dict()) == {"embedding.weight", "mask_token", "classifier.weight", "classifier.bias"}
    with torch.no_grad():
        module.mask_token += 1
    written = ee.to_torch(ee.write_back(graph, module, strict=False))
    torch.testing.assert_close(written(*examples(7)), module(*examples(7)))


class Cached(nn.Module):
    """As vision transformers do with attention biases: looked up once in eval mode, and forgotten by ``train()``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 8)
        self.biases = nn.Parameter(torch.randn(3))
        self.classifier = nn.Linear(8, 3)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Cached:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training or "biases" not in self.cache:
            self.cache["biases"] = self.biases[torch.arange(8) % 3]
        scores: Tensor = self.classifier(torch.tanh(self.layer(x) + self.cache["biases"]))
        return scores


@pytest.mark.parametrize("used", [False, True])
def test_what_a_module_looked_up_once_is_no_constant(used: bool, recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    module, x = Cached().eval(), torch.randn(5, 4)
    if used:
        module(x)
    raised = ee.to_torch(ee.load(module, x[:1]))
    assert not recwarn.list
    assert set(raised.state_dict()) == set(module.state_dict())
    torch.testing.assert_close(raised(x), module(x))
    raised(x).square().sum().backward()
    gradient = raised.get_parameter("biases").grad
    assert gradient is not None
    assert gradient.abs().min() > 0


class Padded(nn.Module):
    """Zeros around features that are negative, then the largest of each window."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.pool = nn.Sequential(nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(3, 2))
        self.classifier = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.pool(-self.layer(x).square()).sum((2, 3)))
        return scores


def test_zeros_around_negative_features_stay_zeros_in_onnxruntime() -> None:
    torch.manual_seed(0)
    module, x = Padded().eval(), torch.randn(5, 3, 9, 9)
    graph = ee.load(module, x[:1])
    expected = module(x).detach()
    found = ort.run(ort.session(graph), {graph.inputs[0]: x.numpy()})[graph.final]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ee.to_torch(graph)(x).detach(), expected, rtol=1e-5, atol=1e-5)
