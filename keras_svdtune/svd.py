"""The decomposition behind a method.

One place turns a matrix W (in, out) into W = U diag(s) Vᵀ, or into as much
of it as a method needs, and decides how:

- **Where.** On a GPU the work stays there, in float32 at full matmul
  precision through `keras.ops`. On a CPU, and for a TPU (whose compiler
  needs minutes for one full decomposition of one shape), it is done on the
  host in float64 by LAPACK, large products block by block (`blocks.py`). There
  all backends get the same basis to the last bit, so that an adapter trained
  with one loads into another.
- **How.** An orthonormal basis of the smaller side comes from the Gram matrix
  (`eigh`), 3-5 times faster than `svd`. A few components come from some of
  its eigenvectors (on the host: `leading.py`, `lapack.py`), or from a seeded
  randomised range finder where the method asks for it; those that are too
  small for that from a true SVD.

Signs are canonical: the entry of largest magnitude of each singular vector of
the smaller side (v where out <= in, else u) is positive.
Nothing here is ever differentiated: gradients of an SVD are NaN where
singular values are equal.

Reference: Halko, Martinsson, Tropp, "Finding structure with randomness",
https://arxiv.org/abs/0909.4061 (the range finder).
"""

import contextlib
import dataclasses
import types
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import keras
import numpy as np
from keras import ops

from keras_svdtune import blocks, cache, lapack, leading

# NumPy in float64 under the names of keras.ops, so that the same algorithms
# run on both; and what `keras.ops` has no name for.
_HOST = types.SimpleNamespace(
    **{
        name: getattr(np.linalg, name, None) or getattr(np, name)
        for name in (
            *("eigh", "qr", "absolute", "argmax", "expand_dims", "flip"),
            *("maximum", "sqrt", "take_along_axis", "transpose", "where"),
        )
    },
    matmul=blocks.matmul,
    gram=blocks.gram,
    svd=lambda w, **how: np.linalg.svd(w.astype("float64"), **how),
)


class _Device:
    """`keras.ops`, and one more."""

    def gram(self, w: Any) -> Any:
        return ops.matmul(ops.transpose(w), w)

    def __getattr__(self, name: str) -> Any:
        return getattr(ops, name)


_DEVICE = _Device()


