"""What an application imports. Needs numpy and onnxruntime, and Pillow for image files; neither torch nor onnx.

`Predictor.open("exported/cspdarknet53", artifact="onnx-int8")("photo.jpg")[0].label`
"""

from cspdeploy.core.errors import CspDeployError, InputError
from cspdeploy.edge.predictor import Predictor
from cspdeploy.edge.results import Prediction, Result, StreamItem

__all__ = ["CspDeployError", "InputError", "Prediction", "Predictor", "Result", "StreamItem"]
