# mcpproxy with what most MCP servers need: Python, Node (npx) and uv (uvx).
#
#   docker build -t mcpproxy .
#   docker run --rm -p 8000:8000 --stop-timeout 15 -e MCP_SERVER_CONFIG="uvx mcp-server-fetch" -e AUTH_KEY=secret mcpproxy
#
# Into an image of your own that has Python 3.11 or newer, one line copies all there is:
#
#   COPY --from=mcpproxy /usr/local/bin/mcpproxy.py /usr/local/bin/mcpproxy.py
#
# and one starts it beside, or instead of, what the image runs so far:
#
#   CMD ["python3", "/usr/local/bin/mcpproxy.py", "--", "your-mcp-server", "--its-flags"]

FROM node:22-bookworm-slim AS node

FROM python:3.13-slim-bookworm

# tini is PID 1: it hands signals on and reaps what is nobody's; what servers leave behind, mcpproxy reaps.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git tini \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir uv \
    && useradd --create-home --uid 1000 mcp \
    && chgrp 0 /home/mcp && chmod g=u /home/mcp

COPY --from=node /usr/local/bin/node /usr/local/bin/node
COPY --from=node /usr/local/lib/node_modules/npm /usr/local/lib/node_modules/npm
RUN ln -s ../lib/node_modules/npm/bin/npm-cli.js /usr/local/bin/npm \
    && ln -s ../lib/node_modules/npm/bin/npx-cli.js /usr/local/bin/npx

# Compiled once: from source, every start takes three times as long.
COPY mcpproxy.py /usr/local/bin/mcpproxy.py
RUN python3 -c "import py_compile; py_compile.compile('/usr/local/bin/mcpproxy.py', '/usr/local/bin/mcpproxy.pyc', doraise=True)"

# npx and uvx keep their packages in the home directory: a volume there makes the next start fast. The user is a number,
# because Kubernetes has to see that it is not root, and HOME is named for users that /etc/passwd does not know: OpenShift
# gives any number, but the group 0, whose the home is.
USER 1000:1000
WORKDIR /home/mcp
EXPOSE 8000
ENV HOME=/home/mcp HOST=0.0.0.0 PORT=8000

# With no proxy: what http_proxy names is not for this.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["python3", "-c", "import http.client as http, os, ssl, sys; at = ('127.0.0.1', int(os.environ['PORT'] or 8000)); link = http.HTTPSConnection(*at, timeout=4, context=ssl._create_unverified_context()) if os.environ.get('TLS_CERT') else http.HTTPConnection(*at, timeout=4); link.request('GET', '/healthz'); sys.exit(link.getresponse().status != 200)"]

# -s: no warning where another init is process 1 already (docker run --init).
ENTRYPOINT ["tini", "-s", "--", "python3", "/usr/local/bin/mcpproxy.pyc"]
