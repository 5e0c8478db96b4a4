"""Published configs of large models, as KerasHub backbones without values.

`scale.py` counts with them: layers, matrices and parameters are those of the
real backbone at its full size, whose variables are declared and never made.
"""

import dataclasses
import functools
from typing import Any

import keras
import keras_hub

from keras_svdtune.hosts.attach import view_of
from keras_svdtune.matrix.view import MatrixView
from keras_svdtune.model.targets import find_targets


@dataclasses.dataclass(frozen=True)
class Config:
    """The numbers of a published config that decide its cost.

    Attributes:
        family: "gemma", "gemma3" or "llama", the class of the backbone.
        inner: int, width of either half of the gated feed-forward block.
        post_norms: bool, norms after attention and feed-forward too.
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
    post_norms: bool = False
    tied: bool = True
    preset: str | None = None

    @functools.cached_property
    def backbone(self) -> keras.Model:
        """The backbone in bfloat16; no variable of it has a value."""
        settings: dict[str, Any] = {
            "vocabulary_size": self.vocabulary,
            "num_layers": self.layers,
            "num_query_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "hidden_dim": self.width,
            "intermediate_dim": self.inner,
            "dtype": "bfloat16",
        }
        if self.family == "llama":
            settings["tie_word_embeddings"] = self.tied
        else:
            settings["head_dim"] = self.head_dim
            settings["use_post_ffw_norm"] = self.post_norms
            settings["use_post_attention_norm"] = self.post_norms
        if self.family == "gemma":
            settings["intermediate_dim"] *= 2  # it counts both halves
        if self.family == "gemma3":
            settings["image_size"] = 16  # of no image: text only
        with keras.StatelessScope(initialize_variables=False):
            backbone = BACKBONES[self.family](**settings)
        # Or else Keras gives them values when it leaves the next scope.
        keras.utils.clear_session()
        return backbone

    @functools.cached_property
    def matrices(self) -> dict[str, MatrixView]:
        """The linear layers of one block, by name, in the order of `_NAMES`."""
        found: dict[str, MatrixView] = {}
        targets = find_targets(self.backbone).values()
        for layer in targets:
            view = view_of(layer)
            if found.setdefault(layer.name, view).shape != view.shape:
                raise AssertionError(f"Blocks differ: {layer.path}")
        names = _NAMES[self.family]
        if set(names) != set(found):
            raise AssertionError(f"Other layers: {sorted(found)}, not {names}")
        if len(targets) != self.layers * len(names):
            raise AssertionError(f"{len(targets)} layers in all")
        return {name: found[name] for name in names}

    @property
    def parameters(self) -> int:
        """All parameters of the backbone, and of a head that is not tied."""
        return self.backbone.count_params()

    @property
    def published_parameters(self) -> int | None:
        """What KerasHub's list of presets says."""
        if self.preset is None:
            return None
        presets = BACKBONES[self.family].presets
        return presets[self.preset]["metadata"]["params"]

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
_NAMES = {"gemma": _GEMMA, "gemma3": _GEMMA, "llama": _LLAMA}
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
        post_norms=True,
        preset="gemma2_9b_en",
    ),
    "Gemma 3 27B, text": Config(
        *("gemma3", 62, 5376, 32, 16, 128, 21504, 262144),
        post_norms=True,
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
    post_norms=True,
    preset="gemma3_270m",
)
BACKBONES = {
    "gemma": keras_hub.models.GemmaBackbone,
    "gemma3": keras_hub.models.Gemma3Backbone,
    "llama": keras_hub.models.Llama3Backbone,
}
