# SPDX-License-Identifier: Apache-2.0
"""There is one door: what a program cannot compute by itself enters through ``bottomhalf.host``.

Above it nobody reads a clock, waits, touches a file, a socket, a thread, a process, a signal or a random
number. From this come record and replay, and deterministic tests; one call that goes round the door breaks
both.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

from tests.style.imports import Problem, Source, aliases, dotted, imports, sources

# Modules that reach outside by themselves.
_MODULES = """
    _socket _ssl _thread asyncio concurrent ctypes fcntl ftplib getpass glob http mmap multiprocessing poplib posix
    pty queue random resource sched secrets select selectors shutil signal smtplib socket socketserver
    ssl subprocess syslog tempfile termios threading time tty urllib.request xmlrpc
"""
MODULES: Final = frozenset(_MODULES.split())

# Names in modules that are otherwise harmless.
_OS = """
    _exit abort access chdir chmod chown close close_range closerange copy_file_range cpu_count ctermid dup
    dup2 eventfd eventfd_read eventfd_write execl execle execlp execlpe execv execve execvp execvpe fchmod
    fchown fdatasync fdopen fork forkpty fstat fstatvfs fsync ftruncate getcwd getloadavg getrandom getxattr
    ioctl isatty kill killpg lchown link listdir listxattr lockf lseek lstat makedirs memfd_create mkdir
    mkfifo mknod nice open openpty pidfd_open pipe pipe2 popen posix_fadvise posix_fallocate posix_spawn
    posix_spawnp pread preadv pwrite pwritev read readlink readv register_at_fork remove removedirs
    removexattr rename renames replace rmdir scandir sched_getaffinity sched_setaffinity sched_yield sendfile
    set_blocking setsid setxattr splice stat statvfs symlink sync system tcsetpgrp times truncate umask uname
    unlink urandom utime wait wait3 wait4 waitid waitpid walk write writev
"""
_OS_PATH = (
    "abspath exists getatime getctime getmtime getsize isdir isfile islink ismount lexists realpath samefile"
)
_OTHERS = """
    open input pathlib.Path pathlib.PosixPath io.open io.FileIO io.open_code uuid.uuid1 uuid.uuid4
    uuid.getnode datetime.datetime.now datetime.datetime.utcnow datetime.datetime.today datetime.date.today
"""
NAMES: Final = frozenset(
    [
        *(f"os.{name}" for name in _OS.split()),
        *(f"os.path.{name}" for name in _OS_PATH.split()),
        *_OTHERS.split(),
    ]
)

# Bridges to other worlds: file below the package, and what it may import because bridging is its purpose.
BRIDGES: Final = {
    "aio/asyncio_bridge.py": {"asyncio"},
    "aio/asyncio_loop.py": {"asyncio", "selectors"},
    "aio/asyncio_thread.py": {"asyncio"},
    "library.py": {"asyncio", "threading"},
    "tls/contexts.py": {"ssl"},  # OpenSSL, over memory: it is given bytes and asked for bytes
    "tls/session.py": {"ssl"},
    "tools/console.py": {"asyncio"},  # prompt_toolkit lives there; the loop is one of ours, AioEventLoop
    "tools/console_link.py": {"asyncio"},
    "tools/console_terminal.py": {"asyncio"},
}


def check_door(root: Path) -> list[Problem]:
    """Return every place in the package at ``root``, outside ``host``, that reaches the world by itself."""
    problems = []
    for source in sources(root):
        if source.path.startswith("host/"):
            continue
        allowed = BRIDGES.get(source.path, set())
        for found in imports(source):
            module = _forbidden_module(found.name)
            if module and module not in allowed:
                text = f"imports {module}: that enters through the host"
                problems.append(Problem(source.path, found.line, text))
        problems.extend(_forbidden_names(source))
    return problems


def _forbidden_module(name: str) -> str | None:
    parts = name.split(".")
    return next((p for n in (1, 2) if (p := ".".join(parts[:n])) in MODULES), None)


def _forbidden_names(source: Source) -> list[Problem]:
    bound = aliases(source)
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    own = {node.name for node in source.tree.body if isinstance(node, definitions)}
    problems = []
    seen: set[tuple[int, str]] = set()

    def report(line: int, name: str) -> None:
        if (line, name) not in seen:
            seen.add((line, name))
            problems.append(Problem(source.path, line, f"uses {name}: that enters through the host"))

    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                if f"{node.module}.{alias.name}" in NAMES:
                    report(node.lineno, f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            name = dotted(node)
            if name is None:
                continue
            first, _, rest = name.partition(".")
            if first in own:
                continue
            if first in bound:
                name = bound[first] + ("." + rest if rest else "")
            elif rest:
                continue  # an attribute of an object, not of a module
            if name in NAMES:
                report(node.lineno, name)
    return problems
