"""An OpenAI-compatible HTTP server over the embedded engine: `kvferry serve`.

app        routes: bytes in, replies out; no engine calls of its own
protocol   what a client may send, checked, and what it means as prompts and SamplingParams
replies    what a client gets, as OpenAI shapes it
service    between asyncio and the one thread that steps the engine
observe    what the engine reports, as metrics
run        sockets, signals, start and end
"""
