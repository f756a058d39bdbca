#!/usr/bin/env bash
# The two stages of the Containerfile without containers: the same commands, in directories of their own and mount
# namespaces. Needs a Python in which torchkiln is installed, and `unshare`; no GPU, no driver, no root.
#
#   without_containers.sh [directory [command ...]]
#
# The command runs in the second stage instead of app.py: on a read-only file system, without a home directory, without
# any NVRTC, where compiling is forbidden. ARCHS names the architectures.
# SPDX-License-Identifier: Apache-2.0
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(realpath "${1:-$(mktemp -d)}")
shift || true
python=${PYTHON:-$(command -v python3)}
torchkiln=("$python" -P -m torchkiln_cli.main)
archs=${ARCHS:-sm_80,sm_86,sm_89,sm_90}
command=("$@")
[[ ${#command[@]} -gt 0 ]] || command=("$python" -P "$here/app.py")
mkdir -p "$work"/{build,runtime}

# ---- first stage: a compiler, a cache of its own, no GPU ----

echo "stage 1: bundle for $archs"
TORCHKILN_CACHE_DIR=$work/build/cache "${torchkiln[@]}" bundle create \
  --out "$work/build/app.bundle" --manifest "$here/app.manifest.json" --arch "$archs"
"${torchkiln[@]}" bundle verify "$work/build/app.bundle" --manifest "$here/app.manifest.json" --arch "$archs"
cp "$work/build/app.bundle" "$work/runtime/"

# ---- second stage: the bundle and nothing else ----

# Every NVRTC that this Python, a toolkit or the loader could find, as "path" lines.
nvrtc_libraries() {
  "${torchkiln[@]}" doctor --json >/dev/null 2>&1 || true
  "$python" -P - <<'PYTHON'
from torchkiln_cli import _native
for candidate in _native.control("nvrtc")["candidates"]:
    print(candidate["path"])
PYTHON
}

# Runs inside the namespace: NVRTC hidden, then every mount read-only.
enter() {
  local path mount
  while read -r path; do
    [[ -e $path ]] && mount --bind "$work/empty" "$(realpath "$path")"
  done <"$work/nvrtc"
  mount --bind / /
  while read -r mount; do
    case $mount in /proc* | /sys* | /dev*) continue ;; esac
    mount -o remount,bind,ro "$mount" 2>/dev/null || true
  done < <(awk '{print $5}' /proc/self/mountinfo | sort -u)
  if touch "$work/runtime/probe" 2>/dev/null; then
    echo "the file system is not read-only" >&2
    exit 1
  fi
  # A cache that cannot be made: what this user's other programs compiled must not help.
  exec env -u HOME -u XDG_CACHE_HOME -u XDG_RUNTIME_DIR -u TORCHKILN_NVRTC_PATH \
    TORCHKILN_CACHE_DIR="$work/runtime/cache" TORCHKILN_BUNDLES="$work/runtime/app.bundle" TORCHKILN_JIT=forbid \
    PYTHONDONTWRITEBYTECODE=1 "${command[@]}"
}

echo "stage 2: ${command[*]}"
: >"$work/empty"
nvrtc_libraries >"$work/nvrtc"
options=-m
[[ $(id -u) -eq 0 ]] || options=-Urm
export -f enter
export work
unshare $options bash -euo pipefail -c 'command=("$@"); enter' stage2 "${command[@]}"
