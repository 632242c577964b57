"""What an application imports: `Predictor`. Needs numpy, Pillow and onnxruntime; neither torch nor onnx."""

from cspdeploy.edge.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
