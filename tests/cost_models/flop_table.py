"""The zoo counted twice: by torch's ``FlopCounterMode`` while the module runs, and by our rules on its graph.

``python -m tests.cost_models.flop_table`` prints the table.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from eexform.ir.arithmetic import node_macs
from eexform.ir.flops import node_flops
from eexform.ir.graph import Graph
from tests.zoo import doors, modules

KERNELS = {
    "convolution": "convolution",
    "addmm": "product",
    "bmm": "product",
    "baddbmm": "product",
    "mm": "product",
}
"""Class of work of each kernel that torch's counter meets in the zoo. Recurrent layers run as ``addmm``."""

LAYERS = {"Conv": "convolution", "Gemm": "product", "MatMul": "product", "GRU": "product"}
"""The same for our operators."""

BESIDE = {
    "bias": "Conv Gemm",
    "gates": "GRU",
    "norm": "BatchNormalization LayerNormalization",
    "activation": "Clip Gelu HardSigmoid HardSwish Relu Sigmoid Tanh",
    "softmax": "Softmax",
    "pooling": "AveragePool MaxPool ReduceMax ReduceMean",
    "element-wise": "Add Div Mul Sub Range",
}
"""What ``flops`` counts and torch's counter does not, since it has formulas for products, convolutions and attention
alone: the operators by kind of work."""

FUSED = {
    "vit": "_scaled_dot_product_flash_attention_for_cpu",
    "vit_encoder": "_transformer_encoder_layer_fwd",
}
"""Networks that torch runs on the CPU through a fused kernel for which its counter has no formula: the products in it
are missing from torch's figure."""


@dataclass(frozen=True)
class Row:
    """One network of the zoo at batch 1.

    Attributes:
        name: of the network.
        torch: operations by class of work, as torch counts the module when it runs as it does by default.
        plain: the same with fused kernels switched off, so that torch's counter sees every product.
        kernels: kernels that ran by default.
        products: 2 x multiply-accumulates by class of work, by our rules.
        beside: operations beside the products by kind of work (:data:`BESIDE`); others under the operator's name.
        flops: all operations, by our rules.
    """

    name: str
    torch: Counter[str]
    plain: Counter[str]
    kernels: frozenset[str]
    products: Counter[str]
    beside: Counter[str]
    flops: int


def row(name: str, graph: Graph) -> Row:
    """Count a network of the zoo with torch's counter, and one of its graphs with our rules."""
    counts, kernels = torch_counts(name)
    with _plain():
        plain, _ = torch_counts(name)
    kinds = {op: kind for kind, ops in BESIDE.items() for op in ops.split()}
    products: Counter[str] = Counter()
    beside: Counter[str] = Counter()
    total = 0
    for node in graph.nodes:
        macs, flops = node_macs(node, graph.types), node_flops(node, graph.types)
        if macs is None or flops is None:
            raise ValueError(f"{name}: {node.op} has no rule")
        total += flops
        if macs:
            products[LAYERS.get(node.op, node.op)] += 2 * macs
        if flops > 2 * macs:
            beside[kinds.get(node.op, node.op)] += flops - 2 * macs
    return Row(name, counts, plain, kernels, products, beside, total)


def torch_counts(name: str) -> tuple[Counter[str], frozenset[str]]:
    """Operations by class of work as ``FlopCounterMode`` counts them at batch 1, and the kernels that ran."""
    module, args = doors.module(name), modules.inputs(name, 1)
    seen, counter = _Kernels(), FlopCounterMode(display=False)
    with torch.no_grad(), counter, seen:
        module(*args)
    counts: Counter[str] = Counter()
    for kernel, operations in counter.get_flop_counts()["Global"].items():
        short = str(kernel).split(".")[-1]
        counts[KERNELS.get(short, short)] += operations
    return counts, frozenset(seen.names)


class _Kernels(TorchDispatchMode):
    """Notes the names of the kernels that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def _plain() -> Iterator[None]:
    """Attention and encoder layers as products of their own, which torch's counter sees."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    kinds = list(BESIDE)
    head = ["network", "FlopCounterMode", "2 x macs", "difference", "flops", *kinds]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for item in rows:
        ours, theirs = item.products.total(), item.torch.total()
        cells = [theirs, ours, ours - theirs, item.flops, *(item.beside[kind] for kind in kinds)]
        lines.append(f"| {item.name} | " + " | ".join(f"{cell:,}" for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(table([row(name, doors.graph(name, "torch")) for name in modules.NAMES]))
