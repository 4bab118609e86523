"""3 the draft adapts: from feedback to a gradient step."""
