# SPDX-License-Identifier: Apache-2.0
"""What a person asks about work in the background, and about what has been read and written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from bottomhalf.block.written import written_ends
from bottomhalf.drivers.describe import in_order_of_opening
from bottomhalf.host.request import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES
from bottomhalf.jobs.job import Job
from bottomhalf.monitor.hmp_table import Arg, Entry, Output
from bottomhalf.monitor.job_commands import query_block_jobs

if TYPE_CHECKING:
    from bottomhalf.monitor.storage import Storage


def info_jobs(storage: Storage, given: dict[str, Any], out: Output) -> None:
    """info jobs: all of them. (QEMU's monitor knows those alone that work on a node.)"""
    jobs = storage.jobs.infos()
    for job in jobs:
        out.line(f"{job.id}: {job.type}, {job.status}, {job.current_progress} of {job.total_progress}")
        if job.error is not None:
            out.line(f"    {job.error}")
    if not jobs:
        out.line("No jobs")


def info_block_jobs(storage: Storage, given: dict[str, Any], out: Output) -> None:
    """info block-jobs, in QEMU's words."""
    jobs = query_block_jobs(storage, None)
    for job in jobs:
        what = "Streaming device" if job.type == "stream" else f"Type {job.type}, device"
        out.line(
            f"{what} {job.device}: Completed {job.offset} of {job.len} bytes, speed limit {job.speed} bytes/s"
        )
    if not jobs:
        out.line("No active jobs")


def info_blockstats(storage: Storage, given: dict[str, Any], out: Output) -> None:
    """info blockstats: what exports have done, by the names of query-blockstats, and how far nodes were written.
    (QEMU's monitor tells it of devices, of which there are none.)"""
    for export_id, export in storage.exports.exports.items():
        numbers = export.backend.statistics()
        operations, sizes = numbers.operations, numbers.bytes
        out.line(
            f"{export_id}: rd_bytes={sizes[READ]} wr_bytes={sizes[WRITE] + sizes[WRITE_ZEROES]} "
            f"unmap_bytes={sizes[DISCARD]} rd_operations={operations[READ]} "
            f"wr_operations={operations[WRITE] + operations[WRITE_ZEROES]} flush_operations={operations[FLUSH]} "
            f"unmap_operations={operations[DISCARD]} failed_operations={numbers.failed}"
        )
    ends = written_ends(storage.graph)
    for node in in_order_of_opening(storage.graph):
        out.line(f"{node.name}: wr_highest_offset={ends.get(node, 0)}")


def _verb(name: str) -> Any:
    def run(storage: Storage, given: dict[str, Any], out: Output) -> None:
        getattr(storage.jobs.get(given["id"]), name)()

    return run


def _ids(storage: Storage) -> list[str]:
    return [job.id for job in storage.jobs.infos()]


_ID: Final = Arg("id")
COMMANDS: Final = [
    Entry("job_pause", (_ID,), _verb(Job.user_pause.__name__), "let a job rest", _ids),
    Entry("job_resume", (_ID,), _verb(Job.user_resume.__name__), "let a job go on", _ids),
    Entry("job_cancel", (_ID,), _verb(Job.user_cancel.__name__), "end a job without its result", _ids),
    Entry("job_complete", (_ID,), _verb(Job.user_complete.__name__), "let a job that is ready do its last step", _ids),
    Entry("job_finalize", (_ID,), _verb(Job.user_finalize.__name__), "carry out what a job has prepared", _ids),
    Entry("job_dismiss", (_ID,), _verb(Job.user_dismiss.__name__), "forget a job that has ended", _ids),
]

INFO: Final = [
    Entry("jobs", (), info_jobs, "show the jobs"),
    Entry("block-jobs", (), info_block_jobs, "show the jobs that work on block nodes"),
    Entry("blockstats", (), info_blockstats, "show what exports have done, and how far nodes were written"),
]
