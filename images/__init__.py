"""The line: catalog file, lock, image, proof, registry. One module for each station."""
