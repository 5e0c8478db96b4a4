"""Stand-ins for the hubs, as far as an adapter needs them.

Hugging Face's client is the real one, and speaks HTTP to a server on this
machine that keeps what it gets in memory. Of Kaggle's client two functions are
replaced, by ones that copy files.
"""

import base64
import contextlib
import hashlib
import http.server
import inspect
import json
import re
import shutil
import threading
import types

import huggingface_hub
import kagglehub

TOKEN = "hf_of_the_tests"


@contextlib.contextmanager
def hugging_face(monkeypatch, folder):
    """Turns the client to a `Hub`, which this gives."""
    server = Hub()
    threading.Thread(
        target=server.serve_forever, args=(0.01,), daemon=True
    ).start()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_HUB_DISABLE_XET": True,  # its own protocol, to servers of its own
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sleep = "huggingface_hub.utils._http.time.sleep"
    monkeypatch.setattr(sleep, lambda seconds: None)
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


def kaggle(monkeypatch, folder):
    """Replaces what the client does by copies from and to `folder`/kaggle,
    which this gives: a folder for each version, numbered from 1."""
    root = folder / "kaggle"
    parse = kagglehub.handle.parse_model_handle

    def model_upload(handle, local_model_dir):
        assert not parse(handle).is_versioned()
        number = len(list((root / handle).glob("*"))) + 1
        shutil.copytree(local_model_dir, root / handle / str(number))

    def model_download(handle, path):
        versions = root / str(parse(handle).with_version(0))
        number = parse(handle).version or len(list(versions.glob("*")))
        file = versions / str(number) / path
        if not file.exists():
            response = types.SimpleNamespace(status_code=404, headers={})
            raise kagglehub.exceptions.KaggleApiHTTPError("404", response)
        return str(file)

    for function in (model_upload, model_download):
        real = inspect.signature(getattr(kagglehub, function.__name__))

        def checked(*args, real=real, function=function):
            real.bind(*args)
            return function(*args)

        monkeypatch.setattr(kagglehub, function.__name__, checked)
    return root


class Hub(http.server.ThreadingHTTPServer):
    """Serves on a free port of this machine.

    Attributes:
        repos: name -> `{"private": bool, "history": [{file: bytes}, ...]}`.
        asked: every request so far, "METHOD /path".
        fail: pattern of a request -> (status, body) to answer instead.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.blobs, self.asked, self.fail = {}, {}, [], {}

    def files(self, name="user/pirate"):
        return self.repos[name]["history"][-1]

    def head(self, name="user/pirate"):
        return f"{len(self.repos[name]['history']) - 1:040x}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, data=b"", status=200, **headers):
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def any(self):
        hub, path = self.server, self.path
        hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for pattern, (status, data) in hub.fail.items():
            if re.search(pattern, hub.asked[-1]):
                return self.answer(data, status)
        if path.startswith("/blob/"):  # a signed URL: no token
            hub.blobs[path.removeprefix("/blob/")] = body
            return self.answer()
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer({"error": "Who are you?"}, 401)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            text = json.loads(body)["content"]
            good = re.match(r"---\n(\w+:( \S+)?\n(- \S+\n)*)+---\n", text)
            return self.answer({"errors": []}, 200 if good else 400)
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        name = name.removesuffix(".git")
        if name not in hub.repos:
            return self.answer(status=404, X_Error_Code="RepoNotFound")
        if path == f"/api/models/{name}":
            private = hub.repos[name]["private"]
            return self.answer({"id": name, "private": private})
        if path.endswith("/preupload/main"):
            return self.preupload(json.loads(body)["files"])
        if path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            for x in objects:
                href = f"{hub.url}/blob/{x['oid']}"
                x["actions"] = {"upload": {"href": href}}
            return self.answer({"objects": objects})
        if path.endswith("/commit/main"):
            return self.commit(name, body.splitlines()[1:])
        return self.resolve(name, *path.split("/resolve/")[1].split("/"))

    do_GET = do_HEAD = do_POST = do_PUT = any

    def create(self, wanted):
        name = f"{wanted['organization']}/{wanted['name']}"
        there = name in self.server.repos
        private = wanted.get("visibility") == "private"
        new = {"private": private, "history": [{}]}
        self.server.repos.setdefault(name, new)
        url = {"url": f"{self.server.url}/{name}"}
        return self.answer(url, 409 if there else 200)

    def preupload(self, files):
        """As the Hub does it, safetensors go to its large storage."""
        found = []
        for x in files:
            large = x["path"].endswith(".safetensors")
            mode = {"uploadMode": "lfs" if large else "regular"}
            found.append({"path": x["path"], "shouldIgnore": False} | mode)
        return self.answer({"files": found})

    def commit(self, name, lines):
        files = dict(self.server.files(name))
        for line in map(json.loads, lines):
            x = line["value"]
            files[x["path"]] = (
                self.server.blobs[x["oid"]]
                if line["key"] == "lfsFile"
                else base64.b64decode(x["content"])
            )
        self.server.repos[name]["history"].append(files)
        commit = self.server.head(name)
        url = f"{self.server.url}/{name}/commit/{commit}"
        return self.answer({"commitUrl": url, "commitOid": commit})

    def resolve(self, name, revision, file):
        history = self.server.repos[name]["history"]
        history = {f"{i:040x}": x for i, x in enumerate(history)}
        if revision == "main":
            revision = self.server.head(name)
        if revision not in history:
            return self.answer(status=404, X_Error_Code="RevisionNotFound")
        if file not in history[revision]:
            return self.answer(status=404, X_Error_Code="EntryNotFound")
        content = history[revision][file]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.answer(content, X_Repo_Commit=revision, ETag=etag)
