"""Products with a banded matrix that is never formed."""

from keras import ops

from keras_svdtune.runtime.types import Tensor


def banded_product(c: Tensor, entries: Tensor, n: int, width: int) -> Tensor:
    """Computes c·N in float32 by 2·width + 1 shifts and elementwise products.

    The backward pass keeps c alone; autodiff would keep every shift.
    c (tokens, n) has any floating dtype. `entries` are the diagonals of
    N (n, n), one after the other, `width` on either side of the main one.
    """
    parts, start = [], 0
    for k, i, j in diagonals(n, width):
        parts.append((k, i, j, start, start + j - i))
        start += j - i

    # Padded once and sliced at full width: XLA makes one pass of that, where
    # it writes parts that are sliced and then padded to memory (on a TPU).
    def padded(x: Tensor) -> Tensor:
        return ops.pad(x, ((0, 0), (width, width)))

    def shifted(x: Tensor, by: int) -> Tensor:
        """Returns columns by, ..., by + n - 1 of the unpadded x; 0 outside."""
        return ops.cast(x[:, width + by : width + by + n], entries.dtype)

    @ops.custom_gradient  # type: ignore[untyped-decorator]
    def product(c: Tensor, entries: Tensor) -> Tensor:
        def grad(*args: Tensor, upstream: Tensor = None) -> Tensor:
            g = padded(args[0] if upstream is None else upstream)
            wide = ops.cast(c, entries.dtype)
            dc: Tensor = 0.0
            de = []
            for k, i, j, a, b in parts:
                # Only g is sliced: XLA would keep slices of c, the same as
                # in the forward pass, from there to here.
                g_k = shifted(g, k)
                dc = dc + g_k * ops.pad(entries[a:b], (i, n - j))
                de.append(ops.sum(wide * g_k, axis=0)[i:j])
            return ops.cast(dc, c.dtype), ops.concatenate(de)

        c_padded = padded(c)
        total: Tensor = 0.0
        for k, i, j, a, b in parts:
            e = ops.pad(entries[a:b], (i + k, n - j - k))
            total = total + shifted(c_padded, -k) * e
        return total, grad

    return product(c, entries)


def diagonals(n: int, width: int) -> list[tuple[int, int, int]]:
    """Lists (k, i, j): diagonal k of an (n, n) matrix is in rows i to j."""
    return [(k, max(-k, 0), n - max(k, 0)) for k in range(-width, width + 1)]
