"""Operators for selective scans."""

# SPDX-License-Identifier: Apache-2.0

from torchkiln.ops.scan.selective_scan import *  # noqa: F403
