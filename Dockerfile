# The environment of requirements.txt: the same versions as everywhere, checked by hash, without TensorFlow.
# One image serves the driver (`docker run IMAGE run job.yaml`) and Ray nodes (see deploy/compose.yaml).
FROM python:3.12-slim

RUN pip install --no-cache-dir uv
WORKDIR /opt/equigram
COPY requirements.txt .
RUN uv pip install --system --no-cache --require-hashes --no-deps -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY workers workers
RUN uv pip install --system --no-cache --no-deps .

RUN useradd --create-home equigram && mkdir /data /runs && chown equigram /data /runs
USER equigram
WORKDIR /home/equigram
ENV NUMBA_CACHE_DIR=/tmp/numba RAY_USAGE_STATS_ENABLED=0
ENTRYPOINT ["equigram"]
CMD ["--help"]
