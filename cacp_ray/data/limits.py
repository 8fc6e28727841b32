"""Sizes above which an image is taken for a mistake; a module that is imported fast."""

MAX_PIXELS = 2**26  # of an image: 192 MiB once it is decoded
MAX_SIDE = 8192  # of resized and cropped images
