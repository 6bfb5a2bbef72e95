"""The Hub, both ways: the real client in a process of its own, over HTTP, against a server on loopback."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from omni_convert.convert.execution.journal import JOURNAL

TOKEN = "hf_thisTokenMustNeverBeSeenAnywhere"
SIGNATURE = "X-Signature=thisSignatureNeither"
Files = dict[str, bytes]


@dataclass
class Fault:
    """A fault that the next requests of a kind meet.

    Attributes:
        pattern: of "METHOD /path"
        times: how often
        status: the answer, or 0 to close the connection; with `after` bytes of the real answer sent
    """

    pattern: str
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""
    after: int = 0


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    branches: dict[str, Files] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: list[str] = field(default_factory=list)

    def at(self, revision: str) -> Files | None:
        by_commit = {commit_of(files): files for files in self.branches.values()}
        return self.branches.get(revision) or by_commit.get(revision)


def commit_of(files: Files) -> str:
    return hashlib.sha1(repr(sorted((name, oid_of(name, data)) for name, data in files.items())).encode()).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", "tokenizer.json"))


def oid_of(name: str, data: bytes) -> str:
    """The identity of a file in Git: the SHA-256 of a large one, else the SHA-1 of a blob."""
    if is_large(name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def large_part(key: str, name: str, data: bytes) -> dict[str, Any]:
    """The entry that a listing adds for a large file."""
    described = {key: oid_of(name, data), "size": len(data), "pointerSize": 130}
    return {"lfs": described} if is_large(name) else {}


class HubServer(ThreadingHTTPServer):
    """The endpoints that the client calls to download, to create a repository and to commit."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.sent_to_storage: list[str] = []
        self.lock = threading.Lock()
        self.seconds: dict[str, float] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self) -> str:
        """Another host, which must not be given the token."""
        return f"http://localhost:{self.server_port}"

    def add(self, repo_id: str, folder: Path) -> Repository:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.large |= {oid_of(name, data): data for name, data in files.items() if is_large(name)}
        self.repositories[repo_id] = Repository(branches={"main": files})
        return self.repositories[repo_id]

    def fault_for(self, request: str) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client closing a connection is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command != "GET" else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        self.path_only = unquote(urlsplit(self.path).path)
        self.fault = self.server.fault_for(f"{self.command} {self.path_only} {self.headers.get('Range') or 'whole'}")
        if self.fault is not None and not self.fault.after:
            if not self.fault.status:
                self.close_connection = True
                self.connection.close()
                return
            self.reply(self.fault.status, {"error": self.fault.message}, self.fault.headers)
            return
        for pattern, method in self.ROUTES.items():
            match = re.fullmatch(pattern, f"{self.command} {self.path_only}")
            if match:
                method(self, *match.groups())
                return
        self.reply(404, {"error": "no such endpoint"})

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 - the names that the base class looks for

    def read_chunks(self) -> bytes:
        body = b""
        while length := int(self.rfile.readline(), 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.after:
            self.wfile.write(body[: self.fault.after])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)

    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, repo_id: str) -> Repository | None:
        found = self.server.repositories.get(repo_id)
        if found is None or (found.private and not self.is_known()):
            self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if found.gated:
            self.reply(403, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
            return None
        return found

    def files(self, repo_id: str, revision: str) -> Files | None:
        repository = self.repository(repo_id)
        if repository is None:
            return None
        files = repository.at(revision)
        if files is None:
            self.reply(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return files

    def whoami(self) -> None:
        if self.is_known():
            self.reply(200, {"type": "user", "name": "me", "orgs": [], "auth": {}})
        else:
            self.reply(401, {"error": f"Invalid credentials: {self.headers.get('Authorization')}"})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not repo_id.startswith("me/"):
            self.reply(403, {"error": "You don't have the rights to create a model under this namespace"})
            return
        url = f"{self.server.address}/{repo_id}"
        if repo_id in self.server.repositories:
            self.reply(409, {"error": "You already created this model repo", "url": url})
            return
        private = asked.get("visibility") == "private" or asked.get("private", False)
        self.server.repositories[repo_id] = Repository(private=private)
        self.reply(200, {"url": url, "name": repo_id, "id": "1"})

    def info(self, repo_id: str, revision: str = "main") -> None:
        files = self.files(repo_id, revision)
        if files is None:
            return
        siblings = [
            {
                "rfilename": name,
                "size": len(data),
                "blobId": hashlib.sha1(data).hexdigest(),
                **large_part("sha256", name, data),
            }
            for name, data in sorted(files.items())
        ]
        private = self.server.repositories[repo_id].private
        content = {"id": repo_id, "sha": commit_of(files), "private": private, "siblings": siblings, "tags": []}
        self.reply(200, content | {"downloads": 0, "likes": 0})

    def tree(self, repo_id: str, revision: str) -> None:
        files = self.files(repo_id, revision)
        if files is None:
            return
        self.reply(
            200,
            [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                    **large_part("oid", name, data),
                }
                for name, data in sorted(files.items())
            ],
        )

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        files = self.files(repo_id, revision)
        if files is None:
            return
        if name not in files:
            self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        oid = oid_of(name, files[name])
        headers = {"X-Repo-Commit": commit_of(files), "ETag": f'"{oid}"'}
        if not is_large(name):
            self.reply(200, files[name], headers)
            return
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(files[name]))}
        self.reply(302, b"", {**headers, **linked, "Location": f"{self.server.storage}/storage/{oid}?{SIGNATURE}"})

    def download(self, oid: str) -> None:
        if self.headers.get("Authorization"):
            self.server.sent_to_storage.append(self.headers["Authorization"])
        data = self.server.large[oid]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            time.sleep(self.server.seconds.get(oid, 0.0))
            self.reply(200, data)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        self.reply(206, data[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def preupload(self, repo_id: str, revision: str) -> None:
        files = self.files(repo_id, revision)
        if files is None:
            return
        described = []
        for file in json.loads(self.body)["files"]:
            name = file["path"]
            entry = {"path": name, "uploadMode": "lfs" if is_large(name) else "regular", "shouldIgnore": False}
            described.append(entry | ({"oid": oid_of(name, files[name])} if name in files else {}))
        self.reply(200, {"files": described})

    def batch(self, repo_id: str) -> None:
        objects = []
        for entry in json.loads(self.body)["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"], "authenticated": True}
            if entry["oid"] not in self.server.large:
                upload = {"href": f"{self.server.storage}/storage/{entry['oid']}?{SIGNATURE}"}
                verify = {"href": f"{self.server.address}/{repo_id}/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        if self.headers.get("Authorization"):
            self.server.sent_to_storage.append(self.headers["Authorization"])
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.large[oid] = self.body
        self.reply(200)

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id)
        if repository is None:
            return
        files = dict(repository.branches[revision])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        repository.branches[revision] = files
        oid = commit_of(files)
        repository.commits.append(oid)
        url = f"{self.server.address}/{repo_id}/commit/{oid}"
        self.reply(200, {"success": True, "commitUrl": url, "commitOid": oid, "hookOutput": ""})

    def branch(self, repo_id: str, name: str) -> None:
        repository = self.repository(repo_id)
        if repository is None:
            return
        if name in repository.branches:
            self.reply(409, {"error": "Reference already exists"})
            return
        repository.branches[name] = dict(repository.branches["main"])
        self.reply(200, {})

    def nothing(self, *_: str) -> None:
        self.reply(200, {})

    ROUTES: ClassVar[dict[str, Callable[..., None]]] = {
        r"GET /api/whoami-v2": whoami,
        r"POST /api/repos/create": create,
        r"GET /api/models/([^/]+/[^/]+)": info,
        r"GET /api/models/([^/]+/[^/]+)/revision/(.+)": info,
        r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)/?": tree,
        r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)": resolve,
        r"(?:GET|HEAD) /storage/(\w+)": download,
        r"PUT /storage/(\w+)": upload,
        r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)": preupload,
        r"POST /api/models/([^/]+/[^/]+)/commit/(.+)": commit,
        r"POST /api/models/([^/]+/[^/]+)/branch/(.+)": branch,
        r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": batch,
        r"POST /api/validate-yaml": nothing,
        r"POST /[^/]+/[^/]+/verify": nothing,
    }


