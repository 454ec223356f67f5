# SPDX-License-Identifier: Apache-2.0
"""Style is a test: layers, door, the look of files. Each check reads the source tree that it is given."""
