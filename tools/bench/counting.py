"""What one step asks of a machine: arithmetic, traffic and the shapes of its matrix products, counted as it runs.

**FLOPs** are torch's own count (``torch.utils.flop_counter``): two per multiply-add of every matrix product,
convolution and scaled-dot-product attention, forward and backward as the step really runs them; elementwise work,
normalisation, softmax and optimisers are not in it.

**Bytes** are the sizes of every operator's tensor inputs and outputs, each distinct storage once per operator, as if
nothing stayed in a cache between two operators and nothing were fused. Views cost nothing. It is what an eager step
moves at most, not what it must move.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """A matrix product (m, k) × (k, n), ``batch`` of them; a convolution as the product it implies."""

    batch: int
    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        """Two per multiply-add."""
        return 2 * self.batch * self.m * self.k * self.n


@dataclass(frozen=True)
class Count:
    """What a step did.

    Attributes:
        flops: see the module.
        bytes: see the module.
        operators: operators called that were no views.
        products: shape → how often it occurred, of forward products and convolutions.
    """

    flops: int
    bytes: int
    operators: int
    products: dict[Product, int]

    def heaviest(self, share: float) -> list[tuple[Product, float]]:
        """The fewest shapes that hold ``share`` of the products' arithmetic, heaviest first, and the share of each."""
        total = sum(shape.flops * often for shape, often in self.products.items()) or 1
        kept: list[tuple[Product, float]] = []
        for shape, often in sorted(self.products.items(), key=lambda item: -item[0].flops * item[1]):
            if sum(part for _, part in kept) >= share:
                break
            kept.append((shape, shape.flops * often / total))
        return kept


class _Traffic(TorchDispatchMode):
    """Adds up bytes, and notes the shapes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operators = 0
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func in (aten.detach.default, aten.alias.default):
            return out
        self.operators += 1
        storages = {}
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor):
                place = tensor.untyped_storage()._cdata, tensor.storage_offset()
                storages[place] = tensor.numel() * tensor.element_size()
        self.bytes += sum(storages.values())
        product = _product(func, args, out)
        if product is not None:
            self.products[product] += 1
        return out


def _product(func: Any, args: Any, out: Any) -> Product | None:
    """The matrix product behind a forward operator; None for any other."""
    if func is aten.mm.default:
        return Product(1, args[0].shape[0], args[0].shape[1], args[1].shape[1])
    if func is aten.addmm.default:
        return Product(1, args[1].shape[0], args[1].shape[1], args[2].shape[1])
    if func is aten.bmm.default:
        batch, m, k = args[0].shape
        return Product(batch, m, k, args[1].shape[2])
    if func is aten.convolution.default:
        groups, weight = args[8], args[1]
        pixels = out.shape[0] * prod(out.shape[2:])
        return Product(groups, pixels, prod(weight.shape[1:]), weight.shape[0] // groups)
    return None


def count(work: Callable[[], Any]) -> Count:
    """Run ``work`` once and count it.

    Fused attention of evaluation mode is switched off meanwhile, since its one operator has no formula.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    traffic, counter = _Traffic(), FlopCounterMode(display=False)
    try:
        with traffic, counter:
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return Count(counter.get_total_flops(), traffic.bytes, traffic.operators, dict(traffic.products))
