"""Converts kernels, inputs and outputs of layers to matrices and back.

Every linear Keras layer multiplies its input by a matrix W (in, out), but few
store it as one: an `EinsumDense` kernel (heads, head_dim, model_dim) with
equation `btnh,nhd->btd` is the matrix (heads * head_dim, model_dim).

Nothing else in the package knows einsum. A `Dense` layer is the equation
`...i,io->...o`, a 2-D convolution `nhwxyi,xyio->nhwo` on the patches of an
image, and a bank of experts, (experts, in, out), is one matrix for each label
that all three operands share: `eti,eio->eto`.

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

import numpy as np
from keras import ops

from keras_svdtune.runtime.types import Array, Tensor

DENSE_EQUATION = "...i,io->...o"
_Labels = tuple[str, ...]
# Sizes of axes; a tensor for a size that is known only when the model runs.
Sizes = tuple[int | Tensor, ...]
_Shape = tuple[int, ...]
_ELLIPSIS = "."  # one label that stands for any number of batch axes


class MatrixView:
    """Reads the kernel of an einsum equation as a matrix W (in, out).

    in is the product of the kernel axes that the equation contracts with the
    input, in the input's order; out is the product of those that it passes on
    to the output, in the output's order.

    Attributes:
        shape: (in, out).
        count: int, the number of matrices in a bank; None for one matrix.

    Args:
        equation: str. `"input,kernel->output"`, e.g. `"btd,ndh->btnh"`. An
            ellipsis may stand for batch axes in input and output.
        kernel_shape: tuple of int. The shape of the kernel.
        bank: bool. Whether the kernel may be a bank of matrices.

    Raises:
        ValueError: the kernel is not one matrix: input, kernel and output share
            an axis (a bank) though `bank` is False, only one of the three has a
            label, or a label occurs twice in one of them.
    """

    def __init__(
        self, equation: str, kernel_shape: tuple[int, ...], bank: bool = False
    ):
        self.equation = equation
        self.kernel_shape = tuple(kernel_shape)
        inputs, kernel, outputs = _split(equation, bank)
        if len(kernel) != len(kernel_shape):
            raise ValueError(
                f"The equation '{equation}' wants a kernel of rank "
                f"{len(kernel)}. Received: kernel_shape={kernel_shape}"
            )
        self._inputs, self._kernel, self._outputs = inputs, kernel, outputs
        size = dict(zip(kernel, self.kernel_shape, strict=True))
        self._batch = tuple(x for x in outputs if x not in kernel)
        self._shared = tuple(x for x in outputs if x in kernel and x in inputs)
        self._contracted = tuple(
            x for x in inputs if x in kernel and x not in outputs
        )
        self._produced = tuple(
            x for x in outputs if x in kernel and x not in inputs
        )
        self._counts = tuple(size[x] for x in self._shared)
        self._in_dims = tuple(size[x] for x in self._contracted)
        self._out_dims = tuple(size[x] for x in self._produced)
        self.shape = (math.prod(self._in_dims), math.prod(self._out_dims))
        self.count = math.prod(self._counts) if self._shared else None

    def kernel_dims(self, part: str) -> tuple[int, ...]:
        """Returns the dims of "in", "out" or "count" in flattening order."""
        labels = {
            "in": self._contracted,
            "out": self._produced,
            "count": self._shared,
        }[part]
        return tuple(self._kernel.index(x) for x in labels)

    @property
    def batch(self) -> tuple[int, ...]:
        """The shape in front of `shape`: (count,) for a bank, else ()."""
        return () if self.count is None else (self.count,)

    @property
    def by_example(self) -> bool:
        """Whether the first axis of input and output is that of the examples.

        Not in a bank; nor in XLNet, whose first axis is that of the tokens.
        """
        inputs, _, outputs = _split(self.equation, self.count is not None)
        time_first = inputs[:2] == ("i", "b")
        return self.count is None and inputs[0] == outputs[0] and not time_first

    @property
    def contracted_axes(self) -> tuple[int, ...]:
        """The axes of an input that W multiplies, counted from the last."""
        labels = self._inputs
        return tuple(labels.index(x) - len(labels) for x in self._contracted)

    def to_matrix(self, kernel: Array) -> Array:
        """Reshapes a kernel to W (in, out), or (count, in, out) of a bank."""
        labels = self._shared + self._contracted + self._produced
        kernel = _permute(kernel, self._kernel, labels)
        return _reshape(kernel, self.batch + self.shape)

    def to_kernel(self, matrix: Array) -> Array:
        """Reshapes W (in, out), or (count, in, out), to `kernel_shape`."""
        labels = self._shared + self._contracted + self._produced
        dims = self._counts + self._in_dims + self._out_dims
        return _permute(ops.reshape(matrix, dims), labels, self._kernel)

    def flatten_inputs(self, x: Array) -> Array:
        """Reshapes a layer input of any rank to (tokens, in)."""
        x = _permute(x, self._inputs, self._batch + self._contracted)
        return ops.reshape(x, (-1, self.shape[0]))

    def unflatten_inputs(self, flat: Array, batch_dims: Sizes) -> Array:
        """Reshapes (tokens, in) to a layer input with these batch axes."""
        x = ops.reshape(flat, batch_dims + self._in_dims)
        return _permute(x, self._batch + self._contracted, self._inputs)

    def rows_as_inputs(self, rows: Array) -> Array:
        """Reshapes (k, in) to a layer input with batch axes (k, 1, 1, ...)."""
        ones = (1,) * (len(self._batch) - 1)
        return self.unflatten_inputs(rows, (ops.shape(rows)[0], *ones))

    def flatten_outputs(self, y: Array) -> Array:
        """Reshapes a layer output, without its bias, to (tokens, out)."""
        y = _permute(y, self._outputs, self._batch + self._produced)
        return ops.reshape(y, (-1, self.shape[1]))

    def unflatten_outputs(self, flat: Array, batch_dims: Sizes) -> Array:
        """Reshapes (tokens, out) to a layer output with these batch axes."""
        y = ops.reshape(flat, batch_dims + self._out_dims)
        return _permute(y, self._batch + self._produced, self._outputs)

    def batch_dims(self, x: Array) -> Sizes:
        """Returns the sizes of the input's batch axes, in output order."""
        order = _axes(
            self._inputs, self._batch + self._contracted, len(x.shape)
        )
        shape = ops.shape(x)
        return tuple(shape[i] for i in order[: len(order) - len(self._in_dims)])

    def batch_dims_of_output(self, y: Array) -> Sizes:
        """Returns the sizes of the output's batch axes, in its order."""
        order = _axes(self._outputs, self._batch + self._produced, len(y.shape))
        shape = ops.shape(y)
        return tuple(
            shape[i] for i in order[: len(order) - len(self._out_dims)]
        )

    def __repr__(self) -> str:
        rows, columns = self.shape
        bank = "" if self.count is None else f"{self.count} of "
        return f"<MatrixView {self.equation} as {bank}{rows} x {columns}>"


