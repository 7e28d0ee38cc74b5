"""The laboratory: networks, data, training, comparisons, measurements, the command line. Nothing below imports it."""
