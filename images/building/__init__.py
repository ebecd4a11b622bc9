"""Second: from a lock to an image, its layers, and what they weigh."""
