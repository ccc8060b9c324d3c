"""Label efficiency: how many labels pretraining is worth (being written by the main engineer)."""
