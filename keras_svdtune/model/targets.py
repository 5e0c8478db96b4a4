"""Finds the matrices of a model to adapt, once, as `Target`s."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable
from typing import TypeVar

from keras_svdtune.hosts.attach import adapted_targets_of, plain_targets
from keras_svdtune.hosts.embeddings import untied
from keras_svdtune.hosts.host import AdapterHost
from keras_svdtune.hosts.target import Target
from keras_svdtune.methods.base import nearest
from keras_svdtune.runtime.keras_internals import layers_in
from keras_svdtune.runtime.types import Layer, Model

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Matrices:
    """The matrices of a model.

    Attributes:
        targets: by path, in the model's order.
        not_matrices: layers of an adaptable kind whose kernel is no matrix, by
            path: their name, and why.
    """

    targets: dict[str, Target]
    not_matrices: dict[str, tuple[str, str]]


def matrices_in(model: Model, adapted: bool = False) -> Matrices:
    """Returns every matrix of a built model that can have an adapter.

    Args:
        adapted: whether to include those that have one already.
    """
    targets, problems = [], {}
    for layer in layers_in(model):
        if not layer.built:
            continue
        if adapted:
            targets += adapted_targets_of(layer)
        if isinstance(layer, AdapterHost):
            continue
        try:
            targets += plain_targets(layer)
        except ValueError as error:
            problems[layer.path or layer.name] = (layer.name, str(error))
    return Matrices(_by_path(targets), problems)


def adapted_targets(model: Model) -> dict[str, Target]:
    """Returns the matrices of `model` that have an adapter, by path."""
    return _by_path(
        target
        for layer in layers_in(model)
        if layer.built
        for target in adapted_targets_of(layer)
    )


def find_targets(
    model: Model,
    target_layer_names: Iterable[str] | None = None,
    adapted: bool = False,
    exclude: Iterable[str] = (),
) -> dict[str, Target]:
    """Returns the matrices to adapt, by path.

    Args:
        model: a built `keras.Model`.
        target_layer_names: None for every Dense, EinsumDense and convolution
            and every bank of experts; or names of layers (`"query"`), or
            regular expressions that match a whole layer path
            (`".*attention/(query|value)"`). Embeddings only where named.
        adapted: whether to include those that have an adapter already.
        exclude: names and expressions of the same kind, of layers to leave out
            of these.

    Returns:
        dict from layer path to `Target`, in the model's order. A layer that the
        model calls at several places is in it once.

    Raises:
        ValueError: a name or expression matches nothing, or a layer that it
            matches cannot be adapted.
    """
    if not model.built:
        raise ValueError(
            f"Model '{model.name}' is not built yet, so it has no kernels. "
            "Call it on some data, or `build()` it, first."
        )
    for option, value in (
        ("target_layer_names", target_layer_names),
        ("exclude", exclude),
    ):
        if isinstance(value, str):
            raise ValueError(
                f"`{option}` must be a list of strings. Received the "
                f"string {value!r}; write [{value!r}]."
            )
    found = matrices_in(model, adapted)
    if not found.targets and not found.not_matrices:
        raise ValueError(
            f"Model '{model.name}' has no Dense, EinsumDense or convolution "
            "that is built and not yet adapted."
        )
    names = {path: target.name for path, target in found.targets.items()}
    names |= {path: name for path, (name, _) in found.not_matrices.items()}
    left_out = {path for name in exclude for path in matching(name, names)}
    if target_layer_names is None:
        return _by_default(model.name, _without(found, left_out))
    wanted = {
        path for name in target_layer_names for path in matching(name, names)
    }
    if not wanted:
        raise ValueError("`target_layer_names` is empty. Received: []")
    wanted -= left_out
    if not wanted:
        raise ValueError(
            "`exclude` leaves out all that `target_layer_names` names."
        )
    for path, (_, problem) in found.not_matrices.items():
        if path in wanted:
            raise ValueError(f"Layer '{path}': {problem}")
    chosen = {p: x for p, x in found.targets.items() if p in wanted}
    for path, target in chosen.items():
        if untied(target.owner):
            warnings.warn(
                f"The reverse projection of '{path}' is a matrix of its own "
                "(its weights are not tied), which is not adapted.",
                stacklevel=5,
            )
    return chosen


def layers_by_path(layers: Iterable[Layer]) -> dict[str, Layer]:
    """Returns layers by path; a repeated path gets `#1`, `#2`, ..."""
    return numbered(layers, lambda layer: layer.path or layer.name)


def _by_path(targets: Iterable[Target]) -> dict[str, Target]:
    found = numbered(targets, lambda x: re.sub(r"#\d+$", "", x.path))
    return {
        path: x if x.path == path else dataclasses.replace(x, path=path)
        for path, x in found.items()
    }


def numbered(items: Iterable[T], path_of: Callable[[T], str]) -> dict[str, T]:
    """Returns items by path; a repeated path gets `#1`, `#2`, ..."""
    found: dict[str, T] = {}
    for item in items:
        path = stem = path_of(item)
        count = 0
        while path in found:
            count += 1
            path = f"{stem}#{count}"
        found[path] = item
    return found


def _without(found: Matrices, left_out: set[str]) -> Matrices:
    return Matrices(
        {k: x for k, x in found.targets.items() if k not in left_out},
        {k: x for k, x in found.not_matrices.items() if k not in left_out},
    )


def matching(wanted: str, names: dict[str, str]) -> list[str]:
    """Returns the paths in `names` that a name or an expression selects.

    `names` holds the name of each layer by its path.
    """
    by_name = [path for path, name in names.items() if name == wanted]
    if by_name:
        return by_name
    try:
        pattern = re.compile(wanted)
    except re.error as error:
        raise ValueError(
            f"The target {wanted!r} is neither the name of a layer nor a "
            f"regular expression ({error})."
        ) from None
    by_path = [path for path in names if pattern.fullmatch(path)]
    if not by_path:
        raise ValueError(
            f"The target {wanted!r} matches no layer: none with a kernel "
            "has this name, and as a regular expression it matches no whole "
            f"path such as '{next(iter(names))}'. "
            f"{nearest(wanted, sorted(set(names.values())) + list(names))}"
        )
    return by_path


def _by_default(name: str, found: Matrices) -> dict[str, Target]:
    chosen = {p: x for p, x in found.targets.items() if not x.is_embedding}
    left_out = list(found.not_matrices)
    if not chosen:
        raise ValueError(
            f"Model '{name}' has nothing that is adapted by default: "
            "embeddings are where they are named, depthwise kernels are no "
            f"matrices (of these {len(left_out)})."
        )
    if left_out:
        warnings.warn(
            f"Left out, since their kernels are not matrices: {left_out}",
            stacklevel=2,
        )
    return chosen
