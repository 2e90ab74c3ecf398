"""Connectors to read and to try things with; none of them is for production."""
