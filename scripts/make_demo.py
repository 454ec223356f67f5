# SPDX-License-Identifier: Apache-2.0
"""Make a demonstration image: sparse, with a little data at both ends and in the middle. Its name tells its format.

python scripts/make_demo.py demo.qcow2|demo.raw [SIZE_MIB]
"""

from __future__ import annotations

import sys
from pathlib import Path

import bottomhalf

MIB = 1024 * 1024
GREETING = b"bottomhalf demonstration image\n"


def make_demo(path: Path, size_mib: int = 256) -> None:
    """Write the image; a name without its last byte written never appears."""
    size = size_mib * MIB
    unfinished = path.with_name(path.name + ".unfinished")
    format = "qcow2" if path.suffix == ".qcow2" else "raw"
    bottomhalf.create(unfinished, format=format, size=size)
    with bottomhalf.open(unfinished, format=format) as image:
        for offset in (0, size // 2, size - MIB):
            image.pwrite(b"".join(b"%012d %s" % (offset + at, GREETING) for at in range(0, 64 * 1024, 44)), offset)
    unfinished.rename(path)


def main(arguments: list[str]) -> int:
    """Make the image that the command line names."""
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    make_demo(Path(arguments[0]), int(arguments[1]) if len(arguments) == 2 else 256)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
