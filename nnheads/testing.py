"""The contract of a head, as checks that anyone can run on a head of their own.

    import nnheads.testing
    import my_heads  # registers "mine"
    nnheads.testing.check_head("mine", k=5)

or one test a check, with `head_checks` and ``pytest.mark.parametrize``. A check raises `AssertionError` with one line
that says what the head does and what the contract asks for. Everything runs on the CPU in well under a second.
"""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import EmptyMemoryError, ShapeError
from .heads import Head, MemoryHead, build_head, head_class, list_heads

#: Width of the embeddings and number of classes that the checks build heads with.
IN_FEATURES, NUM_CLASSES = 16, 3


class Check(Protocol):
    """One named check: takes the name of a registered head and its options, raises `AssertionError`."""

    __name__: str

    def __call__(self, name: str, **options: Any) -> None: ...


_CHECKS: dict[str, Check] = {}


def head_checks() -> dict[str, Check]:
    """All checks by name, in the order in which `check_head` runs them."""
    return dict(_CHECKS)


def check_head(name: str, **options: Any) -> None:
    """Run every check on a registered head.

    Args:
        name: see `nnheads.list_heads`.
        options: the head's options, as JSON takes them; a ``k`` among them may be larger than the number of samples.

    Raises:
        AssertionError: the head breaks the contract; the check is named.
    """
    for check in _CHECKS.values():
        check(name, **options)


