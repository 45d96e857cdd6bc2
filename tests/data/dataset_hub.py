"""As much of the Hugging Face hub as downloading a dataset needs, over a folder of repositories."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator

_COMMIT = "0" * 40


class _Hub(http.server.BaseHTTPRequestHandler):
    folder: pathlib.Path

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/")
        api, path = path.startswith("api/"), path.removeprefix("api/").removeprefix("datasets/")
        owner, _, path = path.partition("/")
        name, _, path = path.partition("/")
        repository = self.folder / owner / name
        kind, _, path = path.partition("/")
        inside = repository / path.partition("/")[2]  # after the commit
        if not repository.is_dir():
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif kind == "tree" and inside.is_dir():
            entries = [self.entry(place, repository) for place in sorted(inside.iterdir())]
            self.answer(200, json.dumps(entries).encode(), {})
        elif kind == "resolve" and inside.is_file():
            content = inside.read_bytes()
            tag = hashlib.sha256(content).hexdigest()
            self.answer(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": _COMMIT})
        elif api and kind in ("", "revision"):
            about = {"id": f"{owner}/{name}", "sha": _COMMIT, "private": False, "downloads": 0}
            self.answer(200, json.dumps({**about, "tags": [], "siblings": []}).encode(), {})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def entry(self, place: pathlib.Path, repository: pathlib.Path) -> dict:
        kind, size = ("directory", 0) if place.is_dir() else ("file", place.stat().st_size)
        path = str(place.relative_to(repository))
        return {"type": kind, "path": path, "size": size, "oid": _COMMIT}

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def running_hub(folder: pathlib.Path) -> Iterator[str]:
    """Serves the repositories `folder/owner/name`; yields what HF_ENDPOINT is to be."""
    handler = type("Handler", (_Hub,), {"folder": folder})
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()
