# SPDX-License-Identifier: Apache-2.0
"""TLS: sessions, streams that look like sockets, credentials as objects. Nothing is imported until it is used: most
programs speak none, and OpenSSL takes longer to load than they take to start."""
