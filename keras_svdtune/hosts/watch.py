"""Sees what comes into layers while a model computes what it computes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from keras import ops

from keras_svdtune.hosts.host import HOSTS
from keras_svdtune.hosts.target import Target
from keras_svdtune.matrix.view import Sizes
from keras_svdtune.runtime.interrupts import run_to_the_end
from keras_svdtune.runtime.types import Tensor

# Is called with a target and the input of its layer, whenever it computes.
Note = Callable[[Target, Tensor], None]


@contextlib.contextmanager
def watched(targets: Iterable[Target], note: Note) -> Iterator[None]:
    """Temporarily calls `note` with what comes into the layers of targets.

    The layers change their class for that, and nothing else. They must not be
    direct kernels.
    """
    before = [(target, type(target.owner)) for target in targets]

    def restore() -> None:
        for target, cls in before:
            target.owner.__class__ = cls

    with contextlib.ExitStack() as at_end:
        at_end.callback(run_to_the_end, [restore])
        for target, cls in before:
            target.owner.__class__ = _watching(cls, target, note)
        yield


def _watching(cls: type, target: Target, note: Note) -> type:
    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        note(target, args[0] if args else next(iter(kwargs.values())))
        return cls.__call__(layer, *args, **kwargs)

    # Not by `call`: under a RematScope that is a program of its own.
    namespace = {"__call__": call, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), namespace)


def rows_of(target: Target, inputs: Tensor) -> tuple[Tensor, Sizes]:
    """Returns the input of a target's layer as x (rows, in), for x·W.

    And the sizes of the axes that are flattened to rows. x has the numbers that
    the layer multiplies, in its compute dtype.
    """
    owner = target.owner
    host = next(HOSTS[x] for x in type(owner).__mro__ if x in HOSTS)
    x = ops.cast(inputs, owner.compute_dtype)
    return host.input_rows(owner, target.view, x)
