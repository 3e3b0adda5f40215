"""The `cached` command: its verbs, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence

import click

from cached import __version__
from cached.cli.connect import Globals
from cached.cli.failures import INTERRUPTED, exit_code, print_failure
from cached.cli.interrupt import heard_interrupts
from cached.cli.sections import Sections
from cached.errors import CachedError
from cached_client.errors import CacheError


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--socket", default="", metavar="PATH", help="The daemon's socket.  [CACHED_SOCKET, else the usual places]"
)
@click.option("--address", default="", metavar="HOST:PORT", help="A daemon elsewhere, by mutual TLS.  [CACHED_ADDRESS]")
@click.option("--tls-ca", default="", metavar="FILE", help="Authorities of that daemon's certificate.  [CACHED_TLS_CA]")
@click.option("--tls-cert", default="", metavar="FILE", help="Your certificate.  [CACHED_TLS_CERT]")
@click.option("--tls-key", default="", metavar="FILE", help="Your private key.  [CACHED_TLS_KEY]")
@click.version_option(__version__, prog_name="cached")
@click.pass_context
def cli(context: click.Context, /, **options: str) -> None:
    """The host's cache of model weights: pulled once, every byte verified, shared by all workers.

    A REF is NAME, NAME@REVISION, or a URI such as s3://bucket/prefix.

    \b
    Begin with:
      cached push ./tiny s3://bucket/tiny > catalog.json     upload a model, get its catalog entry
      cached serve --catalog catalog.json                    run the daemon
      cached pull tiny                                       bring it into memory
      cached run tiny -- CMD {path}                          use it as a directory
      cached COMMAND --help                                  options and examples of each

    \b
    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 timed out, 5 no room, 6 damaged content.
    Completion: eval "$(_CACHED_COMPLETE=bash_source cached)"   (also zsh_source; fish_source)
    """  # noqa: D301 click reads the control character
    context.obj = Globals(**options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; expected errors are printed, not raised."""
    try:
        with heard_interrupts():
            result = cli.main(arguments, prog_name="cached", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except (CachedError, CacheError) as error:
        print_failure(error)
        return exit_code(error.reason)
    return result if isinstance(result, int) else 0
