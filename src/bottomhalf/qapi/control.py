# SPDX-License-Identifier: Apache-2.0
"""The monitor itself (qapi/control.json, qapi/misc.json): negotiation, version, commands, quit."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from bottomhalf.qapi.types import Command, Doc, Struct


class QMPCapability(StrEnum):
    """Extensions of the protocol that a client may enable."""

    OOB = "oob"


class QmpCapabilities(Command, name="qmp_capabilities"):
    """Leave the negotiation mode in which a monitor starts.

    Until then no other command is accepted and no events are sent.
    """

    enable: Annotated[list[QMPCapability] | None, Doc("capabilities to enable", default="none")] = None


class VersionTriple(Struct):
    """A version number."""

    major: Annotated[int, Doc("major version")]
    minor: Annotated[int, Doc("minor version")]
    micro: Annotated[int, Doc("micro version")]


class VersionInfo(Struct):
    """Versions."""

    qemu: Annotated[VersionTriple, Doc("version of QEMU whose interface this is")]
    package: Annotated[str, Doc("version of the software that speaks")]


class QueryVersion(Command, name="query-version", returns=VersionInfo):
    """Tell the version."""


class CommandInfo(Struct):
    """A command."""

    name: Annotated[str, Doc("its name")]


class QueryCommands(Command, name="query-commands", returns=list[CommandInfo]):
    """List the commands."""


class Quit(Command, name="quit"):
    """Answer, then shut everything down in order and exit with status 0."""


class HumanMonitorCommand(Command, name="human-monitor-command", returns=str, features=("savevm-monitor-nodes",)):
    """Run a command of the monitor for people, and return what it prints.

    People's output changes from version to version: programs should use the command that returns data.
    """

    command_line: Annotated[str, Doc("the command with its arguments")]
    cpu_index: Annotated[int | None, Doc("has no effect here: there are no processors")] = None


class XExplain(Command, name="x-explain", returns=str, allow_oob=True, features=("unstable",)):
    """Tell who waits for whom, a line each.

    Out of band it answers while a command hangs, which is when one wants to know.
    """


class MonitorMode(StrEnum):
    """What a monitor speaks."""

    READLINE = "readline"
    CONTROL = "control"


class MonitorOptions(Struct):
    """Options of a monitor (--monitor)."""

    id: Annotated[str | None, Doc("the monitor's id")] = None
    mode: Annotated[
        MonitorMode | None,
        Doc("readline for people, control for QMP", default="control in the storage daemon"),
    ] = None
    pretty: Annotated[bool, Doc("indent what QMP sends")] = False
    chardev: Annotated[str, Doc("character device to speak on")]
