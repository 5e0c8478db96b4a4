"""Published configs of large models: their matrices, parameters and FLOPs.

`scale.py` counts with them. No weights are made: a config is checked against a
tiny backbone of its KerasHub class.
"""

import dataclasses
import math
from typing import Any

import keras_hub

from keras_svdtune.attach import view_of
from keras_svdtune.matrix import DENSE_EQUATION, MatrixView
from keras_svdtune.targets import find_targets


@dataclasses.dataclass(frozen=True)
class Config:
    """The numbers of a published config that decide its cost.

    Attributes:
        family: "gemma", "gemma3" or "llama", the equations of its layers.
        norms: int, RMS norms of the model's width in one layer.
        head_norms: int, RMS norms of a head's width in one layer.
        inner: int, width of either half of the gated feed-forward block.
        tied: bool, whether the logits come from the embedding's table.
        preset: KerasHub preset, to compare the number of parameters with.
    """

    family: str
    layers: int
    width: int
    heads: int
    key_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    norms: int = 2
    head_norms: int = 0
    tied: bool = True
    preset: str | None = None

    def matrices(self) -> dict[str, MatrixView]:
        """The linear layers of one block, by name."""
        d, f = self.width, self.inner
        n, k, h = self.heads, self.key_heads, self.head_dim
        if self.family == "llama":
            query, key, output = (
                "bqm,muh->bquh",
                "bkm,mvh->bkvh",
                "bquh,uhm->bqm",
            )
            kernels = ((d, n, h), (d, k, h), (n, h, d))
            up, down, names = DENSE_EQUATION, DENSE_EQUATION, _LLAMA
        else:
            query, key, output = (
                "btd,ndh->btnh",
                "bsd,kdh->bskh",
                "btnh,nhd->btd",
            )
            kernels = ((n, d, h), (k, d, h), (n, h, d))
            up, down, names = "btd,df->btf", "btf,fd->btd", _GEMMA
        views = (
            MatrixView(query, kernels[0]),
            MatrixView(key, kernels[1]),
            MatrixView(key, kernels[1]),
            MatrixView(output, kernels[2]),
            MatrixView(up, (d, f)),
            MatrixView(up, (d, f)),
            MatrixView(down, (f, d)),
        )
        return dict(zip(names, views, strict=True))

    @property
    def parameters(self) -> int:
        """All parameters of the backbone, and of a head that is not tied."""
        block = sum(math.prod(v.shape) for v in self.matrices().values())
        block += self.norms * self.width + self.head_norms * self.head_dim
        tables = self.vocabulary * self.width * (1 if self.tied else 2)
        return self.layers * block + tables + self.width

    def attention_flops(self, batch: int, length: int) -> float:
        """Scores and sums of one layer, forward and backward."""
        return 12.0 * batch * self.heads * length**2 * self.head_dim

    def head_flops(self, tokens: int) -> float:
        """Logits, and the gradient of what they are computed from."""
        return 4.0 * tokens * self.vocabulary * self.width


_GEMMA = (
    *("query", "key", "value", "attention_output"),
    *("ffw_gating", "ffw_gating_2", "ffw_linear"),
)
_LLAMA = (
    *("query", "key", "value", "attention_output"),
    *("feedforward_intermediate_dense", "feedforward_gate_dense"),
    "feedforward_output_dense",
)
MODELS = {
    "Gemma 2B": Config(
        *("gemma", 18, 2048, 8, 1, 256, 16384, 256000),
        preset="gemma_2b_en",
    ),
    "Gemma 7B": Config(
        *("gemma", 28, 3072, 16, 16, 256, 24576, 256000),
        preset="gemma_7b_en",
    ),
    "Gemma 2 9B": Config(
        *("gemma", 42, 3584, 16, 8, 256, 14336, 256000),
        norms=4,
        preset="gemma2_9b_en",
    ),
    "Gemma 3 27B, text": Config(
        *("gemma3", 62, 5376, 32, 16, 128, 21504, 262144),
        norms=4,
        head_norms=2,
        preset="gemma3_27b_text",
    ),
    "Llama 3 8B": Config(
        *("llama", 32, 4096, 32, 8, 128, 14336, 128256),
        tied=False,
        preset="llama3_8b_en",
    ),
    "Llama 3 70B": Config(
        *("llama", 80, 8192, 64, 8, 128, 28672, 128256), tied=False
    ),
}
# Of the other benchmarks, to check the count with.
GEMMA3_270M = Config(
    *("gemma3", 18, 640, 4, 1, 256, 2048, 262144),
    norms=4,
    head_norms=2,
    preset="gemma3_270m",
)
BACKBONES = {
    "gemma": keras_hub.models.GemmaBackbone,
    "gemma3": keras_hub.models.Gemma3Backbone,
    "llama": keras_hub.models.Llama3Backbone,
}


def check_matrices(config: Config) -> None:
    """Compares the matrices with those of a tiny backbone of the class."""
    tiny = dataclasses.replace(
        config,
        layers=2,
        width=48,
        heads=4,
        key_heads=2,
        head_dim=12 if config.family == "llama" else 16,
        inner=40,
        vocabulary=32,
    )
    settings: dict[str, Any] = {
        "vocabulary_size": tiny.vocabulary,
        "num_layers": tiny.layers,
        "num_query_heads": tiny.heads,
        "num_key_value_heads": tiny.key_heads,
        "hidden_dim": tiny.width,
        "intermediate_dim": tiny.inner,
    }
    if tiny.family != "llama":
        settings["head_dim"] = tiny.head_dim
        settings["use_post_ffw_norm"] = tiny.norms == 4
        settings["use_post_attention_norm"] = tiny.norms == 4
    if tiny.family == "gemma":
        settings["intermediate_dim"] *= 2  # it counts both halves
    if tiny.family == "gemma3":
        settings["image_size"] = 16
    if tiny.family == "llama":
        settings["tie_word_embeddings"] = tiny.tied
    backbone = BACKBONES[tiny.family](**settings)
    theirs = {}
    for layer in find_targets(backbone).values():
        view = view_of(layer)
        theirs[layer.name] = (view.equation, view.kernel_shape)
    ours = {k: (v.equation, v.kernel_shape) for k, v in tiny.matrices().items()}
    if ours != theirs:
        raise AssertionError(f"Other matrices: {ours} and {theirs}")
    if tiny.parameters != backbone.count_params():
        raise AssertionError(
            f"{tiny.parameters:,} parameters, of {backbone.count_params():,}"
        )


def published_parameters(config: Config) -> int | None:
    """What KerasHub's list of presets says."""
    if config.preset is None:
        return None
    presets = BACKBONES[config.family].presets
    return presets[config.preset]["metadata"]["params"]
