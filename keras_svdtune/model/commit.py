"""Changes a model wholly or not at all."""

import contextlib
from collections.abc import Iterator

from keras_svdtune.model.state import remember_enabled
from keras_svdtune.runtime.interrupts import interrupts_held
from keras_svdtune.runtime.keras_internals import Structure, layers_in
from keras_svdtune.runtime.types import Model


@contextlib.contextmanager
def commit(root: Model) -> Iterator[contextlib.ExitStack]:
    """Puts the structure of `root` back if anything is raised within.

    Its structure is the classes of its layers, which layers and variables they
    hold in which order, what is trainable, and which models have a record of an
    adapter. Values of variables are not part of it: what assigns one adds to
    the stack how to undo that. A Ctrl-C waits for the end.

    Yields:
        An `ExitStack`, whose callbacks run, last first, if anything is raised.
    """
    structure = Structure(layers_in(root))
    restore_enabled = remember_enabled()
    with interrupts_held(), contextlib.ExitStack() as undo:
        undo.callback(restore_enabled)
        undo.callback(structure.restore)
        yield undo
        undo.pop_all()
