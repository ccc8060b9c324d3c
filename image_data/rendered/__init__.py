"""The procedural data set ``rendered:`` (after Newell & Deng, CVPR 2020): images with aligned targets."""
