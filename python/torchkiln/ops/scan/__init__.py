"""Operators for selective scans."""

# SPDX-License-Identifier: Apache-2.0
