# docker build -t lape . && docker run --rm lape demo
FROM python:3.12-slim
WORKDIR /app
COPY . .
RUN pip install --no-cache-dir '.[all]'
ENTRYPOINT ["lape"]
CMD ["--help"]
