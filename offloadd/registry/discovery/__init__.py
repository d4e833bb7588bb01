"""Models on this machine's disk: where they lie, what they are, and what they are called. Reads only, never writes."""
