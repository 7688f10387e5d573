#!/usr/bin/env bash
# package.sh SOURCE OUT: source distribution and wheel. A wheel with the native decoder is repaired: libjpeg goes into it, and its name
# says on which releases of Linux it runs. BIN is the folder of the environment's programs; SOURCE_DATE_EPOCH makes the same bytes again.
set -euo pipefail
BIN=$(cd "$BIN" && pwd)
source=$1 out=$2 built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT

quietly() {
  "$@" > "$built/log" 2>&1 || { cat "$built/log" >&2 && exit 2; }
}

quietly "$BIN/python" -m build --no-isolation --outdir "$built" "$source"
mkdir -p "$out"
mv "$built"/*.tar.gz "$out"
wheel=$(echo "$built"/*.whl)
if "$BIN/python" -m zipfile -l "$wheel" | grep '_jpeg\.abi3\.so' > /dev/null; then
  PATH="$BIN:$PATH" quietly "$BIN/python" -m auditwheel repair --wheel-dir "$out" "$wheel"
else
  echo "the wheel has no native decoder: no C compiler, or no headers of libjpeg-turbo (Debian, Ubuntu: apt-get install gcc libjpeg-dev)"
  mv "$wheel" "$out"
fi
ls "$out"/*.whl
