"""Object detection as a downstream task: the objects of images, detectors trained on them, and how they are scored."""
