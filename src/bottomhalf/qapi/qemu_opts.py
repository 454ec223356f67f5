# SPDX-License-Identifier: Apache-2.0
"""The older option form that ``--chardev`` takes: flat ``key=value`` pairs from a fixed list.

It looks like ``keyval`` and differs in what users can see: keys are flat and have no dots to split at, the
value of the implied key may contain a doubled comma, and a word without ``=`` is a boolean (``server`` is
``server=on``, ``nowait`` is ``wait=off``), which is deprecated and warned about. If a key is given twice the
last one counts.

    parse_qemu_opts("socket,id=m,path=/tmp/s,server=on,wait=off", implied_key="backend")
    # .values == {"backend": "socket", "id": "m", "path": "/tmp/s", "server": "on", "wait": "off"}
"""

from __future__ import annotations

import re
from typing import Final

from bottomhalf.qapi.errors import OptionError
from bottomhalf.qapi.keyval import COUNT_MAX, HELP_WORDS, TEXT_LENGTH_MAX

_NAME_END: Final = re.compile(r"[=,]|\Z")
_VALUE: Final = re.compile(r"[^,]*(?:,,[^,]*)*")
_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")
ID_HINT: Final = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."


class QemuOpts:
    """What an option said: ``values`` (all strings), ``warnings`` to print, whether ``help`` is wanted."""

    __slots__ = ("help", "values", "warnings")

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.warnings: list[str] = []
        self.help = False


def id_wellformed(id: str) -> bool:
    """Whether a user may give this name to something."""
    return _ID.match(id) is not None


def parse_qemu_opts(text: str, implied_key: str | None = None) -> QemuOpts:
    """Split ``text``. Raises OptionError only for the limits and for an ``id`` that is no identifier."""
    if len(text) > TEXT_LENGTH_MAX:
        raise OptionError("Option is too long", hint=f"At most {TEXT_LENGTH_MAX} characters are allowed.")
    opts = QemuOpts()
    position = count = 0
    while position < len(text):
        count += 1
        if count > COUNT_MAX:
            raise OptionError("Option has too many parameters", hint=f"At most {COUNT_MAX} are allowed.")
        found = _NAME_END.search(text, position)
        assert found is not None
        name = text[position : found.start()]
        if found.group() == "=" or (count == 1 and implied_key):
            start = found.start() + 1
            if found.group() != "=":
                assert implied_key is not None
                name, start = implied_key, position
            matched = _VALUE.match(text, start)
            assert matched is not None
            value = matched.group().replace(",,", ",")
            position = matched.end() + 1
        else:
            position = found.start() + 1
            if name in HELP_WORDS:
                opts.help = True
                continue
            given, value = name, "on"
            if name.startswith("no"):
                name, value = name[2:], "off"
            replacement = f"{name}={value}"
            if name == "delay":
                replacement = f"nodelay={'on' if value == 'off' else 'off'}"
            opts.warnings.append(
                f"short-form boolean option '{given}' deprecated\nPlease use {replacement} instead"
            )
        if name == implied_key and value in HELP_WORDS:
            opts.help = True
            continue
        opts.values[name] = value
    id = opts.values.get("id")
    if id is not None and not id_wellformed(id):
        raise OptionError("Parameter 'id' expects an identifier", key="id", hint=ID_HINT)
    return opts
