# vLLM with the cache's client: what deploy/kubernetes/examples/vllm.yaml runs. Build from the repository's root:
#   docker build -f deploy/image/vllm.Dockerfile -t registry.example.com/vllm-cached:0.32.0 .
ARG VLLM_IMAGE=docker.io/vllm/vllm-openai:v0.32.0

FROM ${VLLM_IMAGE}
WORKDIR /src
COPY client client
# pip brings what the image lacks of the client's few dependencies (grpcio, protobuf, googleapis-common-protos, numpy).
RUN python3 -m pip install --no-cache-dir ./client && rm -rf client
WORKDIR /
ENTRYPOINT ["vllm"]
CMD ["serve", "--help"]
