# SPDX-License-Identifier: Apache-2.0
"""The door (floor 0): everything that a program cannot compute by itself enters here."""
