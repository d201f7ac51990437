"""kdsr: distil slow, excellent super-resolution networks into small fast ones."""

__version__ = "0.1.0"
