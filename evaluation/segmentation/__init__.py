"""Semantic segmentation by fine-tuning: a class for every pixel, on Cityscapes or on the rendered images.

``task.py`` is the task, ``problem.py`` what a worker trains, ``deeplab.py`` the networks, ``augment.py`` the training
views, ``metric.py`` the scores, ``figures.py`` the pictures.
"""
