"""The draft is shared: on disk, on the Hub, as a plain model; what it gives away."""
