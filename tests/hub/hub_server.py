# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""A server on this machine that speaks the Hub's protocol, for the real client: HF_ENDPOINT is its address.

Repositories, commits and large files are kept in memory. It checks what the Hub checks, as far as the tests need it:
tokens, metadata of cards, sizes and hashes of large files, parents of commits. `Hub(xet=True)` also takes uploads in
chunks (Xet), as the client makes them by default; files that come that way are sent back whole, over HTTP. Without it
the client has to have HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from xet_store import XetStore

TOKEN = "hf_" + "a1" * 17  # in two parts, so that no scanner takes this file for a leak
USER = "someone"
XET_TOKEN = "xet_of_the_storage"
LICENCES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc0-1.0", "gpl-3.0", "unknown", "other"}
PIPELINE_TAGS = {
    *("text-generation", "fill-mask", "text-classification", "token-classification", "question-answering"),
    "feature-extraction",
}
LARGE = 10_000_000  # bytes; above, a file is stored as a large one
PART = 300_000  # bytes of a part, above which a large file comes in parts


@dataclass
class Repository:
    """Commits, oldest first: (id, files by path); the content of a file is in `Hub.blobs`."""

    private: bool = False
    commits: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def at(self, revision: str) -> tuple[str, dict[str, str]] | None:
        """A commit by branch or id."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class Hub:
    """The server, in a thread: a context manager.

    Attributes:
        requests: (method, path) of all that came.
        stored: ids of large files in the order in which they were received whole.
        before_large: called with the number of large files that were received, before the next is read. What it
            returns, if not None, is the status that is answered; "drop" closes the connection.
        xet: its storage of chunks, or None.
        xorbs_sent: for each upload of a xorb its name and size in bytes.
    """

    def __init__(self, xet: bool = False):
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # by git's hash, or SHA-256 of large files
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.stored: list[str] = []
        self.before_large = lambda count: None
        self.xet = XetStore() if xet else None
        self.xorbs_sent: list[tuple[str, int]] = []
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # The client follows redirects to the same host at once, and the Hub's storage has another.
        self.cdn = f"http://localhost:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache) -> dict[str, str]:
        """Variables for a process whose Hub this is."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
        }

    def add_commit(self, repository: Repository, files: dict[str, str], message: str) -> str:
        """Add a commit with these files, by path; returns its id."""
        with self.lock:
            parent = repository.commits[-1][0] if repository.commits else ""
            number = len(repository.commits)
            commit = hashlib.sha1(json.dumps([parent, number, message, sorted(files.items())]).encode()).hexdigest()
            repository.commits.append((commit, files))
            repository.messages.append(message)
        return commit

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository."""
        return {path: self.blobs[oid] for path, oid in self.repositories[name].at(revision)[1].items()}


def git_hash(content: bytes) -> str:
    """What git calls a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int) -> bool:
    """Whether the Hub stores a file as a large one, as its .gitattributes say."""
    return path.endswith((".safetensors", ".bin", ".pt")) or size > LARGE


