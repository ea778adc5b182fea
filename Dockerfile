# syntax=docker/dockerfile:1
# Two images of one source: `--target api` (no torch, some 570 MB) and `--target worker` (CUDA torch, several GB).
# Python is that of requirements/*.lock.

FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/srv/squeeze \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/squeeze/bin:$PATH
# A fixed id, so that volumes fit from one image to the next. Caches of libraries go to the home, which is the data.
RUN groupadd --gid 10001 squeeze \
    && useradd --uid 10001 --gid squeeze --home-dir /data --no-create-home --shell /usr/sbin/nologin squeeze \
    && install --directory --owner=squeeze --group=squeeze --mode=0750 /data
WORKDIR /srv/squeeze
ENV SQUEEZE_DATA=/data

FROM base AS api-packages
COPY requirements/api.lock requirements/
RUN python -m venv /opt/squeeze && pip install -r requirements/api.lock

FROM base AS worker-packages
# pypcre, which gptqmodel needs, comes as source. Debian has one version of each at a time, so none is named.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ libpcre2-dev && rm -rf /var/lib/apt/lists/*
COPY requirements/worker.lock requirements/gptqmodel.txt requirements/
RUN python -m venv /opt/squeeze && pip install -r requirements/worker.lock
# Its build looks at the torch that is there, hence a line of its own and no isolation.
RUN pip install --no-build-isolation --no-deps -r requirements/gptqmodel.txt

FROM base AS api
COPY --from=api-packages /opt/squeeze /opt/squeeze
COPY squeeze squeeze
COPY storage storage
COPY jobs jobs
COPY api api
ENV SQUEEZE_HOST=0.0.0.0 \
    SQUEEZE_PORT=8000
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as http; http.urlopen(f\"http://127.0.0.1:{os.environ['SQUEEZE_PORT']}/healthz\", timeout=4)"]
CMD ["python", "-m", "api"]

FROM base AS worker
# pypcre links to PCRE2; Triton compiles a small launcher in C for each kernel, at run time.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev libpcre2-8-0 && rm -rf /var/lib/apt/lists/*
COPY --from=worker-packages /opt/squeeze /opt/squeeze
COPY squeeze squeeze
COPY storage storage
COPY jobs jobs
COPY models models
COPY workers workers
COPY scripts/worker_health.py scripts/
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
VOLUME /data
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s --retries=3 CMD ["python", "-m", "scripts.worker_health"]
CMD ["python", "-m", "workers"]
