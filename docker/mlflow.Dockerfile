# syntax=docker/dockerfile:1
# The team's tracking server (docker/compose.yaml): MLflow and the clients of PostgreSQL and S3, at the versions of the lock file.
#   docker build -f docker/mlflow.Dockerfile -t shardline-mlflow:3.17.2 .
ARG BASE=python:3.11.15-slim-bookworm
FROM ${BASE}

ENV PATH=/opt/mlflow/bin:$PATH HOME=/tmp USER=mlflow PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/mlflow
COPY docker/mlflow.lock /opt/mlflow/
RUN pip install --no-cache-dir --no-deps --require-hashes -r /opt/mlflow/mlflow.lock
COPY docker/mlflow-auth.ini /etc/mlflow/auth.ini
USER 1000:1000
WORKDIR /tmp
EXPOSE 5000
CMD ["mlflow", "server", "--help"]
