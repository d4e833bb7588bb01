"""The control plane over HTTP: what is there, and why."""