def find_errors(text: str) -> list[str]:
    """What is wrong with the metadata of a model's card."""
    block = re.match(r"---\n(.*?)\n---(\n|$)", text, re.S)
    if not block:
        return ["no block of metadata between two lines of three dashes"]
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping"]
    errors = []
    if data.get("license") not in LICENCES:
        errors.append(f'"license" must be one of {sorted(LICENCES)}; got {data.get("license")!r}')
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required with license "other"')
    if data.get("pipeline_tag") not in PIPELINE_TAGS:
        errors.append(f'"pipeline_tag" is unknown: {data.get("pipeline_tag")!r}')
    languages = data.get("language") or []
    for language in [languages] if isinstance(languages, str) else languages:
        if not re.fullmatch("[a-z]{2,3}|code|multilingual", str(language)):
            errors.append(f'"language" must be an ISO 639 code; got {language!r}')
    for name in ("datasets", "base_model"):
        ids = data.get(name) or []
        for one in [ids] if isinstance(ids, str) else ids:
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(one)):
                errors.append(f'"{name}" must name repositories; got {one!r}')
    for entry in data.get("model-index") or []:
        for result in entry.get("results") or [{}]:
            if not (result.get("task", {}).get("type") and result.get("dataset", {}).get("type")):
                errors.append('"model-index" needs the type of task and dataset')
            if not all("type" in metric and "value" in metric for metric in result.get("metrics") or [{}]):
                errors.append('"model-index" needs the type and value of metrics')
    return errors


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Print nothing."""

    # requests

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def do_PUT(self):
        self._answer()

    def _answer(self):
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
        routes = (
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/storage/([0-9a-f]{64})/(\d+)", self._store),
            ("POST", r"/storage/([0-9a-f]{64})/complete", self._complete),
            ("POST", r"/storage/verify", self._verify),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
            ("POST", r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", self._paths_info),
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            ("GET|HEAD", r"/cdn/([0-9a-f]{64})", self._cdn),
            *self._xet_routes(),
        )
        for methods, pattern, function in routes:
            if self.command in methods.split("|") and (match := re.fullmatch(pattern, path)):
                return function(*match.groups())
        self._body()  # or the next request of this connection would begin with it
        return self._json({"error": f"no such page: {self.command} {path}"}, 404)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            content = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # answers

    def _send(self, content: bytes, status: int = 200, **headers):
        self.send_response(status)
        headers = {"Content_Length": str(len(content)), **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content, status: int = 200, **headers):
        if "error" in content:
            headers.setdefault("X_Error_Message", content["error"])
        self._send(json.dumps(content).encode(), status, Content_Type="application/json", **headers)

    def _refuse(self, status: int, code: str, words: str, **headers):
        self._json({"error": words}, status, X_Error_Code=code, X_Error_Message=words, **headers)

    def _logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._logged_in()):
            self._refuse(
                401 if found is None and not self._logged_in() else 404, "RepoNotFound", "Repository not found"
            )
            return None
        return found

    def _writable(self, name: str) -> Repository | None:
        if not self._logged_in():
            self._refuse(401, "", "Invalid username or password.")
            return None
        return self._repository(name)

    # the Hub's pages

    def _whoami(self):
        if not self._logged_in():
            return self._json({"error": "Invalid credentials"}, 401)
        return self._json({"type": "user", "name": USER, "auth": {"accessToken": {"role": "write"}}, "orgs": []})

    def _create(self):
        wanted = json.loads(self._body())
        owner = wanted.get("organization") or USER
        name = f"{owner}/{wanted['name']}"
        if not self._logged_in():
            return self._json({"error": "Invalid username or password."}, 401)
        if owner != USER:
            return self._json({"error": f"You don't have the rights to create a model under {owner}"}, 403)
        if name in self.hub.repositories:
            return self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        repository = Repository(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.hub.blobs[git_hash(attributes)] = attributes
        self.hub.repositories[name] = repository
        self.hub.add_commit(repository, {".gitattributes": git_hash(attributes)}, "initial commit")
        return self._json({"url": f"{self.hub.url}/{name}", "id": name, "name": name})

    def _validate(self):
        sent = json.loads(self._body())
        errors = [{"message": one} for one in find_errors(sent["content"])]
        return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, name: str, revision: str):
        wanted = json.loads(self._body())
        if (repository := self._writable(name)) is None:
            return None
        files = repository.at(revision)[1]
        return self._json(
            {
                "files": [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if is_large(one["path"], one["size"]) else "regular",
                        "shouldIgnore": False,
                        "oid": files.get(one["path"]),
                    }
                    for one in wanted["files"]
                ]
            }
        )

    def _batch(self, name: str):
        wanted = json.loads(self._body())
        if self._writable(name) is None:
            return None
        objects = []
        for one in wanted["objects"]:
            oid, size = one["oid"], one["size"]
            if oid not in self.hub.blobs:
                place = f"{self.hub.url}/storage/{oid}"
                upload = {"href": f"{place}/1"}
                if size > PART:
                    numbers = range(1, -(-size // PART) + 1)
                    header = {"chunk_size": str(PART), **{str(i): f"{place}/{i}" for i in numbers}}
                    upload = {"href": f"{place}/complete", "header": header}
                one["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/storage/verify"}}
            objects.append(one)
        return self._json({"transfer": "multipart", "objects": objects})

    def _store(self, oid: str, part: str):
        if part == "1" and (status := self.hub.before_large(len(self.hub.stored))) is not None:
            self.close_connection = True
            return self._json({"error": "no"}, status) if status != "drop" else self.connection.close()
        content = self._body()
        with self.hub.lock:
            self.hub.parts[oid, int(part)] = content
            if part == "1" and hashlib.sha256(content).hexdigest() == oid:
                self._keep(oid, content)
        return self._send(b"", ETag=f'"{hashlib.md5(content).hexdigest()}"')

    def _complete(self, oid: str):
        sent = json.loads(self._body())
        numbers = [one["partNumber"] for one in sent["parts"]]
        content = b"".join(self.hub.parts.pop((oid, number), b"") for number in sorted(numbers))
        if hashlib.sha256(content).hexdigest() != oid:
            return self._json({"error": "the parts are not the announced file"}, 400)
        self._keep(oid, content)
        return self._json({})

    def _keep(self, oid: str, content: bytes):
        with self.hub.lock:
            self.hub.blobs[oid] = content
            self.hub.stored.append(oid)

    def _verify(self):
        sent = json.loads(self._body())
        whole = len(self.hub.blobs.get(sent["oid"], b"")) == sent["size"]
        return self._json({} if whole else {"error": "size differs"}, 200 if whole else 400)

    # storage of chunks; the client goes on to these pages when /v2/shards and /v1/xorb-grants do not exist

    def _xet_routes(self):
        if self.hub.xet is None:
            return ()
        return (
            ("GET", r"/api/models/([^/]+/[^/]+)/xet-write-token/(.+)", self._xet_token),
            ("POST", r"/v1/xorbs/default/([0-9a-f]{64})", self._store_xorb),
            ("POST", r"/v1/shards", self._store_shard),
        )

    def _xet_token(self, name: str, revision: str):
        if self._writable(name) is None:
            return None
        expires = int(time.time()) + 3600
        return self._json({"accessToken": XET_TOKEN, "exp": expires, "casUrl": self.hub.url})

    def _is_xet_writer(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {XET_TOKEN}"

    def _store_xorb(self, xorb: str):
        if (status := self.hub.before_large(len(self.hub.stored))) is not None:
            self.close_connection = True
            return self._json({"error": "no"}, status) if status != "drop" else self.connection.close()
        content = self._body()
        if not self._is_xet_writer():
            return self._json({"error": "no token of the storage"}, 401)
        with self.hub.lock:
            is_new = self.hub.xet.add_xorb(xorb, content)
            self.hub.xorbs_sent.append((xorb, len(content)))
        return self._json({"was_inserted": is_new})

    def _store_shard(self):
        content = self._body()
        if not self._is_xet_writer():
            return self._json({"error": "no token of the storage"}, 401)
        try:
            files = self.hub.xet.files_of_shard(content)
        except ValueError as error:
            return self._json({"error": str(error)}, 400)
        for oid, file in files.items():
            if oid not in self.hub.blobs:
                self._keep(oid, file)
        return self._json({"result": 1})

    def _commit(self, name: str, revision: str):
        lines = [json.loads(line) for line in self._body().splitlines() if line.strip()]
        if (repository := self._writable(name)) is None:
            return None
        head, files = repository.at(revision)
        files = dict(files)
        message = ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, head):
                    return self._json({"error": "A commit has happened since. Please refresh and try again."}, 412)
            elif key == "file":
                content = base64.b64decode(value["content"])
                if value["path"] == "README.md" and (errors := find_errors(content.decode())):
                    return self._json({"error": f"Invalid metadata: {errors}"}, 400)
                if is_large(value["path"], len(content)):
                    return self._json({"error": f"{value['path']} must be stored as a large file"}, 400)
                oid = files[value["path"]] = git_hash(content)
                self.hub.blobs[oid] = content
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self._json({"error": f"the large file {value['path']} was not uploaded"}, 400)
                files[value["path"]] = value["oid"]
            elif key == "deletedFile":
                del files[value["path"]]
        commit = self.hub.add_commit(repository, files, message)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        return self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _at(self, name: str, revision: str):
        if (repository := self._repository(name)) is None:
            return None
        if (commit := repository.at(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _info(self, name: str, revision: str | None = None):
        if (commit := self._at(name, revision or "main")) is None:
            return None
        siblings = [{"rfilename": path} for path in sorted(commit[1])]
        repository = self.hub.repositories[name]
        about = {"id": name, "modelId": name, "sha": commit[0], "private": repository.private, "siblings": siblings}
        return self._json({"_id": "0" * 24, **about, "tags": [], "downloads": 0, "likes": 0, "gated": False})

    def _entry(self, path: str, oid: str) -> dict:
        size = len(self.hub.blobs[oid])
        entry = {"type": "file", "path": path, "size": size, "oid": oid}
        if len(oid) == 64:
            entry |= {"oid": git_hash(oid.encode()), "lfs": {"oid": oid, "size": size, "pointerSize": 134}}
        return entry

    def _tree(self, name: str, revision: str, below: str | None = None):
        if (commit := self._at(name, revision)) is None:
            return None
        start = f"{below}/" if below else ""
        found = {path: oid for path, oid in commit[1].items() if path.startswith(start)}
        if below and not found:
            return self._refuse(404, "EntryNotFound", f"{below} does not exist on {revision}")
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            found = {path: oid for path, oid in found.items() if "/" not in path[len(start) :]}
        return self._json([self._entry(path, oid) for path, oid in sorted(found.items())])

    def _paths_info(self, name: str, revision: str):
        body = self._body()
        if (commit := self._at(name, revision)) is None:
            return None
        json_body = self.headers.get("Content-Type", "").startswith("application/json")
        paths = json.loads(body)["paths"] if json_body else parse_qs(body.decode()).get("paths", [])
        return self._json([self._entry(path, commit[1][path]) for path in paths if path in commit[1]])

    def _resolve(self, name: str, revision: str, path: str):
        if (commit := self._at(name, revision)) is None:
            return None
        if (oid := commit[1].get(path)) is None:
            return self._refuse(404, "EntryNotFound", f"{path} does not exist on {revision}", X_Repo_Commit=commit[0])
        content, headers = self.hub.blobs[oid], {"X_Repo_Commit": commit[0], "Accept_Ranges": "bytes"}
        if len(oid) == 64:  # a large file is elsewhere
            headers |= {"X_Linked_Size": str(len(content)), "X_Linked_ETag": f'"{oid}"'}
            return self._send(b"", 302, Location=f"{self.hub.cdn}/cdn/{oid}", **headers)
        return self._send_range(content, ETag=f'"{oid}"', **headers)

    def _cdn(self, oid: str):
        return self._send_range(self.hub.blobs[oid], ETag=f'"{oid}"', Accept_Ranges="bytes")

    def _send_range(self, content: bytes, **headers):
        if not (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return self._send(content, **headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
        return self._send(content[start : end + 1], 206, **headers)
