"""Gives some layers another rank or alpha than the others."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.base import Method
from keras_svdtune.model.targets import matching

# Maps names of layers, or expressions on their paths, to a number.
Pattern = Mapping[str, float] | None


def patterns_of(cls: type[Method]) -> list[str]:
    """Returns which of `rank_pattern` and `alpha_pattern` a method knows."""
    names = {f.name for f in dataclasses.fields(cls)}
    if getattr(cls, "shares_ranks", False):
        names.remove("rank")
    return [f"{x}_pattern" for x in ("rank", "alpha") if x in names]


def methods_by_path(
    method: Method, targets: dict[str, Target], **patterns: Pattern
) -> dict[str, Method]:
    """Returns the method of each target, by path.

    Args:
        patterns: `rank_pattern` and `alpha_pattern`: the number by a name or an
            expression, as in `target_layer_names`; others have `method`'s.

    Raises:
        ValueError: the method has no such setting, a key matches no target or
            two give one of them different numbers, or a number is out of range.
    """
    names = {path: target.name for path, target in targets.items()}
    changes: dict[str, dict[str, Any]] = {path: {} for path in targets}
    for option, pattern in patterns.items():
        if pattern is None:
            continue
        setting = option.removesuffix("_pattern")
        if option not in patterns_of(type(method)) or (
            setting == "rank" and getattr(method, "rank", None) is None
        ):
            raise ValueError(
                f"{method!r} has no {setting} of each layer, so `{option}` "
                f"has no meaning. Received: {option}={pattern!r}"
            )
        if not isinstance(pattern, Mapping):
            raise ValueError(
                f"`{option}` must be a dict from a layer's name, or an "
                f"expression on its path, to a number. Received: {pattern!r}"
            )
        for key, number in pattern.items():
            for path in matching(key, names):
                if changes[path].setdefault(setting, number) != number:
                    raise ValueError(
                        f"`{option}` gives layer '{path}' two numbers, "
                        f"{changes[path][setting]!r} and {number!r}."
                    )
    return {
        path: dataclasses.replace(method, **change) if change else method
        for path, change in changes.items()
    }
