# SPDX-License-Identifier: Apache-2.0
"""What waits to be sent to one client: pieces of arenas, small replies, ranges of files, in order.

Mostly nothing waits: a batch of replies fits into the socket and is gone with one system call. When the client is
slower than we are, the rest stays here with the memory it lives in, and the loop sends on when the socket takes
more. Memory is given back (``Buffer.release``) as soon as its last byte is out.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from bottomhalf.host.protocol import Arena, File, Socket
from bottomhalf.host.request import Request

PIECES_PER_SEND_MAX: Final = 512  # buffers in one sendmsg (the kernel takes 1024)


class Buffer:
    """An arena with a count of its users; the pool gets it back when nobody is left."""

    __slots__ = ("_give_back", "address", "arena", "size", "users", "view")

    def __init__(self, arena: Arena, give_back: Callable[[Buffer], object]) -> None:
        self.arena = arena
        self.view = arena.view
        self.address = arena.address
        self.size = arena.size
        self.users = 0
        self._give_back = give_back

    def release(self, count: int = 1) -> None:
        self.users -= count
        if self.users == 0:
            self._give_back(self)


class _FileRange:
    """Bytes of a file that go to the socket without passing through us."""

    __slots__ = ("count", "file", "offset")

    def __init__(self, file: File, offset: int, count: int) -> None:
        self.file = file
        self.offset = offset
        self.count = count


class _Mapped:
    """What a view of the page cache needs while it waits."""

    __slots__ = ("_end", "_file", "done")

    def __init__(self, file: File, end: int) -> None:
        self._file = file
        self._end = end  # of the view, in the file
        self.done: Callable[[], object] | None = None

    def release(self) -> None:
        if self.done is not None:
            self.done()

    def copy(self, view: memoryview) -> memoryview:
        """The bytes themselves; zeroes where the file has ended."""
        count = len(view)
        return memoryview(self._file.pread(count, self._end - count).ljust(count, b"\0"))


class FileEnded(Exception):
    """A file became shorter while a range of it, already promised to the client, was being sent."""


class Output:
    """The send side of one connection."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket
        # (memoryview or _FileRange, what has to know when it is out)
        self._pieces: deque[tuple[Any, Buffer | _Mapped | None]] = deque()
        self.unsent_bytes = 0
        self.sent_bytes = 0

    def __bool__(self) -> bool:
        """Whether something waits."""
        return bool(self._pieces)

    def send(self, piece: Any, memory: Buffer | None = None) -> None:
        """Send a piece (bytes or a view of ``memory``, one of whose users this is) after everything before."""
        length = len(piece)
        if not self._pieces:
            try:
                sent = self._socket.send(piece)
            except BlockingIOError:
                sent = 0
            except OSError:
                if memory is not None:
                    memory.release()
                raise
            self.sent_bytes += sent
            if sent == length:
                if memory is not None:
                    memory.release()
                return
            piece = memoryview(piece)[sent:]
            length -= sent
        self._pieces.append((piece, memory))
        self.unsent_bytes += length

    def send_all(self, pieces: list[tuple[Any, Buffer | None]]) -> None:
        """Send several pieces in order, with as few system calls as possible."""
        if len(pieces) == 1:
            self.send(*pieces[0])
            return
        if self._pieces or len(pieces) > PIECES_PER_SEND_MAX:
            waited = bool(self._pieces)
            for piece, memory in pieces:
                self._pieces.append((piece, memory))
                self.unsent_bytes += len(piece)
            if not waited:
                self.flush()
            return
        sent = 0
        try:
            sent = self._socket.sendmsg([piece for piece, _ in pieces])
            self.sent_bytes += sent
        except BlockingIOError:
            pass
        except OSError:
            self._pieces.extend(pieces)  # the memory goes with the connection
            raise
        for piece, memory in pieces:
            length = len(piece)
            if sent >= length:
                sent -= length
                if memory is not None:
                    memory.release()
            else:
                self._pieces.append((memoryview(piece)[sent:], memory))
                self.unsent_bytes += length - sent
                sent = 0

    def send_parts(self, parts: list[memoryview], memory: Buffer) -> None:
        """Send views of ``memory``, which has one user for all of them."""
        sent, at = 0, 0
        if not self._pieces:
            try:
                sent = self._socket.sendmsg(parts[:PIECES_PER_SEND_MAX])
            except BlockingIOError:
                pass
            except OSError:
                memory.release()
                raise
            self.sent_bytes += sent
            if sent == sum(map(len, parts)):
                memory.release()
                return
            while sent >= len(parts[at]):
                sent -= len(parts[at])
                at += 1
        left: list[Any] = parts[at:]
        left[0] = left[0][sent:]
        self._pieces.extend((part, None) for part in left[:-1])
        self._pieces.append((left[-1], memory))
        self.unsent_bytes += sum(map(len, left))

    def send_mapped(
        self,
        heads: memoryview,
        head_size: int,
        reads: list[Request],
        file: File,
        offsets: list[int],
        total: int,
        hold: Callable[[], Callable[[], object] | None],
    ) -> None:
        """Send headers from ``heads`` and data that the requests' buffers show in the page cache, ``total`` bytes; in
        the file they are at ``offsets``. What the socket does not take now is kept there by ``hold()``."""
        pieces, sent = self._pieces, 0
        if not pieces:
            buffers: list[Any] = []
            add = buffers.append
            position = 0
            for request in reads:
                add(heads[position : position + head_size])
                add(request.buffer)
                position += head_size
            try:
                sent = self._socket.sendmsg(buffers)
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
            self.sent_bytes += sent
            if sent == total:
                return
        self.unsent_bytes += total - sent
        position, part = 0, None
        for request, offset in zip(reads, offsets, strict=True):
            whole = head_size + request.length
            if sent >= whole:
                sent -= whole
            else:
                if sent < head_size:
                    pieces.append((memoryview(bytes(heads[position + sent : position + head_size])), None))
                part = _Mapped(file, offset + request.length)
                pieces.append((request.buffer[max(sent - head_size, 0) :], part))
                sent = 0
            position += head_size
        assert part is not None
        part.done = hold()

    def send_file(self, header: bytes, file: File, offset: int, count: int) -> None:
        """Send a reply header and ``count`` bytes of a file."""
        if not self._pieces:
            try:
                sent = self._socket.send_more(header)
            except BlockingIOError:
                sent = 0
            self.sent_bytes += sent
            header = header[sent:]
        if header:
            self._pieces.append((memoryview(header), None))
        self._pieces.append((_FileRange(file, offset, count), None))
        self.unsent_bytes += len(header) + count
        if not header and len(self._pieces) == 1:
            self.flush()

    def flush(self) -> bool:
        """Send as much as the socket takes; whether everything is out. OSError if the client is gone,
        FileEnded if a promised range is not there any more."""
        pieces = self._pieces
        try:
            while pieces:
                if isinstance(pieces[0][0], _FileRange):
                    self._flush_file(pieces[0][0])
                else:
                    self._flush_memory()
        except BlockingIOError:
            return False
        return True

    def _flush_file(self, part: _FileRange) -> None:
        sent = self._socket.send_file(part.file, part.offset, part.count)
        if sent == 0:
            raise FileEnded(f"{part.file.path} became shorter while it was being sent")
        part.offset += sent
        part.count -= sent
        self.unsent_bytes -= sent
        self.sent_bytes += sent
        if part.count == 0:
            self._pieces.popleft()

    def _flush_memory(self) -> None:
        pieces = self._pieces
        buffers: list[Any] = []
        for piece, _ in pieces:
            if isinstance(piece, _FileRange) or len(buffers) == PIECES_PER_SEND_MAX:
                break
            buffers.append(piece)
        try:
            sent = self._socket.sendmsg(buffers) if len(buffers) > 1 else self._socket.send(buffers[0])
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            self._copy_mapped()
            return
        self.unsent_bytes -= sent
        self.sent_bytes += sent
        while sent:
            piece, memory = pieces[0]
            if sent < len(piece):
                pieces[0] = (memoryview(piece)[sent:], memory)
                return
            sent -= len(piece)
            pieces.popleft()
            if memory is not None:
                memory.release()

    def keep_file_bytes(self, read: Callable[[File, int, int], memoryview]) -> None:
        """Replace ranges of files by their bytes: whoever drains the disk must not wait for a slow client."""
        self._copy_mapped()
        self._pieces = deque(
            (read(piece.file, piece.offset, piece.count), memory)
            if isinstance(piece, _FileRange)
            else (piece, memory)
            for piece, memory in self._pieces
        )

    def _copy_mapped(self) -> None:
        """Replace views of the page cache by copies."""
        copied: deque[tuple[Any, Buffer | _Mapped | None]] = deque()
        for view, memory in self._pieces:
            if isinstance(memory, _Mapped):
                copied.append((memory.copy(view), None))
                memory.release()
            else:
                copied.append((view, memory))
        self._pieces = copied

    def drop(self) -> None:
        """Forget everything: the client is gone."""
        for _, memory in self._pieces:
            if memory is not None:
                memory.release()
        self._pieces.clear()
        self.unsent_bytes = 0