# Of the algorithms: to be raised when one returns other numbers than it did,
# or else `cache.py` returns the old ones.
_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a method needs to know of W = U diag(s) Vᵀ, n = min(in, out).

    Attributes:
        part: `"small_side"`, an orthonormal basis of the smaller side: V
            (n, n) where out <= in, else U (n, n). `"top"` or `"bottom"`,
            the `rank` largest or smallest components of both sides.
        rank: int, how many components; or float in (0, 1], the smallest
            number that holds that share of the sum of s². None for
            `"small_side"`.
        n_iter: int or None. Power iterations of the randomised algorithm for
            `"top"`; None is exact.
        seed: int. Seed of the randomised algorithm.
    """

    part: Literal["small_side", "top", "bottom"]
    rank: int | float | None = None
    n_iter: int | None = None
    seed: int = 0

    def few_of(self, n: int) -> bool:
        """Whether so few of n components are wanted that all cost more."""
        return isinstance(self.rank, int) and 4 * self.rank <= n


@dataclasses.dataclass(frozen=True)
class Factors:
    """Components of W = U diag(s) Vᵀ as float32 NumPy arrays, s descending.

    Attributes:
        u: (in, k), or None where the method has no need of it.
        s: (k,).
        v: (out, k), or None.
    """

    u: np.ndarray | None
    s: np.ndarray
    v: np.ndarray | None


def decompose(matrix: Any, needs: Needs, name: str = "matrix") -> Factors:
    """Decomposes one matrix.

    Args:
        matrix: (in, out), a tensor of any floating dtype.
        needs: `Needs`. Which part of the decomposition.
        name: str. What to call the matrix in an error.

    Returns:
        `Factors`, finite, with canonical signs.

    Raises:
        ValueError: the matrix holds NaN or infinity, or its rank does not
            fit.
    """
    w = finite(matrix, name)
    where = "host" if on_host() else f"device {keras.backend.backend()}"
    found = cache.recalled(
        w,
        f"{_VERSION} {where} {needs}",
        lambda: _arrays(computed(w, needs, name)),
        lambda arrays: _fit(arrays, w.shape, needs),
    )
    return Factors(found.get("u"), found["s"], found.get("v"))


def finite(matrix: Any, name: str) -> np.ndarray:
    """A matrix as a float32 array, or an error if it holds NaN or infinity."""
    if not isinstance(matrix, np.ndarray):  # it is on the host already
        matrix = ops.convert_to_numpy(ops.cast(matrix, "float32"))
    w = np.ascontiguousarray(matrix, "float32")
    if not np.isfinite(w).all():
        raise ValueError(
            f"The kernel of '{name}' holds NaN or infinity, and such a matrix "
            "has no singular values. Load its weights again, or leave the "
            "layer out of `target_layer_names`."
        )
    return w


def computed(w: np.ndarray, needs: Needs, name: str = "matrix") -> Factors:
    """What `decompose` returns for a finite w, without the cache on disk."""
    if not on_host():
        try:
            with full_precision():
                factors = _run(ops.convert_to_tensor(w), needs, _DEVICE)
        except Exception as error:
            # A solver that did not converge, or no memory left for it.
            reason = f"{type(error).__name__}: {error}"
        else:
            if _finite(factors):
                return factors
            reason = "it returned values that are not finite"
        warnings.warn(
            f"The {keras.backend.backend()} backend could not decompose the "
            f"kernel of '{name}' on its device ({reason}); LAPACK does it on "
            "the host instead.",
            stacklevel=2,
        )
    return _run(w, needs, _HOST)


def singular_values(
    matrix: Any, name: str = "matrix", keep: bool = True
) -> np.ndarray:
    """All singular values of a matrix, descending, (n,) float32.

    Those of the decomposition that SVF uses, so that it is kept for it, and
    read if it is there. On a GPU that is of the float32 Gram matrix, whose
    small values are rounded: if there are any, LAPACK does it in float64.

    Args:
        matrix, name: as for `decompose`.
        keep: bool. Whether the cache on disk is used.

    Raises:
        ValueError: as `decompose`.
    """
    needs = Needs("small_side")
    if keep:
        s = decompose(matrix, needs, name).s
    else:
        s = computed(finite(matrix, name), needs, name).s
    if on_host() or s[-1] > 1e-2 * s[0]:
        return s
    return _run(finite(matrix, name), needs, _HOST).s


def on_host() -> bool:
    """Whether matrices are decomposed by LAPACK on the host's CPU."""
    match keras.backend.backend():
        case "jax":
            import jax

            return jax.default_backend() in ("cpu", "tpu")
        case "torch":
            import torch

            return not torch.cuda.is_available()
        case "tensorflow":
            import tensorflow as tf

            return not tf.config.list_physical_devices("GPU")
        case _:
            return True


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32: TPUs default to bfloat16, GPUs to tf32."""
    match keras.backend.backend():
        case "jax":
            import jax

            with jax.default_matmul_precision("highest"):
                yield
        case "torch":
            import torch

            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
        case "tensorflow":
            import tensorflow as tf

            config = tf.config.experimental
            enabled = config.tensor_float_32_execution_enabled()
            config.enable_tensor_float_32_execution(False)
            try:
                yield
            finally:
                config.enable_tensor_float_32_execution(enabled)
        case _:
            yield


def _run(w: Any, needs: Needs, xp: Any) -> Factors:
    if needs.part == "small_side":
        u, s, v = small_side(w, xp)
    elif needs.n_iter is None or isinstance(needs.rank, float):
        u, s, v = components(w, needs, xp)
    else:
        u, s, v = randomised_top(w, needs, xp)
    return Factors(_to_float32(u), _to_float32(s), _to_float32(v))


def top_on_host(w: np.ndarray, rank: int) -> Factors:
    """The `rank` largest components of w (in, out), by LAPACK in float64."""
    return _run(w, Needs("top", rank), _HOST)


def small_side(w: Any, xp: Any) -> tuple[Any, Any, Any]:
    """An orthonormal basis of the smaller side, by the Gram matrix.

    With G = WᵀW = V diag(s²) Vᵀ where out <= in, else G = WWᵀ. The basis is
    orthogonal by construction, so W·V·Vᵀ = W however accurate the small
    singular values are.

    Args:
        w: (in, out).
        xp: `_DEVICE` or `_HOST`.

    Returns:
        (u, s, v): one of u and v is (n, n), the other is None.
    """
    tall = w.shape[1] <= w.shape[0]
    values, basis = xp.eigh(xp.gram(w if tall else xp.transpose(w)))
    s = xp.sqrt(xp.maximum(xp.flip(values), 0.0))
    basis = xp.flip(basis, axis=1)
    basis = basis * signs(basis, xp)
    return (None, s, basis) if tall else (basis, s, None)


def components(w: Any, needs: Needs, xp: Any) -> tuple[Any, Any, Any]:
    """The largest or smallest components, to full accuracy.

    In float64 the Gram matrix gives them too, and the other side follows
    from W·v = s·u; only where s has sunk below 1e-4 of the largest, so that
    u would lose its orthogonality, is a full SVD needed.

    Args:
        w: (in, out).
        needs: part `"top"` or `"bottom"`, and how many.
        xp: `_DEVICE` or `_HOST`.

    Returns:
        (u, s, v) of shapes (in, k), (k,), (out, k), s descending.
    """
    if xp is _HOST:
        if needs.part == "top" and isinstance(needs.rank, int):
            found = leading.top(w, needs.rank)
            if found is not None:
                return _signed(*found, xp)
        tall = w.shape[1] <= w.shape[0]
        limit, s, basis = _part_of_small_side(w if tall else w.T, needs)
        if s[-1] > 1e-4 * limit:
            other = blocks.matmul(w if tall else w.T, basis) / s
            return (other, s, basis) if tall else (basis, s, other)
    u, s, vt = xp.svd(w, full_matrices=False)
    part = _wanted(_to_float32(s), needs)
    return _signed(u[:, part], s[part], xp.transpose(vt)[:, part], xp)


def _part_of_small_side(w: np.ndarray, needs: Needs) -> tuple[Any, Any, Any]:
    """(limit, s, v) in float64: s₁ or more, and the wanted components.

    Args:
        w: (in, out), out <= in.
        needs: as for `components`.
    """
    n = w.shape[1]
    if needs.few_of(n):
        gram = blocks.gram(w)
        part = _wanted(np.arange(n), needs)
        found = lapack.eigh_part(gram, n - (part.stop or n), n - part.start)
        if found is not None:
            values, v = (np.flip(x, axis=-1) for x in found)
            s = np.sqrt(np.maximum(values, 0.0))
            # ‖G‖ is no less than its largest eigenvalue.
            return np.sqrt(np.linalg.norm(gram)), s, v * signs(v, _HOST)
    _, s, v = small_side(w, _HOST)
    # From these values in float32, as `estimate` has them: where they are
    # equal, rounding decides, and it must decide the same.
    part = _wanted(_to_float32(s), needs)
    return s[0], s[part], v[:, part]


def randomised_top(w: Any, needs: Needs, xp: Any) -> tuple[Any, Any, Any]:
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


def rank_of_energy(s: np.ndarray, energy: float, part: str) -> int:
    """The smallest number of components with that share of the sum of s².

    Args:
        s: (n,) singular values, descending.
        energy: float in (0, 1].
        part: `"top"`, counted from the largest; `"bottom"`, from the
            smallest.
    """
    squares = np.asarray(s, "float64") ** 2
    total = np.cumsum(squares if part == "top" else squares[::-1])
    # A hair below: the last of n rounded sums may fall short of itself.
    enough = total >= energy * total[-1] * (1 - 1e-12)
    return int(np.argmax(enough)) + 1


def _wanted(s: Any, needs: Needs) -> slice:
    rank = needs.rank
    if isinstance(rank, float):
        rank = rank_of_energy(s, rank, needs.part)
    assert rank is not None
    return slice(0, rank) if needs.part == "top" else slice(len(s) - rank, None)


def _like(array: np.ndarray, xp: Any) -> Any:
    return array if xp is _HOST else ops.convert_to_tensor(array, "float32")


def _signed(u: Any, s: Any, v: Any, xp: Any) -> tuple[Any, Any, Any]:
    sign = signs(v if v.shape[0] <= u.shape[0] else u, xp)
    return u * sign, s, v * sign


def signs(u: Any, xp: Any) -> Any:
    """(k,) of ±1 that make each column's entry of largest magnitude > 0."""
    rows = xp.expand_dims(xp.argmax(xp.absolute(u), axis=0), 0)
    return xp.where(xp.take_along_axis(u, rows, axis=0)[0] < 0, -1.0, 1.0)


def _to_float32(x: Any) -> Any:
    if x is None:
        return None
    return ops.convert_to_numpy(x).astype("float32", order="C")


def _finite(factors: Factors) -> bool:
    arrays = (factors.u, factors.s, factors.v)
    return all(x is None or bool(np.isfinite(x).all()) for x in arrays)


def _arrays(factors: Factors) -> dict[str, np.ndarray]:
    return {k: x for k, x in vars(factors).items() if x is not None}


def _fit(
    arrays: dict[str, np.ndarray], shape: tuple[int, int], needs: Needs
) -> bool:
    """Whether arrays have the names, dtypes and shapes of these factors."""
    rows, columns = shape
    n = min(shape)
    if needs.part == "small_side":
        expected: dict[str, tuple[int, ...]]
        expected = {"s": (n,), "v" if columns <= rows else "u": (n, n)}
    else:
        rank = needs.rank
        if isinstance(rank, float):
            rank = len(arrays.get("s", ()))
        assert rank is not None
        expected = {"u": (rows, rank), "s": (rank,), "v": (columns, rank)}
    return {k: x.shape for k, x in arrays.items()} == expected and all(
        x.dtype == np.float32 for x in arrays.values()
    )
