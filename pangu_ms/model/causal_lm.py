"""openPangu-2.0: the network, and the compiled functions that run it."""
import dataclasses

import mindspore as ms
import numpy as np
from mindspore import nn, ops
from mindspore.nn.utils import no_init_parameters
from tqdm import tqdm

from pangu_ms.errors import PanguError
from pangu_ms.model.block import Block
from pangu_ms.model.hyper_connection import StreamMerge
from pangu_ms.model.linear import Embedding, Linear
from pangu_ms.model.mtp import MTPLayer
from pangu_ms.model.norm import RMSNorm
from pangu_ms.model.parallel import Parallel
from pangu_ms.model.rows import Rows, positions
from pangu_ms.model.trace import MTPForward, TraceForward, collect_trace


class PanguModel(nn.Cell):
    """Embedding, trunk layers, MTP layers (behind the trunk's in `layers`), stream merge, final norm."""

    def __init__(self, config, parallel):
        super().__init__()
        self.embed_tokens = Embedding(config, parallel)
        self.layers = nn.CellList([(MTPLayer if plan.mtp_depth else Block)(config, plan, parallel)
                                   for plan in config.layers])
        self.merge_mhc_module = StreamMerge(config)
        self.norm = RMSNorm(config.hidden_size, config)
        self.depth, self.streams = config.num_hidden_layers, config.mhc_num_stream

    def construct(self, ids, rows, memory):
        """ids int32 [B, T] -> merged hidden [B, T, H] before the final norm, streams and pieces of each trunk layer."""
        embedding = ops.expand_dims(self.embed_tokens(ids), 2)                  # [B, T, 1, H]
        streams = ops.tile(embedding, (1, 1, self.streams, 1))                  # every stream starts as the embedding
        trace = ()
        for i in range(self.depth):
            streams, pieces = self.layers[i](streams, rows, None if memory is None else memory[i])
            trace = trace + ((streams,) + pieces,)
        return self.merge_mhc_module(streams), trace


class PanguForCausalLM(nn.Cell):
    """`model(ids)`: int32 [B, T] -> logits float32 [B, T, vocab_size], the full sequence without a cache.

    Every position sees what is before it; ids are a Tensor or anything numpy makes an array of. `mtp_logits`, `trace`
    and the generation engine compile functions of their own around the same parameters. On several ranks all of them
    are given the same ids, and get the same results.

    Args:
        config (PanguConfig): of the whole model.
        parallel (Parallel): what of it this process holds; default: all.

    Raises:
        ConfigError: it cannot be shared so (`Parallel.check`).
    """

    def __init__(self, config, parallel=None):
        super().__init__()
        self.config, self.parallel = config, parallel or Parallel()
        self.parallel.check(config)
        self.model = PanguModel(config, self.parallel)
        self.lm_head = Linear(config.hidden_size, config.vocab_size // self.parallel.tensor, config)
        self.gather = self.parallel.gather()
        self.rows = Rows(config, config.layers)
        self.mtp_reads_merged = config.mtp_hidden == "merged"
        self._functions = {}
        self.set_train(False)

    @classmethod
    def from_pretrained(cls, directory, dtype="float32", progress=False, parallel=None):
        """The model of a checkpoint directory, Hugging Face's layout or ours.

        Args:
            directory: holds config.json and model.safetensors, or an index with its shards.
            dtype: "float32", "float16" or "bfloat16"; parameters that stay float32 (mHC, router) do so.
            progress: show a bar of tensors on stderr.
            parallel (Parallel): of this process, which reads no more than it holds; default: the whole model.

        Raises:
            PanguError: what `read_config` and `read_parameters` refuse: every missing, unexpected or
                wrongly shaped tensor is listed by name, before any of them is read.
        """
        from pangu_ms.checkpoint.load import read_config, read_parameters  # here alone: the network knows no files

        if dtype == "bfloat16" and ms.get_context("device_target") == "CPU":
            raise PanguError("dtype is bfloat16, for which MindSpore has next to no operators on a CPU: take float32")
        parallel = parallel or Parallel()
        config = dataclasses.replace(read_config(directory), compute_dtype=dtype)
        with no_init_parameters():
            model = cls(config, parallel)
        parameters = {parameter.name: parameter for parameter in model.get_parameters()}
        exact = [name for name, parameter in parameters.items() if parameter.dtype == ms.float32]
        with read_parameters(directory, config, dtype, exact, parallel.grid, parallel.model_rank) as tensors:
            bar = tqdm(tensors, "loading", len(tensors), unit=" tensors", leave=False, disable=not progress)
            for name, values in bar:
                tensor = ms.Tensor.from_numpy(values)                           # shares the memory of `values`
                if values.dtype == np.uint16:                                   # numpy has no bfloat16: its bits
                    tensor = tensor.view(ms.bfloat16)
                parameters[name].set_data(tensor)
        return model

    def __call__(self, ids):
        return super().__call__(_as_ids(ids))

    def construct(self, ids):
        merged, _ = self.model(ids, self.rows(positions(ids), None, False, True), None)
        return self.logits(merged)

    def logits(self, merged):
        """Hidden [B, T, H] before the final norm -> float32 [B, T, vocab_size]."""
        return self.head(self.model.norm(merged))

    def head(self, normed):
        return self.gather(ops.cast(self.lm_head(normed), ms.float32))

    def mtp_hidden(self, merged):
        """What depth 1 reads: public sources differ on whether it is normed (`mtp_hidden` of the config)."""
        return merged if self.mtp_reads_merged else self.model.norm(merged)

    def mtp(self, depth, ahead, hidden, rows, memory):
        """One MTP depth: ahead int32 [B, T], for each row p the token at p + depth; hidden [B, T, H], of depth - 1.

        memory: None, or the layer's tensors -> hidden [B, T, H], for `mtp_head` and the next depth, and the layer's
        routing.
        """
        return self.model.layers[self.model.depth + depth - 1](self.model.embed_tokens(ahead), hidden, rows, memory)

    def mtp_head(self, depth, hidden):
        """-> float32 [B, T, vocab_size]: row p predicts the token at p + depth + 1."""
        return self.head(self.model.layers[self.model.depth + depth - 1].shared_head(hidden))

    def mtp_logits(self, ids):
        """ids int32 [B, T] -> a list over depth d = 1 .. D of float32 [B, T - d, vocab_size].

        Row p of depth d has seen ids[: p + d + 1] and predicts ids[p + d + 1]. Depths from T on have no row and are
        left out.
        """
        return self.function(MTPForward)(_as_ids(ids))

    def trace(self, ids):
        """The pieces of a full forward, for comparing implementations; see `pangu_ms.model.trace`."""
        return collect_trace(self.config, self.function(TraceForward)(_as_ids(ids)))

    def function(self, cell, *arguments):
        """The one instance of a compiled function of this model: `cell(model, *arguments)`, kept for the next call."""
        if (cell, arguments) not in self._functions:
            self._functions[cell, arguments] = cell(self, *arguments)
        return self._functions[cell, arguments]


def _as_ids(ids):
    return ids if isinstance(ids, ms.Tensor) else ms.Tensor(np.asarray(ids, np.int32))
