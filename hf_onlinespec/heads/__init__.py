"""Draft heads: small modules that draft from the target's hidden states. What they are and how they lie on disk."""
