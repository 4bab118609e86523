"""What the client of the Hub raises. It lets errors of its HTTP library through, whose name has changed before."""

from __future__ import annotations

from .versions import imports_of_others

with imports_of_others():
    from huggingface_hub.errors import HFValidationError, HTTPError, RevisionResolutionError

# What a call of the Hub's client may raise: no network, no rights, nothing there, a name that is none; RuntimeError comes out
# of the upload of large files, ValueError of an answer that is no JSON.
HUB_FAILURES = (HFValidationError, HTTPError, RevisionResolutionError, OSError, RuntimeError, ValueError)
