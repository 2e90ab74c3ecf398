"""Tiers below host memory, and what they share."""
