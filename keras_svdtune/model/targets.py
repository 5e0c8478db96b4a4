"""Which layers to adapt."""

import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from keras_svdtune.hosts.direct_kernels import adapted_kernels, raw_kernels
from keras_svdtune.hosts.embeddings import untied
from keras_svdtune.hosts.host import HOSTS, AdapterHost, view_of
from keras_svdtune.methods.base import nearest


def find_targets(
    model: keras.Model, target_layer_names: Iterable[str] | None = None
) -> dict[str, keras.layers.Layer]:
    """The layers to adapt, by path.

    Args:
        model: a built `keras.Model`.
        target_layer_names: None for every Dense, EinsumDense and convolution
            and every bank of experts; or names of layers (`"query"`), or
            regular expressions that match a whole layer path
            (`".*attention/(query|value)"`). Embeddings only where named.

    Returns:
        dict from layer path to layer, in the model's order. A layer that the
        model calls at several places is in it once.

    Raises:
        ValueError: a name or expression matches nothing, or a layer that it
            matches cannot be adapted.
    """
    return _chosen(model, target_layer_names, _candidates(model))


def find_matrices(
    model: keras.Model, target_layer_names: Iterable[str] | None = None
) -> dict[str, Any]:
    """The same, with those among them that have an adapter already."""
    return _chosen(model, target_layer_names, _candidates(model, True))


def _chosen(
    model: keras.Model,
    target_layer_names: Iterable[str] | None,
    candidates: dict[str, Any],
) -> dict[str, Any]:
    if not model.built:
        raise ValueError(
            f"Model '{model.name}' is not built yet, so it has no kernels. "
            "Call it on some data, or `build()` it, first."
        )
    if isinstance(target_layer_names, str):
        raise ValueError(
            "`target_layer_names` must be a list of strings. Received the "
            f"string {target_layer_names!r}; write [{target_layer_names!r}]."
        )
    if not candidates:
        raise ValueError(
            f"Model '{model.name}' has no Dense, EinsumDense or convolution "
            "that is built and not yet adapted."
        )
    if target_layer_names is None:
        return _by_default(model.name, candidates)
    targets = {
        path
        for wanted in target_layer_names
        for path in _matching(wanted, candidates)
    }
    if not targets:
        raise ValueError("`target_layer_names` is empty. Received: []")
    chosen = {p: x for p, x in candidates.items() if p in targets}
    for path, layer in chosen.items():
        try:
            view_of(layer)
        except ValueError as error:
            raise ValueError(f"Layer '{path}': {error}") from None
    for path, layer in chosen.items():
        if untied(layer):
            warnings.warn(
                f"The reverse projection of '{path}' is a matrix of its own "
                "(its weights are not tied), which is not adapted.",
                stacklevel=5,
            )
    return chosen


def adapted_layers(model: keras.Model) -> dict[str, Any]:
    """The built layers and raw kernels of `model` with an adapter, by path."""
    return layers_by_path(
        target
        for layer in all_layers(model)
        if layer.built
        for target in (
            [layer]
            if isinstance(layer, AdapterHost)
            else adapted_kernels(layer)
        )
    )


def loadable_layers(model: keras.Model) -> dict[str, Any]:
    """All that has a path: every layer, and the targets by their own.

    A target may have the path of a layer around it: then it has it here.
    """
    return layers_by_path(all_layers(model)) | _candidates(model)


def _candidates(model: keras.Model, adapted: bool = False) -> dict[str, Any]:
    return layers_by_path(
        target
        for layer in all_layers(model)
        if layer.built
        for target in _targets_in(layer, adapted)
    )


def _targets_in(layer: Any, adapted: bool) -> list[Any]:
    if type(layer) in HOSTS or (adapted and isinstance(layer, AdapterHost)):
        return [layer]
    return list(raw_kernels(layer))


def all_layers(model: keras.Model) -> Iterator[Any]:
    """The model and its layers in order, each once."""
    seen: set[int] = set()
    # Keras' own `_flatten_layers` goes through siblings backwards.
    stack = [model]
    while stack:
        layer = stack.pop()
        if id(layer) not in seen:
            seen.add(id(layer))
            yield layer
            stack.extend(reversed(layer._layers))


def layers_by_path(layers: Iterable[Any]) -> dict[str, Any]:
    """Layers by path; a path that occurs again gets `#1`, `#2`, ..."""
    found: dict[str, Any] = {}
    for layer in layers:
        path = stem = layer.path or layer.name
        count = 0
        while path in found:
            count += 1
            path = f"{stem}#{count}"
        found[path] = layer
    return found


def _matching(wanted: str, candidates: dict[str, Any]) -> list[str]:
    by_name = [p for p, layer in candidates.items() if layer.name == wanted]
    if by_name:
        return by_name
    try:
        pattern = re.compile(wanted)
    except re.error as error:
        raise ValueError(
            f"The target {wanted!r} is neither the name of a layer nor a "
            f"regular expression ({error})."
        ) from None
    by_path = [p for p in candidates if pattern.fullmatch(p)]
    if not by_path:
        names = [layer.name for layer in candidates.values()]
        raise ValueError(
            f"The target {wanted!r} matches no layer: none with a kernel "
            "has this name, and as a regular expression it matches no whole "
            f"path such as '{next(iter(candidates))}'. "
            f"{nearest(wanted, sorted(set(names)) + list(candidates))}"
        )
    return by_path


def _by_default(name: str, candidates: dict[str, Any]) -> dict[str, Any]:
    chosen, left_out = {}, []
    for path, layer in candidates.items():
        if not getattr(HOSTS.get(type(layer), layer), "by_default", True):
            continue
        try:
            view_of(layer)
        except ValueError:
            left_out.append(path)
        else:
            chosen[path] = layer
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