class GroupedView(MatrixView):
    """Reads the kernel of a grouped convolution as a bank of matrices.

    The kernel (*window, in / groups, out) holds one matrix for each group,
    (window·in / groups, out / groups): group g makes the g-th part of the
    outputs from the g-th part of the inputs.
    """

    def __init__(self, kernel_shape: tuple[int, ...], groups: int):
        *window, columns = kernel_shape
        self._split_shape = (*window, groups, columns // groups)
        labels = "uvwxyz"[: len(window)]
        super().__init__(f"gt{labels},{labels}go->gto", self._split_shape, True)
        self.kernel_shape = tuple(kernel_shape)

    def to_matrix(self, kernel: Array) -> Array:
        return super().to_matrix(_reshape(kernel, self._split_shape))

    def kernel_dims(self, part: str) -> tuple[int, ...]:
        last = len(self.kernel_shape) - 1  # out: (groups, out / groups)
        if part == "in":
            return super().kernel_dims(part)
        return (last,) if part == "count" else ()

    def to_kernel(self, matrix: Array) -> Array:
        return ops.reshape(super().to_kernel(matrix), self.kernel_shape)


def _split(equation: str, bank: bool) -> tuple[_Labels, _Labels, _Labels]:
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
    if shared and not bank:
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


def _permute(x: Array, old: _Labels, new: _Labels) -> Array:
    """Transposes the axes of `x`, labelled `old`, into the order `new`."""
    order = _axes(old, new, len(x.shape))
    # Most equations need no transposition; then no op is added to the graph.
    if order == tuple(range(len(order))):
        return x
    # A kernel gathered from several devices is an array: it stays on the host.
    on_host = isinstance(x, np.ndarray)
    return x.transpose(order) if on_host else ops.transpose(x, order)


def _reshape(x: Array, shape: _Shape) -> Array:
    on_host = isinstance(x, np.ndarray)
    return x.reshape(shape) if on_host else ops.reshape(x, shape)


@functools.lru_cache(maxsize=1024)
def _axes(old: _Labels, new: _Labels, n_axes: int) -> tuple[int, ...]:
    """Returns the permutation from `old` to `new`, the ellipsis expanded."""
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
