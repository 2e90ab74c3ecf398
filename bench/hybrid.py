"""KV space that one long request holds, in KV groups and in one group: the embedded engine over layers as in Gemma 3.

Five layers in six see a window of 512 tokens, the sixth sees everything; the stub model stands for the weights, for
only the blocks are counted. `peak` is the most KV held at one time, prefill included; `decode` what is held while the
request decodes. Both exclude the null block. Nothing is timed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import record

from kvferry import LLM, SamplingParams
from kvferry.testing.stub_model import StubModel

NUM_LAYERS, WINDOW_TOKENS = 12, 512
NUM_TOKENS = (512, 2048, 4096)


@dataclass
class Sample:
    """Bytes held by one request."""

    num_tokens: int
    num_groups: int
    peak_bytes: int
    decode_bytes: int


def measure(num_tokens: int, hybrid: bool) -> Sample:
    """Run one request of `num_tokens` prompt tokens and watch the pool."""
    windows = [None if i % 6 == 5 else WINDOW_TOKENS for i in range(NUM_LAYERS)]
    model = StubModel(windows=windows, num_kv_heads=1, head_size=2, max_model_len=8192)
    settings = {"num_kv_blocks": 4096, "max_num_batched_tokens": 512, "disable_hybrid_kv_cache_manager": not hybrid}
    with LLM(model, **settings) as llm:  # type: ignore[arg-type]
        pool = llm.scheduler.manager.block_pool
        block_bytes = llm._hosted.kv.storage.numel() // len(pool.blocks)
        llm.add_request([i % 1000 for i in range(num_tokens)], SamplingParams(max_tokens=4, temperature=0))
        held = []
        while llm.has_unfinished_requests():
            plan = llm.scheduler.schedule()
            held.append(len(pool.blocks) - 1 - pool.get_num_free_blocks())
            llm.scheduler.update(plan, llm.runner.execute(plan))
        num_groups = len(llm.kv_cache_config.kv_cache_groups)
        return Sample(num_tokens, num_groups, max(held) * block_bytes, held[-1] * block_bytes)


def main() -> None:
    """Measure, print, write bench/results/hybrid.json."""
    record.parse(record.parser(__doc__))
    samples = [measure(num_tokens, hybrid) for num_tokens in NUM_TOKENS for hybrid in (False, True)]
    for one, several in zip(samples[::2], samples[1::2], strict=True):
        print(
            f"{one.num_tokens:5} tokens: peak {several.peak_bytes / one.peak_bytes:.0%}, decode "
            f"{several.decode_bytes / one.decode_bytes:.0%} of one group's KV, in {several.num_groups} groups"
        )
    content = {"machine": record.machine(), "num_layers": NUM_LAYERS, "window_tokens": WINDOW_TOKENS}
    print(record.write("hybrid", {**content, "samples": [asdict(sample) for sample in samples]}))


if __name__ == "__main__":
    main()
