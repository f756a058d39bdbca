"""References of the operators for selective scans."""

# SPDX-License-Identifier: Apache-2.0
