"""The tables of README and the Benchmarks page, from the benchmarks' JSON.

    python .docs/tables.py

rewrites what stands between `<!-- table: NAME -->` and `<!-- end -->` in
both. A test compares them with the JSON.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
PAGES = (
    REPOSITORY / "README.md",
    REPOSITORY / ".docs/pages/benchmarks.md",
)
RESULTS = REPOSITORY / "tests/benchmarks/results"
RANK_8 = " (rank 8)"

TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {}


def table(
    function: Callable[[], Iterator[list[str]]],
) -> Callable[[], Iterator[list[str]]]:
    """Registers a function that gives a table's rows, the header first."""
    TABLES[function.__name__] = function
    return function


def read(name: str) -> Any:
    """The results of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def markdown(rows: Iterator[list[str]]) -> str:
    """A table; numbers stand to the right."""
    head, *body = rows
    sides = ["|:--", *("|--:" for _ in head[1:])]
    lines = [f"| {' | '.join(row)} |" for row in (head, *body)]
    return "\n".join([lines[0], "".join(sides) + "|", *lines[1:]])


def filled(text: str) -> str:
    """A page with its tables as the JSON has them now."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda x: f"{x[1]}\n{markdown(TABLES[x[2]]())}\n\n{x[3]}",
        text,
        flags=re.DOTALL,
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


STUDY = {
    "pirate": "smollm2_135m, pirate, 120",
    "names": "smollm2_135m, names, 120",
    "reviews": "minilm, reviews, 150",
    "short": "smollm2_135m, pirate, 40",
    "gemma": "gemma3_270m, pirate, 120",
    "speeches": "smollm2_135m, speeches, 120",
}


def study(task: str) -> Iterator[list[str]]:
    """Every method of the study on one task, at its own best rate."""
    found = read("study")[STUDY[task]]
    base = found["base"]
    exact = any(x["exact"] for x in found["methods"].values())
    yield [
        *("", "trained", "file, KiB", "best rate", "seeds", "test loss"),
        "to LoRA, 95 %",
        *(("accuracy" if base is None else "exact",) if exact else ()),
        *(() if base is None else ("forgotten", "LoRA at this loss")),
    ]
    if base is not None:
        row = ["base model", *4 * [""], f"{base['test_loss']:.3f}", ""]
        row += [f"{base['test_exact']:.0%}"] if exact else []
        yield [*row, "", ""]
    for x in found["methods"].values():
        row = [
            x["label"],
            f"{x['trained']:,}",
            f"{x['file_bytes'] / 1024:,.0f}" if x["file_bytes"] else "",
            f"{x['rate']:.1g}" + ("" if x["inside"] else " (edge)"),
            str(x["seeds"]),
            f"{x['test_loss']:.3f}",
            "{:+.3f} ({:+.3f} to {:+.3f})".format(*x["to_lora"])
            if x.get("to_lora")
            else "",
        ]
        if exact:
            row.append(f"{x['exact']:.0%}")
        if base is not None:
            row.append(f"{x['forgotten']:+.2f}")
            other = x["lora_forgets"]
            row.append("" if other is None else f"{other:+.2f}")
        yield row


for _task in STUDY:
    TABLES[f"study_{_task}"] = functools.partial(study, _task)


def compared(x: Any) -> str:
    """A difference to LoRA and its interval, bold where that leaves out 0."""
    if not x.get("to_lora"):
        return ""
    mean, low, high = x["to_lora"]
    text = f"{mean:+.3f}"
    if round(low, 3) > 0 or round(high, 3) < 0:
        text = f"**{text}**"
    return f"{text} ({low:+.2f} to {high:+.2f})"


@table
def front_page() -> Iterator[list[str]]:
    """For README: what has three seeds or more."""
    yield [
        *("", "trained", "style: loss", "to LoRA, 95 %", "forgotten"),
        *("reviews: loss", "to LoRA, 95 %", "skill: right"),
    ]
    style, reviews, names = (
        {
            name: x
            for name, x in read("study")[STUDY[task]]["methods"].items()
            if x["seeds"] >= 3
        }
        for task in ("pirate", "reviews", "names")
    )
    for name in sorted(style, key=lambda name: style[name]["trained"]):
        x, y, z = style[name], reviews.get(name), names.get(name)
        yield [
            x["label"],
            f"{x['trained']:,}",
            f"{x['test_loss']:.3f}",
            compared(x),
            f"{x['forgotten']:+.2f}",
            f"{y['test_loss']:.3f}" if y else "",
            compared(y) if y else "",
            f"{z['exact']:.0%}" if z else "",
        ]


