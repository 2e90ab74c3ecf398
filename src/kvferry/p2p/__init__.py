"""Engine to engine: hand the KV of a finished prefill over to another engine. See `core` for the drawing."""
