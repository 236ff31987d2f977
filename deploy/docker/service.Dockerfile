# Every image of Usagi. Built from the repository's root:
#
#   docker build -f deploy/docker/service.Dockerfile --target serve --build-arg SERVICE=vision .
#
# Targets: serve (one domain, no torch), train (one domain, with torch), gateway (Envoy and the catalog), load (locust).
# Arguments: BASE, SERVICE (a table of services/services.toml), RUNTIME (cpu or gpu), EXTRA_INDEX_URL (see install.sh).
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /build
COPY deploy/docker/install.sh ./


# Images that serve, or run beside those, install what deploy/locks says, each file by its hash: `make lock` writes it.
FROM build AS serve-packages
ARG SERVICE=
ARG RUNTIME=cpu
ARG EXTRA_INDEX_URL=
COPY deploy/locks/${SERVICE}-${RUNTIME}.lock serve.lock
RUN --mount=type=cache,target=/root/.cache/pip ./install.sh serve.lock

FROM build AS gateway-packages
ARG EXTRA_INDEX_URL=
COPY deploy/locks/gateway.lock ./
RUN --mount=type=cache,target=/root/.cache/pip ./install.sh gateway.lock

FROM build AS load-packages
ARG EXTRA_INDEX_URL=
COPY deploy/locks/load.lock ./
RUN --mount=type=cache,target=/root/.cache/pip ./install.sh load.lock

# Training installs versions without hashes: torch comes from PyPI or from an index of CPU builds, as other files. What it
# installs is a stage of its own, as text, so that only a changed dependency installs again.
FROM build AS requirements
COPY pyproject.toml deploy/docker/requirements.py ./
RUN python requirements.py train >train.txt

FROM build AS train-packages
ARG EXTRA_INDEX_URL=
COPY constraints*.txt ./
COPY --from=requirements /build/train.txt ./
RUN --mount=type=cache,target=/root/.cache/pip ./install.sh train.txt constraints.txt


# The sources, cut to what each image runs. The final images copy from here, so that an edit in training leaves the
# serving image as it was.
FROM build AS source
WORKDIR /app
COPY services/__init__.py services/services.toml services/
COPY shared shared

FROM source AS serve-source
ARG SERVICE=
RUN test -n "${SERVICE}" || { echo 'set --build-arg SERVICE=<domain>' >&2; exit 1; }
COPY services/${SERVICE} services/${SERVICE}
COPY deploy/docker/serve.py serve.py
RUN rm -rf shared/training shared/data shared/testing services/*/training \
           services/*/cli.py services/*/demo.py services/*/load.py \
 && python -m compileall -q --invalidation-mode unchecked-hash .
COPY deploy/models/${SERVICE} deploy/models/${SERVICE}

FROM source AS train-source
ARG SERVICE=
RUN test -n "${SERVICE}" || { echo 'set --build-arg SERVICE=<domain>' >&2; exit 1; }
COPY services/${SERVICE} services/${SERVICE}
RUN python -m compileall -q --invalidation-mode unchecked-hash .
COPY deploy/models/${SERVICE} deploy/models/${SERVICE}

FROM source AS gateway-source
COPY services/gateway services/gateway
RUN rm -rf shared/training shared/data shared/testing \
 && python -m compileall -q --invalidation-mode unchecked-hash .

FROM source AS load-source
COPY services services
COPY tests/load tests/load
COPY tests/data tests/data
RUN rm -rf shared/training shared/data shared/testing services/*/training services/*/serving \
 && python -m compileall -q --invalidation-mode unchecked-hash .


# What all running images share. USER is numeric so that Kubernetes can check runAsNonRoot; the folder of models belongs
# to it, and so does a volume that is created over it.
FROM ${BASE} AS runtime
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONPATH=/app:/app/shared/gen \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    OPENBLAS_NUM_THREADS=1 \
    HOME=/tmp
RUN install -d -o 10001 -g 10001 /var/lib/usagi /var/lib/usagi/models /var/lib/usagi/runs /var/lib/usagi/results \
    /var/lib/usagi/gateway \
 && install -d -o 10001 -g 10001 -m 0700 /var/lib/usagi/keys
WORKDIR /app
STOPSIGNAL SIGTERM
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.vendor="Usagi" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"


FROM runtime AS serve
ARG SERVICE=
LABEL org.opencontainers.image.title="usagi-${SERVICE}" \
      org.opencontainers.image.description="Usagi's ${SERVICE} service: ONNX Runtime behind gRPC"
COPY --from=serve-packages /opt/venv /opt/venv
COPY --from=serve-source /app /app
ENV USAGI_SERVICE=${SERVICE} \
    USAGI_HOST=0.0.0.0 \
    USAGI_MODEL_ROOTS=/var/lib/usagi/models:/app/deploy/models
USER 10001:10001
EXPOSE 50051 9464
HEALTHCHECK --interval=3s --timeout=3s --start-period=20s --retries=3 \
  CMD ["python", "-I", "-S", "/app/shared/serving/probe.py", "127.0.0.1:50051"]
ENTRYPOINT ["python", "/app/serve.py"]


FROM runtime AS train
ARG SERVICE=
LABEL org.opencontainers.image.title="usagi-${SERVICE}-train" \
      org.opencontainers.image.description="Trains, compresses and exports Usagi's ${SERVICE} models"
COPY --from=train-packages /opt/venv /opt/venv
COPY --from=train-source /app /app
USER 10001:10001
WORKDIR /var/lib/usagi
# A batch job: it ends, and its exit status is its health. What to run is the command: a module and its arguments.
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m"]


FROM runtime AS gateway
LABEL org.opencontainers.image.title="usagi-gateway" \
      org.opencontainers.image.description="Usagi's gateway: Envoy and the catalog"
COPY --from=gateway-packages /opt/venv /opt/venv
COPY --from=gateway-source /app /app
ENV USAGI_UPSTREAMS=network \
    USAGI_GATEWAY_HOST=0.0.0.0
USER 10001:10001
EXPOSE 8080
# Asks through Envoy for the catalog's own service: the health of "" is that of all domains, and a domain that is down
# must not make the gateway unhealthy.
HEALTHCHECK --interval=3s --timeout=3s --start-period=20s --retries=3 \
  CMD ["python", "-I", "-S", "/app/shared/serving/probe.py", "127.0.0.1:8080", "usagi.model.v1.ModelService"]
ENTRYPOINT ["python", "-m", "services.gateway"]


FROM runtime AS load
LABEL org.opencontainers.image.title="usagi-load" \
      org.opencontainers.image.description="Load tests Usagi with locust"
COPY --from=load-packages /opt/venv /opt/venv
COPY --from=load-source /app /app
USER 10001:10001
HEALTHCHECK NONE
ENTRYPOINT ["locust", "-f", "tests/load/locustfile.py"]
CMD ["--headless", "--host", "gateway:8080"]
