"""Checks of settings; each error says what was received."""

import math
from typing import Any


def check_whole_number(name: str, value: Any, least: int) -> None:
    """Raises a ValueError unless `value` is an integer, `least` or more."""
    if type(value) is not int or value < least:
        raise ValueError(
            f"`{name}` must be an integer, {least} or more. "
            f"Received: {name}={value!r}"
        )


def check_number(name: str, value: Any, least: float, below: float) -> None:
    """Raises a ValueError unless `value` is a number in [least, below)."""
    if not is_number(value) or not least <= value < below:
        top = "" if math.isinf(below) else f" and below {below:g}"
        raise ValueError(
            f"`{name}` must be a number, {least:g} or more{top}. "
            f"Received: {name}={value!r}"
        )


def check_alpha(alpha: Any) -> None:
    """Raises a ValueError unless `alpha` is a positive number or None."""
    if alpha is not None and not (is_number(alpha) and alpha > 0):
        raise ValueError(
            "`alpha` must be a positive number, or None for a scale of 1. "
            f"Received: alpha={alpha!r}"
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
    """Says whether `value` is a finite int or float; a bool is not."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )
