# SPDX-License-Identifier: Apache-2.0
"""Where a job may stand, where it may go from there, and what users may ask of it there.

The tables are QEMU's interface: programs wait for these words, in this order. docs/jobs.md draws them.
"""

from __future__ import annotations

from typing import Final

from bottomhalf.qapi.jobs import JobStatus, JobVerb

_S = JobStatus

TRANSITIONS: Final[dict[JobStatus, frozenset[JobStatus]]] = {
    _S.UNDEFINED: frozenset({_S.CREATED}),
    _S.CREATED: frozenset({_S.RUNNING, _S.ABORTING, _S.NULL}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING}),
    _S.PAUSED: frozenset({_S.RUNNING}),
    _S.READY: frozenset({_S.STANDBY, _S.WAITING, _S.ABORTING}),
    _S.STANDBY: frozenset({_S.READY}),
    _S.WAITING: frozenset({_S.PENDING, _S.ABORTING}),
    _S.PENDING: frozenset({_S.ABORTING, _S.CONCLUDED}),
    _S.ABORTING: frozenset({_S.ABORTING, _S.CONCLUDED}),
    _S.CONCLUDED: frozenset({_S.NULL}),
    _S.NULL: frozenset(),
}

_ALIVE: Final = frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY})

VERBS: Final[dict[JobVerb, frozenset[JobStatus]]] = {
    JobVerb.CANCEL: _ALIVE | {_S.WAITING, _S.PENDING},
    JobVerb.PAUSE: _ALIVE,
    JobVerb.RESUME: _ALIVE,
    JobVerb.SET_SPEED: _ALIVE,
    JobVerb.COMPLETE: frozenset({_S.READY, _S.STANDBY}),
    JobVerb.FINALIZE: frozenset({_S.PENDING}),
    JobVerb.DISMISS: frozenset({_S.CONCLUDED}),
    JobVerb.CHANGE: _ALIVE,
}

RUNS: Final = frozenset({_S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY})  # its body has not ended
HAS_ENDED: Final = frozenset({_S.WAITING, _S.PENDING, _S.ABORTING, _S.CONCLUDED, _S.NULL})  # it has