@table
def fewer() -> Iterator[list[str]]:
    """What might make SVF forget less."""
    yield [
        *("answers like a pirate", "trained", "best rate", "seeds"),
        *("test loss", "forgotten", "LoRA at this loss"),
    ]
    for x in read("study")[STUDY["pirate"]]["fewer"].values():
        other = x["lora_forgets"]
        yield [
            x["label"],
            f"{x['trained']:,}",
            f"{x['rate']:.1g}",
            str(x["seeds"]),
            f"{x['test_loss']:.3f}",
            f"{x['forgotten']:+.2f}",
            "" if other is None else f"{other:+.2f}",
        ]


@table
def default_rate() -> Iterator[list[str]]:
    """The style at the rate of `compile()` without arguments."""
    found = read("study")[STUDY["pirate"]]
    yield ["120 steps at 2e-5", "test loss", "of the base model's"]
    before = found["base"]["test_loss"]
    for x in [found["enable_lora"], *found["methods"].values()]:
        loss = x["at_keras_hub_rate"]
        if loss is not None:
            yield [x["label"], f"{loss:.3f}", f"{loss - before:+.3f}"]


@table
def claims() -> Iterator[list[str]]:
    """What papers claim, as the study finds it."""
    found = {task: read("study").get(key) for task, key in STUDY.items()}
    tasks = {t: x["claims"] for t, x in found.items() if x and x["claims"]}
    heads = {"pirate": "style", "names": "skill"}
    yield ["difference, 95 %", *(heads.get(task, task) for task in tasks)]
    for name in dict.fromkeys(name for x in tasks.values() for name in x):
        cells = []
        for x in tasks.values():
            if name not in x:
                cells.append("")
                continue
            mean, low, high = x[name]
            verdict = "undecided"
            if round(high, 3) < 0:
                verdict = "yes"
            elif round(low, 3) > 0:
                verdict = "**no**"
            cells.append(f"{verdict}: {mean:+.3f} ({low:+.3f} to {high:+.3f})")
        yield [name, *cells]


@table
def gemma2_9b() -> Iterator[list[str]]:
    """What the methods add to a model of nine billion parameters."""
    yield [
        "Gemma 2 9B, bfloat16",
        "trained parameters",
        "extra frozen, MB",
        "Adam's state, MB",
        "adapter file, MB",
    ]
    for name, x in read("scale")["models"]["gemma2_9b"]["results"].items():
        yield [
            name.replace(RANK_8, ", rank 8"),
            f"{x['trainable']:,}",
            *(
                f"{x[k] / 1e6:,.1f}"
                for k in ("frozen_bytes", "optimizer_bytes")
            ),
            f"{x['file_bytes'] / 1e6:,.1f}",
        ]


@table
def memory_of_svf() -> Iterator[list[str]]:
    """The basis that SVF keeps beside W."""
    yield ["model, bfloat16", "its parameters", "SVF's extra frozen, GB"]
    for name, x in read("scale")["models"].items():
        frozen = x["results"]["SVF"]["frozen_bytes"] / 1e9
        yield [f"`{name}`", f"{x['parameters']:,}", f"{frozen:.1f}"]


@table
def sums() -> Iterator[list[str]]:
    """Two SVF adapters and their sums, without a decay and with it."""
    head = ("style: loss", "skill: loss", "skill: right")
    yield ["", *head, *(f"{name}, decay" for name in head)]
    files = [f"compose_smollm2_135m_svf{x}" for x in ("", "_decay_16")]
    found = [read(file)["rows"] for file in files]
    for name in found[0]:
        row = [name.replace("pirate", "style").replace("names", "skill")]
        for tasks in (x[name] for x in found):
            row += [f"{tasks[x]['loss']:.2f}" for x in ("pirate", "names")]
            row.append(f"{tasks['names']['exact']:.0%}")
        yield row


def plain(label: str) -> str:
    """A label of the benchmarks, as the tables have it."""
    return label.replace("replace_kernel=true", "with `replace_kernel`")


@table
def steps() -> Iterator[list[str]]:
    """One training step of Gemma 3 270M."""
    yield [
        "",
        "seconds, to `enable_lora`",
        "CPU seconds, to `enable_lora`",
        "seconds, to the frozen floor",
        "GFLOP",
        "temporary bytes, to `enable_lora`",
    ]
    for name, x in read("step_time_gemma3_270m_jax")["results"].items():
        yield [
            plain(name),
            f"{x['seconds_to_lora']:.2f}",
            f"{x['cpu_seconds_to_lora']:.2f}",
            f"{x['seconds_to_floor']:.2f}",
            f"{x['flops'] / 1e9:,.0f}",
            f"{x['temp_bytes_to_lora']:.2f}",
        ]


