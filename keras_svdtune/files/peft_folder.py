"""Reads a folder that Hugging Face's PEFT wrote: LoRA, DoRA or AdaLoRA.

Its modules are those of the model in `transformers` that has the weights of the
KerasHub model under other names (`convert/hf_names.py`). What PEFT computes:

    LoRA      W + k·(B·A)ᵀ           k = alpha / r, or alpha / sqrt(r) (rsLoRA)
    DoRA      the same, its columns scaled to the norms m
    AdaLoRA   W + k·(B·diag(E)·A)ᵀ   k = alpha / (r + 1e-5)

with `lora_A` (r, in), `lora_B` (out, r), `lora_E` (r, 1). AdaLoRA is read as a
LoRA with diag(E)·A for A. Dropout, which matters in training alone, is left
out. Neither `peft` nor `transformers` is imported.
"""

import json
import math
import os
import pathlib
import re

import numpy as np
import safetensors.numpy

from keras_svdtune.convert.hf_names import family_of, module_of
from keras_svdtune.files.hub_client import PEFT_FILES
from keras_svdtune.files.low_rank_files import LowRankFile, LowRankLayer, thin
from keras_svdtune.methods.base import nearest
from keras_svdtune.model.targets import matrices_in
from keras_svdtune.runtime.types import Json, Model

CONFIG, TENSORS = PEFT_FILES
_KINDS = ("LORA", "ADALORA")
# Settings that say how it was trained, or are read below. Any other that is
# set may change what the adapter computes.
_UNDERSTOOD = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
    # of AdaLoRA alone
    "beta1",
    "beta2",
    "deltaT",
    "init_r",
    "orth_reg_weight",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
}
# Starts that leave W as it is; the others put a residual in its place.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_MODULE = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?:model\.|language_model\.|transformer\.)*(?:layers|h)\.(\d+)\.(.+)"
)
_TENSOR = re.compile(
    r"(.+)\.(lora_[ABE]|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)


def read_peft(
    folder: str | os.PathLike[str], root: Model, source: str
) -> LowRankFile:
    """Reads a folder for the KerasHub backbone `root`.

    Raises a ValueError if it is no folder of PEFT's, is damaged, or holds
    what cannot be read without a loss.
    """
    folder = pathlib.Path(folder)
    config = _config(folder, source)
    tensors = _tensors(folder / TENSORS, source)
    family = family_of(root)
    # By number and module: the layers that stand side by side in it, in order.
    ours: dict[tuple[str, str], list[str]] = {}
    targets = matrices_in(root, adapted=True).targets
    for path in targets:
        try:
            module, _ = module_of(path, family)
        except ValueError:
            continue  # a layer that transformers has under another name
        number, name = _split(module)
        ours.setdefault((number, name), []).append(path)
    order = list(family.modules)
    layers: dict[str, LowRankLayer] = {}
    for module, parts in _modules(tensors, source).items():
        key = _split(module)
        if key not in ours:
            known = [f"layers.{n}.{x}" for n, x in ours]
            raise ValueError(
                f"{source} adapts '{module}', which '{root.name}' does not "
                "have, or which is not among what can be adapted here. "
                f"{nearest('layers.' + '.'.join(key), known)}"
            )
        layer = _layer(module, parts, config, source)
        paths = sorted(ours[key], key=lambda p: order.index(p.split("/")[-1]))
        widths = [targets[path].view.shape[1] for path in paths]
        if sum(widths) != layer.b.shape[1]:
            raise ValueError(
                f"{source} was made for another model: its '{module}' has "
                f"{layer.b.shape[1]} outputs, expected {sum(widths)}."
            )
        ends = np.cumsum(widths)[:-1]
        bs = np.split(layer.b, ends, axis=1)
        m = layer.magnitude
        ms = [None] * len(paths) if m is None else np.split(m, ends)
        for path, b, m in zip(paths, bs, ms, strict=True):
            layers[path] = LowRankLayer(layer.a, b, layer.scale, m)
    return LowRankFile(source, {p: thin(x) for p, x in layers.items()})


def _config(folder: pathlib.Path, source: str) -> Json:
    """Reads the settings; raises a ValueError if one is not understood."""
    try:
        config: Json = json.loads((folder / CONFIG).read_text("utf-8"))
        kind = config["peft_type"]
    except FileNotFoundError:
        raise ValueError(
            f"{source} is a folder without '{CONFIG}'. `load_adapter` takes a "
            "file that `save_adapter` wrote, or a folder of PEFT's."
        ) from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"'{CONFIG}' of {source} is damaged: {error!r}"
        ) from None
    if kind not in _KINDS:
        raise ValueError(
            f"{source} is a {kind} of PEFT's. Read are {', '.join(_KINDS)}. "
            "Merge it there, and load the merged model with `from_preset`."
        )
    start = config.pop("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"{source} was started by init_lora_weights={start!r}, which "
            "changes the base too. Save it again with PEFT's "
            "`save_pretrained(folder, path_initial_model_for_weight_"
            "conversion=...)`, which makes a LoRA of it."
        )
    if config.pop("bias", "none") != "none":
        raise ValueError(f"{source} trains biases, which are not read.")
    others = {k: v for k, v in config.items() if v and k not in _UNDERSTOOD}
    if others:
        name, value = next(iter(others.items()))
        raise ValueError(
            f"{source} has {name}={value!r}, which is not read. Merge it "
            "there, and load the merged model with `from_preset`."
        )
    return config


