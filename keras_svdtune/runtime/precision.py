"""Where matrices are decomposed, and products in full float32."""

import contextlib
from collections.abc import Iterator

import keras


def on_host() -> bool:
    """Whether matrices are decomposed by LAPACK on the host's CPU."""
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


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32: TPUs default to bfloat16, GPUs to tf32."""
    match keras.backend.backend():
        case "jax":
            import jax

            with jax.default_matmul_precision("highest"):
                yield
        case "torch":
            import torch

            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
        case "tensorflow":
            import tensorflow as tf

            config = tf.config.experimental
            enabled = config.tensor_float_32_execution_enabled()
            config.enable_tensor_float_32_execution(False)
            try:
                yield
            finally:
                config.enable_tensor_float_32_execution(enabled)
        case _:
            yield
