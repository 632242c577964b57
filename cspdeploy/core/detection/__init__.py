"""Boxes: from the raw maps of detection heads to boxes in a picture, with numpy alone.

One set of functions, which the edge side, the checks, the choice of INT8 and the report share. Legend of shapes in all
files of this folder: N images, A candidates (anchors of all cells of all heads, in the order of the heads), C classes,
M boxes that are left, H height, W width. Boxes are `[left, top, right, bottom]`.
"""
