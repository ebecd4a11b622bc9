"""What an engine offers, read from its published sources alone; the engine is not imported."""
