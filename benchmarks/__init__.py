# SPDX-License-Identifier: Apache-2.0
"""Measurements of our daemon beside QEMU's programs and nbdkit: ``python -m benchmarks --list``.

How a number is made, and why (the traps are real, each of them cost a wrong table once):

* The contenders of a row take turns within each round, and the ratio is the median of the rounds' ratios:
numbers
  taken at different times on a shared machine do not compare. A ratio above 1 means that ours is better.
* The image is read into the page cache before every run, because the kernel may have paged it out
meanwhile; for
  O_DIRECT rows it is dropped from the page cache instead.
* Before writes it is filled with small pages instead (``system.settle_for_writes`` says why).
* Foreign CPU, busy time that is neither server nor client, is printed; a row with much of it is marked. *
CPU per operation of the server comes from ``/proc``; it moves less than operations per second do when the
machine
  is shared, and tells more about the server than a rate that the client limits.
* fio's nbd engine is itself a limit; rows that need more use ``nbdload.c``, compiled on demand.
"""
