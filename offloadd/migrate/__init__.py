"""Configs of other programs as configs of offloadd: what can be carried over, and a list of what cannot, each with its line."""
