# SPDX-License-Identifier: Apache-2.0
"""The one schema (floor 2): options, commands, events and types as classes, and what is made from them.

``types`` is the kernel, ``visit`` and ``keyval`` turn input into instances, ``commands`` collects everything,
``help``, ``schema`` and ``reference`` describe it. The other files define it, one subject each.
"""
