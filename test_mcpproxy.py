"""Tests of mcpproxy.py, in the order of its sections.

    python3 test_mcpproxy.py               installs pytest where it is missing and runs all of this
    python3 -m pytest -k "http and chunk"  some of it

The wire's sections are tested with plain calls. Everything else is tested from outside: a real
mcpproxy.py as a process, real sockets, real MCP servers. The clients here are small and literal
on purpose; the last part does it again with the official SDKs and servers. Those need `uv` and
`node`, and are skipped where there is none, unless MCPPROXY_TEST_ALL is set.

FAKE_SERVER is the server behind most tests: its tools do what a test needs to see happen.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

if __name__ == "__main__" and "pytest" not in sys.modules:
    # The README's test command. A virtual environment, because the system's pip may refuse to install.
    try:
        import pytest
    except ImportError:
        import venv
        home = os.path.join(tempfile.gettempdir(), f"mcpproxy-tests-{os.getuid()}")
        venv.create(home, with_pip=True, clear=not os.path.exists(f"{home}/bin/pip"))
        subprocess.run([f"{home}/bin/pip", "install", "--quiet", "pytest"], check=True)
        os.execv(f"{home}/bin/python", [f"{home}/bin/python", *sys.argv])
    sys.exit(pytest.main([os.path.abspath(__file__), "-q", *sys.argv[1:]]))

import pytest

import mcpproxy

HERE = os.path.dirname(os.path.abspath(__file__))
PROXY = os.path.join(HERE, "mcpproxy.py")
PATIENCE = 20.0        # seconds after which something that should happen counts as not happening


# ============================================================================
# Helpers
# ============================================================================

def until(condition, what="the condition", patience=PATIENCE):
    """Waits until condition() is true and returns its value."""
    deadline = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come true in {patience} s"
        time.sleep(0.01)


def is_alive(pid):
    """Is this process running? A zombie is not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_with(tag):
    """The processes that have this text in their environment."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/environ", "rb") as environment:
                if tag.encode() in environment.read() and is_alive(pid):
                    found.append(int(pid))
    return found


class Proxy:
    """A running mcpproxy.py."""

    def __init__(self, command=None, arguments=(), **settings):
        self.tag = f"TEST_TAG={os.urandom(8).hex()}"
        environment = {name: value for name, value in os.environ.items()
                       if name not in mcpproxy.Settings.__dataclass_fields__ and name.lower() not in
                       mcpproxy.Settings.__dataclass_fields__}
        environment.update(HOST="127.0.0.1", PORT="0", TEST_TAG=self.tag.partition("=")[2])
        environment.update({name: str(value) for name, value in settings.items()})
        if command:
            environment["MCP_SERVER_CONFIG"] = command if isinstance(command, str) else shlex.join(command)
        self._log = tempfile.TemporaryFile()
        self.process = subprocess.Popen([sys.executable, PROXY, *arguments], env=environment, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=self._log)
        line = self.process.stdout.readline()
        while line and b"http" not in line:
            line = self.process.stdout.readline()
        match = re.search(rb"https?://[^/]*:(\d+)", line)
        assert match, f"mcpproxy did not start: {self.log()}"
        self.port = int(match[1])

    def log(self):
        return os.pread(self._log.fileno(), 10_000_000, 0).decode(errors="replace")

    def children(self):
        """The MCP servers and whatever else runs because of this proxy."""
        return [pid for pid in processes_with(self.tag) if pid != self.process.pid]

    def stop(self, number=signal.SIGTERM):
        """Ends the proxy; returns its exit status. Nothing of it may be left."""
        self.process.send_signal(number)
        try:
            status = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"mcpproxy did not end: {self.log()}") from None
        finally:
            self.process.stdout.close()
        until(lambda: not processes_with(self.tag), "the end of all processes")
        return status

    def request(self, method, path, body=None, headers=None):
        """One HTTP request on a connection of its own."""
        with HTTP(self) as http:
            return http.request(method, path, body, headers)


@contextlib.contextmanager
def running_proxy(command=None, **settings):
    """A Proxy for a while; it has to end well, with nothing in its log that is a fault of its own."""
    proxy = Proxy(command, **settings)
    try:
        yield proxy
    finally:
        if proxy.process.poll() is None:
            status = proxy.stop()
            assert status == 0, proxy.log()
        log = proxy.log()
        proxy._log.close()
    assert "Traceback" not in log and "fault of the proxy" not in log, log


class Response:
    """An HTTP response: status, headers by lower-case name, body."""

    def __init__(self, status, headers, body=b""):
        self.status, self.headers, self.body = status, headers, body

    def json(self):
        return json.loads(self.body)

    def error(self):
        """(status, code) of an error."""
        return self.status, self.json()["error"]["code"]


class HTTP:
    """A socket that speaks HTTP/1.1 literally."""

    def __init__(self, proxy):
        self.socket = socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE)
        self.file = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.file.close()
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def request(self, method, path, body=None, headers=None):
        self.send(encode_http(method, path, body, headers))
        return self.response(method)

    def head(self):
        """The status and headers of the next response."""
        line = self.file.readline()
        assert line.startswith(b"HTTP/1.1 "), line
        headers = {}
        for field in iter(self.file.readline, b"\r\n"):
            assert field, "the connection ended within a head"
            name, _, value = field.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        return Response(int(line.split()[1]), headers)

    def response(self, method="GET"):
        """The next response, whole."""
        response = self.head()
        if response.headers.get("transfer-encoding") == "chunked":
            while size := int(self.file.readline(), 16):
                response.body += self.file.read(size)
                assert self.file.readline() == b"\r\n"
            self.file.readline()
        elif method != "HEAD":
            response.body = self.file.read(int(response.headers.get("content-length", 0)))
        return response

    def is_closed(self):
        """Did the proxy close the connection, with nothing more said?"""
        return self.file.read(1) == b""


def encode_http(method, path, body=None, headers=None):
    """A request as bytes. A body that is not bytes is sent as JSON."""
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    fields = {"Host": "127.0.0.1"}
    if body is not None:
        fields.update({"Content-Type": "application/json", "Content-Length": len(body)})
    fields.update(headers or {})
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items() if value is not None)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (body or b"")


class Events:
    """The events of an open stream, read by a thread so that a test can wait for what it wants."""

    def __init__(self, http):
        self.http = http
        self.response = http.head()
        self.events = []                 # dicts of the fields of each event
        self.comments = 0
        self.ended = threading.Event()
        if self.response.headers.get("content-type") == "text/event-stream":
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()

    def _read(self):
        rest = b""
        with contextlib.suppress(OSError, ValueError):
            while size := int(self.http.file.readline() or b"0", 16):
                rest += self.http.file.read(size)
                self.http.file.readline()
                *blocks, rest = rest.split(b"\n\n")
                for block in blocks:
                    self._add(block.decode())
        self.ended.set()

    def _add(self, block):
        if block.startswith(":"):
            self.comments += 1
        else:
            fields = (line.partition(":") for line in block.split("\n"))
            self.events.append({name: value.removeprefix(" ") for name, _, value in fields})

    def messages(self):
        return [json.loads(event["data"]) for event in list(self.events)
                if event.get("event", "message") == "message" and event.get("data")]

    def wait(self, condition, what="a message"):
        """The first message for which condition(message) is true."""
        return until(lambda: next((message for message in self.messages() if condition(message)), None), what)

    def answer(self, request_id):
        """The response to a request."""
        return self.wait(lambda message: message.get("id") == request_id and "method" not in message,
                         f"the answer to {request_id}")

    def close(self):
        with contextlib.suppress(OSError):
            self.http.socket.shutdown(socket.SHUT_RDWR)
        if self.response.headers.get("content-type") == "text/event-stream":
            self._thread.join(PATIENCE)
        self.http.close()


CLIENT_INFO = {"name": "test", "version": "1"}


def request(request_id, method, params=None):
    message = {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}
    return {name: value for name, value in message.items() if value is not None}


def notification(method, params=None):
    return {name: value for name, value in request(None, method, params).items()}


def initialize(request_id=0, version="2025-06-18", capabilities=None):
    return request(request_id, "initialize", {"protocolVersion": version, "capabilities": capabilities or {},
                                              "clientInfo": CLIENT_INFO})


def tool_call(request_id, name, arguments=None, token=None):
    params = {"name": name, "arguments": arguments or {}}
    if token is not None:
        params["_meta"] = {"progressToken": token}
    return request(request_id, "tools/call", params)


def text_of(answer):
    """The text of a tool's result."""
    assert "result" in answer, answer
    return answer["result"]["content"][0]["text"]


class SSEClient:
    """A client of HTTP+SSE."""

    def __init__(self, proxy, query="", headers=None, capabilities=None, handshake=True):
        self.proxy = proxy
        self.headers = headers or {}
        http = HTTP(proxy)
        http.send(encode_http("GET", "/sse" + query, None, {"Accept": "text/event-stream", **self.headers}))
        self.stream = Events(http)
        self.response = self.stream.response
        if self.response.status != 200:
            self.response.body = http.file.read(int(self.response.headers["content-length"]))
            return
        until(lambda: self.stream.events, "the endpoint event")
        self.endpoint = self.stream.events[0]["data"]
        self._ids = iter(range(1, 1_000_000))
        if handshake:
            self.initialized = self.call("initialize", initialize(capabilities=capabilities)["params"])
            self.post(notification("notifications/initialized"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def post(self, message, expect=202):
        response = self.proxy.request("POST", self.endpoint, message, self.headers)
        assert response.status == expect, (response.status, response.body)
        return response

    def start(self, name, arguments=None, request_id=None, token=None):
        """Calls a tool and returns the id to wait for."""
        request_id = request_id or next(self._ids)
        self.post(tool_call(request_id, name, arguments, token))
        return request_id

    def call(self, method, params=None):
        """The response to a request."""
        request_id = next(self._ids)
        self.post(request(request_id, method, params))
        return self.stream.answer(request_id)

    def tool(self, name, **arguments):
        """The text that a tool returns."""
        return text_of(self.stream.answer(self.start(name, arguments)))


# ============================================================================
# Fake servers
# ============================================================================

FAKE_SERVER = r"""
import json, os, subprocess, sys, threading, time
lock, answers, cancelled, seen = threading.Lock(), {}, {}, []
VERSION = os.environ.get("FAKE_VERSION", "2025-06-18")
CAPABILITIES = {"tools": {"listChanged": True}, "prompts": {}, "logging": {}, "completions": {},
                "resources": {"subscribe": True, "listChanged": True}}

def write(text):
    with lock:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

def send(**members):
    write(json.dumps({"jsonrpc": "2.0", **members}))

def ask(method, params):
    number = "ask-%d" % len(answers)
    answers[number] = event = [threading.Event(), None]
    send(id=number, method=method, params=params)
    event[0].wait(30)
    return event[1]

def call(id, name, meta, echo=None, text="", seconds=0, steps=0, method="", params=None, size=0, code=0, line="",
         level="info", variable=""):
    if name == "echo": return text
    if name == "pid": return str(os.getpid())
    if name == "seen": return json.dumps(seen)
    if name == "variable": return os.environ.get(variable, "(unset)")
    if name == "sleep":
        cancelled[id] = event = threading.Event()
        for step in range(steps):
            time.sleep(seconds / steps)
            send(method="notifications/progress", params={"progressToken": meta.get("progressToken"), "progress": step})
        if event.wait(0 if steps else seconds): return None
        return "slept"
    if name == "ask": return json.dumps(ask(method, params))
    if name == "log":
        send(method="notifications/message", params={"level": level, "data": text})
        return "logged"
    if name == "notify":
        send(method=method, params=params or {})
        return "notified"
    if name == "later":
        threading.Timer(seconds, lambda: send(method=method, params=params or {})).start()
        return "soon"
    if name == "die":
        print(text, file=sys.stderr, flush=True)
        os._exit(code)
    if name == "big": return "x" * size
    if name == "raw":
        write(line)
        return "written"
    if name == "twice":
        send(id=id, result={"content": [{"type": "text", "text": "first"}]})
        return "second"
    if name == "leave":
        child = subprocess.Popen(["sleep", "1000"], start_new_session=True, stdin=subprocess.DEVNULL,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return str(child.pid)
    if name == "silent": return None
    raise KeyError(name)

def answer(id, method, params):
    if method == "tools/call":
        text = call(id, params["name"], params.get("_meta") or {}, **params.get("arguments") or {})
        return None if text is None else {"content": [{"type": "text", "text": text}]}
    if method == "initialize":
        return {"protocolVersion": VERSION, "capabilities": CAPABILITIES, "serverInfo": {"name": "fake", "version": "1"},
                "x-unknown": 12345678901234567890}
    if method == "tools/list":
        return {"tools": [{"name": "echo", "inputSchema": {"type": "object"}, "x-unknown": 1.0}]}
    if method == "resources/list": return {"resources": [{"uri": "test://a", "name": "a"}]}
    if method == "resources/read": return {"contents": [{"uri": params["uri"], "text": "content"}]}
    if method == "prompts/list": return {"prompts": []}
    if method in ("ping", "logging/setLevel", "resources/subscribe", "resources/unsubscribe"): return {}
    if method == "custom/method": return {"params": params, "number": 1.0}
    raise KeyError(method)

def handle(message):
    try:
        result = answer(message["id"], message["method"], message.get("params") or {})
        if result is not None: send(id=message["id"], result=result)
    except KeyError as error:
        send(id=message["id"], error={"code": -32601, "message": "no %s" % error})

for line in sys.stdin:
    message = json.loads(line)
    seen.append(message)
    if "method" not in message:
        event = answers[message["id"]]
        event[1] = message
        event[0].set()
    elif message["method"] == "notifications/cancelled":
        if message["params"]["requestId"] in cancelled: cancelled[message["params"]["requestId"]].set()
    elif "id" in message:
        threading.Thread(target=handle, args=(message,), daemon=True).start()
"""
FAKE = [sys.executable, "-c", FAKE_SERVER]


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """Fails a test that leaves a process, a thread or a descriptor behind."""
    def left():
        with open(f"/proc/self/task/{os.getpid()}/children") as children:
            return len(os.listdir("/proc/self/fd")), threading.active_count(), children.read()
    before = left()
    yield
    until(lambda: left() <= before or left() == before, f"the state before, {before}, from {left()}", 5)


import ast
import asyncio
import bisect
import dataclasses
import dis
import itertools
import logging
import random
import types

import test_mcpproxy
from mcpproxy import HTTPError, ProxyError, RPCError, Settings, SettingsError


@pytest.fixture(scope="module")
def demo():
    """A proxy in front of the demo server, for all tests that leave it as it was."""
    with running_proxy() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def fake():
    """A proxy in front of a fake server, likewise."""
    with running_proxy(FAKE) as proxy:
        yield proxy


def case(name, *values):
    """A row of a table."""
    return pytest.param(*values, id=name)


# ============================================================================
# 3. Settings
# ============================================================================

# A value of each setting that is not its default, where the type alone does not give one.
SAMPLES = {"mcp_server_config": "cat", "base_path": "/x", "log_level": "DEBUG", "log_format": "json",
           "server_era": "legacy"}

NEEDS = {"tls_key": {"TLS_CERT": "x"}}         # what a setting needs beside it


def sample(field):
    by_type = {bool: str(not field.default), int: "7", float: "1.5", str: "x"}
    return SAMPLES.get(field.name) or by_type[type(field.default)]


def default_of(field):
    """A setting's default as people read it."""
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default) or "none"


def load(arguments="", **environment):
    return mcpproxy.load_settings(shlex.split(arguments), {"PATH": os.environ["PATH"], **environment})


every_setting = pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda field: field.name)


