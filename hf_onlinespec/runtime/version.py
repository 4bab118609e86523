"""The package's version, for `setup.cfg` and for what is saved; `__init__` hands it on."""

__version__ = "0.1.0"