def _tensors(path: pathlib.Path, source: str) -> dict[str, np.ndarray]:
    """Reads the arrays, in float32."""
    if not path.exists():
        raise ValueError(
            f"{source} has no '{TENSORS}'. A folder with "
            "'adapter_model.bin' is one of old: load it with PEFT, and save "
            "it again."
        )
    try:
        found = safetensors.numpy.load_file(path)
    except Exception as error:
        raise ValueError(
            f"'{TENSORS}' of {source} is damaged: {error}"
        ) from None
    return {key: array.astype("float32") for key, array in found.items()}


def _modules(
    tensors: dict[str, np.ndarray], source: str
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the arrays of each module, by PEFT's names for them."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    for key, array in tensors.items():
        found = _TENSOR.fullmatch(key)
        if found is None or _MODULE.fullmatch(found[1]) is None:
            raise ValueError(
                f"{source} holds '{key}', which is not a low-rank factor of a "
                "layer in a block: embeddings, heads and modules that were "
                "trained whole are not read. Merge it with PEFT, and load the "
                "merged model with `from_preset`."
            )
        modules.setdefault(found[1], {})[found[2]] = array
    if not modules:
        raise ValueError(f"{source} adapts no layer.")
    return modules


def _split(module: str) -> tuple[str, str]:
    """Returns a block's number, and the name of a module in it."""
    found = _MODULE.fullmatch(module)
    assert found is not None
    return found[1], found[2]


def _layer(
    module: str, parts: dict[str, np.ndarray], config: Json, source: str
) -> LowRankLayer:
    """Returns what PEFT's arrays of a module add to W (in, out)."""
    adalora = config["peft_type"] == "ADALORA"
    wanted = {"lora_A": 2, "lora_B": 2}
    if adalora:
        wanted["lora_E"] = 2
    if config.get("use_dora"):
        wanted["lora_magnitude_vector"] = 1
    # PEFT has kept m as a row, too.
    shapes = {k: np.squeeze(v).shape for k, v in parts.items()}
    if set(parts) != set(wanted) or (
        parts["lora_A"].ndim != 2
        or parts["lora_B"].ndim != 2
        or len(shapes.get("lora_magnitude_vector", (0,))) != 1
        or len({parts["lora_A"].shape[0], parts["lora_B"].shape[1]}) != 1
    ):
        raise ValueError(
            f"{source} should hold {', '.join(wanted)} of '{module}', of one "
            f"rank. Found: { {k: v.shape for k, v in parts.items()} }"
        )
    a, b = parts["lora_A"], parts["lora_B"]
    rank = a.shape[0]
    name = module.removeprefix("base_model.model.")
    alpha = _of_pattern(config.get("alpha_pattern"), name)
    alpha = float(config["lora_alpha"]) if alpha is None else alpha
    if adalora:
        a = a * parts["lora_E"].reshape(rank, 1)
        scale = alpha / (rank + 1e-5)
    elif config.get("use_rslora"):
        scale = alpha / math.sqrt(rank)
    else:
        scale = alpha / rank
    magnitude = parts.get("lora_magnitude_vector")
    return LowRankLayer(
        np.ascontiguousarray(a.T),
        np.ascontiguousarray(b.T),
        scale,
        None if magnitude is None else magnitude.reshape(-1),
    )


def _of_pattern(patterns: Json | None, name: str) -> float | None:
    """Returns the value of the first pattern that the end of a name matches."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return float(value)
    return None