@every_setting
def test_settings_each_is_a_variable(field):
    value = getattr(load(**{field.name.upper(): sample(field)}, **NEEDS.get(field.name, {})), field.name)
    assert value != field.default and type(value) is type(field.default)


@every_setting
def test_settings_each_is_a_flag_that_beats_the_variable(field):
    flag = "--" + field.name.replace("_", "-")
    loaded = mcpproxy.load_settings([flag, sample(field)], {field.name.upper(): str(field.default),
                                                            **NEEDS.get(field.name, {})})
    assert getattr(loaded, field.name) == mcpproxy.parse_setting(field.name, field.default, sample(field))


def test_settings_without_any_are_the_defaults():
    assert load() == Settings()


@pytest.mark.parametrize("arguments, environment, expected", [
    case("empty variable is none", "", {"AUTH_KEY": "", "PORT": ""}, {"auth_key": "", "port": 8000}),
    case("empty flag beats variable", "--auth-key ''", {"AUTH_KEY": "secret"}, {"auth_key": ""}),
    case("flag with =", "--port=7", {}, {"port": 7}),
    case("last flag wins", "--port 1 --port 2", {}, {"port": 2}),
    case("several keys", "--auth-key 'a, b,,c'", {}, {"auth_keys": ("a", "b", "c")}),
    case("part of a megabyte", "--max-message-mb 0.5", {}, {"max_message_bytes": 512 * 1024}),
    case("no grace", "--shutdown-grace 0", {}, {"shutdown_grace": 0.0}),
    case("command behind --", "--port 1 -- cat -u", {"MCP_SERVER_CONFIG": "ls"}, {"mcp_server_config": "cat -u"}),
    case("flags of the command", "-- cat --port 5", {}, {"port": 8000, "mcp_server_config": "cat --port 5"}),
    case("second -- is the command's", "-- cat -- -x", {}, {"mcp_server_config": "cat -- -x"}),
    case("word with blanks", "-- cat 'a b'", {}, {"mcp_server_config": "cat 'a b'"}),
])
def test_settings_are_read_from(arguments, environment, expected):
    settings = load(arguments, **environment)
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize("text, expected", [
    ("true", True), ("True", True), ("1", True), ("yes", True), ("ON", True),
    ("false", False), ("FALSE", False), ("0", False), ("no", False), ("off", False)])
def test_settings_truth_is_spelled_in_many_ways(text, expected):
    assert load(SHARED_SESSION=text).shared_session is expected


BAD_SETTINGS = pytest.mark.parametrize("arguments, environment, word", [
    case("unknown flag", "--frobnicate 1", {}, "--frobnicate"),
    case("abbreviated flag", "--po 1", {}, "--po"),
    case("stray word", "cat", {}, "cat"),
    case("flag without value", "--port", {}, "--port"),
    case("port is a word", "--port http", {}, "PORT"),
    case("port is empty", "--port ''", {}, "PORT"),
    case("port in the environment", "", {"PORT": "80a"}, "PORT"),
    case("port below", "--port -1", {}, "PORT"),
    case("port above", "--port 65536", {}, "PORT"),
    case("neither true nor false", "--shared-session maybe", {}, "SHARED_SESSION"),
    case("no time", "--heartbeat 0", {}, "HEARTBEAT"),
    case("negative time", "", {"REQUEST_TIMEOUT": "-5"}, "REQUEST_TIMEOUT"),
    case("endless time", "--request-timeout inf", {}, "REQUEST_TIMEOUT"),
    case("time is no number", "--request-timeout nan", {}, "REQUEST_TIMEOUT"),
    case("negative grace", "--shutdown-grace -1", {}, "SHUTDOWN_GRACE"),
    case("no sessions", "--max-sessions 0", {}, "MAX_SESSIONS"),
    case("no processes", "--max-processes 0", {}, "MAX_PROCESSES"),
    case("no messages", "--max-message-mb 0", {}, "MAX_MESSAGE_MB"),
    case("unknown era", "--server-era old", {}, "SERVER_ERA"),
    case("unknown log level", "--log-level LOUD", {}, "LOG_LEVEL"),
    case("key without a key", "--auth-key ', ,'", {}, "AUTH_KEY"),
    case("base path without slash", "--base-path mcp", {}, "BASE_PATH"),
    case("base path ends in slash", "--base-path /mcp/", {}, "BASE_PATH"),
    case("base path with blank", "--base-path '/a b'", {}, "BASE_PATH"),
    case("nothing behind --", "--", {}, "--"),
    case("command not found", "-- no-such-command-here", {}, "no-such-command-here"),
    case("command of the environment", "", {"MCP_SERVER_CONFIG": "no-such-command -y"}, "no-such-command"),
    case("open quote", "", {"MCP_SERVER_CONFIG": "cat 'x"}, "MCP_SERVER_CONFIG"),
    case("command of blanks", "", {"MCP_SERVER_CONFIG": "  "}, "MCP_SERVER_CONFIG"),
])


@BAD_SETTINGS
def test_settings_that_cannot_be_used_are_told_by_name(arguments, environment, word):
    with pytest.raises(SettingsError) as error:
        load(arguments, **environment)
    assert word in str(error.value)


# ============================================================================
# 4. HTTP/1.1
# ============================================================================

LIMIT = 64 * 1024 * 1024           # of a body, in these tests as in a proxy by default
NEXT = b"GET /next HTTP/1.1\r\nHost: next\r\n\r\n"
GET = b"GET /sse HTTP/1.1\r\nHost: a\r\n"                     # to be completed
POST = b"POST /messages HTTP/1.1\r\nHost: a\r\n"              # likewise
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@dataclasses.dataclass(eq=False)
class Request:
    """What was parsed, to be compared by all that it says."""
    head: mcpproxy.HTTPHead
    body: bytes

    def __eq__(self, other):
        return dataclasses.astuple(self) == dataclasses.astuple(other)


def feed(pieces):
    """What a parser makes of pieces of bytes: (whole requests, status of the refusal or None)."""
    parser, head, requests = mcpproxy.RequestParser(), None, []
    try:
        for piece in pieces:
            parser.feed(piece)
            while True:
                head = head or parser.next_head()
                body = parser.next_body(LIMIT) if head else None
                if body is None:
                    break
                requests.append(Request(head, body))
                head = None
    except HTTPError as error:
        return requests, error.http_status
    return requests, None


def feed_every_way(raw):
    """feed() of bytes: whole, byte by byte, in any two pieces, and with the next request behind; always the same."""
    result = requests, status = feed([raw])
    assert feed(raw[at:at + 1] for at in range(len(raw))) == result, "byte by byte"
    for at in range(len(raw) if len(raw) < 500 else 0):
        assert feed([raw[:at], raw[at:]]) == result, f"cut in two at {raw[:at]}"
    behind = feed([raw + NEXT])
    assert behind == (result if status else (requests + feed([NEXT])[0], None)), "with the next request behind"
    return result


def one_request(raw):
    (request,), status = feed_every_way(raw)
    assert status is None
    return request


