"""The data plane: a request finds its model, waits for an instance, and is relayed."""
