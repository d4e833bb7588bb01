"""Faults injected into the real daemon: what a client saw, and how long it took until all was well again."""
