"""One matrix of a model, without its adapter and with it.

A layer holds one matrix, a bank of experts several; and an adapter changes
it, or puts another one in its place. Here each is one W, one W', and what its
method says of the difference.
"""

import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from keras_svdtune.hosts import attach
from keras_svdtune.hosts.host import host_matrix_of, host_value_of
from keras_svdtune.methods.base import Method
from keras_svdtune.runtime import processes
from keras_svdtune.runtime.parallel import run_all

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ModelMatrix:
    """One matrix of a plain or adapted layer.

    Attributes:
        path: str, the layer's; `#i` at the end for the i-th of a bank.
        layer: a layer, or a `RawKernel`.
        index: int, which one of a bank; or None.
    """

    path: str
    layer: Any
    index: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out)."""
        return attach.view_of(self.layer).shape

    @property
    def method(self) -> Method | None:
        """What the layer is adapted by, if it is."""
        adapter = attach.adapter_of(self.layer)
        return None if adapter is None else adapter.method

    @property
    def replaced(self) -> bool:
        """Whether the layer's kernel is not W but was made for its adapter."""
        adapter = attach.adapter_of(self.layer)
        return adapter is not None and adapter.replaced is not None

    def kernel(self) -> Any:
        """(in, out), float32: what is in the layer. W, unless `replaced`."""
        matrix = host_matrix_of(self.layer)
        return matrix if self.index is None else matrix[self.index]

    def base(self) -> Any:
        """W (in, out), float32: without what the adapter has learned."""
        kernel = self.kernel()
        if not self.replaced:
            return kernel
        assert self.method is not None
        return self.method.merged(self.weights(neutral=True), kernel)

    def merged(self) -> Any:
        """W' (in, out), float32; W where there is no adapter."""
        kernel = self.kernel()
        if self.method is None:
            return kernel
        return self.method.merged(self.weights(), kernel)

    def weights(self, neutral: bool = False) -> Any:
        """The adapter's weights for this matrix, as methods take them.

        Args:
            neutral: bool. The trainables as those that change nothing.
        """
        adapter = attach.adapter_of(self.layer)
        assert adapter is not None
        found = types.SimpleNamespace(shape=self.shape)
        for weight in adapter.method.weights(self.shape):
            value = host_value_of(getattr(adapter, weight.name))
            if self.index is not None:
                value = value[self.index]
            setattr(found, weight.name, value)
        if neutral:
            vars(found).update(adapter.method.neutral(found))
        return found


def for_each(
    what: str, jobs: Mapping[str, Callable[[], T]], bar: bool = True
) -> dict[str, T]:
    """`run_all`; with several processes in order, as they gather together."""
    if processes.processes()[1] > 1:
        return {path: job() for path, job in jobs.items()}
    return run_all(what, jobs, bar)


def matrices_of(layers: dict[str, Any]) -> dict[str, ModelMatrix]:
    """The matrices of layers, by path, in order."""
    return {
        matrix.path: matrix
        for path, layer in layers.items()
        for matrix in _matrices(path, layer)
    }


def _matrices(path: str, layer: Any) -> Iterable[ModelMatrix]:
    count = attach.view_of(layer).count
    if count is None:
        return [ModelMatrix(path, layer)]
    return [ModelMatrix(f"{path}#{i}", layer, i) for i in range(count)]
