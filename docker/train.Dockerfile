# syntax=docker/dockerfile:1
# Every verb, for clusters of containers: data, checks, training, evaluation, export. (docker/serve.Dockerfile is the small one.)
#   docker run --rm --gpus all --shm-size 16g -v "$PWD:/work" shardline-train train --config digits
# --shm-size: loader processes hand batches over in shared memory, of which a container has 64 MB unless told otherwise.
#
# The base is slim and not one of NVIDIA's: torch's wheels bring CUDA, cuDNN and NCCL, each with its hash, and load no others, so a CUDA
# base would add gigabytes that nothing reads. From the machine comes the driver alone, mounted by NVIDIA's container toolkit.
# ARG BASE takes any image with Python 3.11 or newer, its venv module and apt-get.
ARG BASE=python:3.11.15-slim-bookworm

# The lock in two parts, so that gigabytes of CUDA and torch are made anew only when their own versions change.
FROM ${BASE} AS locks
WORKDIR /locks
COPY docker/train.lock ./
RUN awk '/^[a-z]/ { cuda = /^(torch|torchvision|triton|cuda-.*|nvidia-.*)==/ } { print > (cuda ? "cuda.lock" : "rest.lock") }' train.lock

FROM ${BASE}
# Bytecode is then checked by what a file holds: podman and buildah set every file's time after it was compiled.
ARG SOURCE_DATE_EPOCH=0
# NCCL looks for InfiniBand and RoCE in these libraries, and without them takes TCP, many times slower, without a word.
# torch.compile needs a C++ compiler, the native decoder that and libjpeg-turbo. Debian keeps only the newest of a version, so these are not pinned (DL3008).
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ibverbs-providers libibverbs1 librdmacm1 g++ libjpeg-dev \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*
ENV PATH=/opt/shardline/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/shardline
WORKDIR /build
COPY --from=locks /locks/cuda.lock ./
RUN pip install --no-cache-dir --no-deps --require-hashes -r cuda.lock
COPY --from=locks /locks/rest.lock ./
RUN pip install --no-cache-dir --no-deps --require-hashes -r rest.lock
COPY pyproject.toml setup.py README.md LICENSE ./
COPY pipeline pipeline
COPY configs configs
COPY docker/licenses.py docker/sbom.py ./
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && python sbom.py > /opt/shardline/sbom.json && rm -rf /build/*
# Under Slurm (pyxis, Apptainer) and OpenShift the user is any number without a name, and HOME may be missing or not writable: what
# libraries keep goes to /tmp. NVIDIA_*: what the container toolkit and enroot mount where nobody says it on a command line.
ENV HOME=/tmp USER=shardline XDG_CACHE_HOME=/tmp/cache XDG_CONFIG_HOME=/tmp/config TRITON_CACHE_DIR=/tmp/cache/triton \
    PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["shardline"]
CMD ["--help"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="shardline-train" \
    org.opencontainers.image.description="Shardline with torch and CUDA: from images to a proved ONNX model" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
