"""Using what was trained: samples in, classes out."""

from .predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
