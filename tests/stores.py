"""Stores to read from: a web server on this machine with byte ranges, which fails as it is told to."""

import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = b"<html><body>The service is busy.</body></html>"


class Store(ThreadingHTTPServer):
    """Serves the files under a folder; `url` ends without a slash.

    `fails` holds what goes wrong with the next requests, one after the other, and `always` what does with the rest:
    an HTTP status, "page" (a page of words with status 200), "whole" (ranges are ignored), "cut" (the connection ends
    early), "reset" (it ends at once), "stall" (nothing comes until `go_on` is set) or "wrong" (other bytes of the right
    length). `requests` holds the path and range of each.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_port}"
        self.fails: deque[int | str] = deque()
        self.always: int | str | None = None
        self.requests: list[tuple[str, str | None]] = []
        self.go_on = threading.Event()

    def handle_error(self, *_: object) -> None:
        """Say nothing: a reader that goes away is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """Answers for a `Store`."""

    protocol_version = "HTTP/1.1"  # connections are kept, as by real stores
    disable_nagle_algorithm = True
    server: Store

    def do_GET(self) -> None:
        store, asked = self.server, self.headers.get("Range")
        store.requests.append((self.path, asked))
        failure = store.fails.popleft() if store.fails else store.always
        path = store.folder / self.path.lstrip("/")
        if failure == "stall":
            store.go_on.wait(10)
        if failure == "reset":
            self.close_connection = True
        elif isinstance(failure, int):
            self.answer(failure, PAGE)
        elif not path.is_file():
            self.answer(404, PAGE)
        elif failure == "page":
            self.answer(200, PAGE)
        elif asked is None or failure == "whole":
            self.answer(200, path.read_bytes(), failure)
        else:
            start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
            with path.open("rb") as file:
                file.seek(start)
                data = file.read(end + 1 - start)
            self.answer(206 if data else 416, data, failure)

    def answer(self, status: int, data: bytes, failure: int | str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "text/html" if data is PAGE else "application/x-tar")
        self.end_headers()
        self.close_connection = failure == "cut"
        self.wfile.write({"cut": data[: len(data) // 2], "wrong": bytes(len(data))}.get(failure, data))

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[Store]:
    """Serve a folder while the block runs."""
    with Store(folder) as store:
        thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield store
        finally:
            store.go_on.set()
            store.shutdown()
            thread.join()
