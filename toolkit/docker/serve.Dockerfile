# The server of medseg-trt on a CPU: HTTP on port 8000, DICOM on port 11112.
#
# Not built in CI, which has no image registry. Nobody has built it yet.
#
#   docker build -f toolkit/docker/serve.Dockerfile -t medseg-serve .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/model.medseg:/model.medseg:ro" -v "$PWD/token:/token:ro" \
#       -v medseg-spool:/spool medseg-serve --bundle /model.medseg --token-file /token
FROM python:3.12-slim

COPY . /src
RUN pip install --no-cache-dir --constraint /src/tests/constraints.txt '/src[cpu,openvino,medical,serve,sign]' \
    && rm -rf /src

RUN useradd --create-home medseg && install -d -o medseg /spool
USER medseg
VOLUME /spool
EXPOSE 8000 11112
STOPSIGNAL SIGTERM
# Inside a container, loopback is the container's own; a token is needed to listen beyond it.
ENTRYPOINT ["medseg-trt", "serve", "--host", "0.0.0.0", "--spool", "/spool"]
