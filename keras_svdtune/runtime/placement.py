"""Several devices and processes, as JAX has them. Elsewhere there is one.

All that knows `jax.sharding`, and how a Keras variable is laid out, is in
this file. On TensorFlow and torch, which have no `keras.distribution`, every
function here does nothing.

With several processes (hosts of a TPU slice) an array is in no process as a
whole, and what touches it is done by all of them together, in the same order.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import keras
import numpy as np
from keras import ops

from keras_svdtune.runtime.types import Array, Mesh, Sharding, Tensor, Variable

# The mesh axes of every dim of an array; () for a dim that is not split.
Axes = tuple[str, ...]
Spec = tuple[Axes, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a variable is split over a mesh of devices.

    Attributes:
        mesh: `jax.sharding.Mesh`.
        spec: the mesh axes of each of its dims.
    """

    mesh: Mesh
    spec: Spec

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each mesh axis."""
        return dict(self.mesh.shape)

    def sharding(self, spec: Spec) -> Sharding:
        """`jax.sharding.NamedSharding` on the same mesh."""
        import jax

        return jax.sharding.NamedSharding(
            self.mesh, jax.sharding.PartitionSpec(*(x or None for x in spec))
        )


def placement_of(variable: Variable) -> Placement | None:
    """How a variable is split; None where it is on one device.

    A variable that has no value yet is where its layout says, or where the
    `keras.distribution` in effect will put it.
    """
    if keras.backend.backend() != "jax":
        return None
    import jax

    value = getattr(variable, "_value", None)
    layout = getattr(value, "sharding", None)
    if value is None:
        layout = variable._layout
        distribution = keras.distribution.distribution()
        if layout is None and distribution is not None:
            layout = distribution.get_variable_layout(variable)
        layout = getattr(layout, "backend_layout", layout)
    if not isinstance(layout, jax.sharding.NamedSharding):
        return None
    spec = [_names(x) for x in layout.spec]
    spec += [()] * (len(variable.shape) - len(spec))
    return Placement(layout.mesh, tuple(spec))


def _names(entry: object) -> tuple[str, ...]:
    if isinstance(entry, str):
        return (entry,)
    return tuple(entry) if isinstance(entry, tuple) else ()


def placed(value: Array, sharding: Sharding | None) -> Tensor:
    """A tensor of `value`, split as `sharding` says; None: where it is made.

    From an array on the host each device gets its part, and no more.
    """
    if sharding is None:
        return ops.convert_to_tensor(value)
    import jax

    if isinstance(value, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(value, sharding)
    if sharding.is_fully_addressable or (
        isinstance(value, jax.Array) and not value.is_fully_addressable
    ):
        return jax.device_put(value, sharding)
    whole = np.asarray(value)
    return jax.make_array_from_callback(
        whole.shape, sharding, lambda index: whole[index]
    )


def place_variable(variable: Variable, sharding: Sharding | None) -> None:
    """Splits a variable as `sharding` says, and the optimizer's of it.

    Keras looks a layout up by the path of a variable when it makes it; so
    variables that are to follow another one are made under `undistributed`,
    and get theirs here.
    """
    if sharding is None:
        return
    variable._layout = sharding
    if variable._value is not None:
        variable._value = placed(variable._value, sharding)


def whole_rows(x: Tensor, weight: Variable) -> Tensor:
    """x (tokens, n) with every row on one device, where `weight` is split.

    For what mixes neighbouring columns: a compiler that has columns on other
    devices sends them one by one.
    """
    layout = getattr(weight, "_layout", None)
    if layout is None or keras.backend.backend() != "jax":
        return x
    import jax

    spec = jax.sharding.PartitionSpec(
        jax.sharding.PartitionSpec.UNCONSTRAINED, None
    )
    return jax.lax.with_sharding_constraint(
        x, jax.sharding.NamedSharding(layout.mesh, spec)
    )


def follow(variable: Variable, other: Variable) -> None:
    """Puts a variable where `other` is."""
    if getattr(other, "_layout", None) is not None:
        variable._layout = other._layout
        variable.assign(variable.value)


@contextlib.contextmanager
def undistributed() -> Iterator[None]:
    """Within it no rule of a `keras.distribution` places new variables."""
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)
