"""image_data."""
