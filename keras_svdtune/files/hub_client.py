"""Reads and writes adapters on model hubs, and parses their URIs.

On either hub an adapter is the file `adapter.safetensors` and a model card,
`README.md`. What PEFT pushed to Hugging Face is fetched too. The URIs are
KerasHub's, with a revision:

    hf://user/name                          Hugging Face, its branch `main`
    hf://user/name@revision                 a branch, a tag or a commit of it
    kaggle://user/model/keras/variation     Kaggle, the newest version
    kaggle://user/model/keras/variation/3   one version of it

A hub's client is imported only when a URI of that hub is used.
"""

import contextlib
import dataclasses
import importlib
import pathlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

FILE, CARD = "adapter.safetensors", "README.md"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Only a card with this line in it is replaced on Hugging Face.
MARK = (
    "<!-- Written by keras_svdtune: each push_adapter replaces this card. "
    "Delete this line to keep what you write here. -->"
)


@dataclasses.dataclass(frozen=True)
class _Hub:
    """A hub: the form of its URIs, its client, and texts for error messages."""

    form: str
    version: str
    pattern: str
    package: str
    login: str
    missing: str


NAME = "[A-Za-z0-9][A-Za-z0-9_.-]*"
_HUBS = {
    "hf": _Hub(
        "hf://user/name",
        "@revision",
        f"hf://({NAME}/{NAME})(?:@([A-Za-z0-9][A-Za-z0-9_./-]*))?",
        "huggingface_hub",
        "`hf auth login`",
        "no such repository or revision",
    ),
    # The framework must be `keras`: an upload under a name that Kaggle does
    # not know would fail half way.
    "kaggle": _Hub(
        "kaggle://user/model/keras/variation",
        "/version",
        f"kaggle://({NAME}/{NAME}/keras/{NAME})(?:/([1-9][0-9]*))?",
        "kagglehub",
        "`kagglehub.login()`",
        f"no such model, or no '{FILE}' in it",
    ),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of an adapter: a version of a repository on a hub."""

    uri: str
    hub: str
    name: str
    version: str | None  # None is the newest


def is_uri(path: object) -> bool:
    """Says whether `path` is a URI on a hub and not a local file."""
    return isinstance(path, str) and "://" in path


def parse_uri(uri: object) -> Place:
    """Parses a URI; raises a ValueError that shows the valid forms."""
    for key, hub in _HUBS.items():
        if found := re.fullmatch(hub.pattern, str(uri)):
            return Place(str(uri), key, *found.groups())
    forms = " or ".join(f"'{x.form}[{x.version}]'" for x in _HUBS.values())
    raise ValueError(f"An adapter on a hub is {forms}. Received: {uri!r}")


def place_to_push(uri: object, private: bool) -> Place:
    """Returns the place to push to; raises an error if `uri` cannot be one."""
    place = parse_uri(uri)
    if place.version is not None:
        raise ValueError(
            "Each push makes a new version by itself: push to "
            f"'{_HUBS[place.hub].form}'. Received: {uri!r}"
        )
    if private and place.hub == "kaggle":
        raise ValueError(
            "`private` is for 'hf://'. Kaggle makes every new model private, "
            f"until you publish it there. Received: private={private!r}"
        )
    _client(place)
    return place


def fetch(uri: str) -> str:
    """Downloads an adapter's file, and returns its path in the hub's cache.

    Of a repository of PEFT's on Hugging Face that is the path of a folder.
    Raises an ImportError if the hub's client is not installed, and a
    ValueError if `uri` is no URI of an adapter or there is no such one.
    """
    place = parse_uri(uri)
    client = _client(place)
    with _explained(place, "read"):
        if place.hub == "kaggle":
            version = f"/{place.version}" if place.version else ""
            return client.model_download(place.name + version, FILE)
        try:
            return _download(client, place, FILE)
        except client.errors.EntryNotFoundError as missing:
            if isinstance(missing, client.errors.LocalEntryNotFoundError):
                raise  # the hub did not answer
            try:
                paths = [_download(client, place, x) for x in PEFT_FILES]
            except client.errors.EntryNotFoundError:
                raise missing from None
        return str(pathlib.Path(paths[0]).parent)


def _download(client: Any, place: Place, file: str) -> str:
    path: str = client.hf_hub_download(place.name, file, revision=place.version)
    return path


def upload(place: Place, folder: pathlib.Path, private: bool) -> None:
    """Uploads the two files in `folder`, both or neither."""
    client = _client(place)
    if place.hub == "kaggle":
        with _explained(place, "written"):
            client.model_upload(place.name, str(folder))
        return
    api = client.HfApi()
    with _explained(place, "written"):
        # None takes the account's default, which may be private.
        api.create_repo(place.name, private=private or None, exist_ok=True)
        exposed = private and not api.model_info(place.name).private
    if exposed:
        raise ValueError(
            f"'{place.uri}' was there already and is public. Nothing was "
            "uploaded: make it private on its page, or push without `private`."
        )
    with _explained(place, "written"):
        names = [FILE, CARD] if _card_is_ours(api, place) else [FILE]
        api.create_commit(
            place.name,
            [client.CommitOperationAdd(x, folder / x) for x in names],
            commit_message="Adapter, by keras_svdtune",
        )


def _card_is_ours(api: Any, place: Place) -> bool:
    if not api.file_exists(place.name, CARD):
        return True
    path = api.hf_hub_download(place.name, CARD)
    if MARK in pathlib.Path(path).read_text(encoding="utf-8"):
        return True
    warnings.warn(
        f"The {CARD} of '{place.uri}' is not the one that `push_adapter` "
        "writes, and is left as it is. See whether it describes the adapter.",
        stacklevel=4,
    )
    return False


def _client(place: Place) -> Any:
    package = _HUBS[place.hub].package
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"'{place.uri}' needs the package {package}. Install it, or both "
            f"hubs' with `pip install 'keras_svdtune[hub]'`. ({error})"
        ) from None


@contextlib.contextmanager
def _explained(place: Place, done: str) -> Iterator[None]:
    """Turns any error of a hub's client into one kind of ValueError."""
    try:
        yield
    except Exception as error:
        hub = _HUBS[place.hub]
        # The client's message for a refusal may blame the connection.
        refused = hasattr(error, "response")
        cause = error if refused else error.__cause__ or error
        response = getattr(cause, "response", None)
        status = getattr(response, "status_code", None)
        code = getattr(response, "headers", {}).get("X-Error-Code")
        if code == "EntryNotFound":
            reason = f"it has no file '{FILE}', which `push_adapter` writes."
        elif status in (401, 403, 404):
            reason = (
                f"{hub.missing}, or it is not open to you (HTTP {status}). "
                f"Check the name, or log in with {hub.login}."
            )
        else:
            reason = f"{type(cause).__name__}: {cause}"
            if not isinstance(cause, ValueError):
                reason += "\nCheck the connection, or try again later."
        raise ValueError(
            f"'{place.uri}' could not be {done}: {reason}"
        ) from error
