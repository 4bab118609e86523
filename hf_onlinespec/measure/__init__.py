"""Measuring ways of generating against each other: `hf-onlinespec try`."""
