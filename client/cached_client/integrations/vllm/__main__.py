"""``python -m cached_client.integrations.vllm NAME``: a folder that vLLM starts from, where only the socket is there.

::

    vllm serve $(python -m cached_client.integrations.vllm llama-13b) --load-format cached

The download of the weights begins with it and goes on while vLLM starts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cached_client.errors import CacheError
from cached_client.integrations.vllm.staging import default_folder, stage


def main(arguments: list[str] | None = None) -> int:
    """Prints the folder; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cached_client.integrations.vllm",
        description="Copies a model's configuration and tokenizer to a folder for `vllm serve`, and prints its path. "
        "The weights come from the cache: vllm serve FOLDER --load-format cached",
    )
    parser.add_argument("model", metavar="NAME", help="the model: NAME, NAME@REVISION or a URI")
    parser.add_argument("--source", default="", metavar="URI", help="origin of a model that is not in the catalog")
    parser.add_argument(
        "--into", type=Path, metavar="DIR", help="where (default: a folder of your own for temporary files)"
    )
    parser.add_argument("--socket", default=None, metavar="PATH", help="the daemon's socket (default: CACHED_SOCKET)")
    parser.add_argument("--timeout", type=float, default=None, metavar="SECONDS", help="give up after so long")
    options = parser.parse_args(arguments)
    from cached_client.cache import connect

    try:
        with connect(options.socket) as cache:
            attach = cache.attach(
                options.model, source=options.source, timeout_s=options.timeout, client_name="vllm staging"
            )
            with attach as model:
                sys.stdout.write(f"{stage(model, options.into or default_folder(), timeout_s=options.timeout)}\n")
    except CacheError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
