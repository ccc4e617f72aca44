# medseg-trt on a Jetson with JetPack 7 (Ubuntu 24.04, Python 3.12, CUDA 13), for the TensorRT that JetPack brings.
#
# Not built in CI: nothing there is a Jetson or reaches an image registry. Nobody has built it yet.
# The base must have the TensorRT of the JetPack on the device: see NVIDIA's support matrix of the container.
#
#   docker build -f toolkit/docker/jetpack7.Dockerfile --build-arg BASE=nvcr.io/nvidia/tensorrt:25.10-py3 -t medseg-trt .
#   docker run --rm --runtime nvidia -v "$PWD:/work" -v medseg-cache:/cache medseg-trt \
#       infer images/ --bundle model.medseg --backend tensorrt -o masks
ARG BASE=nvcr.io/nvidia/tensorrt:25.10-py3
FROM ${BASE}

COPY . /src
# TensorRT's own Python package is the image's, which pip must not replace: the extra "tensorrt" is left out.
RUN python3 -m venv --system-site-packages /opt/medseg \
    && /opt/medseg/bin/pip install --no-cache-dir '/src[cpu,medical,sign]' 'cuda-bindings>=13.0,<14' 'ml_dtypes>=0.5' \
    && /opt/medseg/bin/python -c 'import tensorrt' \
    && rm -rf /src

ENV PATH=/opt/medseg/bin:$PATH XDG_CACHE_HOME=/cache
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["medseg-trt"]
CMD ["doctor"]
