"""KV between engines: one protocol core, thin transports."""
