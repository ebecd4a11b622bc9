"""Third: what an image has shown, and what that is worth today."""