@pytest.fixture
def hub() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(hub: HubServer, tmp_path: Path) -> Run:
    """Runs the command line against the server; whatever happens, nobody sees the token."""

    def run_command(*arguments: str | Path, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_TOKEN": token} if token else {}
        command = [sys.executable, "-m", "omni_convert.convert.cli", *(str(argument) for argument in arguments)]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
        secrets = (TOKEN, SIGNATURE.partition("=")[2])
        assert not any(secret in result.stdout + result.stderr for secret in secrets)
        written = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
        assert not [path for path in written if any(secret.encode() in path.read_bytes() for secret in secrets)]
        assert not hub.sent_to_storage
        return result

    return run_command


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1, result.stdout + result.stderr
    line, *others = result.stderr.splitlines()
    assert not others, result.stderr
    assert line.startswith("Error: ")
    return line


def contents(folder: Path) -> Files:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a repository: a card, and the transformer in shards of which some split a fused group."""
    import torch
    from diffusers import ZImageTransformer2DModel

    folder = tmp_path_factory.mktemp("hub") / "tiny"
    shutil.copytree(tiny_pipeline_folder, folder)
    model = ZImageTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    shutil.rmtree(folder / "transformer")
    model.save_pretrained(folder / "transformer", max_shard_size="500KB")
    assert len(list(folder.glob("transformer/*.safetensors"))) >= 6
    (folder / "README.md").write_text("---\nlicense: apache-2.0\npipeline_tag: text-to-image\n---\n# Tiny\n")
    return folder


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source as it is converted from the disk."""
    from omni_convert.convert import Recipe, convert_checkpoint

    output = tmp_path_factory.mktemp("converted") / "out"
    convert_checkpoint(source, output, Recipe(method="int8"))
    return output


def weights_of(files: Files) -> Files:
    return {name: data for name, data in files.items() if name.endswith((".safetensors", "config.json", ".index.json"))}


def largest_on_disk(folder: Path, stop: threading.Event, seen: list[int]) -> None:
    while not stop.is_set():
        size = 0
        for place, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(OSError):
                    size += Path(place, name).stat().st_size
        seen.append(size)
        time.sleep(0.001)


def test_a_model_on_the_hub_is_converted_shard_by_shard(
    hub: HubServer, run: Run, source: Path, converted: Path, tmp_path: Path
) -> None:
    repository = hub.add("someone/tiny", source)
    hub.seconds = dict.fromkeys(hub.large, 0.05)
    seen: list[int] = [0]
    stop = threading.Event()
    watcher = threading.Thread(
        target=largest_on_disk, args=(tmp_path / "out.partial" / ".downloads", stop, seen), daemon=True
    )
    watcher.start()
    result = run("-v", "someone/tiny", "-m", "int8", "-o", "out", "--workers", "1")
    stop.set()
    watcher.join()
    assert result.returncode == 0, result.stderr
    assert weights_of(contents(tmp_path / "out")) == weights_of(contents(converted))

    shards = [len(data) for name, data in contents(source).items() if name.endswith(".safetensors")]
    said = re.search(r"at most (\d+) of (\d+) bytes of weights", result.stderr)
    assert said is not None
    assert int(said[2]) == sum(shards)
    assert 0 < max(seen) < sum(shards) * 0.7
    assert int(said[1]) < sum(shards) * 0.7
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert not (tmp_path / "out" / ".downloads").exists()

    manifest = json.loads((tmp_path / "out" / "omni_convert.json").read_text())
    assert manifest["source"] == {"name": "someone/tiny", "revision": commit_of(repository.branches["main"])}
    downloads = [request for request in hub.requests if re.fullmatch(r"GET /storage/\w+ whole", request)]
    assert len(downloads) == len(set(downloads)) == sum(is_large(name) for name in contents(source))


def test_the_card_names_the_base_model_and_its_license(hub: HubServer, run: Run, source: Path, tmp_path: Path) -> None:
    hub.add("someone/tiny", source)
    assert run("someone/tiny", "-m", "int8", "-o", "out", "--push-to-hub", "me/tiny-int8", "--private").returncode == 0
    repository = hub.repositories["me/tiny-int8"]
    assert repository.private
    assert len(repository.commits) == 1
    uploaded = repository.branches["main"]
    uploaded.pop(".gitattributes")
    assert uploaded == contents(tmp_path / "out")
    data = ModelCard((tmp_path / "out" / "README.md").read_text()).data.to_dict()
    assert data["base_model"] == "someone/tiny"
    assert data["base_model_relation"] == "quantized"
    assert data["library_name"] == "diffusers"
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "text-to-image"
    assert {"quantized", "int8"} <= set(data["tags"])


def test_a_broken_download_goes_on_where_it_was_and_a_failed_run_resumes(
    hub: HubServer, run: Run, source: Path, converted: Path, tmp_path: Path
) -> None:
    hub.add("someone/tiny", source)
    shards = sorted(name for name in contents(source) if re.fullmatch(r"transformer/.*\.safetensors", name))
    first = oid_of(shards[0], (source / shards[0]).read_bytes())
    cut = Fault(f"GET /storage/{first} ", 2, after=100_000)
    broken = Fault(f"GET /storage/{first} whole", 1, after=100_000)
    gone = Fault(f"HEAD /someone/tiny/resolve/.*{re.escape(shards[-1])}", 9, status=403)
    hub.faults = [broken, cut, gone]
    assert "found 403 Forbidden, expected a login" in error_line(run("someone/tiny", "-m", "int8", "-o", "out"))
    assert not (tmp_path / "out").exists()
    hub.faults = []
    result = run("someone/tiny", "-m", "int8", "-o", "out", "--resume")
    assert result.returncode == 0, result.stderr
    assert cut.times == broken.times == 0
    assert weights_of(contents(tmp_path / "out")) == weights_of(contents(converted))


def failing(pattern: str, status: int, message: str = "", **headers: str) -> Fault:
    return Fault(pattern, 99, status, headers, message)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (failing("GET /api/models", 401, f"Invalid credentials {TOKEN}"), "found 401 Unauthorized"),
        (failing("GET /api/models", 403, **{"X-Error-Code": "GatedRepo"}), "gated; accept its terms"),
        (failing("GET /api/models", 404, **{"X-Error-Code": "RepoNotFound"}), "neither a local path nor a repository"),
        (failing("GET /api/models", 404, **{"X-Error-Code": "RevisionNotFound"}), "no such revision"),
        pytest.param(
            failing("GET /api/models", 503, f"sorry {TOKEN}"),
            r"found 503 Service Unavailable \(sorry \*\*\*\)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            failing("GET /api/models", 429, **{"Retry-After": "1"}),
            "found 429 Too Many Requests .*after 3 more tries",
            marks=pytest.mark.slow,
        ),
        (Fault("GET /api/models", 99), "no local path of that name, and the Hub does not answer"),
    ],
    ids=["401", "gated", "404", "revision", "503", "429", "dropped"],
)
def test_a_source_that_does_not_come_is_one_line(
    hub: HubServer, run: Run, source: Path, tmp_path: Path, fault: Fault, message: str
) -> None:
    hub.add("someone/tiny", source)
    hub.faults = [fault]
    assert re.search(message, error_line(run("someone/tiny", "-o", "out")))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_login_that_does_not_work_shows_before_the_conversion(
    hub: HubServer, run: Run, source: Path, tmp_path: Path
) -> None:
    refused = run(source, "-o", "out", "--push-to-hub", "me/tiny", token="hf_anotherToken")
    assert re.search("me/tiny: found 401 .*expected a valid token", error_line(refused))
    assert "hf_anotherToken" not in refused.stderr
    assert list(tmp_path.glob("out*")) == []
    assert not hub.repositories


