"""Few samples and none; classes and samples that come and go; copies."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import torch
from torch import Tensor

from ..errors import EmptyMemoryError, ShapeError
from ..heads import Head, MemoryHead
from ._material import (
    IN_FEATURES,
    NUM_CLASSES,
    contract_check,
    expect,
    expect_log_probs,
    expect_one_line,
    expect_same,
    fill,
    filled_head,
    gradient_of,
    ids_held,
    new_head,
    samples,
    state_of,
    train,
    trained_head,
    unchanged,
)

# ---- few samples -----------------------------------------------------------------------------------------------------


@contract_check
def _empty_memory(name: str, options: dict[str, Any]) -> None:
    """Without samples: uniform in evaluation; in training an error where the output trains, else a usable loss."""
    head = new_head(name, options)
    z, y, ids = samples()
    if isinstance(head, MemoryHead):
        out = head.eval()(z, ids=ids)
        expect_log_probs(out, len(z))
        expect_same(out, torch.full_like(out, -math.log(NUM_CLASSES)), "not uniform", 1e-5)
        expect(bool((head.neighbors(z).ids == -1).all()), "neighbors() finds something")
        expect_same(head.explain(z).probabilities, out.exp(), "explained", 1e-5)
    head.train()
    if head.uses_memory and head.trains_with == "output":
        expect_one_line(lambda: head(z, ids=ids), EmptyMemoryError, "training without samples")
        return
    z.requires_grad_()
    expect(float(gradient_of(head.loss(z, y, ids=ids), z).abs().max()) > 0, "the loss has no gradient")


@contract_check
def _few_samples(name: str, options: dict[str, Any]) -> None:
    """One sample, one class, k beyond the memory: finite everywhere, and the class stored is the answer."""
    z, y, ids = samples()
    for keep in (torch.tensor([1]), (y == 1).nonzero().squeeze(1)):
        head = new_head(name, {**options, "k": 1000} if options.get("k", 0) else options)
        fill(head, z[keep], y[keep], ids[keep])
        _expect_finite_training(head, z[keep], y[keep], ids[keep])
        out = head.eval()(z)
        expect_log_probs(out, len(z))
        expect(
            not head.uses_memory or bool((out.argmax(1)[keep] == 1).all()), "the only class stored is not the answer"
        )
    single = new_head(name, options, classes=1)
    fill(single, z, y * 0, ids)
    expect_log_probs(single.eval()(z), len(z), 1)


@contract_check
def _duplicates(name: str, options: dict[str, Any]) -> None:
    """Samples that coincide, of one class or of several, give a finite loss and finite gradients."""
    head = new_head(name, options)
    z, y, ids = samples()
    z = z[:1].expand(len(z), -1).clone()
    fill(head, z, y, ids)
    _expect_finite_training(head, z, y, ids)
    expect_log_probs(head.eval()(z), len(z))


def _expect_finite_training(head: Head, z: Tensor, y: Tensor, ids: Tensor) -> None:
    head.train()
    for given in (ids, torch.full_like(ids, -1)):
        leaf = z.clone().requires_grad_()
        loss = head.loss(leaf, y, ids=given)
        if loss.requires_grad:
            loss.backward()
        gradients = [leaf.grad, *(p.grad for p in head.parameters())]
        finite = all(bool(torch.isfinite(g).all()) for g in gradients if g is not None)
        expect(bool(torch.isfinite(loss)) and finite, "the loss or a gradient is not finite")
        stored = head.memory.state_dict().values() if isinstance(head, MemoryHead) else []
        expect(all(bool(torch.isfinite(part).all()) for part in stored), "training makes a center infinite")


@contract_check
def _empty_batch(name: str, options: dict[str, Any]) -> None:
    """No rows in, no rows out, a loss of zero; storing nothing changes nothing, also before anything is stored."""
    fresh = new_head(name, options)
    z, y, ids = samples()
    nothing = z[:0], y[:0], ids[:0]
    fresh.memorize(nothing[0], nothing[1], ids=nothing[2])
    fill(fresh, *nothing)
    fill(fresh, z, y, ids)
    expect_log_probs(fresh.eval()(z), len(z))
    head, *_ = filled_head(name, options)
    state = state_of(head)
    head.memorize(nothing[0], nothing[1], ids=nothing[2])
    expect(unchanged(head, state), "storing nothing changes the state")
    expect_log_probs(head.train()(nothing[0], ids=nothing[2]), 0)
    loss = head.loss(nothing[0].requires_grad_(), nothing[1], ids=nothing[2])
    expect(loss.dim() == 0 and loss.item() == 0, f"the loss of nothing is {loss.tolist()}, must be 0")
    expect_log_probs(head.eval()(nothing[0]), 0)


# ---- classes, samples and copies -------------------------------------------------------------------------------------


@contract_check
def _unseen_class(name: str, options: dict[str, Any]) -> None:
    """A class that was never announced widens the head when it is memorized, empty or filled."""
    z, y, ids = samples(classes=NUM_CLASSES + 2)
    for old in (y < 0, y < NUM_CLASSES):
        head = new_head(name, options)
        fill(head, z[old], y[old], ids[old])
        fill(head, z[~old], y[~old], ids[~old])
        expect(head.num_classes == NUM_CLASSES + 2, f"num_classes is {head.num_classes} after class 4 was stored")
        expect_log_probs(head.eval()(z), len(z), NUM_CLASSES + 2)
        expect(bool(torch.isfinite(head.train().loss(z, y, ids=ids))), "the loss of the new class is not finite")
        head.widen(2)
        expect(head.num_classes == NUM_CLASSES + 2, "widen() narrows")
        # A head that decides by samples takes the classes of those it loads.
        for classes in (head.num_classes, NUM_CLASSES) if head.uses_memory else (head.num_classes,):
            again = new_head(name, head.config(), classes=classes)
            again.load_state_dict(head.state_dict())
            expect_same(head.eval()(z), again.eval()(z), f"rebuilt after widening, of {classes} classes")
            expect(bool(torch.isfinite(again.train().loss(z, y, ids=ids))), "rebuilt, the loss is not finite")


@contract_check
def _add_and_drop(name: str, options: dict[str, Any]) -> None:
    """Samples are learned and forgotten at once; nothing of a dropped one stays in the state."""
    head, z, _, ids = filled_head(name, options)
    if not isinstance(head, MemoryHead):
        return
    head.eval()
    held = ids_held(head)
    expect(len(held) > 0 and bool(torch.isin(held, ids).all()), "what is held is not some of what was stored")
    far = 3 * torch.randn(2, IN_FEATURES)
    new = head.add(far, torch.tensor([0, NUM_CLASSES]))
    expect(new.shape == (2,) and not bool(torch.isin(new, ids).any()), f"add() gives the ids {new.tolist()}")
    expect(bool(torch.equal(head.neighbors(far, k=1).ids[:, 0], new)), "a sample added is not found")
    expect(head.num_classes == NUM_CLASSES + 1, "a new class does not widen the head")
    head.add(far[1:], torch.tensor([1]), new[:1])
    expect(len(head.memory) == len(held) + 2, "an id added twice must replace its row")
    gone = torch.cat([held[3:9], new])
    keys = head.memory.keys_at(head.memory.rows_of(gone)).flatten()
    head.drop(gone)
    expect(not bool(torch.isin(head.neighbors(z, k=len(z)).ids, gone).any()), "a dropped sample is found")
    for key, part in head.state_dict().items():
        if "quantizer" in key:  # codebooks are trained with the samples, as weights are
            continue
        whole = torch.empty(0, dtype=part.dtype).set_(part.untyped_storage())  # with what the tensor does not show
        expect(not whole.is_floating_point() or not bool(torch.isin(whole, keys[keys != 0]).any()), f"{key} remembers")
    state = state_of(head)
    expect_one_line(lambda: head.drop(torch.stack([held[0], gone[0]])), ShapeError, "dropping an unknown id")
    expect(unchanged(head, state), "a failed drop changes the state")
    head.drop(held[:3])
    head.drop(held[9:])
    expect(len(head.memory) == 0, "not empty after dropping everything")
    expect_same(head(z), torch.full((len(z), head.num_classes), -math.log(head.num_classes)), "emptied", 1e-5)


@contract_check
def _inference_mode(name: str, options: dict[str, Any]) -> None:
    """What was answered, learned or forgotten under `torch.inference_mode` can be changed outside of it."""
    for inside in range(5):
        head, z, y, ids = filled_head(name, options)
        if not isinstance(head, MemoryHead):
            return
        held = ids_held(head)
        gone = held[5:9]
        head = pickle.loads(pickle.dumps(head)).eval()  # as loaded: nothing was searched yet
        with torch.inference_mode():
            head(z)
            if inside == 1:
                head.add(z.repeat(9, 1) + 1, y.repeat(9))
            elif inside == 2:
                head.drop(held[:5])
            elif inside == 3:
                head.widen(NUM_CLASSES + 1)
            elif inside == 4:
                head = copy.deepcopy(head)
        if inside == 4:  # parameters that were copied there are as torch leaves them
            head.drop(gone)
            expect_log_probs(head(z), len(z))
            continue
        head.drop(gone)
        others = (~torch.isin(ids, gone)).nonzero().squeeze(1)[5:8]
        head.add(z[others], y[others], ids[others])
        train(head, z, y, ids, steps=1)
        out, near = head.eval()(z), head.neighbors(z, k=1).ids
        again = new_head(name, head.config(), classes=head.num_classes)
        again.load_state_dict(head.state_dict())
        expect_same(out, again.eval()(z), "changed after inference mode", 1e-5)
        expect(not bool(torch.isin(near, gone).any()), "a sample dropped after inference mode is found")


@contract_check
def _half_precision(name: str, options: dict[str, Any]) -> None:
    """In a model that is cast to half precision a head answers as before, to the bit."""
    head, z, _, _ = trained_head(name, options)
    out = head(z)
    for dtype in (torch.float16, torch.bfloat16):
        expect_same(head.to(dtype)(z), out, f"after .to({dtype})")
        expect(head(z.to(dtype)).dtype == torch.float32, f"{dtype} embeddings must give float32")


@contract_check
def _abandoned_refresh(name: str, options: dict[str, Any]) -> None:
    """After a refresh that was broken off samples are stored as ever."""
    head, z, y, ids = filled_head(name, options)
    if not isinstance(head, MemoryHead):
        return
    head.begin_refresh()
    head.memorize(z[:4], y[:4], ids=ids[:4])
    head.abandon_refresh()
    new = ids.max() + 1 + torch.arange(2)
    head.memorize(z[:2] + 1, y[:2], ids=new)
    expect(bool((head.memory.rows_of(new) >= 0).all()), "a sample given after it is not stored")
    expect_log_probs(head.eval()(z), len(z))


@contract_check
def _refresh(name: str, options: dict[str, Any]) -> None:
    """Embedding the same samples anew, to the same place, changes no answer."""
    head, z, y, ids = filled_head(name, options)
    before = head.eval()(z)
    fill(head, z, y, ids, replace=False)
    expect_same(head(z), before, "refreshed with the same embeddings", 1e-4)


@contract_check
def _copies(name: str, options: dict[str, Any]) -> None:
    """deepcopy and pickle answer the same, bit for bit, and live on their own."""
    head, z, y, _ = trained_head(name, options)
    out = head(z)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        expect_same(twin(z), out, "a copy")
        twin.memorize(z + 5, y.flip(0))
        for parameter in twin.parameters():
            parameter.data.add_(1)
        expect_same(head(z), out, "after its copy was changed, the original")


@contract_check
def _state_dict(name: str, options: dict[str, Any]) -> None:
    """A state dict of tensors rebuilds the head from its config, bit for bit, also one that held other samples."""
    head, z, y, _ = trained_head(name, options)
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    for busy in (False, True):
        file.seek(0)
        state = torch.load(file, weights_only=True)
        expect(all(isinstance(part, Tensor) for part in state.values()), "the state dict holds more than tensors")
        again = new_head(name, head.config())
        if busy:
            fill(again, z.repeat(2, 1) + 1, y.repeat(2), torch.arange(2 * len(z)))
            again.eval()(z)
        again.load_state_dict(state)
        expect_same(again.eval()(z), head(z), "loaded")
        if isinstance(head, MemoryHead) and isinstance(again, MemoryHead):
            expect(bool(torch.equal(again.neighbors(z).ids, head.neighbors(z).ids)), "loaded: neighbours differ")
