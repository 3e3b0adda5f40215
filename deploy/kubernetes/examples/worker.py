"""The least that a worker needs: tensors without a copy, a warm-up, and a readiness that tells the truth."""

import os
import signal
import threading

import cached_client
from cached_client.warmup import Readiness, ReadyServer

stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
readiness = Readiness()
with ReadyServer(readiness, host="0.0.0.0", port=int(os.environ.get("PORT", "8081"))), cached_client.connect() as cache:
    with readiness.loading() as loading:
        model = loading.watch(cache.attach(os.environ["MODEL"], wait=True))
        weights = {name: model.numpy(name) for name in model.names()}
    readiness.warm_up(lambda *_: [weight.reshape(-1)[:1024].sum() for weight in weights.values()])
    stop.wait()  # and here it would serve
    model.close()
