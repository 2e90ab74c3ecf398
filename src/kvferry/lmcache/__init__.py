"""KV in an LMCache server: both sides of the connector and the client of the server's protocol."""
