"""Plans turned into effects: the reconcile loop, instances, launchers, logs and reload."""
