# SPDX-License-Identifier: Apache-2.0
"""bottomhalf doctor [PATH]: what this machine allows, what was chosen because of it, and what that costs.

Most of what bottomhalf uses can be refused: by a sysctl, a container's seccomp profile, a limit, an old kernel, the
permissions of a device node. It works all the same, more slowly, and says nothing. Here it says it: everything is
tried (``host.linux.probe``), and a refusal comes with its likely cause. ``--json`` prints the same for programs.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from bottomhalf.tools.getopt import Option, UsageError, fail, parse

if TYPE_CHECKING:
    from bottomhalf.host.linux.probe import FileReport, Finding

PROGRAM: Final = "bottomhalf doctor"
OPTIONS: Final = (Option("help", "h"), Option("json", "j"))
MEASURED_HALVES: Final = 10_000

HELP: Final = """\
Usage: bottomhalf doctor [options] [PATH]
Say what this machine allows, what is used because of it, and what that costs.

  -j, --json    the same as JSON
  -h, --help    display this help and exit

With the PATH of an image or a block device it says what can be done with that too, and reads from it to measure.
"""

# What a limit is called, and the kernel's own name for it.
LIMITS: Final = {
    "open-files": "open files (RLIMIT_NOFILE)",
    "open-files-max": "open files at most (hard limit)",
    "locked-bytes": "locked memory (RLIMIT_MEMLOCK)",
    "locked-bytes-max": "locked memory at most (hard limit)",
    "aio-max-nr": "linux-aio requests (fs.aio-max-nr)",
    "aio-nr": "linux-aio requests taken (fs.aio-nr)",
    "io-uring-disabled": "kernel.io_uring_disabled",
}
OPEN_FILES_FEW: Final = 1024  # a daemon with a thousand clients needs more


def main(arguments: list[str]) -> int:
    """Print the report; the exit status."""
    as_json = False
    paths = []
    try:
        for name, value, _ in parse(arguments, OPTIONS):
            if name == "help":
                print(HELP, end="")
                return 0
            if name == "json":
                as_json = True
            else:
                paths.append(value)
        if len(paths) > 1:
            raise UsageError("give one path")
    except UsageError as error:
        fail(PROGRAM, str(error), error.hint or "Try 'bottomhalf doctor --help' for more information.")
    try:
        report = examine(paths[0] if paths else None)
    except OSError as error:
        fail(PROGRAM, f"{error.filename or paths[0]}: {error.strerror}")
    if as_json:
        import json

        print(json.dumps(report, indent=2))
    else:
        print(as_text(report), end="")
    return 0


def examine(path: str | None) -> dict[str, Any]:
    """Everything, as JSON's types. OSError if ``path`` cannot be looked at."""
    from bottomhalf import __version__
    from bottomhalf.host.linux import probe

    file = probe.file_report(path) if path is not None else None
    report: dict[str, Any] = {
        "version": __version__,
        "machine": probe.machine(),
        "limits": probe.limits(),
        "engines": {"chosen": probe.chosen_engine(), "kinds": _findings(probe.engines(path))},
        "ring": _findings([probe.ring_operations()]),
        "pollers": {"chosen": probe.chosen_poller(), "kinds": _findings(probe.pollers())},
        "locks": _findings([probe.image_locks()]),
        "devices": _findings(probe.devices()),
        "bottom-half-ns": _bottom_half_ns(),
    }
    if file is not None:
        report["file"] = _file(file)
    report["advice"] = advice(report)
    return report


def _findings(found: list[Finding]) -> list[dict[str, Any]]:
    return [{name: value for name, value in asdict(one).items() if value not in (None, "")} for one in found]


def _file(report: FileReport) -> dict[str, Any]:
    return {
        "path": report.path,
        "file-system": report.file_system,
        "size": report.size,
        "allocated": report.allocated,
        "direct-alignment": report.direct_alignment,
        "direct-memory-alignment": report.direct_memory_alignment,
        "direct-by": report.direct_by,
        "abilities": _findings(report.findings),
    }


def _bottom_half_ns() -> float:
    """What it costs to schedule a bottom half and to run it."""
    from bottomhalf.aio import AioContext

    context = AioContext(name="doctor")
    halves = [context.bottom_half(_nothing) for _ in range(MEASURED_HALVES)]
    started_ns = context.now_ns()
    for half in halves:
        half.schedule()
    context.poll(False)
    taken_ns = context.now_ns() - started_ns
    context.close()
    return taken_ns / MEASURED_HALVES


def _nothing() -> None:
    pass


def advice(report: dict[str, Any]) -> list[str]:
    """What is worth changing here."""
    lines = []
    kinds = {one["name"]: one for one in report["engines"]["kinds"]}
    if not kinds["io_uring"]["works"]:
        lines.append(
            f"io_uring is refused ({kinds['io_uring'].get('cause', 'unknown')}): requests that are not in memory go "
            f"to {report['engines']['chosen']} instead, at a multiple of the cost"
        )
    if report["pollers"]["chosen"] != "epoll":
        lines.append("epoll is refused: a loop with many descriptors is slow")
    files = report["limits"]["open-files"]
    if 0 <= files <= OPEN_FILES_FEW:
        lines.append(f"at most {files} files may be open: enough for some hundreds of clients (ulimit -n)")
    if not report["locks"][0]["works"]:
        lines.append("image locks do not work: nothing keeps two programs from writing the same image")
    return lines


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"bottomhalf {report['version']}", "", "machine"]
    lines += [_row(name, str(value)) for name, value in report["machine"].items()]
    lines += ["", "limits"]
    for name, value in report["limits"].items():
        lines.append(_row(LIMITS[name], "not known here" if value is None else "none" if value < 0 else str(value)))
    for title, section in (("engines, for files", "engines"), ("pollers, for descriptors", "pollers")):
        lines += ["", f"{title}: {report[section]['chosen']} is used"]
        lines += map(_finding, report[section]["kinds"])
        if section == "engines":
            lines += map(_finding, report["ring"])
    lines += ["", "image locks", *map(_finding, report["locks"]), "", "devices", *map(_finding, report["devices"])]
    if "file" in report:
        lines += _file_text(report["file"])
    lines += ["", f"a bottom half costs {report['bottom-half-ns']:.0f} ns to schedule and run"]
    if report["advice"]:
        lines += ["", "advice", *(f"  {line}" for line in report["advice"])]
    return "\n".join(lines) + "\n"


def _file_text(file: dict[str, Any]) -> list[str]:
    from bottomhalf.tools.units import binary_size

    if file["direct-alignment"] is None:
        direct = file["direct-by"]
    else:
        direct = (
            f"offsets by {file['direct-alignment']}, memory by {file['direct-memory-alignment']} bytes "
            f"(by {file['direct-by']})"
        )
    size = f"{file['size']} bytes ({binary_size(file['size'])}), {binary_size(file['allocated'])} allocated"
    rows = [_row("file system", file["file-system"]), _row("size", size), _row("O_DIRECT", direct)]
    return ["", file["path"], *rows, *map(_finding, file["abilities"])]


def _finding(one: dict[str, Any]) -> str:
    if one["works"]:
        text = "works"
        if "nanoseconds" in one:
            text += f", {one['nanoseconds'] / 1000:.2f} us per {one['per']}"
        elif "detail" in one:
            text += f": {one['detail']}"
    else:
        text = f"no: {one.get('detail', '')}"
        if "errno" in one:
            text += f" ({one['errno']})"
        if "cause" in one:
            text += f"; likely cause: {one['cause']}"
    return _row(one["name"], text)


def _row(name: str, value: str) -> str:
    return f"  {name:36} {value}"
