"""The whole job from Python: look at a model, search, walk over the front, export, run, verify, time.

    python samples/python_api.py                                     # on a small model that it makes itself
    python samples/python_api.py model.onnx data.npz                 # an archive with the parts train and test

Each step is what one command of `eexform` does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import eexform as ee


def main() -> None:
    parser = argparse.ArgumentParser(description="The Python interface, step by step.")
    parser.add_argument("model", nargs="?", help="an .onnx file; default: a small one is made")
    parser.add_argument("data", nargs="?", help="an .npz file with the parts train and test")
    parser.add_argument("--out", default="python_api", help="folder for everything that is written")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--generations", type=int, default=20)
    given = parser.parse_args()
    folder = Path(given.out)
    if given.model is None:
        from small_model import make

        given.model, given.data = make(folder)

    # the model and its sites
    graph = ee.load(given.model)
    seen = ee.inspect(graph)
    print(f"{graph!r}: {seen.macs:,.0f} MACs, {len(seen.report.sites)} sites, {len(seen.report.rejected)} other values")
    for site in seen.report.sites:
        print(f"  {site.value} {site.shape}: {seen.macs_before[site.value] / seen.macs:.0%} of the MACs before it")

    # the data and the search
    data = ee.open_dataset(str(given.data), train_from="train", select_from="test", fractions=(0.2, 0.4, 0.4))
    run = ee.search(
        graph,
        data,
        out=folder / "run",
        options=ee.SearchOptions(heads=("none/avg", "mlp:1x32/avg"), generations=given.generations, seed=1),
        train=ee.TrainOptions(epochs=given.epochs, batch_size=64),
        limits=ee.Limits(min_accuracy="-5"),
    )
    print(f"state {run.state}; {run.facts['memorisation']['message']}")

    # the front: plans by rising cost, select and test side by side
    trunk = run.front.trunk
    print(f"  the model: {trunk.select['accuracy']:.1%} right on select, {trunk.test['accuracy']:.1%} on test")
    for plan in run.front:
        share, right = plan.test["macs"] / trunk.test["macs"], (plan.select["accuracy"], plan.test["accuracy"])
        print(f"  plan {plan.index}: {share:.0%} of the MACs, {right[0]:.1%} right on select, {right[1]:.1%} on test")

    # one plan, as a graph with exits and as files
    plan = run.front.pick("min-accuracy=-2")
    flat = plan.materialise()
    print(f"plan {plan.index}: {flat!r}, thresholds {[round(leaving.threshold, 3) for leaving in flat.exits]}")
    plan.export(folder / "stages", form="stages")
    plan.export(folder / "ee.onnx")

    # run it, verify it, time it
    bound = data.bind(graph)
    result = ee.StagedSession(folder / "stages").run(bound.sample_feeds("test", 64))
    print(f"64 samples in stages: {np.bincount(result.exit_index).tolist()} leave at each exit")
    for exported in (folder / "stages", folder / "ee.onnx"):
        report = ee.verify(exported, graph, bound, samples=64)
        print(f"{exported}: {'verified' if report.ok else [check for check in report.checks if not check.ok]}")
    files = [folder / "ee.onnx", folder / "stages", given.model]
    for timing in ee.bench(files, bound.sample_feeds("test", 128), batches=(1,)).results:
        print(f"  {timing.file}: median {timing.median_ms:.3f} ms, mean {timing.mean_ms:.3f} ms")


if __name__ == "__main__":
    main()
