"""Floor 3: what the user touches in the block: Envoy, Tracer, Cache."""
