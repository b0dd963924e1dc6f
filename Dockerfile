# docker build -t lape . && docker run --rm lape lape demo        (docs/containers.md: GPUs, data, shells)
ARG BASE=python:3.12-slim
FROM ${BASE}
WORKDIR /app
COPY . .
RUN pip install --no-cache-dir '.[all]'
# No entry point, the base's neither: `docker run lape bash` and `docker run lape python main.py ...` run as they stand.
ENTRYPOINT []
CMD ["lape", "--help"]
