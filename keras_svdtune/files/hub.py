"""Uploads an adapter to a model hub, with a model card.

`hub_client.py` talks to the hubs; `load_adapter` loads what is there.
"""

import pathlib
import re
import tempfile

import keras_hub

from keras_svdtune.files import hub_client
from keras_svdtune.files.format import BESIDE
from keras_svdtune.files.hub_client import CARD, FILE, MARK, NAME, Place
from keras_svdtune.files.save_load import saved_adapter
from keras_svdtune.methods.base import Method
from keras_svdtune.model.names import note_saved
from keras_svdtune.model.state import adapted_part, require_adapted
from keras_svdtune.reports.cost import cost_of
from keras_svdtune.runtime.types import Json, Model
from keras_svdtune.version import __version__


def push_adapter(
    model: Model,
    uri: str,
    base_preset: str | None = None,
    private: bool = False,
    include_basis: bool = False,
    adapter_only: bool = False,
    name: str | None = None,
) -> None:
    """Uploads the enabled adapter to a model hub, for `load_adapter`.

    Of several adapters, that is what is set (`set_adapter`), also a sum of
    them, or the one with this `name`.

    The repository gets the file that `save_adapter` writes, as
    `adapter.safetensors`, and a model card about it. It is made if it does not
    exist; otherwise both files are replaced by one commit (a version, on
    Kaggle). A card on Hugging Face that you wrote, or from which you deleted
    the line that says so, stays.

    Args:
        model: a model with an adapter.
        uri: `"hf://user/name"` or `"kaggle://user/model/keras/variation"`.
            You must be logged in there.
        base_preset: str or None. The preset that the base was loaded from,
            for the card: `"gemma3_1b"`, `"hf://user/name"`. The model does
            not know it.
        private: whether only you can read it. For Hugging Face; Kaggle makes
            every new model private.
        include_basis, adapter_only, name: as for `save_adapter`.

    Raises:
        ImportError: `pip install keras_svdtune[hub]` is needed.
        ValueError: the model has no adapter, or none of that `name`; `uri` or
            `base_preset` cannot be one; or the hub did not take it.

    Example:

    ```python
    gemma.backbone.push_adapter("hf://user/pirate", "gemma3_1b")
    # elsewhere
    gemma.backbone.load_adapter("hf://user/pirate")
    ```
    """
    place = hub_client.place_to_push(uri, private)
    root = adapted_part(model)
    require_adapted(root)
    if base_preset is not None:
        _check_preset(base_preset, root)
    saved = saved_adapter(model, include_basis, adapter_only, name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        saved.save(folder / FILE)
        size = (folder / FILE).stat().st_size
        text = _card(place, model, saved.about, size, base_preset)
        (folder / CARD).write_text(text, encoding="utf-8")
        hub_client.upload(place, folder, private)
    if name is None:
        note_saved(model, adapter_only)


def _check_preset(preset: str, root: Model) -> None:
    if not re.fullmatch("[A-Za-z0-9_.:/-]+", str(preset)):
        raise ValueError(
            "`base_preset` must be a preset of KerasHub, such as "
            f"'gemma3_1b' or 'hf://user/name'. Received: {preset!r}"
        )
    if not isinstance(root, keras_hub.models.Backbone):
        raise ValueError(
            f"`base_preset` is for KerasHub's models; '{root.name}' is a "
            f"{type(root).__name__}. Received: base_preset={preset!r}"
        )


def _card(
    place: Place,
    model: Model,
    about: Json,
    size: int,
    preset: str | None,
) -> str:
    """Writes the model card of an adapter at `place`: only what is known.

    `about` is the metadata of its file, `size` the bytes of that.
    """
    cost = cost_of(model)
    method, base, trainable = cost.method, cost.model_parameters, cost.trainable
    dtypes = sorted({x["dtype"] for x in about["layers"].values()})
    versions = {"keras_svdtune": __version__, **about["versions"]}
    rows = {
        "method": f"`{method}`",
        "paper": ", ".join(_papers(method)),
        "base": f"{about['model_class']}, {base:,} parameters",
        "preset of the base": preset and f"`{preset}`",
        "adapted layers": f"{len(about['layers']):,}, in {', '.join(dtypes)}",
        "trainable parameters": f"{trainable:,} ({trainable / base:.4%})",
        "also trained": ", ".join(f"`{x}`" for x in about.get(BESIDE, {})),
        "file": f"`{FILE}`, {size / 1024:,.1f} KiB",
        "written with": ", ".join(f"{k} {v}" for k, v in versions.items()),
    }
    # Not `keras-hub`: the Hub would tell readers to call `from_preset`.
    header = ["library_name: keras_svdtune", "tags:", "- keras"]
    header += [f"- {method.name}"]
    if preset and re.fullmatch(f"hf://{NAME}/{NAME}", preset):
        header += [f"base_model: {preset.removeprefix('hf://')}"]
        header += ["base_model_relation: adapter"]
    code = ["import keras_svdtune", ""]
    if preset:
        code = ["import keras_hub", *code]
        name = about.get("saved_from", "Backbone")
        code += [f'model = keras_hub.models.{name}.from_preset("{preset}")']
    else:
        name = about.get("saved_from", about["model_class"])
        code += [f"# `model` is the {name} it belongs to"]
    code += [f'keras_svdtune.load_adapter(model, "{place.uri}")']
    return "\n".join(
        [
            *("---", *header, "---", MARK, ""),
            *(f"# {place.name.split('/')[-1]}", ""),
            f"An adapter ({method.title}) for a {about['model_class']}, made "
            "with keras_svdtune. It is not a whole model:",
            "it loads onto the base that it belongs to, and onto no other.",
            *("", "| | |", "|---|---|"),
            *(f"| {k} | {v} |" for k, v in rows.items() if v),
            *("", "```python", *code, "```", ""),
        ]
    )


def _papers(method: Method) -> list[str]:
    """Finds the URLs of the papers in the docstring of a method."""
    _, _, references = (type(method).__doc__ or "").partition("Reference")
    return re.findall("https://arxiv[.]org/abs/[0-9.]*[0-9]", references)