def sent(hub: HubServer) -> int:
    return sum(request.startswith("PUT ") for request in hub.requests)


def test_a_push_is_one_commit_and_a_second_one_sends_nothing(hub: HubServer, run: Run, converted: Path) -> None:
    first = run("push", converted, "me/tiny", "--revision", "int8")
    assert first.returncode == 0, first.stderr
    assert re.fullmatch(r"http://.*/me/tiny/commit/\w{40}\n", first.stdout)
    repository = hub.repositories["me/tiny"]
    assert {**contents(converted), ".gitattributes": b""} == repository.branches["int8"]
    assert repository.branches["main"] == {".gitattributes": b""}
    assert len(repository.commits) == 1
    before = sent(hub)
    assert run("push", converted, "me/tiny", "--revision", "int8").returncode == 0
    assert sent(hub) == before
    assert len(repository.commits) == 1


def test_what_passes_is_tried_again(hub: HubServer, run: Run, converted: Path) -> None:
    hub.faults = [
        Fault("GET /api/whoami", 1),
        Fault("POST /api/repos/create", 1, 429, {"Retry-After": "1"}),
        Fault("POST .*/preupload/", 1, 500),
        Fault("PUT /storage/", 2),
        Fault("POST .*/commit/", 1, 503),
    ]
    result = run("push", converted, "me/tiny")
    assert result.returncode == 0, result.stderr
    assert not any(fault.times for fault in hub.faults)
    assert {**contents(converted), ".gitattributes": b""} == hub.repositories["me/tiny"].branches["main"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (failing("GET /api/whoami", 401, f"who is {TOKEN}?"), "found 401 Unauthorized.*hf auth login"),
        (
            failing("POST /api/repos/create", 403, "You don't have the rights"),
            "found 403 Forbidden .You don.t have the rights.*write access",
        ),
        (failing("PUT /storage/", 403), "found 403 Forbidden"),
        (failing("POST .*/commit/", 403), "found 403 Forbidden"),
        (failing("POST .*/commit/", 413), "found 413"),
    ],
    ids=["whoami", "create", "storage", "commit", "too large"],
)
def test_a_push_that_fails_leaves_nothing_to_be_seen(
    hub: HubServer, run: Run, converted: Path, fault: Fault, message: str
) -> None:
    hub.faults = [fault]
    assert re.search(message, error_line(run("push", converted, "me/tiny")))
    assert all(repository.branches == {"main": {".gitattributes": b""}} for repository in hub.repositories.values())
    hub.faults = []
    before = sent(hub)
    assert run("push", converted, "me/tiny").returncode == 0
    if "commit" in fault.pattern:
        assert sent(hub) == before
    assert hub.repositories["me/tiny"].branches["main"].keys() > contents(converted).keys()


