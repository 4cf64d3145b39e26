"""A head under training: its module, its averaged parameters and the best it has been."""

from __future__ import annotations

import numpy as np
import torch

from eexform.backends.fx import fx_parameters, raise_to_fx
from eexform.errors import EexformError
from eexform.heads import HeadSpec, head_graph
from eexform.ir.sites import Site
from eexform.training.options import TrainOptions


class Student:
    """One head at one site.

    Attributes:
        order: place of the site on a sample's way.
        module: the trainable graph module raised from the head's graph; outputs logits.
        best_loss: lowest loss on calibrate so far.
        stale: epochs since then.
    """

    def __init__(self, order: int, site: Site, spec: HeadSpec, num_classes: int, options: TrainOptions) -> None:
        self.order = order
        self.site = site
        self.spec = spec
        # Every head draws its own initial values, the same whatever other heads are trained beside it.
        seed = int(np.random.SeedSequence([options.seed, *str((site.value, str(spec))).encode()]).generate_state(1)[0])
        self.module = raise_to_fx(head_graph(spec, site, num_classes=num_classes, scores="logits", seed=seed))
        self.decay = options.ema
        self.average = self._state() if self.decay else {}
        self.best = self._state()
        self.best_loss = float("inf")
        self.stale = 0

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
            result: np.ndarray = self.module(torch.from_numpy(features)).numpy().astype(np.float32)
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
            EexformError: one of them is not finite.
        """
        arrays = fx_parameters(self.module)
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise EexformError(f"head {self.spec} at {self.site.value!r}: parameter {name!r} is not finite")
        return arrays

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.module.state_dict().items()}
