"""How bytes get from one engine to another: a protocol, and a file per transport."""
