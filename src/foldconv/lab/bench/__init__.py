"""What the methods cost: paired measurements in one process, kept as JSON, drawn as a picture."""
