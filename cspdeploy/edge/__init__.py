"""What an application imports. Needs numpy and onnxruntime, and Pillow for image files; neither torch nor onnx.

`Predictor.open("exported/cspdarknet53", artifact="onnx-int8")("photo.jpg")[0].label`, and of a detector
`[(box.label, box.left, box.top, box.right, box.bottom) for box in predictor("photo.jpg")]`; of a segmenter
`predictor.segment("photo.jpg")`, the class of every pixel.
"""

from cspdeploy.core.errors import CspDeployError, InputError
from cspdeploy.edge.predictor import Predictor
from cspdeploy.edge.results import DetectedBox, Detections, Prediction, Result, StreamItem

__all__ = [
    "CspDeployError", "DetectedBox", "Detections", "InputError", "Prediction", "Predictor", "Result", "StreamItem",
]  # fmt: skip
