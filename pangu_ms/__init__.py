"""openPangu-2.0 on MindSpore.

`import pangu_ms` is light: MindSpore is imported when a name that needs it is first used.
"""
from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "PanguConfig": "pangu_ms.architectures.openpangu_v2",
    "PanguForCausalLM": "pangu_ms.pretrained",
    "Sampling": "pangu_ms.generation.sampling",
    "generate": "pangu_ms.generation.stream",
    "read_config": "pangu_ms.architectures",
    "stream_generate": "pangu_ms.generation.stream",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'pangu_ms' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
