"""The device of this process: where graphs run, and which form of a formula they are given."""
from importlib import import_module
from pkgutil import iter_modules

import mindspore as ms
from mindspore.device_context.ascend import device as ascend
from mindspore.ops.primitive import constexpr

REPLACEMENTS = {"CPU": "pangu_ms.ops.cpu", "Ascend": "pangu_ms.ops.ascend"}
NO_ASCEND = "found Ascend, but MindSpore has none here; give CPU, or see python -m pangu_ms.env for what is missing"


def start(device_target=None, **context):
    """Set MindSpore up before a model is made: graph mode, for which its cells are written.

    Args:
        device_target: "CPU" or "Ascend"; default: what MindSpore has found.
        context: other settings of `mindspore.set_context`.
    """
    if device_target is not None:
        context["device_target"] = device_target
    ms.set_context(mode=ms.GRAPH_MODE, **context)


def available(device_target):
    """Whether this process could run on "CPU" or "Ascend"."""
    return device_target != "Ascend" or ascend.is_available()


def target():
    """"CPU" or "Ascend"."""
    return ms.get_context("device_target")


def on_ascend():
    return target() == "Ascend"


def wants_fixed_shapes():
    """Ascend works best on a graph whose every shape is known; on a CPU padding would cost more than it saves."""
    return on_ascend()


def gathers_no_rows(plan):
    """Whether sparse attention reads the rows of the cache where they lie, in a prefill of this plan's network."""
    return _forms().gathers_no_rows(plan)


def replaceable(formula):
    """Decorates a formula that a device may compute in another form.

    The other form is a function of the same name and arguments in `pangu_ms.ops.cpu` or `pangu_ms.ops.ascend`, and
    gives the same up to rounding. It is chosen by the device and the dtype of the first argument, both of which are
    known when a graph is compiled: no choice is left in the graph. `formula` of the decorated function is the formula.
    """
    @constexpr
    def form(dtype):
        return replacement(formula, dtype)

    def call(*arguments):
        return form(arguments[0].dtype)(*arguments)

    call.formula, call.__name__, call.__doc__ = formula, formula.__name__, formula.__doc__
    return call


def replacement(formula, dtype):
    """What this device computes in place of a formula in a dtype; the formula itself, where it has nothing better."""
    forms = _forms()
    return getattr(forms, formula.__name__, formula) if forms.available(dtype) else formula


def formula_modules():
    """The modules whose formulas a device may replace."""
    return [import_module(f"{package}.{module.name}") for package in ("pangu_ms.cache", "pangu_ms.model")
            for module in iter_modules(import_module(package).__path__)]


def _forms():
    return import_module(REPLACEMENTS[target()])
