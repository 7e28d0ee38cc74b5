"""From a trained network to a file that runs on a device: a runtime a file, and what is done for all of them."""
