"""`cached doctor`: looks at the host and at how workers start here, and tells what would help."""

from __future__ import annotations

from cached.cli.doctor.command import doctor

__all__ = ["doctor"]
