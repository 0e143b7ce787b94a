"""Filling the model from a directory."""
import mindspore as ms
import numpy as np
import pytest
from safetensors.numpy import load_file

from pangu_ms import PanguForCausalLM
from pangu_ms.errors import PanguError


def test_every_parameter_holds_its_tensor(model, data):
    stored = load_file(data / "odd" / "model.safetensors")
    parameters = {parameter.name: parameter.asnumpy() for parameter in model("odd").get_parameters()}
    for name, values in parameters.items():
        if ".experts." in name:
            layer, projection = name.split(".experts.")
            wanted = np.stack([stored.pop(f"{layer}.experts.{e}.{projection}") for e in range(len(values))])
        else:
            wanted = stored.pop(name)
        np.testing.assert_array_equal(values, wanted)
    assert stored.keys() == {f"model.layers.{i}.{copy}" for i in (5, 6, 7)
                             for copy in ("embed_tokens.weight", "shared_head.head.weight")}


def test_what_decides_stays_float32_in_a_float16_model(data):
    """mHC and the router: their values are the stored ones, not rounded on the way."""
    stored = load_file(data / "tiny" / "model.safetensors")
    model = PanguForCausalLM.from_pretrained(data / "tiny", dtype="float16")
    exact = 0
    for parameter in model.get_parameters():
        decides = any(part in parameter.name for part in ("mhc_module", ".mlp.gate.", "correction_bias"))
        assert parameter.dtype == (ms.float32 if decides else ms.float16), parameter.name
        if decides:
            np.testing.assert_array_equal(parameter.asnumpy(), stored[parameter.name])
            exact += 1
    assert exact == 4 * 2 * 4 + 4 + 6 * 2


def test_bfloat16_on_a_cpu_is_refused(data):
    with pytest.raises(PanguError, match="dtype is bfloat16.*take float32"):
        PanguForCausalLM.from_pretrained(data / "tiny", dtype="bfloat16")
