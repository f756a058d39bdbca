"""References of the operators for point clouds: sampling, grouping, voxels."""

# SPDX-License-Identifier: Apache-2.0
