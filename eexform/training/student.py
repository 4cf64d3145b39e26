"""A head under training: its module, its averaged parameters and the best it has been."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from eexform.backends.fx import fx_parameters, raise_to_fx
from eexform.data.dataset import Batch
from eexform.errors import TrainingError
from eexform.heads import HeadSpec, head_graph
from eexform.heads.build import GATE
from eexform.ir.sites import Site
from eexform.training.losses import gate_loss, head_loss
from eexform.training.options import TrainOptions


@dataclass(frozen=True)
class GivenHead:
    """A head that was trained elsewhere.

    Attributes:
        order: place of the site on a sample's way.
        site: where it belongs.
        spec: its shape.
        arrays: its parameters by their names in the head's graph.
    """

    order: int
    site: Site
    spec: HeadSpec
    arrays: Mapping[str, np.ndarray]

    def parameters(self) -> dict[str, np.ndarray]:
        """The parameters by their names in the head's graph."""
        return dict(self.arrays)


def head_seed(seed: int, site: str, spec: HeadSpec) -> int:
    """Seed of a head's initial values: its own, whatever other heads are trained beside it, gate or not."""
    text = str((site, str(replace(spec, gate=False))))
    return int(np.random.SeedSequence([seed, *text.encode()]).generate_state(1)[0])


class Student:
    """One head at one site.

    Attributes:
        order: place of the site on a sample's way.
        module: the trainable graph module raised from the head's graph; outputs logits, and what the gate says where
            there is one.
        best_loss: lowest loss on calibrate so far.
        stale: epochs since then.
    """

    def __init__(self, order: int, site: Site, spec: HeadSpec, num_classes: int, options: TrainOptions) -> None:
        self.order = order
        self.site = site
        self.spec = spec
        seed = head_seed(options.seed, site.value, spec)
        self.module = raise_to_fx(head_graph(spec, site, num_classes=num_classes, scores="logits", seed=seed))
        self.decay = options.ema
        self.average = self._state() if self.decay else {}
        self.best = self._state()
        self.best_loss = float("inf")
        self.stale = 0

    def loss(self, features: torch.Tensor, teacher: torch.Tensor, batch: Batch, options: TrainOptions) -> torch.Tensor:
        """The loss of the scores on a batch.

        A gate's own loss is sent back here and now, into the gate's parameters alone: what classifies does not learn
        from it, so that the scores of a head with a gate are bit for bit those of the same head without.

        Args:
            features: the site's values, [batch, ...].
            teacher: the trunk's final logits, [batch, classes].
            batch: labels and how they were mixed.
            options: of the training.
        """
        found = self.module(features)
        scores, gate = found if self.spec.gate else (found, None)
        if gate is not None:
            own = [value for name, value in self.module.named_parameters() if name.startswith(f"{GATE}.")]
            gate_loss(gate, scores, teacher, batch).backward(inputs=own)
        return head_loss(scores, teacher, batch, options)

    def update_average(self) -> None:
        """Move the averaged parameters one step towards the current ones."""
        with torch.no_grad():
            for name, value in self.module.state_dict().items() if self.decay else ():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - self.decay)
                else:
                    self.average[name].copy_(value)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Logits on the site's values, float32 [n, classes], with the averaged parameters where there are any."""
        current = None
        if self.decay and self.average:
            current = self._state()
            self.module.load_state_dict(self.average)
        self.module.eval()
        with torch.inference_mode():
            found = self.module(torch.from_numpy(features))
            result: np.ndarray = (found[0] if self.spec.gate else found).numpy().astype(np.float32)
        if current is not None:
            self.module.load_state_dict(current)
        return result

    def consider(self, loss: float, epoch: int) -> None:
        """Keep the present parameters where they are the best so far."""
        if loss < self.best_loss:
            self.best_loss, self.stale = loss, 0
            self.best = {name: value.clone() for name, value in (self.average or self.module.state_dict()).items()}
        else:
            self.stale += 1

    def load_best(self) -> None:
        """Make the best parameters the current ones."""
        self.module.load_state_dict(self.best)
        self.average = {}

    def parameters(self) -> dict[str, np.ndarray]:
        """The current parameters by their names in the head's graph.

        Raises:
            TrainingError: one of them is not finite.
        """
        arrays = fx_parameters(self.module)
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise TrainingError(f"head {self.spec} at {self.site.value!r}: parameter {name!r} is not finite")
        return arrays

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.module.state_dict().items()}
