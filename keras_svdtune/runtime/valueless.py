"""A model of shapes alone: every variable without a value.

For what only the structure of a model decides: its layout on devices, or the
program of a step that a compiler is to judge. A model of 9 billion
parameters takes a second to make, and no memory.
"""

import contextlib
import copy
from collections.abc import Iterator

import keras
from keras.src.backend.common import global_state


@contextlib.contextmanager
def abstract() -> Iterator[None]:
    """Within it, what is built has variables of a shape and no value.

    Nothing can be computed with such a model outside of a function that is
    given its values, such as `model.stateless_call` under `jax.jit`.

    Example:

    ```python
    with abstract():
        backbone = keras_hub.models.GemmaBackbone(**config)
    ```
    """
    waiting = global_state.get_global_attribute(
        "uninitialized_variables", [], set_to_default=True
    )
    before = len(waiting)
    # Names that Keras counts (`vision_encoder_1`) are left to real models.
    names = copy.copy(global_state.get_global_attribute("object_name_uids"))
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        # Or Keras would give them values when it next has the chance.
        del waiting[before:]
        global_state.set_global_attribute("object_name_uids", names)
