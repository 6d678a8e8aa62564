"""What a head is and what it answers."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
import torch.nn.functional as F

from ..heads import MemoryHead, head_class, list_heads
from ._material import (
    NUM_CLASSES,
    contract_check,
    emptied_head,
    expect,
    expect_log_probs,
    expect_same,
    fill,
    filled_head,
    gradient_of,
    new_head,
    samples,
    state_of,
    trained_head,
    unchanged,
)

# ---- what it is ------------------------------------------------------------------------------------------------------


@contract_check
def _declaration(name: str, options: dict[str, Any]) -> None:
    """Registered, final, with its flags; deciding by stored samples means being a `MemoryHead`."""
    cls = head_class(name)
    others = [head_class(other) for other in list_heads() if other != name]
    expect(not any(issubclass(cls, other) for other in others), "inherits from another registered head")
    expect(cls.name == name, f"name is {cls.name!r}")
    expect(isinstance(cls.uses_memory, bool) and isinstance(cls.differentiable, bool), "a flag is no bool")
    expect(cls.trains_with in ("output", "objective"), f"trains_with is {cls.trains_with!r}")
    expect(issubclass(cls, MemoryHead) == cls.uses_memory, "uses_memory must be True exactly for a MemoryHead")
    expect(cls.differentiable or cls.trains_with == "objective", "an output without gradient cannot train")


@contract_check
def _configuration(name: str, options: dict[str, Any]) -> None:
    """``config()`` survives JSON, names options only, holds the options given and rebuilds the head."""
    head = new_head(name, options)
    config = json.loads(json.dumps(head.config()))
    unknown = set(config) - set(head.option_names())
    expect(not unknown, f"config() names {sorted(unknown)}, which the constructor does not take")
    given = json.loads(json.dumps(options))
    expect(all(config.get(key) == value for key, value in given.items()), f"config() gives {config} for {given}")
    again = new_head(name, config)
    expect(json.loads(json.dumps(again.config())) == config, "config() changes when the head is rebuilt from it")


@contract_check
def _parameter_groups(name: str, options: dict[str, Any]) -> None:
    """``param_groups`` covers each parameter exactly once, at the rate asked for."""
    head = new_head(name, options)
    grouped = [id(p) for group in head.param_groups(0.1, 1e-4) for p in group["params"]]
    expect(sorted(grouped) == sorted(id(p) for p in head.parameters()), "a parameter is missing or stands twice")


# ---- what it answers -------------------------------------------------------------------------------------------------


@contract_check
def _output(name: str, options: dict[str, Any]) -> None:
    """(B, C) float32 log-probabilities in training and evaluation, also for samples far from everything."""
    head, z, _, ids = filled_head(name, options)
    expect_log_probs(head.train()(z, ids=ids), len(z))
    expect_log_probs(head.eval()(z), len(z))
    expect_log_probs(head(z * 1e3), len(z))


@contract_check
def _flags(name: str, options: dict[str, Any]) -> None:
    """``differentiable`` and ``uses_memory`` are what the gradients and the outputs say."""
    head = new_head(name, options)
    z, y, ids = samples()
    z = torch.randn_like(z)  # classes mixed, so that a vote of neighbours has something to weigh
    fill(head, z, y, ids)
    head.train()
    z.requires_grad_()
    slope = float(gradient_of(F.nll_loss(head(z, ids=ids), (y + 1) % NUM_CLASSES), z).abs().max())
    expect((slope > 0) == head.differentiable, f"differentiable is {head.differentiable}, the gradient is {slope:g}")
    fresh = new_head(name, options).eval()
    before = fresh(z).detach()
    fill(fresh, z.detach(), y, ids)
    moved = not torch.equal(before, fresh(z))
    expect(moved == head.uses_memory, f"uses_memory is {head.uses_memory}, memorizing changes the output: {moved}")


@contract_check
def _evaluation_changes_nothing(name: str, options: dict[str, Any]) -> None:
    """In evaluation asking twice gives the same answer and leaves the state as it was."""
    head, z, _, _ = trained_head(name, options)
    state = state_of(head)
    expect_same(head(z), head(z), "asked twice")
    if isinstance(head, MemoryHead):
        head.neighbors(z)
    expect(unchanged(head, state), "evaluation changes the state")


@contract_check
def _watching_changes_nothing(name: str, options: dict[str, Any]) -> None:
    """In training mode without gradients, as for a metric between two steps, an answer leaves the state as it was."""
    head, z, _, ids = trained_head(name, options)
    state = state_of(head)
    with torch.no_grad():
        head.train()(1.5 * z, ids=ids)
    expect(unchanged(head, state), "an answer without gradients changes the state in training mode")


@contract_check
def _ids(name: str, options: dict[str, Any]) -> None:
    """ids (B,), (B, 2), -1 and unknown ones are accepted; no sample has itself among its neighbours."""
    head, z, y, ids = filled_head(name, options)
    for given in (ids, torch.stack([ids, ids.flip(0)], 1), torch.full_like(ids, -1), ids + 10**6):
        expect_log_probs(head.train()(z, ids=given), len(z))
        expect(
            bool(torch.isfinite(head.loss(z, y, ids=given))), f"the loss with ids {tuple(given.shape)} is not finite"
        )
        if isinstance(head, MemoryHead):
            found = head.neighbors(z, ids=given, k=len(z)).ids
            own = (found.unsqueeze(-1) == given.view(len(z), 1, -1)) & (found >= 0).unsqueeze(-1)
            expect(not bool(own.any()), "a sample is among its own neighbours")
    expect_same(head.eval()(z, ids=torch.full_like(ids, -1)), head(z), "ids of -1 are not as no ids")


@contract_check
def _neighbors(name: str, options: dict[str, Any]) -> None:
    """Neighbours are stored samples, nearest first, with weights that sum to one; empty slots have id -1."""
    head, z, y, ids = filled_head(name, options)
    if not isinstance(head, MemoryHead):
        return
    head.eval()
    for k in (None, 1, 5, len(z) + 7):
        found = head.neighbors(z, k=k)
        shapes = {part.shape for part in (found.rows, found.ids, found.labels, found.distances, found.weights)}
        expect(len(shapes) == 1 and (k is None or shapes == {(len(z), k)}), f"shapes are {shapes} for k={k}")
        filled = found.ids >= 0
        expect(int(filled.sum(1).max()) <= len(z), "more neighbours than samples")
        expect_same(found.weights.sum(1), torch.ones(len(z)), "sum of the weights", 1e-4)
        expect(bool((found.weights >= 0).all() and (found.weights[~filled] == 0).all()), "a weight is wrong")
        expect(bool(torch.isinf(found.distances[~filled]).all()), "an empty slot must be infinitely far")
        nearest_first = found.distances.nan_to_num(posinf=1e9).diff(dim=1)
        expect(bool((nearest_first >= -1e-3).all()), "neighbours are not in order of distance")
        places = torch.searchsorted(ids, found.ids[filled])
        expect(bool(torch.equal(ids[places], found.ids[filled])), "an id was never stored")
        expect(bool(torch.equal(y[places], found.labels[filled])), "a label is not the one stored under the id")


@contract_check
def _explanation(name: str, options: dict[str, Any]) -> None:
    """What neighbours contribute adds up, with the rest, to the head's own probabilities, to 1e-5; however many are
    listed."""
    for build in (filled_head, trained_head, emptied_head):
        head, z, _, ids = build(name, options)
        if not isinstance(head, MemoryHead):
            return
        head.eval()
        for given in (None, ids):
            expected = head(z, ids=given).exp()
            own = head.explain(z, ids=given)
            found = head.neighbors(z, ids=given)
            expect_same(own.weights, found.weights, "weights", 1e-6)
            expect(bool(torch.equal(own.ids, found.ids)), "explain() and neighbors() name other samples")
            for k in (None, 1, 3, len(z) + 7):
                why = head.explain(z, ids=given, k=k)
                many = own.ids.shape[1] if k is None else k
                expect(why.shares.shape == (len(z), many, head.num_classes), f"shares are {tuple(why.shares.shape)}")
                expect(why.ids.shape == (len(z), many), f"ids are {tuple(why.ids.shape)} for k={k}")
                expect_same(why.probabilities, expected, f"contributions do not add up for k={k}", 1e-5)
                expect(bool((why.shares[why.ids < 0] == 0).all()), "an empty slot contributes")
                listed = why.ids.sort(1).values
                expect(not bool(((listed.diff(dim=1) == 0) & (listed[:, 1:] >= 0)).any()), "a sample is listed twice")


@contract_check
def _calibration(name: str, options: dict[str, Any]) -> None:
    """Calibration makes answers in evaluation more or less certain and changes none; outlier scores are finite."""
    head, z, _, ids = trained_head(name, options)
    plain = head(z)
    for temperature, share in ((0.5, 0.0), (3.0, 0.0), (1.0, 0.1), (2.0, 0.02)):
        head.set_scaling(temperature, share)
        expected = ((1 - share) * (plain / temperature).softmax(-1) + share / plain.shape[-1]).log()
        expect_same(head(z), expected, f"at temperature {temperature}, {share} shared", 1e-5)
        if isinstance(head, MemoryHead):
            why = head.explain(z)
            expect_same(why.probabilities, expected.exp(), f"explained at {temperature}, {share} shared", 1e-5)
            expect(abs(why.uniform_share - share) < 1e-6, f"explained with {why.uniform_share} shared, not {share}")
        again = new_head(name, head.config())
        again.load_state_dict(head.state_dict())
        expect_same(again.eval()(z), head(z), "loaded with a temperature")
        training = copy.deepcopy(head).train()
        training.set_scaling(1.0, 0.0)
        expect_same(copy.deepcopy(head).train()(z, ids=ids), training(z, ids=ids), "in training, at a temperature")
    scores = head.outlier_scores(z)
    expect(scores.shape == (len(z),) and bool(torch.isfinite(scores).all()), f"outlier scores are {scores}")
