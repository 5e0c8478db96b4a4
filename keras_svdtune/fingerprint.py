"""A fingerprint of a matrix, to recognise the base an adapter belongs to.

Four bilinear forms with fixed vectors of ±1, and the norm:

    f = (‖W‖, a₁ᵀWb₁, a₂ᵀWb₂, a₃ᵀWb₃, a₄ᵀWb₄)

Each form of another matrix of the same norm is off by about ‖W‖; rounding W
to bfloat16 moves it by about 0.001·‖W‖. So the same weights are recognised in
either dtype, and weights that were trained further are not.
"""

import numpy as np

_PROBES = 4
# Rounding moves a form by eps/sqrt(12)·‖W‖ (one standard deviation, from a
# uniform error within half a unit in the last place): these are > 8 of them.
_TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


def fingerprint(matrix: np.ndarray) -> np.ndarray:
    """(5,) float32 for a matrix (in, out)."""
    w = np.asarray(matrix, "float64")
    values = [np.sqrt(np.sum(w * w))]
    for i in range(_PROBES):
        a, b = (
            _plus_minus(w.shape[0], 2 * i),
            _plus_minus(w.shape[1], 2 * i + 1),
        )
        values.append(a @ w @ b)
    return np.array(values, "float32")


def matches(ours: np.ndarray, theirs: np.ndarray, *dtypes: str) -> bool:
    """Whether two fingerprints are of the same matrix.

    Args:
        ours, theirs: fingerprints.
        dtypes: the dtypes in which the two matrices were held.
    """
    if ours.shape != theirs.shape or not np.isfinite(theirs).all():
        return False
    tolerance = max(_TOLERANCE.get(d, 1e-5) for d in dtypes)
    difference = np.abs(ours.astype("float64") - theirs.astype("float64"))
    return bool((difference <= tolerance * ours[0] + 1e-12).all())


def _plus_minus(n: int, seed: int) -> np.ndarray:
    """n values of ±1 by the splitmix64 hash, the same everywhere for ever."""
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) + np.uint64(seed << 40)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.where(z & np.uint64(1), 1.0, -1.0)
