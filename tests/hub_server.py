"""A Hub on this machine: as much of its HTTP API as the real `huggingface_hub` client needs, and failures at will."""

import base64
import hashlib
import json
import re
import socket
from dataclasses import dataclass, field

import yaml
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response
from werkzeug.exceptions import HTTPException
from werkzeug.routing import Map, PathConverter, Rule

TOKEN = "hf_secretOfTheTests"
USER = "ada"
LFS = (".safetensors", ".png", ".bin", ".pt", ".pth")


class Repo(PathConverter):
    regex = r"[^/]+/[^/]+?"
    part_isolating = False


ROUTES = [
    ("/api/repos/create", "create", ["POST"]),
    ("/api/validate-yaml", "validate", ["POST"]),
    ("/api/models/<repo:repo>/preupload/<revision>", "preupload", ["POST"]),
    ("/api/models/<repo:repo>/commit/<revision>", "commit", ["POST"]),
    ("/api/models/<repo:repo>/branch/<revision>", "branch", ["POST"]),
    ("/api/models/<repo:repo>/tree/<revision>", "tree", ["GET"]),
    ("/api/models/<repo:repo>/revision/<revision>", "info", ["GET"]),
    ("/api/models/<repo:repo>", "info", ["GET"]),
    ("/<repo:repo>.git/info/lfs/objects/batch", "batch", ["POST"]),
    ("/lfs/<oid>", "upload", ["PUT"]),
    ("/<repo:repo>/resolve/<revision>/<path:path>", "resolve", ["GET", "HEAD"]),
]


@dataclass
class Failure:
    """What goes wrong at a route: a status with headers, or, without status, a cut connection; `times` times."""

    route: str
    status: int | None
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1000


