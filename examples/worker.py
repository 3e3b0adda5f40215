"""A complete worker: it embeds sentences with a model from the cache, and says when it is ready for them.

    python examples/worker.py --model all-minilm-l6-v2 --port 8080
    curl -i localhost:8080/ready                   # 503 and the reason while it loads and warms up, then 200

Each line of its standard input is a request, answered by a line of JSON; it serves until its input ends. Before, it
prints where the time of its start went, and tells the daemon (see `cached coldstart`). It needs torch, transformers and
tokenizers beside cached-client, and uses a GPU if torch has one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import cached_client
from cached_client.coldstart import Timeline
from cached_client.warmup import KeepWarm, Readiness, ReadyServer


class Embedder:
    """The model, and what it computes."""

    def __init__(self, model: cached_client.Model, timeline: Timeline) -> None:
        """Made while the model's bytes still arrive: what needs none of them comes first, then what needs a few."""
        with timeline.phase("imports"):
            import torch
            from tokenizers import Tokenizer
            from transformers import AutoConfig, AutoModel
        self.torch, self.device = torch, "cuda:0" if torch.cuda.is_available() else "cpu"
        if self.device != "cpu":
            with timeline.phase("cuda_init"):
                torch.cuda.init()
        with timeline.phase("build_model"):  # small files are the first to arrive
            self.tokenizer = Tokenizer.from_buffer(model.read("tokenizer.json"))
            self.tokenizer.enable_padding()
            with torch.device("meta"):  # takes no memory: the weights come from the cache
                self.module = AutoModel.from_config(AutoConfig.for_model(**json.loads(model.read("config.json"))))
        with timeline.phase("load_weights", after="download"):
            model.load_into(self.module.eval(), None if self.device == "cpu" else self.device, strict=False)

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """A vector of length 1 for each sentence."""
        encoded = self.tokenizer.encode_batch(list(texts))
        return self.forward([item.ids for item in encoded], [item.attention_mask for item in encoded])

    def forward(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[int]]) -> list[list[float]]:
        """The mean of the last layer over each sentence. Positions and types are given: no checkpoint has them."""
        torch = self.torch
        with torch.inference_mode(), torch.device(self.device):
            words, seen = torch.tensor(ids), torch.tensor(mask)
            places = torch.arange(words.shape[1]).unsqueeze(0)
            found = self.module(words, seen, token_type_ids=torch.zeros_like(words), position_ids=places)[0]
            mean = (found * seen.unsqueeze(-1)).sum(1) / seen.sum(1, keepdim=True)
            vectors: list[list[float]] = torch.nn.functional.normalize(mean).tolist()
            return vectors  # on the CPU: so a call is over when it returns, as warm-up wants it

    def run_shape(self, batch_size: int, length: int) -> list[list[float]]:
        """A synthetic request."""
        return self.forward([[101] * length] * batch_size, [[1] * length] * batch_size)


def main() -> None:
    """Ready after load and warm-up, and no more when the model is lost."""
    parser = argparse.ArgumentParser(description="A worker that embeds sentences with a model from the cache.")
    parser.add_argument("--socket", help="the daemon's socket (default: CACHED_SOCKET, else the usual places)")
    parser.add_argument("--model", default="all-minilm-l6-v2", help="NAME, NAME@REVISION or URI")
    parser.add_argument("--port", type=int, default=0, help="of /ready on this host (default: a free one)")
    arguments = parser.parse_args()
    timeline, readiness = Timeline(), Readiness()
    with ReadyServer(readiness, port=arguments.port) as server, cached_client.connect(arguments.socket) as cache:
        print(f"serving {server.url}", flush=True)
        with readiness.loading() as loading:
            model = loading.watch(cache.attach(arguments.model))  # returns at once, and its bytes arrive meanwhile
            embedder = Embedder(model, timeline)
        timeline.add_model(model)
        warm_up = readiness.warm_up(embedder.run_shape, batch_sizes=(1, 8), lengths=(16, 128), timeline=timeline)
        with timeline.phase("first_inference"):
            embedder.embed(["The weights are in memory already."])
        print(timeline.table(), timeline.chart(), warm_up.table(), sep="\n\n", flush=True)
        timeline.report(cache)
        print("told the daemon", flush=True)
        with KeepWarm(lambda: embedder.run_shape(1, 16), idle_s=30, readiness=readiness) as keep_warm:
            for line in sys.stdin:
                readiness.check()  # a model that is lost serves nobody
                with keep_warm.busy():
                    print(json.dumps(embedder.embed([line.strip()])[0]), flush=True)


if __name__ == "__main__":
    main()
