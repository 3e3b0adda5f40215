"""runai-model-streamer: safetensors files from S3, or from disk, into CPU tensors that stay."""

from __future__ import annotations

from runai_model_streamer import SafetensorsStreamer

from bench.peers.protocol import serve
from bench.peers.tensors import Tensors, TensorsPeer


class Runai(TensorsPeer):
    """See TensorsPeer; the settings come by the environment."""

    packages = ("runai-model-streamer",)

    def read(self, paths: list[str]) -> Tensors:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(paths, device=self.device)
            return dict(streamer.get_tensors())


if __name__ == "__main__":
    serve(Runai)
