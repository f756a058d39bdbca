"""Names of `mmcv.ops` that work, under the peer's modules: translations only."""
# SPDX-License-Identifier: Apache-2.0
