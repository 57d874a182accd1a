"""A server on this machine that answers as the Hugging Face hub does to an upload: what `HfApi` asks for, and no more."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_secret"


class Hub(ThreadingHTTPServer):
    """The state of the stand-in.

    Attributes:
        repositories: files by path, of each repository.
        created: what each creation asked for.
        large: file endings that go by LFS.
        refuse: HTTP status by the beginning of a request's path, in place of an answer.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.created, self.objects, self.validated = {}, [], {}, []
        self.large, self.refuse, self.requests = (".safetensors", ".png"), {}, []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answered(lambda body: (404, {"error": "not found"}))

    def do_POST(self):
        self._answered(self._post)

    def do_PUT(self):
        self._answered(self._put)

    def _answered(self, route):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if not self._chunked() else self._chunks()
        hub, path = self.server, self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        refused = next((status for start, status in hub.refuse.items() if path.startswith(start)), None)
        if refused is not None:
            status, content = refused, {"error": "refused by the test"}
        elif not path.startswith("/store/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status, content = 401, {"error": "Invalid username or password."}
        else:
            status, content = route(body)
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")  # no thread waits for another request when the test is over
        self.end_headers()
        self.wfile.write(data)

    def _post(self, body):
        hub, path = self.server, self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            hub.created.append(asked)
            if name in hub.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
            hub.repositories[name] = {}
            return 200, {"url": f"{hub.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            hub.validated.append(json.loads(body)["content"])
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            answer = [
                {"path": one["path"], "uploadMode": mode[one["path"].endswith(hub.large)], "shouldIgnore": False, "oid": None}
                for one in files
            ]
            return 200, {"files": answer}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**one, "actions": {"upload": {"href": f"{hub.url}/store/{one['oid']}"}}} for one in objects]
            return 200, {"transfer": "basic", "objects": actions}
        if "/commit/" in path:
            return self._commit(body, "/".join(path.split("/")[3:5]))
        return 404, {"error": f"no route {path}"}

    def _put(self, body):
        oid = self.path.rsplit("/", 1)[-1]
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "checksum"}
        self.server.objects[oid] = body
        return 200, {}

    def _commit(self, body, name):
        if name not in self.server.repositories:
            return 404, {"error": "Repository not found"}
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.server.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                self.server.repositories[name][value["path"]] = self.server.objects[value["oid"]]
        url = f"{self.server.url}/{name}/commit/{'0' * 40}"
        return 200, {"success": True, "commitUrl": url, "commitOid": "0" * 40, "pullRequestUrl": None}

    def _chunked(self):
        return self.headers.get("Transfer-Encoding") == "chunked"

    def _chunks(self):
        data = b""
        while size := int(self.rfile.readline().strip(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def log_message(self, *args):
        pass


@contextmanager
def hub_stand_in():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
