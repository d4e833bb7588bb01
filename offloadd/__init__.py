"""offloadd: one daemon that owns the LLM server processes of a GPU machine."""

__version__ = "0.1.0"
