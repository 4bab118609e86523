"""The draft adapts: from feedback to a gradient step."""
