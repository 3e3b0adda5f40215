"""What is said of a model that is not there, the same whether nobody knows it or the caller may not know of it."""

from __future__ import annotations

from cached.errors import NoSourceError, NotFoundError
from cached.refs import Ref


def not_known(ref: Ref) -> NotFoundError:
    """To whoever asks about it."""
    return NotFoundError(
        f"no model {ref.name!r} is known here",
        hint="`cached ls` lists the known ones; `cached pull NAME --source URI` brings a new one",
        ref=str(ref),
    )


def no_source(ref: Ref) -> NoSourceError:
    """To whoever wants it."""
    return NoSourceError(
        f"nothing says where to get {ref.name} from",
        hint=f"add it to the catalog, or: cached pull {ref.name} --source s3://BUCKET/PREFIX",
        ref=str(ref),
    )


def not_in_l1(ref: Ref) -> NotFoundError:
    """To whoever wants it only if it is in memory."""
    return NotFoundError(f"{ref} is not in L1", hint="attach it without resume to bring it there", ref=str(ref))
