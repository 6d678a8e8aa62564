"""Dtypes and layouts, mistakes, and training."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import ShapeError
from ..heads import MemoryHead, head_class
from ._material import (
    NUM_CLASSES,
    contract_check,
    expect,
    expect_log_probs,
    expect_one_line,
    expect_same,
    fill,
    filled_head,
    gradient_of,
    new_head,
    samples,
    state_of,
    train,
    unchanged,
)

# ---- dtypes and layouts ----------------------------------------------------------------------------------------------


@contract_check
def _double(name: str, options: dict[str, Any]) -> None:
    """float64 in, float64 out, close to float32; a float64 head computes in float64."""
    head, z, y, ids = filled_head(name, options)
    out = head.eval()(z)
    precise = copy.deepcopy(head).double().eval()
    for each in (head, precise):
        expect_log_probs(each(z.double()), len(z), dtype=torch.float64)
        expect_same(each(z.double()), out, "float64", 1e-3)
    expect(bool(torch.isfinite(precise.train().loss(z.double(), y, ids=ids))), "the float64 loss is not finite")


@contract_check
def _half(name: str, options: dict[str, Any]) -> None:
    """bfloat16 and float16 embeddings are raised to float32, and autocast changes nothing."""
    head, z, y, ids = filled_head(name, options)
    loss = copy.deepcopy(head).train().loss(z, y, ids=ids)
    for dtype in (torch.bfloat16, torch.float16):
        expect_log_probs(head.eval()(z.to(dtype)), len(z))
        expect_same(head(z.to(dtype)), head(z.to(dtype).float()), "half precision")
    out = head(z)
    with torch.autocast("cpu", torch.bfloat16):
        expect_same(head(z), out, "under autocast")
        expect_same(head.train().loss(z, y, ids=ids), loss, "loss under autocast", 1e-6)


@contract_check
def _layout(name: str, options: dict[str, Any]) -> None:
    """Strided embeddings, labels and ids are as good as contiguous ones."""
    z, y, ids = samples()
    strided = torch.stack([z, z]).permute(2, 1, 0)[..., 0].T
    y2, ids2 = torch.stack([y, y], 1)[:, 0], torch.stack([ids, ids], 1)[:, 0]
    outs = []
    for given in ((z, y, ids), (strided, y2, ids2)):
        torch.manual_seed(1)
        head = new_head(name, options)
        fill(head, *given)
        head.train().loss(given[0], given[1], ids=given[2])
        outs.append(head.eval()(given[0]))
    expect_same(outs[0], outs[1], "strided", 1e-5)


# ---- mistakes and training -------------------------------------------------------------------------------------------


@contract_check
def _mistakes(name: str, options: dict[str, Any]) -> None:
    """A wrong tensor raises `ShapeError` in one line, in every method that takes one, and changes nothing."""
    head, z, y, ids = filled_head(name, options)
    state = state_of(head)
    nan, infinite = z.clone(), z.clone()
    nan[2, 3], infinite[2, 3] = math.nan, math.inf
    wrong = {"too narrow": z[:, 1:], "no batch": z[0], "whole numbers": z.long(), "NaN": nan, "infinity": infinite}
    for what, bad in wrong.items():
        for mode in (True, False):
            head.train(mode)
            expect_one_line(partial(head, bad), ShapeError, f"forward, {what}")
        expect_one_line(partial(head.loss, bad, y, ids=ids), ShapeError, f"loss, {what}")
        if isinstance(head, MemoryHead):
            expect_one_line(partial(head.memorize, bad, y, ids=ids), ShapeError, f"memorize, {what}")
            expect_one_line(partial(head.neighbors, bad), ShapeError, f"neighbors, {what}")
    soft = F.one_hot(y, NUM_CLASSES).float()
    labels = {
        "a negative label": y - 1,
        "labels of another length": y[1:],
        "a scalar label": y[0],
        "fractional labels": y.float(),
    }
    beyond = {"a label beyond the classes": y + 1, "soft labels too wide": F.pad(soft, (0, 1))}
    for what, bad in {**labels, **beyond}.items():
        expect_one_line(partial(head.loss, z, bad, ids=ids), ShapeError, f"loss, {what}")
    for what, bad in labels.items():
        expect_one_line(partial(head.memorize, z, bad, ids=ids), ShapeError, f"memorize, {what}")
    if isinstance(head, MemoryHead):
        twice = F.pad(soft * 2, (0, 1))
        expect_one_line(lambda: head.memorize(z + 1, twice, ids=ids), ShapeError, "memorize, no distribution")
    for what, bad in {"ids of another length": ids[1:], "fractional ids": ids.float()}.items():
        expect_one_line(partial(head, z, ids=bad), ShapeError, f"forward, {what}")
    expect(unchanged(head, state) and head.num_classes == NUM_CLASSES, "a mistake changes the state")


@contract_check
def _training(name: str, options: dict[str, Any]) -> None:
    """``loss`` trains an embedding, and so does a criterion on the output where ``trains_with`` says so."""
    for output in (False, True) if head_class(name).trains_with == "output" else (False,):
        head = new_head(name, options)
        z, y, ids = samples()
        z = z + 0.7 * torch.randn_like(z)
        fill(head, z, y, ids)
        first, last = train(head, z, y, ids, steps=30, output=output)
        expect(last < first, f"the loss goes from {first:.4f} to {last:.4f} in 30 steps")


@contract_check
def _soft_labels(name: str, options: dict[str, Any]) -> None:
    """Soft labels are taken by `loss` and by `memorize`; one-hot ones count as the class."""
    head, z, y, ids = filled_head(name, options)
    soft = F.one_hot(y, NUM_CLASSES).float()
    head.train()
    twin = copy.deepcopy(head)
    expect_same(head.loss(z, soft, ids=ids), twin.loss(z, y, ids=ids), "loss with one-hot labels", 1e-5)
    mixed = 0.5 * soft + 0.5 * soft.flip(0)
    leaf = z.clone().requires_grad_()
    loss = head.loss(leaf, mixed, ids=torch.stack([ids, ids.flip(0)], 1))
    expect(bool(torch.isfinite(gradient_of(loss, leaf)).all()) and loss.dim() == 0, "mixup gives no finite gradient")
    outs = []
    for labels in (soft, y):
        torch.manual_seed(1)
        fresh = new_head(name, options)
        fill(fresh, z, labels, ids)
        outs.append(fresh.eval()(z))
    expect_same(outs[0], outs[1], "stored with one-hot labels", 1e-5)
