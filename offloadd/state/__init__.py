"""The vocabulary: frozen dataclasses that every layer shares, and nothing that acts."""
