"""First on the line: what an image is made of, exactly. From a catalog file to a lock."""
