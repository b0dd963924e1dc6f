"""The first example of the documentation: convert, save, load, push to a Hub on this machine, and load from there."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

QUICK_START = Path(__file__).parents[2] / "docs" / "quick-start.md"
COMMIT = "0" * 40
PUSH = """
address = lape.push_to_hub(model, "name/my-model")
again, images = lape.load(address), torch.randn(2, 3, 32, 32)
assert torch.equal(again(images), model(images))
print(address, lape.describe(again))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's API as uploading a folder and downloading it ask for: one model, its files in the commit."""

    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/name/my-model", "id": "name/my-model"})
        elif self.path.startswith("/api/models/name/my-model/preupload/main"):
            wanted = json.loads(body)["files"]
            self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
            )
        elif self.path.startswith("/api/models/name/my-model/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                {
                    "success": True,
                    "commitOid": COMMIT,
                    "commitUrl": f"http://{self.headers['Host']}/name/my-model/commit/{COMMIT}",
                }
            )
        else:
            self.send_error(404)

    def do_GET(self) -> None:
        if self.path.startswith(f"/name/my-model/resolve/{COMMIT}/"):
            self.answer(self.files[self.path.rpartition("/")[2]])
        elif self.path.startswith("/api/models/name/my-model"):
            siblings = [
                {"rfilename": name, "path": name, "type": "file", "size": len(f), "oid": ""}
                for name, f in self.files.items()
            ]
            listing = "/tree/" in self.path
            self.answer(siblings if listing else {"id": "name/my-model", "sha": COMMIT, "siblings": siblings})
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, content: object) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_the_first_model_is_saved_loaded_and_pushed(hub: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    code = "".join(re.findall(r"^```python\n(.*?)^```$", QUICK_START.read_text(encoding="utf-8"), re.M | re.S)) + PUSH
    environ = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "hf_nobody",
        "HF_HUB_DISABLE_XET": "1",
    }
    environ |= {"HF_HUB_OFFLINE": "0", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.splitlines()[-1].startswith(
        "hf-hub:name/my-model timm VisionTransformer: join=LaPE pe=learnable"
    )
    assert {"config.json", "model.safetensors"} <= set(Hub.files)
    assert (tmp_path / "my-model" / "model.safetensors").read_bytes() == Hub.files["model.safetensors"]
    assert (tmp_path / "position.html").stat().st_size > 10_000
