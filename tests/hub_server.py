"""A small Hugging Face Hub on the loopback interface, for clients that are told nothing but its address.

It speaks the part of the protocol that huggingface_hub uses: repositories, branches, previews of uploads, LFS,
commits, trees, model information, downloads with ETag and Range. It stores everything in memory, and fails on request.
With a folder for Xet it names that as the storage: hf_xet, unmodified, keeps chunks in a local folder as well as on a
server (`local://`, a feature that its documentation does not promise).
"""

import base64
import contextlib
import datetime
import hashlib
import json
import re
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


TOKEN = "hf_testtoken"
READ_TOKEN = "hf_readonly"
KINDS = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}


@dataclass
class Commit:
    sha: str
    files: dict[str, bytes]
    lfs: set[str]
    message: str
    date: str


@dataclass
class Repo:
    name: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def commit(self, revision: str) -> Commit | None:
        """Newest commit of a branch, or the one of this hash."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.sha == revision), None)


@dataclass
class Fault:
    """The next `times` requests that match fail: with a status, by "drop", "hang", "truncate" or "huge", or a body.

    "huge" promises a petabyte and sends what is there. A body in bytes comes with status 200, as from a proxy.
    """

    pattern: str
    what: int | str | bytes
    times: int = 1_000_000
    headers: dict[str, str] = field(default_factory=dict)


class XetFile(bytes):
    """A file that lies in Xet's storage; as bytes it is empty."""

    def __new__(cls, sha256, size, xet_hash):
        self = super().__new__(cls)
        self.sha256, self.size, self.xet_hash = sha256, size, xet_hash
        return self


def sha256_of(data):
    return data.sha256 if isinstance(data, XetFile) else hashlib.sha256(data).hexdigest()


def xet_hash_of(folder: Path, sha256: str) -> str | None:
    """Xet's name of the file with this hash, from the shards that hf_xet wrote.

    A shard is a header of 48 bytes and then, for each file, records of 48 bytes: its hash, flags and number of
    segments; the segments; as many verification records if flag 1 << 31 is set; the SHA-256 if flag 1 << 30 is set.
    Hashes are printed as four little-endian numbers of 64 bits.
    """

    def shown(raw):
        return "".join(raw[i : i + 8][::-1].hex() for i in range(0, 32, 8))

    for path in folder.rglob("*.mdb"):
        data, position = path.read_bytes(), 48
        while position + 48 <= len(data) and data[position : position + 32] != b"\xff" * 32:
            flags, count = struct.unpack_from("<II", data, position + 32)
            end = position + 48 * (1 + count * (2 if flags & 1 << 31 else 1))
            if flags & 1 << 30:
                if sha256 in (data[end : end + 32].hex(), shown(data[end : end + 32])):
                    return shown(data[position : position + 32])
                end += 48
            position = end
    return None


class Hub(ThreadingHTTPServer):
    """The server; `url`, `requests` (a list of "METHOD path") and `faults` are for tests."""

    daemon_threads = True

    def __init__(self, xet_folder: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.xet_folder = xet_folder
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.stop = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Say nothing of clients that went away."""

    def environment(self, home, token=TOKEN, **more):
        """Environment variables of an unmodified client; LFS unless there is a folder for Xet."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "0" if self.xet_folder else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **more,
        }

    def files(self, name, revision="main"):
        """Files of a repository by path."""
        return self.repos[f"models/{name}"].commit(revision).files

    def count(self, pattern):
        return sum(bool(re.search(pattern, request)) for request in self.requests)


