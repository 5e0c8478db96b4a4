"""The matrix behind a kernel.

Every linear Keras layer multiplies its input by a matrix W of shape
(in, out), but few of them store it as one: an `EinsumDense` kernel of shape
(heads, head_dim, model_dim) with equation `btnh,nhd->btd` is the matrix
(heads * head_dim, model_dim). `MatrixView` reads an einsum equation and tells
how kernel, input and output look as matrices, and how to come back.

Nothing else in the package knows einsum. A `Dense` layer is the equation
`...i,io->...o`.

Example:

```python
view = MatrixView("btnh,nhd->btd", kernel_shape=(4, 256, 640))
view.shape                    # (1024, 640)
w = view.to_matrix(kernel)    # (4, 256, 640) -> (1024, 640)
h = view.flatten_inputs(x)    # (2, 7, 4, 256) -> (14, 1024)
y = view.unflatten_outputs(h @ w, view.batch_dims(x))   # -> (2, 7, 640)
```
"""

import functools
import math
from typing import Any

from keras import ops

DENSE_EQUATION = "...i,io->...o"
_Labels = tuple[str, ...]
_ELLIPSIS = "."  # one label that stands for any number of batch axes


class MatrixView:
    """How the kernel of an einsum equation reads as a matrix W (in, out).

    in is the product of the kernel axes that the equation contracts with
    the input, in the input's order; out is the product of those that it
    hands on to the output, in the output's order.

    Args:
        equation: str. `"input,kernel->output"`, e.g. `"btd,ndh->btnh"`.
            An ellipsis may stand for batch axes in input and output.
        kernel_shape: tuple of int. The shape of the kernel.

    Raises:
        ValueError: the kernel is not one matrix: an axis that input, kernel
            and output share (a batch of matrices), a label that only one of
            the three has, or a label that occurs twice in one of them.
    """

    def __init__(self, equation: str, kernel_shape: tuple[int, ...]):
        self.equation = equation
        self.kernel_shape = tuple(kernel_shape)
        inputs, kernel, outputs = _split(equation)
        if len(kernel) != len(kernel_shape):
            raise ValueError(
                f"The equation '{equation}' wants a kernel of rank "
                f"{len(kernel)}. Received: kernel_shape={kernel_shape}"
            )
        self._inputs, self._kernel, self._outputs = inputs, kernel, outputs
        size = dict(zip(kernel, self.kernel_shape, strict=True))
        self._batch = tuple(x for x in outputs if x not in kernel)
        self._contracted = tuple(x for x in inputs if x in kernel)
        self._produced = tuple(x for x in outputs if x in kernel)
        self._in_dims = tuple(size[x] for x in self._contracted)
        self._out_dims = tuple(size[x] for x in self._produced)
        self.shape = (math.prod(self._in_dims), math.prod(self._out_dims))

    def to_matrix(self, kernel: Any) -> Any:
        """Kernel of `kernel_shape` -> W (in, out)."""
        labels = self._contracted + self._produced
        return ops.reshape(_permute(kernel, self._kernel, labels), self.shape)

    def to_kernel(self, matrix: Any) -> Any:
        """W (in, out) -> kernel of `kernel_shape`."""
        labels = self._contracted + self._produced
        kernel = ops.reshape(matrix, self._in_dims + self._out_dims)
        return _permute(kernel, labels, self._kernel)

    def flatten_inputs(self, x: Any) -> Any:
        """Layer input of any rank -> (tokens, in)."""
        x = _permute(x, self._inputs, self._batch + self._contracted)
        return ops.reshape(x, (-1, self.shape[0]))

    def unflatten_inputs(self, flat: Any, batch_dims: tuple[Any, ...]) -> Any:
        """(tokens, in) -> a layer input with these batch axes."""
        x = ops.reshape(flat, batch_dims + self._in_dims)
        return _permute(x, self._batch + self._contracted, self._inputs)

    def flatten_outputs(self, y: Any) -> Any:
        """Layer output of any rank, without its bias -> (tokens, out)."""
        y = _permute(y, self._outputs, self._batch + self._produced)
        return ops.reshape(y, (-1, self.shape[1]))

    def unflatten_outputs(self, flat: Any, batch_dims: tuple[Any, ...]) -> Any:
        """(tokens, out) -> a layer output with these batch axes."""
        y = ops.reshape(flat, batch_dims + self._out_dims)
        return _permute(y, self._batch + self._produced, self._outputs)

    def batch_dims(self, x: Any) -> tuple[Any, ...]:
        """Sizes of the batch axes of the layer input `x`, in output order."""
        order = _axes(
            self._inputs, self._batch + self._contracted, len(x.shape)
        )
        shape = ops.shape(x)
        return tuple(shape[i] for i in order[: len(order) - len(self._in_dims)])

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"<MatrixView {self.equation} as {rows} x {columns}>"


def _split(equation: str) -> tuple[_Labels, _Labels, _Labels]:
    """Splits and checks an equation; an ellipsis becomes one label."""
    operands, arrow, outputs = equation.replace(" ", "").partition("->")
    parts = [*operands.split(","), outputs]
    if not arrow or len(parts) != 3:
        raise ValueError(
            "Expected an equation of the form 'input,kernel->output', e.g. "
            f"'btd,ndh->btnh'. Received: equation='{equation}'"
        )
    inputs, kernel, out = (tuple(p.replace("...", _ELLIPSIS)) for p in parts)
    for labels in (inputs, kernel, out):
        if len(set(labels)) != len(labels):
            raise ValueError(
                "A label that occurs twice in one operand (a diagonal) is no "
                f"matrix product. Received: equation='{equation}'"
            )
    shared = set(inputs) & set(kernel) & set(out)
    if shared:
        raise ValueError(
            f"The kernel of '{equation}' is a batch of matrices, one for each "
            f"{'/'.join(sorted(shared))}, not one matrix. Leave this layer "
            "out of `target_layer_names`."
        )
    for label in inputs + kernel + out:
        if sum(label in p for p in (inputs, kernel, out)) < 2:
            raise ValueError(
                f"The label '{label}' of '{equation}' occurs in one operand "
                "only; such a sum or broadcast is no matrix product. Leave "
                "this layer out of `target_layer_names`."
            )
    return inputs, kernel, out


def _permute(x: Any, old: _Labels, new: _Labels) -> Any:
    """Transposes the axes of `x`, labelled `old`, into the order `new`."""
    order = _axes(old, new, len(x.shape))
    # Most equations need no transposition; then no op is added to the graph.
    return x if order == tuple(range(len(order))) else ops.transpose(x, order)


@functools.lru_cache(maxsize=1024)
def _axes(old: _Labels, new: _Labels, n_axes: int) -> tuple[int, ...]:
    """The permutation from `old` to `new`, the ellipsis written out."""
    width = n_axes - len(old) + 1  # how many axes the ellipsis stands for
    start = old.index(_ELLIPSIS) if _ELLIPSIS in old else n_axes
    axes: list[int] = []
    for label in new:
        i = old.index(label)
        if label == _ELLIPSIS:
            axes.extend(range(start, start + width))
        else:
            axes.append(i if i < start else i + width - 1)
    return tuple(axes)
