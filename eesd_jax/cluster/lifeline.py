"""Tells the processes of one run at once when one of them has ended: process 0 holds a TCP connection to each of the others.

Whatever ends a process, the kernel closes its connection; where a machine or a network died, unanswered keep-alives do. So no process
has to send heartbeats, and one that compiles for minutes, or is stopped for a while, is not taken for dead. (JAX notices a killed process
after 100 seconds, and reports it with a C++ stack.) Messages are JSON, one a line.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from eesd_jax.config import LifelineConfig

GONE = 1  # exit code where another process ended without a message
_LOST = "is gone: it was killed, or its machine or network failed; expected all processes to run to the end: start all of them again"
_KEEPALIVE = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")  # as Linux names them; others keep their own pace


class Lifeline:
    """Holds this process's connections, and threads that listen to them for as long as it runs.

    Args:
      process: which one this is. names: of all processes, as messages call them.
      config: times to wait.
    """

    def __init__(self, process: int, names: list[str], config: LifelineConfig):
        self._process, self._names, self._config = process, names, config
        self._token = ""
        self._lines: dict[int, socket.socket] = {}
        self._left: set[int] = set()  # processes that have nothing more to do, and may close their connections
        self._closed: set[int] = set()
        self._first = threading.Lock()  # held by the thread that heard of the first end
        self._over = threading.Lock()  # held by the thread that ends this process

    def listen(self) -> tuple[int, str]:
        """Opens a port for the others (on process 0), and returns it with the password by which they connect."""
        if socket.has_dualstack_ipv6():
            server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            server = socket.create_server(("", 0))
        self._token = secrets.token_hex(16)
        _in_background(self._accept, server)
        return server.getsockname()[1], self._token

    def connect(self, host: str, port: int, token: str) -> None:
        """Connects to process 0 (on the others); raises OSError where it cannot be reached there."""
        line = socket.create_connection((host, port), timeout=self._config.connect)
        line.settimeout(None)
        self._lines[0] = line
        self._keep_alive(line)
        self._send(0, {"token": token, "process": self._process})
        _in_background(self._hear, 0, line.makefile("r", encoding="utf-8"))

    def wait_for(self, others: set[int]) -> None:
        """Waits (on process 0, after `listen`) until all that have connected are known here, too."""
        while not others <= self._lines.keys():
            time.sleep(0.01)

    def leave(self) -> None:
        """Tells the others that this process is done, so that they do not take its end for a failure."""
        for other in list(self._lines):
            self._send(other, {"left": True})
        self._left.add(self._process)

    def fail(self, why: str, code: int, text: str) -> NoReturn:
        """Ends this process with that text on stderr, and lets the others know why."""
        self._over.acquire()  # for good
        _say(text)
        self._tell({"process": self._process, "why": why, "code": code})
        self._exit(code)

    def wait_for_news(self) -> None:
        """Waits until the end of another process, which shows as an error here too, would be known; does not return if there was one."""
        time.sleep(self._config.grace)

    def _accept(self, server: socket.socket) -> None:
        while len(self._lines) < len(self._names) - 1:
            line, _ = server.accept()
            file = line.makefile("r", encoding="utf-8")
            line.settimeout(self._config.connect)
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # not one of our processes
                hello = json.loads(file.readline(1000))
                if secrets.compare_digest(hello["token"], self._token):
                    line.settimeout(None)
                    self._keep_alive(line)
                    self._lines[hello["process"]] = line
                    _in_background(self._hear, hello["process"], file)
        server.close()

    def _keep_alive(self, line: socket.socket) -> None:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in zip(_KEEPALIVE, self._config.keepalive, strict=True):
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def _hear(self, other: int, file: Any) -> None:
        """Listens to one other process until it ends."""
        with contextlib.suppress(OSError, ValueError):  # cut in the middle of a line
            for text in file:
                message = json.loads(text)
                if "left" in message:
                    self._left.add(other)
                else:
                    self._closed |= {other} if other else set()
                    self._ended(**message)
        self._closed.add(other)
        if other not in self._left:
            self._ended(other, None, GONE)

    def _ended(self, process: int, why: str | None, code: int) -> None:
        """Ends this process because another has ended too early."""
        if not self._first.acquire(blocking=False):
            return  # a consequence of the first end
        if self._process == 0:
            self._tell({"process": process, "why": why, "code": code})
        if why is not None:
            time.sleep(self._config.grace)  # a mistake there may be one here, too, and is then better reported by this process itself
        if self._over.acquire(blocking=False):
            _say(f"error: {self._names[process]} {_LOST if why is None else f'ended: {why}'}")
            self._exit(code)

    def _tell(self, message: dict[str, Any]) -> None:
        for other in list(self._lines):
            self._send(other, message)

    def _send(self, other: int, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # that one is gone
            self._lines[other].sendall(json.dumps(message).encode() + b"\n")

    def _exit(self, code: int) -> NoReturn:
        """Exits without telling JAX, which would wait for processes that are gone."""
        deadline = time.monotonic() + 2 * self._config.grace
        # JAX's own service ends with process 0, and the others would crash at that: they go first.
        while self._process == 0 and self._closed != set(self._lines) and time.monotonic() < deadline:
            time.sleep(0.05)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _say(text: str) -> None:
    """Writes a line in one piece: other threads and processes may write to the same stream."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _in_background(work: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()
