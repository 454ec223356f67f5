# SPDX-License-Identifier: Apache-2.0
"""Sparse bytes: the content of a simulated file, page by page.

A disk image is mostly holes, and what is a hole matters to the block layer above. Therefore content is a dict
of pages. A page is absent (a hole), ``None`` (allocated but never written, as fallocate leaves it: it takes
space and reads as zeroes) or a bytearray (data, even where it is all zeroes). Bytes beyond ``size`` in the
last page are always zero, so that growing a file shows zeroes.
"""

from __future__ import annotations

from typing import Any, Final

PAGE: Final = 4096
_ZEROES: Final = bytes(PAGE)


class Store:
    """Pages and a size."""

    __slots__ = ("pages", "size")

    def __init__(self, size: int = 0) -> None:
        self.pages: dict[int, bytearray | None] = {}
        self.size = size

    def copy(self) -> Store:
        copied = Store(self.size)
        copied.pages = {i: None if page is None else bytearray(page) for i, page in self.pages.items()}
        return copied

    def content(self) -> bytes:
        """Everything, holes as zeroes."""
        return self.read(0, self.size)

    def read(self, offset: int, length: int) -> bytes:
        content = bytearray(length)
        self.read_into(offset, memoryview(content))
        return bytes(content)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the view from ``offset``; zeroes beyond the end."""
        position, length = 0, len(view)
        while position < length:
            index, start = divmod(offset + position, PAGE)
            count = min(PAGE - start, length - position)
            page = self.pages.get(index)
            part = _ZEROES[:count] if page is None else page[start : start + count]
            view[position : position + count] = part
            position += count

    def write(self, offset: int, data: Any) -> None:
        """Write, growing the file where needed."""
        view = memoryview(data).cast("B")
        position, length = 0, len(view)
        while position < length:
            index, start = divmod(offset + position, PAGE)
            count = min(PAGE - start, length - position)
            page = self.pages.get(index)
            if page is None:
                page = self.pages[index] = bytearray(PAGE)
            page[start : start + count] = view[position : position + count]
            position += count
        if length:
            self.size = max(self.size, offset + length)

    def zero(self, offset: int, length: int, *, unmap: bool, grow: bool) -> None:
        """Make the range read as zeroes: whole pages become holes (``unmap``) or allocated and unwritten,
        pages touched in part are overwritten in part. ``grow`` lets the range end beyond the end of the
        file."""
        end = offset + length
        if grow and length:
            self.size = max(self.size, end)
        end = min(end, self.size)
        if offset >= end:
            return
        first = -(-offset // PAGE)  # of the whole pages; the last page of the file is whole without its tail
        stop = -(-end // PAGE) if end == self.size else end // PAGE
        if first >= stop:
            self._zero_part(offset, end, unmap)
            return
        self._zero_part(offset, first * PAGE, unmap)
        if unmap:
            for index in self._present(first, stop):
                del self.pages[index]
        else:
            self.pages.update(dict.fromkeys(range(first, stop)))
        self._zero_part(stop * PAGE, end, unmap)

    def _zero_part(self, offset: int, end: int, unmap: bool) -> None:
        while offset < end:
            index, start = divmod(offset, PAGE)
            count = min(PAGE - start, end - offset)
            page = self.pages.get(index)
            if page is not None:
                page[start : start + count] = _ZEROES[:count]
            elif not unmap:
                self.pages[index] = None
            offset += count

    def resize(self, size: int) -> None:
        if size < self.size:
            last, start = divmod(size, PAGE)
            for index in [index for index in self.pages if index > last or (index == last and start == 0)]:
                del self.pages[index]
            page = self.pages.get(last)
            if page is not None:
                page[start:] = _ZEROES[start:]
        self.size = size

    def extent(self, offset: int, length: int) -> tuple[bool, int]:
        """Whether the bytes from ``offset`` are data, and for how many of ``length`` that goes on."""
        end = min(offset + length, self.size)
        if offset >= end:
            return False, length
        first, last = offset // PAGE, (end - 1) // PAGE
        if self.pages.get(first) is None:
            data = min((i for i in self._present(first, last + 1) if self.pages[i] is not None), default=None)
            return False, length if data is None else data * PAGE - offset
        index = first + 1
        while index <= last and self.pages.get(index) is not None:
            index += 1
        return True, min(index * PAGE, end) - offset

    def missing(self, offset: int, length: int) -> list[int]:
        """Pages of the range that take no space yet."""
        if length <= 0:
            return []
        return [i for i in range(offset // PAGE, (offset + length - 1) // PAGE + 1) if i not in self.pages]

    def _present(self, first: int, stop: int) -> list[int]:
        """Pages from ``first`` to before ``stop`` that take space, by the shorter of the two ways."""
        if stop - first < len(self.pages):
            return [index for index in range(first, stop) if index in self.pages]
        return [index for index in self.pages if first <= index < stop]
