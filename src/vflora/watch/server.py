"""`vflora watch`: serves the growing page of a training run, to this machine alone unless told otherwise.

Only what the page shows is served: the request names no path, but the digest of one that was found in the run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from vflora.config import require
from vflora.errors import UserError
from vflora.watch.run_state import read_run
from vflora.watch.view import marks, render_page, render_parts

log = logging.getLogger(__name__)

_KINDS = {".mp4": "video/mp4", ".png": "image/png", ".html": "text/html; charset=utf-8"}
_POLICY = (
    "default-src 'none'; img-src 'self' data:; media-src 'self'; connect-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_CHUNK = 1 << 16


@dataclass(frozen=True)
class WatchConfig:
    """Which run, and where to show it."""

    run_dir: Path
    """Folder of the run: what its --output_dir was."""
    port: int = 8765
    """Port to serve at; 0 takes any that is free."""
    host: str = "127.0.0.1"
    """Address to serve at; 0.0.0.0 lets everyone in the network see the run."""
    refresh_s: float = 2.0
    """Seconds between two looks at the run."""

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "--port must lie in 0 to 65535.")
        require(self.refresh_s >= 0.1, "--refresh_s must be at least 0.1.")


def run(config: WatchConfig) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        UserError: if there is no run, or the address cannot be had.
    """
    with open_server(config) as server:
        if not _is_loopback(config.host):
            log.warning("everyone who reaches %s sees this run: pictures, prompts and settings", config.host)
        log.info("%s is at %s (Ctrl-C ends)", config.run_dir, server.address)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            log.info("no longer watching; the run goes on")


def open_server(config: WatchConfig) -> WatchServer:
    """Returns a server that listens already; `serve_forever` answers.

    Raises:
        UserError: see `run`.
    """
    read_run(config.run_dir)
    try:
        return WatchServer(config)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {config.port} is taken: choose another with --port, or --port 0.") from error
        raise UserError(
            f"{config.host}:{config.port} cannot be served at ({error}): check --host and --port."
        ) from error


class WatchServer(ThreadingHTTPServer):
    """Answers for one run."""

    daemon_threads = True

    def __init__(self, config: WatchConfig):
        """Listens at the address of `config`."""
        is_ipv6 = isinstance(_numeric(config.host), IPv6Address)
        self.address_family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
        super().__init__((config.host, config.port), _Handler)
        self._config = config
        self._files: dict[str, Path] = {}
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """What to type into a browser."""
        host, port = str(self.server_address[0]), self.server_address[1]
        if host in ("0.0.0.0", "::"):
            host = "localhost"
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    @property
    def is_private(self) -> bool:
        """Whether only this machine can reach it."""
        return _is_loopback(self._config.host)

    def parts(self, step: int | None) -> dict[str, str]:
        """Returns the parts of the page as the run is now."""
        return render_parts(read_run(self._config.run_dir), self._link, step)

    def page(self) -> str:
        """Returns the page as the run is now."""
        state = read_run(self._config.run_dir)
        return render_page(state, render_parts(state, self._link), self._config.refresh_s)

    def file(self, digest: str) -> Path | None:
        """Returns the file that the page linked under `digest`."""
        with self._lock:
            return self._files.get(digest)

    def _link(self, path: Path) -> str:
        """Returns the address of a file of the run; a new version of it has another one."""
        stat = path.stat()
        digest = hashlib.sha256(f"{path}\0{stat.st_mtime_ns}\0{stat.st_size}".encode()).hexdigest()[:32]
        with self._lock:
            self._files[digest] = path
        return f"/file/{digest}"


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "vflora", ""

    def handle(self) -> None:
        with suppress(ConnectionError):  # a browser that has seen enough hangs up, wherever its answer has got to
            super().handle()

    def do_GET(self) -> None:
        # A page from elsewhere must not read the run by giving this address a name of its own (DNS rebinding).
        name = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        if self.server.is_private and not _is_loopback(name):
            return self._text(HTTPStatus.FORBIDDEN, "served to this machine only", "text/plain; charset=utf-8")
        url = urlsplit(self.path)
        if url.path == "/":
            return self._text(HTTPStatus.OK, self.server.page(), _KINDS[".html"])
        if url.path == "/state":
            return self._state(parse_qs(url.query))
        digest = re.fullmatch(r"/file/([0-9a-f]{32})", url.path)
        path = self.server.file(digest.group(1)) if digest else None
        if path is None or not path.is_file():
            return self._text(HTTPStatus.NOT_FOUND, "there is no such page", "text/plain; charset=utf-8")
        return self._file(path)

    do_HEAD = do_GET

    def _state(self, query: dict[str, list[str]]) -> None:
        step = query.get("step", [""])[0]
        parts = self.server.parts(int(step) if re.fullmatch(r"[0-9]{1,12}", step) else None)
        found = marks(parts)
        mark = "-".join(found.values())
        if query.get("mark") == [mark]:
            return self._text(HTTPStatus.NO_CONTENT, "", "application/json")
        state = {"mark": mark, "marks": found, "parts": parts}
        return self._text(HTTPStatus.OK, json.dumps(state), "application/json")

    def _text(self, status: HTTPStatus, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(status)
        self._common(kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", _POLICY)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _file(self, path: Path) -> None:
        """Sends a file, or the one range of it that was asked for: players seek by ranges."""
        with path.open("rb") as file:
            size = file.seek(0, 2)
            first, last = 0, size - 1
            asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if asked and asked.group(1):
                first, last = int(asked.group(1)), min(last, int(asked.group(2) or last))
            elif asked and asked.group(2):
                first = max(0, size - int(asked.group(2)))
            if first > last:
                self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK)
            self._common(_KINDS[path.suffix])
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Cache-Control", "private, max-age=86400, immutable")
            self.send_header("Content-Length", str(last - first + 1))
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.end_headers()
            if self.command != "HEAD":
                self._send(file, first, last - first + 1)
        return None

    def _send(self, file, first: int, count: int) -> None:
        file.seek(first)
        while count > 0 and (chunk := file.read(min(_CHUNK, count))):
            self.wfile.write(chunk)
            count -= len(chunk)

    def _common(self, kind: str) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")

    def log_message(self, format: str, *args: object) -> None:
        log.debug(format, *args)


def _is_loopback(host: str) -> bool:
    address = _numeric(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _numeric(host: str) -> IPv4Address | IPv6Address | None:
    """Returns the address that `host` spells; None for a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None