def front_matter(text):
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    return yaml.safe_load(match.group(1)) if match else {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        """Keep quiet."""

    def do_GET(self):
        self.answer("GET")

    def do_HEAD(self):
        self.answer("HEAD")

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def do_DELETE(self):
        self.answer("DELETE")

    # The way in and out

    def answer(self, method):
        path = unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        self.method = method
        with self.server.lock:
            self.server.requests.append(f"{method} {path}")
            fault = next(
                (f for f in self.server.faults if f.times > 0 and re.search(f.pattern, f"{method} {path}")), None
            )
            if fault:
                fault.times -= 1
        self.truncates = fault is not None and fault.what == "truncate"
        self.boasts = fault is not None and fault.what == "huge"
        if fault and fault.what == "hang":
            self.server.stop.wait(3600)
        if fault and fault.what in ("drop", "hang"):
            self.connection.close()
            self.close_connection = True
            return
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self.chunked_body()
        if fault and isinstance(fault.what, (int, bytes)):
            answer = ({"error": "injected"}, fault.what) if isinstance(fault.what, int) else (fault.what, 200)
            self.reply(*answer, fault.headers)
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for route_method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method in route_method:
                    function(self, *match.groups())
                    return
            self.reply({"error": f"no route {method} {path}"}, 404)

    def chunked_body(self):
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def reply(self, data, status=200, headers=None):
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", **(headers or {})}
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.method == "HEAD":
            return
        if self.truncates:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(body)

    def token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def may_write(self):
        if self.token() == TOKEN:
            return True
        status = 403 if self.token() == READ_TOKEN else 401
        error = "This token may not write." if status == 403 else "Invalid username or password."
        self.reply({"error": error}, status)
        return False

    def repo(self, kind, name):
        """The repository, or None after a 404."""
        repo = self.server.repos.get(f"{kind}/{name}")
        if repo is None or (repo.private and self.token() not in (TOKEN, READ_TOKEN)):
            self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def commit(self, repo, revision):
        """The commit, or None after a 404."""
        commit = repo.commit(revision)
        if commit is None:
            self.reply({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return commit

    # Routes

    def whoami(self):
        if self.token() not in (TOKEN, READ_TOKEN):
            self.reply({"error": "Invalid username or password."}, 401)
            return
        role = "write" if self.token() == TOKEN else "read"
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        self.reply({"type": "user", "name": "tester", "orgs": [{"name": "org"}], "auth": auth})

    def create_repo(self):
        if not self.may_write():
            return
        data = json.loads(self.body)
        name = f"{data.get('organization') or 'tester'}/{data['name']}"
        key = f"{data.get('type') or 'model'}s/{name}"
        url = f"{self.server.url}/{name}"
        with self.server.lock:
            if key in self.server.repos:
                self.reply({"error": "You already created this repo", "url": url}, 409)
                return
            private = data.get("private") or data.get("visibility") == "private"
            repo = self.server.repos[key] = Repo(name, bool(private))
            self.add_commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"}, set(), "initial commit")
        self.reply({"url": url, "name": name, "id": name})

    def add_commit(self, repo, branch, files, lfs, message):
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        past = repo.branches.setdefault(branch, [])
        seed = f"{repo.name}{branch}{len(past)}{message}{time.time_ns()}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), files, lfs, message, date)
        past.append(commit)
        return commit

    def create_branch(self, kind, name, branch):
        if not self.may_write() or (repo := self.repo(kind, name)) is None:
            return
        if branch in repo.branches:
            self.reply({"error": "Reference already exists"}, 409)
            return
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repo.branches[branch] = [repo.commit(start)]
        self.reply({})

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        try:
            front_matter(content)
            self.reply({"errors": [], "warnings": []})
        except yaml.YAMLError as error:
            self.reply({"errors": [{"message": str(error)}], "warnings": []}, 400)

    def preupload(self, kind, name, revision):
        if not self.may_write() or (repo := self.repo(kind, name)) is None:
            return
        if (commit := self.commit(repo, revision)) is None:
            return
        answers = []
        for file in json.loads(self.body)["files"]:
            is_lfs = file["path"].endswith((".safetensors", ".bin", ".onnx", ".parquet")) or file["size"] > 10_000_000
            old = commit.files.get(file["path"])
            oid = None
            if old is not None:
                blob = f"blob {len(old)}\0".encode() + old
                oid = sha256_of(old) if is_lfs else hashlib.sha1(blob).hexdigest()
            mode = "lfs" if is_lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply({"files": answers})

    def xet_token(self, kind, name, use, revision):
        if (use == "write" and not self.may_write()) or self.repo(kind, name) is None:
            return
        storage, expires = f"local://{self.server.xet_folder}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": storage, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        self.reply({"casUrl": storage, "accessToken": "xet", "exp": expires}, 200, headers)

    def lfs_batch(self, name):
        if not self.may_write():
            return
        objects = []
        for item in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.server.url}/lfs/{item['oid']}"},
                "verify": {"href": f"{self.server.url}/lfs-verify"},
            }
            known = item["oid"] in self.server.blobs
            objects.append({**item, "authenticated": True, **({} if known else {"actions": actions})})
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.reply({"error": "wrong hash"}, 400)
            return
        self.server.blobs[oid] = self.body
        self.reply({})

    def lfs_verify(self):
        item = json.loads(self.body)
        blob = self.server.blobs.get(item["oid"])
        self.reply({}, 200 if blob is not None and len(blob) == item["size"] else 404)

    def make_commit(self, kind, name, revision):
        if not self.may_write() or (repo := self.repo(kind, name)) is None:
            return
        with self.server.lock:
            if (parent := self.commit(repo, revision)) is None:
                return
            lines = [json.loads(line) for line in self.body.decode().splitlines() if line]
            header = next(line["value"] for line in lines if line["key"] == "header")
            if header.get("parentCommit") not in (None, parent.sha):
                self.reply({"error": "The branch has moved"}, 412)
                return
            files, lfs = dict(parent.files), set(parent.lfs)
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    content = self.server.blobs.get(value["oid"])
                    if content is None and self.server.xet_folder:
                        xet_hash = xet_hash_of(self.server.xet_folder, value["oid"])
                        content = XetFile(value["oid"], value["size"], xet_hash) if xet_hash else None
                    if content is None:
                        self.reply({"error": "LFS object was never uploaded"}, 400)
                        return
                    files[value["path"]] = content
                    lfs.add(value["path"])
                elif line["key"] == "deletedFile":
                    files.pop(value["path"], None)
                elif line["key"] == "deletedFolder":
                    files = {path: data for path, data in files.items() if not path.startswith(value["path"])}
            commit = self.add_commit(repo, revision, files, lfs, header["summary"])
        url = f"{self.server.url}/{KINDS[kind]}{name}/commit/{commit.sha}"
        self.reply({"success": True, "commitUrl": url, "commitOid": commit.sha, "hookOutput": ""})

    def info(self, kind, name, revision=None):
        if (repo := self.repo(kind, name)) is None or (commit := self.commit(repo, revision or "main")) is None:
            return
        card = front_matter(commit.files.get("README.md", b"").decode())
        self.reply(
            {
                "_id": "1",
                "id": name,
                "modelId": name,
                "author": name.split("/")[0],
                "sha": commit.sha,
                "private": repo.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": (card or {}).get("tags") or [],
                "cardData": card,
                "lastModified": commit.date,
                "createdAt": commit.date,
                "siblings": [{"rfilename": path, "size": len(data)} for path, data in commit.files.items()],
            }
        )

    def entries(self, commit, paths):
        for path in paths:
            data = commit.files[path]
            size = data.size if isinstance(data, XetFile) else len(data)
            oid = hashlib.sha1(f"blob {size}\0".encode() + data).hexdigest()
            lfs = {"lfs": {"oid": sha256_of(data), "size": size, "pointerSize": 130}} if path in commit.lfs else {}
            xet = {"xetHash": data.xet_hash} if isinstance(data, XetFile) else {}
            yield {"type": "file", "path": path, "size": size, "oid": oid, **lfs, **xet}

    def tree(self, kind, name, revision, folder=None):
        if (repo := self.repo(kind, name)) is None or (commit := self.commit(repo, revision)) is None:
            return
        prefix = f"{folder.strip('/')}/" if folder else ""
        paths = [path for path in commit.files if path.startswith(prefix)]
        if not self.query.get("recursive", ["false"])[0].lower().startswith(("t", "1")):
            folders = {path[: path.index("/", len(prefix))] for path in paths if "/" in path[len(prefix) :]}
            paths = [path for path in paths if "/" not in path[len(prefix) :]]
            directories = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
            self.reply([*directories, *self.entries(commit, paths)])
            return
        self.reply(list(self.entries(commit, paths)))

    def paths_info(self, kind, name, revision):
        if (repo := self.repo(kind, name)) is None or (commit := self.commit(repo, revision)) is None:
            return
        if "json" in self.headers.get("Content-Type", ""):
            wanted = json.loads(self.body)["paths"]
        else:
            wanted = parse_qs(self.body.decode()).get("paths", [])
        self.reply(list(self.entries(commit, [path for path in wanted if path in commit.files])))

    def commits(self, kind, name, revision):
        if (repo := self.repo(kind, name)) is None or self.commit(repo, revision) is None:
            return
        past = repo.branches.get(revision, [])[::-1]
        self.reply([{"id": c.sha, "title": c.message, "message": "", "date": c.date, "authors": []} for c in past])

    def refs(self, kind, name):
        if (repo := self.repo(kind, name)) is None:
            return
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commits[-1].sha}
            for branch, commits in repo.branches.items()
        ]
        self.reply({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def resolve(self, prefix, name, revision, path):
        kind = f"{prefix.strip('/')}" if prefix else "models"
        if (repo := self.repo(kind, name)) is None or (commit := self.commit(repo, revision)) is None:
            return
        if path not in commit.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.sha}
            self.reply({"error": "Entry not found"}, 404, headers)
            return
        data = commit.files[path]
        headers = {
            "Content-Type": "application/octet-stream",
            "X-Repo-Commit": commit.sha,
            "Accept-Ranges": "bytes",
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Linked-Size": str(len(data)),
        }
        if isinstance(data, XetFile):
            route = f"{self.server.url}/api/{kind}/{name}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": data.xet_hash, "X-Xet-Refresh-Route": route}
            headers |= {"ETag": f'"{data.sha256}"', "X-Linked-Size": str(data.size)}
        if self.boasts:
            headers["X-Linked-Size"] = str(10**15)
            if self.method == "HEAD":
                headers["Content-Length"] = str(10**15)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if self.method == "HEAD" or not wanted:
            self.reply(data, 200, {"Content-Length": str(len(data)), **headers})
            return
        first, last = int(wanted.group(1)), int(wanted.group(2) or len(data) - 1)
        part = data[first : last + 1]
        self.reply(part, 206, {**headers, "Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"})

    def delete_repo(self):
        if self.may_write():
            data = json.loads(self.body)
            name = f"{data.get('organization') or 'tester'}/{data['name']}"
            self.server.repos.pop(f"{data.get('type') or 'model'}s/{name}", None)
            self.reply({})


NAME = r"([\w.-]+/[\w.-]+)"
API = rf"/api/(models|datasets|spaces)/{NAME}"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("DELETE", "/api/repos/delete", Handler.delete_repo),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"{API}/branch/(.+)", Handler.create_branch),
    ("POST", rf"{API}/preupload/([^/]+)", Handler.preupload),
    ("GET", rf"{API}/xet-(read|write)-token/([^/]+)", Handler.xet_token),
    ("POST", rf"/(?:datasets/|spaces/)?{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(\w+)", Handler.lfs_put),
    ("POST", "/lfs-verify", Handler.lfs_verify),
    ("POST", rf"{API}/commit/([^/]+)", Handler.make_commit),
    ("POST", rf"{API}/paths-info/([^/]+)", Handler.paths_info),
    ("GET", rf"{API}/commits/([^/]+)", Handler.commits),
    ("GET", rf"{API}/refs", Handler.refs),
    ("GET", rf"{API}/tree/([^/]+)(/.+)?", Handler.tree),
    ("GET", rf"{API}/revision/([^/]+)", Handler.info),
    ("GET", API, Handler.info),
    ("GET HEAD", rf"/(datasets/|spaces/)?{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
