"""The command line of torchkiln. It never imports torch unless a command needs operators."""
# SPDX-License-Identifier: Apache-2.0
