"""Give an ONNX classifier early exits: a model and a data set in, a file that skips work out.

    python samples/retrofit_onnx.py                                  # on a small model that it makes itself
    python samples/retrofit_onnx.py model.onnx data.npz --select-from test --layout nhwc --scale 1/255

Part --select-from of the data must be unseen by the model: temperatures, plans and thresholds are chosen there, and the
figures are judged on a share of it that no choice has touched.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import eexform as ee


def main() -> None:
    parser = argparse.ArgumentParser(description="Give an ONNX classifier early exits.")
    parser.add_argument("model", nargs="?", help="an .onnx file; default: a small one is made")
    parser.add_argument("data", nargs="?", help="an .npz file, a folder of class folders, hf:... or module:attribute")
    parser.add_argument("--out", default="retrofit", help="folder for everything that is written")
    parser.add_argument("--select-from", help="part of the data that the model was not trained on")
    parser.add_argument("--layout", help="layout of raw images: nhwc or nchw")
    parser.add_argument("--scale", help="factor for raw values, such as 1/255")
    parser.add_argument("--mean", help="subtracted after scaling, such as 0.49,0.48,0.45")
    parser.add_argument("--std", help="divisor after that")
    parser.add_argument("--augment", default="none", help="for training the heads, such as flip,crop:4")
    parser.add_argument("--pick", default="min-accuracy=-1", help="which plan to export, as in `eexform export`")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--generations", type=int, default=40)
    given = parser.parse_args()

    folder = Path(given.out)
    if given.model is None:
        from small_model import make

        given.model, given.data = make(folder)
        given.select_from = "test"

    graph = ee.load(given.model)
    data = ee.open_dataset(
        str(given.data),
        select_from=given.select_from,
        preprocess=ee.Preprocess.parse(layout=given.layout, scale=given.scale, mean=given.mean, std=given.std),
        augment=given.augment,
    )
    run = ee.search(
        graph,
        data,
        out=folder / "run",
        options=ee.SearchOptions(generations=given.generations),
        train=ee.TrainOptions(epochs=given.epochs),
    )

    plan, trunk = run.front.pick(given.pick), run.front.trunk
    exported = folder / "model.ee.onnx"
    plan.export(exported)
    for name, of in (("the model alone", trunk), (f"with {len(plan.exits)} exits", plan)):
        print(f"{name}: {of.test['accuracy']:.2%} right on test, {of.test['macs']:,.0f} MACs on average")
    for leaves, share in zip([*(exit_.site for exit_ in plan.exits), "the end"], plan.test["rates"], strict=True):
        print(f"  {share:6.1%} of the samples leave at {leaves}")

    bound = data.bind(graph)
    report = ee.verify(exported, graph, bound)
    report.require()
    print(f"{exported}: {len(report.checks)} checks passed on {report.samples} samples")
    timings = ee.bench([exported, given.model], bound.sample_feeds("test", 256), batches=(1, 32))
    for size in (1, 32):
        print(f"mean time at batch {size}: {timings.ratio(str(exported), str(given.model), size):.2f} of the model's")


if __name__ == "__main__":
    try:
        main()
    except ee.EexformError as error:
        raise SystemExit(f"error: {error}") from None
