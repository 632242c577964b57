"""Proof and timing. Reads bundles; knows neither torch nor onnx."""
