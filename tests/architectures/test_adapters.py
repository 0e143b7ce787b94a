"""Which matrices an adapter stands beside, and the names and shapes of its tensors."""
import pytest

from pangu_ms.architectures.adapters import Adapter, adapter_tensors, carries, targets
from pangu_ms.architectures.tensors import extended, parameters
from pangu_ms.checkpoint.directory import read_config
from pangu_ms.errors import ConfigError


@pytest.mark.parametrize("name, pattern, wanted", [
    ("tiny", r".*\.1\.self_attn\.q_a_proj", {"model.layers.1.self_attn.q_a_proj"}),
    ("tiny", r".*\.1\.mlp\.experts\.\d+\.(gate|up)_proj",
     {"model.layers.1.mlp.experts.gate_proj", "model.layers.1.mlp.experts.up_proj"}),
    ("embedded", r".*\.0\.self_attn\.[qk]_proj", {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"}),
    ("pro_moe_v2", r".*\.0\.self_attn\.qkv_proj", {"model.layers.0.self_attn.qkv_proj"}),
    ("ultra_moe", r".*\.0\.self_attn\.kv_b_proj", {"model.layers.0.self_attn.kv_b_proj"}),
])
def test_a_pattern_matches_whole_hugging_face_names(data, name, pattern, wanted):
    """A bias of a matched module stays as it is; experts are matched one by one and adapted together."""
    assert {p.name for p in targets(read_config(data / name), pattern)} == {f"{each}.weight" for each in wanted}


@pytest.mark.parametrize("pattern, message", [
    (r"q_a_proj", r"matches the whole name of no module; their names are such as model.layers.0.self_attn.q_a_proj"),
    (r".*\.q_a_layernorm", r"matches model.layers.0.self_attn.q_a_layernorm.* which can carry no adapter"),
    (r".*(q_a_proj|mlp\.gate)", r"matches model.layers.1.mlp.gate.* which can carry no adapter"),
    (r".*param_sink_k_pe", r"matches model.layers.0.self_attn.param_sink_k_pe.* which can carry no adapter"),
    (r".*indexer\.wk", r"matches model.layers.0.self_attn.indexer.wk.* which can carry no adapter"),
    (r"lm_head|model\.embed_tokens", r"matches model.embed_tokens, lm_head, which can carry no adapter"),
    (r".*", r"matches model.embed_tokens, .* and \d+ more, which can carry no adapter"),
    (r".*experts\.[01]\.up_proj", r"matches 2 of the 8 experts of model.layers.1.mlp.experts.up_proj, such as"),
    (r"(", r"'\(' is no regular expression"),
])
def test_a_wrong_pattern_is_refused_by_name(data, pattern, message):
    with pytest.raises(ConfigError, match=rf"^model.pet_config.target_modules: .*{message}") as raised:
        targets(read_config(data / "tiny"), pattern)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["tiny", "embedded", "pro_moe", "pro_moe_v2", "ultra_moe"])
def test_tensors_have_the_shapes_of_their_matrices(data, name):
    """lora_A [rank, columns], lora_B [rows, rank] as PEFT has them, for experts a pair each."""
    config = read_config(data / name)
    adapter = Adapter(3, 6.0, 0.0, "|".join(source.removesuffix(".weight").replace(".", r"\.")
                                            for p in parameters(config).values() if carries(p) for source in p.sources))
    found = adapter_tensors(config, adapter)
    carriers = [p for p in parameters(config).values() if carries(p)]
    assert len(found) == 2 * len(carriers) > 0 and adapter.scale == 2
    for p in carriers:
        module, stack = p.name.removesuffix(".weight"), p.shape[:-2]
        down, up = (found[f"{module}.lora_{kind}.weight"] for kind in "AB")
        assert (down.shape, up.shape) == ((*stack, 3, p.shape[-1]), (*stack, p.shape[-2], 3))
        assert down.sources == tuple(source.replace(".weight", ".lora_A.weight") for source in p.sources)
    known = parameters(config)
    assert parameters(extended(config, found)) == known | found and parameters(config) is known
