"""The tiered store: slots in host memory, tiers below them, one policy over all."""
