"""The model that users hold: a network, filled from a checkpoint directory, and its compiled functions."""
import dataclasses

import mindspore as ms
import numpy as np
from mindspore.nn.utils import no_init_parameters
from tqdm import tqdm

from pangu_ms import device
from pangu_ms.architectures.tensors import check_ranks
from pangu_ms.checkpoint.directory import read_config
from pangu_ms.checkpoint.load import read_parameters
from pangu_ms.errors import PanguError
from pangu_ms.model.causal_lm import CausalLM
from pangu_ms.model.trace import MTPForward, TraceForward, collect_trace
from pangu_ms.parallel.ranks import Ranks


class PanguForCausalLM(CausalLM):
    """`model(ids)`: int32 [B, T] -> logits float32 [B, T, vocab_size], the full sequence without a cache.

    Every position sees what is before it; ids are a Tensor or anything numpy makes an array of. `mtp_logits`, `trace`
    and the generation engine compile functions of their own around the same parameters. On several ranks all of them
    are given the same ids, and get the same results.

    Args:
        config: of the whole model, see `pangu_ms.architectures`.
        ranks (Ranks): which part of it this process holds; default: all.

    Raises:
        ConfigError: it cannot be shared so (`check_ranks`).

    Attributes:
        adapter: in training what PEFT's adapter_config.json says of the adapter that is trained; None: there is none.
    """

    adapter = None

    def __init__(self, config, ranks=None):
        device.start()
        ranks = ranks or Ranks()
        check_ranks(config, ranks)
        super().__init__(config.plan, ranks)
        self.config = config
        self._functions = {}
        self.set_train(False)

    @classmethod
    def from_pretrained(cls, directory, dtype="float32", progress=False, ranks=None, adapter=None):
        """The model of a checkpoint directory, Hugging Face's layout or ours.

        Args:
            directory: holds config.json and model.safetensors, or an index with its shards.
            dtype: "float32", "float16" or "bfloat16"; parameters that stay float32 (mHC, router) do so.
            progress: show a bar of tensors on stderr.
            ranks (Ranks): with this process's place, which reads no more than it holds; default: the whole model.
            adapter: a directory with a LoRA adapter in PEFT's layout, or a run that trains one: merged while loading.

        Raises:
            PanguError: what `read_config` and `read_parameters` refuse: every missing, unexpected or
                wrongly shaped tensor is listed by name, before any of them is read.
        """
        if dtype == "bfloat16" and not device.on_ascend():
            raise PanguError("dtype is bfloat16, for which MindSpore has next to no operators on a CPU: take float32")
        ranks = ranks or Ranks()
        config = dataclasses.replace(read_config(directory), compute_dtype=dtype)
        with no_init_parameters():
            model = cls(config, ranks)
        parameters = {parameter.name: parameter for parameter in model.get_parameters()}
        exact = [name for name, parameter in parameters.items() if parameter.dtype == ms.float32]
        with read_parameters(directory, config, dtype, exact, ranks.model, adapter) as tensors:
            bar = tqdm(tensors, "loading", len(tensors), unit=" tensors", leave=False, disable=not progress)
            for name, values in bar:
                tensor = ms.Tensor.from_numpy(values)                           # shares the memory of `values`
                if values.dtype == np.uint16:                                   # numpy has no bfloat16: its bits
                    tensor = tensor.view(ms.bfloat16)
                parameters[name].set_data(tensor)
        return model

    def __call__(self, ids):
        return super().__call__(self._checked(ids))

    def mtp_logits(self, ids):
        """ids int32 [B, T] -> a list over depth d = 1 .. D of float32 [B, T - d, vocab_size].

        Row p of depth d has seen ids[: p + d + 1] and predicts ids[p + d + 1]. Depths from T on have no row and are
        left out.
        """
        return self.function(MTPForward)(self._checked(ids))

    def trace(self, ids):
        """The pieces of a full forward, for comparing implementations; see `pangu_ms.model.trace`."""
        return collect_trace(self.plan, self.function(TraceForward)(self._checked(ids)))

    def function(self, cell, *arguments):
        """The one instance of a compiled function of this model: `cell(model, *arguments)`, kept for the next call."""
        if (cell, arguments) not in self._functions:
            self._functions[cell, arguments] = cell(self, *arguments)
        return self._functions[cell, arguments]

    def _checked(self, ids):
        """ids as a Tensor int32 [B, T]; `PanguError` for another rank or dtype, or an id outside the vocabulary."""
        found = ids.asnumpy() if isinstance(ids, ms.Tensor) else np.asarray(ids)
        if found.ndim != 2 or not found.size or not issubclass(found.dtype.type, np.integer):
            raise PanguError(f"ids are {found.dtype} {list(found.shape)}: wanted integers [B, T], for one sequence "
                             "[[1, 2, 3]]")
        if found.min() < 0 or found.max() >= self.plan.vocab_size:
            wrong = found.min() if found.min() < 0 else found.max()
            raise PanguError(f"ids hold {wrong}, outside the vocabulary: wanted 0 to {self.plan.vocab_size - 1}")
        return ms.Tensor(found.astype(np.int32))
