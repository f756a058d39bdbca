"""Operators for sparse convolution."""

# SPDX-License-Identifier: Apache-2.0
