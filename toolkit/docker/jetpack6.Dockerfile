# medseg-trt on a Jetson Orin with JetPack 6 (Ubuntu 22.04, CUDA 12.6, TensorRT 10.3).
#
# Not built in CI: nothing there is a Jetson or reaches an image registry. Nobody has built it yet.
# JetPack's TensorRT speaks to Python 3.10 only, and medseg-trt needs 3.11: so NVIDIA's bindings are built once more,
# after python/README.md of its repository. TensorRT 10.3 reads the dialect "plain" of a graph.
#
#   docker build -f toolkit/docker/jetpack6.Dockerfile -t medseg-trt .      # on the Jetson
#   docker run --rm --runtime nvidia -v "$PWD:/work" -v medseg-cache:/cache medseg-trt \
#       infer images/ --bundle model.medseg --backend tensorrt -o masks
ARG BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0
FROM ${BASE} AS bindings
RUN apt-get update && apt-get install -y --no-install-recommends \
    build-essential cmake git python3.11 python3.11-dev python3.11-venv && rm -rf /var/lib/apt/lists/*
ENV EXT_PATH=/external
RUN git clone --depth 1 -b v2.11.1 https://github.com/pybind/pybind11.git $EXT_PATH/pybind11 \
    && git clone --depth 1 -b release/10.3 https://github.com/NVIDIA/TensorRT.git /TensorRT \
    && mkdir -p $EXT_PATH/python3.11 && ln -s /usr/include/python3.11 $EXT_PATH/python3.11/include
RUN python3.11 -m venv /build && /build/bin/pip install wheel setuptools \
    && cd /TensorRT/python && PATH=/build/bin:$PATH TRT_OSSPATH=/TensorRT TENSORRT_MODULE=tensorrt \
    PYTHON_MAJOR_VERSION=3 PYTHON_MINOR_VERSION=11 TARGET_ARCHITECTURE=aarch64 ./build.sh

FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends python3.11 python3.11-venv \
    && rm -rf /var/lib/apt/lists/*
COPY --from=bindings /TensorRT/python/build/bindings_wheel/dist/*.whl /wheels/
COPY . /src
RUN python3.11 -m venv /opt/medseg \
    && /opt/medseg/bin/pip install --no-cache-dir '/src[cpu,medical,sign]' 'cuda-bindings>=12.6,<13' 'ml_dtypes>=0.5' \
    && /opt/medseg/bin/pip install --no-cache-dir --no-deps /wheels/*.whl \
    && /opt/medseg/bin/python -c 'import tensorrt' \
    && rm -rf /src /wheels

ENV PATH=/opt/medseg/bin:$PATH XDG_CACHE_HOME=/cache
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["medseg-trt"]
CMD ["doctor"]
