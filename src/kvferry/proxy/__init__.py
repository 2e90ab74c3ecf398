"""The P/D router: clients speak OpenAI's protocol to it, it lets one engine prefill and another one decode."""
