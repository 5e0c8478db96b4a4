"""Where matrices are decomposed, and in what precision products are taken."""

import contextlib
from collections.abc import Iterator

import keras

from keras_svdtune.runtime.together import Together


def on_host() -> bool:
    """Returns whether LAPACK decomposes matrices on the host's CPU."""
    match keras.backend.backend():
        case "jax":
            import jax

            return jax.default_backend() in ("cpu", "tpu")
        case "torch":
            import torch

            return not torch.cuda.is_available()
        case "tensorflow":
            import tensorflow as tf

            return not tf.config.list_physical_devices("GPU")
        case _:
            return True


def float64_on_device() -> contextlib.AbstractContextManager[None]:
    """Lets `keras.ops` compute in float64, which JAX else makes float32."""
    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    context: contextlib.AbstractContextManager[None] = jax.enable_x64(True)
    return context


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Temporarily turns off bfloat16 (TPU) and tf32 (GPU) in products."""
    match keras.backend.backend():
        case "jax":
            import jax

            # Of this thread alone; in the others it is one for the process.
            with jax.default_matmul_precision("highest"):
                yield
        case "torch":
            with _TORCH:
                yield
        case "tensorflow":
            with _TENSORFLOW:
                yield
        case _:
            yield


@contextlib.contextmanager
def _highest_on_torch() -> Iterator[None]:
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _float32_on_tensorflow() -> Iterator[None]:
    import tensorflow as tf

    config = tf.config.experimental
    enabled = config.tensor_float_32_execution_enabled()
    config.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        config.enable_tensor_float_32_execution(enabled)


_TORCH = Together(_highest_on_torch)
_TENSORFLOW = Together(_float32_on_tensorflow)
