"""KV outlives the engine, in host memory and in the tiers below it."""
