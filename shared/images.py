"""stub"""
import cv2
import numpy as np
def decode_image(data, *, field="image", max_pixels=40_000_000):
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
