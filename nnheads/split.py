"""A model in two parts, cut behind a named module, without the user rewriting it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor, fx, nn

from nnheads.classifier_layer import ClassifierTap
from nnheads.errors import AttachError

# What only shrinks or rectifies: when nothing else reads a module's output, the cut comes after these, so that less
# has to be kept, and nothing behind the cut changes it in place.
_LIGHT_FUNCTIONS = frozenset({"relu", "relu_", "max_pool2d", "avg_pool2d", "boolean_dispatch"})
_SUMS = frozenset({"add", "iadd", "add_"})  # a residual connection around the named module ends in one
_LIGHT_MODULES = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Identity)
_ROOT = "model"


@final
class Split:
    """The two parts of a model: ``f1`` up to a named module and ``f2`` from there to the classifier's tap.

    Only the modules around the named one are traced (`torch.fx`); all others are called whole, so what happens
    inside them need not be traceable. The parts share the model's modules: training one trains the model.

    Args:
        model: with its classifier replaced by a `ClassifierTap`.
        at: dotted name of the module whose output h is (behind it, pooling and ReLU that nothing else reads past
            also belong to f1).

    Raises:
        AttachError: there is no such module, or the model cannot be split there.
    """

    def __init__(self, model: nn.Module, at: str) -> None:
        self.at = at
        self._parts: dict[bool, tuple[nn.Module, nn.Module]] = {}
        if at not in dict(model.named_modules(remove_duplicate=False)) or not at:
            names = [name for name, _ in model.named_children()]
            raise AttachError(f"the model has no module {at!r} to split at; its parts: {', '.join(names)}")
        if isinstance(model.get_submodule(at), ClassifierTap):
            raise AttachError(f"{at!r} is the classifier: split the model at a module before it")
        self.parts(model)

    def parts(self, model: nn.Module) -> tuple[nn.Module, nn.Module]:
        """``(f1, f2)`` for the mode that the model is in; the second ends in the tap, which keeps the embedding."""
        mode = model.training
        if mode not in self._parts:
            self._parts[mode] = _split(model, self.at)
        return self._parts[mode]

    def forget(self) -> None:
        """Trace anew when next asked: the model's tensors were replaced."""
        self._parts = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has modules of its own, which are to be traced.
        return {"at": self.at, "_parts": {}}


@final
class _OneInput(nn.Module):
    """Calls a model with one tensor, so that its other arguments have their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.add_module(_ROOT, model)

    def forward(self, x: Tensor) -> Any:
        return self.get_submodule(_ROOT)(x)


@final
class _Tracer(fx.Tracer):
    """Looks only into the modules that contain the one to split at."""

    def __init__(self, opened: set[str]) -> None:
        super().__init__()
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened


def _split(model: nn.Module, at: str) -> tuple[nn.Module, nn.Module]:
    what = f"{type(model).__name__} cannot be split at {at!r}"
    root = _OneInput(model)
    root.training = model.training
    steps = at.split(".")
    opened = {".".join([_ROOT, *steps[:i]]) for i in range(len(steps))}
    try:
        graph = _Tracer(opened).trace(root)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AttachError(
            f"{what}: its forward cannot be traced ({reason}); give its two parts, attach_head((f1, f2), 'biased')"
        ) from error
    target = f"{_ROOT}.{at}"
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == target]
    if len(calls) != 1:
        often = "never calls it" if not calls else f"calls it {len(calls)} times"
        raise AttachError(f"{what}: its forward {often}; name another module")
    cut = _behind_light(calls[0], root)
    taps = [f"{_ROOT}.{name}" for name, module in model.named_modules() if isinstance(module, ClassifierTap)]
    ends = [node for node in graph.nodes if node.op == "call_module" and _holds(str(node.target), taps)]
    before, behind = _ancestors([cut]), _ancestors(ends)
    if not ends or cut in ends or cut not in behind:
        raise AttachError(f"{what}: the classifier does not come after it; name an earlier module")
    inputs = {node for node in graph.nodes if node.op == "placeholder"}
    second = [
        node
        for node in graph.nodes
        if node in behind and (node not in before or not (_ancestors([node]) & inputs)) and node is not cut
    ]
    crossing = sorted(
        {str(given) for node in second for given in node.all_input_nodes if given is not cut and given not in second}
    )
    if crossing:
        raise AttachError(
            f"{what}: what comes before it ({', '.join(crossing[:3])}) is read again behind it; name another module"
        )
    first = [node for node in graph.nodes if node in before]
    return _module(root, first, None, [cut]), _module(root, second, cut, ends)


def _behind_light(node: fx.Node, root: nn.Module) -> fx.Node:
    while len(node.users) == 1:
        (user,) = node.users
        closed = set(user.all_input_nodes) <= _ancestors([node])
        if not closed or not _is_light(user, root, alone=user.all_input_nodes == [node]):
            break
        node = user
    return node


def _is_light(node: fx.Node, root: nn.Module, *, alone: bool) -> bool:
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), _LIGHT_MODULES)
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return node.op.startswith("call_") and name in (_LIGHT_FUNCTIONS if alone else _SUMS)


def _holds(module: str, taps: Sequence[str]) -> bool:
    return any(tap == module or tap.startswith(f"{module}.") for tap in taps)


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes and all they are computed from."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _module(root: nn.Module, nodes: Sequence[fx.Node], given: fx.Node | None, ends: Sequence[fx.Node]) -> nn.Module:
    """The nodes as a module of one input: the model's own, or what ``given`` computes."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    if given is not None:
        copies[given] = graph.placeholder("h")
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    outputs = [copies[end] for end in ends]
    graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    return fx.GraphModule(root, graph)