@table
def steps_of_largest() -> Iterator[list[str]]:
    """That of SVF with the largest singular values alone."""
    yield [
        "",
        "seconds, to `enable_lora`",
        "seconds, to the frozen floor",
        "GFLOP",
        "beside the model, MB",
    ]
    found = read("step_time_gemma3_270m_jax_rank80")["results"]
    floor = found["frozen floor"]["argument_bytes"]
    for name in ("frozen floor", "LoRA (rank 8)", "SVF", "SVF (rank 80)"):
        x = found[name]
        yield [
            name,
            f"{x['seconds_to_lora']:.2f}",
            f"{x['seconds_to_floor']:.2f}",
            f"{x['flops'] / 1e9:,.0f}",
            f"{(x['argument_bytes'] - floor) / 1e6:,.0f}",
        ]


@table
def layers() -> Iterator[list[str]]:
    """One training step of single layers of larger models."""
    yield [
        "seconds, to `enable_lora`",
        "matrix",
        "tokens",
        "LoRA",
        "SVF",
        "SVF with `replace_kernel`",
    ]
    models = {
        "Gemma 2B": {"gate": (2048, 16384), "down": (16384, 2048)},
        "Gemma 2 9B": {"gate": (3584, 14336), "down": (14336, 3584)},
        "Llama 3 8B": {"gate": (4096, 14336), "down": (14336, 4096)},
    }
    models["Gemma 2B"]["query"] = (2048, 2048)
    models["Gemma 2 9B"]["query"] = (3584, 4096)
    models["Llama 3 8B"]["query"] = (4096, 4096)
    for model, matrices in models.items():
        for layer, (rows, columns) in matrices.items():
            for tokens in (512, 4096, 16384):
                name = f"step_time_{rows}x{columns}_jax_{tokens}"
                if not (RESULTS / f"{name}.json").exists():
                    continue
                found = read(name)["results"]
                yield [
                    f"{model}, {layer}",
                    f"{rows} x {columns}",
                    f"{tokens:,}",
                    *(
                        f"{found[x]['seconds_to_lora']:.2f}"
                        for x in (
                            f"LoRA{RANK_8}",
                            "SVF",
                            "SVF replace_kernel=true",
                        )
                    ),
                ]


def by_reward(task: str, reward: str) -> Iterator[list[str]]:
    """What a task is answered like after steps by reward and by examples."""
    found = read(f"by_reward_{task}_smollm2_135m")
    start, more = (found["settings"][x] for x in ("warm_up", "steps"))
    yield ["SmolLM2-135M, SVF", reward, "held-out loss"]
    titles = {"the start": f"{start} steps by examples: the start"}
    titles |= {x: f"{more} more {x}" for x in ("by reward", "by examples")}
    for name, x in found["rows"].items():
        mean = percent(x["reward"])
        yield [titles.get(name, name), mean, f"{x['loss']:.2f}"]


@table
def by_reward_names() -> Iterator[list[str]]:
    """Right names by reward and by examples."""
    yield from by_reward("names", "right names")


@table
def by_reward_pirate() -> Iterator[list[str]]:
    """Pirate speech by reward and by examples."""
    yield from by_reward("pirate", "pirate words")


@table
def mixtures_letters() -> Iterator[list[str]]:
    """Mixtures found from a few examples of counting letters."""
    yield from mixtures("letters", "right answers")


@table
def mixtures_speeches() -> Iterator[list[str]]:
    """Mixtures found from a few examples of a pirate's speeches."""
    yield from mixtures("speeches", "words in common")


def mixtures(task: str, score: str) -> Iterator[list[str]]:
    """What mixtures are worth on a task."""
    yield [
        "SmolLM2-135M, SVF",
        "search, s",
        "loss: searched by",
        "chosen by",
        "others",
        "to the best expert",
        f"{score}: searched by",
        "chosen by",
        "others",
    ]
    for name, x in read(f"mixtures_{task}_smollm2_135m")["rows"].items():
        shots, held, others = (x[k] for k in ("shots", "held out", "others"))
        yield [
            name,
            f"{x['seconds']:,.0f}" if x["seconds"] else "",
            *(f"{part['loss'][0]:.2f}" for part in (shots, held)),
            "{:.2f} ± {:.2f}".format(*others["loss"]),
            "{:+.2f} ± {:.2f}".format(*x["to_expert"]),
            *(percent(part["score"][0]) for part in (shots, held)),
            "{:.1f} ± {:.1f} %".format(*(100 * y for y in others["score"])),
        ]


