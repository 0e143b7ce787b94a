"""A small random model whose heads, experts and vocabulary four ranks can share, and runs of several processes."""
import dataclasses
import subprocess

import numpy as np
import pytest
from safetensors.numpy import save_file

from pangu_ms.architectures.openpangu_v2 import PanguConfig
from pangu_ms.architectures.pangu_embedded import PanguEmbeddedConfig
from pangu_ms.architectures.pangu_pro_moe import PanguProMoEConfig
from pangu_ms.architectures.pangu_pro_moe_v2 import PanguProMoEV2Config
from pangu_ms.architectures.pangu_ultra_moe import PanguUltraMoEConfig
from pangu_ms.architectures.tensors import parameters
from tests import launch

CONFIG = PanguConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=1,
    num_nextn_predict_layers=1, num_attention_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=8, num_experts_per_tok=3, first_k_dense_replace=0,
    mhc_recur_norm=4, mhc_num_stream=2, block_post_layernorm_idx=(0,), param_sink_number=4, dsa_layers=(0,),
    swa_layers=(1,), sliding_window_list=(6,), index_n_heads=2, index_head_dim=16, index_topk=8,
    max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None)

GROUPED = PanguEmbeddedConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, rope_theta=1e4, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
    eos_token_id=None, pad_token_id=None)

FUSED = PanguProMoEV2Config(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, qk_nope_dim=6, qk_rope_dim=4, v_channels=8, param_sink_number=3, rope_theta=1e4,
    max_position_embeddings=256, mlp_only_layers=(0,), num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=32, bos_token_id=None, eos_token_id=None, pad_token_id=None)
MIXED = PanguProMoEConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_experts=12,
    num_experts_per_tok=4, moe_intermediate_size=16, shared_expert_intermediate_size=24, rope_theta=1e4,
    max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None)
LATENT = PanguUltraMoEConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=1,
    num_dense_layers=0, num_attention_heads=4, attention_q_lora_dim=24, attention_kv_lora_dim=16, attention_qk_dim=8,
    attention_qk_rope_dim=8, attention_v_dim=8, num_routed_experts=8, num_experts_per_tok=3, rope_theta=1e4,
    max_position_embeddings=256)

# 194 MB, of which each of four ranks takes 86: enough to be measured.
LARGE = dataclasses.replace(CONFIG, vocab_size=32768, hidden_size=512, moe_intermediate_size=512)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The directory of a model of CONFIG with random weights; in it a directory for each of the others."""
    directory, random = tmp_path_factory.mktemp("model"), np.random.default_rng(3)
    for config, place in ((CONFIG, directory), (GROUPED, directory / "grouped"), (FUSED, directory / "fused"),
                          (MIXED, directory / "mixed"), (LATENT, directory / "latent")):
        config.save_pretrained(place)
        tensors = {}
        for name, parameter in parameters(config).items():
            values = random.standard_normal(parameter.shape) * 0.3
            tensors[name] = (values + ("norm" in name)).astype(np.float32)
        save_file(tensors, place / "model.safetensors")
    (directory / "large").mkdir()
    LARGE.save_pretrained(directory / "large")
    save_file({name: np.ones(p.shape, np.float32) for name, p in parameters(LARGE).items()},
              directory / "large" / "model.safetensors")
    return directory


@pytest.fixture(scope="session")
def msrun(tmp_path_factory):
    """msrun(processes, script, *arguments) -> (exit code, what it printed, the directory of its logs)."""
    def run(processes, script, *arguments):
        logs = tmp_path_factory.mktemp("logs")
        done = launch.msrun([f"--worker_num={processes}", f"--local_worker_num={processes}", f"--log_dir={logs}",
                             "--join=True", script, *arguments], cwd=logs, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)
        return done.returncode, done.stdout, logs
    return run
