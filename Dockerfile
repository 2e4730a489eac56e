# One image for every process: Ray head and workers, `pedro`, MLflow's server and the dashboard.
#
#   docker build -t pedro-platform:0.1.0 .
#   docker build -t pedro-platform:0.1.0 --build-arg TORCH_INDEX_URL=$CPU_WHEELS .   (torch's index of CPU wheels: no CUDA)
FROM python:3.11.13-slim-bookworm

ARG TORCH_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

# The engine compiles its CPU kernel for the processor that it finds.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

RUN useradd --uid 10001 --user-group --home-dir /var/lib/pedro --create-home pedro

WORKDIR /opt/pedro
COPY constraints.txt ./
# The largest layer first: it changes with constraints.txt only.
RUN pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -c constraints.txt torch
COPY pyproject.toml setup.py README.md LICENSE ./
COPY platform ./platform
COPY dashboard ./dashboard
RUN pip install -c constraints.txt '.[all]'
COPY jobs ./jobs
# What is in here, with licences.
RUN python -m jobs.supply_chain sbom --out /opt/pedro/sbom.cdx.json

ENV HOME=/var/lib/pedro \
    PYTHONPATH=/opt/pedro \
    PEDRO_HOME=/var/lib/pedro \
    HF_HOME=/var/lib/pedro/huggingface
VOLUME /var/lib/pedro
USER 10001:10001
CMD ["pedro", "--help"]
