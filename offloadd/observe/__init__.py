"""The machine, read: devices, engines, model files, processes and probes, joined into one ObservedState."""
