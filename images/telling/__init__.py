"""Last: the generated pages that tell people of all that."""
