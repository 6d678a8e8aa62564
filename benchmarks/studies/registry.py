"""The studies by name."""

from __future__ import annotations

import importlib
from typing import Final

from nnheads.benchmarks.studies.study import Study
from nnheads.errors import unknown_name

STUDIES: Final[dict[str, str]] = {
    "conv-knn": "conv_knn",
    "dnn-or-knn": "dnn_or_knn",
    "dnn-knn-svm-lr": "dnn_knn_svm_lr",
    "nngk": "nngk",
    "impostor": "impostor",
    "biased": "biased",
    "training-practice": "training_practice",
}
"""The module that declares each study as ``STUDY``."""


def list_studies() -> list[str]:
    """The names that `get_study` takes."""
    return list(STUDIES)


def get_study(name: str) -> Study:
    """A study by its name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name not in STUDIES:
        raise unknown_name("study", name, STUDIES)
    study: Study = importlib.import_module(f"nnheads.benchmarks.studies.{STUDIES[name]}").STUDY
    study.check()
    return study
