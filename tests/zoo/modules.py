"""The zoo as PyTorch modules: tiny networks with the wiring of real ones, for the tests of the PyTorch door.

``module("vit")`` gives an ``nn.Module`` in eval mode with random weights (statistics and affine parameters of
normalisations, tokens and biases too, so that no part of it is an identity); ``inputs("vit", batch=2)`` what its
``forward`` takes. Modules are made anew at every call; their graphs are in :mod:`tests.zoo.doors`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.zoo import torch_convnets, torch_mobile, torch_sequence, torch_transformers

_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "cnn": torch_convnets.PlainCNN,
    "vgg": torch_convnets.VGG,
    "resnet_a": lambda: torch_convnets.ResNet("A"),
    "resnet_b": lambda: torch_convnets.ResNet("B"),
    "preact": torch_convnets.PreActResNet,
    "densenet": torch_convnets.DenseNet,
    "inception": torch_convnets.Inception,
    "mobilenet_v2": torch_mobile.MobileNetV2,
    "mobilenet_v3": torch_mobile.MobileNetV3,
    "shufflenet_v2": torch_mobile.ShuffleNetV2,
    "efficientnet": torch_mobile.EfficientNet,
    "convnext": torch_mobile.ConvNeXt,
    "vit": torch_transformers.ViT,
    "vit_encoder": torch_transformers.ViTEncoder,
    "swin": torch_transformers.Swin,
    "mixer": torch_transformers.Mixer,
    "bert": torch_transformers.Bert,
    "kws_gru": torch_sequence.GRUSpotter,
    "kws_conv": torch_sequence.ConvSpotter,
}

NAMES = tuple(_BUILDERS)
CLASSES = 5
_FRAMES = {"kws_gru": (20, 10), "kws_conv": (10, 32)}
_WORDS = 7


def module(name: str, seed: int = 0) -> nn.Module:
    """The network called ``name``, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = _BUILDERS[name]()
        _shake(made, name)
    return made.eval()


def _shake(made: nn.Module, name: str) -> None:
    """Noise on every parameter that starts as zeros or ones; statistics near, not at, those of random inputs."""
    norms = [part for part in made.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in made.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3)
            elif bool((parameter == parameter.flatten()[0]).all()):
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
            elif name == "cnn" and parameter.ndim > 1:  # no normalisation at all: torch's default would fade
                parameter.mul_(2)
        for part in norms:
            part.momentum = 1.0
        made.train()(*inputs(name, 16, seed=1))  # else activations fade with depth and all samples look alike
        for part in norms:
            part.momentum = 0.1
            part.running_mean += 0.3 * part.running_var.sqrt() * torch.randn_like(part.running_mean)
            part.running_var *= torch.empty_like(part.running_var).uniform_(0.6, 1.4)


def inputs(name: str, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """Random positional arguments of the network called ``name``."""
    random = torch.Generator().manual_seed(seed)
    if name == "bert":
        lengths = torch.randint(3, _WORDS + 1, (batch, 1), generator=random)
        ids = torch.randint(1, 20, (batch, _WORDS), generator=random)
        mask = (torch.arange(_WORDS) < lengths).long()
        return ids * mask, mask
    return (torch.randn(batch, *_FRAMES.get(name, (3, 16, 16)), generator=random),)


def logits(found: Tensor | torch_transformers.ClassifierOutput) -> Tensor:
    """The scores in what a network's ``forward`` returned, [N, classes]."""
    return found if isinstance(found, Tensor) else found.logits
