"""KV from engine to engine: prefill here, decode there."""
