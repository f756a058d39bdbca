"""References of the operators for boxes."""

# SPDX-License-Identifier: Apache-2.0
