#!/usr/bin/env bash
# The program with its kernels in one file, where nothing may be compiled. The first half needs NVRTC and no GPU.
#
#   deploy.sh [directory]      ARCHS names the GPUs
#
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
work=${1:-$(mktemp -d)}
archs=${ARCHS:-sm_80,sm_90}

# Which kernels the program uses shows on a GPU. Without one: what the defaults can be.
kernels=(--ops bias_gelu)
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  torchkiln record --out "$work/used.json" -- python train.py --tune
  kernels=(--manifest "$work/used.json")
fi

torchkiln bundle create --import bias_gelu "${kernels[@]}" --arch "$archs" --out "$work/own.bundle"
torchkiln bundle verify --import bias_gelu --arch "$archs" "$work/own.bundle"

TORCHKILN_CACHE_DIR=$work/empty TORCHKILN_BUNDLES=$work/own.bundle TORCHKILN_JIT=forbid python train.py
