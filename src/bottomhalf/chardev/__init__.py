# SPDX-License-Identifier: Apache-2.0
"""Character devices (floor 7): byte streams that come and go, for monitors and whoever else sits in front of them."""
