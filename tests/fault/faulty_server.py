"""An HTTP proxy that fails some of the calls it should pass on, in a seeded order."""

import http.client
import http.server
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

import numpy as np

# One call in five is answered 503; others lose their connection before or after they took effect, or in mid-answer.
DECK = ("busy",) * 4 + ("dropped before", "dropped after", "cut short") + ("passed",) * 13
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


class FaultyServer(http.server.ThreadingHTTPServer):
    """Passes calls on to `upstream`; `counts` says what was done to how many, by (method, fate).

    Fates are drawn for each method from a shuffled `deck`, so that a few dozen calls meet all of them.
    """

    daemon_threads = True

    def __init__(self, upstream: str, deck: Sequence[str] = DECK, seed: int = 0, host: str = "127.0.0.1") -> None:
        super().__init__((host, 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.counts: Counter[tuple[str, str]] = Counter()
        self._deck = list(deck)
        self._rng = np.random.default_rng(seed)
        self._left: dict[str, list[str]] = {}
        self._lock = threading.Lock()
        self._away = False

    @property
    def address(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_port}"

    @contextmanager
    def away(self) -> Iterator[None]:
        """Answer every call with 503 in the block."""
        self._away = True
        yield
        self._away = False

    def draw_fate(self, method: str) -> str:
        if self._away:
            return "busy"
        with self._lock:
            left = self._left.setdefault(method, [])
            if not left:
                left += self._rng.permutation(self._deck).tolist()
            fate = left.pop()
            self.counts[method, fate] += 1
            return fate


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def handle_one_call(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fate = self.server.draw_fate(self.command)
        if fate == "busy":
            self.answer(503, [], b"<Error><Code>ServiceUnavailable</Code><Message>busy</Message></Error>")
            return
        self.close_connection = fate != "passed"
        if fate == "dropped before":
            return
        call = http.client.HTTPConnection(self.server.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "expect")}
        call.request(self.command, self.path, body, headers)
        answer = call.getresponse()
        content = answer.read()
        call.close()
        if fate != "dropped after":
            cut = len(content) // 2 if fate == "cut short" else len(content)
            self.answer(answer.status, answer.getheaders(), content, cut)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one_call

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: int | None = None) -> None:
        self.send_response_only(status)
        length = dict(headers).get("Content-Length") if self.command == "HEAD" else None
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content[:cut])

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def faulty_server(upstream: str, deck: Sequence[str] = DECK, host: str = "127.0.0.1") -> Iterator[FaultyServer]:
    with FaultyServer(upstream, deck, host=host) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