def test_what_is_not_a_finished_output_is_not_sent(
    hub: HubServer, run: Run, source: Path, converted: Path, tmp_path: Path
) -> None:
    partial, changed, short, begun = (tmp_path / name for name in ("a.partial", "changed", "short", "begun"))
    for folder in (partial, changed, short, begun):
        shutil.copytree(converted, folder)
    weights = next(changed.glob("transformer/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    next(short.glob("transformer/*.safetensors")).unlink()
    (tmp_path / "begun.partial").mkdir()
    for folder, message in (
        (partial, "no finished output"),
        (source, "no finished output"),
        (begun, "under way"),
        (tmp_path / "absent", "no finished output"),
        (short, "the file is missing"),
        (changed, "found other bytes than the manifest says"),
    ):
        assert message in error_line(run("push", folder, "me/tiny"))
    assert not hub.requests


def test_a_repository_of_another_kind_is_left_alone(hub: HubServer, run: Run, source: Path, converted: Path) -> None:
    hub.add("me/original", source)
    assert "found another model" in error_line(run("push", converted, "me/original"))
    hub.repositories["me/public"] = Repository()
    assert "found a public repository" in error_line(run("push", converted, "me/public", "--private"))
    stale = {"omni_convert.json": b"{}", "transformer/old-00001-of-00001.safetensors": b"old", "notes.txt": b"mine"}
    hub.repositories["me/earlier"] = Repository(branches={"main": stale})
    assert run("push", converted, "me/earlier").returncode == 0
    files = hub.repositories["me/earlier"].branches["main"]
    assert files == {**contents(converted), "notes.txt": b"mine"}


def test_without_a_login_nothing_is_tried(hub: HubServer, run: Run, converted: Path) -> None:
    assert "found no login to the Hub" in error_line(run("push", converted, "me/tiny", token=None))
    assert not [request for request in hub.requests if request.startswith("POST")]


def test_several_components_are_streamed_and_their_hashes_verified(
    hub: HubServer, run: Run, source: Path, tmp_path: Path
) -> None:
    from omni_convert.convert import Recipe, convert_checkpoint

    hub.add("someone/tiny", source)
    options = ["-m", "int8", "--component", "text_encoder=int8", "--verify-source", "--workers", "3"]
    result = run("someone/tiny", *options, "-o", "out")
    assert result.returncode == 0, result.stderr
    recipe = Recipe(method="int8", component={"text_encoder": "int8"}, verify_source=True)
    convert_checkpoint(source, tmp_path / "local", recipe)
    assert weights_of(contents(tmp_path / "out")) == weights_of(contents(tmp_path / "local"))
    components = [
        json.loads((tmp_path / name / "omni_convert.json").read_text())["components"] for name in ("out", "local")
    ]
    assert components[0] == components[1]
    assert not (tmp_path / "out" / ".downloads").exists()
    downloads = [request for request in hub.requests if re.fullmatch(r"GET /storage/\w+ whole", request)]
    assert len(downloads) == len(set(downloads)), "each is hashed before it goes"


def test_a_source_may_be_kept_and_is_then_not_fetched_again(
    hub: HubServer, run: Run, source: Path, converted: Path, tmp_path: Path
) -> None:
    hub.add("someone/tiny", source)
    assert run("someone/tiny", "-m", "int8", "-o", "kept", "--keep-source").returncode == 0
    assert list((tmp_path / "home").rglob("*.safetensors"))
    before = [request for request in hub.requests if request.startswith("GET /storage") and "whole" in request]
    assert run("someone/tiny", "-m", "int8", "-o", "out").returncode == 0
    assert [request for request in hub.requests if request.startswith("GET /storage") and "whole" in request] == before
    assert list((tmp_path / "home").rglob("*.safetensors"))
    for name in ("kept", "out"):
        assert weights_of(contents(tmp_path / name)) == weights_of(contents(converted))


def test_a_killed_run_goes_on_and_fetches_few_shards_again(
    hub: HubServer, run: Run, source: Path, converted: Path, tmp_path: Path
) -> None:
    hub.add("someone/tiny", source)
    shards = sorted(name for name in contents(source) if re.fullmatch(r"transformer/.*\.safetensors", name))
    first, last = (
        f"GET /storage/{oid_of(name, (source / name).read_bytes())} whole" for name in (shards[0], shards[-1])
    )
    hub.seconds = {last.split("/")[-1].removesuffix(" whole"): 60.0}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "omni_convert.convert.cli", "someone/tiny", "-m", "int8", "-o", "out"]
    process = subprocess.Popen(
        command, env=environment | {"HF_HUB_DISABLE_XET": "1"}, cwd=tmp_path, stderr=subprocess.PIPE
    )
    partial = tmp_path / "out.partial"

    def is_first_shard_done() -> bool:
        has_begun = first in hub.requests and b"transformer/" in (partial / JOURNAL).read_bytes()
        return has_begun and not list((partial / ".downloads").rglob(Path(shards[0]).name))

    while last not in hub.requests or not is_first_shard_done():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    hub.seconds = {}
    result = run("someone/tiny", "-m", "int8", "-o", "out", "--resume")
    assert result.returncode == 0, result.stderr
    assert weights_of(contents(tmp_path / "out")) == weights_of(contents(converted))
    whole = [request for request in hub.requests if re.fullmatch(r"GET /storage/\w+ whole", request)]
    assert len(whole) - len(set(whole)) <= len(shards) // 2
    assert not (tmp_path / "out" / ".downloads").exists()


@pytest.mark.slow  # a busy machine may take longer than the download that must not be waited for
def test_an_interruption_does_not_wait_for_a_download(hub: HubServer, source: Path, tmp_path: Path) -> None:
    hub.add("someone/tiny", source)
    shards = [oid_of(name, data) for name, data in contents(source).items() if name.endswith(".safetensors")]
    hub.seconds = dict.fromkeys(shards, 60.0)
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "omni_convert.convert.cli", "someone/tiny", "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while not any(f"GET /storage/{shard} whole" in hub.requests for shard in shards):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert errors.decode().splitlines()[-1] == "Error: interrupted"
    assert (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def in_gguf(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source with its transformer in GGUF, in two types."""
    from omni_convert.convert import Recipe, convert_checkpoint

    folder = tmp_path_factory.mktemp("in-gguf")
    convert_checkpoint(source, folder / "tiny", Recipe("gguf"))
    convert_checkpoint(source, folder / "other", Recipe("gguf", gguf_type="Q4_0"))
    shutil.copy(folder / "other" / "transformer" / "tiny-Q4_0.gguf", folder / "tiny" / "transformer")
    return folder / "tiny"


def test_of_several_gguf_files_on_the_hub_the_one_that_is_named_comes(
    hub: HubServer, run: Run, in_gguf: Path, tmp_path: Path
) -> None:
    from omni_convert.convert import Recipe, convert_checkpoint

    hub.add("someone/tiny", in_gguf)
    line = error_line(run("someone/tiny", "-m", "int8", "-o", "out"))
    assert "found 2 .gguf files" in line
    assert "name the file that is meant, as someone/tiny/transformer/tiny-Q4_0.gguf" in line
    line = error_line(run("dequantize", "someone/tiny/transformer/tiny-Q5_0.gguf", "-o", "out"))
    assert "found no file 'transformer/tiny-Q5_0.gguf'" in line
    assert not list((tmp_path / "home").rglob("*.gguf"))
    result = run("dequantize", "someone/tiny/transformer/tiny-Q8_0.gguf", "-o", "out")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "home").rglob("*.gguf")] == ["tiny-Q8_0.gguf"]
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    convert_checkpoint(in_gguf / "transformer" / "tiny-Q8_0.gguf", tmp_path / "wanted", Recipe("dequantize"))
    assert weights_of(contents(tmp_path / "out")) == weights_of(contents(tmp_path / "wanted"))


@pytest.mark.slow
def test_gguf_beside_safetensors_stays_on_the_hub(
    hub: HubServer, run: Run, in_gguf: Path, source: Path, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "both")
    shutil.copy(in_gguf / "transformer" / "tiny-Q4_0.gguf", tmp_path / "both" / "transformer")
    hub.add("someone/both", tmp_path / "both")
    result = run("someone/both", "-m", "gguf", "-o", "out", "--keep-source")
    assert result.returncode == 0, result.stderr
    assert not list((tmp_path / "home").rglob("*.gguf"))
    (file,) = (tmp_path / "out" / "transformer").glob("*.gguf")
    assert file.read_bytes() == (in_gguf / "transformer" / "tiny-Q8_0.gguf").read_bytes()


@pytest.mark.slow
def test_gguf_is_made_of_shards_that_stay_on_the_hub(
    hub: HubServer, run: Run, in_gguf: Path, source: Path, tmp_path: Path
) -> None:
    hub.add("someone/tiny", source)
    result = run("-v", "someone/tiny", "-m", "gguf", "-o", "out", "--workers", "1")
    assert result.returncode == 0, result.stderr
    (file,) = (tmp_path / "out" / "transformer").glob("*.gguf")
    assert file.read_bytes() == (in_gguf / "transformer" / "tiny-Q8_0.gguf").read_bytes()
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    said = re.search(r"at most (\d+) of (\d+) bytes of weights", result.stderr)
    assert said is not None
    assert int(said[1]) < int(said[2]) * 0.7
    shards = [name for name in contents(source) if name.endswith(".safetensors") and name.startswith("transformer/")]
    downloads = [request for request in hub.requests if re.fullmatch(r"GET /storage/\w+ whole", request)]
    assert len(downloads) == len(set(downloads)) > len(shards)


@pytest.mark.slow
def test_a_pipeline_in_gguf_is_loaded_from_the_hub(hub: HubServer, in_gguf: Path, tmp_path: Path) -> None:
    shutil.copytree(in_gguf, tmp_path / "one", ignore=shutil.ignore_patterns("*-Q4_0.gguf"))
    hub.add("someone/one", tmp_path / "one")
    hub.add("someone/two", in_gguf)
    code = """
from omni_convert.formats.errors import CheckpointError
from omni_convert.loaders import kernel_report, load_pipeline
print({layer.format for layer in kernel_report(load_pipeline("someone/one")).layers if "Q" in layer.format})
print({layer.format for layer in kernel_report(load_pipeline("someone/one", local_files_only=True)).layers})
try:
    load_pipeline("someone/two")
except CheckpointError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
    )
    assert result.returncode == 0, result.stderr
    first, cached, refused = result.stdout.splitlines()
    assert first == "{'gguf Q8_0'}"
    assert "gguf Q8_0" in cached
    assert "someone/two: found 2 .gguf files" in refused
    assert [path.name for path in (tmp_path / "home").rglob("*.gguf")] == ["tiny-Q8_0.gguf"]


@pytest.mark.slow
def test_a_request_names_a_gguf_file_on_the_hub_by_its_path_or_its_type(
    hub: HubServer, in_gguf: Path, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    hub.add("someone/gguf", in_gguf)
    hub.add("someone/plain", tiny_pipeline_folder)
    code = """
from omni_convert.formats.errors import CheckpointError
from omni_convert.loaders import kernel_report, load_pipeline
for name in ("transformer/tiny-Q4_0.gguf", ":Q8_0", "transformer/tiny-Q5_0.gguf", ":Q5_0"):
    spec = {"method": "gguf", "gguf_model": f"someone/gguf{'' if name[0] == ':' else '/'}{name}"}
    try:
        layers = kernel_report(load_pipeline("someone/plain", quantization=spec))
        print({layer.format for layer in layers if "Q" in layer.format})
    except CheckpointError as error:
        print(error)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
    )
    assert result.returncode == 0, result.stderr
    by_path, by_type, no_path, no_type = result.stdout.splitlines()
    assert (by_path, by_type) == ("{'gguf Q4_0'}", "{'gguf Q8_0'}")
    assert "found a repository without such a file" in no_path
    assert "someone/gguf: found 0 .gguf files of type 'Q5_0', expected one" in no_type


@pytest.mark.slow
def test_the_loader_checks_what_it_fetches_and_fetches_nothing_twice(
    hub: HubServer, tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    code = """
from omni_convert.formats.errors import CheckpointError
from omni_convert.loaders import load_pipeline
load_pipeline("someone/plain")
try:
    load_pipeline("someone/bad")
except CheckpointError as error:
    print(error)
"""
    (weights,) = (tiny_pipeline_folder / "transformer").glob("*.safetensors")
    bad = Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "bad")) / "transformer" / weights.name
    tensors = load_file(weights)
    name = "layers.0.attention.to_q.weight"
    save_file(tensors | {name: tensors[name].char()}, bad, metadata={"format": "pt"})
    variant = "transformer/diffusion_pytorch_model.fp8.safetensors"
    hub.add("someone/plain", tiny_pipeline_folder).branches["main"][variant] = b"no safetensors"
    hub.add("someone/bad", tmp_path / "bad")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
    )
    assert "found no quantization_config, but 'layers.0.attention.to_q' holds I8 codes" in result.stdout, result.stderr
    for file in (weights, bad):
        assert hub.requests.count(f"GET /storage/{oid_of(file.name, file.read_bytes())} whole") == 1
    assert not any(request.startswith("GET") and variant in request for request in hub.requests)
