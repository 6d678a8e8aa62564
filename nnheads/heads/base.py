"""What every head is."""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._lasting import lasting
from ..errors import ConfigError, ShapeError
from .scaling import scaled


class Head(nn.Module, ABC):
    """Maps embeddings (B, d) to log-probabilities (B, C), and knows its own training objective.

    A concrete head is final: none inherits from another concrete head. Its constructor takes ``in_features`` and
    ``num_classes`` and then keyword options that `config` returns, so that `build_head` can rebuild it.

    Attributes:
        name: the name it is registered under.
        uses_memory: whether it decides by stored samples.
        differentiable: whether the output has a useful gradient with respect to the embeddings.
        trains_with: ``"output"`` where a criterion on the log-probabilities trains it, ``"objective"`` where only
            `loss` does.
        temperature: scalar by which log-probabilities are divided in evaluation, before they are normalized; 1 until
            `nnheads.calibrate` fits it. Saved with the head.
        uniform_share: scalar, the part of the probability that is then shared equally over all classes; 0 until
            `nnheads.calibrate` fits it. Saved with the head.
        outlier_threshold: scalar, `outlier_scores` from which on a sample counts as unlike the training samples;
            infinite until `nnheads.calibrate` chooses it. Saved with the head.
    """

    name: ClassVar[str] = ""
    uses_memory: ClassVar[bool]
    differentiable: ClassVar[bool]
    trains_with: ClassVar[Literal["output", "objective"]]
    temperature: Tensor
    uniform_share: Tensor
    outlier_threshold: Tensor

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        if in_features < 1 or num_classes < 1:
            raise ConfigError(
                f"head {self.name!r}: in_features and num_classes must be 1 or more, got {in_features}, {num_classes}"
            )
        self.in_features = in_features
        self.num_classes = num_classes
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("uniform_share", torch.zeros(()))
        self.register_buffer("outlier_threshold", torch.full((), math.inf))
        self._scaled = False

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of the constructor's options, in order."""
        return [p for p in inspect.signature(cls).parameters if p not in ("in_features", "num_classes")]

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The options that rebuild this head, as JSON takes them."""

    @abstractmethod
    def _log_probs(self, z: Tensor, ids: Tensor | None) -> Tensor:
        """(B, d) checked embeddings in float32 or float64 -> (B, C) log-probabilities."""

    def forward(self, z: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """Log-probabilities of the classes.

        Args:
            z: (B, d) embeddings. Half precision is raised to float32, also under autocast.
            ids: (B,) int64 positions of the samples in the training set, or (B, 2) where two were mixed; -1 where
                there is none. A sample's own center is left out of its neighbours.

        Returns:
            (B, C) log-probabilities, so that `torch.nn.CrossEntropyLoss` works on them as it is; float32, or float64
            where the embeddings are.
        """
        z = self._check(z)
        with torch.autocast(z.device.type, enabled=False):
            return self.calibrated(self._log_probs(z, self._check_ids(ids, len(z)))).to(z.dtype)

    @property
    def is_calibrated(self) -> bool:
        """Whether answers are other than they would be without `set_scaling`: in evaluation, where it was used."""
        return self._scaled and not self.training

    def calibrated(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities (B, C) at the head's temperature and uniform share, see `nnheads.heads.scaling.scaled`."""
        if not self.is_calibrated:
            return log_probs
        temperature, share = (value.to(log_probs.dtype) for value in (self.temperature, self.uniform_share))
        return scaled(log_probs, temperature, share)

    def set_scaling(self, temperature: float, uniform_share: float) -> None:
        """How certain answers are from now on, in evaluation; which class is likeliest stays the same.

        Args:
            temperature: by which log-probabilities are divided; above 1 they become less certain. 1 for none.
            uniform_share: part of the probability that is then shared equally over all classes; 0 for none.

        Raises:
            ConfigError: the temperature is not above 0, or the share is not 0 or more and below 1.
        """
        positive(self.name, "temperature", temperature)
        positive(self.name, "uniform_share", uniform_share, zero=True)
        if uniform_share >= 1:
            raise ConfigError(f"head {self.name!r}: uniform_share must be below 1, got {uniform_share!r}")
        self.temperature.fill_(temperature)
        self.uniform_share.fill_(uniform_share)
        self._scaled = temperature != 1 or uniform_share != 0

    @torch.no_grad()
    def outlier_scores(self, z: Tensor) -> Tensor:
        """(B,) how unlike the training samples embeddings (B, d) are; the higher the less like.

        Without stored samples, one minus the largest probability (Hendrycks and Gimpel 2017).
        """
        log_probs: Tensor = self(z)
        return 1 - log_probs.exp().amax(-1)

    def loss(self, z: Tensor, y: Tensor, *, ids: Tensor | None = None) -> Tensor:
        """The head's own objective on a batch; the negative log-likelihood of the output unless a head says otherwise.

        Args:
            z: (B, d) embeddings.
            y: (B,) int64 labels, or (B, C) soft labels.
            ids: as in `forward`.

        Returns:
            A scalar.
        """
        self._check_labels(y, len(z))
        return nll(self(z, ids=ids), y)

    def memorize(self, z: Tensor, y: Tensor, *, ids: Tensor | None = None) -> None:
        """Store samples; an id already stored is replaced and an unseen class widens the head. No-op without memory."""
        self._check_labels(y, len(z), seen=False)
        self._widen_to(y)

    def begin_refresh(self, *, replace: bool = False) -> None:
        """Called before samples are embedded and memorized batch by batch; then comes `refreshed`.

        Args:
            replace: True where samples stored under the same ids are to be replaced altogether; False where they are
                the same samples embedded anew, which keep their soft labels and weights.
        """

    def abandon_refresh(self) -> None:
        """Called in place of `refreshed` where an error or Ctrl-C came between; what was embedded so far stays."""

    def refreshed(self) -> None:
        """Called after all stored samples were embedded anew. No-op without memory."""

    @lasting
    def widen(self, num_classes: int) -> None:
        """Make room for classes up to ``num_classes``; never narrows. New parameters need a new optimizer entry."""
        self.num_classes = max(self.num_classes, num_classes)

    def param_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """The head's parameters as optimizer groups: biases and widths are not decayed."""
        decay = [p for p in self.parameters() if p.dim() > 1]
        plain = [p for p in self.parameters() if p.dim() <= 1]
        groups = [
            {"params": decay, "lr": lr, "weight_decay": weight_decay},
            {"params": plain, "lr": lr, "weight_decay": 0.0},
        ]
        return [g for g in groups if g["params"]]

    @lasting
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        return made

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # A head computes in float32 where its model is cast to half precision.
        return cast(Self, super()._apply(partial(_applied, fn), recurse))  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A head may have been saved before there were any.
        for name, value in (("temperature", 1.0), ("uniform_share", 0.0), ("outlier_threshold", math.inf)):
            state_dict.setdefault(prefix + name, torch.tensor(value))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._scaled = float(self.temperature) != 1 or float(self.uniform_share) != 0

    def _check(self, z: Tensor) -> Tensor:
        if z.dim() != 2 or z.shape[1] != self.in_features:
            raise ShapeError(f"head {self.name!r}: embeddings must be (B, {self.in_features}), got {tuple(z.shape)}")
        if not z.is_floating_point():
            raise ShapeError(f"head {self.name!r}: embeddings must be floating point, got {z.dtype}")
        # On a GPU this would make every training step wait for the device, so there it is checked in evaluation only.
        if (z.device.type == "cpu" or not self.training) and not bool(torch.isfinite(z).all()):
            raise ShapeError(
                f"head {self.name!r}: embeddings hold NaN or infinity; check the learning rate and the input"
            )
        return z if z.dtype == torch.float64 else z.float()

    def _check_ids(self, ids: Tensor | None, batch: int) -> Tensor | None:
        if ids is None:
            return None
        if ids.is_floating_point() or ids.dim() not in (1, 2) or len(ids) != batch:
            raise ShapeError(
                f"head {self.name!r}: ids must be int64 of shape ({batch},) or ({batch}, 2), got {ids.dtype} "
                f"{tuple(ids.shape)}"
            )
        return ids.long() if ids.dim() == 2 else ids.long().unsqueeze(1)

    def _check_labels(self, y: Tensor, batch: int, *, seen: bool = True) -> None:
        if y.dim() not in (1, 2) or len(y) != batch or (seen and y.dim() == 2 and y.shape[1] > self.num_classes):
            raise ShapeError(
                f"head {self.name!r}: labels must be ({batch},) or ({batch}, {self.num_classes}), got {tuple(y.shape)}"
            )
        if seen and y.dim() == 2 and y.shape[1] == 1 < self.num_classes and not y.is_floating_point():
            raise ShapeError(f"head {self.name!r}: labels of shape ({batch}, 1) must be ({batch},): give y.squeeze(1)")
        if y.dim() == 1 and y.is_floating_point():
            raise ShapeError(f"head {self.name!r}: labels of shape ({batch},) must be integers, got {y.dtype}")
        if y.dim() == 2 or not len(y) or (y.device.type != "cpu" and self.training):
            return
        low, high = int(y.min()), int(y.max())
        if low < 0 or (seen and high >= self.num_classes):
            wrong = low if low < 0 else high
            raise ShapeError(f"head {self.name!r}: label {wrong} is outside the classes 0 to {self.num_classes - 1}")

    def _widen_to(self, y: Tensor) -> None:
        if len(y):
            self.widen(y.shape[1] if y.dim() == 2 else int(y.max()) + 1)


