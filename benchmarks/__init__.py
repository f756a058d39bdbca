"""Measures the operators against their peers: `python -m benchmarks.run --help`."""

# SPDX-License-Identifier: Apache-2.0
