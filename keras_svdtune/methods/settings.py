"""Checks of numbers that a user gives; each error says what was received.

The same rules hold everywhere: NumPy's numbers count as Python's, a bool is no
number, and NaN and infinity are refused.
"""

import math
from typing import Any

import numpy as np

# Beyond these a product in float32 overflows, or is lost.
_LEAST, _MOST = 1e-30, 1e30


def plain(value: Any) -> Any:
    """Returns a NumPy number as Python's, and anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def check_whole_number(
    name: str, value: Any, least: int, most: int | None = None
) -> int:
    """Returns `value`; raises a ValueError unless it is such an integer.

    It may be `least` to `most`, with no upper limit if that is None.
    """
    number = plain(value)
    if (
        type(number) is not int
        or number < least
        or (most is not None and number > most)
    ):
        top = "or more" if most is None else f"to {most}"
        raise ValueError(
            f"`{name}` must be an integer, {least} {top}. "
            f"Received: {name}={value!r}"
        )
    return number


def check_rank_or_share(rank: Any) -> None:
    """Raises a ValueError unless `rank` is an int from 1 or a share (0, 1]."""
    number = plain(rank)
    whole = type(number) is int and number >= 1
    share = isinstance(number, float) and 0.0 < number <= 1.0
    if not whole and not share:
        raise ValueError(
            "`rank` must be an integer, 1 or more, or a float in (0, 1] "
            "for that share of the squared singular values. "
            f"Received: rank={rank!r}"
        )


def check_number(
    name: str, value: Any, least: float, below: float = _MOST
) -> float:
    """Returns `value`; raises a ValueError unless it is in [least, below)."""
    number = plain(value)
    if not is_number(number) or not least <= number < below:
        raise ValueError(
            f"`{name}` must be a number, {least:g} or more and below "
            f"{below:g}. Received: {name}={value!r}"
        )
    return float(number)


def check_seed(seed: Any) -> None:
    """Raises a ValueError unless `seed` is one that NumPy takes."""
    check_whole_number("seed", seed, 0, 2**32 - 1)


def check_alpha(alpha: Any) -> None:
    """Raises a ValueError unless `alpha` is a positive number or None."""
    if alpha is not None and not (
        is_number(alpha) and _LEAST <= alpha <= _MOST
    ):
        raise ValueError(
            f"`alpha` must be a positive number, {_LEAST:g} to {_MOST:g}, or "
            f"None for a scale of 1. Received: alpha={alpha!r}"
        )


def check_n_iter(n_iter: Any) -> None:
    """Raises a ValueError unless `n_iter` is None or an int from 0 to 100."""
    if n_iter is not None and (
        type(n_iter) is not int or not 0 <= n_iter <= 100
    ):
        raise ValueError(
            "`n_iter` must be an integer from 0 to 100, or None for an "
            f"exact decomposition. Received: n_iter={n_iter!r}"
        )


def is_number(value: Any) -> bool:
    """Says whether `value` is a finite number of Python's; a bool is not."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )
