"""Messages between a worker and the process of its lane, over a socket. Sending never waits, on either side."""

import pickle
import select
import socket
from collections import deque
from time import monotonic
from typing import Any

HEAD = 8
"""Bytes of a message's length, before it."""
READ = 1 << 20
"""Bytes read at a time."""


class Channel:
    """One end. What the other end has not taken yet is queued here, in order, and sent by later calls.

    Args:
        end: of a pair of connected stream sockets; the channel closes it.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._outbox: deque[memoryview] = deque()
        self._inbox = bytearray()
        self._ended = False

    @classmethod
    def pair(cls) -> tuple["Channel", socket.socket]:
        """A channel, and the other end for another process to inherit."""
        ours, theirs = socket.socketpair()
        return cls(ours), theirs

    @property
    def unsent(self) -> int:
        """Bytes that the other end has not taken."""
        return sum(len(part) for part in self._outbox)

    def send(self, message: Any) -> None:
        """Queues a message and sends what can be sent now. Drops it when the other end is closed; `receive` raises then."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._outbox.append(memoryview(len(data).to_bytes(HEAD, "little") + data))
        self.flush()

    def flush(self) -> None:
        while self._outbox:
            try:
                sent = self._socket.send(self._outbox[0])
            except BlockingIOError:
                return
            except OSError:
                self._outbox.clear()
                return
            if sent == len(self._outbox[0]):
                self._outbox.popleft()
            else:
                self._outbox[0] = self._outbox[0][sent:]

    def receive(self, patience_s: float | None = 0.0) -> list[Any]:
        """The messages that have arrived; sends what can be sent now.

        Args:
            patience_s: how long to wait for the first one, None without limit.

        Raises:
            EOFError: the other end is closed, and every message it had sent has been returned.
        """
        deadline = None if patience_s is None else monotonic() + patience_s
        while True:
            self.flush()
            self._read()
            messages = self._messages()
            if messages:
                return messages
            if self._ended:
                raise EOFError("the other end is closed")
            left = None if deadline is None else deadline - monotonic()
            if left is not None and left <= 0.0:
                return []
            waiting = select.poll()
            waiting.register(self._socket, select.POLLIN | (select.POLLOUT if self._outbox else 0))
            waiting.poll(None if left is None else left * 1000)

    def _read(self) -> None:
        while not self._ended:
            try:
                data = self._socket.recv(READ)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            self._ended = not data
            self._inbox += data

    def _messages(self) -> list[Any]:
        found, at = [], 0
        while len(self._inbox) >= at + HEAD:
            end = at + HEAD + int.from_bytes(self._inbox[at : at + HEAD], "little")
            if len(self._inbox) < end:
                break
            found.append(pickle.loads(self._inbox[at + HEAD : end]))
            at = end
        del self._inbox[:at]
        return found

    def close(self) -> None:
        self._ended = True
        self._outbox.clear()
        self._socket.close()