def _check(body: Callable[[str, dict[str, Any]], None]) -> Check:
    """Register a check: it runs from a fixed seed and its failures carry its name."""
    label = body.__name__.removeprefix("_").removesuffix("_")

    def check(name: str, **options: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                body(name, options)
            except AssertionError as error:
                raise AssertionError(f"head {name!r} {options}: {label}: {error}") from error

    check.__name__ = label
    check.__doc__ = body.__doc__
    _CHECKS[label] = check
    return check


# ---- material ----------------------------------------------------------------------------------------------------


def _samples(per_class: int = 8, classes: int = NUM_CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (n, d) in one cloud a class, labels (n,) and ids (n,)."""
    y = torch.arange(per_class * classes) % classes
    return 0.3 * torch.randn(len(y), IN_FEATURES) + 2 * torch.eye(IN_FEATURES)[y], y, torch.arange(len(y)) * 3 + 1


def _build(name: str, options: dict[str, Any], classes: int = NUM_CLASSES) -> Head:
    return build_head(name, IN_FEATURES, classes, **options)


def _fill(head: Head, z: Tensor, y: Tensor, ids: Tensor, *, replace: bool = True) -> None:
    head.begin_refresh(replace=replace)
    for part in torch.arange(len(z)).split(10):
        head.memorize(z[part], y[part], ids=ids[part])
    head.refreshed()


def _filled(name: str, options: dict[str, Any]) -> tuple[Head, Tensor, Tensor, Tensor]:
    head = _build(name, options)
    z, y, ids = _samples()
    _fill(head, z, y, ids)
    return head, z, y, ids


def _trained(name: str, options: dict[str, Any]) -> tuple[Head, Tensor, Tensor, Tensor]:
    """A head some steps after its last refresh, so that everything it trains has moved."""
    head, z, y, ids = _filled(name, options)
    _train(head, z, y, ids, steps=3)
    return head.eval(), z, y, ids


def _emptied(name: str, options: dict[str, Any]) -> tuple[Head, Tensor, Tensor, Tensor]:
    """A head that has forgotten what it held."""
    head, z, y, ids = _filled(name, options)
    if isinstance(head, MemoryHead):
        head.drop(head.memory.ids[: len(head.memory)].clone())
    return head, z, y, ids


def _train(head: Head, z: Tensor, y: Tensor, ids: Tensor, steps: int, *, output: bool = False) -> tuple[float, float]:
    """Loss before and after training a linear layer and the head, by `loss` or by a criterion on the output."""
    layer = nn.Linear(IN_FEATURES, IN_FEATURES)
    nn.init.eye_(layer.weight)
    optimizer = torch.optim.SGD([{"params": layer.parameters()}, *head.param_groups(0.05)], lr=0.05)
    first = last = math.nan
    for step in range(steps):
        features = layer(z)
        loss = (
            F.cross_entropy(head.train()(features, ids=ids), y) if output else head.train().loss(features, y, ids=ids)
        )
        first, last = (loss.item() if step == 0 else first), loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return first, last


def _expect(condition: bool, message: str) -> None:
    if not condition:  # an assert statement would vanish under python -O
        raise AssertionError(message)


def _expect_log_probs(out: Tensor, batch: int, classes: int = NUM_CLASSES, dtype: torch.dtype = torch.float32) -> None:
    _expect(out.shape == (batch, classes), f"output is {tuple(out.shape)}, must be {(batch, classes)}")
    _expect(out.dtype == dtype, f"output is {out.dtype}, must be {dtype}")
    _expect(bool(torch.isfinite(out).all()), "log-probabilities are not finite")
    _expect(bool((out.logsumexp(-1).abs() < 1e-4).all()), "probabilities do not sum to one")


def _expect_same(a: Tensor, b: Tensor, what: str, tolerance: float = 0.0) -> None:
    near = a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance))
    _expect(near, f"{what}: outputs differ")


def _expect_one_line(call: Callable[[], object], error: type[Exception], what: str) -> None:
    try:
        call()
    except error as raised:
        _expect(bool(str(raised)) and "\n" not in str(raised), f"{what}: the message must be one line")
    except Exception as other:
        raise AssertionError(f"{what}: raises {type(other).__name__}, must raise {error.__name__}") from other
    else:
        raise AssertionError(f"{what}: must raise {error.__name__}")


def _gradient(loss: Tensor, z: Tensor) -> Tensor:
    if not loss.requires_grad:
        return torch.zeros_like(z)
    (gradient,) = torch.autograd.grad(loss, z, allow_unused=True, materialize_grads=True)
    return gradient


def _state(head: Head) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in head.state_dict().items()}


def _unchanged(head: Head, before: dict[str, Tensor]) -> bool:
    after = head.state_dict()
    return before.keys() == after.keys() and all(
        before[key].shape == after[key].shape and bool(torch.equal(before[key].nan_to_num(), after[key].nan_to_num()))
        for key in before
    )


# ---- what it is --------------------------------------------------------------------------------------------------


@_check
def _declaration(name: str, options: dict[str, Any]) -> None:
    """Registered, final, with its flags; deciding by stored samples means being a `MemoryHead`."""
    cls = head_class(name)
    others = [head_class(other) for other in list_heads() if other != name]
    _expect(not any(issubclass(cls, other) for other in others), "inherits from another registered head")
    _expect(cls.name == name, f"name is {cls.name!r}")
    _expect(isinstance(cls.uses_memory, bool) and isinstance(cls.differentiable, bool), "a flag is no bool")
    _expect(cls.trains_with in ("output", "objective"), f"trains_with is {cls.trains_with!r}")
    _expect(issubclass(cls, MemoryHead) == cls.uses_memory, "uses_memory must be True exactly for a MemoryHead")
    _expect(cls.differentiable or cls.trains_with == "objective", "an output without gradient cannot train")


@_check
def _configuration(name: str, options: dict[str, Any]) -> None:
    """``config()`` survives JSON, names options only, holds the options given and rebuilds the head."""
    head = _build(name, options)
    config = json.loads(json.dumps(head.config()))
    unknown = set(config) - set(head.option_names())
    _expect(not unknown, f"config() names {sorted(unknown)}, which the constructor does not take")
    given = json.loads(json.dumps(options))
    _expect(all(config.get(key) == value for key, value in given.items()), f"config() gives {config} for {given}")
    again = _build(name, config)
    _expect(json.loads(json.dumps(again.config())) == config, "config() changes when the head is rebuilt from it")


@_check
def _parameter_groups(name: str, options: dict[str, Any]) -> None:
    """``param_groups`` covers each parameter exactly once, at the rate asked for."""
    head = _build(name, options)
    grouped = [id(p) for group in head.param_groups(0.1, 1e-4) for p in group["params"]]
    _expect(sorted(grouped) == sorted(id(p) for p in head.parameters()), "a parameter is missing or stands twice")


# ---- what it answers ---------------------------------------------------------------------------------------------


@_check
def _output(name: str, options: dict[str, Any]) -> None:
    """(B, C) float32 log-probabilities in training and evaluation, also for samples far from everything."""
    head, z, _, ids = _filled(name, options)
    _expect_log_probs(head.train()(z, ids=ids), len(z))
    _expect_log_probs(head.eval()(z), len(z))
    _expect_log_probs(head(z * 1e3), len(z))


@_check
def _flags(name: str, options: dict[str, Any]) -> None:
    """``differentiable`` and ``uses_memory`` are what the gradients and the outputs say."""
    head = _build(name, options)
    z, y, ids = _samples()
    z = torch.randn_like(z)  # classes mixed, so that a vote of neighbours has something to weigh
    _fill(head, z, y, ids)
    head.train()
    z.requires_grad_()
    slope = float(_gradient(F.nll_loss(head(z, ids=ids), (y + 1) % NUM_CLASSES), z).abs().max())
    _expect((slope > 0) == head.differentiable, f"differentiable is {head.differentiable}, the gradient is {slope:g}")
    fresh = _build(name, options).eval()
    before = fresh(z).detach()
    _fill(fresh, z.detach(), y, ids)
    moved = not torch.equal(before, fresh(z))
    _expect(moved == head.uses_memory, f"uses_memory is {head.uses_memory}, memorizing changes the output: {moved}")


@_check
def _evaluation_changes_nothing(name: str, options: dict[str, Any]) -> None:
    """In evaluation asking twice gives the same answer and leaves the state as it was."""
    head, z, _, _ = _trained(name, options)
    state = _state(head)
    _expect_same(head(z), head(z), "asked twice")
    if isinstance(head, MemoryHead):
        head.neighbors(z)
    _expect(_unchanged(head, state), "evaluation changes the state")


@_check
def _ids(name: str, options: dict[str, Any]) -> None:
    """ids (B,), (B, 2), -1 and unknown ones are accepted; no sample has itself among its neighbours."""
    head, z, y, ids = _filled(name, options)
    for given in (ids, torch.stack([ids, ids.flip(0)], 1), torch.full_like(ids, -1), ids + 10**6):
        _expect_log_probs(head.train()(z, ids=given), len(z))
        _expect(
            bool(torch.isfinite(head.loss(z, y, ids=given))), f"the loss with ids {tuple(given.shape)} is not finite"
        )
        if isinstance(head, MemoryHead):
            found = head.neighbors(z, ids=given, k=len(z)).ids
            own = (found.unsqueeze(-1) == given.view(len(z), 1, -1)) & (found >= 0).unsqueeze(-1)
            _expect(not bool(own.any()), "a sample is among its own neighbours")
    _expect_same(head.eval()(z, ids=torch.full_like(ids, -1)), head(z), "ids of -1 are not as no ids")


@_check
def _neighbors(name: str, options: dict[str, Any]) -> None:
    """Neighbours are stored samples, nearest first, with weights that sum to one; empty slots have id -1."""
    head, z, y, ids = _filled(name, options)
    if not isinstance(head, MemoryHead):
        return
    head.eval()
    for k in (None, 1, 5, len(z) + 7):
        found = head.neighbors(z, k=k)
        shapes = {part.shape for part in (found.rows, found.ids, found.labels, found.distances, found.weights)}
        _expect(len(shapes) == 1 and (k is None or shapes == {(len(z), k)}), f"shapes are {shapes} for k={k}")
        filled = found.ids >= 0
        _expect(int(filled.sum(1).max()) <= len(z), "more neighbours than samples")
        _expect_same(found.weights.sum(1), torch.ones(len(z)), "sum of the weights", 1e-4)
        _expect(bool((found.weights >= 0).all() and (found.weights[~filled] == 0).all()), "a weight is wrong")
        _expect(bool(torch.isinf(found.distances[~filled]).all()), "an empty slot must be infinitely far")
        nearest_first = found.distances.nan_to_num(posinf=1e9).diff(dim=1)
        _expect(bool((nearest_first >= -1e-3).all()), "neighbours are not in order of distance")
        places = torch.searchsorted(ids, found.ids[filled])
        _expect(bool(torch.equal(ids[places], found.ids[filled])), "an id was never stored")
        _expect(bool(torch.equal(y[places], found.labels[filled])), "a label is not the one stored under the id")


@_check
def _explanation(name: str, options: dict[str, Any]) -> None:
    """What neighbours contribute adds up, with the rest, to the head's own probabilities, to 1e-5; however many are
    listed."""
    for build in (_filled, _trained, _emptied):
        head, z, _, ids = build(name, options)
        if not isinstance(head, MemoryHead):
            return
        head.eval()
        for given in (None, ids):
            expected = head(z, ids=given).exp()
            own = head.explain(z, ids=given)
            found = head.neighbors(z, ids=given)
            _expect_same(own.weights, found.weights, "weights", 1e-6)
            _expect(bool(torch.equal(own.ids, found.ids)), "explain() and neighbors() name other samples")
            for k in (None, 1, 3, len(z) + 7):
                why = head.explain(z, ids=given, k=k)
                many = own.ids.shape[1] if k is None else k
                _expect(why.shares.shape == (len(z), many, head.num_classes), f"shares are {tuple(why.shares.shape)}")
                _expect(why.ids.shape == (len(z), many), f"ids are {tuple(why.ids.shape)} for k={k}")
                _expect_same(why.probabilities, expected, f"contributions do not add up for k={k}", 1e-5)
                _expect(bool((why.shares[why.ids < 0] == 0).all()), "an empty slot contributes")
                listed = why.ids.sort(1).values
                _expect(not bool(((listed.diff(dim=1) == 0) & (listed[:, 1:] >= 0)).any()), "a sample is listed twice")


@_check
def _calibration(name: str, options: dict[str, Any]) -> None:
    """Calibration makes answers in evaluation more or less certain and changes none; outlier scores are finite."""
    head, z, _, ids = _trained(name, options)
    plain = head(z)
    for temperature, share in ((0.5, 0.0), (3.0, 0.0), (1.0, 0.1), (2.0, 0.02)):
        head.set_temperature(temperature, share)
        expected = ((1 - share) * (plain / temperature).softmax(-1) + share / plain.shape[-1]).log()
        _expect_same(head(z), expected, f"at temperature {temperature}, {share} shared", 1e-5)
        if isinstance(head, MemoryHead):
            why = head.explain(z)
            _expect_same(why.probabilities, expected.exp(), f"explained at {temperature}, {share} shared", 1e-5)
            _expect(abs(why.uniform_share - share) < 1e-6, f"explained with {why.uniform_share} shared, not {share}")
        again = _build(name, head.config())
        again.load_state_dict(head.state_dict())
        _expect_same(again.eval()(z), head(z), "loaded with a temperature")
        training = copy.deepcopy(head).train()
        training.set_temperature(1.0)
        _expect_same(copy.deepcopy(head).train()(z, ids=ids), training(z, ids=ids), "in training, at a temperature")
    scores = head.outlier_scores(z)
    _expect(scores.shape == (len(z),) and bool(torch.isfinite(scores).all()), f"outlier scores are {scores}")


# ---- few samples -------------------------------------------------------------------------------------------------


@_check
def _empty_memory(name: str, options: dict[str, Any]) -> None:
    """Without samples: uniform in evaluation; in training an error where the output trains, else a usable loss."""
    head = _build(name, options)
    z, y, ids = _samples()
    if isinstance(head, MemoryHead):
        out = head.eval()(z, ids=ids)
        _expect_log_probs(out, len(z))
        _expect_same(out, torch.full_like(out, -math.log(NUM_CLASSES)), "not uniform", 1e-5)
        _expect(bool((head.neighbors(z).ids == -1).all()), "neighbors() finds something")
    head.train()
    if head.uses_memory and head.trains_with == "output":
        _expect_one_line(lambda: head(z, ids=ids), EmptyMemoryError, "training without samples")
        return
    z.requires_grad_()
    _expect(float(_gradient(head.loss(z, y, ids=ids), z).abs().max()) > 0, "the loss has no gradient")


@_check
def _few_samples(name: str, options: dict[str, Any]) -> None:
    """One sample, one class, k beyond the memory: finite everywhere, and the class stored is the answer."""
    z, y, ids = _samples()
    for keep in (torch.tensor([1]), (y == 1).nonzero().squeeze(1)):
        head = _build(name, {**options, "k": 1000} if options.get("k", 0) else options)
        _fill(head, z[keep], y[keep], ids[keep])
        _expect_finite_training(head, z[keep], y[keep], ids[keep])
        out = head.eval()(z)
        _expect_log_probs(out, len(z))
        _expect(
            not head.uses_memory or bool((out.argmax(1)[keep] == 1).all()), "the only class stored is not the answer"
        )
    single = _build(name, options, classes=1)
    _fill(single, z, y * 0, ids)
    _expect_log_probs(single.eval()(z), len(z), 1)


@_check
def _duplicates(name: str, options: dict[str, Any]) -> None:
    """Samples that coincide, of one class or of several, give a finite loss and finite gradients."""
    head = _build(name, options)
    z, y, ids = _samples()
    z = z[:1].expand(len(z), -1).clone()
    _fill(head, z, y, ids)
    _expect_finite_training(head, z, y, ids)
    _expect_log_probs(head.eval()(z), len(z))


def _expect_finite_training(head: Head, z: Tensor, y: Tensor, ids: Tensor) -> None:
    head.train()
    for given in (ids, torch.full_like(ids, -1)):
        leaf = z.clone().requires_grad_()
        loss = head.loss(leaf, y, ids=given)
        if loss.requires_grad:
            loss.backward()
        gradients = [leaf.grad, *(p.grad for p in head.parameters())]
        finite = all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)
        _expect(bool(torch.isfinite(loss)) and finite, "the loss or a gradient is not finite")
        stored = head.memory.state_dict().values() if isinstance(head, MemoryHead) else []
        _expect(all(bool(torch.isfinite(part).all()) for part in stored), "training makes a center infinite")


@_check
def _empty_batch(name: str, options: dict[str, Any]) -> None:
    """No rows in, no rows out, a loss of zero; storing nothing changes nothing, also before anything is stored."""
    fresh = _build(name, options)
    z, y, ids = _samples()
    nothing = z[:0], y[:0], ids[:0]
    fresh.memorize(nothing[0], nothing[1], ids=nothing[2])
    _fill(fresh, *nothing)
    _fill(fresh, z, y, ids)
    _expect_log_probs(fresh.eval()(z), len(z))
    head, *_ = _filled(name, options)
    state = _state(head)
    head.memorize(nothing[0], nothing[1], ids=nothing[2])
    _expect(_unchanged(head, state), "storing nothing changes the state")
    _expect_log_probs(head.train()(nothing[0], ids=nothing[2]), 0)
    loss = head.loss(nothing[0].requires_grad_(), nothing[1], ids=nothing[2])
    _expect(loss.dim() == 0 and loss.item() == 0, f"the loss of nothing is {loss.tolist()}, must be 0")
    _expect_log_probs(head.eval()(nothing[0]), 0)


# ---- classes, samples and copies ---------------------------------------------------------------------------------


@_check
def _unseen_class(name: str, options: dict[str, Any]) -> None:
    """A class that was never announced widens the head when it is memorized, empty or filled."""
    z, y, ids = _samples(classes=NUM_CLASSES + 2)
    for old in (y < 0, y < NUM_CLASSES):
        head = _build(name, options)
        _fill(head, z[old], y[old], ids[old])
        _fill(head, z[~old], y[~old], ids[~old])
        _expect(head.num_classes == NUM_CLASSES + 2, f"num_classes is {head.num_classes} after class 4 was stored")
        _expect_log_probs(head.eval()(z), len(z), NUM_CLASSES + 2)
        _expect(bool(torch.isfinite(head.train().loss(z, y, ids=ids))), "the loss of the new class is not finite")
        head.widen(2)
        _expect(head.num_classes == NUM_CLASSES + 2, "widen() narrows")
        again = _build(name, head.config(), classes=head.num_classes)
        again.load_state_dict(head.state_dict())
        _expect_same(head.eval()(z), again.eval()(z), "rebuilt after widening")


@_check
def _add_and_drop(name: str, options: dict[str, Any]) -> None:
    """Samples are learned and forgotten at once; nothing of a dropped one stays in the state."""
    head, z, _, ids = _filled(name, options)
    if not isinstance(head, MemoryHead):
        return
    head.eval()
    far = 3 * torch.randn(2, IN_FEATURES)
    new = head.add(far, torch.tensor([0, NUM_CLASSES]))
    _expect(new.shape == (2,) and not bool(torch.isin(new, ids).any()), f"add() gives the ids {new.tolist()}")
    _expect(bool(torch.equal(head.neighbors(far, k=1).ids[:, 0], new)), "a sample added is not found")
    _expect(head.num_classes == NUM_CLASSES + 1, "a new class does not widen the head")
    head.add(far[1:], torch.tensor([1]), new[:1])
    _expect(len(head.memory) == len(ids) + 2, "an id added twice must replace its row")
    gone = torch.cat([ids[3:9], new])
    keys = head.memory.keys_at(head.memory.rows_of(gone)).flatten()
    head.drop(gone)
    _expect(not bool(torch.isin(head.neighbors(z, k=len(z)).ids, gone).any()), "a dropped sample is found")
    for key, part in head.state_dict().items():
        if "quantizer" in key:  # codebooks are trained with the samples, as weights are
            continue
        whole = torch.empty(0, dtype=part.dtype).set_(part.untyped_storage())  # with what the tensor does not show
        _expect(not whole.is_floating_point() or not bool(torch.isin(whole, keys[keys != 0]).any()), f"{key} remembers")
    state = _state(head)
    _expect_one_line(lambda: head.drop(torch.stack([ids[0], gone[0]])), ShapeError, "dropping an unknown id")
    _expect(_unchanged(head, state), "a failed drop changes the state")
    head.drop(ids[:3])
    head.drop(ids[9:])
    _expect(len(head.memory) == 0, "not empty after dropping everything")
    _expect_same(head(z), torch.full((len(z), head.num_classes), -math.log(head.num_classes)), "emptied", 1e-5)


@_check
def _refresh(name: str, options: dict[str, Any]) -> None:
    """Embedding the same samples anew, to the same place, changes no answer."""
    head, z, y, ids = _filled(name, options)
    before = head.eval()(z)
    _fill(head, z, y, ids, replace=False)
    _expect_same(head(z), before, "refreshed with the same embeddings", 1e-4)


@_check
def _copies(name: str, options: dict[str, Any]) -> None:
    """deepcopy and pickle answer the same, bit for bit, and live on their own."""
    head, z, y, _ = _trained(name, options)
    out = head(z)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        _expect_same(twin(z), out, "a copy")
        twin.memorize(z + 5, y.flip(0))
        for parameter in twin.parameters():
            parameter.data.add_(1)
        _expect_same(head(z), out, "after its copy was changed, the original")


@_check
def _state_dict(name: str, options: dict[str, Any]) -> None:
    """A state dict of tensors rebuilds the head from its config, bit for bit, also one that held other samples."""
    head, z, y, _ = _trained(name, options)
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    for busy in (False, True):
        file.seek(0)
        state = torch.load(file, weights_only=True)
        _expect(all(isinstance(part, Tensor) for part in state.values()), "the state dict holds more than tensors")
        again = _build(name, head.config())
        if busy:
            _fill(again, z.repeat(2, 1) + 1, y.repeat(2), torch.arange(2 * len(z)))
            again.eval()(z)
        again.load_state_dict(state)
        _expect_same(again.eval()(z), head(z), "loaded")
        if isinstance(head, MemoryHead) and isinstance(again, MemoryHead):
            _expect(bool(torch.equal(again.neighbors(z).ids, head.neighbors(z).ids)), "loaded: neighbours differ")


# ---- dtypes and layouts ------------------------------------------------------------------------------------------


@_check
def _double(name: str, options: dict[str, Any]) -> None:
    """float64 in, float64 out, close to float32; a float64 head computes in float64."""
    head, z, y, ids = _filled(name, options)
    out = head.eval()(z)
    precise = copy.deepcopy(head).double().eval()
    for each in (head, precise):
        _expect_log_probs(each(z.double()), len(z), dtype=torch.float64)
        _expect_same(each(z.double()), out, "float64", 1e-3)
    _expect(bool(torch.isfinite(precise.train().loss(z.double(), y, ids=ids))), "the float64 loss is not finite")


@_check
def _half(name: str, options: dict[str, Any]) -> None:
    """bfloat16 and float16 embeddings are raised to float32, and autocast changes nothing."""
    head, z, y, ids = _filled(name, options)
    loss = copy.deepcopy(head).train().loss(z, y, ids=ids)
    for dtype in (torch.bfloat16, torch.float16):
        _expect_log_probs(head.eval()(z.to(dtype)), len(z))
        _expect_same(head(z.to(dtype)), head(z.to(dtype).float()), "half precision")
    out = head(z)
    with torch.autocast("cpu", torch.bfloat16):
        _expect_same(head(z), out, "under autocast")
        _expect_same(head.train().loss(z, y, ids=ids), loss, "loss under autocast", 1e-6)


@_check
def _layout(name: str, options: dict[str, Any]) -> None:
    """Strided embeddings, labels and ids are as good as contiguous ones."""
    z, y, ids = _samples()
    strided = torch.stack([z, z]).permute(2, 1, 0)[..., 0].T
    y2, ids2 = torch.stack([y, y], 1)[:, 0], torch.stack([ids, ids], 1)[:, 0]
    outs = []
    for given in ((z, y, ids), (strided, y2, ids2)):
        torch.manual_seed(1)
        head = _build(name, options)
        _fill(head, *given)
        head.train().loss(given[0], given[1], ids=given[2])
        outs.append(head.eval()(given[0]))
    _expect_same(outs[0], outs[1], "strided", 1e-5)


# ---- mistakes and training ---------------------------------------------------------------------------------------


@_check
def _mistakes(name: str, options: dict[str, Any]) -> None:
    """A wrong tensor raises `ShapeError` in one line, in every method that takes one, and changes nothing."""
    head, z, y, ids = _filled(name, options)
    state = _state(head)
    nan, infinite = z.clone(), z.clone()
    nan[2, 3], infinite[2, 3] = math.nan, math.inf
    wrong = {"too narrow": z[:, 1:], "no batch": z[0], "whole numbers": z.long(), "NaN": nan, "infinity": infinite}
    for what, bad in wrong.items():
        for mode in (True, False):
            head.train(mode)
            _expect_one_line(partial(head, bad), ShapeError, f"forward, {what}")
        _expect_one_line(partial(head.loss, bad, y, ids=ids), ShapeError, f"loss, {what}")
        if isinstance(head, MemoryHead):
            _expect_one_line(partial(head.memorize, bad, y, ids=ids), ShapeError, f"memorize, {what}")
            _expect_one_line(partial(head.neighbors, bad), ShapeError, f"neighbors, {what}")
    soft = F.one_hot(y, NUM_CLASSES).float()
    labels = {
        "a negative label": y - 1,
        "labels of another length": y[1:],
        "a scalar label": y[0],
        "fractional labels": y.float(),
    }
    beyond = {"a label beyond the classes": y + 1, "soft labels too wide": F.pad(soft, (0, 1))}
    for what, bad in {**labels, **beyond}.items():
        _expect_one_line(partial(head.loss, z, bad, ids=ids), ShapeError, f"loss, {what}")
    for what, bad in labels.items():
        _expect_one_line(partial(head.memorize, z, bad, ids=ids), ShapeError, f"memorize, {what}")
    if isinstance(head, MemoryHead):
        twice = F.pad(soft * 2, (0, 1))
        _expect_one_line(lambda: head.memorize(z + 1, twice, ids=ids), ShapeError, "memorize, no distribution")
    for what, bad in {"ids of another length": ids[1:], "fractional ids": ids.float()}.items():
        _expect_one_line(partial(head, z, ids=bad), ShapeError, f"forward, {what}")
    _expect(_unchanged(head, state) and head.num_classes == NUM_CLASSES, "a mistake changes the state")


@_check
def _training(name: str, options: dict[str, Any]) -> None:
    """``loss`` trains an embedding, and so does a criterion on the output where ``trains_with`` says so."""
    for output in (False, True) if head_class(name).trains_with == "output" else (False,):
        head = _build(name, options)
        z, y, ids = _samples()
        z = z + 0.7 * torch.randn_like(z)
        _fill(head, z, y, ids)
        first, last = _train(head, z, y, ids, steps=30, output=output)
        _expect(last < first, f"the loss goes from {first:.4f} to {last:.4f} in 30 steps")


@_check
def _soft_labels(name: str, options: dict[str, Any]) -> None:
    """Soft labels are taken by `loss` and by `memorize`; one-hot ones count as the class."""
    head, z, y, ids = _filled(name, options)
    soft = F.one_hot(y, NUM_CLASSES).float()
    head.train()
    twin = copy.deepcopy(head)
    _expect_same(head.loss(z, soft, ids=ids), twin.loss(z, y, ids=ids), "loss with one-hot labels", 1e-5)
    mixed = 0.5 * soft + 0.5 * soft.flip(0)
    leaf = z.clone().requires_grad_()
    loss = head.loss(leaf, mixed, ids=torch.stack([ids, ids.flip(0)], 1))
    _expect(bool(torch.isfinite(_gradient(loss, leaf)).all()) and loss.dim() == 0, "mixup gives no finite gradient")
    outs = []
    for labels in (soft, y):
        torch.manual_seed(1)
        fresh = _build(name, options)
        _fill(fresh, z, labels, ids)
        outs.append(fresh.eval()(z))
    _expect_same(outs[0], outs[1], "stored with one-hot labels", 1e-5)
