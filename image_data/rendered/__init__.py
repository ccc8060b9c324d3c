"""The procedural data set ``rendered:`` (papers.md 4.15, after Newell & Deng): images with aligned targets."""
