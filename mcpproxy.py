#!/usr/bin/env python3
"""mcpproxy - put any stdio MCP server on the network, in one file.

    $ python3 mcpproxy.py                                            # a built-in demo server
    $ python3 mcpproxy.py -- npx -y @modelcontextprotocol/server-everything
    $ MCP_SERVER_CONFIG="uvx mcp-server-fetch" SHARED_SESSION=false AUTH_KEY=secret python3 mcpproxy.py

It starts a program that speaks MCP on stdin and stdout and offers it over HTTP to many clients at once;
also several programs as one, and remote servers. Python 3.11+, standard library only. Copy it, read it, change it.

     clients                       mcpproxy                        MCP server
     of any revision -- HTTP, SSE --> (this file) -- stdin, stdout --> one for all, or one for each

Contents (list them with:  grep -nE '^# [0-9]+[.] ' mcpproxy.py)

    The wire: what the bytes mean. Nothing here opens a socket or reads a clock.
    1.  Vocabulary             names and numbers that appear on a wire
    2.  Errors                 what can go wrong, and what the client is told
    3.  Settings               every knob, with its default and its meaning
    4.  HTTP/1.1               bytes into requests, responses into bytes
    5.  Server-sent events     messages into events
    6.  JSON                   values found and changed in a text, without writing the rest anew
    7.  JSON-RPC               text into one valid message
    8.  Protocol eras          how a message of one era reads in the other
    9.  Results                the same for results; what a server says of itself; and ids of tasks
    10. Access                 who may come in, and what a client may set
    11. Tokens                 what an OAuth token says, and who has signed it
    12. Views                  which servers and tools a URL shows, and under which names
    13. Configuration file     the file of several servers, as desktop clients write it; and the file of keys

    The moving parts: what is alive while the proxy runs.
    14. Logs                   what happened, a line each
    15. Counters               how often it happened, and how long it took
    16. Shares                 who gives up what it holds when there is no more room
    17. Linux                  what it says of processes
    18. Processes              which server each belongs to, what it uses, and which could outlive it
    19. Confinement            what a process can forbid itself, for good
    20. Sandbox                what a server is kept from, and what it has for itself
    21. Links                  the way to a server and back: a process, and how it ends
    22. HTTP client            requests of ours, and the connections for them
    23. Issuer of tokens       who is asked what a token is worth
    24. Requests to remote servers          a message to a URL, and what comes back
    25. Remote servers         the other kind of link: a URL
    26. Pending requests       what waits for a server's response, and what may cause more than that
    27. Server connection      JSON-RPC over one link: handshakes, ids, responses
    28. Streams, questions and outlets      what goes to a client
    29. What servers send      questions and notifications, and whom they concern
    30. Subscriptions          what the proxy asks a server for once, for all clients that subscribe
    31. Listening              the one request by which a modern server is asked for it
    32. Lists                  what servers list, kept for all who ask
    33. Instances              links that are kept running
    34. Clients                who sends requests: sessions and visitors
    35. Servers and groups     what was configured: each server's instances, and which servers stand in for others
    36. Mounts                 what clients reach, at whatever URL, and what limits them
    37. Several servers as one              what all are asked, and which of them a request is for
    38. Bridges                what happens to a call between two eras
    39. Dialogues              what a server asks in the course of a call
    40. Records                what is kept of a call that is over
    41. Client requests        one request of a client, from its arrival to its end
    42. Exchanges              how that gets to a server, and what the server sends in answer
    43. Joint exchanges        requests that the proxy answers for its servers

    The program: what can be seen from outside.
    44. HTTP connections       one socket each
    45. HTTP server            the sockets that are listened on, and TLS
    46. Outlets                a call's messages into an HTTP reply
    47. Overview               the proxy for whoever operates it: health, metrics, what runs
    48. Admission              what the head of a request says: who, where to, what for
    49. OpenAPI                the tools as operations
    50. The application        what every request passes, and what anybody may ask
    51. Endpoints              what each method and path means
    52. Standard streams       the other way in: for one client, on stdin and stdout
    53. Demo server            a small MCP server to try things with
    54. The proxy              everything put together
    55. Command line           arguments and environment into a running proxy
    56. The page               the overview for people

Words

    message     one JSON-RPC object: a request, a notification or a response. In sections 1, 4, 10, 15, 22
                to 25 and 44 to 51 these words may mean HTTP's; our HTTP response to a client is a Reply
    client id   the id that the client chose for its request; it comes back exactly as it was written
    server id   the id that we chose for the server; an integer, unique for that link
    legacy      the revisions with an `initialize` handshake, up to 2025-11-25
    modern      2026-07-28, with metadata on every request
    link        lines to a server and lines from it, until it ends, once; through a process, or to a remote server
    connection  JSON-RPC over one link: handshake, ids, pending requests
    instance    a server kept running through one link after another, and set up anew for its clients
    server      one configured server: how its links are made, and its instances
    mount       what clients reach, at whatever URL: it has their sessions, their calls, and the limits
    view        what one URL shows of the servers: which of them, and the names of their tools there
    place       the <name> of /servers/<name>, where a server or group is reached by itself; None at other URLs
    joint       of several servers as one
    members     a view's or a group's servers; a client's, the one of each group that it stays with; of a Message
                and the like, what JSON calls an object's name/value pairs
    caller      who brings a key or a token; None: somebody without one
    principal   who is charged for what a request uses: its caller; without one, the address it comes from
    client      a session, known by its Mcp-Session-Id or ?session_id=, or on stdin; or a visitor, without one
    exchange    one request of a client at one instance, and all that is sent in answer to it; also: a call
    outlet      where the messages of an exchange go: into the reply to a POST, a session's stream, or stdout
    payload     an encoded message on its way out: a list of bytes that are written one after another
    holder      what has bytes in memory for a principal, counted in one budget; when that is full, it may have to
                give() them back

The life of a call

    1.  An HTTPConnection reads bytes and feeds them to the RequestParser until it has a whole request.
    2.  Before its body is read, the route is looked up and the guards look at its head; the first that objects
        raises an error.
    3.  The route's endpoint turns the body into a Message, or into several.
    4.  The session is found, or a visitor let in, and its view tells which server, and so which instance, this
        request is for.
    5.  An Exchange waits until the instance is ready. It restates the request in the server's era, under an
        id of ours, and hands the line to the ServerConnection.
    6.  The link writes the line to the server, and hands back the lines that come from it.
    7.  The connection finds the exchange that a line belongs to; other lines are what servers send unasked.
    8.  The exchange restates the response in the client's era, with the client's id, and ends: it leaves the
        lists of running calls, writes its line into the log, and passes its payload to its outlet.
    9.  The outlet writes it to the HTTP connection, as JSON or as an event of a stream.

Where to add something, with the section:
    a setting             a field of Settings (3)
    a legacy revision     LEGACY_VERSIONS (1)
    a filter of tools     Rules (12), which lists and calls both ask
    a metric              Counters (15), and for /metrics a row of Overview._families (47)
    a kind of link        a subclass of Link (21), as RemoteLink (25); made in Proxy._new_server (54)
    a notification        a row of NOTIFICATION_ROUTES (29)
    a choice of servers   pick() and find_targets() (37)
    a method              METHODS (1), to be counted by its name; where the eras say it differently, a row of a
                          Bridge's `intercepted` (38)
    a guard               a method of Application and its place in GUARDS (50)
    a URL                 a method of Endpoints and a row of ROUTES (51)
"""

import sys

if sys.version_info < (3, 11):
    sys.exit("mcpproxy needs Python 3.11 or newer; this is Python %d.%d" % sys.version_info[:2])

import base64
import contextlib
import dataclasses
import enum
import fnmatch
import functools
import itertools
import json
import re
import typing
from json.decoder import scanstring
from urllib.parse import SplitResult, quote, unquote, unquote_to_bytes, urljoin, urlsplit

__version__ = "1.0.0"

# Each part imports what it needs. What only some runs need is imported where it is needed.


# ============================================================================
# PART I. THE WIRE: what the bytes mean
# ============================================================================
#
# Nothing in this part opens a socket, reads a clock, looks at the environment
# or starts a process. Everything can be tried in a Python shell.


# ============================================================================
# 1. Vocabulary
# ============================================================================
#
# Names and numbers that appear on a wire, and limits of what is read from one, each defined once.

# The revisions with an `initialize` handshake, newest first.
LEGACY_VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")

BATCH_VERSION = "2025-03-26"         # the only one in which several messages may be sent as an array
PRIMING_VERSION = "2025-11-25"       # the only legacy one in which a stream begins with an id to resume it by

BOM = b"\xef\xbb\xbf"                # a byte order mark, which some put before UTF-8

# The revision with metadata on every request, and the names in its _meta.
MODERN_VERSION = "2026-07-28"
RESERVED_PREFIX = "io.modelcontextprotocol/"
VERSION_KEY = RESERVED_PREFIX + "protocolVersion"
CLIENT_INFO_KEY = RESERVED_PREFIX + "clientInfo"
CAPABILITIES_KEY = RESERVED_PREFIX + "clientCapabilities"
LOG_LEVEL_KEY = RESERVED_PREFIX + "logLevel"
SERVER_INFO_KEY = RESERVED_PREFIX + "serverInfo"
SUBSCRIPTION_KEY = RESERVED_PREFIX + "subscriptionId"
TASKS_EXTENSION = RESERVED_PREFIX + "tasks"          # its results have another shape than the tasks of 2025-11-25
RELATED_TASK_KEY = RESERVED_PREFIX + "related-task"

# What the proxy looks at in a message, its params and their _meta.
MEMBERS = frozenset("jsonrpc id method params result error".split())
PARAMETERS = frozenset("""_meta argument arguments capabilities clientInfo context cursor inputResponses level name
    notifications protocolVersion ref requestId requestState task taskId uri""".split())
META = frozenset(("progressToken", VERSION_KEY, CLIENT_INFO_KEY, CAPABILITIES_KEY, LOG_LEVEL_KEY, RELATED_TASK_KEY))

# The methods of requests that clients send, of all revisions and of the extensions Tasks and Skills.
METHODS = frozenset("""initialize server/discover ping tools/list tools/call prompts/list prompts/get resources/list
    resources/templates/list resources/read resources/subscribe resources/unsubscribe completion/complete
    logging/setLevel subscriptions/listen tasks/get tasks/result tasks/list tasks/cancel tasks/update skills/list
    skills/get""".split())

# JSON-RPC 2.0, section 5.1, and the code that MCP implementations use for a server that failed.
PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603
SERVER_FAILED = -32000

# MCP 2026-07-28, Overview, Error Codes.
HEADER_MISMATCH = -32020
MISSING_CAPABILITY = -32021
UNSUPPORTED_VERSION = -32022
# MCP 2025-11-25: Resources, Error Handling; Elicitation, URL Elicitation Required Error.
RESOURCE_NOT_FOUND = -32002
URL_ELICITATION_REQUIRED = -32042

RESOURCE_UPDATED = "notifications/resources/updated"
TASK_CHANGED = "notifications/tasks"                 # SEP-2663
JSON_TYPE = "application/json"
EVENT_STREAM_TYPE = "text/event-stream"
SESSION_ID_HEADER = "Mcp-Session-Id"
CHALLENGE_HEADER = "WWW-Authenticate"

# RFC 5424 severities, mildest first. MCP 2025-11-25, Logging, Log Levels.
LOG_LEVELS = ("debug", "info", "notice", "warning", "error", "critical", "alert", "emergency")

# What limits a request: its head (nginx takes 8 KiB a line and 32 KiB in all, node 16 KiB in all), and what is in it.
MAX_HEAD_BYTES = 32 * 1024
MAX_TARGET_BYTES = 8 * 1024
MAX_HEADERS = 100
MAX_INTRODUCTION = 64 * 1024         # bytes of what a client says of itself: capabilities, its info with icons
SMALL_INTRODUCTION = 4 * 1024        # characters; a message of no more is not checked for that
MAX_INTRODUCTION_VALUES = 1_000      # values in it: each takes far more memory than its text
MAX_URI = 2 * 1024                   # of a resource that is subscribed to, or compared to templates, in characters
MAX_TEMPLATE_PARTS = 24              # of a resource template
MAX_PARTS = 100                      # of a query, and of what Accept lists
MAX_BATCH = 1_000                    # messages in one array
MAX_CHUNK_LINE_BYTES = 4 * 1024      # a chunk's size with its extensions; a real one is 3 to 8 bytes
LINES_A_TURN = 2_000                 # of a chunked body, before others have their turn: each byte may take two lines
KNOWN_HEADS = 2_048                  # heads that are kept parsed; most clients send three, again and again
KNOWN_HEAD_BYTES = 1024              # the longest that is kept
KNOWN_HEAD_FIELDS = 32               # header lines of one that is kept: each takes 150 bytes beside its text

# What may wait for one client that does not read: enough for a burst, too little to hurt.
MAX_QUEUED_MESSAGES = 1_000
MAX_QUEUED_BYTES = 64 * 1024 * 1024

OTHER = "_OTHER"                     # OpenTelemetry's label for whatever has no label of its own

LARGEST_FLOAT = 1.7976931348623157e308

LARGE = 64 * 1024                    # bytes; to copy so many costs more than a system call


# ============================================================================
# 2. Errors
# ============================================================================
#
# What can go wrong, by who has to act: an HTTPError refuses the HTTP request, an
# RPCError the message in it, and a ServerError says that the MCP server failed.
# Each knows the HTTP status and the JSON-RPC code it becomes; *The application*
# and *Client requests* send it. Their texts go to the client, so they hold no
# secret of the proxy's; like `data`, they may hold what the server said last.

class ProxyError(Exception):
    """Something that the client is told: an HTTP status and a JSON-RPC error."""

    http_status = 400
    code = INVALID_REQUEST
    raw_id: bytes | None = None          # the request's id, as JSON, if the request did not become a Message

    def __init__(self, message: str, *, status: int | None = None, code: int | None = None,
                 data: object = None, headers: tuple = ()):
        super().__init__(message)
        self.http_status = status or self.http_status
        self.code = code or self.code
        self.data = data
        self.headers = headers           # more HTTP headers, as (name, value) pairs

    def error_object(self) -> dict:
        """The `error` member of a JSON-RPC response."""
        error = {"code": self.code, "message": str(self)}
        if self.data is not None:
            error["data"] = self.data
        return error

    def as_refusal(self) -> "RPCError":
        """The same error as one that asking again will not change."""
        return RPCError(str(self), status=self.http_status, code=self.code, data=self.data, headers=self.headers)


class HTTPError(ProxyError):
    """The HTTP request was refused; what it carries was not looked at."""


class RPCError(ProxyError):
    """The message was understood well enough to be refused."""


class ServerError(ProxyError):
    """The MCP server failed, is not available, or took too long."""

    http_status = 502
    code = SERVER_FAILED
    is_unsent = False                    # is it sure that nothing of the request reached the server?

    def again(self, message: str = "") -> "ServerError":
        """A new ServerError in place of one that is kept: raised itself, that would keep alive the frames it passed."""
        return ServerError(message or str(self), status=self.http_status, data=self.data, headers=self.headers)


class HandshakeRefused(ServerError):
    """The server answered, but not with what a handshake needs."""


class RefusedAsModern(ServerError):
    """The server is a modern one, but refuses us, or speaks no revision known here."""


class GreetedTwice(ServerError):
    """A slow server got the handshakes of both eras and took both: which it stays with, nobody knows."""


class StartError(Exception):
    """Ends the program, with one line and this exit status."""

    exit_status = 1


class SettingsError(StartError):
    """A setting that cannot be used."""

    exit_status = 2


# ============================================================================
# 3. Settings
# ============================================================================
#
# Every knob with its default and its meaning. The command line and `--help` are
# made from these fields, and a test compares the README's rows with them; so to
# add a setting, add a field here and a row there.

def setting(default, about: str):
    """A field of Settings. Its type is that of the default; its text is the help."""
    return dataclasses.field(default=default, metadata={"about": about})


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one proxy behaves. A field is named as its flag is, and in capitals as its environment variable."""

    mcp_server_config: str = setting("", "command line of the MCP server, split as a shell would; "
                                         "the built-in demo server when empty")
    mcp_config: str = setting("", "JSON file of several servers, as desktop clients write it, in place of a command")
    watch: bool = setting(False, "read MCP_CONFIG again when it changes, looked at each second; SIGHUP always does")
    host: str = setting("0.0.0.0", "address to listen on")
    port: int = setting(8000, "port to listen on; 0 picks a free one and prints it")
    shared_session: bool = setting(True, "true: all clients share one server process; "
                                         "false: one process per client session")
    stateless: bool = setting(False, "Streamable HTTP without session ids: any replica can answer any request")
    require_session: bool = setting(False, "refuse legacy requests without Mcp-Session-Id to a shared server, instead "
                                           "of serving them as STATELESS does")
    session_secret: str = setting("", "signs ids of sessions of shared servers, which then go on at any replica "
                                      "that has the same secret, and when this one was started again")
    auth_key: str = setting("", "key required on every request; several with commas between")
    auth_keys_file: str = setting("", "JSON file of keys by name, each with what it may use; SIGHUP reads it again")
    public_url: str = setting("", "with OAUTH_ISSUER, the URL by which clients reach this proxy, as "
                                    "https://host/prefix")
    oauth_issuer: str = setting("", "issuer of the OAuth access tokens that are taken, beside keys; its URL: https, "
                                    "or on loopback")
    oauth_audience: str = setting("", "what tokens have to be for; empty: the URL of the place, as PUBLIC_URL/mcp")
    oauth_scopes: str = setting("", "scopes that every token has to have, with blanks between")
    oauth_jwks_url: str = setting("", "where the issuer's keys are; empty: where its metadata says")
    oauth_introspection_url: str = setting("", "where the issuer is asked about tokens that are no JWTs (RFC 7662)")
    oauth_client_id: str = setting("", "client id of the proxy at OAUTH_INTROSPECTION_URL")
    oauth_client_secret: str = setting("", "secret of OAUTH_CLIENT_ID")
    allowed_origins: str = setting("", "origins whose web pages may call, with commas between; * for all. "
                                       "Loopback and the host itself always may")
    allowed_hosts: str = setting("", "public host names under which this may be called without AUTH_KEY, "
                                     "with commas between; * for all")
    allowed_env: str = setting("", "variables that clients may set, and settings of the proxy that its server "
                                   "gets too: names and * patterns with commas between; empty: variables with "
                                   "the shape of a credential, as GITHUB_TOKEN or AWS_REGION, and no settings")
    base_path: str = setting("", "path prefix under which a reverse proxy publishes this one")
    heartbeat: float = setting(30.0, "seconds between keep-alive comments on open streams; "
                                     "less than what proxies cut idle connections after")
    request_timeout: float = setting(600.0, "seconds a call may take without progress, a day in all; "
                                            "then it is cancelled")
    session_idle: float = setting(1800.0, "seconds a session without stream or call is kept")
    max_message_mb: float = setting(64.0, "largest JSON-RPC message, either direction")
    # Parsing is done in one go, and nobody else is served meanwhile: 32 MB take 60 ms as one string, 0.6 s as numbers,
    # 1 to 2 s as millions of objects. One MB, which is more than most send, takes 60 ms at the most.
    max_request_mb: float = setting(32.0, "largest request of a client, and never more than MAX_MESSAGE_MB")
    max_buffered_mb: float = setting(512.0, "memory for bodies (also as parsed), kept requests, open questions, "
                                            "event logs, unread output and what remote servers are sending, together; "
                                            "past that whoever holds most yields first, and new bodies get 503")
    max_result_kb: int = setting(0, "text of a tool's result over this is cut in the middle; 0: none is")
    max_sessions: int = setting(1000, "sessions at a time, and as many modern subscriptions; past that clients get 503 "
                                      "with Retry-After")
    max_processes: int = setting(100, "server processes, and sessions at remote servers, at a time; past that 503 too")
    prewarm: int = setting(0, "initialised spare processes kept ready for new sessions that set no variables, "
                              "when SHARED_SESSION is false")
    server_era: str = setting("auto", "legacy (initialize handshake), modern (2026-07-28), or auto: find out")
    drain_delay: float = setting(0.0, "seconds after SIGTERM or SIGINT in which all goes on, but /readyz is 503 and "
                                      "connections are not kept, so that balancers notice")
    shutdown_grace: float = setting(10.0, "seconds that running calls may take to finish, after DRAIN_DELAY")
    tls_cert: str = setting("", "certificate chain (PEM file); with it, HTTPS is served")
    tls_key: str = setting("", "private key (PEM file), when it is not in TLS_CERT")
    metrics_port: int = setting(0, "port for /metrics, /healthz and /readyz alone, plain HTTP without a key; "
                                   "0: only beside the rest, where /metrics needs one")
    log_level: str = setting("INFO", "DEBUG (with message bodies), INFO, WARNING or ERROR")
    log_format: str = setting("text", "text, or json for one object a line")
    sandbox: str = setting("off", "on: the server reads no more files than it needs, and writes none but its own; try: "
                                  "as far as this machine can; or off")
    sandbox_read: str = setting("", "paths that the server may read too, with : between")
    sandbox_write: str = setting("", "paths that the server may write to, with : between")
    sandbox_net: bool = setting(True, "false: the server and its children can open no socket")
    private_home: bool = setting(False, "home, temporary and working directory of its own for each process, removed "
                                        "after; SANDBOX has it too")
    clean_env: bool = setting(False, "the server gets of the proxy's environment only PATH, locale, HOME, TMPDIR and "
                                     "what ALLOWED_ENV names")
    run_as_user: str = setting("", "whom the server runs as: a name or number, or numbers as 2000-2099, of which each "
                                   "process gets one of its own")
    limit_memory_mb: int = setting(0, "memory of a server and all its children; over it they are ended; 0: no limit")
    limit_processes: int = setting(0, "processes of a server and all its children; over it they are ended; 0: no limit")
    limit_cpu_seconds: int = setting(0, "CPU time of a process, in its whole life; over it, it is ended; 0: no limit")
    limit_open_files: int = setting(0, "open files and sockets of a process; 0: as many as the proxy")
    limit_file_mb: int = setting(0, "size of a file that is written; 0: no limit")

    @property
    def auth_keys(self) -> tuple[str, ...]:
        return listed(self.auth_key)

    @property
    def is_guarded(self) -> bool:
        return bool(self.auth_key or self.auth_keys_file or self.oauth_issuer)

    @property
    def max_message_bytes(self) -> int:
        return int(self.max_message_mb * 1024 * 1024)

    @property
    def max_request_bytes(self) -> int:
        return int(min(self.max_request_mb, self.max_message_mb) * 1024 * 1024)


# With which setting a group begins, in --help and in the README.
GROUPS = {"mcp_server_config": "what to serve, where to listen", "shared_session": "sessions",
          "auth_key": "who may come in, and under which path", "heartbeat": "times and limits",
          "prewarm": "server processes, start to stop", "tls_cert": "HTTPS, log, metrics", "sandbox": "sandbox"}

SANDBOX_SETTINGS = tuple(name for name in Settings.__dataclass_fields__ if name.startswith(("sandbox", "limit_")) or
                         name in ("private_home", "clean_env", "run_as_user"))


def listed(text: str) -> tuple[str, ...]:
    """The parts of a setting, which commas separate."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_setting(name: str, default, text: str):
    """The value of setting `name` that `text` stands for; SettingsError when it stands for none."""
    if not isinstance(text, str):          # what argparse makes of --port=-- before Python 3.13
        raise SettingsError(f"{name.upper()} cannot be --")
    text = text.strip() or text            # a file of variables with CR LF leaves a CR behind that nobody sees
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "yes": True, "on": True,
                    "false": False, "0": False, "no": False, "off": False}[text.lower()]
        return type(default)(text)
    except (KeyError, ValueError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise SettingsError(f"{name.upper()} must be {kind}, not {text!r}") from None


_PUBLIC_URL = re.compile(r"(?i:(https?)://([a-z0-9._~-]+|\[[0-9a-f:.]+\]))(?::([0-9]{1,5}))?((?:/[A-Za-z0-9._~-]+)*)/?")


@functools.lru_cache(maxsize=16)
def canonical(url: str) -> str:
    """A URL normalized, as clients send it: RFC 3986 §6.2.2 and 6.2.3; "" if it is not one."""
    match = _PUBLIC_URL.fullmatch(url)
    if not match or match[3] and not 0 < int(match[3]) < 65_536:
        return ""
    scheme, port = match[1].lower(), match[3] and int(match[3])
    is_usual = not port or port == {"http": 80, "https": 443}[scheme]
    return f"{scheme}://{match[2].lower()}{'' if is_usual else f':{port}'}{match[4]}"


def split_url(url: object) -> SplitResult | None:
    """The parts of an http or https URL; None if it is none."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(url if isinstance(url, str) and re.fullmatch("[!-~]+", url) else "")
        return parts if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 else None


def is_safe_url(url: object) -> bool:
    """Is it a URL whose answers cannot be forged on the way: https, or http on loopback?"""
    parts = split_url(url)
    return bool(parts) and not parts.fragment and "@" not in parts.netloc and (
        parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1"))


def users_of(text: str) -> range:
    """The numbers of users in a range such as 2000-2099; empty if the text is not one."""
    numbers = re.fullmatch("([0-9]{1,9})-([0-9]{1,9})", text)
    return range(int(numbers[1]), int(numbers[2]) + 1) if numbers else range(0)


def check_settings(settings: Settings) -> Settings:
    """The settings again, or SettingsError for values that no run can use."""
    for rule, fits, names in (
            ("be from 0 to 65535", lambda value: 0 <= value <= 65535, "port metrics_port"),
            ("be a number above 0, up to 10**12", lambda value: 0 < value <= 10**12,
             "heartbeat request_timeout session_idle max_message_mb max_request_mb max_buffered_mb"),
            ("be 0 or more, up to 10**12", lambda value: 0 <= value <= 10**12, "drain_delay shutdown_grace prewarm "
             "max_result_kb limit_memory_mb limit_processes limit_cpu_seconds limit_open_files limit_file_mb"),
            ("be 1 or more", lambda value: value >= 1, "max_sessions max_processes"),
            ("be DEBUG, INFO, WARNING or ERROR", re.compile("(?i)debug|info|warn(ing)?|error").fullmatch, "log_level"),
            ("be auto, legacy or modern", re.compile("auto|legacy|modern").fullmatch, "server_era"),
            ("be text or json", re.compile("text|json").fullmatch, "log_format"),
            ("look like https://host/prefix", lambda value: not value or bool(canonical(value)), "public_url"),
            ("be an https URL, or an http one on loopback", lambda value: not value or is_safe_url(value),
             "oauth_issuer oauth_jwks_url oauth_introspection_url"),
            ("be an issuer's URL, without a query", lambda value: "?" not in value, "oauth_issuer"),
            ("be scopes with blanks between", re.compile("[!#-\\[\\]-~ ]*").fullmatch, "oauth_scopes"),
            ("be on, try or off", re.compile("on|try|off").fullmatch, "sandbox"),
            ("be a user's name or number, or two numbers as 2000-2099", lambda value: (
                users_of(value) or re.fullmatch("[0-9]{1,9}|[A-Za-z_][A-Za-z0-9_.-]*|", value)), "run_as_user"),
            ("look like /prefix, and be neither /tools nor /servers",
             re.compile("(?!/(?:tools|servers)(?:/|$))(/[A-Za-z0-9._~-]+)*").fullmatch, "base_path")):
        for name in names.split():
            if not fits(getattr(settings, name)):
                raise SettingsError(f"{name.upper()} must {rule}, not {getattr(settings, name)!r}")
    if settings.auth_key and not settings.auth_keys:
        raise SettingsError("AUTH_KEY is set but holds no key")
    if settings.mcp_config and settings.mcp_server_config:
        raise SettingsError("MCP_CONFIG is a file of several servers, so there cannot be a command too: leave one out")
    if bool(settings.oauth_issuer) != bool(settings.public_url):
        raise SettingsError("OAUTH_ISSUER and PUBLIC_URL need each other")
    if settings.tls_key and not settings.tls_cert:
        raise SettingsError("TLS_KEY is of no use without TLS_CERT")
    return settings


# ============================================================================
# 4. HTTP/1.1
# ============================================================================
#
# Bytes into requests, responses into bytes. A proxy in front of this one parses
# the same bytes; if the two can be made to disagree about where a request ends,
# an attacker's request arrives as part of somebody else's (request smuggling).
# So whatever RFC 9112 lets a server repair, this parser refuses. Requests are
# read in two steps, head and body, because access is decided by the head alone;
# responses too, those of remote servers, because a stream is read as it comes.

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"                              # RFC 9110 §5.6.2
_REQUEST_LINE = re.compile(rb"(%b) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])" % _TOKEN)    # RFC 9112 §3
_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")      # RFC 9112 §4
# Here and below, where two parts can match the same blanks, a possessive *+ keeps the time from being quadratic.
_FIELD_LINE = re.compile(rb"(%b):[ \t]*+([\t\x20-\x7e\x80-\xff]*+)" % _TOKEN)         # RFC 9112 §5
_BARE_LF = re.compile(rb"(?<!\r)\n")
_LENGTH = re.compile(rb"\r\nContent-Length: ?([0-9]{1,15})(?=\r|\Z)", re.IGNORECASE)
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]*)(?::[0-9]{0,5})?")
_ABSOLUTE = re.compile(r"https?://([^/?#]+)([^#]*)", re.IGNORECASE)                    # RFC 3986 §3
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_QUOTED = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'             # RFC 9110 §5.6.4
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?)*"
                         % (_TOKEN, _TOKEN, _QUOTED))                                  # RFC 9112 §7.1 and §7.1.1

# Headers that we act on and that have one value. If one came twice, two readers could each take a different one.
_SINGLETONS = frozenset("""authorization content-length content-type expect host last-event-id location
    mcp-method mcp-name mcp-protocol-version mcp-session-id origin retry-after transfer-encoding x-api-key""".split())

REASONS = {
    100: "Continue", 200: "OK", 202: "Accepted", 204: "No Content", 400: "Bad Request", 401: "Unauthorized",
    403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed", 406: "Not Acceptable",
    408: "Request Timeout", 413: "Content Too Large", 414: "URI Too Long",
    415: "Unsupported Media Type", 417: "Expectation Failed", 431: "Request Header Fields Too Large",
    500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable",
    504: "Gateway Timeout", 505: "HTTP Version Not Supported", 508: "Loop Detected",          # the last: RFC 5842
}


@dataclasses.dataclass(eq=False, slots=True)
class HTTPHead:
    """A request without its body. Header names are in lower case, the path is decoded."""

    method: str
    path: str
    query: tuple[tuple[str, str], ...]
    headers: dict[str, str]
    fields: tuple[tuple[str, str], ...]      # the header lines one by one, for those that may be repeated
    version: tuple[int, int]
    keep_alive: bool
    content_length: int | None               # None: chunked. A kept head comes with other lengths: see RequestParser
    expects_continue: bool
    admission: object = None                 # what the application made of it, for when it comes again

    def query_value(self, name: str) -> str | None:
        """The value of a query parameter; HTTPError when it is given twice."""
        values = [value for key, value in self.query if key == name]
        if len(values) > 1:
            raise HTTPError(f"{name} is given more than once")
        return values[0] if values else None


def parse_head(raw: bytes) -> HTTPHead:
    """The head of a request, without the empty line that ends it; HTTPError when two parsers could disagree."""
    request_line, *lines = raw.removeprefix(b"\r\n").split(b"\r\n")     # RFC 9112 §2.2: one empty line is ignored
    match = _REQUEST_LINE.fullmatch(request_line)
    if not match:
        raise HTTPError("malformed request line")
    version = int(match[3]), int(match[4])
    if version[0] != 1:
        raise HTTPError("this is an HTTP/1.1 server", status=505)
    if len(match[2]) > MAX_TARGET_BYTES:
        raise HTTPError("request target too long", status=414)
    fields = parse_fields(lines)
    headers = by_name(fields)
    method = match[1].decode()
    authority, path, query = parse_target(method, match[2].decode())
    if version >= (1, 1) and "host" not in headers or not (
            _HOST.fullmatch(headers.get("host", "")) and _HOST.fullmatch(authority or "")):
        raise HTTPError("missing or malformed Host header")  # RFC 9112 §3.2
    if authority is not None:
        headers["host"] = authority                          # RFC 9112 §3.2.2: the target wins
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise HTTPError("unknown expectation", status=417)   # RFC 9110 §10.1.1
    return HTTPHead(
        method=method, path=path, query=query, headers=headers, fields=fields, version=version,
        keep_alive=is_kept_alive(headers, version), content_length=body_length(headers, version),
        expects_continue="expect" in headers and version >= (1, 1))


UNTIL_CLOSE = 1 << 62                # the length of a body that ends with its connection


@dataclasses.dataclass(eq=False, slots=True)
class ResponseHead:
    """A response without its body. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    keep_alive: bool
    content_length: int | None               # None: the body is chunked; or UNTIL_CLOSE


def parse_response_head(raw: bytes) -> ResponseHead:
    """The head of the response to a GET, POST or DELETE; HTTPError as for a request's."""
    status_line, *lines = raw.split(b"\r\n")
    match = _STATUS_LINE.fullmatch(status_line)
    if not match:
        raise HTTPError("malformed status line")
    status, version, headers = int(match[2]), (1, int(match[1])), by_name(parse_fields(lines))
    length = body_length(headers, version)
    if status < 200 or status in (204, 304):                 # RFC 9112 §6.3
        length = 0
    elif length == 0 and "content-length" not in headers:
        length = UNTIL_CLOSE
    return ResponseHead(status, headers, is_kept_alive(headers, version) and length != UNTIL_CLOSE, length)


def media_type(head: HTTPHead | ResponseHead) -> str:
    """The media type of a body, without its parameters."""
    return head.headers.get("content-type", "").partition(";")[0].strip().lower()


def is_kept_alive(headers: dict[str, str], version: tuple[int, int]) -> bool:
    """May another message come on the same connection? RFC 9112 §9.3."""
    options = {option.strip().lower() for option in headers.get("connection", "").split(",")}
    return "close" not in options and (version >= (1, 1) or "keep-alive" in options)


def by_name(fields: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Header lines by name; HTTPError when one comes twice that may come only once."""
    headers = {}
    for name, value in fields:
        if name in headers:
            if name == "content-type" and value == headers[name]:          # some clients write it twice. RFC 9110 §8.3
                continue
            if name in _SINGLETONS:
                raise HTTPError(f"repeated header: {name}")
            value = f"{headers[name]}, {value}"              # RFC 9110 §5.3
        headers[name] = value
    return headers


def parse_fields(lines: list[bytes]) -> tuple[tuple[str, str], ...]:
    """Header or trailer lines as (name in lower case, value) pairs."""
    if len(lines) > MAX_HEADERS:
        raise HTTPError("too many headers", status=431)
    fields = []
    for line in lines:
        # RFC 9112 §5.1 and §5.2: 400 for one that starts with a blank (obsolete folding) or has one before its colon.
        match = _FIELD_LINE.fullmatch(line)
        if not match:
            raise HTTPError("malformed header line")
        fields.append((match[1].decode().lower(), match[2].decode("latin-1").rstrip(" \t")))
    return tuple(fields)


def parse_target(method: str, target: str) -> tuple[str | None, str, tuple[tuple[str, str], ...]]:
    """(authority or None, decoded path, query parameters) of a request target. RFC 9112 §3.2."""
    if target == "*" and method == "OPTIONS":
        return None, "*", ()
    authority, absolute = None, _ABSOLUTE.fullmatch(target)
    if absolute:
        authority, target = absolute.groups()
        if not target.startswith("/"):
            target = "/" + target                            # RFC 3986 §6.2.3: an empty path is /
    if not target.startswith("/") or "#" in target or _BAD_ESCAPE.search(target):
        raise HTTPError("malformed request target")
    path, _, query = target.partition("?")
    if query.count("&") >= MAX_PARTS:
        raise HTTPError("too many query parameters")
    pairs = (pair.partition("=") for pair in query.split("&") if pair)
    return authority, percent_decode(path), tuple(
        (percent_decode(name.replace("+", " ")), percent_decode(value.replace("+", " "))) for name, _, value in pairs)


def percent_decode(text: str) -> str:
    """Text with its percent escapes decoded; HTTPError when they are not UTF-8 or hide control characters."""
    if "%" in text:
        try:
            text = unquote_to_bytes(text).decode()
        except UnicodeDecodeError:
            raise HTTPError("request target is not UTF-8") from None
        if any(character < " " or character == "\x7f" for character in text):
            raise HTTPError("control character in request target")
    return text


def body_length(headers: dict[str, str], version: tuple[int, int]) -> int | None:
    """How many bytes the body has; None when it is chunked. RFC 9112 §6.3."""
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if coding is not None:
        # RFC 9112 §6.1: both together "might indicate an attempt to perform request smuggling".
        if length is not None or version < (1, 1):
            raise HTTPError("Transfer-Encoding does not belong here")
        codings = [part.strip(" \t").lower() for part in coding.split(",")]
        if codings.pop() != "chunked" or "chunked" in codings:
            raise HTTPError("the last transfer coding must be chunked, once")      # RFC 9112 §6.3 and §7.1
        if codings:
            raise HTTPError("only the chunked transfer coding is known", status=501)
        return None
    if length is None:
        return 0
    if not (length.isascii() and length.isdigit()) or len(length) > 15:
        raise HTTPError("malformed Content-Length")
    return int(length)


class RequestParser:
    """The requests of one connection, however its bytes are cut: feed() them, then call next_head() and next_body()."""

    _parse = staticmethod(parse_head)

    def __init__(self, known: dict[tuple, HTTPHead] | None = None):
        self.rest = b""                   # bytes that were not used yet
        self.is_interrupted = False       # did next_body() stop for others to have a turn, and not for want of bytes?
        self._searched = 0                # how far `rest` was searched for the end of a head
        self._known = {} if known is None else known      # parsed heads of all connections, by their shape
        self._shape = b"", b""            # the last head, before and after the digits of its length (None: it has none)
        self._last: HTTPHead | None = None                # the last head, if it is a known one
        self.length: int | None = 0       # of the body; None: it is chunked
        self._body = bytearray()          # so far
        self._reader = None               # the generator that reads it, if it does not come all at once

    def feed(self, data: bytes) -> None:
        self.rest = self.rest + data if self.rest else data

    @property
    def is_between(self) -> bool:
        """Has nothing of the next request come yet? An empty line before it does not count."""
        return self.rest in (b"", b"\r", b"\r\n")

    def next_head(self) -> HTTPHead | None:
        """The next request's head, or None when bytes are missing."""
        rest, head, (before, behind) = self.rest, self._last, self._shape
        if head and rest.startswith(before):                          # a client mostly sends the same head again
            start = len(before)
            end = rest.find(behind, start, start + 15 + len(behind))
            if end > 0 and rest[start:end].isdigit():
                self.length, self.rest, self._searched = int(rest[start:end]), rest[end + len(behind):], 0
                return head
        end = rest.find(b"\r\n\r\n", self._searched)
        if end < 0 or end > MAX_HEAD_BYTES:
            self._check_unfinished_head()
            return None
        raw, self.rest, self._searched = rest[:end], rest[end + 4:], 0
        match = _LENGTH.search(raw)
        self._shape = (raw[:match.start(1)], raw[match.end(1):] + b"\r\n\r\n") if match else (raw, None)
        known = self._known.get(self._shape)
        if len(raw) > KNOWN_HEAD_BYTES:
            self._shape = b"", b""             # too long to keep, even for this connection alone
        head = known or self._parse(raw)
        self._last = known if match else None
        self.length = int(match[1]) if known and match else head.content_length
        return head

    @property
    def size(self) -> int:
        """How many bytes it holds."""
        return len(self.rest) + len(self._body)

    def clear(self) -> None:
        """Forgets all bytes: where the next request begins is not known any more, or there is none."""
        self.rest, self._body, self._reader = b"", bytearray(), None

    def keep(self, head: HTTPHead) -> None:
        """Keeps the last head, which was admitted, if it is small; if need be, the oldest makes room."""
        if self._shape[0] and len(head.fields) <= KNOWN_HEAD_FIELDS:
            if len(self._known) >= KNOWN_HEADS and self._shape not in self._known:
                self._known.pop(next(iter(self._known))).admission = None        # each refers to the other: a cycle
            self._known[self._shape] = head
            self._last = head if self._shape[1] is not None else None

    def _check_unfinished_head(self) -> None:
        """Refuses what can be refused before the head is complete; it may never be."""
        if len(self.rest) > MAX_HEAD_BYTES + 3:          # part of the empty line may be there
            is_one_line = b"\r\n" not in self.rest[2:MAX_HEAD_BYTES]
            raise HTTPError("head too large", status=414 if is_one_line else 431)
        if self.rest.startswith(b"\x16\x03"):             # RFC 8446 §5.1: a handshake
            raise HTTPError("this port speaks plain HTTP, not TLS: use http://, or set TLS_CERT")
        if _BARE_LF.search(self.rest, self._searched) or b"\0" in self.rest[self._searched:]:
            raise HTTPError("malformed head")
        self._searched = max(0, len(self.rest) - 3)      # where the empty line may have begun

    def next_body(self, limit: int) -> bytes | None:
        """The body that belongs to the last head, or None when bytes are missing; 413 when it is over `limit`."""
        length, rest = self.length, self.rest
        if self._reader is None and length is not None and len(rest) >= length <= limit:
            self.rest = rest[length:]                                          # all of it is there: no copy
            return rest[:length]
        self._reader = self._reader or self._read_body(limit)
        self._at, self._lines_left = 0, LINES_A_TURN              # `_at`: how much of `rest` was used
        self.is_interrupted = next(self._reader, None)
        self.rest = self.rest[self._at:]
        if self.is_interrupted is not None:
            return None
        body, self._body, self._reader = bytes(self._body), bytearray(), None
        return body

    # The rest are generators, which yield False when more bytes are needed, and True when it is the others' turn.

    def _read_body(self, limit: int):
        if self.length == UNTIL_CLOSE:
            while not self.is_ended:
                yield from self._read_data(len(self.rest), limit)
                yield False
            return
        if self.length is not None:
            yield from self._read_data(self.length, limit)
            return
        while True:
            match = _CHUNK_LINE.fullmatch((yield from self._read_line()))
            if not match:
                raise HTTPError("malformed chunk")
            size = int(match[1], 16)
            if not size:
                break
            yield from self._read_data(size, limit)
            if (yield from self._read_line()):
                raise HTTPError("malformed chunk")
        for _ in range(MAX_HEADERS + 1):
            line = yield from self._read_line()
            if not line:
                return
            parse_fields([line])          # trailers are checked like headers and then forgotten. RFC 9112 §7.1.2
        raise HTTPError("too many trailers", status=431)

    def _read_data(self, missing: int, limit: int):
        if len(self._body) + missing > limit:
            raise HTTPError(f"message too large: {limit} bytes are the limit", status=413)
        while True:
            part = self.rest[self._at:self._at + missing]
            self._at += len(part)
            missing -= len(part)
            self._body += part
            if not missing:
                return
            yield False

    def _read_line(self):
        self._lines_left -= 1
        if self._lines_left < 0:
            yield True
        while True:
            end = self.rest.find(b"\r\n", self._at, self._at + MAX_CHUNK_LINE_BYTES + 2)
            line = self.rest[self._at:end if end >= 0 else None]
            if len(line) > MAX_CHUNK_LINE_BYTES + 1 or b"\n" in line or b"\r" in line[:-1]:
                raise HTTPError("malformed chunk")
            if end >= 0:
                self._at = end + 2
                return line
            yield False


class ResponseParser(RequestParser):
    """The same for the responses on a connection of ours. A body can be taken as it comes."""

    _parse = staticmethod(parse_response_head)
    is_ended = False                  # will nothing more come?

    def take(self) -> bytes:
        """What came of the body and was not taken yet."""
        part, self._body = bytes(self._body), bytearray()
        return part


# Headers whose values are few, and ours. A head of these alone is kept; one that may repeat a client's words is not.
_OUR_WORDS = frozenset({"Content-Type", "Cache-Control", "X-Accel-Buffering", "Transfer-Encoding", "Connection"})
_known_heads: dict[tuple, bytes] = {}


def encode_head(status: int, headers: tuple[tuple[str, str], ...], date: bytes, length: int | None) -> bytes:
    """A response's head. `length` is its body's; None, the body comes in chunks or there is none."""
    head = _known_heads.get((status, headers))
    if head is None:
        lines = [f"{name}: {value}".encode("latin-1") for name, value in headers]
        # Response splitting: a CR LF in a value would end the header and begin another, or a body, of any choice.
        if not all(map(_FIELD_LINE.fullmatch, lines)):
            raise ValueError("unusable header")
        head = b"\r\n".join([f"HTTP/1.1 {status} {REASONS[status]}".encode(), *lines])
        if all(name in _OUR_WORDS for name, _ in headers):
            _known_heads[status, headers] = head
    if length is None:
        return b"%b\r\nDate: %b\r\n\r\n" % (head, date)
    return b"%b\r\nDate: %b\r\nContent-Length: %d\r\n\r\n" % (head, date, length)


def encode_chunk(parts: list) -> list:
    """One chunk around a payload. RFC 9112 §7.1."""
    return [b"%x\r\n" % sum(map(len, parts)), *parts, b"\r\n"]


LAST_CHUNK = b"0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


# ============================================================================
# 5. Server-sent events
# ============================================================================
#
# HTML Living Standard, Server-sent events. An event is lines, and an empty line
# ends it. A line may end with CR, LF or both, so neither may be in the data;
# JSON has them only between tokens, and *JSON* takes them out.

EVENT_LINE = 64                  # bytes that each line of an event takes beside its text
KEPT_ENDS = 4 * 1024             # bytes kept of each end of a line over the limit: enough to find its id, or secrets


class LineSplitter:
    """Lines out of chunks of bytes. A large line is joined once, and only new bytes are searched for its end."""

    def __init__(self, limit: int, on_line=None, on_too_long=None):
        self._limit = limit
        if on_line:          # called with each line, without its LF; on_too_long with both ends of one over the limit
            self._on_line, self._on_too_long = on_line, on_too_long
        self._parts: list[bytes] = []
        self._size = 0

    @property
    def size(self) -> int:
        """How many bytes it holds, not counting the ends of a line over the limit."""
        return self._size if self._size <= self._limit else 0

    def feed(self, data: bytes) -> None:
        *lines, rest = data.split(b"\n") if data.find(b"\n") >= 0 else (data,)       # split() is slow, and most parts
        for line in lines:                                                            # of a screenshot have no line end
            size = self._size + len(line)
            if self._parts:
                line, self._parts, self._size = b"".join([*self._parts, line]), [], 0
            if size > self._limit:
                self._on_too_long(line[:KEPT_ENDS], line[-KEPT_ENDS:])
            else:
                self._on_line(line)
        if rest:
            self._size += len(rest)
            self._parts.append(rest)
            if self._size > self._limit:
                joined = b"".join(self._parts)
                self._parts = [joined[:KEPT_ENDS], joined[-KEPT_ENDS:]] if len(joined) > 2 * KEPT_ENDS else [joined]


def encode_event(payload: list, event: bytes = b"message", event_id: bytes = b"") -> list:
    """One event around a payload that is a single line."""
    head = b"id: %b\nevent: %b\ndata: " % (event_id, event) if event_id else b"event: %b\ndata: " % event
    return [head, *payload, b"\n\n"]


# A comment, which keeps the connection alive and means nothing. Some readers look at nothing before an empty line; but
# httpx-sse makes an event without data of each empty line, once an event had an id.
HEARTBEAT, BARE_HEARTBEAT = b": heartbeat\n\n", b": heartbeat\n"


class EventParser(LineSplitter):
    """Events out of the bytes of a stream, however they are cut."""

    def __init__(self, limit: int, on_event, on_too_long):
        self.last_id = ""                      # of the last event, after which the stream is resumed
        self.retry: float | None = None        # seconds to wait before that
        super().__init__(limit)                # both callbacks are methods here: as attributes they would be a cycle
        self._on_event = on_event              # called with the type and the data of each,
        self._on_too_large = on_too_long       # or with the first and last bytes of data that is over the limit
        self._id, self._type, self._data = "", b"", []
        self._ended_in_cr = False
        self._event_size = 0

    @property
    def size(self) -> int:
        return super().size + min(self._event_size, self._limit)

    def feed(self, data: bytes) -> None:
        if b"\r" in data or self._ended_in_cr:
            data, self._ended_in_cr = data.removeprefix(b"\n") if self._ended_in_cr else data, data[-1:] == b"\r"
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        super().feed(data)

    def _on_line(self, line: bytes) -> None:
        if not line:
            self._event_size = 0
            data, kind, self._data, self._type, self.last_id = self._data, self._type, [], b"", self._id
            return self._on_event(kind or b"message", b"\n".join(data)) if data else None
        if line.startswith(b"data: "):         # what is large is copied once
            return self._add(line[6:], line)
        name, _, value = line.removeprefix(BOM).partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._add(value, value)
        elif name == b"event":
            self._type = value[:KEPT_ENDS]     # longer ones are nobody's, and `size` does not count them
        elif name == b"id" and b"\0" not in value and len(value) <= KEPT_ENDS:         # no head has room for more
            self._id = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit() and len(value) < 10:
            self.retry = int(value) / 1000

    def _add(self, value: bytes, tail: bytes, missing: int = 0) -> None:
        was_whole = self._event_size <= self._limit + EVENT_LINE
        self._event_size += len(value) + missing + EVENT_LINE
        if self._event_size <= self._limit + EVENT_LINE:
            self._data.append(value)
        elif was_whole:                        # one line is over the limit, or all together; what follows is dropped
            self._on_too_large((self._data or [value])[0][:KEPT_ENDS], tail[-KEPT_ENDS:])
            self._data.clear()

    def _on_too_long(self, head: bytes, tail: bytes) -> None:
        if head.startswith(b"data:"):          # other fields that are so long are ignored
            self._add(head[5:].removeprefix(b" "), tail, self._limit + 1)


# ============================================================================
# 6. JSON
# ============================================================================
#
# A proxy must pass on what it does not know, with numbers as they were written
# (1.0, 1e400, 12345678901234567890), so a message is never parsed and written
# anew. It is parsed once, to be understood; to change a member, its place in the
# text is found, and another text put there.
#
# Where a member stands is found in one of five ways, the cheapest first. All but
# the last may be unable to tell, and then the next that applies is tried:
#
#     a response's id     at the head or the tail of a server's line, by a pattern; the line is not even
#                         parsed then, be it a screenshot of 8 MB (find_response)
#     a request's id      likewise, in the text of a parsed message (Message.id_span)
#     any member          its name is searched for: if the text holds it only once, and no escapes by which
#                         there might be another, this is the one (find_only_member)
#     any member          that comes first in an object whose own name is in the text once only (JSONObject.span)
#     any member          the object around it is walked, from its first name on; once for each object
#                         (walk_members)
#
# They agree where no object has a name twice. A message is refused if it, its params or their _meta has, because two
# readers could each take a different one; deeper in, one way may find the first and another the last. (Noting all
# places while parsing was tried: it cost 2 to 5 µs for a small message, and twice the time for a large one.)

_WHITESPACE = re.compile(r"[ \t\n\r]*")
# Also one that nothing ends: it would be searched to its end again from each quote in it.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+', re.DOTALL)
_FIRST_NAME = re.compile(r"\{[ \t\n\r]*(?=\")")
_FIRST_MEMBER = re.compile(r'\{[ \t\n\r]*"([A-Za-z]+)"[ \t\n\r]*:[ \t\n\r]*')
_NEXT_NAME = re.compile(r"[ \t\n\r]*,[ \t\n\r]*(?=\")")
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")


# A value as JSON text without superfluous spaces; json.dumps() would make an encoder for each call.
dump = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def _no_such_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _finite(number: str) -> float:
    return max(-LARGEST_FLOAT, min(float(number), LARGEST_FLOAT))          # 1e400 is more than a float holds


def _scanner(hook, parse_float=None):
    """A function (text, at) -> (the value that starts at text[at], its end). `hook` makes an object of its pairs."""
    # Python's scanner knows NaN and Infinity, which JSON does not. Python also refuses to read integers of more
    # than 4,300 digits; nobody needs their value, so all integers of such a text are read as floats.
    options = {"object_pairs_hook": hook, "parse_constant": _no_such_constant, "parse_float": parse_float}
    scan = json.JSONDecoder(**options).scan_once
    scan_huge = json.JSONDecoder(**options, parse_int=parse_float or float).scan_once

    def scan_value(text: str, at: int) -> tuple[object, int]:
        try:
            return scan(text, at)
        except ValueError as error:
            if "integer string conversion" not in str(error):
                raise
            return scan_huge(text, at)
    return scan_value


scan_value = _scanner(tuple)             # an object as its (name, value) pairs, so that a name given twice is seen
scan_plain = _scanner(None, _finite)     # as json.loads() would, for what may have to be written again
_skip_value = _scanner(None)             # the quickest, when only the end is wanted

SPARE_DEPTH = 100                        # stack frames that are left for whoever reads a part of a message later


def _scan_deeper_down(text: str, at: int, frames: int = 0) -> tuple[object, int]:
    """scan_value() with SPARE_DEPTH frames less of the stack: what is nested too deeply is refused here, not later."""
    if frames == SPARE_DEPTH:
        return scan_value(text, at)
    return next(map(_scan_deeper_down, (text,), (at,), (frames + 1,)))         # by way of C, whose frames Python 3.12
                                                                               # counts apart from its own


def members_of(scanned: object) -> dict:
    """The members of an object that scan_value() read, by name; empty for any other value."""
    return dict(scanned) if isinstance(scanned, tuple) else {}


def unique_members_of(scanned: object) -> dict:
    """The same; ValueError when a name is there twice."""
    return without_repeats(scanned) if isinstance(scanned, tuple) else {}


def strings_of(value: object) -> list[str]:
    """The strings in an array, which may hold anything; empty for any other value."""
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def without_repeats(pairs: list[tuple[str, object]] | tuple) -> dict:
    """The members of an object, by name; ValueError when a name is there twice: another parser may take the first of
    two, where ours takes the last, and would then act on what was not checked."""
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice[:80]}: is there twice")
    return members


def check_repeats(scanned: object) -> None:
    """ValueError when an object that scan_value() read, or one within it, has a name twice."""
    for value in scanned if isinstance(scanned, list) else unique_members_of(scanned).values():
        check_repeats(value)


_known_name = functools.lru_cache(maxsize=256)(dump)      # a name in JSON, for those that come again and again


def quoted(name: str) -> str:
    """A member's name in JSON."""
    return _known_name(name) if len(name) <= 64 else dump(name)


def walk_members(text: str, at: int) -> dict[str, tuple[int, int]]:
    """name -> (start, end) of the member's value, for the object at text[at]; the last of two counts, as in dict()."""
    places = {}
    match = _FIRST_NAME.match(text, at)
    while match:
        name, end = scanstring(text, match.end() + 1)
        start = _COLON.match(text, end).end()
        end = _skip_value(text, start)[1]
        places[name] = start, end
        match = _NEXT_NAME.match(text, end)
    return places


def as_object(members: dict[str, str]) -> str:
    """An object of members that are JSON already."""
    return "{" + ",".join([f"{quoted(name)}:{value}" for name, value in members.items()]) + "}"


def find_only_member(text: str, name: str) -> int:
    """Where the value of the member `name` starts, if that can be told without parsing the text; otherwise 0.

    It can if the name is there only once. Without \\u and \\/ a name can only be written in one way, and a quote
    that begins a string has no backslash before it."""
    written = quoted(name)
    at = text.find(written)
    if at < 0 or text.find(written, at + 1) >= 0 or text[at - 1] == "\\":
        return 0
    if "\\" in text and ("\\u" in text or "\\/" in text):          # the first alone is found much faster
        return 0
    colon = _COLON.match(text, at + len(written))
    return colon.end() if colon else 0


class JSONObject:
    """An object as text, whose members are found and changed without writing the rest anew."""

    __slots__ = ("text", "_walked")

    def __init__(self, text: str):
        self.text = text
        self._walked = None

    def value(self, *path: str) -> object:
        """The value of a member as json.loads() would give it; `path` are the names that lead to it."""
        return scan_plain(self.text, self.span(*path)[0])[0]

    def span(self, *path: str) -> tuple[int, int]:
        """(start, end) of a member's value in the text. `path` are the names that lead to it; it has to be there."""
        start = find_only_member(self.text, path[-1])
        if not start and len(path) > 1:                    # the name that is there twice may come first in its object
            at = find_only_member(self.text, path[-2])
            match = at and _FIRST_MEMBER.match(self.text, at)
            start = match.end() if match and match[1] == path[-1] else 0
        return (start, _skip_value(self.text, start)[1]) if start else self._places(path[:-1])[path[-1]]

    def _places(self, path: tuple[str, ...]) -> dict[str, tuple[int, int]]:
        """Where all members of the object at `path` stand. An object is walked only once."""
        if self._walked is None:
            self._walked = {}
        if path not in self._walked:
            self._walked[path] = walk_members(self.text, self.span(*path)[0] if path else self.text.index("{"))
        return self._walked[path]

    def raw(self, *path: str) -> str:
        """A member's value as it was written, in one line."""
        start, end = self.span(*path)
        return one_line(self.text[start:end])

    def raw_members(self, *path: str) -> dict[str, str]:
        """The same for all members of the object at `path`, by name."""
        return {name: one_line(self.text[start:end]) for name, (start, end) in self._places(path).items()}

    def with_text(self, text: str, *path: str) -> bytes:
        """The object as one line, with another text for the member at `path`."""
        return self.changed([(*self.span(*path), text)])

    def changed(self, changes: list[tuple[int, int, str]]) -> bytes:
        """The object as one line, with these changes, which are (start, end, replacement)."""
        text, line, at = self.text, "", 0
        for start, end, replacement in sorted(changes) if len(changes) > 1 else changes:
            line += text[at:start] + replacement
            at = end
        return one_line(line + text[at:]).encode()


def without_members(text: str, *names: str) -> str:
    """An object without some of its members."""
    return as_object({name: value for name, value in JSONObject(text).raw_members().items() if name not in names})


def one_line(text: str) -> str:
    """JSON without line ends; they are only between tokens, because a string cannot hold them."""
    return text.replace("\n", " ").replace("\r", " ")


def decode_json(body: bytes) -> str:
    """The text of a body; -32700 when it is not UTF-8."""
    try:
        return body.removeprefix(BOM).decode()         # RFC 8259 §8.1: "MAY ignore"; JavaScript's json() does
    except UnicodeDecodeError:
        raise RPCError("not UTF-8", code=PARSE_ERROR) from None


# ============================================================================
# 7. JSON-RPC
# ============================================================================
#
# Text into exactly one valid request, notification or response, or an error
# that says why not. A server's response may also stay a ResponseLine, which is
# not parsed; it has what a Message has and most responses need: id, is_result,
# with_id() for the client's id, and parsed() where more is wanted.

_BATCH_START = re.compile(r"[ \t\n\r]*(\[(?:[ \t\n\r]*\])?)")         # "[", or all of an empty array
_AFTER_ELEMENT = re.compile(r"[ \t\n\r]*([,\]])")

# An id at the head of a message is plainly its own; so is one at the tail, because the last brace closes the message.
_ID_AT_HEAD = re.compile(r'\{(?:"jsonrpc": ?"2\.0", ?)?"id": ?("[^"\\]*"|-?[0-9]+) ?[,}]')
_ID_AT_TAIL = re.compile(r', ?"id": ?("[^"\\]*"|-?[0-9]+)(?:, ?"jsonrpc": ?"2\.0")?\}\Z')
_TAIL_LENGTH = 64


# What a message is: JSON-RPC 2.0, sections 4 and 5. Names of the module, as looking up a member of an Enum is slow.
REQUEST, NOTIFICATION, RESPONSE = enum.StrEnum("Kind", "REQUEST NOTIFICATION RESPONSE")


class Message(JSONObject):
    """One JSON-RPC message: its text, and what it says. Objects in it are tuples of pairs, as from scan_value()."""

    __slots__ = ("members", "kind", "method", "id", "params", "meta")

    def __init__(self, text: str, members: dict):
        self.text = text
        self.members = members
        self.id = members.get("id")                # str, int or float; None: a notification, or an error without one
        self.method = members.get("method")        # None: a response
        self.params = without_repeats(members["params"]) if "params" in members else {}
        self.meta = unique_members_of(self.params["_meta"]) if "_meta" in self.params else {}
        self.kind = (RESPONSE if self.method is None else
                     NOTIFICATION if "id" not in members else REQUEST)
        self._walked = None

    @property
    def plain_params(self) -> dict:
        """All of the params as json.loads() would give them."""
        return self.value("params") if self.params else {}

    @property
    def result(self) -> dict | None:
        """The result of a response as json.loads() would give it; None when it is no object, or an error."""
        return self.value("result") if isinstance(self.members.get("result"), tuple) else None

    @property
    def error_code(self) -> int | None:
        """The code of an error response; None when it is no integer."""
        code = members_of(self.members["error"]).get("code")
        return int(code) if is_id(code) and not isinstance(code, str) else None

    @property
    def is_result(self) -> bool:
        return "result" in self.members

    def id_span(self) -> tuple[int, int]:
        """Where the id stands: mostly at the head or the tail of the message, where a look is enough."""
        text = self.text
        match = _ID_AT_HEAD.match(text) or _ID_AT_TAIL.search(text, max(0, len(text) - _TAIL_LENGTH))
        return match.span(1) if match else self.span("id")

    @property
    def raw_id(self) -> bytes:
        """The id as it was written."""
        if type(self.id) is int and self.id > 0:
            return b"%d" % self.id                 # there is one way to write it
        start, end = self.id_span()
        return self.text[start:end].encode()

    def parsed(self) -> "Message":
        """Itself; a ResponseLine has to be parsed for this."""
        return self

    @property
    def payload(self) -> list[bytes]:
        """The message as it is."""
        return [self.changed([])]

    def new_members(self, new: dict[str, str], *path: str) -> tuple[int, int, str]:
        """The change that puts members (name -> JSON) into the object at `path`; if need be, params are made for it."""
        inside = as_object(new)[1:-1]
        if path == ("params",) and "params" not in self.members:
            start = self.text.index("{") + 1
            return start, start, f'"params":{{{inside}}},'
        start = self.span(*path)[0] + 1
        is_empty = self.text[_WHITESPACE.match(self.text, start).end()] == "}"
        return start, start, inside if is_empty else inside + ","

    def with_id(self, raw_id: bytes) -> list[bytes]:
        """The payload with another id."""
        return [self.changed([self.new_id(raw_id)])]

    def new_id(self, raw_id: bytes) -> tuple[int, int, str]:
        """The change that gives it another id."""
        return (*self.id_span(), raw_id.decode())


def parse_message(text: str, is_servers: bool = False) -> Message:
    """The one message that `text` is; RPCError, with the fitting code, if it is not one. Slips that SDKs tolerate,
    mostly servers', are mended, which changes the message's text."""
    try:
        start = 0 if text[:1] == "{" else _WHITESPACE.match(text).end()
        is_shallow = len(text) < 4 * SPARE_DEPTH or len(text) < LARGE and (
            text.count("[") + text.count("{") < SPARE_DEPTH)
        value, end = (scan_value if is_shallow else _scan_deeper_down)(text, start)
        if end != len(text) and _WHITESPACE.match(text, end).end() != len(text):
            raise ValueError("text behind the message")
        if not isinstance(value, tuple):
            raise RPCError(f"not one JSON-RPC message but {'a batch' if isinstance(value, list) else 'another value'}")
        members = without_repeats(value)
        if None in members.values() or is_servers and "method" not in members:
            text, members = mended(text, members, is_servers)
        try:
            check_message(members)
        except RPCError as error:
            if is_id(members.get("id")) and not members.keys() & {"result", "error"}:
                error.raw_id = JSONObject(text).raw("id").encode()
            raise
        return Message(text, members)
    except (ValueError, StopIteration) as error:
        reason = f": {error}" if isinstance(error, ValueError) else ""
        raise RPCError(f"not valid JSON{reason}", code=PARSE_ERROR) from None
    except RecursionError:
        raise RPCError("nested too deeply", code=PARSE_ERROR) from None


def with_member(message: Message, text: str, *path: str) -> Message:
    """A message with another text for the member at `path`."""
    return parse_message(message.with_text(text, *path).decode(), is_servers=True)


def mended(text: str, members: dict, is_servers: bool) -> tuple[str, dict]:
    """A message and its members as JSON-RPC wants them: without null params and, in a server's response, without a null
    method, a null error, or a null result beside an error. A response with neither gets an empty result, and an error
    without an id, which MCP has since 2025-11-25, the id null."""
    is_response = is_servers and members.get("method") is None and ("id" in members or bool(members.get("error")))
    drops = {"params", "method", "error"} if is_response else {"params"}
    drops |= {"result"} if is_response and members.get("error") else set()
    kept = {name: value for name, value in members.items() if value is not None or name not in drops}
    if is_response:
        kept.setdefault("id")
    if is_response and kept.keys() == {"jsonrpc", "id"}:
        kept["result"] = ()
    if kept.keys() == members.keys():
        return text, members
    written = JSONObject(text).raw_members()
    return as_object({name: written.get(name, "null" if name == "id" else "{}") for name in kept}), kept


is_batch = _BATCH_START.match            # is a text an array, if it is JSON at all?


def split_array(text: str, limit: int = MAX_BATCH) -> list[str]:
    """The texts of the values in an array; RPCError when it is not an array, or has more than `limit`."""
    texts, after = [], _BATCH_START.match(text)
    try:
        while after and after[1][-1] != "]":
            start = _WHITESPACE.match(text, after.end()).end()
            _, end = scan_value(text, start)
            texts.append(text[start:end])
            if len(texts) > limit:
                raise RPCError(f"more than {limit} messages in a batch")
            after = _AFTER_ELEMENT.match(text, end)
    except (ValueError, StopIteration, RecursionError):
        after = None
    if not after or _WHITESPACE.match(text, after.end()).end() != len(text):
        raise RPCError("not valid JSON", code=PARSE_ERROR)
    return texts


def check_lookalikes(members: dict, known: frozenset[str], code: int = INVALID_PARAMS) -> None:
    """Refuses a name that differs from a known one in case alone: Go's encoding/json, for one, takes it for that one,
    and would act on what was not checked here."""
    folded = set(map(str.casefold, known))
    for name in members:
        if name not in known and name.casefold() in folded:
            raise RPCError(f"{name[:80]!r} may be taken for another name", code=code)


def check_message(members: dict) -> None:
    """Refuses what is JSON but no JSON-RPC 2.0 message as MCP uses them."""
    if not MEMBERS.issuperset(members):
        check_lookalikes(members, MEMBERS, INVALID_REQUEST)
    if members.get("jsonrpc") != "2.0":
        raise RPCError('jsonrpc must be "2.0"')
    # MCP 2025-11-25, Overview, Requests: "Unlike base JSON-RPC, the ID MUST NOT be null."
    if "id" in members and not is_id(members["id"]) and not ("error" in members and members["id"] is None):
        raise RPCError("id must be a string or an integer")
    if "params" in members and not isinstance(members["params"], tuple):
        raise RPCError("params must be an object", code=INVALID_PARAMS)
    if "method" in members:
        if not isinstance(members["method"], str):
            raise RPCError("method must be a string")
        if "result" in members or "error" in members:
            raise RPCError("a message with a method must not have a result or an error")
    elif "id" not in members or ("result" in members) == ("error" in members):
        raise RPCError("there must be a method, or an id and either a result or an error")
    elif "error" in members and not isinstance(members["error"], tuple):
        raise RPCError("error must be an object")


def is_id(value: object) -> bool:
    """Is it a string or an integer, as the id of a request or a progress token? 1.0 is an integer in JSON."""
    return type(value) is int or isinstance(value, str) or isinstance(value, float) and value.is_integer()


def as_own_id(value: object) -> object:
    """An id that we chose, from what comes back: some SDKs make a string of it."""
    return int(value) if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value) else value


def encode_request(request_id: int | None, method: str, params: dict | None = None) -> bytes:
    """A message of our own: a request, or without an id a notification."""
    message = {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}
    return dump({name: value for name, value in message.items() if value is not None}).encode()


INITIALIZED = encode_request(None, "notifications/initialized")


def list_changed(kind: str, params: dict | None = None) -> Message:
    """A notification of our own that the tools, prompts or resources changed."""
    return parse_message(encode_request(None, f"notifications/{kind}/list_changed", params).decode())


def resource_updated(uri: str) -> Message:
    """A notification of our own that a resource changed."""
    return parse_message(encode_request(None, RESOURCE_UPDATED, {"uri": uri}).decode())


def encode_result(raw_id: bytes, result: bytes = b"{}") -> list[bytes]:
    """The payload of a successful response; `result` is JSON."""
    return [b'{"jsonrpc":"2.0","id":%b,"result":%b}' % (raw_id, result)]


def encode_end_of_subscription(raw_id: bytes) -> list[bytes]:
    """The response to a subscriptions/listen that the server ends. MCP 2026-07-28, Subscriptions, Graceful Closure."""
    return encode_result(raw_id, b'{"resultType":"complete","_meta":{"%b":%b}}' % (SUBSCRIPTION_KEY.encode(), raw_id))


def encode_error(raw_id: bytes | None, error: ProxyError) -> list[bytes]:
    """The payload of an error response. MCP 2025-11-25, Overview, Error Responses: no id when none could be read."""
    raw_id = raw_id or error.raw_id
    member = b'"id":%b,' % raw_id if raw_id else b""
    return [b'{"jsonrpc":"2.0",%b"error":%b}' % (member, dump(error.error_object()).encode())]


# A server's response is not even parsed where its id stands at the head or the tail (TypeScript servers write it
# last): the rest need not be understood then, even 8 MB of a screenshot. (Code that every line passes uses find():
# `in` first tries to take its left side for an integer, and that exception takes time.)
_VERSION = rb'"jsonrpc": ?"2\.0"'
_ID = rb'"id": ?([0-9]{1,18})'
_ANSWER = rb'"(result|error)":[ \t]*+(?!null)'
_RESPONSE_HEAD = re.compile(rb"\{(?:%b, ?)?%b, ?(?:%b, ?)?%b" % (_VERSION, _ID, _VERSION, _ANSWER))
_NULL = re.compile(rb'"(?:result|error|params|method)"\s*:\s*null')
_ANSWER_FIRST = re.compile(rb"\{(?:%b, ?)?%b" % (_VERSION, _ANSWER))
_RESPONSE_TAIL = re.compile(rb", ?(?:%b, ?)?%b(?:, ?%b)?\}\Z" % (_VERSION, _ID, _VERSION))
_IS_ERROR = re.compile(rb'"isError"\s*:\s*true')
_END_BYTES = 4 * 1024


class ResponseLine:
    """A response from a server, as a line that was not parsed: where its id is, and where its result or error."""

    __slots__ = ("line", "id", "start", "end", "is_result", "answer_start")

    def __init__(self, line: bytes, id_match: re.Match, answer_match: re.Match):
        self.line = line
        self.id = int(id_match[1])
        self.start, self.end = id_match.span(1)
        self.is_result = answer_match[answer_match.lastindex] == b"result"
        self.answer_start = answer_match.end()

    @property
    def result_start(self) -> int | None:
        """Where the members of the result begin; None when it is no object, or an error."""
        at = self.answer_start
        return at + 1 if self.is_result and self.line[at:at + 1] == b"{" else None

    def parsed(self) -> Message:
        """The whole response as a Message; RPCError when it is not valid."""
        return parse_message(decode_json(self.line), is_servers=True)

    def with_id(self, raw_id: bytes, at: int | None = None, to: int = 0, *parts: bytes | memoryview) -> list:
        """The payload with another id, and with `parts` in place of what stands from `at` to `to` in the result. A
        large line is not copied."""
        line, start, end = self.line, self.start, self.end
        if len(line) >= LARGE:
            line = memoryview(line)
        if at is None:
            return [line[:start], raw_id, line[end:]]
        if at < start:
            return [line[:at], *parts, line[to:start], raw_id, line[end:]]
        return [line[:start], raw_id, line[end:at], *parts, line[to:]]


def has_one_id(line: bytes) -> bool:
    """Does a server's line plainly have only one id? If a client took another for the message's, one of several servers
    that it sees as one could answer for the others."""
    return line.lower().count(b'"id"') == 1 and (b"\\u00" not in line or not any(
        letter in line for letter in (b"\\u0049", b"\\u0069", b"\\u0044", b"\\u0064")))


def error_type(response: ResponseLine | Message) -> str:
    """What went wrong, as OpenTelemetry has it (Semantic conventions for MCP, error.type): the code of an error, or
    tool_error where a tool's result says so; "" if nothing did. Of a large result only the ends are searched."""
    if response.is_result and isinstance(response, ResponseLine):
        line = response.line
        if len(line) > LARGE:
            line = line[:_END_BYTES] + line[-_END_BYTES:]
        if b'"isError"' not in line or not _IS_ERROR.search(line):
            return ""
    with contextlib.suppress(RPCError):
        message = response.parsed()
        if not message.is_result:
            return OTHER if message.error_code is None else str(message.error_code)
        return "tool_error" if members_of(message.members["result"]).get("isError") is True else ""
    return ""


def find_response(line: bytes) -> ResponseLine | None:
    """The line, if it plainly is a response; None if it has to be parsed, to be sure or to change something in it."""
    if line.find(b"\r") >= 0 or line[-1:] != b"}":
        return None
    searched = line if len(line) < 512 else line[-_TAIL_LENGTH:]
    if searched.find(b"null") >= 0 and _NULL.search(searched):
        return None
    head = _RESPONSE_HEAD.match(line)
    if head:
        return ResponseLine(line, head, head)
    payload = _ANSWER_FIRST.match(line)
    tail = _RESPONSE_TAIL.search(line, max(0, len(line) - _TAIL_LENGTH)) if payload else None
    return ResponseLine(line, tail, payload) if tail else None


def escape_separators(line: bytes) -> bytes:
    """JSON that means the same, with U+2028, U+2029 and U+0085 escaped, which some readers take for the end of a line;
    they can only be in strings. RPCError when it is not UTF-8."""
    decode_json(line)
    return line.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029").replace(
        b"\xc2\x85", b"\\u0085")


def find_response_id(head: bytes, tail: bytes) -> int | None:
    """The id of a response of which only the first and last bytes are known."""
    match = _RESPONSE_HEAD.match(head) or _ANSWER_FIRST.match(head) and _RESPONSE_TAIL.search(tail[-_TAIL_LENGTH:])
    return int(match[1]) if match else None


_REQUEST_ID = re.compile(rb'"id": ?(-?[0-9]{1,100}(?![0-9.eE])|"[^"\\\x00-\x1f]{1,100}")')
_REQUEST_HEAD = re.compile(rb'\{(?:"jsonrpc": ?"2\.0", ?|"method": ?"[^"\\]{1,100}", ?)*%b' % _REQUEST_ID.pattern)
_RESPONSE_START = re.compile(rb'\{(?:"jsonrpc": ?"2\.0", ?|"id":[^,]*+, ?)*"(?:result|error)"')
_REQUEST_TAIL = re.compile(rb'%b(?:, ?"jsonrpc": ?"2\.0")?\}\s*\Z' % _REQUEST_ID.pattern)


def find_request_id(head: bytes, tail: bytes) -> bytes | None:
    """The id, as JSON, of a request of which only the first and last bytes are known; None where it is not plain."""
    if b'"method"' not in head + tail or _RESPONSE_START.match(head):
        return None
    match = _REQUEST_HEAD.match(head) or _REQUEST_TAIL.search(tail[-_TAIL_LENGTH:])
    return match[1] if match else None


# ============================================================================
# 8. Protocol eras
# ============================================================================
#
# MCP changed in 2026. Legacy: a client and a server shake hands once
# (`initialize`), and either may then ask the other. Modern (2026-07-28): every
# request says in its _meta who sends it and what the sender can do, only clients
# ask, and a server that wants to know something ends the request with
# `input_required`; the client then sends the request again with the answers.
#
# This section restates messages of one era in the other. Which message needs what
# is up to *Bridges*.

# Whether a side shakes hands or says all with each request. (A StrEnum, because the hash of an Enum is slow.)
LEGACY, MODERN = Era = enum.StrEnum("Era", "LEGACY MODERN")


# Methods with a parameter that names what they are about, a string. Modern requests repeat it in Mcp-Name.
NAMED_BY = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}
REQUIRED_PARAMETERS = {**NAMED_BY, "initialize": "protocolVersion", "resources/subscribe": "uri",
                       "resources/unsubscribe": "uri"}
# The tasks extension (SEP-2663), Streamable HTTP: Routing Headers, adds to what Mcp-Name repeats.
NAMED_IN_HEADER = {**NAMED_BY, **dict.fromkeys(("tasks/get", "tasks/update", "tasks/cancel"), "taskId")}

# MCP 2026-07-28, Changelog, Major changes 2, 4 and 5; the last two: SEP-2663, Backward Compatibility.
REMOVED_IN_MODERN = frozenset({"initialize", "ping", "logging/setLevel", "resources/subscribe",
                               "resources/unsubscribe", "tasks/result", "tasks/list"})

# MCP 2026-07-28, Caching, Cacheable Results.
CACHEABLE = frozenset({"server/discover", "tools/list", "prompts/list", "resources/list", "resources/templates/list",
                       "resources/read", "skills/list", "skills/get"})          # the last two: SEP-2640

# MCP 2026-07-28, Multi Round-Trip Requests, Supported Requests.
MAY_NEED_INPUT = frozenset({"tools/call", "prompts/get", "resources/read"})

INPUT_REQUESTS = frozenset({"sampling/createMessage", "elicitation/create", "roots/list"})     # that ask for input
ANSWERS = frozenset(("inputResponses", "requestState"))          # parameters of a request that comes again with input

# What can be subscribed to beside resources, and the notification that it brings. MCP 2026-07-28, Subscriptions.
LIST_CHANGES = {f"{kind}ListChanged": (kind, f"notifications/{kind}/list_changed")
                for kind in ("tools", "prompts", "resources")}

# What we tell a server that many clients share of its clients. Not roots: they are one client's own.
SHARED_CAPABILITIES = {"sampling": {}, "elicitation": {"form": {}, "url": {}}}
OUR_INFO = {"name": "mcpproxy", "version": __version__}
OUR_ENVELOPE = {VERSION_KEY: MODERN_VERSION, CLIENT_INFO_KEY: OUR_INFO, CAPABILITIES_KEY: {}}


def our_initialize(is_for_all: bool) -> dict:
    """The params of the proxy's own `initialize`. Roots are one client's, so a server for all is not told of them."""
    capabilities = SHARED_CAPABILITIES if is_for_all else {**SHARED_CAPABILITIES, "roots": {"listChanged": True}}
    return {"protocolVersion": LEGACY_VERSIONS[0], "capabilities": capabilities, "clientInfo": OUR_INFO}


def check_parameters(message: Message) -> None:
    """Refuses a request without an id or without the parameter that names what it is about, a _meta that is no object,
    lookalikes, and a handshake that says too much of its client. (A server may carry out a request without an id, to
    which no limit would have been applied.)"""
    params, meta = message.params, message.meta
    if message.kind is NOTIFICATION and "notifications/" not in message.method:
        raise RPCError("a request must have an id")
    if "_meta" in params and not isinstance(params["_meta"], tuple):
        raise RPCError("params._meta must be an object", code=INVALID_PARAMS)
    if not PARAMETERS.issuperset(params):
        check_lookalikes(params, PARAMETERS)
    if meta and not META.issuperset(meta):
        check_lookalikes(meta, META)
    if RELATED_TASK_KEY in meta or "ref" in params:
        try:
            for reference in meta.get(RELATED_TASK_KEY), params.get("ref"):            # they too name what it is about
                check_lookalikes(unique_members_of(reference), PARAMETERS)
        except ValueError as error:
            raise RPCError(str(error), code=INVALID_PARAMS) from None
    required = REQUIRED_PARAMETERS.get(message.method)
    if required and not isinstance(params.get(required), str):
        raise RPCError(f"{message.method} needs the parameter {required}", code=INVALID_PARAMS)
    if message.method == "initialize":
        check_size(message, *(("params", name) for name in ("capabilities", "clientInfo") if name in params))


def wholes_of(uri: object) -> list[str]:
    """The resources that an update of this one concerns: itself, and what it may be a part of. MCP 2025-11-25, Schema,
    ResourceUpdatedNotification: "This might be a sub-resource of the one that the client actually subscribed to." """
    if not isinstance(uri, str):
        return []
    ends = re.finditer("(?=[/?#])|(?<=/)", uri[:MAX_URI])          # before each of these, and behind a slash
    return [uri, *(uri[:end.start()] for end in ends if end.start() < len(uri))]


@functools.lru_cache(maxsize=1_024)
def template_parts(template: str) -> tuple[str, ...]:
    """A resource template's literals and {expressions}."""
    return tuple(part for part in re.split(r"(\{[^{}]*\})", template[:MAX_URI]) if part)


def fits_template(uri: str, template: str) -> bool:
    """Is a URI one that a resource template stands for? RFC 6570, §3.2: {name} is one or more characters but / ? #,
    {+name}, {/name*} and {?name} may be anything. The time is at most in proportion to characters times parts."""
    parts, ends = template_parts(template)[:MAX_TEMPLATE_PARTS], {0}         # where the parts so far may end
    if parts and not parts[-1].startswith("{") and not uri.endswith(parts[-1]):
        return False                       # a quick no for most templates
    for part in parts:
        if not part.startswith("{"):
            ends = {end + len(part) for end in ends if uri.startswith(part, end)}
        elif not (part[1:2].isalnum() and part[-2] != "*"):
            ends = set(range(min(ends), len(uri) + 1))
        else:
            before, ends, is_inside = ends, set(), False
            for at in range(min(before), len(uri)):
                is_inside = (is_inside or at in before) and uri[at] not in "/?#"
                if is_inside:
                    ends.add(at + 1)
        if not ends:
            return False
    return len(uri) in ends


def negotiate(requested: object) -> str:
    """The revision to answer an `initialize` with. MCP 2025-11-25, Lifecycle, Version Negotiation."""
    return requested if requested in LEGACY_VERSIONS else LEGACY_VERSIONS[0]


def missing_capabilities(capabilities: dict, method: str, params: dict) -> dict | None:
    """What a client with these capabilities lacks to be asked this by a server; None when it lacks nothing."""
    if method == "sampling/createMessage":
        sampling = capabilities.get("sampling")
        if not isinstance(sampling, dict):
            return {"sampling": {}}
        if params.get("tools") is not None and "tools" not in sampling:
            return {"sampling": {"tools": {}}}
    elif method == "elicitation/create":
        elicitation = capabilities.get("elicitation")
        mode = "url" if params.get("mode") == "url" else "form"
        # MCP 2025-11-25, Elicitation, Capabilities: an empty object means form mode only. Old Go SDKs say Form: null.
        modes = elicitation.keys() & {"form", "url"} or {"form"} if isinstance(elicitation, dict) else ()
        if mode not in modes:
            return {"elicitation": {mode: {}}}
    elif method == "roots/list" and not isinstance(capabilities.get("roots"), dict):
        return {"roots": {}}
    return None


# Modern requests.

@dataclasses.dataclass(slots=True)
class Envelope:
    """What a modern request says of its sender. MCP 2026-07-28, Overview, _meta."""

    capabilities: dict
    log_level: str | None
    headers: dict[str, str] | None         # of HTTP, which repeat some of it; None on a transport without any


def is_modern(message: Message, version_header: str | None) -> bool:
    """Does a message claim to be of the modern era? `initialize` negotiates, so its header decides nothing."""
    return VERSION_KEY in message.meta or CAPABILITIES_KEY in message.meta or (
        version_header == MODERN_VERSION and message.method != "initialize")


def check_size(message: Message, *paths: tuple[str, ...]) -> None:
    """Refuses a message if what stands at one of these paths is too large to be kept as long as its client is."""
    for path in paths if len(message.text) > SMALL_INTRODUCTION else ():
        text = message.raw(*path).encode(errors="replace")
        # Values are counted by what begins them, outside of strings such as an icon's URI.
        if len(text) > MAX_INTRODUCTION or sum(map(_STRING.sub(b"", text).count, b"[{,")) > MAX_INTRODUCTION_VALUES:
            raise RPCError(f"{path[-1]} is too large", code=INVALID_PARAMS)


def check_modern(message: Message, headers: dict[str, str] | None) -> Envelope:
    """The envelope of a modern request that may go on. `headers` are HTTP's, None on a transport without any.

    The checks, in the order of the specification's conformance tests: the envelope is whole, the headers say what the
    body says, the revision is known and has not removed the method. The client is told of the first that fails."""
    version, capabilities, log_level = map(message.meta.get, (VERSION_KEY, CAPABILITIES_KEY, LOG_LEVEL_KEY))
    if not isinstance(version, str):
        raise RPCError(f"_meta needs {VERSION_KEY}", code=INVALID_PARAMS)
    if not isinstance(capabilities, tuple):
        raise RPCError(f"_meta needs {CAPABILITIES_KEY}", code=INVALID_PARAMS)
    if log_level is not None and log_level not in LOG_LEVELS:
        raise RPCError(f"{LOG_LEVEL_KEY} is no log level", code=INVALID_PARAMS)
    check_size(message, ("params", "_meta", CAPABILITIES_KEY))
    if headers is not None:
        check_headers(message, headers, version)
    if version != MODERN_VERSION:
        raise RPCError("unsupported protocol version", code=UNSUPPORTED_VERSION,
                       data={"supported": [MODERN_VERSION], "requested": version})
    if message.method in REMOVED_IN_MODERN:
        raise RPCError(f"{message.method} is no method of {MODERN_VERSION}", status=404, code=METHOD_NOT_FOUND)
    check_parameters(message)
    return Envelope(message.value("params", "_meta", CAPABILITIES_KEY) if capabilities else {}, log_level, headers)


def check_headers(message: Message, headers: dict[str, str], version: str) -> None:
    """MCP 2026-07-28, Streamable HTTP, Server Validation: a balancer may have acted on the headers."""
    named = NAMED_IN_HEADER.get(message.method)
    expected = (("mcp-protocol-version", version), ("mcp-method", message.method),
                ("mcp-name", message.params.get(named)))
    for name, value in expected if named else expected[:2]:
        given = headers.get(name)
        if given is None:
            raise RPCError(f"missing header {name}", code=HEADER_MISMATCH)
        if (decode_header(given) if name == "mcp-name" else given) != value:
            raise RPCError(f"the header {name} does not match the body", code=HEADER_MISMATCH)


def encode_header(value: str | int | float) -> str:
    """A string, an integer or a boolean as a header's value. Streamable HTTP, Value Encoding."""
    text = value if isinstance(value, str) else dump(int(value) if isinstance(value, float) else value)
    if _PLAIN_VALUE.fullmatch(text) and not (text.startswith("=?base64?") and text.endswith("?=")):
        return text
    return f"=?base64?{base64.b64encode(text.encode('utf-8', 'surrogatepass')).decode()}?="


def decode_header(value: str) -> str | None:
    """What a header's value stands for; None when it cannot be read. Streamable HTTP, Value Encoding."""
    if not (value.startswith("=?base64?") and value.endswith("?=") and len(value) > 10):
        return value if value.isascii() else None
    try:
        return base64.b64decode(value[9:-2], validate=True).decode()
    except ValueError:
        return None


_HEADER_NAME = re.compile(_TOKEN.decode())
_PLAIN_VALUE = re.compile(r"(?:[!-~](?:[\t -~]*[!-~])?)?")
_DECIMAL = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")             # float() takes 4_2 and infinity, too


def mirrored_parameters(schema: object, path: tuple = ()) -> dict[str, tuple[str, ...]]:
    """Header name in lower case -> path of the argument that is repeated in it, for a tool's inputSchema."""
    found = {}
    properties = member_at(schema, ("properties",))
    for name, inner in properties.items() if isinstance(properties, dict) else ():
        header = member_at(inner, ("x-mcp-header",))
        if isinstance(header, str) and _HEADER_NAME.fullmatch(header) and inner.get("type") in (
                "string", "integer", "boolean"):
            found["mcp-param-" + header.lower()] = (*path, name)
        found.update(mirrored_parameters(inner, (*path, name)))
    return found


# JSON Schema 2020-12: keywords that hold schemas by name, and keywords whose values are data, not schemas.
NAMING_KEYWORDS = frozenset("properties patternProperties dependentSchemas dependencies $defs definitions".split())
DATA_KEYWORDS = frozenset({"default", "const", "enum", "examples"})


def misuses_headers(schema: object) -> bool:
    """Does a tool's inputSchema name a header where it may not, or in a way that it may not? Then mirrored_parameters()
    finds fewer than there are. MCP 2026-07-28, Streamable HTTP, Schema Extension."""
    def number_in(value: object, is_map: bool = False) -> int:             # a map has schemas by names of any kind
        if not isinstance(value, dict):
            return sum(map(number_in, value if isinstance(value, list) else ()))
        return (not is_map and "x-mcp-header" in value) + sum(
            number_in(inner, not is_map and name in NAMING_KEYWORDS) for name, inner in value.items()
            if is_map or name not in DATA_KEYWORDS)
    try:
        return number_in(schema) != len(mirrored_parameters(schema))
    except RecursionError:
        return False


def member_at(value: object, path: tuple[str, ...]) -> object:
    """The value of the member to which these names lead; None where there is none."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def mirror(parameters: dict[str, tuple[str, ...]], arguments: object) -> tuple[tuple[str, str], ...]:
    """The headers that repeat arguments, as (name, value) pairs."""
    values = ((header, member_at(arguments, path)) for header, path in parameters.items())
    return tuple((header, encode_header(value)) for header, value in values if is_id(value) or isinstance(value, bool))


def check_mirrored(parameters: dict[str, tuple[str, ...]], arguments: object, headers: dict[str, str]) -> None:
    """Compares Mcp-Param-* headers with the arguments that they repeat.

    MCP 2026-07-28, Streamable HTTP, Server Behavior for Custom Headers."""
    for header, path in parameters.items():
        value, given = member_at(arguments, path), headers.get(header)
        if value is None:
            if given is not None:
                raise RPCError(f"the header {header} repeats an argument that is not there", code=HEADER_MISMATCH)
        elif given is None:
            raise RPCError(f"missing header {header}", code=HEADER_MISMATCH)
        elif not says_the_same(decode_header(given), value):
            raise RPCError(f"the header {header} does not match the body", code=HEADER_MISMATCH)


def says_the_same(text: str | None, value: object) -> bool:
    """Is this header text the value? Integers are compared as numbers: 42.0 is 42."""
    if isinstance(value, bool):
        return text == ("true" if value else "false")
    if isinstance(value, (int, float)):
        # Beyond 2^53 another number may have the same float: an integer is told by its digits there.
        return text == str(value) or bool(_DECIMAL.fullmatch(text or "")) and float(text) == value and (
            isinstance(value, float) or abs(value) < 2**53)
    return text == value


def restated_meta(message: Message, new: dict[str, str], keeps_envelope: bool = True,
                  beside: dict[str, str] | None = None) -> list[tuple[int, int, str]]:
    """The changes that put new members (name -> JSON) into a message's params._meta, and those `beside` it into its
    params; and that take the envelope out, unless it is to stay."""
    if not (new or beside) and (keeps_envelope or not message.meta):
        return []
    changes, beside = [], beside or {}
    kept = [name for name in message.meta if keeps_envelope or not name.startswith(RESERVED_PREFIX)]
    if new and "_meta" not in message.params:
        beside = {**beside, "_meta": as_object(new)}
    elif new or len(kept) < len(message.meta):
        old = message.raw_members("params", "_meta") if kept else {}
        new = {name: old[name] for name in kept} | new if kept else new
        changes.append((*message.span("params", "_meta"), as_object(new) if new else "{}"))
    return [*changes, message.new_members(beside, "params")] if beside else changes


def without_params(message: Message, *names: str) -> Message:
    """A request without these parameters."""
    if message.params.keys().isdisjoint(names):
        return message
    return with_member(message, without_members(message.raw("params"), *names), "params")


def digest_of(message: Message) -> int:
    """A digest of what makes a request the same request when it comes again."""
    salient = {name: value for name, value in message.plain_params.items()
               if name != "_meta" and name not in ANSWERS}
    return hash(json.dumps(salient, sort_keys=True))


def input_required(requests: dict[str, Message], state: str, server_info: str | None) -> bytes:
    """The result that asks a modern client what a legacy server asks, by key, and names the call to go on with."""
    asked = {}
    for key, request in requests.items():
        # MCP 2026-07-28, Changelog, Minor changes 11: there is no elicitationId any more.
        params = without_members(request.raw("params"), "elicitationId") if request.params else "{}"
        asked[key] = as_object({"method": dump(request.method), "params": params})
    meta = {"_meta": as_object({SERVER_INFO_KEY: server_info})} if server_info else {}
    return as_object({"resultType": '"input_required"', "inputRequests": as_object(asked), "requestState": dump(state),
                      **meta}).encode()


# ============================================================================
# 9. Results
# ============================================================================
#
# How a result of one era reads in the other; what a server said of itself in its handshake, which is a result too;
# results that are too large; and task ids of several servers as one.

class Additions:
    """What every result of a method has for a modern client; the server's info (JSON) too, in its _meta."""

    def __init__(self, method: str, server_info: str | None):
        self.meta = {SERVER_INFO_KEY: server_info} if server_info else {}
        self.members = {"resultType": '"complete"'}             # name -> JSON
        if method in CACHEABLE:
            # A legacy server says nothing of caches: so none may keep it for any time, nor for anybody but the asker.
            self.members.update(ttlMs="0", cacheScope='"private"')
        beside = dict(self.members)
        if self.meta:
            self.members["_meta"] = as_object(self.meta)
        self.text, self.text_beside_meta, self.meta_text = (
            as_object(members)[1:-1].encode() for members in (self.members, beside, self.meta))
        self.find_in = re.compile(rb'"(?:%b)"' % "|".join(self.members).encode()).search


additions = functools.lru_cache(maxsize=256)(Additions)

_SERVER_INFO = f'"{SERVER_INFO_KEY}"'.encode()
_META_FIRST = re.compile(rb'[ \t]*"_meta":[ \t]*\{')
_RESULT_END = re.compile(rb'\}(?:, ?(?:"jsonrpc": ?"2\.0"|"id": ?[0-9]{1,18}))*\}\Z')
_OBJECT_END = re.compile(rb"[ \t]*\}")


def find_meta(line: bytes, start: int) -> int | None:
    """Where the members of a result's _meta begin in a line that is a response, when that is plain without parsing all
    of it: it comes first in the result, whose members begin at `start`; or last, and is the only _meta."""
    match = _META_FIRST.match(line, start)
    if match:
        return match.end()
    at = line.rfind(b'"_meta"', max(start, len(line) - LARGE))
    match = _META_FIRST.match(line, at) if at > 0 and line.find(b'"_meta"', start, at) < 0 else None
    with contextlib.suppress(ValueError, StopIteration, RecursionError):
        # In Latin-1 a character is a byte, and JSON's syntax has nothing beyond ASCII.
        if match and _RESULT_END.match(line, at + _skip_value(line[at:].decode("latin-1"), match.end() - 1 - at)[1]):
            return match.end()
    return None


def result_with(response: ResponseLine | Message, raw_id: bytes, new: Additions) -> list:
    """A response's payload with another id, and in its result what it lacks of `new`."""
    if isinstance(response, ResponseLine):
        at, line = response.result_start, response.line
        if at is None:
            return response.with_id(raw_id)
        # None of these names anywhere in the line: they can be put in without a look at the rest.
        found = new.find_in(line)
        if not found:
            return response.with_id(raw_id, at, at, new.text if _OBJECT_END.match(line, at) else new.text + b",")
        at_meta = find_meta(line, at)
        if at_meta and found[0] == b'"_meta"' and not new.find_in(line, at_meta) and _SERVER_INFO not in line:
            meta = new.meta_text if _OBJECT_END.match(line, at_meta) else new.meta_text + b","
            between = memoryview(line)[at:at_meta]           # nearly all of a large one, if its _meta stands last
            return response.with_id(raw_id, at, at_meta, new.text_beside_meta + b",", between, meta)
        response = response.parsed()
    if not isinstance(response.members.get("result"), tuple):
        return response.with_id(raw_id)
    result, changes = members_of(response.members["result"]), [response.new_id(raw_id)]
    lacking = {name: value for name, value in new.members.items() if name not in result}
    if lacking:
        changes.append(response.new_members(lacking, "result"))
    if new.meta and isinstance(result.get("_meta"), tuple) and SERVER_INFO_KEY not in members_of(result["_meta"]):
        changes.append(response.new_members(new.meta, "result", "_meta"))
    return [response.changed(changes)]


def parsed_if_it_has(response: ResponseLine | Message, name: str, written: bytes) -> Message | None:
    """The response, parsed, if its result has a member of this name and this value, a string as JSON; otherwise None.
    A line in which they stand nowhere together is not parsed."""
    if isinstance(response, ResponseLine) and (response.line.find(written) < 0 or not re.search(
            rb'"%b"\s*:\s*%b' % (name.encode(), written), response.line)):
        return None
    response = response.parsed()
    return response if members_of(response.members.get("result")).get(name) == json.loads(written) else None


_COMPLETE_FIRST = re.compile(rb'[ \t]*"resultType": ?"complete"(?:, ?|(?=\}))')
_OTHER_STRUCTURE = re.compile(rb'"structuredContent"\s*:\s*[^{\s]')
_MODERN_NAMES = b'"resultType"', b'"ttlMs"', b'"cacheScope"'


def result_without(response: ResponseLine | Message, raw_id: bytes, method: str) -> list:
    """A response's payload with another id and without what only modern results have: some members, and in a tool's
    output anything but an object (MCP 2025-11-25, Schema, CallToolResult)."""
    if isinstance(response, ResponseLine):
        at, line = response.result_start, response.line
        match = at is not None and _COMPLETE_FIRST.match(line, at)
        # None of the other names behind it, in whatever object: it can be taken out without a look at the rest.
        if match and all(line.find(name, match.end()) < 0 for name in _MODERN_NAMES) and not (
                method == "tools/list" and b'"outputSchema"' in line or method == "tools/call" and (
                    b'"structuredContent"' in line and _OTHER_STRUCTURE.search(line))):
            return response.with_id(raw_id, match.start(), match.end())
        response = response.parsed()
    changes, result = [response.new_id(raw_id)], response.members.get("result")
    if isinstance(result, tuple):
        # MCP 2026-07-28, Overview, ResultType: of a type that is not known "MUST be considered invalid".
        if members_of(result).get("resultType", "complete") != "complete":
            raise ServerError("the MCP server's result is of an unknown type")
        kept = {name: value for name, value in response.raw_members("result").items() if not (
            name in ("resultType", "ttlMs", "cacheScope") or name == "structuredContent" and value[:1] != "{")}
        tools = members_of(result).get("tools") if method == "tools/list" else None
        if isinstance(tools, list):
            kept["tools"] = f"[{','.join(map(as_legacy_tool, split_array(kept['tools'], len(tools))))}]"
        changes.append((*response.span("result"), as_object(kept)))
    return [response.changed(changes)]


def as_legacy_tool(text: str) -> str:
    """A tool as a list has it for legacy clients: some refuse the whole list for one schema in it that is not an
    object's. MCP 2025-11-25, Schema, Tool: outputSchema is "restricted to type: "object" at the root level"."""
    if '"outputSchema"' not in text:
        return text
    return (_with_output_of_objects if len(text) < LARGE else _with_output_of_objects.__wrapped__)(text)


@functools.lru_cache(maxsize=256)
def _with_output_of_objects(text: str) -> str:
    with contextlib.suppress(RecursionError, ValueError):          # too deep, or too many digits
        schema = member_at(json.loads(text), ("outputSchema",))
        properties = member_at(schema, ("properties",)) or {}
        if schema is None or isinstance(properties, dict) and member_at(schema, ("type",)) == "object" and (
                all(isinstance(one, dict) for one in properties.values())):
            return text
    return without_members(text, "outputSchema")


# MCP 2026-07-28, Streamable HTTP: the status that goes with an error of the server's.
STATUS_OF_CODE = {METHOD_NOT_FOUND: 404, HEADER_MISMATCH: 400, MISSING_CAPABILITY: 400, UNSUPPORTED_VERSION: 400}
# A legacy server's codes as modern ones: MCP 2026-07-28, Resources, Error Handling. Those that are reserved for this
# revision and later ones (Overview, Error Codes) mean something else when such a server sends them.
MODERN_CODES = {RESOURCE_NOT_FOUND: INVALID_PARAMS,
                **dict.fromkeys({*range(-32099, -32019)} - {URL_ELICITATION_REQUIRED}, INTERNAL_ERROR)}


def error_with(response: Message, raw_id: bytes, codes: dict[int, int]) -> list:
    """An error's payload with another id, and another code where `codes` has one for it."""
    changes, code = [response.new_id(raw_id)], response.error_code
    if code in codes:
        changes.append((*response.span("error", "code"), str(codes[code])))
    return [response.changed(changes)]


def speaks_modern(response: Message) -> bool:
    """Is this the DiscoverResult of a server that speaks the revision we do?"""
    return MODERN_VERSION in strings_of((response.result or {}).get("supportedVersions"))


def check_is_legacy(found: Exception | Message) -> None:
    """RefusedAsModern when a server's error or answer to server/discover says that `initialize` is of no use either.
    MCP 2026-07-28, stdio and Streamable HTTP, Backward Compatibility."""
    error, result = getattr(found, "data", None), found.result if isinstance(found, Message) else None
    code = member_at(error, ("code",))
    if code in (HEADER_MISMATCH, MISSING_CAPABILITY):
        raise RefusedAsModern(f"the MCP server refused: {str(member_at(error, ('message',)))[:200]}")
    versions = strings_of(member_at(error, ("data", "supported")) if code == UNSUPPORTED_VERSION else
                          member_at(result, ("supportedVersions",)))
    if versions and {MODERN_VERSION, *LEGACY_VERSIONS}.isdisjoint(versions):
        spoken = ", ".join(versions)[:200]
        raise RefusedAsModern(f"the MCP server speaks {spoken}, and none of the revisions known here")


def merged(one: object, other: object) -> object:
    """Capabilities together: what either has."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {**one, **other, **{name: merged(one[name], other[name]) for name in one if name in other}}
    return one if isinstance(one, dict) else other if isinstance(other, dict) else one or other


def without_session(capabilities: str, is_anybody: bool) -> str:
    """What is left of capabilities (JSON) for a legacy client without a session; `is_anybody`: nor a key."""
    unfit = "subscribe", "listChanged", *(["list"] if is_anybody else [])          # of tasks: nobody knows whose
    return as_object({name: without_members(one, *unfit) if one[:1] == "{" else one
                      for name, one in JSONObject(capabilities).raw_members().items() if name != "logging"})


UNNAMED = {"name": "unnamed", "version": "0"}          # a program that says nothing of itself; a modern one need not


class Identity:
    """What a server said of itself in its handshake, of either era, kept to tell every client."""

    def __init__(self, era: Era, response: Message):
        self.era = era
        self._result = response.result or {}
        self.capabilities = self._result.get("capabilities")
        if not isinstance(self.capabilities, dict):
            raise ServerError("the MCP server's answer to the handshake is not one")
        self._members = response.raw_members("result")         # name -> JSON
        self._told = {name: self._members[name] for name in ("capabilities", "instructions") if name in self._members}
        # The revision that the server answered with; a legacy server may have sent anything.
        self.version: object = MODERN_VERSION if era is MODERN else self._result.get("protocolVersion")
        path = ("_meta", SERVER_INFO_KEY) if era is MODERN else ("serverInfo",)
        info = member_at(self._result, path)
        self.info = response.raw("result", *path) if isinstance(info, dict) else None          # serverInfo, as JSON
        self.name, self.release = (str(member_at(info, (name,)) or usual) for name, usual in UNNAMED.items())

    def initialize_result(self, version: str, has_session: bool, is_anybody: bool) -> bytes:
        """The result of `initialize`, with the revision that was negotiated with one client."""
        new = {"protocolVersion": f'"{version}"'}
        if not has_session:
            new["capabilities"] = without_session(self._told["capabilities"], is_anybody)
        if "protocolVersion" in self._members and self.era is LEGACY:
            return as_object(self._members | new).encode()
        return as_object({**self._told, **new, "serverInfo": self.info or dump(UNNAMED)}).encode()

    def discover_result(self) -> bytes:
        # SEP-2663: the tasks of 2025-11-25 "MUST NOT" be advertised.
        return as_object({"supportedVersions": dump([MODERN_VERSION, *LEGACY_VERSIONS]), **self._told,
                          "capabilities": without_members(self._told["capabilities"], "tasks"),
                          **additions("server/discover", self.info).members}).encode()

    def has(self, capability: str) -> bool:
        """Does the server declare a capability, or an extension?"""
        extensions = self.capabilities.get("extensions")
        return capability in self.capabilities or isinstance(extensions, dict) and capability in extensions

    @property
    def instructions(self) -> str | None:
        """What the server tells models of itself."""
        text = self._result.get("instructions")
        return text if isinstance(text, str) and text.strip() else None

    def supported(self, wanted: dict) -> dict:
        """The part of a subscription filter that a server of these capabilities can serve."""
        honoured: dict = {name: True for name, (kind, _) in LIST_CHANGES.items()
                          if wanted.get(name) is True and member_at(self.capabilities, (kind, "listChanged"))}
        uris = wanted.get("resourceSubscriptions")
        if isinstance(uris, list) and member_at(self.capabilities, ("resources", "subscribe")):
            honoured["resourceSubscriptions"] = [*dict.fromkeys(strings_of(uris))]
        return honoured


# Results that are too large.

def shortened(text: str, limit: int) -> str:
    """A text cut to about `limit` bytes: its head and tail, 3 to 1, around a note of how much was left out."""
    data = text.encode("utf-8", "surrogatepass")
    head, tail = data[:limit * 3 // 4], data[len(data) - limit // 4:]
    marker = f"\n[... {kilobytes(len(data) - limit)} of {kilobytes(len(data))} left out by mcpproxy ...]\n"
    return head.decode("utf-8", "ignore") + marker + tail.decode("utf-8", "ignore")


def kilobytes(size: int) -> str:
    return f"{max(1, round(size / 1024))} kB"


# Where a response has the result of a tool. The last: SEP-2663, Task Polling; there it is a task's that has ended.
TOOL_RESULTS = {"tools/call": ("result",), "tasks/result": ("result",), "tasks/get": ("result", "result")}


def cut_result(message: Message, limit: int, path: tuple[str, ...] = ("result",)) -> Message:
    """The message without what is larger than `limit` bytes in a tool's result, which is at `path`."""
    result = message.members
    for name in path:
        result = members_of(result.get(name))
    content = result["content"] if isinstance(result.get("content"), list) else []
    written = split_array(message.raw(*path, "content"), len(content)) if content else []
    blocks = [*written]
    for number, block in enumerate(map(members_of, content)):
        text = block.get("text")
        if block.get("type") == "text" and isinstance(text, str) and len(text.encode("utf-8", "surrogatepass")) > limit:
            old = JSONObject(blocks[number]).raw_members()
            blocks[number] = as_object(old | {"text": dump(shortened(text, limit))})
    members = message.raw_members(*path) if result else {}
    structured = len(members.get("structuredContent", "").encode())
    if structured > limit:
        del members["structuredContent"]
        blocks.append(dump({"type": "text", "text": f"[... structuredContent, {kilobytes(structured)}, left out by "
                                                    "mcpproxy ...]"}))
    if blocks == written:
        return message
    members["content"] = f"[{','.join(blocks)}]"
    return with_member(message, as_object(members), *path)


def without_empty_cursor(response: ResponseLine | Message) -> ResponseLine | Message:
    """A page of a legacy server's list as a modern client understands it; see next_cursor()."""
    page = parsed_if_it_has(response, "nextCursor", b'""')
    return with_member(page, without_members(page.raw("result"), "nextCursor"), "result") if page else response


def as_private(response: ResponseLine | Message) -> ResponseLine | Message:
    """A result that no cache may give to others. MCP 2026-07-28, Caching."""
    public = parsed_if_it_has(response, "cacheScope", b'"public"')
    return with_member(public, '"private"', "result", "cacheScope") if public else response


def with_known_versions(discovered: ResponseLine | Message) -> ResponseLine | Message:
    """What a modern server says of itself, without revisions that the proxy does not speak."""
    discovered = discovered.parsed()
    versions = strings_of(members_of(discovered.members.get("result")).get("supportedVersions"))
    known = [version for version in versions if version in (MODERN_VERSION, *LEGACY_VERSIONS)]
    return discovered if known == versions else with_member(discovered, dump(known), "result", "supportedVersions")


def next_cursor(page: Message, era: Era, seen: set[str]) -> str | None:
    """The cursor of the page after this one of a list; None for the last. `seen` are those before: one that comes again
    would go on for ever. MCP 2026-07-28, Pagination: an empty cursor is one, too. A legacy server means the end by it.
    """
    cursor = members_of(page.members.get("result")).get("nextCursor")
    if not isinstance(cursor, str) or cursor in seen or not cursor and era is LEGACY:
        return None
    seen.add(cursor)
    return cursor


# Task ids of several servers as one.

def with_tasks(message: Message, rename) -> Message:
    """The message with other task ids; `rename` makes one of another, as strings. MCP 2025-11-25, Tasks; SEP-2663."""
    result, places = members_of(message.members.get("result")), []
    for top, inside in ("params", message.params), ("result", result):
        if isinstance(inside.get("taskId"), str):
            places.append((top, "taskId"))
        related = members_of(members_of(inside.get("_meta")).get(RELATED_TASK_KEY))
        if isinstance(related.get("taskId"), str):
            places.append((top, "_meta", RELATED_TASK_KEY, "taskId"))
    if isinstance(members_of(result.get("task")).get("taskId"), str):
        places.append(("result", "task", "taskId"))
    changes = [(*message.span(*place), dump(rename(message.value(*place)))) for place in places]
    return parse_message(message.changed(changes).decode(), is_servers=True) if changes else message


# ============================================================================
# 10. Access
# ============================================================================
#
# Who may come in, to what, and what a client may set in the environment of its server.

# What clients may set where ALLOWED_ENV is empty: what has the shape of a credential, or of the place that one is for,
# and a few plain preferences. It is an allowlist because no list of what is dangerous is ever whole: some program runs
# what is in MAKEFLAGS, TAR_OPTIONS or LESSOPEN, or fetches from PREFIX, and OPENAI_BASE_URL and its like send the
# operator's own credentials elsewhere. Words count whole, so SSH_ASKPASS and LESSKEY, which run something, are neither
# PASS nor KEY. The prefixes left out below are of programs that run or fetch what they find there: R_PROFILE_USER,
# UV_PROJECT and TS_NODE_PROJECT have the shape of a credential and are none.
MAY_BE_SET = re.compile(r"""
    (?! (?: UV | PIP | PIPX | PIPENV | PDM | HATCH | POETRY | PIXI | RYE | CONDA | NPM_CONFIG | PNPM | YARN | BUN |
            COREPACK | TS_NODE | CARGO | RUSTUP | BUNDLE | ORG_GRADLE | R | JULIA | GIT_CONFIG )_ )
    (?: [A-Z0-9]*_ )* (?: TOKEN | KEY | KEY_ID | SECRET | PASSWORD | PASS | PAT | EMAIL | CLIENT_ID |
        (?P<user> USER | USERNAME) | (?P<place> ACCOUNT | ACCOUNT_ID | TENANT_ID | TEAM_ID | WORKSPACE_ID | PROJECT |
                   PROJECT_ID | ORG | ORG_ID | REGION | DATABASE_ID) ) |
    DEBUG | ROOT_DIR | (?P<file> NODE_ENV | LANG | TZ) """, re.VERBOSE)
# Programs put a place into the host name that they send their credentials to, take a user that begins with - for an
# option, and the others for the name of a file. So not every value is allowed.
VALUES = {"place": re.compile(r"(?!-)[\w.,+~= -]*"), "user": re.compile(r"(?!-).*", re.DOTALL),
          "file": re.compile(r"(?![:/])(?!.*\.\.)[\w.@+/-]*")}
MAX_VARIABLES = 64                # of one client
MAX_CHOSEN = 1_024                # characters of a name that is matched against globs: the time grows with both lengths

OUR_SECRETS = frozenset({"AUTH_KEY", "OAUTH_CLIENT_SECRET", "SESSION_SECRET"})          # which no server gets
OUR_PREFIX = "MCPPROXY_"          # of the variables that the proxy itself sets for its servers
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
CLEAN = "PATH", "LANG", "LANGUAGE", "LC_*", "HOME", "TMPDIR"          # what CLEAN_ENV leaves

# Query parameters that are ours. Every other one is a variable for the server, see Admission.variables.
QUERY_PARAMETERS = frozenset({"auth_key", "session_id", "server", "tools", "client"})


def in_utf8(value: str) -> str:
    """A header's value, which was read as Latin-1, as what most clients mean."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeDecodeError:
        return value


def given_token(head: HTTPHead) -> str | None:
    """What a request has in Authorization: Bearer. RFC 6750 §2.1; a token may be nowhere else."""
    scheme, _, credentials = in_utf8(head.headers.get("authorization", "")).partition(" ")
    return credentials.strip() or None if scheme.lower() == "bearer" else None


def given_key(head: HTTPHead) -> str | None:
    """The key that a request carries: Authorization: Bearer, X-API-Key or ?auth_key=."""
    token = given_token(head)
    return token if token is not None else (
        in_utf8(head.headers.get("x-api-key", "")) or head.query_value("auth_key"))


@functools.lru_cache(maxsize=1_024)
def glob_matcher(glob: str):
    """A function that tells whether a name fits. (fnmatch() would cache 32,768 globs, clients' among them.)"""
    return re.compile(fnmatch.translate(glob)).match


def is_chosen(name: str, globs: tuple[str, ...]) -> bool:
    """Is a name chosen by these globs? The last one that fits decides; with ! before it, it leaves the name out. If
    the first has a !, all is chosen that none leaves out; but never what is too long for a name."""
    if len(name) > MAX_CHOSEN:
        return False
    for glob in reversed(globs):
        if glob_matcher(glob.removeprefix("!"))(name):
            return not glob.startswith("!")
    return bool(globs) and globs[0].startswith("!")


@dataclasses.dataclass(frozen=True)
class Grant:
    """What may be used. None: everything."""

    servers: tuple[str, ...] | None = None
    tools: tuple[str, ...] | None = None       # globs on the servers' own names
    read_only: bool = False                    # tools with readOnlyHint alone
    env: tuple[str, ...] | None = None         # variables that may be set, with * patterns

    def is_for(self, servers: tuple[str, ...]) -> bool:
        return self.servers is None or bool({*servers} & {*self.servers})

    def allows_tool(self, tool: str, is_read_only: bool) -> bool:
        return (self.tools is None or is_chosen(tool, self.tools)) and (is_read_only or not self.read_only)

    def allows_variable(self, variable: str) -> bool:
        return self.env is None or is_named(variable, self.env)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a caller may use: what any of these grants opens."""

    key: str                                   # the caller's name, for error texts
    grants: tuple[Grant, ...]
    # Of a token: all scopes that there are, those that it has, and how the challenge that asks for more begins.
    scopes: tuple[tuple[str, Grant], ...] = ()
    held_scopes: tuple[str, ...] = ()
    challenge: str = ""

    def of(self, servers: tuple[str, ...]) -> tuple[Grant, ...]:
        """The grants for a server that has these names: its own, and that of its group."""
        return tuple(grant for grant in self.grants if grant.is_for(servers))

    def refusal(self, limit: str, text: str, status: int = 200, servers: tuple[str, ...] = (),
                tool: str | None = None, variable: str | None = None) -> RPCError:
        """The error for a caller who is over one of these limits. Where one more scope would help a token, it asks for
        that and, by MCP 2025-11-25, Scope Challenge Handling, for those that it has, which would be lost otherwise."""
        # Whether a tool only reads is not known here, so the scopes for all tools are tried first.
        scopes = sorted(self.scopes, key=lambda one: one[1].read_only) if tool is not None else self.scopes
        scope = next((name for name, grant in scopes if name not in self.held_scopes and grant.is_for(servers)
                      and (tool is None or grant.allows_tool(tool, limit != "read_only"))
                      and (variable is None or grant.allows_variable(variable))), None)
        needed = " ".join([*self.held_scopes, scope or ""])
        challenge = f'{self.challenge}, error="insufficient_scope", scope="{needed}"'
        headers = ((CHALLENGE_HEADER, challenge),) if scope and self.challenge else ()
        return RPCError(f"{text} is not open to {self.key}", status=403 if headers else status, code=INVALID_PARAMS,
                        data={"limit": limit, "key": self.key}, headers=headers)


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who calls, by a key or a token. Two are the same if their name and digest are, whatever they may use."""

    name: str                                  # of a token's subject: with a colon, which no key's has
    digest: bytes                              # SHA-256 of the key, or of the token's issuer and subject
    limits: Limits | None = dataclasses.field(default=None, compare=False)
    scopes: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)         # that its token has

    @property
    def is_token(self) -> bool:
        return ":" in self.name

    @property
    def sees_all(self) -> bool:
        """May it see what others do? Not with limits; and not with a token, for anybody may get one."""
        return not (self.limits or self.is_token)

    def under(self, scopes: dict[str, Grant] | None) -> "Caller":
        """The same caller by a token, limited to what its scopes open; `scopes` are all there are, None: no limits."""
        old, has = self.limits or Limits(self.name, ()), [name for name in scopes or () if name in self.scopes]
        return dataclasses.replace(self, limits=None if scopes is None else dataclasses.replace(
            old, grants=tuple(scopes[name] for name in has), scopes=tuple(scopes.items()),
            held_scopes=tuple(dict.fromkeys([*old.held_scopes, *has]))))


def digest_of_key(key: str) -> bytes:
    """What is kept of a key or a token, so that it need not be kept itself."""
    import hashlib
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


# A session id that outlives its process: the name of the session, facts of it as JSON, and a signature of both, with
# dots between. RFC 2104; RFC 4648 §5. MCP 2025-11-25, Transports, Session Management: visible ASCII, and secure.

MAX_FACTS = 1_500                # bytes; many servers take no header of more than 8 KiB
ID_SECONDS = 30 * 86400          # for which an id is good


def seal(secret: str, name: str, facts: dict) -> str:
    """The id of a session with this name, which says these facts of it; what is too large is left out."""
    for shorter in {}, {"info": None}, {"capabilities": dict.fromkeys(facts["capabilities"], {})}, {"wanted": None}:
        facts = {**facts, **shorter}
        text = dump(facts).encode()
        if len(text) <= MAX_FACTS:
            sealed = f"{name}.{base64.urlsafe_b64encode(text).decode().rstrip('=')}"
            return f"{sealed}.{_signature(secret, sealed)}"
    return name                                    # this session lives as long as the process


def unseal(secret: str, sealed: str) -> tuple[str, dict] | None:
    """The name of a session and the facts that its id says of it; None if it is not of ours."""
    import hmac
    body, _, signature = sealed.rpartition(".")
    name, _, text = body.partition(".")
    if not (text and secret and sealed.isascii() and hmac.compare_digest(_signature(secret, body), signature)):
        return None
    return name, json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))


def _signature(secret: str, text: str) -> str:
    import hmac
    digest = hmac.digest(secret.encode("utf-8", "surrogateescape"), b"mcpproxy session\0" + text.encode(
        "utf-8", "surrogatepass"), "sha256")
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def caller_mark(secret: str, caller: Caller | None) -> str:
    """What a session's id says of its caller: the same whatever its key is called, and nothing to anybody else."""
    return _signature(secret, caller.digest.hex())[:16] if caller else ""


def find_caller(key: str, callers: tuple[Caller, ...]) -> Caller | None:
    """Whose key this is. Compares with all in constant time: how long it takes tells nothing of how much was right."""
    import hmac
    try:
        given = digest_of_key(key)
    except UnicodeEncodeError:                 # a lone surrogate, which no key has
        return None
    return next(itertools.compress(callers, [hmac.compare_digest(given, one.digest) for one in callers]), None)


# DNS rebinding: a web page at evil.example makes its own name point to 127.0.0.1 or to a machine behind the
# visitor's firewall, and then calls it as its own host, which no browser forbids. The Host header still says
# evil.example. Names that only resolve inside a network cannot be used for this.
_PRIVATE_HOST = re.compile(r"""(?:[0-9]{1,3}\.){3}[0-9]{1,3} | \[[0-9a-f:.]+\] | [a-z0-9_-]* |
                               .*\.(?:local|localhost|internal|test|lan|home\.arpa)\.?""", re.VERBOSE | re.IGNORECASE)
_LOOPBACK_ORIGIN = re.compile(
    r"https?://(?:localhost|[a-z0-9-]+\.localhost|127(?:\.[0-9]{1,3}){3}|\[::1\])(?::[0-9]+)?", re.IGNORECASE)


@functools.lru_cache(maxsize=128)
def is_allowed_host(host: str, allowed: tuple[str, ...]) -> bool:
    """May the proxy be called by this Host header without a key? `allowed` are in lower case, without ports."""
    name = re.sub(r":[0-9]*$", "", host)
    return bool(_PRIVATE_HOST.fullmatch(name)) or "*" in allowed or name.lower() in allowed


def is_allowed_origin(origin: str, host: str, allowed: tuple[str, ...]) -> bool:
    """May a web page of this origin call? `allowed` are in lower case. MCP 2025-11-25, Transports, Security Warning."""
    if _LOOPBACK_ORIGIN.fullmatch(origin) or "*" in allowed or origin.lower() in allowed:
        return True
    scheme, _, authority = origin.lower().partition("://")
    default_port = {"http": ":80", "https": ":443"}.get(scheme)
    return default_port is not None and authority.removesuffix(default_port) == host.lower().removesuffix(default_port)


def client_variables(head: HTTPHead) -> dict[str, str]:
    """The variables that a request sets for its servers, by ?NAME=value and X-MCP-Env-NAME: value; RPCError (-32602)
    for bad names, two values for one name, or too many."""
    pairs = [(name, value) for name, value in head.query if name not in QUERY_PARAMETERS]
    for field, line in head.fields:
        if field.startswith("x-mcp-env-"):
            pairs.append((field.removeprefix("x-mcp-env-").upper().replace("-", "_"), in_utf8(line)))
        elif field == "x-mcp-env":                 # the older form: NAME=value
            name, equals, value = in_utf8(line).partition("=")
            if not equals or re.search(",(?: [A-Za-z_]|[A-Z_])[A-Za-z0-9_]*=", value):      # two headers, merged
                raise RPCError("X-MCP-Env holds one NAME=value; X-MCP-Env-NAME: value says it better",
                               code=INVALID_PARAMS)
            pairs.append((name.strip(), value))
    variables: dict[str, str] = {}
    if len(pairs) > MAX_VARIABLES:
        raise RPCError(f"at most {MAX_VARIABLES} variables can be set", code=INVALID_PARAMS)
    for name, value in pairs:
        if not _VARIABLE_NAME.fullmatch(name):
            raise RPCError("that is no name for a variable", code=INVALID_PARAMS)
        if variables.setdefault(name, value) != value:
            raise RPCError(f"the variable {name} is set twice", code=INVALID_PARAMS)
    return variables


def may_set(name: str, value: str, allowed: str) -> bool:
    """May a client set this variable? `allowed` is ALLOWED_ENV; what it names may be set, but for OUR_PREFIX."""
    named, match = listed(allowed), MAY_BE_SET.fullmatch(name)
    fits = is_named(name, named) if named else match and all(
        values.fullmatch(value) for kind, values in VALUES.items() if match[kind])
    return bool(fits) and not name.startswith(OUR_PREFIX)


def is_named(name: str, patterns: tuple[str, ...]) -> bool:
    """Is a name one of these, which may have * in them?"""
    return any(re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name) for pattern in patterns)


def server_environment(environment: dict[str, str], settings: Settings) -> dict[str, str]:
    """What a server gets of our environment: none of our settings, because one that also knows HTTP would take our
    PORT for its own; with CLEAN_ENV nothing but what every program needs; and what ALLOWED_ENV names. Never a
    secret of the proxy's."""
    ours, allowed = {field.name.upper() for field in dataclasses.fields(Settings)}, listed(settings.allowed_env)
    return {name: value for name, value in environment.items() if name not in OUR_SECRETS and (
        is_named(name, allowed) or name not in ours and (not settings.clean_env or is_named(name, CLEAN)))}


# ============================================================================
# 11. Tokens
# ============================================================================
#
# Access tokens as a resource server meets them (RFC 6749 §1.1, RFC 9068): what a JWT says (RFC 7519), and whether its
# issuer has signed it (RFC 7515), with one of the keys that it publishes (RFC 7517). Two algorithms are enough for the
# issuers there are, and what a token says of its own algorithm is only ever compared with its key's (RFC 8725 §3.1).
# Nothing here is secret, so nothing has to take the same time whatever it finds.
#
#     RS256, RFC 7518 §3.3: the signature to the power of the key's exponent is, in full, what the signer has padded.
#         To build that anew and compare leaves nothing to parse, where forgers would get in (Bleichenbacher, 2006).
#     ES256, RFC 7518 §3.4: the first coordinate of (hash / s) G + (r / s) Q is r again, on the curve P-256. A triple
#         (X, Y, Z) stands for (X / Z, Y / Z), so one inverse is enough, at the end (SEC 1 §4.1.4; SEC 2 §2.4.2).

MAX_TOKEN = 24 * 1024            # with its 200 groups, one of Entra has 12 KiB
MAX_KEYS = 100                   # of one issuer, that can be used
MAX_TRIES = 8                    # of those that one token may mean, as when it names none
LEEWAY = 60                      # seconds that two clocks may differ
JWT_TYPES = frozenset({"jwt", "at+jwt", "application/jwt", "application/at+jwt"})      # RFC 9068 §2.1
OTHER_TOKENS = "ID", "Refresh", "Offline", "Logout"        # `typ` of tokens of Keycloak's that are not for access
DIGEST_INFO = bytes.fromhex("003031300d060960864801650304020105000420")  # RFC 8017 §9.2: a zero, and which hash it is
P256_P = 2**256 - 2**224 + 2**192 + 2**96 - 1
P256_B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
P256_N = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
P256_G = (0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
          0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5, 1)
INFINITY = (0, 1, 0)
_SURROGATE = re.compile("[\ud800-\udfff]")


class TokenError(ValueError):
    """Why a token is not good."""


class UnknownKey(TokenError):
    """It may be signed with a key of the issuer that is not known here yet."""


class PublicKey(typing.NamedTuple):
    """One key of an issuer's."""

    kid: str | None
    algorithm: str                             # "RS256": the numbers are n and e. "ES256": x and y
    numbers: tuple[int, int]


class Token(typing.NamedTuple):
    """A JWT, taken apart."""

    header: dict
    claims: dict
    signed: bytes                              # what its signature is of
    signature: bytes


def from_base64url(text: str) -> bytes:
    """RFC 7515 §2; there is one way to write each value, and ValueError for others."""
    data = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    if base64.urlsafe_b64encode(data).rstrip(b"=") != text.encode("ascii"):
        raise ValueError("it is no base64url")
    return data


_JWT_SHAPE = re.compile(r"e[w-z][^.]*\.[^.]*\.[^.]*\Z")         # base64url of an object, and two more parts


def parse_token(text: str) -> Token:
    """Takes a JWT apart; TokenError when it is none, or none of the kind that is known here."""
    parts = text.split(".") if len(text) <= MAX_TOKEN else []
    try:
        header, claims, signature = map(from_base64url, parts)
        header, claims = (json.loads(part.decode(), object_pairs_hook=without_repeats,
                                     parse_constant=_no_such_constant) for part in (header, claims))
        if not isinstance(header, dict) or not isinstance(claims, dict):
            raise ValueError("they are no objects")
    except (ValueError, RecursionError):
        raise TokenError("it is no signed JWT") from None
    if header.get("alg") not in ("RS256", "ES256"):
        raise TokenError("it is not signed with RS256 or ES256")
    if {"crit", "b64", "zip", "cty"} & header.keys() or str(header.get("typ", "JWT")).lower() not in JWT_TYPES or (
            not isinstance(header.get("kid", ""), str)):
        raise TokenError("its header asks for what is not known here")
    return Token(header, claims, f"{parts[0]}.{parts[1]}".encode(), signature)


def check_claims(claims: dict, issuer: str, now: float) -> None:
    """Refuses a token that is another issuer's, nobody's, or of another time. RFC 7519 §4.1."""
    times = {name: claims[name] for name in ("exp", "nbf") if name in claims}
    if claims.get("iss") != issuer:
        raise TokenError("another issuer has made it")
    # A refresh token is active too, for who introspects it. Hydra and Cognito name the kind in `token_use`, Keycloak in
    # `typ`; RFC 7662 and 9068 have no claim for it.
    if claims.get("token_use", "access") not in ("access", "access_token") or claims.get("typ") in OTHER_TOKENS:
        raise TokenError("it is no access token")
    if not isinstance(claims.get("sub"), str) or not 0 < len(claims["sub"]) <= 255 or _SURROGATE.search(claims["sub"]):
        raise TokenError("it does not say whose it is")
    if "exp" not in times or not all(type(time) in (int, float) and abs(time) < 1e12 for time in times.values()):
        raise TokenError("it does not say until when it is good")
    if now >= times["exp"] + LEEWAY:
        raise TokenError("it has expired")
    if now < times.get("nbf", 0) - LEEWAY:
        raise TokenError("it is not good yet")


def parse_jwks(given: dict) -> list[PublicKey]:
    """The keys of a JWK set that are of use here. RFC 7517 §5: others are passed over. ValueError if it is no set."""
    if not isinstance(given.get("keys"), list):
        raise ValueError("it has no keys")
    keys = []
    for jwk in given["keys"]:
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            keys.append(parse_jwk(jwk))
    return keys[:MAX_KEYS]


def parse_jwk(jwk: dict) -> PublicKey:
    """One key; ValueError or TypeError when it is of no use, or weak. RFC 7518 §6; NIST SP 800-131A for the size."""
    def number(name: str) -> int:
        return int.from_bytes(from_base64url(jwk.get(name)), "big")
    algorithm = {"RSA": "RS256", "EC": "ES256"}.get(jwk.get("kty"))
    if (algorithm is None or jwk.get("alg", algorithm) != algorithm or jwk.get("use", "sig") != "sig"
            or "verify" not in jwk.get("key_ops", ["verify"]) or not isinstance(jwk.get("kid", ""), str)):
        raise ValueError("it is for something else")
    if algorithm == "RS256":
        n, e = number("n"), number("e")
        if not (2048 <= n.bit_length() <= 8192 and n % 2 and e % 2 and 3 <= e < 2**32):
            raise ValueError("it is weak")
        return PublicKey(jwk.get("kid"), algorithm, (n, e))
    x, y = number("x"), number("y")
    if jwk.get("crv") != "P-256" or len(jwk["x"]) != 43 or len(jwk["y"]) != 43 or not (          # 32 bytes, §6.2.1.2
            x < P256_P and y < P256_P and (y * y - x**3 + 3 * x - P256_B) % P256_P == 0):
        raise ValueError("it is no point of P-256")
    return PublicKey(jwk.get("kid"), algorithm, (x, y))


def verify(token: Token, keys: list[PublicKey]) -> PublicKey:
    """The key that has signed it; TokenError if none of these has, UnknownKey if one not known here may have."""
    kid = token.header.get("kid")
    named = [key for key in keys if key.algorithm == token.header["alg"] and (kid is None or key.kid == kid)]
    if not named:
        raise UnknownKey("its issuer has published no such key")
    is_signed = {"RS256": is_signed_by_rsa, "ES256": is_signed_by_ecdsa}[token.header["alg"]]
    for key in named[:MAX_TRIES]:
        if is_signed(token.signed, token.signature, *key.numbers):
            return key
    raise (UnknownKey if kid is None else TokenError)("its signature is wrong")      # without a kid: maybe a new key's


def is_signed_by_rsa(signed: bytes, signature: bytes, n: int, e: int) -> bool:
    """RFC 8017 §8.2.2, with SHA-256."""
    import hashlib
    size, number = (n.bit_length() + 7) // 8, int.from_bytes(signature, "big")
    padded = DIGEST_INFO + hashlib.sha256(signed).digest()
    padded = b"\0\1" + b"\xff" * (size - len(padded) - 2) + padded
    return len(signature) == size and number < n and pow(number, e, n).to_bytes(size, "big") == padded


def is_signed_by_ecdsa(signed: bytes, signature: bytes, x: int, y: int) -> bool:
    """SEC 1 §4.1.4, on P-256 with SHA-256."""
    import hashlib
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    if len(signature) != 64 or not (0 < r < P256_N and 0 < s < P256_N):
        return False
    inverse = pow(s, -1, P256_N)
    hashed = int.from_bytes(hashlib.sha256(signed).digest(), "big") * inverse % P256_N
    shift, key, total = r * inverse % P256_N, (x, y, 1), INFINITY
    sums = INFINITY, P256_G, key, add_points(P256_G, key)
    for bit in range(255, -1, -1):                     # both products at once
        total = add_points(add_points(total, total), sums[(hashed >> bit & 1) + 2 * (shift >> bit & 1)])
    return total[2] != 0 and total[0] * pow(total[2], -1, P256_P) % P256_P % P256_N == r


def add_points(one: tuple[int, int, int], other: tuple[int, int, int]) -> tuple[int, int, int]:
    """The sum of any two points of y² = x³ - 3x + b, also of one and itself, or infinity: Renes, Costello and Batina,
    Complete addition formulas for prime order elliptic curves, 2016, §3."""
    (x1, y1, z1), (x2, y2, z2) = one, other
    xx, yy, zz = x1 * x2 % P256_P, y1 * y2 % P256_P, z1 * z2 % P256_P
    xy, xz, yz = x1 * y2 + x2 * y1, x1 * z2 + x2 * z1, y1 * z2 + y2 * z1
    s, t, u = 3 * (P256_B * zz - xz) % P256_P, 3 * (P256_B * xz - xx - 3 * zz) % P256_P, 3 * (xx - zz)
    return ((xy * (yy - s) - yz * t) % P256_P, (u * t + (yy + s) * (yy - s)) % P256_P,
            (yz * (yy + s) + xy * u) % P256_P)


# ============================================================================
# 12. Views
# ============================================================================
#
# What one URL shows: which servers, and under which names what they list. A server by itself keeps its names, except
# for tools that the operator hid or renamed. Of several servers as one, the names of tools and prompts get a prefix.
# URIs of resources are never changed.

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")             # of a tool, as all clients and models take it
_SHORTENED = re.compile(r".*_[0-9a-f]{6}", re.DOTALL)
KNOWN_NAMES, FEW_NAMES = 4_096, 64       # of tools and prompts that a view remembers, and one that a client chose
KNOWN_NAME = 128                 # characters of the longest of these
KNOWN_CHOICE = 1_024             # characters of the longest choice of servers and tools that is remembered
MAX_GLOBS = 100                  # in one client's choice
MAX_GLOB = 256                   # characters of one of these: some take time by the square of that
SKILLS_EXTENSION = RESERVED_PREFIX + "skills"
TOOLS_HEADER = "x-mcp-tools"     # in which a client chooses tools, as in ?tools=
UNAVAILABLE_KEY = "mcpproxy/unavailable"               # in _meta: the servers that a list lacks, and why


class Listed(typing.NamedTuple):
    """What a method lists."""

    member: str                      # of the result, which has the items
    named_by: str                    # the member of an item that tells it from others
    capability: str


LISTS = {"tools/list": Listed("tools", "name", "tools"), "prompts/list": Listed("prompts", "name", "prompts"),
         "resources/list": Listed("resources", "uri", "resources"),
         "resources/templates/list": Listed("resourceTemplates", "uriTemplate", "resources"),
         "skills/list": Listed("skills", "uri", SKILLS_EXTENSION)}
PAGED = {**LISTS, "tasks/list": Listed("tasks", "taskId", "tasks")}  # beside these, what is read for one client alone


def fitting(name: str) -> str:
    """The name if all clients take it; otherwise cut, with _ for other characters, and ended by a hash of the whole."""
    if _NAME.fullmatch(name):
        return name
    import hashlib
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{re.sub('[^A-Za-z0-9_-]', '_', name)[:57]}_{digest[:6]}"


@dataclasses.dataclass(frozen=True)
class Override:
    """What the operator changed of a tool."""

    name: str | None = None
    description: str | None = None
    annotations: dict = dataclasses.field(default_factory=dict)
    defaults: dict = dataclasses.field(default_factory=dict)         # arguments of calls that lack them
    fixed: dict = dataclasses.field(default_factory=dict)            # arguments of all calls, which clients do not see
    text: str = ""                             # all of it as JSON, for ==: without it, 1, 1.0 and true would be equal


def hints_of(tool: dict, override: Override | None) -> dict:
    """A tool's annotations: those that its server lists, replaced where the operator gives others."""
    hints = tool.get("annotations")
    return {**(hints if isinstance(hints, dict) else {}), **(override.annotations if override else {})}


@dataclasses.dataclass(frozen=True)
class Rules:
    """What the operator chose and changed of a server's tools."""

    tools: tuple[str, ...] | None = None                   # globs on the server's own names
    overrides: dict[str, Override] = dataclasses.field(default_factory=dict)
    max_result_kb: int = 0

    def shown(self, name: str) -> str | None:
        """The name under which a tool is shown; None if it is hidden."""
        if self.tools is not None and not is_chosen(name, self.tools):
            return None
        return name in self.overrides and self.overrides[name].name or name

    def own(self, shown: str) -> str | None:
        """The server's own name of the tool that is shown under this one; None if there is none. A name that the
        operator gave to a tool hides another tool that the server itself calls so."""
        own = self._given_names.get(shown, shown)
        return own if self.shown(own) == shown else None

    def without_effect(self, names: dict[str, object]) -> list[str]:
        """The globs and overrides that fit none of these tools: maybe a slip, which leaves a tool open or unchanged."""
        globs = [glob for glob in self.tools or () if not any(map(glob_matcher(glob.removeprefix("!")), names))]
        return [*globs, *(name for name in self.overrides if name not in names)]

    @functools.cached_property
    def _given_names(self) -> dict[str, str]:
        """The server's own names of tools by those that they were given."""
        return {override.name: name for name, override in self.overrides.items() if override.name and self.shown(name)}

    def restated(self, tool: JSONObject, name: str, shown: str) -> str:
        """The text of a tool as clients see it."""
        members, override = tool.raw_members(), self.overrides.get(name, Override())
        members["name"] = dump(shown)
        if override.description is not None:
            members["description"] = dump(override.description)
        if override.annotations:
            old = tool.raw_members("annotations") if members.get("annotations", "")[:1] == "{" else {}
            new = {name: dump(value) for name, value in override.annotations.items()}
            members["annotations"] = as_object(old | new)
        if self.max_result_kb:
            members.pop("outputSchema", None)              # a result that was cut may not conform to it
        if (override.defaults or override.fixed) and members.get("inputSchema", "")[:1] == "{":
            schema = tool.raw_members("inputSchema")
            if schema.get("properties", "")[:1] == "{":
                schema["properties"] = without_members(schema["properties"], *override.fixed)
            required = scan_plain(schema.get("required", "[]"), 0)[0]
            if isinstance(required, list) and required:
                given = override.fixed.keys() | override.defaults.keys()
                schema["required"] = dump([name for name in required if not (isinstance(name, str) and name in given)])
            members["inputSchema"] = as_object(schema)
        return as_object(members)


@dataclasses.dataclass(frozen=True)
class When:
    """Which calls a server of a group claims: those in which all that is named here fits its glob."""

    argument: dict[str, str] = dataclasses.field(default_factory=dict)
    header: dict[str, str] = dataclasses.field(default_factory=dict)           # of HTTP, by name in lower case
    key: str | None = None                                                     # the name of the client's key

    def claims(self, arguments: dict, headers: dict[str, str], key: str | None) -> bool:
        """Is a call with these one of them?"""
        given = [(glob, arguments.get(name)) for name, glob in self.argument.items()]
        given += [(glob, in_utf8(headers[name]) if name in headers else None) for name, glob in self.header.items()]
        given += [(self.key, key)] if self.key else []
        return all(value is not None and glob_matcher(glob)(value if isinstance(value, str) else dump(value))
                   for glob, value in given)


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """One configured server, of a file or of the command line. Or a group of servers: then it has `members`, and
    everything else is as in the first of them."""

    name: str
    settings: Settings = Settings()            # of this server
    command: tuple[str, ...] = ()
    url: str | None = None                     # of a remote one, in place of the command
    headers: dict[str, str] = dataclasses.field(default_factory=dict)          # that it gets with every request
    is_sse: bool = False                       # does it speak HTTP+SSE alone?
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    cwd: str | None = None
    prefix: str | None = None                  # in place of the name
    rules: Rules = Rules()
    group: str | None = None                   # of which it is a member
    when: When | None = None                   # which of the group's calls it claims
    weight: float = 1.0                        # of its share of the calls that no member claims
    is_backup: bool = False                    # is it used only when no other is up?
    members: "tuple[ServerConfig, ...]" = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Its own, and that of its group."""
        return (self.name, self.group) if self.group else (self.name,)

    def can_become(self, new: "ServerConfig") -> bool:
        """Can it keep running under the new configuration? Only what its links do not depend on may differ."""
        return self == dataclasses.replace(new, rules=self.rules, prefix=self.prefix, group=self.group, when=self.when,
                                           weight=self.weight, is_backup=self.is_backup)

    def shown_as(self, name: str, method: str, is_joint: bool) -> str | None:
        """The name under which a tool or prompt is shown; None if it is hidden. URIs are shown as they are."""
        shown = self.rules.shown(name) if method.startswith("tools/") else name
        if shown is None or not is_joint or LISTS[method].named_by != "name":
            return shown
        return fitting(self.start_of_names + shown)

    @property
    def start_of_names(self) -> str:
        prefix = self.group or self.name if self.prefix is None else self.prefix
        return prefix and prefix + "__"


class ShownItem(typing.NamedTuple):
    """A tool or whatever else a server lists, as clients see it."""

    server: ServerConfig
    own: str                                   # the server's name for it
    text: str


class Target(typing.NamedTuple):
    """Where a request goes, and what is changed in it on the way."""

    server: str
    name: str | None = None                    # the server's own, of a tool or prompt that is shown with another
    override: Override | None = None
    depends_on_hints: bool = False             # may access to it depend on hints, which only the server's list has?

    def changes(self, message: Message) -> list[tuple[int, int, str]]:
        """The changes to the text of a request."""
        changes, override, arguments = [], self.override, message.params.get("arguments")
        if self.name is not None:
            path = ("params", "ref", "name") if message.method == "completion/complete" else ("params", "name")
            changes.append((*message.span(*path), quoted(self.name)))
        if override and (override.defaults or override.fixed):
            if not isinstance(arguments, tuple | None):
                raise RPCError("arguments must be an object", code=INVALID_PARAMS)
            given = message.raw_members("params", "arguments") if arguments else {}
            fixed = {name: dump(value) for name, value in override.fixed.items()}
            taken = set(map(str.casefold, fixed))          # some servers take Raw for raw: see check_lookalikes()
            new = {name: dump(value) for name, value in override.defaults.items()} | {
                name: value for name, value in given.items() if name.casefold() not in taken} | fixed
            changes.append((*message.span("params", "arguments"), as_object(new)) if "arguments" in message.params else
                           message.new_members({"arguments": as_object(new)}, "params"))
        return changes


class once(functools.cached_property):
    """A property that is worked out once, and kept as an attribute like others. (The original reads __dict__, which
    makes CPython 3.11 create one: from then on, all attributes of the object are slower to find.)"""

    def __get__(self, instance, owner=None):
        value = self.func(instance)
        setattr(instance, self.attrname, value)
        return value


class View:
    """What one URL shows: which servers, and what of them."""

    def __init__(self, place: str | None, members: tuple[ServerConfig, ...], globs: tuple[tuple[str, ...], ...],
                 is_joint: bool, wanted: tuple, limits: Limits | None, catalog: "Catalog"):
        self.limits = limits                   # of its caller
        self.catalog = catalog
        self.place = place                     # the name of the server or group that is reached by itself, or None
        self.members = members
        self.by_name = {member.name: member for member in members}
        self.grants = {member.name: limits.of(member.names) for member in members} if limits else {}
        self.offer = members, self.grants      # if it is equal in two views of a client, its lists are the same
        self.servers = tuple(one for member in members for one in member.members or (member,))       # each of a group's
        self.names = {one.name for one in (*members, *self.servers)}         # of all of these, and of groups
        self.globs = globs                     # a tool has to be chosen by each of these, by its name as it is here
        self.is_joint = is_joint               # several as one, with prefixes
        self.wanted = wanted                   # how its client narrowed it down
        is_group = any(member.members for member in members)
        self.is_plain = not (is_joint or globs or is_group or limits) and members[0].rules == Rules()   # all passes
        self.has_choice = is_joint or is_group         # may a client go on here after it has lost a server?
        self.is_for_all = all(member.settings.shared_session for member in members)
        self.left_out: set[tuple[str, ...]] = set()            # (server, name) of what lost its name to another; logged
        self._known = functools.lru_cache(FEW_NAMES if wanted else KNOWN_NAMES)(self._direct)

    @once
    def depends_on_client(self) -> bool:
        """May what is answered here depend on who asks?"""
        return any(one.when and (one.when.header or one.when.key) or not one.settings.shared_session
                   for one in self.servers)

    def shows(self, name: str) -> bool:
        """Does the client's choice include a tool with this name, as it is shown here?"""
        return all(is_chosen(name, globs) for globs in self.globs)

    def opens(self, server: str, kind: str, own: str, tool: dict | None = None) -> bool:
        """May its caller use the tool or prompt that the server calls `own`? `tool` is how the server lists it; while
        that is not known, no hint forbids it. MCP 2025-11-25, Schema, ToolAnnotations."""
        member = self.by_name.get(server)
        if not self.grants or member is None or kind != "tools":
            return member is not None
        is_harmless = tool is None or hints_of(tool, member.rules.overrides.get(own)).get("readOnlyHint") is True
        return any(grant.allows_tool(own, is_harmless) for grant in self.grants[server])

    def depends_on_hints(self, server: str, kind: str) -> bool:
        """May its caller's access depend on hints, which only the server's list has?"""
        return kind == "tools" and any(grant.read_only for grant in self.grants.get(server, ()))

    def terms(self, place: str, kind: str, own: str | None) -> tuple | None:
        """What decides about calls of what the server of a place calls `own` (None: of anything there): the grants,
        and what the operator changed. None if that server is not here."""
        member = self.by_name.get(place)
        rules = member.rules if member and kind == "tools" else None
        changes = rules and (rules.shown(own), rules.overrides.get(own)) if own else rules
        return member and (self.grants.get(place), changes)

    def candidates(self, name: str) -> list[ServerConfig]:
        """The servers that may have a tool or prompt of this name."""
        return [member for member in self.members if not self.is_joint or name.startswith(member.start_of_names)]

    def direct(self, method: str, name: str) -> Target | None:
        """Where a call of a tool or prompt goes, or RPCError; None when only the servers' lists can tell."""
        return (self._known if len(name) <= KNOWN_NAME else self._direct)(method, name)

    def _direct(self, method: str, name: str) -> Target | None:
        kind, candidates = method.partition("/")[0], self.candidates(name)
        if not candidates or self.is_joint and not _NAME.fullmatch(name) or kind == "tools" and not self.shows(name):
            raise self.unknown(kind, name)
        # Of those that are open, only one without a prefix may have it; but it may begin with the prefix of one that is
        # closed. Then the servers' lists tell.
        if self.limits and self.is_joint and not candidates[0].start_of_names:
            candidates = self.catalog.view(self.place, self.wanted).candidates(name)
        if self.is_joint and (len(candidates) > 1 or _SHORTENED.fullmatch(name)):
            return None
        member = candidates[0]
        shown = name.removeprefix(member.start_of_names) if self.is_joint else name
        own = member.rules.own(shown) if kind == "tools" else shown
        if own is None or not self.opens(member.name, kind, own):
            raise self.unknown(kind, name)
        return self.target(member, kind, own, name)

    def target(self, member: ServerConfig, kind: str, own: str, name: str) -> Target:
        """Where a call goes of what the server calls `own` and the client `name`."""
        override = member.rules.overrides.get(own) if kind == "tools" else None
        return Target(member.name, own if own != name else None, override, self.depends_on_hints(member.name, kind))

    def unknown(self, kind: str, name: str, status: int = 200, if_closed: int = 200) -> RPCError:
        """The error for a tool or a prompt that is not here, with `status`; or, if only this caller may not use it, the
        refusal that says so, with `if_closed`."""
        if self.limits:
            whole = self.catalog.view(self.place, self.wanted)
            with contextlib.suppress(RPCError, StopIteration):     # nobody may; or no prefix says whose it is
                target = whole.direct(f"{kind}/", name)
                if target is None:                     # the servers' lists would tell; a prefix is good enough here
                    one = next(one for one in whole.candidates(name) if one.start_of_names)
                    shown = name.removeprefix(one.start_of_names)
                    target = Target(one.name, kind == "tools" and one.rules.own(shown) or shown)
                server, own = target.server, target.name or name
                if not self.opens(server, kind, own) or self.depends_on_hints(server, kind):
                    return self.refusal(server, kind, own, name, if_closed)
        return RPCError(f"unknown {kind.removesuffix('s')}: {name[:200]}", status=status, code=INVALID_PARAMS)

    def refusal(self, server: str, kind: str, own: str, name: str, status: int = 200) -> RPCError:
        """The error for a tool or a prompt, which the server calls `own`, that the caller may not use, or whose server
        it may not use at all."""
        member = self.by_name.get(server)
        limit = "servers" if member is None else "read_only" if self.opens(server, kind, own) else "tools"
        # Scopes have globs for tools alone.
        return self.limits.refusal(limit, name[:200], status, member.names if member else (server,),
                                   own if kind == "tools" else None)

    def check_variables(self, variables: dict[str, str]) -> None:
        """RPCError (-32602) unless each of them may be set for every server here that is not shared."""
        if variables and self.is_for_all:
            raise RPCError(f"the variable {next(iter(variables))} cannot be set: all clients share one server here, "
                           "unless SHARED_SESSION=false, or shared_session in a file, gives each its own",
                           code=INVALID_PARAMS)
        own = [server for server in self.servers if not server.settings.shared_session]
        for (name, value), member in itertools.product(variables.items(), own):
            if not may_set(name, value, member.settings.allowed_env):
                raise RPCError(f"clients may not set the variable {name} like this, unless ALLOWED_ENV names it",
                               code=INVALID_PARAMS)
            if self.limits and not any(grant.allows_variable(name) for grant in self.limits.of(member.names)):
                raise self.limits.refusal("env", f"the variable {name}", 403, member.names, variable=name)


def is_short(wanted: tuple) -> bool:
    """Is a client's choice short enough to be remembered?"""
    return sum(len(value) for _, value in wanted) <= KNOWN_CHOICE


class Catalog:
    """All servers, and the views of them."""

    def __init__(self, servers: dict[str, ServerConfig], is_file: bool = False):
        self.servers = servers
        self.is_file = is_file                 # are they of a file: reached as one, and each at a place of its own?
        self.groups: dict[str, ServerConfig] = {}
        for name in dict.fromkeys(server.group for server in servers.values() if server.group):
            members = tuple(server for server in servers.values() if server.group == name)
            self.groups[name] = dataclasses.replace(members[0], name=name, group=None, when=None, members=members)
        # `offered`: all as one, with a group in the place of its first server. `places`: what is reached by itself.
        self.offered = {server.group or name: self.groups.get(server.group, server) for name, server in servers.items()}
        self.places = {**servers, **self.groups}
        self.leaving: set[str] = set()         # places that were taken out, and may still have sessions
        self.shown: dict[tuple, tuple] = {}    # by view and method: what servers listed last, and what is shown of it
        self._known = functools.lru_cache(1_024)(self._view)

    def view(self, place: str | None = None, wanted: tuple = (), limits: Limits | None = None) -> View:
        """What there is at a place: the name of a server, or None for all as one. `wanted` is how a client narrows
        it down: ("server" or "tools" or TOOLS_HEADER, text) pairs. RPCError when there is no such place or server."""
        return (self._known if is_short(wanted) else self._view)(place, wanted, limits)

    def _view(self, place: str | None, wanted: tuple, limits: Limits | None) -> View:
        if place is not None and place not in self.places:
            raise RPCError(f"there is no server {place}", status=404, code=METHOD_NOT_FOUND)
        members, globs = self.offered if place is None else {place: self.places[place]}, []
        if limits:
            everywhere = tuple(members)
            members = {name: member for name, member in members.items() if limits.of(member.names)}
            if not members:
                raise limits.refusal("servers", "this place", 403, everywhere)
        for kind, text in wanted:
            parts, most = listed(text), MAX_GLOBS - (0 if kind == "server" else sum(map(len, globs)))
            if not 1 <= len(parts) <= most or max(map(len, parts)) > MAX_GLOB or len(text) > 16 * MAX_GLOB:
                raise RPCError(f"{kind} is empty or too long", code=INVALID_PARAMS)
            if kind != "server":
                globs.append(parts)
            elif self.is_file:
                unknown = [part for part in parts if part not in members]
                for part in unknown if limits else ():
                    if part in self.places and not limits.of(self.places[part].names):
                        raise limits.refusal("servers", f"server {part}", 403, (part,))
                if unknown:
                    raise RPCError(f"there is no server {unknown[0]} here, but {', '.join(members)}", status=404)
                members = {name: member for name, member in members.items() if name in parts}
        return View(place, tuple(members.values()), tuple(globs), self.is_file and place is None, wanted, limits, self)


# ============================================================================
# 13. Configuration file
# ============================================================================
#
# Several servers in a file, as desktop clients write it. Keys that only those read are passed over; keys that nobody
# reads are mistakes, and are refused.

# What some desktop client reads in a server, and this program does not.
_OTHERS_KEYS = frozenset("""alwaysAllow alwaysLoad auth autoApprove chatMenu description dev disabledTools gallery
    headersHelper iconPath name oauth oauthScopes sandboxEnabled start_on_launch timeout transportType trust version
    watchPaths""".split())
# One server's own, by the names of settings.
SERVER_SETTINGS = ("shared_session", "server_era", "prewarm", "request_timeout", "allowed_env", "max_result_kb",
                   *SANDBOX_SETTINGS)
_TEXTS = "a list of strings", lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value)
_TEXT = "a string", lambda value: isinstance(value, str)
_OBJECT = "an object", lambda value: isinstance(value, dict)
_BOOL = "true or false", lambda value: isinstance(value, bool)
_NUMBER = "a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
_WHOLE = "a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)
_BY_TYPE = {bool: _BOOL, int: _WHOLE, float: _NUMBER, str: _TEXT}
_MAP = "an object of strings", lambda value: _OBJECT[1](value) and _TEXTS[1]([*value.values()])
_SERVER_KEYS = {"command": _TEXT, "args": _TEXTS, "cwd": _TEXT, "disabled": _BOOL, "enabled": _BOOL, "tools": _TEXTS,
                "prefix": _TEXT, "overrides": _OBJECT, "env": _MAP, "headers": _MAP, "type": _TEXT, "group": _TEXT,
                "url": ("a string or a list of strings", lambda value: _TEXT[1](value) or _TEXTS[1](value) and value),
                "replicas": ("a whole number from 1 to 100", lambda value: _WHOLE[1](value) and 1 <= value <= 100),
                "weight": ("a number above 0", lambda value: _NUMBER[1](value) and 0 < value < 1e9), "backup": _BOOL,
                "when": _OBJECT, **{name: _BY_TYPE[type(getattr(Settings, name))] for name in SERVER_SETTINGS}}
_WHEN_KEYS = {"argument": _MAP, "header": _MAP, "key": _TEXT}
_OVERRIDE_KEYS = {"name": _TEXT, "description": _TEXT, "annotations": _OBJECT, "defaults": _OBJECT, "fixed": _OBJECT}
# Headers that nobody else sets: those that say how a message is sent, and those of the protocol.
_OUR_HEADERS = re.compile(
    "(?i)host|connection|content-.*|transfer-encoding|accept|expect|te|upgrade|last-event-id|mcp-.*")
# VS Code allows comments, and a comma before a closing bracket. Strings are matched first, so that they stay.
_COMMENTS = re.compile(r'("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
_COMMAS = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])', re.DOTALL)


@contextlib.contextmanager
def within(where: str, *others: type[Exception]):
    """Turns a SettingsError, or another of these errors, into one that says where in a file the mistake is."""
    try:
        yield
    except (SettingsError, *others) as error:
        problem = ("is nested too deeply" if isinstance(error, RecursionError) else
                   f"is not JSON: {error}" if isinstance(error, json.JSONDecodeError) else error)
        raise SettingsError(f"{where}: {problem}") from None


def parse_config(text: str, settings: Settings, environment: dict[str, str]) -> dict[str, ServerConfig]:
    """The servers of a file, by name, in its order; SettingsError says which file, server and key cannot be used."""
    servers: dict[str, ServerConfig] = {}
    with within(settings.mcp_config, ValueError, RecursionError):
        plain, scanned = read_config(text)
        used = [name for name, given in plain.items() if not (isinstance(given, dict) and (
            given.get("disabled") is True or given.get("enabled") is False))]
        for name, members in scanned:
            with within(f"server {name[:80] if name.isprintable() else repr(name)[:80]}",
                        ValueError, OverflowError, RecursionError):
                check_name(name)
                if [other for other, _ in scanned].count(name) > 1:
                    raise SettingsError("is there twice")
                check_repeats(members)
                for server in parse_server(name, plain[name], settings, environment) if name in used else ():
                    for kind, own in ("replica", server.name), ("group", server.group):
                        if own != name and own in used:
                            raise SettingsError(f"its {kind} {own} has another server's name")
                    servers[server.name] = server
        if not servers:
            raise SettingsError("has no server that is not disabled")
        check_groups(servers)
        check_names(servers)
    return servers


def as_json(text: str) -> str:
    """A file as people write it, without what JSON has not: a byte order mark, comments, commas at the end."""
    for superfluous in _COMMENTS, _COMMAS:
        text = superfluous.sub(lambda match: match[1] or " ", text.removeprefix("\ufeff"))
    return text


def read_config(text: str) -> tuple[dict, tuple]:
    """The servers of a file by name; and as scan_value() reads them, which shows what is there twice."""
    text = as_json(text)
    if not text.strip():
        raise SettingsError("is empty")
    plain = json.loads(text, parse_float=_finite)          # an infinite argument could be sent to no server
    whole = scan_value(text, _WHITESPACE.match(text).end())[0]
    lists = [(name, members) for name, members in (whole if isinstance(whole, tuple) else ())
             if name in ("mcpServers", "servers") and isinstance(members, tuple) and isinstance(plain[name], dict)]
    if len(lists) != 1:
        raise SettingsError("needs an object mcpServers, or servers, of servers by name" + (
            ", and not both or two" if lists else ""))
    return plain[lists[0][0]], lists[0][1]


def check_name(name: str) -> None:
    """Refuses what is no name for a server or a group."""
    if not re.fullmatch("[A-Za-z0-9_-]{1,32}", name) or "__" in name:
        good = re.sub("__+", "_", re.sub("[^A-Za-z0-9_-]+", "-", name))[:32].strip("-_") or "server"
        raise SettingsError(f"a name is 1 to 32 of A-Z a-z 0-9 _ -, without two _ in a row; {good} would do")


def replicated(server: ServerConfig, urls: list[str | None], number: int) -> list[ServerConfig]:
    """This number of a server at each URL; if that makes several, they are a group."""
    if len(urls) == number == 1:
        return [server]
    if server.group:
        raise SettingsError("group: goes with neither replicas nor several URLs, which are a group by themselves")
    names = [f"{server.name}-{count}" for count in range(1, len(urls) * number + 1)]
    if len(names[-1]) > 32:
        raise SettingsError(f"replicas: the name {names[-1]} would be too long")
    return [dataclasses.replace(server, name=name, url=url, group=server.name)
            for name, url in zip(names, urls * number)]


def check_groups(servers: dict[str, ServerConfig]) -> None:
    """Refuses groups that cannot be offered as one."""
    first: dict[str, ServerConfig] = {}
    for name, server in servers.items():
        if server.group in servers:
            raise SettingsError(f"server {name}: group: {server.group} is a server's name")
        other = first.setdefault(server.group, server) if server.group else server
        for key, mine, others in (("prefix", server.prefix, other.prefix),
                                  ("tools, overrides or max_result_kb", server.rules, other.rules),
                                  ("shared_session", server.settings.shared_session, other.settings.shared_session)):
            if mine != others:
                raise SettingsError(
                    f"server {name}: {key}: differs from that of {other.name}, which is in the same group")


def parse_server(name: str, given: object, settings: Settings, environment: dict[str, str]) -> list[ServerConfig]:
    """The servers that one entry of the file stands for; SettingsError names the key that cannot be used."""
    if isinstance(given, dict):
        names = [key for key in ("url", "serverUrl", "httpUrl") if key in given]
        if any(given[key] != given[names[0]] for key in names):
            raise SettingsError(f"{names[0]}: differs from {names[1]}")
        given = {"url" if key in names else key: value for key, value in given.items() if key not in _OTHERS_KEYS}
        if "envFile" in given:
            raise SettingsError("envFile: files of variables are not read; name the variables in env, as ${NAME}")
    check_keys(given, _SERVER_KEYS)
    # Headers are only checked: they are kept as written, and expanded for each link, with its client's variables.
    is_later = given.get("shared_session", settings.shared_session) is False
    env, headers = expanded(given.get("env", {}), "env", environment), given.get("headers", {})
    known = {**environment, **env}
    given = {key: env if key == "env" else expanded(value, key, known, is_later and key == "headers")
             for key, value in given.items()}
    urls = given["url"] if isinstance(given.get("url"), list) else [given.get("url")]
    if "url" in given:
        for url in urls:
            check_url(url)
        if not given.keys().isdisjoint(("command", *SANDBOX_SETTINGS)):
            raise SettingsError("url: goes with neither a command nor a setting of its sandbox")
    elif not given.get("command", "").strip():
        raise SettingsError("command: is missing, and so is url")
    group = given.get("group")
    if group is not None:
        with within("group"):
            check_name(group)
    elif alone := [key for key in given if key in ("when", "weight", "backup")]:
        raise SettingsError(f"{alone[0]}: is for servers of a group")
    for variable, value in env.items():
        if not re.fullmatch("[^=\0]+", variable) or "\0" in value:
            raise SettingsError(f"env: {variable[:80]!r} cannot be set")
    for header, value in given.get("headers", {}).items():
        if not _HEADER_NAME.fullmatch(header) or _OUR_HEADERS.fullmatch(header) or not (
                is_later or _FIELD_LINE.fullmatch(f"{header}: {value}".encode("utf-8", "replace"))):
            raise SettingsError(f"headers: {header[:80]} cannot be set, at least not to this value")
    if not re.fullmatch("[A-Za-z0-9_-]{0,32}", given.get("prefix", "")) or "__" in given.get("prefix", ""):
        raise SettingsError("prefix: is up to 32 of A-Z a-z 0-9 _ -, without two _ in a row")
    own = {key: type(getattr(Settings, key))(given[key]) for key in SERVER_SETTINGS if key in given}
    try:
        own_settings = check_settings(dataclasses.replace(settings, **own))
    except SettingsError as error:
        key, _, rule = str(error).partition(" ")           # it begins with the name of the variable
        raise SettingsError(f"{key.lower()}: {rule}") from None
    overrides = {tool: parse_override(tool, changes) for tool, changes in given.get("overrides", {}).items()}
    command = (given["command"], *given.get("args", ())) if "command" in given else ()
    rules = Rules(tuple(given["tools"]) if "tools" in given else None, overrides, own_settings.max_result_kb)
    server = ServerConfig(
        name, own_settings, command, urls[0], headers, given.get("type") == "sse", env, given.get("cwd"),
        given.get("prefix"), rules, group, parse_when(given["when"]) if "when" in given else None,
        float(given.get("weight", 1)), given.get("backup", False))
    return replicated(server, urls, given.get("replicas", 1))


def parse_override(tool: str, changes: object) -> Override:
    """What the operator changes of a tool."""
    with within(f"overrides: {tool}"):
        check_keys(changes, _OVERRIDE_KEYS)
        if not _NAME.fullmatch(changes.get("name", "x")):
            raise SettingsError("name: is 1 to 64 of A-Z a-z 0-9 _ -")
        if set(changes.get("defaults", ())) & set(changes.get("fixed", ())):
            raise SettingsError("an argument is in defaults or in fixed, not in both")
    return Override(**changes, text=json.dumps(changes, sort_keys=True))


def parse_when(given: dict) -> When:
    """Which calls a server of a group claims."""
    with within("when"):
        check_keys(given, _WHEN_KEYS)
        if not any(given.values()):
            raise SettingsError("names neither argument, header nor key")
    headers = {name.lower(): glob for name, glob in given.get("header", {}).items()}
    return When(given.get("argument", {}), headers, given.get("key"))


def check_url(url: str) -> None:
    """Refuses what is no URL of a remote server."""
    parts = split_url(url)
    if not parts or "#" in url:
        raise SettingsError("url: must be an http:// or https:// URL, in ASCII, without blanks or #")
    if "@" in parts.netloc:
        raise SettingsError("url: must hold no user or password; write an Authorization header in headers")


def check_keys(given: object, keys: dict) -> None:
    """Refuses an object with a key that is not known, or a value of the wrong type."""
    if not isinstance(given, dict):
        raise SettingsError("must be an object")
    for key, value in given.items():
        if key not in keys:
            import difflib
            near = difflib.get_close_matches(key.lower(), keys, 1, 0)
            raise SettingsError(f"{key[:80]}: is not known; the nearest that is: {near[0]}")
        kind, fits = keys[key]
        if not fits(value):
            raise SettingsError(f"{key}: must be {kind}")


def expanded(value: object, key: str, environment: dict[str, str], is_later: bool = False) -> object:
    """A value with variables in the place of ${NAME} in all its strings; with `is_later`, one that is not set stays as
    it is. What only looks like ${NAME} (braces in a default, an editor's variable) is found too, and refused."""
    def replace(match: re.Match) -> str:
        if match[0] == "$${":
            return "${"
        said, default = match[1] or match[0][2:], match[2]
        name = said.removeprefix("env:")
        name = "HOME" if name == "userHome" else name
        if re.match("input:|workspaceFolder|workspaceRoot", said):
            raise SettingsError(f"{key}: {match[0]} is an editor's, and means nothing here; write ${{NAME}}, and set "
                                "that variable")
        if not _VARIABLE_NAME.fullmatch(name):
            raise SettingsError(f"{key}: {match[0]} is not ${{NAME}}, ${{env:NAME}} or ${{NAME:-default}}; write $${{ "
                                "for a ${ that is meant as it is")
        if default is not None:
            return environment.get(name) or default
        if name in environment:
            return environment[name]
        if is_later:
            return match[0]
        raise SettingsError(f"{key}: the variable {name} is not set; set it, or write ${{{name}:-default}}")
    if isinstance(value, str):
        return re.sub(r"\$\$\{|\$\{([^{}:]*(?::(?!-)[^{}:]*)?)(?::-([^{}]*))?\}|\$\{(?:env:)?\w+:-[^{}]*\$?\{[^{}]*\}*"
                      r"|\$\{(?:input|command|workspace\w+):[^{}]*\}", replace, value)
    if isinstance(value, list):
        return [expanded(one, key, environment, is_later) for one in value]
    if isinstance(value, dict):
        return {name: expanded(one, key, environment, is_later) for name, one in value.items()}
    return value


def check_names(servers: dict[str, ServerConfig]) -> None:
    """Refuses overrides that give two tools the same name."""
    owners = {}
    for name, server in servers.items():
        for tool, override in server.rules.overrides.items():
            shown, owner = server.shown_as(tool, "tools/list", is_joint=True), f"{tool} of {server.group or name}"
            if shown is not None and override.name and owners.setdefault(shown, owner) != owner:
                raise SettingsError(f"server {name}: overrides: {tool}: the name {shown} is {owners[shown]}'s already")


# The file of keys.

_SCOPE = re.compile(r"[!#-\[\]-~]+")                  # RFC 6749 §3.3
_GRANT_KEYS = {"servers": _TEXTS, "tools": _TEXTS, "read_only": _BOOL, "env": _TEXTS}
_CALLER_KEYS = {"key": _TEXT, "sha256": _TEXT, **_GRANT_KEYS}


class Keys(typing.NamedTuple):
    """Who may come in."""

    callers: tuple[Caller, ...] = ()           # with a key
    scopes: dict[str, Grant] | None = None     # what a scope opens for tokens that have it; None: all open everything


def keys_of(settings: Settings, text: str = "", servers: tuple[str, ...] = ()) -> Keys:
    """The keys of AUTH_KEY, called key1, key2, ..., and those of the file, which has this text and may name only these
    `servers`. SettingsError says what is wrong in it."""
    callers = [Caller(f"key{number}", digest_of_key(key)) for number, key in enumerate(settings.auth_keys, 1)]
    if not settings.auth_keys_file:
        return Keys(tuple(callers))
    with within(settings.auth_keys_file, ValueError, RecursionError):
        given = json.loads(as_json(text), object_pairs_hook=without_repeats)
        if not isinstance(given, dict):
            raise SettingsError("must be an object")
        if "scopes" in given:
            check_keys({"scopes": given["scopes"]}, {"scopes": _OBJECT})
        scopes = given.pop("scopes", None)             # the rest parse_caller() checks, which repeats no bad name
        for name in scopes or ():
            if not _SCOPE.fullmatch(name):
                raise SettingsError(f"scopes: {name[:80]!r} is no scope: RFC 6749 §3.3")
            scopes[name] = parse_grant(f"scopes: {name}", scopes[name], servers, _GRANT_KEYS)
        callers += [parse_caller(name, entry, servers) for name, entry in given.items()]
        first: dict[object, Caller] = {}
        for caller in callers:
            for what, value in ("name", caller.name), ("key", caller.digest):
                other = first.setdefault(value, caller)
                if other is not caller:
                    where = " of AUTH_KEY" if other in callers[:len(settings.auth_keys)] else ""
                    raise SettingsError(f"{caller.name}: has the same {what} as {other.name}{where}")
    return Keys(tuple(callers), scopes)


def parse_caller(name: str, entry: dict, servers: tuple[str, ...]) -> Caller:
    """One key of the file."""
    if not re.fullmatch("[A-Za-z0-9._@-]{1,64}", name) or name == "scopes":
        # The name is not told: it may be a key that was written in the wrong place.
        raise SettingsError("a key has no name of 1 to 64 of A-Z a-z 0-9 . _ @ -, or is called scopes")
    grant = parse_grant(name, entry, servers, _CALLER_KEYS)
    key, sha256 = entry.get("key"), entry.get("sha256")
    if (key is None) == (sha256 is None):
        raise SettingsError(f"{name}: needs either key or sha256")
    if not (re.fullmatch("[0-9a-fA-F]{64}", sha256) if key is None else key and key == key.strip()):
        raise SettingsError(f"{name}: a key must not be empty, nor have blanks around it, and a sha256 has 64 digits")
    digest = bytes.fromhex(sha256) if key is None else digest_of_key(key)
    if digest == digest_of_key(""):
        raise SettingsError(f"{name}: sha256: is that of an empty key")
    return Caller(name, digest, Limits(name, (grant,)) if grant != Grant() else None)


def parse_grant(name: str, entry: dict, servers: tuple[str, ...], known: dict) -> Grant:
    """What a key or a scope opens; `known` are the members that it may have."""
    with within(name):
        if isinstance(entry, dict) and not entry.keys() <= known.keys():
            raise SettingsError(f"has something that is not known; what is: {', '.join(known)}")
        check_keys(entry, known)
        unknown = [server for server in entry.get("servers", ()) if server not in servers]
        if unknown:
            raise SettingsError(f"servers: there is no server {unknown[0][:80]}, but {', '.join(servers)}")
    return Grant(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
                    if key in _GRANT_KEYS})


# ============================================================================
# PART II. THE MOVING PARTS: what is alive while the proxy runs
# ============================================================================
#
# Two measures that save memory, before asyncio is imported. CPython keeps the syntax tree of a file that it runs from
# its source, which takes more than all the rest: so the program starts itself again as compiled code. And asyncio
# imports ssl if it can, an eighth of what remains: where no TLS is needed, that import is made to fail.

import marshal
import os


def start_compiled() -> None:
    """Runs the same program in the place of this one, from compiled code in memory. execve(2), memfd_create(2)."""
    code = os.memfd_create("mcpproxy", 0)              # without MFD_CLOEXEC, Python's default, so that it stays open
    try:
        with open(code, "wb", closefd=False) as file:
            marshal.dump(sys._getframe(1).f_code, file)
        os.lseek(code, 0, os.SEEK_SET)
        run = ("import marshal, sys; del sys.argv[0]; __file__ = sys.argv[0]; "
               f"file = open({code}, 'rb'); main = marshal.load(file); file.close(); exec(main)")
        os.execv(sys.executable, [*sys.orig_argv[:-len(sys.argv)], "-P", "-c", run, *sys.argv])
    finally:
        os.close(code)


if __name__ == "__main__" and not __spec__ and "SourceFileLoader" in str(globals().get("__loader__")):
    with contextlib.suppress(OSError, AttributeError):     # without it the program only takes more memory
        start_compiled()

_configured = " ".join(sys.argv + [f"{name}={os.environ[name].strip() or '-'}" for name in (
    "TLS_CERT", "MCP_CONFIG", "MCP_SERVER_CONFIG", "OAUTH_ISSUER") if os.environ.get(name)])
if __name__ == "__main__" and not re.search(
        r"--tls-cert|TLS_CERT=\S|https://|--(mcp-)?config|MCP_CONFIG=\S|--oauth|OAUTH_ISSUER=\S", _configured):
    sys.modules["ssl"] = None

import asyncio
import bisect
import collections
import concurrent.futures
import errno
import fcntl
import logging
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
import traceback
import weakref


# ============================================================================
# 14. Logs
# ============================================================================
#
# What happened, a line each, on stderr. Two rules: a log that nobody reads, or a
# full disk, must not stop the proxy; and no secret gets in, so what is logged of a
# message is its method, a tool's name, id, size and time; its body only at DEBUG.
#
#     <  came from a client    >  goes to a client    <> came and is over    =  changed state    !  went wrong

MAX_LOG_LINE = 4_000          # bytes; less than PIPE_BUF
level_name = functools.cache(logging.getLevelName)

_turn: tuple = (None, [])          # (the event loop, what is to be called at the end of its turn)


def at_end_of_turn(call) -> None:
    """Calls `call` at the end of this turn of the event loop, when all that is ready now has been done: so what is
    collected in a turn is written once. All who collect share one callback of the loop."""
    global _turn
    loop = asyncio.get_running_loop()
    if _turn[0] is not loop:
        _turn = loop, []
        loop.call_soon(_end_turn)
    _turn[1].append(call)


def _end_turn() -> None:
    global _turn
    calls, _turn = _turn[1], (None, [])
    for call in calls:
        try:
            call()
        except Exception as error:
            log.fault(error)


def _fitted(text: str, limit: int) -> str:
    """A value of an entry, cut. Plain ones of 100 characters always fit: no client shortens who it was, or the time, by
    what takes 12 bytes a character in JSON."""
    return text[:max(limit, 100) if text.isascii() and text.isprintable() else limit]


class Log(logging.Handler):
    """Writes lines to a file descriptor, all of one turn of the event loop at once, and never waits.

    A line is a %-template and its fields; as JSON, an object of the text and of the fields that are not "-"."""

    def __init__(self, descriptor: int = 2, as_json: bool = False):
        super().__init__("INFO")
        self.as_json = as_json
        self.descriptor = descriptor
        self.dropped = 0                        # lines that could not be written, for a debugger
        self._is_cut = False                    # does what was written end within a line?
        self.debug, self.info, self.warning, self.error = (functools.partial(self.say, level) for level in (
            logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR))
        self._entries: list[tuple] = []         # (time, level, template, fields, error, about) of lines to come
        self._second, self._clock, self._zone = 0, "", ""           # of the last line: its time and zone as text
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Logs what asyncio reports."""
        self.add(record.levelno, "! %(problem)s", {"problem": record.getMessage()},
                 record.exc_info and record.exc_info[1])

    def fault(self, error: BaseException | None) -> None:
        """Something that should not have happened, with its traceback."""
        self.add(logging.ERROR, "! a fault of the proxy's own", {}, error)

    def say(self, level: int, template: str, **fields) -> None:
        self.add(level, template, fields)

    def add(self, level: int, template: str, fields: dict | tuple, error: BaseException | None = None,
            about: dict | None = None) -> None:
        """Logs a template with its fields, by name or in its order, and an error's traceback. `about`: the fields
        of the JSON object, where they are others than those of the text, or have no names there."""
        if level < self.level:
            return
        self._entries.append((time.time(), level, template, fields, error, about))
        if len(self._entries) == 1:
            try:
                at_end_of_turn(self.flush)
            except RuntimeError:                # no event loop runs
                self.flush()

    def flush(self) -> None:
        entries, self._entries = self._entries, []
        block = b""
        for entry in entries:
            line = self._line(*entry)
            if len(block) + len(line) > select.PIPE_BUF:
                self._write(block)
                block = b""
            block += line
        if block:
            self._write(block)

    def _line(self, when: float, level: int, template: str, fields: dict | tuple, error: BaseException | None,
              about: dict | None) -> bytes:
        second, millisecond = divmod(int(when * 1000), 1000)
        if second != self._second:
            self._second, local = second, time.localtime(second)
            self._clock, self._zone = time.strftime("%Y-%m-%d %H:%M:%S.", local), time.strftime("%z", local)
        try:
            text = template % fields if fields else template
        except (TypeError, ValueError, KeyError):
            text, fields, about = f"{template} {fields}", {}, {}      # a mistake of ours: no reason to lose the others
        if not text.isprintable():
            text = repr(text)[1:-1]             # a line feed in a method's name would forge a line
        if error:
            text += "\n" + "".join(traceback.format_exception(error, limit=-8)).rstrip()     # where it happened
        name = level_name(level)
        if not self.as_json:
            line = ("%s%03d %-7s %s" % (self._clock, millisecond, name, text)).encode("utf-8", "backslashreplace")
            if len(line) > MAX_LOG_LINE:        # half a character would make a line of bytes of it, for journald
                line = line[:MAX_LOG_LINE].decode("utf-8", "ignore").encode()
            return line + b"\n"
        clock = f"{self._clock.replace(' ', 'T')}{millisecond:03}{self._zone[:3]}:{self._zone[3:]}"
        entry = {"time": clock, "level": name, "message": text, **(about or fields)}
        for limit in (MAX_LOG_LINE, 1_000, 100, 20):     # values are cut, and not the line, which would be JSON no more
            line = dump({field: round(value, 1) if isinstance(value, (int, float)) and abs(value) < 1e18 else
                         _fitted(str(value), limit) for field, value in entry.items() if value != "-"})
            if len(line) <= MAX_LOG_LINE:
                break
        return line.encode() + b"\n"

    def _write(self, block: bytes) -> None:
        try:
            # A pipe that can be written to has room for PIPE_BUF bytes, so this does not wait.
            if self._poll.poll(0):
                text = b"\n" + block if self._is_cut else block           # a line that was cut spoils no other
                written = os.write(self.descriptor, text)
                if written == len(text):
                    self._is_cut = False
                    return
                self._is_cut, block = not text.endswith(b"\n", 0, written), text[written:]
        except OSError:
            pass                  # a full disk, or stderr is closed: there is nowhere to say so
        self.dropped += block.count(b"\n")


class Rate:
    """Counts how often something happens within some seconds, which begin with the first time."""

    def __init__(self, seconds: float = 1):
        self.count, self._since, self._seconds = 0, 0.0, seconds

    def add(self, now: float) -> int:
        """Once more."""
        self.count, self._since = (self.count + 1, self._since) if now - self._since < self._seconds else (1, now)
        return self.count


def redactor(secrets: collections.abc.Iterable[str]):
    """A function that replaces secrets of more than three characters in a text for the log, plain or escaped as in
    JSON. (One regular expression for all would be slower, and much slower for secrets that begin alike.)"""
    forms = {form for secret in secrets if len(secret) > 3 for form in (
        secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1])}
    longest_first = sorted(forms, key=len, reverse=True)

    def redact(text: str) -> str:
        for form in longest_first:
            text = text.replace(form, "***")
        return text
    return redact


log = Log()


def as_client_error(error: Exception) -> ProxyError:
    """The error that a client is told; what is not for clients goes to the log."""
    if isinstance(error, ProxyError):
        return error
    log.fault(error)
    return ProxyError("internal error", status=500, code=INTERNAL_ERROR)


def start_logging(level: str, as_json: bool) -> None:
    """Sends the log to stderr in this form from now on."""
    log.setLevel(level.upper())
    log.as_json = as_json
    logging.getLogger("asyncio").handlers = [log]
    if log.descriptor == 2:
        with contextlib.suppress(OSError):       # a terminal that poll() calls writable may lack room for a line
            log.descriptor = os.open(os.ttyname(2), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)


# ============================================================================
# 15. Counters
# ============================================================================
#
# How often things happened, for Prometheus. The names and buckets of requests are OpenTelemetry's (Semantic conventions
# for MCP, metric mcp.server.operation.duration). Each set of labels is kept for good, so no client may make new ones:
# a method, revision or tool that it made up counts as OTHER. Only the server says which tools there are, and it may not
# have been asked yet: so calls of unknown tools are kept apart until the numbers are read. Error codes are the
# server's, and only so many are told apart.

DURATIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)         # seconds
MAX_TOOLS = 500                  # that have numbers of their own, or that somebody was warned of
MAX_CODES = 50                   # of errors, the well-known ones included
MAX_CALL_SERIES = 4_000          # sets of labels; past that, tools and errors are not told apart: each is 3 KB of text
MAX_UNSETTLED = 1_000            # sets of labels with a tool that is not known (yet)
MAX_LABEL_VALUE = 100            # characters


def is_first(known: set[tuple[str, ...]], *names: str) -> bool:
    """Is what these name met for the first time? Remembers that, of no more than MAX_TOOLS: a server may list new ones
    each time."""
    cut = tuple(name[:MAX_LABEL_VALUE] for name in names)
    if cut in known or len(known) >= MAX_TOOLS:
        return False
    known.add(cut)
    return True


class Counters:
    """What is counted at the doors: a call ends, a request is refused, bytes and streams come and go."""

    def __init__(self):
        self.calls: dict[tuple, list] = {}         # by (server, method, tool, revision, error): see find()
        self.unsettled: set[tuple] = set()         # those of which it is not known (yet) whether there is such a tool
        self.refused: collections.Counter = collections.Counter({503: 0})          # HTTP requests, by status
        self.received = self.sent = 0              # bytes, by HTTP
        self.streams = 0                           # that are open
        self._kept: dict[str, set[str]] = {"tool": set(), "error": {"", "cancelled", "tool_error", *map(str, (
            PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, INTERNAL_ERROR, SERVER_FAILED,
            HEADER_MISMATCH, MISSING_CAPABILITY, UNSUPPORTED_VERSION, RESOURCE_NOT_FOUND, URL_ELICITATION_REQUIRED))}}

    def find(self, labels: tuple, tools: collections.abc.Container[str]) -> list:
        """The numbers for a call whose labels are new. All labels but the method may be empty; an empty error means
        that there was none. `tools` are those that the server has. The numbers are: how many calls fell into each
        bucket of DURATIONS, how many took longer, and how many seconds they took together."""
        tool = labels[2]
        if tool and tool not in tools and len(tool) <= MAX_LABEL_VALUE and len(self.unsettled) < MAX_UNSETTLED:
            self.unsettled.add(labels)
            return self.calls.setdefault(labels, [0] * (len(DURATIONS) + 2))
        return self._settled(labels, tools)

    def _settled(self, labels: tuple, tools: collections.abc.Container[str]) -> list:
        server, method, tool, revision, error = labels
        method = method if method in METHODS else OTHER
        is_name = tool in tools and len(tool) <= MAX_LABEL_VALUE and tool.isprintable()      # or two may look alike
        tool = self._bounded("tool", tool, MAX_TOOLS) if is_name else tool and OTHER
        revision = revision if revision in ("", MODERN_VERSION, *LEGACY_VERSIONS) else OTHER
        labels = server, method, tool, revision, self._bounded("error", error, MAX_CODES)
        if labels not in self.calls and len(self.calls) - len(self.unsettled) >= MAX_CALL_SERIES:
            labels = server, method, tool and OTHER, revision, error and OTHER
        return self.calls.setdefault(labels, [0] * (len(DURATIONS) + 2))

    def _bounded(self, kind: str, value: str, limit: int) -> str:
        kept = self._kept[kind]
        if value not in kept and len(kept) < limit and len(value) <= MAX_LABEL_VALUE:
            kept.add(value)
        return value if value in kept else OTHER

    def settle(self, tools: dict[str, collections.abc.Container[str]], waiting: set[str]) -> None:
        """Counts what was kept apart, now that the tools of each server are as well known as can be; `waiting` are the
        servers that will still say which they have."""
        for labels in [labels for labels in self.unsettled if labels[0] not in waiting]:
            self.unsettled.remove(labels)
            numbers = self.calls.pop(labels)
            into = self._settled(labels, tools.get(labels[0], ()))
            into[:] = map(sum, zip(into, numbers))


def exposition(families: collections.abc.Iterable[tuple]) -> bytes:
    """The text that Prometheus reads, of (name, type, help, samples); these are (labels as a dict, value), and of a
    histogram the value is as in Counters. Prometheus, Exposition formats, Text-based format, 0.0.4."""
    escapes = str.maketrans({"\\": r"\\", '"': r'\"', "\n": r"\n", "\0": "?"})          # a NUL ends it for Prometheus

    def sample(name: str, pairs: list[str], value: float) -> str:
        return f"{name}{{{','.join(pairs)}}} {value}" if pairs else f"{name} {value}"
    lines, limits = [], [f'le="{limit}"' for limit in (*DURATIONS, "+Inf")]
    for name, kind, about, samples in families:
        lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
        for labels, value in samples:
            pairs = [f'{label}="{str(text)[:MAX_LABEL_VALUE].translate(escapes)}"' for label, text in labels.items()]
            if kind != "histogram":
                lines.append(sample(name, pairs, value))
                continue
            *counts, seconds = value
            for limit, count in zip(limits, itertools.accumulate(counts)):
                lines.append(sample(f"{name}_bucket", [*pairs, limit], count))
            lines += [sample(f"{name}_sum", pairs, seconds), sample(f"{name}_count", pairs, sum(counts))]
    return "\n".join([*lines, ""]).encode("utf-8", "replace")


# ============================================================================
# 16. Shares
# ============================================================================
#
# What many share is never enough for one who takes without end, and limits for each connection, session and stream
# do not limit all of them together. So all that is held for clients in memory is counted in one place, in bytes; and
# where there are only so many places (sessions, processes, parked calls, listeners), those who have them are counted
# when one more is wanted. When there is no room, whoever has most is refused first, and something is taken from whoever
# has most only for one who has less.

SMALL = 4 * 1024                 # bytes; what is smaller comes with what is counted anyway, and is not counted


def principal_of(host: str) -> str:
    """Who is charged for an address. Whoever has one has its neighbours too: a /64 of IPv6, all of the loopback."""
    host = host.removeprefix("::ffff:")              # how a socket for both families shows IPv4
    if host == "::1" or host.startswith("127."):
        return "127.0.0.1"
    # As text, an address leaves out zeros: its first four words need not be the first 64 bits.
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8].hex(":", 2) if ":" in host else host


class Holder:
    """What holds bytes for a principal, and can give them back."""

    __slots__ = ()
    principal: object = None
    held = 0
    is_spare = False             # would nothing fail without them? Then they go before others of the same principal

    def give(self) -> None:
        """Does without what it holds."""


class Budget:
    """All that is held for clients, together."""

    def __init__(self, limit: float = float("inf")):
        self.limit = limit               # bytes
        self.held = self.most = 0        # now, and since give_back()
        self._holders: dict[Holder, tuple] = {}                         # the (principal, is_spare) each counts under
        self._totals: collections.Counter = collections.Counter()       # bytes, by these

    def set(self, holder: Holder, size: int) -> None:
        """The holder holds so many bytes now. If that is too much in all, room is made at the end of the turn."""
        before, holder.held = holder.held, size
        was_over = self.held > self.limit
        self.held += size - before
        self.most = max(self.most, self.held)
        if before:
            kind = self._holders.pop(holder)
            self._totals[kind] -= before
            if not self._totals[kind]:
                del self._totals[kind]
        if size:
            kind = self._holders[holder] = holder.principal, holder.is_spare
            self._totals[kind] += size
        if self.held > self.limit and not was_over:
            at_end_of_turn(lambda: self.held > self.limit and self._free(0, self._totals.keys()))

    def has_room(self, principal: object, size: int) -> bool:
        """May so much more be held for a principal? Others, who hold more, give for it; of its own, what is spare."""
        if self.held + size <= self.limit:
            return True
        mine = self._total(principal) + size
        return self._free(size, {kind for kind in self._totals if self._total(kind[0]) > mine or (
            kind == (principal, True))})

    def _total(self, principal: object) -> int:
        return self._totals.get((principal, False), 0) + self._totals.get((principal, True), 0)

    def _free(self, size: int, kinds: collections.abc.Set) -> bool:
        """Makes room for so many bytes, and for a tenth of the limit, so that it is seldom done: takes from whoever
        holds most, first what can be spared, then the largest. Takes nothing if all of these kinds hold too little:
        looking at each holder may take long, and being refused costs a client nothing."""
        if self.held + size - sum(map(self._totals.get, kinds)) > self.limit:
            return False
        totals = {principal: self._total(principal) for principal, _ in kinds}
        holders = [(totals[kind[0]], kind[1], holder.held, number, holder)
                   for number, (holder, kind) in enumerate(self._holders.items()) if kind in kinds]
        for *_, holder in sorted(holders, reverse=True):
            if self.held + size <= self.limit * 0.9:
                break
            self.set(holder, 0)
            holder.give()
        return True


budget = Budget()                # of the program


def holders_of_most(holders, principal: object) -> list:
    """The holders of the principal that has most: one has to go, to make room for one more of `principal`'s. Nobody, if
    `principal` would then have as many."""
    numbers = collections.Counter(holder.principal for holder in holders)
    most = max(numbers, key=numbers.get, default=None)
    if numbers[principal] + 1 >= numbers[most]:
        return []
    return [holder for holder in holders if holder.principal == most]


def try_later(why: str) -> ServerError:
    """The answer to a client that may come again."""
    return ServerError(why, status=503, headers=(("Retry-After", "5"),))


def limits_changed() -> ServerError:
    """The error for what was let in, under limits that have changed since."""
    return try_later("what its caller may use has changed")


# ============================================================================
# 17. Linux
# ============================================================================
#
# What Linux says of processes, where there is a /proc; threads and signals; and the removal of files that others have
# written.

# Fields of /proc/PID/stat, behind the name. proc_pid_stat(5).
STATE, PARENT, GROUP, SESSION, USER_TICKS, SYSTEM_TICKS, CHILDREN_TICKS, THREADS, START, PAGES = (
    0, 1, 2, 3, 11, 12, slice(13, 15), 17, 19, 21)
MAX_PROC = 6 * 1024 * 1024       # bytes that are read of a file there: an environment may seem endless. execve(2)


def libc():
    """The C library, for what Python has no function for; None where it cannot be had."""
    try:
        import ctypes
        return ctypes.CDLL(None, use_errno=True)
    except (ImportError, OSError):
        return None


def executor_with_its_thread() -> concurrent.futures.ThreadPoolExecutor:
    """One thread for what takes long, from now on: later there may be none to be had."""
    executor = concurrent.futures.ThreadPoolExecutor(1)
    with contextlib.suppress(RuntimeError):
        executor.submit(int)
    return executor


def children_of(pid: int) -> list[int]:
    """The children of a process, where the system can say. proc_tid_children(5)."""
    try:
        return [int(child) for task in os.listdir(f"/proc/{pid}/task")
                for child in read_file(f"/proc/{pid}/task/{task}/children").split()]
    except OSError:
        return []


def descendants_of(pid: int) -> set[tuple[int, bytes]]:
    """(process id, time of its start) of what descends from a process."""
    found, parents = set(), [pid]
    while parents:
        for child in children_of(parents.pop()):
            if (one := (child, process_stat(child)[START])) not in found:
                found.add(one)
                parents.append(child)
    return found


def read_proc(pid: int, name: str) -> collections.abc.Iterator[bytes]:
    """What a file of /proc says of a process, and then of its threads: they may go on when the first has ended."""
    yield read_file(f"/proc/{pid}/{name}", MAX_PROC)
    with contextlib.suppress(OSError):
        tasks = os.listdir(f"/proc/{pid}/task")
        yield from (read_file(f"/proc/{pid}/task/{task}/{name}", MAX_PROC) for task in tasks if len(tasks) > 1)


def process_stat(pid: int) -> list[bytes]:
    """The fields of a process, by STATE and the others; all are empty if it is gone."""
    stats = (text.rpartition(b")")[2].split() for text in read_proc(pid, "stat"))
    stat = next(stats) or [b""] * (PAGES + 1)
    if stat[STATE] == b"Z" and stat[THREADS] != b"1":          # its other threads run
        alive = next((one for one in stats if one and one[STATE] not in (b"Z", b"X")), stat)
        stat[STATE], stat[PAGES] = alive[STATE], alive[PAGES]
    return stat


def cgroups_around() -> list[str]:
    """Our control group and the one above it, as directories; none where there is no cgroup v2. cgroups(7)."""
    root = re.search(r"^\S+ (\S+) cgroup2 ", read_file("/proc/self/mounts").decode(errors="replace"), re.MULTILINE)
    own = re.search("^0::(.*)$", read_file("/proc/self/cgroup").decode(errors="replace"), re.MULTILINE)
    paths = (own[1], os.path.dirname(own[1])) if root and own else ()
    return [*dict.fromkeys(os.path.normpath(root[1] + path) for path in paths)]


def make_divisible(group: str, leaf: str) -> bool:
    """Can limits be set for the groups below a control group? While processes are in it, only if it is the root: so if
    all of them are ours, they move to `leaf`, below it. (Linux would refuse memory then, but not pids, which makes it a
    group of threads: below that no process can be, neither a server nor what systemd starts for a reload.) cgroups(7);
    Linux, Control Group v2, No Internal Process Constraint, Threads."""
    if not os.path.exists(f"{group}/cgroup.type"):             # which the root alone has not
        return True
    others = None
    for _ in range(10):                      # they end, and start others, which are in it too, while they are moved
        pids, before = {int(pid) for pid in read_file(f"{group}/cgroup.procs").split()}, others
        others = pids and pids - {os.getpid(), *(pid for pid, _ in descendants_of(os.getpid()))}
        if not pids or others and others == before:
            break
        for pid in () if others else pids:
            with contextlib.suppress(OSError):
                os.makedirs(leaf, exist_ok=True)
                write_file(f"{leaf}/cgroup.procs", str(pid))
    return not pids


def list_processes() -> list[int]:
    """The ids of all processes that can be seen; none where there is no /proc."""
    try:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def processes_of(uid: int) -> list[int]:
    """What runs as a user; a zombie does not."""
    found = []
    for pid in list_processes():
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{pid}").st_uid == uid and process_stat(pid)[STATE] != b"Z":
                found.append(pid)
    return found


def read_file(path: str, most: int = -1) -> bytes:
    """A small file's bytes; none when it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(most)
    except OSError:
        return b""


def write_file(path: str, text: str) -> None:
    """Writes to a file of the kernel's; OSError when that refuses it."""
    with open(path, "w") as file:
        file.write(text)


def open_up(name: str, at: int) -> None:
    """Gives its owner all rights on a directory, and never on what a link in its place leads to, as chmod() would. Root
    may need them too: a container can take away its right to do without."""
    with contextlib.suppress(OSError):                 # gone, exchanged, or another's: what follows meets that
        folder = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
        try:
            os.chmod(f"/proc/self/fd/{folder}", 0o700)
        finally:
            os.close(folder)


def remove_tree(base: str, name: str) -> None:
    """Removes a directory from a base where nobody else may write: whatever the permissions in it, however deep it is,
    and even while somebody still changes it. Each directory in it is moved up into the base, where nobody can exchange
    it, before it is opened; no link is entered."""
    at = os.open(base, os.O_RDONLY)
    try:
        found = [one for one in os.listdir(at) if one.partition(".")[0] == name]     # also what an earlier try moved up
        while found:
            here = found.pop()
            try:
                open_up(here, at)
                folder = os.open(here, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            except NotADirectoryError:                 # it was exchanged for another thing as it was moved
                os.unlink(here, dir_fd=at)
                continue
            try:
                for entry in list(os.scandir(folder)):
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.name, dir_fd=folder)
                        continue
                    open_up(entry.name, folder)
                    found.append(f"{name}.{os.urandom(8).hex()}")
                    os.rename(entry.name, found[-1], src_dir_fd=folder, dst_dir_fd=at)
            finally:
                os.close(folder)
            os.rmdir(here, dir_fd=at)
    finally:
        os.close(at)


def kill(pid: int, number: int) -> bool:
    """Sends a signal to a process, or to a group when negative; False when there is nobody of ours."""
    try:
        os.kill(pid, number)
        return True
    except (ProcessLookupError, PermissionError):
        return False


# ============================================================================
# 18. Processes
# ============================================================================
#
# Whose each process is, what it uses, and how nothing outlives its server. A process can get away in steps:
#
#     it ...                                           and is known by
#     leaves its process group                         its parent, its session, and what was known before
#     loses its parent                                 MCPPROXY_TAG in its environment
#     clears its environment                           in a sandbox: its control group, or its server as its parent
#     does all of it between two looks                 having become the proxy's child; it is ended when no server runs
#     is there when the proxy is killed (SIGKILL)      MCPPROXY_TAG alone: a shell waits for that moment


STALE_SECONDS = 0.1              # nobody is told what was found longer ago: it is looked at again


class Usage:
    """What a server uses, with all that descends from it."""

    def __init__(self, server: str, tag: str, on_measured):
        self.server = server
        self.tag = tag
        self.on_measured = on_measured               # called when what follows was measured
        self.memory = self.peak_memory = 0           # bytes that are resident; what is shared counts for each
        self.processes = self.peak_processes = 0
        self.zombies = 0                             # ended processes for which their parents have not waited
        self.cpu: dict[int, float] = {}              # seconds of CPU, by process, with those of children it waited for
        self.waited: dict[int, float] = {}           # the latter alone
        self.most_seconds = 0.0                      # of the running process that took most
        self.gone = 0.0                              # of processes that have ended, for which none of these waited
        self.measured_at = time.monotonic()          # or when it began
        self.is_over = False                         # has the server itself ended?

    @property
    def seconds(self) -> float:
        """Seconds of CPU, in all."""
        return self.gone + sum(self.cpu.values())

    @property
    def megabytes(self) -> float:
        """Megabytes of memory, rounded as they are shown."""
        return round(self.memory / 1024 / 1024, 1)


class Census:
    """Which server each process belongs to, whatever becomes of its parents; and what it uses."""

    def __init__(self):
        self.starting = 0                                       # servers whose process id is not known yet
        self.servers: dict[int, Usage] = {}                     # by process id
        self.spent: collections.Counter = collections.Counter()           # seconds of CPU of what has ended, by server
        self.killed: collections.Counter = collections.Counter()          # processes, by (server, limit)
        self._whose: dict[int, tuple[bytes, int]] = {}          # (the time of its start, its server), by process id
        self._others: set[int] = set()                          # processes that are no server's, as far as can be told
        self._reaped = sum(os.times()[2:4])                     # seconds of CPU, of children that have ended
        self._looked_at = 0.0
        self.ours: set[int] = set()                             # children of the proxy that are no server's either
        # A shell may have started others before it became this program, and process 1 gets everybody's orphans.
        # Otherwise it becomes the parent of those below it: prctl(2), PR_SET_CHILD_SUBREAPER.
        self.gets_orphans = os.getpid() != 1 and not children_of(os.getpid()) and (
            hasattr(libc(), "prctl") and libc().prctl(36, 1, 0, 0, 0) == 0)

    def look(self) -> None:
        """Reads /proc. What was found to be another's is not read again; each of the rest takes 20 µs."""
        tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
        self._looked_at, pids = time.monotonic(), {*list_processes()}
        if not pids:                           # no /proc, or no file descriptor is left to read it
            return
        self._others = (self._others & pids) - self.servers.keys()
        found = {pid: stat for pid in pids - self._others if (stat := process_stat(pid))[STATE]}
        before, self._whose = self._whose, {}
        running, ended = collections.defaultdict(list), collections.defaultdict(list)          # by server
        for pid, stat in sorted(found.items(), key=lambda one: (int(one[1][START]), one[0])):          # parents first
            server = self._server_of(pid, stat, before)
            if server in self.servers:
                self._whose[pid] = stat[START], server
                (ended if stat[STATE] == b"Z" else running)[server].append(pid)
            elif not self.starting:
                self._others.add(pid)
        for server, usage in self.servers.items():
            mine, known = running[server], usage.waited
            own = {pid: (int(found[pid][USER_TICKS]) + int(found[pid][SYSTEM_TICKS])) / tick
                   for pid in mine + ended[server]}
            usage.waited = {pid: sum(map(int, found[pid][CHILDREN_TICKS])) / tick for pid in own}
            # What one took that is no more is its parent's now, if that waited for it.
            lost = sum(seconds for pid, seconds in usage.cpu.items() if pid not in own)
            usage.gone += max(0, lost - sum(usage.waited[pid] - known.get(pid, 0) for pid in own))
            usage.cpu = {pid: own[pid] + usage.waited[pid] for pid in own}
            usage.processes, usage.zombies = len(mine), len(ended[server])
            usage.most_seconds = max((own[pid] for pid in mine), default=0)
            usage.memory = sum(int(found[pid][PAGES]) for pid in mine) * page
            usage.peak_memory = max(usage.memory, usage.peak_memory)
            usage.peak_processes = max(usage.processes, usage.peak_processes)
            usage.measured_at = time.monotonic()

    def measure(self) -> None:
        """Called each second: looks, and tells everybody."""
        if self.servers:
            self.look()
        for usage in list(self.servers.values()):
            usage.on_measured()

    def by_server(self) -> tuple[collections.Counter, collections.Counter, collections.Counter]:
        """The processes of each server, their bytes of memory, and seconds of CPU, also of those that have ended."""
        if self.servers and time.monotonic() - self._looked_at > STALE_SECONDS:
            self.look()
        processes, memory, seconds = collections.Counter(), collections.Counter(), self.spent.copy()
        for usage in self.servers.values():
            processes[usage.server] += usage.processes
            memory[usage.server] += usage.memory
            seconds[usage.server] += usage.seconds
        return processes, memory, seconds

    def _server_of(self, pid: int, stat: list[bytes], before: dict) -> int | None:
        """The server that a process belongs to: by what was known of it, its parent, or its session; an orphan's by its
        control group or its environment. Any other orphan that the proxy got goes to the server, if only one runs."""
        start, server = before.get(pid, (b"", None))
        if pid in self.servers:
            return pid
        if start == stat[START]:
            return server
        parent, session = int(stat[PARENT]), int(stat[SESSION])
        if parent in self._whose:
            return self._whose[parent][1]
        if session in self.servers:
            return session
        if parent not in (1, os.getpid()):
            return None
        for file, mark in ("cgroup", b"/mcpproxy-%b\n"), ("environ", b"MCPPROXY_TAG=%b\0"):
            text = next(filter(None, read_proc(pid, file)), b"")
            for server, usage in self.servers.items():
                if mark % usage.tag.encode() in text:
                    return server
        if parent != os.getpid() or not self.gets_orphans or self.starting or pid in self.ours:
            return None
        return next(iter(self.servers)) if len(self.servers) == 1 else None         # then it stays nobody's: see look()

    def reaped(self, usage: Usage | None = None) -> None:
        """A server's process has ended, and what it took since the last look is found in what the system adds up for
        all children that ended. None: another child has ended, whose time is its server's already."""
        before, self._reaped = self._reaped, sum(os.times()[2:4])
        if usage:
            usage.is_over = True               # others that ended too are reported next: they keep their share
            self._reaped -= sum(other.seconds for pid, other in self.servers.items()
                                if not other.is_over and not process_stat(pid)[STATE])
            usage.gone += max(0, self._reaped - before - usage.seconds)

    def forget(self, server: int) -> None:
        """It is gone; what it used counts."""
        usage = self.servers.pop(server, None)
        if usage:
            self.spent[usage.server] += usage.seconds
        if not self.servers:                   # nobody looks from now on, so ids may be reused unseen;
            self._others &= {*children_of(os.getpid())}        # but orphans there are now are not the next server's

    def of(self, server: int) -> set[tuple[int, bytes]]:
        """(process id, time of its start) of what is a server's."""
        return {(pid, start) for pid, (start, whose) in self._whose.items() if whose == server}

    def kill(self, server: int) -> None:
        """Kills a server and all that is its, whole process groups at a time, and what was born meanwhile."""
        known = None
        for _ in range(20):
            self.look()
            if known == (known := self.of(server)):
                break
            for group in {int(stat[GROUP]) for pid, start in known if (stat := process_stat(pid))[START] == start}:
                kill(-group, signal.SIGKILL)


class Reaper:
    """Ends what would outlive its server, and all servers when the proxy is killed; removes what they had.

    Every server has the variable MCPPROXY_TAG in its environment: a nonce of the proxy's and one of its own, which its
    neighbours do not know. Processes are found by it in Linux's /proc, wherever they went. A small shell waits for the
    proxy's end, however that comes: the pipe from the proxy to it closes. Where there is no /proc, groups have to do.

    A process that clears its environment is found through its parents, when its server is stopped or earlier. If it
    lost them at once, it is the proxy's own child, and nobody can say whose it was: it is killed when no server runs,
    or when the proxy ends. Only if the proxy is killed with SIGKILL does such a process live on."""

    SCRIPT = """
        trap '' HUP INT TERM
        while read -r line; do is_over=$line; done           # said by close(), when all is gone
        unset tag                                            # what is exported would be in the programs' environment
        tag="MCPPROXY_TAG=$1-"
        for round in 1 2 3 4 5; do
            found=$(ulimit -v 1048576; grep -ls "$tag" /proc/[0-9]*/environ)
            command -v grep > /dev/null || for path in /proc/[0-9]*/environ; do
                while IFS= read -r line || [ -n "$line" ]; do
                    case $line in *"$tag"*) found="$found $path"; break;; esac; done < "$path"
            done
            [ -n "$found" ] || break
            for path in $found; do pid=${path#/proc/}; pid=${pid%/*}; kill -s KILL -- "-$pid" "$pid"; done
        done
        # It may also be in what is endless, or a thread's: see read_proc(). Each is looked at only where one has it.
        has_tag() { head -qc 6291456 "$@" | grep -q "$tag"; }
        # What was killed is gone by then.
        [ "$is_over" ] || { sleep 0.2; has_tag /proc/[0-9]*/environ /proc/[0-9]*/task/*/environ; [ $? = 1 ]; } ||
            for path in /proc/[0-9]*; do has_tag $path/environ $path/task/*/environ && kill -9 ${path#/proc/}; done
        rm -rf -- "$2" || { chmod -R u+rwx "$2"; rm -rf -- "$2"; }
        shift 2
        for prefix do
            for round in 1 2 3 4 5 6 7 8 9 10; do        # what dies is still in its control group
                rmdir "$prefix"-*/* "$prefix"-*
                set -- "$prefix"-*
                [ -e "$1" ] && sleep 0.2 || break
            done
            # Ours is as it was before make_divisible() again, for who starts the next one in it.
            [ -d "$prefix" ] || continue
            above=${prefix%/*}
            for name in memory pids; do echo "-$name" > "$above/cgroup.subtree_control"; done
            for pid in $(cat "$prefix/cgroup.procs"); do echo "$pid" > "$above/cgroup.procs"; done
            rmdir "$prefix"
        done"""

    def __init__(self):
        self.nonce = os.urandom(8).hex()
        self.census = Census()
        # For sandboxed servers: the directory of their homes; how the paths of their control groups may begin.
        try:
            place = tempfile.gettempdir()
        except OSError:                       # a server that needs a home there will fail
            place = "/tmp"
        self.homes = os.path.join(place, f"mcpproxy-{os.urandom(4).hex()}")
        self.cgroups = [f"{path}/mcpproxy-{self.nonce}" for path in cgroups_around()]
        # Users that are taken, or never given: all that runs as one is killed in the end, so never root, nor our user.
        self.uids = {0, os.getuid()}
        self.patience = 2.0, 3.0, 1.0         # seconds that a server has to end, after each step of ServerProcess._stop
        self._ended: list[tuple] = []         # (tag, left, cell) of servers whose leftovers are looked for next
        self.unclosed: collections.deque[Cell] = collections.deque()           # of which something could not be removed
        self._closer = executor_with_its_thread()
        self._sweep: asyncio.TimerHandle | None = None        # while `_ended` has any
        with contextlib.suppress(OSError):
            os.mkdir(self.homes, 0o711)        # before a server could see its name, and make it its own
        self._start_watcher()

    def _start_watcher(self, is_told: bool = False) -> None:
        self._watcher: subprocess.Popen | None = None
        try:
            self._watcher = subprocess.Popen(
                ["sh", "-c", self.SCRIPT, "mcpproxy-reaper", self.nonce, self.homes, *self.cgroups],
                # Without the tag of another proxy, and without LD_*: a server may have put code where they lead.
                env={name: value for name, value in os.environ.items() if not name.startswith(("MCPPROXY_TAG", "LD_"))},
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            self.census.ours = {self._watcher.pid}
        except OSError as error:
            if not is_told:
                log.warning("! no shell (%(reason)s): servers may survive if this program is killed with SIGKILL",
                            reason=error.strerror)

    def new_tag(self) -> str:
        return f"{self.nonce}-{os.urandom(8).hex()}"

    def tick(self) -> None:
        """Called every few seconds: reaps orphans that ended (as process 1, everybody's); restarts an ended shell;
        tries again to remove what a server had."""
        if self.unclosed:
            self._closer.submit(self.unclosed.popleft().close)
        for pid in self._strangers() if self.census.gets_orphans or os.getpid() == 1 else ():
            if process_stat(pid)[STATE] == b"Z":
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
                    self.census.reaped()
        if self._watcher and self._watcher.poll() is not None:
            log.warning("! the shell that ends servers if this program is killed has ended, and is started again")
            self._watcher.stdin.close()
            self._start_watcher()
        elif not self._watcher:
            self._start_watcher(is_told=True)

    def _strangers(self) -> set[int]:
        """Our children that we did not start: orphans that servers left behind; as process 1, everybody's. None while
        a server is being started, which could be one of them."""
        known = {*self.census.servers, *self.census.ours}
        return {*children_of(os.getpid())} - known if not self.census.starting else set()

    def ended(self, tag: str, pid: int | None, cell, descendants: collections.abc.Iterable[tuple] = ()) -> None:
        """Called when a server is gone. What it left behind is killed soon, for many servers at once; then its `cell`,
        if it has one, is closed. `descendants`: those that it had when its end began."""
        self._ended.append((tag, self.census.of(pid).union(descendants), cell))
        self.census.forget(pid)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(0.05, self.sweep)

    def sweep(self) -> None:
        """Kills what is left of ended servers now. Reads /proc once: 20 µs a process."""
        self._sweep.cancel()
        self._sweep = None
        processes = list_processes()
        if not processes and os.path.exists("/proc/self"):          # no file descriptor is left
            self._sweep = asyncio.get_running_loop().call_later(1, self.sweep)
            return
        ended, self._ended = self._ended, []
        marks = [b"MCPPROXY_TAG=%b\0" % tag.encode() for tag, _, _ in ended]
        found = [pid for _, left, _ in ended for pid, start in left if process_stat(pid)[START] == start]
        if not self.census.servers and self.census.gets_orphans:
            found += self._strangers()
        for pid in processes:
            environment = next(filter(None, read_proc(pid, "environ")), b"")
            if any(mark in environment for mark in marks):
                found.append(pid)
        for pid in {*found} - self.census.servers.keys():
            if process_stat(pid)[STATE] not in (b"Z", b""):
                log.info("= killed process %(pid)d, left behind by its server", pid=pid)
                kill(pid, signal.SIGKILL)
        for _, _, cell in ended:
            if cell:
                self._closer.submit(cell.close)            # in a thread, because it may take long

    def close(self) -> None:
        """Ends the shell. Every server has to be gone by now."""
        if self._ended:
            self.sweep()
        self._closer.shutdown()
        with contextlib.suppress(OSError):
            os.rmdir(self.homes)
        if self._watcher:
            with contextlib.suppress(OSError):
                self._watcher.communicate(b"over\n")


# ============================================================================
# 19. Confinement
# ============================================================================
#
# What Linux lets a process forbid itself, for good, with no privilege or namespace.
#
#     landlock(7)     files. A ruleset names what is forbidden wherever no rule allows it, each rule allows some of that
#                     beneath a path, and a process restricts itself to it. It is asked when a file is opened.
#     seccomp(2)      system calls. A small program, in the BPF of 1992, sees the number and the registers of each call
#                     and says what becomes of it. It sees no memory, so it knows no path and no address.
#     setrlimit(2)    what one process may use. What a server uses with all its children is looked at each second, and
#                     bounded by cgroups(7) where there is one that may be divided.
#
# A process can only restrict itself. So CONFINE, a small program of its own, is started in the place of the server,
# takes the steps that it is given, one after the other, and becomes the server. To do this between fork and exec of the
# proxy itself (preexec_fn) is not safe where there are threads. A step that fails ends the start, unless SANDBOX=try.

# linux/landlock.h: the rights on files, and the version of the interface (ABI) from which on some are known.
LANDLOCK_RIGHTS = (
    EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE, MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK,
    MAKE_FIFO, MAKE_BLOCK, MAKE_SYM, REFER, TRUNCATE, IOCTL_DEV) = [1 << bit for bit in range(16)]
LANDLOCK_SINCE = {REFER: 2, TRUNCATE: 3, IOCTL_DEV: 5}
LANDLOCK_SCOPES = 0b11, 6                # LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET and _SIGNAL, and from which ABI on
LANDLOCK_ABI = 3                         # the least of use: before, whatever can be read can be emptied. Linux 6.2
READ = EXECUTE | READ_FILE | READ_DIR
WRITE = sum(LANDLOCK_RIGHTS) - (MAKE_CHAR | MAKE_BLOCK | IOCTL_DEV)
DEVICE = READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | IOCTL_DEV
OF_A_FILE = EXECUTE | READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV          # others are of directories
ALL_READ = "/usr /lib /lib32 /lib64 /libx32 /bin /sbin /etc /opt /proc".split()
ALL_USE = [f"/dev/{name}" for name in "null zero full random urandom tty ptmx pts".split()]

# linux/audit.h; asm/unistd.h of each machine: the calls that SANDBOX_NET=false refuses. socketpair() stays for
# SOCK_STREAM and SOCK_SEQPACKET: a datagram socket could be connected elsewhere. pidfd_getfd(2) could take another's.
MACHINES = {"x86_64": (0xC000003E, {"socket": 41, "socketpair": 53}),
            "aarch64": (0xC00000B7, {"socket": 198, "socketpair": 199})}
EVERYWHERE = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "pidfd_getfd": 438}
X32 = 0x40000000                         # bit of the calls of x86_64's third interface
# linux/bpf_common.h: load a word of struct seccomp_data, compare, mask, return; linux/seccomp.h.
LOAD, EQUALS, AT_LEAST, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000   # REFUSE with an errno

CONFINE = """
import ctypes, os, resource, struct, sys               # and not json or signal, which take longer than all the rest
libc = ctypes.CDLL(None, use_errno=True)

def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result

def system_call(number, *arguments):
    return checked(libc.syscall(*(ctypes.c_long(one) if isinstance(one, int) else one for one in (number, *arguments))))

def prctl(option, *arguments):
    checked(libc.prctl(option, *(ctypes.c_ulong(one) for one in (*arguments, 0, 0, 0, 0)[:4])))

def limit(kind, soft, hard):
    most = resource.getrlimit(kind)[1]
    soft, hard = (one if most == resource.RLIM_INFINITY else min(one, most) for one in (soft, hard))
    resource.setrlimit(kind, (soft, hard))

def enter(cgroup):
    try:
        with open(cgroup + "/cgroup.procs", "w") as file:
            file.write("0")
    except OSError:
        prctl(36, 1)                                 # as without one, see Sandbox.steps()

def landlock(attributes, rules):                     # landlock_create_ruleset(2), _add_rule(2), _restrict_self(2)
    attributes = struct.pack("=QQQ", *attributes)
    ruleset = system_call(444, attributes, len(attributes), 0)
    for path, allowed in rules:
        at = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
        system_call(445, ruleset, 1, struct.pack("=Qi", allowed, at), 0)
        os.close(at)
    system_call(446, ruleset, 0)
    os.close(ruleset)

def reach(home):
    os.stat(home + "/.")

def become(uid, gid):
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)

def seccomp(program):                                # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    code = ctypes.create_string_buffer(bytes.fromhex(program))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(code)))
    prctl(22, 2, ctypes.addressof(program))

def main(report, is_strict, prefix, ignored, steps, program):
    os.set_inheritable(report, False)                # it closes when this becomes the server
    for number in ignored:                           # signals that Python ignores; what is ignored would stay so
        libc.signal(number, None)
    for number, (name, *arguments) in enumerate(steps):
        try:
            globals()[name](*arguments)
        except (OSError, ValueError) as error:
            os.write(report, b"%d %d\\n" % (number, getattr(error, "errno", 0) or 0))
            if is_strict:
                sys.exit(126)
    os.write(report, b"done")
    environment = {name.removeprefix(prefix): value for name, value in os.environ.items() if name.startswith(prefix)}
    try:
        program and os.execve(program, sys.argv[1:], environment)
    except OSError as error:
        os.write(report, b"\\n-1 %d" % error.errno)
        sys.exit(126)
"""

REASONS_AGAINST = {              # by step and errno
    ("landlock", errno.ENOSYS): "this kernel has no Landlock, or hides it: it takes Linux 6.2, and not gVisor",
    ("landlock", errno.EOPNOTSUPP): "Landlock is off in this kernel: lsm= at boot has to name it",
    ("landlock", errno.EPERM): "Landlock is refused, as by the seccomp profile of a container",
    ("seccomp", errno.EINVAL): "this kernel has no seccomp filters, or hides them",
    ("become", errno.EPERM): "only root may become another user",
    **dict.fromkeys([("home", errno.EPERM), ("home", errno.EACCES)],
                    "RUN_AS_USER takes the capabilities CHOWN, DAC_OVERRIDE, KILL, SETGID and SETUID"),
    ("home", errno.EINVAL): "this user namespace (/proc/self/uid_map) has no such user as RUN_AS_USER",
    ("reach", errno.EACCES): "RUN_AS_USER cannot get there; set TMPDIR to a directory where it can"}


def landlock_abi() -> int:
    """Which version of Landlock there is; OSError when there is none. LANDLOCK_CREATE_RULESET_VERSION."""
    if not hasattr(libc(), "syscall"):
        raise OSError(errno.ENOSYS, "")
    import ctypes
    abi = libc().syscall(ctypes.c_long(444), None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if abi < 0:
        raise OSError(ctypes.get_errno(), "")
    return abi


def socket_filter() -> bytes:
    """The program that refuses sockets, for seccomp(2)."""
    audit, calls = MACHINES[os.uname().machine]

    def refuse(number: int, error: int) -> list[tuple]:
        return [(EQUALS, 0, 1, number), (RETURN, 0, 0, REFUSE | error)]          # if it is another, skips one step
    # struct seccomp_data: the number at 0, the machine at 4, and from 16 on the arguments, 8 bytes each.
    program = [(LOAD, 0, 0, 4), (EQUALS, 1, 0, audit), (RETURN, 0, 0, REFUSE | errno.ENOSYS),
               (LOAD, 0, 0, 0), (AT_LEAST, 0, 1, X32), (RETURN, 0, 0, REFUSE | errno.ENOSYS),
               *itertools.chain.from_iterable(refuse(number, errno.ENOSYS) for number in EVERYWHERE.values()),
               *refuse(calls["socket"], errno.EACCES),
               (EQUALS, 0, 5, calls["socketpair"]),
               (LOAD, 0, 0, 24), (AND, 0, 0, 0xF),                       # its second argument without its flags
               (EQUALS, 2, 0, socket.SOCK_STREAM), (EQUALS, 1, 0, socket.SOCK_SEQPACKET),
               (RETURN, 0, 0, REFUSE | errno.EACCES),
               (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in program)


def why_refused(step: str, number: int) -> str:
    """What it means that a step failed with this errno."""
    return REASONS_AGAINST.get((step, number)) or f"{step}: {os.strerror(number)}"


# ============================================================================
# 20. Sandbox
# ============================================================================
#
# What a server is kept from, by the steps that CONFINE takes before it becomes the server, and what it has for itself:
# a home, a user, a control group.

LIBRARIES = "LD_LIBRARY_PATH"
UID_SECONDS = 5.0                # for what runs as a user of a range to die
TASKS = 32                       # that a control group allows for each of LIMIT_PROCESSES: threads count


def is_below(path: str, folders: list[str]) -> bool:
    """Is a path within one of these folders, whatever links are on the way to it?"""
    above = os.path.dirname(path)
    where = os.path.realpath(above) + "/"
    if above == path or any(where.startswith(folder.rstrip("/") + "/") for folder in folders):
        return above != path
    target = os.path.join(above, os.readlink(path)) if os.path.islink(path) and os.path.exists(path) else "/"
    return is_below(above, folders) or is_below(target, folders)


class Sandbox:
    """What one configured server is confined to."""

    def __init__(self, server: str, settings: Settings, reaper: Reaper, given: collections.abc.Collection[str] = ()):
        self.server, self.settings, self.reaper = server, settings, reaper
        self.given = given                     # variables that the file sets, and that stay as they are
        self.is_on = any(getattr(settings, name) != getattr(Settings, name) for name in SANDBOX_SETTINGS)

    def refuse(self, name: str, problem: str) -> None:
        """A setting cannot be put into effect: ServerError, or a warning with SANDBOX=try."""
        text = f"{name.upper()} cannot be given: {problem}"
        if self.settings.sandbox != "try":
            raise ServerError(f"{text} (SANDBOX=try starts the server all the same)")
        log.warning("! server %(server)s: %(problem)s", server=self.server, problem=text)

    def paths(self, name: str) -> list[str]:
        return [os.path.abspath(os.path.expanduser(path)) for path in getattr(self.settings, name).split(":") if path]

    @property
    def writable(self) -> list[str]:
        """The paths of SANDBOX_WRITE, with links resolved."""
        return [os.path.realpath(path) for path in self.paths("sandbox_write")]

    def own_libraries(self) -> str:
        """Where the proxy's own Python is loaded from, if it takes LD_LIBRARY_PATH to find that; but not where a server
        may put another."""
        loaded, writable, found = read_file("/proc/self/maps").decode(errors="replace"), self.writable, []

        def is_open(folder: str) -> bool:
            about = os.stat(folder)
            is_others = os.geteuid() == 0 and bool(about.st_uid or about.st_mode & 0o022)
            return is_others or is_below(f"{folder}/x", writable)
        for path in filter(os.path.isabs, os.environ.get(LIBRARIES, "").split(":")):
            with contextlib.suppress(OSError):
                files = [os.path.realpath(f"{path}/{name}") for name in os.listdir(path)
                         if name.startswith(("libpython", "libffi"))]          # which may be links
                folders = {os.path.dirname(file) for file in files if f" {file}\n" in loaded}
                if folders and not any(map(is_open, {path, *folders})):
                    found.append(path)
        return ":".join(found)

    def steps(self, cell: "Cell") -> list[tuple]:
        """What a process does to itself before it becomes the server: (the setting, a function of CONFINE, its
        arguments). The user comes late, because rules and limits may need root; sockets come last."""
        import resource
        settings, megabyte = self.settings, 1024 * 1024
        steps = [("sandbox", "prctl", 38, 1),                        # PR_SET_NO_NEW_PRIVS
                 ("sandbox", "limit", resource.RLIMIT_CORE, 0, 0)]
        # PR_CAPBSET_DROP of CAP_SYS_RESOURCE, which knows no limits: if root may have it at all (PR_CAPBSET_READ), for
        # where its capabilities were taken away before, as in a container with cap_drop, there is none to drop it with.
        if os.geteuid() == 0 and getattr(libc(), "prctl", lambda *_: 1)(23, 24, 0, 0, 0) == 1:
            steps.append(("sandbox", "prctl", 24, 24))
        # Hard limits too, because a soft one could be raised again. SIGXCPU comes a second before SIGKILL.
        for name, kind, unit, more in (("limit_open_files", resource.RLIMIT_NOFILE, 1, 0),
                                       ("limit_file_mb", resource.RLIMIT_FSIZE, megabyte, 0),
                                       ("limit_cpu_seconds", resource.RLIMIT_CPU, 1, 1)):
            allowed = getattr(settings, name) * unit
            steps += [(name, "limit", kind, allowed, allowed + more)] if allowed else []
        # Orphans are recognized by the server's control group, or else become its children: PR_SET_CHILD_SUBREAPER.
        steps.append(("limit_memory_mb", "enter", cell.cgroup) if cell.cgroup else ("sandbox", "prctl", 36, 1))
        if settings.sandbox != "off":
            steps += self._landlock(cell)
        if cell.user:
            steps.append(("run_as_user", "become", *cell.user))
            steps += [("private_home", "reach", cell.home)] if cell.home else []
        if not settings.sandbox_net:
            if os.uname().machine in MACHINES:
                steps.append(("sandbox_net", "seccomp", socket_filter().hex()))
            else:
                self.refuse("sandbox_net", f"the calls of this machine, {os.uname().machine}, are not known here")
        return steps

    def _landlock(self, cell: "Cell") -> list[tuple]:
        try:
            abi = landlock_abi()
        except OSError as error:
            self.refuse("sandbox", why_refused("landlock", error.errno))
            return []
        if abi < LANDLOCK_ABI:
            self.refuse("sandbox", f"Landlock of this kernel (ABI {abi}) lets files be emptied that may only be read; "
                                   "it takes Linux 6.2, in a container the host's")
        known = sum(right for right in LANDLOCK_RIGHTS if LANDLOCK_SINCE.get(right, 1) <= abi)
        # The Python that runs this file, for the demo server; and what names are resolved with.
        usual = sys.prefix, sys.base_prefix, os.path.abspath(__file__), os.path.realpath("/etc/resolv.conf")
        allowed = [(path, READ) for path in (*ALL_READ, *usual)] + [(path, DEVICE) for path in ALL_USE]
        writable = self.writable
        for name, right in ("sandbox_read", READ), ("sandbox_write", WRITE):
            for path in self.paths(name):
                exists = os.path.exists(path)
                # What is below a writable path is open anyway, and may be a link that another run or server has made.
                if is_below(path, writable):
                    if exists and not is_below(os.path.realpath(path), writable):
                        log.warning("! server %(server)s: %(path)s is not opened: a server may have made the link in "
                                    "it", server=self.server, path=path)
                elif exists:
                    allowed.append((path, right))
                else:
                    self.refuse(name, f"{path} does not exist")
        allowed = [(os.path.realpath(path), right) for path, right in allowed if not is_below(path, writable)]
        rules = [(path, right & known & (-1 if os.path.isdir(path) else OF_A_FILE))
                 for path, right in (*allowed, (cell.directory or "", WRITE)) if os.path.exists(path)]
        scopes, since = LANDLOCK_SCOPES
        return [("sandbox", "landlock", (known, 0, scopes if abi >= since else 0), rules)]


class Cell:
    """What one run of a server has for itself: directories, a user, a control group."""

    def __init__(self, sandbox: Sandbox, tag: str):
        self.sandbox, self._number = sandbox, tag.rpartition("-")[2]
        self.variables: dict[str, str] = {}
        self.directory = self.home = self.cgroup = self.user = self._uid = None

    async def _open(self) -> None:
        settings = self.sandbox.settings
        if settings.run_as_user:
            await self._take_user(settings.run_as_user)
        if settings.private_home or settings.sandbox != "off":
            try:
                self._make_home(self.sandbox.reaper.homes)
            except OSError as error:                   # as in a read-only or full /tmp
                why = REASONS_AGAINST.get(("home", error.errno)) if self.user and os.geteuid() == 0 else None
                self.sandbox.refuse("private_home", f"{error}; {why or 'set TMPDIR'}")
        self._make_cgroup()

    def _make_home(self, homes: str) -> None:
        os.makedirs(homes, 0o711, exist_ok=True)
        if os.lstat(homes).st_uid != os.geteuid():     # another, who saw its name, made it first
            raise ServerError(f"{homes} is somebody else's")
        os.chmod(homes, 0o711)                         # whatever the umask is: another user's home is in it
        # Short, because a path of a Unix socket may have 107 characters, and browsers put theirs deep below.
        directory = f"{homes}/{self._number[:8]}"
        for path in directory, f"{directory}/home", f"{directory}/tmp":
            os.mkdir(path, 0o700)
            self.directory = directory                 # close() may remove it: it is ours
            if self.user and os.geteuid() == 0:
                os.chown(path, *self.user)
        self.home = f"{directory}/home"
        self.variables.update(HOME=self.home, TMPDIR=f"{directory}/tmp")

    async def _take_user(self, text: str) -> None:
        """Takes a user by name or number, or one of a range as whom nothing runs, and waits for one a while."""
        import pwd
        users, number = users_of(text), int(text) if text.isdigit() else None
        if users:
            taken, deadline = self.sandbox.reaper.uids, time.monotonic() + UID_SECONDS
            while (uid := next((one for one in users if one not in taken and not processes_of(one)), None)) is None:
                if time.monotonic() > deadline:
                    raise try_later("all users of RUN_AS_USER are taken")
                await asyncio.sleep(0.1)
            taken.add(uid)
            self._uid = number = uid
        try:
            found = pwd.getpwnam(text) if number is None else pwd.getpwuid(number)
            self.user, self.variables["HOME"] = (found.pw_uid, found.pw_gid), found.pw_dir
        except KeyError:
            if number is None:
                return self.sandbox.refuse("run_as_user", f"there is no user {text}")
            self.user, self.variables["HOME"] = (number, number), "/"

    def _make_cgroup(self) -> None:
        """A control group in ours or in the one above it, with its limits, where they can be set there. Linux, Control
        Group v2, memory.oom.group, memory.max and pids.max."""
        settings = self.sandbox.settings
        limits = {file: value for file, value in (
            ("memory.oom.group", settings.limit_memory_mb and 1),              # all are ended, not the largest alone
            ("memory.max", settings.limit_memory_mb * 1024 * 1024),
            ("pids.max", settings.limit_processes * TASKS)) if value}
        for prefix in self.sandbox.reaper.cgroups:
            with contextlib.suppress(OSError):
                os.mkdir(path := f"{prefix}-{self._number}")
                self.cgroup = path
                break
        above = os.path.dirname(self.cgroup or "")
        if above and limits and make_divisible(above, prefix):
            for file, value in limits.items():
                with contextlib.suppress(OSError):
                    write_file(f"{above}/cgroup.subtree_control", f"+{file.partition('.')[0]}")
                    write_file(f"{self.cgroup}/{file}", str(value))

    @property
    def is_out_of_memory(self) -> bool:
        """Did the kernel end it because of its own limit, and not because the machine or a container had no more?"""
        events = read_file(f"{self.cgroup}/memory.events") if self.cgroup else b""
        return re.search(rb"^oom [1-9]", events, re.MULTILINE) is not None

    async def start(self, spawn, command: list[str], environment: dict[str, str], directory: str | None) -> None:
        """Starts CONFINE by spawn(), as asyncio's subprocess_exec; returns when it has become the server, or, without a
        command, when all steps were taken. OSError when there is no such program, ServerError when a step failed."""
        await self._open()
        given = self.sandbox.given
        environment = {**{name: value for name, value in environment.items()
                          if not (self.home and name.startswith("XDG_")) or name in given},  # these lead out of home
                       **{name: value for name, value in self.variables.items() if name not in given}}
        name = command[0] if command else ""
        name = os.path.join(directory or "", name) if "/" in name else name          # as exec would find it
        program = name and shutil.which(name, path=environment.get("PATH"))
        if program is None:
            raise FileNotFoundError(errno.ENOENT, "")
        steps = self.sandbox.steps(self)
        output, report = os.pipe()
        try:
            # LD_* and the like would act on CONFINE too, and may lead to code that the server put there in another run.
            environment = {OUR_PREFIX + name: value for name, value in environment.items()}
            environment[LIBRARIES] = self.sandbox.own_libraries()
            plan = (report, self.sandbox.settings.sandbox != "try", OUR_PREFIX,
                    [int(signal.SIGPIPE), int(signal.SIGXFSZ)], [step for _, *step in steps],
                    program and os.path.abspath(program))
            # Isolated from what the server's environment and directory say to Python.
            await spawn(sys.executable, "-I", "-S", "-c", f"{CONFINE}main{plan!r}", *command, start_new_session=True,
                        env=environment, cwd=directory or self.home, pass_fds=[report])
        except BaseException:
            os.close(output)
            raise
        finally:
            os.close(report)
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(output, "rb", 0))
        try:
            lines = (await reader.read()).splitlines()
            for number, error in (map(int, line.split()) for line in lines if line != b"done"):
                if number < 0:
                    raise OSError(error, "")
                name, step, *_ = steps[number]
                self.sandbox.refuse(name, why_refused(step, error))
            if b"done" not in lines:
                raise ServerError("the sandbox could not be made")
        finally:
            transport.close()

    def close(self) -> None:
        """Gives back what it has; all processes that are known have got their SIGKILL. It may take long: so where
        servers run, it is called in a thread."""
        deadline = time.monotonic() + UID_SECONDS
        uid, self._uid = self._uid, None               # closed twice, it would kill what another runs as that user
        while uid is not None and any([kill(pid, signal.SIGKILL) for pid in processes_of(uid)]):
            if time.monotonic() > deadline:            # it cannot be killed, so its user is not given again
                uid = None
            time.sleep(0.01)
        for _ in range(20):
            try:
                if self.cgroup and os.path.exists(self.cgroup):
                    with contextlib.suppress(OSError):             # Linux 5.14
                        write_file(f"{self.cgroup}/cgroup.kill", "1")
                    # The server may have divided it; without a descriptor, os.walk() finds nothing.
                    for group in [group for group, *_ in os.walk(self.cgroup, topdown=False)] or [self.cgroup]:
                        os.rmdir(group)
                if self.directory and os.path.exists(os.path.dirname(self.directory)):
                    remove_tree(*os.path.split(self.directory))
                break
            except OSError:                            # something still writes, or has not ended yet
                time.sleep(0.05)
        else:
            self.sandbox.reaper.unclosed.append(self)  # or no descriptor is free, or the disk fails: it is tried again
        self.sandbox.reaper.uids.discard(uid)


# ============================================================================
# 21. Links
# ============================================================================
#
# A link is what a server is spoken to through: lines out, lines in, and one end.
# A process is the usual kind: lines to its stdin, lines from its stdout, its stderr
# into the log. It knows lines of bytes, nothing of JSON.
#
# The hard part is the end. A server may exit by itself, hang, ignore its stdin,
# or have children of its own: npx starts a shell that starts node. So every
# server leads a process group, stopping is a list of steps, each less polite
# than the one before, and it always comes to an end. What escapes its group is
# ended by the Reaper. A server that died is stopped like any other: it may have
# left children.

PIPE_BYTES = 1024 * 1024         # the most that Linux allows everybody: fewer wake-ups for a screenshot
STDERR_LINES = 20                # how many of the last lines an error carries
STDERR_A_SECOND = 500            # lines that are looked at
MAX_REDACTED = 16 * 1024         # bytes of one, in which secrets are looked for
MAX_STDERR_LINE = 1_000          # characters of one, that are shown after that
LAST_WORDS_SECONDS = 0.25        # for what an ended server wrote; a child of its own may hold the pipe open
# By limit: the setting, and what is counted.
LIMITS = {"memory": ("limit_memory_mb", "MB of memory"), "processes": ("limit_processes", "processes"),
          "cpu": ("limit_cpu_seconds", "s of CPU in one process"),
          "file_size": ("limit_file_mb", "MB and more in a file")}
# Lines that languages write after the one that says what is wrong: where it happened, the version, the exit code.
_TRAILER = re.compile(r"\s|#\d|Node\.js v\d|Stack trace:|goroutine \d|exit status \d|[\w.*/()-]+\([^ ]*\)$|[]})]+$|"
                      r"npm (?:notice|\w+!? (?:A complete log|404(?: Note| tarball|$)))|Run '[^']+ --help'")


class About(typing.NamedTuple):
    """What a remote server is told of a request beside its line."""

    number: int | None              # its server id
    method: str | None
    name: str | None = None         # what Mcp-Name says
    headers: tuple = ()             # of its own: (name, value)
    way: str = ""                   # the ids of the proxies that it came through


class Link:
    """What a ServerConnection speaks through. The callbacks below are set before start() is called."""

    on_line = None          # called with each line from the server, and with the id of the call it belongs to if the
                            # link knows it (cause=)
    on_too_long = None      # called with the first and last bytes of a line over the limit
    on_end = None           # called once, when no more lines will come
    on_refused = None       # called with the id of a request that gets no line in answer, and a ServerError
    request = None          # called with a method and its params for a request of the link's own
    on_forgotten = None     # called when the server has forgotten all that it was told, and what it had asked
    pending_of = None       # called with the id of a request; returns who still waits for the answer, or None

    is_remote = False       # is the server at a URL, and not our process?
    label = "a link"        # what the log calls it, as a template
    fields: dict[str, str] = {}          # of that template
    revision: str | None = None          # that was agreed on in the handshake
    way = ""                # the proxies through which those came who wait for its start
    exit_code: int | None = None
    was_stopped = False     # by us; it did not end by itself
    how_it_ended = ""       # " with exit code 1", or the signal; nothing when that is not known
    excess: dict[str, object] = {}       # the limit for which it was ended, what that allows, and what was measured
    usage_text = ""         # what it used, for the log
    last_words: collections.abc.Collection[str] = ()     # the last lines of what the server said beside the protocol
    is_open = True          # can lines be written?
    backlog = 0             # bytes of what was written that wait here for the server to read
    hearing: int | None = 0              # times when what belongs to no request could be missed; None: now is one
    unread = 0              # how much it has not read, as the system counts it; 0 where it does not
    _stopping: asyncio.Task | None = None

    async def start(self) -> None:
        """Brings the server up; ServerError when that is not possible."""

    @property
    def last_word(self) -> str:
        """The last of its last words that says something by itself."""
        return next((line for line in reversed(self.last_words) if not _TRAILER.match(line)),
                    self.last_words[-1].strip() if self.last_words else "")

    def write(self, line: bytes, about: About | None = None, principal: object = None) -> None:
        """Sends a line, a client's with its principal. `about`: a request has it, if the server is remote."""
        raise NotImplementedError

    def cancel(self, number: int, line: bytes, principal: object) -> None:
        """Takes back a principal's request; `line` tells the server so."""
        self.write(line)

    def has_sent(self, number: int) -> bool:
        """Is a request on its way to the server, or there? It may wait for a connection, or for a session."""
        return True

    def on_answered(self, number: int) -> None:
        """Nobody waits for the answer to a request any more: it came, wherever, or is not wanted."""

    def tell_way(self, way: str) -> None:
        """Tells a server that is starting through which proxies those came that wait for it."""

    def stop(self) -> asyncio.Future:
        """Begins the end, unless it has begun; the future is done when nothing of the server is left."""
        if self._stopping is None:
            self.is_open = False
            self._stopping = asyncio.get_running_loop().create_task(self._stop())
        return self._stopping

    async def _stop(self) -> None:
        """Ends the server, whatever it does, and calls end()."""
        self.end()

    def end(self) -> None:
        """No more lines will come."""
        if self.on_end:
            on_end, self.on_end = self.on_end, None
            self.was_stopped = self._stopping is not None
            self.stop()
            on_end()


_SHELL_WORD = re.compile(r"[|&;<>]+|[0-9]?>.*|.*(?:\$[A-Za-z_{(]|`).*|.*;|~(?:/.*)?", re.DOTALL)


def why_not_found(program: str, path: str | None, directory: str | None = None) -> str | None:
    """What is wrong with a program that cannot be started in a directory, and what to write instead; None if nothing
    is. `path` is the variable PATH."""
    # Where it would be as a path; a plain name is looked for in PATH.
    place, is_path = os.path.join(directory or "", program), "/" in program
    if shutil.which(place if is_path else program, path=path) and program != "cd":
        return None
    if program[:1] in ("[", "{"):
        hint = "a command is written as you would type it, not as JSON: npx -y some-server"
    elif re.match(r"[A-Za-z_]\w*=", program):
        hint = f"no shell reads the command, so write env before variables: env {program.partition('=')[0]}=..."
    elif (program.split(" ")[0] in ("cd", "export", "exec", "source", ".") or
          any(map(_SHELL_WORD.fullmatch, program.split(" ")))):
        hint = "no shell reads the command; where one is needed, write sh -c '...'"
    elif " " in program:
        hint = "it is one word because of the quotes around it: leave them out, or in a file of servers use args"
    elif program.endswith(".json") and os.path.isfile(program):
        hint = f"a file of several servers is given as --config {program}"
    elif program.startswith(("http://", "https://")):
        hint = "the URL of a remote server is a whole command, without arguments"
    elif os.path.isdir(place):
        hint = "it is a directory"
    elif os.path.exists(place):
        hint = (f"but is there: make it executable{'' if is_path else f' and write ./{program}'}, or name its "
                f"interpreter before it: python3 {program}")
    elif is_path and place != program:
        hint = "it was looked for in cwd"
    else:
        hint = "is it installed and in PATH?"
    return f"the command {program!r} was not found; {hint}"


class Output(asyncio.Protocol):
    """Receives what asyncio reads from a pipe of a process. By itself, asyncio hands it on a turn of the loop later."""

    def __init__(self, pipe: asyncio.ReadTransport, data_received):
        before = pipe.get_protocol()
        if before:                             # otherwise it has ended already
            self.data_received, self.connection_lost = data_received, before.connection_lost
            pipe.set_protocol(self)


class ServerProcess(Link, asyncio.SubprocessProtocol):
    """One run of an MCP server."""

    label = "process %(pid)s"

    def __init__(self, command: list[str], environment: dict[str, str], sandbox: Sandbox, redact, limit: int,
                 directory: str | None = None):
        self._server, self._sandbox, self._reaper = sandbox.server, sandbox, sandbox.reaper
        self._command, self._environment, self._directory = command, environment, directory
        self._tag = sandbox.reaper.new_tag()
        self._cell = Cell(sandbox, self._tag) if sandbox.is_on else None
        self.usage = Usage(self._server, self._tag, self._check_limits)
        self._redact = redact                  # removes the values of its client's variables from what it says
        self.last_words = collections.deque(maxlen=STDERR_LINES)
        self._limit = limit                    # of a line from stdout, in bytes
        self._stderr = LineSplitter(LARGE, self._log_stderr, lambda head, tail: self._log_stderr(head))
        self._said = Rate()                    # lines of stderr
        self._unsaid = collections.deque(maxlen=STDERR_LINES)          # the last of those that were too many
        self._exited = asyncio.Event()
        self._open_outputs = {1, 2}            # stdout and stderr
        self._outputs_ended = asyncio.Event()
        self._soon: list[bytes] = []           # what is written at the end of this turn
        self._pid: int | None = None

    async def start(self) -> None:
        """Starts the server in a process group of its own; ServerError when it cannot be executed."""
        self._stdout = LineSplitter(self._limit, self.on_line, self.on_too_long)
        self._reaper.census.starting += 1
        spawn = functools.partial(asyncio.get_running_loop().subprocess_exec, lambda: self)
        environment = {**self._environment, "MCPPROXY_TAG": self._tag}
        try:
            if self._cell:
                await self._cell.start(spawn, self._command, environment, self._directory)
            else:
                await spawn(*self._command, start_new_session=True, cwd=self._directory, env=environment)
        except BaseException as error:
            # Even if it was cancelled, there may be children. If there is a process, stop() gives the cell back.
            self.usage.is_over = True
            self._reaper.ended(self._tag, self._pid, None if self._pid else self._cell)
            if not isinstance(error, (OSError, ValueError)):
                raise
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "bad command"
            if self._directory and not os.path.isdir(self._directory):
                reason = "cwd is no directory"
            elif isinstance(error, FileNotFoundError):
                reason = why_not_found(self._command[0], self._environment.get("PATH"), self._directory) or reason
            elif self._cell and isinstance(error, PermissionError):
                reason += f": {self._command[0]} is not within SANDBOX_READ, or RUN_AS_USER may not run it"
            raise ServerError(f"the MCP server could not be started: {reason}") from None
        finally:
            self._reaper.census.starting -= 1
        log.debug("= server %(server)s started as process %(pid)s", server=self._server, **self.fields)

    # What asyncio calls.

    def connection_made(self, transport: asyncio.SubprocessTransport) -> None:
        self._transport = transport
        self._pid = transport.get_pid()
        if not self.usage.is_over:             # its start was cancelled before: nobody would take it out again
            self._reaper.census.servers[self._pid] = self.usage
        self.fields = {"pid": self._pid}
        self._stdin = transport.get_pipe_transport(0)
        Output(transport.get_pipe_transport(1), self._stdout.feed)
        for number in (0, 1):
            # It fails on other systems than Linux, if this user's pipes hold too much already, or if it is closed.
            with contextlib.suppress(AttributeError, OSError, ValueError):
                pipe = transport.get_pipe_transport(number).get_extra_info("pipe")
                fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def pipe_data_received(self, number: int, data: bytes) -> None:
        (self._stdout if number == 1 else self._stderr).feed(data)

    def pipe_connection_lost(self, number: int, error: Exception | None) -> None:
        # MCP, stdio, Shutdown: "The server MAY initiate shutdown by closing its output stream".
        if number == 2:
            self._stderr.feed(b"\n")              # its last words may lack the end of the line
        self._open_outputs.discard(number)
        if not self._open_outputs:
            self._outputs_ended.set()
        if number == 1 or number == 0 and self.is_open:       # it will read nothing more
            self._end_soon()

    def process_exited(self) -> None:
        self.exit_code = self._transport.get_returncode()
        self._reaper.census.reaped(self.usage)
        if not self.excess:
            self._find_limit()
        self._exited.set()
        self._end_soon()

    # What the rest of the proxy calls.

    def write(self, line: bytes, about: About | None = None, principal: object = None) -> None:
        """Sends a line, with all others of this turn of the event loop."""
        if not self._soon:
            at_end_of_turn(self._flush)
        self._soon += line, b"\n"

    def _flush(self) -> None:
        lines, self._soon = self._soon, []
        if lines:
            self._stdin.write(b"".join(lines))

    @property
    def how_it_ended(self) -> str:
        if self.excess:
            name, what = LIMITS[self.excess["limit"]]
            return f": {self.excess['measured']:g} {what} are more than {name.upper()} allows"
        if self.exit_code is None or self.exit_code >= 0:
            return "" if self.exit_code is None else f" with exit code {self.exit_code}"
        return f" by signal {-self.exit_code} ({signal.strsignal(-self.exit_code)})"

    def _blame(self, limit: str, measured: float) -> None:
        """Notes that this limit is why it ends."""
        allowed = getattr(self._sandbox.settings, LIMITS[limit][0])
        self.excess = {"limit": limit, "allowed": allowed, "measured": measured}
        self._reaper.census.killed[self._server, limit] += 1

    def _check_limits(self) -> None:
        """Called when its usage was measured: ends it if it is over a limit."""
        settings, usage = self._sandbox.settings, self.usage
        held = usage.processes + usage.zombies         # of which pids.max allows so many, in a control group
        processes = held if held > settings.limit_processes * TASKS else usage.processes
        for limit, measured in (("memory", usage.megabytes), ("processes", processes),
                                ("cpu", round(usage.most_seconds, 1))):
            if 0 < getattr(settings, LIMITS[limit][0]) < measured and self.exit_code is None and not self.excess:
                self._blame(limit, measured)
                self._reaper.census.kill(self._pid)

    def _find_limit(self) -> None:
        """Blames the limit for which the kernel ended it, if it did. A shell or npx passes on how its child ended."""
        settings, most_cpu = self._sandbox.settings, self.usage.most_seconds
        number = -self.exit_code if self.exit_code < 0 else self.exit_code - 128
        since = (time.monotonic() - self.usage.measured_at) * (os.cpu_count() or 1)
        could_be = min(self.usage.seconds, most_cpu + since)
        if settings.limit_file_mb and number == signal.SIGXFSZ:
            self._blame("file_size", settings.limit_file_mb)
        elif settings.limit_cpu_seconds and (
                number == signal.SIGXCPU and self.usage.seconds > settings.limit_cpu_seconds - 1 or (
                number == signal.SIGKILL and not self._stopping and could_be > settings.limit_cpu_seconds)):
            self._blame("cpu", max(settings.limit_cpu_seconds, round(most_cpu, 1)))
        elif self._cell and self._cell.is_out_of_memory:
            self._blame("memory", max(settings.limit_memory_mb, self.usage.megabytes))

    @property
    def usage_text(self) -> str:
        usage = self.usage
        return (f"it took up to {usage.peak_memory / 1024 / 1024:.1f} MB of memory, {usage.seconds:.1f} s of CPU, "
                f"processes: {usage.peak_processes}") if usage.peak_processes else ""

    @property
    def unread(self) -> int:
        import termios
        for number in (termios.TIOCOUTQ, termios.FIONREAD):          # of a socket, of a pipe
            with contextlib.suppress(OSError, AttributeError, ValueError):
                return int.from_bytes(fcntl.ioctl(self._stdin.get_extra_info("pipe").fileno(), number, bytes(4)),
                                      sys.byteorder)
        return 0

    @property
    def backlog(self) -> int:
        return self._stdin.get_write_buffer_size()

    # The end.

    def _end_soon(self) -> None:
        # The exit and the end of stdout belong together: one brings the exit code, the other the last lines.
        # But a child may hold the pipe open, and a server may close it and go on: neither is waited for long.
        both = 1 not in self._open_outputs and self._exited.is_set()
        asyncio.get_running_loop().call_later(0 if both else LAST_WORDS_SECONDS, self.end)

    async def _stop(self) -> None:
        if self._pid is None:                  # it could not be started
            return self.end()
        descendants = descendants_of(self._pid)
        self._flush()
        self._stdin.close()                    # MCP, stdio, Shutdown
        for number, seconds in zip((0, signal.SIGTERM, signal.SIGKILL), self._reaper.patience):         # 0 is no signal
            kill(-self._pid, number)           # its children, too
            if await self._is_gone_within(seconds):
                break
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._outputs_ended.wait(), LAST_WORDS_SECONDS)
        self._transport.close()
        self._reaper.ended(self._tag, self._pid, self._cell, descendants)
        self.end()

    def end(self) -> None:
        while self._unsaid:                    # what it said last is why it ended
            self._say(self._unsaid.popleft())
        super().end()

    async def _is_gone_within(self, seconds: float) -> bool:
        """Waits for the server to exit, and then for its process group to be empty."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._exited.wait()
                # Children that lost their parent get a moment to notice, and are then treated as it was.
                for _ in range(25):
                    with contextlib.suppress(ChildProcessError):         # those that the proxy got, and that have ended
                        while os.waitpid(-self._pid, os.WNOHANG)[0]:
                            self._reaper.census.reaped()
                    if not kill(-self._pid, 0):
                        return True
                    await asyncio.sleep(0.02)
        return False

    def _log_stderr(self, line: bytes) -> None:
        if self._said.add(time.monotonic()) > STDERR_A_SECOND:
            return self._unsaid.append(line[:MAX_REDACTED])
        self._unsaid.clear()
        self._say(line)

    def _say(self, line: bytes) -> None:
        text = self._redact(line[:MAX_REDACTED].decode("utf-8", "replace").rstrip())[:MAX_STDERR_LINE]
        if text:
            self.last_words.append(text)
            log.info("server %(server)s: %(text)s", server=self._server, text=text)


# ============================================================================
# 22. HTTP client
# ============================================================================
#
# Our own requests to one remote server, on a limited number of connections, which are kept for the next ones. This
# section knows HTTP and nothing of MCP; what a response means is the business of the Fetch.

CONNECT_SECONDS = 10.0           # for a connection, TLS included
ADDRESS_SECONDS = 0.25           # for one address, before the next is tried beside it; RFC 8305 §5
MAX_FETCHES = 256                # of one HTTPClient at a time; of one principal, fewer than three times those left free
EXTRA_FETCHES = 4                # beside these: for initialize, ping, what has no answer, a session's stream and end
MAX_INTERIM = 100                # 1xx before one response
KEPT_CONNECTIONS = 8             # of one HTTPClient, that are idle
REUSE_SECONDS = 4.0              # for which an idle one can be used again: node closes it after 5
ANSWERED_SECONDS = 5.0           # for a stream to end after the answer
# Seconds of silence until the peer's system is asked whether it is there; between such questions; and how many. By
# default that takes two hours, and what stands between (a NAT, a balancer) forgets a silent connection sooner. tcp(7)
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


class Fetch(Holder):
    """One request and its response."""

    connection: "ClientConnection | None" = None
    is_idempotent = False            # may it be sent twice?
    is_stream = False                # is the body of the response wanted as it comes?
    is_over = False
    is_extra = False                 # may it be one of EXTRA_FETCHES?
    limit_name = "MAX_MESSAGE_MB"    # what says how large its answer may be
    is_endless = False               # is it a subscription? These are counted where they are let in
    whose: object = None             # its principal, as far as was known when it was sent
    size = 0                         # bytes of what came that it holds itself
    waits_in: "collections.deque[Fetch] | None" = None         # where it waits for a connection, or did; None: unsent

    def __init__(self, head: bytes, body: bytes, limit: int):
        self.head, self.body = head, body
        self.limit = limit                     # bytes of the response, or of an event

    def on_head(self, head: ResponseHead) -> None:
        """The response begins."""

    def on_part(self, data: bytes) -> None:
        """More of the body of a stream came."""

    def on_end(self, head: ResponseHead, body: bytes) -> None:
        """All of the response is there; `body` is empty if it was a stream."""

    def on_failure(self, reason: str, is_connected: bool = True) -> None:
        """There will be no response. `reason` goes on after "the server", as "cut its answer off" does."""

    def abort_later(self) -> None:
        """The answer came, or is not wanted: hangs up if the server does not end its stream soon."""
        self.body, self.is_idempotent = b"", False
        asyncio.get_running_loop().call_later(ANSWERED_SECONDS, self.abort)

    def give(self) -> None:
        """Fails, because what it holds of the answer has to go."""
        self.on_failure("sent more than can be held now")
        self.abort()

    def abort(self) -> None:
        """Hangs up."""
        if not self.is_over:
            self.is_over = True
            if self.connection:
                self.connection.close()
            elif self.waits_in and self in self.waits_in:
                self.waits_in.remove(self)


class ClientConnection(asyncio.Protocol):
    """One socket, and the fetch that it is busy with."""

    def __init__(self, client: "HTTPClient"):
        self._client = client
        self.fetch: Fetch | None = None
        self._head: ResponseHead | None = None
        self._parser = ResponseParser()
        self._uses = self._interim = 0
        self.used_at = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._client.connections.add(self)
        # A stream may be silent for hours, and a peer that vanished has to be noticed at last.
        wire = transport.get_extra_info("socket")
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):                      # macOS calls the first one otherwise
                wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._poll = select.poll()
        self._poll.register(wire.fileno(), select.POLLIN)

    @property
    def is_good(self) -> bool:
        """Can it be used again? What came while nothing was asked is its end, most likely."""
        return time.monotonic() - self.used_at < REUSE_SECONDS and not self._poll.poll(0)

    def send(self, fetch: Fetch) -> None:
        self.fetch, self._head, fetch.connection, self._interim = fetch, None, self, 0
        self._uses += 1
        # Given an empty part, a transport of Python 3.12.1 or 3.13.0 never ends.
        self._transport.writelines(list(filter(None, (fetch.head, fetch.body))))

    def data_received(self, data: bytes) -> None:
        fetch = self.fetch
        if fetch is None:
            return self.close()                # nothing was asked
        self._parser.feed(data)
        try:
            if self._head or self._read_head(fetch):
                self._read_body(fetch)
            size = self._parser.size + fetch.size if self.fetch is fetch else 0
            if size > SMALL or fetch.held:
                budget.set(fetch, size)
        except HTTPError as error:
            too_large = f"sent an answer that is larger than {fetch.limit_name}"
            self._fail(fetch, too_large if error.http_status == 413 else
                       f"sent an answer that is not HTTP: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        fetch, head, parser = self.fetch, self._head, self._parser
        self._client.forget(self)
        parser.is_ended = True
        if fetch and head and head.content_length == UNTIL_CLOSE and error is None:
            self._read_body(fetch)
        elif fetch and not head and fetch.is_idempotent and self._uses > 1 and not parser.rest:
            fetch.connection = None
            self._client.send(fetch)           # it was idle, and was closed just as we used it again
        elif fetch:
            self._fail(fetch, "cut its answer off" if head else "closed the connection without an answer")

    def close(self) -> None:
        self._parser.clear()                   # what it reads a body with is a cycle
        self._client.forget(self)
        self._transport.abort()

    def _read_head(self, fetch: Fetch) -> bool:
        while self._head is None:
            head = self._parser.next_head()
            if head is None:
                return False
            if head.status == 101:
                raise HTTPError("an upgrade that nobody asked for")
            if head.status >= 200:             # RFC 9110 §15.2: the others are interim
                self._head = head
                fetch.on_head(head)
            else:
                self._interim += 1
                if self._interim > MAX_INTERIM:
                    raise HTTPError("too many interim responses")
        return not fetch.is_over

    def _read_body(self, fetch: Fetch) -> None:
        parser, limit = self._parser, UNTIL_CLOSE if fetch.is_stream else fetch.limit
        body = parser.next_body(limit)
        while body is None and parser.is_interrupted:
            body = parser.next_body(limit)
        if fetch.is_stream and (part := parser.take() if body is None else body):
            fetch.on_part(part)
        if body is not None and not fetch.is_over:
            fetch.is_over, head = True, self._head
            if head.keep_alive and not parser.rest and not self._transport.get_write_buffer_size():
                self._client.release(self)
            else:
                self.close()
            fetch.on_end(head, b"" if fetch.is_stream else body)

    def _fail(self, fetch: Fetch, reason: str) -> None:
        self.close()
        if not fetch.is_over:
            fetch.is_over = True
            fetch.on_failure(reason)


@functools.lru_cache(maxsize=1)
def client_tls():
    """What verifies the certificates of remote servers: the system's authorities, or those of SSL_CERT_FILE. OSError
    when their file cannot be opened just now: without it nobody would be trusted from then on."""
    import ssl
    file = ssl.get_default_verify_paths().cafile
    if file:
        with contextlib.suppress(PermissionError):     # there may be a directory of them too
            open(file, "rb").close()
    return ssl.create_default_context()


def port_of(url: SplitResult) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


def target_of(url: SplitResult) -> str:
    """What is asked for of a URL's host."""
    return (url.path or "/") + (f"?{url.query}" if url.query else "")


_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_lookups: dict[tuple, asyncio.Future] = {}          # of hosts, that are not answered yet


async def look_up(host: str | None, port: int, flags: int = 0) -> list[tuple]:
    """What getaddrinfo() finds, once for all who want that: each lookup of a host's name takes a thread, for long if
    nobody answers, and those of other hosts shall not wait."""
    asked = host, port, flags
    lookup = _lookups.get(asked)
    if lookup is None:
        lookup = _lookups[asked] = asyncio.ensure_future(asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=flags))
        lookup.add_done_callback(lambda done: (_lookups.pop(asked), done.cancelled() or done.exception()))
    return await asyncio.shield(lookup)


def end_lookups(status: int) -> None:
    """Ends the program with this status, where Python would wait for threads that look up names."""
    if _lookups:
        log.flush()
        os._exit(status)


class HTTPClient:
    """The connections to one server."""

    def __init__(self, url: str):
        self._url = urlsplit(url)
        self.target = target_of(self._url)                 # what is asked for
        self.connections: set[ClientConnection] = set()
        self._idle: list[ClientConnection] = []            # the one that was used last is the last
        # What waits for a connection: what is_extra; what is_endless; and the rest, by principal, each in turn.
        self._extras: collections.deque[Fetch] = collections.deque()
        self._endless: collections.deque[Fetch] = collections.deque()
        self._waiting: dict[object, collections.deque[Fetch]] = {}
        self._places: collections.Counter = collections.Counter()          # that are taken, by principal
        self._opening: set[asyncio.Task] = set()
        self.is_closed = False

    def head(self, method: str, headers: collections.abc.Iterable[tuple[str, str]], size: int | None = None) -> bytes:
        """The head of a request with these headers, and with a body of this size."""
        lines = [f"{method} {self.target} HTTP/1.1", f"Host: {self._url.netloc}"]
        lines += [f"{name}: {value}" for name, value in headers]
        if not any(line.lower().startswith("user-agent:") for line in lines):          # the file may set it
            lines.append(f"User-Agent: mcpproxy/{__version__}")
        if size is not None:
            lines.append(f"Content-Length: {size}")
        # A line end in a value would begin another header, or another request: so none is let through.
        return "\r\n".join([*(_CONTROL.sub("?", line) for line in lines), "\r\n"]).encode("utf-8", "replace")

    def send(self, fetch: Fetch) -> None:
        """Sends it, as soon as there is a connection."""
        if self.is_closed:
            return fetch.abort()
        fetch.whose = fetch.principal
        fetch.waits_in = self._extras if fetch.is_extra else self._endless if fetch.is_endless else (
            self._waiting.setdefault(fetch.whose, collections.deque()))
        fetch.waits_in.append(fetch)
        self._go_on()

    def _go_on(self) -> None:
        """Sends what waits, on idle connections or on a new one."""
        while self._idle and (fetch := self._next()):
            connection = self._idle.pop()
            if connection.is_good:
                self._send_on(connection, fetch)
            else:
                connection.close()
        opening = len(self._opening)
        if not self.is_closed and self._next(opening) and sum(map(len, self._all_waiting())) > opening:
            self._opening.add(asyncio.get_running_loop().create_task(self._open()))

    def _next(self, opening: int = 0) -> Fetch | None:
        """The next that has a place. Each of the connections being made may take one, for anybody."""
        free, places = MAX_FETCHES - self._places.total() - opening, self._places
        while self._waiting and not self._waiting[first := next(iter(self._waiting))]:
            del self._waiting[first]                       # all were given up
        if self._extras and free > -EXTRA_FETCHES:
            return self._extras[0]
        if self._endless or opening >= 3 * free:           # then none of the others has a place, however many they are
            return self._endless[0] if self._endless else None
        return next((fetches[0] for whose, fetches in self._waiting.items() if fetches and (
            places[whose] + opening < 3 * free)), None)

    def _all_waiting(self) -> collections.abc.Iterator[collections.deque[Fetch]]:
        return itertools.chain([self._extras, self._endless], self._waiting.values())

    def _send_on(self, connection: ClientConnection, fetch: Fetch) -> None:
        fetch.waits_in.remove(fetch)
        if not (fetch.is_extra or fetch.is_endless):
            del self._waiting[fetch.whose]
            if fetch.waits_in:
                self._waiting[fetch.whose] = fetch.waits_in            # behind the others
        if not fetch.is_endless:
            self._places[fetch.whose] += 1
        connection.send(fetch)

    def _vacate(self, connection: ClientConnection) -> None:
        """Its fetch is over, or is sent again on another one; what came of it is counted by whoever takes it."""
        fetch, connection.fetch = connection.fetch, None
        if fetch:
            budget.set(fetch, 0)
        if fetch and not fetch.is_endless:
            self._places[fetch.whose] -= 1
            if not self._places[fetch.whose]:
                del self._places[fetch.whose]

    async def _open(self) -> None:
        reason = None
        try:
            # Not wait_for(): before Python 3.12 it takes turns of its own, in which the connection may end unseen.
            async with asyncio.timeout(CONNECT_SECONDS):
                host, port = self._url.hostname, port_of(self._url)
                tls = client_tls() if self._url.scheme == "https" else None
                await look_up(host, port)
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: ClientConnection(self), host, port, ssl=tls, happy_eyeballs_delay=ADDRESS_SECONDS)
        except TimeoutError:
            reason = "it takes too long"
        # SSLError is an OSError; Happy Eyeballs may assert; RuntimeError: there can be no other thread.
        except (OSError, UnicodeError, AssertionError, RuntimeError) as error:
            words = getattr(error, "verify_message", None), getattr(error, "strerror", None), str(error), "it hangs up"
            reason = next(filter(None, words))
        finally:
            self._opening.discard(asyncio.current_task())
        if reason is None:
            connection.close() if self.is_closed else self.release(connection)
        for fetch in [one for waiting in self._all_waiting() for one in waiting] if reason else ():
            if not fetch.is_over:                          # all would meet the same
                fetch.waits_in.remove(fetch)
                fetch.is_over = True
                fetch.on_failure(f"cannot be reached: {reason}", is_connected=False)
        self._go_on()                                      # for what was sent while this one was on its way

    def release(self, connection: ClientConnection) -> None:
        connection.used_at = time.monotonic()
        self._vacate(connection)
        fetch = self._next()
        if fetch:
            return self._send_on(connection, fetch)
        self._idle.append(connection)
        if len(self._idle) > KEPT_CONNECTIONS:
            self._idle[0].close()

    def forget(self, connection: ClientConnection) -> None:
        self.connections.discard(connection)
        self._vacate(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._go_on()

    def close(self) -> None:
        self.is_closed = True              # _open() sees that; if it were cancelled, a connection might be left open
        for fetch in [fetch for fetches in self._all_waiting() for fetch in fetches]:
            fetch.abort()
        for connection in list(self.connections):
            connection.fetch.abort() if connection.fetch else connection.close()


# ============================================================================
# 23. Issuer of tokens
# ============================================================================
#
# The issuer says what a token is worth. Its keys are read now and then, to verify JWTs; a token that is no JWT is sent
# to it (introspection). The verdict is kept by the token's hash, so that a signature is verified once, and not by the
# event loop. NotYet is raised while there is no verdict; whoever gets it waits for its task and asks again.

ANSWER_SECONDS = 10.0            # for the issuer to say something
ANSWER_BYTES = 256 * 1024        # of what it says
KEYS_SECONDS = 600.0             # after which its keys are read again
RETRY_SECONDS = 60.0             # between two tries to find an unknown key among them
OUTAGE_SECONDS = 5.0             # between two tries to read them otherwise
KNOWN_SECONDS = 3600.0           # after which a JWT is verified again
INTROSPECTED_SECONDS = 60.0      # for which it is believed what it said of a token
BAD_SECONDS = 10.0               # for which a token is remembered as bad
BAD_LEAST, BAD_MOST, BAD_SHARE = 0.01, 1.0, 16   # a wrong signature costs nothing to make: after one there is a pause
                                 # of BAD_SHARE times what the check took, from BAD_LEAST to BAD_MOST seconds
KNOWN_TOKENS = 10_000            # good ones that are remembered, and as many bad ones
QUESTIONS = 8                    # introspection requests at a time
QUESTION_PAUSE = 0.1             # after a token that is not active, to slow down whoever makes tokens up
CHECKS, CHECKS_OF_ONE = 256, 128 # that may wait or run, in all and for one address, which may be a reverse proxy's
TURNS = 4                        # of them that run at a time for one address, or for one subject that was let in before
CHECK_SECONDS = 60.0             # that one may wait and run


class NotYet(Exception):
    """Something has to be found out first; when `task` is done, ask again."""

    headers: tuple = ()                # of the reply, if it fails

    def __init__(self, task: asyncio.Task):
        super().__init__()
        self.task = task


class Verdict(typing.NamedTuple):
    """What is known of a token."""

    good_until: float                          # by the proxy's clock: until then all of this holds
    error: str | None = None                   # why the token is refused, if it is
    subject: str = ""
    audience: frozenset[str] = frozenset()
    scopes: frozenset[str] = frozenset()
    key: PublicKey | None = None               # that verified its signature
    expires: float = float("inf")              # in seconds since 1970; the proxy's clock stops while a machine sleeps


class Ask(Fetch):
    """A request whose end is waited for."""

    is_idempotent = is_extra = True

    def __init__(self, head: bytes, body: bytes = b"", limit: int = ANSWER_BYTES):
        super().__init__(head, body, limit)
        if limit == ANSWER_BYTES:
            self.limit_name = f"{ANSWER_BYTES // 1024} KiB"
        self._over = asyncio.get_running_loop().create_future()

    async def answer(self, client: HTTPClient, seconds: float | None = None) -> tuple[ResponseHead, bytes]:
        """Sends it, unless that was done, and waits for the answer: OSError when there is none in that time,
        ConnectionError when the server cannot be reached."""
        try:
            if self.waits_in is None and not self.is_over:
                client.send(self)
            async with asyncio.timeout(seconds):
                return await self._over
        except TimeoutError:
            raise OSError("does not answer") from None
        finally:
            self.abort()

    def on_end(self, head: ResponseHead, body: bytes) -> None:
        if not self._over.done():
            self._over.set_result((head, body))

    def on_failure(self, reason: str, is_connected: bool = True) -> None:
        if not self._over.done():
            self._over.set_exception((OSError if is_connected else ConnectionError)(reason))

    def abort(self) -> None:
        """Hangs up, and cancels whoever waits."""
        super().abort()
        self._over.cancel()


async def ask(url: str, body: bytes = b"", headers: tuple[tuple[str, str], ...] = ()) -> dict:
    """The JSON object that a URL answers with; OSError when it does not. Redirects are not followed."""
    client = HTTPClient(url)
    method, size = ("POST", len(body)) if body else ("GET", None)
    try:
        head, answer = await Ask(client.head(method, (("Accept", JSON_TYPE), *headers), size), body).answer(
            client, ANSWER_SECONDS)
    finally:
        client.close()
    if head.status != 200:
        raise OSError(f"answers HTTP {head.status}")
    with contextlib.suppress(ValueError, RecursionError):              # their texts may repeat what was asked
        found = json.loads(answer.decode(), object_pairs_hook=without_repeats)
        if isinstance(found, dict):
            return found
    raise OSError("does not answer with a JSON object")


class Issuer:
    """The issuer of tokens, as it is known here."""

    def __init__(self, settings: Settings, now, on_other_keys):
        self._settings, self._now = settings, now
        self._on_other_keys = on_other_keys        # called when what was found out by keys may be wrong
        self._keys: list[PublicKey] = []
        # When the keys were last read, when that was last tried, and when it was last tried for an unknown key.
        self._read_at = self._tried_at = self._retried_at = -float("inf")
        self._reading: asyncio.Task | None = None
        self._verdicts: dict[bytes, Verdict] = {}  # of good tokens, by the hash
        self._refused: dict[bytes, Verdict] = {}   # of bad ones, kept apart lest they push the good ones out
        self._checks: dict[bytes, tuple[asyncio.Task, object]] = {}          # that wait or run, and for whom
        self._turns: weakref.WeakValueDictionary[object, asyncio.Semaphore] = weakref.WeakValueDictionary()
        self._verifier = executor_with_its_thread()
        self._questions = asyncio.Semaphore(QUESTIONS)

    def check(self, text: str, principal: object) -> Verdict:
        """What a token is worth. Raises NotYet when that has to be found out, ServerError when it cannot be."""
        digest, now = digest_of_key(text), self._now()
        if self._keys and now - self._read_at > KEYS_SECONDS:
            self._read_soon()
        verdict = self._verdicts.get(digest) or self._refused.get(digest)
        if verdict and now < verdict.good_until and time.time() < verdict.expires:
            return verdict
        if digest in self._checks:
            raise NotYet(self._checks[digest][0])
        if verdict and not verdict.error:          # who was let in before does not wait behind strangers
            principal = verdict.subject
        try:
            is_opaque = self._settings.oauth_introspection_url and not _JWT_SHAPE.match(text)
            token = None if is_opaque else parse_token(text)
            if token:
                check_claims(token.claims, self._settings.oauth_issuer, time.time())
        except TokenError as error:
            return Verdict(now + BAD_SECONDS, str(error))
        numbers = collections.Counter(whose for _, whose in self._checks.values())
        busiest, most = next(iter(numbers.most_common(1)), (None, 0))
        if numbers[principal] >= CHECKS_OF_ONE or len(self._checks) >= CHECKS and numbers[principal] + 1 >= most:
            raise try_later("too many tokens have to be looked at")
        if len(self._checks) >= CHECKS:            # room is made by whoever has most: the newest of those checks ends
            last = next(one for one in reversed(self._checks) if self._checks[one][1] == busiest)
            self._checks.pop(last)[0].cancel()
        turn = self._turns.setdefault(principal, asyncio.Semaphore(TURNS))
        task = asyncio.get_running_loop().create_task(self._find_out(digest, text, token, turn))
        self._checks[digest] = task, principal
        task.add_done_callback(functools.partial(self._forget, digest))
        raise NotYet(task)

    def _forget(self, digest: bytes, task: asyncio.Task) -> None:
        """This check is over. If it was cancelled, another one of the same token may have begun."""
        if self._checks.get(digest, (None,))[0] is task:
            del self._checks[digest]
        task.cancelled() or task.exception()       # looked at, or asyncio logs it when nobody waits

    async def _find_out(self, digest: bytes, text: str, token: Token | None, turn: asyncio.Semaphore) -> None:
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                claims, key = (token.claims, await self._verify(token, turn)) if token else (
                    await self._introspect(text, turn), None)
            scopes, audience = claims.get("scope") or claims.get("scp", ""), claims.get("aud")
            scopes = frozenset(scopes.split() if isinstance(scopes, str) else strings_of(scopes))
            audience = frozenset([audience] if isinstance(audience, str) else strings_of(audience))
            # MCP 2025-11-25, Authorization, Canonical Server URI: "SHOULD accept uppercase scheme and host components".
            audience |= {re.sub("^[^/]*//[^/]*", lambda start: start[0].lower(), one) for one in audience}
            left = min(max(claims["exp"] - time.time(), 1), INTROSPECTED_SECONDS if token is None else KNOWN_SECONDS)
            verdict = Verdict(self._now() + left, None, claims["sub"], audience, scopes, key, claims["exp"] + LEEWAY)
        except TimeoutError:
            raise try_later("it takes too long to find out what the token is worth") from None
        except TokenError as error:
            verdict = Verdict(self._now() + BAD_SECONDS, str(error))
        self._verdicts.pop(digest, None)
        known = self._refused if verdict.error else self._verdicts
        if len(known) >= KNOWN_TOKENS:
            del known[next(iter(known))]
        known[digest] = verdict

    # JWTs.

    async def _verify(self, token: Token, turn: asyncio.Semaphore) -> PublicKey:
        if not self._keys:
            await self._renew_keys()
        if not self._keys:
            raise try_later("the keys of the tokens' issuer cannot be read")
        try:
            return await self._signer(token, turn)
        except UnknownKey:
            if self._now() - self._retried_at >= (OUTAGE_SECONDS if self._is_down else RETRY_SECONDS) or self._reading:
                self._retried_at = self._now()
                await self._renew_keys(0)
            elif not self._is_down:
                raise
            if self._is_down:
                raise try_later("the keys of the tokens' issuer cannot be read")
            return await self._signer(token, turn)

    @property
    def _is_down(self) -> bool:
        """Did the last try to read its keys fail, or is one under way?"""
        return self._tried_at > self._read_at

    async def _signer(self, token: Token, turn: asyncio.Semaphore) -> PublicKey:
        """The key that has signed it, and that its issuer has not withdrawn while it was looked for."""
        while True:
            keys = self._keys
            async with turn:
                began = self._now()
                try:
                    key = await asyncio.get_running_loop().run_in_executor(self._verifier, verify, token, keys)
                    if key in self._keys:
                        return key
                    continue
                except TokenError as error:
                    failure, is_known = error, not isinstance(error, UnknownKey)
                    if is_known or token.header.get("kid") is None:        # see BAD_SHARE
                        await asyncio.sleep(min(BAD_MOST, max(BAD_LEAST, BAD_SHARE * (self._now() - began))))
            # One of those that are read just now may have signed it. (For an unknown one _verify() waits by itself.)
            if is_known and self._reading:
                await asyncio.wait([self._reading], timeout=BAD_MOST)
            if keys is self._keys:
                raise failure

    def _read_soon(self, pause: float = OUTAGE_SECONDS) -> asyncio.Task | None:
        """Begins to read its keys, unless that was tried just now. Returns the task that reads them, if one does."""
        if self._reading is None and self._now() - self._tried_at >= pause:
            self._tried_at = self._now()
            self._reading = asyncio.get_running_loop().create_task(self._read())
        return self._reading

    async def _renew_keys(self, pause: float = OUTAGE_SECONDS) -> None:
        if self._read_soon(pause):
            await asyncio.wait([self._reading])

    async def _read(self) -> None:
        """Reads its keys. If that fails, those that are known stay."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                keys = parse_jwks(await ask(self._settings.oauth_jwks_url or await self._discover()))
            if not keys:
                raise ValueError("no key that is of use")
            is_other, self._keys, self._read_at = keys != self._keys, keys, self._now()
            if is_other:
                self._verdicts = {digest: verdict for digest, verdict in self._verdicts.items()
                                  if verdict.key is None or verdict.key in keys}
                self._refused.clear()
                self._on_other_keys()
        except (OSError, ValueError) as error:             # TimeoutError is an OSError
            log.error("! the keys of %(issuer)s cannot be read: %(reason)s", issuer=self._settings.oauth_issuer,
                      reason=str(error)[:200] or "it takes too long")
        finally:
            self._reading = None

    async def _discover(self) -> str:
        """Where its keys are. MCP 2025-11-25, Authorization Server Discovery: RFC 8414 first, then OpenID Connect."""
        issuer, failure = urlsplit(self._settings.oauth_issuer), None
        path = issuer.path.rstrip("/")
        for where in (f"/.well-known/oauth-authorization-server{path}", f"/.well-known/openid-configuration{path}",
                      f"{path}/.well-known/openid-configuration"):
            try:
                found = await ask(f"{issuer.scheme}://{issuer.netloc}{where}")
                if found.get("issuer") != self._settings.oauth_issuer:           # RFC 8414 §3.3
                    raise ValueError("its metadata is another issuer's")
                if not is_safe_url(found.get("jwks_uri")):
                    raise ValueError("its jwks_uri is no https URL")
                return found["jwks_uri"]
            except OSError as error:
                failure = failure or error
            except ValueError as error:                # there was metadata: this says more than that others have none
                failure = error
        raise failure

    # Others. RFC 7662.

    async def _introspect(self, text: str, turn: asyncio.Semaphore) -> dict:
        settings = self._settings
        # RFC 6749 §2.3.1: both are form-encoded first.
        who = f"{quote(settings.oauth_client_id, safe='')}:{quote(settings.oauth_client_secret, safe='')}".encode()
        known = (("Authorization", f"Basic {base64.b64encode(who).decode()}"),) if settings.oauth_client_id else ()
        try:
            async with turn, self._questions:
                said = await ask(settings.oauth_introspection_url,
                                 f"token={quote(text, safe='')}&token_type_hint=access_token".encode(),
                                 (("Content-Type", "application/x-www-form-urlencoded"), *known))
                if said.get("active") is not True:
                    await asyncio.sleep(QUESTION_PAUSE)
                    raise TokenError("it is not active")
        except OSError as error:
            log.error("! tokens cannot be introspected: %(reason)s", reason=str(error)[:200])
            raise try_later("the service that introspects tokens cannot be reached") from None
        # RFC 7662 makes these optional. A name of another kind is marked as such, and so never taken for a `sub`.
        name = next((f"{kind}:{said[kind]}" for kind in ("username", "client_id")
                     if isinstance(said.get(kind), str) and said[kind]), None)
        usual = {"iss": settings.oauth_issuer, "exp": time.time() + INTROSPECTED_SECONDS, "sub": name}
        claims = {**usual, **{name: value for name, value in said.items() if value is not None}}
        check_claims(claims, settings.oauth_issuer, time.time())
        return claims

    def close(self) -> None:
        self._verifier.shutdown(wait=False, cancel_futures=True)


# ============================================================================
# 24. Requests to remote servers
# ============================================================================
#
# Each message to a remote server is a POST of its own. The response is JSON, or a stream with the answer and whatever
# belongs to that call, so that here, unlike on stdio, it is known whose a question is. A GET asks for other streams.
# The RemoteLink that sends these requests decides what becomes of their responses.
#
# A request may pass several proxies, but none of them twice: each adds its id to a header, and refuses a request that
# has it already. Two that wait for each other to start would not send that request, so a server that is starting is
# also told the way of whoever waits for it. To a proxy all clients of another one look like one, with one key; a second
# header tells it which requests are one client's, so that it asks nobody what is meant for somebody else.

WAY_HEADER = "x-mcpproxy-via"    # of a request: ids of the proxies on the way, with commas between
ASKER_HEADER = "x-mcpproxy-for"  # of a request: a value that is the same in all requests of one client
WAY_KEY = "mcpproxy/via"         # in _meta of a list_changed, an array: Mount.told_id of the proxies on the way
PROXY_ID = re.compile(r"\b[0-9a-f]{16}\b")           # one of them
MAX_WAY = 32                     # of these are passed on
IDEMPOTENT_METHODS = CACHEABLE | {"initialize", "ping", "prompts/get", "completion/complete", "tasks/get", "tasks/list"}
GREETINGS = "initialize", "server/discover"
PASSING = 408, 425, 429          # HTTP statuses that say nothing of what was asked for,
FOR_NOW = *PASSING, 502, 503, 504        # and with those of what stands before a server that does not answer
RESUMES = 5                      # times in a row that a stream may be asked for in vain
RESUME_SECONDS = 1.0             # before a stream that was cut is asked for again, unless the server says otherwise;
RESUME_LIMIT = 30.0              # this is doubled each time, up to here
RESUME_LEAST, RESUME_MOST = 0.1, 3600.0          # of what the server says
DOUBT_SECONDS = 10.0             # between two checks whether a server still speaks as it did
LASTING_SECONDS = 10.0           # a stream that was open for so long was not in vain, even if nothing came on it
# What a server says to messages of another era than its own, or of a revision that it does not know.
_NOT_MINE = re.compile(rb"%d|%d|unsupported protocol version" % (HEADER_MISMATCH, UNSUPPORTED_VERSION), re.IGNORECASE)


def way_of(headers: dict[str, str]) -> str:
    """The ids of the proxies that a request came through; `headers` are its own, by name in lower case."""
    way = headers.get(WAY_HEADER)
    return ", ".join(PROXY_ID.findall(way)[-MAX_WAY:]) if way else ""


class RemoteFetch(Fetch):
    """A request to a remote server whose response may be a stream of messages; `number` is the id of the request that
    they belong to, and `session` the one that it is made in."""

    def __init__(self, link: "RemoteLink", number: int | None, head: bytes, body: bytes = b""):
        super().__init__(head, body, link.limit)
        self.link, self.number, self.session = link, number, link.session
        self.events: EventParser | None = None

    @property
    def principal(self) -> object:
        request = self.link.pending_of(self.number)
        return request and request.principal

    @property
    def size(self) -> int:
        return self.events.size if self.events else 0

    def give(self) -> None:
        """Fails the call for want of room here: the server is not to blame, and is not asked for the rest."""
        request = self.link.pending_of(self.number)
        if request and request.client:
            request.give()                     # takes it back
        else:
            self.is_stream = False             # nothing is resumed
            super().give()

    def on_head(self, head: ResponseHead) -> None:
        if is_stream(head):
            self.is_stream, self.events = True, event_parser(self.link, self.number, self.session)

    def on_part(self, data: bytes) -> None:
        self.events.feed(data)


class Post(RemoteFetch):
    """The POST of a JSON-RPC request."""

    def __init__(self, link: "RemoteLink", line: bytes, about: About, is_repeated: bool = False):
        super().__init__(link, about.number, link.post_head(line, about), line)
        self.about, self.is_repeated = about, is_repeated
        self.is_greeting = about.method in GREETINGS
        self.session = None if self.is_greeting else self.session
        self.is_idempotent = about.method in IDEMPOTENT_METHODS
        self.is_extra = about.method in ("initialize", "ping")
        self.is_endless = about.method == "subscriptions/listen"

    def on_head(self, head: ResponseHead) -> None:
        session = head.headers.get(SESSION_ID_HEADER.lower(), "")
        if self.about.method == "initialize" and head.status == 200 and re.fullmatch("[!-~]+", session):
            self.session = self.link.session = session
        super().on_head(head)

    def on_end(self, head: ResponseHead, body: bytes) -> None:
        self.link.on_end_of_post(self, head, body)

    def on_failure(self, reason: str, is_connected: bool = True) -> None:
        self.link.on_failure_of_post(self, reason, is_connected)

    def may_come_again(self) -> bool:
        """May it be sent once more, in another session? What the proxy asks by itself it asks in each new session: if
        that did not last, it must not be what opens the next one, for ever."""
        request, age = self.link.pending_of(self.number), asyncio.get_running_loop().time() - self.link.renewed_at
        return not (self.is_repeated or request and (request.is_pinned or not request.client and (
            self.session == self.link.session and age < DOUBT_SECONDS)))


class Aside(Ask):
    """The POST of a message that gets no response: a notification, or a response to the server."""

    def __init__(self, link: "RemoteLink", line: bytes, is_repeated: bool = True):
        super().__init__(link.post_head(line, None), line, link.limit)
        self.session, self.is_repeated = link.session, is_repeated

    def on_head(self, head: ResponseHead) -> None:
        if is_stream(head):                    # it was taken; nothing is to come
            self.on_end(head, b"")
            self.abort()


class Listen(RemoteFetch, Ask):
    """A GET for a stream: a session's, what is missing of an answer, or the one of HTTP+SSE. `tries`: how often in a
    row it was asked for in vain; `retry`: the seconds before it is asked for again, if the server said how many."""

    def __init__(self, link: "RemoteLink", number: int | None = None, last_id: str = "", retry: float | None = None,
                 tries: int = 0):
        super().__init__(link, number, link.get_head(last_id))
        self.last_id, self.retry, self.tries = last_id, retry, tries
        self.is_extra = number is None         # the GET for the rest of an answer counts as a request of its client's

    def again(self) -> "Listen":
        """The next one, which goes on where this one ended."""
        last_id, retry = (self.events.last_id, self.events.retry) if self.events else ("", None)
        return Listen(self.link, self.number, last_id or self.last_id, self.retry if retry is None else retry,
                      self.tries + 1)

    @property
    def pause(self) -> float:
        """The seconds to wait before it. MCP 2025-11-25, Transports, Sending Messages to the Server, 6: `retry` MUST be
        respected (and is, up to an hour); RESUME_LIMIT bounds only what doubling adds to it."""
        if self.number is None and not self.tries:
            return 0
        first = RESUME_SECONDS if self.retry is None else min(RESUME_MOST, max(RESUME_LEAST, self.retry))
        return max(first, min(RESUME_LIMIT, first * 2 ** min(10, max(0, self.tries - 1))))

    def give(self) -> None:
        self.tries = RESUMES                   # the longest pause
        super().give()

    def on_head(self, head: ResponseHead) -> None:
        super().on_head(head)
        if self.is_stream and self.number is None and not self.last_id:          # with one, it brings what was missed
            self.link.gaps += 1

    def on_part(self, data: bytes) -> None:
        self.tries = 0
        super().on_part(data)

    async def read_to_end(self, client: HTTPClient) -> tuple[int, str, bool]:
        """Reads it to its end. Returns the HTTP status if it was no stream, otherwise 0, and 404 for any that says that
        the session is lost; how it ended, in words that follow "the server"; and whether the server was reached."""
        now = asyncio.get_running_loop().time
        began = now()
        try:
            head, body = await self.answer(client)
            status = 404 if is_of_lost_session(head, body) else head.status
            if self.number is None and self.last_id and 400 <= status < 500 and status not in (404, *PASSING):
                self.last_id, status = "", 0           # the event is not known any more: then without what was missed
            return 0 if self.is_stream else status, f"answered HTTP {head.status}", True
        except OSError as error:
            return 0, str(error), not isinstance(error, ConnectionError)
        finally:
            # A proxy in between may cut each stream that is silent for a minute, and most are.
            if self.is_stream and now() - began >= LASTING_SECONDS:
                self.tries = 0


def event_parser(link: "RemoteLink", number: int | None, session: str | None) -> EventParser:
    """What takes in the events of a stream of this session, and of the request with this id. (It does not know its
    fetch: a cycle of the two would keep what was read until the next garbage collection.)"""
    def on_event(kind: bytes, data: bytes) -> None:
        if kind == b"message" and data and session != link.session and kind_of(data) is REQUEST:
            # The answer would go into the new session, where this id may be that of somebody else's question.
            link.on_refused(number, ServerError("the MCP server asked in a session that it has forgotten"))
        elif kind == b"message" and data:
            link.receive(data, number)
        elif kind == b"endpoint" and link.endpoint and not link.endpoint.done():
            link.endpoint.set_result(data.decode("utf-8", "replace"))
    return EventParser(link.limit, on_event, lambda head, tail: link.on_end and link.on_too_long(head, tail))


def is_stream(head: ResponseHead) -> bool:
    return head.status == 200 and media_type(head) == EVENT_STREAM_TYPE


def is_answer(head: ResponseHead, body: bytes, number: int | None) -> bool:
    """Is a response that is no stream the server's answer to the request with this id, be it an error?"""
    if head.status == 200 and media_type(head) == JSON_TYPE:
        return True
    if head.status < 400 or head.status in (401, 403):
        return False
    try:
        return as_own_id(parse_message(decode_json(body), is_servers=True).id) == number
    except RPCError:
        return False


def kind_of(line: bytes) -> str | None:
    """Is a line a request, a notification or a response? An array (MCP 2025-03-26, Batching) counts as a request if it
    may hold one. None if it is no message."""
    if line.lstrip().startswith(b"["):
        return REQUEST if b'"method"' in line else RESPONSE
    with contextlib.suppress(RPCError):
        return parse_message(decode_json(line), is_servers=True).kind


def is_of_lost_session(head: ResponseHead, body: bytes, number: int | None = None) -> bool:
    """Does the server say that it has forgotten the session? By the specification it does so by a 404, if that does not
    mean an unknown method. In the field a 400 that speaks of a session says so too, unless its error is a wrong
    parameter, which may have such a name. So does one that objects to the revision agreed on: the server is another."""
    return head.status == 404 and b"-32601" not in body or head.status == 400 and (
        b"session" in body.lower() and not (b"-32602" in body and is_answer(head, body, number))
        or _NOT_MINE.search(body) is not None)


def refusal(head: ResponseHead, body: bytes) -> ServerError:
    """The error that a response means if it is no answer."""
    status, text = head.status, f"HTTP {head.status}"
    if 300 <= status < 400:
        # Without the query, which may hold somebody's secret.
        text += f", a redirect to {head.headers.get('location', 'nowhere').partition('?')[0][:200]}: set that as url"
    elif status < 300:
        text += f" with {media_type(head) or 'nothing'}, which is no answer"
    with contextlib.suppress(ProxyError, ValueError, StopIteration, RecursionError):
        said = member_at(scan_plain(decode_json(body).lstrip(), 0)[0], ("error", "message"))     # it may have no id
        text += f": {said[:1_000]}" if isinstance(said, str) else ""
    retry = head.headers.get("retry-after", "") if status in (429, 503) else ""
    kind = HandshakeRefused if status in (400, 404, 405, 406, 415, 422) else ServerError
    return kind(f"the MCP server answered {text}", status=503 if status in (429, 503) else 502, data={"status": status},
                headers=(("Retry-After", retry),) if retry else ())


# ============================================================================
# 25. Remote servers
# ============================================================================
#
# The other kind of link: a server that is spoken to over HTTP, as MCP clients do. A modern server answers messages, and
# does nothing else. A legacy one may open a session, and a stream for what belongs to no request. A stream that is cut
# is resumed where it ended, and a session that the server has forgotten is replaced by another, so that nobody notices.
# A server from before 2025-03-26 has one stream for everything (HTTP+SSE).

ASIDE_SECONDS = 30.0             # for a server to take a message that has no answer
ASIDES = 128                     # such messages on their way at a time: calls need connections too
DELETE_SECONDS = 2.0             # for the server to end a session
GREETING_PAUSES = 1.0, 2.0, 4.0  # seconds, before it is told again that the handshake is over
DISCOVER = encode_request(0, "server/discover", {"_meta": OUR_ENVELOPE}), About(0, "server/discover")


class RemoteLink(Link):
    """An MCP server that is reached by a URL."""

    is_remote = True
    label = "%(url)s"

    def __init__(self, server: str, url: str, headers: dict[str, str], way: str, limit: int, is_sse: bool = False):
        parts = urlsplit(url)
        self.fields = {"url": f"{parts.scheme}://{parts.netloc}{parts.path}"}          # a query may hold a key
        self.limit = limit                     # of an answer or an event, in bytes
        self._server, self._url, self._is_sse = server, url, is_sse
        self._headers, self._own_way = headers.items(), way
        self._client = HTTPClient(url)
        # What brings the answers, by server id; at None, the session's stream, or the one of HTTP+SSE.
        self._running: dict[int | None, RemoteFetch] = {}
        # By principal, (line, is_repeated) of messages that get no response and wait for the one before to be taken.
        self._asides: dict[object, collections.deque[tuple]] = {}
        self._places = asyncio.Semaphore(ASIDES)
        self.backlog = 0                       # bytes in _asides and _held
        self._held: list[tuple] | None = None  # what waits for a session, as write() takes it
        self._initialize: tuple[bytes, About] | None = None          # of the handshake of a legacy server
        self.session: str | None = None
        self.gaps = 0                          # of the session's streams, in which something may have been missed
        self.endpoint: asyncio.Future | None = None          # where HTTP+SSE takes messages
        self._certain_until = 0.0              # until when it is not checked again whether it speaks as it did
        self.renewed_at = float("-inf")        # when a request of the proxy's own last had another session opened

    async def start(self) -> None:
        for name, value in self._headers:
            if not _FIELD_LINE.fullmatch(f"{name}: {value}".encode("utf-8", "replace")):
                raise ServerError(f"the header {name} cannot have this value")
        if self._is_sse:
            await self._open_sse()

    # What the connection calls.

    def write(self, line: bytes, about: About | None = None, principal: object = None,
              is_repeated: bool = False) -> None:
        if about and about.method == "initialize":
            self._initialize = line, about
            self._post(line, about)
        elif line == INITIALIZED:
            self._held = self._held or []      # a server may refuse what comes before this
            asyncio.create_task(self._open())
        elif about is None and principal in self._asides:
            self._asides[principal].append((line, is_repeated))
            self.backlog += len(line)
        elif self._held is not None:
            self._held.append((line, about, principal, is_repeated))
            self.backlog += len(line)
        elif about is None:
            asides = self._asides[principal] = collections.deque([(line, is_repeated)])
            self.backlog += len(line)
            first = self._next_aside(asides) if len(self._asides) <= ASIDES else None
            asyncio.create_task(self._tell_all(principal, first))
        elif not is_repeated or self.pending_of(about.number):
            self._post(line, about, is_repeated)

    def cancel(self, number: int, line: bytes, principal: object) -> None:
        # In 2026-07-28, to hang up is to cancel. Otherwise, only what was "previously issued" in this session can be.
        session = getattr(self._running.get(number), "session", self.session)
        if self.revision != MODERN_VERSION and self.has_sent(number) and self._held is None and session == self.session:
            self.write(line, None, principal)
        self._drop(number)

    def has_sent(self, number: int) -> bool:
        fetch = self._running.get(number)
        if fetch is None:                      # it is still held; or, with HTTP+SSE, its POST is over
            return self.endpoint is not None and self._held is None
        return not isinstance(fetch, Post) or fetch.connection is not None

    def _drop(self, number: int | None) -> None:
        fetch = self._running.pop(number, None)
        if fetch:
            fetch.abort()

    def tell_way(self, way: str) -> None:
        if self.on_end and self.is_open:
            self.way = way
            asyncio.create_task(self._tell_way())

    async def _tell_way(self) -> None:
        with contextlib.suppress(OSError):     # only that it is refused is of interest
            head, _ = await self._ask(*DISCOVER)
            if head.status == 508:
                self.end("answered HTTP 508: requests would go round in a circle")

    def _ask(self, line: bytes, about: About) -> collections.abc.Awaitable[tuple[ResponseHead, bytes]]:
        """Sends a request of the link's own; returns the HTTP response."""
        return Ask(self.post_head(line, about), line).answer(self._client, ASIDE_SECONDS)

    async def _greet_again(self) -> None:
        """The server refuses what it took before. One of the other era may have taken its place, or one that wants a
        session. So it is greeted once more as before, and if it answers that in another way, the link ends."""
        now, is_modern = asyncio.get_running_loop().time(), self.revision == MODERN_VERSION
        if not self.revision or self.endpoint or now < self._certain_until:
            return
        self._certain_until = now + DOUBT_SECONDS
        with contextlib.suppress(OSError):
            head, body = await self._ask(*(DISCOVER if is_modern else self._initialize))
            member = b"supportedVersions" if is_modern else b"protocolVersion"
            if head.status in (400, 404, 405) or head.status == 200 and (
                    member not in body or SESSION_ID_HEADER.lower() in head.headers and not is_modern):
                self.end("does not speak as it did before")

    async def _stop(self) -> None:
        for number in list(self._running):
            self._drop(number)
        if self.session:
            with contextlib.suppress(OSError):
                await Ask(self._request_head("DELETE", self._session_headers())).answer(self._client, DELETE_SECONDS)
        self._client.close()
        self.end()

    def end(self, reason: str = "") -> None:
        """No more lines will come; `reason` says why, in words that follow "it"."""
        if self.on_end:
            self.how_it_ended = reason and f": it {reason}"
            error = ServerError(f"the MCP server ended{self.how_it_ended}")
            error.is_unsent = True             # what waits for a connection, or for a session
            waiting = [number for number in self._running if not self.has_sent(number)]
            held = [about.number for _, about, _, is_repeated in self._held or () if about and not is_repeated]
            for number in waiting + held:
                self._drop(number)
                self.on_refused(number, error)
        super().end()

    # Requests.

    def _request_head(self, method: str, headers: list[tuple[str, str]], size: int | None = None,
                      way: str = "") -> bytes:
        way = ", ".join(filter(None, (way or self.way, self._own_way)))
        return self._client.head(method, (*self._headers, (WAY_HEADER, way), *headers), size)

    def _session_headers(self) -> list[tuple[str, str]]:
        return [*([(SESSION_ID_HEADER, self.session)] if self.session else []),
                *([("MCP-Protocol-Version", self.revision)] if self.revision else [])]

    def post_head(self, line: bytes, about: About | None) -> bytes:
        """The head of a POST. MCP 2026-07-28, Streamable HTTP, Request Metadata."""
        _, method, name, more, way = about or About(None, None)
        headers = [("Content-Type", JSON_TYPE), ("Accept", f"{JSON_TYPE}, {EVENT_STREAM_TYPE}"), *more]
        if method == "server/discover" or self.revision == MODERN_VERSION:
            repeated = ("Mcp-Method", method), ("Mcp-Name", name)
            headers.append(("MCP-Protocol-Version", MODERN_VERSION))
            headers += [(header, encode_header(value)) for header, value in repeated if value is not None]
        elif method != "initialize":
            headers += self._session_headers()
        return self._request_head("POST", headers, len(line), way)

    def get_head(self, last_id: str) -> bytes:
        """The head of a GET for a stream."""
        headers = [("Accept", EVENT_STREAM_TYPE), ("Cache-Control", "no-cache"), *self._session_headers()]
        return self._request_head("GET", headers + ([("Last-Event-ID", last_id)] if last_id else []))

    def _post(self, line: bytes, about: About, is_repeated: bool = False) -> None:
        post = self._running[about.number] = Post(self, line, about, is_repeated)
        self._client.send(post)

    def _next_aside(self, asides: collections.deque) -> Aside:
        """Sends the next of a principal's messages that get no response."""
        line, is_repeated = asides.popleft()
        self.backlog -= len(line)
        aside = Aside(self, line, is_repeated)
        self._client.send(aside)
        return aside

    async def _tell_all(self, principal: object, sent: Aside | None) -> None:
        """Sends a principal's messages that have no answer one by one, for their order counts; `sent` is on its way."""
        asides = self._asides[principal]
        while sent or asides and self.on_end:
            async with self._places:
                if sent or self._held is None:
                    await self._tell(sent or self._next_aside(asides), asides)
                    sent = None
            if self._held is not None:                     # they wait for a session
                self._held += [(line, None, principal, is_repeated) for line, is_repeated in asides]
                asides.clear()
        del self._asides[principal]

    async def _tell(self, aside: Aside, asides: collections.deque | None = None) -> int:
        """Waits until a message was taken; returns 0, or the HTTP status of a refusal, 502 if there was no answer."""
        problem, status = "", 0
        try:
            head, body = await aside.answer(self._client, ASIDE_SECONDS)
            if aside.session and not aside.is_repeated and is_of_lost_session(head, body):
                if kind_of(aside.body) is not RESPONSE:    # in the new session, nobody has asked for this answer
                    asides.appendleft((aside.body, True))
                    self.backlog += len(aside.body)
                self._renew(aside.session)
            elif not 200 <= head.status < 300:
                problem, status = f"answered HTTP {head.status}", head.status
                self._answer_instead(aside, refusal(head, body))
        except OSError as error:
            problem, status = str(error), 502
            if isinstance(error, ConnectionError) and not self._client.connections:
                self.end(problem)
        if problem and self.on_end:
            log.warning("! server %(server)s did not take a message: %(problem)s", server=self._server, problem=problem)
        return status

    def _answer_instead(self, aside: Aside, error: ServerError) -> None:
        """If the server did not take the answer to its question, it would wait for one: maybe it takes an error."""
        with contextlib.suppress(ProxyError):
            message = parse_message(decode_json(aside.body))
            if message.is_result and aside.session == self.session:
                self.write(b"".join(encode_error(message.raw_id, error)))

    # Responses.

    def on_answered(self, number: int) -> None:
        fetch = self._running.pop(number, None)
        if fetch:
            fetch.abort_later()

    def receive(self, data: bytes, number: int | None) -> None:
        if b"\n" in data or b"\r" in data:
            data = data.replace(b"\n", b" ").replace(b"\r", b" ")            # they are only between tokens
        if self.on_end:
            self.on_line(data, number)

    def on_end_of_post(self, post: Post, head: ResponseHead, body: bytes) -> None:
        """A POST has been answered. MCP 2025-11-25, Transports, Sending Messages to the Server; Session Management."""
        self._running.pop(post.number, None)
        has_answer = post.is_stream or is_answer(head, body, post.number)
        is_lost = is_of_lost_session(head, body, post.number)
        if not (post.session or post.is_greeting) and (is_lost or not has_answer and head.status in (400, 404, 405)):
            # A server of the other era would answer so. MCP 2026-07-28, Streamable HTTP, Backward Compatibility.
            asyncio.create_task(self._greet_again())
        if post.session and is_lost:
            if post.may_come_again():
                if (request := self.pending_of(post.number)) and not request.client:
                    self.renewed_at = asyncio.get_running_loop().time()
                self._renew(post.session)
                self.write(post.body, post.about, is_repeated=True)
            else:
                self._refuse(post, refusal(head, body))
        elif self.endpoint and 200 <= head.status < 300:
            answer = find_response(body)       # HTTP+SSE answers on its one stream; here only a response counts
            if answer and answer.id == post.number:
                self.receive(body, post.number)
        elif has_answer:
            if not post.is_stream:
                self.receive(body, post.number)
            if self.pending_of(post.number):
                self._resume(post)
        else:
            self._refuse(post, refusal(head, body))

    def on_failure_of_post(self, post: Post, reason: str, is_connected: bool) -> None:
        self._running.pop(post.number, None)
        if post.is_stream and self.pending_of(post.number):
            self._resume(post)
        else:
            error = ServerError(f"the MCP server {reason}")
            error.is_unsent = not is_connected
            self._refuse(post, error)
        if not is_connected and not self._client.connections:
            self.end(reason)

    def _resume(self, post: Post) -> None:
        """The stream ended before the answer: asks for the rest, if it can be asked for."""
        if post.is_stream and post.events.last_id and self.revision != MODERN_VERSION and (
                post.session == self.session):           # in another, the id may be that of somebody else's event
            self._listen(Listen(self, post.number, post.events.last_id, post.events.retry))
        else:
            self._refuse(post, ServerError("the MCP server cut its answer off" if post.is_stream else
                                           "the MCP server answered something else"))

    def _refuse(self, post: Post, error: ServerError) -> None:
        """The request fails; but where `initialize` was refused, HTTP+SSE is tried first."""
        if post.about.method == "initialize" and self._held is None and not self.endpoint and (
                error.data and error.data["status"] in (400, 404, 405)):
            asyncio.create_task(self._fall_back(post, error))
        else:
            self.on_refused(post.number, error)

    # Sessions.

    async def _open(self) -> None:
        """Says that the handshake is over, then what was held back, and asks for the session's stream."""
        now = asyncio.get_running_loop().time
        until = now() + ASIDE_SECONDS
        for pause in (*GREETING_PAUSES, 0):    # a server may refuse all else for ever if it does not hear this
            if not self.is_open or await self._tell(Aside(self, INITIALIZED)) not in FOR_NOW or now() >= until:
                break
            await asyncio.sleep(pause)
        if not self.is_open:
            return                             # end() refuses what is held
        held, self._held = self._held, None
        for line, about, *more in held:
            self.backlog -= len(line)
            if about is None or self.pending_of(about.number):
                self.write(line, about, *more)
        if not self.endpoint:
            self._listen(Listen(self))

    def _renew(self, session: str) -> None:
        """The server has forgotten this session: another one is opened, unless that was done. MCP 2025-11-25,
        Transports, Session Management, 4."""
        if self._held is None and session == self.session:
            self._held, self.session = [], None
            self._drop(None)
            self.on_forgotten()
            for asides in self._asides.values():
                for one in [one for one in asides if kind_of(one[0]) is RESPONSE]:
                    asides.remove(one)
                    self.backlog -= len(one[0])
            asyncio.create_task(self._open_another())

    async def _open_another(self) -> None:
        try:
            async with asyncio.timeout(ASIDE_SECONDS):
                params = json.loads(self._initialize[0])["params"]
                response = await self.request("initialize", params).result()
        except (ProxyError, TimeoutError) as error:
            return self.end(f"has forgotten its session, and opens no other: {str(error) or 'it takes too long'}")
        log.info("= server %(server)s had forgotten its session, and has another one", server=self._server)
        version = response.result.get("protocolVersion")
        self.revision = version if version in LEGACY_VERSIONS else None
        self.write(INITIALIZED)

    # Streams.

    @property
    def hearing(self) -> int | None:
        stream = self._running.get(None)
        return self.gaps if self.endpoint or stream and stream.is_stream and not stream.is_over else None

    def _listen(self, listen: Listen) -> None:
        self._running[listen.number] = listen
        asyncio.create_task(self._follow(listen))

    async def _follow(self, listen: Listen) -> None:
        """Reads a stream, and those that go on where it was cut, until that is in vain."""
        number = listen.number
        while True:
            await asyncio.sleep(listen.pause)
            status, reason, is_reached = await listen.read_to_end(self._client)
            if self._running.get(number) is not listen:
                return                         # nobody needs it any more: what it is for is over, or its session
            del self._running[number]
            if self.endpoint and number is None:
                if self.endpoint.done():
                    return self.end("ended its stream")
                return self.endpoint.set_exception(ServerError(f"the MCP server {reason}"))
            is_in_vain = listen.tries >= RESUMES
            if number is not None and (status or is_in_vain or listen.session != self.session):
                self.on_refused(number, ServerError(f"the MCP server cut its answer off, and then {reason}"))
            if is_in_vain and not is_reached:
                return self.end(reason)
            if number is None and status == 404 and listen.tries and self.session:
                return self._renew(self.session)         # it had a stream before
            if not self.pending_of(number) and (number is not None or 400 <= status < 500 and status not in PASSING):
                return                         # MCP 2025-11-25: 405, if it has no stream for what belongs to no request
            listen = self._running[number] = listen.again()

    # HTTP+SSE. MCP 2024-11-05, Transports, HTTP with SSE; 2025-11-25, Transports, Backwards Compatibility.

    async def _fall_back(self, post: Post, error: ServerError) -> None:
        try:
            await self._open_sse()
        except HandshakeRefused as other:      # it does speak HTTP+SSE
            self.on_refused(post.number, other)
        except ServerError:
            self.on_refused(post.number, error)
        else:
            self._post(post.body, post.about)

    async def _open_sse(self) -> None:
        self.endpoint = asyncio.get_running_loop().create_future()
        self._listen(Listen(self))
        try:
            where = await asyncio.wait_for(asyncio.shield(self.endpoint), 2 * CONNECT_SECONDS)  # not before it fails
            where, here = urlsplit(urljoin(self._url, where)), urlsplit(self._url)
            if (where.scheme, where.hostname, port_of(where)) != (here.scheme, here.hostname, port_of(here)):
                raise HandshakeRefused("the MCP server wants its messages sent elsewhere")
        except (ServerError, TimeoutError, ValueError) as error:
            self._drop(None)
            self.endpoint = None
            raise error if isinstance(error, ServerError) else ServerError("the MCP server names no endpoint")
        self._client.target = target_of(where)


# ============================================================================
# 26. Pending requests
# ============================================================================
#
# What waits for a server's response. A client's call may also be why a server says something that names no request.

MAX_CAUSES = 1_000               # running calls that are compared with each other; with more, a message is nobody's


class PendingRequest:
    """What waits for a server's response. *Exchanges* has the important kind: a client's."""

    __slots__ = ()
    client = None              # the Client that the request came from, if it came from one
    principal: object = None   # who is charged for it
    is_endless = False         # is it a subscription, for which no time is too long?
    is_pinned = False          # is it not to be sent again?
    last_sign = float("inf")   # when it last showed that it is alive; inf: it may take for ever

    def on_response(self, response: ResponseLine | Message) -> None:
        """The server responded."""

    def on_failure(self, error: ServerError) -> None:
        """It never will."""

    def on_progress(self, message: Message) -> None:
        """It sent notifications/progress with this request's id as the token."""

    def on_event(self, message: Message) -> None:
        """It sent a notification for the subscription that this request is."""


OVER = PendingRequest()          # stands for one that is over, and on whose stream something came nonetheless


class OwnRequest(PendingRequest):
    """A request that the proxy itself makes."""

    def __init__(self, now: float, then=None):
        self.response: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        # Called with that future in the turn in which it is done; a future's own callbacks come a turn later.
        self._then = then or (lambda response: None)
        self.last_sign = now

    def on_response(self, response: ResponseLine | Message) -> None:
        if not self.response.done():
            self.response.set_result(response.parsed())
            self._then(self.response)

    def on_failure(self, error: ServerError) -> None:
        if not self.response.done():
            self.response.set_exception(error)
            self.response.exception()        # nobody has to ask for it
            self._then(self.response)

    async def result(self) -> Message:
        """The response, which has a result; HandshakeRefused when it is an error."""
        message = await self.response
        if message.result is None:
            error = None if message.is_result else message.value("error")
            words = member_at(error, ("message",))
            raise HandshakeRefused(f"the MCP server refused{f': {words[:1_000]}' if isinstance(words, str) else ''}",
                                   data=error)
        return message


class Causes(dict[PendingRequest, None]):
    """Clients' running calls that may cause what a server sends by itself, the newest last."""

    def __init__(self):
        super().__init__()
        self._of_one: list[PendingRequest] | None = None       # see of_one_client(); None: not compared yet

    def add(self, call: PendingRequest) -> None:
        self[call] = None
        self._of_one = None

    def discard(self, call: PendingRequest) -> None:
        self.pop(call, None)
        self._of_one = None

    def of_one_client(self) -> list[PendingRequest]:
        """All of them if they are one client's, and not too many; otherwise none. This is kept until a call comes or
        goes, since a server may send thousands of messages meanwhile."""
        if self._of_one is None:
            calls = list(itertools.islice(self, MAX_CAUSES + 1))
            are_of_one = len(calls) <= MAX_CAUSES and all(call.asker == calls[0].asker for call in calls)
            self._of_one = calls if are_of_one else []
        return self._of_one


# ============================================================================
# 27. Server connection
# ============================================================================
#
# JSON-RPC with one server over the link that is handed in: a request gets an id of ours, and what comes back is given
# to whoever waits for it. Knows messages; nothing of sessions or HTTP. `now` is the clock: it returns seconds.

# Lines that are requests, answers that nobody waits for, or no messages: a server that writes so many more of them than
# answers within FLOOD_SECONDS is ended (in one, a busy machine does not read them); and how many a second are logged.
FLOOD, FLOOD_SECONDS, LOGGED_QUESTIONS, LOGGED_JUNK = 5_000, 5.0, 100, 10
PROBE_SECONDS = 3.0        # for the answer to server/discover; then the server is also asked the old way
GREETING_SECONDS = 10.0    # for the answer to that from a server that reads; then it is taken to be silent for good


class ServerConnection(Holder):
    """One server that is spoken to. Its link has to be started, and a handshake made, before anything else."""

    def __init__(self, name: str, link: Link, *, now, redact, on_request, on_notification, is_single_user: bool):
        self.name = name
        self.link = link
        self.has_served = False                           # did it get a client's call?
        self._is_single_user = is_single_user              # see Instance.is_single_user
        link.on_line, link.on_too_long, link.on_end = self._on_line, self._on_too_long, self._on_end
        link.pending_of = lambda number: self.pending.get(number)
        link.on_refused, link.request = self._fail, self.request
        self.era = LEGACY
        self.is_greeted = False                            # is the handshake made?
        self.mirrors = False                               # do headers repeat arguments of its tools?
        self.pending: dict[int, PendingRequest] = {}      # by server id, the oldest first
        self.causes = Causes()
        self.questions: dict[object, object] = {}         # the server's own requests that were not answered yet, by id
        self._flood, self.unasked = Rate(FLOOD_SECONDS), Rate()          # of lines that nobody asked for; for the log
        self._withdrawn = 0                               # requests that it may answer, though they were taken back
        self.heard_at, self.silences = float("-inf"), 0   # when something came last; and the time-outs since
        self.closed: asyncio.Future[ServerError] = asyncio.get_running_loop().create_future()
        self.on_closed = None                             # called at once when the link ends
        self._on_request, self._on_notification = on_request, on_notification
        self._now, self._redact = now, redact
        self.next_id = itertools.count(1).__next__        # of a request to the server
        self.tokens: dict[int, tuple] = {}                # (session's id, progress token) of calls that became tasks
        self._waiting: collections.deque[tuple] = collections.deque()      # (principal, size) of what waits to be read
        self._shares: collections.Counter = collections.Counter()         # the same together, by principal

    # Handshakes. Each returns what the server said of itself, or raises ServerError.

    async def initialize(self, params: dict) -> Identity:
        """The legacy one. MCP 2025-11-25, Lifecycle, Initialization."""
        return self._greeted(LEGACY, await self.request("initialize", params).result())

    async def discover(self) -> Identity:
        """The modern one. MCP 2026-07-28, Discovery."""
        response = await self.request("server/discover", {"_meta": OUR_ENVELOPE}).result()
        if not speaks_modern(response):
            raise HandshakeRefused(f"the MCP server does not speak {MODERN_VERSION}")
        return self._greeted(MODERN, response)

    async def probe(self, params: dict) -> Identity:
        """Whichever the server understands. MCP 2026-07-28, stdio, Backward Compatibility: any answer to
        server/discover that is not modern, and none within a reasonable time, mean that the server is legacy.

        A server that reads its input and stays silent is given up: a fresh process will have to be asked. One that has
        read nothing has not started yet; npx may be fetching it. A remote one is waited for while its POST runs: it
        may start a process for the session. GreetedTwice when a server was slow and took both."""
        probe = asyncio.ensure_future(self.request("server/discover", {"_meta": OUR_ENVELOPE}).result())
        waiting, greeting, unread, has_begun = {probe}, None, 0, False
        try:
            while waiting:
                patience = (None if self.link.is_remote else GREETING_SECONDS) if greeting in waiting else PROBE_SECONDS
                done, waiting = await asyncio.wait(waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                # A server may just be slow to start, so its late answer counts too.
                if probe in done and not probe.exception() and speaks_modern(probe.result()):
                    if greeting:
                        await asyncio.wait({greeting}, timeout=PROBE_SECONDS)
                        if greeting.done() and not greeting.exception():
                            raise GreetedTwice("the MCP server was greeted in both eras")
                    return self._greeted(MODERN, probe.result())
                if probe in done:
                    check_is_legacy(probe.exception() or probe.result())
                if greeting in done and not greeting.exception():
                    return self._greeted(LEGACY, greeting.result())
                if greeting is None and self.link.is_open:
                    has_begun = bool(done) or not self.link.unread
                    greeting = asyncio.ensure_future(self.request("initialize", params).result())
                    waiting.add(greeting)
                elif greeting in waiting and not done:
                    before, unread = unread, self.link.unread
                    log.warning("! server %(server)s has not answered yet: does it speak MCP on stdin and stdout?",
                                server=self.name)
                    if has_begun or not unread or unread < before:
                        raise ServerError("the MCP server does not answer")
                elif greeting and not done:
                    break                       # initialize was refused, and server/discover is not answered
            raise (greeting or probe).exception() or HandshakeRefused("the MCP server refused")
        finally:
            for task in filter(None, (probe, greeting)):
                task.cancel()

    def _greeted(self, era: Era, response: Message) -> Identity:
        identity = Identity(era, response)
        self.era, self.is_greeted, self.mirrors = era, True, era is MODERN and self.link.is_remote
        for number in list(self.pending):                  # what else it was asked, to find out how to greet it
            del self.pending[number]
            self._withdrawn += 1
            self.link.on_answered(number)
        self.link.revision = identity.version if identity.version in (MODERN_VERSION, *LEGACY_VERSIONS) else None
        if era is LEGACY:
            self.send_if_possible(INITIALIZED)
        return identity

    # To the server.

    def send(self, line: bytes, about: About | None = None, principal: object = None,
             cancelled: int | None = None) -> None:
        """Writes one message: a client's, with its principal; with `cancelled`, one that takes back the request of that
        id. ServerError when the server does not read and the principal has more than its share of what waits."""
        link = self.link
        if not link.is_open:
            raise self.failure()
        if (backlog := link.backlog) or self._waiting:
            self._check_backlog(len(line), principal, backlog, cancelled is not None)
        if principal is not None:
            self.has_served = True
        if cancelled is None:
            link.write(line, about, principal)
        else:
            link.cancel(cancelled, line, principal)

    def _check_backlog(self, size: int, principal: object, backlog: int, has_to_go: bool) -> None:
        """Counts a message among what waits to be read, or refuses it."""
        waiting, shares = self._waiting, self._shares
        while waiting and shares.total() - waiting[0][1] >= backlog:         # the oldest was read
            whose, read = waiting.popleft()
            shares[whose] -= read
            if shares[whose] <= 0:
                del shares[whose]
        if backlog + size > MAX_QUEUED_BYTES and not has_to_go and shares[principal] + size > MAX_QUEUED_BYTES / (
                len({principal, *shares}) if principal is not None else 1):
            if principal is None:                  # what the proxy itself has to say cannot be left out
                log.error("! server %(server)s is ended: it does not read its input", server=self.name)
                self.link.stop()
            raise ServerError("the MCP server does not read its input", status=503)
        waiting.append((principal, size))
        shares[principal] += size
        if self._is_single_user:
            budget.set(self, backlog)

    def give(self) -> None:
        """Ends the server, which does not read what its one client sends."""
        self.link.stop()

    def send_request(self, pending: PendingRequest, method: str, params: dict, way: str = "") -> int:
        """Sends a request of the proxy's own, for which `pending` waits; returns its id. `way` is as Link.way."""
        server_id = self.next_id()
        self.pending[server_id] = pending
        if self.era is MODERN:
            params = {"_meta": OUR_ENVELOPE, **params}
        try:
            self.send(encode_request(server_id, method, params), About(server_id, method, way=way))
        except ServerError as error:
            del self.pending[server_id]
            pending.on_failure(error)
        return server_id

    def request(self, method: str, params: dict | None, then=None, way: str = "") -> OwnRequest:
        """A request of the proxy's own whose response is wanted; `then` is called with the future when it is done."""
        request = OwnRequest(self._now(), then)
        self.send_request(request, method, params or {}, way)
        return request

    def ping(self) -> asyncio.Future[Message]:
        """Asks for a sign of life. An error is one, too: not every server knows the method."""
        return self.request("server/discover" if self.era is MODERN else "ping", None).response

    def cancel(self, server_id: int, reason: str, line: bytes | None = None) -> None:
        """Takes a request back, if it is pending, and tells the server so: with `line`, if that is given."""
        request = self.pending.pop(server_id, None)
        if request:
            self._withdrawn += 1
            line = line or encode_request(None, "notifications/cancelled", {"requestId": server_id, "reason": reason})
            self.send_if_possible(line, request.client and request.client.principal, server_id)

    def expire(self, now: float, patience: float) -> collections.abc.Iterator[PendingRequest]:
        """Ends the proxy's own requests that take too long, and yields them; clients' calls end by their exchanges."""
        if self.held:
            budget.set(self, self.link.backlog)
        for server_id, request in list(self.pending.items()):
            if request.client is None and now - request.last_sign >= patience:
                self.cancel(server_id, "timed out")
                request.on_failure(ServerError("the MCP server took too long", status=504))
                yield request

    def send_if_possible(self, line: bytes, principal: object = None, cancelled: int | None = None) -> None:
        """Writes a message to which nobody awaits a response."""
        with contextlib.suppress(ServerError):
            self.send(line, None, principal, cancelled)

    def failure(self) -> ServerError:
        """Why nothing more will come from this server, with its last words. If several clients share it, and it has had
        a call, those may hold anybody's secret, and are for the log alone."""
        data, said = {"exitCode": self.link.exit_code, **self.link.excess}, ""
        if self._is_single_user or not self.has_served:
            said, data["stderr"] = self.link.last_word, list(self.link.last_words)
        return ServerError(f"the MCP server ended{self.link.how_it_ended}{said and ': '}{said}",
                           data=None if self.link.is_remote else data)

    # From the server.

    def _on_line(self, line: bytes, cause: int | None = None) -> None:
        if self._flood.count > FLOOD or self.closed.done():         # what outlived its server may still write
            return
        line, self.heard_at, self.silences = line.strip(b" \t\r"), self._now(), 0
        try:
            if not line.isascii() and line[:1] != b"[":
                line = escape_separators(line)
            response = find_response(line)
            if response:
                self._resolve(response.id, response)
            elif line.startswith(b"["):
                self._on_batch(line, cause)
            elif line.strip():
                self._on_text(line, cause)
            else:
                self._count_flood()
        except RPCError as error:
            self._on_junk(line, error)
        except Exception as error:
            log.fault(error)                    # one message is lost, those behind it are not

    def _on_text(self, line: bytes, cause: int | None) -> None:
        text = decode_json(line)
        message = parse_message(text, is_servers=True)
        if message.text is not text:
            log.debug("! server %(server)s wrote what is no JSON-RPC but is meant as such: %(text)s",
                      server=self.name, text=self._redact(text[:200]))
        if message.kind is RESPONSE:           # an error's id may be null (JSON-RPC 2.0 §5); a link may know whose
            self._resolve(cause if message.id is None and cause is not None else as_own_id(message.id), message)
        elif message.kind is REQUEST:
            if self.era is MODERN:
                raise RPCError("a request, as only legacy servers make them")
            self._count_flood()
            self._on_request(self, message, self._cause(cause))
        else:
            self._deliver(message, cause)

    def _deliver(self, message: Message, cause: int | None) -> None:
        """A notification goes to the request that it names, if it names one."""
        token = message.params.get("progressToken") if message.method == "notifications/progress" else None
        subscription = message.meta.get(SUBSCRIPTION_KEY) if message.method != "notifications/cancelled" else None
        pending = self.pending.get(as_own_id(token or subscription)) if is_id(token or subscription) else None
        if pending and token:
            pending.on_progress(message)
        elif pending:
            pending.on_event(message)
        elif token or not subscription:
            self._on_notification(message, self._cause(cause))

    def _cause(self, number: int | None) -> PendingRequest | None:
        """The request on whose stream a message came, if the link knows that."""
        return None if number is None else self.pending.get(number, OVER)

    def _on_batch(self, line: bytes, cause: int | None) -> None:
        """MCP 2025-03-26, Overview, Batching: a server may put several messages into an array."""
        for text in split_array(line.decode("utf-8", "surrogateescape")):          # one bad message spoils no other
            if text.startswith("["):
                raise RPCError("a batch in a batch")
            self._on_line(text.encode("utf-8", "surrogateescape"), cause)

    def _on_junk(self, line: bytes, error: RPCError) -> None:
        """Whoever waits for this response is told that it is not valid; a server that meant a request gets an error."""
        text = line.decode("utf-8", "replace")
        if self._count_flood() <= LOGGED_JUNK:
            log.warning(f"! server %(server)s {'sent junk' if self.link.is_remote else 'wrote junk to stdout'} "
                        "(%(reason)s): %(text)s", server=self.name, reason=str(error), text=self._redact(text)[:200])
        try:
            junk = json.loads(text)
            request_id = junk["id"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return                              # not even that
        if not is_id(request_id):
            return
        if "method" not in junk:
            self._fail(as_own_id(request_id), ServerError(f"the MCP server's answer is not valid: {error}"))
        elif self.era is LEGACY:                # MCP 2026-07-28, stdio: "MUST NOT write JSON-RPC responses"
            self.send_if_possible(encode_error(dump(request_id).encode(), error)[0])

    def _count_flood(self) -> int:
        if self._flood.add(self._now()) == FLOOD + 1:
            log.error("! server %(server)s is ended: it floods stdout", server=self.name)
            self.link.stop()
        return self.unasked.add(self._now())          # in this second

    def _resolve(self, server_id, response: ResponseLine | Message) -> None:
        pending = self.pending.pop(server_id, None)
        if pending:
            self._flood.count -= self._flood.count > 0     # a question or a line of junk in each call is no flood
            self.link.on_answered(server_id)
            try:
                pending.on_response(response)
            except Exception:
                pending.on_failure(ServerError("the MCP server's answer cannot be understood"))
                raise
        elif self._withdrawn:
            self._withdrawn -= 1                # the server answered before it read that it need not
        elif self._count_flood() <= LOGGED_JUNK:
            log.info("! server %(server)s answered %(id)s, which nobody waits for", server=self.name,
                     id=self._redact(repr(server_id)))

    def _fail(self, server_id: int | None, error: ServerError) -> None:
        if member_at(error.data, ("status",)):           # over HTTP, that is an answer, too
            self.heard_at, self.silences = self._now(), 0
        pending = self.pending.pop(server_id, None)
        if pending:
            self.link.on_answered(server_id)
            pending.on_failure(error)

    def _on_too_long(self, head: bytes, tail: bytes) -> None:
        """A line over the limit: if it is a response, one call fails; nothing else does."""
        self.heard_at, self.silences = self._now(), 0
        log.warning("! server %(server)s wrote a message over the limit", server=self.name)
        self._fail(find_response_id(head, tail), ServerError("the answer is larger than MAX_MESSAGE_MB"))

    def _on_end(self) -> None:
        error = self.failure()
        budget.set(self, 0)
        if self.on_closed:
            self.on_closed()
        if self.is_greeted:              # otherwise the instance logs that it did not start
            # What a server said is a field of the line; what stands before it, as ": ", is part of the template.
            level, reason = (logging.INFO, self.link.how_it_ended) if self.link.was_stopped else (
                logging.WARNING, f": {error}; {sum(bool(call.client) for call in self.pending.values())} calls fail")
            said, usage = reason.lstrip(": "), self.link.usage_text
            log.say(level, f"= server %(server)s, {self.link.label} ended{reason.removesuffix(said)}%(reason)s"
                           f"{usage and '; '}%(usage)s", server=self.name, reason=said, usage=usage, **self.link.fields)
        pending, self.pending = self.pending, {}
        for request in pending.values():
            try:
                request.on_failure(error)
            except Exception as fault:
                log.fault(fault)                # the others are to be told, too, and the server to be started again
        self.closed.set_result(error)


# ============================================================================
# 28. Streams, questions and outlets
# ============================================================================
#
# What goes to a client: messages in order, a server's questions, and the ways that the messages of a call take.

KEPT_EVENTS = MAX_QUEUED_MESSAGES            # of each stream, for a client whose connection broke
KEPT_BYTES = 8 * 1024 * 1024
EVENT_BYTES = 120                            # that one takes beside its text

NO_CLIENT_CAN = RPCError("no client can answer this", code=METHOD_NOT_FOUND)


class Stream(Holder):
    """Messages to one client in order, for one reader at a time. One with a name keeps its last messages, so that
    they can be fetched again. MCP 2025-11-25, Transports, Resumability and Redelivery."""

    is_spare = True

    def __init__(self, name: str = "", principal: object = None):
        self.name, self.principal = name, principal
        self.has_forgotten = False
        self.is_ended = False
        self.last_number = 0        # of the events so far
        self.last_read = 0          # the number of the last one that a reader got
        self._reader = None         # takes bytes with write(parts), and ends with close()
        self._kept: collections.deque[tuple[int, bytes]] = collections.deque()

    @property
    def is_attached(self) -> bool:
        return self._reader is not None

    def attach(self, reader, after: int | None = None) -> None:
        """Takes a reader, in place of the one before. It first gets what is kept since message number `after`, or
        without that, what no reader got yet."""
        before, self._reader = self._reader, reader
        if before:
            before.close()
        for number, payload in list(self._kept):
            if number > (self.last_read if after is None else after):
                self._write([payload], number)
        if self.is_ended:
            self.close()

    def detach(self, reader) -> None:
        """This reader is gone."""
        if self._reader is reader:
            self._reader = None

    def send(self, payload: list) -> None:
        self.last_number += 1
        if self.name:
            self._keep(b"".join(payload))
        if self._reader:
            self._write(payload, self.last_number)

    def close(self, last_words: bytes = b"") -> None:
        """Nothing more will come."""
        self.is_ended = True
        reader, self._reader = self._reader, None
        if reader:
            if last_words:
                reader.write([last_words])
            reader.close()

    def is_over(self, after: int | None) -> bool:
        """Is nothing to come behind message number `after`?"""
        return self.is_ended and not (self._kept and self._kept[-1][0] > after)

    def event_id(self, number: int) -> bytes:
        """The id of an event; it names the stream."""
        return f"{self.name}-{number}".encode() if self.name else b""

    def _write(self, payload: list, number: int) -> None:
        self.last_read = max(self.last_read, number)
        self._reader.write(encode_event(payload, event_id=self.event_id(number)))

    def _keep(self, payload: bytes) -> None:
        self._kept.append((self.last_number, payload))
        size = self.held + EVENT_BYTES + len(payload)
        while len(self._kept) > KEPT_EVENTS or size > KEPT_BYTES and len(self._kept) > 1:
            size -= EVENT_BYTES + len(self._kept.popleft()[1])
        budget.set(self, size)

    def give(self) -> None:
        """Forgets the messages that it kept."""
        self.has_forgotten = True
        self._kept.clear()
        budget.set(self, 0)


class Question(Holder):
    """A request to a client, under an id of ours: a legacy server's, or the input that a modern one wants first."""

    # Not from 1: another proxy may have asked something in the same session, and no id may come twice there.
    _ids = itertools.count(int.from_bytes(os.urandom(5), "big"))

    def __init__(self, encode, on_response, message: Message | None = None):
        self.id = next(self._ids)
        self.encode = encode                     # makes the payload with an id for the client
        self._on_response = on_response          # called with the question and the client's response
        self.message = message                   # a legacy server's request
        self.call = None                         # the exchange that it belongs to, if there is one
        self.missing: dict | None = None         # what its client lacks to answer it
        self.client = None                       # the session that is asked,
        self.send = None                         # called with a payload that goes the way the question went,
        self.asked_at = float("inf")             # and when
        self.patience = float("inf")             # for how long, if it belongs to no call

    def hold(self, size: int, principal: object) -> None:
        """Counts its size for a principal while it is open."""
        self.principal = principal
        if size > SMALL:
            budget.set(self, size)

    def give(self) -> None:
        self.withdraw(try_later("too much is held for this client"))

    def respond(self, response: Message) -> None:
        """Takes the client's response, whatever its id."""
        self.leave_books()
        if self.call:
            self.call.touch()                          # its client shows that it is there
        self._on_response(self, response)

    def refuse(self, error: ProxyError) -> None:
        """Responds for the client, as if it had said so itself."""
        self.respond(parse_message(encode_error(b"0", error)[0].decode()))

    def withdraw(self, error: ProxyError) -> None:
        """Takes it back from the client, and answers it with this error."""
        self.take_back()
        self.refuse(error)

    def take_back(self, payload: list | None = None) -> None:
        """Tells the client that was asked, if one was, that there is nothing to answer any more."""
        if self.client:
            self.send(payload or [encode_request(None, "notifications/cancelled", {"requestId": self.id})])
        self.leave_books()

    def leave_books(self) -> None:
        """It is open no more: neither at the client nor at the exchange."""
        budget.set(self, 0)
        if self.client:
            self.client.questions.pop(self.id, None)
        if self.call:
            self.call.dialogue.questions.pop(str(self.id), None)


class Outlet:
    """Where the messages of an exchange go: into the answer to a POST, a session's stream, or stdout."""

    exchange: "Exchange | None" = None     # whose outlet it is, while that is on its way
    asks = False                           # can a question of the server's be sent this way, and be answered?
    is_heard = True                        # is somebody there now?
    patience = float("inf")                # after how long it is open()ed, if it can be, for an answer that takes long
    transport = ""                         # what the log calls it

    def open(self) -> None:
        """The answer becomes a stream, where it may be either."""

    def send(self, payload: list) -> None:
        """A message before the answer."""

    def finish(self, payload: list, status: int, headers: tuple = ()) -> None:
        """The answer, with a status and headers for where it becomes a reply of its own."""

    def close(self) -> None:
        """There will be no answer: the call was cancelled."""


# ============================================================================
# 29. What servers send
# ============================================================================
#
# What a server sends by itself, and to whom it goes. A message may say whose it is by the task or the elicitation that
# it names. Most do not, and stdio does not say to which call they belong; so they are a client's only while every
# running call that can have caused them is that client's. (Several calls of one client are not told apart.) Over HTTP,
# what comes on the stream of a call belongs to that call, and to nobody when it is over.
#
#     a question          to the newest of these calls that can be asked, if possible one whose client is there;
#                         without a call, to the one session there is, unless another client's call has just ended;
#                         otherwise it is refused. That fails a call only if no other can be the cause, never for roots
#     a log message       to the newest of them, if its client wants that level, or to that session; otherwise to nobody
#     an update           to those who subscribed to the resource, or to what it is a part of
#     a changed list      to all
#     progress            names its call, or a task's that was answered; what names none is dropped

KNOWN_OWNERS = 10_000            # tasks and elicitations of one instance whose owner is remembered
MAX_NAMED = 2 * 1024             # characters of the longest id that is remembered: what has a longer one is nobody's
LATE_SECONDS = 5                 # in which what a server says may be about a call that is over

# MCP 2025-11-25, Sampling and Elicitation, User Interaction Model: "nested inside other MCP server features".
MAY_CAUSE = frozenset({"tools/call", "prompts/get", "resources/read", "completion/complete"})

NOBODYS = RPCError("nothing says whose this is: calls of several clients are running, or none that can have caused it")


def unknown_task() -> RPCError:
    """A new one each time: an exception that is raised again and again keeps the frames of all that raised it."""
    return RPCError("the task is unknown", status=200, code=INVALID_PARAMS)


def no_tasks() -> RPCError:
    return RPCError("the client does not declare the tasks extension", code=MISSING_CAPABILITY, data={
        "requiredCapabilities": {"extensions": {TASKS_EXTENSION: {}}}})


def make_room_in(book: dict, limit: int, whose=lambda value: value) -> None:
    """If a book is full, forgets some of the oldest entries of those who have most, or at least half as many."""
    if len(book) < limit:
        return
    numbers = collections.Counter(map(whose, book.values()))
    most = max(numbers.values())
    oldest = (name for name, value in book.items() if 2 * numbers[whose(value)] >= most)
    for name in list(itertools.islice(oldest, 1 + limit // 100)):      # several at once, because counting takes long
        del book[name]


def state_key(state: str, name: object) -> str | bytes:
    """The key under which a requestState is kept, for the request that names this: servers may give the same one. Both
    as they are, or if they are long, a digest."""
    import hashlib
    state = f"{name}\n{state}"
    return state if len(state) <= MAX_NAMED else hashlib.sha256(state.encode("utf-8", "surrogatepass")).digest()


class Owners(dict[tuple[str, str], object]):
    """The identity of the client that owns each task and elicitation; None is that of a client that may be anybody:
    whoever knows the id may use it."""

    def __init__(self):
        super().__init__()
        self.old: set[tuple[str, str]] = set()       # from before the server's last start: it may use these ids again

    def remember(self, name: tuple[str, str] | None, client) -> None:
        if not (name and client) or len(name[1]) > MAX_NAMED:
            return
        if name[0] != "task" or self.get(name) is None or name in self.old:
            make_room_in(self, KNOWN_OWNERS)
            self[name] = client.owner
            self.old.discard(name)


def owner_named(message: Message) -> tuple[str, str] | None:
    """The task or the elicitation that a message says it is about. MCP 2025-11-25, Tasks, Associating Task-Related
    Messages; Elicitation, Completion Notifications."""
    params, related = message.params, members_of(message.meta.get(RELATED_TASK_KEY))
    # The task that it is for counts before the one that it is related to, which may be anything that a client likes.
    for kind, name in (("task", params.get("taskId")), ("task", related.get("taskId")),
                       ("elicitation", params.get("elicitationId"))):
        if isinstance(name, str):
            return kind, name
    return None


def find_owner(instance, connection: ServerConnection | None, message: Message, cause: PendingRequest | None) -> tuple:
    """Whose a message is, as (calls, session): one client's calls that may carry it, newest last; a session or None."""
    named = owner_named(message)
    owner = instance.owners.get(named) if named and (message.kind is NOTIFICATION or named[0] == "task") else None
    if cause and cause.client and owner in (None, cause.client.owner):       # it came on the stream of a client's call
        return [cause], None
    if named and (owner or message.kind is NOTIFICATION and not instance.is_single_user):         # it says whose it is
        session = instance.sessions.get(owner)
        return [call for call in session.calls.values() if call.is_running and call.instance is instance] if (
            session) else [], session
    # It came on the stream of a request, so it is about that (MCP 2025-11-25, Transports, Sending Messages). But that
    # one is the proxy's own, or over.
    if cause and not instance.is_single_user:
        return [], None
    if connection and connection.causes:                                     # running calls that can have caused it
        return connection.causes.of_one_client(), None
    # No such call is running: it may belong to one that waits for its client, or to the only session that there is.
    waiting = [call for call in connection.pending.values() if call.client] if connection else []
    parked = [call for call in waiting if call.is_parked]
    if len({call.asker for call in parked}) > 1 or not parked and len(instance.sessions) != 1:
        return [], None
    client = parked[0].client if parked else next(iter(instance.sessions.values()))
    if any((asker != hash(parked[0].asker) if parked else whose != client.identity)
           and instance.server.now() - when < LATE_SECONDS for asker, (whose, when) in instance.recent_callers.items()):
        return [], None                                              # it may be about that one's call
    return parked, client if not parked and all(call.client is client for call in waiting) else None


def ask_client(instance, connection: ServerConnection, message: Message, cause: PendingRequest | None) -> None:
    """Sampling, elicitation, roots: asks the client that it concerns."""
    if message.method == "ping":
        return connection.send_if_possible(encode_result(message.raw_id)[0])
    params = message.plain_params

    def missing(asked) -> dict | None:
        # A server that was told its client's own capabilities has to keep to them by itself.
        if not instance.knows_our_capabilities:
            return None
        return missing_capabilities(asked.capabilities, message.method, params)

    def on_response(question: Question, response: Message) -> None:
        if connection.questions.get(message.id) is question:
            del connection.questions[message.id]
            if told is not message:
                response = with_tasks(response, lambda task: task.removeprefix(f"{instance.server.name}__"))
            connection.send_if_possible(response.with_id(message.raw_id)[0], question.principal)

    # Who is asked: of the calls that it may belong to, the newest that can be, preferably one whose client is there.
    calls, session = find_owner(instance, connection, message, cause)
    able = (call for call in reversed(calls) if call.can_be_asked and not missing(call))
    call = max(able, key=lambda call: call.outlet.is_heard, default=None)
    if not call and len(calls) == 1 and message.method != "roots/list":     # many servers ask for roots by themselves
        call = calls[0]                          # it alone can be the cause, so it is told what it lacks
    client = call.client if call else session

    # What it is asked: tasks/get and the like name a task of the client's own, the rest may name one of the server's.
    told = outward(client, instance, message) if client and not message.method.startswith("tasks/") else message
    question = connection.questions[message.id] = Question(told.with_id, on_response, told)
    question.patience = instance.server.settings.request_timeout
    if connection.unasked.count <= LOGGED_QUESTIONS:
        log.info("> %(session)s %(method)s id=%(id)d, from the server", session=client.label if client else "-",
                 method=message.method, id=question.id)
    if client and not missing(call or client):
        instance.owners.remember(owner_named(message), client)

    if call and call.can_be_asked:
        call.ask(question, missing(call))
    elif session and not missing(session) and not (instance.server.is_for_all and message.method == "roots/list"):
        session.ask(question, session.stream.send)
    else:
        question.refuse(NO_CLIENT_CAN if session or calls else NOBODYS)


def drop_questions(connection: ServerConnection) -> None:
    """Takes all open questions back: the server that asked is gone, or has forgotten them."""
    questions, connection.questions = connection.questions, {}
    for question in questions.values():
        question.take_back()


def remember_named(call, response: Message) -> None:
    """Remembers the task or the elicitations that the response to a client's call names: they are its own."""
    result, client, instance = members_of(response.members.get("result")), call.client, call.instance
    for task in (members_of(result.get("task")), result if result.get("resultType") == "task" else {}):
        if isinstance(task.get("taskId"), str):
            instance.owners.remember(("task", task["taskId"]), client)
            if call.token and len(call.token) <= MAX_NAMED and client.is_session:
                make_room_in(call.connection.tokens, KNOWN_OWNERS, lambda known: known[0])
                call.connection.tokens[call.server_id] = client.id, call.token
    if not response.is_result and response.error_code == URL_ELICITATION_REQUIRED:
        named = members_of(members_of(response.members["error"]).get("data")).get("elicitations")
        for elicitation in map(members_of, named if isinstance(named, list) else ()):
            if isinstance(elicitation.get("elicitationId"), str):
                instance.owners.remember(("elicitation", elicitation["elicitationId"]), client)


def own_tasks(instance, client, response: Message) -> Message:
    """The response to tasks/list with the client's own tasks alone. MCP 2025-11-25, Tasks, Task Isolation and Access
    Control."""
    tasks = members_of(response.members.get("result")).get("tasks")
    if instance.is_single_user or not isinstance(tasks, list):
        return response
    ids = [members_of(task).get("taskId") for task in tasks]
    own = [text for name, text in zip(ids, split_array(response.raw("result", "tasks"), len(tasks)))
           if isinstance(name, str) and instance.owners.get(("task", name)) == client.identity]
    return with_member(response, f"[{','.join(own)}]", "result", "tasks")


def cut_task(message: Message, instance) -> Message:
    """The news of a task, with no more of its result than its server's limit."""
    limit = instance.server.max_result
    return cut_result(message, limit, ("params", "result")) if limit and message.method == TASK_CHANGED else message


def without_misused(page: ResponseLine | Message, server) -> ResponseLine | Message:
    """A page of a remote modern server's tools without those that a client of Streamable HTTP "MUST exclude"."""
    if isinstance(page, ResponseLine) and b'"x-mcp-header"' not in page.line:
        return page
    page = page.parsed()
    tools, kept = members_of(page.members.get("result")).get("tools"), []
    for text in split_array(page.raw("result", "tools"), len(tools)) if isinstance(tools, list) else ():
        tool = scan_plain(text, 0)[0] if '"x-mcp-header"' in text else None
        if not misuses_headers(member_at(tool, ("inputSchema",))):
            kept.append(text)
        elif is_first(server.misused, name := str(tool.get("name"))):
            log.warning("! server %(server)s: the tool %(name)s is left out, for its x-mcp-header is not valid",
                        server=server.name, name=name)
    if not isinstance(tools, list) or len(kept) == len(tools):
        return page
    return with_member(page, f"[{','.join(kept)}]", "result", "tools")


def pass_on(instance, message: Message, cause: PendingRequest | None = None) -> None:
    """Passes a notification on, unless its link is being replaced: then nobody knows its calls any more."""
    if instance.state == "ready" and instance.connection is None:
        return
    NOTIFICATION_ROUTES.get(message.method, _to_owner)(instance, message, cause)


def _to_all(instance, message: Message, cause: PendingRequest | None) -> None:
    for (method, _), kept in instance.lists.items():
        if message.method == f"notifications/{LISTS[method].capability}/list_changed":
            kept.is_old = True
    tell_all(instance, message)


def tell_all(instance, message: Message) -> None:
    """Tells all clients that a list changed. To other proxies it also says which proxies it came through, as a request
    does in a header: otherwise it would go round for ever in a circle of proxies."""
    if not instance.is_news(message.method if instance.is_crowded else message.payload[0]):
        return
    way = [one for one in strings_of(message.meta.get(WAY_KEY)) if PROXY_ID.fullmatch(one)][:MAX_WAY]
    kind = message.method.split("/")[1]
    plain = list_changed(kind) if way else message
    payload = plain.payload                    # one for all, though each may keep it

    def with_way(client) -> Message:
        return list_changed(kind, {"_meta": {WAY_KEY: [*way, client.mount.told_id]}})
    for session in list(instance.sessions.values()):
        if session.mount.told_id not in way and not session.listens:
            session.stream.send(with_way(session).payload if way_of(session.headers) else payload)
    for listener in list(instance.listeners):
        client = listener.client
        if client.mount.told_id not in way:
            listener.hear(with_way(client) if way_of(client.headers) else plain)


def tell_of_lists(instance) -> None:
    """Tells all clients that what its server lists may have changed."""
    for kind, _ in LIST_CHANGES.values():
        if kind in instance.identity.capabilities:
            _to_all(instance, list_changed(kind), None)


def _to_subscribers(instance, message: Message, cause: PendingRequest | None) -> None:
    uris = wholes_of(message.params.get("uri")) if instance.topics else ()
    topics = [instance.topics[uri] for uri in uris if uri in instance.topics]
    if instance.is_crowded and not instance.is_private:      # they are told of what they asked for, not of each part
        updates = [(resource_updated(topic.uri), set(topic.subscribers)) for topic in topics if instance.is_news(topic)]
    else:
        own = [one for one in instance.sessions.values() if not one.listens] if instance.is_private else ()
        subscribers = set(own).union(*(topic.subscribers for topic in topics))
        updates = [(message, subscribers)] if subscribers and instance.is_news(message.payload[0]) else []
    for update, subscribers in updates:
        payload = update.payload
        for subscriber in subscribers:
            if subscriber in instance.listeners:
                subscriber.hear(update)
            else:
                subscriber.stream.send(payload)


def _to_owner(instance, message: Message, cause: PendingRequest | None) -> None:
    calls, session = find_owner(instance, instance.connection, message, cause)
    owner = calls[-1] if calls else session
    if owner is None:
        log.debug("! server %(server)s: %(method)s goes to nobody, because nothing says whose it is",
                  server=instance.server.name, method=message.method)
    elif message.method != "notifications/message" or owner.wants_log(message.params.get("level"), instance):
        message = outward(owner if owner is session else owner.client, instance, message)
        (owner.stream.send if owner is session else owner.tell)(message.payload)


def outward(client, instance, message: Message) -> Message:
    """A message as a client gets it: where several servers are one, tasks have their server's name before their own."""
    if not client.view.is_joint:
        return message
    return with_tasks(message, lambda task: f"{instance.server.name}__{task}")


def _on_cancelled(instance, message: Message, cause: PendingRequest | None) -> None:
    """The server takes a question back: tells the client that was asked. Or it ends a subscription: MCP 2026-07-28,
    Cancellation, has it do so over stdio, where a response may be missing."""
    request_id, connection = message.params.get("requestId"), instance.connection
    if not (connection and is_id(request_id)):
        return
    listen = connection.pending.get(as_own_id(request_id))
    if listen and listen.is_endless:
        return connection.link.on_line(*encode_end_of_subscription(b"%d" % as_own_id(request_id)))
    question = connection.questions.pop(request_id, None)
    if question:
        question.take_back([message.with_text(str(question.id), "params", "requestId")])


def _to_owner_of_task(instance, message: Message, cause: PendingRequest | None) -> None:
    """Progress of a task whose call has ended. MCP 2025-11-25, Progress: it goes on with the token of the call."""
    token, connection = message.params.get("progressToken"), instance.connection
    name, own = connection and is_id(token) and connection.tokens.get(as_own_id(token)) or (None, "")
    session = instance.sessions.get(name)
    if session:
        session.stream.send([outward(session, instance, message).with_text(own, "params", "progressToken")])


# To route another notification, add a row; what is not here goes where a log message goes.
NOTIFICATION_ROUTES = {
    "notifications/cancelled": _on_cancelled,
    "notifications/progress": _to_owner_of_task,
    RESOURCE_UPDATED: _to_subscribers,
    **{method: _to_all for _, method in LIST_CHANGES.values()},
}


# ============================================================================
# 30. Subscriptions
# ============================================================================
#
# Many clients of one instance look like one to its server. So the first who subscribes to a resource makes the proxy
# ask the server, under a request of its own that no client can cancel, and all who wait are told what the server says
# to that; the last who leaves makes it take the subscription back. A legacy server is asked for each resource, here; a
# modern one for all at once, see the next section.

ASK_PAUSE = 30.0                 # seconds until a legacy server that did not answer is asked for a resource again; and
                                 # for a modern one to acknowledge a listen, and then to answer a ping
TAKE_BACK_SECONDS = 5.0          # for a remote server to answer an unsubscribe
TOPIC_BYTES = 1_000              # that a subscription takes beside its URI
MAX_TAKEN_BACK = 2_000           # unsubscribes that the server has yet to answer; past that it is asked for nothing new

REFUSED = RPCError("the MCP server refused the subscription", status=200, code=INVALID_PARAMS)


class Topic:
    """A resource that clients of an instance are told of: who they are, and what the server said when it was asked."""

    def __init__(self, instance, uri: str):
        self.instance = instance
        self.uri = uri
        self.subscribers: set = set()          # sessions, and exchanges that listen; each has it in its `topics`
        self.told: set = set()                 # those among them that were told that they have it
        self.asking: list = []                 # the exchanges of sessions that wait to be told
        self.verdict: asyncio.Future[ProxyError | None] = asyncio.get_running_loop().create_future()
        self.is_put_off = False                # see Listening._put_off()

    def drop(self, subscriber) -> None:
        self.subscribers.discard(subscriber)
        self.told.discard(subscriber)
        if self in subscriber.topics:
            subscriber.topics.discard(self)
            budget.set(subscriber, max(0, subscriber.held - TOPIC_BYTES - len(self.uri)))


class Topics(dict[str, Topic]):
    """The resources that clients of an instance are told of, by URI."""

    def __init__(self, instance):
        super().__init__()
        self.instance = instance
        self._taken_back = weakref.WeakValueDictionary()         # URI -> its unsubscribe, until that is answered; and
        self._unanswered: collections.Counter = collections.Counter()          # by principal, how many there are

    def subscribe(self, subscriber, uri: str, is_told: bool = False) -> Topic:
        """Takes a session, or an exchange that listens, among those who are told of a resource; if it is the first, the
        server is asked. `is_told`: it had the resource at another server."""
        if len(uri) > MAX_URI:
            raise RPCError("the URI is too long", code=INVALID_PARAMS)
        topic, is_first = self.get(uri), uri not in self
        unanswered, whose = self._unanswered, subscriber.principal
        if is_first and not is_told and unanswered.total() >= MAX_TAKEN_BACK and (
                unanswered[whose] >= MAX_TAKEN_BACK / len({whose, *unanswered})):
            raise try_later("the MCP server has not answered earlier unsubscribes yet")
        if is_first:
            topic = self[uri] = Topic(self.instance, uri)
        if subscriber not in topic.subscribers:
            topic.subscribers.add(subscriber)
            subscriber.topics.add(topic)
            budget.set(subscriber, subscriber.held + TOPIC_BYTES + len(uri))
        if is_told:
            topic.told.add(subscriber)
        if is_first:
            if self.instance.listening:
                self.instance.listening.renew()
            elif self.instance.connection:
                self.ask(topic)                # last: if it cannot be sent, all of the above is taken back
        return topic

    def ask(self, topic: Topic) -> None:
        """Asks a legacy server for a resource. A remote one may take two requests in either order, so if a subscription
        to the same one is being taken back, it first has to answer that."""
        def on_response(response: asyncio.Future) -> None:
            error = response.exception()
            if not error and not response.result().is_result:
                said = response.result().value("error")
                error = RPCError(str(said.get("message") or REFUSED), status=200, data=said.get("data"),
                                 code=response.result().error_code or INVALID_PARAMS)
            self.settle(topic, error)
            if isinstance(error, ServerError) and self.get(topic.uri) is topic:        # it may have been slow, once
                asyncio.get_running_loop().call_later(ASK_PAUSE, ask_again)

        def ask_again() -> None:
            if self.get(topic.uri) is topic and self.instance.connection is connection:
                self.ask(topic)
        connection, before = self.instance.connection, self._taken_back.get(topic.uri)
        if before and not before.response.done() and connection.link.is_remote:
            async def wait() -> None:
                await asyncio.wait([before.response], timeout=TAKE_BACK_SECONDS)
                self._taken_back.pop(topic.uri, None)
                ask_again()
            asyncio.ensure_future(wait())
            return
        connection.has_served = True
        connection.request("resources/subscribe", {"uri": topic.uri}, on_response)

    def settle(self, topic: Topic, error: ProxyError | None) -> None:
        """The server took or refused a subscription. A refused one (RPCError) ends, also when it is refused after a
        restart; one that it did not live to answer is asked for again, if clients were told that they have it."""
        is_new = not topic.verdict.done()
        if is_new:
            topic.verdict.set_result(error)
        if not error or self.get(topic.uri) is not topic:
            return
        leaving = list(topic.subscribers)
        if isinstance(error, RPCError) or is_new and not topic.told:
            del self[topic.uri]
        else:
            leaving = [one.client for one in topic.asking if is_new and one.client not in topic.told]
            if is_new:                         # who comes from now on waits for what the next server says
                topic.verdict = asyncio.get_running_loop().create_future()
        for subscriber in leaving:
            was_told = subscriber in topic.told
            topic.drop(subscriber)
            if was_told and subscriber in self.instance.listeners:
                subscriber.lose(topic.uri)

    def unsubscribe(self, subscriber, topic: Topic) -> None:
        """Takes a subscriber out; after the last one the server is told."""
        topic.drop(subscriber)
        if not topic.subscribers and self.get(topic.uri) is topic:
            del self[topic.uri]
            self.settle(topic, None)           # for who still waits: the next request may not name it any more
            if self.instance.listening:
                self.instance.listening.renew()
            elif self.instance.connection:
                one = collections.Counter([subscriber.principal])
                self._unanswered += one
                self._taken_back[topic.uri] = self.instance.connection.request(
                    "resources/unsubscribe", {"uri": topic.uri}, functools.partial(self._on_taken_back, one))

    def _on_taken_back(self, one: collections.Counter, response: asyncio.Future) -> None:
        self._unanswered -= one                # which forgets whoever has none left

    def leave(self, subscriber) -> None:
        for topic in [topic for topic in subscriber.topics if topic.instance is self.instance]:
            self.unsubscribe(subscriber, topic)


# ============================================================================
# 31. Listening
# ============================================================================
#
# A modern server gets one `subscriptions/listen` for all resources and lists, and another when more or less is wanted.
# What follows when one of them ends or fails depends on which it was. (The names are those of Listening.)
#
#     _taken_back   is answered nonetheless      all is asked for anew, when _current has been taken back, too, and its
#                                                answer has come; so it is the next time
#     _current      ends                         it is asked for again after a pause, unless _next asks for it already
#     _next         is refused, or is not        what is new in it is to blame: two to ONE_BY_ONE are asked for again,
#                   acknowledged in time         one after the other; more, or one alone, are refused. Without any,
#                                                _current goes on; if there is none, it is as if that had ended, but a
#                                                process that never took anything is taken to tell of no lists
#                   fails beside _current        likewise, but one that clients were told that they have is put off
#                   fails while nobody listens   after a pause, lists and what was taken before are asked for alone;
#                                                where there are none, each that is new in turn: one at which a server
#                                                still answers with an HTTP error after half a minute is to blame

LISTEN_PAUSE, LONGEST_LISTEN_PAUSE = 1.0, 30.0       # seconds until a server that ended a listen is asked again
ONE_BY_ONE = 100                 # new resources that are asked for one by one when a server refused them together
MOST_TAKEN_BACK = 20             # listens that a process may still answer
CATCH_UP_SECONDS = 30.0          # in which clients are told once at the most that they may have missed a change


class ListenRequest(PendingRequest):
    """One `subscriptions/listen` at a modern server."""

    is_endless = True
    is_waited_for = False            # is it taken back to make room for the next, which waits for its answer?

    def __init__(self, listening: "Listening", topics: list[Topic]):
        self.listening = listening
        self.topics = topics
        self.new_count = sum(not topic.verdict.done() for topic in topics)
        self.server_id: int | None = None

    def on_event(self, message: Message) -> None:
        if message.method == "notifications/subscriptions/acknowledged":
            taken = message.plain_params.get("notifications")
            return self.listening.on_acknowledged(self, taken if isinstance(taken, dict) else {})
        if self.listening.is_heard_twice(self):
            return
        # The id of the subscription is the proxy's own business.
        line = message.changed(restated_meta(message, {}, keeps_envelope=False))
        pass_on(self.listening.instance, parse_message(line.decode()))

    def on_response(self, response: ResponseLine | Message) -> None:
        self.listening.on_ended(self, REFUSED)

    def on_failure(self, error: ServerError) -> None:
        self.listening.on_ended(self, error)


class Listening:
    """What an instance listens for, by at most one request in each of the first two of these states:

        _next         is sent, and not acknowledged yet; what is wanted anew waits until it is
        _current      is acknowledged, and heard
        _taken_back   was heard until the next one took its place; it may still be answered, and so may those before

    The current one goes on until the next one is acknowledged, or what happens in between would be missed; but it ends
    first at a server that keeps only one."""

    def __init__(self, instance):
        self.instance = instance
        self._current: ListenRequest | None = None
        self._next: ListenRequest | None = None
        self._taken_back: list[ListenRequest] = []             # the last few, each of which a process may still answer
        self._answers_late = False             # did the server answer one that was taken back?
        self._patience = LISTEN_PAUSE          # for that answer, doubling when it came too late
        self._one_by_one = False               # was one refused that asked for several new resources?
        self._is_doubted = False               # did one fail that asked for new ones, while nobody listened?
        self.refused: set[str] = set()         # of LIST_CHANGES, those that the server does not tell of;
        self.has_said = asyncio.get_running_loop().create_future()       # did it say so once?
        self._is_outdated = False              # did what is wanted change after the next one was sent?
        self._was_deaf = False                 # did a request end before another one took its place?
        self._heard_since = 0.0                # when the current one was acknowledged
        self._pause = LISTEN_PAUSE             # until the next, doubling while they are refused, or end at once
        self._gaps = 0                         # times when nobody listened
        self._asking_again = self._catching_up = self._giving_up = self._trying = None          # timers
        self._tried, self._trial_pause = None, LISTEN_PAUSE          # see _put_off()
        for topic in instance.topics.values():
            topic.is_put_off = False           # the server before failed at it
        self._caught_up_at = -CATCH_UP_SECONDS

    @property
    def hearing(self) -> int | None:
        """The same as a link's."""
        return self._gaps if self._current else None

    def is_heard_twice(self, request: ListenRequest) -> bool:
        """Does what comes on a request come on the one in its place, too?"""
        return request in self._taken_back and (self._current is not None or request is not self._taken_back[-1])

    def renew(self) -> None:
        """Asks for what is wanted, once for all that changes in a turn."""
        self._is_outdated = True
        at_end_of_turn(self._ask)

    def _ask(self) -> None:
        """Asks anew if something else is wanted now, and the server has answered what it was asked last."""
        instance = self.instance
        if not self._is_outdated or self._next or instance.listening is not self:
            return                             # as mostly: this is called for each topic that comes or goes in a turn
        topics = [topic for topic in instance.topics.values() if not topic.is_put_off]
        if self._answers_late and self._current:
            current, self._current, self._was_deaf, self._answers_late = self._current, None, True, False
            current.is_waited_for = True
            self._take_back(current)
            return self._ask_in(self._patience)          # or as soon as it is answered
        new = [topic for topic in topics if not topic.verdict.done()]
        self._is_outdated = self._one_by_one = self._one_by_one and len(new) > 1
        if self._one_by_one:                   # for the server did not say which it refuses
            topics = [topic for topic in topics if topic is new[0] or topic.verdict.done()]
        if self._is_doubted and new and not self._current:           # it may fail at these: first what it took before
            topics, self._is_outdated = [topic for topic in topics if topic.verdict.done()], True
            if not topics and not any(instance.identity.supported(dict.fromkeys(LIST_CHANGES, True)).values()):
                topics = new[:1]               # or, if that is nothing, at each of these in turn
                instance.topics[new[0].uri] = instance.topics.pop(new[0].uri)
        wanted = {**dict.fromkeys(LIST_CHANGES, True), "resourceSubscriptions": [topic.uri for topic in topics]}
        supported = instance.identity.supported(wanted)
        if "resourceSubscriptions" not in supported:
            for topic in topics:
                instance.topics.settle(topic, RPCError("the server has no subscriptions", status=200,
                                                       code=METHOD_NOT_FOUND))
        if any(supported.values()):
            self._next = request = ListenRequest(self, topics)
            self._give_up_later(request)
            request.server_id = instance.connection.send_request(
                request, "subscriptions/listen", {"notifications": supported})
        elif self._current:
            current, self._current = self._current, None
            instance.connection.cancel(current.server_id, "nobody listens")

    def _give_up_later(self, request: ListenRequest, ping: asyncio.Future | None = None) -> None:
        self._giving_up = asyncio.get_running_loop().call_later(ASK_PAUSE, self._give_up, request, ping)

    def _give_up(self, request: ListenRequest, ping: asyncio.Future | None) -> None:
        """The server has not acknowledged it: a refusal, if nothing is heard meanwhile or something new waits."""
        if self.instance.listening is not self:
            return
        connection, topics = self.instance.connection, self.instance.topics.values()
        if ping is None or ping.done() and ping.exception():
            ping = connection.ping()           # a server that is just busy does not answer this either
        is_deaf = self._was_deaf or bool(request.topics) and self._current is None         # since a restart
        if not ping.done() or not is_deaf and all(topic.verdict.done() for topic in topics):
            self._give_up_later(request, ping)
        else:
            connection.cancel(request.server_id, "timed out")
            self.on_ended(request, REFUSED)

    def _learn(self, refused: set[str]) -> None:
        self.refused = refused
        if not self.has_said.done():
            self.has_said.set_result(None)

    def on_acknowledged(self, request: ListenRequest, taken: dict) -> None:
        """The server takes these subscriptions; the others it has refused."""
        if request is not self._next:
            return
        self._giving_up.cancel()
        before, self._current, self._next = self._current, request, None
        self._gaps += not before
        if before:
            self._take_back(before)
        if self._was_deaf and not self._catching_up:
            self._catching_up = asyncio.get_running_loop().call_later(
                max(0, self._caught_up_at + CATCH_UP_SECONDS - self.instance.server.now()), self._catch_up)
        self._was_deaf, self._is_doubted, self._heard_since = False, False, self.instance.server.now()
        self._learn({name for name in LIST_CHANGES if taken.get(name) is not True})
        uris = set(strings_of(taken.get("resourceSubscriptions")))
        for topic in request.topics:
            self.instance.topics.settle(topic, None if topic.uri in uris else REFUSED)
        if self._tried in request.topics:      # what it failed at works now: so may the rest
            self._tried, self._trial_pause = None, LISTEN_PAUSE
            for topic in self.instance.topics.values():
                self._is_outdated, topic.is_put_off = self._is_outdated or topic.is_put_off, False
        self._ask()

    def _take_back(self, request: ListenRequest) -> None:
        """Another one takes its place. From a process, it is seen whether it is answered nonetheless."""
        connection = self.instance.connection
        if connection.link.is_remote:
            return connection.cancel(request.server_id, "replaced")
        self._taken_back.append(request)
        if len(self._taken_back) > MOST_TAKEN_BACK:
            connection.pending.pop(self._taken_back.pop(0).server_id, None)
        connection.send_if_possible(encode_request(None, "notifications/cancelled", {
            "requestId": request.server_id, "reason": "replaced"}))

    def _catch_up(self) -> None:
        """Tells clients that all may have changed: nobody listened, and a remote server may even be another one now."""
        self._catching_up, self._caught_up_at = None, self.instance.server.now()
        if self.instance.listening is self:
            tell_of_lists(self.instance)
            for uri in list(self.instance.topics):
                pass_on(self.instance, resource_updated(uri))

    def _ask_in(self, seconds: float) -> None:
        if self._asking_again:                 # one timer is enough: who subscribed meanwhile did not wait for it
            self._asking_again.cancel()
        self._asking_again = asyncio.get_running_loop().call_later(seconds, self._ask)

    def on_ended(self, request: ListenRequest, error: ProxyError) -> None:
        """The server ended a request, or it failed."""
        status, is_current = member_at(error.data, ("status",)) or 0, request is self._current
        is_refused = not isinstance(error, ServerError) or 400 <= status < 500 and status not in PASSING
        # While the one before goes on, what is new in the next one is what the server fails at. Where none goes on, a
        # single resource that is asked for alone is, once the server has failed for half a minute.
        is_alone = self._is_doubted and self._pause == LONGEST_LISTEN_PAUSE and (
            len(request.topics) == request.new_count == 1)
        is_blamed = is_refused or request is self._next and (is_alone or self._current is not None)
        if request in self._taken_back:
            return self._on_late_end(request)
        if is_current:
            self._current, self._was_deaf = None, True
            if self.instance.server.now() - self._heard_since >= LISTEN_PAUSE:
                self._pause = LISTEN_PAUSE
            if self._next:                     # which asks for all of it
                return
        else:
            self._next = None
            self._giving_up.cancel()
            is_alive = self.instance.listening is self
            self._is_doubted = not is_blamed and (
                self._is_doubted or not all(topic.verdict.done() for topic in request.topics))
            if (is_blamed or not is_alive) and not (self._refuse(request, error, is_refused) and is_alive):
                return self._ask()
        self._is_outdated, self._was_deaf = True, self._current is None      # one may fail while the other goes on
        wanted = dict(error.headers).get("Retry-After", "")          # RFC 9110 §10.2.3; a date is not looked at
        pause = min(RESUME_MOST, int(wanted)) if re.fullmatch("[0-9]{1,9}", wanted) else 0
        self._ask_in(max(self._pause, pause))
        has_answered = is_current or status or is_blamed
        self._pause = min(LONGEST_LISTEN_PAUSE, 2 * self._pause) if has_answered else LISTEN_PAUSE

    def _on_late_end(self, request: ListenRequest) -> None:
        """One that was taken back is answered nonetheless. Go's SDK 1.8 does so, and by then has forgotten what the
        next one asked for, if that came before."""
        if request.is_waited_for and (self._next or self._current):
            self._patience = min(LONGEST_LISTEN_PAUSE, 2 * self._patience)
        self._taken_back.remove(request)
        self._answers_late = self._is_outdated = True
        if self._current or request.is_waited_for:
            self._ask()

    def _refuse(self, request: ListenRequest, error: ProxyError, is_refused: bool) -> bool:
        """Refuses what is new in a request that the server refused, or failed at. True if it is to be sent again later:
        nothing was new, nobody listens now, and what was taken before, or a gateway, may just need time."""
        new, is_alive = [topic for topic in request.topics if not topic.verdict.done()], self.instance.listening is self
        # Even a single new one may have been refused because of another, whose clients have left meanwhile.
        self._one_by_one = request.new_count > 1 and 0 < len(new) <= ONE_BY_ONE and is_alive
        for topic in () if self._one_by_one else new:
            puts_off = topic.told and not is_refused and is_alive
            self.instance.topics.settle(topic, error.as_refusal() if is_alive and not puts_off else error)
            if puts_off:
                self._put_off(topic)
        # Asks without them: Go's SDK forgets at this end, too, what was listened to before.
        self._is_outdated = self._is_outdated or bool(new)
        is_deaf = self._was_deaf or any(topic.verdict.done() for topic in self.instance.topics.values())
        if not (new or self._current or is_deaf):
            self._learn(set(LIST_CHANGES))
            is_deaf = member_at(error.data, ("status",)) is not None         # a gateway may have said that for a moment
        return is_deaf and not (new or self._current)

    def _put_off(self, topic: Topic) -> None:
        """Asks for it again after a while: this server just failed at it, and clients were told that they have it."""
        topic.is_put_off = True
        if not self._trying:
            self._trying = asyncio.get_running_loop().call_later(self._trial_pause, self._try_one)
            self._trial_pause = min(LONGEST_LISTEN_PAUSE, 2 * self._trial_pause)

    def _try_one(self) -> None:
        self._trying, topics = None, self.instance.topics
        rest = [topic for topic in topics.values() if topic.is_put_off]
        if rest and self.instance.listening is self:
            self._tried, rest[0].is_put_off = rest[0], False
            topics[rest[0].uri] = topics.pop(rest[0].uri)          # they take turns
            for topic in rest[1:2]:
                self._put_off(topic)                               # the next turn
            self.renew()


# ============================================================================
# 32. Lists
# ============================================================================
#
# The proxy reads a server's lists whole and keeps them, for all requests that it answers itself. (A list request to one
# server that is shown as it is goes there, see new_exchange().) Whoever was answered without a list is told later.

MAX_TTL_MS = 86_400_000          # for which a list is said to be good
MAX_PAGES = 100                  # of a list; a server that always has one more is read no further
RELIST_SECONDS = 1.5             # for a server to list something again; then what it listed before is used
KEPT_SECONDS = 5.0               # before a server is asked for what it did not list, or again if it tells of no changes
LONGEST_RELIST_PAUSE = 300.0     # before it is asked again for what it fails to list; at first KEPT_SECONDS, doubling


class Items(dict):
    """What a server lists of one kind, as json.loads() would give it, by name or URI."""

    def __init__(self, method: str, now: float):
        super().__init__()
        self.method = method
        self.asked_at = now
        self.hearing: int | None = None            # as KeptList's was then
        self.size = 0                              # characters
        self.texts: dict[str, str] = {}            # as the server wrote them
        self.mirrored: dict[str, dict] = {}        # the arguments of tools that are repeated in Mcp-Param-* headers
        self.ttl_ms, self.is_public = MAX_TTL_MS, True         # for how long and for whom it may be kept
        self._shown: dict[tuple, tuple] = {}       # by (name of a configuration, is_joint): that, and its shown()

    def add(self, page: Message) -> None:
        member, key, _ = PAGED[self.method]
        result = members_of(page.members["result"])
        items, ttl = result.get(member), result.get("ttlMs")
        self.ttl_ms = min(self.ttl_ms, MAX_TTL_MS, ttl if isinstance(ttl, (int, float)) and ttl > 0 else 0)
        self.is_public = self.is_public and result.get("cacheScope") == "public"
        for text in split_array(page.raw("result", member), len(items)) if isinstance(items, list) else ():
            item = scan_plain(text, 0)[0]
            if not (isinstance(item, dict) and isinstance(item.get(key), str)):
                continue
            if item[key] in self:
                log.debug("! %(kind)s: %(name)s is listed twice; the first counts", kind=member, name=item[key])
                continue
            self[item[key]], self.texts[item[key]] = item, text
            self.size += len(text)
            if member == "tools":
                with contextlib.suppress(RecursionError):          # a schema like that spoils its own tool alone
                    self.mirrored[item[key]] = mirrored_parameters(item.get("inputSchema"))

    def shown(self, config: ServerConfig, is_joint: bool) -> dict[str, ShownItem]:
        """The same as clients see it, by the name that is shown."""
        known_for, shown = self._shown.get((config.name, is_joint), (None, {}))
        if known_for is config:
            return shown
        shown = {}
        for own, text in self.texts.items():
            name = config.shown_as(own, self.method, is_joint)
            if name is None or name in shown or self.method == "tools/list" and (
                    config.rules.own(config.rules.shown(own)) != own):         # another one was renamed to this
                continue
            if self.method == "tools/list" and (own in config.rules.overrides or config.rules.max_result_kb):
                text = config.rules.restated(JSONObject(text), own, name)
            elif name != own:
                item = JSONObject(text)
                text = item.with_text(dump(name), "name").decode()
            shown[name] = ShownItem(config, own, text)
        self._shown[config.name, is_joint] = config, shown
        return shown


class KeptList:
    """What a server listed of one kind, kept until it says that it changed; or for a while, if it never says so. There
    is one for each `way` (see way_of()), because a remote proxy does not list to others what it has from them.

        is_old       it changed, as the server says, or may have, as after a restart: whoever asks waits a moment for
                     the new one, and then gets the last
        is_missed    somebody was answered without it: it is asked for in tick(), and when it is there, all are told
        _in_use      the texts of one that is in use though it was asked for again, or that failed, or it changed
                     meanwhile, or though its server's process ended: likewise, but they are told only if it is another
    """

    def __init__(self, instance, method: str, way: str):
        self.instance, self.method, self.way = instance, method, way
        self.is_old = self.is_missed = False
        self._in_use: dict[str, str] | None = None
        self._asked_at, self._pause = instance.server.now(), KEPT_SECONDS         # until it is asked for, while missed
        self.last: Items | None = None             # what it listed last, though it may have changed since
        self.listing: asyncio.Task | None = None             # while the server lists it

    async def get(self, refresh: bool = False) -> Items:
        """The items. With `refresh` they are asked for again, unless that was done a moment ago: the caller wants one
        that is not among them. If the server does not answer soon, the last ones are used."""
        items, now = self.last, self.instance.server.now()
        if self.fresh is None or refresh and now - items.asked_at >= KEPT_SECONDS:
            listing = self._ask(now)
            patience = None if items is None else max(0, self._asked_at + RELIST_SECONDS - now)
            await asyncio.wait([listing], timeout=patience)
            if self.last is None:
                listing.result()                   # which raises what went wrong
            if not listing.done():
                self._in_use = self.last.texts
        return self.last

    def follow(self, before: "KeptList") -> None:
        """Its instance is in the place of that one's, which has ended."""
        self.is_missed = self.is_missed or before.is_missed
        self._in_use = before.last.texts if before.last else before._in_use

    def _ask(self, now: float) -> asyncio.Task:
        if self.listing is None:
            self.listing, self._asked_at = asyncio.get_running_loop().create_task(self._list()), now
            self.listing.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self.listing

    def tick(self, now: float) -> None:
        """Called now and then: asks for what somebody was given an answer without; less often the longer it is so."""
        if (self.is_missed or self._in_use is not None) and not self.listing and now - self._asked_at >= self._pause:
            self._pause = min(LONGEST_RELIST_PAUSE, 2 * self._pause)
            self._ask(now)

    @property
    def known(self) -> Items | None:
        """The items, also while they are asked for again; None when they would have to be asked for first."""
        return None if self.is_old and not self.listing else self.last

    @property
    def fresh(self) -> Items | None:
        """The items if they are what the server would say now."""
        if self.is_old or self.last is None:
            return None
        path, heard = (LISTS[self.method].capability, "listChanged"), self.last.hearing
        if member_at(self.instance.identity.capabilities, path) is True and (
                self.instance.connection is None or heard is not None and heard == self._hearing):
            return self.last                       # the server would have said if it changed since
        age = self.instance.server.now() - self.last.asked_at
        return self.last if age < max(KEPT_SECONDS, self.last.ttl_ms / 1000) else None

    @property
    def _hearing(self) -> int | None:
        """None while nobody would hear that the list changed; otherwise a number. While that is the same, nothing was
        missed."""
        listening = self.instance.listening
        if listening and f"{PAGED[self.method].capability}ListChanged" in listening.refused:
            return None
        return (listening or self.instance.connection.link).hearing

    async def _list(self) -> None:
        if self.is_old and self.last:              # who else asks meanwhile waits for the new one
            self.last.asked_at, self.last.hearing = float("-inf"), None
        self.is_old = False
        try:
            items = await self.read()
            is_missed = self.is_missed or self._in_use not in (None, items.texts)
            self.last, self.is_missed = items, False
            self._in_use = items.texts if self.is_old else None            # it changed meanwhile, maybe
            if self.method == "tools/list":
                self.instance.server.learn_tools(items)
                self.instance.server.check_rules(items)
            kind, self._pause = LISTS[self.method].capability, self._pause if self.is_old else KEPT_SECONDS
            if is_missed and f"{kind}ListChanged" in LIST_CHANGES:
                items.asked_at = self.instance.server.now()        # whoever is told asks now, and shall get this
                tell_all(self.instance, list_changed(kind))
        except ServerError as error:
            if self.last is None or self.instance.state == "closed":
                raise
            log.warning("! server %(server)s: %(reason)s; what it listed before is used",
                        server=self.instance.server.name, reason=str(error))
            self.last.asked_at, self.last.hearing = self.instance.server.now(), None
            self.last.ttl_ms, self._in_use = 0, self.last.texts            # the ttl was said of an older answer
        finally:
            self.listing = None

    async def read(self) -> Items:
        """Reads all pages."""
        connection, items = await self.instance.ready(), Items(self.method, self.instance.server.now())
        items.hearing = self._hearing
        cursor, seen, (kind, _, capability) = None, set(), PAGED[self.method]
        if self.method != "tools/list" and not self.instance.identity.has(capability):
            return items
        for _ in range(MAX_PAGES):
            params = None if cursor is None else {"cursor": cursor}
            page = await connection.request(self.method, params, way=self.way).response
            if not isinstance(page.members.get("result"), tuple):
                if not page.is_result and page.error_code == METHOD_NOT_FOUND:
                    return items                # it has none
                said = members_of(page.members.get("error")).get("message")
                raise ServerError(f"the MCP server does not list its {kind}{f': {said}' if said else ''}")
            if self.method == "tools/list" and connection.mirrors:
                page = without_misused(page, self.instance.server)
            items.add(page)
            cursor = next_cursor(page, connection.era, seen)
            if cursor is None:
                return items
            if items.size > MAX_QUEUED_BYTES:
                break
        log.warning("! server %(server)s lists %(kind)s without end; the first %(number)d are used",
                    server=self.instance.server.name, kind=kind, number=len(items))
        return items


# ============================================================================
# 33. Instances
# ============================================================================
#
# An instance keeps a server running through one link after another, and sets each new one up as its clients need it.
# The hard part is that many clients look like one to the server, and that none of them may notice the others.
#
#     owner                        who uses it                                   is_private   is_single_user
#     ()                           all clients, in shared mode                   no           no
#     (caller, name, variables)    visitors that are the same user               no           with a key or variables
#     a Session                    that session; it ends with its link           yes          yes
#     the instance itself          nobody: it is a spare for a new session       yes          yes
#
#     NEW --> STARTING --> READY
#                ^  |        |
#                |  v        |
#                PAUSED <----+      (any of them --> CLOSED)

RESTART_DELAY = 0.1              # seconds, doubling with each death in the last minute; of a remote server times 4
DEATHS_IN_A_MINUTE = 5           # after so many, a server starts only for a request, and now and then for subscribers
SILENCES, PING_SECONDS = 3, 5.0  # time-outs of a silent server, after which it is pinged; seconds for it to answer that
UNASKED_LEVEL = "info"           # of log messages for who asked for none: when others did, and at modern servers
LEVEL_SECONDS = 60.0             # for which a level that a modern request asked for is remembered
KNOWN_WAYS = 16                  # see way_of(): of those who wait for a start; and those that lists are kept for
FAR_PAUSE = 30.0                 # the longest until a server is tried again that is remote or has subscribers
TOLD_A_TURN = 10_000             # messages to all clients together in a turn; then those of one kind become one
SLOW_START = 10.0                # seconds, after each of which the log says what a start waits for

NEW, STARTING, READY, PAUSED, CLOSED = InstanceState = enum.StrEnum("InstanceState", "NEW STARTING READY PAUSED CLOSED")
INSTANCE_STATES = {
    NEW: {STARTING, CLOSED}, STARTING: {READY, PAUSED, CLOSED}, READY: {PAUSED, CLOSED}, PAUSED: {STARTING, CLOSED},
    CLOSED: set()}


class Instance:
    """A server kept running through one link after another, and the clients that use it."""

    def __init__(self, server, owner: object, variables: dict[str, str], principal: object):
        self.server, self.variables = server, variables
        self.owner = owner
        self.principal = principal                  # to whose account it goes
        self.redact = redactor(variables.values())
        self.state, self.since = NEW, server.now()          # and since when
        self.sessions: dict[str, object] = {}       # that use it, by id
        self.listeners: set = set()                 # exchanges of modern clients, for which the proxy itself listens
        self.topics = Topics(self)
        self.owners = Owners()
        self.recent_callers: dict[int, tuple] = {}   # by asker's hash, the last two whose call ended: (identity, when)
        self.identity: Identity | None = None
        self.tries_legacy_first = False             # because it died when it was last asked in legacy
        self.knows_our_capabilities = True          # a legacy server knows the proxy's capabilities, not its client's
        self.log_level: str | None = None           # that is wanted of it: a legacy server was told it
        self.connection: ServerConnection | None = None       # while READY
        self.listening: Listening | None = None     # at a modern server
        self.last_used = server.now()               # -inf: its key is gone or means something else now
        self._asked_levels: dict[str, float] = {}   # that modern requests asked for, and when one did last
        self.levels: collections.Counter = collections.Counter()        # how many sessions asked for each, or for none
        self.lists: dict[tuple[str, str], KeptList] = {}     # by method, and by way for who comes through other proxies
        self.is_missed = False                      # was somebody given an answer without this server?
        self.failures, self.counted_at = 0, 0.0     # of a group's calls in a row, and when one was counted
        self.failure: ServerError | None = None     # why the last start failed, if it did
        self._said: set = set()                     # to all clients, in this turn
        self._started: asyncio.Future[ServerError | None] = asyncio.get_running_loop().create_future()
        self._wanted = asyncio.Event()              # somebody waits for the server
        self._deaths: collections.deque[float] = collections.deque(maxlen=DEATHS_IN_A_MINUTE)
        self._runner: asyncio.Task | None = None
        self.link = Link()                          # the last one that was started
        self._told_slow = 0                         # how often the log said that it is still starting
        self._ways: set[str] = set()                # of those that wait for it through other proxies

    @property
    def is_private(self) -> bool:
        """Is it one session's own, or will it be? Then it ends with its link."""
        return not isinstance(self.owner, tuple)

    @property
    def has_process(self) -> bool:
        return self._runner is not None and self.state is not CLOSED

    @property
    def is_used(self) -> bool:
        """Does anybody wait for something of it, its start or an answer?"""
        calls = self.connection.pending.values() if self.connection else ()
        return self._wanted.is_set() or bool(self.listeners) or any(call.client for call in calls) or any(
            kept.listing for kept in self.lists.values())

    @property
    def is_single_user(self) -> bool:
        """Does it serve one user alone? Visitors without a key or variables may be anybody: anyone can give a name."""
        return self.is_private or self.owner != () and (self.owner[0] is not None or bool(self.variables))

    def list_of(self, method: str, way: str = "") -> KeptList:
        if len(self.lists) > KNOWN_WAYS:
            del self.lists[next(key for key in self.lists if key[1])]
        key = method, way if self.server.config.url else ""
        return self.lists.get(key) or self.lists.setdefault(key, KeptList(self, *key))

    tools = once(lambda self: self.list_of("tools/list"))

    # Running.

    def start(self, initialize: dict | None = None) -> None:
        """Starts the server, unless that was done; `initialize` is what a legacy one is told."""
        if self._runner is None and self.state is NEW:
            if self.owner is not self:                 # a spare one is only started where there is room
                self.server.pool.make_room(self.principal, self.server)
            self.knows_our_capabilities = not initialize
            initialize = initialize or our_initialize(self.server.is_for_all)
            self._runner = asyncio.get_running_loop().create_task(self._run(initialize))

    @property
    def is_over(self) -> bool:
        """Is it to be replaced? One for a session is so from its process's death on, while what that left is ended."""
        return self.state is CLOSED or self.is_private and self.state is READY and self.connection is None

    def check_up(self) -> None:
        """Raises what was wrong with the last start, for callers who do not wait for the next one, which follows."""
        if self.failure and self.state is not STARTING:
            if self.server.now() - self.since >= KEPT_SECONDS:
                self._wanted.set()
            raise self.failure.again()

    def tell_way(self, way: str) -> None:
        """Somebody waits for it through other proxies: it must not wait for one of those itself."""
        if way not in self._ways and len(self._ways) < KNOWN_WAYS:
            self._ways.add(way)
            self.link.tell_way(way)

    async def ready(self) -> ServerConnection:
        """The connection, once the server can be used; ServerError when it cannot be started."""
        if self.state is CLOSED:
            raise (self.failure or ServerError("the MCP server was stopped", status=503)).again()
        self.start()
        while self.connection is None:
            self._wanted.set()
            if error := await asyncio.shield(self._started):
                raise error.again()
        return self.connection

    async def close(self) -> None:
        """Ends the server; returns when nothing of it is left."""
        self._become(CLOSED)
        self._settle_start(ServerError("the MCP server was stopped", status=503))
        if self._runner:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
        await self.link.stop()

    async def _run(self, initialize: dict) -> None:
        has_run = False
        while True:
            self.server.restarts += self.state is PAUSED
            self._become(STARTING)
            connection, is_ready = None, False
            try:
                async with asyncio.timeout(self.server.settings.request_timeout):     # wait_for() may lose a cancel
                    connection = await self._connect(initialize)
                if connection.closed.done():
                    raise connection.closed.result()       # it ended before anybody was told that it is ready
                self._make_ready(connection, has_run)
                has_run = is_ready = True
                error = await asyncio.shield(connection.closed)
                # At once: it takes seconds to end what it left behind.
                self.server.on_error(self.redact(str(error)), self.link.last_word, has_started=True, is_ours=True)
            except ServerError as failure:
                error = failure
            except asyncio.TimeoutError:
                error = ServerError("the MCP server did not start", status=504)
            except Exception as fault:
                log.fault(fault)
                error = ServerError("the MCP server could not be started")
            finally:
                if connection:
                    await asyncio.shield(connection.link.stop())
            # What a client said in its handshake, or set as a variable, may be wrong.
            is_ours = not self.variables and (self.knows_our_capabilities or not isinstance(error, HandshakeRefused))
            self.server.on_error(reason := self.redact(str(error)), self.link.last_word, is_ready, is_ours)
            if not is_ready:
                log.error("! server %(server)s did not start: %(reason)s", server=self.server.name, reason=reason)
                self.failure = error
                self._settle_start(error)
            if self.is_private:
                break
            self._become(PAUSED)
            await self._pause()
        self._become(CLOSED)
        self._settle_start(error)
        for session in list(self.sessions.values()):
            session.on_closed(error)
        for listener in list(self.listeners) if is_ready else ():        # for its client to ask again
            listener.end_subscription()

    async def _connect(self, initialize: dict) -> ServerConnection:
        """Starts a link and finds out how to speak to it; what was found out is remembered for the next start."""
        failure, speaks, eras = None, self.server.speaks, self._eras_to_try()
        for era in eras:
            link = self.server.new_link(self.variables, self.redact)
            connection = ServerConnection(self.server.name, link, now=self.server.now, redact=self.redact,
                                          on_request=functools.partial(ask_client, self),
                                          on_notification=functools.partial(pass_on, self),
                                          is_single_user=self.is_single_user)
            connection.on_closed = functools.partial(self._forget, connection)
            link.way = way_of({WAY_HEADER: ", ".join(self._ways)})         # no more than servers take
            link.on_forgotten = functools.partial(self._on_forgotten, connection)
            self.link = link
            try:
                await link.start()
                if era is LEGACY:
                    self.identity = await connection.initialize(initialize)
                elif LEGACY in eras[1:]:
                    self.identity = await connection.probe(initialize)
                else:
                    self.identity = await connection.discover()
                speaks.update(dict.fromkeys(eras[:eras.index(connection.era)], False))
                speaks[connection.era] = True
                self.tries_legacy_first = False
                return connection
            except BaseException as error:
                await asyncio.shield(link.stop())
                if not isinstance(error, ServerError):
                    raise
                if not isinstance(failure, HandshakeRefused) or member_at(error.data, ("code",)) != METHOD_NOT_FOUND:
                    failure = error             # an unknown method says nothing of what is wrong
                if isinstance(error, GreetedTwice):
                    log.info("= server %(server)s was slow and got the greetings of both eras: it is started again",
                             server=self.server.name)
                    speaks[MODERN] = True
                    return await self._connect(initialize)           # a fresh one is spoken to in that alone
                if isinstance(error, HandshakeRefused):
                    speaks[era] = False
                elif era is LEGACY or link.is_remote or isinstance(error, RefusedAsModern):
                    self.tries_legacy_first = era is LEGACY
                    break                       # it died, refused or is not reached: no other words help
        if isinstance(failure, HandshakeRefused):
            speaks.clear()
        raise failure

    def _eras_to_try(self) -> list[Era]:
        """The eras in which to address a new link, one after the other. A server may stay with the first: so a
        session's own gets legacy, like the session, and a shared one modern; but after a death at its start, legacy."""
        setting, speaks = self.server.settings.server_era, self.server.speaks
        if setting != "auto":
            return [Era(setting)]
        first, second = (LEGACY, MODERN) if self.is_private or self.tries_legacy_first else (MODERN, LEGACY)
        if speaks.get(first):
            return [first]
        return [era for era in (first, second) if speaks.get(era) is not False] or [first, second]

    def _make_ready(self, connection: ServerConnection, is_restart: bool) -> None:
        """Makes a new link what the one before was to its clients."""
        whose = next((session.label for session in self.sessions.values()), "-") if self.is_private else "all"
        log.info(f"= server %(server)s is ready for %(session)s: {connection.link.label}, %(name)s %(version)s, "
                 "revision %(revision)s", server=self.server.name, name=self.identity.name, session=whose,
                 version=self.identity.release, revision=str(self.identity.version), **connection.link.fields)
        self.connection, self.failure, self.last_used = connection, None, self.server.now()
        connection.principal = self.principal
        self.server.on_ready(self)
        self._become(READY)
        if connection.era is MODERN:
            self.listening = Listening(self)
            self.listening.renew()
        self._settle_start(None)
        self._restore(connection, is_restart or self.is_missed)

    def _on_forgotten(self, connection: ServerConnection) -> None:
        """A remote server has forgotten its session, and all that was asked and told in it."""
        drop_questions(connection)
        if connection is self.connection:
            self._restore(connection, is_another=True)

    def _restore(self, connection: ServerConnection, is_another: bool) -> None:
        """Tells a legacy server what its clients need of it; and the clients of its lists, if it is another one."""
        if connection.era is LEGACY:
            for topic in list(self.topics.values()):
                self.topics.ask(topic)
            self.log_level = None                          # it was told none yet
            self.adjust_log_level()
        if is_another:
            self.owners.old, self.is_missed = set(self.owners), False
            for kept in self.lists.values():
                kept.is_old = True
            tell_of_lists(self)

    def on_time_out(self, request: PendingRequest) -> None:
        """A request was not answered in time. A server that says nothing at all through several of these, and does not
        answer a ping then, is stuck, and is replaced."""
        connection = self.connection
        is_silent = connection and not self.is_private and connection.heard_at <= request.last_sign
        if request.client and request.group or is_silent and self.server.config.group:
            self.server.count_outcome(self, has_failed=True)
        if is_silent:
            connection.silences += 1
            if connection.silences == SILENCES:
                connection.ping()
                asyncio.get_running_loop().call_later(
                    min(PING_SECONDS, self.server.settings.request_timeout), self._replace_silent, connection)

    def _replace_silent(self, connection: ServerConnection) -> None:
        if connection is self.connection and connection.silences >= SILENCES:
            log.error("! server %(server)s says nothing any more and is started anew", server=self.server.name)
            connection.link.stop()
            self._forget(connection)                 # it may take its time to end

    def _forget(self, connection: ServerConnection) -> None:
        """A call that comes from now on waits for the next link."""
        if self.connection is connection:
            self.connection = self.listening = None
        drop_questions(connection)

    async def _pause(self) -> None:
        """Waits before a restart: longer after each death, and after many of them until somebody asks. To ask whether a
        remote server is back costs little."""
        self._deaths.append(self.server.now())
        recent = [death for death in self._deaths if death > self._deaths[-1] - 60]
        if self.server.config.url:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), min(FAR_PAUSE, RESTART_DELAY * 4 ** len(recent)))
        elif len(recent) >= DEATHS_IN_A_MINUTE:
            log.error("! server %(server)s died %(deaths)d times in a minute; it is started when it is needed",
                      server=self.server.name, deaths=len(recent))
            while not self._wanted.is_set():
                with contextlib.suppress(asyncio.TimeoutError):
                    async with asyncio.timeout(FAR_PAUSE):     # wait_for() may lose a cancel, and this go on for ever
                        await self._wanted.wait()
                if self.listeners or self.topics:        # subscribers send no request that would start it
                    break
        else:
            await asyncio.sleep(RESTART_DELAY * 2 ** (len(recent) - 1))

    def _settle_start(self, error: ServerError | None) -> None:
        """Tells those who wait for the server that it can be used, or why it cannot."""
        self._wanted.clear()
        self._ways.clear()
        self.link.way = ""               # what is sent from now on is not for those who waited
        self._started.set_result(error)
        self._started = asyncio.get_running_loop().create_future()

    def _become(self, state: InstanceState) -> None:
        if self.state is state is CLOSED:
            return
        assert state in INSTANCE_STATES[self.state], (self.state, state)
        self.state, self.since, self._told_slow = state, self.server.now(), 0

    def tick(self, now: float) -> None:
        """Called now and then: gives up on what takes too long, and says so of a start."""
        if self.connection:
            for request in self.connection.expire(now, self.server.settings.request_timeout):
                self.on_time_out(request)
            for kept in self.lists.values():
                kept.tick(now)
        if self.state is STARTING and now - self.since >= SLOW_START * (self._told_slow + 1):
            self._told_slow, words = self._told_slow + 1, self.link.last_word
            log.info("= server %(server)s is still starting, %(seconds)d s" + (": %(text)s" if words else ""),
                     server=self.server.name, seconds=int(now - self.since), text=words or "-")

    # The clients together, as the server sees them.

    def leave(self, session, is_over: bool = True) -> None:
        """Takes back what the server does for this session. If that is over, so is an instance of its own."""
        if self.sessions.pop(session.id, None):
            self.levels[session.log_level] -= 1
        self.topics.leave(session)
        self.adjust_log_level()
        if self.is_private and is_over:
            self.server.end(self)

    def adjust_log_level(self, asked: str | None = None) -> None:
        """Sets a legacy server to the most verbose level that is wanted, once somebody asked for one (a modern request
        for `asked`). Nobody shall be silenced by another's choice, nor flooded by that of one who is gone."""
        now = self.server.now()
        if asked:
            self._asked_levels[asked] = now
        self._asked_levels = {level: when for level, when in self._asked_levels.items() if when > now - LEVEL_SECONDS}
        levels = {*self._asked_levels, *+self.levels}          # + leaves out what no session has any more
        if not self.log_level and levels <= {None}:
            return
        level = min((level or UNASKED_LEVEL for level in levels), key=LOG_LEVELS.index, default=self.log_level)
        if level != self.log_level:
            self.log_level = level
            if self.connection and self.connection.era is LEGACY and "logging" in self.identity.capabilities:
                self.connection.request("logging/setLevel", {"level": level})

    @property
    def is_crowded(self) -> bool:
        """Was so much told in this turn that all of one kind counts as the same now? Others are to be served, too."""
        return len(self._said) * (len(self.sessions) + len(self.listeners)) >= TOLD_A_TURN

    def is_news(self, said: bytes | str | Topic) -> bool:
        """Is it said for the first time in this turn? A list that changed a thousand times has changed once."""
        if not self._said:
            at_end_of_turn(self._said.clear)
        is_news = said not in self._said
        self._said.add(said)
        return is_news

    def is_owner(self, client: "Client", name: tuple[str, str] | None) -> bool:
        """May a client know of this task? A client that may be anybody may know of one that is nobody's."""
        return self.is_single_user or self.owners.get(name) == client.owner


# ============================================================================
# 34. Clients
# ============================================================================
#
# Who sends requests. A client stays with the instance of a server that it got when it first used that server.

OPEN_QUESTIONS = 100             # of one client; past that, the proxy answers the oldest with an error
KEPT_STREAMS = 16                # of each session, after they ended
MAX_LABEL = 64                   # characters of who somebody is, in the log
# How many ms a client waits before it asks for an ended stream again. SDKs try twice, which leaves time for the proxy
# to restart. It is sent last of all, because Java's SDK 1.0 to 2.0 ends a stream there (java-sdk#1047).
RETRY = b"retry: 3000\n\n"


class Client(Holder):
    """Who sends requests: a session, or a visitor for the time of one."""

    initialize_params: dict | None = None           # of its handshake, with which a server of its own is started
    may_have_logs = False                           # was it offered logs for a server that was missing? True if unknown
    software = ""                                   # the name/version that it gave when its session opened
    gathering: tuple[float, asyncio.Task] | None = None        # when it began, and gather_resources()
    turns = once(lambda self: asyncio.Lock())       # see take_turn()
    listens = False                                 # are its requests modern? Then only a listen tells it of new lists
    is_ended = False                                # of a session alone
    is_homeless = False                             # has it no server left? It begins nothing and ends after its calls
    _serials = itertools.count()
    serial = once(lambda self: f"client {next(self._serials)}")          # that no other client ever has
    redact = once(lambda self: redactor(self.variables.values()))    # takes these values out of a text for the log

    def __init__(self, mount: "Mount", view: View, caller: Caller | None, variables: dict[str, str], principal: object,
                 name: str | None = None, headers: dict[str, str] | None = None):
        self.mount = mount
        self.view = view                            # what it is shown
        self.wanted = view.wanted                   # how it narrowed that down, also to servers that are gone for now
        self.principal = principal
        self.caller = caller                        # whose key it came with
        self.name = name                            # that tells apart visitors who come with the same key
        self.variables = variables                  # that it sets for its servers
        self.headers = headers or {}                # of its last request over HTTP, by name in lower case
        self.calls: dict[object, PendingRequest] = {}       # running, by client id
        self._instances: dict[Server, Instance] = {}        # that it uses
        self.members: dict[str, Server] = {}        # the member of each group that it stays with, by the group's name

    @property
    def is_apart(self) -> bool:
        """May it be told what others at the same URL are not? Caches go by the URL; and a server that calls its
        answer public knows nothing of keys, of other servers, or of servers that clients have to themselves."""
        return self.caller is not None or self.view.depends_on_client

    @property
    def owner(self) -> object:
        """The identity by which it owns tasks; None if it may be anybody."""
        return None if self.identity is self else self.identity

    def at(self, server: "Server | Group", left_out: "Server | None" = None) -> Instance:
        """Its instance of a server: the same until that has ended, or KEPT_SECONDS longer if it failed to start. Of a
        group: that of a member other than `left_out`, chosen for no request in particular."""
        if server.is_group:
            server = server.choose(self, left_out, self.headers)
        instance = self._instances.get(server)
        if instance is None or instance.is_over and (self.view.has_choice or not self.is_session) and (
                not instance.failure or self.mount.now() - instance.since >= KEPT_SECONDS):
            if self.is_homeless:                       # its variables were checked for a configuration that is gone
                raise no_such_session()
            before, instance = instance, server.instance_for(self)
            self._instances[server] = instance
            instance.is_missed = instance.is_missed or before is not None and before.is_missed
            for key, kept in before.lists.items() if before and instance.is_private else ():
                instance.list_of(*key).follow(kept)
            for listener in [one for one in before.listeners if one.client is self] if before else ():
                # If it heard anything there, its client listens again.
                listener.end_subscription() if before.identity else listener.move(before, instance)
            if instance.is_missed and instance.connection:         # a spare one, which has told nobody
                instance.is_missed = False
                tell_of_lists(instance)
            if instance.is_private and self.initialize_params is not None:
                instance.start(self.initialize_params)
            if before and self.is_session:
                self.move_topics(server, server)
        instance.last_used = self.mount.now()
        if instance.connection is None and way_of(self.headers):
            instance.tell_way(way_of(self.headers))
        return instance

    def by_name(self, name: str) -> Instance:
        """Its instance of the server with this name; RPCError when that was taken out of the configuration."""
        return self.at(self.mount.server(name))

    def place_of(self, server: "Server") -> str | None:
        """What it is shown in the place of a server that it used: the name of that, or of a group; or None."""
        before = [name for name, member in self.members.items() if member is server]    # server.config may be newer
        return next((name for name in (server.name, server.config.group, *before) if name in self.view.names), None)

    @property
    def only_instance(self) -> Instance:
        """The one that its requests go to if it is shown one server."""
        return self.by_name(self.view.members[0].name)

    def adopt(self, catalog: Catalog) -> RPCError | None:
        """Goes by another configuration from now on, and pins affected calls. Returns why it cannot, if so."""
        before, problem = self.view, None
        # Of the servers that it chose, those that are left; if none is left, view() refuses its choice.
        wanted = tuple((kind, ",".join(one for one in listed(text) if one in catalog.offered) or text
                        if kind == "server" else text) for kind, text in self.wanted)
        try:
            view = catalog.view(before.place, wanted, self.caller and self.caller.limits)
            view.check_variables(self.variables)
            self.view = view
        except RPCError as error:
            problem = error
        for call in list(self.calls.values()):
            if problem or call.is_changed(before):
                call.pin(no_such_session() if problem and self.is_session else problem or limits_changed())
        return problem

    def notify(self, message: Message) -> None:
        """Passes its notification, as extensions may have some, to the modern servers that it is shown and uses."""
        check_parameters(message)
        for member in self.view.servers:
            server = self.mount.servers.get(member.name)
            instance = server and server.used_by(self)
            if instance and instance.connection and instance.connection.era is MODERN:
                instance.connection.send_if_possible(message.payload[0], self.principal)

    def cancel_request(self, notification: Message) -> None:
        """It cancels a request, by this notification."""
        request_id = notification.params.get("requestId")
        call = self.calls.get(request_id) if is_id(request_id) else None
        if call:
            call.cancel(notification)

    def wants_log(self, level: object, instance: Instance) -> bool:
        """Does it want log messages of this level? One that asked for nothing is spared what others asked for."""
        return is_at_least(level, self.log_level or (UNASKED_LEVEL if instance.log_level else "debug"))


class Visitor(Client):
    """A client without a session."""

    is_session = False
    capabilities: dict = {}                         # a modern one has them in each request; no other can be asked,
    info = version = log_level = None               # and it has said nothing of itself

    @property
    def label(self) -> str:
        """What the log calls it."""
        return self.caller.name[:MAX_LABEL] if self.caller else "-"

    def choose_log_level(self, level: object, has_logs: bool) -> None:
        raise RPCError("a log level needs a session")

    @once
    def user(self) -> tuple:
        """Visitors for whom this is equal are one user."""
        return self.caller, self.name, frozenset(self.variables.items())

    @property
    def identity(self) -> object:
        """Whose its calls are: the user's, or if that may be anybody, each its own."""
        return self.user if self.caller is not None or self.variables else self


class Session(Client):
    """A client with an Mcp-Session-Id, or over HTTP+SSE a ?session_id=; or the legacy one on stdin."""

    is_session = True

    def __init__(self, mount: "Mount", view: View, caller: Caller | None, variables: dict[str, str],
                 principal: object, is_streamable: bool, name: str | None, headers: dict[str, str] | None):
        super().__init__(mount, view, caller, variables, principal, headers=headers)
        self.id = self.identity = name or os.urandom(16).hex()
        self.label = label_of(self.id)
        self.is_streamable = is_streamable          # Streamable HTTP; otherwise HTTP+SSE, or in the words of clients:
        self.transport = "streamable-http" if is_streamable else "sse"
        self.is_followed = False                    # did its client come again?
        self.capabilities: dict = {}
        self.info: str | None = None                # clientInfo, as JSON; see also `software`
        self.version: str | None = None             # the revision that was negotiated
        self.offered: str | None = None             # that will be, at a shared server
        self.log_level: str | None = None           # that it asked for
        self.topics: set[Topic] = set()             # that it subscribed to
        self.questions: dict[int, Question] = {}    # asked of the client, by our id
        # No other process has the events of this one; by the tag in their ids, it sees that they are not its own.
        self._tag = "." + os.urandom(4).hex() if is_streamable and mount.settings.session_secret else ""
        self.stream = Stream("0" + self._tag if is_streamable else "", principal)
        self.last_used = self.opened_at = mount.now()
        self._streams = {self.stream.name: self.stream}          # by name; those that ended, for a while
        self._stream_names = itertools.count(1)

    def announce(self, message: Message) -> None:
        """Takes in its handshake before the server has answered it: the session's id contains all that it says, and
        with a server that starts slowly the client gets the id before that answer."""
        self.introduce(message, None)
        self.offered = negotiate(message.params.get("protocolVersion"))

    def introduce(self, message: Message, version: object) -> None:
        """Takes in what the client says of itself in its handshake, and the revision that was agreed on."""
        self.version = version
        self.capabilities = message.value("params", "capabilities") if isinstance(
            message.params.get("capabilities"), tuple) else {}
        self.info = message.raw("params", "clientInfo") if "clientInfo" in message.params else None
        self.software = client_name(message.params.get("clientInfo"))

    @once
    def sealed_id(self) -> str:
        """Its Mcp-Session-Id: the same from the first time that it is told."""
        secret, version = self.mount.settings.session_secret, self.version or self.offered
        if not (secret and version and self.is_streamable and self.view.is_for_all):
            return self.id
        return seal(secret, self.id, {
            "version": version, "capabilities": self.capabilities, "info": self.info and scan_plain(self.info, 0)[0],
            "whose": caller_mark(secret, self.caller), "place": self.view.place, "wanted": self.view.wanted,
            "time": int(time.time())})

    def restore(self, sealed_id: str, facts: dict) -> None:
        """Goes on as the session that has this id. What it heard of, and what it subscribed to, is not known any more,
        so it is told that all lists may have changed."""
        self.sealed_id, self.is_followed, self.may_have_logs = sealed_id, True, True
        self.version, self.capabilities = facts["version"], facts["capabilities"]
        self.info = facts["info"] and dump(facts["info"])
        self.software = client_name(tuple(facts["info"].items()) if isinstance(facts["info"], dict) else ())
        for member in self.view.members:
            with contextlib.suppress(ProxyError):
                self.by_name(member.name)
        for kind, _ in LIST_CHANGES.values():
            self.stream.send(list_changed(kind).payload)

    def on_closed(self, error: ServerError) -> None:
        """Its own process of a server is gone. A session of that server alone ends with it."""
        if not self.view.has_choice:
            self.end(error)

    def adopt(self, catalog: Catalog) -> None:
        """As Client.adopt(); and what it used at servers that are gone, it uses at those in their place."""
        before, problem = self.view, super().adopt(catalog)
        self.is_homeless = problem is not None
        if problem:
            return self.end() if problem.data else None    # its key may no longer open the place, or set its variables
        shown = self.view.names
        for old in [server for server in self._instances if server.is_retired or server.name not in shown]:
            instance, place = self._instances.pop(old), self.place_of(old)
            self.move_topics(old, place and self.mount.server(place))
            if old.is_retired:                             # it ends when its calls are done
                instance.sessions.pop(self.id, None)
            else:
                instance.leave(self, is_over=False)
        # It stays with the same member of each group, which may be a new server with that name by now.
        self.members = {name: self.mount.servers.get(member.name, member) for name, member in self.members.items()}
        is_told = self.version and not self.listens        # one that listens is told by that
        for kind, _ in LIST_CHANGES.values() if is_told and self.view.offer != before.offer else ():
            self.stream.send(list_changed(kind).payload)

    def choose_log_level(self, level: object, has_logs: bool) -> None:
        """It wants log messages of this level from now on; RPCError when there are none."""
        if level not in LOG_LEVELS or not has_logs:
            raise RPCError("the server sends no log messages of this level", status=200,
                           code=INVALID_PARAMS if has_logs else METHOD_NOT_FOUND)
        before, self.log_level = self.log_level, level
        for instance in self._instances.values():
            instance.levels[before] -= 1
            instance.levels[level] += 1
            instance.adjust_log_level()

    def move_topics(self, before: "Server", server: "Server | Group | None", with_unsettled: bool = True) -> None:
        """Moves its subscriptions to another server, or to the same one's next instance; drops what cannot move."""
        for topic in [topic for topic in self.topics if topic.instance.server is before]:
            if not (with_unsettled or self in topic.told):
                continue                               # its client still waits for the old server's answer
            topic.instance.topics.unsubscribe(self, topic)
            if server:
                with contextlib.suppress(ProxyError):
                    self.at(server).topics.subscribe(self, topic.uri, is_told=True)

    def speak_through(self, stream: Stream) -> None:
        """Uses this one in place of its own, before anything was sent."""
        self.stream = self._streams["0" + self._tag] = stream

    def open_stream(self) -> Stream:
        """A stream for the answer to one POST."""
        stream = Stream(f"{next(self._stream_names)}{self._tag}", self.principal)
        self._streams[stream.name] = stream
        return stream

    @property
    def _last_words(self) -> bytes:
        """What its streams end with: see RETRY."""
        return RETRY if self.is_streamable and self.version == PRIMING_VERSION else b""

    def end_stream(self, stream: Stream) -> None:
        """Ends such a stream; it can be fetched again for a while."""
        stream.close(self._last_words)
        self._streams[stream.name] = self._streams.pop(stream.name, stream)          # the last to end is the last to go
        ended = [stream for stream in self._streams.values() if stream.is_ended]
        while len(ended) > KEPT_STREAMS or len(ended) > 1 and sum(stream.held for stream in ended) > KEPT_BYTES:
            oldest = ended.pop(0)
            oldest.give()
            del self._streams[oldest.name]

    def find_event(self, event_id: str) -> tuple[Stream | None, int | None]:
        """The stream that an event was on, and its number there; RPCError when that is not known here. Of another
        process's event: the session's own stream, or None if it was on that of a call; and None for the number."""
        name, _, number = event_id.partition("-")
        stream = self._streams.get(name)
        if not name.endswith(self._tag):
            return None if re.fullmatch(r"[1-9][0-9]*\..+", name) else self.stream, None
        if not (stream and re.fullmatch(r"[0-9]{1,15}", number) and int(number) <= stream.last_number) or (
                stream.is_ended and stream.has_forgotten):
            raise RPCError("Last-Event-ID names no event that is kept here")
        return stream, int(number)

    def ask(self, question: Question, send) -> None:
        """Passes a request of the server's on to the client; `send` is the way that it takes."""
        if len(self.questions) >= OPEN_QUESTIONS:
            next(iter(self.questions.values())).refuse(NO_CLIENT_CAN)
            if question.call and question.call.is_done:
                return                             # the oldest was of the same call, which ended by that
        self.questions[question.id] = question
        question.client, question.send, question.asked_at = self, send, self.mount.now()
        payload = question.encode(b"%d" % question.id)
        question.hold(len(payload[0]), self.principal)
        send(payload)

    def receive(self, message: Message) -> None:
        """The client's response to a question, or its notification on its way to the servers that it uses."""
        if message.kind is RESPONSE:
            question = self.questions.get(as_own_id(message.id))      # one that nobody asked is forgotten
            return question.respond(message) if question else None
        check_parameters(message)
        log.info("< %(session)s %(method)s", session=self.label, method=message.method)
        if message.method == "notifications/cancelled":
            return self.cancel_request(message)
        for instance in self._instances.values():
            connection = instance.connection
            if connection is None or connection.era is MODERN:
                continue
            if message.method == "notifications/initialized":
                # The proxy has sent this itself. A spare server had no client then to ask for roots: it may ask now.
                if instance.is_private and instance.knows_our_capabilities and "roots" in self.capabilities:
                    connection.send_if_possible(encode_request(None, "notifications/roots/list_changed"))
            elif instance.is_private or self._may_tell(connection, message):
                connection.send_if_possible(message.payload[0], self.principal)

    def _may_tell(self, connection: ServerConnection, message: Message) -> bool:
        """May a server for many be told this? Nothing of roots, which are one client's; and progress only of what it
        asked this client, by the token that it gave."""
        if message.method == "notifications/progress":
            asked = [question.message.meta for question in connection.questions.values() if question.client is self]
            return any(meta.get("progressToken") == message.params.get("progressToken") for meta in asked)
        return message.method != "notifications/roots/list_changed"

    def give(self) -> None:
        """What it holds are its subscriptions: it ends with them."""
        self.end()

    def leave(self) -> None:
        """The client is gone, or says that it goes."""
        for call in list(self.calls.values()):             # another connection of its may still wait
            call.cancel(error=no_such_session())
        self.end()

    def end(self, error: ServerError | None = None) -> None:
        """Ends it, and all that is its own. Its calls fail: with the error, if it ends because its server is gone."""
        if self.is_ended:
            return
        self.is_ended = True
        self.mount.sessions.pop(self.id, None)
        for call in [*self.calls.values(), *(call for call in self.mount.parked.values() if call.client is self)]:
            call.fail(error or no_such_session())
        for question in list(self.questions.values()):
            question.refuse(ServerError("the client is gone"))
        for instance in self._instances.values():
            instance.leave(self)
        for stream in self._streams.values():
            stream.close(self._last_words)
            stream.give()
        log.info("= session %(session)s closed", session=self.label)


def no_such_session() -> RPCError:
    return RPCError("session unknown or ended", status=404)


def label_of(session_id: str) -> str:
    """What the log calls a session; its id is a secret."""
    return digest_of_key(session_id).hex()[:8]


def client_name(info: object) -> str:
    """What a client says of itself, a clientInfo as it was scanned, as name/version."""
    given = members_of(info)
    return "/".join(given[name][:MAX_LABEL] for name in ("name", "version") if isinstance(given.get(name), str))


def is_at_least(level: object, wanted: str) -> bool:
    """Is a log message's level at least as high as what is wanted? One that is unknown passes."""
    return level not in LOG_LEVELS or LOG_LEVELS.index(level) >= LOG_LEVELS.index(wanted)


# ============================================================================
# 35. Servers and groups
# ============================================================================
#
# A server is what was configured: how its links are made, and its instances. Servers of one group stand in for each
# other. The first of these that applies decides which of them gets a request: the task or call that it continues, a
# `when` that claims it, the member that the session stays with, and who is least busy. A member is left out while it
# has no process, and after failures in a row until it answers again.

SPARES_PAUSE = 5.0               # seconds without new spare processes after one died
FAILURES = 3                     # in a row, after which a member of a group is left out
PROBE_PAUSE = 1.0                # seconds until one that is left out is asked whether it is back, doubling
LONGEST_PROBE_PAUSE = 30.0       # to this
MAX_LISTINGS = 8                 # pages of tools that went to clients, kept until read_listings() reads them,
MAX_LISTING = 256 * 1024         # if they have no more bytes than this


class Pool:
    """The processes of all servers together (one at a URL counts as one), and how many there may be."""

    def __init__(self, limit: int):
        self.limit = limit
        self.servers: set[Server] = set()

    def make_room(self, principal: object, server: "Server") -> None:
        """Sees to it that one more process of a server's can be started for a principal; ServerError when it cannot."""
        other = self.instance_to_end(principal, server)
        if other:
            for session in list(other.sessions.values()):
                session.on_closed(try_later("others need the room"))
            for listener in list(other.listeners):         # they wait at no request of the server's that would fail
                listener.end_subscription()
            other.server.end(other)

    def servers_in_the_way(self, server: "Server") -> set["Server"]:
        """The servers whose processes leave no room for one more of this one's: all, or those that share its range of
        users. Empty while there is room."""
        sharing = {one for one in self.servers if server.users and one.users == server.users and not (
            one.is_retired and not any(instance.is_used for instance in one.instances.values()))}      # it ends soon
        for limit, servers in (self.limit, self.servers), (len(server.users), sharing):
            if servers and sum(len(one.ending) + sum(instance.has_process for instance in one.instances.values())
                   for one in servers) >= limit:
                return servers
        return set()

    def instance_to_end(self, principal: object, server: "Server") -> Instance | None:
        """The instance that has to end before a server gets one more process for a principal: a spare one, an idle one
        of visitors, or one of whoever has most. None: there is room. ServerError: none may end, or enough do."""
        servers = self.servers_in_the_way(server)
        if not servers:
            return None
        running = [instance for one in servers for instance in one.instances.values()
                   if instance.has_process and instance.owner != ()]
        spares = [instance for instance in running if instance.owner is instance]
        idle = [instance for instance in running if not (instance.is_private or instance.is_used)]
        others = spares or idle or holders_of_most(running, principal)
        if not others or sum(len(one.ending) for one in self.servers) >= max(1, self.limit // 10):
            raise try_later("too many processes")
        return min(others, key=lambda instance: (instance.is_used, instance.last_used))


class Server:
    """One configured MCP server: how links to it are made, and its instances."""

    is_group = False

    def __init__(self, config: ServerConfig, new_link, now, pool: Pool):
        self.name, self.settings = config.name, config.settings
        self.config = config
        self.max_result = config.settings.max_result_kb * 1024        # bytes; 0: any
        self.users = users_of("" if config.url else config.settings.run_as_user)      # of which each process gets one
        self.pool = pool
        pool.servers.add(self)
        self.is_retired = False                    # out of the configuration: ends when its calls are done
        self.new_link = new_link                   # takes (variables, redact), returns a Link that is not started yet
        self.now = now                             # the clock: returns seconds
        self.is_for_all = self.settings.shared_session
        self.spares_wanted = 0 if self.is_for_all else self.settings.prewarm
        self.speaks: dict[Era, bool] = {}          # the eras in which it was found to speak, or not to
        self.instances: dict[object, Instance] = {}
        self.ending: dict[Instance, asyncio.Task] = {}
        self._spares_pause = 0.0                   # until when no new ones are started, because one died
        self.identity: Identity | None = None      # what it said of itself last
        self.restarts = 0                          # starts of its instances, after the first of each
        self.start_seconds: float | None = None    # that the last one took
        self.start_failed = False                  # did the last one fail, but not because of a client's variables?
        self.back_at = float("-inf")               # when one last worked again after that had been so
        self.takes_variables = False               # did one work with such? Then it may need them
        self.last_error, self.last_error_at = "", 0.0        # of a start, or how one ended; with its last words
        self.tool_names: dict[str, None] = {}      # that are known, the newest first
        self._checked_rules: Rules | None = None   # that were compared to its tools
        self.misused: set[tuple[str, ...]] = set()             # tools left out for their x-mcp-header, which was logged
        self.listings: collections.deque[ResponseLine] = collections.deque(maxlen=MAX_LISTINGS)
        self.waiting: set[asyncio.Task] = set()    # the tasks of calls that its group chose it for, until they are sent
        self.failures = 0                          # of calls in a row
        self._probe_pause, self._probe_at = PROBE_PAUSE, 0.0
        self._probing: asyncio.Task | None = None

    @property
    def is_up(self) -> bool:
        """Can a call be expected to work?"""
        instance = self.instances.get(())          # none, if there was no room for its process
        return self.failures < FAILURES and not (self.is_for_all if instance is None else (
            instance.connection is None and (instance.failure or instance.identity)))

    def is_up_for(self, client: Client) -> bool:
        """Can a call of this client be expected to work? If it has a process to itself, whatever fails for others; one
        that failed is tried again after a while."""
        mine = None if self.is_for_all else self.used_by(client)
        if not (mine and mine.connection):
            return self.is_up
        return mine.failures < FAILURES or self.now() - mine.counted_at >= LONGEST_PROBE_PAUSE

    def count_outcome(self, instance: Instance, has_failed: bool) -> None:
        """A call of its group's was answered by this instance, or failed there."""
        for one in self, instance:
            one.failures = one.failures + 1 if has_failed else 0
        instance.counted_at = self.now()

    @property
    def state(self) -> str:
        """For who looks after the proxy: ready, starting, down, or on demand."""
        if not self.is_for_all:
            states = {instance.state for instance in self.instances.values()}
            return ("down" if self.start_failed else "ready" if READY in states else
                    "starting" if STARTING in states else "on demand")
        instance = self.instances.get(())
        if instance is None or instance.state in (NEW, STARTING):
            return "starting"
        return "ready" if instance.connection and self.failures < FAILURES else "down"

    @property
    def can_be_used(self) -> bool:
        return self.state == "ready" or not (self.is_for_all or self.start_failed)

    def on_ready(self, instance: Instance) -> None:
        """An instance was started, and can be used now."""
        now, self.identity = instance.last_used, instance.identity
        if self.start_failed:
            self.back_at = now
        self.start_seconds, self.start_failed = now - instance.since, False
        self.takes_variables = self.takes_variables or bool(instance.variables)

    def on_error(self, reason: str, words: str, has_started: bool, is_ours: bool) -> None:
        """An instance could not be started, or has ended, with these last words; `is_ours`: no client can be the
        reason."""
        self.last_error = f"{reason}: {words}" if words and words not in reason else reason
        self.last_error_at = self.now()
        self.start_failed = self.start_failed or not (has_started or self.takes_variables) and is_ours

    def learn_tools(self, names: collections.abc.Iterable[str]) -> None:
        names = dict.fromkeys((*names, *self.tool_names))
        self.tool_names = dict.fromkeys(itertools.islice(names, MAX_TOOLS))

    def check_rules(self, tools: Items) -> None:
        """Warns once of rules in its configuration that fit none of the tools that it lists."""
        checked, self._checked_rules = self._checked_rules, self.config.rules
        slips = self.config.rules.without_effect(tools) if tools and self.config.rules != checked else ()
        if slips:
            log.warning("! server %(server)s lists no tool for this in its configuration: %(rules)s", server=self.name,
                        rules=", ".join(slips))

    def read_listings(self) -> None:
        """Learns from the pages that clients were given."""
        while self.listings:
            with contextlib.suppress(RPCError):
                tools = (self.listings.popleft().parsed().result or {}).get("tools")
                self.learn_tools(tool["name"] for tool in (tools if isinstance(tools, list) else ())
                                 if isinstance(tool, dict) and isinstance(tool.get("name"), str))

    @property
    def is_starting(self) -> bool:
        """Would a call have to wait until it is ready?"""
        instance = self.instances.get(())
        return bool(instance and instance.connection is None)

    def probe(self) -> None:
        """Finds out now and then whether a server that could not be used is back."""
        if (self.start_failed or not self.is_up) and not self._probing and self.now() >= self._probe_at and (
                self in self.pool.servers):
            self._probing = asyncio.get_running_loop().create_task(self._probe())

    async def _probe(self) -> None:
        try:
            async with asyncio.timeout(PING_SECONDS if self.is_for_all else self.settings.request_timeout):
                if self.is_for_all:
                    connection = await (self.instances.get(()) or self.make_instance()).ready()
                    await connection.ping()
                elif self.start_failed:
                    await self._try_start()
        except Exception:
            pause, self._probe_pause = self._probe_pause, min(LONGEST_PROBE_PAUSE, 2 * self._probe_pause)
        else:
            pause = self._probe_pause = PROBE_PAUSE
            self.failures = 0
        self._probing, self._probe_at = None, self.now() + pause

    async def _try_start(self) -> None:
        """Starts a spare instance, to see whether that works."""
        if self.pool.servers_in_the_way(self):
            raise try_later("too many processes")
        spare = self._new_spare()
        try:
            await spare.ready()
        finally:
            if spare.owner is spare:               # nobody adopted it
                self.end(spare)

    def _new_spare(self) -> Instance:
        spare = Instance(self, None, {}, None)
        spare.owner = spare
        self.instances[spare] = spare
        return spare

    def _owner_for(self, client: Client) -> object:
        return () if self.is_for_all else client if client.is_session else client.user

    def used_by(self, client: Client) -> Instance | None:
        """The instance that a client uses already, if there is one."""
        return self.instances.get(self._owner_for(client))

    def instance_for(self, client: Client) -> Instance:
        """The instance that a client uses; RPCError or ServerError when it cannot have one, or when the client or
        the server has ended meanwhile."""
        if client.is_ended or self not in self.pool.servers:
            raise no_such_session() if client.is_ended else try_later("the MCP server was stopped")
        variables, owner = client.variables, self._owner_for(client)
        instance = self.instances.get(owner)
        if instance is None or instance.is_over:
            if instance and instance.state is not CLOSED:
                self.end(instance)
            spare = self._adopt_spare(client) if client.is_session and not variables else None
            instance = spare or self.make_instance(owner, variables if owner != () else {}, client.principal)
        if client.is_session and client.id not in instance.sessions:
            instance.sessions[client.id] = client
            instance.levels[client.log_level] += 1
            instance.adjust_log_level()
        return instance

    def make_instance(self, owner: object = (), variables: dict[str, str] | None = None,
                      principal: object = None) -> Instance:
        """A new instance; ServerError when there would be no room for its process."""
        for name, value in (variables or {}).items():          # they may have been checked for an older configuration
            if not may_set(name, value, self.settings.allowed_env):
                raise RPCError(f"clients may not set the variable {name} like this", code=INVALID_PARAMS)
        self.pool.instance_to_end(principal, self)
        instance = self.instances[owner] = Instance(self, owner, variables or {}, principal)
        return instance

    def _adopt_spare(self, session: Session) -> Instance | None:
        """Makes a spare instance the session's, one that is ready if there is any."""
        spares = [one for one in self.instances.values() if one.owner is one and one.has_process and not one.is_over]
        spare = max(spares, key=lambda spare: spare.connection is not None, default=None)
        if spare:
            del self.instances[spare]
            spare.owner, spare.principal = session, session.principal
            if spare.connection:
                spare.connection.principal = session.principal
            self.instances[session] = spare
            asyncio.get_running_loop().call_soon(self.keep_spares)
        return spare

    def keep_spares(self) -> None:
        """Starts spare processes until there are enough; not at once again after one died."""
        spares = [instance for instance in self.instances.values() if instance.owner is instance]
        for spare in spares:
            if spare.state is CLOSED:
                del self.instances[spare]
                self._spares_pause = self.now() + SPARES_PAUSE
        if self.now() < self._spares_pause:
            return
        for _ in range(self.spares_wanted - len(spares)):
            if self.pool.servers_in_the_way(self):
                break
            self._new_spare().start()

    def end(self, instance: Instance) -> None:
        """Ends an instance in the background."""
        if self.instances.get(instance.owner) is instance:
            del self.instances[instance.owner]
        if instance not in self.ending:
            task = self.ending[instance] = asyncio.get_running_loop().create_task(instance.close())
            task.add_done_callback(lambda _: self.ending.pop(instance))

    def tick(self, now: float, busy: collections.abc.Container[Instance]) -> None:
        """Called now and then: gives up on what takes too long, and ends what nobody uses. `busy` are the instances
        with calls: an instance itself may not know of a call that asks its client something, or waits for a list."""
        self.keep_spares()
        for instance in list(self.instances.values()):
            is_visitors = instance.owner != () and not instance.is_private
            is_left = self.is_retired or instance.is_private and not instance.sessions and (
                instance.owner is not instance)            # a session's own, that it has left; and no spare one
            is_used = (is_visitors or is_left) and (instance in busy or instance.is_used)
            if is_used and instance.last_used > float("-inf"):             # see Mount._adopt_keys()
                instance.last_used = now
            is_stale = is_visitors and now - instance.last_used > self.settings.session_idle
            if (is_stale or is_left) and not is_used:
                self.end(instance)
            else:
                instance.tick(now)

    async def close(self) -> None:
        """Ends all instances; returns when no process is left."""
        for instance in list(self.instances.values()):
            self.end(instance)
        await asyncio.gather(*self.ending.values())


class Group:
    """Servers that stand in for each other."""

    is_group = True

    def __init__(self, config: ServerConfig, members: list[Server]):
        self.name, self.config, self.members = config.name, config, members
        self.chosen: collections.Counter[Server] = collections.Counter()           # how often each was
        self._ready: dict[Server, int] = {}            # when one was chosen last, and how often it had restarted

    def probe(self) -> None:
        """Called now and then: finds out whether members are back."""
        for member in self.members:
            member.probe()

    def _welcome(self) -> None:
        """A member that is back, or that has started at last, would get most calls until it has had as many as the
        others: it counts as if it had."""
        before, self._ready = self._ready, {
            one: one.restarts for one in self.members if one.is_up and not one.is_starting}
        stayed = {one for one, restarts in self._ready.items() if before.get(one) == restarts}
        for member in self._ready.keys() - stayed:     # among those with which choose() compares it
            alike = [one for one in self._ready if (one.config.is_backup, one.config.when) == (
                member.config.is_backup, member.config.when)]
            had = {one: self.chosen[one] / one.config.weight for one in alike}
            least = min((had[one] for one in alike if one in stayed), default=max(had.values()))
            self.chosen[member] = max(self.chosen[member], least * member.config.weight)

    def choose(self, client: Client, left_out: Server | None, headers: dict[str, str],
               message: Message | None = None) -> Server:
        """The member for a request that came with these HTTP headers; or, without a message, for all that a client may
        ask. `left_out` has failed with it. RPCError when no other member takes a call like this."""
        # What is claimed goes to nobody else, also when those who claim it are down.
        owner = self._owner(client, message) if message else None
        claiming = [member for member in self.members if self._claims(member, client, message, headers)]
        if owner and (owner in claiming or not claiming or "requestState" not in message.params):
            return owner               # otherwise both have given the same requestState
        members = [member for member in claiming or self.members if member is not left_out]
        if claiming and members:
            return next((member for member in members if member.is_up_for(client)), members[0])
        is_call = message is not None and message.method in ("tools/call", "prompts/get")
        members = [member for member in members if not member.config.when] or ([] if is_call else members)
        if not members:
            raise RPCError("no server of the group takes a call like this", status=200, code=INVALID_PARAMS)

        # The member that the client is at, unless it is down, a backup while another is up, or starts while another is
        # ready; otherwise whoever has least to do.
        before = client.members.get(self.config.name)
        up = [member for member in members if member.is_up_for(client)]
        first = [member for member in up if not member.config.is_backup] or up or members
        if before in first and (not before.is_starting or all(member.is_starting for member in first)):
            return before
        self._welcome()
        own = min(first, key=self._load)
        if before is None or before is not left_out or not before.is_up_for(client):     # else for this request alone
            self.chosen[own] += client.is_session          # a call of others counts when it is sent
            client.members[self.config.name] = own
            if before in self.members and client.is_session:
                client.move_topics(before, own, with_unsettled=False)
        return own

    def _load(self, member: Server) -> tuple:
        """What orders the members that are up: who is ready, and then who has least to do."""
        weight = member.config.weight
        calls = len(member.waiting) + sum(not call.is_endless for one in member.instances.values() if one.connection
                                          for call in one.connection.pending.values())
        return member.is_starting, calls / weight, self.chosen[member] / weight

    def _claims(self, member: Server, client: Client, message: Message | None, headers: dict[str, str]) -> bool:
        when = member.config.when
        if when is None:
            return False
        is_by_argument = message and when.argument and message.params.get("arguments")
        arguments = message.plain_params["arguments"] if is_by_argument else {}
        return when.claims(arguments if isinstance(arguments, dict) else {}, headers,
                           client.caller and client.caller.name)

    def _owner(self, client: Client, message: Message) -> Server | None:
        """The member that has the task, or the call that waits for input, which a request names."""
        state, named = message.params.get("requestState"), owner_named(message)
        if isinstance(state, str):
            given = client.mount.states.get(state_key(state, message.params.get(NAMED_BY.get(message.method))))
            return given.server if given and given.server in self.members else None
        return next((member for member in self.members if (instance := member.used_by(client)) and (
            named in instance.owners and instance.is_owner(client, named))), None) if named else None


# ============================================================================
# 36. Mounts
# ============================================================================
#
# A mount is what clients reach, at whatever URL: it has their sessions, their calls, and the limits.
#
# When the configuration is read again, a server of which only that has changed which can_become() allows keeps its
# processes. Those of one that was changed otherwise, or taken out, end when their calls are done, and this becomes of
# what a client has there:
#
#                            the server was changed            it was taken out                the client's key is gone
#   its session              goes on, is told of other lists;  goes on with what it has left,  ends
#                            ends where its variables may      or ends when its calls are done
#                            not be set any more
#   its calls that are sent  go on to their answers            go on to their answers          end with their session;
#                                                                                              without one, go on
#   its other calls          go on, or fail where other rules  go on there, or fail as they    end with their session;
#                            apply to them now                 would if they came now          without one, fail
#   its subscriptions        move to the one in its place      end, or move to its group       end with their session
#   subscriptions/listen     goes on at the one in its place;  goes on with what it has left,  ends
#                            at its own URL, ends: the client  or ends
#                            may ask again

NOBODYS_NAME = "-"               # which no session has
MAX_DELETED = 10_000             # sessions that are known as ended by their clients
GOODBYE_SECONDS = 0.5            # for a client to close, after it has ended its session
CLOCKS_DIFFER = 300              # seconds, at the most, of replicas
LONGEST_CALL = 86_400            # seconds, "regardless of progress notifications". MCP 2025-11-25, Lifecycle, Timeouts
UNFOLLOWED_SECONDS = 60.0        # for which a session is kept that was opened, and then not used
RECENT_CALLS = 100               # that the overview shows
KNOWN_STATES = 1_000             # each the requestState of a call that waits for input
ASKED_SECONDS = 60.0             # after somebody asked at /readyz, in which servers that are down are probed


class GivenState(typing.NamedTuple):
    """To whom a requestState was given, and by which server."""

    principal: object
    place: str                       # the server or group, as the client is shown it
    server: Server


class Mount:
    """What clients reach, at whatever URL: sessions, calls, and what limits them. What each URL shows is a View."""

    def __init__(self, catalog: Catalog, settings: Settings, new_server, now):
        self.settings = settings
        # By which other proxies know this one: in requests, and in what clients are told. They differ, or a client
        # could send the id that it was told, and have any start that waits refused as a circle.
        self.id, self.told_id = os.urandom(8).hex(), os.urandom(8).hex()
        self.now = now                             # the clock: returns seconds
        self.sessions: dict[str, Session] = {}
        self.deleted: dict[str, None] = {}         # names of sessions that their clients ended, the oldest first
        self.calls: set[PendingRequest] = set()    # that clients wait for, and
        self.subscriptions: set[PendingRequest] = set()      # those that are endless
        self.parked: dict[str, PendingRequest] = {}          # calls that wait for their client, by our requestState
        # With several servers: who gave a requestState, also a modern server's own, by state_key().
        self.states: dict[str | bytes, GivenState] = {}
        self.is_leaving = False                    # will the proxy end? Until it drains, it goes on as before
        self.is_draining = False                   # no new calls: the proxy is about to end
        self.counters = Counters()
        self.recent: collections.deque[tuple] = collections.deque(maxlen=RECENT_CALLS)          # see record()
        self.asked_at = float("-inf")              # when somebody last asked at /readyz
        self._looked_at = float("-inf")            # when the sessions were last looked after
        self._new_server = new_server              # takes (config, pool), returns a Server
        self._pool = Pool(settings.max_processes)
        self.servers = {name: new_server(config, self._pool) for name, config in catalog.servers.items()}
        self._adopt(catalog)

    def _adopt(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.groups = {name: Group(config, [self.servers[member.name] for member in config.members])
                       for name, config in catalog.groups.items()}

    def start(self) -> None:
        """Starts what is there before any client is."""
        for server in self.servers.values():
            try:
                if server.is_for_all and () not in server.instances:
                    server.make_instance().start()
            except ServerError as error:
                log.warning("! server %(server)s is started when it is needed: %(reason)s", server=server.name,
                            reason=str(error))
            server.keep_spares()

    def reload(self, catalog: Catalog, keys: Keys) -> None:
        """Takes another configuration: what it keeps goes on, what it changes ends when its calls are done, and what
        came by a key that is gone ends at once."""
        self._adopt_keys(keys)
        before, self.servers = self.servers, {}
        catalog.leaving = {session.view.place for session in self.sessions.values()} - {None, *catalog.places}
        for name, config in catalog.servers.items():
            old = before.get(name)
            if old and old.config.can_become(config):
                self.servers[name] = before.pop(name)
                old.config = config
                for instance in old.instances.values():
                    if instance.tools.last:
                        old.check_rules(instance.tools.last)
            else:
                self.servers[name] = self._new_server(config, self._pool)
                self.servers[name].restarts = old.restarts if old else 0
        for server in before.values():
            server.is_retired, server.spares_wanted = True, 0
        self._adopt(catalog)
        self.start()
        views = {call: call.client.view for call in self.subscriptions}           # several may be one client's
        calling = (call.client for call in (*self.calls, *views))
        for client in dict.fromkeys((*self.sessions.values(), *calling)):
            client.adopt(catalog)
        for call, view in views.items():
            if not call.is_done:               # with its session
                call.adopt(view)

    def _adopt_keys(self, keys: Keys) -> None:
        """Gives each client its caller as the keys are now; ends what came by a key that is gone."""
        callers = {caller: caller for caller in keys.callers}

        def current(caller: Caller | None) -> Caller | None:
            return caller.under(keys.scopes) if caller and caller.is_token else callers.get(caller)

        def is_another(caller: Caller | None) -> bool:
            return caller is not None and (current(caller) is None or current(caller).limits != caller.limits)
        calling = (call.client for call in self.calls if call.client.is_session)         # also those about to end
        for session in dict.fromkeys((*self.sessions.values(), *calling)):
            caller = current(session.caller)
            if session.caller and not caller:
                session.end()
            session.caller = caller
        for call in [call for call in (*self.subscriptions, *self.calls) if not call.client.is_session]:
            if call.is_endless and is_another(call.client.caller):
                call.end_subscription()
            elif call.client.caller and current(call.client.caller) is None:
                call.pin(limits_changed())
            call.client.caller = current(call.client.caller) or call.client.caller
        for server in self.servers.values():
            for instance in [one for one in server.instances.values() if one.owner and not one.is_private]:
                caller = instance.owner[0]                                         # a visitor's
                if caller and (is_another(caller) if instance.variables else current(caller) is None):
                    instance.last_used = float("-inf")                             # for when its calls are done
                    if not instance.is_used:
                        server.end(instance)

    @property
    def is_ready(self) -> bool:
        """Is there a server that can be used?"""
        return not self.is_leaving and any(server.can_be_used for server in self.servers.values())

    def server(self, name: str) -> Server | Group:
        """RPCError when it was taken out of the configuration."""
        server = self.servers.get(name) or self.groups.get(name)
        if server is None:
            raise RPCError(f"there is no server {name}", status=404)
        return server

    def check_open(self) -> None:
        """Refuses what would be new when the proxy is about to end."""
        if self.is_draining:
            raise try_later("the proxy is shutting down")

    def open_session(self, view: View, caller: Caller | None, variables: dict[str, str], principal: object = None,
                     is_streamable: bool = True, name: str | None = None,
                     headers: dict[str, str] | None = None) -> Session:
        """A session for a new client, once there is room for it and what it uses; `headers` are its request's."""
        self.check_open()
        others = ()
        if len(self.sessions) >= self.settings.max_sessions:
            others = holders_of_most(self.sessions.values(), principal)
            if not others:
                raise try_later("too many sessions")
        session = Session(self, view, caller, variables, principal, is_streamable, name, headers)
        connection = session.only_instance.connection if not view.is_joint else None
        if others:
            min(others, key=lambda one: (bool(one.calls), one.stream.is_attached, one.last_used)).end()
        self.sessions[session.id] = session
        about = {"session": session.label, **({"key": caller.name[:MAX_LABEL]} if caller else {})}
        log.info("= session %(session)s opened" + (" by %(key)s" if caller else "") + (
            f", at {connection.link.label}" if connection else ""), **about,
                 **(connection.link.fields if connection else {}))
        return session

    def unseal_session(self, sealed_id: str, view_now, caller: Caller | None, principal: object,
                       headers: dict[str, str]) -> str:
        """The name of the session with this id. One that is not known here is opened again, if its id is genuine and
        its servers are shared: another process opened it, or this one before it was started again."""
        name, secret = sealed_id.partition(".")[0], self.settings.session_secret
        if name in self.sessions:
            return name if self.sessions[name].sealed_id == sealed_id else NOBODYS_NAME
        view = view_now()                          # RPCError where there is nothing any more
        _, facts = unseal(secret, sealed_id) or (None, None)
        is_genuine = facts and (facts["whose"], facts["place"]) == (caller_mark(secret, caller), view.place) and (
            -CLOCKS_DIFFER <= time.time() - facts["time"] <= ID_SECONDS)
        if not is_genuine or name in self.deleted:
            return NOBODYS_NAME
        wanted = facts.get("wanted")               # without that, it is narrowed down as this request is
        if wanted is not None:
            view = self.catalog.view(view.place, tuple(map(tuple, wanted)), caller and caller.limits)
        if not view.is_for_all:
            return NOBODYS_NAME
        self.open_session(view, caller, {}, principal, name=name, headers=headers).restore(sealed_id, facts)
        return name

    def delete_session(self, session: Session) -> None:
        """Its client needs it no more: it is not opened again here. Running calls are answered a moment later, when the
        client has closed: Python's SDK 1.x would take an earlier answer for a fault, or die of it."""
        self.sessions.pop(session.id, None)
        if session.calls:
            asyncio.get_running_loop().call_later(GOODBYE_SECONDS, session.leave)
        else:
            session.leave()
        if self.settings.session_secret:
            self.deleted[session.id] = None
            if len(self.deleted) > MAX_DELETED:
                del self.deleted[next(iter(self.deleted))]

    def find_session(self, session_id: str | None, place: str | None, caller: Caller | None,
                     is_streamable: bool) -> Session:
        """The session that a client names; it has to come from the caller who opened it, and to the same place."""
        if not session_id:
            raise RPCError("missing Mcp-Session-Id: send initialize first, its answer has one" if is_streamable else
                           "missing session_id: post to the address that the stream of GET /sse begins with")
        session = self.sessions.get(session_id)
        if session is None or (session.view.place, session.caller, session.is_streamable) != (
                place, caller, is_streamable):
            raise no_such_session()
        session.last_used, session.is_followed = self.now(), True
        return session

    def visit(self, view: View, caller: Caller | None, variables: dict[str, str], principal: object = None,
              name: str | None = None, headers: dict[str, str] | None = None) -> Visitor:
        self.check_open()
        return Visitor(self, view, caller, variables, principal, name, headers)

    def make_room_for(self, call: PendingRequest) -> None:
        """Ends subscriptions while there are more than max_sessions; ServerError when this one has to go instead."""
        while len(self.subscriptions) > self.settings.max_sessions:
            others = holders_of_most(self.subscriptions - {call}, call.principal)
            if not others:
                raise try_later("too many subscriptions")
            min(others, key=lambda one: one.started).end_subscription()

    def tick(self, now: float) -> None:
        """Called now and then: ends the calls that take too long, and the sessions that nobody uses."""
        calls = [*self.calls, *self.parked.values()]
        busy = {call.instance for call in calls}
        for server in list(self._pool.servers):
            server.tick(now, busy)
            if server.is_retired and not (server.instances or server.ending):
                self._pool.servers.discard(server)
        for group in self.groups.values():
            group.probe()
        if now - self.asked_at < ASKED_SECONDS and not self.is_ready:
            for server in self.servers.values():
                server.probe()
        for call in calls:
            settings = call.instance.server.settings if call.instance else self.settings
            if now - call.last_sign >= settings.request_timeout or (
                    now - call.started >= max(LONGEST_CALL, settings.request_timeout)):
                call.time_out()
        if now - self._looked_at < 1.0:                      # there may be many thousands
            return
        self._looked_at = now
        for session in list(self.sessions.values()):
            self._look_after(session, now)
        for call in list(self.subscriptions):
            if call.early is None and any(self._has_better(call.client, one.server) for one in call.joined):
                call.end_subscription()                      # its client asks again, and comes to another of the group

    def _has_better(self, client: Client, server: Server) -> bool:
        """Is this member of a group down, and another one up? Then choose() has moved the client to that."""
        group = self.groups.get(server.config.group)
        if not group or group.name not in client.view.by_name or server.is_up_for(client):         # it is met by itself
            return False
        other = group.choose(client, None, client.headers)
        return other is not server and other.is_up_for(client)

    def _look_after(self, session: Session, now: float) -> None:
        """Does what no request of the session does, for it may just wait: withdraws questions that its client does not
        answer, keeps a server behind its subscriptions, and ends it when nobody uses it."""
        for question in list(session.questions.values()):                  # MCP 2025-11-25, Lifecycle, Timeouts
            if question.call is None and now - question.asked_at >= question.patience:
                question.withdraw(ServerError("the client did not answer", status=504))
        for name, member in list(session.members.items()) if session.topics else ():
            if name in self.groups and not member.is_up_for(session):
                self.groups[name].choose(session, None, session.headers)
        self._look_after_own(session, now)
        idle = self.settings.session_idle
        if session.is_homeless and not session.calls:
            session.end()
        elif session.calls or session.stream.is_attached:
            session.last_used = now
        elif now - session.last_used > (idle if session.is_followed else min(idle, UNFOLLOWED_SECONDS)):
            session.end()

    def _look_after_own(self, session: Session, now: float) -> None:
        """Of a session's own processes that did not start, or have ended, starts again those by which it would hear of
        a resource. If it was given a list without one, it is told once the server has worked for somebody else; its
        next request starts its own."""
        silent = {topic.instance for topic in session.topics if topic.instance.is_private and (
            topic.instance.state is NEW or
            topic.instance.state is CLOSED and now - topic.instance.since >= LONGEST_PROBE_PAUSE)}
        for instance in silent:
            if instance.failure:               # of a group, another one may have to take its place
                instance.server.count_outcome(instance, has_failed=True)
            with contextlib.suppress(ProxyError):
                session.at(instance.server).start()
        for server in [self.servers.get(one.name) for one in session.view.servers if not one.settings.shared_session]:
            instance = server and server.used_by(session)
            if instance and instance.is_missed and instance.state is CLOSED and server.back_at > instance.since and (
                    now - instance.since >= KEPT_SECONDS):
                instance.is_missed, instance.identity = False, server.identity
                tell_of_lists(instance)

    async def drain(self, seconds: float, delay: float = 0.0) -> None:
        """Lets balancers notice for a while; then takes no new calls, and gives those that run some time to finish."""
        self.is_leaving = True
        await asyncio.sleep(delay)
        self.is_draining = True
        for server in self.servers.values():
            server.spares_wanted = 0
        deadline = self.now() + seconds
        while self.calls and self.now() < deadline:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Ends everything; returns when no process is left."""
        for call in list(self.subscriptions):
            call.end_subscription()
        for call in [*self.calls, *self.parked.values()]:
            call.fail(try_later("the proxy was stopped"))          # no other of a group is to be asked
        for session in list(self.sessions.values()):
            session.end()
        servers, self._pool.servers = self._pool.servers, set()            # nothing is started for who waits for a list
        await asyncio.gather(*(server.close() for server in servers))


# ============================================================================
# 37. Several servers as one
# ============================================================================
#
# What is asked of all servers of a view, and which of them a request is for. Nobody is waited for long: one slow server
# costs only what it has itself.

RESOURCE_LISTS = "resources/list", "resources/templates/list"
MAX_TEMPLATES = 100              # of one server, to which a URI is compared
KNOWN_ITEMS = 100_000            # of what views show together
JOINT_SECONDS = 2.0              # to wait for the answers of all servers; then those that came are enough. More than
                                 # RELIST_SECONDS, so that a slow server's last list is among them
START_SECONDS = 10.0             # to wait for the start of a server that may have a resource, before a client listens
                                 # to it at another one


def stand_in_for(client: Client, server: Server | Group, failed: Instance, error: ServerError) -> Instance:
    """The instance of another server of a group in place of one that failed; raises the error if there is none."""
    if server.is_group:
        with contextlib.suppress(RPCError):                    # that group, as it is configured now
            return client.at(client.mount.server(server.name), failed.server)
    raise error


def instances_of(client: Client, names: collections.abc.Iterable[str]):
    """Yields (name, the client's instance) of each of these servers, but for those of which it can have none."""
    for name in names:
        with contextlib.suppress(ProxyError):
            yield name, client.by_name(name)


async def ask_servers(client: Client, known, ask,
                      members=None) -> tuple[list[tuple[ServerConfig, object]], dict[str, str]]:
    """Asks a client's servers, or only these `members`, for something: ([(server, value)] of those that have it,
    {name: why not} of the others). ServerError if none has it. A single server is waited for without limit.

    known(instance) is the value if it is known, or None; ask(instance), a coroutine, finds it out."""
    members = client.view.members if members is None else members

    async def ask_one(server: Server | Group, instance: Instance) -> object:
        try:
            return await ask(instance)
        except ServerError as error:
            return await ask(stand_in_for(client, server, instance, error))

    values, errors, waiting = {}, {}, {}
    for member in members:
        try:
            server = client.mount.server(member.name)
            instance = client.at(server)
            try:
                instance.check_up()
            except ServerError as error:
                instance = stand_in_for(client, server, instance, error)
                instance.check_up()
            if (value := known(instance)) is not None:
                values[member.name] = value
            else:
                waiting[asyncio.ensure_future(ask_one(server, instance))] = member.name, instance
        except ProxyError as error:
            errors[member.name] = error
    left, timeout = set(waiting), JOINT_SECONDS if len(members) > 1 else None
    try:
        while left:
            done, left = await asyncio.wait(left, timeout=timeout, return_when=asyncio.ALL_COMPLETED if timeout else
                                            asyncio.FIRST_COMPLETED)
            for task in done:
                name, error = waiting[task][0], task.exception()
                if error:
                    errors[name] = as_client_error(error)
                else:
                    values[name] = task.result()
            if values:
                break
            timeout = None                         # nothing is there yet: the first that comes is waited for
    finally:
        for task in left:
            task.cancel()
            name, instance = waiting[task]
            errors[name] = ServerError("it has not answered yet" if instance.connection else "it is starting")
    missing = {name: str(error) for name, error in errors.items()}
    found = [(member, values[member.name]) for member in members if member.name in values]
    if not found:
        what = "server " if len(members) == 1 else "none of the servers can be used: "
        what += "; ".join(f"{name}: {why}" for name, why in missing.items())
        all_are_busy = all(error.http_status == 503 for error in errors.values())
        error = try_later(what) if all_are_busy else ServerError(what)
        error.data = {UNAVAILABLE_KEY: missing}
        raise error
    return found, missing


async def gather_lists(client: Client, method: str, members=None,
                       way: str = "") -> tuple[list[tuple[ServerConfig, Items]], dict[str, str]]:
    """What the servers list by a method; those that are missing tell the client when they are back."""
    try:
        found, missing = await ask_servers(client, lambda instance: instance.list_of(method, way).fresh,
                                           lambda instance: instance.list_of(method, way).get(), members)
    except ServerError as error:
        mark_missed(client, error.data[UNAVAILABLE_KEY], method, way)
        raise
    mark_missed(client, missing, method, way)
    return found, missing


async def have_started(client: Client, missing: collections.abc.Iterable[str], waited: frozenset[str],
                       patience: float | None = None) -> frozenset[str]:
    """Waits until the first of these servers has started or failed to, for `patience` seconds at the most; one that has
    just started, and still lists what it has, counts too. Returns the names of those that may have more to say now. One
    whose last start failed is not waited for, nor one that was `waited` for: where there is no room for all, that would
    have no end."""
    starts = {}
    for _, instance in instances_of(client, missing):
        is_starting = instance.state in (NEW, STARTING)
        is_new = instance.state is READY and client.mount.now() - instance.since < JOINT_SECONDS
        if (is_starting or is_new) and not (instance.failure or instance.server.name in waited):
            start = asyncio.ensure_future(instance.ready())
            start.add_done_callback(lambda start: start.cancelled() or start.exception())
            starts[start] = instance.server.name
    if not starts:
        return frozenset()
    try:
        done, _ = await asyncio.wait(starts, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        return frozenset(map(starts.get, done))
    finally:
        for start in starts:
            start.cancel()


def mark_missed(client: Client, missing: dict[str, str], method: str | None = None, way: str = "") -> None:
    """Remembers that a client was given an answer without these servers."""
    for _, instance in instances_of(client, missing):
        if instance.connection is None:
            instance.is_missed = True
        elif method:
            instance.list_of(method, way).is_missed = True


async def gather_identities(client: Client) -> tuple[list[tuple[ServerConfig, Identity]], dict[str, str]]:
    """What the servers said of themselves in their handshakes."""
    async def ask(instance: Instance) -> Identity:
        await instance.ready()
        return instance.identity
    found, missing = await ask_servers(client, lambda instance: instance.identity, ask)
    mark_missed(client, missing)
    return found, missing


async def tools_at(client: Client, name: str | None = None, refresh: bool = False) -> dict[str, str]:
    """The texts of the tools that a client is shown, by name; with a name, of those servers that may have it."""
    view = client.view
    if view.is_plain:
        return (await client.only_instance.tools.get(refresh)).texts
    found, _ = await ask_servers(
        client, lambda instance: None if refresh else instance.tools.fresh,
        lambda instance: instance.tools.get(refresh), None if name is None else view.candidates(name))
    return {name: item.text for name, item in shown_of(view, found).items()}


def shown_of(view: View, found: list[tuple[ServerConfig, Items]]) -> dict[str, ShownItem]:
    """All items by the name that is shown; of two with one name the first."""
    kept, key = view.catalog.shown, (view, found[0][1].method)
    known_for, shown = kept.pop(key, ((), {}))
    if len(known_for) == len(found) and all(one[1] is other[1] for one, other in zip(known_for, found)):
        kept[key] = known_for, shown                       # at the end again: what was used last is dropped last
        return shown
    shown = {}
    for member, items in found:
        try:
            own_shown = shown_of_one(view, member, items)
        except Exception as error:             # what is wrong with one of them is no other's fault
            log.fault(error)
            continue
        for name, item in own_shown.items():
            if name in shown:
                if LISTS[items.method].named_by == "name" and is_first(view.left_out, member.name, name):
                    log.warning("! server %(server)s: %(name)s is left out, because server %(other)s has that name",
                                server=member.name, name=name, other=shown[name].server.name)
            elif items.method != "tools/list" or view.shows(name):
                shown[name] = item
    if is_short(view.wanted):
        kept[key] = found, shown
        # Lists may be large, and each key's and each choice another.
        while sum(100 + len(one) for _, one in kept.values()) > KNOWN_ITEMS and len(kept) > 1:
            del kept[next(iter(kept))]
    return shown


def shown_of_one(view: View, member: ServerConfig, items: Items) -> dict[str, ShownItem]:
    """What one server lists, by the name that is shown, and of that what the caller may use."""
    shown, kind = items.shown(member, view.is_joint), items.method.partition("/")[0]
    return shown if not view.limits else {
        name: item for name, item in shown.items() if view.opens(member.name, kind, item.own, items[item.own])}


def pick(client: Client, message: Message) -> Target | None:
    """Where a request of a client goes, in a view that is not plain; None when that has to be found out."""
    view, method, params = client.view, message.method, message.params
    if method in ("tools/call", "prompts/get"):
        return view.direct(method, params["name"])
    if not view.is_joint:
        return Target(view.members[0].name)
    if method == "resources/unsubscribe" and client.is_session:        # the first to list it may have refused it
        joined = {name for topic in client.topics if topic.uri == params.get("uri")
                  for name in (topic.instance.server.name, topic.instance.server.config.group)}
        return next((Target(one.name) for one in view.members if one.name in joined), None)
    task, state = params.get("taskId"), params.get("requestState")
    names = [one.name for one in view.servers if task.startswith(f"{one.name}__")] if isinstance(task, str) else []
    if names:
        return Target(max(names, key=len))                             # a___1 is of a_, and not of a
    given = client.mount.states.get(state_key(state, params["uri"])) if method == "resources/read" and (
        isinstance(state, str)) else None
    return Target(given.place) if given and given.place in view.by_name else None


async def find_targets(client: Client, message: Message) -> tuple[list[Target], dict[str, str]]:
    """For a request whose name alone does not say where it goes: (where to, one after the other, until it is taken;
    {name: why} of servers that may have it too, but could not be asked)."""
    view, params, method = client.view, message.params, message.method
    is_call, is_completion = method in ("tools/call", "prompts/get"), method == "completion/complete"
    named = members_of(params.get("ref")) if is_completion else params
    name, uri = named.get("name"), named.get("uri")
    # A call goes by its name alone: by a `ref` or a `uri` beside that, it would get around what its caller may use.
    if isinstance(uri, str) and not is_call:
        return await find_by_uri(client, uri, None if method == "resources/subscribe" else 0)
    if method.startswith("tasks/"):
        await check_knows_tasks(client, message)
        raise unknown_task()
    if is_completion and not isinstance(name, str):
        raise RPCError("ref has neither a name nor a uri", status=200, code=INVALID_PARAMS)
    if is_completion and (target := view.direct("prompts/get", name)):
        return [target], {}
    if is_completion or is_call:
        return await find_by_name(client, "tools" if method == "tools/call" else "prompts", name)
    # The method is an extension's. A server without a prefix could have every name.
    candidates = view.candidates(name) if isinstance(name, str) else []
    candidates = [one for one in candidates if one.start_of_names] or candidates
    if len(candidates) != 1:
        raise RPCError(f"no server is named for {method}", status=404, code=METHOD_NOT_FOUND)
    return [Target(candidates[0].name, name.removeprefix(candidates[0].start_of_names))], {}


async def find_by_name(client: Client, kind: str, name: str,
                       waited: frozenset[str] = frozenset()) -> tuple[list[Target], dict[str, str]]:
    """The first server that lists the tool or prompt, in the form of find_targets(), without waiting twice for any."""
    view = client.view
    found, missing = await gather_lists(client, f"{kind}/list", view.candidates(name))
    member, own, _ = shown_of(view, found).get(name, (None, None, None))
    if member is None:
        started = await have_started(client, missing, waited)
        if started:
            return await find_by_name(client, kind, name, waited | started)
        if missing:
            raise ServerError("; ".join(f"server {name}: {why}" for name, why in missing.items()), status=503)
        # What one of these lists has, but not for this caller; else what no list has.
        closed = (view.refusal(one.name, kind, items.shown(one, view.is_joint)[name].own, name)
                  for one, items in found if view.limits and name in items.shown(one, view.is_joint))
        raise next(closed, None) or view.unknown(kind, name)
    before = itertools.takewhile(lambda other: other is not member, view.members)
    for other, instance in instances_of(client, (one.name for one in before if one.name in missing)):
        last = instance.list_of(f"{kind}/list").last       # what it listed before, if it cannot be used now
        if last and name in shown_of_one(view, view.by_name[other], last):
            raise ServerError(f"server {other}: {missing[other]}", status=503)         # it is still its name
    return [view.target(member, kind, own, name)], {}


async def check_knows_tasks(client: Client, message: Message) -> None:
    """Refuses a request for a task where no server has any, or the client has not said that it knows them. SEP-2663,
    Capability Negotiation."""
    found, _ = await gather_identities(client)
    if not any(identity.has("tasks") or identity.has(TASKS_EXTENSION) for _, identity in found):
        raise RPCError(f"no server knows {message.method}", status=404, code=METHOD_NOT_FOUND)
    if CAPABILITIES_KEY in message.meta:
        if message.method not in NAMED_IN_HEADER:
            raise RPCError(f"{message.method} is no method of {MODERN_VERSION}", status=404, code=METHOD_NOT_FOUND)
        if TASKS_EXTENSION not in members_of(members_of(message.meta[CAPABILITIES_KEY]).get("extensions")):
            raise no_tasks()


async def gather_resources(client: Client) -> tuple[list[tuple[ServerConfig, tuple]], dict[str, str]]:
    """([(server, (its identity, its resources, its templates))], {name: why not} of the others). The parts of one
    request may all want them at once, and share the work; what began earlier, only if no server is missing in it."""
    def known(instance: Instance) -> tuple | None:
        items = [instance.list_of(method).fresh for method in RESOURCE_LISTS]
        return (instance.identity, *items) if instance.identity and None not in items else None

    async def ask(instance: Instance) -> tuple:
        items = await asyncio.gather(*(instance.list_of(method).get() for method in RESOURCE_LISTS))
        return instance.identity, *items

    def on_done(task: asyncio.Task) -> None:
        task.cancelled() or task.exception()
        client.gathering = None
    arrived = client.mount.now()
    while True:
        if client.gathering is None:
            client.gathering = client.mount.now(), asyncio.ensure_future(ask_servers(client, known, ask))
            client.gathering[1].add_done_callback(on_done)
        began, gathering = client.gathering
        await asyncio.wait([gathering])
        if began >= arrived or not (gathering.exception() or gathering.result()[1]):
            return gathering.result()


async def take_turn(client: Client) -> None:
    """Parts of one request that look at all servers do so one after the other, each in a turn of the loop."""
    async with client.turns:
        await asyncio.sleep(0)


async def find_by_uri(client: Client, uri: str, patience: float | None,
                      waited: frozenset[str] = frozenset()) -> tuple[list[Target], dict[str, str]]:
    """The first server that lists the resource, or the template; else the first with a template that it fits, else
    all. In the form of find_targets(). Servers that start are waited for, each for `patience` seconds (None: without
    limit; 0: not at all), since a subscription at the wrong one would stay there."""
    await take_turn(client)
    for method in RESOURCE_LISTS:                  # where a list that is known has it, nobody is waited for
        for name, instance in instances_of(client, client.view.by_name):
            items = instance.list_of(method).known
            if items is not None and uri in items:
                return [Target(name)], {}
    failure = None
    try:
        found, missing = await gather_resources(client)
    except ServerError as error:                   # none could list what it has
        failure, found, missing = error, [], error.data[UNAVAILABLE_KEY]
    await take_turn(client)
    for number in (1, 2):
        for member, has in found:
            if uri in has[number]:
                return [Target(member.name)], {}
    fitting = (member.name for member, (_, _, templates) in found if any(
        fits_template(uri[:MAX_URI], template) for template in itertools.islice(templates, MAX_TEMPLATES)))
    first = next(fitting, None)
    if first and len(uri) <= MAX_URI:
        return [Target(first)], missing
    started = patience != 0 and await have_started(client, missing, waited, patience)
    if started:
        return await find_by_uri(client, uri, patience, waited | started)
    identities = {member.name: identity for member, (identity, *_) in found}
    for name, instance in instances_of(client, missing):      # one that could not list them may have it all the same
        identities[name] = instance.connection and instance.identity
    targets = [Target(member.name) for member in client.view.members
               if identities.get(member.name) and identities[member.name].has("resources")]
    likely = {first, *fitting}                     # of a longer URI, whose end was not compared and may not fit
    targets.sort(key=lambda target: target.server not in likely)
    if not targets:
        raise failure or RPCError("no server has resources", status=404, code=METHOD_NOT_FOUND)
    return targets, {name: why for name, why in missing.items() if not identities.get(name)}


# ============================================================================
# 38. Bridges
# ============================================================================
#
# What happens to the messages of an exchange depends on the eras of its two sides, so there are four bridges. Between
# sides of one era a message only gets another id. Between eras the hard part is a server's question. The legacy way is
# a request in the middle of a running call; the modern way is to end the call with `input_required` and to be called
# again. So where a legacy server asks a modern client, the running call is parked until the client comes back with the
# answers, and where a modern server asks a legacy client, the client's answers are gathered and the call is made again.

ACKNOWLEDGE_SECONDS = 2.0        # for a server to say which subscriptions it takes
SUBSCRIPTIONS = 1_000            # of one session, or in one subscriptions/listen
ROUNDS = 32                      # that a modern server may ask a legacy client for input in one call
REPEAT_SECONDS = 0.1             # longer each time, before a server that asked for nothing gets the call again


def listened_for(message: Message) -> dict:
    """What a subscriptions/listen asks for; RPCError when it asks for nothing or for too much."""
    wanted = message.plain_params.get("notifications")
    if not isinstance(wanted, dict):
        raise RPCError("subscriptions/listen needs the parameter notifications", code=INVALID_PARAMS)
    uris = wanted.get("resourceSubscriptions")
    if isinstance(uris, list) and len(dict.fromkeys(strings_of(uris))) > SUBSCRIPTIONS:
        raise RPCError(f"more than {SUBSCRIPTIONS} resources", code=INVALID_PARAMS)
    return wanted


class Bridge:
    """What happens between a client and a server: here, what is the same in every pair of eras.

    What is done before, or in place of, sending a request is a method that takes (exchange, message), has a row in
    `intercepted`, and returns True where the request still has to be sent."""

    keeps_requests = False             # may a request be needed after it was sent?

    def check_task(self, exchange: "Exchange", message: Message) -> bool:
        """Knows nothing of another client's task."""
        if not exchange.instance.is_owner(exchange.client, owner_named(message)):
            raise unknown_task()
        return True

    # MCP method -> method of the bridge
    intercepted = dict.fromkeys(("tasks/get", "tasks/result", "tasks/cancel", "tasks/update"), check_task)

    def restate(self, exchange: "Exchange", message: Message, new: dict[str, str]) -> list[tuple[int, int, str]]:
        """What a request needs changed for the server beside its id; the members `new` (name -> JSON) go into _meta."""
        return restated_meta(message, new) if new else []

    def respond(self, exchange: "Exchange", response: ResponseLine | Message) -> None:
        """The server's response."""
        exchange.finish(response.with_id(exchange.raw_id))


class LegacyClientBridge(Bridge):
    """Requests of a legacy client that would change the server for its other clients, too: the proxy answers them."""

    def initialize(self, exchange: "Exchange", message: Message) -> None:
        """Shakes hands for the server."""
        client, identity = exchange.client, exchange.instance.identity
        # A server that was told the client's own words has answered the client; otherwise the proxy answers for it,
        # also where the server answered with a revision that nobody knows.
        is_answered = not exchange.instance.knows_our_capabilities and identity.version in LEGACY_VERSIONS
        version = identity.version if is_answered else negotiate(message.params.get("protocolVersion"))
        if client.is_session:
            client.introduce(message, version)
        exchange.finish(encode_result(exchange.raw_id, identity.initialize_result(
            version, client.is_session, client.owner is None)))

    def set_level(self, exchange: "Exchange", message: Message) -> bool | None:
        """Remembers which log messages the client wants; the server is told the most verbose level of all."""
        has_logs = "logging" in exchange.instance.identity.capabilities
        if exchange.client.is_session and not has_logs and exchange.connection.era is LEGACY:
            return True                     # the server knows what to say to that; a modern one has no such method
        exchange.client.choose_log_level(message.params.get("level"), has_logs)
        exchange.finish(encode_result(exchange.raw_id))

    def subscribe(self, exchange: "Exchange", message: Message) -> None:
        """Joins those who subscribed to a resource, and tells the client what the server says to that."""
        uri, client, instance = message.params.get("uri"), exchange.client, exchange.instance
        if not client.is_session:
            raise RPCError("subscriptions need a session")
        if len(client.topics) >= SUBSCRIPTIONS and not any(topic.uri == uri for topic in client.topics):
            raise try_later("too many subscriptions")
        if instance.server.is_retired:         # while this waited for its start: it ends when this call is done
            raise try_later("the configuration has changed")

        topic = instance.topics.subscribe(client, uri)
        verdict = topic.verdict

        def settle(verdict: asyncio.Future) -> None:
            if exchange.is_done:
                return
            topic.asking.remove(exchange)
            exchange.on_done = None
            if not verdict.result():
                if client in topic.subscribers:        # it may have left meanwhile
                    topic.told.add(client)
                exchange.finish(encode_result(exchange.raw_id))
            elif not exchange.ask_next():
                exchange.fail(verdict.result())

        def leave() -> None:
            """It was cancelled: nothing is kept of it, however long the server takes."""
            topic.asking.remove(exchange)
            verdict.remove_done_callback(settle)
            if client not in topic.told and not any(other.client is client for other in topic.asking):
                instance.topics.unsubscribe(client, topic)
        topic.asking.append(exchange)
        exchange.on_done = leave
        verdict.add_done_callback(settle)

    def unsubscribe(self, exchange: "Exchange", message: Message) -> bool | None:
        """Unsubscribes the client at each server where it subscribed to this: it may have moved since. Where it waits
        to subscribe, it waits no longer."""
        uri, client, instance = message.params.get("uri"), exchange.client, exchange.instance
        joined = [topic for topic in client.topics if topic.uri == uri] if client.is_session else []
        for topic in joined:
            topic.instance.topics.unsubscribe(client, topic)
        earlier = itertools.takewhile(lambda call: call is not exchange, client.calls.values())
        waiting = [call for call in earlier if client.is_session and call.method == "resources/subscribe" and (
            not call.is_running and call.size <= SMALL and parse_message(call.text).params.get("uri") == uri)]
        for call in waiting:
            call.finish(encode_result(call.raw_id))
            call.work.cancel()
        if not (joined or waiting) and uri not in instance.topics and exchange.connection.era is LEGACY:
            return True                     # nobody's: the server knows what to say to that
        exchange.finish(encode_result(exchange.raw_id))

    intercepted = {**Bridge.intercepted, "initialize": initialize, "logging/setLevel": set_level,
                   "resources/subscribe": subscribe, "resources/unsubscribe": unsubscribe}


class LegacyClientLegacyServer(LegacyClientBridge):
    """Both shake hands; the server's handshake was the proxy's, or a session's own. (Here and below, what is the same
    in each message is left out.)

        client > {"id":"a","method":"tools/call","params":{"name":"x"}}
                 server > {"id":7,"method":"tools/call","params":{"name":"x"}}
                 server < {"id":1,"method":"elicitation/create","params":{...}}
        client < {"id":31,"method":"elicitation/create","params":{...}}
        client > {"id":31,"result":{"action":"decline"}}
                 server > {"id":1,"result":{"action":"decline"}}
                 server < {"id":7,"result":{"content":[]}}
        client < {"id":"a","result":{"content":[]}}
    """

    def ask(self, exchange: "Exchange", question: Question, missing: dict | None) -> None:
        # Many servers ask for roots once and keep the answer; one for many would use one client's for all.
        if missing or question.message.method == "roots/list" and not exchange.instance.is_private:
            question.refuse(NO_CLIENT_CAN)
        else:
            exchange.begin_dialogue().ask_session(question)


class ModernClientModernServer(Bridge):
    """Neither has a state; ids are all that has to be told apart. That of a subscription is in _meta, too.

        client > {"id":"a","method":"subscriptions/listen","params":{"notifications":{"taskIds":["t"]},...}}
                 server > {"id":7,"method":"subscriptions/listen",...}
                 server < {"method":"notifications/tasks","params":{"_meta":{".../subscriptionId":7},...}}
        client < {"method":"notifications/tasks","params":{"_meta":{".../subscriptionId":"a"},...}}
    """

    def listen(self, exchange: "Exchange", message: Message) -> bool | None:
        """A subscription. The proxy listens in its place, for servers may have room for one alone; but not for what it
        knows nothing of, as extensions may have some, nor for tasks, which are one client's own."""
        wanted = listened_for(message)
        if wanted.keys() <= {*LIST_CHANGES, "resourceSubscriptions"}:
            return exchange.listen_here()
        for name in strings_of(wanted.get("taskIds")):
            if not exchange.instance.is_owner(exchange.client, ("task", name)):
                raise unknown_task()
        exchange.client.mount.make_room_for(exchange)
        # The changes of which the proxy itself tells it, see adopt(); the rest comes from the server.
        exchange.wanted = exchange.instance.identity.supported({name: wanted.get(name) for name in LIST_CHANGES})
        return True

    intercepted = {**Bridge.intercepted, "subscriptions/listen": listen}

    def respond(self, exchange: "Exchange", response: ResponseLine | Message) -> None:
        if exchange.method in CACHEABLE and response.is_result:
            response = as_private(response) if exchange.client.is_apart else response
            if exchange.method == "server/discover":
                response = with_known_versions(response)
        payload = [self.under_own_id(exchange, response.parsed(), "result")] if exchange.is_endless else (
            response.with_id(exchange.raw_id))
        exchange.finish(payload, 200 if response.is_result else STATUS_OF_CODE.get(response.parsed().error_code, 200))

    @staticmethod
    def under_own_id(exchange: "Exchange", message: Message, member: str) -> bytes:
        """A message of a subscription, with the client's id in the place of ours."""
        changes = [message.new_id(exchange.raw_id)] if "id" in message.members else []
        meta = members_of(members_of(message.members.get(member)).get("_meta"))
        if SUBSCRIPTION_KEY in meta:
            changes.append((*message.span(member, "_meta", SUBSCRIPTION_KEY), exchange.raw_id.decode()))
        return message.changed(changes)


class ModernClientLegacyServer(Bridge):
    """The envelope is taken off, and results get what a modern client expects in them. A question parks the call.

        client > {"id":1,"method":"tools/call","params":{"name":"x","_meta":{".../protocolVersion":"2026-07-28",...}}}
                 server > {"id":7,"method":"tools/call","params":{"name":"x","_meta":{}}}
                 server < {"id":1,"method":"elicitation/create","params":{...}}
        client < {"id":1,"result":{"resultType":"input_required","inputRequests":{"31":{...}},"requestState":"c0ffee"}}
        client > {"id":2,"method":"tools/call","params":{"name":"x","inputResponses":{"31":{...}},
                                                         "requestState":"c0ffee","_meta":{...}}}
                 server > {"id":1,"result":{...}}
                 server < {"id":7,"result":{"content":[]}}
        client < {"id":2,"result":{"resultType":"complete","content":[]}}
    """

    keeps_requests = True              # to know one again that comes with answers

    def restate(self, exchange: "Exchange", message: Message, new: dict[str, str]) -> list[tuple[int, int, str]]:
        if exchange.envelope.log_level:
            exchange.instance.adjust_log_level(exchange.envelope.log_level)
        return restated_meta(message, new, keeps_envelope=False)

    def respond(self, exchange: "Exchange", response: ResponseLine | Message) -> None:
        if response.is_result:
            if exchange.method in LISTS:
                response = without_empty_cursor(response)
            return exchange.finish(result_with(response, exchange.raw_id, additions(
                exchange.method, exchange.instance.identity.info)))
        response = response.parsed()
        code = MODERN_CODES.get(response.error_code, response.error_code)
        exchange.finish(error_with(response, exchange.raw_id, MODERN_CODES), STATUS_OF_CODE.get(code, 200))

    def ask(self, exchange: "Exchange", question: Question, missing: dict | None) -> None:
        if question.message.method not in INPUT_REQUESTS:
            return question.refuse(NO_CLIENT_CAN)
        exchange.begin_dialogue().ask_by_parking(question, missing)

    def discover(self, exchange: "Exchange", message: Message) -> None:
        """Answers from the server's handshake."""
        exchange.finish(encode_result(exchange.raw_id, exchange.instance.identity.discover_result()))

    def listen(self, exchange: "Exchange", message: Message) -> None:
        """A subscription, made of list changes and legacy ones."""
        exchange.listen_here()

    def retry(self, exchange: "Exchange", message: Message) -> bool | None:
        """A request that comes again with answers goes on where its call was parked."""
        message = exchange.message = without_params(message, "task")        # SEP-2663: "servers MUST ignore it"
        if "requestState" not in message.params:
            return True
        state = message.params.get("requestState")
        parked = exchange.client.mount.parked.get(state) if isinstance(state, str) else None
        if (parked is None or parked.client.caller != exchange.client.caller or parked.instance is not exchange.instance
                or parked.method != exchange.method or parked.digest != digest_of(message)):
            raise RPCError("requestState is unknown, was used, or belongs to another request", code=INVALID_PARAMS)
        parked.dialogue.resume(exchange, message)

    intercepted = {**Bridge.intercepted, "server/discover": discover, "subscriptions/listen": listen,
                   **dict.fromkeys(MAY_NEED_INPUT, retry)}


class LegacyClientModernServer(LegacyClientBridge):
    """The proxy shakes hands for the server, puts an envelope on each request, and asks what the server asks.

        client > {"id":1,"method":"tools/call","params":{"name":"x"}}
                 server > {"id":7,"method":"tools/call","params":{"name":"x","_meta":{...}}}
                 server < {"id":7,"result":{"resultType":"input_required","inputRequests":{"q":{...}},
                                           "requestState":"s"}}
        client < {"id":31,"method":"elicitation/create","params":{...}}
        client > {"id":31,"result":{...}}
                 server > {"id":8,"method":"tools/call","params":{"name":"x","inputResponses":{"q":{...}},
                                                                  "requestState":"s","_meta":{...}}}
                 server < {"id":8,"result":{"resultType":"complete","content":[]}}
        client < {"id":1,"result":{"content":[]}}
    """

    keeps_requests = True              # to make one again with answers

    def restate(self, exchange: "Exchange", message: Message, new: dict[str, str]) -> list[tuple[int, int, str]]:
        client = exchange.client
        new[VERSION_KEY] = f'"{MODERN_VERSION}"'
        extensions = exchange.capabilities.get("extensions")
        new[CAPABILITIES_KEY] = dump(exchange.capabilities if not isinstance(extensions, dict) else {
            **exchange.capabilities, "extensions": {name: extension for name, extension in extensions.items()
                                                    if name != TASKS_EXTENSION}})
        new[CLIENT_INFO_KEY] = client.info or dump(OUR_INFO)
        if client.is_session:                              # a legacy server may tell its log unasked, too
            new[LOG_LEVEL_KEY] = f'"{client.log_level or UNASKED_LEVEL}"'
        return restated_meta(message, new, beside=exchange.dialogue and exchange.dialogue.gathered)

    def respond(self, exchange: "Exchange", response: ResponseLine | Message) -> None:
        if not response.is_result:
            # What it was called before 2026-07-28.
            codes = {INVALID_PARAMS: RESOURCE_NOT_FOUND} if exchange.method == "resources/read" else {}
            exchange.finish(error_with(response.parsed(), exchange.raw_id, codes))
        elif parsed_if_it_has(response, "resultType", b'"input_required"'):
            self._gather(exchange, response.parsed())
        else:
            exchange.finish(result_without(response, exchange.raw_id, exchange.method))

    def _gather(self, exchange: "Exchange", response: Message) -> None:
        """Asks the client for the input, and then makes the call again. MCP 2026-07-28, Multi Round-Trip Requests."""
        exchange.connection.causes.discard(exchange)          # until it is made again
        dialogue = exchange.begin_dialogue()
        dialogue.rounds += 1
        budget.set(exchange, exchange.held - dialogue.held)
        dialogue.held = 0
        if exchange.text is None and exchange.is_pinned:
            raise limits_changed()
        if dialogue.rounds > ROUNDS or exchange.text is None:
            raise ServerError("the MCP server asked for input too often, or where it may not")
        result, answers = response.result, {}
        state = response.raw("result", "requestState") if "requestState" in result else None
        wanted = result.get("inputRequests")
        wanted = wanted if isinstance(wanted, dict) else {}
        if not wanted and state is None:
            raise ServerError("the MCP server asked for input without saying which")

        def gathered(key: str, text: str) -> None:
            if exchange.is_done:
                return
            answers[key] = text
            dialogue.held += len(text)
            budget.set(exchange, exchange.held + len(text))
            if len(answers) == len(wanted):
                self._repeat(exchange, answers, state)
        for key, request in wanted.items():
            if exchange.is_done:                              # a question could not be asked
                return
            self._ask_client(exchange, key, request, response, gathered)
        if not wanted:                                        # "the client MAY retry the original request immediately"
            asyncio.get_running_loop().call_later(REPEAT_SECONDS * (dialogue.rounds - 1), self._repeat, exchange, {},
                                                  state)

    def _ask_client(self, exchange: "Exchange", key: str, request: object, response: Message, gathered) -> None:
        request = request if isinstance(request, dict) else {}
        method, params = request.get("method"), request.get("params", {})
        if not (isinstance(method, str) and isinstance(params, dict)):
            raise ServerError("the MCP server asked for something that is no request")
        if method not in INPUT_REQUESTS or missing_capabilities(exchange.capabilities, method, params):
            raise ServerError("the MCP server asked for what this client cannot do")
        members = response.raw_members("result", "inputRequests", key, "params") if params else {}
        if method == "elicitation/create" and params.get("mode") == "url":
            members["elicitationId"] = f'"{os.urandom(16).hex()}"'         # 2025-11-25 requires it, 2026-07-28 has none

        def on_response(_: Question, response: Message) -> None:
            if "result" in response.members:
                gathered(key, response.raw("result"))
            elif method == "elicitation/create":
                gathered(key, '{"action":"cancel"}')
            else:
                # There is no way to tell the server of an error, so the call fails with it.
                exchange.finish(response.with_id(exchange.raw_id))
        asked = dump(method).encode(), as_object(members).encode()
        question = Question(lambda raw_id: [b'{"jsonrpc":"2.0","id":%b,"method":%b,"params":%b}' % (raw_id, *asked)],
                            on_response)
        exchange.begin_dialogue().ask_session(question)

    def _repeat(self, exchange: "Exchange", answers: dict[str, str], state: str | None) -> None:
        if exchange.is_done:
            return
        gathered = exchange.dialogue.gathered = {"inputResponses": as_object(answers)} if answers else {}
        if state:
            gathered["requestState"] = state
        if not exchange.connection.link.is_open:       # the server may be back, and the answers go on from there
            return exchange.start_over()
        try:
            exchange.transmit()
        except ServerError as error:
            exchange.fail(error)

    def ping(self, exchange: "Exchange", message: Message) -> None:
        """Modern servers have no such method."""
        exchange.finish(encode_result(exchange.raw_id))

    intercepted = {**LegacyClientBridge.intercepted, "ping": ping}


#    client      server
BRIDGES = {
    (LEGACY, LEGACY): LegacyClientLegacyServer(),
    (MODERN, MODERN): ModernClientModernServer(),
    (MODERN, LEGACY): ModernClientLegacyServer(),
    (LEGACY, MODERN): LegacyClientModernServer(),
}


# ============================================================================
# 39. Dialogues
# ============================================================================
#
# What a server asks in the course of a call. A legacy client is asked while its request is served. A modern one is
# asked by ending its request: the call is parked, under a state that the client brings when it comes back with the
# answers. Of several questions, it gets those that it can answer.

PARKED_CALLS = 1_000             # that wait for their client; past that somebody's oldest times out
PARK_SECONDS = 0.02              # how long further questions are waited for before a call is parked


class Dialogue:
    """The questions of one exchange."""

    def __init__(self, exchange: "Exchange"):
        self.exchange = exchange
        self.questions: dict[str, Question] = {}      # that are open, by their id, which is a modern client's key
        self.request_state = ""                       # under which the parked call is known
        self.late = None                              # the response or error that came while the call was parked
        self.rounds = 0                               # how often a modern server asked for input
        self.gathered: dict[str, str] = {}            # what it gets with the next round, as members of the params,
        self.held = 0                                 # and how many bytes that is
        self._parking: asyncio.TimerHandle | None = None

    def ask_session(self, question: Question) -> None:
        """Asks a legacy client."""
        self.questions[str(question.id)] = question
        question.call, self.exchange.has_begun = self.exchange, True
        self.exchange.client.ask(question, self.exchange.outlet.send)

    def ask_by_parking(self, question: Question, missing: dict | None) -> None:
        """Asks a modern client, when the call is parked; with something `missing`, refuses the question then."""
        if len(self.questions) >= OPEN_QUESTIONS:
            next(iter(self.questions.values())).refuse(NO_CLIENT_CAN)
        self.questions[str(question.id)] = question
        question.call, question.missing = self.exchange, missing
        question.hold(len(question.message.text), self.exchange.principal)
        self._park_soon()

    def _park_soon(self) -> None:
        self._parking = self._parking or asyncio.get_running_loop().call_later(PARK_SECONDS, self._park)

    def _park(self) -> None:
        exchange, missing, self._parking = self.exchange, {}, None
        for question in [question for question in self.questions.values() if question.missing]:
            question.refuse(NO_CLIENT_CAN)
            for name, value in question.missing.items():
                missing.setdefault(name, {}).update(value)
        if exchange.is_running and not self.questions and missing:
            exchange.fail(RPCError("the call needs a capability that the client did not declare",
                                   code=MISSING_CAPABILITY, data={"requiredCapabilities": missing}))
        elif exchange.is_running and self.questions and self._make_room():
            # Nobody can guess or make one, it is good for one use, and it says nothing: what it stands for stays here.
            self.request_state = os.urandom(24).hex()
            result = input_required({key: question.message for key, question in self.questions.items()},
                                    self.request_state, exchange.instance.identity.info)
            if exchange.group:
                exchange.remember_state(self.request_state)
            exchange.park(encode_result(exchange.raw_id, result))

    def _make_room(self) -> bool:
        """Can one more call be parked? If need be, another one times out for it, or this one fails."""
        exchange, parked = self.exchange, self.exchange.client.mount.parked.values()
        if len(parked) < PARKED_CALLS:
            return True
        others = holders_of_most(parked, exchange.principal) or [
            call for call in parked if call.principal == exchange.principal]
        if others:
            others[0].time_out()
        else:
            exchange.fail(try_later("too many calls wait for their clients"))
        return bool(others)

    def resume(self, retry: "Exchange", message: Message) -> None:
        """The client is back, and answers what it was asked: the parked call takes the place of `retry`."""
        exchange, given = self.exchange, message.params.get("inputResponses", ())
        if not isinstance(given, tuple):
            raise RPCError("inputResponses must be an object", code=INVALID_PARAMS)
        given = members_of(given)
        keys = self.questions.keys() & given.keys()
        if not all(isinstance(given[key], tuple) for key in keys):
            raise RPCError("an input response must be an object", code=INVALID_PARAMS)
        exchange.take_place_of(retry, message)
        for key in keys:
            result = encode_result(b"0", message.raw("params", "inputResponses", key).encode())[0]
            if key in self.questions:             # the answer to another one may have ended the call
                self.questions[key].respond(parse_message(result.decode()))
        late, self.late = self.late, None
        if isinstance(late, ProxyError):
            exchange.fail(late)
        elif late:
            exchange.on_response(late)
        elif self.questions:
            self._park_soon()                     # what is missing is asked again

    def end(self, is_answered: bool) -> None:
        """The exchange is over: its questions are withdrawn, or a thread of the server's would wait for ever. But if it
        was answered, a question may have been another call's of the same client: the newest of these takes it over. And
        many servers ask for roots when they start, in whatever call comes first; and a task goes on when a call that
        its question went by is over: the session keeps such questions."""
        causes, asker = self.exchange.connection.causes, self.exchange.asker
        may_pass_on = is_answered and len(causes) <= MAX_CAUSES
        heirs = [call for call in reversed(causes) if call.asker == asker] if may_pass_on else []
        for question in list(self.questions.values()):
            message = question.message             # None: a modern server's
            heir = message and next((call for call in heirs if question.client or call.can_be_asked and not (
                missing_capabilities(call.capabilities, message.method, message.plain_params))), None)
            if heir and question.client:               # a session's, which has been asked
                question.call, question.send = heir, heir.outlet.send
                heir.begin_dialogue().questions[str(question.id)] = question
            elif heir:
                heir.ask(question, None)
            elif message and question.client and (
                    message.method == "roots/list" or RELATED_TASK_KEY in message.meta):
                question.call, question.send = None, question.client.stream.send
            else:
                question.withdraw(ServerError("the client did not answer"))


# ============================================================================
# 40. Records
# ============================================================================
#
# What stays of a call that is over: a line of the log, its place in the counters, and for a while what the overview
# shows of it. Never an argument of it.

# How an exchange ends, or is interrupted: by names of the module, because to look into a class is slow.
ANSWERED, FAILED, TIMED_OUT, NEEDS_INPUT = "answered", "failed", "timed out", "waits for input"
CANCELLED = "cancelled"            # the client said so, or is gone


def audit(caller: Caller | None, software: object, method: str | None, name: str | None,
          trace: dict[str, str] | None, **fields) -> dict:
    """The fields of the line that the JSON log has of each client request, never with an argument. `software` is
    what the client says it is. What has no value is left out."""
    traced = re.match('"?(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-', (trace or {}).get("traceparent", ""))
    found = {"trace_id": traced and traced[1], "key": caller and not caller.is_token and caller.name,
             "sub": caller and caller.is_token and caller.name.partition(":")[2],
             "client": software if isinstance(software, str) else client_name(software), "method": method,
             {"tools/call": "tool", "prompts/get": "prompt"}.get(method, "name"): name, **fields}
    return {field: value for field, value in found.items() if value or value == 0 and value is not False}


def record(call: "Exchange", outcome: str, payload: list, now: float) -> None:
    """Counts a call that is over now, or parked, keeps it for the overview, and logs it: one line for request and
    response, because at full speed a line for each would be a tenth of all work."""
    client, method, mount = call.client, call.method, call.client.mount
    if log.level <= logging.DEBUG:
        log.debug("> %(session)s %(method)s id=%(id)s: %(body)s", session=client.label, method=method,
                  id=call.id, body=client.redact(b"".join(payload).decode("utf-8", "replace")))
    size, seconds, server = sum(map(len, payload)), now - call.started, call.instance and call.instance.server
    server_name = server.name if server else ""
    problem = "cancelled" if outcome is CANCELLED else call.problem
    # The name of a tool or a prompt; a resource's URI may hold a secret.
    name = call.name if call.name and NAMED_BY[method] == "name" else "-"
    own_name = name if call.target is None or name == "-" else call.own_name
    revision = MODERN_VERSION if call.envelope else client.version or ""
    labels = server_name, method, own_name if method == "tools/call" else "", revision, problem
    numbers = mount.counters.calls.get(labels) or mount.counters.find(labels, server.tool_names if server else ())
    numbers[0 if seconds <= DURATIONS[0] else bisect.bisect_left(DURATIONS, seconds)] += 1
    numbers[-1] += seconds
    fields = client.label, method, name, call.id, outcome, call.size, size, seconds * 1000
    about, software = None, client.software or call.software
    if log.as_json and log.level <= logging.INFO:
        about = audit(client.caller, software, method, own_name if name != "-" else None,
                      call.trace, transport=call.outlet.transport,
                      era=(MODERN if call.envelope else LEGACY) if revision else "",
                      session=client.is_session and client.label, server=server_name, id=call.id, outcome=outcome,
                      error_type=problem, ms=seconds * 1000, bytes_in=call.size, bytes_out=size)
    log.add(logging.INFO, "<> %s %s %s id=%s %s, %d bytes in, %d bytes out, %.1f ms", fields, None, about)
    if call.size > SMALL:                  # what it says may be what is large
        labels, own_name = [text[:MAX_LABEL_VALUE] for text in labels], own_name[:MAX_LABEL_VALUE]
        software = client.software
        fields = client.label, labels[1], "-", "-", *fields[4:]
    mount.recent.append((now, labels, own_name, software, client.caller, fields))


# ============================================================================
# 41. Client requests
# ============================================================================
#
# One client request from its arrival to its end, and the answer to it; where that goes is up to its outlet. It begins
# when its instance is ready, and it has one way out, end(), whatever ends it: so nothing is forgotten at the server, at
# the client or in the books (the calls of its client and of its mount), and the log has a line of each.
#
#     WAITING <--> RUNNING <--> PARKED        (any of them --> DONE)
#     for the      at the       for the
#     server       server       client
#
# It goes back to WAITING where several servers may have a resource, and one refused it; where a member of a group
# failed; where a remote server refused its headers; and, a subscription, where the proxy listens in a server's place.
# While it waits, it has its request as a message and as text; once that was sent, as text alone, if it may have to be
# sent again; while it is parked, as a digest, to be compared with that of the request that comes back for it.

RUNNING_CALLS = 1_000            # of one client at a time
FEW_CALLS = 16                   # of one client, which are not counted in the budget if they are small
TINY = 1024                      # bytes; of a larger call, nothing is kept as scanned: that takes many times its text

WAITING, RUNNING, PARKED, DONE = ExchangeState = enum.StrEnum("ExchangeState", "WAITING RUNNING PARKED DONE")
EXCHANGE_STATES = {
    WAITING: {RUNNING, DONE},
    RUNNING: {WAITING, PARKED, DONE},
    PARKED: {RUNNING, DONE},
    DONE: set(),
}


class ClientRequest(PendingRequest, Holder):
    """What is known of a client's request; `envelope` is a modern one's."""

    __slots__ = tuple("""client instance message envelope method trace headers state connection server_id names_tasks
        dialogue answerer on_done started last_sign id raw_id name size token software problem outlet text held
        http_headers digest principal target others missing unknown group work is_repeated is_pinned has_begun
        _bridge""".split())

    def __init__(self, client: Client, instance: Instance | None, message: Message, outlet: Outlet,
                 envelope: Envelope | None = None, trace: dict[str, str] | None = None):
        self.client, self.instance = client, instance
        self.target: Target | None = None             # where it goes, and what is changed in it; None in a plain view
        self.others: list[Target] | tuple = ()        # where it goes next if it is refused
        self.missing: dict[str, str] | None = None    # the servers that were not asked, and why
        self.unknown: tuple | None = None             # (bridge, response) of the first server without the resource
        self.group: Group | None = None               # whose members stand in for each other, once per call
        self.work: asyncio.Task | None = None         # waits until it can be sent, or answers it
        self.is_repeated = False                      # was it sent again, after a failure? That is done once
        self.is_pinned = False                        # see pin()
        self.has_begun = False                        # was its client told or asked anything?
        self.message: Message | None = message        # the request, until it is sent;
        self.text: str | None = message.text          # where it may be needed again, as text, or when parked as a
        self.digest = 0                               # digest: what was parsed of a large one takes many times its size
        self.held = 0                                 # bytes, of what is not small
        self.envelope = envelope
        self.method = message.method
        self.trace = trace                            # members for _meta, as JSON
        # Its HTTP headers, if they have to repeat its arguments; and always, as a member may be chosen by them.
        self.headers = envelope.headers if envelope and message.method == "tools/call" else None
        self.http_headers = client.headers
        self.state = WAITING
        self.connection: ServerConnection | None = None
        self.server_id: int | None = None
        self.dialogue: Dialogue | None = None
        self.problem = ""                             # what went wrong, see error_type()
        self.answerer = None                          # takes it and its message, and answers in place of one server
        self.on_done = None                           # called when the exchange is over
        self.started = self.last_sign = client.mount.now()     # last_sign: when it last showed that it is alive
        self._take_on(message, outlet)

    def _take_on(self, message: Message, outlet: Outlet) -> None:
        """Takes on a request, its first one or that which a client came back with, and the outlet for the answer."""
        self.id, self.raw_id = message.id, message.raw_id
        name = message.params.get(NAMED_BY.get(self.method))
        self.name = name if isinstance(name, str) else None
        self.size, self.principal = len(message.text), self.client.principal
        self.token = self.software = None
        meta = message.meta
        if meta:
            if "progressToken" in meta and is_id(meta["progressToken"]):
                self.token = message.raw("params", "_meta", "progressToken")
            if self.size <= SMALL:                    # what the client says of itself, as it was scanned
                software = meta.get(CLIENT_INFO_KEY)
                self.software = software if isinstance(software, tuple) else None
            if isinstance(meta.get("traceparent"), str):             # it is what the server gets
                self.trace = {**(self.trace or {}), "traceparent": message.raw("params", "_meta", "traceparent")}
        self.outlet = outlet
        outlet.exchange = self

    @property
    def is_done(self) -> bool:
        return self.state is DONE

    @property
    def is_running(self) -> bool:
        return self.state is RUNNING and not self.is_endless

    @property
    def is_parked(self) -> bool:
        return self.state is PARKED

    def pin(self, error: ProxyError) -> None:
        """What its caller may use has changed: it fails with this error if it is at no server yet; otherwise it goes on
        where it is, but is not sent again, as a legacy client's would be with its answers: so its text is taken away,
        unless park() makes a digest of it for a modern client."""
        self.is_pinned = self.is_repeated = True
        self.others, self.text = (), self.envelope and self.text
        connection, number = self.connection, self.server_id
        is_sent = connection and number in connection.pending and connection.link.has_sent(number)
        if self.state in (WAITING, RUNNING) and not (is_sent or self.is_endless):
            self.fail(error)

    @property
    def own_name(self) -> str | None:
        """The name that the server has for the tool or prompt."""
        return self.target and self.target.name or self.name

    def is_changed(self, before: View) -> bool:
        """Do other rules or limits apply to it now than in the view that its client had before?"""
        view, instance, kind = self.client.view, self.instance, self.method.partition("/")[0]
        places = [self.target.server if self.target else before.members[0].name] if instance else before.by_name
        own = self.own_name if instance else None
        if view.limits and instance and instance.server.name not in view.names:
            return True                               # it left its group, which may be all that is open
        terms = {place: view.terms(place, kind, own) for place in places if view.limits or place in view.by_name}
        return any(now != before.terms(place, kind, own) or now is None and view.limits != before.limits
                   for place, now in terms.items())

    @property
    def asker(self) -> object:
        """Whose it is: its client's, or if that is a proxy, one of that proxy's clients', also without any key."""
        client, headers = self.client, self.http_headers
        return (client.owner, headers.get(ASKER_HEADER, self)) if way_of(headers) else client.identity

    @property
    def can_be_asked(self) -> bool:
        """Can its client be asked something in its course?"""
        return self.method in MAY_NEED_INPUT if self.envelope else self.outlet.asks

    @property
    def capabilities(self) -> dict:
        """What the client can be asked."""
        if self.envelope:
            return self.envelope.capabilities
        return self.client.capabilities if self.outlet.asks else {}

    def wants_log(self, level: object, instance: Instance) -> bool:
        """Does the client want log messages of this level with this call?"""
        if self.envelope is None:
            return self.client.wants_log(level, instance)
        # MCP 2026-07-28, Logging: none "for a request that does not include this field".
        wanted = self.envelope.log_level
        return wanted is not None and level in LOG_LEVELS and is_at_least(level, wanted)

    def touch(self) -> None:
        """It shows that it is alive; parked, it lives by its client's signs, not by the server's."""
        if self.state is not PARKED:
            self.last_sign = self.client.mount.now()

    def _become(self, state: ExchangeState) -> None:
        assert state in EXCHANGE_STATES[self.state], (self.state, state)
        self.state = state

    # To the client.

    def tell(self, payload: list) -> None:
        """A message to the client before the answer; while the call is parked there is no way."""
        if self.state is RUNNING:
            self.has_begun = True
            self.outlet.send(payload)

    # The end.

    def finish(self, payload: list, status: int = 200) -> None:
        self.end(ANSWERED, payload, status)

    def fail(self, error: ProxyError, outcome: str = FAILED) -> None:
        # To a legacy client, 404 says that its session is lost (MCP 2025-11-25, Transports, Session Management, 4), and
        # Python's SDK 1.x gives it up for any error status. So in a session, or with STATELESS, what was accepted fails
        # with 200, unless credentials were refused, here or further on; and an unknown method does so everywhere.
        is_refused = member_at(error.data, ("status",)) in (401, 403) or error.http_status in (401, 403)
        is_accepted = self.method != "initialize" and self.client.calls.get(self.id) is self and (
            self.client.is_session or self.client.mount.settings.stateless)
        hides_status = is_accepted and not is_refused or error.code == METHOD_NOT_FOUND
        status = 200 if self.envelope is None and hides_status else error.http_status
        self.problem = str(error.code)
        self.end(outcome, encode_error(self.raw_id, error), status, error.headers)

    def time_out(self) -> None:
        """It shows no sign of life, or its client does not come back."""
        is_asked = self.dialogue and self.dialogue.questions          # then it is the client who is waited for
        was_at_server = self.state is RUNNING and self.server_id and not is_asked
        who = "client did not answer" if is_asked else "MCP server took too long"
        self.fail(ServerError(f"the {who}", status=504), TIMED_OUT)
        if was_at_server:
            self.instance.on_time_out(self)

    def end(self, outcome: str, payload: list = (), status: int = 200, headers: tuple = (),
            notification: Message | None = None) -> None:
        """The one way out: for good, or, parked, until the client comes back. Without a payload there is no answer."""
        before, is_answered, is_parked = self.state, outcome is ANSWERED, outcome is NEEDS_INPUT
        if before is DONE:
            return
        self._become(PARKED if is_parked else DONE)
        now = self.client.mount.now()
        self.leave_books()
        if before is not WAITING and self.method in MAY_CAUSE:
            self._cause_no_more(now)
        if not is_answered and not is_parked:
            self._cancel_at_server(notification, outcome)
        if self.dialogue and not is_parked:
            self.dialogue.end(is_answered)
        if before is not PARKED:                  # that request was answered, and is recorded
            record(self, outcome, payload, now)
        if self.work and not is_answered:
            self.work.cancel()
        if self.on_done and not is_parked:
            on_done, self.on_done = self.on_done, None
            on_done()
        if before is PARKED:
            return                                # its client was told, and is not there
        if payload:
            self.outlet.finish(payload, status, headers)
        else:
            self.outlet.close()
        self.outlet.exchange = None               # a cycle less: what a call took is free at once

    def _cause_no_more(self, now: float) -> None:
        """What the server sends by itself from now on does not go to this call; for a while it may still be about it,
        and so it goes to nobody else either. See find_owner()."""
        self.connection.causes.discard(self)
        callers, asker = self.instance.recent_callers, hash(self.asker)        # which keeps no call in memory
        callers.pop(asker, None)
        callers[asker] = self.client.identity, now
        if len(callers) > 2:                      # two are enough to see whether anybody else called lately
            del callers[next(iter(callers))]

    def _enter_books(self) -> None:
        self.client.calls[self.id] = self
        mount = self.client.mount
        (mount.subscriptions if self.is_endless else mount.calls).add(self)
        are_many = len(self.client.calls) > FEW_CALLS
        if are_many or self.size > TINY:
            self.software = client_name(self.software)
        if are_many or self.size > SMALL:
            budget.set(self, sys.getsizeof(self.text) + sum(map(len, itertools.chain(*self.http_headers.items()))))

    def give(self) -> None:
        """If what it holds has to go, so has the call."""
        self.fail(try_later("too much is held for this client"))

    def leave_books(self) -> None:
        calls, mount = self.client.calls, self.client.mount
        if calls.get(self.id) is self:            # one that was refused has another's id, maybe
            del calls[self.id]
        (mount.subscriptions if self.is_endless else mount.calls).discard(self)
        if self.held:
            budget.set(self, 0)
        if self.dialogue:
            mount.parked.pop(self.dialogue.request_state, None)

    def _cancel_at_server(self, notification: Message | None, reason: str) -> None:
        """Tells the server to stop, if it is at work on this; with the client's own words if there are any."""
        if self.server_id is not None:
            is_small = notification and len(notification.text) <= SMALL
            line = notification.with_text(str(self.server_id), "params", "requestId") if is_small else None
            self.connection.cancel(self.server_id, reason, line)

    # What the server asks.

    def begin_dialogue(self) -> Dialogue:
        """The dialogue that this exchange has from its first question on."""
        self.touch()
        self.dialogue = self.dialogue or Dialogue(self)
        return self.dialogue

    def park(self, payload: list) -> None:
        """Ends the client's request with the questions. The call goes on when the client comes back with its state."""
        message = parse_message(self.text)
        self.text, self.digest = None, digest_of(message)
        self.end(NEEDS_INPUT, payload)
        self.client.mount.parked[self.dialogue.request_state] = self
        if self.size > SMALL:
            budget.set(self, self.size - len(message.raw("params")) + len(message.raw("params", "_meta")))

    def take_place_of(self, retry: "ClientRequest", message: Message) -> None:
        """The client is back, with another request: this call goes on for that one."""
        retry.leave_books()
        retry.state = DONE
        self.leave_books()
        self._become(RUNNING)
        # It runs again, so it has not ended lately; and a visitor without a key would count as somebody else now.
        self.instance.recent_callers.pop(hash(self.asker), None)
        self.client, self.envelope, self.text = retry.client, retry.envelope, message.text
        self.http_headers = retry.http_headers
        self.started = retry.started                # the time that people took does not count
        self._take_on(message, retry.outlet)
        self._enter_books()
        self.connection.causes.add(self)
        self.touch()


# ============================================================================
# 42. Exchanges
# ============================================================================
#
# How a client's request gets to a server, and what becomes of what that sends. The exchange puts a server id in the
# place of the client's and takes it out of the response again; what its messages become is up to the bridge.

UNKNOWN_RESOURCE = RESOURCE_NOT_FOUND, INVALID_PARAMS          # until 2025-11-25, and since


class Exchange(ClientRequest):
    """One client request on its way to a server, or from one to another, and back."""

    __slots__ = ()

    # From the client.

    def start(self) -> None:
        """Sends the request, as soon as there is a server to send it to and it is known to be right."""
        client = self.client
        if self.envelope is None:
            check_parameters(self.message)
        if self.instance is None and not self.answerer:
            self._pick()
        connection = self.instance and self.instance.connection
        client.mount.check_open()
        if client.is_homeless:                 # its view is of what was there before, with the limits of then
            raise no_such_session()
        if self.id in client.calls:
            raise RPCError("a request with this id is running")
        if len(client.calls) >= RUNNING_CALLS:
            raise try_later("too many running calls")
        is_plain = self.headers is None and self.target is None          # so it is for most calls
        is_checked = connection and (is_plain and not connection.link.is_remote or self._is_checked(connection))
        self._enter_books()
        if log.level <= logging.DEBUG:
            log.debug("< %(session)s %(method)s id=%(id)s: %(body)s", session=client.label, method=self.method,
                      id=self.id, body=client.redact(self.message.text))
        if is_checked:
            return self.begin(connection)
        try:
            if self.method == "initialize" and self.instance and self.instance.is_private:
                check_size(self.message, ("params",))          # all of them set up the server, and are kept
                self.instance.start(self.message.plain_params)
        except ProxyError as error:
            return self.fail(error)
        self.message = None
        self._begin_soon()

    def start_or_fail(self) -> None:
        """Starts it; an error is its answer."""
        try:
            self.start()
        except ProxyError as error:
            self.fail(error)

    def _begin_soon(self) -> None:
        self.work = asyncio.get_running_loop().create_task(self._begin_when_ready())
        if self.group:
            waiting = self.instance.server.waiting
            waiting.add(self.work)
            self.work.add_done_callback(waiting.discard)

    def _pick(self) -> None:
        """Chooses a server by the request alone, if that is enough."""
        state = self.message.params.get("requestState")
        parked = self.client.mount.parked.get(state) if isinstance(state, str) and self.envelope else None
        if parked and not self.client.is_session and parked.instance.owner in ((), self.client.user) and (
                parked.client.caller, parked.method, parked.name) == (self.client.caller, self.method, self.name):
            # It goes on there, whatever was taken out of the configuration since.
            self.target, self.instance, self.group = self._target_again(parked), parked.instance, parked.group
            return
        target = pick(self.client, self.message)
        if target:
            self.aim(target)
            if self.client.view.is_joint and self.method.startswith("tasks/"):
                self.message = with_tasks(self.message, lambda task: task.removeprefix(f"{target.server}__"))
                self.text = self.message.text

    def _target_again(self, parked: "Exchange") -> Target | None:
        """The target of a parked call, by what its caller may use now; RPCError if that is less."""
        view, kind, target = self.client.view, self.method.partition("/")[0], parked.target
        if not view.limits:
            return target
        target = target or Target(parked.instance.server.name)               # all was open to it
        own = target.name or self.name
        if not view.opens(target.server, kind, own):
            raise view.refusal(target.server, kind, own, str(self.name))
        return view.target(view.by_name[target.server], kind, own, self.name)

    def aim(self, target: Target, left_out: Server | None = None) -> None:
        """Chooses a server for it, by its target: that server, or a member of that group."""
        if target.server not in self.client.view.names:        # its client is shown less than when the target was found
            raise try_later("the configuration has changed")
        server = self.client.mount.server(target.server)
        group = server if server.is_group else None
        if group:
            server = group.choose(self.client, left_out, self.http_headers, self.message or parse_message(self.text))
        self.instance, self.target, self.group = self.client.at(server), target, group

    def _is_checked(self, connection: ServerConnection) -> bool:
        """Checks what only the server's list of tools tells: does a modern tools/call repeat in headers what it has to,
        may its caller use a tool with such hints, what has to be repeated for a remote server? False: read it first."""
        depends_on_hints = self.target and self.target.depends_on_hints
        if self.headers is None and not depends_on_hints and not (connection.mirrors and self.method == "tools/call"):
            return True
        tools, name = self.instance.tools, self.own_name
        tools = tools.fresh if depends_on_hints else tools.known    # what was allowed may be no more
        if tools is None or name not in tools:
            return False
        try:
            self._check_by(tools, name)
        except RPCError:
            if tools is self.instance.tools.fresh:
                raise
            return False                    # it may be another tool by now
        return True

    def _check_by(self, tools: Items, name: str | None) -> None:
        view, target = self.client.view, self.target
        if target and target.depends_on_hints and view.limits and not view.opens(
                target.server, "tools", name, tools.get(name, {})):
            raise view.refusal(target.server, "tools", name, self.name)
        if self.headers is not None and tools.mirrored.get(name):
            check_mirrored(tools.mirrored[name], self.message.plain_params.get("arguments"), self.headers)

    async def _check_by_list(self) -> None:
        kept = self.instance.tools
        try:
            tools = await kept.get(refresh=kept.known is not None)
        except ServerError:                 # without the list, its headers are left for the server to check
            if self.target and self.target.depends_on_hints:
                raise
        else:
            self._check_by(tools, self.own_name)

    async def _begin_when_ready(self) -> None:
        try:
            if self.answerer:
                return await self.answerer(self, parse_message(self.text))
            if self.instance is None:
                (first, *self.others), self.missing = await find_targets(self.client, parse_message(self.text))
                self.aim(first)
            connection = await self._connection()
            self.message = parse_message(self.text)
            if not self._is_checked(connection):
                await self._check_by_list()
        except Exception as error:
            (self.fail if self.answerer else self.on_failure)(as_client_error(error))
        else:
            self.begin(connection)

    async def _connection(self) -> ServerConnection:
        if not self.client.view.has_choice:
            return await self.instance.ready()
        try:
            self.instance.check_up()
            return await self.instance.ready()
        except ServerError as error:
            raise error.again(f"server {self.instance.server.name}: {error}") from None

    def begin(self, connection: ServerConnection) -> None:
        """Sends the request, or does what is done in its place."""
        if self.state is DONE:
            return                          # a subscription that was ended; what is cancelled does not come here
        self.state, self.connection = RUNNING, connection
        self._bridge = BRIDGES[MODERN if self.envelope else LEGACY, connection.era]
        intercept = self._bridge.intercepted.get(self.method)
        try:
            if intercept and not intercept(self._bridge, self, self.message):
                return
        except Exception as error:
            return self.fail(as_client_error(error))          # that is ours: no other server is to be asked
        try:
            self.transmit()
        except Exception as error:
            self.on_failure(as_client_error(error))

    def transmit(self) -> None:
        """Sends the request to the server under a new server id, which serves as its progress token too."""
        message, connection = self.message or parse_message(self.text), self.connection
        number = connection.next_id()
        server_id = str(number)
        new_meta = dict(self.trace) if self.trace and "traceparent" not in message.meta else {}
        if self.token:
            new_meta["progressToken"] = server_id
        extensions = self.envelope and self.envelope.capabilities.get("extensions")
        self.names_tasks = "task" in message.params or self.method.startswith("tasks/") or (
            isinstance(extensions, dict) and TASKS_EXTENSION in extensions)
        changes = [(*message.id_span(), server_id), *self._bridge.restate(self, message, new_meta)]
        if self.target:
            changes += self.target.changes(message)
        connection.has_served = True
        if self.group and not self.client.is_session:
            self.group.chosen[self.instance.server] += 1
        about = self._about(number, connection, message) if connection.link.is_remote else None
        connection.pending[number] = self              # before it is sent: the link looks up whose it is
        try:
            connection.send(message.changed(changes), about, self.principal)
        except Exception:
            del connection.pending[number]
            raise
        self.server_id = number
        if self.method in MAY_CAUSE:
            connection.causes.add(self)
        self.message = None
        self.text = message.text if self.others or self.group or (
            self._bridge.keeps_requests and self.method in MAY_NEED_INPUT) else None

    def _about(self, number: int, connection: ServerConnection, message: Message) -> About:
        """What a remote server is told beside the message: by headers, whose it is, and the arguments that a tools/call
        has to repeat there."""
        task = message.params.get("taskId") if self.names_tasks else None
        name = self.own_name or (task if isinstance(task, str) else None)
        whose = self.asker
        if whose is self.client:                       # hash() would be of an address, which another may have later
            whose = self.client.serial
        asker = ASKER_HEADER, f"{hash(whose) % 2**32:08x}"               # which says no more than that
        if not (connection.mirrors and self.method == "tools/call"):
            return About(number, self.method, name, (asker,), way_of(self.http_headers))
        tools, arguments = self.instance.tools.known, message.plain_params.get("arguments")
        if self.target and self.target.override and isinstance(arguments or {}, dict):
            override = self.target.override
            arguments = {**override.defaults, **(arguments or {}), **override.fixed}
        own = mirror(tools.mirrored.get(self.own_name, {}) if tools else {}, arguments)
        # "Intermediate servers that do not recognize an Mcp-Param-{Name} header MUST forward it."
        given = self.http_headers.items() if self.envelope else ()
        forwarded = [(header, value) for header, value in given
                     if header.startswith("mcp-param-") and value.isascii() and header not in dict(own)]
        return About(number, self.method, name, (asker, *own, *forwarded), way_of(self.http_headers))

    def cancel(self, notification: Message | None = None, error: ProxyError | None = None) -> None:
        """The client took the request back with a notification; without one, the client is gone. With an error, one of
        its connections may still wait, and gets that."""
        if error:
            self.outlet.open()           # Python's SDK 1.x dies of an answer as JSON, if it closes slowly
            self.fail(error, CANCELLED)
        elif self.method != "initialize" or not notification:    # MCP 2025-11-25, Cancellation: "MUST NOT be cancelled"
            self.end(CANCELLED, notification=notification)

    # From the server.

    def on_response(self, response: ResponseLine | Message) -> None:
        """Remembers what later requests will name, finds out how the call went, cuts a result that is too large, and
        leaves the rest to the bridge. What comes while the call is parked waits for its client."""
        if self.state is PARKED:
            self.dialogue.late = response
            return budget.set(self, self.held + len(response.line if isinstance(response, ResponseLine)
                                                    else response.text))
        try:
            if self.group:
                self.instance.server.count_outcome(self.instance, has_failed=False)
            if self.envelope and (self.group or self.method == "resources/read"):
                asking = parsed_if_it_has(response, "resultType", b'"input_required"')
                if asking:
                    self.remember_state(asking.result.get("requestState"))
            if not response.is_result and (response := self._final_error(response.parsed())) is None:
                return None
            if self.names_tasks or not response.is_result:
                response = response.parsed()
                remember_named(self, response)
                if self.method == "tasks/list":
                    response = own_tasks(self.instance, self.client, response)
                response = outward(self.client, self.instance, response)
            if self.client.view.is_joint and type(response) is ResponseLine and not has_one_id(response.line):
                response = response.parsed()
            # For most, a search in the line is enough; the call of a function would cost too much.
            if not response.is_result or self.method == "tools/call" and (
                    type(response) is not ResponseLine or len(response.line) > LARGE
                    or response.line.find(b'"isError"') >= 0):
                self.problem = error_type(response)
            elif self.method == "tools/list":
                if isinstance(response, ResponseLine) and len(response.line) <= MAX_LISTING:
                    self.instance.server.listings.append(response)
                if self.connection.mirrors:
                    response = without_misused(response, self.instance.server)
            limit = self.instance.server.max_result
            # JSON makes no text shorter: what is in a line within the limit is within the limit, too.
            if limit and response.is_result and self.method in TOOL_RESULTS and (
                    type(response) is not ResponseLine or len(response.line) > limit):
                response = cut_result(response.parsed(), limit, TOOL_RESULTS[self.method])
            self._bridge.respond(self, response)
        except RPCError:
            self.fail(ServerError("the MCP server's answer is not valid"))
        except ServerError as error:
            self.fail(error)

    def _final_error(self, response: Message) -> Message | None:
        """The error that the client gets for one of a server's; None if the request goes on instead."""
        if self.others and self.unknown is None and response.error_code in UNKNOWN_RESOURCE:
            self.unknown = self._bridge, response
        if self.ask_next():
            return None
        self._bridge, response = self.unknown or (self._bridge, response)
        if self.connection.link.is_remote and response.error_code == HEADER_MISMATCH:
            # MCP 2026-07-28, Streamable HTTP: its tools are to be listed again, and then the call is retried.
            self.instance.tools.is_old = True
            if self.text and not self.is_repeated:
                self.is_repeated = True
                return self.start_over()
        # A resource that nobody knows may be that of a server which cannot be asked.
        if self.missing and response.error_code in UNKNOWN_RESOURCE:
            why = "; ".join(f"server {name}: {why}" for name, why in self.missing.items())
            raise ServerError(f"no server that can be used has it; {why}", data={UNAVAILABLE_KEY: self.missing})
        return response

    def remember_state(self, state: object) -> None:
        """The request that comes back with this is for the same server, even if it was ours and is used up."""
        if isinstance(state, str) and self.target:
            states = self.client.mount.states
            make_room_in(states, KNOWN_STATES, lambda given: given.principal)
            states[state_key(state, self.name)] = GivenState(self.principal, self.target.server, self.instance.server)

    def ask_next(self) -> bool:
        """The server refuses it: asks the next of those that may have the resource; is there one?"""
        while self.others:
            if self._move_to(self.others.pop(0)):
                return True
        return False

    def _move_to(self, target: Target, left_out: Server | None = None) -> bool:
        """Goes to another server, without what the one before asked and was told; False if it cannot."""
        before = self.instance.server
        try:
            self.aim(target, left_out)
        except ProxyError:                             # it was taken out of the configuration, say
            return False
        if self.instance.server is not before:         # its requestState may lead back there, see Group._owner()
            self.text = without_params(parse_message(self.text), *ANSWERS).text
            if self.dialogue:
                self.dialogue.gathered = {}
        self.start_over()
        return True

    def start_over(self) -> None:
        if self.state is RUNNING:
            if self.method in MAY_CAUSE:
                self._cause_no_more(self.client.mount.now())
            self._become(WAITING)
        self.server_id, self.message = None, None
        self._begin_soon()

    def on_failure(self, error: ProxyError) -> None:
        if self.state is PARKED:
            self.dialogue.late = error
        elif not (self.group and isinstance(error, ServerError) and self._goes_elsewhere(error)):
            self.fail(error)

    def _goes_elsewhere(self, error: ServerError) -> bool:
        """A member of a group failed. Another one is asked, once, if nothing can happen twice by that, and the client
        was told and asked nothing."""
        failed = self.instance.server
        failed.count_outcome(self.instance, has_failed=True)
        if self.state is DONE or self.is_repeated or self.has_begun or not (
                self.server_id is None or error.is_unsent or self._is_idempotent()):
            return False
        self.is_repeated = True
        return self._move_to(self.target, failed)

    def _is_idempotent(self) -> bool:
        """May it be done twice? MCP 2025-11-25, Schema, ToolAnnotations."""
        if self.method != "tools/call":
            return self.method in IDEMPOTENT_METHODS
        lists = (instance.tools.last for member in self.group.members for instance in member.instances.values())
        tool = next((tools[self.own_name] for tools in lists if tools and self.own_name in tools), {})
        hints = hints_of(tool, self.target and self.target.override)
        return True in (hints.get("readOnlyHint"), hints.get("idempotentHint"))

    def on_progress(self, message: Message) -> None:
        self.touch()
        if self.token:
            message = outward(self.client, self.instance, message)
            self.tell([message.with_text(self.token, "params", "progressToken")])

    def ask(self, question: Question, missing: dict | None) -> None:
        """A legacy server's request, which this call caused; `missing` is what the client lacks to answer it."""
        self.has_begun = True
        self._bridge.ask(self, question, missing)


# ============================================================================
# 43. Joint exchanges
# ============================================================================
#
# Requests that concern all servers of a view, or what they list: the proxy answers them from what the servers say. And
# subscriptions, for which the proxy itself listens where it can.

class TaskListenRequest(PendingRequest):
    """By this request, a Listener of several servers listens for tasks at a modern one."""

    __slots__ = ("_exchange", "instance", "connection", "server_id", "taken")
    is_endless = True

    def __init__(self, exchange: "Listener", instance: Instance, names: list[str]):
        self._exchange, self.instance, self.connection = exchange, instance, instance.connection
        self.taken: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()    # what it listens for
        meta = {**OUR_ENVELOPE, CAPABILITIES_KEY: {"extensions": {TASKS_EXTENSION: {}}}}
        self.server_id = self.connection.send_request(
            self, "subscriptions/listen", {"notifications": {"taskIds": names}, "_meta": meta})

    def on_event(self, message: Message) -> None:
        if message.method == TASK_CHANGED:
            self._exchange.hear(outward(self._exchange.client, self.instance, cut_task(message, self.instance)))
        elif not self.taken.done():
            self.taken.set_result(strings_of(member_at(message.plain_params, ("notifications", "taskIds"))))

    def on_response(self, response: ResponseLine | Message) -> None:
        if not self.taken.done():
            self.taken.set_result([])
        elif self.taken.result():
            self._exchange.end_subscription()      # or its client would wait in vain; it can listen again

    on_failure = on_response


class Listener(Exchange):
    """A client's subscriptions/listen."""

    __slots__ = ("wanted", "topics", "early", "joined", "_task_listeners", "_lost")
    is_endless = True

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.wanted: dict = {}                     # what it listens for, of what its client asked for
        self.topics: set[Topic] = set()
        self.early: list[Message] | None = None    # what was told before it was acknowledged
        self.joined: set[Instance] = set()         # whose listener it is
        self._task_listeners: list[TaskListenRequest] = []
        self._lost: set[str] = set()               # URIs that were looked for again, see lose()

    async def listen(self, message: Message) -> None:
        """Says what is listened for, once it is settled with the servers, and then what was told meanwhile."""
        try:
            if not self.is_done:
                await self._settle(listened_for(message))
            if not self.is_done:
                self._become(RUNNING)
                early, self.early = self.early, None
                budget.set(self, self.held - sum(len(message.text) for message in early))
                self.tell([encode_request(None, "notifications/subscriptions/acknowledged", {
                    "_meta": {SUBSCRIPTION_KEY: self.id}, "notifications": self.wanted})])
                for message in early:
                    self.hear(message)
        finally:
            if self.is_done:                           # it joined somebody after its end, maybe
                self._leave()

    async def _settle(self, wanted: dict) -> None:
        """Settles what is listened for. Of several servers, it joins the listeners of all, also where one has not
        started yet."""
        self.client.mount.make_room_for(self)
        if self.instance:                              # which it has joined, see listen_here()
            wanted = self.wanted = self.instance.identity.supported(wanted)
        else:
            self.early, self.on_done = [], self._leave
            self._join_all()                           # at once: whoever starts meanwhile says that there is more
            found, missing = await gather_identities(self.client)
            for instance in [one for one in self.joined if not one.server.is_up_for(self.client)]:
                self._leave_one(instance)              # another of its group may be there in its place
            self._join_all()
            self.wanted = {name: True for name, (kind, _) in LIST_CHANGES.items() if wanted.get(name) is True and (
                missing or any(identity.has(kind) for _, identity in found))}
        uris = wanted.get("resourceSubscriptions")
        _, *taken = await asyncio.gather(
            self._leave_out_lists(), *map(self._subscribe, dict.fromkeys(strings_of(uris))))
        if isinstance(wanted.get("taskIds"), list) and not self.is_done:
            self.wanted["taskIds"] = await self._listen_to_tasks(strings_of(wanted["taskIds"]))
        if isinstance(uris, list):
            if not self.instance:                      # one server may be gone meanwhile, and another have what it had
                gone = {uri for uri in taken if uri} - {topic.uri for topic in self.topics}
                await asyncio.gather(*map(self._subscribe, gone))
            has = {topic.uri for topic in self.topics}
            self.wanted["resourceSubscriptions"] = [uri for uri in taken if uri in has]

    async def _leave_out_lists(self) -> None:
        """Leaves out the lists that the server does not tell of."""
        listening = self.instance and self.instance.listening
        if listening and LIST_CHANGES.keys() & self.wanted.keys():
            await asyncio.wait([listening.has_said], timeout=ACKNOWLEDGE_SECONDS)
            for name in listening.refused:
                self.wanted.pop(name, None)

    def listen_here(self) -> None:
        """The proxy listens in its place, at the one server that there is, which is used from now on."""
        self.answerer, self.early, self.on_done = Listener.listen, [], self._leave
        self._join(self.instance)
        self.start_over()

    def _join_all(self) -> None:
        for member in self.client.view.members:
            with contextlib.suppress(ProxyError):
                self._join(instance := self._at(member.name))
                instance.start()                       # or nothing would be heard of it

    def _at(self, name: str) -> Instance:
        """Its instance in this place: of a group, of the member where it listens already. On stdio the calls of its
        client may be at another."""
        return next((one for one in self.joined if name and name in (one.server.name, one.server.config.group) and (
            one.state is not CLOSED and not one.server.is_retired and one.server.is_up_for(self.client))),
            None) or self.client.by_name(name)

    def _join(self, instance: Instance) -> None:
        instance.listeners.add(self)
        self.joined.add(instance)

    def move(self, before: Instance, instance: Instance) -> None:
        """Goes on at its client's next instance of a server."""
        uris = [topic.uri for topic in self.topics if topic.instance is before]
        self._leave_one(before)
        self._join(instance)
        for uri in uris:
            self._follow(uri, instance.server.name)

    async def _subscribe(self, uri: str) -> str | None:
        """Subscribes to it at the first server that does not refuse it soon; returns the URI, or None if all do."""
        with contextlib.suppress(ProxyError):
            targets = () if self.instance else (await find_by_uri(self.client, uri, START_SECONDS))[0]
            names = self.client.view.names             # maybe fewer than when it was looked for
            for instance in [self.instance] if self.instance else (
                    self._at(one.server) for one in targets if one.server in names):
                if self.is_done or not instance.identity or not instance.identity.supported(
                        {"resourceSubscriptions": [uri]}):
                    continue
                self._join(instance)                   # of a group, it may be another member by now
                topic = instance.topics.subscribe(self, uri)
                await asyncio.wait([topic.verdict], timeout=ACKNOWLEDGE_SECONDS)
                if not (topic.verdict.done() and topic.verdict.result()):
                    if self in topic.subscribers:
                        topic.told.add(self)
                    return uri
        return None

    async def _listen_to_tasks(self, names: list[str]) -> list[str]:
        """Listens for the client's tasks at their servers; returns those that they take. SEP-2663, Task Status
        Notifications."""
        if member_at(self.capabilities, ("extensions", TASKS_EXTENSION)) is None:
            raise no_tasks()
        listeners = self._task_listeners
        for member in self.client.view.servers:
            prefix = f"{member.name}__"
            own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            instance = self.client.by_name(member.name) if own else None
            own = [name for name in own if instance.is_owner(self.client, ("task", name))]
            if own and instance.connection and instance.connection.era is MODERN:
                listeners.append(TaskListenRequest(self, instance, own))
        if listeners:
            await asyncio.wait([listener.taken for listener in listeners], timeout=ACKNOWLEDGE_SECONDS)
        return [f"{listener.instance.server.name}__{name}" for listener in listeners if listener.taken.done()
                for name in listener.taken.result()]

    def on_event(self, message: Message) -> None:
        self.tell([self._bridge.under_own_id(self, cut_task(message, self.instance), "params")])

    def hear(self, message: Message) -> None:
        """A server told all clients this: passes it on if the client listens for it."""
        if self.is_done:                               # it ended before it had joined all
            return
        if self.early is not None:
            self.early.append(message)
            budget.set(self, self.held + len(message.text))
        elif message.method in (RESOURCE_UPDATED, TASK_CHANGED) or any(
                self.wanted.get(name) and method == message.method for name, (_, method) in LIST_CHANGES.items()):
            self.tell([message.changed(restated_meta(message, {SUBSCRIPTION_KEY: self.raw_id.decode()}))])

    def adopt(self, view: View) -> None:
        """Its client has adopted another configuration, if it could; before, its place showed `view`. It goes on while
        that place and its server are there, and of several servers with those that there are now."""
        shown, server = self.client.view, self.instance and self.instance.server
        is_adopted = shown.catalog is self.client.mount.catalog
        goes_on = is_adopted and not (server and (server.is_retired or server.name not in shown.names))
        if self.early is None and not self.has_begun:          # its acknowledgement is first: 2026-07-28, Subscriptions
            return None if goes_on else self.end_subscription()
        if goes_on and server is None:
            gone = [one for one in self.joined if one.server.is_retired or one.server.name not in shown.names]
            moving = [(topic.uri, topic.instance.server) for topic in self.topics if topic.instance in gone]
            for instance in gone:
                self._leave_one(instance)
            self._join_all()
            if self.is_done:                       # to make room for one of these, it was ended itself
                return self._leave()
            for uri, old in moving:
                self._follow(uri, self.client.place_of(old), old.is_retired)
        if is_adopted and not (goes_on and shown.offer == view.offer):
            for kind, _ in LIST_CHANGES.values():
                self.hear(list_changed(kind))
        if not goes_on:                                # when it listens again, nobody would tell it of these lists
            self.end_subscription()

    def _follow(self, uri: str, place: str | None, is_gone: bool = True) -> None:
        """Listens to a resource at the server in the place of the one that had it, even if that starts slowly; if there
        is none, or it refuses that, at another. What its client may not use any more just ends."""
        if self.is_done:                               # with one that was lost
            return
        try:
            self._join(instance := self._at(place))
            instance.start()                           # of a group, it may be another member than _join_all() chose
            instance.topics.subscribe(self, uri, is_told=True)
        except ProxyError:
            if is_gone:
                return self.lose(uri)
            asyncio.get_running_loop().create_task(self._subscribe(uri))

    def lose(self, uri: str) -> None:
        """A server refuses what the client was told that it has. Once, the servers that may have it are asked again; if
        none has, the client is told by the end, and may listen again."""
        async def find() -> None:
            if not await self._subscribe(uri) and not self.is_done:
                self.end_subscription()
        if self.early is not None:                     # it is not acknowledged yet: _settle() leaves it out
            return
        if self.instance or uri in self._lost:
            return self.end_subscription()
        self._lost.add(uri)
        asyncio.get_running_loop().create_task(find())

    def end_subscription(self) -> None:
        """Ends it, and tells its client, who may ask again. MCP 2026-07-28, Subscriptions, Graceful Closure."""
        self._cancel_at_server(None, "the subscription is over")
        self.finish(encode_end_of_subscription(self.raw_id))

    def _leave_one(self, instance: Instance) -> None:
        self.joined.discard(instance)
        instance.listeners.discard(self)
        instance.topics.leave(self)

    def _leave(self) -> None:
        for instance in list(self.joined):
            self._leave_one(instance)
        for listener in self._task_listeners:
            listener.connection.cancel(listener.server_id, "nobody listens")


def answer(exchange: Exchange, members: dict[str, str], missing: dict[str, str] = {}, ttl_ms: float = 0,
           is_public: bool = False, info: str | None = None) -> None:
    """Finishes an exchange with a result of these members (name -> JSON); `missing` are the servers that it lacks."""
    meta = {UNAVAILABLE_KEY: dump(missing)} if missing else {}
    if exchange.envelope:
        new = additions(exchange.method, info or dump(OUR_INFO))
        members = {**members, **new.members}
        if "ttlMs" in members:
            members["ttlMs"] = str(0 if missing else int(max(0, ttl_ms)))
            members["cacheScope"] = '"public"' if is_public else '"private"'
        meta |= new.meta
    if meta:
        members["_meta"] = as_object(meta)
    exchange.finish(encode_result(exchange.raw_id, as_object(members).encode()))


def check_cursor(message: Message) -> None:
    """MCP 2025-11-25, Pagination, and Tasks, Protocol Errors: an unknown cursor is -32602."""
    if message.params.get("cursor") is not None:
        raise RPCError("the cursor is unknown: all is on one page", status=200, code=INVALID_PARAMS)


async def answer_list(exchange: Exchange, message: Message) -> None:
    """What all servers list, on one page."""
    check_cursor(message)
    client, view = exchange.client, exchange.client.view
    found, missing = await gather_lists(client, exchange.method, way=way_of(exchange.http_headers))
    await take_turn(client)                    # a batch may ask for it a thousand times
    now, shown = client.mount.now(), shown_of(view, found)
    # What no server has so far may be there with the next configuration.
    has_any = any(items or items.ttl_ms < MAX_TTL_MS for _, items in found)
    ttl = min(items.ttl_ms - (now - items.asked_at) * 1000 for _, items in found) if has_any else 0
    is_public = all(items.is_public for _, items in found) and TOOLS_HEADER not in dict(view.wanted) and (
        not client.is_apart)
    # Of a group, only_instance may be of another member than has answered, and may not have started.
    identity = None if view.is_joint else client.only_instance.identity
    is_legacy = exchange.method == "tools/list" and not exchange.envelope
    texts = [as_legacy_tool(item.text) if is_legacy else item.text for item in shown.values()]
    answer(exchange, {LISTS[exchange.method].member: f"[{','.join(texts)}]"}, missing, ttl, is_public,
           identity and identity.info)


async def answer_handshake(exchange: Exchange, message: Message) -> None:
    """`initialize` and `server/discover`: what the servers can do, together."""
    client, is_initialize = exchange.client, exchange.method == "initialize"
    if is_initialize:
        check_size(message, ("params",))               # all of them may set up servers, and are kept
        client.initialize_params = message.plain_params
    found, missing = await gather_identities(client)
    client.may_have_logs = bool(missing)
    # What is missing may have all of these, and a legacy client never asks again.
    capabilities: dict = {"tools": {}, "prompts": {}, "resources": {"subscribe": True}, "logging": {},
                          "completions": {}} if missing else {}
    for _, identity in found:
        capabilities = merged(capabilities, {
            name: value for name, value in identity.capabilities.items() if isinstance(value, dict)})
    for kind, _ in LIST_CHANGES.values():
        if isinstance(capabilities.get(kind), dict):
            capabilities[kind] = {**capabilities[kind], "listChanged": True}          # servers may come and go
    if not is_initialize:
        capabilities.pop("tasks", None)                # SEP-2663; see Identity.discover_result()
    capabilities = dump(capabilities)
    members = {"capabilities": capabilities if client.is_session or not is_initialize else
               without_session(capabilities, client.owner is None)}
    instructions = [f"# {member.name}\n\n{identity.instructions}" for member, identity in found
                    if identity.instructions]
    if instructions:
        members["instructions"] = dump("\n\n".join(instructions))
    if is_initialize:
        version = negotiate(message.params.get("protocolVersion"))
        if client.is_session:
            client.introduce(message, version)
        members = {"protocolVersion": dump(version), **members, "serverInfo": dump(OUR_INFO)}
    else:
        members["supportedVersions"] = dump([MODERN_VERSION, *LEGACY_VERSIONS])
    answer(exchange, members, missing)


async def answer_ping(exchange: Exchange, message: Message) -> None:
    """The proxy is there."""
    answer(exchange, {})


async def answer_level(exchange: Exchange, message: Message) -> None:
    """Sets the client's level; each server is told the most verbose one of all its clients."""
    found, _ = await gather_identities(exchange.client)
    exchange.client.choose_log_level(message.params.get("level"), exchange.client.may_have_logs or any(
        identity.has("logging") for _, identity in found))
    answer(exchange, {})


async def answer_tasks(exchange: Exchange, message: Message) -> None:
    """The client's tasks at all servers, or at all of a group."""
    check_cursor(message)
    client, tasks = exchange.client, []

    async def ask(instance: Instance) -> tuple[Instance, Items]:
        return instance, await KeptList(instance, exchange.method, way_of(exchange.http_headers)).read()
    asked = [one for one in client.view.servers if one in client.view.members or client.mount.server(
        one.name).used_by(client)]
    found, missing = await ask_servers(client, lambda instance: None, ask, asked or client.view.members)
    if not any(instance.identity.has("tasks") for _, (instance, _) in found):
        raise RPCError("no server lists tasks", status=404, code=METHOD_NOT_FOUND)
    for member, (instance, items) in found:
        for own, text in items.texts.items():
            if instance.is_single_user or instance.owners.get(("task", own)) == client.identity:
                tasks.append(JSONObject(text).with_text(dump(f"{member.name}__{own}"), "taskId").decode()
                             if client.view.is_joint else text)
    answer(exchange, {"tasks": f"[{','.join(tasks)}]"}, missing)


# What is answered for several servers as one, beside what they list.
JOINT = {
    "initialize": answer_handshake,
    "server/discover": answer_handshake,
    "ping": answer_ping,
    "logging/setLevel": answer_level,
    "tasks/list": answer_tasks,
}


def new_exchange(client: Client, message: Message, outlet: Outlet, envelope: Envelope | None = None,
                 trace: dict[str, str] | None = None) -> Exchange:
    """The exchange for a client's request, at the instance that it is for."""
    view, method = client.view, message.method
    kind = Listener if envelope and method == "subscriptions/listen" else Exchange
    # Only its requestState tells where a call is that comes back: that server may be configured no more.
    if view.is_plain and not (envelope and "requestState" in message.params):
        return kind(client, client.only_instance, message, outlet, envelope, trace)
    exchange = kind(client, None, message, outlet, envelope, trace)
    # Of a group, the next page might be asked of another server, which does not know the cursor.
    if method in LISTS and (view.has_choice or method == "tools/list"):
        exchange.answerer = answer_list
    elif view.is_joint or method == "tasks/list" and view.has_choice:
        exchange.answerer = kind.listen if kind is Listener else JOINT.get(method)
    return exchange


# ============================================================================
# PART III. THE PROGRAM: what can be seen from outside
# ============================================================================

import gc
import resource
import shlex
import threading


# ============================================================================
# 44. HTTP connections
# ============================================================================
#
# One socket each: bytes in, requests to the application, replies out, in order.
# Knows HTTP and nothing of MCP; what a request means is the business of the
# application that is handed in. It has
#
#     max_body                           bytes
#     counters                           where bytes and streams are counted
#     admit(head, host)                  before the body is read: raises ProxyError when a request with this head may
#                                        not pass, NotYet when that has to be found out first. The result is used again
#                                        when the same head comes, until it `is_old`; its `headers` go into every reply,
#                                        and its `caller` is who is charged (None: the client's address is)
#     handle(admission, body, reply)     sees to it that the reply is sent, now or later
#     refuse(error, reply)               sends the reply that an error stands for
#
#     HEAD [--> CHECK] --> BODY --> REPLY --> HEAD       (the connection is kept)
#       |                    |
#       +--------------------+----> LINGER               (the request was not read to its end)
#
# The hard part is clients that misbehave. A reply that comes before the request
# was read would be lost if the socket were just closed, because the unread rest
# makes the system reset the connection; so after a refusal the rest is read and
# thrown away for a while. A client that does not read is cut off, not waited for.

HEAD_SECONDS = 30.0            # from a head's first byte to its last
BODY_SECONDS = 30.0            # for a head and the silence in its body; less than BODY_RATE bytes a second use it up
BODY_RATE = 16 * 1024
IDLE_SECONDS = 620.0           # between requests: balancers keep theirs up to 600 s, and who closes first may lose one
LINGER_SECONDS = 30.0          # after a refusal
STALL_SECONDS = 60.0           # for a client to read some of a reply
MAX_CONNECTIONS = 10_000       # or three quarters of the descriptors, if less; past that an idle or the new one goes
REQUESTS_A_TURN = 16           # of one connection; then it is the others' turn


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> bytes:
    """A time as the Date header wants it. RFC 9110 §5.6.7."""
    # In English: Python uses the names of a locale only after setlocale().
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(second)).encode()


# What a connection waits for. CHECK: to be told whether a request may pass, when its head alone does not say.
HEAD, CHECK, BODY, REPLY, LINGER = enum.StrEnum("Phase", "HEAD CHECK BODY REPLY LINGER")


class Reply:
    """The answer to one request: send() it whole, or start_stream(), write() and close()."""

    __slots__ = ("connection", "head", "admission", "refusal", "headers", "on_gone", "is_stream", "is_done",
                 "leaves_on_eof", "last_write", "heartbeat")

    def __init__(self, connection: "HTTPConnection", head: HTTPHead | None):
        self.connection = connection
        self.head = head
        self.admission = None              # once it may pass. `head` has one too, which another connection may replace
        self.refusal: ProxyError | None = None             # why it may not, by its head alone
        self.headers: tuple = ()           # of every answer, of an error too
        self.on_gone = None                # called when the client leaves before the reply is complete
        self.leaves_on_eof = False         # is a client that closes its sending half gone?
        self.is_stream = self.is_done = False

    def send(self, status: int, body: list, headers: tuple = ()) -> None:
        """The whole reply; `body` is a payload, `headers` are (name, value) pairs."""
        if self.is_done:
            return
        self.is_done, self.on_gone = True, None
        connection, length, headers = self.connection, sum(map(len, body)), headers + self.headers
        if not connection.keeps_alive:
            headers += ("Connection", "close"),
        elif self.head.version < (1, 1):
            headers += ("Connection", "keep-alive"),
        head = encode_head(status, headers, http_date(int(time.time())), length if status != 204 else None)
        if self.head and self.head.method == "HEAD":
            body, length = [], 0
        connection.write([head, *body], len(head) + length)
        connection.on_reply_complete()

    @property
    def about(self) -> dict[str, str]:
        """What the log says of the request; not its query, which may hold a key."""
        return {"http_method": self.head.method if self.head else "-", "path": self.head.path if self.head else "-",
                "address": self.connection.address}

    def start_stream(self, headers: tuple) -> None:
        """Begins a reply of unknown length, of events; tick() writes a heartbeat after a while of silence."""
        self.is_stream, self.heartbeat = True, lambda: HEARTBEAT
        self.connection.counters.streams += 1
        self.last_write = time.monotonic()
        headers += self.headers
        if self.head.version >= (1, 1):
            headers += ("Transfer-Encoding", "chunked"),
        else:
            self.connection.keeps_alive = False
        if not self.connection.keeps_alive:
            headers += ("Connection", "close"),
        self.connection.write([encode_head(200, headers, http_date(int(time.time())), None)])

    def write(self, parts: list) -> None:
        """More of a stream."""
        if not self.is_done:
            self.last_write = time.monotonic()
            self.connection.write_soon(parts)

    def close(self) -> None:
        """The end of a stream."""
        if not self.is_done:
            self.is_done, self.on_gone = True, None
            self.connection.counters.streams -= 1
            self.connection.write([LAST_CHUNK] if self.head.version >= (1, 1) else [])
            self.connection.on_reply_complete()


class HTTPConnection(asyncio.Protocol, Holder):
    """One client's socket."""

    def __init__(self, writer: asyncio.StreamWriter, transport: "asyncio.Transport | TLSTransport",
                 server: "HTTPServer"):
        self._writer = writer               # kept: newer Pythons close the socket when this is freed
        self._transport = transport
        self.abort = transport.abort        # ends the connection at once
        self._server = server
        self._application = server.application
        self.counters = server.application.counters
        self._parser = RequestParser(server.heads)
        self._phase = HEAD
        self._reply: Reply | None = None    # to the request whose head was read
        host, port, *_ = writer.get_extra_info("peername") or ("-", "-")
        self.principal = self._host = principal_of(host)    # by its address; `principal` may become its caller
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._soon: list = []               # what is written at the end of this turn
        self._queued = 0                    # writes that wait for the client to read
        self._is_clogged = False            # does output wait for the client to read?
        self._unread = float("inf")         # what waited when it was last seen to read: see tick()
        self.is_half_closed = False         # will the client send nothing more?
        self._advances_soon = False         # will _advance() be called soon?
        self.since = time.monotonic()       # when it began to wait for a request, the rest of one, or the end (LINGER)
        self.keeps_alive = True
        server.connections.add(self)

    @property
    def is_idle(self) -> bool:
        """Is nothing at work for it? It may have sent a part of a request, or not have read an answer."""
        return self._phase in (HEAD, BODY, LINGER) and not self._advances_soon

    # What asyncio calls.

    def data_received(self, data: bytes) -> None:
        if self._phase is LINGER:
            return
        if self._phase is BODY:
            self.since = min(time.monotonic(), self.since + len(data) / BODY_RATE)
        elif self._phase is HEAD and self._parser.is_between:
            self.since = time.monotonic()
        self.counters.received += len(data)
        self._parser.feed(data)
        self._advance()

    def eof_received(self) -> bool:
        # A client may close its sending half and wait for the answer. One that reads a stream has no reason to do so.
        self.is_half_closed = True
        self._eof_at, self._probes = time.monotonic(), 0
        if self._phase in (REPLY, CHECK) and self._reply:
            waits = not (self._reply.is_stream or self._reply.leaves_on_eof)
        else:
            waits = self._is_clogged or self._advances_soon
        return waits and self._transport.can_write_eof()

    def connection_lost(self, error: Exception | None) -> None:
        self._server.connections.discard(self)
        self._parser.clear()                # a connection is part of a cycle, and may be collected much later
        budget.set(self, 0)
        reply, self._reply, self._soon = self._reply, None, []
        if reply and not reply.is_done:
            reply.is_done = True
            self.counters.streams -= reply.is_stream
            if reply.on_gone:
                reply.on_gone()

    def pause_writing(self) -> None:
        self._is_clogged = True
        self._stalled_since, self._unread = time.monotonic(), self._transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        self._is_clogged = False
        self._queued, self._unread = 0, float("inf")
        self.since = time.monotonic()       # a request that waited behind the answer has its time from now on
        self._update_budget()
        if not self._transport.is_closing():
            self._transport.resume_reading()
            self._advance_soon()                      # asyncio must not be told to close from within this

    # Reading.

    def _advance(self) -> None:
        """Passes on complete requests, one after another; after REQUESTS_A_TURN of them, others have their turn."""
        parser, self._advances_soon = self._parser, False
        for _ in range(REQUESTS_A_TURN):
            if self._phase is not BODY and not (self._phase is HEAD and parser.rest):
                break
            if self._is_clogged or self._transport.is_closing() or not self._next_request():
                break
        else:
            self._advance_soon()
        if self._phase is REPLY or self._phase is CHECK or self._is_clogged or self._advances_soon:
            if len(parser.rest) > MAX_HEAD_BYTES:
                self._transport.pause_reading()        # a client that keeps sending while it is answered can wait
        elif self.is_half_closed:
            self._transport.close()                    # nothing more can come
        elif self._phase is BODY:
            self._transport.resume_reading()
        if parser.rest or self._phase is BODY or self._is_clogged or self.held:
            self._update_budget()

    def _advance_soon(self) -> None:
        if not self._advances_soon:
            self._advances_soon = True
            asyncio.get_running_loop().call_soon(self._advance)

    def _next_request(self) -> bool:
        """Passes on the next request if all of it is there. The connection can then be kept after a refusal too, as
        it is known where the next request begins. Otherwise a refusal is sent at once, and ends the connection."""
        parser, application, reply, continues = self._parser, self._application, self._reply, False
        try:
            if self._phase is HEAD:
                head = parser.next_head()
                if head is None:
                    return False
                self._phase, self._reply = BODY, (reply := Reply(self, head))
                self.keeps_alive = head.keep_alive and not self._server.is_leaving
            head = reply.head
            if not (reply.admission or reply.refusal):
                continues = head.expects_continue
                try:
                    if head.admission is None or head.admission.is_old:
                        head.admission = None              # and stays so if admit() raises
                        head.admission = application.admit(head, self._host)
                        parser.keep(head)
                    reply.admission = admission = head.admission
                    reply.headers, self.principal = admission.headers, admission.caller or self._host
                    size = parser.length or 0                    # next_body() refuses what is over `max_body`
                    if size > SMALL and size <= application.max_body and not budget.has_room(self.principal, size):
                        raise try_later("too much is held already, most of it for you")
                except NotYet as reason:
                    self._phase = CHECK
                    reason.task.add_done_callback(functools.partial(self._on_checked, reason.headers))
                    return False
                except Exception as error:                       # a refusal, or a fault of the proxy's own
                    reply.refusal = as_client_error(error)
            # With other methods a body means nothing (RFC 9110 §9.3.1), and anybody may send one: it has to be small.
            body = parser.next_body(application.max_body if head.method == "POST" else SMALL)
        except ProxyError as error:
            self.refuse(reply and reply.refusal or error)
            return False
        if body is not None:
            self._phase = REPLY
            if reply.refusal:
                application.refuse(reply.refusal, reply)
            else:
                application.handle(reply.admission, body, reply)
            return True
        if reply.refusal:
            self.refuse(reply.refusal)
        elif parser.is_interrupted:
            self._advance_soon()
        elif continues and not parser.rest:
            self.write([CONTINUE])
        return False

    def _on_checked(self, headers: tuple, task: asyncio.Task) -> None:
        """The check that a request waited for is done; `headers` are for the reply if it failed."""
        if not self._transport.is_closing():
            error = None if task.cancelled() else task.exception()
            if error:
                self._reply.refusal, self._reply.headers = as_client_error(error), headers
            self._phase, self.since = BODY, time.monotonic()
            if not self._is_clogged:
                self._transport.resume_reading()           # also if refused: an unread rest would lose the reply
            self._advance()

    def refuse(self, error: ProxyError) -> None:
        """Answers a request that was not read to its end; where the next one begins is not known."""
        self.keeps_alive = False
        self._phase, self._reply = LINGER, self._reply or Reply(self, None)
        self._parser.clear()
        self._application.refuse(error, self._reply)

    def _update_budget(self) -> None:
        """Tells the budget how much is held here: of incomplete requests and of unread replies."""
        size = self._parser.size + (self._transport.get_write_buffer_size() if self._is_clogged else 0)
        if size > SMALL or self.held:
            budget.set(self, size if size > SMALL else 0)

    def give(self) -> None:
        if self._phase is BODY:
            self.refuse(try_later("too much is held already, most of it for you"))
        else:
            self._transport.abort()

    # Writing.

    def write(self, parts: list, size: int | None = None) -> None:
        """Writes at once; `size` is that of all parts, if it is known."""
        if self._soon:
            self._flush()
        self._queued += self._is_clogged
        self._send(parts, size)

    def write_soon(self, parts: list) -> None:
        """Writes more of a stream at the end of this turn of the event loop, so that many events are one chunk."""
        if not self._soon:
            at_end_of_turn(self._flush)
        self._soon += parts
        self._queued += self._is_clogged

    def _flush(self) -> None:
        if self._soon:
            parts, self._soon = self._soon, []
            self._send(encode_chunk(parts) if self._reply.head.version >= (1, 1) else parts)

    def _send(self, parts: list, size: int | None = None) -> None:
        size = sum(map(len, parts)) if size is None else size
        # One message may be larger than that alone, so what is small, as the end of its stream, may follow it.
        if self._is_clogged and (self._queued > MAX_QUEUED_MESSAGES or size > SMALL
                                 and self._transport.get_write_buffer_size() > MAX_QUEUED_BYTES):
            if not self._transport.is_closing():
                log.warning("! the client at %(address)s does not read and is cut off", address=self.address)
            return self._transport.abort()
        self.counters.sent += size
        before = self._transport.get_write_buffer_size() if self._is_clogged else None
        if size < LARGE:
            self._transport.write(b"".join(parts))
        else:
            for is_large, run in itertools.groupby(parts, lambda part: len(part) >= LARGE):
                for piece in run if is_large else [b"".join(run)]:            # what is large is not copied
                    self._transport.write(piece)
        if self._is_clogged:                   # maybe since the first of several pieces
            unread = self._transport.get_write_buffer_size()
            self._unread = unread if before is None else self._unread + unread - before
            self._update_budget()

    def on_reply_complete(self) -> None:
        """The reply is complete: on to the next request, or the end."""
        self._reply, rest = None, self._parser.rest
        self.since = time.monotonic()
        if self._phase is LINGER:
            self._transport.resume_reading()              # what comes is thrown away
            if self._transport.can_write_eof():
                self._transport.write_eof()
        elif not self.keeps_alive:
            self._transport.close()
        else:
            self._phase = HEAD
            self._transport.resume_reading()
            if rest or self.is_half_closed:
                self._advance_soon()                      # not at once: _advance() may be what called this

    # Time.

    def tick(self, now: float, heartbeat: float) -> None:
        """Called now and then: keeps streams alive, and gives up on what takes too long."""
        reply = self._reply if self._phase is REPLY else None
        unread = self._transport.get_write_buffer_size()
        if self._is_clogged and unread < self._unread:         # `_unread`: its size if nothing had been read
            self.since, self._stalled_since, self._unread, self._queued = now, now, unread, 0
            self._update_budget()
        if self._is_clogged and now - self._stalled_since > STALL_SECONDS:
            self._transport.abort()        # nothing was read of what was written
        elif self._transport.is_closing():                     # once the rest is read, which is less than clogs it
            if unread < self._unread:
                self.since, self._unread = now, unread
            elif now - self.since > STALL_SECONDS:
                self._transport.abort()
        elif reply is not None:
            if reply.is_stream and now - reply.last_write >= heartbeat:
                reply.write([reply.heartbeat()])
            elif (self.is_half_closed and self._probes < 2 and now > self._eof_at + 1 + self._probes / 2
                    and (reply.is_stream or reply.head.version >= (1, 1))):
                # It may be waiting or be gone. Only writing tells: if it is gone, the second write fails. Every client
                # can read past an interim response (RFC 9110 §15.2), as past a comment in a stream.
                self._probes += 1
                reply.write([reply.heartbeat()]) if reply.is_stream else self.write([CONTINUE])
        elif not self._is_clogged and self._phase is not CHECK:        # in which the client waits for us
            is_between = self._parser.is_between
            seconds = {LINGER: LINGER_SECONDS, BODY: BODY_SECONDS}.get(
                self._phase, IDLE_SECONDS if is_between else HEAD_SECONDS)
            if now <= self.since + seconds:
                return
            if self._phase is LINGER or self._phase is HEAD and is_between:
                self._transport.close()
            else:
                self.refuse(HTTPError("the request took too long", status=408))

    def close(self) -> None:
        """Ends the connection once what was written has been sent."""
        self._flush()
        self._transport.close()


# ============================================================================
# 45. HTTP server
# ============================================================================
#
# The sockets that are listened on, TLS on them, and what all connections have in common.

RECORD_BYTES = 16 * 1024       # RFC 8446 §5.1
HANDSHAKE_SECONDS = 10.0       # for TLS, from the moment that a client is connected


class TLSTransport(asyncio.Protocol):
    """TLS between a socket and an HTTPConnection, which takes it for the socket. asyncio's own sets 256 KiB aside for
    each client, even for a silent one, and shows no connection that could be counted before the handshake."""

    def __init__(self, writer: asyncio.StreamWriter, server: "HTTPServer"):
        self._transport = transport = writer.transport
        self._context = server.tls
        self._tls = None                       # an ssl.SSLObject, from the first byte on
        self._is_handshake_done = False
        self._is_paused = False
        self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_SECONDS, transport.abort)
        self.is_closing, self.abort = transport.is_closing, transport.abort
        self.get_write_buffer_size = transport.get_write_buffer_size
        self._connection = connection = HTTPConnection(writer, self, server)
        self.eof_received = connection.eof_received
        self.pause_writing, self.resume_writing = connection.pause_writing, connection.resume_writing

    # What asyncio calls.

    def data_received(self, data: bytes) -> None:
        import ssl
        if self._tls is None:
            if data[:1] != b"\x16":            # RFC 8446 §5.1: a handshake
                # Refused like a request that was not read; what follows goes to the connection as it is.
                self._timer.cancel()
                self.write = self._transport.write
                self._transport.set_protocol(self._connection)
                return self._connection.refuse(HTTPError("this port speaks HTTPS: use https://"))
            self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            self._tls = self._context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        for at in range(0, len(data), RECORD_BYTES):       # as in write()
            self._incoming.write(data[at:at + RECORD_BYTES])
            self._read()
            if self._tls is None:
                break                          # it was closed

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        self._tls = self._incoming = self._outgoing = None         # see HTTPConnection.connection_lost()
        self._connection.connection_lost(error)
        self._connection = self.eof_received = self.pause_writing = self.resume_writing = None

    # What the connection calls.

    def write(self, data) -> None:
        data = memoryview(data)
        try:
            while data and self._is_handshake_done and not self.is_closing():
                data = data[self._tls.write(data[:LARGE]):]
                self._flush()                  # a MemoryBIO keeps the size of the most that was ever in it
        except OSError:                        # ssl.SSLError is one
            self.abort()

    def pause_reading(self) -> None:
        self._is_paused = True
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()
            asyncio.get_running_loop().call_soon(self._read)          # what has come already

    def can_write_eof(self) -> bool:
        return False                           # TLS has half-closing (RFC 8446 §6.1), but most clients do not know it

    def close(self) -> None:
        if self._is_handshake_done and not self.is_closing():
            with contextlib.suppress(OSError):
                self._tls.unwrap()             # sends close_notify, and does not wait for the client's
            self._flush()
        self._transport.close()

    def _read(self) -> None:
        import ssl
        if self._tls is None:
            return                             # the client is gone
        try:
            if not self._is_handshake_done:
                self._tls.do_handshake()
                self._is_handshake_done = True
                self._timer.cancel()
            while not (self._is_paused or self.is_closing()):
                data = self._tls.read(LARGE)
                if not data:
                    self._connection.eof_received()
                    return self.close()
                self._connection.data_received(data)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            self._flush()                      # the alert, which says why
            self._transport.close()
        finally:
            self._flush()

    def _flush(self) -> None:
        data = self._outgoing.read() if self._tls else b""
        if data and not self.is_closing():
            self._transport.write(data)


class HTTPServer:
    """The listening sockets and their connections."""

    def __init__(self, application, heartbeat: float):
        self.connections: set[HTTPConnection] = set()
        self.is_leaving = False                # are connections to be closed after the next answer?
        self._servers: list[asyncio.Server] = []
        self.application = application
        self._heartbeat = heartbeat
        self._max_connections = min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4)
        self._refused: set = set()             # principals for whom there was no room since the last tick()
        self.tls: object = None                # an ssl.SSLContext, for connections to come
        self.heads: dict[tuple, HTTPHead] = {}         # clients send the same head again and again

    async def start(self, host: str, port: int, tls: object = None) -> list[tuple[str, int]]:
        """Listens at all addresses of a host (:: is both families); returns them. StartError when one is taken."""
        self.tls = tls
        name, problem = host.removeprefix("[").removesuffix("]"), None
        try:
            for family, *_, address in dict.fromkeys(await look_up(name or None, port, socket.AI_PASSIVE)):
                try:
                    listener = socket.create_server((address[0], port, *address[2:]), family=family,
                                                    dualstack_ipv6=name == "::" and socket.has_dualstack_ipv6())
                except OSError as error:
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):      # a family that is turned off
                        raise
                    problem = error
                    continue
                port = port or listener.getsockname()[1]          # all take the port that the first one got
                # Accepted sockets inherit this. Without it, an event behind another waits 40 ms for the client's ACK.
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._servers.append(await asyncio.start_server(self._connected, sock=listener, backlog=1024))
            if not self._servers:
                raise problem
        except RuntimeError as error:          # there is no thread to look the host up with
            raise StartError(f"cannot listen on {host} port {port}: {error}") from None
        except (OSError, UnicodeError) as error:
            # What socket.create_server() adds in brackets is said already.
            reason = (getattr(error, "strerror", None) or "not an address").partition(" (")[0]
            raise StartError(f"cannot listen on {host} port {port}: {reason}") from None
        return [server.sockets[0].getsockname()[:2] for server in self._servers]

    def leave(self) -> None:
        """From now on each connection is closed after its next answer, even if that is to a running request."""
        self.is_leaving = True
        for connection in self.connections:
            connection.keeps_alive = False

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Callbacks take half the time of streams with a task for each connection, so the stream that start_server()
        # made hands its socket over before a byte is read.
        if len(self.connections) >= self._max_connections and not self._make_room(writer):
            return writer.transport.abort()
        stream = writer.transport.get_protocol()
        writer.transport.set_protocol(
            TLSTransport(writer, self) if self.tls else HTTPConnection(writer, writer.transport, self))
        stream.connection_lost(None)                   # or it and its writer would keep each other alive

    def _make_room(self, writer: asyncio.StreamWriter) -> bool:
        """Closes some connections for a new one: those that have been idle longest, of whoever has most of them."""
        host, *_ = writer.get_extra_info("peername") or ("-",)
        principal = principal_of(host)
        if principal in self._refused:                 # counting takes long
            return False
        others = holders_of_most([one for one in self.connections if one.is_idle], principal)
        if sum(one.principal == principal for one in self.connections) + 1 >= len(others):     # its busy ones count too
            self._refused.add(principal)
            return False
        for one in sorted(others, key=lambda one: one.since)[:1 + len(others) // 100]:
            self.connections.discard(one)              # connection_lost() comes a turn later; others may come sooner
            one.abort()
        return True

    def tick(self, now: float) -> None:
        """Called now and then: looks at every connection."""
        self._refused.clear()
        for connection in list(self.connections):
            connection.tick(now, self._heartbeat)

    async def close(self) -> None:
        """Stops listening and ends all connections."""
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            connection.close()
        for _ in range(100):                   # what was written gets two seconds to be sent
            if not self.connections:
                break
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            connection.abort()


# ============================================================================
# 46. Outlets
# ============================================================================
#
# How the messages of an exchange get into an HTTP reply.

UNDECIDED_SECONDS = 2.0       # a legacy answer that takes longer comes as a stream, a quicker one as plain JSON
SILENT_SECONDS = 5.0          # the same for a modern one

# No cache may keep an answer: caches go by the URL alone, answers also by the key. And nginx must not buffer streams.
STREAM_HEADERS = (("Content-Type", EVENT_STREAM_TYPE), ("Cache-Control", "no-cache"), ("X-Accel-Buffering", "no"))
JSON_HEADERS = (("Content-Type", JSON_TYPE), ("Cache-Control", "no-store"))


def begin_events(reply: Reply, stream: Stream, version: str | None) -> None:
    """Begins with an event without data, whose id lets a client come back for what follows. MCP 2025-11-25, Transports,
    Sending Messages to the Server, 6: "an SSE event consisting of an event ID and an empty data field in order to prime
    the client to reconnect". Clients of older revisions choke on one, also on one that they make of a heartbeat:
    Python's SDK before 1.23. They get neither."""
    if version == PRIMING_VERSION:
        stream.last_number += 1
        reply.write([b"id: ", stream.event_id(stream.last_number), b"\ndata: \n\n"])
    else:
        reply.heartbeat = lambda: BARE_HEARTBEAT if stream.last_read else HEARTBEAT


class StreamOutlet(Outlet):
    """Into the one stream that the session has for everything: HTTP+SSE."""

    asks = True
    transport = "sse"

    def __init__(self, stream: Stream):
        self.send = stream.send

    def finish(self, payload: list, status: int, headers: tuple = ()) -> None:
        self.send(payload)


class PostOutlet(Outlet, Holder):
    """Into the reply to a POST: plain JSON when the answer is the first thing that comes, and comes soon; otherwise a
    stream. For a client that takes only one of the two, that one. Several requests get a stream or an array."""

    transport = "streamable-http"

    def __init__(self, admission, reply: Reply, client: Client, era: Era = LEGACY, batch: int = 0):
        self.reply = reply
        self._client = client
        self._session = client if client.is_session else None
        self._stream: Stream | None = None
        self._takes_json, self._takes_stream = admission.takes_json, admission.takes_stream
        self._left = batch or 1                    # answers still to come: one, or those of a batch
        self._answers: list[bytes] | None = [] if batch else None
        self.asks = self._session is not None and self._takes_stream
        reply.on_gone = self._gone
        # MCP 2026-07-28, Streamable HTTP, Cancellation: hanging up is cancelling. And the reply waits for the server's
        # first message, because an error sets its HTTP status; but not for long, because reverse proxies cut silent
        # connections.
        reply.leaves_on_eof = era is MODERN
        if self._takes_stream:
            self.patience = SILENT_SECONDS if era is MODERN else UNDECIDED_SECONDS

    @property
    def is_heard(self) -> bool:
        reply = self.reply                # one that half-closed may still be there, but others are asked first
        return self._stream.is_attached if self._stream else not (reply.is_done or reply.connection.is_half_closed)

    def open(self) -> None:
        """Makes the reply a stream, if the client takes one."""
        if self._stream is not None or not self._takes_stream:
            return
        self.patience, session = float("inf"), self._session
        self._stream = session.open_stream() if session else Stream()
        if not self.reply.is_done:        # otherwise the client is gone, but it may come back for what is kept
            self.reply.start_stream((*STREAM_HEADERS, *self._session_header()))
            if session:
                begin_events(self.reply, self._stream, session.version)
            self._stream.attach(self.reply)
        for answer in self._answers or ():
            self._stream.send([answer])
        budget.set(self, 0)

    def send(self, payload: list) -> None:
        self.open()
        if self._stream:
            self._stream.send(payload)

    def finish(self, payload: list, status: int, headers: tuple = ()) -> None:
        if not self._takes_json and (status == 200 or self._answers is not None):
            self.open()
        if self._stream:
            self._stream.send(payload)
        elif self._answers is not None:
            self._answers.append(b"".join(payload))
            self.principal = self._client.principal
            budget.set(self, self.held + len(self._answers[-1]))
        else:
            return self.reply.send(status, payload, JSON_HEADERS + headers + self._session_header())
        self._one_less()

    def close(self) -> None:
        if self._answers is None:
            self.open()
        self._one_less()

    def _one_less(self) -> None:
        self._left -= 1
        if self._left:
            return
        budget.set(self, 0)
        if self._stream is None and self._answers:
            parts = [part for answer in self._answers for part in (b",", answer)]
            self.reply.send(200, [b"[", *parts[1:], b"]"], JSON_HEADERS)
        elif self._stream is None:
            self.reply.send(202, [])          # a call that was cancelled has no answer
        elif self._session:
            self._session.end_stream(self._stream)
        else:
            self._stream.close()

    def give(self) -> None:
        """Refuses a batch whose answers wait for the last one."""
        error = try_later("too much is held for this client")
        self.reply.send(error.http_status, encode_error(None, error), (*JSON_HEADERS, *error.headers))
        self._answers = []
        self._gone()

    def _session_header(self) -> tuple:
        """The header of the answer that opens a session."""
        session, call = self._session, self.exchange
        opens = call and call.method == "initialize" and session and (session.version or self._stream)
        return ((SESSION_ID_HEADER, session.sealed_id),) if opens else ()

    def _gone(self) -> None:
        """The client hung up. A call of a session goes on, and what comes on its stream can be fetched."""
        if self._session is None:             # a visitor's is cancelled: nobody could fetch the answer
            for call in list(self._client.calls.values()):
                call.cancel()
        elif self.exchange and self.exchange.method == "initialize":
            self._session.leave()             # nobody knows its id
        elif self._stream:
            self._stream.detach(self.reply)


class ToolOutlet(Outlet):
    """Into the reply to a tool call without MCP: the result alone. Progress has no place there."""

    transport = "tools"

    def __init__(self, reply: Reply):
        self._reply = reply
        reply.on_gone = lambda: self.exchange and self.exchange.cancel()

    def finish(self, payload: list, status: int, headers: tuple = ()) -> None:
        try:
            message = parse_message(decode_json(b"".join(payload)))
        except RPCError:
            error = ServerError("the MCP server's answer is not valid")
            return self._reply.send(error.http_status, encode_error(b"1", error), JSON_HEADERS)
        if message.is_result:
            return self._reply.send(200, [message.raw("result").encode()], JSON_HEADERS)
        if status == 200:
            status = {INVALID_PARAMS: 400, METHOD_NOT_FOUND: 404}.get(message.error_code, 502)
        self._reply.send(status, payload, (*JSON_HEADERS, *headers))


# ============================================================================
# 47. Overview
# ============================================================================
#
# The proxy for whoever operates it: /readyz, /metrics, and the JSON that the page at / shows. Nothing is kept here; all
# is read off when somebody asks. Names of metrics are OpenTelemetry's and the Prometheus client libraries' where
# they have any.

LABELS = ("server", "mcp_method_name", "gen_ai_tool_name", "mcp_protocol_version", "error_type")
LISTS_SECONDS = 1.0              # for servers to say which tools they have
MAX_SESSIONS_SHOWN = 100


class Overview:
    """The proxy as seen from outside."""

    def __init__(self, mount: Mount, census: Census):
        self._mount, self._census = mount, census
        self._started_at, self._clock_at = time.time(), mount.now()
        self._metrics: asyncio.Task[bytes] | None = None

    def _wall(self, moment: float) -> float:
        """A moment of the mount's clock in seconds since 1970."""
        return self._started_at - self._clock_at + moment

    def _facts(self, server: Server, with_error: bool) -> dict:
        """What is known of a server: what is not known has no member."""
        facts, identity = {"state": server.state, "restarts": server.restarts}, server.identity
        if identity:
            facts |= {"era": identity.era, "revision": str(identity.version)[:MAX_LABEL],
                      "name": identity.name[:MAX_LABEL], "version": identity.release[:MAX_LABEL]}
        return facts | ({"error": server.last_error} if server.last_error and with_error else {})

    def readiness(self, with_errors: bool) -> dict:
        """Which servers can be used."""
        mount = self._mount
        return {"status": "draining" if mount.is_leaving else "ready" if mount.is_ready else "not ready",
                "servers": {name: self._facts(server, with_errors) for name, server in mount.servers.items()}}

    def summary(self, caller: Caller | None) -> str:
        """All that a caller may see, as JSON."""
        mount, sees_all = self._mount, caller is None or caller.sees_all
        view = mount.catalog.view(None, (), caller and caller.limits)
        sessions = [session for session in mount.sessions.values() if sees_all or session.caller == caller]
        used = self._census.by_server()
        return dump({
            "name": "mcpproxy", "version": __version__, "status": self.readiness(False)["status"], "mcp": "/mcp",
            "isGuarded": mount.settings.is_guarded, "isFile": mount.catalog.is_file,
            "shared": all(server.is_for_all for server in mount.servers.values()),
            "servers": [self._about_server(name, server, sees_all, *(numbers[name] for numbers in used))
                        for name, server in mount.servers.items() if name in view.names or sees_all],
            "sessions": [self._about_session(session) for session in sessions[-MAX_SESSIONS_SHOWN:]],
            "calls": [self._about_call(*call) for call in reversed(mount.recent) if sees_all or call[4] == caller]})

    def _about_server(self, name: str, server: Server, with_error: bool, processes: int, memory: int,
                      seconds: float) -> dict:
        facts = self._facts(server, with_error)
        instance, group = server.instances.get(()), server.config.group
        place = name if name in self._mount.catalog.places else group
        if instance and instance.state is READY:
            facts["since"] = int(self._wall(instance.since))
        if instance and with_error and server.state == "starting":
            facts["words"] = instance.link.last_word
        if "error" in facts:
            facts["errorAt"] = int(self._wall(server.last_error_at))
        facts["title"] = facts.pop("name", None)
        return {"name": name, **facts, "group": group, "isRemote": bool(server.config.url),
                "path": f"/servers/{place}/mcp" if self._mount.catalog.is_file else "/mcp",
                "processes": processes, "memory": memory, "cpu": round(seconds, 1)}

    def _about_session(self, session: Session) -> dict:
        return {"session": session.label, "client": session.software, "place": session.view.place or "",
                "revision": session.version or "", "transport": session.transport,
                "key": session.caller.name if session.caller else "", "since": int(self._wall(session.opened_at)),
                "calls": len(session.calls)}

    def _about_call(self, at: float, labels: tuple, name: str, software: object, caller: Caller | None,
                    fields: tuple) -> dict:
        label, method, _, _, outcome, size_in, size_out, ms = fields
        return {"at": round(self._wall(at), 3), "server": labels[0], "session": "" if label == "-" else label,
                "client": software if isinstance(software, str) else client_name(software), "method": method,
                "tool": "" if name == "-" else name, "outcome": outcome, "error_type": labels[4], "ms": round(ms, 1),
                "bytes_in": size_in, "bytes_out": size_out}

    def metrics(self) -> asyncio.Future[bytes]:
        """What Prometheus reads. Whoever asks while it is being made gets the same."""
        if self._metrics is None or self._metrics.done():
            self._metrics = asyncio.get_running_loop().create_task(self._read_metrics())
        return asyncio.shield(self._metrics)

    async def _read_metrics(self) -> bytes:
        """The same, once the servers have said which tools they have."""
        servers, counters, instances = self._mount.servers, self._mount.counters, {}
        for server in servers.values():
            server.read_listings()
        for name, _, tool, *_ in counters.unsettled:
            if name in servers and tool not in servers[name].tool_names:
                instances[name] = next((one for one in servers[name].instances.values() if one.connection), None)
        if any(instances.values()):
            await asyncio.wait({asyncio.ensure_future(asyncio.gather(*(
                one.tools.get(refresh=True) for one in instances.values() if one), return_exceptions=True))},
                timeout=LISTS_SECONDS)
        counters.settle({name: server.tool_names for name, server in servers.items()}, {
            name for name, server in servers.items() if server.state == "starting" and not server.tool_names})
        return exposition(self._families())

    def _families(self) -> collections.abc.Iterator[tuple]:
        """All metrics, in the form that exposition() takes."""
        mount, counters, census = self._mount, self._mount.counters, self._census
        running = collections.Counter(call.instance.server.name if call.instance else "" for call in mount.calls)
        processes, memory, seconds = census.by_server()
        transports = collections.Counter(session.transport for session in mount.sessions.values())
        yield ("mcp_server_operation_duration_seconds", "histogram", "How long requests of clients took.",
               [(dict(zip(LABELS, labels)), numbers) for labels, numbers in counters.calls.items()
                if labels not in counters.unsettled])
        for name, kind, about, value_of in (
                ("server_up", "gauge", "Can the server be used?", lambda server: int(server.can_be_used)),
                ("server_restarts_total", "counter", "Restarts of the server.", lambda server: server.restarts),
                ("server_start_duration_seconds", "gauge", "How long the server's last start took.",
                 lambda server: server.start_seconds),
                ("server_processes", "gauge", "Processes of the server.", lambda server: processes[server.name]),
                ("server_resident_memory_bytes", "gauge", "Memory of the server's processes.",
                 lambda server: memory[server.name]),
                ("server_cpu_seconds_total", "counter", "CPU time of the server's processes, also of ended ones.",
                 lambda server: seconds[server.name])):
            found = [({"server": server.name}, value_of(server)) for server in mount.servers.values()]
            yield f"mcpproxy_{name}", kind, about, [sample for sample in found if sample[1] is not None]
        facts = [(server.name, self._facts(server, False)) for server in mount.servers.values() if server.identity]
        for name, kind, about, samples in (
                ("server_info", "gauge", "What the server said of itself.", [({"server": server, **{
                    label: known[label] for label in ("era", "revision", "name", "version")}}, 1)
                    for server, known in facts]),
                ("limit_kills_total", "counter", "Processes that were ended because of a limit.", [
                    ({"server": server, "limit": limit}, number) for (server, limit), number in census.killed.items()]),
                ("calls_in_flight", "gauge", "Calls that clients wait for.", [
                    ({"server": name}, running[name]) for name in dict.fromkeys(("", *mount.servers, *running))]),
                ("sessions", "gauge", "Sessions of clients.", [
                    ({"transport": transport}, transports[transport]) for transport in ("streamable-http", "sse")]),
                ("refused_total", "counter", "Requests that were refused, by HTTP status.", [
                    ({"reason": re.sub("[ -]", "_", REASONS[status].lower())}, number)
                    for status, number in counters.refused.items()]),
                ("streams", "gauge", "Event streams that are open.", [({}, counters.streams)]),
                ("received_bytes_total", "counter", "Bytes that came by HTTP.", [({}, counters.received)]),
                ("sent_bytes_total", "counter", "Bytes that went by HTTP.", [({}, counters.sent)]),
                ("build_info", "gauge", "What runs here.", [
                    ({"version": __version__, "python": sys.version.split()[0]}, 1)])):
            yield f"mcpproxy_{name}", kind, about, samples
        pages = process_stat(os.getpid())[PAGES]
        yield ("process_resident_memory_bytes", "gauge", "Memory of the proxy itself.",
               [({}, int(pages) * os.sysconf("SC_PAGE_SIZE"))] if pages else [])
        yield "process_cpu_seconds_total", "counter", "CPU time of the proxy itself.", [({}, time.process_time())]
        yield "process_start_time_seconds", "gauge", "When the proxy was started.", [({}, self._started_at)]
        with contextlib.suppress(OSError):
            yield "process_open_fds", "gauge", "Descriptors of the proxy.", [({}, len(os.listdir("/proc/self/fd")))]


# ============================================================================
# 48. Admission
# ============================================================================
#
# What the head of a request says: found out once, and used again when the same head comes.

RESOURCE_METADATA = "/.well-known/oauth-protected-resource"          # RFC 9728 §3
WHOLE_PROXY_PATHS = ("/", "/healthz", "/readyz", "/metrics")            # paths that no single server has
# W3C Trace Context, 3.2 and 4.3: ids of zeros alone and the version ff are invalid, and higher versions may add to it.
_TRACEPARENT = re.compile(r"(?!ff|00.{54})[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


class Admission:
    """Who sends a request, to which place, and what for."""

    def __init__(self, head: HTTPHead, host: str, application):
        self.head, self.host, self.application = head, host, application       # `host` was the first to send it
        self.keys, self._settings, self._catalog = application.keys, application.settings, application.mount.catalog
        self.caller: Caller | None = None      # whose key or token it brings, once that was checked
        self.good_until: float | None = None   # when it has to be checked again
        self.place, self.path = self._find_place(application.routes)
        # The start of the paths that clients are told.
        self.base = self._settings.base_path + (f"/servers/{self.place}" if self.place else "")
        self.route = application.routes.get("/tools/<name>" if self.path.startswith("/tools/") else self.path)
        if self.path.startswith(RESOURCE_METADATA):
            resource = self._described_resource() if self._settings.oauth_issuer and not self.place else None
            self.route = application.routes.get(RESOURCE_METADATA) if resource else None
            self.place, self.path = resource or (self.place, self.path)
        self.objection: HTTPError | None = None          # of a guard; an open route then says less
        self.headers: tuple = ()               # of every reply, as (name, value) pairs
        self.session_id = head.headers.get(SESSION_ID_HEADER.lower())
        self.version = head.headers.get("mcp-protocol-version")
        self.media_type = media_type(head)
        accept = head.headers.get("accept", "")
        self.takes_json, self.takes_stream = is_accepted(accept, JSON_TYPE), is_accepted(accept, EVENT_STREAM_TYPE)
        self.trace = trace_of(head.headers)

    def _find_place(self, routes: dict) -> tuple[str | None, str]:
        """(place, path there). A reverse proxy may or may not have removed BASE_PATH."""
        place, path, base = None, self.head.path, self._settings.base_path
        if path.startswith(base + "/"):
            path = path.removeprefix(base)
        elif path == base and base not in routes:
            path = "/"
        if self._catalog.is_file and path.startswith("/servers/"):
            name, slash, rest = path.removeprefix("/servers/").partition("/")
            if (name in self._catalog.places or name in self._catalog.leaving) and (
                    not slash or "/" + rest.rstrip("/") not in WHOLE_PROXY_PATHS):
                place, path = name, slash + rest
        if path not in routes and path.rstrip("/") in routes:
            path = path.rstrip("/")
        return place, path

    def _described_resource(self) -> tuple[str | None, str] | None:
        """(place, path) of the resource whose metadata is asked for; None if it is not one of ours. RFC 9728 §3.1: its
        path stands behind the well-known one."""
        prefix = urlsplit(canonical(self._settings.public_url)).path
        rest = self.path.removeprefix(RESOURCE_METADATA)
        match = re.fullmatch("(?:/servers/([^/]+))?(/mcp|/sse|/tools)?/?", rest.removeprefix(prefix))
        if not match or match[1] and not (self._catalog.is_file and match[1] in self._catalog.places):
            return None
        return match[1], match[2] or "/mcp"

    @property
    def is_old(self) -> bool:
        return self.keys is not self.application.keys or (
            self.good_until is not None and self.good_until < time.monotonic())

    @property
    def resources(self) -> list[str]:
        """The URLs of its place, its own first. A token that is for one of them (its `aud`, RFC 8707 §2) is good for
        all."""
        base = canonical(self._settings.public_url) + (f"/servers/{self.place}" if self.place else "")
        own = {"/messages": "/sse", "/openapi.json": "/tools"}.get(self.path, "/" + self.path.split("/")[1])
        return [base + path for path in sorted(("/mcp", "/sse", "/tools"), key=lambda path: path != own)]

    @property
    def challenge(self) -> str:
        """What a client without a good token needs to get one: RFC 9728 §5.1. The metadata of a resource name just
        that one, §3.3."""
        parts = urlsplit(self.resources[0])
        return f'Bearer resource_metadata="{parts.scheme}://{parts.netloc}{RESOURCE_METADATA}{parts.path}"'

    @once
    def view(self) -> View:
        """What the client is shown: what its place has, narrowed down by ?server=, ?tools= and X-MCP-Tools."""
        wanted = [(name, value) for name, value in self.head.query if name in ("server", "tools")]
        wanted += [field for field in self.head.fields if field[0] == TOOLS_HEADER]
        return self._catalog.view(self.place, tuple(wanted), self.caller and self.caller.limits)

    @once
    def variables(self) -> dict[str, str]:
        """The variables that the request sets for its servers that are not shared; each of these has to allow them."""
        head = self.head
        if self.view.is_for_all:
            # Nothing can be set here, so what is not named like a variable is somebody else's, and does no harm.
            query = tuple(pair for pair in head.query
                          if pair[0] in QUERY_PARAMETERS or re.fullmatch("_*[A-Z][A-Z0-9_]*", pair[0]))
            if len(query) < len(head.query):
                log.debug("= %(ignored)d query parameters are no variables", ignored=len(head.query) - len(query))
            head = dataclasses.replace(head, query=query)
        elif head.method in ("GET", "HEAD") and not (
                self._settings.is_guarded or self.headers or "sec-fetch-site" in head.headers
                or QUERY_PARAMETERS.issuperset(name for name, _ in head.query)):
            # Any page can make a browser GET any URL; over plain HTTP to another host, no header shows it.
            raise HTTPError("a web page could have sent this: send variables as X-MCP-Env-<NAME>, or set AUTH_KEY",
                            status=403)
        variables = client_variables(head)
        self.view.check_variables(variables)
        return variables

    @once
    def name(self) -> str | None:
        """?client=: tells clients apart that have the same key and no session."""
        name = self.head.query_value("client")
        if name is not None and not re.fullmatch("[A-Za-z0-9._-]{1,64}", name):
            raise RPCError("client must be 1 to 64 of A-Z a-z 0-9 . _ -", code=INVALID_PARAMS)
        return name


def trace_of(headers: dict[str, str]) -> dict[str, str]:
    """A request's trace context, as members (name -> JSON) for a message's _meta. MCP 2026-07-28, Overview, _meta."""
    if not _TRACEPARENT.fullmatch(headers.get("traceparent", "")):
        return {}
    return {name: dump(headers[name]) for name in ("traceparent", "tracestate", "baggage") if name in headers}


@functools.lru_cache(maxsize=32)          # clients differ little in this
def is_accepted(accept: str, wanted: str) -> bool:
    """Does an Accept header take this media type? RFC 9110 §12.5.1: without it, yes; the closest range counts."""
    is_taken = {}                              # by media range
    for part in (accept.strip() or "*/*").lower().split(",", MAX_PARTS)[:MAX_PARTS]:
        media_range, *parameters = [piece.strip() for piece in part.split(";")]
        is_taken.setdefault(media_range, not any(re.fullmatch(r"q=0(\.0*)?", parameter) for parameter in parameters))
    closest_first = wanted, wanted.partition("/")[0] + "/*", "*/*"
    return next((is_taken[one] for one in closest_first if one in is_taken), False)


def check_is_json(admission: Admission) -> None:
    """Refuses a body that is not said to be JSON."""
    if admission.media_type != JSON_TYPE:
        raise HTTPError(f"send JSON, with the header Content-Type: {JSON_TYPE}", status=415)


def check_accept(admission: Admission, is_endless: bool = False) -> None:
    """Refuses a request whose answer its client takes in no form; an endless answer can only be a stream."""
    if not (admission.takes_stream or admission.takes_json and not is_endless):
        raise HTTPError(f"the answer would be {EVENT_STREAM_TYPE}{'' if is_endless else ' or ' + JSON_TYPE}, which the "
                        "Accept header leaves out", status=406)


def check_version(admission: Admission) -> None:
    """Refuses a legacy request whose MCP-Protocol-Version is no legacy revision. A session that was opened at one
    revision takes every known one, because clients in the field mix them up."""
    if admission.version is not None and admission.version not in LEGACY_VERSIONS:
        raise RPCError("unsupported MCP-Protocol-Version")


# ============================================================================
# 49. OpenAPI
# ============================================================================
#
# The tools as operations, for clients that know no MCP.


def openapi_document(tools: dict[str, str], title: str, version: str, base_path: str, needs_key: bool) -> bytes:
    """An OpenAPI 3.1 description of tools, given as texts by name: one operation each."""
    paths, schemas = {}, {}
    for name, text in tools.items():
        try:
            tool, parts = scan_plain(text, 0)[0], {}
            path = "/tools/" + quote(name, safe="", errors="surrogatepass")
            operation = dump({"post": openapi_operation(path, name, tool, parts, len(schemas))})
            schemas.update({part: dump(schema) for part, schema in parts.items()})
            paths[path] = operation
        except RecursionError:
            log.warning("! the tool %(tool)s is nested too deeply for /openapi.json", tool=name)
    document = {"openapi": '"3.1.0"', "info": dump({"title": title, "version": version}),
                "servers": dump([{"url": base_path or "/"}]), "paths": as_object(paths)}
    components = {"schemas": as_object(schemas)} if schemas else {}
    if needs_key:
        components["securitySchemes"] = dump({"key": {"type": "http", "scheme": "bearer"}})
        document["security"] = '[{"key":[]}]'
    if components:
        document["components"] = as_object(components)
    return as_object(document).encode()


def openapi_operation(path: str, name: str, tool: dict, parts: dict[str, object], taken: int) -> dict:
    """The operation that calls a tool at a path. What its schemas define by name goes to `parts`, to join the `taken`
    components that the document has already: many readers, such as Open WebUI, follow no other references."""
    pointer = "#/paths/" + path.replace("~", "~0").replace("/", "~1").replace("%", "%25") + "/post"
    result = {"type": "object", "properties": {"content": {"type": "array", "items": {"type": "object"}},
                                               "isError": {"type": "boolean"}}, "required": ["content"]}

    def part(schema: object, place: str) -> object:
        homes, own = {"#": pointer + place}, {}
        if isinstance(schema, dict):           # references would be relative to a URI of its own
            schema = {keyword: value for keyword, value in schema.items() if keyword != "$id"}
            for keyword in ("$defs", "definitions"):
                for one, value in (schema.pop(keyword) if isinstance(schema.get(keyword), dict) else {}).items():
                    home = re.sub("[^A-Za-z0-9._-]", "_", f"{one}-{taken + len(parts) + len(own)}")
                    homes[f"#/{keyword}/" + one.replace("~", "~0").replace("/", "~1")] = "#/components/schemas/" + home
                    own[home] = value
        parts.update({home: rebase_references(value, homes) for home, value in own.items()})
        return rebase_references(schema, homes)
    if isinstance(tool.get("outputSchema"), dict):
        result["properties"]["structuredContent"] = part(
            tool["outputSchema"], "/responses/200/content/application~1json/schema/properties/structuredContent")
    schema = part(tool.get("inputSchema", {"type": "object"}), "/requestBody/content/application~1json/schema")
    is_required = isinstance(schema, dict) and bool(schema.get("required"))
    error = {"description": "What went wrong", "content": {JSON_TYPE: {"schema": {"type": "object"}}}}
    return {
        "operationId": name, "summary": tool.get("title") or name,
        "description": tool.get("description") or tool.get("title") or name,
        "requestBody": {"required": is_required, "content": {JSON_TYPE: {"schema": schema}}},
        "responses": {"200": {"description": "The CallToolResult", "content": {JSON_TYPE: {"schema": result}}},
                      "default": error}}


def rebase_references(schema: object, homes: dict[str, str], are_named: bool = False) -> object:
    """A JSON schema whose references to its own parts point to the places of these in another document, which `homes`
    gives; or, if `are_named`, the same for an object of schemas, whose keys are names and not keywords."""
    if isinstance(schema, list):
        return [rebase_references(item, homes) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if are_named:
        return {name: {} if value is True else rebase_references(value, homes) for name, value in schema.items()}

    def rebased(name: str, value: object) -> object:
        if name == "$ref" and isinstance(value, str) and re.match("#(?:/|$)", value):
            text = unquote(value)
            part = re.match("#(?:/(?:[$]defs|definitions)/[^/]*)?", text)[0]
            part = part if part in homes else "#"
            return homes[part] + quote(text[len(part):], "/~$!&'()*+,;=:@?", errors="surrogatepass")
        return value if name in DATA_KEYWORDS else rebase_references(value, homes, name in NAMING_KEYWORDS)
    return {name: rebased(name, value) for name, value in schema.items() if name != "$schema"}


# ============================================================================
# 50. The application
# ============================================================================
#
# What an HTTPConnection calls. A request has to pass the guards; its path and method choose an endpoint; and what that
# raises becomes the reply, in one place. The endpoints that know no MCP (probes, metrics, preflights) are here too.

CHECKED_SECONDS = 60.0           # for which a good token is not checked again
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LARGE_BODY = 4 * 1024 * 1024     # bytes
VALUE_BYTES = {b"[": 64, b"{": 64, b",": 32, b'"': 16}         # of memory, when parsed, for each such byte
MANY_STRINGS = 100_000


class Work(Holder):
    """The task of an endpoint that has to wait before it can reply: it ends when the client leaves, and a body of
    `size` counts as held while it runs."""

    def __init__(self, application: "Application", work, size: int, reply: Reply):
        self._application, self._reply, self.principal = application, reply, reply.connection.principal
        budget.set(self, size if size > SMALL else 0)
        self._task = asyncio.get_running_loop().create_task(self._run(work))
        self._task.add_done_callback(lambda task: (work.close(), budget.set(self, 0)))         # it may not have begun
        reply.on_gone = self._task.cancel

    async def _run(self, work) -> None:
        try:
            await work
        except Exception as error:
            self._application.refuse(as_client_error(error), self._reply)

    def give(self) -> None:
        self._task.cancel()
        self._application.refuse(try_later("too much is held for this client"), self._reply)


def check_can_be_parsed(body: bytes, principal: object) -> None:
    """Refuses a large body if there is no room for it once parsed: [[],[]] takes thirty times its text."""
    def size_of(text: bytes) -> int:
        return sum(size * text.count(sign) for sign, size in VALUE_BYTES.items())
    size = size_of(body)
    if size > LARGE_BODY and body.count(b'"') - body.count(b'\\"') < MANY_STRINGS:
        size = size_of(_STRING.sub(b"", body))             # a few long strings: their commas are no values
    if size > budget.limit:
        raise HTTPError("the body has more values than can be held", status=413)
    if not budget.has_room(principal, size):
        raise try_later("too much is held already, most of it for you")


class Application:
    """What is the same at PORT and at METRICS_PORT; `routes` are by path, see Admission."""

    nothing_here = ""                          # what is said of other paths; {0} is BASE_PATH
    takes_keys = True

    def __init__(self, routes: "dict[str, Route]", mount: Mount, overview: Overview, keys: Keys = Keys(),
                 issuer: Issuer | None = None):
        self.routes, self.guards = routes, GUARDS
        self.mount, self.overview, self.counters = mount, overview, mount.counters
        self.keys, self.issuer = keys, issuer
        self.settings = settings = mount.settings
        self.max_body = settings.max_request_bytes
        # As browsers and clients write them.
        self._origins = tuple(one.rstrip("/") for one in listed(settings.allowed_origins.lower()))
        self._hosts = tuple(re.sub(":[0-9]*$", "", one) for one in listed(settings.allowed_hosts.lower()))

    def _nothing_at(self, path: str) -> str:
        """What is said of a path that is not there. A client whose key is refused looks for OAuth, and shows this."""
        is_for_oauth = re.search(r"/(register|authorize|token)$|/\.well-known/(oauth|openid)", path)
        return self.nothing_here.format(self.settings.base_path) + (
            "; a client that looks for OAuth has no key, or a wrong one" if is_for_oauth and self.keys.callers else "")

    def admit(self, head: HTTPHead, host: str) -> Admission:
        """Decides by the head alone whether a request may pass; raises the error of the first guard that objects, or
        NotYet when one has to find something out first, for which `host` is charged."""
        admission = Admission(head, host, self)
        route = admission.route
        self._allow_page(admission)
        try:
            # A client that takes / for the URL of MCP is told where that is, with or without a key: asked for one here,
            # it would look for OAuth.
            if route is None or admission.path == "/" and (
                    head.method == "POST" or head.headers.get("accept", "").startswith(EVENT_STREAM_TYPE)):
                raise HTTPError(self._nothing_at(head.path), status=404, code=METHOD_NOT_FOUND)
            try:
                for guard in self.guards if not route.is_public else ():
                    guard(self, admission)
            except HTTPError as error:
                if not route.is_open:
                    raise
                # Not kept for the next request: an error that is raised again and again holds ever more frames.
                admission.objection, admission.good_until = error, 0.0
            if head.method not in route.methods:
                raise HTTPError(f"this path takes {route.allow}", status=405, headers=(("Allow", route.allow),))
            if head.headers.get("content-encoding", "identity").lower() != "identity":        # RFC 9110 §15.5.16
                raise HTTPError("a body must come as it is, without Content-Encoding", status=415,
                                headers=(("Accept-Encoding", "identity"),))
        except (ProxyError, NotYet) as error:
            error.headers += admission.headers
            raise
        return admission

    def admit_anew(self) -> None:
        """Every request has to pass the guards anew, as when keys change: admissions are good for one Keys object."""
        self.keys = self.keys._replace()

    def _allow_page(self, admission: Admission) -> None:
        """Lets a browser show its page the answer, also a refusal, if pages of that origin may call."""
        if admission.route is METADATA_ROUTE:          # which is for everybody
            admission.headers = (("Access-Control-Allow-Origin", "*"),)
            return
        origin, host = (admission.head.headers.get(name, "") for name in ("origin", "host"))
        if origin and is_allowed_origin(origin, host, self._origins):
            admission.headers = (("Access-Control-Allow-Origin", origin), ("Vary", "Origin"),
                              ("Access-Control-Expose-Headers", f"{SESSION_ID_HEADER}, WWW-Authenticate, Retry-After"))

    # Guards.

    def _check_origin(self, admission: Admission) -> None:
        headers = admission.head.headers
        if "origin" in headers:
            if not admission.headers:
                raise HTTPError("pages of this origin may not call; name it in ALLOWED_ORIGINS", status=403)
        elif headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            # Browsers send no Origin with images, links and frames. W3C, Fetch Metadata Request Headers, §2.3.
            raise HTTPError("pages of other sites may not call like this", status=403)

    def _check_host(self, admission: Admission) -> None:
        if not (self.settings.is_guarded and self.takes_keys) and not is_allowed_host(
                admission.head.headers.get("host", ""), self._hosts):
            raise HTTPError("this host name is not allowed; name it in ALLOWED_HOSTS" + (
                " or set AUTH_KEY" if self.takes_keys else ""), status=403)

    def _check_key(self, admission: Admission) -> None:
        if not self.settings.is_guarded or admission.head.method == "OPTIONS":
            return                        # a preflight brings no key, and learns nothing
        key = given_key(admission.head)
        admission.caller = find_caller(key, self.keys.callers) if key is not None else None
        if admission.caller is None and self.issuer and admission.path != "/readyz":        # where no token shows more
            self._check_token(admission, key)
        elif admission.caller is None:
            how = "send Authorization: Bearer <key>, X-API-Key: <key> or ?auth_key=<key>"
            raise HTTPError(f"missing key: {how}" if key is None else "wrong key", status=401,
                            headers=((CHALLENGE_HEADER, 'Bearer realm="mcpproxy"'),))            # RFC 6750 §3

    def _check_token(self, admission: Admission, key: str | None) -> None:
        """RFC 6750 §3; MCP 2025-11-25, Authorization, Access Token Usage."""
        text = given_token(admission.head)
        settings, wanted, scopes = self.settings, self.settings.oauth_scopes.split(), self.keys.scopes

        def refusal(problem: str, error: str = "", status: int = 401, has: tuple[str, ...] = ()) -> HTTPError:
            named = self._scopes_to_ask_for([*dict.fromkeys([*wanted, *has])], admission.place)
            parameters = [admission.challenge, *([f'error="{error}", error_description="{problem}"'] if error else []),
                          *([f'scope="{" ".join(named)}"'] if wanted else [])]
            return HTTPError(problem, status=status, headers=((CHALLENGE_HEADER, ", ".join(parameters)),))
        if not text:
            raise refusal("wrong key" if key else "missing token: send Authorization: Bearer <token>")
        verdict = self.issuer.check(text, admission.host)
        if verdict.error:
            raise refusal(f"the token is not good: {verdict.error}", "invalid_token")
        if verdict.audience.isdisjoint([settings.oauth_audience] if settings.oauth_audience else admission.resources):
            raise refusal("the token is not good: it is for something else", "invalid_token")
        has = tuple(name for name in scopes or () if name in verdict.scopes)
        if not verdict.scopes.issuperset(wanted):
            raise refusal(f"the token lacks one of the scopes {' '.join(wanted)}", "insufficient_scope", 403, has)
        subject = f"oauth:{verdict.subject}"
        admission.caller = Caller(subject, digest_of_key(f"{settings.oauth_issuer}\0{verdict.subject}"), Limits(
            subject, (), held_scopes=tuple(wanted), challenge=admission.challenge), verdict.scopes).under(scopes)
        admission.good_until = min(verdict.good_until, time.monotonic() + CHECKED_SECONDS)

    def _scopes_to_ask_for(self, scopes: list[str], place: str | None) -> list[str]:
        """These scopes, and if none opens anything at a place, one that does. MCP 2025-11-25, Scope Selection
        Strategy: clients ask for what a challenge names, and for no more."""
        catalog = self.mount.catalog
        members = [catalog.places[place]] if place in catalog.places else catalog.offered.values()
        opening = [name for name, grant in (self.keys.scopes or {}).items()
                   if any(grant.is_for(member.names) for member in members)]
        return scopes if not {*scopes}.isdisjoint(opening) else [*scopes, *opening[:1]]

    def _check_way(self, admission: Admission) -> None:
        if self.mount.id in way_of(admission.head.headers):
            raise HTTPError("requests go round in a circle: this one came through this proxy before", status=508)

    # Requests.

    def handle(self, admission: Admission, body: bytes, reply: Reply) -> None:
        """Runs the endpoint that the request is for; one that has to wait for something is a coroutine."""
        try:
            if admission.keys is not self.keys:
                reply.headers = ()                     # an error brings its own
                admission = reply.admission = self.admit(admission.head, admission.host)    # keys changed meanwhile
                reply.headers = admission.headers
            if len(body) > LARGE_BODY:
                check_can_be_parsed(body, reply.connection.principal)
            work = admission.route.methods[admission.head.method](self, admission, body, reply)
            if work:
                Work(self, work, len(body), reply)
        except NotYet as reason:          # what was a key may be a token now, which has to be checked
            reply.headers = reason.headers
            self.refuse(try_later("the keys have changed"), reply)
        except Exception as error:
            self.refuse(as_client_error(error), reply)

    def refuse(self, error: ProxyError, reply: Reply, message: Message | None = None) -> None:
        """Answers an HTTP request with an error; `message` is what was in it, if that could be read. The error of a
        call that has begun goes through its outlet instead."""
        self.counters.refused[error.http_status] += 1
        payload = encode_error(message.raw_id if message and message.kind is REQUEST else None, error)
        about, admission = reply.about, reply.admission
        if log.as_json and admission and reply.head.method == "POST":
            about |= self._audited(admission, message, error)
            about |= {"ms": (time.monotonic() - reply.connection.since) * 1000, "bytes_out": sum(map(len, payload)),
                      **({"bytes_in": len(message.text)} if message else {})}
        log.info("! %(http_method)s %(path)s from %(address)s refused with %(status)d: %(reason)s", **about,
                 status=error.http_status, reason=str(error))
        headers = [one for one in error.headers if one not in reply.headers]         # admit() may have added these
        reply.send(error.http_status, payload, (*JSON_HEADERS, *headers))

    def _audited(self, admission: Admission, message: Message | None, error: ProxyError) -> dict:
        """What the log has of a request that became no call."""
        method = message.method if message else "tools/call" if admission.path.startswith("/tools/") else None
        name = admission.path.removeprefix("/tools/") if not message and method else None
        if message and NAMED_BY.get(method) == "name":
            name = message.params.get("name")
        session = (admission.session_id or dict(admission.head.query).get("session_id", "")).partition(".")[0]
        return audit(admission.caller, client_name(message.meta.get(CLIENT_INFO_KEY)) if message else None, method,
                     name if isinstance(name, str) else None, admission.trace,
                     era=(MODERN if is_modern(message, admission.version) else LEGACY) if message else "",
                     transport={"/messages": "sse", "/mcp": "streamable-http", "/sse": "streamable-http"}.get(
                         admission.path, "tools"), session=session and label_of(session), server=admission.place,
                     id=message and message.id, outcome="refused", error_type=str(error.code))

    def send_json(self, reply: Reply, body: bytes) -> None:
        """Answers a request that is no call, and logs it."""
        log.info("<> %(http_method)s %(path)s from %(address)s, %(bytes_out)d bytes out", **reply.about,
                 bytes_out=len(body))
        reply.send(200, [body], JSON_HEADERS)

    # What is asked without MCP.

    def preflight(self, admission: Admission, body: bytes, reply: Reply) -> None:
        """OPTIONS: what a web page may send here. Fetch Standard, CORS protocol."""
        route, headers = admission.route, ()
        if "origin" in admission.head.headers:
            wanted = admission.head.headers.get("access-control-request-headers", "*")
            headers = (("Access-Control-Allow-Methods", route.allow), ("Access-Control-Allow-Headers", wanted),
                       ("Access-Control-Max-Age", "3600"))
        reply.send(204, [], (("Allow", route.allow), *headers))

    def describe_resource(self, admission: Admission, body: bytes, reply: Reply) -> None:
        """GET /.well-known/oauth-protected-resource: who issues tokens for this place. RFC 9728 §3.2."""
        scopes = [*self.settings.oauth_scopes.split(), *(self.keys.scopes or ())]
        self.send_json(reply, dump({
            "resource": admission.resources[0], "authorization_servers": [self.settings.oauth_issuer],
            "bearer_methods_supported": ["header"],
            **({"scopes_supported": [*dict.fromkeys(scopes)]} if scopes else {})}).encode())

    def health(self, admission: Admission, body: bytes, reply: Reply) -> None:
        """GET /healthz: this process is alive, whatever its servers are."""
        reply.send(200, [b'{"status":"ok"}'], JSON_HEADERS)

    def ready(self, admission: Admission, body: bytes, reply: Reply) -> None:
        """GET /readyz: can a server be used?"""
        self.mount.asked_at, caller = self.mount.now(), admission.caller
        # May it know what a server said last? It can be another client's business.
        sees_all = admission.objection is None and (caller.sees_all if caller else not self.settings.is_guarded)
        document = dump(self.overview.readiness(sees_all)).encode()
        status, more = (200, ()) if self.mount.is_ready else (503, (("Retry-After", "5"),))
        reply.send(status, [document], JSON_HEADERS + more)

    async def metrics(self, admission: Admission, body: bytes, reply: Reply) -> None:
        """GET /metrics: what was counted and measured, for Prometheus."""
        if admission.caller and not admission.caller.sees_all:
            raise HTTPError("a token, or a key with limits, may not see what all do", status=403)
        reply.send(200, [await self.overview.metrics()], (
            ("Content-Type", METRICS_TYPE), ("Cache-Control", "no-store")))


# In the order in which they ask; to add a guard, write a method and add it here.
GUARDS = (Application._check_origin, Application._check_host, Application._check_key, Application._check_way)


class Route:
    """What can be done with a path; every one takes OPTIONS."""

    def __init__(self, is_public: bool = False, is_open: bool = False, **methods):
        self.is_public = is_public             # no guard is asked
        self.is_open = is_open                 # a request that a guard refuses is let in too, but is told less
        self.methods = {**methods, "OPTIONS": Application.preflight}          # what an application does for each
        self.allow = ", ".join(self.methods)


METADATA_ROUTE = Route(GET=Application.describe_resource, HEAD=Application.describe_resource, is_public=True)
PROBES = {
    "/healthz": Route(GET=Application.health, HEAD=Application.health, is_public=True),
    "/readyz": Route(GET=Application.ready, HEAD=Application.ready, is_open=True),
    "/metrics": Route(GET=Application.metrics, HEAD=Application.metrics),
}


class Probes(Application):
    """The application at METRICS_PORT: what those who look after the proxy ask for. That port is for a network of their
    own, and takes no key."""

    nothing_here = "here are only /metrics, /healthz and /readyz"
    takes_keys = False

    def __init__(self, mount: Mount, overview: Overview):
        super().__init__(PROBES, mount, overview)
        self.counters = Counters()             # its own requests are not counted
        self.guards = Application._check_origin, Application._check_host       # no key; and no loop leads here


# ============================================================================
# 51. Endpoints
# ============================================================================
#
# What each method and path means: a Route of ROUTES, to methods that take (admission, body, reply).
#
# /mcp and /sse are one endpoint, so that one URL serves every client: a POST is
# Streamable HTTP, of the era that the message claims; a GET is the stream of the
# session that it names, and without a session it is HTTP+SSE.

KEPT_DOCUMENT_BYTES = 8 * 1024 * 1024      # of documents that describe tools, together,
KEPT_DOCUMENTS = 100             # and how many


def encode_call(name: str, arguments: str) -> Message:
    """The call of a tool; `arguments` is text: a JSON object, which is checked here, or empty."""
    try:
        message = parse_message(f'{{"jsonrpc":"2.0","id":1,"method":"tools/call",'
                                f'"params":{{"name":{dump(name)},"arguments":{arguments.strip() or "{}"}}}}}')
    except RPCError:
        raise RPCError("the arguments are not valid JSON", code=PARSE_ERROR) from None
    # By closing a brace early, they could add members beside themselves.
    is_alone = set(message.params) == {"name", "arguments"} and len(message.members) == 4
    if not is_alone or not isinstance(message.params.get("arguments"), tuple):
        raise RPCError("the arguments must be a JSON object", code=INVALID_PARAMS)
    return message


class Endpoints(Application):
    """The application at PORT."""

    nothing_here = ("there is nothing here: MCP is at {0}/mcp, the tools are at {0}/tools, described by "
                    "{0}/openapi.json")

    def __init__(self, mount: Mount, overview: Overview, keys: Keys = Keys(), issuer: Issuer | None = None):
        super().__init__(ROUTES, mount, overview, keys, issuer)
        self.documents: dict[View, tuple[tuple, bytes]] = {}           # (what it was made of, /openapi.json)

    def tick(self, now: float) -> None:
        """Called now and then: makes a stream of each reply whose answer takes too long to be plain JSON."""
        for call in [*self.mount.calls, *self.mount.subscriptions]:
            if call.started + call.outlet.patience <= now:
                call.outlet.open()

    # HTTP+SSE. MCP 2024-11-05, Transports, HTTP with SSE.

    def _open_sse(self, admission: Admission, reply: Reply) -> None:
        """Opens a session, which lives as long as this stream of it."""
        given = admission.head.query_value("auth_key")          # refused when it is there twice, before a session opens
        session = self.mount.open_session(admission.view, admission.caller, admission.variables,
                                          reply.connection.principal, is_streamable=False,
                                          headers=admission.head.headers)
        endpoint = f"{admission.base}/messages?session_id={session.id}"
        if given:
            endpoint += f"&auth_key={quote(given, safe='')}"
        reply.start_stream((*STREAM_HEADERS, (SESSION_ID_HEADER, session.id)))
        reply.on_gone = session.leave
        reply.write(encode_event([endpoint.encode()], b"endpoint"))
        session.stream.attach(reply)

    def post_message(self, admission: Admission, body: bytes, reply: Reply) -> None:
        """POST /messages: one message of a session's client, or in 2025-03-26 several; what is answered goes to its
        stream."""
        session = self._session(admission, is_streamable=False)
        if "content-type" in admission.head.headers:          # older clients do not say it
            check_is_json(admission)
        text = decode_json(body)
        texts = session.version == BATCH_VERSION and is_batch(text) and split_array(text) or [text]
        is_several = len(texts) > 1
        for one in texts:
            message = None
            try:
                message = parse_message(one)
                if is_several and message.method == "initialize":
                    raise RPCError("a batch with initialize in it")
                self._take_message(session, message, admission.trace)
            except ProxyError as error:
                # The client waits at its stream, so the error goes there too; but not with the id of a call that is
                # running, and not if the client may come again with another token.
                is_awaited = message.kind is REQUEST and message.id not in session.calls if message else is_several
                if is_awaited and (is_several or CHALLENGE_HEADER not in dict(error.headers)):
                    session.stream.send(encode_error(message and message.raw_id, error))
                if error.http_status != 200 and not is_several:
                    return self.refuse(error, reply, message)
        reply.send(202, [b"Accepted"], (("Content-Type", "text/plain"),))

    def _take_message(self, session: Session, message: Message, trace: dict[str, str] | None) -> None:
        if message.kind is not REQUEST:
            return session.receive(message)
        envelope = check_modern(message, None) if is_modern(message, None) else None
        session.listens = envelope is not None
        exchange = new_exchange(session, message, StreamOutlet(session.stream), envelope, trace)
        try:
            exchange.start()
        except ProxyError as error:
            if error.http_status != 200:
                raise
            exchange.fail(error)

    # Streamable HTTP. MCP 2025-11-25 and 2026-07-28, Transports.

    def post(self, admission: Admission, body: bytes, reply: Reply) -> None:
        """POST /mcp: a message of either era."""
        check_is_json(admission)
        text = decode_json(body)
        if is_batch(text):
            return self._post_batch(admission, split_array(text), reply)
        message = parse_message(text)
        try:
            if message.kind is REQUEST:
                check_accept(admission, is_endless=message.method == "subscriptions/listen")
            if is_modern(message, admission.version):
                self._post_modern(admission, message, reply)
            else:
                self._post_legacy(admission, message, reply)
        except ProxyError as error:
            self.refuse(error, reply, message)

    def _post_legacy(self, admission: Admission, message: Message, reply: Reply) -> None:
        is_initialize = message.kind is REQUEST and message.method == "initialize"
        if is_initialize:
            check_parameters(message)         # before a session is opened for it
        else:
            check_version(admission)
        if is_initialize and not self.settings.stateless:
            if admission.session_id and not self.settings.session_secret:
                self._session(admission)          # 404 if it has ended, as for any other request
            client = self.mount.open_session(admission.view, admission.caller, admission.variables,
                                             reply.connection.principal, headers=admission.head.headers)
        else:
            client = self._client(admission, reply)
        if message.kind is not REQUEST:
            if client.is_session:
                client.receive(message)
            elif message.kind is NOTIFICATION:
                check_parameters(message)
            return reply.send(202, [])
        exchange = new_exchange(client, message, PostOutlet(admission, reply, client), None, admission.trace)
        if is_initialize and client.is_session:
            if self.settings.session_secret and client.view.is_for_all:
                client.announce(message)
            # If the handshake fails, there is no session after all; it ends once the error was sent.
            exchange.on_done = lambda: client.version or asyncio.get_running_loop().call_soon(client.end)
        exchange.start_or_fail()

    def _post_batch(self, admission: Admission, texts: list[str], reply: Reply) -> None:
        """Several messages. They came with 2025-03-26 and went with 2025-06-18."""
        check_version(admission)
        client = self._client(admission, reply)
        if (client.version or admission.version or BATCH_VERSION) != BATCH_VERSION:
            raise RPCError(f"batches are for {BATCH_VERSION} only")
        messages, errors = [], []
        for text in texts:                     # an invalid one spoils no other. JSON-RPC 2.0 §6
            try:
                messages.append(parse_message(text))
            except RPCError as error:
                errors.append(error)
        requests = [message for message in messages if message.kind is REQUEST]
        if errors and not messages:
            raise errors[0]
        if not messages or any(message.method == "initialize" for message in requests):
            raise RPCError("an empty batch, or one with initialize in it")
        for message in messages:
            if message.kind is not REQUEST:                # these have no answer to carry an error: raise it now
                check_parameters(message)
        answers = len(requests) + len(errors)
        if answers:
            check_accept(admission)
        outlet = PostOutlet(admission, reply, client, batch=answers) if answers else None
        # First what may refuse all of it: where an answer was given, no error can be the reply.
        exchanges = [new_exchange(client, message, outlet, None, admission.trace) if message.kind is REQUEST else None
                     for message in messages]
        for error in errors:
            outlet.finish(encode_error(None, error), 200)
        for message, exchange in zip(messages, exchanges):
            if exchange:
                exchange.start_or_fail()
            elif client.is_session:
                client.receive(message)
        if not answers:
            reply.send(202, [])

    def _post_modern(self, admission: Admission, message: Message, reply: Reply) -> None:
        if message.kind is RESPONSE:
            raise RPCError(f"clients send no responses in {MODERN_VERSION}")
        if message.kind is NOTIFICATION:
            if message.method != "notifications/cancelled":          # over HTTP, to hang up is to cancel
                self._visit(admission, reply).notify(message)
            return reply.send(202, [])
        envelope = check_modern(message, admission.head.headers)
        client = self._visit(admission, reply)
        outlet = PostOutlet(admission, reply, client, MODERN)
        new_exchange(client, message, outlet, envelope, admission.trace).start_or_fail()

    def get(self, admission: Admission, body: bytes, reply: Reply) -> None:
        """GET /mcp: the stream of a session; without a session, the beginning of HTTP+SSE."""
        if not admission.takes_stream:
            raise HTTPError(f"a GET is answered with {EVENT_STREAM_TYPE} alone", status=406)
        # SDKs send a version with HTTP+SSE too; only where there are no sessions does that mean Streamable HTTP.
        is_streamable = admission.version == MODERN_VERSION or self.settings.stateless and admission.version is not None
        if admission.session_id is None and is_streamable:
            raise HTTPError("there is no stream without a session", status=405, headers=(("Allow", "POST"),))
        check_version(admission)
        if admission.session_id is None:
            return self._open_sse(admission, reply)
        session = self._session(admission)
        stream, after = session.stream, None
        last_event_id = admission.head.headers.get("last-event-id")
        if last_event_id:                      # an empty one is that of a client that has seen none
            stream, after = session.find_event(last_event_id)
            if stream is None or stream.is_over(after):
                # To a stream that just ends, SDKs come back for ever. So the answer is what tells a browser not to come
                # back: WHATWG HTML, Server-sent events, Processing model.
                return reply.send(204, [])
        reply.start_stream(STREAM_HEADERS)
        reply.on_gone = lambda: stream.detach(reply)
        stream.attach(reply, after)
        if not stream.is_ended:
            begin_events(reply, stream, session.version)

    def delete(self, admission: Admission, body: bytes, reply: Reply) -> None:
        """DELETE /mcp: the client needs its session no more."""
        if self.settings.stateless or admission.session_id is None and admission.version == MODERN_VERSION:
            raise HTTPError("there are no sessions here", status=405, headers=(("Allow", "POST"),))
        check_version(admission)
        self.mount.delete_session(self._session(admission))
        reply.send(204, [])

    def _session(self, admission: Admission, is_streamable: bool = True) -> Session:
        """The session that a request names, under the limits that its caller has now."""
        caller = admission.caller
        session_id = admission.session_id if is_streamable else admission.head.query_value("session_id")
        if self.settings.session_secret and is_streamable and session_id:
            session_id = self.mount.unseal_session(session_id, lambda: admission.view, caller,
                                                   caller or admission.host, admission.head.headers)
        session = self.mount.find_session(session_id, admission.place, caller, is_streamable)
        session.headers = admission.head.headers
        if caller is not session.caller and (caller.limits, caller.scopes) != (
                session.caller.limits, session.caller.scopes):                             # a token with other scopes
            view = self.mount.catalog.view(session.view.place, session.view.wanted, caller.limits)    # or RPCError
            view.check_variables(session.variables)
            before, session.caller = session.view, caller
            session.adopt(self.mount.catalog)
            for call in [call for call in session.calls.values() if call.is_endless]:
                call.adopt(before)
        return session

    def _visit(self, admission: Admission, reply: Reply) -> Visitor:
        return self.mount.visit(admission.view, admission.caller, admission.variables, reply.connection.principal,
                                admission.name, admission.head.headers)

    def _client(self, admission: Admission, reply: Reply) -> Client:
        """Who sends a legacy request: its session, or where none is needed and none is named, a visitor: hosted clients
        never send back the id that they were given."""
        settings = self.settings
        if settings.stateless or (
                admission.session_id is None and admission.view.is_for_all and not settings.require_session):
            visitor = self._visit(admission, reply)
            visitor.version = admission.version or BATCH_VERSION         # MCP 2025-11-25, Transports, Protocol Version
            return visitor
        return self._session(admission)

    # Tools without MCP.

    async def _tools(self, admission: Admission, client: Client, name: str | None = None,
                     refresh: bool = False) -> dict[str, str]:
        """See tools_at(). If what is offered changed meanwhile, asks anew; an error if what the caller may use did."""
        tools, view = await tools_at(client, name, refresh), client.view
        with contextlib.suppress(NotYet):
            if admission.keys is not self.keys:
                view = self.admit(admission.head, admission.host).view
            if view.offer == client.view.offer:
                return tools
            if view.grants == client.view.grants:
                view.check_variables(client.variables)
                client.view = view
                return await self._tools(admission, client, name)
        raise limits_changed()

    async def list_tools(self, admission: Admission, body: bytes, reply: Reply) -> None:
        """GET /tools: what there is."""
        tools = await self._tools(admission, self._visit(admission, reply))
        self.send_json(reply, b'{"tools":[%b]}' % ",".join(tools.values()).encode())

    async def call_tool(self, admission: Admission, body: bytes, reply: Reply) -> None:
        """POST /tools/<name>: calls a tool with the JSON object that is the body."""
        if body:
            check_is_json(admission)
        name, since = admission.path.removeprefix("/tools/"), self.mount.now()
        message, body = encode_call(name, decode_json(body)), None
        if len(message.text) > SMALL:             # what was parsed of it takes many times its size
            message, body = None, message.text
        client = self._visit(admission, reply)
        if not client.view.candidates(name) or name not in await self._tools(admission, client, name) and (
                name not in await self._tools(admission, client, name, refresh=True)):
            raise client.view.unknown("tools", name, 404, if_closed=403)
        exchange = new_exchange(client, message or parse_message(body), ToolOutlet(reply), None, admission.trace)
        exchange.started = since
        exchange.start_or_fail()

    async def openapi(self, admission: Admission, body: bytes, reply: Reply) -> None:
        """GET /openapi.json: the tools as operations."""
        client = self._visit(admission, reply)
        tools = await self._tools(admission, client)
        identity = None if client.view.is_joint else client.only_instance.identity
        name, version = (identity.name, identity.release) if identity else ("mcpproxy", __version__)
        about = tools, name, version, admission.base, self.settings.is_guarded
        kept = self.documents.pop(client.view, None)
        if not kept or kept[0] != about:
            kept = about, openapi_document(*about)
        self.documents[client.view] = kept
        while len(self.documents) > KEPT_DOCUMENTS or len(self.documents) > 1 and (
                sum(len(text) for _, text in self.documents.values()) > KEPT_DOCUMENT_BYTES):
            del self.documents[next(iter(self.documents))]
        self.send_json(reply, kept[1])

    # For those who look at the overview.

    def get_overview(self, admission: Admission, body: bytes, reply: Reply) -> None:
        """GET /: all that can be seen of the proxy, as JSON. The page asks for /?watch=1 each second, and that is not
        logged."""
        if admission.objection:
            raise admission.objection
        document = self.overview.summary(admission.caller).encode()          # RPCError for a key that opens nothing
        if admission.head.query_value("watch") is None:
            return self.send_json(reply, document)
        reply.send(200, [document], JSON_HEADERS)


_MCP = Route(GET=Endpoints.get, POST=Endpoints.post, DELETE=Endpoints.delete)

ROUTES = {
    "/mcp": _MCP,
    "/sse": _MCP,
    "/messages": Route(POST=Endpoints.post_message),
    "/tools": Route(GET=Endpoints.list_tools, HEAD=Endpoints.list_tools),
    "/tools/<name>": Route(POST=Endpoints.call_tool),
    "/openapi.json": Route(GET=Endpoints.openapi, HEAD=Endpoints.openapi),
    **PROBES,
    RESOURCE_METADATA: METADATA_ROUTE,                       # the path of a resource may follow
}


# ============================================================================
# 52. Standard streams
# ============================================================================
#
# The other way to be reached: by one client, on stdin and stdout, as a program that it starts. A legacy client is one
# session, a modern one a visitor that stays. What is written to stdout is nothing but messages, a line each.

STDIN_BYTES = 256 * 1024         # that are read at a time
STDIN_READS = 8                  # that may wait to be looked at: a file is read faster than its messages are understood


class LineStream(Stream):
    """Messages for a reader of lines."""

    def _write(self, payload: list, number: int) -> None:
        self._reader.write([*payload, b"\n"])


class StdioOutlet(StreamOutlet):
    """Into stdout. A subscription has no stream to end there; a message ends it. MCP 2026-07-28, Cancellation."""

    transport = "stdio"

    def __init__(self, stream: Stream, asks: bool):
        super().__init__(stream)
        self.asks = asks

    def finish(self, payload: list, status: int, headers: tuple = ()) -> None:
        call = self.exchange
        self.send(payload)
        if call.is_endless and call.has_begun:
            self.send([encode_request(None, "notifications/cancelled", {"requestId": call.id})])


class StandardStreams(asyncio.BaseProtocol):
    """The client on stdin and stdout. MCP 2025-11-25, Transports, stdio, and 2026-07-28, stdio."""

    def __init__(self, mount: Mount, is_over: asyncio.Event):
        self._is_over = is_over                # is the client gone, or its session?
        self._mount = mount
        self._loop = asyncio.get_running_loop()
        self._lines = LineSplitter(mount.settings.max_request_bytes, self._on_line, self._on_too_long)
        self._stream = LineStream()
        self._stream.attach(self)
        self._session: Session | None = None
        self._visitor = mount.visit(mount.catalog.view(), None, {}, "stdin")
        self._output: asyncio.WriteTransport | None = None             # None: a file
        self._room = threading.Semaphore(STDIN_READS)

    async def start(self) -> None:
        """Begins to read."""
        with contextlib.suppress(ValueError):              # it is a file; that is written to directly and never blocks
            self._output, _ = await self._loop.connect_write_pipe(lambda: self, open(1, "wb", 0, closefd=False))
            if os.path.sameopenfile(0, 1):     # one socket for both: asyncio takes what comes in for the reader's end
                self._loop.remove_reader(1)
        try:
            threading.Thread(target=self._read, daemon=True).start()
        except RuntimeError as error:
            raise StartError(f"cannot read stdin: {error}") from None

    def _read(self) -> None:
        # In a thread, because stdin may be a file, which asyncio cannot wait for.
        data = b"-"
        with contextlib.suppress(RuntimeError, OSError):   # the loop is closed
            while data:
                try:
                    data = os.read(0, STDIN_BYTES)
                except BlockingIOError:                    # made non-blocking by the parent, or with stdout
                    select.select([0], [], [])
                    continue
                except OSError:                            # the terminal is gone
                    data = b""
                self._room.acquire()
                self._loop.call_soon_threadsafe(self._feed, data or b"\n")
            self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._on_end()))

    def _feed(self, data: bytes) -> None:
        self._room.release()
        self._lines.feed(data)

    async def _on_end(self) -> None:
        for question in list(self._session.questions.values()) if self._session else ():
            question.refuse(NO_CLIENT_CAN)                                     # nobody can answer it
        deadline = self._mount.now() + self._mount.settings.shutdown_grace
        await self._mount.drain(self._mount.settings.shutdown_grace)           # what was asked is answered,
        while self._output and self._output.get_write_buffer_size() and self._mount.now() < deadline:
            await asyncio.sleep(0.02)                                          # and read
        self._is_over.set()

    def connection_lost(self, error: Exception | None) -> None:
        # asyncio calls it when nobody reads any more.
        self._is_over.set()

    # What the streams call.

    def write(self, parts: list) -> None:
        """Writes a message."""
        if self._output is None:
            with contextlib.suppress(OSError):
                os.writev(1, parts)
        elif self._output.get_write_buffer_size() > max(MAX_QUEUED_BYTES, 2 * self._mount.settings.max_message_bytes):
            log.error("! the client does not read")
            self._is_over.set()
        else:
            self._output.write(b"".join(parts))

    def close(self) -> None:
        """The session is over: its server is gone."""
        self._is_over.set()

    # Messages.

    def _on_line(self, line: bytes) -> None:
        try:
            text = decode_json(line)
            texts = split_array(text) if is_batch(text) else [text] if text.strip() else ()
            if not texts and text.strip():
                raise RPCError("an empty batch")
        except ProxyError as error:
            return self._refuse(error)
        for text in texts:
            self._receive(text)

    def _on_too_long(self, head: bytes, tail: bytes) -> None:
        self._refuse(RPCError("message too large; MAX_REQUEST_MB and MAX_MESSAGE_MB are the limits"),
                     find_request_id(head, tail))

    def _receive(self, text: str) -> None:
        message, self._visitor.view = None, self._mount.catalog.view()         # the configuration may be a new one
        self._visitor.members = {}                 # it is no session: its calls go to any of a group
        try:
            message = parse_message(text)
            if message.kind is REQUEST:
                envelope = check_modern(message, None) if is_modern(message, None) else None
                if message.method == "initialize":
                    self._open_session(message)
                client = self._visitor if envelope or self._session is None else self._session
                exchange = new_exchange(client, message, StdioOutlet(self._stream, client.is_session), envelope)
                if client.is_session and message.method == "initialize":
                    exchange.on_done = lambda: client.version or self._loop.call_soon(self._drop_session)
                exchange.start_or_fail()
            elif message.method == "notifications/cancelled":
                for client in filter(None, (self._visitor, self._session)):
                    client.cancel_request(message)
            elif self._session:
                self._session.receive(message)
            elif message.kind is NOTIFICATION:
                self._visitor.notify(message)
        except ProxyError as error:
            self._refuse(error, message.raw_id if message and message.kind is REQUEST else None, message)

    def _open_session(self, message: Message) -> None:
        check_parameters(message)
        if self._session:
            raise RPCError("this client has shaken hands already")
        self._session = self._mount.open_session(self._mount.catalog.view(), None, {}, "stdin", is_streamable=False)
        self._session.speak_through(self._stream)

    def _drop_session(self) -> None:
        """The handshake failed; it may be made again."""
        session, self._session = self._session, None
        session.speak_through(LineStream())        # whose end is not the client's
        session.end()

    def _refuse(self, error: ProxyError, raw_id: bytes | None = None, message: Message | None = None) -> None:
        log.info("! refused: %(reason)s", reason=str(error), **audit(
            None, None, message and message.method, None, None, transport="stdio", id=message and raw_id and message.id,
            outcome="refused", error_type=str(error.code)))
        if message is None or raw_id:              # a notification has no answer. JSON-RPC 2.0 §4.1
            self.write([*encode_error(raw_id, error), b"\n"])


# ============================================================================
# 53. Demo server
# ============================================================================
#
# A small MCP server, so that there is something to serve without configuration. It runs as a child process like any
# other (`mcpproxy.py --demo-server`) and shows what a stdio server is: lines in, lines out.

DEMO_COMMAND = [sys.executable, os.path.abspath(__file__), "--demo-server"]

DEMO_URI = "demo://clock"

DEMO_ANSWERS = {               # to what is always answered in the same way
    "ping": {},
    "tools/list": {"tools": [
        {"name": "echo", "description": "Returns the text.",
         "inputSchema": {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}},
        {"name": "add", "description": "Adds two numbers.",
         "inputSchema": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                         "required": ["a", "b"]}},
        {"name": "whoami", "description": "Shows the variables that you set, by ?NAME=value or X-MCP-Env-NAME: value.",
         "inputSchema": {"type": "object", "properties": {}}},
        {"name": "slow", "description": "Takes some seconds, reports progress and can be cancelled.",
         "inputSchema": {"type": "object", "properties": {"seconds": {"type": "number", "default": 3}}}}]},
    "resources/list": {"resources": [
        {"uri": DEMO_URI, "name": "clock", "description": "The time; subscribe to be told every second.",
         "mimeType": "text/plain"}]},
    "prompts/list": {"prompts": [
        {"name": "greet", "description": "Asks for a greeting.",
         "arguments": [{"name": "name", "description": "who is greeted", "required": True}]}]},
}


class DemoServer:
    """An MCP server that speaks revision 2025-11-25 and before, with a thread for each request."""

    def __init__(self):
        self._lock = threading.Lock()
        self._cancelled: dict[object, threading.Event] = {}      # by the id of a running request
        self._is_watched = False

    def run(self) -> None:
        """Answers until stdin ends."""
        threading.Thread(target=self._tick, daemon=True).start()
        for line in sys.stdin.buffer:
            message, _ = scan_plain(line.decode(), 0)
            method, params = message.get("method"), message.get("params", {})
            if method == "notifications/cancelled":
                self._cancelled.get(params.get("requestId"), threading.Event()).set()
            elif method is not None and "id" in message:
                self._cancelled[message["id"]] = threading.Event()
                threading.Thread(target=self._answer, args=(message["id"], method, params), daemon=True).start()
        with self._lock:
            os._exit(0)                    # Python's own end aborts where a thread has just begun to write

    def _write(self, **members) -> None:
        with self._lock:
            sys.stdout.write(dump({"jsonrpc": "2.0", **members}) + "\n")
            sys.stdout.flush()

    def _tick(self) -> None:
        while True:
            time.sleep(1)
            if self._is_watched:
                self._write(method=RESOURCE_UPDATED, params={"uri": DEMO_URI})

    def _answer(self, request_id, method: str, params: dict) -> None:
        try:
            answer = {"result": self._result(request_id, method, params)}
        except RPCError as error:
            answer = {"error": error.error_object()}
        except Exception as error:
            answer = {"error": {"code": INVALID_PARAMS, "message": f"bad parameter: {error}"}}
        if not self._cancelled.pop(request_id).is_set():
            self._write(id=request_id, **answer)

    def _result(self, request_id, method: str, params: dict) -> dict:
        if method in DEMO_ANSWERS:
            return DEMO_ANSWERS[method]
        if method == "initialize":
            return {"protocolVersion": negotiate(params.get("protocolVersion")),
                    "capabilities": {"tools": {}, "prompts": {}, "resources": {"subscribe": True}},
                    "serverInfo": {"name": "mcpproxy-demo", "version": __version__},
                    "instructions": "A small server to try mcpproxy with."}
        if method == "tools/call":
            return {"content": [{"type": "text", "text": self._call(request_id, params)}]}
        if method == "prompts/get":
            # Looked up, so that any other name is an error: see _answer().
            text = {"greet": f"Please greet {(params.get('arguments') or {})['name']}."}[params["name"]]
            return {"messages": [{"role": "user", "content": {"type": "text", "text": text}}]}
        if method in ("resources/read", "resources/subscribe", "resources/unsubscribe"):
            text = {DEMO_URI: time.strftime("%H:%M:%S")}[params["uri"]]
            if method == "resources/read":
                return {"contents": [{"uri": DEMO_URI, "mimeType": "text/plain", "text": text}]}
            self._is_watched = method == "resources/subscribe"
            return {}
        raise RPCError(f"no method {method}", code=METHOD_NOT_FOUND)

    def _call(self, request_id, params: dict) -> str:
        name, arguments = params["name"], params.get("arguments") or {}
        if name == "echo":
            return str(arguments["text"])
        if name == "add":
            return str(arguments["a"] + arguments["b"])
        if name == "whoami":
            names = os.environ.get("MCPPROXY_VARIABLES", "").split()
            return "\n".join(f"{name}={os.environ.get(name)}" for name in names) or "you set no variables"
        if name != "slow":
            raise KeyError(f"no tool {name}")
        steps = max(1, int(float(arguments.get("seconds", 3)) * 10))
        token = (params.get("_meta") or {}).get("progressToken")
        for step in range(1, steps + 1):
            if self._cancelled[request_id].wait(0.1):
                break
            if token is not None:
                self._write(method="notifications/progress",
                            params={"progressToken": token, "progress": step, "total": steps})
        return f"done in {steps} steps"


# ============================================================================
# 54. The proxy
# ============================================================================
#
# Everything put together: started in order, ended in reverse.

TICK_SECONDS = 0.25              # between looks at the time,
MEASURE_SECONDS = 1.0            # at connections, at what servers use, at the file of servers,
LOOK_SECONDS = 3.0               # and at orphans
TRIM_BYTES = 64 * 1024 * 1024    # once the budget holds so much less than at its peak, memory is given back


async def try_out(sandbox: Sandbox) -> None:
    """Takes all steps of a sandbox, in a process that then ends; StartError when one fails."""
    if not sandbox.is_on:
        return
    cell, census, started = Cell(sandbox, sandbox.reaper.new_tag()), sandbox.reaper.census, []

    async def spawn(*command, **more) -> None:
        started.append(await asyncio.create_subprocess_exec(*command, **more))
    census.starting += 1                         # or another proxy with that reaper would take it for an orphan
    try:
        await cell.start(spawn, [], {}, None)
    except ServerError as error:
        raise StartError(str(error)) from None
    except OSError as error:                     # no process, or no descriptor, is to be had
        raise StartError(f"the sandbox cannot be tried out: {error.strerror}") from None
    finally:
        for process in started:                  # it may hang. Its own kill() may fail, or, in Python 3.12, reap it
            if process.returncode is None:
                kill(process.pid, signal.SIGKILL)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 1)
        census.starting -= 1
        cell.close()


class Proxy:
    """One running mcpproxy. Several in one process share a `reaper`, because all their servers are children of that
    process; whoever made it closes it. Servers are told apart by name there, so no two may have the same."""

    def __init__(self, settings: Settings, environment: dict[str, str], reaper: Reaper | None = None):
        self.settings = settings
        self.environment = environment
        self._config_seen = self._stat_config()          # before it is read: a change meanwhile is seen later
        self._problem = ""                               # why it could not be read again
        catalog, keys = load_files(settings, environment)
        self.reaper, self._is_reaper_own = reaper or Reaper(), reaper is None
        budget.limit = settings.max_buffered_mb * 1024 * 1024
        self.mount = Mount(catalog, settings, self._new_server, time.monotonic)
        self.issuer = Issuer(settings, time.monotonic, lambda: self.endpoints.admit_anew()) if (
            settings.oauth_issuer) else None
        overview = Overview(self.mount, self.reaper.census)
        self.endpoints = Endpoints(self.mount, overview, keys, self.issuer)
        self.http = HTTPServer(self.endpoints, settings.heartbeat)
        self.probes = HTTPServer(Probes(self.mount, overview), settings.heartbeat)
        self._ticker: asyncio.Task | None = None
        self._last_shortage = 0.0
        self._is_stopping = False

    def _new_server(self, config: ServerConfig, pool: Pool) -> Server:
        if self.settings.mcp_config:
            self._doubt(config)
        environment = {**server_environment(self.environment, config.settings), **config.env}
        sandbox = Sandbox(config.name, config.settings, self.reaper, config.env)

        def new_link(variables: dict[str, str], redact) -> Link:
            if config.url:
                try:
                    headers = expanded(config.headers, "headers", {**self.environment, **config.env, **variables})
                except SettingsError as error:
                    missing = str(error).removeprefix("headers: ").partition(";")[0]
                    raise ServerError(f"{missing}; clients set it in the URL, or as X-MCP-Env-<NAME>") from None
                return RemoteLink(config.name, config.url, headers, self.mount.id, self.settings.max_message_bytes,
                                  config.is_sse)
            # Only the demo server asks which variables its client has set.
            names = {"MCPPROXY_VARIABLES": " ".join(variables)} if variables else {}
            return ServerProcess(list(config.command), {**environment, **variables, **names}, sandbox, redact,
                                 self.settings.max_message_bytes, config.cwd)
        return Server(config, new_link, time.monotonic, pool)

    def _doubt(self, config: ServerConfig) -> None:
        """Warns of settings of a server that do less than they seem to."""
        own = config.settings
        for name in ("sandbox_read", "sandbox_write") if own.sandbox == "off" else ():
            if getattr(own, name) != getattr(self.settings, name):
                log.warning("! server %(server)s: %(name)s has no effect with sandbox off", server=config.name,
                            name=name)
        if own.sandbox != "off" and not config.url and os.geteuid() == 0 and own.run_as_user in ("", "0", "root"):
            log.warning("! server %(server)s: for root a sandbox is half a sandbox: set RUN_AS_USER too",
                        server=config.name)

    def _stat_config(self) -> tuple:
        """What changes when the file of servers does."""
        try:
            found = os.stat(self.settings.mcp_config)
            return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino
        except OSError:
            return ()

    def reload(self, is_asked: bool = True) -> None:
        """Reads the files again: of servers, of keys, and the certificate. One that cannot be used changes nothing."""
        settings = self.settings
        if not (settings.mcp_config or settings.auth_keys_file or self.http.tls):
            return log.info("= SIGHUP: nothing to read again")
        self._config_seen = self._stat_config()
        try:
            for path in filter(None, (settings.mcp_config, settings.auth_keys_file, settings.tls_cert,
                                      settings.tls_key)):
                if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
                    raise SettingsError(f"{path}: is a pipe or a device, which cannot be read again")
            catalog, keys = load_files(settings, self.environment)
            tls = self.http.tls and tls_context(settings)
        except SettingsError as error:
            if is_asked or str(error) != self._problem:
                log.error("! the configuration stays as it was: %(reason)s", reason=str(error))
            self._problem = str(error)
            return
        self._problem = ""
        if self._is_stopping or self.mount.is_draining:
            return                                         # what it would start would be ended at once
        self.endpoints.keys, self.http.tls = keys, tls
        for server in self.http, self.probes:
            server.heads.clear()                           # their admissions keep the old configuration alive
        self.endpoints.documents.clear()
        self.mount.reload(catalog, keys)
        gc.collect()                                       # views and what they show refer to each other
        log.info("= configuration read again: %(servers)s", servers=", ".join(catalog.servers))

    async def start(self, listens: bool = True) -> list[tuple[str, int]]:
        """Listens, unless requests come by stdin or through a router, and starts the shared servers and spare ones;
        returns the addresses."""
        if not self.settings.mcp_config:
            server, = self.mount.servers.values()
            await try_out(Sandbox(server.name, self.settings, self.reaper))
            self._doubt(server.config)                     # not before: a sandbox that fails ends the program
        addresses = await self.http.start(
            self.settings.host, self.settings.port, tls_context(self.settings)) if listens else []
        if listens and self.settings.metrics_port:
            await self.probes.start(self.settings.host, self.settings.metrics_port)
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)
        self.watch_time()
        self.mount.start()
        return addresses

    def watch_time(self) -> None:
        self._ticker = asyncio.get_running_loop().create_task(self._tick())

    async def _tick(self) -> None:
        """Looks at the time: one periodic sweep costs less than a timer for each thing that may take too long."""
        # With thousands of streams, to look at each more often would be most of the idle work.
        looks = [(min(MEASURE_SECONDS, self.settings.heartbeat / 2), part.tick) for part in (self.http, self.probes)]
        looks += [(0.0, part.tick) for part in (self.endpoints, self.mount)]
        looks += [(MEASURE_SECONDS, lambda now: self.reaper.census.measure()),
                  (LOOK_SECONDS, lambda now: self.reaper.tick()), (MEASURE_SECONDS, lambda now: give_back())]
        if self.settings.watch:
            looks += [(MEASURE_SECONDS, lambda now: self._stat_config() == self._config_seen or self.reload()),
                      (LOOK_SECONDS, lambda now: self._problem and self.reload(is_asked=False))]
        last, now = {look: 0.0 for _, look in looks}, time.monotonic()
        while True:
            await asyncio.sleep(min(TICK_SECONDS, self.settings.heartbeat / 2))
            if time.monotonic() - now > 1:                 # we were suspended: what came meanwhile is read first
                await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            for period, look in looks:
                if now - last[look] > period:
                    last[look] = now
                    try:
                        look(now)
                    except Exception as error:
                        log.fault(error)                   # one that fails stops no other

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict) -> None:
        """What asyncio has to say. It pauses accepting when descriptors run out, and says so a thousand times."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            if time.monotonic() - self._last_shortage > 1:
                log.error("! no new connections for a second: %(reason)s", reason=os.strerror(error.errno))
                self._last_shortage = time.monotonic()
        elif self._is_stopping and isinstance(error, (ValueError, ProxyError)):
            pass         # it goes on to accept, after its pause, on a socket that was closed; or a request has failed
        else:
            log.add(logging.ERROR, "! %(problem)s", {"problem": context.get("message")}, error)

    async def stop(self) -> None:
        """Ends everything that was started; afterwards no process is left."""
        self._is_stopping = True
        if self._ticker:
            self._ticker.cancel()
        await self.mount.close()
        await self.http.close()
        await self.probes.close()
        if self.issuer:
            self.issuer.close()
        if self._is_reaper_own:
            self.reaper.close()


def give_back() -> None:
    """Gives memory back to the system once much less is held than before. What large answers took is free then, but
    lies between small blocks in use, so the C library keeps it: see malloc_trim(3), which glibc has."""
    if budget.most - budget.held > TRIM_BYTES:
        budget.most = budget.held
        with contextlib.suppress(AttributeError):
            libc().malloc_trim(0)


def load_files(settings: Settings, environment: dict[str, str]) -> tuple[Catalog, Keys]:
    """The servers of the file, or the one of the command line; and who may come in."""
    if settings.mcp_config:
        servers = parse_config(read_text(settings.mcp_config), settings, environment)
        if sum(server.settings.shared_session for server in servers.values()) > settings.max_processes:
            raise SettingsError(f"{settings.mcp_config}: has more servers than MAX_PROCESSES, {settings.max_processes}")
    else:
        command = shlex.split(settings.mcp_server_config) or DEMO_COMMAND
        name = server_name(command)
        where = {"url": command[0]} if is_url(command) else {"command": tuple(command)}
        servers = {name: ServerConfig(name, settings, **where, rules=Rules(max_result_kb=settings.max_result_kb))}
    catalog = Catalog(servers, is_file=bool(settings.mcp_config))
    text = read_text(settings.auth_keys_file) if settings.auth_keys_file else ""
    return catalog, keys_of(settings, text, tuple(catalog.places))


def read_text(path: str) -> str:
    """A file of the configuration; SettingsError when it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise SettingsError(f"{path}: cannot be read: {reason}") from None


def tls_context(settings: Settings):
    """The ssl.SSLContext of the settings, or None; SettingsError when the files cannot be used."""
    if not settings.tls_cert:
        return None
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2          # RFC 8996 deprecates what was before
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None, lambda: "")
    except (OSError, ValueError) as error:
        hint = "" if settings.tls_key else "; TLS_KEY is the file of its key, if that is another"
        raise SettingsError(f"TLS_CERT and TLS_KEY cannot be used: {error.strerror or error}{hint}") from None
    return context


_LAUNCHERS = re.compile(r"npx|npm|pnpm|yarn|bunx?|uvx?|pipx|node|deno|python[0-9.]*|sh|bash|docker|podman")
_SUBCOMMANDS = frozenset("run exec dlx tool x".split())
_TAKE_A_VALUE = frozenset("""-e --env --env-file -v --volume --mount -p --publish --name --network -u --user -w
    --workdir --entrypoint --platform --with --python --registry --directory --project --index-url --index""".split())


def is_url(command: list[str]) -> bool:
    """Is a command line the URL of a remote server?"""
    return len(command) == 1 and command[0].startswith(("http://", "https://"))


def server_name(command: list[str]) -> str:
    """What a server is called in the log: the program, the package that a launcher launches, or the host of a URL."""
    if command == DEMO_COMMAND:
        return "demo"
    if is_url(command):
        return urlsplit(command[0]).hostname
    program, words = os.path.basename(command[0]), command[1:]
    if program == "env":
        while words and (words[0].startswith("-") or "=" in words[0]):
            words = words[1 + (words[0] in ("-u", "-C")):]
        return server_name(words) if words else program
    words = iter(words)
    for word in words if _LAUNCHERS.fullmatch(program) else ():
        if word in _TAKE_A_VALUE:
            next(words, None)
        elif not word.startswith("-") and word not in _SUBCOMMANDS:
            return _package_name(word) or program
    return program


def _package_name(word: str) -> str | None:
    """`@a/b` of `@a/b@1`, `jsr:@a/b` and `/x/node_modules/@a/b/cli.js`; None of what may hold more than a name."""
    if not re.fullmatch(r"[\w@./:+~<>=!\[\],*^-]{1,100}", word) or "://" in word:
        return None
    package = re.split(r"node_modules/(?:\.bin/)?", word)[-1]
    if package != word:
        return "/".join(package.split("/")[:2 if package.startswith("@") else 1])
    if word.startswith(("/", ".", "~")) or os.path.exists(word):
        return os.path.basename(word.rstrip("/"))
    return re.split(r"(?<=.)@|[\[=<>~!]", re.sub(r"^(jsr|npm):", "", word))[0]


# ============================================================================
# 55. Command line
# ============================================================================
#
# Arguments and environment into settings, settings into a running proxy.

LOOKUP_THREADS = 64            # that look up names of hosts


def load_settings(given, command: list[str] | None, environment: dict[str, str]) -> Settings:
    """The settings of a run; `given` is what argument_parser() made of flags and environment."""
    values = {field.name: parse_setting(field.name, field.default, text) for field in dataclasses.fields(Settings)
              if (text := getattr(given, field.name)) is not None}
    if command is not None:
        if not command:
            raise SettingsError("-- must be followed by the command of an MCP server")
        values["mcp_server_config"] = shlex.join(command)
    settings = check_settings(Settings(**values))
    if not settings.mcp_config:
        check_command(settings.mcp_server_config, environment)
    return settings


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    """(flags with their values, command or None): the command follows --, or begins at the first other word."""
    at = 0
    while at < len(arguments) and arguments[at].startswith("-") and arguments[at] != "--":
        takes_next = "=" not in arguments[at] and arguments[at] not in (
            "-h", "--help", "--version", "--check", "--stdio")
        at += 1 + (takes_next and at + 1 < len(arguments) and arguments[at + 1] != "--")
    rest = arguments[at:]
    return arguments[:at], rest[1:] if rest[:1] == ["--"] else rest or None


def check_command(config: str, environment: dict[str, str]) -> None:
    """Refuses a command line that can never be started, and says what to write instead."""
    try:
        command = shlex.split(config)
    except ValueError as error:
        raise SettingsError(f"MCP_SERVER_CONFIG cannot be split: {error}") from None
    if config and not command:
        raise SettingsError("MCP_SERVER_CONFIG is empty")
    if is_url(command):
        return check_url(command[0])
    problem = why_not_found(command[0] if command else sys.executable, environment.get("PATH"))
    if problem:
        raise SettingsError(problem)


def doubts(settings: Settings, environment: dict[str, str]) -> list[str]:
    """What is allowed but probably a mistake, a line each."""
    import difflib
    command, lines = shlex.split(settings.mcp_server_config), []
    if not any(re.fullmatch("-[a-z]*c", word) for word in command):             # sh -c
        lines = [f"word {number} of the command is passed as it is, because no shell reads it; where one is needed, "
                 "write sh -c '...'" for number, word in enumerate(command, 1) if _SHELL_WORD.fullmatch(word)]
    names, is_alone = {field.name.upper() for field in dataclasses.fields(Settings)}, not settings.mcp_config
    for given in sorted(environment.keys() - names):
        near = difflib.get_close_matches(given, names - {"HOST", "PORT"}, 1, 0.87)
        lines += [f"{given} is no setting; was {near[0]} meant?"] if near else []
    without_effect = (
        ("with SHARED_SESSION=true", is_alone and settings.shared_session, "PREWARM"),
        ("with SHARED_SESSION=false", is_alone and not settings.shared_session, "REQUIRE_SESSION SESSION_SECRET"),
        ("with STATELESS=true", settings.stateless, "REQUIRE_SESSION SESSION_SECRET"),
        *((f"with {name}", getattr(settings, name.lower()) and not settings.metrics_port, "ALLOWED_HOSTS")
          for name in ("AUTH_KEY", "AUTH_KEYS_FILE", "OAUTH_ISSUER")),
        ("without OAUTH_ISSUER", not settings.oauth_issuer, "OAUTH_AUDIENCE OAUTH_SCOPES OAUTH_JWKS_URL "
                                                            "OAUTH_INTROSPECTION_URL OAUTH_CLIENT_ID"),
        ("without OAUTH_CLIENT_ID", not settings.oauth_client_id, "OAUTH_CLIENT_SECRET"),
        ("with SANDBOX=off", is_alone and settings.sandbox == "off", "SANDBOX_READ SANDBOX_WRITE"),
        ("without MCP_CONFIG", is_alone, "WATCH"),
        ("on a server at a URL", is_url(command), " ".join(SANDBOX_SETTINGS).upper()))
    for name, shape, meant in (
            ("ALLOWED_ORIGINS", r"\*|null|[a-z][a-z0-9+.-]*://[^/*A-Z]+", "an origin as browsers send it: https://a.b"),
            ("ALLOWED_HOSTS", r"\*|[\w.-]+|\[[\da-fA-F:]+\]", "a host's name, without scheme or port")):
        lines += [f"{name}: {given} is not {meant}" for given in listed(getattr(settings, name.lower()))
                  if not re.fullmatch(shape, given)]
    end = urlsplit(settings.public_url).path.rstrip("/")[-4:]
    if end in ("/mcp", "/sse") and not settings.base_path.rstrip("/").endswith(end):
        lines.append(f"PUBLIC_URL is where this proxy is, without {end}: behind it tokens would be for {end}/mcp")
    if 0 < len(settings.session_secret) < 32:
        lines.append("SESSION_SECRET should be 32 random characters or more: whoever guesses it can forge session ids")
    return lines + [f"{name} has no effect {where}" for where, is_so, names in without_effect if is_so
                    for name in names.split() if getattr(settings, name.lower()) != getattr(Settings, name.lower())]


def argument_parser(environment: dict[str, str]):
    """The flags, made from Settings. A flag wins over its variable, and both over the default, which is None here."""
    import argparse
    parser = argparse.ArgumentParser(
        prog="mcpproxy.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="mcpproxy.py [--flag value ...] [-- command of an MCP server ...]",
        description="Puts any stdio MCP server on the network. Without a command it serves a built-in demo server.\n"
                    "Every flag is also an environment variable of the same name: --shared-session is SHARED_SESSION.")

    def refuse(message: str):
        raise SettingsError(f"{message}; --help lists the flags")
    parser.error = refuse
    parser.add_argument("--version", action="version", version=f"mcpproxy {__version__}")
    parser.add_argument("--check", action="store_true", help="start every server, print what it is and offers, and "
                                                             "end: with 0 if all work, otherwise with 1")
    parser.add_argument("--new-key", metavar="NAME", help="print a fresh key and its line for AUTH_KEYS_FILE, and end")
    parser.add_argument("--stdio", action="store_true", help="serve one client on stdin and stdout instead of HTTP, "
                                                             "whatever is configured")
    group = parser
    for field in dataclasses.fields(Settings):
        default = f"{field.default:g}" if isinstance(field.default, float) else dump(field.default).strip('"') or "none"
        flags = [*(["--config"] if field.name == "mcp_config" else []), "--" + field.name.replace("_", "-")]
        variable = environment.get(field.name.upper()) or None       # empty: not set, as in `docker run -e AUTH_KEY`
        group = parser.add_argument_group(GROUPS[field.name]) if field.name in GROUPS else group
        group.add_argument(*flags, dest=field.name, metavar="VALUE", default=variable,
                           help=f"{field.metadata['about']} (default: {default})".replace("%", "%%"))
    return parser


def banner(settings: Settings, names: list[str], addresses: list[tuple[str, int]]) -> str:
    """What is served, and where: printed when the proxy has started."""
    listening = ", ".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in addresses)
    host, port = addresses[0]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    base = f"{'https' if settings.tls_cert else 'http'}://{host}:{port}{settings.base_path}"
    key = ' -H "Authorization: Bearer <your key>"' if settings.is_guarded else ""
    mode = (f"as one, and each at {base}/servers/<name>/mcp" if settings.mcp_config else
            "one process for all clients; a stateful server wants SHARED_SESSION=false" if settings.shared_session else
            "a process for each client")
    name = ", ".join(names)
    return (f"mcpproxy {__version__} serves {name} ({mode})\n"
            f"  listening on     {listening}\n"
            f"  MCP, any client  {base}/mcp\n"
            f"  plain HTTP       {base}/tools\n"
            f"  in a browser     {base}/\n"
            + (f"  metrics          port {settings.metrics_port}, /metrics\n" if settings.metrics_port else "") +
            f"  try it           curl -s{key} {base}/tools"
            + ("/echo -H 'Content-Type: application/json' -d '{\"text\":\"hello\"}'\n" if name == "demo" else "\n"))


def printable(text: object) -> str:
    """What somebody else said, on one line and without what a terminal would obey."""
    return text if (text := str(text)).isprintable() else repr(text)[1:-1]


def write_out(text: str) -> None:
    """Writes to stdout. A terminal that is stopped, or that nobody reads, must not stop the proxy: the text is lost."""
    output = 1
    if os.isatty(1):
        with contextlib.suppress(OSError):     # it may be another user's
            output = os.open(os.ttyname(1), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    elif not select.select([], [1], [], 0)[1]:
        raise BlockingIOError(errno.EAGAIN, "nobody reads it")               # a pipe that is full
    try:
        os.write(output, text.encode("utf-8", "backslashreplace"))
    finally:
        if output != 1:
            os.close(output)


@contextlib.asynccontextmanager
async def running(settings: Settings, on_signal):
    """A Proxy, which is stopped in the end. SIGTERM and SIGINT are for `on_signal`."""
    loop, blocks = asyncio.get_running_loop(), os.get_blocking(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    # A host name that cannot be looked up keeps a thread busy for long, and other lookups must not wait for it.
    loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(LOOKUP_THREADS))
    proxy = Proxy(settings, dict(os.environ))
    # SIGHUP, also that of a closing terminal, has all files of the configuration read again.
    loop.add_signal_handler(signal.SIGHUP, proxy.reload)
    # Signals that come faster than they are handled are dropped. They would say nothing new, so no warning.
    signal.set_wakeup_fd(signal.set_wakeup_fd(-1), warn_on_full_buffer=False)
    try:
        yield proxy
    finally:
        await proxy.stop()
        os.set_blocking(1, blocks)             # others have the same open file
        # All is done: a signal while Python exits must not change the exit status.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    end_lookups(0)


async def unless(end: collections.abc.Coroutine, work: collections.abc.Coroutine):
    """What `work` returns; None if `end` comes before, which cancels it."""
    work, end = asyncio.ensure_future(work), asyncio.ensure_future(end)
    await asyncio.wait({work, end}, return_when=asyncio.FIRST_COMPLETED)
    if end.cancel():
        return work.result()
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    return None


async def run(settings: Settings) -> None:
    """One run of the program, until SIGTERM or SIGINT."""
    signals = asyncio.Semaphore(0)
    async with running(settings, signals.release) as proxy:
        addresses = await unless(signals.acquire(), proxy.start())         # which a sandbox or a host name may hold up
        if addresses is None:
            return
        text = banner(settings, list(proxy.mount.servers), addresses)
        try:
            if settings.log_format == "json":
                # Whatever the level: this is how the port is known.
                log.say(max(log.level, logging.INFO), "= %(banner)s", banner="; ".join(
                    " ".join(line.split()) for line in text.splitlines()))
            else:
                write_out(text)                # unbuffered: nothing is left to be flushed at the end, to a full disk
        except OSError as error:
            log.warning("! stdout: %(reason)s", reason=error.strerror)          # a full disk is no reason to stop
        if not settings.is_guarded:
            log.warning("! AUTH_KEY is not set: whoever reaches this port can use the server")
        for doubt in doubts(settings, dict(os.environ)):
            log.warning("! %(doubt)s", doubt=doubt)
        await signals.acquire()
        log.info("= stopping: running calls may take %(seconds)g s to finish, or until a second signal",
                 seconds=settings.drain_delay + settings.shutdown_grace)
        proxy.http.leave()
        await unless(signals.acquire(), proxy.mount.drain(settings.shutdown_grace, settings.drain_delay))


async def serve_stdio(settings: Settings) -> None:
    """One run for one client on stdin and stdout: until it is gone, or SIGTERM or SIGINT."""
    is_over = asyncio.Event()
    async with running(settings, is_over.set) as proxy:
        client = StandardStreams(proxy.mount, is_over)
        proxy.reaper.patience = 1.5, 1.5, 1.0          # SDKs, and other proxies, kill what they started after 4 or 5 s
        if await unless(is_over.wait(), proxy.start(listens=False)) is not None:
            await client.start()
            await is_over.wait()


async def describe(member: ServerConfig, client: Client) -> list[str]:
    """What a server is and offers, a line each; raises what keeps it from working."""
    instance = client.at(client.mount.servers[member.name])
    await instance.ready()
    identity = instance.identity
    lines = [f"{member.name}: {identity.name} {identity.release}, revision {identity.version}"]
    for method, (kind, _, _) in LISTS.items():
        try:
            names = (await instance.list_of(method).get()).shown(member, client.view.is_joint)
        except ServerError as error:
            if method == "tools/list":
                raise
            lines.append(f"  {kind}: {error}")                     # the rest can be used
        else:
            lines += [f"  {kind} ({len(names)}): {', '.join(names)}"] if names else []
    return lines


def sandbox_support() -> str:
    """What this machine can do of a sandbox, in words."""
    try:
        abi = landlock_abi()
        found = [f"Landlock {'' if abi >= LANDLOCK_ABI else 'of before Linux 6.2, which is not enough '}(ABI {abi})"]
    except OSError as error:
        found = [f"no Landlock: {why_refused('landlock', error.errno)}"]
    has_filters = False
    if hasattr(libc(), "prctl") and os.uname().machine in MACHINES:
        import ctypes
        libc().prctl(22, ctypes.c_ulong(2), None, None, None)          # PR_SET_SECCOMP: EFAULT if filters are supported
        has_filters = ctypes.get_errno() == errno.EFAULT
    # CAP_SETGID and CAP_SETUID, 6 and 7, of which a container may have deprived root. capabilities(7)
    has = re.search(rb"^CapEff:\s*([0-9a-f]+)", read_file("/proc/self/status"), re.MULTILINE)
    is_able = os.geteuid() == 0 and (not has or int(has[1], 16) >> 6 & 3 == 3)
    return ", ".join([*found, "sockets can be refused" if has_filters else "sockets cannot be refused",
                      "can become other users" if is_able else "cannot become other users"])


async def check(settings: Settings) -> bool:
    """Starts every server and prints what it is and offers; do all work?"""
    proxy, all_work, lines = Proxy(settings, dict(os.environ)), True, [f"sandbox: {sandbox_support()}"]
    try:
        for server in proxy.mount.servers.values():
            server.spares_wanted = 0
        proxy.watch_time()             # so that limits hold, and a slow start is told
        client = proxy.mount.visit(proxy.mount.catalog.view(), None, {})
        members = proxy.mount.catalog.servers.values()
        outcomes = await asyncio.gather(*(asyncio.wait_for(describe(member, client), member.settings.request_timeout)
                                          for member in members), return_exceptions=True)
        for member, outcome in zip(members, outcomes):
            if isinstance(outcome, BaseException):
                all_work = False
                is_late = isinstance(outcome, asyncio.TimeoutError)
                why = "it has not answered in time" if is_late else str(as_client_error(outcome))
                outcome = [f"{member.name}: does not work: {why}"]
            lines += map(printable, outcome)
    finally:
        await proxy.stop()
    # The reader may have closed the pipe; the exit status counts all the same.
    with contextlib.suppress(OSError), open(1, "w", encoding="utf-8", closefd=False) as output:
        print(*lines, sep="\n", file=output)
    end_lookups(int(not all_work))
    return all_work


def print_new_key(name: str) -> None:
    """A fresh key, and what the file of keys has of it."""
    import secrets
    key = secrets.token_urlsafe(32)
    entry = {"sha256": digest_of_key(key).hex()}
    parse_caller(name, entry, ())              # refuses a name that the file would not take
    print(f"the key, for {name}: {key}\nfor AUTH_KEYS_FILE:   {dump(name)}: {dump(entry)}")


def open_standard_streams() -> None:
    """Puts /dev/null in the place of standard streams that are closed, or the next socket would be taken for them."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:               # gets the lowest number that is free
        pass
    os.close(number)


def raise_descriptor_limit() -> None:
    """Lets this process have more open sockets, at most 65,536: the usual 1,024 are too few for 1,000 sessions."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def watch_children_without_threads() -> None:
    """Python 3.11 starts a thread for each child, to hear of its end, and waits until that runs: on a busy machine
    half a second. Later ones do what this does, where the kernel can."""
    if sys.version_info < (3, 12):
        with contextlib.suppress(OSError, AttributeError):
            os.close(os.pidfd_open(os.getpid()))
            asyncio.set_child_watcher(asyncio.PidfdChildWatcher())


def main() -> None:
    """The program."""
    if sys.argv[1:] == ["--demo-server"]:
        return DemoServer().run()
    open_standard_streams()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)          # where it is ignored, nobody learns how servers end
    signal.signal(signal.SIGHUP, lambda *_: None)          # one that comes before the file was read changes nothing
    flags, command = split_arguments(sys.argv[1:])
    # What is wrong with the settings is logged in the format that they ask for, too.
    formats = [os.environ.get("LOG_FORMAT", ""), *re.findall(r"--log-format[ =](\S*)", " ".join(flags))]
    start_logging("INFO", formats[-1].strip() == "json")
    try:
        given = argument_parser(dict(os.environ)).parse_args(flags)
        if given.new_key is not None:
            return print_new_key(given.new_key)
        settings = load_settings(given, command, dict(os.environ))
        raise_descriptor_limit()
        watch_children_without_threads()
        if settings.is_guarded or settings.session_secret:
            import hmac                # not with the first key: its connection may have taken the last descriptor
        # glibc gives large blocks back to the kernel, and every large message faults its pages in anew: half of its
        # time. Freeing a block of 31 MB, which is never touched, raises its threshold for good (one of 32 would not).
        bytes(31 * 1024 * 1024)
        # A large message is millions of objects for a moment. The collector would look through them again and again,
        # for two thirds of the time, and find nothing.
        gc.set_threshold(100_000, 10, 10)
        start_logging(settings.log_level, settings.log_format == "json")
        if given.check:
            sys.exit(not asyncio.run(check(settings)))
        asyncio.run((serve_stdio if given.stdio else run)(settings))
    except StartError as error:
        text = " ".join(str(error).split())
        if log.as_json:
            log.error("! %(reason)s", reason=text)
        else:
            print("mcpproxy:", text, file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:                    # in --check, or before a run handles SIGINT itself
        sys.exit(128 + signal.SIGINT)
    finally:
        log.flush()


# ============================================================================
# 56. The page
# ============================================================================
#
# The overview for people: one page that holds nothing but what is here and asks nobody but this proxy. What it shows
# is the overview, asked for each second; tools are called as without MCP.

PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<title>mcpproxy</title><style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; --back: light-dark(#f4f6f9, #12151b);
  --card: light-dark(#fff, #1b2029); --line: light-dark(#dde1e7, #313947); --soft: light-dark(#566070, #a3adbd);
  --text: light-dark(#1c2330, #e8ebf1); --blue: light-dark(#2257d6, #8fb2ff); --good: light-dark(#0f7048, #5fd39c);
  --bad: light-dark(#b8241b, #ff8f86); --wait: light-dark(#855600, #f0bd62) }
* { box-sizing: border-box; overflow-wrap: anywhere } [hidden] { display: none !important } a { color: var(--blue) }
body { max-width: 1280px; margin: auto; padding: 16px; background: var(--back); color: var(--text) }
h1 { font-size: 21px; margin: 0 } h2 { font-size: 18px; margin: 0 0 8px } label, p { display: block; margin: 8px 0 }
header, .row { display: flex; flex-wrap: wrap; gap: 2px 12px; align-items: baseline } header { margin-bottom: 14px }
main, .column { display: grid; gap: 14px; align-content: start; grid-template-columns: minmax(0, 1fr) }
@media (min-width: 960px) { #all { grid-template-columns: repeat(2, minmax(0, 1fr)) } }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px }
.item { border-top: 1px solid var(--line); padding: 8px 0 } .item:first-child { border: 0; padding-top: 0 }
.row > :last-child { margin-left: auto } .soft { color: var(--soft); font-weight: 400 } summary { cursor: pointer }
.state::before { content: "\25cf  " } .ready { color: var(--good) } .starting { color: var(--wait) }
.down, .error { color: var(--bad) } .error, pre { white-space: pre-wrap; margin: 4px 0 0 }
.bar { height: 3px; background: var(--blue); margin-top: 4px } .down + .bar { background: var(--bad) }
img, audio { max-width: 100%; display: block; margin-top: 6px } #calls, pre { max-height: 520px; overflow: auto }
pre, input:not([type=checkbox]), select, textarea { width: 100%; font: inherit; color: inherit; padding: 6px 8px;
  background: var(--back); border: 1px solid var(--line); border-radius: 6px } pre, textarea { font: 13px monospace }
::placeholder { color: var(--soft); opacity: 1 } .old { opacity: .5 } #closed { max-width: 420px }
b, .soft { unicode-bidi: isolate } summary b { word-break: break-all } summary .soft { display: -webkit-box;
  -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden; margin-left: 17px }
[open] > summary .soft { -webkit-line-clamp: none; white-space: pre-line }
button { font: inherit; color: var(--card); background: var(--blue); border: 0; border-radius: 6px; padding: 6px 14px }
</style>
<header><h1>mcpproxy</h1><span id="status" class="soft" role="status">connecting</span></header>
<main id="closed" hidden><section><form id="login"><label>This proxy asks for a key <input id="key" type="password"
required></label><button>Show</button><p id="wrong" class="error" role="alert"></p></form></section></main>
<main id="all" hidden><div class="column"><section><h2>Servers</h2><div id="servers"></div></section>
<section id="connect"><h2>Connect</h2><label>to <select id="what"></select></label><label>with <select id="with">
</select></label><label id="mine" hidden><input id="show-key" type="checkbox"> my key in it</label><pre id="recipe"
tabindex="0" role="region" aria-label="configuration"></pre><p><button id="copy">Copy</button></p></section>
<section><h2>Sessions</h2><div id="sessions"></div></section></div><div class="column"><section><h2>Tools</h2>
<div id="tools"></div><button id="load" hidden>Start a server and list its tools</button></section><section><h2>Calls
<span class="soft">the last hundred, newest first</span></h2><div id="calls" tabindex="0" role="region"
aria-label="calls"></div></section></div></main>
<script>
const $ = id => document.getElementById(id), base = location.pathname.replace(/\/?$/, "/")
let key = sessionStorage.getItem("key") || "", now = null, seen = null, listed = null, watched = 0, tools = new Map()
// What comes from elsewhere is text here, and never markup.
function el(tag, { dataset, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties)
  return Object.assign(made.dataset, dataset), made.append(...children.filter(Boolean)), made
}
const soft = (...facts) => el("span", { className: "soft" }, facts.filter(Boolean).join(" \u00b7 "))
const bad = text => el("div", { className: "error" }, text), pre = text => el("pre", {}, text)
const row = (...parts) => el("div", { className: "row" }, ...parts), pretty = value => JSON.stringify(value, null, 2)
const isSelected = id => !getSelection().isCollapsed && getSelection().containsNode($(id), true)
const put = (id, items, none) => isSelected(id) || $(id).replaceChildren(...items.length ? items : [soft(none)])
// What stays as it was keeps its selection, and is not read aloud again.
const write = (id, text) => $(id).textContent === text || ($(id).textContent = text)
const bearer = text => text ? { Authorization: `Bearer ${text}` } : {}, json = { "Content-Type": "application/json" }
const worded = one => typeof one === "string" ? one : JSON.stringify(one)
const exact = (_, value, text) => /^-?[1-9]\d{15,}$/.test(text?.source) && JSON.rawJSON?.(text.source) || value
const ask = (path, more) => fetch(base + path, { ...more, headers: { ...more && json, ...bearer(key) } })
const clock = moment => new Date(moment * 1000).toLocaleTimeString()
const bytes = n => n < 1000 ? `${n} B` : n < 1e6 ? `${(n / 1e3).toFixed(1)} kB` : `${(n / 1e6).toFixed(1)} MB`
const long = ms => ms < 1000 ? `${ms} ms` : `${(ms / 1000).toFixed(1)} s`
const since = (moment, s = Math.max(0, Date.now() / 1000 - moment)) => s < 90 ? `${Math.floor(s)} s` : s < 5400 ?
  `${Math.floor(s / 60)} min` : s < 129600 ? `${Math.floor(s / 3600)} h` : `${Math.floor(s / 86400)} d`
const showServer = one => el("div", { className: "server item", dataset: { name: one.name, state: one.state } },
  row(el("b", {}, one.name), soft(one.title, one.version), el("span", { className: `state ${one.state}` }, one.state)),
  soft(one.era && `${one.era} ${one.revision}`, one.since && `up ${since(one.since)}`, one.restarts &&
    `restarts: ${one.restarts}`, one.processes && `processes: ${one.processes}, ${bytes(one.memory)}, ${one.cpu} s CPU`,
    one.isRemote && "remote", one.group && `of ${one.group}`, one.words),
  one.error && bad(`${since(one.errorAt)} ago: ${one.error}`))
const showSession = one => el("div", { className: "session item" }, row(el("b", {}, one.client || "a client"),
  soft(one.session), soft(`for ${since(one.since)}`)), soft(one.place && `at ${one.place}`, one.transport, one.revision,
  one.key && `key ${one.key}`, one.calls && `running: ${one.calls}`))
function showCall(one) {
  const bar = el("div", { className: "bar" }), went = one.error_type || one.outcome
  const isGood = ["answered", "waits for input"].includes(went)
  bar.style.width = `${Math.min(100, 2 + 16 * Math.log10(1 + one.ms))}%`
  return el("div", { className: "call item" }, el("div", { className: isGood ? "row" : "row down" },
    [one.server, one.tool || one.method].filter(Boolean).join(" \u203a "), !isGood && el("span", {}, went),
    soft(one.client || one.session, clock(one.at), bytes(one.bytes_out), long(one.ms))), bar)
}
function show() {
  put("servers", now.servers.map(showServer), "none"), put("calls", now.calls.map(showCall), "none yet")
  put("sessions", now.sessions.map(showSession), "none; clients without a session show in the calls only")
  const state = pretty(now.servers.map(one => [one.name, one.state, one.restarts])), isNew = state !== seen
  const places = new Set(["/mcp", ...now.servers.flatMap(one => one.group ?
    [`/servers/${one.group}/mcp`, one.path] : [one.path])])
  if ([...$("what").options].map(one => one.value).join() !== [...places].join())
    $("what").replaceChildren(...[...places].map(one => el("option", {}, one)))
  if (isNew && (now.shared || listed)) loadTools()
  seen = state, $("load").hidden = now.shared || listed, $("mine").hidden = !key
  write("recipe", RECIPES[$("with").value]())
}
// How clients are told of the proxy. What a shell reads is quoted for it.
const quoted = text => /^[\w.:/@-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`
const url = () => location.origin + base.slice(0, -1) + $("what").value
const given = () => now.isGuarded && ($("show-key").checked && key || "<your key>")
const flag = name => given() ? ` ${name} ${quoted(`Authorization: ${bearer(given()).Authorization}`)}` : ""
const short = () => ($("what").value.split("/")[2] || (now.isFile ? "all" : now.servers[0].name))
  .replace(/^\W+/, "").replace(/\W+/g, "-") || "mcp"
const entry = (list, server) => pretty({ [list]: { [short()]: server } })
const remote = () => ({ url: url(), ...given() && { headers: bearer(given()) } })
const RECIPES = {
  "Cursor: .cursor/mcp.json": () => entry("mcpServers", remote()),
  "Claude Code": () => `claude mcp add --transport http ${short()} ${quoted(url())}${flag("--header")}`,
  "Claude Desktop: mcp-remote": () => entry("mcpServers", { command: "npx", args: ["-y", "mcp-remote", url(),
    .../^http:/.test(url()) ? ["--allow-http"] : [],
    ...given() ? ["--header", `Authorization: Bearer ${given()}`] : []] }),
  "VS Code: .vscode/mcp.json": () => entry("servers", { type: "http", ...remote() }),
  "Python SDK": () => `import mcp\nfrom mcp.client.streamable_http import streamablehttp_client\n
async with streamablehttp_client("${url()}", ${pretty(bearer(given()))}) as (read, write, _):
    async with mcp.ClientSession(read, write) as session: ...`,
  "TypeScript SDK": () => `// from "@modelcontextprotocol/sdk/client/streamableHttp.js"
await client.connect(new StreamableHTTPClientTransport(new URL("${url()}"),
    { requestInit: { headers: ${pretty(bearer(given()))} } }))`,
  "curl, without MCP": () => `curl -s ${quoted(url().replace(/mcp$/, "tools"))}${flag("-H")}`,
  "Inspector": () => "npx @modelcontextprotocol/inspector --cli " +
    `${quoted(url())} --transport http --method tools/list${flag("--header")}`,
}
// Tools. A form has a field for each simple part of the schema, and one for the rest.
async function loadTools() {
  try {
    const answer = await ask("tools"), text = await answer.text(), said = JSON.parse(text, exact)
    if (text === listed || listed && !answer.ok) return
    listed = answer.ok && text             // a tool that stays as it was keeps what is typed in its form
    tools = new Map(said.tools?.map(pretty).map((one, at) => [one, tools.get(one) || showToolOrWhy(said.tools[at])]))
    put("tools", answer.ok ? [...tools.values()] : [bad(said.error.message)], "none")
  } catch (error) { put("tools", [bad(error.message)]), seen = listed = null }        // to be asked for again
}
function fieldOf([name, schema], isRequired) {
  const kind = Array.isArray(schema?.enum) ? "enum" : schema?.type, usual = schema?.default, required = isRequired
  const value = worded(usual ?? "")
  const number = { type: "number", value, required, min: worded(schema?.minimum), max: worded(schema?.maximum) }
  const properties = { enum: {}, boolean: { type: "checkbox", checked: usual === true }, string: { value },
    number: { ...number, step: "any" }, integer: number }[kind]
  if (!properties) return name
  const input = el(kind === "enum" ? "select" : "input", { name, ...properties })
  if (kind === "enum") input.append(...isRequired ? [] : [el("option", { value: "" })], ...schema.enum.map((one, at) =>
    el("option", { value: at, selected: pretty(one) === pretty(usual) }, worded(one))))
  const isLeftOut = () => !isRequired && (kind === "boolean" ? !input.checked && usual !== true : input.value === "")
  const read = () => isLeftOut() ? undefined : kind === "boolean" ? input.checked : kind === "string" ? input.value :
    kind === "enum" ? schema.enum[input.value] : exact("", Number(input.value), { source: input.value })
  return { name, read, made: el("label", {}, name, isRequired && " *", " ", input, soft(schema.description)) }
}
function showToolOrWhy(tool) {                   // what a server says of one may be anything
  try { return showTool(tool) } catch (error) { return bad(`${tool.name}: ${error.message}`) }
}
function showTool(tool) {
  const { properties, required } = tool.inputSchema || {}, result = el("div", { className: "result" })
  const all = Object.entries(properties || {}).map(one => fieldOf(one, [required].flat().includes(one[0])))
  const rest = all.filter(one => !one.read), fields = all.filter(one => one.read)
  const example = pretty(Object.fromEntries(rest.map(name => [name, null])))
  const more = el("textarea", { name: "json", rows: rest.length + 2, placeholder: example })
  const form = el("form", {}, ...fields.map(one => one.made), (rest.length > 0 || !properties) && el("label", {},
    `as JSON: ${rest.join(", ") || "arguments"} `, more), el("p", {}, el("button", { type: "submit" }, "Call")))
  form.addEventListener("submit", async event => {           // a field may be called onsubmit
    event.preventDefault(), result.replaceChildren(soft("running"))
    try {
      const simple = Object.fromEntries(fields.map(one => [one.name, one.read()]))           // undefined is left out
      const body = JSON.stringify({ ...simple, ...JSON.parse(more.value || "{}", exact) })
      const answer = await ask(`tools/${encodeURIComponent(tool.name)}`, { method: "POST", body })
      const { error, isError, content, structuredContent: structured } = JSON.parse(await answer.text(), exact)
      const parts = [error && bad(`${error.message} (${error.code})`), isError && bad("the tool failed"),
        ...(content || []).map(showContent), structured && pre(pretty(structured))].filter(Boolean)
      result.replaceChildren(...parts.length ? parts : [soft("done, without a result")])
    } catch (error) { result.replaceChildren(bad(error.message)) }
  })
  return el("details", { className: "tool item", dataset: { name: tool.name } },
    el("summary", {}, el("b", {}, tool.name), " ", soft(tool.description)), form, result)
}
function showContent(one) {
  const src = `data:${one.mimeType};base64,${one.data}`
  if (one.type === "image") return el("img", { src, alt: "image" })
  if (one.type === "audio") return el("audio", { src, controls: true })
  if (one.type === "resource_link" && /^https?:\/\//i.test(one.uri)) return el("div", {}, el("a", { href: one.uri,
    target: "_blank", rel: "noopener noreferrer" }, one.title || one.name || one.uri), " ", soft(one.uri))
  return pre(one.text ?? one.resource?.text ?? pretty(one))
}
function forget() {
  for (const id of ["servers", "sessions", "calls", "tools"]) $(id).replaceChildren()
  now = seen = listed = null, tools.clear(), $("status").textContent = "closed", sessionStorage.removeItem("key")
  $("wrong").textContent = key && "Wrong key.", $("key").focus()
}
// Asks for the overview each second, and more seldom where the key does not open it. A newer watch() ends the one
// before: it has the key given last.
async function watch(number = ++watched) {
  let pause = 1000
  try {
    const canBeSent = (key || $("closed").hidden) && /^[ -~\xa0-\xff]*$/.test(key)
    const answer = canBeSent ? await ask("?watch=1", { signal: AbortSignal.timeout(10000) }) : { status: 401 }
    const said = canBeSent && await answer.json()
    if (number !== watched) return
    $("closed").hidden = !($("all").hidden = answer.status === 401)
    if (answer.status === 401) return forget()
    if (answer.status === 403) pause = 10000
    if (!answer.ok) throw new Error(said.error.message)
    sessionStorage.setItem("key", key)
    now = said, $("all").className = "", show()
    write("status", `${now.version} \u00b7 ${now.status} \u00b7 ${location.host}`)
  } catch (error) {
    if (number !== watched) return
    $("all").className = "old", write("status", `not connected: ${error.message}`)
  }
  setTimeout(watch, pause, number)
}
$("with").append(...Object.keys(RECIPES).map(name => el("option", {}, name)))
$("what").oninput = $("with").oninput = $("show-key").oninput = show, $("load").onclick = loadTools
$("login").onsubmit = () => (key = $("key").value.trim(), watch(), false)
$("copy").onclick = () => navigator.clipboard?.writeText($("recipe").textContent) ??
  getSelection().selectAllChildren($("recipe"))                    // only pages of https and of this machine may copy
watch()
</script>
"""


def show_page(endpoints: Endpoints, admission: Admission, body: bytes, reply: Reply) -> None:
    """GET /: the page for a browser, which says that it wants one; for others the same facts as JSON."""
    if "text/html" not in admission.head.headers.get("accept", ""):
        return endpoints.get_overview(admission, body, reply)
    import hashlib
    own = []           # only these may run in the page, and ask only this proxy. W3C, CSP Level 3
    for tag in "script", "style":
        text = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        own.append(f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
    policy = "; ".join(["default-src 'none'", *own, "connect-src 'self'", "img-src data:", "media-src data:",
                        "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"])
    has_to_ask = admission.objection is not None           # for a key, before it asks the proxy for anything
    page = PAGE.replace(' id="closed" hidden', ' id="closed"') if has_to_ask else PAGE
    reply.send(200, [page.encode()], (
        ("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", policy),
        ("Cache-Control", "no-cache"), ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")))


ROUTES["/"] = Route(GET=show_page, HEAD=show_page, is_open=True)


if __name__ == "__main__":
    main()
