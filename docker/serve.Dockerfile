# syntax=docker/dockerfile:1
# Answers from an exported model, over HTTP or on the command line: onnxruntime and no torch, a user without rights, nothing written
# outside /tmp.  `make images` builds it and lists what it holds in dist/sbom-serve.json.
#   docker run --rm --read-only --tmpfs /tmp -p 8000:8000 -v "$PWD/runs/digits/export:/work:ro" shardline-serve
#   docker run --rm --read-only --tmpfs /tmp -v "$PWD:/work:ro" shardline-serve predict runs/digits/export/model.onnx image.jpg
# A model of a registry: `shardline-serve serve models:/digits@champion --host 0.0.0.0 --tracking.uri=https://mlflow.example.org`, with
# MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
ARG BASE=python:3.11.15-slim-bookworm

# What we depend on: made anew only when docker/serve.lock changes.
FROM ${BASE} AS packages
WORKDIR /build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
# pip stays in an environment of its own, which no image gets.
RUN python3 -m venv tools && python3 -m venv --without-pip /opt/shardline
COPY docker/serve.lock ./
# Bytecode without time stamps is the same in every build, and nothing at run time has to look whether it is still true.
RUN tools/bin/pip --python /opt/shardline/bin/python install --no-cache-dir --no-compile --no-deps --require-hashes -r serve.lock \
    && /opt/shardline/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/shardline/lib

# What is ours, in a folder of its own: a change of it leaves the layer above as it is.
FROM packages AS code
COPY requirements.lock ./
RUN awk '/^[a-z]/ { keep = /^setuptools==/ } keep' requirements.lock > backend.lock \
    && tools/bin/pip install --no-cache-dir --no-deps --require-hashes -r backend.lock
# Without setup.py, which builds the decoder of training.
COPY pyproject.toml README.md LICENSE ./
COPY pipeline pipeline
COPY configs configs
RUN tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
    && tools/bin/pip --python /opt/shardline/bin/python install --no-compile --no-deps --no-index --prefix /code dist/*.whl \
    && /opt/shardline/bin/python -m compileall -q --invalidation-mode unchecked-hash -s /code -p /opt/shardline /code
COPY docker/licenses.py docker/sbom.py ./
RUN PYTHONPATH="$(echo /code/lib/python3*/site-packages)" /opt/shardline/bin/python sbom.py > /code/sbom.json

FROM ${BASE}
# The base's own pip: what cannot be run needs no updates.
RUN rm -rf /usr/local/lib/python3.*/site-packages/* /usr/local/lib/python3.*/ensurepip /usr/local/bin/pip*
COPY --from=packages /opt/shardline /opt/shardline
COPY --from=code /code /opt/shardline
# Any user may run it, also one without a name or a home (USER, HOME).
ENV PATH=/opt/shardline/bin:$PATH HOME=/tmp USER=shardline PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
WORKDIR /work
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["shardline"]
CMD ["serve", "model.onnx", "--host", "0.0.0.0"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="shardline-serve" \
    org.opencontainers.image.description="An exported Shardline model over HTTP, without torch" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
