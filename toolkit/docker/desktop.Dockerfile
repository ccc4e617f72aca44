# medseg-trt on a desktop or server with an NVIDIA GPU (RTX 20xx and newer) and a driver from 580, for TensorRT-RTX.
#
# Not built in CI: nothing there has a GPU or an image registry. Nobody has built it yet.
#
#   docker build -f toolkit/docker/desktop.Dockerfile -t medseg-trt .
#   docker run --rm --gpus all -v "$PWD:/work" -v medseg-cache:/cache medseg-trt \
#       infer images/ --bundle model.medseg --backend tensorrt-rtx -o masks
FROM python:3.12-slim

COPY . /src
# onnxruntime is for the CPU: it runs the same bundle where --backend is left out.
RUN pip install --no-cache-dir --constraint /src/tests/constraints.txt '/src[tensorrt-rtx,cpu,medical,sign]' \
    && rm -rf /src

# The container toolkit mounts the driver, and with it libcuda.so.1.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility XDG_CACHE_HOME=/cache
RUN useradd --create-home medseg && install -d -o medseg /cache
USER medseg
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["medseg-trt"]
CMD ["doctor"]
