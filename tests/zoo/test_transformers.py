"""Classifiers of Hugging Face transformers, tiny and untrained: what is promised of every module."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import eexform as ee
from eexform.backends import ort
from eexform.backends.export import export
from eexform.frontends.torch import from_reference
from eexform.heads import portfolio
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.passes import PassContext
from eexform.passes.insert_exits import InsertExits
from eexform.verification.simulate import simulate
from eexform.verification.verify import verify
from tests.lowering import nets

hf = pytest.importorskip("transformers", reason="transformers is in the extra dev, and not installed here")

CLASSES, LENGTH, PAD = 5, 12, 0
WIDE = {"num_labels": CLASSES, "initializer_range": 0.15, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE |= {"hidden_size": 32, "intermediate_size": 48}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
WORDS = {"vocab_size": 96, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
SOUND = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
SOUND |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16}
SOUND |= dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}

Inputs = dict[str, Tensor]
NETS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "bert": (lambda: made("Bert", **WIDE, **STILL, **WORDS, max_position_embeddings=40), "typed", 8),
    "gpt2": (
        lambda: made(
            "GPT2",
            **{**WORDS, "num_labels": CLASSES, "initializer_range": 0.15},
            **{"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        ),
        "text",
        6,
    ),
    "llama": (lambda: made("Llama", **WIDE, **WORDS, num_key_value_heads=2), "text", 6),
    "t5": (
        lambda: made(
            "T5",
            **{**WORDS, "num_labels": CLASSES, "decoder_start_token_id": PAD, "dropout_rate": 0.0},
            **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "classifier_dropout": 0.0},
        ),
        "text",
        3,
    ),
    "swin": (
        lambda: made("Swin", "Image", **SWIN, num_labels=CLASSES, initializer_range=0.15, drop_path_rate=0.0),
        "image",
        12,
    ),
    "convnext": (
        lambda: made(
            "ConvNext", "Image", hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, num_labels=CLASSES,
            initializer_range=0.15, layer_scale_init_value=0.5,
        ),
        "image",
        6,
    ),
    "wav2vec2": (
        lambda: made("Wav2Vec2", **WIDE, **SOUND, vocab_size=32, layerdrop=0.0, apply_spec_augment=False),
        "sound",
        8,
    ),
}  # fmt: skip
"""How each is made, what it takes, and the fewest sites that it must have."""

NAMES = tuple(NETS)

UNUSED = {"wav2vec2.masked_spec_embed"}
"""What only augmentation in training mode reads: no graph has it."""


def made(family: str, task: str = "Sequence", **settings: object) -> nn.Module:
    """A network of a family with random weights; normalisation layers not at their neutral start."""
    torch.manual_seed(0)
    module: nn.Module = getattr(hf, f"{family}For{task}Classification")(getattr(hf, f"{family}Config")(**settings))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 and "norm" in name.lower():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return module.eval()


def bert() -> nn.Module:
    """For the command line, which wants a function without arguments."""
    return module("bert")


@cache
def module(name: str) -> nn.Module:
    """A constant: evaluate it, leave it as it is."""
    return NETS[name][0]()


def inputs(name: str, batch: int, seed: int) -> Inputs:
    """Keyword arguments; texts and sounds are padded to one length, each from another place on."""
    dice, kind = torch.Generator().manual_seed(seed), NETS[name][1]
    if kind == "image":
        return {"pixel_values": torch.randn((batch, 3, 32, 32), generator=dice)}
    length = 640 if kind == "sound" else LENGTH
    long = torch.randint(length // 3, length + 1, (batch,), generator=dice)
    mask = torch.arange(length) < long[:, None]
    if kind == "sound":
        return {"input_values": torch.randn((batch, length), generator=dice) * mask, "attention_mask": mask.long()}
    ids = torch.randint(3, 96, (batch, length), generator=dice)
    ids[torch.arange(batch), long - 1] = 2  # the end of a text, which encoder-decoders look for
    made = {"input_ids": torch.where(mask, ids, PAD), "attention_mask": mask.long()}
    return made | ({"token_type_ids": (mask & (torch.arange(length) > 3)).long()} if kind == "typed" else {})


@cache
def graph(name: str) -> Graph:
    return ee.load(module(name), example_inputs=inputs(name, 1, seed=1))


def feeds(name: str, batch: int, seed: int) -> dict[str, np.ndarray]:
    found = {key: value.numpy() for key, value in inputs(name, batch, seed).items()}
    return {key: found[key] for key in graph(name).inputs}


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_says_what_the_module_says(name: str) -> None:
    session = ort.session(graph(name))
    for batch in (1, 7):
        with torch.no_grad():
            expected = module(name)(**inputs(name, batch, seed=batch)).logits
        assert expected.shape == (batch, CLASSES)
        assert batch == 1 or float(expected.std(0).max()) > 0.01  # samples differ, or nothing would be compared
        found = ort.run(session, feeds(name, batch, seed=batch))[graph(name).final]
        assert relative(torch.from_numpy(found), expected) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_sites_are_called_after_sub_modules(name: str) -> None:
    report, paths = find_sites(graph(name)), {path for path, _ in module(name).named_modules() if path}
    named = [site for site in report.sites if any(site.value.startswith(path) for path in paths)]
    assert len(named) >= NETS[name][2]


@pytest.mark.parametrize("name", NAMES)
def test_exits_lowered_and_verified(name: str, tmp_path: Path) -> None:
    sites = find_sites(graph(name)).sites
    heads = {}
    for place in (len(sites) // 3, 2 * len(sites) // 3):
        offered = portfolio(sites[place], trunk_macs=10**9, num_classes=CLASSES, max_share=0.5)
        heads[sites[place].value] = str(offered[len(heads)])
    step = InsertExits(tuple(heads), heads, dict.fromkeys(heads, 0.5), untrained=True)
    flat = step.run(graph(name), PassContext(seed=7)).graph
    given = feeds(name, 9, seed=3)
    flat = nets.set_thresholds(flat, nets.spread(simulate(flat, given)))
    leaving = simulate(flat, given).decisions().exit_index
    assert len(set(leaving.tolist())) > 1
    verify(export(flat, tmp_path / "ee.onnx", "if"), graph(name), given).require()  # batch sizes 1 and 7 among others
    with torch.no_grad():
        found = ee.to_torch(flat)(*(torch.from_numpy(value) for value in given.values()))
    np.testing.assert_array_equal(found.exit_index.numpy(), leaving)


@pytest.mark.parametrize("name", NAMES)
def test_back_to_torch(name: str) -> None:
    """The same keys, numbers and gradients as the module that came in, in training mode."""
    ours, theirs = ee.to_torch(graph(name)), NETS[name][0]()
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items() if key not in UNUSED
    }
    ours.train()
    theirs.train()
    given = inputs(name, 7, seed=5)
    found, expected = ours(*(given[key] for key in graph(name).inputs)), theirs(**given).logits
    assert relative(found.detach(), expected.detach()) <= 1e-5
    wanted = torch.randn(expected.shape, generator=torch.Generator().manual_seed(11))
    (found * wanted).sum().backward()
    (expected * wanted).sum().backward()
    mine = dict(ours.named_parameters())
    gradients = {key: value.grad for key, value in theirs.named_parameters() if value.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert len(gradients) > 10
    for key, gradient in gradients.items():
        scale = max(float(gradient.abs().max()), 1e-2 * largest)  # what cancels is compared with the largest of all
        found_gradient = mine[key].grad
        assert found_gradient is not None, key
        assert float((found_gradient - gradient).abs().max()) <= 1e-4 * scale, key
    missing, unexpected = NETS[name][0]().load_state_dict(ours.state_dict(), strict=False)
    assert set(missing) <= UNUSED
    assert not unexpected


def test_by_reference() -> None:
    """As on the command line."""
    given = [f"{key}=1,{LENGTH}:int64" for key in ("input_ids", "attention_mask", "token_type_ids")]
    found = from_reference(f"{__name__}:bert", inputs=given)
    assert found.digest == graph("bert").digest
