# The image of every node, of jobs and of the MLflow server: docker build -t REGISTRY/ccsr:0.1.0 .
# CUDA comes with PyTorch's wheel; the driver with the NVIDIA container toolkit. Nothing is compiled.
FROM python:3.11.14-slim-bookworm

# KubeRay's probes call wget.
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home ccsr

WORKDIR /opt/ccsr
# The libraries are one layer that stays as long as their versions do: nodes fetch only the code of a new image.
COPY constraints.txt ./
RUN pip install --no-cache-dir --requirement constraints.txt
COPY pyproject.toml README.md LICENSE ./
COPY infra infra
COPY degradation degradation
COPY training training
COPY evaluation evaluation
COPY pipelines pipelines
COPY configs configs
RUN pip install --no-cache-dir --no-deps . && pip check && rm -r build *.egg-info

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_AUTH_MODE=token
USER ccsr
WORKDIR /home/ccsr
CMD ["ccsr", "--help"]
