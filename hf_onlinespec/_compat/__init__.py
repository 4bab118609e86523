"""Every private name of transformers, PEFT and accelerate that we touch, and what their versions differ in, by theme.

Checked on what docs/versions.md lists. A release that moves one of these names breaks here and nowhere else.
"""
