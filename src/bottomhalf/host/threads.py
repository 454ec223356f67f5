# SPDX-License-Identifier: Apache-2.0
"""What the floors above need of threads without importing them: storage per thread, a lock."""

from __future__ import annotations

import threading

Local = threading.local
Lock = threading.Lock
