"""Reads and sets how variables are split over devices, which JAX can do.

Everything that knows `jax.sharding`, and how a Keras variable is laid out, is
in this file. TensorFlow and torch have no `keras.distribution`; there every
function leaves things as they are.

With several processes (hosts of a TPU slice) no process holds a whole array, so
all of them must do together, in the same order, whatever touches it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import keras
import numpy as np
from keras import ops

from keras_svdtune.runtime.types import Array, Mesh, Sharding, Tensor, Variable

# `Axes`: the mesh axes that split one dimension. `Spec`: those of each one.
Axes = tuple[str, ...]
Spec = tuple[Axes, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a variable is split over a mesh of devices.

    Attributes:
        mesh: `jax.sharding.Mesh`.
        spec: the mesh axes of each dimension of the variable.
    """

    mesh: Mesh
    spec: Spec

    @property
    def sizes(self) -> dict[str, int]:
        """The number of devices along each mesh axis."""
        return dict(self.mesh.shape)

    def sharding(self, spec: Spec) -> Sharding:
        """Returns the `jax.sharding.NamedSharding` of `spec` on this mesh."""
        import jax

        return jax.sharding.NamedSharding(
            self.mesh, jax.sharding.PartitionSpec(*(x or None for x in spec))
        )


def placement_of(variable: Variable) -> Placement | None:
    """Returns how a variable is split, or None if it is on one device.

    For a variable without a value yet, its layout decides, or else the
    `keras.distribution` in effect.
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


def to_devices(value: Array, sharding: Sharding | None) -> Tensor:
    """Returns `value` as a tensor that is split as `sharding` says.

    If `sharding` is None, it is on the default device. Of an array on the host
    each device receives its own part only.
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
    """Splits a variable, and the optimizer's slots for it, by `sharding`.

    Keras looks up a variable's layout by its path when it creates the variable.
    So variables that must follow another one are created under `undistributed`,
    and get their layout here.
    """
    if sharding is None:
        return
    variable._layout = sharding
    if variable._value is not None:
        variable._value = to_devices(variable._value, sharding)


def whole_rows(x: Tensor, weight: Variable) -> Tensor:
    """Returns x (tokens, n) with each row on one device, if `weight` is split.

    Operations that mix neighbouring columns need it: the compiler would send
    columns on other devices one by one.
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


@contextlib.contextmanager
def undistributed() -> Iterator[None]:
    """Temporarily keeps `keras.distribution` from placing new variables."""
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)
