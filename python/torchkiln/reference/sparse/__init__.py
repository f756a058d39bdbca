"""References of the operators for sparse convolution."""

# SPDX-License-Identifier: Apache-2.0