@pytest.mark.parametrize("raw, expected", [
    case("the least", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
         {"method": "GET", "path": "/", "query": (), "headers": {"host": "a"}, "version": (1, 1), "keep_alive": True,
          "content_length": 0, "expects_continue": False}),
    case("one empty line before", b"\r\nGET /x HTTP/1.1\r\nHost: a\r\n\r\n", {"path": "/x"}),        # RFC 9112 §2.2
    case("query", b"GET /x?a=1&b=%C3%A9&c=x+y&d&e= HTTP/1.1\r\nHost: a\r\n\r\n",
         {"path": "/x", "query": (("a", "1"), ("b", "\xe9"), ("c", "x y"), ("d", ""), ("e", ""))}),
    case("= in a query's value", b"GET /?a=b=c HTTP/1.1\r\nHost: a\r\n\r\n", {"query": (("a", "b=c"),)}),
    case("escaped & in a query", b"GET /?a=b%26c%3D HTTP/1.1\r\nHost: a\r\n\r\n", {"query": (("a", "b&c="),)}),
    case("escapes in the path", b"GET /a%20b%2Fc HTTP/1.1\r\nHost: a\r\n\r\n", {"path": "/a b/c"}),
    case("+ in the path", b"GET /a+b HTTP/1.1\r\nHost: a\r\n\r\n", {"path": "/a+b"}),
    case("OPTIONS *", b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", {"method": "OPTIONS", "path": "*"}),
    # RFC 9112 §3.2.2: a server "MUST accept the absolute-form in requests", and ignores Host then.
    case("absolute form", b"GET http://b:80/x?y=1 HTTP/1.1\r\nHost: a\r\n\r\n",
         {"path": "/x", "query": (("y", "1"),), "headers": {"host": "b:80"}}),
    case("absolute form without path", b"GET HTTP://b HTTP/1.1\r\nHost: a\r\n\r\n",
         {"path": "/", "headers": {"host": "b"}}),
    case("HTTP/1.0", b"GET / HTTP/1.0\r\n\r\n", {"version": (1, 0), "headers": {}, "keep_alive": False}),
    case("HTTP/1.0 that stays", b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", {"keep_alive": True}),
    case("HTTP/1.0 does not wait", b"POST / HTTP/1.0\r\nExpect: 100-continue\r\n\r\n", {"expects_continue": False}),
    case("HTTP/1.2", b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", {"version": (1, 2), "keep_alive": True}),  # RFC 9110 §2.5
    case("close", GET + b"Connection: close\r\n\r\n", {"keep_alive": False}),
    case("close among others", GET + b"Connection: x, CLOSE\r\n\r\n", {"keep_alive": False}),
    case("close in a second line", GET + b"Connection: x\r\nConnection: close\r\n\r\n", {"keep_alive": False}),
    case("names in any case", b"GET / HTTP/1.1\r\nhOST: a\r\nX-Y: Z\r\n\r\n", {"headers": {"host": "a", "x-y": "Z"}}),
    case("blanks around a value", GET + b"X:\t  a b \t\r\n\r\n", {"headers": {"host": "a", "x": "a b"}}),
    case("no blank before a value", GET + b"X:y\r\n\r\n", {"headers": {"host": "a", "x": "y"}}),
    case("empty value", GET + b"X:\r\n\r\n", {"headers": {"host": "a", "x": ""}}),
    case("colons in a value", GET + b"X: a:b:\r\n\r\n", {"headers": {"host": "a", "x": "a:b:"}}),
    case("value in Latin-1", GET + b"X: \xe9\r\n\r\n", {"headers": {"host": "a", "x": "\xe9"}}),
    case("repeated header", GET + b"X: a\r\nx: b\r\n\r\n",                                           # RFC 9110 §5.3
         {"headers": {"host": "a", "x": "a, b"}, "fields": (("host", "a"), ("x", "a"), ("x", "b"))}),
    case("empty Host", b"GET / HTTP/1.1\r\nHost:\r\n\r\n", {"headers": {"host": ""}}),               # RFC 9112 §3.2
    case("IPv6 Host", b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", {"headers": {"host": "[::1]:80"}}),
    case("unknown method", b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", {"method": "BREW"}),
    case("100 headers", b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 99 + b"\r\n", {"method": "GET"}),
    case("target of 8 KiB", b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"x" * 8191), {"path": "/" + "x" * 8191}),
])
def test_http_head_says(raw, expected):
    head = one_request(raw).head
    found = {name: getattr(head, name) for name in expected}
    assert found == expected


@pytest.mark.parametrize("raw, body", [
    case("none", POST + b"\r\n", b""),
    case("length 0", POST + b"Content-Length: 0\r\n\r\n", b""),
    case("length", POST + b"Content-Length: 5\r\n\r\nhello", b"hello"),
    case("length with zeros", POST + b"Content-Length: 005\r\n\r\nhello", b"hello"),
    case("looks like a request", POST + b"Content-Length: %d\r\n\r\n" % len(NEXT) + NEXT, NEXT),
    case("GET with a body", GET + b"Content-Length: 2\r\n\r\nhi", b"hi"),
    case("announced", POST + b"Expect: 100-Continue\r\nContent-Length: 2\r\n\r\nhi", b"hi"),
    case("one chunk", CHUNKED + b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    case("many chunks", CHUNKED + b"1\r\nh\r\n2\r\nel\r\n2\r\nlo\r\n0\r\n\r\n", b"hello"),
    case("no chunk", CHUNKED + b"0\r\n\r\n", b""),
    case("line ends in a chunk", CHUNKED + b"7\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n", b"\r\n0\r\n\r\n"),
    case("size in capitals", CHUNKED + b"A\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    case("size in small letters", CHUNKED + b"a\r\n0123456789\r\n0\r\n\r\n", b"0123456789"),
    case("size with zeros", CHUNKED + b"0005\r\nhello\r\n000\r\n\r\n", b"hello"),
    # RFC 9112 §7.1.1: "A recipient MUST ignore unrecognized chunk extensions."
    case("extension", CHUNKED + b"5;a=b\r\nhello\r\n0;c\r\n\r\n", b"hello"),
    case("extension behind a blank", CHUNKED + b'5 ;a="b; c"\r\nhello\r\n0\r\n\r\n', b"hello"),
    case("trailers", CHUNKED + b"5\r\nhello\r\n0\r\nX: y\r\nContent-Length: 9\r\n\r\n", b"hello"),
    case("Chunked", POST + b"Transfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", b"hello"),
    case("chunked behind blanks", POST + b"Transfer-Encoding: \t chunked \r\n\r\n5\r\nhello\r\n0\r\n\r\n", b"hello"),
])
def test_http_body_is(raw, body):
    request = one_request(raw)
    assert request.body == body
    assert not [name for name, _ in request.head.fields if name == "x"], "a trailer became a header"


def field(line):
    """A request with one more line in its head."""
    return GET + line + b"\r\n\r\n"


def length(value):
    return POST + b"Content-Length: " + value + b"\r\n\r\nhello"


def coding(value):
    return POST + b"Transfer-Encoding: " + value + b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n"


def target(text):
    return b"GET " + text + b" HTTP/1.1\r\nHost: a\r\n\r\n"


def host(line):
    return b"GET /sse HTTP/1.1\r\n" + line + b"\r\n"


# What a client may not send: every way known to make two parsers disagree, and what is too much.
ATTACKS = pytest.mark.parametrize("raw, status", [
    # RFC 9112 §6.1, §6.3: two ways to find the end of a message are one too many.
    case("length and chunked", POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    case("chunked and length", POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
    case("two lengths", POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
    case("the same length twice", POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", 400),
    case("list of lengths", length(b"5, 5"), 400),
    case("length +5", length(b"+5"), 400),
    case("length -5", length(b"-5"), 400),
    case("length 0x5", length(b"0x5"), 400),
    case("length 5 5", length(b"5 5"), 400),
    case("length 5.0", length(b"5.0"), 400),
    case("length 1_0", length(b"1_0"), 400),
    case("length in Latin-1 digits", length(b"\xb2"), 400),
    case("no length", length(b""), 400),
    case("length of 30 digits", length(b"9" * 30), 400),
    case("length over the limit", length(b"67108865"), 413),
    # RFC 9112 §6.1: an unknown coding "SHOULD" be answered with 501. §6.3: where chunked is not the last
    # coding, the length is unknown and "the server MUST respond with the 400 (Bad Request) status code".
    case("gzip, chunked", coding(b"gzip, chunked"), 501),
    case("chunked, chunked", coding(b"chunked, chunked"), 400),
    case("chunked, gzip", coding(b"chunked, gzip"), 400),
    case("gzip", coding(b"gzip"), 400),
    case("identity", coding(b"identity"), 400),
    case("xchunked", coding(b"xchunked"), 400),
    case("chunkedx", coding(b"chunkedx"), 400),
    case("quoted coding", coding(b'"chunked"'), 400),
    case("coding with parameter", coding(b"chunked;q=1"), 400),
    case("no coding", coding(b""), 400),
    case("vertical tab before the coding", coding(b"\x0bchunked"), 400),
    case("NUL behind the coding", coding(b"chunked\0"), 400),
    case("two codings", POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    case("two different codings", POST + b"Transfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    case("blank before the coding's colon", POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", 400),
    case("folded coding", POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", 400),
    case("chunked in HTTP/1.0", b"POST /messages HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    # RFC 9112 §7.1
    case("chunk size 0x5", CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n", 400),
    case("chunk size +5", CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n", 400),
    case("chunk size -5", CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n", 400),
    case("chunk size 5_0", CHUNKED + b"1_0\r\nhello\r\n0\r\n\r\n", 400),
    case("chunk size g", CHUNKED + b"g\r\nhello\r\n0\r\n\r\n", 400),
    case("no chunk size", CHUNKED + b"\r\nhello\r\n0\r\n\r\n", 400),
    case("extension without a size", CHUNKED + b";a\r\nhello\r\n0\r\n\r\n", 400),
    case("blank before a chunk size", CHUNKED + b" 5\r\nhello\r\n0\r\n\r\n", 400),
    case("blank behind a chunk size", CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n", 400),
    case("chunk size of 16 digits", CHUNKED + b"0" * 15 + b"5\r\nhello\r\n0\r\n\r\n", 400),
    case("chunk size that overflows", CHUNKED + b"10000000000000005\r\nhello\r\n0\r\n\r\n", 400),
    case("chunk over the limit", CHUNKED + b"4000001\r\n", 413),
    case("chunks over the limit", CHUNKED + b"1\r\nx\r\n4000000\r\n", 413),
    case("chunk longer than its size", CHUNKED + b"5\r\nhello!\r\n0\r\n\r\n", 400),
    case("chunk without its end", CHUNKED + b"5\r\nhello0\r\n\r\n", 400),
    case("chunk that ends in LF", CHUNKED + b"5\r\nhello\n0\r\n\r\n", 400),
    case("chunk size that ends in LF", CHUNKED + b"5\nhello\r\n0\r\n\r\n", 400),
    case("chunk size that ends in CR", CHUNKED + b"5\rhello\r\n0\r\n\r\n", 400),
    case("chunk size that ends in CR CR LF", CHUNKED + b"5\r\r\nhello\r\n0\r\n\r\n", 400),
    case("LF in an extension", CHUNKED + b"5;a\nb\r\nhello\r\n0\r\n\r\n", 400),
    case("NUL in an extension", CHUNKED + b"5;\0\r\nhello\r\n0\r\n\r\n", 400),
    case("extension over 4 KiB", CHUNKED + b"5;" + b"a" * 5000 + b"\r\nhello\r\n0\r\n\r\n", 400),
    case("trailer without colon", CHUNKED + b"0\r\nx\r\n\r\n", 400),
    case("folded trailer", CHUNKED + b"0\r\nX: y\r\n z\r\n\r\n", 400),
    case("trailer that ends in LF", CHUNKED + b"0\r\nX: y\n\r\n", 400),
    case("too many trailers", CHUNKED + b"0\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
    # RFC 9112 §2.2: a recipient may take a bare LF for a line's end; two that do not agree on it are a hole.
    case("LF behind the request line", b"GET /sse HTTP/1.1\nHost: a\r\n\r\n", 400),
    case("LF behind a header", GET + b"X: y\nZ: z\r\n\r\n", 400),
    case("head that ends in LF LF", GET + b"X: y\n\n", 400),
    case("CR behind the request line", b"GET /sse HTTP/1.1\rHost: a\r\n\r\n", 400),
    case("CR in a value", field(b"X: y\rZ: z"), 400),
    case("CR CR LF", field(b"X: y\r"), 400),
    case("NUL in a value", field(b"X: y\0"), 400),
    case("NUL in a name", field(b"X\0: y"), 400),
    case("NUL in the target", target(b"/\0"), 400),
    case("DEL in a value", field(b"X: \x7f"), 400),
    case("escape character in a value", field(b"X: \x1b[2J"), 400),
    # RFC 9112 §5.1: "No whitespace is allowed between the field name and colon." §5.2: obsolete folding.
    case("folded header", field(b"X: y\r\n z"), 400),
    case("header folded by a tab", field(b"X: y\r\n\tz"), 400),
    case("blank before the first header", b"GET /sse HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    case("blank before a colon", field(b"X : y"), 400),
    case("tab before a colon", field(b"X\t: y"), 400),
    case("empty name", field(b": y"), 400),
    case("no colon", field(b"X"), 400),
    case("brackets in a name", field(b"X(y): z"), 400),
    case("slash in a name", field(b"X/y: z"), 400),
    case("Latin-1 in a name", field(b"\xe9: z"), 400),
    # RFC 9112 §3.2: without a Host, with two, or with a bad one, "MUST respond with a 400".
    case("no Host", host(b""), 400),
    case("two Hosts", host(b"Host: a\r\nHost: b\r\n"), 400),
    case("the same Host twice", host(b"Host: a\r\nHost: a\r\n"), 400),
    case("list of Hosts", host(b"Host: a, b\r\n"), 400),
    case("Host with a path", host(b"Host: a/b\r\n"), 400),
    case("Host with a user", host(b"Host: b@a\r\n"), 400),
    case("Host with a blank", host(b"Host: a b\r\n"), 400),
    case("Host with a bad port", host(b"Host: a:b\r\n"), 400),
    case("Host with an open bracket", host(b"Host: [::1\r\n"), 400),
    case("absolute form without Host", b"GET http://a/sse HTTP/1.1\r\n\r\n", 400),
    case("absolute form with a bad Host", b"GET http://a/sse HTTP/1.1\r\nHost: b/c\r\n\r\n", 400),
    # RFC 9112 §3.2
    case("absolute form without a host", target(b"http:///sse"), 400),
    case("absolute form with a user", target(b"http://b@a/sse"), 400),
    case("another scheme", target(b"ftp://a/sse"), 400),
    case("* for GET", target(b"*"), 400),
    case("no slash", target(b"sse"), 400),
    case("authority form", b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", 400),
    case("fragment", target(b"/sse#x"), 400),
    case("fragment in the query", target(b"/sse?a=b#x"), 400),
    case("escape of one digit", target(b"/sse%2"), 400),
    case("escape of no digits", target(b"/sse%"), 400),
    case("escape of wrong digits", target(b"/%zz"), 400),
    case("escape of wrong digits in the query", target(b"/sse?a=%u0041"), 400),
    case("escaped NUL", target(b"/sse%00"), 400),
    case("escaped NUL in the query", target(b"/sse?a=%00"), 400),
    case("escaped line end", target(b"/sse?a=%0d%0aX:%20y"), 400),
    case("escape that is not UTF-8", target(b"/%ff"), 400),
    case("overlong escape", target(b"/%c0%af"), 400),
    case("byte that is not ASCII", target(b"/\xc3\xa9"), 400),
    case("blank in the target", target(b"/a b"), 400),
    case("target over 8 KiB", target(b"/" + b"x" * 9000), 414),
    case("target over 32 KiB", target(b"/" + b"x" * 40_000), 414),
    # RFC 9112 §3
    case("two blanks", b"GET  /sse HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    case("tab", b"GET\t/sse HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    case("blank before the method", b" GET /sse HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    case("blank behind the version", b"GET /sse HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
    case("no method", b" /sse HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    case("method with a bad character", b"G@T /sse HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    case("HTTP/0.9", b"GET /sse\r\n\r\n", 400),
    case("HTTP/0.9, said", b"GET /sse HTTP/0.9\r\nHost: a\r\n\r\n", 505),
    case("HTTP/2.0", b"GET /sse HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    case("preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),                             # RFC 9113 §3.4
    case("HTTP/1.10", b"GET /sse HTTP/1.10\r\nHost: a\r\n\r\n", 400),
    case("HTTP/1", b"GET /sse HTTP/1\r\nHost: a\r\n\r\n", 400),
    case("http/1.1", b"GET /sse http/1.1\r\nHost: a\r\n\r\n", 400),
    case("greeting of TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    # What is understood and not wanted.
    case("unknown expectation", field(b"Expect: gold"), 417),
    case("two keys", field(b"Authorization: Bearer a\r\nAuthorization: Bearer b"), 400),
    case("two session ids", field(b"Mcp-Session-Id: a\r\nMcp-Session-Id: b"), 400),
    case("too many headers", GET + b"X: y\r\n" * 200 + b"\r\n", 431),
    case("head over 32 KiB", field(b"X: " + b"y" * 40_000), 431),
    case("head without end", GET + b"X: y\r\n" * 7000, 431),
])


@ATTACKS
def test_http_refuses(raw, status):
    assert feed_every_way(raw) == ([], status)


@pytest.mark.parametrize("size", range(32 * 1024 - 4, 32 * 1024 + 5))
def test_http_largest_head_does_not_depend_on_how_it_is_cut(size):
    head = GET + b"X: "
    raw = head + b"y" * (size - len(head)) + b"\r\n\r\n"
    assert feed(raw[at:at + 1] for at in range(len(raw))) == feed([raw])


@pytest.mark.parametrize("lines", [2, 3, 4])
def test_http_empty_lines_before_a_request_do_not_depend_on_how_they_are_cut(lines):
    feed_every_way(b"\r\n" * lines + NEXT)


def test_http_empty_line_between_requests_is_ignored():
    # RFC 9112 §2.2: some old clients send one behind the body of a POST.
    requests, status = feed_every_way(POST + b"Content-Length: 2\r\n\r\nhi\r\n" + NEXT)
    assert [request.head.path for request in requests] == ["/messages", "/next"] and status is None


def test_http_body_of_exactly_the_limit_is_read():
    parser = mcpproxy.RequestParser()
    parser.feed(CHUNKED + b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n")
    parser.next_head()
    assert parser.next_body(5) == b"abcde"


def seconds_to_parse(chunks):
    parser = mcpproxy.RequestParser()
    parser.feed(CHUNKED + b"1\r\nx\r\n" * chunks + b"0\r\n\r\n")
    parser.next_head()
    start = time.perf_counter()
    assert len(parser.next_body(LIMIT)) == chunks
    return time.perf_counter() - start


def test_http_many_small_chunks_take_linear_time():
    few = min(seconds_to_parse(4_000) for _ in range(5))
    many = min(seconds_to_parse(40_000) for _ in range(3))         # 240 KB, about as much as one read of a socket
    assert many < 2 * 10 * few, f"ten times the chunks took {many / few:.0f} times as long"


def test_http_parameter_given_twice_is_refused():
    head = one_request(target(b"/?auth_key=a&auth_key=b&x=1")).head
    assert head.query_value("x") == "1" and head.query_value("y") is None
    with pytest.raises(HTTPError):
        head.query_value("auth_key")


DATE = b"Sun, 06 Nov 1994 08:49:37 GMT"


def test_http_response_head_is_encoded():
    assert mcpproxy.encode_head(200, (("X", "y"),), DATE, 5) == (
        b"HTTP/1.1 200 OK\r\nX: y\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\nContent-Length: 5\r\n\r\n")
    assert b"Content-Length" not in mcpproxy.encode_head(204, (), DATE, None)


@pytest.mark.parametrize("name, value", [
    ("X", "a\r\nSet-Cookie: b"), ("X", "a\nb"), ("X", "a\rb"), ("X", "a\0"), ("X\r\nY", "a"), ("X:", "\n"), ("", "a"),
    ("X", "\u0100"), ("X", "\u010a")])                 # U+010A is LF for who keeps only its low byte
def test_http_header_that_would_split_the_response_is_not_sent(name, value):
    with pytest.raises(ValueError):
        mcpproxy.encode_head(200, ((name, value),), DATE, 0)


def test_http_chunk_is_encoded():
    assert b"".join(mcpproxy.encode_chunk([b"hello, ", b"world"])) == b"c\r\nhello, world\r\n"


SEEDS_HTTP = [NEXT, POST + b"Content-Length: 5\r\n\r\nhello", CHUNKED + b"5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
              b"GET http://a/x?y=%41+b#c HTTP/1.0\r\nHost: a\r\nConnection: close\r\nExpect: 100-continue\r\n\r\n"]
PIECES_HTTP = [b"\r\n", b"\r", b"\n", b"\0", b" ", b"\t", b":", b";", b"%", b"0", b"5", b"-", b"\xff", b"chunked",
               b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"Host: a\r\n", b"HTTP/1.1", b"\r\n\r\n"]


def mutations(seeds, pieces, seconds=2.0):
    """Seeds with bytes taken out, put in and doubled, for some seconds; (random numbers, bytes) pairs."""
    deadline, numbers = time.monotonic() + seconds, itertools.count()
    while time.monotonic() < deadline:
        chance = random.Random(next(numbers))
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 4)):
            start = chance.randrange(len(data) + 1)
            end = chance.choice((start, start, start + 1, chance.randrange(len(data) + 1)))
            data[start:end] = chance.choice((b"", chance.choice(pieces), bytes(data[end:start]), chance.randbytes(1)))
        yield chance, bytes(data)


def test_http_any_bytes_are_requests_or_refused_however_they_are_cut():
    for chance, data in mutations(SEEDS_HTTP, PIECES_HTTP):
        data += NEXT
        at = chance.randrange(len(data))
        whole, status = feed([data])
        cut, cut_status = feed([data[:at], data[at:]])
        # What is refused is refused either way, but an earlier look may find another reason.
        assert (whole, bool(status)) == (cut, bool(cut_status)), (data, at)


# ============================================================================
# 5. Server-sent events
# ============================================================================

@pytest.mark.parametrize("arguments, expected", [
    case("message", ([b'{"a":', b"1}"],), b'event: message\ndata: {"a":1}\n\n'),
    case("endpoint", ([b"/messages?session_id=1"], b"endpoint"), b"event: endpoint\ndata: /messages?session_id=1\n\n"),
    case("with an id", ([b"{}"], b"message", b"7"), b"id: 7\nevent: message\ndata: {}\n\n"),
    case("empty", ([b""],), b"event: message\ndata: \n\n"),
])
def test_sse_event_is_encoded(arguments, expected):
    assert b"".join(mcpproxy.encode_event(*arguments)) == expected


def test_sse_heartbeat_is_a_comment():
    assert mcpproxy.HEARTBEAT.startswith(b":") and mcpproxy.HEARTBEAT.endswith(b"\n\n")


# ============================================================================
# 6. JSON-RPC
# ============================================================================

def verdict(body):
    """What a message's bytes are: its kind, or the code of the error."""
    try:
        message = mcpproxy.parse_message(mcpproxy.decode_json(body))
        mcpproxy.check_parameters(message)
        return message.kind.value
    except RPCError as error:
        assert error.http_status == 400
        return error.code


def message(members):
    """A message of the version, with the text of its other members."""
    return b'{"jsonrpc":"2.0",' + members + b"}"


DEEP = 100_000
LONG = b"9" * 5_000                # Python itself reads no integer of more than 4,300 digits


@pytest.mark.parametrize("body, expected", [
    case("request", message(b'"id":1,"method":"ping"'), "request"),
    case("request with params", message(b'"id":1,"method":"a","params":{}'), "request"),
    case("id is a string", message(b'"id":"x","method":"a"'), "request"),
    case("id is an empty string", message(b'"id":"","method":"a"'), "request"),
    case("id is 0", message(b'"id":0,"method":"a"'), "request"),
    case("id is negative", message(b'"id":-1,"method":"a"'), "request"),
    case("id above 2^53", message(b'"id":12345678901234567890,"method":"a"'), "request"),
    case("notification", message(b'"method":"notifications/initialized"'), "notification"),
    case("result", message(b'"id":1,"result":{}'), "response"),
    case("result that is null", message(b'"id":1,"result":null'), "response"),
    case("error", message(b'"id":1,"error":{"code":1,"message":"x"}'), "response"),
    case("error without a known id", message(b'"id":null,"error":{"code":1,"message":"x"}'), "response"),
    case("unknown members", message(b'"id":1,"method":"a","x-y":[1,{"z":null}]'), "request"),
    case("blanks everywhere", b' \t\r\n{ "jsonrpc" :\n"2.0" , "id":\t1\r,"method" : "a" }\n ', "request"),
    case("escapes in names", b'{"json\\u0072pc":"2.0","\\u0069d":1,"meth\\u006fd":"a"}', "request"),
    case("integer of 5,000 digits", message(b'"id":1,"method":"a","params":{"n":' + LONG + b"}"), "request"),
    case("1e400", message(b'"id":1,"method":"a","params":{"n":1e400}'), "request"),
    case("half of a pair", message(b'"id":1,"method":"a","params":{"n":"\\ud800"}'), "request"),
    case("same name in different objects", message(b'"id":1,"method":"a","params":{"id":1,"method":"b"}'), "request"),

    case("nothing", b"", -32700),
    case("blanks", b" \n", -32700),
    case("word", b"hello", -32700),
    case("cut off", b'{"jsonrpc":"2.0","id":1,"method":"a"', -32700),
    case("cut off in a string", b'{"jsonrpc":"2.0","id":1,"method":"a', -32700),
    case("text behind", message(b'"id":1,"method":"a"') + b"x", -32700),
    case("two messages", message(b'"id":1,"method":"a"') * 2, -32700),
    case("comma before }", message(b'"id":1,"method":"a",'), -32700),
    case("comma missing", message(b'"id":1 "method":"a"'), -32700),
    case("colon missing", message(b'"id" 1,"method":"a"'), -32700),
    case("single quotes", b"{'jsonrpc':'2.0'}", -32700),
    case("name without quotes", b'{jsonrpc:"2.0"}', -32700),
    case("comment", message(b'"id":1,/**/"method":"a"'), -32700),
    case("NaN", message(b'"id":1,"method":"a","params":{"n":NaN}'), -32700),
    case("Infinity", message(b'"id":1,"method":"a","params":{"n":Infinity}'), -32700),
    case("-Infinity", message(b'"id":1,"method":"a","x":-Infinity'), -32700),
    case("NaN for an id", message(b'"id":NaN,"method":"a"'), -32700),
    case("NaN alone", b"NaN", -32700),
    case("number 01", message(b'"id":01,"method":"a"'), -32700),
    case("number 1.", message(b'"id":1.,"method":"a"'), -32700),
    case("number +1", message(b'"id":+1,"method":"a"'), -32700),
    case("line end in a string", message(b'"id":1,"method":"a\nb"'), -32700),
    case("line end in a name", message(b'"id":1,"method":"a","x\ny":1'), -32700),
    case("NUL in a string", message(b'"id":1,"method":"a\0"'), -32700),
    case("unknown escape", message(b'"id":1,"method":"\\x61"'), -32700),
    case("not UTF-8", message(b'"id":1,"method":"\xff"'), -32700),
    case("half a character", message(b'"id":1,"method":"\xc3"'), -32700),
    case("overlong UTF-8", message(b'"id":1,"method":"\xc0\xaf"'), -32700),
    case("surrogate in UTF-8", message(b'"id":1,"method":"\xed\xa0\x80"'), -32700),
    case("UTF-16", '{"jsonrpc":"2.0","id":1,"method":"a"}'.encode("utf-16"), -32700),
    # RFC 8259 §4: names "SHOULD be unique"; where they are not, "behavior is unpredictable".
    case("two ids", message(b'"id":1,"id":1,"method":"a"'), -32700),
    case("two ids, one in disguise", message(b'"id":1,"\\u0069d":2,"method":"a"'), -32700),
    case("two methods", message(b'"id":1,"method":"a","meth\\u006Fd":"b"'), -32700),
    case("two unknown members", message(b'"id":1,"method":"a","x":1,"x":2'), -32700),
    case("two names of a tool", message(b'"id":1,"method":"tools/call","params":{"name":"a","nam\\u0065":1}'), -32700),
    case("two tokens",
         message(b'"id":1,"method":"a","params":{"_meta":{"progressToken":1,"progressToken":2}}'), -32700),
    # RFC 8259 §9: "An implementation may set limits on the maximum depth of nesting."
    case("deep array", message(b'"id":1,"method":"a","params":{"x":' + b"[" * DEEP + b"]" * DEEP + b"}"), -32700),
    case("deep object", message(b'"id":1,"method":"a","x":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP), -32700),
    case("deep id", message(b'"id":' + b"[" * DEEP + b"]" * DEEP + b',"method":"a"'), -32700),
    case("deep array that does not end", b"[" * DEEP, -32700),
    case("deep object that does not end", b'{"params":' * DEEP, -32700),

    case("number", b"1", -32600),
    case("string", b'"x"', -32600),
    case("null", b"null", -32600),
    case("batch", b"[" + message(b'"id":1,"method":"a"') + b"]", -32600),
    case("empty batch", b"[]", -32600),
    case("batch with an integer of 5,000 digits", b"[" + LONG + b"]", -32600),
    case("integer of 5,000 digits alone", LONG, -32600),
    case("empty object", b"{}", -32600),
    case("no version", b'{"id":1,"method":"a"}', -32600),
    case("version 1.0", b'{"jsonrpc":"1.0","id":1,"method":"a"}', -32600),
    case("version is a number", b'{"jsonrpc":2.0,"id":1,"method":"a"}', -32600),
    case("version is null", b'{"jsonrpc":null,"id":1,"method":"a"}', -32600),
    case("only an id", message(b'"id":1'), -32600),
    case("only a version", b'{"jsonrpc":"2.0"}', -32600),
    case("method is a number", message(b'"id":1,"method":1'), -32600),
    case("method is null", message(b'"id":1,"method":null'), -32600),
    case("method is null in a notification", message(b'"method":null'), -32600),
    case("Method", message(b'"id":1,"Method":"a"'), -32600),
    case("id is null", message(b'"id":null,"method":"a"'), -32600),
    case("id is true", message(b'"id":true,"method":"a"'), -32600),
    case("id is false", message(b'"id":false,"method":"a"'), -32600),
    case("id is 1.5", message(b'"id":1.5,"method":"a"'), -32600),
    case("id is 1e400", message(b'"id":1e400,"method":"a"'), -32600),
    case("id is an object", message(b'"id":{},"method":"a"'), -32600),
    case("id is an array", message(b'"id":[1],"method":"a"'), -32600),
    case("request and result", message(b'"id":1,"method":"a","result":{}'), -32600),
    case("request and error", message(b'"id":1,"method":"a","error":{}'), -32600),
    case("result and error", message(b'"id":1,"result":{},"error":{}'), -32600),
    case("result without id", message(b'"result":{}'), -32600),
    case("result with id null", message(b'"id":null,"result":{}'), -32600),
    case("error is a string", message(b'"id":1,"error":"x"'), -32600),
    case("error is null", message(b'"id":1,"error":null'), -32600),

    case("params is an array", message(b'"id":1,"method":"a","params":[1]'), -32602),
    case("params is null", message(b'"id":1,"method":"a","params":null'), -32602),
    case("params is a string", message(b'"id":1,"method":"a","params":"x"'), -32602),
    case("params of a notification", message(b'"method":"a","params":[]'), -32602),
    case("tool without name", message(b'"id":1,"method":"tools/call","params":{}'), -32602),
    case("tool without params", message(b'"id":1,"method":"tools/call"'), -32602),
    case("tool's name is a number", message(b'"id":1,"method":"tools/call","params":{"name":1}'), -32602),
    case("prompt without name", message(b'"id":1,"method":"prompts/get","params":{"uri":"x"}'), -32602),
    case("resource without uri", message(b'"id":1,"method":"resources/read","params":{"name":"x"}'), -32602),
    case("subscription without uri", message(b'"id":1,"method":"resources/subscribe","params":{}'), -32602),
    case("end of a subscription without uri", message(b'"id":1,"method":"resources/unsubscribe","params":{}'), -32602),
])
def test_json_message_is(body, expected):
    assert verdict(body) == expected


def parse(text):
    return mcpproxy.parse_message(text)


VALUES = ["1.0", "1e400", "-0", "1E+2", "12345678901234567890", "9" * 5_000, '"\\u00e9\\/"', '"\xe9\u2028"', "[ ]",
          '{"b":1,"a":2}', '{"a":1,"a":2}', "null", '"\\ud800"']


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:20])
def test_json_unknown_members_pass_as_they_were_written(value):
    text = f'{{"x":{value},"jsonrpc":"2.0","id":1,"method":"a","params":{{"y": {value} }},"z":{value}}}'
    assert b"".join(parse(text).payload) == text.encode()
    assert b"".join(parse(text).with_id(b'"new"')) == text.replace('"id":1', '"id":"new"').encode()


@pytest.mark.parametrize("text", [
    '{"id":%s,"jsonrpc":"2.0","method":"a"}', '{"jsonrpc":"2.0","method":"a","id" : %s }',
    '{"jsonrpc":"2.0","params":{"id":1},"id":%s,"method":"a"}', '{"jsonrpc":"2.0","\\u0069d":%s,"method":"a"}'])
@pytest.mark.parametrize("old", ["1", "1.0", "10e-1", '"a\\"b"', '"\xe9"', "12345678901234567890"])
def test_json_id_is_replaced_and_nothing_else(text, old):
    request = parse(text % old)
    assert request.raw_id == old.encode()
    assert b"".join(request.with_id(b"7")) == (text % "7").encode()


def test_json_line_ends_between_tokens_are_taken_out():
    text = '{\r\n  "jsonrpc": "2.0",\n  "id": 1,\r  "method": "a\\nb",\n"params":\n{"x": "\u2028"}\n}\n'
    line = b"".join(parse(text).payload)
    assert b"\n" not in line and b"\r" not in line
    assert json.loads(line) == json.loads(text)


def test_json_several_changes_are_made_at_once():
    request = parse('{"jsonrpc":"2.0","id":1,"method":"a","params":{"_meta":{"progressToken":"t"}}}')
    changes = [(*request.meta["progressToken"][1:], "22"), (*request.members["id"][1:], "333")]
    line = request.changed(changes)
    assert line == b'{"jsonrpc":"2.0","id":333,"method":"a","params":{"_meta":{"progressToken":22}}}'


@pytest.mark.parametrize("line, expected", [
    case("compact", b'{"jsonrpc":"2.0","id":5,"result":{}}', 5),
    case("as Python writes it", b'{"jsonrpc": "2.0", "id": 5, "result": {"a": 1}}', 5),
    case("error", b'{"jsonrpc":"2.0","id":5,"error":{"code":1,"message":"x"}}', 5),
    case("id at the tail", b'{"result":{"content":[]},"jsonrpc":"2.0","id":5}', 5),
    case("id at the tail, with blanks", b'{"result": {"content": []}, "jsonrpc": "2.0", "id": 5}', 5),
    case("id before the version", b'{"result":{},"id":5,"jsonrpc":"2.0"}', 5),
    case("error with its id at the tail", b'{"error":{"code":1,"message":"x"},"jsonrpc":"2.0","id":5}', 5),
    case("largest id", b'{"jsonrpc":"2.0","id":999999999999999999,"result":{}}', 999999999999999999),
    case("another id in the payload", b'{"jsonrpc":"2.0","id":5,"result":{"jsonrpc":"2.0","id":6}}', 5),
    case("another id in the payload before", b'{"result":{"jsonrpc":"2.0","id":6},"jsonrpc":"2.0","id":5}', 5),
    case("another id in a string",
         b'{"result":{"a":", \\"jsonrpc\\":\\"2.0\\",\\"id\\":6}"},"jsonrpc":"2.0","id":5}', 5),
    case("the only id is in the payload", b'{"result":{"jsonrpc":"2.0","id":6}}', None),
    case("the only id is in a string", b'{"result":", \\"jsonrpc\\":\\"2.0\\",\\"id\\":6}"}', None),
    case("request", b'{"jsonrpc":"2.0","id":5,"method":"ping"}', None),
    case("notification", b'{"jsonrpc":"2.0","method":"a","params":{"id":5}}', None),
    case("id is a string", b'{"jsonrpc":"2.0","id":"5","result":{}}', None),
    case("id is negative", b'{"jsonrpc":"2.0","id":-5,"result":{}}', None),
    case("id is 5.0", b'{"jsonrpc":"2.0","id":5.0,"result":{}}', None),
    case("id of 19 digits", b'{"jsonrpc":"2.0","id":1000000000000000000,"result":{}}', None),
    case("cut off", b'{"jsonrpc":"2.0","id":5,"result":{"a":"b', None),
    case("text behind", b'{"jsonrpc":"2.0","id":5,"result":{}} x', None),
    case("array", b'[{"jsonrpc":"2.0","id":5,"result":{}}]', None),
    case("nothing", b"", None),
])
def test_json_answer_is_found(line, expected):
    answer = mcpproxy.find_answer(line)
    assert (answer and answer.id) == expected
    if answer:
        assert line[answer.start:answer.end] == b"%d" % expected
        assert b"".join(answer.with_id(b'"x"')) == line[:answer.start] + b'"x"' + line[answer.end:]


@pytest.mark.parametrize("line", [
    case("id at the head", b'{"jsonrpc":"2.0","id":5,"result":{"a":\r1}}'),
    case("id at the tail", b'{"result":{"a":\r1},"jsonrpc":"2.0","id":5}'),
    case("at the end", b'{"jsonrpc":"2.0","id":5,"result":{}}\r'),
])
def test_json_answer_with_a_carriage_return_stays_one_event(line):
    # In an event stream CR ends a line, so it would cut the event in two.
    answer = mcpproxy.find_answer(line) or mcpproxy.parse_message(line.decode())
    assert b"\r" not in b"".join(answer.with_id(b"1"))


@pytest.mark.parametrize("form", ['{"jsonrpc":"2.0","id":5,"result":"%s"}', '{"result":"%s","jsonrpc":"2.0","id":5}'])
@pytest.mark.parametrize("size", [10, 65_000, 66_000, 1_000_000])
def test_json_answer_of_any_size_gets_the_client_id_back(form, size):
    line = (form % ("x" * size)).encode()
    assert b"".join(mcpproxy.find_answer(line).with_id(b'"client"')) == line.replace(b'"id":5', b'"id":"client"')


@pytest.mark.parametrize("text, expected", [
    ("[]", []), (" [ ] ", []), ('[{"a":1}]', ['{"a":1}']),
    ('[ {"a":1.0} ,\n[2, 3],"]" ]', ['{"a":1.0}', "[2, 3]", '"]"']),
    case("5,000 digits", f'[{{"a":{"9" * 5000}}}]', [f'{{"a":{"9" * 5000}}}'])])
def test_json_batch_is_split(text, expected):
    assert mcpproxy.split_batch(text) == expected


@pytest.mark.parametrize("text", ["", "[", "]", "[1", "[1,", "[1,]", "[,1]", "[1 2]", "[1]]", "[1]x", "[NaN]", "{}",
                                  "1", case("deep", "[" * DEEP), case("deep element", "[1," + "[" * DEEP)])
def test_json_batch_that_is_none_is_refused(text):
    with pytest.raises(RPCError) as error:
        mcpproxy.split_batch(text)
    assert error.value.code == -32700


def test_json_own_messages_are_one_line():
    assert mcpproxy.encode_request(1, "a", {"x": "\n"}) == b'{"jsonrpc":"2.0","id":1,"method":"a","params":{"x":"\\n"}}'
    assert mcpproxy.encode_request(None, "a") == b'{"jsonrpc":"2.0","method":"a"}'
    assert mcpproxy.encode_result(b'"x"') == [b'{"jsonrpc":"2.0","id":"x","result":{}}']


def test_json_error_carries_its_data():
    error = mcpproxy.ServerError("gone", data={"exitCode": 1})
    assert json.loads(mcpproxy.encode_error(b"7", error)[0]) == {
        "jsonrpc": "2.0", "id": 7, "error": {"code": -32000, "message": "gone", "data": {"exitCode": 1}}}


SEEDS_JSON = [message(b'"id":1,"method":"tools/call","params":{"name":"a","_meta":{"progressToken":1.0},"x":{}}'),
              message(b'"method":"notifications/progress","params":{"progressToken":1,"progress":0.5}'),
              b'{"result":{"content":[{"type":"text","text":"\\u00e9"}]},"jsonrpc":"2.0","id":5}',
              b"[" + message(b'"id":5,"error":{"code":-32601,"message":"x"}') + b",{}]"]
PIECES_JSON = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u00", b"1e999", b"-", b"NaN", b"null", b"true",
               b"{}", b"[]", b'"id":', b'"method":', b'"params":', b'"_meta":', b'"result":', b'"jsonrpc":"2.0"',
               b"\xff", b"\n", b"[" * 3000]


def test_json_any_bytes_are_a_message_or_refused():
    for _, data in mutations(SEEDS_JSON, PIECES_JSON):
        with contextlib.suppress(ProxyError):
            parsed = mcpproxy.parse_message(mcpproxy.decode_json(data))
            mcpproxy.check_parameters(parsed)
            line = b"".join(parsed.payload)
            assert json.loads(line) == json.loads(data) and b"\n" not in line, data
        with contextlib.suppress(ProxyError):
            mcpproxy.split_batch(mcpproxy.decode_json(data))


# ============================================================================
# 7. Protocol eras
# ============================================================================

@pytest.mark.parametrize("requested, expected", [
    *[(version, version) for version in ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")],
    ("2026-07-28", "2025-11-25"), ("1.0", "2025-11-25"), ("", "2025-11-25"), (None, "2025-11-25"), (1, "2025-11-25"),
    ([], "2025-11-25"), ({}, "2025-11-25")])
def test_protocol_version_is_negotiated(requested, expected):
    assert mcpproxy.negotiate(requested) == expected


@pytest.mark.parametrize("capabilities, method, params, missing", [
    ({}, "sampling/createMessage", {}, {"sampling": {}}),
    ({"sampling": {}}, "sampling/createMessage", {}, None),
    ({"sampling": {}}, "sampling/createMessage", {"tools": []}, {"sampling": {"tools": {}}}),
    ({"sampling": {"tools": {}}}, "sampling/createMessage", {"tools": []}, None),
    ({"sampling": True}, "sampling/createMessage", {}, {"sampling": {}}),
    ({}, "elicitation/create", {}, {"elicitation": {"form": {}}}),
    ({"elicitation": {}}, "elicitation/create", {}, None),
    ({"elicitation": {}}, "elicitation/create", {"mode": "form"}, None),
    ({"elicitation": {}}, "elicitation/create", {"mode": "url"}, {"elicitation": {"url": {}}}),
    ({"elicitation": {"url": {}}}, "elicitation/create", {"mode": "url"}, None),
    ({"elicitation": {"url": {}}}, "elicitation/create", {}, {"elicitation": {"form": {}}}),
    ({}, "roots/list", {}, {"roots": {}}),
    ({"roots": {"listChanged": True}}, "roots/list", {}, None),
    ({}, "ping", {}, None),
    ({}, "custom/method", {}, None)])
def test_protocol_capability_that_is_missing_is_named(capabilities, method, params, missing):
    assert mcpproxy.missing_capabilities(capabilities, method, params) == missing


# ============================================================================
# 8. Access
# ============================================================================

def head(target="/sse", *lines):
    return mcpproxy.parse_head("\r\n".join([f"GET {target} HTTP/1.1", "Host: a", *lines]).encode())


@pytest.mark.parametrize("given, expected", [
    case("none", head(), None),
    case("bearer", head("/sse", "Authorization: Bearer secret"), "secret"),
    case("bearer in small letters", head("/sse", "authorization: bearer  secret"), "secret"),     # RFC 9110 §11.1
    case("header", head("/sse", "X-API-Key: secret"), "secret"),
    case("query", head("/sse?auth_key=s%26t"), "s&t"),
    case("bearer in UTF-8", head("/sse", "Authorization: Bearer \xfc"), "\xfc"),
    case("header in UTF-8", head("/sse", "X-API-Key: \xfc"), "\xfc"),
    case("bearer beats query", head("/sse?auth_key=a", "Authorization: Bearer b"), "b"),
    case("other scheme", head("/sse?auth_key=a", "Authorization: Basic b"), "a"),
    case("bearer of nothing", head("/sse", "Authorization: Bearer"), ""),
])
def test_access_key_is_given_by(given, expected):
    assert mcpproxy.given_key(given) == expected


@pytest.mark.parametrize("key, expected", [
    ("one", True), ("two", True), ("\xfc", True), ("", False), ("on", False), ("one ", False), ("One", False),
    ("one,two", False), ("\ud800", False)])
def test_access_key_is_known(key, expected):
    assert mcpproxy.is_known_key(key, ("one", "two", "\xfc")) is expected


@pytest.mark.parametrize("name", """
    PATH LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT DYLD_INSERT_LIBRARIES PYTHONPATH PYTHONSTARTUP PYTHONHOME PYTHONINSPECT
    NODE_OPTIONS NODE_PATH NPM_CONFIG_REGISTRY npm_config_registry NPM_CONFIG_PREFIX UV_INDEX_URL UV_PYTHON
    PIP_INDEX_URL PIP_EXTRA_INDEX_URL BASH_ENV ENV SHELLOPTS PS4 IFS JAVA_TOOL_OPTIONS _JAVA_OPTIONS JDK_JAVA_OPTIONS
    CLASSPATH RUBYOPT RUBYLIB PERL5OPT PERL5LIB PHPRC LUA_PATH R_PROFILE_USER JULIA_LOAD_PATH GOFLAGS GOPROXY
    RUSTC_WRAPPER RUSTFLAGS CARGO_HOME DENO_DIR BUN_INSTALL YARN_REGISTRY YARN_RC_FILENAME COREPACK_NPM_REGISTRY
    DOTNET_STARTUP_HOOKS CORECLR_PROFILER_PATH GIT_SSH_COMMAND GIT_CONFIG_GLOBAL GIT_EXEC_PATH GIT_ASKPASS SSH_ASKPASS
    HOME XDG_CONFIG_HOME EDITOR PAGER HTTP_PROXY HTTPS_PROXY ALL_PROXY SSL_CERT_FILE OPENSSL_CONF GCONV_PATH
    NODE_EXTRA_CA_CERTS NODE_TLS_REJECT_UNAUTHORIZED DOCKER_HOST GLIBC_TUNABLES VIRTUAL_ENV CONDA_PREFIX
    """.split())
def test_access_variable_that_loads_code_may_not_be_set(name):
    assert not mcpproxy.may_set(name, "")
    assert not mcpproxy.may_set(name.lower(), "") and not mcpproxy.may_set(name.upper(), "")


@pytest.mark.parametrize("name", """
    GITHUB_TOKEN GITHUB_PERSONAL_ACCESS_TOKEN GOOGLE_API_KEY GOOGLE_APPLICATION_CREDENTIALS API_KEY OPENAI_API_KEY
    NODE_ENV USER LANG TZ DEBUG DATABASE_URL POSTGRES_PASSWORD AWS_ACCESS_KEY_ID AWS_REGION SLACK_TEAM_ID WORKPATH PATHS
    LOG_LEVEL GIT_TOKEN GITLAB_API_URL GOOGLE_MAPS_KEY ENVIRONMENT HOMEPAGE PIPELINE_ID UVICORN_PORT JAVA_VERSION
    a _x X1
    """.split())
def test_access_variable_of_a_server_may_be_set(name):
    assert mcpproxy.may_set(name, "")


@pytest.mark.parametrize("allowed, name, expected", [
    ("API_KEY", "API_KEY", True), ("API_KEY", "OTHER", False), ("API_KEY", "API_KEYS", False),
    ("API_KEY", "api_key", False), ("A, B ,C", "B", True), ("API_*", "API_", True), ("API_*", "API_X", True),
    ("API_*", "XAPI_X", False),
    ("*_TOKEN", "GITHUB_TOKEN", True), ("*", "ANYTHING", True), ("PATH", "PATH", True), ("LD_*", "LD_PRELOAD", True),
    ("", "MCPPROXY_TAG", False), ("*", "MCPPROXY_TAG", False), ("MCPPROXY_TAG", "MCPPROXY_TAG", False),
    ("A.C", "ABC", False), ("A?", "AB", False), ("[A]", "A", False), (" , ", "PATH", False), (" , ", "API_KEY", True)])
def test_access_allowed_env_names_what_may_be_set(allowed, name, expected):
    assert mcpproxy.may_set(name, allowed) is expected


@pytest.mark.parametrize("given, expected", [
    case("none", head("/sse?auth_key=k&session_id=s&server=x"), {}),
    case("query", head("/sse?API_KEY=a%20b&X="), {"API_KEY": "a b", "X": ""}),
    case("header", head("/sse", "X-MCP-Env: API_KEY=a=b"), {"API_KEY": "a=b"}),
    case("two headers", head("/sse", "X-MCP-Env: A=1", "X-MCP-Env: B=2, 3"), {"A": "1", "B": "2, 3"}),
    case("both", head("/sse?A=1", "X-MCP-Env: B=2"), {"A": "1", "B": "2"}),
    case("the same twice", head("/sse?A=1", "X-MCP-Env: A=1"), {"A": "1"}),
    case("header in UTF-8", head("/sse", "X-MCP-Env: A=\xfc"), {"A": "\xfc"}),
])
def test_access_variables_are_set_by(given, expected):
    assert mcpproxy.client_variables(given, "") == expected


@pytest.mark.parametrize("given", [
    case("forbidden", head("/sse?PATH=x")),
    case("forbidden in a header", head("/sse", "X-MCP-Env: ld_preload=x")),
    case("two values", head("/sse?A=1&A=2")),
    case("two values in two ways", head("/sse?A=1", "X-MCP-Env: A=2")),
    case("no =", head("/sse", "X-MCP-Env: A")),
    case("no name", head("/sse?=x")),
    case("digit first", head("/sse?1A=x")),
    case("dash in the name", head("/sse?a-b=x")),
    case("= in the name", head("/sse?A%3DB=x")),
    case("not ASCII", head("/sse?%C3%A9=x")),
    case("long name", head(f"/sse?{'A' * 200}=x")),
])
def test_access_variables_are_refused(given):
    with pytest.raises(RPCError) as error:
        mcpproxy.client_variables(given, "")
    assert (error.value.http_status, error.value.code) == (400, -32602)


def test_access_refusal_does_not_repeat_the_value():
    with pytest.raises(RPCError) as error:
        mcpproxy.client_variables(head("/sse?PATH=hunter2"), "")
    assert "hunter2" not in str(error.value) and "PATH" in str(error.value)


# ============================================================================
# 9. Logs
# ============================================================================

@contextlib.contextmanager
def a_pipe():
    read, write = os.pipe()
    try:
        yield read, write
    finally:
        for descriptor in (read, write):
            with contextlib.suppress(OSError):
                os.close(descriptor)


def fill(write):
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"x" * 4096)
    os.set_blocking(write, True)


def record(text):
    return logging.makeLogRecord({"msg": text, "levelname": "INFO"})


def test_log_lines_are_written():
    with a_pipe() as (read, write):
        handler = mcpproxy.LineHandler(write)
        handler.emit(record("hello"))
        assert re.fullmatch(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO    hello\n", os.read(read, 4096))
        assert handler.dropped == 0


def test_log_lines_of_one_turn_are_written_together_and_in_order():
    async def turn(handler):
        for number in range(3):
            handler.emit(record(f"line {number}"))
        await asyncio.sleep(0)

    with a_pipe() as (read, write):
        asyncio.run(turn(mcpproxy.LineHandler(write)))
        assert re.findall(rb"line \d", os.read(read, 4096)) == [b"line 0", b"line 1", b"line 2"]


@pytest.mark.parametrize("room", [0, 4096], ids=["no room", "room for a page"])
@pytest.mark.parametrize("text", ["x", "x" * 10_000, "\u20ac" * 10_000, "\U0001f600" * 10_000],
                         ids=["short", "ASCII", "euros", "faces"])
def test_log_never_waits_for_a_reader(text, room):
    with a_pipe() as (read, write):
        handler = mcpproxy.LineHandler(write)
        fill(write)
        os.read(read, room)
        writer = threading.Thread(target=lambda: [handler.emit(record(text)) for _ in range(5)])
        writer.start()
        writer.join(2)
        is_stuck = writer.is_alive()
        os.set_blocking(read, False)
        while writer.is_alive():
            with contextlib.suppress(BlockingIOError):
                os.read(read, 65536)
        assert not is_stuck
        assert handler.dropped


def test_log_goes_on_when_there_is_a_reader_again():
    with a_pipe() as (read, write):
        handler = mcpproxy.LineHandler(write)
        fill(write)
        handler.emit(record("lost"))
        os.read(read, 1_000_000)
        handler.emit(record("found"))
        assert b"found" in os.read(read, 4096) and handler.dropped == 1


@pytest.mark.parametrize("end", [0, 1], ids=["reader", "writer"])
def test_log_survives_a_closed_descriptor(end):
    with a_pipe() as pipe:
        handler = mcpproxy.LineHandler(pipe[1])
        os.close(pipe[end])
        handler.emit(record("lost"))
        assert handler.dropped == 1


def test_log_line_is_cut_before_it_is_too_long():
    with a_pipe() as (read, write):
        mcpproxy.LineHandler(write).emit(record("x" * 100_000))
        line = os.read(read, 100_000)
        assert len(line) <= 4096 and line.endswith(b"x\n")


@pytest.mark.parametrize("method", ["a\n2026-01-01 00:00:00.000 INFO    = forged", "a\rforged", "a\x1b[2Jforged"],
                         ids=["LF", "CR", "escape"])
def test_log_line_cannot_be_forged_by_a_client(fake, method):
    at = len(fake.log())
    with SSEClient(fake) as client:
        client.call(method)
        client.post(notification(method))
    log = until(lambda: fake.log()[at:] if fake.log()[at:].count("forged") >= 2 else "", "the lines")
    assert not [line for line in re.split("[\n\r\x1b]", log) if "forged" in line and not re.search("[<>] ", line)]


# ============================================================================
# 10. Server process
# ============================================================================

def split(pieces, limit):
    """The lines in pieces of bytes, and the (head, tail) pairs of those over the limit, in their order."""
    found = []
    splitter = mcpproxy.LineSplitter(limit, found.append, lambda *ends: found.append(ends))
    for piece in pieces:
        splitter.feed(piece)
    return found


def cuts(data):
    """All ways to cut bytes into pieces."""
    for places in itertools.product((False, True), repeat=len(data) - 1):
        at = [0, *(place for place, is_cut in enumerate(places, 1) if is_cut), len(data)]
        yield [data[start:end] for start, end in itertools.pairwise(at)]


def test_process_lines_are_the_same_however_they_are_cut():
    for pieces in cuts(b"ab\n\nc\r\nde\nf"):
        assert split(pieces, 100) == [b"ab", b"", b"c\r", b"de"], pieces


def test_process_line_over_the_limit_is_the_same_however_it_is_cut():
    for pieces in cuts(b"ab\nabcd\nabc\nx\n"):
        assert split(pieces, 3) == [b"ab", (b"abcd", b"abcd"), b"abc", b"x"], pieces


@pytest.mark.parametrize("size", [1, 1000, 1500, 5000, 50_000])
def test_process_line_over_the_limit_reports_its_ends(size):
    line = bytes(number % 240 + 11 for number in range(20_000)).replace(b"\n", b"x")
    data = b"a\n" + line + b"\nb\n"
    assert split([data[at:at + size] for at in range(0, len(data), size)], 10_000) == [
        b"a", (line[:1024], line[-1024:]), b"b"]


def test_process_endless_line_is_not_kept():
    found = []
    splitter = mcpproxy.LineSplitter(1000, found.append, lambda head, tail: found.append(len(head) + len(tail)))
    for _ in range(1000):
        splitter.feed(b"x" * 1000)
    assert sum(map(len, splitter._parts)) <= 4096
    splitter.feed(b"\n")
    assert found == [2048]


# ============================================================================
# 11. Server connection
# ============================================================================

@pytest.mark.parametrize("line", [
    case("junk", "hello"),
    case("empty", ""),
    case("blanks", " \t "),
    case("cut off", '{"jsonrpc":"2.0","method":'),
    case("number", "5"),
    case("empty batch", "[]"),
    case("batch of junk", '[1,"x",[],{}]'),
    case("batch that is none", "[1"),
    case("answer that nobody wants", '{"jsonrpc":"2.0","id":999999,"result":{}}'),
    case("answer with a strange id", '{"jsonrpc":"2.0","id":"x","result":{}}'),
    case("answer with an impossible id", '{"jsonrpc":"2.0","id":[1],"result":{}}'),
    case("error without an id", '{"jsonrpc":"2.0","id":null,"error":{"code":1,"message":"x"}}'),
    case("progress of nothing", '{"jsonrpc":"2.0","method":"notifications/progress"}'),
    case("progress of an array", '{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":[1]}}'),
    case("progress of an object", '{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":{}}}'),
    case("cancelled without an id", '{"jsonrpc":"2.0","method":"notifications/cancelled"}'),
    case("cancelled array", '{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":[1]}}'),
    case("update of an array", '{"jsonrpc":"2.0","method":"notifications/resources/updated","params":{"uri":[1]}}'),
    case("update of nothing", '{"jsonrpc":"2.0","method":"notifications/resources/updated"}'),
    case("level is an array", '{"jsonrpc":"2.0","method":"notifications/message","params":{"level":[1],"data":1}}'),
    case("level is unknown", '{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"loud"}}'),
    case("_meta is an array", '{"jsonrpc":"2.0","method":"notifications/message","params":{"_meta":[1]}}'),
    case("subscription is an array", '{"jsonrpc":"2.0","method":"notifications/tools/list_changed","params":'
         '{"_meta":{"io.modelcontextprotocol/subscriptionId":[1]}}}'),
    case("request with a strange id", '{"jsonrpc":"2.0","id":{},"method":"ping"}'),
    case("deep", "[" * 100_000),
    case("5,000 digits", '{"jsonrpc":"2.0","id":' + "9" * 5000 + ',"result":{}}'),
])
def test_connection_survives_what_a_server_writes(fake, line):
    at = len(fake.log())
    with SSEClient(fake) as client:
        pid = client.tool("pid")
        assert client.tool("raw", line=line) == "written"
        assert client.tool("pid") == pid, "the server was started again"
    assert "Traceback" not in fake.log()[at:]


def test_connection_survives_any_line(caplog):
    async def read():
        guard = mcpproxy.Guard()
        connection = mcpproxy.ServerConnection("x", guard, limit=2000, secrets=(), on_request=lambda *_: None,
                                               on_notification=lambda *_: None)
        for chance, data in mutations(SEEDS_JSON, PIECES_JSON):
            connection.pending[5] = mcpproxy.PendingRequest()
            data += b"\n"
            at = chance.randrange(len(data))
            connection.process.pipe_data_received(1, data[:at])
            connection.process.pipe_data_received(1, data[at:])
        guard.close()

    caplog.set_level(logging.ERROR, "mcpproxy")
    asyncio.run(read())
    assert not caplog.records


# ============================================================================
# 14. HTTP connections
# ============================================================================

HEALTHZ = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


def is_healthy(proxy):
    return proxy.request("GET", "/healthz").status == 200


@ATTACKS
def test_connection_refusal_is_readable_and_ends_the_connection(demo, raw, status):
    with HTTP(demo) as http:
        http.send(raw)
        response = http.response()
        assert (response.status, response.json()["error"]["code"]) == (status, -32600)
        assert response.headers["connection"] == "close" and http.is_closed()
    assert is_healthy(demo)


def test_connection_what_is_behind_a_refused_request_is_not_answered(demo):
    with HTTP(demo) as http:
        http.send(HEALTHZ + b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" + HEALTHZ)
        assert [http.response().status, http.response().status] == [200, 400]
        assert http.is_closed()


def test_connection_refusal_is_readable_while_the_client_still_sends(demo):
    with HTTP(demo) as http:
        http.send(POST + b"Content-Length: 100000000\r\n\r\n")
        for _ in range(80):
            http.send(b"x" * 65536)
        assert http.response().error() == (413, -32600)
        assert http.is_closed()


def test_connection_stays_for_the_next_request(demo):
    with HTTP(demo) as http:
        for _ in range(3):
            response = http.request("GET", "/healthz")
            assert response.status == 200 and "connection" not in response.headers


def test_connection_pipelined_requests_are_answered_in_order(demo):
    with HTTP(demo) as http:
        http.send(HEALTHZ + encode_http("POST", "/tools/echo", {"text": "one"}) + encode_http("GET", "/nowhere"))
        one, two = http.response(), http.response()
        assert one.json() == {"status": "ok"} and two.json()["content"][0]["text"] == "one"
        assert http.response().status == 404


def test_connection_many_pipelined_requests_are_answered(demo):
    with HTTP(demo) as http:
        http.send(HEALTHZ * 500)
        assert {http.response().status for _ in range(500)} == {200}


BOTH_TYPES = {"Accept": "application/json, text/event-stream"}


def slow_call(proxy):
    """A request that takes a moment, in a new session."""
    session = proxy.request("POST", "/mcp", initialize(), BOTH_TYPES).headers["mcp-session-id"]
    headers = {**BOTH_TYPES, "Mcp-Session-Id": session}
    return encode_http("POST", "/mcp", tool_call(1, "slow", {"seconds": 0.2}), headers)


def test_connection_that_is_half_closed_gets_its_answer(demo):
    with HTTP(demo) as http:
        http.send(slow_call(demo))
        http.socket.shutdown(socket.SHUT_WR)
        assert "done" in text_of(http.response().json())
        assert http.is_closed()


def test_connection_that_is_half_closed_gets_all_its_answers(demo):
    with HTTP(demo) as http:
        http.send(HEALTHZ + slow_call(demo) + HEALTHZ)
        http.socket.shutdown(socket.SHUT_WR)
        assert [http.response().status for _ in range(3)] == [200] * 3
        assert http.is_closed()


def test_connection_request_may_come_byte_by_byte(demo):
    with HTTP(demo) as http:
        http.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"\r\n" + encode_http("POST", "/tools/echo", {"text": "hello"}):
            http.send(bytes([byte]))
        assert http.response().json()["content"][0]["text"] == "hello"


def test_connection_closes_when_asked_to(demo):
    with HTTP(demo) as http:
        response = http.request("GET", "/healthz", headers={"Connection": "close"})
        assert response.headers["connection"] == "close" and http.is_closed()


def test_connection_of_http_1_0_is_closed(demo):
    with HTTP(demo) as http:
        http.send(b"GET /healthz HTTP/1.0\r\n\r\n")
        assert http.response().json() == {"status": "ok"} and http.is_closed()


def test_connection_of_http_1_0_may_stay(demo):
    with HTTP(demo) as http:
        for _ in range(2):
            http.send(b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert http.response().headers["connection"] == "keep-alive"


def test_connection_of_http_1_0_gets_streams_without_chunks(demo):
    with HTTP(demo) as http:
        http.send(b"GET /sse HTTP/1.0\r\nAccept: text/event-stream\r\n\r\n")
        response = http.head()
        assert "transfer-encoding" not in response.headers and "content-length" not in response.headers
        assert http.file.readline() == b"event: endpoint\n"


def test_connection_client_that_waits_is_told_to_go_on(demo):
    with HTTP(demo) as http:
        body = b'{"text":"hello"}'
        http.send(encode_http("POST", "/tools/echo", b"", {"Content-Length": len(body), "Expect": "100-continue"}))
        assert http.file.readline() + http.file.readline() == b"HTTP/1.1 100 Continue\r\n\r\n"
        http.send(body)
        assert http.response().json()["content"][0]["text"] == "hello"


@pytest.mark.parametrize("path, length, status", [("/nowhere", 5, 404), ("/messages", 100_000_000, 413)])
def test_connection_client_that_waits_is_refused_without_its_body(demo, path, length, status):
    # RFC 9110 §10.1.1: a final status instead of 100, when it is known from the head.
    with HTTP(demo) as http:
        http.send(encode_http("POST", path, b"", {"Content-Length": length, "Expect": "100-continue"}))
        assert http.response().status == status


def test_connection_head_is_answered_without_a_body(demo):
    with HTTP(demo) as http:
        response = http.request("HEAD", "/healthz")
        assert response.status == 200 and int(response.headers["content-length"]) > 0
        assert http.request("GET", "/healthz").body


def test_connection_error_of_head_has_no_body_either(demo):
    # RFC 9110 §9.3.2: "The server MUST NOT send content in the response".
    with HTTP(demo) as http:
        response = http.request("HEAD", "/messages")
        assert response.status == 405 and "POST" in response.headers["allow"]
        assert http.is_closed()


def test_connection_response_has_a_date(demo):
    response = demo.request("GET", "/healthz")
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", response.headers["date"])      # RFC 9110 §5.6.7


@pytest.mark.parametrize("key", ["a%20b", "a&x=1", "%C3%A9", "a%26b", "<script>", "'\"", "a%2B%2F%3D"])
def test_connection_key_in_the_endpoint_event_is_escaped(demo, key):
    with HTTP(demo) as http:
        http.send(f"GET /sse?auth_key={key.partition('&')[0]} HTTP/1.1\r\nHost: a\r\n"
                  "Accept: text/event-stream\r\n\r\n".encode())
        stream = Events(http)
        until(lambda: stream.events, "the endpoint event")
        assert re.fullmatch(r"/messages\?session_id=\w+&auth_key=[\w.%~-]+", stream.events[0]["data"])
        stream.close()


@pytest.mark.parametrize("raw", [
    case("path", b"GET /a%20b%3Cscript%3E HTTP/1.1\r\nHost: a\r\n\r\n"),
    case("method", b"<script> / HTTP/1.1\r\nHost: a\r\n\r\n"),
    case("odd method", b"X'Y`Z / HTTP/1.1\r\nHost: a\r\n\r\n"),
    case("query", b"GET /messages?session_id=%22%7D%3Cscript%3E HTTP/1.1\r\nHost: a\r\n\r\n"),
    case("session id", b"GET /mcp HTTP/1.1\r\nHost: a\r\nMcp-Session-Id: \x85<script>\r\n\r\n"),
    case("version", b"POST /mcp HTTP/1.1\r\nHost: a\r\nMCP-Protocol-Version: <script>\r\nContent-Length: 0\r\n\r\n"),
    case("variable", b"GET /sse?script%3Cscript%3E=1 HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n"),
])
def test_connection_refusal_repeats_nothing_that_could_be_markup(demo, raw):
    with HTTP(demo) as http:
        http.send(raw)
        response = http.response()
        assert response.status >= 400 and b"<script>" not in response.body
        assert "script" not in str(response.headers)


# ============================================================================
# 18. Command line
# ============================================================================

def run_program(*arguments, **environment):
    """mcpproxy.py, run to its end."""
    return subprocess.run([sys.executable, PROXY, *arguments], env={"PATH": os.environ["PATH"], **environment},
                          capture_output=True, text=True, timeout=PATIENCE)


def assert_one_line(program, status):
    assert program.returncode == status and program.stdout == "", program
    assert program.stderr.count("\n") == 1 and program.stderr.startswith("mcpproxy: "), program.stderr


@pytest.mark.parametrize("arguments, environment, word", [
    case("unknown flag", ["--frobnicate"], {}, "--frobnicate"),
    case("flag without value", ["--port"], {}, "--port"),
    case("bad value", ["--port", "http"], {}, "PORT"),
    case("bad value in the environment", [], {"SHARED_SESSION": "maybe"}, "SHARED_SESSION"),
    case("nothing behind --", ["--"], {}, "--"),
    case("command not found", ["--", "no-such-command-here"], {}, "no-such-command-here"),
    case("line end in a flag", ["--a\nb"], {}, "--a"),
    case("line end in a value", ["--log-level", "a\nb"], {}, "LOG_LEVEL"),
])
def test_command_line_mistake_ends_the_program_with_one_line(arguments, environment, word):
    program = run_program(*arguments, **environment)
    assert_one_line(program, 2)
    assert word in program.stderr


def test_command_line_key_is_not_repeated_in_an_error():
    assert "hunter2" not in run_program("--auth-key", "hunter2", "--port", "x", AUTH_KEY="hunter2").stderr


def test_command_line_port_in_use_ends_the_program_with_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program = run_program("--host", "127.0.0.1", "--port", str(port))
        assert_one_line(program, 1)
        assert str(port) in program.stderr


@pytest.mark.parametrize("host", [
    case("unknown name", "no-such-host.invalid"),              # RFC 6761 §6.4
    case("no address", "300.1.1.1"),
    case("address of nobody", "192.0.2.1"),                    # RFC 5737
    case("label over 63 characters", "x" * 100),
])
def test_command_line_host_that_is_not_ours_ends_the_program_with_one_line(host):
    assert_one_line(run_program("--host", host, "--port", "0"), 1)


def test_command_line_version_is_shown():
    program = run_program("--version")
    assert (program.returncode, program.stdout, program.stderr) == (0, f"mcpproxy {mcpproxy.__version__}\n", "")


def test_command_line_help_lists_every_setting_with_its_default():
    program = run_program("--help")
    assert program.returncode == 0 and program.stderr == ""
    text = " ".join(program.stdout.split())
    for field in dataclasses.fields(Settings):
        flag = field.name.replace('_', '-')
        assert f"--{flag} VALUE {field.metadata['about']} (default: {default_of(field)})" in text


def test_command_line_server_stands_behind_the_dashes():
    proxy = Proxy(arguments=["--log-level", "WARNING", "--", *FAKE])
    try:
        with SSEClient(proxy) as client:
            assert client.tool("echo", text="hello") == "hello"
        assert " INFO " not in proxy.log()
    finally:
        assert proxy.stop() == 0


def test_command_line_program_runs_without_stderr():
    command = [sys.executable, PROXY, "--host", "127.0.0.1", "--port", "0"]
    program = subprocess.Popen(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, text=True)
    try:
        assert "http://127.0.0.1:" in "".join(itertools.islice(program.stdout, 2)), "it did not start"
        program.send_signal(signal.SIGTERM)
        assert program.wait(PATIENCE) == 0
    finally:
        program.kill()
        program.wait()
        program.stdout.close()


# ============================================================================
# The file itself
# ============================================================================

with open(PROXY) as file:
    SOURCE = file.read()
TREE = ast.parse(SOURCE)
BANNERS = re.findall(r"^# =+\n# (\d+)\. (.+)\n# =+$", SOURCE, re.MULTILINE)


STARTS = [SOURCE[:match.start()].count("\n") + 1 for match in re.finditer(r"^# \d+\. ", SOURCE, re.MULTILINE)]


def section_of(line):
    """The number of the section that a line stands in; 0 above the first."""
    return bisect.bisect(STARTS, line)


def test_file_sections_are_numbered_without_gaps():
    assert [int(number) for number, _ in BANNERS] == list(range(1, len(BANNERS) + 1))


def test_file_tests_have_the_banners_of_the_file():
    with open(test_mcpproxy.__file__) as file, open(__file__) as more:
        mine = re.findall(r"^# =+\n# (\d+)\. (.+)\n# =+$", file.read() + more.read(), re.MULTILINE)
    assert mine == [banner for banner in BANNERS if banner in mine]


def defined_in():
    """Top-level name -> number of the section that defines it."""
    sections = {}
    for node in TREE.body:
        names = [node.name] if hasattr(node, "name") else [
            name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)]
        for name in names:
            sections.setdefault(name, section_of(node.lineno))
    return sections


def globals_used(code):
    """(line, name) of every global name that code and the code within it looks up."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.positions.lineno, instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from globals_used(constant)


USED = set(globals_used(compile(SOURCE, PROXY, "exec")))


def test_file_sections_use_only_what_stands_above():
    sections = defined_in()
    assert not [f"line {line}, section {section_of(line)}: {name} of section {sections[name]}"
                for line, name in USED if section_of(line) < sections.get(name, 0)]


FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_file_functions_fit_on_a_screen():
    long = {node.name: size for node in FUNCTIONS if (size := node.end_lineno - node.lineno + 1) > 60}
    assert not long


def test_file_lines_are_at_most_120_wide():
    assert not [number for number, line in enumerate(SOURCE.split("\n"), 1) if len(line) > 120]


def test_file_needs_the_standard_library_only():
    imports = [node for node in ast.walk(TREE) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {getattr(node, "module", None) or alias.name for node in imports for alias in node.names}
    assert {module.partition(".")[0] for module in modules} <= sys.stdlib_module_names


def test_file_the_wire_touches_nothing_outside():
    outside = {"asyncio", "time", "os", "subprocess", "socket", "signal", "sys", "open", "threading", "log", "logging"}
    assert not [(line, name) for line, name in USED if name in outside and 0 < section_of(line) <= 8]


def readme_rows():
    """The rows that the README's table of settings should have."""
    for field in dataclasses.fields(Settings):
        default = default_of(field) if field.default == "" else f"`{default_of(field)}`"
        yield f"| `{field.name.upper()}` | {default} | {field.metadata['about']} |"


def test_file_readme_lists_the_settings():
    with open(os.path.join(HERE, "README.md")) as file:
        rows = re.findall(r"^\| `[A-Z_]+` \|.*\|$", file.read(), re.MULTILINE)
    assert rows == list(readme_rows())
