"""Fourth: from a proved image to a registry, and the check of what is there."""
