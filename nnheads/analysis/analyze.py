"""A model under the papers' questions: at which layer do classical classifiers answer as the model itself does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nnheads.analysis.agreement import agreement, kl_divergence
from nnheads.analysis.layers import OUTPUT, default_layers, layer_embeddings
from nnheads.analysis.probes import KINDS, Kind, probe
from nnheads.devices import Precision
from nnheads.errors import ConfigError
from nnheads.functional import Metric
from nnheads.headed import HeadedModel
from nnheads.loaders import Data

Report = Callable[[str, int, int], None]


def analyze(
    model: HeadedModel,
    train: Data,
    test: Data,
    layers: Sequence[str] | None = None,
    *,
    kinds: Sequence[Kind] = KINDS,
    k: int = 30,
    metric: Metric = "l1",
    batch_size: int = 256,
    device: str = "auto",
    precision: Precision = "float32",
    iterations: int = 300,
    seed: int = 0,
    report: Report | None = None,
) -> dict[str, Any]:
    """Fits classical classifiers on every layer, and says how far they answer as the model does ("DNN or k-NN").

    Args:
        model: in evaluation mode while this runs.
        train: what the classifiers are fitted on.
        test: what is judged.
        layers: see `layer_embeddings`; by default `default_layers`.
        kinds: of `probe`.
        k, metric: of the kNN vote.
        batch_size, device, precision: as in `layer_embeddings`.
        iterations, seed: of `probe`.
        report: called with what is being done, how much is done, and how much there is.

    Returns:
        ``accuracy`` of the model, ``train`` and ``test``, numbers of images, and ``rows``: for each ``layer`` and
        ``kind`` its ``width``, ``accuracy``, ``p_same``, ``mc``, ``me`` and ``kl``, the divergence D_KL(M || model) in
        nats (None where it is infinite).

    Raises:
        ConfigError: no layer, or none that is known.
        DataError: there are no images.
    """
    names = list(default_layers(model) if layers is None else layers)
    if not names:
        raise ConfigError("analyze: the model has no layers to look at: name them")
    told = report or (lambda what, done, total: None)
    options: dict[str, Any] = {"batch_size": batch_size, "device": device, "precision": precision}
    told("embedding the training images", 0, 0)
    with (
        layer_embeddings(model, train, names, **options) as known,
        layer_embeddings(model, test, names, **options) as asked,
    ):
        log_probs: Tensor = asked[OUTPUT].log_softmax(1)  # those of a head stay as they are
        predicted = log_probs.argmax(1)
        rows = []
        for number, (layer, kind) in enumerate([(layer, kind) for layer in names for kind in kinds]):
            told(f"fitting {kind} on {layer}", number, len(names) * len(kinds))
            fitted = probe(
                known[layer],
                known.labels,
                kind,
                num_classes=log_probs.shape[1],
                k=k,
                metric=metric,
                iterations=iterations,
                seed=seed,
            )
            same = agreement(predicted, fitted.predict(asked[layer]), asked.labels)
            divergence = kl_divergence(fitted.log_probs(asked[layer]), log_probs)
            rows.append(
                {
                    "layer": layer,
                    "kind": kind,
                    "width": known[layer].shape[1],
                    "accuracy": same.other_accuracy,
                    "p_same": same.p_same,
                    "mc": same.mc,
                    "me": same.me,
                    "kl": divergence if divergence < float("inf") else None,
                }
            )
        right = float((predicted == asked.labels).double().mean())
        return {"accuracy": right, "train": len(known.labels), "test": len(asked.labels), "rows": rows}
