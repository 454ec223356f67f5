# SPDX-License-Identifier: Apache-2.0
"""What a check has found, as numbers, as text, as ``qemu-img check`` says it.

    found = bottomhalf.check("disk.qcow2", repair="leaks")
    found.status                # 0 whole, 1 could not be checked, 2 corrupt, 3 only leaks
    found.as_json("disk.qcow2")  # the object that qemu-img check --output=json prints

After a repair that has changed something the image is checked once more, and the numbers are what is left then; what
was repaired stands beside them.

Clause: none; the form is that of qemu-img check.
Invariant: the numbers, the words and the exit status are QEMU's.
Test: tests/peers/test_qcow2_check.py
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

FINDINGS_MAX: Final = 1000  # that are kept as text; all are counted
FINDING_CHARACTERS_MAX: Final = 1024  # a snapshot's name, which stands in some, has up to 65535

STATUS_WHOLE: Final = 0
STATUS_FAILED: Final = 1
STATUS_CORRUPT: Final = 2
STATUS_LEAKS: Final = 3
STATUS_UNSUPPORTED: Final = 63  # the format has no check


@dataclass
class CheckResult:
    """What a check has found; clusters, unless named otherwise."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0  # tables that could not be read or understood
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    total_clusters: int = 0  # of the guest's disk
    allocated_clusters: int = 0
    compressed_clusters: int = 0
    fragmented_clusters: int = 0
    image_end_offset: int = 0  # bytes
    findings: list[str] = field(default_factory=list)
    failure: str = ""  # why it was not finished, if it was not

    def say(self, finding: str) -> None:
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(finding[:FINDING_CHARACTERS_MAX])

    def give_up(self, why: str) -> None:
        """The check ends here; the numbers are what was found before."""
        self.check_errors += 1
        self.failure = why
        self.say(why)

    @property
    def status(self) -> int:
        """The exit status of ``qemu-img check`` (63, for a format without checks, nobody gets as a result)."""
        if self.check_errors:
            return STATUS_FAILED
        if self.corruptions:
            return STATUS_CORRUPT
        return STATUS_LEAKS if self.leaks else STATUS_WHOLE

    def as_json(self, filename: str, format: str = "qcow2") -> dict[str, Any]:
        """``ImageCheck`` of QEMU's schema: what is zero is left out, but for the errors of the check."""
        found: dict[str, Any] = {"filename": filename, "format": format, "check-errors": self.check_errors}
        for name in (
            *("image_end_offset", "corruptions", "leaks", "corruptions_fixed", "leaks_fixed"),
            *("total_clusters", "allocated_clusters", "fragmented_clusters", "compressed_clusters"),
        ):
            if getattr(self, name):
                found[name.replace("_", "-")] = getattr(self, name)
        return found
