"""The architecture of openPangu-2.0 on a checkpoint small enough to read, and a first generation with a cache.

python examples/01_generate.py
"""
import os
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only

from pangu_ms import PanguConfig, PanguForCausalLM, stream_generate
from pangu_ms.cache.sizes import cache_bytes

DIRECTORY = Path(__file__).parents[1] / "tests" / "data" / "tiny"
PROMPT = [1, *range(5, 132)]  # 128 tokens: longer than every window and than index_topk
NEW_TOKENS = 64


def show_architecture(config):
    print("layers")
    kinds = {"dsa": f"attention to the {config.index_topk} rows that an indexer scores highest",
             "swa": "sliding window attention",
             "full": "attention to every row"}
    for kind, meaning in kinds.items():
        found = [layer.attention for layer in config.plan.trunk if layer.attention.kind == kind]
        if found:
            windows = sorted({attention.window for attention in found if attention.window})
            print(f"  {kind:<6}{len(found):>3} of {config.num_hidden_layers}   {meaning}",
                  *(["of", ", ".join(map(str, windows)), "tokens"] if windows else []))
    moe = sum(layer.moe for layer in config.plan.trunk)
    print(f"  moe   {moe:>3} of {config.num_hidden_layers}   {config.num_experts_per_tok} of {config.n_routed_experts} "
          f"experts a token, {config.n_shared_experts} shared; the others have a dense MLP")
    print(f"  mtp   {config.num_nextn_predict_layers:>3} more   each predicts one token further ahead")
    print(f"  between the layers run {config.mhc_num_stream} residual streams of {config.hidden_size}")

    count = config.parameter_count()
    print(f"parameters: {count['trunk']:,} in the trunk, {count['mtp']:,} in the MTP layers; of the trunk")
    for component, number in sorted(count["components"].items(), key=lambda item: -item[1]):
        print(f"  {component:<14}{number:>9,}{number / count['trunk']:>7.1%}")

    size = cache_bytes(config.plan, len(PROMPT) + NEW_TOKENS)
    print(f"cache (float32): {size['per_token']:,} bytes a token in the layers that see the whole context, "
          f"{size['fixed']:,} fixed;\n  {size['total']:,} for {len(PROMPT) + NEW_TOKENS} tokens")


def main():
    print(f"{DIRECTORY.name}: openPangu-2.0 in miniature, with RANDOM weights: its shape is real, its text is noise\n")
    show_architecture(PanguConfig.from_pretrained(DIRECTORY))

    model = PanguForCausalLM.from_pretrained(DIRECTORY)
    print(f"\n{len(PROMPT)} prompt tokens, then {NEW_TOKENS} greedy ones:")
    for response in stream_generate(model, PROMPT, NEW_TOKENS, eos_token_ids=()):
        print(response.token_id, end=" ", flush=True)
    first_seconds = response.prefill_seconds + response.decode_seconds

    *_, response = stream_generate(model, PROMPT, NEW_TOKENS, eos_token_ids=())
    print(f"\n\nfirst run, with the compilation of the graphs: {first_seconds:.1f} s; again, without:")
    print(f"  prefill {response.prefill_tokens / response.prefill_seconds:8,.0f} tokens a second")
    print(f"  decode  {response.decode_tokens / response.decode_seconds:8,.0f} tokens a second")


if __name__ == "__main__":
    main()
