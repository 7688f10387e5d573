#!/usr/bin/env bash
# Build docker/NAME.Dockerfile as image shardline-NAME and leave what it holds in dist/sbom-NAME.json:   docker/build.sh serve train
# BUILDER is docker, podman or buildah (the first that works), BUILD_OPTIONS more options of its `build`. The same commit gives the
# same layers of `serve` with podman and buildah; docker keeps the time at which it wrote each file, `train` takes Debian's newest.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "error: $1" >&2
  exit 2
}

works() { # docker without its daemon cannot build
  command -v "$1" >/dev/null && { [ "$1" != docker ] || docker info >/dev/null 2>&1; }
}

builder="${BUILDER:-}"
if [ -z "$builder" ]; then
  for candidate in docker podman buildah; do
    ! works "$candidate" || { builder="$candidate" && break; }
  done
  [ -n "$builder" ] || fail "nothing here can build images; install docker, podman or buildah (Debian, Ubuntu: apt-get install buildah)"
fi
works "$builder" || fail "$builder is not installed, or its daemon does not answer; name another one: make images BUILDER=buildah"

version="$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)"
revision="$(git rev-parse HEAD 2>/dev/null || echo unknown)"
mkdir -p dist
for name in "$@"; do
  [ -f "docker/$name.Dockerfile" ] || fail "there is no docker/$name.Dockerfile; there are: $(cd docker && echo *.Dockerfile)"
  grep -q sbom.json "docker/$name.Dockerfile" || fail "docker/$name.Dockerfile is built by docker compose (docker/compose.yaml)"
  image="shardline-$name"
  # Every file gets the time of the last change of what the large layers come from, so they stay the same until then.
  time="$(git log -1 --format=%ct -- "docker/$name.Dockerfile" "docker/$name.lock" 2>/dev/null || true)"
  time="${time:-0}"
  options=(--file "docker/$name.Dockerfile" --tag "$image:$version" --tag "$image:latest")
  options+=(--build-arg "VERSION=$version" --build-arg "REVISION=$revision")
  case "$builder" in
    docker) options+=(--build-arg "SOURCE_DATE_EPOCH=$time") ;;
    # The health check is a word of docker's image format; the other one drops it.
    *) options+=(--format docker --timestamp "$time" --layers) ;;
  esac
  # shellcheck disable=SC2086
  "$builder" build "${options[@]}" ${BUILD_OPTIONS:-} .
  sbom="dist/sbom-$name.json"
  if [ "$builder" = buildah ]; then
    container="$(buildah from "$image:$version")"
    buildah run "$container" -- cat /opt/shardline/sbom.json > "$sbom.tmp"
    buildah rm "$container" >/dev/null
  else
    container="$("$builder" create "$image:$version")"
    "$builder" cp "$container:/opt/shardline/sbom.json" "$sbom.tmp"
    "$builder" rm "$container" >/dev/null
  fi
  mv "$sbom.tmp" "$sbom"
  echo "$image:$version, built by $builder; what it holds: $sbom"
done
