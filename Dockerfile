# One image serves the driver (`docker run IMAGE run job.yaml`), Ray nodes (compose, KubeRay, `ray up`) and the service
# (`equigram serve`):
#
#   docker build -t registry.example.com/equigram:0.1.0 .
#   docker build -t registry.example.com/equigram:0.1.0-cuda --build-arg VARIANT=cuda .
#
# The environment is that of a lock, checked by hash, without TensorFlow. `make lock` makes requirements-cuda.txt with
# requirements.txt as its constraints: the same versions, and of jax[cuda13] the plug-ins of that very jax. CUDA comes
# with these packages and those of numba-cuda; the host needs a driver for CUDA 13 (580 or later) and NVIDIA's container toolkit.
FROM python:3.12-slim

# ssh and rsync for Ray's cluster launcher, wget for the probes of KubeRay before 1.6
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --user-group --create-home equigram \
    && mkdir /data /jobs /runs \
    && chown equigram /runs

ARG VARIANT=cpu
WORKDIR /opt/equigram
COPY requirements.txt requirements-cuda.txt ./
RUN case "$VARIANT" in \
      cpu) lock=requirements.txt ;; \
      cuda) lock=requirements-cuda.txt ;; \
      *) echo "VARIANT is cpu or cuda, not $VARIANT" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir --require-hashes --no-deps -r "$lock"
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY workers workers
RUN pip install --no-cache-dir --no-deps .
COPY deploy/healthcheck.py ./

# Not NVIDIA_VISIBLE_DEVICES, which would show every GPU of a machine to containers that asked for none.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_USAGE_STATS_ENABLED=0
USER 1000
WORKDIR /home/equigram
# A Ray node and the service must answer; a container of one command is healthy for as long as that runs.
HEALTHCHECK --interval=30s --timeout=10s --start-period=90s --start-interval=3s --retries=3 \
    CMD ["python", "-I", "/opt/equigram/healthcheck.py"]
ENTRYPOINT ["equigram"]
CMD ["--help"]
