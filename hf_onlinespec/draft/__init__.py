"""OnlineDraft: a draft that learns while it serves; the four steps in one object, from call to call."""

from .kept import kept_draft, online_draft
from .online import OnlineDraft

__all__ = ["OnlineDraft", "kept_draft", "online_draft"]