class Hub:
    """The server; `url` is its HF_ENDPOINT.

    Attributes:
        repos: by name, whether each is private, and its branches: their commits with message and files.
        blobs: what was uploaded by LFS, by its SHA-256.
        requests: (route, method) of everything that was asked.
        failure: what fails, until it is set to None.
    """

    def __init__(self):
        self.server = HTTPServer(host="127.0.0.1", port=0, threaded=True)
        self.server.expect_request(re.compile(".*")).respond_with_handler(self.answer)
        rules = [Rule(path, endpoint=route, methods=methods) for path, route, methods in ROUTES]
        self.routes = Map(rules, converters={"repo": Repo})
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.repos: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.failure: Failure | None = None

    @property
    def url(self) -> str:
        return self.server.url_for("").rstrip("/")

    def history(self, repo: str, revision: str) -> list[dict]:
        """The commits of a branch, or the one of a commit's hash."""
        branches = self.repos[repo]["branches"]
        return (
            branches[revision]
            if revision in branches
            else [c for b in branches.values() for c in b if c["oid"] == revision]
        )

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What lies in a repository, by path."""
        commits = self.history(repo, revision)
        return dict(commits[-1]["files"]) if commits else {}

    def commits(self, repo: str, revision: str = "main") -> list[str]:
        """Messages of the commits of a branch."""
        return [commit["message"] for commit in self.repos[repo]["branches"][revision]]

    # ---- answers ------------------------------------------------------------------------------------------------

    def answer(self, request: Request) -> Response:
        try:
            route, parts = self.routes.bind_to_environ(request.environ).match()
        except HTTPException as error:
            return error.get_response()
        self.requests.append((route, request.method))
        failure = self.failure
        if failure is not None and failure.route == route and failure.times:
            failure.times -= 1
            if failure.status is None:
                return self.cut(request)
            return Response(json.dumps({"error": "told to fail"}), failure.status, failure.headers)
        writes = request.method not in ("GET", "HEAD") and route not in ("validate", "upload")
        allowed = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        repo = self.repos.get(parts.get("repo", ""))
        if writes and not allowed:
            return refuse(401, None, "Invalid credentials in Authorization header")
        if "repo" in parts and (repo is None or (repo["private"] and not allowed)):
            return refuse(401, "RepoNotFound", "Repository not found")
        if {"repo", "revision"} <= set(parts) and route != "branch":
            known = parts["revision"] in repo["branches"] or self.history(parts["repo"], parts["revision"])
            if not known:
                return refuse(404, "RevisionNotFound", "Revision not found")
        return getattr(self, route)(request, **parts)

    def cut(self, request: Request) -> Response:
        """Read a part of the body, and hang up."""
        request.stream.read(16)
        request.environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return Response(status=500)

    def create(self, request: Request) -> Response:
        asked = request.get_json()
        name = f"{asked['organization'] or USER}/{asked['name']}"
        url = {"url": f"{self.url}/{name}"}
        if name in self.repos:
            return Response(json.dumps(url), 409)
        self.repos[name] = {"private": asked.get("visibility") == "private", "branches": {"main": []}}
        return answer(url)

    def validate(self, request: Request) -> Response:
        """What the Hub checks of a card's YAML, as far as it concerns us."""
        _, _, rest = request.get_json()["content"].partition("---\n")
        data = yaml.safe_load(rest.partition("\n---")[0])
        wrong = []
        base = data.get("base_model", "user/name")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            wrong.append(f'"base_model" {base!r} is not valid. Use a model id from https://hf.co/models')
        for result in [result for index in data.get("model-index", []) for result in index["results"]]:
            if not all(result["dataset"].get(key) for key in ("name", "type")) or not result["task"].get("type"):
                wrong.append("model-index: a result lacks its task or data set")
        return answer({"errors": [{"message": message} for message in wrong], "warnings": []}, 400 if wrong else 200)

    def preupload(self, request: Request, repo: str, revision: str) -> Response:
        there = self.files(repo, revision)
        return answer(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                        "shouldIgnore": False,
                        "oid": oid_of(file["path"], there[file["path"]]) if file["path"] in there else None,
                    }
                    for file in request.get_json()["files"]
                ]
            }
        )

    def batch(self, request: Request, repo: str) -> Response:
        objects = []
        for asked in request.get_json()["objects"]:
            upload = {"upload": {"href": f"{self.url}/lfs/{asked['oid']}"}}
            objects.append({**asked, **({} if asked["oid"] in self.blobs else {"actions": upload})})
        return answer({"transfer": "basic", "objects": objects})

    def upload(self, request: Request, oid: str) -> Response:
        data = request.get_data()
        if hashlib.sha256(data).hexdigest() != oid:
            return refuse(400, None, "what came is not what was announced")
        self.blobs[oid] = data
        return Response()

    def branch(self, request: Request, repo: str, revision: str) -> Response:
        branches = self.repos[repo]["branches"]
        if revision in branches:
            return refuse(409, None, "Reference already exists")
        branches[revision] = list(branches["main"])
        return answer({})

    def commit(self, request: Request, repo: str, revision: str) -> Response:
        files, message = self.files(repo, revision), None
        for line in request.get_data().decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        branches, number = self.repos[repo]["branches"], None
        if request.args.get("create_pr"):
            number = sum(name.startswith("refs/pr/") for name in branches) + 1
            revision = f"refs/pr/{number}"
        history = branches.setdefault(revision, list(branches["main"]))
        oid = hashlib.sha1(f"{repo}{revision}{len(history)}{sorted(files.items())}".encode()).hexdigest()
        history.append({"oid": oid, "message": message, "files": files})
        url = {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid}
        return answer({**url, "pullRequestUrl": f"{self.url}/{repo}/discussions/{number}" if number else None})

    def info(self, request: Request, repo: str, revision: str = "main") -> Response:
        commits = self.history(repo, revision)
        return answer(
            {
                "id": repo,
                "private": self.repos[repo]["private"],
                "sha": commits[-1]["oid"] if commits else "0" * 40,
                "siblings": [{"rfilename": path} for path in self.files(repo, revision)],
                "tags": [],
            }
        )

    def tree(self, request: Request, repo: str, revision: str) -> Response:
        files = self.files(repo, revision).items()
        return answer([{"type": "file", "path": p, "size": len(c), "oid": oid_of(p, c)} for p, c in files])

    def resolve(self, request: Request, repo: str, revision: str, path: str) -> Response:
        found = self.history(repo, revision)
        if not found or path not in found[-1]["files"]:
            return refuse(404, "EntryNotFound", "Entry not found")
        content = found[-1]["files"][path]
        headers = {"X-Repo-Commit": found[-1]["oid"], "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return Response(content, headers=headers, mimetype="application/octet-stream")


def answer(content, status: int = 200) -> Response:
    return Response(json.dumps(content), status, mimetype="application/json")


def refuse(status: int, code: str | None, message: str) -> Response:
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
    return Response(json.dumps({"error": message}), status, headers, mimetype="application/json")


def oid_of(path: str, content: bytes) -> str:
    """What names a file's content: git's hash, or for large files that of LFS."""
    if path.endswith(LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
