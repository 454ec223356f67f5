# SPDX-License-Identifier: Apache-2.0
"""qcow2: an image in clusters that are allocated when they are first written.

The format is QEMU's docs/interop/qcow2.txt; each file here is a chapter of it.

* ``layout``: the numbers: magic, bits, masks, and the limits on what an image may ask of us.
* ``header``: the first cluster: what the image is, its extensions, the name of its backing file; ``heading`` writes it.
* ``tables``: guest offset to host offset: L1, L2, and what an entry says.
* ``refcounts``: who uses which cluster; where the next one is free.
* ``compression``: clusters that are stored smaller.
* ``metadata``: the tables in memory, read when needed, and written in an order that keeps every crash safe;
  ``counters`` is the part of it that gives clusters out and takes them back, ``tally`` counts many of them.
* ``overlap``, ``trouble``: tables are protected from writes by mistake, and what happens when an image is damaged.
* ``runtime``, ``cleaning``: the options of a node; tables that nobody uses leave memory.
* ``node``: the driver: reads and writes as batches where the tables are in memory, as coroutines where not.
* ``check``: counts all references anew and compares.
* ``writing``, ``squeezing``: writes that change tables, plain and compressed.
* ``create``, ``preallocation``, ``amend``: a new image, its space taken at once, and images that become others.

The first five do no I/O.
"""
