"""A Hub on 127.0.0.1: as much of the server's side as the real huggingface_hub client needs, in one thread each."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Repo:
    """A repository: its commits by id, and where its branches are."""

    def __init__(self, files=None, *, gated=False, token=None):
        self.gated, self.token = gated, token
        self.commits, self.refs, self.messages = {}, {}, []
        self.commit(files or {}, "main")

    def commit(self, files, branch, message="first"):
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[branch] = sha
        self.messages.append(message)
        return sha

    def find(self, revision):
        sha = self.refs.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else (None, None)


class LoopbackHub:
    """`with LoopbackHub() as hub:` serves `hub.repos` at `hub.url`; `hub.requests` lists what was asked for."""

    def __init__(self):
        self.repos, self.requests, self.private = {}, [], []
        self.lfs_from = 2**62  # files of so many bytes go through large file storage
        self.large = {}  # oid -> bytes uploaded there
        self.before = lambda method, path: None  # called before each request, to change things under way
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def patch(self, monkeypatch, cache):
        """Points the client of this process to the server, and its cache to `cache`."""
        from huggingface_hub import constants, file_download

        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache) + "/token")

    def env(self, cache):
        """Environment variables that do the same for another process."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(("PUT", self.path))
        self.hub.large[hashlib.sha256(body).hexdigest()] = body
        self.send(200, b"", {"ETag": '"1"'})

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.hub.before(self.command, path)
        if self.command == "POST" and path == "/api/repos/create":
            return self.create(json.loads(body))
        if self.command == "POST" and path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if self.command == "POST" and path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)(?:/(.+))?)?", path)
        if match:
            action, rest = match[2] or "revision", match[3] or "main"
        else:
            match, action = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path), "resolve"
            rest = match[2] if match else ""
        repo = self.hub.repos.get(match[1]) if match else None
        if repo is None:
            return self.error(404, "RepoNotFound")
        sent = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repo.token is not None and sent != repo.token:
            return self.error(403, "GatedRepo") if repo.gated else self.error(401, "RepoNotFound")
        if action == "branch":
            repo.refs.setdefault(rest, repo.refs["main"])
            return self.json({})
        revision = rest.split("/")[0] if action == "tree" else rest
        sha, files = repo.find(revision)
        if sha is None:
            return self.error(404, "RevisionNotFound")
        if action == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self.json({"id": match[1], "modelId": match[1], "sha": sha, "siblings": siblings, "tags": []})
        if action == "tree":
            entries = [_entry(name, content) for name, content in files.items()]
            return self.json(entries)
        if action == "preupload":
            asked = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            modes = [
                {"path": f["path"], "uploadMode": mode[f["size"] >= self.hub.lfs_from], "shouldIgnore": False}
                for f in asked
            ]
            return self.json({"files": modes})
        if action == "commit":
            return self.commit(match[1], repo, rest, dict(files), body)
        if action == "resolve":
            return self.file(sha, files.get(match[3]))
        return self.error(404, None)

    def create(self, wanted):
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name in self.hub.repos:
            return self.json({"url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repos[name] = Repo()
        self.hub.private.append(wanted.get("private") or wanted.get("visibility") == "private")
        return self.json({"url": f"{self.hub.url}/{name}"})

    def batch(self, wanted):
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.hub.url}/large/{o['oid']}"}}}
            for o in wanted["objects"]
        ]
        body = json.dumps({"transfer": "basic", "objects": objects}).encode()
        self.send(200, body, {"Content-Type": "application/vnd.git-lfs+json"})

    def commit(self, name, repo, branch, files, body):
        proposed = "create_pr=1" in urlsplit(self.path).query
        branch = "refs/pr/1" if proposed else branch
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files, branch, lines[0]["value"]["summary"])
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True}
        self.json(answer | ({"pullRequestUrl": f"{self.hub.url}/{name}/discussions/1"} if proposed else {}))

    def file(self, sha, content):
        if content is None:
            return self.error(404, "EntryNotFound", {"X-Repo-Commit": sha})
        etag = hashlib.sha256(content).hexdigest()
        self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"})

    def json(self, value, status=200):
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, status, code, headers=None):
        self.send(status, b"{}", (headers or {}) | ({"X-Error-Code": code, "X-Error-Message": code} if code else {}))

    def send(self, status, content, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(name, content):
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": oid}
