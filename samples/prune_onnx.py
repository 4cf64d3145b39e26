"""Prune an ONNX classifier: a model, a recipe and samples in; a smaller file out, and the plan that makes it again.

    python samples/prune_onnx.py                                     # on a small model that it makes itself
    python samples/prune_onnx.py model.onnx data.npz --select-from test --layout nhwc --scale 1/255 --epochs 20

The same from the command line: eexform groups, eexform apply --data, eexform distill, eexform bench.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime

import eexform as ee


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune an ONNX classifier.")
    parser.add_argument("model", nargs="?", help="an .onnx file; default: a small one is made")
    parser.add_argument("data", nargs="?", help="an .npz file, a folder of class folders, hf:... or module:attribute")
    parser.add_argument("--recipe", default=Path(__file__).with_name("prune.toml"), help="which passes, and how much")
    parser.add_argument("--out", default="prune", help="folder for everything that is written")
    parser.add_argument("--select-from", help="part of the data that the model was not trained on")
    parser.add_argument("--layout", help="layout of raw images: nhwc or nchw")
    parser.add_argument("--scale", help="factor for raw values, such as 1/255")
    parser.add_argument("--epochs", type=int, default=5, help="of distillation afterwards; 0: none")
    given = parser.parse_args()

    folder = Path(given.out)
    folder.mkdir(parents=True, exist_ok=True)
    if given.model is None:
        from small_model import make

        given.model, given.data = make(folder)
        given.select_from = "test"

    graph = ee.load(given.model)
    data = ee.open_dataset(
        str(given.data),
        select_from=given.select_from,
        preprocess=ee.Preprocess.parse(layout=given.layout, scale=given.scale),
    )
    for group in graph.groups.groups:
        print(f"{group.name}: {group.size} {group.kind}, {group.frozen or 'prunable'}")

    result = ee.apply(graph, str(given.recipe), data=data, plan_out=folder / "plan.json")
    print("\n".join(result.notes))
    files = {"the model": given.model, "pruned": folder / "small.onnx"}
    ee.save(result.graph, files["pruned"])
    again = ee.apply(graph, str(folder / "plan.json")).graph
    print("the plan alone gives the same network:", again.digest == result.graph.digest)
    if given.epochs:
        files["taught"] = folder / "taught.onnx"
        ee.distill(result.graph, data, teacher=graph, epochs=given.epochs, out=files["taught"])

    bound = data.bind(graph)
    test = bound.batch("test", np.arange(bound.size("test")))
    timings = ee.bench(files.values(), test.feeds, batches=(32,))
    for name, file in files.items():
        said = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, dict(test.feeds))[0]
        macs, right = ee.inspect(ee.load(file)).macs, np.mean(said.argmax(axis=1) == test.labels)
        time = timings.ratio(str(file), str(given.model), 32)
        print(f"{name}: {macs:,.0f} MACs, {right:.2%} right on test, {time:.2f} of the model's time at batch 32")


if __name__ == "__main__":
    try:
        main()
    except ee.EexformError as error:
        raise SystemExit(f"error: {error}") from None
