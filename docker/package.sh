#!/usr/bin/env bash
# package.sh SOURCE OUT: source distribution and wheel. A wheel that holds C code is repaired: libjpeg goes into it, and it says which
# releases of Linux it runs on. BIN is the folder of the environment's programs; SOURCE_DATE_EPOCH makes the bytes the same every time.
set -euo pipefail
BIN=$(cd "$BIN" && pwd)
source=$1 out=$2 built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
"$BIN/python" -m build --no-isolation --outdir "$built" "$source" > "$built/log" 2>&1 || { cat "$built/log" >&2; exit 2; }
mkdir -p "$out"
mv "$built"/*.tar.gz "$out"
for wheel in "$built"/*.whl; do
  case $wheel in
    *-any.whl) mv "$wheel" "$out" ;;
    *) PATH="$BIN:$PATH" "$BIN/python" -m auditwheel repair --wheel-dir "$out" "$wheel" 2> "$built/log" > /dev/null || { cat "$built/log" >&2; exit 2; } ;;
  esac
done
ls "$out"/*.whl "$out"/*.tar.gz
