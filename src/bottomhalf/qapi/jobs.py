# SPDX-License-Identifier: Apache-2.0
"""Work in the background (qapi/job.json, and what qapi/block-core.json says of jobs in general)."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from bottomhalf.qapi.block_graph import BlockDeviceIoStatus
from bottomhalf.qapi.types import Command, Doc, EventType, Struct, TaggedUnion


class JobType(StrEnum):
    """Kinds of jobs."""

    COMMIT = "commit"
    STREAM = "stream"
    MIRROR = "mirror"
    BACKUP = "backup"
    CREATE = "create"
    AMEND = "amend"
    SNAPSHOT_LOAD = "snapshot-load"
    SNAPSHOT_SAVE = "snapshot-save"
    SNAPSHOT_DELETE = "snapshot-delete"


class JobStatus(StrEnum):
    """Where a job stands."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class JobVerb(StrEnum):
    """What a user may ask of a job. (No client sees it; it is in the texts of errors.)"""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    DISMISS = "dismiss"
    FINALIZE = "finalize"
    CHANGE = "change"


class JobStatusChange(EventType, name="JOB_STATUS_CHANGE"):
    """A job stands somewhere else."""

    id: Annotated[str, Doc("the job's id")]
    status: Annotated[JobStatus, Doc("where it stands now")]


class JobPause(Command, name="job-pause"):
    """Let a job rest at the next point where it can."""

    id: Annotated[str, Doc("the job's id")]


class JobResume(Command, name="job-resume"):
    """Let a job go on that a user has paused."""

    id: Annotated[str, Doc("the job's id")]


class JobCancel(Command, name="job-cancel"):
    """End a job at the next point where it can end, without what it was to achieve."""

    id: Annotated[str, Doc("the job's id")]


class JobComplete(Command, name="job-complete"):
    """Let a job that is ready do its last step."""

    id: Annotated[str, Doc("the job's id")]


class JobDismiss(Command, name="job-dismiss"):
    """Forget a job that has ended."""

    id: Annotated[str, Doc("the job's id")]


class JobFinalize(Command, name="job-finalize"):
    """Carry out what a job with auto-finalize=off has prepared, with all jobs of its transaction."""

    id: Annotated[str, Doc("the job's id")]


class JobInfo(Struct):
    """A job."""

    id: Annotated[str, Doc("the job's id")]
    type: Annotated[JobType, Doc("what it does")]
    status: Annotated[JobStatus, Doc("where it stands")]
    current_progress: Annotated[int, Doc("how much is done, in units of the job's own")]
    total_progress: Annotated[int, Doc("how much it is in all, as far as is known")]
    error: Annotated[str | None, Doc("why it failed")] = None


class QueryJobs(Command, name="query-jobs", returns=list[JobInfo]):
    """List jobs, the newest first."""


class BlockJobInfoMirror(Struct):
    """A job that mirrors."""

    actively_synced: Annotated[bool, Doc("both sides have the same content, and writes go to both")]


class BlockJobInfo(TaggedUnion, tag="type", branches={"mirror": BlockJobInfoMirror}):
    """A job that works on a node."""

    type: Annotated[JobType, Doc("what it does")]
    device: Annotated[str, Doc("the job's id")]
    len: Annotated[int, Doc("bytes in all, as far as is known")]
    offset: Annotated[int, Doc("bytes that are done")]
    busy: Annotated[bool, Doc("it is at work at this moment")]
    paused: Annotated[bool, Doc("it rests, or is about to")]
    speed: Annotated[int, Doc("bytes a second at most; 0 is no limit")]
    io_status: Annotated[BlockDeviceIoStatus, Doc("how its requests fare")]
    ready: Annotated[bool, Doc("it may be completed")]
    status: Annotated[JobStatus, Doc("where it stands")]
    auto_finalize: Annotated[bool, Doc("it carries out by itself what it has prepared")]
    auto_dismiss: Annotated[bool, Doc("it is forgotten when it has ended")]
    error: Annotated[str | None, Doc("why it failed")] = None


class QueryBlockJobs(Command, name="query-block-jobs", returns=list[BlockJobInfo]):
    """List jobs that work on a node: those that copy."""


class BlockJobReady(EventType, name="BLOCK_JOB_READY"):
    """A job that works on a node may be completed."""

    type: Annotated[JobType, Doc("what it does")]
    device: Annotated[str, Doc("the job's id")]
    len: Annotated[int, Doc("bytes in all, as far as is known")]
    offset: Annotated[int, Doc("bytes that are done")]
    speed: Annotated[int, Doc("bytes a second at most; 0 is no limit")]


class BlockJobPending(EventType, name="BLOCK_JOB_PENDING"):
    """A job with auto-finalize=off waits for job-finalize."""

    type: Annotated[JobType, Doc("what it does")]
    id: Annotated[str, Doc("the job's id")]


class BlockJobCompleted(EventType, name="BLOCK_JOB_COMPLETED"):
    """A job that works on a node has ended, well or not."""

    type: Annotated[JobType, Doc("what it does")]
    device: Annotated[str, Doc("the job's id")]
    len: Annotated[int, Doc("bytes in all")]
    offset: Annotated[int, Doc("bytes that are done")]
    speed: Annotated[int, Doc("bytes a second at most; 0 is no limit")]
    error: Annotated[str | None, Doc("why it failed")] = None


class BlockJobCancelled(EventType, name="BLOCK_JOB_CANCELLED"):
    """A job that works on a node was cancelled."""

    type: Annotated[JobType, Doc("what it does")]
    device: Annotated[str, Doc("the job's id")]
    len: Annotated[int, Doc("bytes in all")]
    offset: Annotated[int, Doc("bytes that are done")]
    speed: Annotated[int, Doc("bytes a second at most; 0 is no limit")]


class BlockErrorAction(StrEnum):
    """What was done about an error."""

    IGNORE = "ignore"
    REPORT = "report"
    STOP = "stop"


class IoOperationType(StrEnum):
    """What failed."""

    READ = "read"
    WRITE = "write"


class BlockJobError(EventType, name="BLOCK_JOB_ERROR"):
    """A request of a job has failed."""

    device: Annotated[str, Doc("the job's id")]
    operation: Annotated[IoOperationType, Doc("what failed")]
    action: Annotated[BlockErrorAction, Doc("what was done about it; stop: the job is paused")]
