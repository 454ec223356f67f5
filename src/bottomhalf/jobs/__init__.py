# SPDX-License-Identifier: Apache-2.0
"""Work in the background that users can watch, pause, cancel and complete. See ``job`` and docs/jobs.md."""
