"""What the samples work on when they are given nothing: a small trained network and its data, as files.

The network is scikit-learn's multi-layer perceptron on 8x8 digits, written down node by node as ONNX, so that nothing
but eexform's own dependencies is needed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier


def make(folder: str | Path, *, width: int = 512, depth: int = 4) -> tuple[Path, Path]:
    """Train the network on one half of the digits and write it and the data.

    Args:
        folder: where to write; made if it is not there.
        width: neurons per hidden layer.
        depth: hidden layers.

    Returns:
        ``model.onnx`` and ``digits.npz``. The archive's parts are ``train``, which the network has seen, and ``test``,
        which it has not.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = (digits.data[order] / 16).astype(np.float32), digits.target[order].astype(np.int64)
    half = len(y) // 2
    network = MLPClassifier((width,) * depth, max_iter=60, early_stopping=True, random_state=0).fit(x[:half], y[:half])
    onnx.save(_as_onnx(network.coefs_, network.intercepts_), folder / "model.onnx")
    np.savez(folder / "digits.npz", x_train=x[:half], y_train=y[:half], x_test=x[half:], y_test=y[half:])
    return folder / "model.onnx", folder / "digits.npz"


def _as_onnx(weights: list[np.ndarray], biases: list[np.ndarray]) -> onnx.ModelProto:
    nodes, constants, value = [], [], "pixels"
    for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        last = place == len(weights) - 1
        made = "logits" if last else f"layer{place}.sum"
        for name, array in (("weight", weight), ("bias", bias)):
            constants.append(numpy_helper.from_array(array.astype(np.float32), f"layer{place}.{name}"))
        inputs = [value, f"layer{place}.weight", f"layer{place}.bias"]
        nodes.append(helper.make_node("Gemm", inputs, [made], f"layer{place}"))
        value = f"layer{place}.out"
        if not last:
            nodes.append(helper.make_node("Relu", [made], [value], f"layer{place}.relu"))
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", weights[0].shape[0]])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", weights[-1].shape[1]])
    graph = helper.make_graph(nodes, "digits_mlp", [pixels], [logits], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model
