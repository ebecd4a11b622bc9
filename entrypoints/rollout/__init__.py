"""What every image carries to say what it is and to prove that it works. Begin with cli.py."""
