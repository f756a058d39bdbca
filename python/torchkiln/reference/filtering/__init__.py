"""References of the operators for filters and resampling of images."""

# SPDX-License-Identifier: Apache-2.0
