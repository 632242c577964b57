"""Where an artifact leaves the original: the first node, in graph order, and what it does."""

from cspdeploy.check.blame.finding import BlamedNode, BlameReport, TensorError
from cspdeploy.check.blame.prepare import BlameRequest
from cspdeploy.check.blame.search import blame, layer_curve

__all__ = ["BlameReport", "BlameRequest", "BlamedNode", "TensorError", "blame", "layer_curve"]
