"""What is done to a whole network: one operation a file; the public names are the package's."""
