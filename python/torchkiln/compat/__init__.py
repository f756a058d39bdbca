"""Drop-ins for other packages' operators, one module each; importing them changes nothing."""
# SPDX-License-Identifier: Apache-2.0
