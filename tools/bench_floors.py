"""What generation cannot do without, by the plan of a network: weights that are read, products that are made."""
from pangu_ms.architectures.tensors import count_parameters, parameters
from pangu_ms.cache.sizes import DTYPE_BYTES
from pangu_ms.estimate.attention import visible_pairs

FLOAT32_BYTES = DTYPE_BYTES["float32"]


def decode_bytes(config) -> int:
    """Bytes of float32 weights that one token reads: every trunk layer with the experts chosen for the token, merge,
    final norm, head.

    Of the embedding one row is read, which is nothing beside the rest. The cache is not counted: the floor is that of
    a short context.
    """
    return FLOAT32_BYTES * count_parameters(config)["active"]["with_head"]


def step_bytes(config, drafts: int) -> dict[str, float]:
    """Bytes of float32 weights that a step with drafts reads: verifying 1 + drafts rows, and drafting.

    A matrix is read once for all rows. Of the routed experts those are counted that the rows reach if each chooses
    evenly and for itself. Drafting runs the MTP layers, the last one once more for each draft that has no layer of its
    own, and the head for each draft; their windows are a few rows, see `Draft`.
    """
    from pangu_ms.generation.steps import Draft

    depths = min(drafts, len(config.plan.mtp_layers))
    verify, draft = 0.0, 0.0
    for p in parameters(config).values():
        def read(rows, p=p):
            if p.component != "expert":
                return p.count
            moe = p.layer.feed_forward
            return p.count * (1 - (1 - moe.experts_per_token / moe.num_experts) ** rows)

        depth = p.layer.mtp_depth if p.layer else 0
        if depth:
            draft += read(Draft.window(drafts, depths)) if depth <= depths else 0
            draft += (drafts - depths) * read(1) if depth == depths else 0
        elif p.component != "embedding":
            verify += read(1 + drafts)
            draft += drafts * p.count if p.component == "head" else 0
    return {"verify": FLOAT32_BYTES * verify, "draft": FLOAT32_BYTES * draft}


def prefill_flop(config, tokens: int) -> int:
    """Floating-point operations of the products that a prefill of `tokens` cannot do without.

    weights      a token multiplies with each active weight of the layers and adds: 2 per weight and token. (Vectors,
                 such as the gains of norms, are among them: under 1 % at real widths.)
    head         the same, for the last token alone.
    attention    a query and a row that it sees, a sink or an earlier token or itself, cost each head one dot product
                 over a key's width, and as many multiplications and additions for the output as a value is wide. A
                 query sees all sinks, and of n rows up to itself min(n, window) or min(n, topk).
    indexer      where n is more than topk, each head of the query's indexer scores all n rows and is added by weight.
    """
    plan = config.plan
    flop = 2 * (count_parameters(config)["active"]["layers"] * tokens + plan.vocab_size * plan.hidden_size)
    for attention in (layer.attention for layer in plan.trunk):
        indexer = attention.indexer
        seen = visible_pairs(0, tokens, indexer.topk if indexer else attention.window)
        pair = 2 * attention.num_heads * (attention.qk_head_dim + attention.v_head_dim)
        flop += pair * (seen + tokens * attention.sinks)
        if indexer and tokens > indexer.topk:
            scored = visible_pairs(indexer.topk, tokens - indexer.topk, None)
            flop += 2 * indexer.num_heads * (indexer.head_dim + 1) * scored
    return int(flop)
