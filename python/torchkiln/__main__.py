"""`python -m torchkiln ...` is the `torchkiln` command."""
# SPDX-License-Identifier: Apache-2.0

from torchkiln_cli.main import cli

cli(prog_name="python -m torchkiln")
