"""Images to pixels with numpy and the standard library alone, for a device without Pillow.

Decoders (`decode`) and the resize (`resample`) give the pixels that Pillow gives, bit by bit; tests hold them to it.
"""
