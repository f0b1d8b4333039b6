import sys
import time
from pathlib import Path

import psutil
import pytest

from demo.children import DemoError, child, free_port, post, run, server

SERVER = """
import http.server, json, signal, sys, threading
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        self.answer(200 if self.path == "/healthz/ready" else 404, {})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(200 if body["history"] else 400, {"items": body["history"]})
    def log_message(self, *arguments):
        pass
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
print("serving", flush=True)
server.serve_forever()
server.server_close()
sys.exit(int(sys.argv[2]))
"""


def fake_server(port: int, status: int = 0) -> tuple[str, ...]:
    return sys.executable, "-W", "ignore", "-c", SERVER, str(port), str(status)


def children() -> list[psutil.Process]:
    return [process for process in psutil.Process().children() if process.status() != psutil.STATUS_ZOMBIE]


def test_a_command_that_fails_is_told() -> None:
    run((sys.executable, "-c", ""))
    with pytest.raises(DemoError, match="ended with status 3"):
        run((sys.executable, "-c", "raise SystemExit(3)"))


def test_a_server_is_asked_and_stopped(tmp_path: Path) -> None:
    before, port = children(), free_port()
    with server(fake_server(port), port, tmp_path / "log", 20):
        assert post(port, "/v1/recommend", {"history": ["a"]}) == {"items": ["a"]}
        with pytest.raises(DemoError, match="was answered 400"):
            post(port, "/v1/recommend", {"history": []})
    assert children() == before
    assert (tmp_path / "log").read_text() == "serving\n"


def test_a_server_that_ends_badly_shows_its_last_output(tmp_path: Path) -> None:
    port = free_port()
    with (
        pytest.raises(DemoError, match=r"status 5; its last output:\nno bundle"),
        server((sys.executable, "-c", "print('no bundle'); raise SystemExit(5)"), port, tmp_path / "log", 20),
    ):
        pytest.fail("it never was ready")
    with pytest.raises(DemoError, match="status 4"), server(fake_server(port, 4), port, tmp_path / "log", 20):
        pass


def test_a_server_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    before = children()
    sleeps = (sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(60)")
    late = pytest.raises(DemoError, match=r"not ready after 1 s; its last output:\nloading")
    with late, server(sleeps, free_port(), tmp_path / "log", 1):
        pytest.fail("it never was ready")
    assert children() == before


def test_an_error_beside_the_server_ends_it(tmp_path: Path) -> None:
    before, port = children(), free_port()
    with pytest.raises(ValueError, match="mine"), server(fake_server(port), port, tmp_path / "log", 20):
        raise ValueError("mine")
    assert children() == before


def test_a_command_left_early_is_interrupted() -> None:
    start = time.monotonic()
    with child((sys.executable, "-c", "import time; time.sleep(60)")) as process:
        pass
    assert process.returncode is not None
    assert time.monotonic() - start < 30
