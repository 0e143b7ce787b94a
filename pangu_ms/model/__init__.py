"""The network. Its cells are written to be compiled: importing this package turns MindSpore's graph mode on."""
import mindspore as ms

ms.set_context(mode=ms.GRAPH_MODE)