def generated(backend: str) -> Iterator[list[str]]:
    """Tokens a second with an adapter on, merged, and without."""
    yield ["SmolLM2-135M, one prompt", "tokens a second", "seconds, to base"]
    run = read(f"generation_smollm2_135m_{backend}")
    for label, x in run["results"].items():
        yield [
            plain(label),
            f"{x['tokens_per_second']:.1f}",
            f"{x['of_base']:.2f}",
        ]


@table
def generation() -> Iterator[list[str]]:
    """On JAX."""
    yield from generated("jax")


@table
def generation_torch() -> Iterator[list[str]]:
    """On torch, with PEFT in transformers."""
    yield from generated("torch")


@table
def per_example() -> Iterator[list[str]]:
    """Another adapter in each row against one for all."""
    yield ["", "one adapter, s", "eight adapters, s", "ratio"]
    for label, x in read("per_example_smollm2_135m_jax")["results"].items():
        yield [
            label,
            f"{x['seconds']['one']:.2f}",
            f"{x['seconds']['each']:.2f}",
            f"{x['ratio']:.2f}",
        ]


@table
def enabling() -> Iterator[list[str]]:
    """Enabling on Gemma 3 270M."""
    yield ["", "seconds", "to `torch.linalg.svd`", "again, from the cache"]
    titles = {"svf": "SVF", "svft": "SVFT"}
    titles |= {"milora": "MiLoRA", "pissa": "PiSSA", "lora_xs": "LoRA-XS"}
    seen = set()
    for rank in (8, 16):
        suffix = "" if rank == 8 else f"_rank{rank}"
        found = read(f"enable_time_gemma3_270m_jax{suffix}")
        for name, x in found["enabling"].items():
            title = titles.get(name, f"`{name.split(',')[0]}`")
            if title in seen:
                continue
            seen.add(title)
            again = found["cache"].get(name)
            ranked = name in ("milora", "pissa", "lora_xs")
            yield [
                title + (f", rank {rank}" if ranked else ""),
                f"{x['seconds']:.1f}",
                f"{x['seconds_to_torch']:.2f}",
                f"{again['second_seconds']:.1f}" if again else "",
            ]


@table
def qpissa() -> Iterator[list[str]]:
    """How much nearer QPiSSA starts to the float model."""
    yield ["rank", "iterations", "int4", "int8"]
    found = {
        (x["rank"], x["iterations"], x["quantize"]): x["all"]["nuclear"]
        for x in read("qpissa_error_gemma3_270m_jax")["results"]
    }
    for rank, iterations in dict.fromkeys(key[:2] for key in found):
        both = [found[rank, iterations, x] for x in ("int4", "int8")]
        yield [str(rank), str(iterations), *map(percent, both)]


@table
def slice_of_a_tpu() -> Iterator[list[str]]:
    """One training step of Gemma 2 9B, compiled for eight TPUs."""
    yield [
        "on each device",
        "adapter, GB",
        "optimizer, GB",
        "peak, GB",
        "collectives",
        "sent, GB",
    ]
    found = read("distribution_gemma2_9b_v5e_2x4")["meshes"]
    for name, x in found["1,8, 1 x 1024"].items():
        adapter = (x.get("bases", 0) + x["trainables"]) / 1e9
        yield [
            name.replace(RANK_8, ", rank 8"),
            f"{adapter:.2f}" if name != "base model" else "",
            f"{x['optimizer'] / 1e9:.3f}",
            f"{x['peak'] / 1e9:.2f}",
            f"{x['collectives']:,.0f}",
            f"{x['collective bytes'] / 1e9:.1f}",
        ]


@table
def layout_maps() -> Iterator[list[str]]:
    """Our layout map beside KerasHub's, for a small Llama 3."""
    yield [
        "mesh (batch, model)",
        "layout map",
        "model, MB on each device",
        "collectives",
        "collectives with SVF",
    ]
    files = {"": "`svdtune_layout_map`", "_keras_hub": "KerasHub's"}
    for mesh in ("1,8", "2,4"):
        for suffix, title in files.items():
            found = read(f"distribution_llama3_small_cpu{suffix}")["meshes"]
            x = found[f"{mesh}, 8 x 128"]
            yield [
                f"({mesh.replace(',', ', ')})",
                title,
                f"{x['base model']['model'] / 1e6:.1f}",
                *(f"{x[k]['collectives']:.0f}" for k in ("base model", "SVF")),
            ]


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text("utf-8")), "utf-8")
