"""The algorithms that decompose a matrix, on the host or on a device."""

from typing import TypeAlias

import numpy as np
from keras import ops

from keras_svdtune.matrix import float64, lanczos, lapack
from keras_svdtune.matrix.factors import Needs, rank_of_energy
from keras_svdtune.runtime.types import Array


class _Host:
    """NumPy in float64 under the names of `keras.ops`."""

    matmul = staticmethod(float64.matmul)
    gram = staticmethod(float64.gram)

    @staticmethod
    def svd(w: Array, full_matrices: bool) -> tuple[Array, Array, Array]:
        """The singular value decomposition (u, s, vᵀ) of w."""
        return np.linalg.svd(w.astype("float64"), full_matrices)

    def __getattr__(self, name: str) -> Array:
        return getattr(np.linalg, name, None) or getattr(np, name)


class _Device:
    """`keras.ops` in float64 (under `precision.float64_on_device`).

    Products are taken by operators: on torch `ops.matmul` and `ops.maximum`
    return float32.
    """

    @staticmethod
    def matmul(a: Array, b: Array) -> Array:
        """Computes a·b."""
        return _float64(a) @ _float64(b)

    @staticmethod
    def gram(w: Array) -> Array:
        """Computes wᵀ·w, by blocks of rows."""
        parts = [_float64(w[rows]) for rows in float64.blocks(*w.shape)]
        return sum(ops.transpose(x) @ x for x in parts)

    @staticmethod
    def svd(w: Array, full_matrices: bool) -> tuple[Array, Array, Array]:
        """The singular value decomposition (u, s, vᵀ) of w."""
        u, s, vt = ops.svd(_float64(w), full_matrices=full_matrices)
        return u, s, vt

    def __getattr__(self, name: str) -> Array:
        return getattr(ops, name)


def _float64(x: Array) -> Array:
    return ops.cast(x, "float64")


# The same algorithms run on both, in float64.
Numbers: TypeAlias = _Host | _Device
HOST, DEVICE = _Host(), _Device()


def small_side(w: Array, xp: Numbers) -> tuple[Array, Array, Array]:
    """An orthonormal basis of the smaller side, by the Gram matrix.

    With G = WᵀW = V diag(s²) Vᵀ where out <= in, else G = WWᵀ. The basis is
    orthogonal by construction, so W·V·Vᵀ = W however accurate the small
    singular values are.

    Args:
        w: (in, out).
        xp: `DEVICE` or `HOST`.

    Returns:
        (u, s, v): one of u and v is (n, n), the other is None.
    """
    tall = w.shape[1] <= w.shape[0]
    values, basis = xp.eigh(xp.gram(w if tall else xp.transpose(w)))
    values = xp.where(values > 0, values, xp.zeros_like(values))
    s = xp.sqrt(xp.flip(values))
    basis = xp.flip(basis, axis=1)
    basis = basis * signs(basis, xp)
    return (None, s, basis) if tall else (basis, s, None)


def components(
    w: Array, needs: Needs, xp: Numbers
) -> tuple[Array, Array, Array]:
    """The largest or smallest components, to full accuracy.

    The Gram matrix gives them too, and the other side follows from
    W·v = s·u; only where s has sunk below 1e-4 of the largest, so that u
    would lose its orthogonality, is a full SVD needed.

    Args:
        w: (in, out).
        needs: part `"top"` or `"bottom"`, and how many.
        xp: `DEVICE` or `HOST`.

    Returns:
        (u, s, v) of shapes (in, k), (k,), (out, k), s descending.
    """
    tall = w.shape[1] <= w.shape[0]
    side = w if tall else xp.transpose(w)
    limit, s, basis = _part_of_small_side(side, needs, xp)
    if s[-1] > 1e-4 * limit:
        other = xp.matmul(side, basis) / s
        return (other, s, basis) if tall else (basis, s, other)
    u, s, vt = xp.svd(w, full_matrices=False)
    part = _wanted(to_float32(s), needs)
    return _signed(u[:, part], s[part], xp.transpose(vt)[:, part], xp)


def _part_of_small_side(
    w: Array, needs: Needs, xp: Numbers
) -> tuple[Array, Array, Array]:
    """(limit, s, v) in float64: s₁ or more, and the wanted components.

    Args:
        w: (in, out), out <= in.
        needs, xp: as for `components`.
    """
    n = w.shape[1]
    if xp is HOST and needs.few_of(n):
        gram = float64.gram(w)
        part = _wanted(np.arange(n), needs)
        found = None
        if needs.part == "top":
            found = lanczos.largest(gram, part.stop)
        if found is None:
            last = n - part.start
            found = lapack.eigh_part(gram, n - (part.stop or n), last)
        if found is not None:
            values, v = (np.flip(x, axis=-1) for x in found)
            s = np.sqrt(np.maximum(values, 0.0))
            # ‖G‖ is no less than its largest eigenvalue.
            return np.sqrt(np.linalg.norm(gram)), s, v * signs(v, HOST)
    _, s, v = small_side(w, xp)
    # From these values in float32, as `estimate` has them: where they are
    # equal, rounding decides, and it must decide the same.
    part = _wanted(to_float32(s), needs)
    return s[0], s[part], v[:, part]


def randomised_top(
    w: Array, needs: Needs, xp: Numbers
) -> tuple[Array, Array, Array]:
    """The largest components by a seeded randomised range finder.

    Ten extra directions and `needs.n_iter` power iterations, each
    orthonormalised, so that small components are not lost to rounding.

    Args, Returns:
        As for `components`.
    """
    assert isinstance(needs.rank, int) and needs.n_iter is not None
    k = min(needs.rank + 10, *w.shape)
    sketch = np.random.RandomState(needs.seed).standard_normal((w.shape[1], k))
    wt = xp.transpose(w)
    y = xp.matmul(w, _like(sketch, xp))
    for _ in range(needs.n_iter):
        z = xp.qr(xp.matmul(wt, xp.qr(y)[0]))[0]
        y = xp.matmul(w, z)
    q = xp.qr(y)[0]
    u, s, vt = xp.svd(xp.matmul(xp.transpose(q), w), full_matrices=False)
    u = xp.matmul(q, u)[:, : needs.rank]
    v = xp.transpose(vt)[:, : needs.rank]
    return _signed(u, s[: needs.rank], v, xp)


def _wanted(s: Array, needs: Needs) -> slice:
    rank = needs.rank
    if isinstance(rank, float):
        rank = rank_of_energy(s, rank, needs.part)
    assert rank is not None
    return slice(0, rank) if needs.part == "top" else slice(len(s) - rank, None)


def _like(array: np.ndarray, xp: Numbers) -> Array:
    return array if xp is HOST else ops.convert_to_tensor(array, "float64")


def _signed(
    u: Array, s: Array, v: Array, xp: Numbers
) -> tuple[Array, Array, Array]:
    sign = signs(v if v.shape[0] <= u.shape[0] else u, xp)
    return u * sign, s, v * sign


def signs(u: Array, xp: Numbers) -> Array:
    """(k,) of ±1 that make each column's entry of largest magnitude > 0."""
    rows = xp.expand_dims(xp.argmax(xp.absolute(u), axis=0), 0)
    largest = xp.take_along_axis(u, rows, axis=0)[0]
    one = xp.ones_like(largest)
    return xp.where(largest < 0, -one, one)


def to_float32(x: Array) -> Array:
    if x is None:
        return None
    return ops.convert_to_numpy(x).astype("float32", order="C")
