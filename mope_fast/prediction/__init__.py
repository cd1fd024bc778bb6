"""Inference with trained models: samples in, classes out."""

from .predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
