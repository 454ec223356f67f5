# SPDX-License-Identifier: Apache-2.0
"""Paths: where we are, what is there, where a user's sockets belong."""

from __future__ import annotations

import os
from typing import Final

SOCKETS_TRIED_MAX: Final = 100

absolute = os.path.abspath


def is_same(one: str, other: str) -> bool:
    """Whether two paths lead to the same file, or would if there was one."""
    if "\0" in one + other:  # a name that no file can have
        return False
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


def free_socket_path(stem: str) -> str:
    """A path for a new socket that nothing has yet: in the user's own run-time directory if there is one
    (XDG_RUNTIME_DIR), else where temporary files go."""
    folder = os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("TMPDIR") or "/tmp"
    for number in range(SOCKETS_TRIED_MAX):
        path = os.path.join(folder, f"{stem}{f'-{number}' if number else ''}.sock")
        if not os.path.lexists(path):
            return path
    return os.path.join(folder, f"{stem}-{os.getpid()}.sock")


def terminal_columns(fd: int) -> int:
    """Width of the terminal, 80 if it does not say."""
    try:
        return os.get_terminal_size(fd).columns or 80
    except OSError:
        return 80
