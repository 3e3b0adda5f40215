"""The origin ``hf://ORG/REPO[@REVISION][/PATH]``, on the Hugging Face hub or any server that speaks its protocol."""

from __future__ import annotations

from cached.origins.hub.origin import HubOrigin

__all__ = ["HubOrigin"]
