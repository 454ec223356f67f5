# SPDX-License-Identifier: Apache-2.0
"""LUKS version 1: disks that only the holder of a password can read. See docs/encryption.md.

``header`` is the first sectors, ``keys`` turns a password into the key of the disk, ``ciphers`` encrypts sectors,
``node`` is the driver and ``create`` makes an image. None but the last two does any I/O.
"""
