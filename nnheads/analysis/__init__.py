"""What heads and networks agree on, layer by layer; and what their answers are worth."""

from nnheads.analysis.agreement import Agreement, agreement, kl_divergence
from nnheads.analysis.analyze import analyze
from nnheads.analysis.layers import LayerEmbeddings, default_layers, layer_embeddings
from nnheads.analysis.measures import Calibration, Roc, calibration, confusion, embedding_neighbors, retrieval, roc
from nnheads.analysis.probes import KINDS, Probe, knn_predictions, probe

__all__ = [
    "KINDS",
    "Agreement",
    "Calibration",
    "LayerEmbeddings",
    "Probe",
    "Roc",
    "agreement",
    "analyze",
    "calibration",
    "confusion",
    "default_layers",
    "embedding_neighbors",
    "kl_divergence",
    "knn_predictions",
    "layer_embeddings",
    "probe",
    "retrieval",
    "roc",
]
