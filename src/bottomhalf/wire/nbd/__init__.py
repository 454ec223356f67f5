# SPDX-License-Identifier: Apache-2.0
"""NBD, both ends, without I/O: bytes in, events out, bytes out.

| | server | client |
|---|---|---|
| negotiation | ``server_handshake``, ``server_options`` | ``client_handshake``, ``client_options`` |
| transmission | ``server_transmission``, ``batch``, ``replies`` | ``client``, ``client_replies`` |

``constants`` has the protocol's numbers and our limits, ``export`` what a server tells of an export.
"""
