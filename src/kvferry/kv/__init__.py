"""What KV is: where its bytes lie, how it is named, and the memory that holds it."""
