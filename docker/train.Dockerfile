# Training, evaluation and export, for clusters of containers. (docker/Dockerfile is the small one that only predicts.)
#   docker build -f docker/train.Dockerfile -t shardline-train .
#   docker run --rm --gpus all --shm-size 16g -v "$PWD:/work" shardline-train train --config configs/digits.yaml
# --shm-size: loader processes hand batches over in shared memory, of which a container has 64 MB unless told otherwise.
ARG BASE=python:3.11-slim
FROM ${BASE}

WORKDIR /src
COPY requirements.lock ./
RUN pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY pipeline pipeline
COPY configs configs
RUN pip install --no-cache-dir --no-deps --no-build-isolation . && useradd --create-home shardline
USER shardline
WORKDIR /work
ENTRYPOINT ["shardline"]
CMD ["--help"]
