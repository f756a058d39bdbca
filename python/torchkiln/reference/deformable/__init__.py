"""References of the operators for deformable convolution, attention and aggregation."""

# SPDX-License-Identifier: Apache-2.0