def _applied(fn: Callable[..., Tensor], tensor: Tensor) -> Tensor:
    made = fn(tensor)
    narrower = made.is_floating_point() and made.element_size() < 4 <= tensor.element_size()
    return tensor.to(made.device) if narrower else made


def nll(log_probs: Tensor, y: Tensor) -> Tensor:
    """Mean negative log-likelihood of log-probabilities (B, C) for labels (B,) or soft labels (B, C); 0 if B is 0."""
    if not len(y):
        return log_probs.sum() * 0
    if y.dim() == 2:
        return -(F.pad(y, (0, log_probs.shape[1] - y.shape[1])) * log_probs).sum(-1).mean()
    return F.nll_loss(log_probs, y.long())


def sample_ids(ids: Tensor | Sequence[int] | int) -> Tensor:
    """Ids (n,) int64 from a tensor, a sequence or one id.

    Raises:
        ShapeError: they are no whole numbers: rounded, a fraction or a mask would name other samples.
    """
    try:
        given = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(f"ids must be whole numbers, not {type(ids).__name__} ({error})") from None
    if given.numel() and (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool):
        raise ShapeError(f"ids must be whole numbers, not {given.dtype}")
    if given.dim() > 1:
        raise ShapeError(f"ids must be of shape (n,), not {tuple(given.shape)}")
    return given.long().reshape(-1)


def one_of(head: str, option: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless ``value`` is one of the words allowed for a head's option."""
    if value not in allowed:
        raise ConfigError(f"head {head!r}: {option} must be one of {', '.join(allowed)}, got {value!r}")


def positive(head: str, option: str, value: Any, *, integer: bool = False, zero: bool = False) -> None:
    """Raise `ConfigError` unless ``value`` is a number above zero (or zero, where ``zero``), or a whole one."""
    kinds = (int,) if integer else (int, float)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if (
        not number
        or not math.isfinite(value)
        or value < 0
        or (value == 0 and not zero)
        or (integer and value < 1 - zero)
    ):
        least = "0 or more" if zero else ("1 or more" if integer else "above 0")
        kind = "a whole number" if integer else "a number"
        raise ConfigError(f"head {head!r}: {option} must be {kind} {least}, got {value!r}")
